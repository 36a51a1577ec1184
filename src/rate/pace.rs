//! The arithmetic of the token bucket and the leaky bucket: one number that says up to when the tokens are spoken for.
//!
//! This is the generic cell rate algorithm (ITU-T I.371, the virtual scheduling form): the state is the theoretical
//! arrival time, a token moves it on by one interval, and a call fits if it would not lie further ahead of now than the
//! burst. The usual form counts in nanoseconds and has to round the interval. Here time is stretched by a factor of 1
//! to 2 instead, so that one token is exactly a power of two of units, none longer than a nanosecond:
//!
//! ```text
//! virtual(t) = t * multiplier >> 62        one token = 1 << bits        burst = tokens << bits
//! ```
//!
//! Taking is an addition and a comparison, and nothing is rounded but the reading of the clock, to less than a unit.
//! The advice is exact: it is the first nanosecond at which the same question gets another answer. Who comes at that
//! nanosecond comes up to a unit late, and is not charged for it ([`GRAIN`]): so the long-run rate is exact, too.

use super::units::Rate;
use crate::internal::time::Moment;

/// Where the stretched time begins: 18 years before the process, so that no reading is earlier.
const BASE: u64 = (1 << 62) - (1 << 59);
/// Where it ends, 36 years after the process. Later readings begin anew: a state then lies far ahead of them, and is
/// [dated back](Pace::healed).
const LAST: u64 = (1 << 61) - (1 << 59);
/// How much further ahead than it could be a state may lie, in nanoseconds, before it is dated back: more than threads
/// that have read the same clock can differ by.
const SKEW: u64 = 10_000_000_000;
/// The most a burst may span, about nine years of stretched time. A debt may span as much again.
const LONGEST_SPAN: u64 = 1 << 58;
const SHIFT: u32 = 62;
/// How many units late still counts as in time. A token has at least two, so the bound holds: in a time `t` fewer than
/// `burst + rate × t + 1` go out, for one unit of grace and less than one of rounding.
const GRAIN: u64 = 1;
/// How late one may come, in nanoseconds, without a paced bucket falling behind its rate: timers are as late as that.
const TIMER_GRAIN: u64 = 2_000_000;

/// From where the next token counts: an idle bucket's state lies in the past and counts as now, but who comes a little
/// late at a promised moment is not charged for it.
#[inline]
const fn from(state: u64, time: u64, grace: u64) -> u64 {
    if state + grace >= time { state } else { time }
}

/// Where on the scale a reading lies that is not on it. Out of line: inlined, its division is done for every call.
#[cold]
#[inline(never)]
const fn out_of_scale(now: Moment) -> u64 {
    now.nanos().saturating_sub(BASE) % LAST
}

/// A rate and a burst, made ready for the arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pace {
    /// Units per nanosecond, in 2^-62.
    pub(super) multiplier: u64,
    /// A token is `1 << bits` units.
    pub(super) bits: u32,
    pub(super) burst: u32,
    /// A call that costs more than the burst passes when the burst is there, and the next one waits for what it took.
    /// There is no burst to make up for the grain of timers, so it is allowed for.
    pub(super) paced: bool,
}

/// The answer to a request for tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Take {
    /// They are there: the state after taking them.
    Now(u64),
    /// They are there from this moment on.
    At(Moment),
}

impl Pace {
    /// What stands for a pace where a setting was wrong.
    pub(super) const NONE: Self = Self { multiplier: 1 << SHIFT, bits: 1, burst: 1, paced: false };

    /// The pace of a rate that the caller has checked, or `None` if the burst spans too long a time.
    pub(super) fn new(rate: Rate, burst: u32, paced: bool) -> Option<Self> {
        // The smallest power of two that is no less than the interval in nanoseconds, and 2: bits <= 55 for a year.
        let bits = (1..SHIFT).find(|bits| u128::from(rate.count) << bits >= u128::from(rate.period))?;
        let multiplier = (u128::from(rate.count) << (bits + SHIFT)) / u128::from(rate.period);
        let fits = u128::from(burst) << bits <= u128::from(LONGEST_SPAN);
        fits.then_some(Self { multiplier: multiplier as u64, bits, burst, paced })
    }

    /// The stretched time.
    #[inline]
    pub(super) fn virtual_time(self, now: Moment) -> u64 {
        let elapsed = now.nanos().wrapping_sub(BASE);
        let elapsed = if elapsed <= LAST { elapsed } else { out_of_scale(now) };
        // Shifted before it is multiplied, which the size of `LAST` allows: what remains is a product's upper half.
        ((u128::from(elapsed << (64 - SHIFT)) * u128::from(self.multiplier)) >> 64) as u64
    }

