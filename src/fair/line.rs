//! Who is next: start-time fair queueing (Goyal, Vin and Cheng 1996) over keys, in order within a key.
//!
//! Each key has an account: the virtual time at which it may start next. A pass moves it on by the call's cost, divided by
//! the key's weight, and the line's own time is the start of the last pass. The key that may start first is next, and
//! among equals the one that would be through first; so a large call waits until the others have had as much, and a small
//! one of a key that has just come goes before everything that has had its share.
//!
//! 1. A key without waiters whose start lies ahead is remembered: with one call at a time nobody gets more than its
//!    share. A start lies ahead by the cost of one call at most, so there is nothing to forgive after a pause.
//! 2. A waiter is charged when it passes. Who leaves before costs its key nothing.
//! 3. An absent waiter keeps its place among those of its key and counts for the bounds, but nothing waits for it.
//! 4. Between two keys that both have waiters all the time, what they got differs from their weights' ratio by no more
//!    than one call of each.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::num::NonZeroU32;

use crate::keyed::Id;

/// A cost of 1 at a weight of 1, in virtual time: a weight divides it with no error that matters.
const UNIT: u128 = 1 << 40;

/// By start, then by end, then by who came first.
type Rank = (u128, u128, u64);

#[derive(Debug, Default)]
pub(super) struct Line {
    now: u128,
    /// Where a key starts of which nothing is known. It is `now`, and goes on while such keys pass, by what all who wait
    /// would get of that: else others would wait for as long as new keys come.
    entry: u128,
    accounts: HashMap<Id, Account>,
    /// The keys that have waiters.
    ranks: BTreeMap<Rank, Id>,
    /// The starts of keys that have none and have had more than others.
    ahead: BTreeSet<(u128, u64, u32)>,
    len: u32,
    absent: u32,
    arrivals: u64,
    /// What all waiters that are not absent cost, and the weights of their keys.
    cost: u64,
    weight: u64,
}

#[derive(Debug)]
struct Account {
    start: u128,
    weight: NonZeroU32,
    waiters: VecDeque<Waiter>,
    /// What its waiters cost.
    cost: u64,
    /// The waiters that did not come when they were called.
    absent: Vec<Waiter>,
    /// It has not passed yet.
    is_new: bool,
}

#[derive(Clone, Copy, Debug)]
struct Waiter {
    number: u32,
    cost: u32,
    arrival: u64,
}

impl Account {
    fn rank(&self) -> Option<Rank> {
        self.waiters.front().map(|first| (self.start, self.start + self.length(first.cost), first.arrival))
    }

    /// What this cost takes in virtual time.
    fn length(&self, cost: u32) -> u128 {
        u128::from(cost) * UNIT / u128::from(self.weight.get())
    }
}

impl Line {
    pub(super) fn len(&self) -> u32 {
        self.len
    }

    /// How many of the waiters come when they are called, as far as is known.
    pub(super) fn present(&self) -> u32 {
        self.len - self.absent
    }

    /// How many wait of one key.
    pub(super) fn len_of(&self, key: Id) -> u32 {
        self.accounts.get(&key).map_or(0, |account| (account.waiters.len() + account.absent.len()) as u32)
    }

    /// What would go before a call of this key: its own, and of the others what they get in the meantime.
    pub(super) fn before(&self, key: Id, weight: NonZeroU32, cost: u32) -> u64 {
        let own = self.accounts.get(&key);
        if own.is_none() {
            // The first call of each of those that start before it.
            let rank = (self.entry, self.entry + u128::from(cost.max(1)) * UNIT / u128::from(weight.get()), u64::MAX);
            let first = |key: &Id| self.accounts.get(key).and_then(|account| account.waiters.front());
            let before = self.ranks.range(..rank).take(MOST_LOOKED_AT).filter_map(|(_, key)| first(key));
            return before.map(|waiter| u64::from(waiter.cost)).sum();
        }
        let own_cost = own.map_or(0, |own| own.cost);
        let lead = own.map_or(0, |own| own.start.saturating_sub(self.now)) / UNIT;
        let (own_weight, others) = match own.filter(|own| !own.waiters.is_empty()) {
            Some(own) => (own.weight.get(), self.weight - u64::from(own.weight.get())),
            None => (weight.get(), self.weight),
        };
        let per_weight = u128::from(own_cost) / u128::from(own_weight) + lead;
        let share = u64::try_from(per_weight.saturating_mul(others.into())).unwrap_or(u64::MAX);
        own_cost.saturating_add(share.min(self.cost - own_cost))
    }

