//! Which keys come most, in fixed memory: the Space-Saving sketch of Metwally, Agrawal and El Abbadi (2005).
//!
//! So many counters; a key without one takes over the smallest, count included. With `m` counters and a total of `n`,
//! a count is never too low and too high by at most `n / m`, and every key above `n / m` has a counter. A table keeps one
//! sketch per shard: no key is in two of them, so their union is one of the whole, with the error of its shard.
//!
//! Counting each unit would cost more than the decision it counts, so one in `gap` is drawn, at random distances so that
//! no pattern of calls escapes, and counts for all of them. A count then also has the error of a sample, about
//! `sqrt(gap * count)` either way, and no bias: the units of all calls lie on one line, from which every unit is drawn
//! with the same chance.

use std::net::IpAddr;

use super::id::{Id, KeyRef};
use crate::call::Key;
use crate::internal::rng::{entropy, mix};

/// The longest text that is kept whole.
const SHOWN: usize = 46;

/// A key as it is shown: long texts are cut, so that a counter has a fixed size and needs no allocation.
#[derive(Clone, Copy, Debug)]
enum Shown {
    Number(u64),
    Wide([u64; 2]),
    Ip(IpAddr),
    Text { bytes: [u8; SHOWN], len: u8 },
}

impl Shown {
    fn of(key: KeyRef<'_>) -> Self {
        match key {
            KeyRef::Number(number) => Self::Number(number),
            KeyRef::Wide(halves) => Self::Wide(halves),
            KeyRef::Ip(address) => Self::Ip(address),
            KeyRef::Text(text) => {
                let len = (0..=text.len().min(SHOWN)).rev().find(|len| text.is_char_boundary(*len)).unwrap_or(0);
                let mut bytes = [0; SHOWN];
                bytes[..len].copy_from_slice(&text.as_bytes()[..len]);
                Self::Text { bytes, len: len as u8 }
            }
        }
    }

    fn to_key(self) -> Key {
        match self {
            Self::Number(number) => Key::Number(number),
            Self::Wide(halves) => Key::Wide(halves),
            Self::Ip(address) => Key::Ip(address),
            Self::Text { bytes, len } => Key::from(String::from_utf8_lossy(&bytes[..len.into()]).into_owned()),
        }
    }
}

/// How much came of a key, as far as a sketch knows.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TopKey {
    /// The key. Of a longer text than 46 bytes the beginning.
    pub key: Key,
    /// How much, or less.
    pub count: u64,
    /// By how much the count may be too high, sampling apart.
    pub error: u64,
}

#[derive(Clone, Copy, Debug)]
struct Counter {
    rest: u32,
    error: u64,
    key: Shown,
}

/// What is searched lies apart from the rest, so that a search stays within a few cache lines.
#[derive(Debug)]
pub(super) struct Sketch {
    places: Vec<u64>,
    counts: Vec<u64>,
    counters: Vec<Counter>,
    most: usize,
    gap: u32,
    /// How many units until the next that is drawn.
    left: u32,
    random: u64,
}

impl Sketch {
    pub(super) fn new(counters: usize, gap: u32) -> Self {
        let mut sketch = Self {
            places: Vec::with_capacity(counters),
            counts: Vec::with_capacity(counters),
            counters: Vec::with_capacity(counters),
            most: counters,
            gap,
            left: 0,
            random: entropy(),
        };
        sketch.draw();
        sketch
    }

    pub(super) fn bytes(&self) -> usize {
        self.most * (size_of::<Counter>() + 2 * size_of::<u64>())
    }

    /// The longest distance between two units that are drawn.
    fn longest(&self) -> u32 {
        2 * self.gap - 1
    }

    /// The distance to the next unit that counts: 1 to the longest, so the gap on average.
    fn draw(&mut self) {
        self.random = self.random.wrapping_add(1);
        self.left = 1 + (mix(self.random) % u64::from(self.longest())) as u32;
    }

    #[inline]
    pub(super) fn add(&mut self, id: Id, key: KeyRef<'_>, units: u32) {
        if units < self.left {
            self.left -= units;
        } else {
            self.count(id, key, units);
        }
    }