    /// The first moment whose stretched time is no less than this. For a reading beyond the scale it is told by what is
    /// missing, and may be a nanosecond later.
    fn moment(self, now: Moment, time: u64) -> Moment {
        if now.nanos() > BASE + LAST {
            return now.plus_nanos(self.nanos(time.saturating_sub(self.virtual_time(now))));
        }
        let nanos = self.nanos(time);
        if nanos > LAST { Moment::NEVER } else { Moment::from_nanos(BASE + nanos) }
    }

    /// The length of so many tokens, no more than [`largest`](Self::largest).
    #[inline]
    fn cost(self, tokens: u32) -> u64 {
        u64::from(tokens) << self.bits
    }

    /// The length of any number of tokens, cut at the longest debt.
    pub(super) fn any_cost(self, tokens: u32) -> u64 {
        (u128::from(tokens) << self.bits).min(u128::from(LONGEST_SPAN)) as u64
    }

    #[inline]
    fn span(self) -> u64 {
        self.cost(self.burst)
    }

    /// The most that one call can cost.
    pub(super) fn largest(self) -> u32 {
        if self.paced { u32::try_from(LONGEST_SPAN >> self.bits).unwrap_or(u32::MAX) } else { self.burst }
    }

    /// How many units late still counts as in time.
    #[inline]
    fn grace(self) -> u64 {
        if self.paced { ((u128::from(TIMER_GRAIN) * u128::from(self.multiplier)) >> SHIFT) as u64 } else { GRAIN }
    }

    /// The state for one who comes later than the grain of timers explains: as many whole tokens as that holds are there.
    pub(super) fn no_older(self, state: u64, now: Moment) -> u64 {
        let (time, grace) = (self.virtual_time(now), self.grace());
        if state + grace >= time { state } else { time - (grace >> self.bits << self.bits) }
    }

    /// So many units in nanoseconds, rounded up.
    fn nanos(self, units: u64) -> u64 {
        (u128::from(units) << SHIFT).div_ceil(u128::from(self.multiplier)) as u64
    }

    /// The rate as it is drawn, rounded.
    pub(super) fn per_second(self) -> f64 {
        let unit = self.multiplier as f64 / (1_u64 << SHIFT) as f64;
        let rate = unit * 1e9 / (1_u64 << self.bits) as f64;
        (rate * 1000.0).round() / 1000.0
    }

    /// How long an empty bucket takes to fill, in whole nanoseconds.
    pub(super) fn fill_time(self) -> u64 {
        // Rounded down, since the multiplier was.
        ((u128::from(self.span()) << SHIFT) / u128::from(self.multiplier)) as u64
    }

    /// The state after taking so many tokens, no more than the burst, if they are there now.
    ///
    /// An idle bucket's state lies in the past and counts as now: it is full, never more. The sums stay below 2^63,
    /// since a state lies no further ahead of the time than a span and a debt, and `LAST` is below 2^61.
    #[inline]
    pub(super) fn take_now(self, state: u64, now: Moment, tokens: u32) -> Option<u64> {
        let time = self.virtual_time(now);
        if state + self.grace() < time {
            // Full, and no cost is above the burst.
            return Some(time + self.cost(tokens));
        }
        let next = state + self.cost(tokens);
        (next <= time + self.span()).then_some(next)
    }

    /// Asks for tokens, no more than the largest cost, behind so many others that are spoken for but not taken yet.
    pub(super) fn take(self, state: u64, now: Moment, ahead: u64, tokens: u32) -> Take {
        let time = self.virtual_time(now);
        // A queue is at most 2^24 waiters of the largest cost each, so its sum can reach any length.
        let ahead = (u128::from(ahead) << self.bits).min(u128::from(u64::MAX >> 1)) as u64;
        let from = from(state, time, self.grace()).saturating_add(ahead);
        let full = from.saturating_add(self.cost(tokens.min(self.burst)));
        if full <= time + self.span() {
            Take::Now(from + self.cost(tokens))
        } else {
            Take::At(self.moment(now, full - self.span()))
        }
    }

    /// The state after so many tokens are put back. A bucket that would be fuller than full is full.
    pub(super) fn put_back(self, state: u64, tokens: u32) -> u64 {
        state.saturating_sub(self.any_cost(tokens))
    }

