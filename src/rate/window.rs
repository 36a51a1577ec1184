//! Counting over the last stretch of time: exactly, by a log, or nearly, by two counters.

use std::collections::VecDeque;

use super::ledger::Ledger;
use super::pace::Take;
use super::shell::Facts;
use super::units::Rate;
use crate::internal::time::Moment;

/// Nobody owes more.
const MOST: u64 = 1 << 62;
/// How much further ahead than a window the latest moment may lie, in nanoseconds, before it is dated back: more than
/// threads that have read the same clock can differ by.
pub(super) const SKEW: u64 = 10_000_000_000;

/// What was taken, each with its moment: exact, and as long as the limit is high.
///
/// What was taken at `t` counts until just before `t + window`.
#[derive(Clone, Debug)]
pub(super) struct Log {
    limit: u64,
    window: u64,
    /// Moments and what was taken at them, oldest first. It grows no longer than the limit.
    taken: VecDeque<(u64, u64)>,
    sum: u64,
    /// The latest moment up to which was forgotten.
    latest: u64,
}

impl Log {
    fn new(rate: Rate) -> Self {
        Self { limit: rate.count, window: rate.period, taken: VecDeque::new(), sum: 0, latest: 0 }
    }

    /// Forgets what no longer counts, and returns the moment that it is.
    fn forget(&mut self, now: Moment) -> u64 {
        self.latest = self.latest.max(now.nanos());
        while let Some((_, units)) = self.taken.front().filter(|(at, _)| self.latest - at >= self.window) {
            self.sum -= units;
            self.taken.pop_front();
        }
        self.latest
    }

    fn missing(&self, cost: u64) -> u64 {
        (self.sum + cost).saturating_sub(self.limit)
    }

    /// When `units` of the counted total will have expired. The total is at least that.
    fn gone(&self, units: u64) -> Moment {
        let mut left = units;
        let last = self.taken.iter().find(|(_, taken)| {
            left = left.saturating_sub(*taken);
            left == 0
        });
        last.map_or(Moment::NEVER, |(at, _)| Moment::from_nanos(at.saturating_add(self.window)))
    }

    fn add(&mut self, now: u64, units: u64) {
        let full = self.taken.len() as u64 >= self.limit;
        self.sum += units;
        match self.taken.back_mut() {
            // What is owed may not make the log longer: the newest then counts from now.
            Some((at, taken)) if *at == now || full => {
                *at = now;
                *taken += units;
            }
            _ => self.taken.push_back((now, units)),
        }
    }

    fn remove(&mut self, place: usize, units: u64) -> u64 {
        let taken = &mut self.taken[place].1;
        let removed = units.min(*taken);
        *taken -= removed;
        self.sum -= removed;
        if *taken == 0 {
            self.taken.remove(place);
        }
        removed
    }
}

impl Ledger for Log {
    fn largest(&self) -> u64 {
        self.limit
    }

    fn take(&mut self, now: Moment, cost: u64) -> Take {
        let now = self.forget(now);
        match self.missing(cost) {
            0 => {
                self.add(now, cost);
                Take::Now(now)
            }
            missing => Take::At(self.gone(missing)),
        }
    }

    fn when(&mut self, now: Moment, cost: u64) -> Moment {
        self.forget(now);
        match self.missing(cost) {
            0 => now,
            missing => self.gone(missing),
        }
    }

    /// What was taken then, and what was charged for it later: the oldest entries from then on, so that what others took
    /// meanwhile counts longer than it should, never shorter.
    fn undo(&mut self, taken: u64, cost: u64) {
        if self.taken.front().is_none_or(|(oldest, _)| taken < *oldest) {
            // It no longer counts, but for what was charged later: that can't be told from what others took.
            return;
        }
        let place = self.taken.partition_point(|(at, _)| *at < taken);
        let mut left = cost;
        while left > 0 && place < self.taken.len() {
            left -= self.remove(place, left);
        }
    }

    /// The oldest that still count: the newest go on counting longer than they should, never shorter.
    fn put_back(&mut self, now: Moment, tokens: u64) {
        self.forget(now);
        let mut left = tokens;
        while left > 0 && !self.taken.is_empty() {
            left -= self.remove(0, left);
        }
    }

