//! One word that callers change: a [`Pace`] for many threads, paced or not.
//!
//! 1. With a flag set the word is above every state, and callers go to the queue's lock.
//! 2. `WAITERS` is set while somebody waits, `BUSY` while the pace is being changed; both are set and cleared under the
//!    lock.
//! 3. A word whose tokens are taken in batches has `BATCHED` set as long as it lives, in the place of `WAITERS`, so that
//!    no other word pays for it; then `BUSY` stands for both.
//! 4. The pace lies in two words that change only while `BUSY` is set: who reads them between reading the word and
//!    swapping it has read them whole, or fails to swap.

use super::pace::{Pace, Take};
use super::purse::Purses;
use super::shell::{Facts, Meter};
use crate::internal::queue::Queue;
use crate::internal::stripe;
use crate::internal::sync::{AcqRel, Acquire, AtomicU64, Relaxed, Release};
use crate::internal::time::Moment;

const WAITERS: u64 = 1 << 62;
const BATCHED: u64 = WAITERS;
const BUSY: u64 = 1 << 63;
const STATE: u64 = WAITERS - 1;

#[derive(Debug)]
pub(super) struct Word<const PACED: bool> {
    /// Up to when the tokens are spoken for, and the two flags.
    cell: AtomicU64,
    multiplier: AtomicU64,
    shape: AtomicU64,
    /// If threads take tokens ahead.
    purses: Option<Box<Purses>>,
}

/// What a pass notes whose tokens came out of a purse: no moment.
const FROM_PURSE: u64 = u64::MAX;

/// What the lock guards beside the word.
#[derive(Debug, Default)]
pub(super) struct Book {
    /// How far the state may lie beyond that of an empty bucket, in units.
    debt: u64,
    /// A stretch of stretched time that has come off tokens which came back. It comes off once only, so that tokens which
    /// were held at the same time all come back.
    charged: (u64, u64),
    /// When the pace was changed, in nanoseconds: what was taken before does not come back.
    changed: u64,
    /// Of a paced word with grants that were not fetched: the state if those had gone when they were due. It says who is
    /// granted next; who may go, the word says. 0 without such grants.
    schedule: u64,
}

impl Book {
    pub(super) const fn owes(&self) -> bool {
        self.debt > 0
    }

    /// The word has moved: so do the turns behind it. A state that has gone by counts as now.
    fn shift(&mut self, pace: Pace, now: Moment, before: u64, after: Take) {
        let Take::Now(after) = after else { return };
        if self.schedule > 0 {
            let time = pace.virtual_time(now);
            let (before, after) = (before.max(time), after.max(time));
            self.schedule = (self.schedule + after.saturating_sub(before)).saturating_sub(before.saturating_sub(after));
        }
    }

    /// What comes back of tokens that were taken at some time, in units: what they cost, less the time since then that has
    /// not come off others.
    ///
    /// That is safe in any order. Compare the word with that of a bucket in which none of the tokens that are out were ever
    /// taken. Each taking puts it ahead by its cost, and it falls back only while the other bucket is full, at the rate. A
    /// unit of time lets it fall back by one, however many tokens are out: so it has to come off once.
    ///
    /// Returns also which stretch is charged then.
    pub(super) fn refund(&self, pace: Pace, taken: Moment, now: Moment, tokens: u32) -> (u64, (u64, u64)) {
        let (since, until) = (pace.virtual_time(taken), pace.virtual_time(now));
        let (from, to) = self.charged;
        let overlap = until.min(to).saturating_sub(since.max(from));
        let uncharged = until.saturating_sub(since).saturating_sub(overlap);
        let cost = pace.any_cost(tokens);
        let off = cost.min(uncharged);
        let charged = if since > to {
            (since, since + off)
        } else if since >= from {
            (from, to + off)
        } else if off >= from - since {
            (since, to + (off - (from - since)))
        } else {
            // Two stretches can't be kept. What is forgotten comes off once more, on the safe side.
            (from, to)
        };
        (cost - off, charged)
    }
}
/// A thread takes no more ahead than this part of what is there, so that nobody does where tokens are scarce.
const AHEAD: u32 = 4;

