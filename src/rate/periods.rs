//! Windows one after the other: what is left of the one that runs, and what the ones that have ended leave to it.

use std::fmt;
use std::time::Duration;

use super::calendar::{Calendar, Unit};
use super::ledger::Ledger;
use super::pace::Take;
use super::shell::Facts;
use super::window::SKEW;
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
    /// Of the window of which `run` knows; negative if more was used than there is.
    left: i128,
    /// So much of that comes off the following windows: what was charged above what was there. What was used before the
    /// limit was lowered does not.
    owed: i128,
    pub(super) run: Run,
}

/// The latest window in which something was taken.
#[derive(Clone, Copy, Debug)]
pub(super) enum Run {
    Calendar {
        calendar: Calendar,
        index: i64,
        start: Moment,
        end: Moment,
    },
    /// It has begun if something was used of it, or is owed.
    FromFirstUse {
        length: u64,
        begun: Option<Moment>,
    },
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
                let begun = begun.map(|begun| begun.plus_nanos(ended * length));
                (Self::FromFirstUse { length, begun }, ended)
            }
        }
    }

    /// Something is used of it.
    fn begin(&mut self, now: Moment) {
        if let Self::FromFirstUse { begun, .. } = self {
            begun.get_or_insert(now);
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
    /// With nothing used of the window that runs.
    pub(super) fn new(limit: u64, carry: u64, run: Run) -> Self {
        Self { limit, carry, left: limit.into(), owed: 0, run }
    }

    fn most(&self) -> i128 {
        i128::from(self.limit) + i128::from(self.carry)
    }

    /// How it is at a moment. Each window that has ended brings the limit, and carries over what there was.
    fn at(&self, now: Moment) -> Self {
        let (run, ended) = self.run.at(now);
        if ended == 0 {
            return *self;
        }
        let left = (self.left_over() + i128::from(self.limit) * i128::from(ended)).min(self.most());
        Self { left, owed: (-left).max(0), run, ..*self }.rested()
    }

    /// What the running window leaves to the next, or takes from it.
    fn left_over(&self) -> i128 {
        self.left.max(-self.owed)
    }

    /// So many more are left of the running window, or fewer.
    fn add(&mut self, units: i128) {
        self.left = (self.left + units).min(self.most());
        self.owed = self.owed.min((-self.left).max(0));
        *self = self.rested();
    }

    /// The same with nothing used, or carried over.
    pub(super) fn another(&self, now: Moment) -> Self {
        let run = match self.run {
            Run::Calendar { calendar, .. } => Run::on(calendar, calendar.index(now)),
            Run::FromFirstUse { length, .. } => Run::FromFirstUse { length, begun: None },
        };
        Self::new(self.limit, self.carry, run)
    }

    /// Whether it is as a new one: with nothing used, owed or carried over.
    pub(super) fn is_fresh(&self, now: Moment) -> bool {
        self.at(now).left == i128::from(self.limit)
    }

    pub(super) fn set_limit(&mut self, now: Moment, limit: u64) {
        *self = self.at(now);
        let more = i128::from(limit) - i128::from(self.limit);
        self.limit = limit;
        self.add(more);
    }

    /// Limit and carry-over of another, if its windows are of the same length.
    pub(super) fn adopt(&mut self, now: Moment, settings: &Self) {
        if settings.run.window() == self.run.window() {
            *self = Self { carry: settings.carry, ..self.at(now) };
            self.set_limit(now, settings.limit);
        }
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
        if i128::from(cost) > seen.left {
            let missing = (i128::from(cost) - self.left_over()) as u128;
            let windows = u64::try_from(missing.div_ceil(u128::from(self.limit))).unwrap_or(u64::MAX);
            return Take::At(self.run.after(windows, now));
        }
        seen.left -= i128::from(cost);
        seen.run.begin(now);
        *self = seen;
        Take::Now(seen.run.note())
    }

    fn undo(&mut self, taken: u64, cost: u64) {
        if taken == self.run.note() {
            self.add(cost.into());
        }
    }

    fn put_back(&mut self, now: Moment, tokens: u64) {
        *self = self.at(now);
        self.add(tokens.into());
    }

    fn charge(&mut self, now: Moment, tokens: u64) -> u64 {
        let mut seen = self.at(now);
        seen.run.begin(now);
        seen.owed += (i128::from(tokens) - seen.left.max(0)).max(0);
        seen.left -= i128::from(tokens);
        *self = seen.rested();
        tokens
    }

    /// What is left is left of the window that runs now.
    fn heal(&mut self, now: Moment) -> bool {
        match &mut self.run {
            Run::Calendar { calendar, start, end, .. } => {
                let is_off = now.plus_nanos(end.nanos_since(*start)).plus_nanos(SKEW) < *start;
                if is_off {
                    self.run = Run::on(*calendar, calendar.index(now));
                }
                is_off
            }
            Run::FromFirstUse { length, begun: Some(begun) } if now.plus_nanos(*length).plus_nanos(SKEW) < *begun => {
                *begun = now;
                true
            }
            Run::FromFirstUse { .. } => false,
        }
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
    #[derive(Clone)]
    struct Model {
        limit: i128,
        carry: i128,
        left: i128,
        owed: i128,
        /// The end of the window that runs, if one does.
        end: Option<u64>,
        from_first_use: bool,
    }

    impl Model {
        fn new(limit: u64, carry: u64, end: Option<u64>) -> Self {
            let (limit, carry, from_first_use) = (limit.into(), carry.into(), end.is_none());
            Self { limit, carry, left: limit, owed: 0, end, from_first_use }
        }

        /// As it is at a moment; `end_of` says when the window ends that runs at a moment or, from first use, begins.
        fn at(&self, now: u64, end_of: &impl Fn(u64) -> u64) -> Self {
            let mut seen = self.clone();
            while let Some(end) = seen.end.filter(|end| *end <= now) {
                seen.left = if seen.left < 0 { seen.limit - seen.owed } else { seen.limit + seen.left.min(seen.carry) };
                seen.owed = (-seen.left).max(0);
                let full = seen.left == seen.limit + seen.carry;
                seen.end = Some(end_of(if full { now } else { end }));
                seen.rest();
            }
            seen
        }

        fn rest(&mut self) {
            if self.from_first_use && self.left == self.limit {
                self.end = None;
            }
        }

        fn use_up(&mut self, units: i128, end: u64) {
            self.owed += units - units.min(self.left.max(0));
            self.left -= units;
            self.end.get_or_insert(end);
        }

        fn give(&mut self, units: i128) {
            self.left = (self.left + units).min(self.limit + self.carry);
            self.owed = self.owed.min((-self.left).max(0));
            self.rest();
        }
    }

    #[derive(Clone, Debug)]
    enum Ask {
        Take(u64),
        Charge(u64),
        PutBack(u64),
        Undo(usize),
        SetLimit(u64),
    }

    /// What is asked, each so many thousandths of a window later, a year later, or earlier.
    fn asks() -> impl Strategy<Value = Vec<(Result<i64, u64>, Ask)>> {
        let ask = prop_oneof![
            8 => (1_u64..9).prop_map(Ask::Take),
            1 => (0_u64..20).prop_map(Ask::Charge),
            1 => (0_u64..4).prop_map(Ask::PutBack),
            2 => any::<usize>().prop_map(Ask::Undo),
            1 => (1_u64..9).prop_map(Ask::SetLimit),
        ];
        let step = prop_oneof![
            30 => Just(Ok(0)), 60 => (0_i64..300).prop_map(Ok), 20 => (0_i64..3000).prop_map(Ok), 10 => Just(Ok(1000)),
            10 => (0_i64..40_000).prop_map(Ok), 10 => (-1500_i64..0).prop_map(Ok), 2 => Just(Err(366 * DAY)),
        ];
        proptest::collection::vec((step, ask), 1..100)
    }

    fn units() -> impl Strategy<Value = Unit> {
        prop_oneof![Just(Unit::Second), Just(Unit::Minute), Just(Unit::Hour), Just(Unit::Day), Just(Unit::Month)]
    }

    fn a_calendar(unit: Unit, begun: u64, east: i128) -> Calendar {
        let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(begun);
        Calendar::new(unit, wall, Moment::at(12_345), east * 3600 * i128::from(SECOND))
    }

    /// Asking changes nothing, and the advice is the first nanosecond at which the same question gets another answer.
    fn assert_advice(windows: &Windows, now: Moment, cost: u64) -> Result<(), TestCaseError> {
        let mut asked = *windows;
        let Take::At(due) = asked.take(now, cost) else { return Ok(()) };
        prop_assert!(due > now);
        prop_assert_eq!(asked.take(now, cost), Take::At(due));
        prop_assert_eq!(asked.take(Moment::from_nanos(due.nanos() - 1), cost), Take::At(due));
        prop_assert!(matches!(asked.take(due, cost), Take::Now(_)), "{:?} at {:?}", windows, due);
        Ok(())
    }

    /// What remains can be taken and no more, and one more at the reset.
    fn assert_facts(windows: &Windows, now: Moment) -> Result<Facts, TestCaseError> {
        let mut asked = *windows;
        let facts = asked.facts(now);
        if facts.remaining > 0 {
            prop_assert!(matches!(asked.take(now, facts.remaining), Take::Now(_)));
        }
        prop_assert_eq!(asked.take(now, 1), Take::At(facts.reset));
        Ok(facts)
    }

    /// Asks both the same.
    fn assert_alike(
        mut windows: Windows,
        mut model: Model,
        shortest: Duration,
        end_of: impl Fn(u64) -> u64,
        asks: Vec<(Result<i64, u64>, Ask)>,
    ) -> Result<(), TestCaseError> {
        let mut now = Moment::at(12_345);
        let mut taken = Vec::new();
        for (step, ask) in asks {
            let step = step.map(|thousandths| (thousandths, thousandths.unsigned_abs() * (nanos(shortest) / 1000)));
            now = match step {
                Ok((thousandths, nanos)) if thousandths < 0 => Moment::from_nanos(now.nanos() - nanos),
                Ok((_, nanos)) | Err(nanos) => now.plus_nanos(nanos),
            };
            let mut seen = model.at(now.nanos(), &end_of);
            let end = end_of(now.nanos());
            match ask {
                Ask::Take(cost) if cost <= windows.largest() => {
                    assert_advice(&windows, now, cost)?;
                    match windows.take(now, cost) {
                        Take::Now(note) => {
                            prop_assert!(i128::from(cost) <= seen.left);
                            seen.use_up(cost.into(), end);
                            taken.push((note, cost, seen.end));
                            model = seen;
                        }
                        Take::At(_) => prop_assert!(i128::from(cost) > seen.left),
                    }
                }
                Ask::Take(_) => {}
                Ask::Charge(units) => {
                    windows.charge(now, units);
                    seen.use_up(units.into(), end);
                    seen.rest();
                    model = seen;
                }
                Ask::PutBack(units) => {
                    windows.put_back(now, units);
                    seen.give(units.into());
                    model = seen;
                }
                Ask::Undo(which) => {
                    if !taken.is_empty() {
                        let (note, cost, end) = taken.swap_remove(which % taken.len());
                        windows.undo(note, cost);
                        if end == model.end {
                            model.give(cost.into());
                        }
                    }
                }
                Ask::SetLimit(limit) => {
                    windows.set_limit(now, limit);
                    let more = i128::from(limit) - seen.limit;
                    seen.limit = limit.into();
                    seen.give(more);
                    model = seen;
                }
            }
            let seen = model.at(now.nanos(), &end_of);
            let facts = assert_facts(&windows, now)?;
            prop_assert_eq!(i128::from(facts.remaining), seen.left.max(0));
            prop_assert_eq!(windows.is_fresh(now), seen.left == seen.limit);
            if seen.left >= 0 {
                prop_assert_eq!(facts.reset.nanos(), seen.end.unwrap_or(end_of(now.nanos())));
            }
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

        #[test]
        fn windows_of_the_calendar_are_counted_as_with_pencil_and_paper(
            limit in 1_u64..9, carry in prop_oneof![Just(0), 0_u64..20], begun in 0_u64..4_000_000_000, unit in units(),
            east in -18_i128..=18, asks in asks(),
        ) {
            let calendar = a_calendar(unit, begun, east);
            let end_of = |at: u64| calendar.start(calendar.index(Moment::from_nanos(at)) + 1).nanos();
            let now = Moment::at(12_345);
            let windows = Windows::new(limit, carry, Run::on(calendar, calendar.index(now)));
            let model = Model::new(limit, carry, Some(end_of(now.nanos())));
            assert_alike(windows, model, unit.shortest(), end_of, asks)?;
        }

        #[test]
        fn windows_from_first_use_are_counted_as_with_pencil_and_paper(limit in 1_u64..9, asks in asks()) {
            let length = 7 * SECOND;
            let windows = Windows::new(limit, 0, Run::FromFirstUse { length, begun: None });
            let model = Model::new(limit, 0, None);
            assert_alike(windows, model, Duration::from_secs(7), |at| at + length, asks)?;
        }

        /// In no stretch of the calendar, of one window or of many, do more go than its windows allow and what was carried
        /// over into the first.
        #[test]
        fn no_stretch_holds_more_than_its_windows_allow(
            limit in 1_u64..9, carry in prop_oneof![Just(0), 0_u64..20], begun in 0_u64..4_000_000_000, unit in units(),
            east in -18_i128..=18, asks in asks(),
        ) {
            let calendar = a_calendar(unit, begun, east);
            let mut now = Moment::at(12_345);
            let mut windows = Windows::new(limit, carry, Run::on(calendar, calendar.index(now)));
            let mut taken = Vec::new();
            for (step, ask) in asks {
                now = now.plus_nanos(match step {
                    Ok(thousandths) => thousandths.unsigned_abs() * (nanos(unit.shortest()) / 1000),
                    Err(nanos) => nanos,
                });
                match ask {
                    Ask::Take(cost) if cost <= windows.largest() => {
                        if let Take::Now(note) = windows.take(now, cost) {
                            taken.push((calendar.index(now), cost, note));
                        }
                    }
                    Ask::Undo(which) if !taken.is_empty() => {
                        let (_, cost, note) = taken.remove(which % taken.len());
                        windows.undo(note, cost);
                    }
                    _ => {}
                }
            }
            for (place, (from, ..)) in taken.iter().enumerate() {
                let mut sum = 0;
                for (to, cost, _) in &taken[place..] {
                    sum += cost;
                    prop_assert!(i128::from(sum) <= i128::from(limit) * i128::from(to - from + 1) + i128::from(carry));
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
            let mut windows = Windows::new(3, 0, run);
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
            let mut windows = Windows::new(3, 0, run);
            let Take::Now(note) = windows.take(Moment::at(0), 2) else { panic!("three were there") };
            let mut soon = windows;
            soon.undo(note, 2);
            assert_eq!(soon.facts(Moment::at(0)).remaining, 3);
            assert!(matches!(windows.take(Moment::at(SECOND), 1), Take::Now(_)));
            windows.undo(note, 2);
            assert_eq!(windows.facts(Moment::at(SECOND)).remaining, 2);
        }
    }

    #[test]
    fn a_limit_that_is_lowered_and_raised_again_gives_nothing_twice() {
        let now = Moment::at(0);
        for run in [
            Run::on(Calendar::new(Unit::Day, SystemTime::UNIX_EPOCH, now, 0), 0),
            Run::FromFirstUse { length: DAY, begun: None },
        ] {
            let mut windows = Windows::new(3, 0, run);
            let Take::Now(note) = windows.take(now, 3) else { panic!("three were there") };
            windows.set_limit(now, 1);
            windows.undo(note, 1);
            assert_eq!(windows.facts(now).remaining, 0, "two of one are used");
            windows.set_limit(now, 3);
            assert_eq!(windows.facts(now).remaining, 1);
        }
    }

    #[test]
    fn a_refund_does_not_make_who_waits_for_what_is_owed_wait_longer() {
        let mut windows = Windows::new(3, 0, Run::FromFirstUse { length: 10, begun: None });
        windows.charge(Moment::at(0), 8);
        let later = Moment::at(19);
        let told = windows.take(later, 1);
        assert_eq!(told, Take::At(Moment::at(20)));
        windows.put_back(later, 1);
        assert_eq!(windows.take(later, 1), told);
        windows.set_limit(later, 3);
        assert_eq!(windows.take(later, 1), told);
    }
}
