//! The sampling machine: when readings in a row flip a state, and how late a pulse is. Time is an argument.
//!
//! 1. A state flips to bad after `bad_after` bad readings in a row, and back after `good_after` good ones. A reading that
//!    is unclear ends either row and flips nothing.
//! 2. A pulse that comes late counts as all the pulses that it has swallowed, so that one long stall weighs as much as
//!    many short ones.

use std::time::Duration;

use super::{Signal, Symptom};
use crate::error::Faults;
use crate::internal::time::{Moment, nanos};

const LONGEST_ROW: u32 = 1000;

/// How many readings in a row it takes to flip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rows {
    pub(super) bad_after: u32,
    pub(super) good_after: u32,
}

impl Rows {
    pub(super) fn check(self, faults: &mut Faults) {
        for (field, row) in [("bad_after", self.bad_after), ("good_after", self.good_after)] {
            faults.check((1..=LONGEST_ROW).contains(&row), field, &row, "1 to 1000");
        }
    }
}

/// What is the matter, and since when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Bad {
    pub(super) since: Moment,
    pub(super) symptom: Symptom,
}

/// One signal's state.
#[derive(Clone, Debug)]
pub(super) struct Track {
    rows: Rows,
    /// How long the row is that speaks against the state.
    row: u32,
    /// When a row of bad readings began.
    began: Moment,
    bad: Option<Bad>,
}

impl Track {
    /// The first reading sets the state as it is: there is none yet that would be worth keeping.
    pub(super) fn new(rows: Rows, first: Signal, now: Moment) -> Self {
        let bad = match first {
            Signal::Bad(symptom) => Some(Bad { since: now, symptom }),
            Signal::Good | Signal::Unclear => None,
        };
        Self { rows, row: 0, began: now, bad }
    }

    /// Takes a reading that counts as so many.
    pub(super) fn read(&mut self, signal: Signal, weight: u32, now: Moment) {
        match (signal, &mut self.bad) {
            (Signal::Unclear, _) | (Signal::Good, None) => self.row = 0,
            (Signal::Bad(symptom), Some(bad)) => {
                self.row = 0;
                bad.symptom = symptom;
            }
            (Signal::Bad(symptom), bad @ None) => {
                if self.row == 0 {
                    self.began = now;
                }
                self.row = self.row.saturating_add(weight);
                if self.row >= self.rows.bad_after {
                    self.row = 0;
                    *bad = Some(Bad { since: self.began, symptom });
                }
            }
            (Signal::Good, bad @ Some(_)) => {
                self.row = self.row.saturating_add(weight);
                if self.row >= self.rows.good_after {
                    self.row = 0;
                    *bad = None;
                }
            }
        }
    }

    pub(super) fn bad(&self) -> Option<&Bad> {
        self.bad.as_ref()
    }
}

/// A beat that is due again and again; how late it comes is how long a task waits for its turn.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pulse {
    every: u64,
    due: Moment,
}

/// How late a beat was, and how many beats it counts as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lag {
    /// When the beat was due: since then somebody waits.
    pub(super) due: Moment,
    pub(super) late: Duration,
    pub(super) weight: u32,
}

impl Lag {
    /// Nothing is late.
    pub(super) const NONE: Self = Self { due: Moment::NEVER, late: Duration::ZERO, weight: 1 };
}

impl Pulse {
    pub(super) fn new(every: Duration, now: Moment) -> Self {
        let every = nanos(every);
        Self { every, due: now.plus_nanos(every) }
    }

    pub(super) fn due(&self) -> Moment {
        self.due
    }

    /// The lag of a beat that comes, or would come, now.
    pub(super) fn lag(&self, now: Moment) -> Lag {
        let late = now.nanos_since(self.due);
        // A period of zero is refused when it is set.
        let swallowed = u32::try_from(late / self.every.max(1)).unwrap_or(u32::MAX);
        Lag { due: self.due, late: Duration::from_nanos(late), weight: swallowed.saturating_add(1) }
    }

    /// The beat comes: its lag. The next one is due a period from now.
    pub(super) fn beat(&mut self, now: Moment) -> Lag {
        let lag = self.lag(now);
        self.due = now.plus_nanos(self.every);
        lag
    }

    /// The time until now was spent on signals: the next beat is due a period from here, if it would be late by that.
    pub(super) fn resume(&mut self, now: Moment) {
        if self.due < now {
            self.due = now.plus_nanos(self.every);
        }
    }
}

