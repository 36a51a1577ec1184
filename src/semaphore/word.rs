//! The word of a semaphore: limit, permits in use and two flags, changed together by one compare-and-swap.
//!
//! ```text
//! 63      62       61..31   30..0
//! closed  waiters  in use   limit
//! ```
//!
//! 1. The waiters flag is set and cleared under the queue's lock. While it is set, nobody takes a permit past the queue.
//! 2. Whoever gives permits back and then sees the flag serves the queue. Since flag and count are one word, a waiter
//!    either sees the permits or is seen.

/// The most permits a semaphore can have.
pub(crate) const MOST_PERMITS: u32 = (1 << 31) - 1;

const FIELD: u64 = MOST_PERMITS as u64;
const IN_USE: u32 = 31;
pub(crate) const WAITERS: u64 = 1 << 62;
pub(crate) const CLOSED: u64 = 1 << 63;

/// So many permits in use, as they are added to the word.
pub(crate) const fn in_use(permits: u32) -> u64 {
    (permits as u64) << IN_USE
}

/// A reading of the word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Word(pub(crate) u64);

impl Word {
    pub(crate) const fn of(limit: u32) -> Self {
        Self(limit as u64)
    }

    pub(crate) const fn limit(self) -> u32 {
        (self.0 & FIELD) as u32
    }

    pub(crate) const fn in_use(self) -> u32 {
        ((self.0 >> IN_USE) & FIELD) as u32
    }

    pub(crate) const fn available(self) -> u32 {
        self.limit().saturating_sub(self.in_use())
    }

    pub(crate) const fn is_closed(self) -> bool {
        self.0 & CLOSED != 0
    }

    pub(crate) const fn has_waiters(self) -> bool {
        self.0 & WAITERS != 0
    }

    /// The word with `permits` more in use, if they are free.
    pub(crate) const fn take(self, permits: u32) -> Option<Self> {
        // Two fields below 2^31 don't overflow a u64's half.
        if self.in_use() as u64 + permits as u64 <= self.limit() as u64 {
            Some(Self(self.0 + in_use(permits)))
        } else {
            None
        }
    }

    pub(crate) const fn with_limit(self, limit: u32) -> Self {
        Self(self.0 & !FIELD | limit as u64)
    }
}