    /// Appends a waiter to those of its key. The owner has checked its bounds. The newest weight holds.
    pub(super) fn push(&mut self, key: Id, weight: NonZeroU32, number: u32, cost: u32) {
        // What costs nothing still takes a turn.
        let cost = cost.max(1);
        let arrival = self.arrivals;
        self.arrivals += 1;
        let (now, entry) = (self.now, self.entry);
        self.change(key, weight, |account| {
            if account.waiters.is_empty() {
                account.start = account.start.max(if account.is_new { entry } else { now });
            }
            account.weight = weight;
            account.waiters.push_back(Waiter { number, cost, arrival });
            account.cost += u64::from(cost);
        });
        self.len += 1;
    }

    /// The next.
    pub(super) fn first(&self) -> Option<u32> {
        let (_, key) = self.ranks.first_key_value()?;
        self.accounts.get(key)?.waiters.front().map(|first| first.number)
    }

    /// A waiter has passed, and leaves.
    pub(super) fn pass(&mut self, key: Id, number: u32) {
        let waiting = u128::from(self.weight).max(1);
        let Some(cost) = self.remove(key, number) else { return };
        let Some(account) = self.accounts.get(&key) else { return };
        if account.is_new {
            // Not past the end of the next one, so that who comes then doesn't wait long.
            let next = self.ranks.first_key_value().map_or(0, |((_, ends, _), _)| *ends);
            self.entry = (self.entry + u128::from(cost) * UNIT / waiting).min(next).max(self.entry);
        }
        self.now = self.now.max(account.start);
        self.entry = self.entry.max(self.now);
        let (now, weight) = (self.now, account.weight);
        self.change(key, weight, |account| {
            account.start = account.start.max(now) + account.length(cost);
            account.is_new = false;
        });
        self.forget();
    }

    /// Takes a waiter out, wherever it stands: what it costs. The account stays until [`forget`](Self::forget).
    fn remove(&mut self, key: Id, number: u32) -> Option<u32> {
        self.set_present(key, number);
        let gone = self.take(key, number)?;
        self.len -= 1;
        Some(gone.cost)
    }

    /// Takes a waiter that is not absent from those of its key.
    fn take(&mut self, key: Id, number: u32) -> Option<Waiter> {
        let account = self.accounts.get(&key)?;
        let place = account.waiters.iter().position(|waiter| waiter.number == number)?;
        let (weight, mut taken) = (account.weight, None);
        self.change(key, weight, |account| {
            taken = account.waiters.remove(place);
            account.cost -= taken.map_or(0, |waiter| waiter.cost.into());
        });
        taken
    }

    /// A waiter did not come when it was called: others are served, of its key and of all, until it does.
    pub(super) fn set_absent(&mut self, key: Id, number: u32) {
        let Some(waiter) = self.take(key, number) else { return };
        self.absent += 1;
        if let Some(account) = self.accounts.get_mut(&key) {
            let lead = (account.start, key.place, key.rest);
            account.absent.push(waiter);
            // Its account is needed for as long as it waits.
            self.ahead.remove(&lead);
        }
    }

    /// A waiter that was absent is back, in the order in which it came.
    pub(super) fn set_present(&mut self, key: Id, number: u32) {
        let Some(account) = self.accounts.get_mut(&key) else { return };
        let Some(place) = account.absent.iter().position(|waiter| waiter.number == number) else { return };
        let waiter = account.absent.swap_remove(place);
        let weight = account.weight;
        self.absent -= 1;
        self.change(key, weight, |account| {
            let place = account.waiters.partition_point(|other| other.arrival < waiter.arrival);
            account.waiters.insert(place, waiter);
            account.cost += u64::from(waiter.cost);
        });
    }

    /// A waiter leaves.
    pub(super) fn leave(&mut self, key: Id, number: u32) {
        self.remove(key, number);
        self.forget();
    }

