//! Counting over the last stretch of time: exactly, by a log, or nearly, by two counters.

use std::collections::VecDeque;

use super::ledger::Ledger;
use super::pace::Take;
use super::shell::Facts;
use super::units::Rate;
use crate::internal::time::Moment;

/// Nobody owes more.
const MOST: u64 = 1 << 62;

/// What was taken, each with its moment: exact, and as long as the limit is high.
///
/// What was taken at `t` counts until just before `t + window`.
#[derive(Clone, Debug)]
pub(super) struct Log {
    limit: u64,
    window: u64,
    /// Moments and what was taken at them, oldest first. No longer than the limit.
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
        while let Some((_, units)) = self.taken.front().filter(|(at, _)| at.saturating_add(self.window) <= self.latest)
        {
            self.sum -= units;
            self.taken.pop_front();
        }
        self.latest
    }

    /// When so many of those that count no longer will; there are as many.
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
        let missing = (self.sum + cost).saturating_sub(self.limit);
        if missing > 0 {
            return Take::At(self.gone(missing));
        }
        self.add(now, cost);
        Take::Now(now)
    }

    fn undo(&mut self, taken: u64, cost: u64) {
        let place = self.taken.partition_point(|(at, _)| *at < taken);
        if self.taken.get(place).is_some_and(|(at, _)| *at == taken) {
            self.remove(place, cost);
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

    fn charge(&mut self, now: Moment, tokens: u64) {
        let now = self.forget(now);
        let tokens = tokens.min(MOST - self.sum);
        if tokens > 0 {
            self.add(now, tokens);
        }
    }

    fn facts(&mut self, now: Moment) -> Facts {
        let now = self.forget(now);
        let reset = match self.sum {
            0 => Moment::from_nanos(now.saturating_add(self.window)),
            sum => self.gone((sum + 1).saturating_sub(self.limit).max(1)),
        };
        Facts { limit: self.limit, remaining: self.limit.saturating_sub(self.sum), window: self.window, reset }
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
    /// The running window's number.
    index: u64,
    current: u64,
    before: u64,
}

impl Weighted {
    fn new(rate: Rate) -> Self {
        Self { limit: rate.count, window: rate.period, index: 0, current: 0, before: 0 }
    }

    /// The counters as they are at a moment, and how much of the running window is over.
    fn at(self, now: Moment) -> (Self, u64) {
        let index = now.nanos() / self.window;
        let (current, before) = match index.checked_sub(self.index) {
            None => return (self, 0),
            Some(0) => (self.current, self.before),
            Some(1) => (0, self.current),
            Some(_) => (0, 0),
        };
        (Self { index, current, before, ..self }, now.nanos() % self.window)
    }

    /// The estimate, times the window's length.
    fn estimate(&self, elapsed: u64) -> u128 {
        u128::from(self.current) * u128::from(self.window) + u128::from(self.before) * u128::from(self.window - elapsed)
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
            Some(room) => (self.index, self.faded(self.before, room)),
            None => (self.index.saturating_add(1), self.faded(self.current, self.limit - cost)),
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
        Take::Now(seen.index)
    }

    fn undo(&mut self, taken: u64, cost: u64) {
        if taken == self.index {
            self.current = self.current.saturating_sub(cost);
        } else if taken.checked_add(1) == Some(self.index) {
            self.before = self.before.saturating_sub(cost);
        }
    }

    /// Of the window before first, where they weigh less.
    fn put_back(&mut self, now: Moment, tokens: u64) {
        let (seen, _) = self.at(now);
        *self = seen;
        let rest = tokens.saturating_sub(self.before);
        self.before = self.before.saturating_sub(tokens);
        self.current = self.current.saturating_sub(rest);
    }

    fn charge(&mut self, now: Moment, tokens: u64) {
        let (seen, _) = self.at(now);
        *self = seen;
        self.current = self.current.saturating_add(tokens).min(MOST);
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

    pub(super) fn rate(&self) -> Rate {
        let (count, period) = match self {
            Self::Log(log) => (log.limit, log.window),
            Self::Weighted(counters) => (counters.limit, counters.window),
        };
        Rate { count, period }
    }

    /// Another limit from now on, for the same way of counting. What was taken still counts; in a longer window only what
    /// the old one still knew of.
    pub(super) fn set_rate(&mut self, now: Moment, rate: Rate) {
        match self {
            Self::Log(log) => {
                log.forget(now);
                (log.limit, log.window) = (rate.count, rate.period);
                log.forget(now);
            }
            Self::Weighted(counters) => {
                let (seen, elapsed) = counters.at(now);
                *counters = Weighted { limit: rate.count, ..seen };
                if rate.period != seen.window {
                    // All that is in view counts as of now, rounded up.
                    let current = seen.estimate(elapsed).div_ceil(u128::from(seen.window)) as u64;
                    *counters = Weighted { current, index: now.nanos() / rate.period, ..Weighted::new(rate) };
                }
            }
        }
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

    fn undo(&mut self, taken: u64, cost: u64) {
        either!(self, ledger => ledger.undo(taken, cost));
    }

    fn put_back(&mut self, now: Moment, tokens: u64) {
        either!(self, ledger => ledger.put_back(now, tokens));
    }

    fn charge(&mut self, now: Moment, tokens: u64) {
        either!(self, ledger => ledger.charge(now, tokens));
    }

    fn facts(&mut self, now: Moment) -> Facts {
        either!(self, ledger => ledger.facts(now))
    }
}