/// A lag is bad from its limit on, and good below half of it.
pub(super) fn judge(late: Duration, limit: Duration) -> Signal {
    if late >= limit {
        Signal::Bad(Symptom::Lagging { lag: late, limit })
    } else if late < limit / 2 {
        Signal::Good
    } else {
        Signal::Unclear
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ROWS: Rows = Rows { bad_after: 3, good_after: 2 };

    fn bad() -> Signal {
        Signal::bad("down")
    }

    fn track(signals: impl IntoIterator<Item = Signal>) -> Track {
        let mut track = Track::new(ROWS, Signal::Good, Moment::at(0));
        for (at, signal) in (1..).zip(signals) {
            track.read(signal, 1, Moment::at(at));
        }
        track
    }

    #[test]
    fn a_row_of_bad_readings_flips_and_is_dated_back_to_its_first() {
        assert_eq!(track([bad(), bad()]).bad(), None);
        let since = |track: &Track| track.bad().map(|bad| bad.since);
        assert_eq!(since(&track([Signal::Good, bad(), bad(), bad()])), Some(Moment::at(2)));
    }

    #[test]
    fn a_good_or_unclear_reading_ends_a_row_of_bad_ones() {
        for other in [Signal::Good, Signal::Unclear] {
            assert_eq!(track([bad(), bad(), other, bad(), bad()]).bad(), None);
        }
    }

    #[test]
    fn a_bad_or_unclear_reading_ends_a_row_of_good_ones() {
        for other in [bad(), Signal::Unclear] {
            let seen = [bad(), bad(), bad(), Signal::Good, other, Signal::Good];
            assert!(track(seen).bad().is_some());
        }
    }

    #[test]
    fn the_latest_symptom_is_told() {
        let track = track([bad(), bad(), bad(), Signal::bad("still down")]);
        assert_eq!(track.bad().map(|bad| bad.symptom.to_string()), Some("still down".to_owned()));
    }

    #[test]
    fn a_late_beat_counts_as_those_that_it_has_swallowed() {
        let ms = Duration::from_millis;
        let at = |millis| Moment::at(0) + ms(millis);
        let lag = |due, late, weight| Lag { due: at(due), late: ms(late), weight };
        let mut pulse = Pulse::new(ms(100), at(0));
        assert_eq!(pulse.beat(at(101)), lag(100, 1, 1));
        assert_eq!(pulse.lag(at(150)), lag(201, 0, 1), "it is not due");
        assert_eq!(pulse.beat(at(451)), lag(201, 250, 3));
        assert_eq!(pulse.beat(at(551)), lag(551, 0, 1), "due from the late one on");
    }

    #[test]
    fn absurd_times_saturate() {
        let mut pulse = Pulse::new(Duration::from_nanos(1), Moment::at(0));
        assert_eq!(pulse.beat(Moment::NEVER).weight, u32::MAX);
        assert_eq!(pulse.beat(Moment::at(0)).late, Duration::ZERO, "a clock that goes back is no lag");
    }

    fn signals() -> impl Strategy<Value = Vec<(Signal, u32)>> {
        let signal = prop_oneof![Just(Signal::Good), Just(bad()), Just(Signal::Unclear)];
        proptest::collection::vec((signal, 1_u32..4), 0..60)
    }

    proptest! {
        /// The model has no state but the history: it looks back for the last row that was long enough.
        #[test]
        fn the_state_is_that_of_the_last_row_that_was_long_enough(
            signals in signals(), bad_after in 1_u32..6, good_after in 1_u32..6,
        ) {
            let mut track = Track::new(Rows { bad_after, good_after }, Signal::Good, Moment::at(0));
            let (mut history, mut expected) = (Vec::new(), false);
            for (at, (signal, weight)) in (1..).zip(signals) {
                let now = Moment::at(at);
                track.read(signal.clone(), weight, now);
                history.push((signal.clone(), weight));
                let row = history.iter().rev().take_while(|(other, _)| *other == signal);
                let row: u32 = row.map(|(_, weight)| weight).sum();
                expected = match signal {
                    Signal::Bad(_) => expected || row >= bad_after,
                    Signal::Good => expected && row < good_after,
                    Signal::Unclear => expected,
                };
                prop_assert_eq!(track.bad().is_some(), expected);
            }
        }
    }
}