    /// Changes an account, which is new if need be, and sorts it in again.
    fn change(&mut self, key: Id, weight: NonZeroU32, how: impl FnOnce(&mut Account)) {
        let start = self.now;
        let new = || Account { start, weight, waiters: VecDeque::new(), cost: 0, absent: Vec::new(), is_new: true };
        let account = self.accounts.entry(key).or_insert_with(new);
        match account.rank() {
            Some(rank) => {
                self.ranks.remove(&rank);
                self.cost -= account.cost;
                self.weight -= u64::from(account.weight.get());
            }
            None => {
                self.ahead.remove(&(account.start, key.place, key.rest));
            }
        }
        how(account);
        match account.rank() {
            Some(rank) => {
                self.ranks.insert(rank, key);
                self.cost += account.cost;
                self.weight += u64::from(account.weight.get());
            }
            None if account.absent.is_empty() => {
                self.ahead.insert((account.start, key.place, key.rest));
            }
            None => {}
        }
    }

    /// Forgets accounts that say nothing any more, and those of the smallest lead if there are too many.
    fn forget(&mut self) {
        while let Some(&(start, place, rest)) = self.ahead.first() {
            if start > self.now && self.ahead.len() <= MOST_AHEAD {
                break;
            }
            self.ahead.remove(&(start, place, rest));
            self.accounts.remove(&Id { place, rest });
        }
    }
}

/// How many other keys are looked at to tell how long a new one would wait.
const MOST_LOOKED_AT: usize = 256;
/// How many keys without waiters are remembered.
const MOST_AHEAD: usize = 16_384;

