//! Windows one after the other: what is left of the one that runs, and what the ones that have ended leave to it.

use std::fmt;
use std::time::Duration;

use super::calendar::{Calendar, Unit};
use super::ledger::Ledger;
use super::pace::Take;
use super::shell::Facts;
use crate::internal::time::Moment;

/// What a window is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Window {
    Calendar(Unit),
    FromFirstUse(Duration),
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Calendar(Unit::Second) => f.write_str("second"),
            Self::Calendar(Unit::Minute) => f.write_str("minute"),
            Self::Calendar(Unit::Hour) => f.write_str("hour"),
            Self::Calendar(Unit::Day) => f.write_str("day"),
            Self::Calendar(Unit::Month) => f.write_str("month"),
            Self::FromFirstUse(length) => write!(f, "{length:?}"),
        }
    }
}

/// What is left of the running window.
#[derive(Clone, Copy, Debug)]
pub(super) struct Windows {
    pub(super) limit: u64,
    pub(super) carry: u64,
    /// Of the window of which `run` knows; negative if more was charged than there was.
    pub(super) left: i128,
    pub(super) run: Run,
}

/// The latest window in which something was taken.
#[derive(Clone, Copy, Debug)]
pub(super) enum Run {
    Calendar { calendar: Calendar, index: i64, start: Moment, end: Moment },
    FromFirstUse { length: u64, begun: Option<Moment> },
}

impl Run {
    pub(super) fn on(calendar: Calendar, index: i64) -> Self {
        let (start, end) = (calendar.start(index), calendar.start(index.saturating_add(1)));
        Self::Calendar { calendar, index, start, end }
    }

    pub(super) fn window(&self) -> Window {
        match self {
            Self::Calendar { calendar, .. } => Window::Calendar(calendar.unit()),
            Self::FromFirstUse { length, .. } => Window::FromFirstUse(Duration::from_nanos(*length)),
        }
    }

    /// The window in which a moment lies, and how many have ended since. A moment before the window counts as in it.
    fn at(&self, now: Moment) -> (Self, u64) {
        match *self {
            Self::Calendar { end, .. } if now < end => (*self, 0),
            Self::Calendar { calendar, index, .. } => {
                let reached = calendar.index(now).max(index);
                (Self::on(calendar, reached), reached.abs_diff(index))
            }
            Self::FromFirstUse { length, begun } => {
                let ended = begun.map_or(0, |begun| now.nanos_since(begun) / length);
                let begun = if ended == 0 { begun.unwrap_or(now) } else { now };
                (Self::FromFirstUse { length, begun: Some(begun) }, ended)
            }
        }
    }

    /// When so many more windows will have ended, at least one.
    fn after(&self, windows: u64, now: Moment) -> Moment {
        match *self {
            Self::Calendar { calendar, index, .. } => {
                calendar.start(index.saturating_add(i64::try_from(windows).unwrap_or(i64::MAX)))
            }
            Self::FromFirstUse { length, begun } => begun.unwrap_or(now).plus_nanos(length.saturating_mul(windows)),
        }
    }

    /// What tells this window from others, for passes.
    fn note(&self) -> u64 {
        match *self {
            Self::Calendar { index, .. } => index as u64,
            Self::FromFirstUse { begun, .. } => begun.map_or(0, Moment::nanos),
        }
    }

    fn length(&self) -> u64 {
        match *self {
            Self::Calendar { start, end, .. } => end.nanos_since(start),
            Self::FromFirstUse { length, .. } => length,
        }
    }
}

impl Windows {
    fn most(&self) -> i128 {
        i128::from(self.limit) + i128::from(self.carry)
    }

    /// How it is at a moment. Each window that has ended brings the limit, and carries over what there was.
    fn at(&self, now: Moment) -> Self {
        let (run, ended) = self.run.at(now);
        let left = match ended {
            0 => self.left,
            ended => (self.left + i128::from(self.limit) * i128::from(ended)).min(self.most()),
        };
        Self { left, run, ..*self }
    }

    /// The same with nothing used, or carried over.
    pub(super) fn another(&self, now: Moment) -> Self {
        let run = match self.run {
            Run::Calendar { calendar, .. } => Run::on(calendar, calendar.index(now)),
            Run::FromFirstUse { length, .. } => Run::FromFirstUse { length, begun: None },
        };
        Self { left: i128::from(self.limit), run, ..*self }
    }

    /// Whether it is as a new one: with nothing used, owed or carried over.
    pub(super) fn is_fresh(&self, now: Moment) -> bool {
        self.at(now).rested().left == i128::from(self.limit)
    }

    pub(super) fn set_limit(&mut self, now: Moment, limit: u64) {
        let mut seen = self.at(now);
        // Who used more than is allowed from now on owes nothing for that.
        seen.left = (seen.left + i128::from(limit) - i128::from(self.limit)).max(seen.left.min(0));
        seen.limit = limit;
        *self = seen.rested();
    }

