//! What a closed circuit counts, without a lock: over a time, over the last calls, or in a row.

use crate::internal::sync::{AtomicI64, AtomicU8, AtomicU64, Relaxed};
use crate::internal::time::Moment;
use crate::internal::window::Window;

const GOOD: usize = 0;
const BAD: usize = 1;
const SLOW: usize = 2;

/// The counts of a window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) calls: u64,
    pub(super) failures: u64,
    pub(super) slow: u64,
}

/// One call's result, as it is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sample {
    pub(super) good: bool,
    pub(super) slow: bool,
}

#[derive(Debug)]
pub(super) enum Tally {
    /// Over the last stretch of time.
    Time(Window<3>),
    /// Over the last N calls.
    Calls(Ring),
    /// Nothing: only failures in a row matter.
    Nothing,
}

impl Tally {
    /// One of the same shape with nothing in it.
    pub(super) fn another(&self) -> Self {
        match self {
            Self::Time(window) => Self::Time(window.another()),
            Self::Calls(ring) => Self::Calls(Ring::new(ring.places.len() as u32)),
            Self::Nothing => Self::Nothing,
        }
    }

    /// Over how many calls it counts; 0 if not over calls.
    pub(super) fn places(&self) -> usize {
        match self {
            Self::Calls(ring) => ring.places.len(),
            Self::Time(_) | Self::Nothing => 0,
        }
    }

    /// Counts a call that went well and quickly: what almost all calls do.
    #[inline]
    pub(super) fn add_good(&self, now: Moment) {
        match self {
            Self::Time(window) => window.add(GOOD, now),
            Self::Calls(ring) => ring.add(Sample { good: true, slow: false }),
            Self::Nothing => {}
        }
    }

    pub(super) fn add(&self, sample: Sample, now: Moment) {
        match self {
            Self::Time(window) => {
                window.add(if sample.good { GOOD } else { BAD }, now);
                if sample.slow {
                    window.add(SLOW, now);
                }
            }
            Self::Calls(ring) => ring.add(sample),
            Self::Nothing => {}
        }
    }

    pub(super) fn counts(&self, now: Moment) -> Counts {
        match self {
            Self::Time(window) => {
                let [good, failures, slow] = window.sum(now);
                Counts { calls: good + failures, failures, slow }
            }
            Self::Calls(ring) => ring.counts(),
            Self::Nothing => Counts::default(),
        }
    }

    pub(super) fn clear(&self) {
        match self {
            Self::Time(window) => window.clear(),
            Self::Calls(ring) => ring.clear(),
            Self::Nothing => {}
        }
    }
}

/// The results of the last N calls, one byte each.
///
/// A call takes the next place and swaps its byte in; what it took out is subtracted from the totals. The totals are
/// therefore those of the bytes in the ring, whatever the order of the swaps; while swaps are under way they may be off
/// by one each. In a ring full of good calls a good call changes no total.
#[derive(Debug)]
pub(super) struct Ring {
    next: AtomicU64,
    places: Box<[AtomicU8]>,
    calls: AtomicI64,
    failures: AtomicI64,
    slow: AtomicI64,
}

const FILLED: u8 = 1;
const FAILED: u8 = 2;
const SLOWED: u8 = 4;

impl Ring {
    pub(super) fn new(places: u32) -> Self {
        Self {
            next: AtomicU64::new(0),
            places: (0..places).map(|_| AtomicU8::new(0)).collect(),
            calls: AtomicI64::new(0),
            failures: AtomicI64::new(0),
            slow: AtomicI64::new(0),
        }
    }

    #[inline(never)]
    fn add(&self, sample: Sample) {
        let new = FILLED | if sample.good { 0 } else { FAILED } | if sample.slow { SLOWED } else { 0 };
        let place = self.next.fetch_add(1, Relaxed) % self.places.len() as u64;
        let old = self.places[place as usize].swap(new, Relaxed);
        for (total, bit) in [(&self.calls, FILLED), (&self.failures, FAILED), (&self.slow, SLOWED)] {
            match (old & bit != 0, new & bit != 0) {
                (false, true) => total.fetch_add(1, Relaxed),
                (true, false) => total.fetch_sub(1, Relaxed),
                _ => continue,
            };
        }
    }

    fn counts(&self) -> Counts {
        let read = |total: &AtomicI64| total.load(Relaxed).max(0) as u64;
        Counts { calls: read(&self.calls), failures: read(&self.failures), slow: read(&self.slow) }
    }

    fn clear(&self) {
        for place in &self.places {
            let old = place.swap(0, Relaxed);
            for (total, bit) in [(&self.calls, FILLED), (&self.failures, FAILED), (&self.slow, SLOWED)] {
                if old & bit != 0 {
                    total.fetch_sub(1, Relaxed);
                }
            }
        }
    }
}

#[cfg(all(test, not(resile_loom)))]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn threads_leave_the_totals_those_of_the_ring() {
        let ring = Ring::new(64);
        std::thread::scope(|scope| {
            for thread in 0..4_u32 {
                let ring = &ring;
                scope.spawn(move || {
                    (0..10_000).for_each(|n| ring.add(Sample { good: (n + thread) % 3 > 0, slow: n % 5 == 0 }));
                });
            }
        });
        let bytes: Vec<u8> = ring.places.iter().map(|place| place.load(Relaxed)).collect();
        let count = |bit| bytes.iter().filter(|byte| **byte & bit != 0).count() as u64;
        assert_eq!(ring.counts(), Counts { calls: count(FILLED), failures: count(FAILED), slow: count(SLOWED) });
        ring.clear();
        assert_eq!(ring.counts(), Counts::default());
    }

    proptest! {
        #[test]
        fn the_ring_counts_like_a_list_of_the_last_calls(samples in proptest::collection::vec(any::<(bool, bool)>(), 0..100), places in 1_u32..20) {
            let ring = Ring::new(places);
            let mut list = VecDeque::new();
            for (good, slow) in samples {
                ring.add(Sample { good, slow });
                list.push_back((good, slow));
                if list.len() > places as usize {
                    list.pop_front();
                }
                let counts = Counts {
                    calls: list.len() as u64,
                    failures: list.iter().filter(|(good, _)| !good).count() as u64,
                    slow: list.iter().filter(|(_, slow)| *slow).count() as u64,
                };
                prop_assert_eq!(ring.counts(), counts);
            }
        }
    }
}