    /// Whole longest distances are counted as they are, and drawn from is the rest. What goes where must not depend on
    /// where the next unit lies: else keys would get more or less than their share of those drawn.
    #[cold]
    fn count(&mut self, id: Id, key: KeyRef<'_>, units: u32) {
        let mut rest = units % self.longest();
        let mut weight = u64::from(units - rest);
        while rest >= self.left {
            rest -= self.left;
            weight += u64::from(self.gap);
            self.draw();
        }
        self.left -= rest;
        let place = self.places.iter().position(|place| *place == id.place);
        if let Some(known) = place.filter(|place| self.counters[*place].rest == id.rest) {
            self.counts[known] = self.counts[known].saturating_add(weight);
        } else if self.places.len() < self.most {
            self.places.push(id.place);
            self.counts.push(weight);
            self.counters.push(Counter { rest: id.rest, error: 0, key: Shown::of(key) });
        } else if let Some((least, error)) = self.counts.iter().copied().enumerate().min_by_key(|(_, count)| *count) {
            self.places[least] = id.place;
            self.counts[least] = error.saturating_add(weight);
            self.counters[least] = Counter { rest: id.rest, error, key: Shown::of(key) };
        }
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = TopKey> {
        self.counters.iter().zip(&self.counts).map(|(counter, count)| TopKey {
            key: counter.key.to_key(),
            count: *count,
            error: counter.error,
        })
    }
}

#[cfg(all(test, not(resile_loom)))]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn id(n: u64) -> Id {
        Id { place: n, rest: 0 }
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        let long = "ä".repeat(40);
        let Key::Text(text) = Shown::of(KeyRef::Text(&long)).to_key() else { panic!("a text") };
        assert_eq!(&*text, "ä".repeat(23));
        assert_eq!(Shown::of(KeyRef::Text("")).to_key(), Key::from(""));
    }

    #[test]
    fn a_sample_finds_the_heavy_keys_and_about_how_heavy_they_are() {
        let mut sketch = Sketch::new(32, 16);
        for n in 0..1_000_000_u64 {
            let key = match n % 10 {
                0..3 => 1,
                3 => 2,
                _ => mix(n) | 1 << 40,
            };
            sketch.add(id(key), KeyRef::Number(key), 1);
        }
        let mut keys: Vec<TopKey> = sketch.keys().collect();
        keys.sort_by_key(|key| std::cmp::Reverse(key.count));
        assert_eq!((&keys[0].key, &keys[1].key), (&Key::Number(1), &Key::Number(2)));
        // The error of a full sketch, and five deviations of the sample.
        assert!((300_000 - 11_000..=300_000 + 31_250 + 11_000).contains(&keys[0].count), "{keys:?}");
    }

    /// What is left of a call after the last unit that was drawn of it used to be skipped, so that a key of calls that
    /// cost 64 each had two thirds of what it took.
    #[test]
    fn whatever_a_call_costs_the_sample_is_as_large_in_the_end() {
        for (round, cost) in [1, 3, 10, 32, 63, 64, 65, 100, 126, 127, 128, 190, 1000].into_iter().enumerate() {
            let mut sketch = Sketch::new(4, 64);
            sketch.random = round as u64;
            let calls = 2_000_000 / u64::from(cost);
            for _ in 0..calls {
                sketch.add(id(1), KeyRef::Number(1), cost);
                sketch.add(id(2), KeyRef::Number(2), 1);
            }
            let mut counts: Vec<TopKey> = sketch.keys().collect();
            counts.sort_by_key(|top| top.key == Key::Number(2));
            for (top, exact) in counts.iter().zip([calls * u64::from(cost), calls]) {
                let off = top.count.abs_diff(exact) as f64;
                assert!(off <= 5.0 * 8.0 * (exact as f64).sqrt(), "cost {cost}: {} for {exact}", top.count);
            }
        }
    }

    /// The largest calls there are: counts stay at their end, and one call is no loop of millions.
    #[test]
    fn counts_end_at_the_largest_number() {
        let mut sketch = Sketch::new(1, 64);
        sketch.add(id(1), KeyRef::Number(1), u32::MAX);
        let [TopKey { count, .. }] = &sketch.keys().collect::<Vec<_>>()[..] else { panic!("one key") };
        assert!(count.abs_diff(u64::from(u32::MAX)) <= 127, "{count}");
        sketch.counts[0] = u64::MAX - 1;
        sketch.add(id(2), KeyRef::Number(2), u32::MAX);
        let [TopKey { key, count, error }] = &sketch.keys().collect::<Vec<_>>()[..] else { panic!("one key") };
        assert_eq!((key, *count, *error), (&Key::Number(2), u64::MAX, u64::MAX - 1));
    }

    proptest! {
        #[test]
        fn counts_are_never_low_and_high_by_no_more_than_said(
            adds in proptest::collection::vec((0_u64..30, 0_u32..9), 0..400),
            counters in 1_usize..12,
        ) {
            let mut sketch = Sketch::new(counters, 1);
            let mut exact: HashMap<u64, u64> = HashMap::new();
            for (key, units) in adds {
                sketch.add(id(key), KeyRef::Number(key), units);
                *exact.entry(key).or_default() += u64::from(units);
            }
            let total: u64 = exact.values().sum();
            let keys: Vec<TopKey> = sketch.keys().collect();
            prop_assert!(keys.len() <= counters);
            for TopKey { key, count, error } in &keys {
                let Key::Number(key) = key else { panic!("a number") };
                let exact = exact[key];
                prop_assert!(exact <= *count && *count - error <= exact && *error <= total / counters as u64);
            }
            for (key, count) in exact {
                prop_assert!(count <= total / counters as u64 || keys.iter().any(|top| top.key == Key::Number(key)));
            }
        }
    }
}