    fn charge(&mut self, now: Moment, tokens: u64) -> u64 {
        let now = self.forget(now);
        let tokens = tokens.min(MOST - self.sum);
        if tokens > 0 {
            self.add(now, tokens);
        }
        tokens
    }

    fn heal(&mut self, now: Moment) -> bool {
        let ahead = self.latest.saturating_sub(now.nanos());
        let is_off = ahead > self.window.saturating_add(SKEW);
        if is_off {
            for (at, _) in &mut self.taken {
                *at = at.saturating_sub(ahead);
            }
            self.latest -= ahead;
        }
        is_off
    }

    /// Does not forget: a look must not move the moment by which the next one is served.
    fn facts(&mut self, now: Moment) -> Facts {
        let now = self.latest.max(now.nanos());
        let over: u64 = self.taken.iter().take_while(|(at, _)| now - at >= self.window).map(|(_, units)| units).sum();
        let sum = self.sum - over;
        let reset = match sum {
            0 => Moment::from_nanos(now.saturating_add(self.window)),
            sum => self.gone(over + (sum + 1).saturating_sub(self.limit).max(1)),
        };
        Facts { limit: self.limit, remaining: self.limit.saturating_sub(sum), window: self.window, reset }
    }
}

/// Two counters, of the running window and of the one before it, which counts by the part of it that is still in view:
///
/// ```text
/// estimate(t) = current + before × (1 - x)        x = the part of the running window that is over at t
/// ```
///
/// All is compared in whole numbers, multiplied by the window's length, so the advice is exact. The products stay below
/// 2^118, for counts below 2^62 and a window of a year.
#[derive(Clone, Copy, Debug)]
pub(super) struct Weighted {
    limit: u64,
    window: u64,
    /// The latest moment of which it knows: in the running window.
    latest: u64,
    current: u64,
    before: u64,
}

impl Weighted {
    fn new(rate: Rate) -> Self {
        Self { limit: rate.count, window: rate.period, latest: 0, current: 0, before: 0 }
    }

    /// The counters as they are at a moment, and how much of the running window is over.
    fn at(self, now: Moment) -> (Self, u64) {
        let latest = self.latest.max(now.nanos());
        let (current, before) = match latest / self.window - self.index() {
            0 => (self.current, self.before),
            1 => (0, self.current),
            _ => (0, 0),
        };
        (Self { latest, current, before, ..self }, latest % self.window)
    }

    /// The running window's number.
    fn index(&self) -> u64 {
        self.latest / self.window
    }

    /// The estimate, times the window's length.
    fn estimate(&self, elapsed: u64) -> u128 {
        u128::from(self.current) * u128::from(self.window) + u128::from(self.before) * u128::from(self.window - elapsed)
    }

    /// How many count, rounded up.
    fn counted(&self, elapsed: u64) -> u64 {
        self.estimate(elapsed).div_ceil(u128::from(self.window)).min(MOST.into()) as u64
    }

    fn whole(&self, count: u64) -> u128 {
        u128::from(count) * u128::from(self.window)
    }

    fn remaining(&self, elapsed: u64) -> u64 {
        (self.whole(self.limit).saturating_sub(self.estimate(elapsed)) / u128::from(self.window)) as u64
    }

    /// How far into a window so many of the one before it have faded to what there is room for.
    fn faded(&self, before: u64, room: u64) -> u64 {
        let in_view = self.whole(room).checked_div(u128::from(before)).unwrap_or(u128::MAX);
        (u128::from(self.window).saturating_sub(in_view)) as u64
    }

    /// When so many more would be there, which they are not now.
    fn due(&self, cost: u64) -> Moment {
        let (index, into) = match (self.limit - cost).checked_sub(self.current) {
            Some(room) => (self.index(), self.faded(self.before, room)),
            None => (self.index().saturating_add(1), self.faded(self.current, self.limit - cost)),
        };
        Moment::from_nanos(index.saturating_mul(self.window).saturating_add(into))
    }
}

impl Ledger for Weighted {
    fn largest(&self) -> u64 {
        self.limit
    }

    fn take(&mut self, now: Moment, cost: u64) -> Take {
        let (mut seen, elapsed) = self.at(now);
        if seen.estimate(elapsed) + seen.whole(cost) > seen.whole(seen.limit) {
            return Take::At(seen.due(cost));
        }
        seen.current += cost;
        *self = seen;
        Take::Now(seen.index())
    }