fn shape(pace: Pace) -> u64 {
    u64::from(pace.bits) << 32 | u64::from(pace.burst)
}

impl<const PACED: bool> Word<PACED> {
    /// A full bucket.
    pub(super) fn new(pace: Pace) -> Self {
        Self::in_state(pace, 0)
    }

    pub(super) fn in_state(pace: Pace, state: u64) -> Self {
        Self {
            cell: AtomicU64::new(state),
            multiplier: AtomicU64::new(pace.multiplier),
            shape: AtomicU64::new(shape(pace)),
            purses: None,
        }
    }

    /// A full bucket whose tokens threads take ahead.
    pub(super) fn batched(pace: Pace, purses: Purses) -> Self {
        Self { purses: Some(Box::new(purses)), ..Self::in_state(pace, BATCHED) }
    }

    /// The most that a thread takes ahead.
    pub(super) fn batch(&self) -> u32 {
        self.purses.as_ref().map_or(0, |purses| purses.batch())
    }

    /// How many tokens threads hold ahead.
    #[cfg(test)]
    pub(super) fn ahead(&self) -> u32 {
        self.purses.as_ref().map_or(0, |purses| purses.all())
    }

    /// The flag that is set while somebody waits.
    const fn waits(&self) -> u64 {
        if self.purses.is_some() { BUSY } else { WAITERS }
    }

    /// Takes out of the thread's purse, or fills that and takes along the way, if nobody waits.
    pub(super) fn take_batched(&self, stripe: usize, now: Moment, cost: u32) -> Option<u64> {
        let purses = self.purses.as_ref()?;
        let mut seen = self.cell.load(Acquire);
        while seen & BUSY == 0 {
            if purses.spend(stripe, cost) {
                return Some(FROM_PURSE);
            }
            let pace = self.pace();
            if cost.wrapping_sub(1) >= pace.burst {
                break;
            }
            let taken = pace.take_now(seen & STATE, now, cost)?;
            let ahead = purses.room(stripe).min(pace.available(taken, now) / AHEAD);
            let (next, ahead) = pace.charge(taken, now, ahead);
            match self.cell.compare_exchange_weak(seen, BATCHED | next, AcqRel, Acquire) {
                Ok(_) => {
                    purses.fill(stripe, ahead);
                    return Some(now.nanos());
                }
                Err(actual) => seen = actual,
            }
        }
        None
    }

    #[inline]
    pub(super) fn pace(&self) -> Pace {
        let shape = self.shape.load(Relaxed);
        Pace {
            multiplier: self.multiplier.load(Relaxed),
            bits: (shape >> 32) as u32,
            burst: shape as u32,
            paced: PACED,
        }
    }

    /// The state, if nobody waits and the pace is not being changed.
    pub(super) fn at_rest(&self) -> Option<u64> {
        Some(self.cell.load(Acquire)).filter(|word| *word <= STATE)
    }

    fn state(&self) -> u64 {
        self.cell.load(Acquire) & STATE
    }

    /// From where the next grant counts.
    fn scheduled(&self, book: &Book) -> u64 {
        self.state().max(book.schedule)
    }

    /// Changes the pace, with the lock held. What is there stays there.
    pub(super) fn set_pace(&self, book: &mut Book, now: Moment, new: Pace) {
        let old = self.pace();
        if old == new {
            return;
        }
        let schedule = if book.schedule > 0 { old.convert(book.schedule, now, new) } else { 0 };
        *book = Book { changed: now.nanos(), debt: 0, charged: (0, 0), schedule };
        let before = self.cell.fetch_or(BUSY, AcqRel);
        self.multiplier.store(new.multiplier, Relaxed);
        self.shape.store(shape(new), Relaxed);
        // One unit, less than a nanosecond, in the callers' favour each time: a rate that changes there and back ends
        // below the word from before, by which somebody might swap in a state of the other pace.
        let state = old.convert(before & STATE, now, new).saturating_sub(1);
        let state = if state == before & STATE { state.saturating_sub(1) } else { state };
        self.cell.store(before & !STATE | state, Release);
        book.debt = new.debt(state, now);
    }

