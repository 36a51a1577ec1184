//! One word that callers change: a [`Pace`] for many threads, paced or not.
//!
//! 1. With a flag set the word is above every state, and callers go to the queue's lock.
//! 2. `WAITERS` is set while somebody waits, `BUSY` while the pace is being changed; both are set and cleared under the
//!    lock.
//! 3. The pace lies in two words that change only while `BUSY` is set: who reads them between reading the word and
//!    swapping it has read them whole, or fails to swap.

use super::pace::{Pace, Take};
use super::shell::{Facts, Meter};
use crate::internal::queue::Queue;
use crate::internal::sync::{AcqRel, Acquire, AtomicU64, Relaxed, Release};
use crate::internal::time::Moment;

const WAITERS: u64 = 1 << 62;
const BUSY: u64 = 1 << 63;
const STATE: u64 = WAITERS - 1;

#[derive(Debug)]
pub(super) struct Word<const PACED: bool> {
    /// Up to when the tokens are spoken for, and the two flags.
    cell: AtomicU64,
    multiplier: AtomicU64,
    shape: AtomicU64,
}

fn shape(pace: Pace) -> u64 {
    u64::from(pace.bits) << 32 | u64::from(pace.burst)
}

impl<const PACED: bool> Word<PACED> {
    /// A full bucket.
    pub(super) fn new(pace: Pace) -> Self {
        Self::in_state(pace, 0)
    }

    pub(super) fn in_state(pace: Pace, state: u64) -> Self {
        Self {
            cell: AtomicU64::new(state),
            multiplier: AtomicU64::new(pace.multiplier),
            shape: AtomicU64::new(shape(pace)),
        }
    }

    #[inline]
    pub(super) fn pace(&self) -> Pace {
        let shape = self.shape.load(Relaxed);
        Pace {
            multiplier: self.multiplier.load(Relaxed),
            bits: (shape >> 32) as u32,
            burst: shape as u32,
            paced: PACED,
        }
    }

    /// The state, if nobody waits and the pace is not being changed.
    pub(super) fn at_rest(&self) -> Option<u64> {
        Some(self.cell.load(Acquire)).filter(|word| *word <= STATE)
    }

    fn state(&self) -> u64 {
        self.cell.load(Acquire) & STATE
    }

    /// Changes the pace, with the lock held. What is there stays there.
    pub(super) fn set_pace(&self, now: Moment, new: Pace) {
        let old = self.pace();
        let before = self.cell.fetch_or(BUSY, AcqRel);
        self.multiplier.store(new.multiplier, Relaxed);
        self.shape.store(shape(new), Relaxed);
        // One unit, less than a nanosecond, in the callers' favour each time: a rate that changes there and back ends
        // below the word from before, by which somebody might swap in a state of the other pace.
        let state = old.convert(before & STATE, now, new).saturating_sub(1);
        let state = if state == before & STATE { state.saturating_sub(1) } else { state };
        self.cell.store(before & WAITERS | state, Release);
    }

    /// Changes the state, with the lock held: the flags stay as they are.
    fn update(&self, change: impl Fn(u64) -> Take) -> Take {
        let mut seen = self.cell.load(Acquire);
        loop {
            let next = match change(seen & STATE) {
                Take::Now(next) => next,
                later @ Take::At(_) => return later,
            };
            match self.cell.compare_exchange_weak(seen, seen & !STATE | next, AcqRel, Acquire) {
                Ok(_) => return Take::Now(next),
                Err(actual) => seen = actual,
            }
        }
    }
}

impl<const PACED: bool> Meter for Word<PACED> {
    type Locked = ();

    #[inline]
    fn take_at_once(&self, now: Moment, cost: u32) -> Option<u64> {
        let mut seen = self.cell.load(Acquire);
        while seen <= STATE {
            let pace = self.pace();
            // Neither nothing nor more than the burst.
            if cost.wrapping_sub(1) >= pace.burst {
                break;
            }
            let next = pace.take_now(seen, now, cost)?;
            match self.cell.compare_exchange_weak(seen, next, AcqRel, Acquire) {
                Ok(_) => return Some(next),
                Err(actual) => seen = actual,
            }
        }
        None
    }

    fn fits_at_once(&self, now: Moment, cost: u32) -> bool {
        // A pace that is read half while it changes goes with no word that is still there.
        self.at_rest().is_some_and(|state| {
            let pace = self.pace();
            cost.wrapping_sub(1) < pace.burst
                && pace.take_now(state, now, cost).is_some()
                && self.at_rest() == Some(state)
        })
    }

    fn set_waiting(&self, waiting: bool) {
        if waiting {
            self.cell.fetch_or(WAITERS, AcqRel);
        } else {
            self.cell.fetch_and(!WAITERS, Release);
        }
    }

    fn largest(&self, (): &()) -> u32 {
        self.pace().largest()
    }

    fn take(&self, (): &mut (), now: Moment, cost: u32) -> Take {
        let pace = self.pace();
        self.update(|state| pace.take(state, now, 0, cost))
    }

    fn take_as_told(&self, (): &mut (), now: Moment, cost: u32) -> Take {
        let pace = self.pace();
        self.update(|state| pace.take_as_told(state, now, cost))
    }

    fn due(&self, (): &mut (), queue: &Queue, now: Moment, cost: u32) -> Moment {
        match self.pace().take(self.state(), now, queue.weight(), cost) {
            Take::At(due) => due,
            Take::Now(_) => now,
        }
    }

    /// Only if nobody has taken since: tokens that came in between may have been for the place of these.
    fn undo(&self, (): &mut (), taken: u64, cost: u32) {
        let back = self.pace().put_back(taken, cost);
        let _always = self.update(|state| Take::Now(if state == taken { back } else { state }));
    }

    fn put_back(&self, (): &mut (), _: Moment, _: Option<u64>, tokens: u32) {
        let pace = self.pace();
        let _always = self.update(|state| Take::Now(pace.put_back(state, tokens)));
    }

    fn charge(&self, (): &mut (), now: Moment, tokens: u32) {
        let pace = self.pace();
        let _always = self.update(|state| Take::Now(pace.charge(state, now, tokens)));
    }

    fn facts(&self, (): &mut (), now: Moment) -> Facts {
        let (pace, state) = (self.pace(), self.state());
        Facts {
            limit: pace.burst.into(),
            remaining: pace.available(state, now).into(),
            window: pace.fill_time(),
            reset: pace.reset(state, now),
        }
    }
}