    fn undo(&mut self, taken: u64, cost: u64) {
        if taken == self.index() {
            self.current = self.current.saturating_sub(cost);
        } else if taken.checked_add(1) == Some(self.index()) {
            // What was charged for it later was counted in the running window.
            let rest = cost.saturating_sub(self.before);
            self.before = self.before.saturating_sub(cost);
            self.current = self.current.saturating_sub(rest);
        }
    }

    fn heal(&mut self, now: Moment) -> bool {
        let is_off = self.latest.saturating_sub(now.nanos()) > self.window.saturating_add(SKEW);
        if is_off {
            // All that is in view counts as of now, rounded up.
            let counted = self.counted(self.latest % self.window);
            (self.latest, self.current, self.before) = (now.nanos(), counted, 0);
        }
        is_off
    }

    /// Of the window before first, where they weigh less.
    fn put_back(&mut self, now: Moment, tokens: u64) {
        let (seen, _) = self.at(now);
        *self = seen;
        let rest = tokens.saturating_sub(self.before);
        self.before = self.before.saturating_sub(tokens);
        self.current = self.current.saturating_sub(rest);
    }

    fn charge(&mut self, now: Moment, tokens: u64) -> u64 {
        let (seen, _) = self.at(now);
        *self = seen;
        let tokens = tokens.min(MOST.saturating_sub(self.current));
        self.current += tokens;
        tokens
    }

    fn facts(&mut self, now: Moment) -> Facts {
        let (seen, elapsed) = self.at(now);
        let remaining = seen.remaining(elapsed);
        let emptied = Self { current: seen.current + remaining, ..seen };
        Facts { limit: self.limit, remaining, window: self.window, reset: emptied.due(1) }
    }
}

/// Either way of counting.
#[derive(Clone, Debug)]
pub(super) enum Counting {
    Log(Log),
    Weighted(Weighted),
}

impl Counting {
    pub(super) fn exact(rate: Rate) -> Self {
        Self::Log(Log::new(rate))
    }

    pub(super) fn weighted(rate: Rate) -> Self {
        Self::Weighted(Weighted::new(rate))
    }

    pub(super) fn is_exact(&self) -> bool {
        matches!(self, Self::Log(_))
    }

    /// The same way of counting, with nothing counted.
    pub(super) fn another(&self, _: Moment) -> Self {
        if self.is_exact() { Self::exact(self.rate()) } else { Self::weighted(self.rate()) }
    }

    /// Whether nothing counts any more.
    pub(super) fn is_fresh(&mut self, now: Moment) -> bool {
        match self {
            Self::Log(log) => {
                log.forget(now);
                log.sum == 0
            }
            Self::Weighted(counters) => {
                let (seen, _) = counters.at(now);
                (seen.current, seen.before) == (0, 0)
            }
        }
    }

    pub(super) fn rate(&self) -> Rate {
        let (count, period) = match self {
            Self::Log(log) => (log.limit, log.window),
            Self::Weighted(counters) => (counters.limit, counters.window),
        };
        Rate { count, period }
    }

    /// Another limit from now on, for the same way of counting. What was taken still counts; in a longer window only
    /// what the old one still knew of.
    pub(super) fn set_rate(&mut self, now: Moment, rate: Rate) {
        match self {
            Self::Log(log) => {
                log.forget(now);
                (log.limit, log.window) = (rate.count, rate.period);
            }
            Self::Weighted(counters) => {
                let (seen, elapsed) = counters.at(now);
                *counters = Weighted { limit: rate.count, ..seen };
                if rate.period != seen.window {
                    // All that is in view counts as of now, rounded up.
                    let current = seen.counted(elapsed);
                    *counters = Weighted { current, latest: seen.latest, ..Weighted::new(rate) };
                }
            }
        }
    }
}

impl Counting {
    /// Limit and window of another, and its way of counting: between the two, all that counts counts as of now.
    pub(super) fn adopt(&mut self, now: Moment, settings: &Self) {
        let (latest, counted) = match (&mut *self, settings) {
            (Self::Log(log), Self::Weighted(_)) => (log.forget(now), log.sum),
            (Self::Weighted(counters), Self::Log(_)) => {
                let (seen, elapsed) = counters.at(now);
                (seen.latest, seen.counted(elapsed))
            }
            _ => return self.set_rate(now, settings.rate()),
        };
        *self = settings.another(now);
        self.charge(Moment::from_nanos(latest), counted);
    }
}