    /// A window from first use of which nothing is used has not begun.
    fn rested(mut self) -> Self {
        if let Run::FromFirstUse { begun, .. } = &mut self.run {
            if self.left == i128::from(self.limit) {
                *begun = None;
            }
        }
        self
    }
}

impl Ledger for Windows {
    fn largest(&self) -> u64 {
        self.limit.saturating_add(self.carry)
    }

    fn take(&mut self, now: Moment, cost: u64) -> Take {
        let mut seen = self.at(now);
        let missing = i128::from(cost) - seen.left;
        if missing > 0 {
            let missing = (i128::from(cost) - self.left) as u128;
            let windows = u64::try_from(missing.div_ceil(u128::from(self.limit))).unwrap_or(u64::MAX);
            return Take::At(self.run.after(windows, now));
        }
        seen.left -= i128::from(cost);
        *self = seen;
        Take::Now(seen.run.note())
    }

    fn undo(&mut self, taken: u64, cost: u64) {
        if taken == self.run.note() {
            self.left = (self.left + i128::from(cost)).min(self.most());
            *self = self.rested();
        }
    }

    fn put_back(&mut self, now: Moment, tokens: u64) {
        let mut seen = self.at(now);
        seen.left = (seen.left + i128::from(tokens)).min(self.most());
        *self = seen.rested();
    }

    fn charge(&mut self, now: Moment, tokens: u64) {
        let mut seen = self.at(now);
        seen.left -= i128::from(tokens);
        *self = seen.rested();
    }

    fn facts(&mut self, now: Moment) -> Facts {
        let seen = self.at(now);
        let remaining = seen.left.max(0);
        let mut emptied = Self { left: seen.left - remaining, ..seen };
        let reset = match emptied.take(now, 1) {
            Take::At(reset) => reset,
            Take::Now(_) => now,
        };
        Facts { limit: self.limit, remaining: remaining as u64, window: seen.run.length(), reset }
    }
}

#[cfg(all(test, not(resile_loom)))]
mod tests {
    use std::time::SystemTime;

    use proptest::prelude::*;

    use super::*;
    use crate::internal::time::nanos;

    const SECOND: u64 = 1_000_000_000;
    const DAY: u64 = 86_400 * SECOND;

    /// Window by window, as one would with pencil and paper.
    struct Model {
        limit: i128,
        carry: i128,
        left: i128,
        /// The end of the window that runs, if one does.
        end: Option<u64>,
    }

    impl Model {
        /// Closes windows up to a moment; `next` says when the window that begins at a moment ends.
        fn advance(&mut self, now: u64, next: impl Fn(u64) -> u64) {
            while let Some(end) = self.end.filter(|end| *end <= now) {
                self.left = self.limit + self.left.min(self.carry);
                self.end = Some(next(end));
            }
        }
    }

    #[derive(Clone, Debug)]
    enum Ask {
        Take(u64),
        Charge(u64),
        PutBack(u64),
    }

    fn asks() -> impl Strategy<Value = Vec<(u64, Ask)>> {
        let ask = prop_oneof![
            6 => (1_u64..9).prop_map(Ask::Take),
            1 => (1_u64..20).prop_map(Ask::Charge),
            1 => (1_u64..4).prop_map(Ask::PutBack),
        ];
        // In thousandths of a window.
        let step = prop_oneof![
            3 => Just(0), 6 => 0_u64..300, 2 => 0_u64..3000, 1 => Just(1000), 1 => 0_u64..40_000
        ];
        proptest::collection::vec((step, ask), 1..100)
    }