#[cfg(all(test, not(resile_loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(place: u64) -> Id {
        Id { place, rest: 0 }
    }

    fn weight(weight: u32) -> NonZeroU32 {
        NonZeroU32::new(weight).unwrap()
    }

    /// The next passes: its number.
    fn next(line: &mut Line, key_of: impl Fn(u32) -> u64) -> Option<u32> {
        let first = line.first()?;
        line.pass(id(key_of(first)), first);
        Some(first)
    }

    #[test]
    fn a_key_with_a_backlog_lets_others_in_between() {
        let mut line = Line::default();
        (10..15).for_each(|waiter| line.push(id(1), weight(1), waiter, 1));
        line.push(id(2), weight(1), 20, 1);
        line.push(id(3), weight(1), 30, 1);
        let order: Vec<u32> = std::iter::from_fn(|| next(&mut line, |number| u64::from(number / 10))).collect();
        assert_eq!(order, [10, 20, 30, 11, 12, 13, 14]);
        assert_eq!((line.len(), line.ranks.len(), line.cost, line.weight), (0, 0, 0, 0));
    }

    #[test]
    fn what_would_go_before_is_ones_own_and_the_others_share() {
        let mut line = Line::default();
        for number in 0..10 {
            line.push(id(1), weight(1), number, 100);
        }
        assert_eq!(line.before(id(2), weight(1), 1), 0, "who has just come is next");
        line.push(id(2), weight(1), 10, 7);
        assert_eq!(line.before(id(2), weight(1), 1), 14);
        assert_eq!(line.before(id(1), weight(1), 1), 1007, "no more than the other wants");
    }

    #[test]
    fn accounts_of_keys_that_have_gone_are_forgotten_in_time() {
        let mut line = Line::default();
        for key in 0..100_000_u32 {
            line.push(id(key.into()), weight(1), key, 1 + key % 7);
            line.pass(id(key.into()), key);
            assert!(line.accounts.len() <= MOST_AHEAD + 1);
        }
    }

    proptest! {
        /// Two keys of any weights and costs, each with as many waiters as it likes, one or a thousand.
        #[test]
        fn shares_go_by_weight_whatever_the_calls_cost(
            costs in [1_u32..=1000, 1_u32..=1000],
            weights in [1_u32..=10, 1_u32..=10],
            outstanding in [1_u32..20, 1_u32..20],
        ) {
            let mut line = Line::default();
            let mut number = 0;
            let mut push = |line: &mut Line, key: usize| {
                line.push(id(key as u64), weight(weights[key]), 2 * number + key as u32, costs[key]);
                number += 1;
            };
            for (key, waiting) in outstanding.into_iter().enumerate() {
                (0..waiting).for_each(|_| push(&mut line, key));
            }
            let mut got = [0_u64; 2];
            for _ in 0..3000 {
                let key = (next(&mut line, |number| u64::from(number % 2)).unwrap() % 2) as usize;
                got[key] += u64::from(costs[key]);
                push(&mut line, key);
                let per_weight = [0, 1].map(|key| got[key] as f64 / f64::from(weights[key]));
                let call = [0, 1].map(|key| f64::from(costs[key]) / f64::from(weights[key]));
                prop_assert!((per_weight[0] - per_weight[1]).abs() <= call[0] + call[1] + 1e-3, "{got:?}");
            }
        }

        /// Whatever waits, and whatever that costs: a key that has had nothing comes after what two of the largest calls cost, of each other key at most.
        #[test]
        fn a_quiet_key_is_next(loud in proptest::collection::vec((0_u64..5, 1_u32..=1000), 1..50), served in 0_usize..50) {
            let mut line = Line::default();
            for (number, (key, cost)) in (0_u32..).zip(&loud) {
                line.push(id(*key), weight(1), number, *cost);
            }
            for _ in 0..served.min(loud.len() - 1) {
                next(&mut line, |number| loud[number as usize].0);
            }
            line.push(id(9), weight(1), 1000, 1);
            let key_of = |number: u32| loud.get(number as usize).map_or(9, |it| it.0);
            let before = std::iter::from_fn(|| next(&mut line, key_of)).take_while(|number| *number != 1000);
            let mut passed = [0; 5];
            before.for_each(|number| passed[key_of(number) as usize] += loud[number as usize].1);
            let largest = loud.iter().map(|(_, cost)| *cost).max().unwrap();
            prop_assert!(passed.iter().all(|cost| *cost <= 2 * largest), "{passed:?} of {largest}");
        }

        /// Each key's waiters go in their order, all of them, and the sums are right.
        #[test]
        fn keys_are_served_in_order(
            ops in proptest::collection::vec((0_u64..5, 1_u32..4, any::<bool>(), any::<bool>(), 0_u8..4), 1..200),
        ) {
            let mut line = Line::default();
            let mut model: HashMap<u64, VecDeque<(u32, u32)>> = HashMap::new();
            let mut away: Vec<(u64, u32, u32)> = Vec::new();
            for (number, (key, cost, serve, leave, absent)) in (0_u32..).zip(ops) {
                line.push(id(key), weight(1), number, cost);
                model.entry(key).or_default().push_back((number, cost));
                match (absent, line.first()) {
                    (0, Some(first)) => {
                        let (key, queue) =
                            model.iter_mut().find(|(_, queue)| queue.iter().any(|(number, _)| *number == first)).unwrap();
                        let (number, cost) = queue.pop_front().unwrap();
                        away.push((*key, number, cost));
                        line.set_absent(id(*key), number);
                    }
                    (1, _) if !away.is_empty() => {
                        let (key, number, cost) = away.swap_remove(away.len() / 2);
                        let queue = model.get_mut(&key).unwrap();
                        let place = queue.partition_point(|(other, _)| *other < number);
                        queue.insert(place, (number, cost));
                        line.set_present(id(key), number);
                    }
                    (2, _) if !away.is_empty() => {
                        let (key, number, _) = away.swap_remove(away.len() / 2);
                        line.leave(id(key), number);
                    }
                    _ => {}
                }
                if leave && !model[&key].is_empty() {
                    let queue = model.get_mut(&key).unwrap();
                    let (gone, _) = queue.remove(queue.len() / 2).unwrap();
                    line.leave(id(key), gone);
                    line.leave(id(key), gone);
                }
                if serve && line.present() > 0 {
                    let first = line.first().unwrap();
                    let of = |(_, queue): &(&u64, &VecDeque<(u32, u32)>)| queue.front().is_some_and(|(number, _)| *number == first);
                    let (key, _) = model.iter().find(of).unwrap();
                    let key = *key;
                    line.pass(id(key), first);
                    model.get_mut(&key).unwrap().pop_front();
                }
                prop_assert_eq!(line.present() as usize, model.values().map(VecDeque::len).sum::<usize>());
                prop_assert_eq!(line.len() - line.present(), away.len() as u32);
                prop_assert_eq!(line.cost, model.values().flatten().map(|(_, cost)| u64::from(*cost)).sum::<u64>());
                prop_assert_eq!(line.weight, model.values().filter(|queue| !queue.is_empty()).count() as u64);
                for (key, queue) in &model {
                    let absent = away.iter().filter(|(other, ..)| other == key).count();
                    prop_assert_eq!(line.len_of(id(*key)) as usize, queue.len() + absent);
                }
            }
        }
    }
}