    /// Changes the state, with the lock held: the flags stay as they are.
    fn update(&self, mut change: impl FnMut(u64) -> Take) -> Take {
        let mut seen = self.cell.load(Acquire);
        loop {
            let next = match change(seen & STATE) {
                Take::Now(next) => next,
                later @ Take::At(_) => return later,
            };
            match self.cell.compare_exchange_weak(seen, seen & !STATE | next, AcqRel, Acquire) {
                Ok(_) => return Take::Now(next),
                Err(actual) => seen = actual,
            }
        }
    }
}

impl<const PACED: bool> Meter for Word<PACED> {
    type Locked = Book;

    const PACED: bool = PACED;

    #[inline]
    fn take_at_once(&self, now: Moment, cost: u32) -> Option<u64> {
        let mut seen = self.cell.load(Acquire);
        while seen <= STATE {
            let pace = self.pace();
            // Neither nothing nor more than the burst.
            if cost.wrapping_sub(1) >= pace.burst {
                break;
            }
            let next = pace.take_now(seen, now, cost)?;
            match self.cell.compare_exchange_weak(seen, next, AcqRel, Acquire) {
                Ok(_) => return Some(now.nanos()),
                Err(actual) => seen = actual,
            }
        }
        None
    }

    fn take_batch(&self, now: Moment, cost: u32) -> Option<u64> {
        // Who has no use for a stripe claims none.
        self.purses.as_ref()?;
        self.take_batched(stripe::own(), now, cost)
    }

    #[inline]
    fn take_ahead(&self, cost: u32) -> Option<u64> {
        let purses = self.purses.as_ref()?;
        let spent = self.cell.load(Acquire) & BUSY == 0 && purses.spend(stripe::own(), cost);
        spent.then_some(FROM_PURSE)
    }

    fn fits_at_once(&self, now: Moment, cost: u32) -> bool {
        if let Some(purses) = &self.purses {
            return self.cell.load(Acquire) & BUSY == 0 && purses.can_spend(stripe::own(), cost);
        }
        // A pace that is read half while it changes goes with no word that is still there.
        self.at_rest().is_some_and(|state| {
            let pace = self.pace();
            cost.wrapping_sub(1) < pace.burst
                && pace.take_now(state, now, cost).is_some()
                && self.at_rest() == Some(state)
        })
    }

    fn set_waiting(&self, waiting: bool) {
        if waiting {
            self.cell.fetch_or(self.waits(), AcqRel);
        } else {
            self.cell.fetch_and(!self.waits(), Release);
        }
    }

    fn largest(&self, _: &Book) -> u32 {
        self.pace().largest()
    }

    fn heal(&self, book: &mut Book, now: Moment) {
        let pace = self.pace();
        let before = self.state();
        let healed = self.update(|state| Take::Now(pace.healed(state, now, book.debt)));
        if let Take::Now(healed) = healed {
            if healed < before {
                book.schedule = book.schedule.min(healed);
            }
        }
        if pace.debt(self.state(), now) == 0 {
            book.debt = 0;
        }
    }

    fn take(&self, book: &mut Book, now: Moment, cost: u32) -> Take {
        let pace = self.pace();
        match self.update(|state| pace.take(state, now, 0, cost)) {
            Take::Now(next) => {
                book.debt = book.debt.max(pace.debt(next, now));
                Take::Now(now.nanos())
            }
            later @ Take::At(_) => later,
        }
    }

    fn grant(&self, book: &mut Book, now: Moment, cost: u32) -> Take {
        if !PACED {
            return self.take(book, now, cost);
        }
        let granted = self.pace().take(self.scheduled(book), now, 0, cost);
        if let Take::Now(next) = granted {
            book.schedule = next;
        }
        granted
    }

