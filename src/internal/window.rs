//! Counters over the last stretch of time, striped by thread.
//!
//! The stretch is cut into [`SLICES`] slices. A counter of a slice is one word that carries the slice's number beside
//! its count, so a word from a lap ago is seen as stale and started again by whoever adds next: nobody sweeps. Threads
//! add to [stripes](super::stripe) of their own; only a reader, who comes when something has failed, walks them all.
//!
//! 1. A stripe that a thread owns is written by that thread alone: it loads and stores. The words of the shared stripe
//!    change by compare-and-swap. So an add never lands in a slice it was not meant for, and none is lost.
//! 2. A window covers the running slice and the 15 before it: between 15/16 of its length and the whole of it.
//! 3. To forget, the slices are renumbered: no word is written by anybody but those who may.

use std::time::Duration;

use super::stripe::{self, SHARED};
use super::sync::{AtomicU64, Relaxed};
use super::time::{Moment, nanos};

/// A power of two, so that a slice's place is a mask away.
const SLICES: usize = 16;
/// The low bits of a word count, up to 268 million per slice and stripe; the high ones are the slice's number, which
/// comes round after 2 years for a window of 16 ms and after 50 days for the shortest of 1 ms.
const COUNT_BITS: u32 = 28;
const COUNT_MASK: u64 = (1 << COUNT_BITS) - 1;

/// Counts of `KINDS` kinds of event over a sliding stretch of time.
#[derive(Debug)]
pub(crate) struct Window<const KINDS: usize> {
    stripes: Box<[Stripe<KINDS>]>,
    /// The slice of a moment is `moment * multiplier >> 64`: a division by the slice's length without dividing.
    multiplier: u64,
    /// Added to the number of each slice.
    renumbered: AtomicU64,
    length: Duration,
}

/// Aligned to two cache lines, which is what x86 prefetches together.
#[derive(Debug)]
#[repr(align(128))]
struct Stripe<const KINDS: usize>([[AtomicU64; SLICES]; KINDS]);

impl<const KINDS: usize> Window<KINDS> {
    /// A window over `length`, which the caller has checked to be at least a millisecond.
    pub(crate) fn new(length: Duration) -> Self {
        let slice = nanos(length) / SLICES as u64;
        let multiplier = ((1_u128 << 64) / u128::from(slice)) as u64;
        let stripe = || Stripe(std::array::from_fn(|_| std::array::from_fn(|_| AtomicU64::new(0))));
        let stripes = (0..stripe::count()).map(|_| stripe()).collect();
        Self { stripes, multiplier, renumbered: AtomicU64::new(0), length }
    }

    /// An empty window over the same length.
    pub(crate) fn another(&self) -> Self {
        Self::new(self.length)
    }

    pub(crate) fn length(&self) -> Duration {
        self.length
    }

    /// Counts one event of `kind`.
    #[inline]
    pub(crate) fn add(&self, kind: usize, now: Moment) {
        let slice = self.slice(now);
        let stripe = stripe::own();
        let word = &self.stripes[stripe].0[kind][slice as usize % SLICES];
        let mut seen = word.load(Relaxed);
        if stripe != SHARED {
            if let Some(next) = plus_one(seen, slice) {
                word.store(next, Relaxed);
            }
            return;
        }
        while let Some(next) = plus_one(seen, slice) {
            match word.compare_exchange_weak(seen, next, Relaxed, Relaxed) {
                Ok(_) => return,
                Err(actual) => seen = actual,
            }
        }
    }

    /// The counts of each kind in the window that ends now.
    pub(crate) fn sum(&self, now: Moment) -> [u64; KINDS] {
        let newest = self.slice(now);
        let mut sums = [0; KINDS];
        for stripe in &self.stripes {
            for (sum, words) in sums.iter_mut().zip(&stripe.0) {
                for age in 0..SLICES as u64 {
                    let slice = newest.wrapping_sub(age);
                    let word = words[slice as usize % SLICES].load(Relaxed);
                    if word & !COUNT_MASK == slice << COUNT_BITS {
                        *sum += word & COUNT_MASK;
                    }
                }
            }
        }
        sums
    }

    /// Forgets everything.
    pub(crate) fn clear(&self) {
        self.renumbered.fetch_add(SLICES as u64, Relaxed);
    }

    #[inline]
    fn slice(&self, now: Moment) -> u64 {
        let slice = ((u128::from(now.nanos()) * u128::from(self.multiplier)) >> 64) as u64;
        slice.wrapping_add(self.renumbered.load(Relaxed))
    }
}

/// A counter with one more in this slice, or `None` if it is full.
#[inline]
fn plus_one(word: u64, slice: u64) -> Option<u64> {
    let tag = slice << COUNT_BITS;
    if word & !COUNT_MASK != tag {
        Some(tag | 1)
    } else if word & COUNT_MASK == COUNT_MASK {
        None
    } else {
        Some(word + 1)
    }
}

#[cfg(all(test, not(resile_loom)))]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_event_is_seen_for_the_length_of_the_window_and_not_longer() {
        let window = Window::<2>::new(Duration::from_secs(16));
        window.add(1, Moment::at(0));
        assert_eq!(window.sum(Moment::at(0)), [0, 1]);
        assert_eq!(window.sum(Moment::at(14_999_999_999)), [0, 1]);
        assert_eq!(window.sum(Moment::at(16_000_000_000)), [0, 0]);
    }

    #[test]
    fn threads_add_up_exactly() {
        let window = Window::<1>::new(Duration::from_secs(16));
        std::thread::scope(|scope| {
            // More than there are stripes, so that some share one.
            for _ in 0..40 {
                scope.spawn(|| (0..10_000).for_each(|_| window.add(0, Moment::at(1))));
            }
        });
        assert_eq!(window.sum(Moment::at(1)), [400_000]);
    }

    #[test]
    fn what_was_forgotten_does_not_come_back() {
        let window = Window::<1>::new(Duration::from_secs(16));
        (0..5).for_each(|_| window.add(0, Moment::at(1)));
        window.clear();
        assert_eq!(window.sum(Moment::at(1)), [0]);
        window.add(0, Moment::at(1));
        assert_eq!(window.sum(Moment::at(1)), [1]);
    }

    proptest! {
        /// Law: the sum lies between the events of the last 15/16 of the window and those of the whole of it.
        #[test]
        fn the_sum_is_between_that_of_the_shorter_and_the_longer_exact_window(
            steps in proptest::collection::vec((0_u64..3_000_000, 1_u8..4), 1..200),
        ) {
            let length = 16_000_000_u64;
            let window = Window::<1>::new(Duration::from_nanos(length));
            let mut events = VecDeque::new();
            let mut now = 5;
            for (step, count) in steps {
                now += step;
                for _ in 0..count {
                    window.add(0, Moment::at(now));
                    events.push_back(now);
                }
                let within = |span: u64| events.iter().filter(|at| now - **at < span).count() as u64;
                let sum = window.sum(Moment::at(now))[0];
                // A nanosecond of slack at either edge: a slice's border is a rounded product.
                prop_assert!(sum >= within(length / 16 * 15 - 1), "{sum} at {now}");
                prop_assert!(sum <= within(length + 1), "{sum} at {now}");
            }
        }
    }
}