macro_rules! either {
    ($counting:expr, $ledger:ident => $asked:expr) => {
        match $counting {
            Counting::Log($ledger) => $asked,
            Counting::Weighted($ledger) => $asked,
        }
    };
}

impl Ledger for Counting {
    fn largest(&self) -> u64 {
        either!(self, ledger => ledger.largest())
    }

    fn take(&mut self, now: Moment, cost: u64) -> Take {
        either!(self, ledger => ledger.take(now, cost))
    }

    fn when(&mut self, now: Moment, cost: u64) -> Moment {
        either!(self, ledger => ledger.when(now, cost))
    }

    fn undo(&mut self, taken: u64, cost: u64) {
        either!(self, ledger => ledger.undo(taken, cost));
    }

    fn put_back(&mut self, now: Moment, tokens: u64) {
        either!(self, ledger => ledger.put_back(now, tokens));
    }

    fn charge(&mut self, now: Moment, tokens: u64) -> u64 {
        either!(self, ledger => ledger.charge(now, tokens))
    }

    fn heal(&mut self, now: Moment) -> bool {
        either!(self, ledger => ledger.heal(now))
    }

    fn facts(&mut self, now: Moment) -> Facts {
        either!(self, ledger => ledger.facts(now))
    }
}

#[cfg(all(test, not(resile_loom)))]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    const YEAR: u64 = 365 * 86_400 * 1_000_000_000;

    #[derive(Clone, Debug)]
    struct Ask {
        step: u64,
        cost: u64,
        /// Undoes an earlier taking, or charges so many, instead.
        instead: Option<Result<usize, u64>>,
    }

    /// Steps are in eighths of a window, or a nanosecond, or none, or a year; costs may be above the limit.
    fn asks(window: u64) -> impl Strategy<Value = Vec<Ask>> {
        let step = prop_oneof![
            3 => Just(0),
            2 => Just(1),
            6 => 0..=window / 8,
            2 => 0..=window * 2,
            1 => Just(window),
            1 => Just(YEAR),
        ];
        let instead = prop_oneof![
            6 => Just(None),
            1 => (0_usize..50).prop_map(|which| Some(Ok(which))),
            1 => (1_u64..4).prop_map(|extra| Some(Err(extra))),
        ];
        proptest::collection::vec(
            (step, 1_u64..8, instead).prop_map(|(step, cost, instead)| Ask { step, cost, instead }),
            1..100,
        )
    }

    fn rates() -> impl Strategy<Value = Rate> {
        (1_u64..12, prop_oneof![Just(17_u64), Just(1000), Just(60_000_000_000)])
            .prop_map(|(count, window)| Rate { count, period: window })
    }

    /// L7, L17: the advice is the first nanosecond at which the same question gets another answer, and asking changes
    /// nothing.
    fn assert_advice<L: Ledger>(ledger: &L, now: Moment, cost: u64) -> Result<(), TestCaseError> {
        let mut asked = ledger.clone();
        let when = asked.when(now, cost);
        let Take::At(due) = asked.take(now, cost) else {
            prop_assert_eq!(when, now);
            return Ok(());
        };
        prop_assert!(due > now && when == due);
        prop_assert_eq!(asked.clone().take(now, cost), Take::At(due));
        let before = Moment::from_nanos(due.nanos() - 1);
        prop_assert_eq!(asked.clone().take(before, cost), Take::At(due));
        prop_assert!(matches!(asked.take(due, cost), Take::Now(_)), "{:?}", asked);
        Ok(())
    }

    /// What remains can be taken and no more, and one more at the reset.
    fn assert_facts<L: Ledger>(ledger: &L, now: Moment) -> Result<(), TestCaseError> {
        let mut asked = ledger.clone();
        let facts = asked.facts(now);
        if facts.remaining > 0 {
            prop_assert!(matches!(asked.take(now, facts.remaining), Take::Now(_)));
        }
        prop_assert_eq!(asked.take(now, 1), Take::At(facts.reset));
        Ok(())
    }

    /// What was taken: when, how many, and the note by which it can be undone.
    type Taken = Vec<(u64, u64, u64)>;

    fn counted(taken: &Taken, from: u64, to: u64) -> u64 {
        taken.iter().filter(|(at, ..)| (from..=to).contains(at)).map(|(_, units, _)| units).sum()
    }

    /// All that was ever counted, by its moment or by the number of its window.
    #[derive(Clone)]
    struct Naive {
        exact: bool,
        rate: Rate,
        latest: u64,
        counts: BTreeMap<u64, u64>,
    }

    impl Naive {
        fn place(&self) -> u64 {
            if self.exact { self.latest } else { self.latest / self.rate.period }
        }

        fn whole(&self, count: u64) -> u128 {
            u128::from(count) * u128::from(self.rate.period)
        }

        fn see(&mut self, now: Moment) {
            self.latest = self.latest.max(now.nanos());
            if self.exact {
                self.counts.retain(|at, _| self.latest - at < self.rate.period);
            }
        }

        /// What counts, times the window's length.
        fn used(&self) -> u128 {
            if self.exact {
                return self.whole(self.counts.values().sum());
            }
            let count = |window: u64| self.counts.get(&window).copied().unwrap_or(0);
            let (window, left) = (self.place(), self.rate.period - self.latest % self.rate.period);
            self.whole(count(window)) + u128::from(count(window - 1)) * u128::from(left)
        }

        fn add(&mut self, mut units: u64) {
            if self.exact && self.counts.len() as u64 >= self.rate.count {
                units += self.counts.pop_last().map_or(0, |(_, newest)| newest);
            }
            *self.counts.entry(self.place()).or_default() += units;
        }

        fn remove(&mut self, place: u64, units: u64) -> u64 {
            let Some(count) = self.counts.get_mut(&place) else { return 0 };
            let removed = units.min(*count);
            *count -= removed;
            self.counts.retain(|_, count| *count > 0);
            removed
        }

        /// What was taken there, and what was charged for it later.
        fn undo(&mut self, place: u64, mut units: u64) {
            if self.exact && self.counts.keys().next().is_none_or(|oldest| place < *oldest) {
                return;
            }
            let (from, to) = if self.exact { (place, u64::MAX) } else { (place, place + 1) };
            if !self.exact && place + 1 < self.place() {
                return;
            }
            while let Some(at) = self.counts.range(from..=to).next().map(|(at, _)| *at).filter(|_| units > 0) {
                units -= self.remove(at, units);
            }
            if !self.exact && place == self.place() {
                self.remove(place - 1, units);
            }
        }

        fn put_back(&mut self, now: Moment, mut units: u64) {
            self.see(now);
            let oldest = if self.exact { 0 } else { self.place() - 1 };
            while let Some(place) = self.counts.range(oldest..).next().map(|(place, _)| *place).filter(|_| units > 0) {
                units -= self.remove(place, units);
            }
        }

        fn set_rate(&mut self, now: Moment, rate: Rate) {
            self.see(now);
            let units = self.used().div_ceil(self.whole(1)) as u64;
            let other = rate.period != self.rate.period;
            self.rate = rate;
            self.see(now);
            if other && !self.exact {
                self.counts = BTreeMap::from([(self.place(), units)]);
                self.counts.retain(|_, units| *units > 0);
            }
        }
    }

    #[test]
    fn what_is_charged_has_a_bound_and_nothing_beyond_it_is_kept() {
        let (now, rate) = (Moment::at(0), Rate::per_second(10));
        for mut counting in [Counting::exact(rate), Counting::weighted(rate)] {
            assert_eq!(counting.charge(now, u64::MAX), MOST);
            assert_eq!(counting.charge(now, u64::MAX), 0);
            assert_eq!(counting.charge(now, 1), 0);
            if let Counting::Log(log) = &counting {
                assert_eq!((log.taken.len(), log.sum), (1, MOST));
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

        /// Against a list of all that was ever taken.
        #[test]
        fn the_log_counts_exactly(
            (rate, asks) in rates().prop_flat_map(|rate| (Just(rate), asks(rate.period))),
        ) {
            let mut log = Log::new(rate);
            let mut taken = Taken::new();
            let mut owed = false;
            let mut now = Moment::at(0);
            for Ask { step, cost, instead } in asks {
                now = now.plus_nanos(step);
                let in_view = |taken: &Taken| counted(taken, (now.nanos() + 1).saturating_sub(rate.period), now.nanos());
                match instead {
                    Some(Ok(which)) if !taken.is_empty() => {
                        let place = which % taken.len();
                        let (at, units, note) = taken[place];
                        // A log that is full may have moved what is owed.
                        if !owed {
                            log.undo(note, units);
                            prop_assert_eq!(note, at);
                            taken.remove(place);
                        }
                    }
                    Some(Err(extra)) => {
                        log.charge(now, extra);
                        if log.taken.len() as u64 >= rate.count {
                            owed = true;
                        }
                        taken.push((now.nanos(), extra, now.nanos()));
                    }
                    _ if cost <= rate.count && !owed => {
                        assert_advice(&log, now, cost)?;
                        let fits = in_view(&taken) + cost <= rate.count;
                        match log.take(now, cost) {
                            Take::Now(note) => {
                                prop_assert!(fits);
                                taken.push((now.nanos(), cost, note));
                            }
                            Take::At(_) => prop_assert!(!fits),
                        }
                    }
                    _ => {}
                }
                if owed {
                    prop_assert!(log.facts(now).remaining <= rate.count.saturating_sub(in_view(&taken)));
                    owed = log.sum > 0;
                } else {
                    prop_assert_eq!(log.facts(now).remaining, rate.count.saturating_sub(in_view(&taken)));
                    assert_facts(&log, now)?;
                }
                prop_assert!(log.taken.len() as u64 <= rate.count);
            }
        }

        /// In no interval shorter than the window does more than the limit go.
        #[test]
        fn no_interval_of_a_log_holds_more_than_the_limit(
            (rate, asks) in rates().prop_flat_map(|rate| (Just(rate), asks(rate.period))),
        ) {
            let mut log = Log::new(rate);
            let mut taken = Taken::new();
            let mut now = Moment::at(0);
            for Ask { step, cost, .. } in asks {
                now = now.plus_nanos(step);
                if let Take::Now(note) = log.take(now, cost.min(rate.count)) {
                    taken.push((now.nanos(), cost.min(rate.count), note));
                }
            }
            for (from, ..) in &taken {
                prop_assert!(counted(&taken, *from, from + rate.period - 1) <= rate.count);
            }
        }

        /// The bounds that the page states: of the estimate against the exact count, and of what goes in any interval.
        #[test]
        fn two_counters_are_off_by_no_more_than_they_say(
            (rate, asks) in rates().prop_flat_map(|rate| (Just(rate), asks(rate.period))),
        ) {
            let mut counters = Weighted::new(rate);
            let mut taken = Taken::new();
            let mut now = Moment::at(3);
            for Ask { step, cost, instead } in asks {
                now = now.plus_nanos(step);
                if let (Some(Ok(which)), false) = (instead, taken.is_empty()) {
                    let (_, units, note) = taken.remove(which % taken.len());
                    counters.undo(note, units);
                }
                let cost = cost.min(rate.count);
                assert_advice(&counters, now, cost)?;
                assert_facts(&counters, now)?;
                let (seen, elapsed) = counters.at(now);
                let exact = seen.whole(counted(&taken, (now.nanos() + 1).saturating_sub(rate.period), now.nanos()));
                let estimate = seen.estimate(elapsed);
                let (over, left) = (u128::from(elapsed), u128::from(rate.period - elapsed));
                prop_assert!(exact <= estimate + u128::from(seen.before) * over);
                prop_assert!(exact + u128::from(seen.before) * left >= estimate);
                let fits = estimate + seen.whole(cost) <= seen.whole(rate.count);
                match counters.take(now, cost) {
                    Take::Now(note) => {
                        prop_assert!(fits);
                        taken.push((now.nanos(), cost, note));
                    }
                    Take::At(_) => prop_assert!(!fits),
                }
            }
            for (place, (from, ..)) in taken.iter().enumerate() {
                for (to, ..) in taken[place..].iter().filter(|(to, ..)| to - from <= rate.period) {
                    let sum = u128::from(counted(&taken, *from, *to)) * u128::from(rate.period);
                    prop_assert!(sum <= u128::from(rate.count) * u128::from(rate.period + (to - from)));
                }
            }
        }

        /// What is put back later never makes more go than was really free: whatever was taken counts for as long.
        #[test]
        fn what_is_put_back_counts_for_no_shorter_than_it_should(
            (rate, asks) in rates().prop_flat_map(|rate| (Just(rate), asks(rate.period))), exact in any::<bool>(),
        ) {
            let mut counting = if exact { Counting::exact(rate) } else { Counting::weighted(rate) };
            // The same without whatever is put back.
            let mut really = counting.clone();
            let mut taken = Taken::new();
            let mut now = Moment::at(0);
            for Ask { step, cost, instead } in asks {
                now = now.plus_nanos(step);
                let cost = cost.min(rate.count);
                taken.retain(|(at, ..)| now.nanos() - at < rate.period);
                if let (Some(Ok(which)), false) = (instead, taken.is_empty()) {
                    let (_, units, note) = taken.remove(which % taken.len());
                    counting.put_back(now, units);
                    really.undo(note, units);
                } else if let Take::Now(_) = counting.take(now, cost) {
                    let Take::Now(note) = really.take(now, cost) else {
                        return Err(TestCaseError::fail("more than was free"));
                    };
                    taken.push((now.nanos(), cost, note));
                }
                prop_assert!(counting.facts(now).remaining <= really.facts(now).remaining);
            }
        }

        /// Also if limit and window change, what was taken is undone, put back or owed, and the clock goes back.
        #[test]
        fn either_way_of_counting_answers_as_a_naive_one(
            (rate, asks) in rates().prop_flat_map(|rate| (Just(rate), asks(rate.period))), exact in any::<bool>(),
            others in proptest::collection::vec((0..12_usize, rates(), 0_u64..100_000_000_000), 100),
        ) {
            let mut counting = if exact { Counting::exact(rate) } else { Counting::weighted(rate) };
            let mut naive = Naive { exact, rate, latest: 0, counts: BTreeMap::new() };
            let mut taken = Vec::new();
            let mut now = Moment::at(YEAR);
            for (Ask { step, cost, instead }, (other, new_rate, back)) in asks.into_iter().zip(others) {
                now = now.plus_nanos(step);
                let mut changed = exact;
                let mut seen = naive.clone();
                match (other, instead) {
                    (0, _) => {
                        counting.set_rate(now, new_rate);
                        seen.set_rate(now, new_rate);
                        changed = true;
                    }
                    (1, _) => {
                        counting.put_back(now, cost);
                        seen.put_back(now, cost);
                        changed = true;
                    }
                    (2, _) => now = Moment::from_nanos(now.nanos() - back % (2 * rate.period)),
                    (_, Some(Ok(which))) if !taken.is_empty() => {
                        let (note, units, window) = taken.swap_remove(which % taken.len());
                        counting.undo(note, units);
                        // The numbers of windows of another length say nothing.
                        if exact || window == naive.rate.period {
                            naive.undo(note, units);
                        }
                        changed = false;
                    }
                    (_, Some(Err(extra))) => {
                        counting.charge(now, extra);
                        seen.see(now);
                        seen.add(extra);
                        changed = true;
                    }
                    _ => {
                        seen.see(now);
                        let cost = cost.min(counting.largest());
                        assert_advice(&counting, now, cost)?;
                        let fits = seen.used() + seen.whole(cost) <= seen.whole(seen.rate.count);
                        match counting.take(now, cost) {
                            Take::Now(note) => {
                                prop_assert!(fits);
                                taken.push((note, cost, seen.rate.period));
                                seen.add(cost);
                                changed = true;
                            }
                            Take::At(_) => prop_assert!(!fits),
                        }
                    }
                }
                if changed {
                    naive = seen;
                }
                let mut seen = naive.clone();
                seen.see(now);
                let free = seen.whole(seen.rate.count).saturating_sub(seen.used()) / seen.whole(1);
                assert_facts(&counting, now)?;
                prop_assert_eq!(u128::from(counting.facts(now).remaining), free);
                prop_assert_eq!(counting.is_fresh(now), seen.used() == 0);
                if exact {
                    naive = seen;
                }
            }
        }
    }

    #[test]
    fn a_clock_that_goes_back_gives_nothing_twice() {
        let (early, late) = (Moment::at(0), Moment::at(10_000_000_000));
        for mut counting in [Counting::exact(Rate::per_second(3)), Counting::weighted(Rate::per_second(3))] {
            let _taken = counting.take(late, 3);
            for _ in 0..3 {
                let Take::At(due) = counting.take(early, 1) else { panic!("none is left") };
                assert!(due > late);
                assert_eq!(counting.take(late, 1), Take::At(due));
            }
        }
    }

    #[test]
    fn what_is_owed_is_gone_after_a_window_or_two() {
        let mut log = Log::new(Rate::per_second(3));
        let mut counters = Weighted::new(Rate::per_second(3));
        let now = Moment::from_nanos(5_000_000_000);
        for _ in 0..10 {
            log.charge(now, u64::from(u32::MAX));
            counters.charge(now, u64::from(u32::MAX));
        }
        assert_eq!(log.take(now, 3), Take::At(now + Duration::from_secs(1)));
        assert_eq!(counters.take(now, 3), Take::At(now + Duration::from_secs(2)));
        log.charge(now, u64::MAX);
        counters.charge(now, u64::MAX);
        assert!(matches!(log.take(Moment::NEVER, 1), Take::Now(_)));
        assert!(matches!(counters.take(Moment::NEVER, 1), Take::Now(_)));
    }

    #[test]
    fn what_is_owed_stays_owed_however_often_the_window_changes() {
        let mut counting = Counting::weighted(Rate { count: 3, period: 1024 });
        let mut now = Moment::from_nanos(1 << 20);
        // Each time all of the window before is still in view.
        for period in [512, 256, 128, 64, 32, 16, 8] {
            counting.charge(now, u64::MAX);
            counting.set_rate(now, Rate { count: 3, period });
            now = now.plus_nanos(period);
            assert!(matches!(counting.take(now, 1), Take::At(due) if due > now), "{counting:?}");
        }
    }

    #[test]
    fn another_limit_keeps_what_was_taken() {
        let now = Moment::from_nanos(5_500_000_000);
        for mut counting in [Counting::exact(Rate::per_second(10)), Counting::weighted(Rate::per_second(10))] {
            let _taken = counting.take(now, 6);
            counting.set_rate(now, Rate::per_second(7));
            assert_eq!(counting.facts(now).remaining, 1);
            counting.set_rate(now, Rate::per_minute(7));
            assert_eq!(counting.facts(now).remaining, 1);
            counting.set_rate(now, Rate::per_minute(5));
            assert_eq!(counting.facts(now).remaining, 0);
            assert!(counting.facts(now).reset > now);
        }
    }

    #[test]
    fn the_other_way_of_counting_keeps_what_was_taken() {
        let now = Moment::from_nanos(5_500_000_000);
        let (log, counters) = (Counting::exact(Rate::per_second(10)), Counting::weighted(Rate::per_second(10)));
        for (from, to) in [(&log, &counters), (&counters, &log), (&log, &log), (&counters, &counters)] {
            let mut counting = from.clone();
            let _taken = counting.take(now, 6);
            // A clock that went back does not make what counts older.
            counting.adopt(Moment::from_nanos(5_400_000_000), to);
            assert_eq!(counting.is_exact(), to.is_exact());
            assert_eq!(counting.facts(now).remaining, 4);
            assert!(matches!(counting.take(now, 5), Take::At(due) if due > now));
        }
    }

    #[test]
    fn nothing_is_forgotten_at_the_end_of_the_scale() {
        for mut counting in [Counting::exact(Rate::per_second(3)), Counting::weighted(Rate::per_second(3))] {
            assert!(matches!(counting.take(Moment::NEVER, 3), Take::Now(_)));
            for now in [Moment::NEVER, Moment::at(0)] {
                assert_eq!(counting.take(now, 1), Take::At(Moment::NEVER), "{counting:?}");
            }
        }
    }

    #[test]
    fn another_window_counts_from_the_latest_moment_although_the_clock_went_back() {
        let (early, late) = (Moment::from_nanos(5_000_000_000), Moment::from_nanos(125_000_000_000));
        for mut counting in [Counting::exact(Rate::per_minute(3)), Counting::weighted(Rate::per_minute(3))] {
            let _taken = counting.take(late, 3);
            counting.set_rate(early, Rate::per_second(3));
            assert!(matches!(counting.take(early, 1), Take::At(due) if due > early));
            if let Counting::Weighted(_) = counting {
                assert!(matches!(counting.take(late, 1), Take::At(_)), "{counting:?}");
            }
        }
    }
}