    fn fetch(&self, book: &mut Book, granted: u64, now: Moment, cost: u32, before: u64) -> Result<u64, [Moment; 2]> {
        if !PACED {
            return Ok(granted);
        }
        let pace = self.pace();
        match self.update(|state| pace.take(pace.no_older(state, now), now, 0, cost)) {
            Take::Now(next) => {
                book.debt = book.debt.max(pace.debt(next, now));
                Ok(now.nanos())
            }
            Take::At(earliest) => match pace.take(self.state(), now, before, cost) {
                Take::At(due) => Err([earliest, due]),
                Take::Now(_) => Err([earliest; 2]),
            },
        }
    }

    fn give_up(&self, book: &mut Book, granted: u64, cost: u32, on_time: Option<Moment>) {
        if !PACED {
            return self.undo(book, granted, cost);
        }
        // The note is the end of its turn. Of that, what has gone by can't be given to others; a late one has its turn yet.
        let (pace, cost) = (self.pace(), self.pace().any_cost(cost));
        let left = on_time.map_or(cost, |now| granted.saturating_sub(pace.virtual_time(now)).min(cost));
        book.schedule = book.schedule.saturating_sub(left);
    }

    fn schedule(&self, book: &mut Book, now: Moment, granted: bool, late: u64) {
        if PACED {
            let (pace, late) = (self.pace(), u32::try_from(late).unwrap_or(u32::MAX));
            let least = if late == 0 { 0 } else { pace.charge(pace.no_older(self.state(), now), now, late).0 };
            book.schedule = if granted { book.schedule.max(least) } else { 0 };
        }
    }

    fn take_behind(&self, book: &mut Book, now: Moment, cost: u32) -> Take {
        match self.pace().take(self.scheduled(book), now, 0, cost) {
            Take::Now(next) if PACED => {
                let taken = self.take(book, now, cost);
                if let Take::Now(_) = taken {
                    book.schedule = next;
                }
                taken
            }
            Take::At(due) if PACED => Take::At(due),
            _ => self.take(book, now, cost),
        }
    }

    fn due(&self, book: &mut Book, queue: &Queue, now: Moment, cost: u32) -> Moment {
        match self.pace().take(self.scheduled(book), now, queue.weight(), cost) {
            Take::At(due) => due,
            Take::Now(_) => now,
        }
    }

    /// What came out of a purse goes into one, if there is room.
    fn undo(&self, book: &mut Book, taken: u64, cost: u32) {
        if let (FROM_PURSE, Some(purses)) = (taken, &self.purses) {
            let stripe = stripe::own();
            return purses.fill(stripe, cost.min(purses.room(stripe)));
        }
        if taken < book.changed {
            return;
        }
        let pace = self.pace();
        let taken = Moment::from_nanos(taken);
        // The lock keeps other refunds out. The clock is read after the word: whoever takes by a later reading fails this
        // swap, so that what has accrued by then is not given twice.
        let (mut charged, mut moment) = (book.charged, Moment::from_nanos(0));
        let before = self.state();
        let undone = self.update(|state| {
            let now = Moment::now();
            let (units, after) = book.refund(pace, taken, now, cost);
            (charged, moment) = (after, now);
            Take::Now(pace.refunded(state, now, units))
        });
        book.charged = charged;
        book.shift(pace, moment, before, undone);
    }

    fn put_back(&self, book: &mut Book, now: Moment, _: Option<u64>, tokens: u32) {
        let (pace, before) = (self.pace(), self.state());
        let back = self.update(|state| Take::Now(pace.put_back(state, tokens)));
        book.shift(pace, now, before, back);
    }

    fn charge(&self, book: &mut Book, now: Moment, tokens: u32) -> u32 {
        let (pace, before) = (self.pace(), self.state());
        let mut booked = 0;
        let charged = self.update(|state| {
            let (next, count) = pace.charge(state, now, tokens);
            booked = count;
            Take::Now(next)
        });
        if let Take::Now(next) = charged {
            book.debt = book.debt.max(pace.debt(next, now));
        }
        book.shift(pace, now, before, charged);
        booked
    }

