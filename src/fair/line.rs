//! Who is next: deficit round robin (Shreedhar and Varghese 1995) over keys, in order within a key.
//!
//! Keys with waiters take turns. At its turn a key is given its quantum, and as many of its waiters go as that pays for;
//! what is left is kept for its next turn, and forgotten when nobody waits any more. The quantum is the key's weight
//! times the largest cost that waits, so at each turn of a key at least one goes. Between two keys that both have waiters
//! all the time, what they got differs from their weights' ratio by no more than a quantum of each.
//!
//! 1. A key is in the ring exactly while it has waiters, and once. Each knows its neighbours, so that it leaves without
//!    a search, however many keys there are.
//! 2. A waiter is charged when it goes. Who leaves before costs its key nothing.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::num::NonZeroU32;

use crate::keyed::Id;

#[derive(Debug, Default)]
pub(super) struct Line {
    keys: HashMap<Id, Turn>,
    /// Whose turn it is.
    first: Option<Id>,
    len: u32,
    /// How many wait with each cost.
    costs: BTreeMap<u32, u32>,
}

#[derive(Debug)]
struct Turn {
    /// Numbers of the owner's, and what each costs.
    waiters: VecDeque<(u32, u32)>,
    weight: NonZeroU32,
    credit: u64,
    /// It is at its turn and has been given its quantum.
    paid: bool,
    /// Whose turn it was before and is after, round the ring.
    before: Id,
    after: Id,
}

impl Line {
    pub(super) fn len(&self) -> u32 {
        self.len
    }

    /// How many wait of one key.
    pub(super) fn len_of(&self, key: Id) -> u32 {
        self.keys.get(&key).map_or(0, |turn| turn.waiters.len() as u32)
    }

    /// Appends a waiter to those of its key. The owner has checked its bounds. The newest weight holds.
    pub(super) fn push(&mut self, key: Id, weight: NonZeroU32, waiter: u32, cost: u32) {
        // What costs nothing still takes a turn.
        let cost = cost.max(1);
        if !self.keys.contains_key(&key) {
            self.join(key, weight);
        }
        if let Some(turn) = self.keys.get_mut(&key) {
            turn.weight = weight;
            turn.waiters.push_back((waiter, cost));
            self.len += 1;
            *self.costs.entry(cost).or_default() += 1;
        }
    }

    /// Takes the next waiter out.
    pub(super) fn next(&mut self) -> Option<u32> {
        loop {
            let key = self.first?;
            let (largest, _) = self.costs.last_key_value()?;
            let turn = self.keys.get_mut(&key)?;
            if !turn.paid {
                turn.credit = turn.credit.saturating_add(u64::from(*largest) * u64::from(turn.weight.get()));
                turn.paid = true;
            }
            match turn.waiters.front() {
                Some(&(waiter, cost)) if u64::from(cost) <= turn.credit => {
                    turn.credit -= u64::from(cost);
                    turn.waiters.pop_front();
                    self.less_one(key, cost);
                    return Some(waiter);
                }
                _ => {
                    turn.paid = false;
                    self.first = Some(turn.after);
                }
            }
        }
    }

    /// Takes a waiter out of the middle.
    pub(super) fn remove(&mut self, key: Id, waiter: u32) {
        let Some(turn) = self.keys.get_mut(&key) else { return };
        let place = turn.waiters.iter().position(|(other, _)| *other == waiter);
        if let Some((_, cost)) = place.and_then(|place| turn.waiters.remove(place)) {
            self.less_one(key, cost);
        }
    }

    fn less_one(&mut self, key: Id, cost: u32) {
        self.len -= 1;
        if let Some(with_it) = self.costs.get_mut(&cost) {
            *with_it -= 1;
            if *with_it == 0 {
                self.costs.remove(&cost);
            }
        }
        if self.keys.get(&key).is_some_and(|turn| turn.waiters.is_empty()) {
            self.quit(key);
        }
    }

    /// Puts a key into the ring: its turn comes after those of all others.
    fn join(&mut self, key: Id, weight: NonZeroU32) {
        let after = *self.first.get_or_insert(key);
        let before = self.keys.get(&after).map_or(key, |first| first.before);
        let turn = Turn { waiters: VecDeque::new(), weight, credit: 0, paid: false, before, after };
        self.keys.insert(key, turn);
        self.link(before, key);
        self.link(key, after);
    }

    /// Takes a key out of the ring.
    fn quit(&mut self, key: Id) {
        let Some(Turn { before, after, .. }) = self.keys.remove(&key) else { return };
        self.link(before, after);
        if self.first == Some(key) {
            self.first = Some(after).filter(|after| *after != key);
        }
    }