    /// The state after tokens that were taken at some time and not used come back, in units. What has accrued since then
    /// comes off: it might not have, had the bucket been full without this taking. So the state never falls below that in
    /// which they had never been taken; nor does an idle bucket become more than full.
    pub(super) fn refunded(self, state: u64, now: Moment, units: u64) -> u64 {
        state.saturating_sub(units).max(state.min(self.virtual_time(now)))
    }

    /// The state after so many tokens are taken whether they are there or not, and how many that were: what is missing is
    /// owed, up to [`LONGEST_SPAN`], and what would be owed beyond that is not taken.
    pub(super) fn charge(self, state: u64, now: Moment, tokens: u32) -> (u64, u32) {
        let time = self.virtual_time(now);
        let from = from(state, time, self.grace());
        let room = (time + self.span() + LONGEST_SPAN).saturating_sub(from) >> self.bits;
        let booked = u64::from(tokens).min(room) as u32;
        (from + self.cost(booked), booked)
    }

    /// How far a state lies beyond that of an empty bucket: what is owed.
    pub(super) fn debt(self, state: u64, now: Moment) -> u64 {
        state.saturating_sub(self.virtual_time(now) + self.span())
    }

    /// The state, dated back if it lies further ahead than an empty bucket that owes so much: another runtime's clock is
    /// ahead, or the scale has begun anew. What it owes stays owed.
    pub(super) fn healed(self, state: u64, now: Moment, debt: u64) -> u64 {
        let empty = self.virtual_time(now) + self.span() + debt;
        let skew = ((u128::from(SKEW) * u128::from(self.multiplier)) >> SHIFT) as u64;
        if state > empty + skew { empty } else { state }
    }

    /// Whether all are there: as in a state of 0.
    pub(super) fn is_full(self, state: u64, now: Moment) -> bool {
        state <= self.virtual_time(now)
    }

    /// How many tokens are there.
    pub(super) fn available(self, state: u64, now: Moment) -> u32 {
        (self.level(state, now).max(0) >> self.bits) as u32
    }

    /// When one more token than are there now could have gone.
    pub(super) fn reset(self, state: u64, now: Moment) -> Moment {
        let from = from(state, self.virtual_time(now), self.grace());
        self.moment(now, from + self.cost(self.available(state, now)) + self.cost(1) - self.span())
    }

    /// What is there, in units; what is owed is negative.
    fn level(self, state: u64, now: Moment) -> i128 {
        let time = self.virtual_time(now);
        i128::from(time + self.span()) - i128::from(from(state, time, self.grace()).max(time))
    }

    /// The state of another pace that has, or owes, as many tokens at this moment, fractions included, up to its burst.
    pub(super) fn convert(self, state: u64, now: Moment, to: Self) -> u64 {
        let level = (self.level(state, now) << to.bits) >> self.bits;
        let level = level.clamp(-i128::from(LONGEST_SPAN), i128::from(to.span()));
        (i128::from(to.virtual_time(now) + to.span()) - level) as u64
    }
}