    fn assert_advice(windows: &Windows, now: Moment, cost: u64) -> Result<(), TestCaseError> {
        let mut asked = *windows;
        let Take::At(due) = asked.take(now, cost) else { return Ok(()) };
        prop_assert!(due > now);
        prop_assert_eq!(asked.take(now, cost), Take::At(due));
        prop_assert_eq!(asked.take(Moment::from_nanos(due.nanos() - 1), cost), Take::At(due));
        prop_assert!(matches!(asked.take(due, cost), Take::Now(_)), "{:?} at {:?}", windows, due);
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

        #[test]
        fn windows_of_the_calendar_are_counted_as_with_pencil_and_paper(
            limit in 1_u64..9, carry in 0_u64..20, begun in 0_u64..4_000_000_000,
            unit in prop_oneof![
                Just(Unit::Second), Just(Unit::Minute), Just(Unit::Hour), Just(Unit::Day), Just(Unit::Month)
            ],
            east in -18_i128..=18, asks in asks(),
        ) {
            let mut now = Moment::at(12_345);
            let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(begun);
            let calendar = Calendar::new(unit, wall, now, east * 3600 * i128::from(SECOND));
            let end_of = |at: u64| calendar.start(calendar.index(Moment::from_nanos(at)) + 1).nanos();
            let limits = (i128::from(limit), i128::from(carry));
            let mut model = Model { limit: limits.0, carry: limits.1, left: limits.0, end: Some(end_of(now.nanos())) };
            let run = Run::on(calendar, calendar.index(now));
            let mut windows = Windows { limit, carry, left: limits.0, run };
            for (step, ask) in asks {
                now = now.plus_nanos(step * (nanos(unit.shortest()) / 1000));
                model.advance(now.nanos(), end_of);
                match ask {
                    Ask::Take(cost) if cost <= windows.largest() => {
                        assert_advice(&windows, now, cost)?;
                        let fits = i128::from(cost) <= model.left;
                        prop_assert_eq!(matches!(windows.take(now, cost), Take::Now(_)), fits);
                        if fits {
                            model.left -= i128::from(cost);
                        }
                    }
                    Ask::Take(_) => {}
                    Ask::Charge(units) => {
                        windows.charge(now, units);
                        model.left -= i128::from(units);
                    }
                    Ask::PutBack(units) => {
                        windows.put_back(now, units);
                        model.left = (model.left + i128::from(units)).min(model.limit + model.carry);
                    }
                }
                let facts = windows.facts(now);
                prop_assert_eq!(i128::from(facts.remaining), model.left.max(0));
                if model.left > 0 {
                    prop_assert_eq!(Some(facts.reset.nanos()), model.end);
                }
                prop_assert_eq!(facts.window, model.end.unwrap() - calendar.start(calendar.index(now)).nanos());
            }
        }

        #[test]
        fn windows_from_first_use_are_counted_as_with_pencil_and_paper(
            limit in 1_u64..9, asks in asks(),
        ) {
            let (length, carry) = (7 * SECOND, 0);
            let mut now = Moment::at(0);
            let limits = (i128::from(limit), i128::from(carry));
            let mut model = Model { limit: limits.0, carry: limits.1, left: limits.0, end: None };
            let run = Run::FromFirstUse { length, begun: None };
            let mut windows = Windows { limit, carry, left: limits.0, run };
            for (step, ask) in asks {
                now = now.plus_nanos(step * (length / 1000));
                let ended = model.end.is_some_and(|end| end <= now.nanos());
                // Windows that nobody begins pass all the same.
                let mut seen = Model { ..model };
                seen.advance(now.nanos(), |end| end + length);
                let end = seen.end.filter(|_| !ended).unwrap_or(now.nanos() + length);
                let begin = |seen: Model| Model { end: (seen.left != seen.limit).then_some(end), ..seen };
                match ask {
                    Ask::Take(cost) if cost <= windows.largest() => {
                        assert_advice(&windows, now, cost)?;
                        let fits = i128::from(cost) <= seen.left;
                        prop_assert_eq!(matches!(windows.take(now, cost), Take::Now(_)), fits);
                        if fits {
                            seen.left -= i128::from(cost);
                            model = Model { end: Some(end), ..seen };
                        }
                    }
                    Ask::Take(_) => {}
                    Ask::Charge(units) => {
                        windows.charge(now, units);
                        seen.left -= i128::from(units);
                        model = begin(seen);
                    }
                    Ask::PutBack(units) => {
                        windows.put_back(now, units);
                        seen.left = (seen.left + i128::from(units)).min(seen.limit + seen.carry);
                        model = begin(seen);
                    }
                }
            }
        }
    }

    #[test]
    fn a_clock_that_goes_back_stays_in_the_window() {
        let wall = SystemTime::UNIX_EPOCH;
        let calendar = Calendar::new(Unit::Day, wall, Moment::at(0), 0);
        let run = Run::on(calendar, 0);
        for run in [run, Run::FromFirstUse { length: DAY, begun: None }] {
            let mut windows = Windows { limit: 3, carry: 0, left: 3, run };
            let (early, late) = (Moment::at(1), Moment::at(3 * DAY + 1));
            assert!(matches!(windows.take(late, 3), Take::Now(_)));
            let Take::At(due) = windows.take(early, 1) else { panic!("none is left") };
            assert_eq!(windows.take(late, 1), Take::At(due));
            windows.charge(early, 1);
            assert!(matches!(windows.take(early, 1), Take::At(then) if then >= due));
        }
    }

    #[test]
    fn what_is_undone_comes_back_to_its_own_window_only() {
        for run in [
            Run::on(Calendar::new(Unit::Second, SystemTime::UNIX_EPOCH, Moment::at(0), 0), 0),
            Run::FromFirstUse { length: SECOND, begun: None },
        ] {
            let mut windows = Windows { limit: 3, carry: 0, left: 3, run };
            let Take::Now(note) = windows.take(Moment::at(0), 2) else { panic!("three were there") };
            let mut soon = windows;
            soon.undo(note, 2);
            assert_eq!(soon.facts(Moment::at(0)).remaining, 3);
            assert!(matches!(windows.take(Moment::at(SECOND), 1), Take::Now(_)));
            windows.undo(note, 2);
            assert_eq!(windows.facts(Moment::at(SECOND)).remaining, 2);
        }
    }
}
