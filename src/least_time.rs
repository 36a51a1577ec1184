//! [`LeastTime`]: how much time an operation needs, so that none is made that its caller cannot wait for.
//!
//! Under overload a first-come queue hands permits to calls that have almost no time left. Their operations are cut by
//! the call's limit, the peer's work is wasted, and the next call in line is as late. A policy therefore learns how long
//! its operations take, and makes no operation after a wait, and no further attempt, that has less time than that.
//!
//! The estimate is a peak that rises fast and falls slowly: a longer sample moves it half-way up, a shorter one a
//! thirty-second of the way down. An operation that a limit cut counts with twice the time it ran, because nobody knows
//! how long it would have taken; leaving cut operations out would make a sample of survivors. A quarter is added as a
//! margin, and the estimate never exceeds the shortest limit of the policy.
//!
//! Two rules keep a wrong estimate from locking everything out. It applies only to operations that waited or that repeat
//! an attempt. And if no sample has come for as long as a call may last, the next operation is made as a probe, however
//! late it is; the sample after a probe moves the estimate half-way down, too.
//!
//! Only operations that waited are sampled, so a policy without contention writes to no shared word.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Duration;

use crate::internal::time::{Moment, nanos};

/// The wait for a sample before a probe, for a policy without a time limit.
const DEFAULT_PATIENCE: u64 = 1_000_000_000;

/// What a policy knows of the time its operations need.
#[derive(Debug)]
pub(crate) struct LeastTime {
    /// Whether the time is learned. If not, `fixed` holds.
    learns: bool,
    /// What the user fixed, in nanoseconds; 0 while it is learned.
    fixed: u64,
    /// The shortest time limit of the policy, in nanoseconds; `u64::MAX` if it has none.
    cap: u64,
    /// How long after the last sample a probe may start, in nanoseconds.
    patience: u64,
    /// The estimate in nanoseconds and one; 0 while nothing is known. Threads may overwrite each other's samples: an
    /// estimate needs no exact count.
    takes: AtomicU64,
    /// The last sample or probe.
    sampled: AtomicU64,
    /// A probe is on its way: the estimate is in doubt.
    probing: AtomicBool,
}

impl LeastTime {
    /// For a policy with these time limits, outermost first: learned, or fixed by the user.
    pub(crate) fn new(limits: impl Iterator<Item = u64>, fixed: Option<Duration>) -> Self {
        let (mut cap, mut outermost) = (u64::MAX, None);
        for limit in limits {
            cap = cap.min(limit);
            outermost = outermost.or((limit < u64::MAX).then_some(limit));
        }
        Self {
            learns: fixed.is_none(),
            fixed: fixed.map_or(0, nanos),
            cap,
            patience: outermost.unwrap_or(DEFAULT_PATIENCE),
            takes: AtomicU64::new(0),
            sampled: AtomicU64::new(0),
            probing: AtomicBool::new(false),
        }
    }

    /// Of no policy: nothing is known and nothing is required.
    pub(crate) const fn none() -> Self {
        Self {
            learns: false,
            fixed: 0,
            cap: u64::MAX,
            patience: DEFAULT_PATIENCE,
            takes: AtomicU64::new(0),
            sampled: AtomicU64::new(0),
            probing: AtomicBool::new(false),
        }
    }

    /// The time in nanoseconds that the user fixed, which holds for first attempts without a wait, too; else 0.
    #[inline]
    pub(crate) const fn fixed(&self) -> u64 {
        self.fixed
    }

    /// The time in nanoseconds that an operation must have before its deadline.
    pub(crate) fn required(&self) -> u64 {
        if !self.learns {
            return self.fixed;
        }
        // What was ready at once left the smallest sample, and needs no time.
        let takes = self.takes.load(Relaxed).saturating_sub(1);
        takes.saturating_add(takes.min(self.cap.saturating_sub(takes)) / 4)
    }

    /// Whether an operation may be made with so little time only because no sample has come for long.
    pub(crate) fn is_probe_due(&self, now: Moment) -> bool {
        if !self.learns {
            return false;
        }
        // A runtime whose clock is behind finds the last sample in its future: that is no recent sample either.
        let sampled = Moment::from_nanos(self.sampled.load(Relaxed));
        now.nanos_since(sampled).max(sampled.nanos_since(now)) > self.patience
    }