#[cfg(all(test, not(resile_loom)))]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn rates() -> impl Strategy<Value = Rate> {
        prop_oneof![
            Just(Rate::per_second(1)),
            Just(Rate::per_second(1_000_000_000)),
            Just(Rate::per_second(999_983)),
            Just(Rate::new(3, Duration::from_secs(7))),
            (1_u64..1_000_000_000).prop_map(Rate::per_second),
            (1_u64..1000, 1_u64..86_400).prop_map(|(count, secs)| Rate::new(count, Duration::from_secs(secs))),
        ]
    }

    /// L4: intervals that are no whole nanoseconds lose nothing in the long run.
    #[test]
    fn the_long_run_rate_is_exact() {
        let rates = [Rate::new(3, Duration::from_secs(7)), Rate::per_second(999_983), Rate::per_second(7)];
        for (rate, paced) in rates.into_iter().flat_map(|rate| [(rate, false), (rate, true)]) {
            let pace = Pace::new(rate, 1, paced).unwrap();
            let (mut state, mut now) = (0, Moment::at(0));
            let start = now;
            let tokens = 100_000_u64;
            for _ in 0..=tokens {
                loop {
                    match pace.take(state, now, 0, 1) {
                        Take::Now(next) => break state = next,
                        Take::At(at) => now = at,
                    }
                }
            }
            let exact = u128::from(tokens) * u128::from(rate.period) / u128::from(rate.count);
            let took = u128::from(now.nanos_since(start));
            assert!(took.abs_diff(exact) <= 1, "{rate:?}: {took} for {exact}");
        }
    }

    /// L1: after a long idle time exactly the burst passes, not one more.
    #[test]
    fn an_idle_bucket_holds_its_burst_and_no_more() {
        let pace = Pace::new(Rate::per_second(10), 5, false).unwrap();
        let now = Moment::at(365 * 86_400 * 1_000_000_000);
        assert_eq!(pace.available(0, now), 5);
        let mut state = 0;
        let took = (0..100).take_while(|_| match pace.take(state, now, 0, 1) {
            Take::Now(next) => {
                state = next;
                true
            }
            Take::At(_) => false,
        });
        assert_eq!(took.count(), 5);
    }

    #[test]
    fn readings_at_the_ends_of_time_neither_panic_nor_overflow() {
        let pace = Pace::new(Rate::per_second(1_000_000_000), 1_000_000, false).unwrap();
        for now in [Moment::from_nanos(0), Moment::at(0), Moment::NEVER] {
            let Take::Now(state) = pace.take(0, now, 0, 1) else { panic!("an idle bucket is full") };
            assert!(pace.available(state, now) < 1_000_000);
            assert!(pace.take(state, Moment::from_nanos(0), u64::MAX, 1) != Take::Now(0));
        }
    }

    #[test]
    fn a_burst_spans_as_much_as_the_scale_holds_and_no_more() {
        let slow = Rate::new(1, std::time::Duration::from_nanos(1 << 27));
        assert!(Pace::new(slow, 1 << 31, false).is_some());
        assert!(Pace::new(slow, (1 << 31) + 1, false).is_none());
    }

    proptest! {
        /// Law: in no interval more than burst + ceil(rate × t), whatever the clock does; the advice is exact to the
        /// nanosecond; a refusal changes nothing by construction, since the state is the caller's.
        #[test]
        fn no_interval_holds_more_than_burst_and_rate(
            rate in rates(),
            burst in 1_u32..20,
            steps in proptest::collection::vec((0_u64..4, 1_u32..6, any::<bool>()), 1..120),
        ) {
            let pace = Pace::new(rate, burst, false).unwrap();
            let interval = (rate.period / rate.count).max(1);
            let (mut state, mut now) = (0, Moment::at(0));
            let mut taken: Vec<(u64, u64)> = Vec::new();
            for (step, tokens, jump) in steps {
                let years = 365 * 86_400 * 1_000_000_000 * u64::from(jump && step == 3 && taken.len() < 20);
                now = now.plus_nanos(step * interval / 2 + years);
                let tokens = tokens.min(burst);
                match pace.take(state, now, 0, tokens) {
                    Take::Now(next) => {
                        state = next;
                        taken.push((now.nanos(), tokens.into()));
                    }
                    Take::At(at) => {
                        prop_assert!(at > now);
                        prop_assert!(matches!(pace.take(state, at, 0, tokens), Take::Now(_)));
                        let before = Moment::from_nanos(at.nanos() - 1);
                        prop_assert!(matches!(pace.take(state, before, 0, tokens), Take::At(_)));
                    }
                }
                for (place, (from, _)) in taken.iter().enumerate() {
                    let mut sum = 0;
                    for (to, count) in &taken[place..] {
                        sum += count;
                        let time = u128::from(to - from);
                        let allowed = u128::from(burst) + (time * u128::from(rate.count)).div_ceil(u128::from(rate.period));
                        prop_assert!(u128::from(sum) <= allowed, "{sum} of {allowed} in {time} ns");
                    }
                }
            }
        }

        /// Against a bucket in whole numbers: its level is counted in the period's part of a token, and each nanosecond
        /// brings as many as the count. Costs are settled and put back, too, and rates are changed.
        #[test]
        fn the_state_is_that_of_an_exact_bucket(
            rates in (rates(), rates()), burst in 1_u32..20, paced in any::<bool>(),
            steps in proptest::collection::vec((0_u64..4, 1_u32..30, 0_u32..8), 1..120),
        ) {
            // The largest cost of a paced bucket is owed at once, and it takes no more than it is late.
            let burst = if paced { 1 } else { burst };
            let (rate, other) = rates;
            let mut pace = Pace::new(rate, burst, paced).unwrap();
            let whole = |tokens: u32| i128::from(tokens) * i128::from(rate.period);
            // Reading the clock rounds by less than a unit, and a unit late is in time; as much at each change of the
            // rate.
            let mut slack = 2 * i128::from(rate.count);
            let interval = (rate.period / rate.count).max(1);
            let (mut state, mut now, mut level) = (0, Moment::at(0), whole(burst));
            for (step, tokens, act) in steps {
                let elapsed = if paced && step == 0 { 0 } else { step * interval.max(2 * TIMER_GRAIN) / 2 };
                now = now.plus_nanos(elapsed);
                level = (level + i128::from(elapsed) * i128::from(rate.count)).min(whole(burst));
                if paced {
                    // Lateness up to the grain is no part of this model.
                    state = state.max(pace.virtual_time(now));
                }
                match act {
                    0 => {
                        (state, _) = pace.charge(state, now, tokens);
                        level -= whole(tokens);
                    }
                    1 => {
                        state = pace.put_back(state, tokens);
                        level = (level + whole(tokens)).min(whole(burst));
                    }
                    2 => {
                        let there = Pace::new(other, burst, paced).unwrap();
                        state = there.convert(pace.convert(state, now, there), now, pace);
                        // A unit of the other rate may be many of this one's.
                        let unit = |pace: Pace| whole(1) >> pace.bits;
                        slack += unit(pace).max(unit(there)) + 1;
                        pace = Pace::new(rate, burst, paced).unwrap();
                    }
                    _ => {
                        let tokens = tokens.min(pace.largest());
                        let needs = whole(tokens.min(burst));
                        match pace.take(state, now, 0, tokens) {
                            Take::Now(next) => {
                                prop_assert!(level + slack >= needs, "{level} for {needs}");
                                state = next;
                                level -= whole(tokens);
                            }
                            Take::At(_) => prop_assert!(level - slack < needs, "{level} for {needs}"),
                        }
                    }
                }
                let there = i128::from(pace.available(state, now)) * i128::from(rate.period);
                prop_assert!(there <= level.max(0) + slack && there + whole(1) + slack > level);
            }
        }

        /// What is owed has an end, and what would be owed beyond it is not taken.
        #[test]
        fn a_debt_ends_at_the_longest_span(rate in rates(), burst in 1_u32..20, times in 1_usize..4, off in 0_u64..1 << 50) {
            let pace = Pace::new(rate, burst, false).unwrap();
            let now = Moment::at(off);
            let (mut state, mut taken) = (0, 0_u128);
            for _ in 0..times {
                let (next, booked) = pace.charge(state, now, u32::MAX);
                prop_assert_eq!(next - state.max(pace.virtual_time(now)), u64::from(booked) << pace.bits);
                state = next;
                taken += u128::from(booked);
            }
            let room = u128::from(pace.span() + LONGEST_SPAN) >> pace.bits;
            prop_assert_eq!(taken, room.min(times as u128 * u128::from(u32::MAX)));
            prop_assert!(pace.debt(state, now) <= LONGEST_SPAN);
        }

        /// The short way decides as the long one, to the unit, also where the clock went back.
        #[test]
        fn both_ways_to_take_are_the_same(
            rate in rates(), burst in 1_u32..20, paced in any::<bool>(), tokens in 1_u32..20, at in 0_u64..1 << 60,
            off in prop_oneof![-3_i64..4, any::<i32>().prop_map(i64::from), -(1_i64 << 59)..1 << 59],
        ) {
            let pace = Pace::new(rate, burst, paced).unwrap();
            let tokens = tokens.min(burst);
            let now = Moment::at(at);
            let time = pace.virtual_time(now);
            // Around the ends at which the answer changes: empty, full, and late by the grace.
            for edge in [time, time + pace.span() - pace.cost(tokens), time - pace.grace()] {
                let state = edge.saturating_add_signed(off);
                let long = match pace.take(state, now, 0, tokens) {
                    Take::Now(next) => Some(next),
                    Take::At(_) => None,
                };
                prop_assert_eq!(pace.take_now(state, now, tokens), long);
            }
        }

        /// Law: a change of rate keeps the level, clipped at the new burst, to less than a token.
        #[test]
        fn a_change_of_rate_keeps_the_level(
            a in rates(), b in rates(), burst in (1_u32..50, 1_u32..50), spent in 0_u32..50, owed in 0_u32..50,
        ) {
            let (from, to) = (Pace::new(a, burst.0, false).unwrap(), Pace::new(b, burst.1, false).unwrap());
            let now = Moment::at(77);
            let spent = spent.min(burst.0);
            let Take::Now(state) = from.take(0, now, 0, spent) else { panic!("full") };
            let after = from.convert(state, now, to);
            prop_assert_eq!(to.available(after, now), (burst.0 - spent).min(burst.1));
            let after = from.convert(from.charge(state, now, burst.0 - spent + owed).0, now, to);
            prop_assert_eq!(to.available(after, now), 0);
            prop_assert_eq!(to.available(to.put_back(after, owed), now), 0);
            prop_assert_eq!(to.available(to.put_back(after, owed + 1), now), 1);
        }
    }
}
