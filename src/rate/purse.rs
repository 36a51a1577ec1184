//! Tokens that threads take ahead of their callers, so that most calls change no word that other threads change.
//!
//! Each thread that owns a [stripe](crate::internal::stripe) has a purse that nobody else touches, so that spending from
//! it takes no locked instruction. Threads that own none have no purse.

use crate::internal::stripe::SHARED;
use crate::internal::sync::{AtomicU64, Relaxed};

#[derive(Debug)]
pub(super) struct Purses {
    /// The most that a purse holds.
    batch: u32,
    purses: Box<[Purse]>,
}

/// On a cache line of its own, and on none that is fetched along with another's.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Purse(AtomicU64);

impl Purses {
    /// Empty ones, for so many stripes.
    pub(super) fn new(batch: u32, stripes: usize) -> Self {
        Self { batch, purses: (0..stripes).map(|_| Purse(AtomicU64::new(0))).collect() }
    }

    pub(super) const fn batch(&self) -> u32 {
        self.batch
    }

    /// Takes so many out of this thread's purse, if they are there.
    #[inline]
    pub(super) fn spend(&self, stripe: usize, cost: u32) -> bool {
        let Some(Purse(held)) = self.purses.get(stripe) else { return false };
        let left = held.load(Relaxed).checked_sub(cost.into()).filter(|_| cost > 0);
        left.is_some_and(|left| {
            held.store(left, Relaxed);
            true
        })
    }

    /// Whether so many are there.
    pub(super) fn can_spend(&self, stripe: usize, cost: u32) -> bool {
        (1..=self.held(stripe)).contains(&cost)
    }

    /// How many more this thread's purse can hold.
    pub(super) fn room(&self, stripe: usize) -> u32 {
        if stripe == SHARED { 0 } else { self.batch.saturating_sub(self.held(stripe)) }
    }

    /// Puts so many, for which there is room, into this thread's purse.
    pub(super) fn fill(&self, stripe: usize, tokens: u32) {
        debug_assert!(tokens <= self.room(stripe), "{tokens} into {self:?}");
        if let Some(Purse(held)) = self.purses.get(stripe) {
            held.store(held.load(Relaxed) + u64::from(tokens), Relaxed);
        }
    }

    /// How many all threads hold.
    #[cfg(test)]
    pub(super) fn all(&self) -> u32 {
        (0..self.purses.len()).map(|stripe| self.held(stripe)).sum()
    }

    fn held(&self, stripe: usize) -> u32 {
        self.purses.get(stripe).map_or(0, |Purse(held)| held.load(Relaxed) as u32)
    }
}