    /// Whether an operation that begins at `now` has enough time, or may begin as a probe.
    pub(crate) fn leaves_room(&self, now: Moment, ends: Moment) -> bool {
        self.is_enough(now, ends) || self.is_probe_due(now)
    }

    fn is_enough(&self, now: Moment, ends: Moment) -> bool {
        ends == Moment::NEVER || ends.nanos_since(now) >= self.required()
    }

    /// An operation begins: with too little time it is the probe, and no other one is due for a while.
    pub(crate) fn start(&self, now: Moment, ends: Moment) {
        if self.learns && !self.is_enough(now, ends) {
            self.sampled.store(now.nanos(), Relaxed);
            self.probing.store(true, Relaxed);
        }
    }

    /// Notes how long an operation took, or ran until a limit cut it.
    pub(crate) fn sample(&self, took: u64, was_cut: bool, now: Moment) {
        if !self.learns {
            return;
        }
        let sample = if was_cut { took.saturating_mul(2) } else { took }.min(self.cap).saturating_add(1);
        let takes = self.takes.load(Relaxed);
        let next = if takes == 0 {
            sample
        } else if sample > takes {
            takes + (sample - takes) / 2
        } else if self.probing.load(Relaxed) {
            takes - (takes - sample) / 2
        } else {
            takes - (takes - sample) / 32
        };
        self.probing.store(false, Relaxed);
        self.takes.store(next, Relaxed);
        self.sampled.store(now.nanos(), Relaxed);
    }
}

#[cfg(all(test, not(resile_loom)))]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn learned(limits: &[u64]) -> LeastTime {
        LeastTime::new(limits.iter().map(|limit| limit * MS), None)
    }

    #[test]
    fn nothing_is_required_before_the_first_sample() {
        let least = learned(&[1000]);
        assert!(least.leaves_room(Moment::at(0), Moment::at(1)));
    }

    #[test]
    fn it_rises_by_halves_and_falls_by_thirty_seconds() {
        let least = learned(&[10_000]);
        least.sample(100 * MS, false, Moment::at(0));
        assert_eq!(least.required(), 125 * MS);
        least.sample(300 * MS, false, Moment::at(0));
        assert_eq!(least.required(), 250 * MS, "200 and a quarter");
        least.sample(136 * MS, false, Moment::at(0));
        assert_eq!(least.required(), 198 * MS * 5 / 4);
    }

    #[test]
    fn a_cut_operation_counts_twice_and_never_more_than_the_shortest_limit() {
        let least = learned(&[1000, 300]);
        least.sample(100 * MS, true, Moment::at(0));
        assert_eq!(least.required(), 225 * MS, "200, and a quarter of the 100 up to the limit");
        for _ in 0..100 {
            least.sample(300 * MS, true, Moment::at(0));
        }
        assert!(least.required() <= 300 * MS);
    }

    #[test]
    fn one_probe_starts_when_no_sample_has_come_for_a_whole_call() {
        let least = learned(&[1000, 300]);
        let at = |millis: u64| Moment::at(millis * MS);
        least.sample(300 * MS, false, at(0));
        assert!(!least.leaves_room(at(1000), at(1100)));
        assert!(least.leaves_room(at(1001), at(1100)), "the probe");
        least.start(at(1001), at(1100));
        assert!(!least.leaves_room(at(1002), at(1100)), "one is enough");
        assert!(least.leaves_room(at(2002), at(2100)));
        least.start(at(2002), at(2100));
        least.sample(100 * MS, false, at(2102));
        assert_eq!(least.required(), 225 * MS, "half-way down to 100, and a quarter of what is left up to the limit");
    }

    #[test]
    fn a_clock_that_is_behind_does_not_wait_for_the_time_of_the_last_sample() {
        let least = learned(&[1000]);
        least.sample(500 * MS, false, Moment::at(3600 * 1000 * MS));
        assert!(least.leaves_room(Moment::at(0), Moment::at(100 * MS)));
    }

    #[test]
    fn a_fixed_time_learns_nothing_and_has_no_probes() {
        let least = LeastTime::new(std::iter::once(1000 * MS), Some(Duration::from_millis(200)));
        least.sample(900 * MS, false, Moment::at(0));
        assert_eq!(least.required(), 200 * MS);
        assert!(!least.leaves_room(Moment::at(5000 * MS), Moment::at(5199 * MS)));
        assert!(least.leaves_room(Moment::at(5000 * MS), Moment::at(5200 * MS)));
    }
}