    fn facts(&self, book: &mut Book, now: Moment) -> Facts {
        let (pace, state) = (self.pace(), self.scheduled(book));
        Facts {
            limit: pace.burst.into(),
            remaining: pace.available(state, now).into(),
            window: pace.fill_time(),
            reset: pace.reset(state, now),
        }
    }
}

#[cfg(all(test, not(resile_loom)))]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::rate::units::Rate;

    fn batched(rate: Rate, burst: u32, batch: u32) -> Word<false> {
        Word::batched(Pace::new(rate, burst, false).unwrap(), Purses::new(batch, 3))
    }

    proptest! {
        /// L1, loosened by what lies ahead. In no interval do more go out, and what does not go out is there.
        #[test]
        fn threads_that_take_ahead_never_let_more_through_than_the_limit_and_what_lies_ahead(
            rate in prop_oneof![
                Just(Rate::per_second(1)),
                Just(Rate::per_second(999_983)),
                Just(Rate::new(3, Duration::from_secs(7))),
            ],
            burst in 1_u32..60,
            part in 1_u32..=4,
            steps in prop::collection::vec((0_usize..3, 0_u64..12, 0_u64..4, 1_u32..4, any::<bool>()), 1..120),
        ) {
            let batch = burst.div_ceil(part);
            let word = batched(rate, burst, batch);
            let mut now = Moment::at(0);
            let mut times = Vec::new();
            for (stripe, pause, unit, cost, goes_back) in steps {
                now = now.plus_nanos(pause * 300_u64.pow(unit as u32));
                if goes_back {
                    now = Moment::from_nanos(now.nanos() - 1);
                }
                let there = word.facts(&mut Book::default(), now).remaining as u32;
                let before = there + word.ahead();
                let taken = word.take_batched(stripe, now, cost);
                let after = word.facts(&mut Book::default(), now).remaining as u32 + word.ahead();
                prop_assert_eq!(after, before - taken.map_or(0, |_| cost));
                if taken.is_some() {
                    times.extend((0..cost).map(|_| now));
                } else {
                    prop_assert!(there < cost);
                }
                prop_assert!(word.ahead() <= 2 * batch, "the stripe of all has no purse");
            }
            for (first, from) in times.iter().enumerate() {
                for (last, to) in times.iter().enumerate().skip(first) {
                    let span = u128::from(to.nanos_since(*from)) + 1;
                    let most = (span * u128::from(rate.count)).div_ceil(u128::from(rate.period));
                    prop_assert!((last - first + 1) as u128 <= most + u128::from(burst + 2 * batch));
                }
            }
        }
    }

    /// A taker that read the word and the other pace must not find the word unchanged.
    #[test]
    fn a_change_of_the_pace_always_changes_the_word() {
        let now = Moment::at(1_000_000_007);
        // The multiplier of the second is smaller, so that there is a state between both times: idle under both paces.
        let (old, new) =
            (Pace::new(Rate::per_second(7), 3, false).unwrap(), Pace::new(Rate::per_second(1), 3, false).unwrap());
        let (old, new) = if old.multiplier > new.multiplier { (old, new) } else { (new, old) };
        for before in
            [new.virtual_time(now) - 1, new.virtual_time(now), new.virtual_time(now) + 1, old.virtual_time(now)]
        {
            let word = Word::<false>::in_state(old, before);
            word.set_pace(&mut Book::default(), now, new);
            assert_ne!(word.state(), before);
        }
    }

    proptest! {
        /// Against buckets in which what came back had never been taken: the word never lets by what no such bucket would,
        /// in whatever order tokens are taken, come back, or are used.
        #[test]
        fn what_comes_back_lets_no_more_by_than_if_it_had_not_been_taken(
            burst in 1_u32..8,
            steps in prop::collection::vec((0_u8..4, 0_u64..4, 0_usize..8), 1..80),
        ) {
            const TOKEN: u64 = 1_000_000_000;
            let pace = Pace::new(Rate::per_second(1), burst, false).unwrap();
            let (mut state, mut book, mut now) = (0, Book::default(), Moment::at(TOKEN));
            // All that was taken, when, and whether it came back.
            let mut taken: Vec<(u64, u32, bool, bool)> = Vec::new();
            for (what, amount, which) in steps {
                match what {
                    0 => now = now.plus_nanos(amount * TOKEN / 3),
                    1 | 2 => {
                        let cost = (amount as u32 + 1).min(burst);
                        if let Some(next) = pace.take_now(state, now, cost) {
                            state = next;
                            taken.push((now.nanos(), cost, true, false));
                        }
                    }
                    _ => {
                        let out: Vec<usize> = (0..taken.len()).filter(|at| taken[*at].2).collect();
                        if out.is_empty() {
                            continue;
                        }
                        let (at, cost, out_still, back) = &mut taken[out[which % out.len()]];
                        *out_still = false;
                        if amount > 0 {
                            *back = true;
                            let (units, charged) = book.refund(pace, Moment::from_nanos(*at), now, *cost);
                            book.charged = charged;
                            state = pace.refunded(state, now, units);
                        }
                    }
                }
                // Without what came back, each of the others went by an exact bucket.
                let (mut level, mut last) = (u64::from(burst) * TOKEN, taken.first().map_or(0, |(at, ..)| *at));
                for (at, cost, _, back) in &taken {
                    level = (level + (at - last)).min(u64::from(burst) * TOKEN);
                    last = *at;
                    if !back {
                        prop_assert!(level + 2 >= u64::from(*cost) * TOKEN, "{level} for {cost}");
                        level = level.saturating_sub(u64::from(*cost) * TOKEN);
                    }
                }
            }
        }
    }

    #[test]
    fn nobody_spends_out_of_a_purse_while_somebody_waits_or_the_pace_changes() {
        let now = Moment::at(0);
        let word = batched(Rate::per_second(1), 8, 1);
        assert!(word.take_batched(1, now, 1).is_some());
        assert_eq!(word.ahead(), 1);
        word.set_waiting(true);
        assert_eq!((word.take_batched(1, now, 1), word.take_ahead(1)), (None, None));
        word.set_pace(&mut Book::default(), now, Pace::new(Rate::per_second(2), 8, false).unwrap());
        assert_eq!(word.take_batched(1, now, 1), None, "somebody still waits");
        word.set_waiting(false);
        assert_eq!(word.take_batched(1, now, 1), Some(FROM_PURSE));
        assert_eq!((word.ahead(), word.facts(&mut Book::default(), now).remaining), (0, 6));
        assert!(word.take_batched(1, now, 1).is_some());
        assert_eq!((word.at_rest(), word.take_at_once(now, 1)), (None, None), "taken is in batches, or in turn");
    }

    #[test]
    fn what_comes_back_to_a_purse_never_fills_it_above_the_batch() {
        let word = Word::<false>::batched(Pace::NONE, Purses::new(3, stripe::count()));
        let most = if stripe::own() == stripe::SHARED { 0 } else { 3 };
        for (back, held) in [(2, 2), (2, 3), (1, 3), (u32::MAX, 3)] {
            word.undo(&mut Book::default(), FROM_PURSE, back);
            assert_eq!(word.ahead(), held.min(most));
        }
    }

    #[test]
    fn where_tokens_are_scarce_nobody_takes_any_ahead() {
        let now = Moment::at(0);
        let word = batched(Rate::per_second(1), 4, 4);
        for left in (0..4).rev() {
            assert!(word.take_batched(1, now, 1).is_some());
            assert_eq!((word.ahead(), word.facts(&mut Book::default(), now).remaining), (0, left));
        }
        assert!(word.take_batched(1, now, 1).is_none());
    }
}