    /// Has one come after the other. A key that is alone is its own neighbour.
    fn link(&mut self, before: Id, after: Id) {
        if let Some(turn) = self.keys.get_mut(&before) {
            turn.after = after;
        }
        if let Some(turn) = self.keys.get_mut(&after) {
            turn.before = before;
        }
    }
}

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

    /// How many keys there are round the ring, each found from both sides.
    fn ring(line: &Line) -> usize {
        let Some(first) = line.first else { return 0 };
        let (mut key, mut keys) = (first, 0);
        loop {
            let after = line.keys[&key].after;
            assert_eq!(line.keys[&after].before, key);
            keys += 1;
            if after == first {
                assert_eq!(keys, line.keys.len());
                return keys;
            }
            key = after;
        }
    }

    #[test]
    fn a_key_with_a_backlog_lets_others_in_between() {
        let mut line = Line::default();
        (0..5).for_each(|waiter| line.push(id(1), weight(1), waiter, 1));
        line.push(id(2), weight(1), 10, 1);
        line.push(id(3), weight(1), 20, 1);
        let order: Vec<u32> = std::iter::from_fn(|| line.next()).collect();
        assert_eq!(order, [0, 10, 20, 1, 2, 3, 4]);
        assert_eq!((line.len(), line.keys.len(), line.first, line.costs.len()), (0, 0, None, 0));
    }

    #[test]
    fn shares_go_by_weight_and_cost() {
        let mut line = Line::default();
        for waiter in 0..400 {
            line.push(id(1), weight(3), waiter, 2);
            line.push(id(2), weight(1), 1000 + waiter, 5);
        }
        let got = (0..200).fold([0_u32; 2], |[one, two], _| match line.next() {
            Some(0..1000) => [one + 2, two],
            _ => [one, two + 5],
        });
        // 3 to 1, to a quantum of each.
        assert!(got[0].abs_diff(3 * got[1]) <= 15 + 3 * 5, "{got:?}");
    }

    /// The quantum went by the largest cost since the line was last empty, which under load may be never.
    #[test]
    fn a_large_cost_that_has_gone_makes_no_longer_turns() {
        let mut line = Line::default();
        line.push(id(1), weight(1), 0, 100);
        line.push(id(2), weight(1), 1, 1);
        assert_eq!(line.next(), Some(0));
        for waiter in 10..20 {
            line.push(id(1), weight(1), waiter, 1);
            line.push(id(2), weight(1), 10 + waiter, 1);
        }
        let order: Vec<u32> = std::iter::from_fn(|| line.next()).collect();
        assert_eq!(order[..6], [1, 10, 20, 11, 21, 12]);
    }

    proptest! {
        /// Each key's waiters go in their order, all of them; no key with waiters is passed over by another for more than
        /// a quantum of that beyond its share.
        #[test]
        fn keys_are_served_in_order_and_none_is_starved(
            ops in proptest::collection::vec((0_u64..5, 1_u32..4, any::<bool>(), any::<bool>()), 1..200),
        ) {
            let mut line = Line::default();
            let mut model: HashMap<u64, VecDeque<(u32, u32)>> = HashMap::new();
            // What was served to others since a key that waits was last served.
            let mut passed: HashMap<u64, u64> = HashMap::new();
            for (waiter, (key, cost, serve, leave)) in (0_u32..).zip(ops) {
                line.push(id(key), weight(1), waiter, cost);
                model.entry(key).or_default().push_back((waiter, cost));
                passed.entry(key).or_insert(0);
                if leave {
                    let queue = model.get_mut(&key).unwrap();
                    let (gone, _) = queue.remove(queue.len() / 2).unwrap();
                    line.remove(id(key), gone);
                    line.remove(id(key), gone);
                }
                if serve {
                    if let Some(next) = line.next() {
                        let (key, _) = model.iter().find(|(_, queue)| queue.front().is_some_and(|(first, _)| *first == next)).unwrap();
                        let key = *key;
                        let (_, cost) = model.get_mut(&key).unwrap().pop_front().unwrap();
                        passed.insert(key, 0);
                        for (other, _) in model.iter().filter(|(other, queue)| **other != key && !queue.is_empty()) {
                            let passed = passed.entry(*other).or_insert(0);
                            *passed += u64::from(cost);
                            // At most two quanta, of three, of each of the four others.
                            prop_assert!(*passed <= 4 * 2 * 3, "{other} was passed by {passed}");
                        }
                    }
                }
                model.retain(|key, queue| {
                    if queue.is_empty() {
                        passed.remove(key);
                    }
                    !queue.is_empty()
                });
                prop_assert_eq!(line.len() as usize, model.values().map(VecDeque::len).sum::<usize>());
                prop_assert_eq!(ring(&line), model.len());
                let costs = model.values().flatten().map(|(_, cost)| *cost);
                prop_assert_eq!(line.costs.keys().copied().max(), costs.max());
                for (key, queue) in &model {
                    prop_assert_eq!(line.len_of(id(*key)) as usize, queue.len());
                }
            }
        }
    }
}
