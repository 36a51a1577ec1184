//! Where the passes of the layers are kept while a call is in.
//!
//! A place is claimed by the thread that owns its [stripe](crate::internal::stripe), by nobody else, and given up by
//! whoever leaves: each finds it as the other has left it, so that neither needs a locked instruction. Threads that own
//! no stripe claim in turn.
//!
//! A stripe grows by a chunk when none of some places, picked as if by chance, is free: half of them free is enough.
//! What it has grown to it keeps.

use crate::gate::Pass;
use crate::internal::stripe::SHARED;
use crate::internal::sync::{Acquire, AtomicU64, Mutex, OnceLock, Relaxed, Release};

/// Places of the first chunk; each next one is twice as large.
const FIRST: usize = 16;
/// For 2^28 calls at a time, of one stripe.
pub(super) const CHUNKS: usize = 24;
/// So many places are tried before a stripe grows.
const TRIES: u64 = 32;
/// A pass has the number of a place in as many low bits, and above them that of its stripe.
const NUMBER_BITS: u32 = 32;

#[derive(Debug)]
pub(super) struct Stays {
    layers: usize,
    stripes: Box<[Stripe]>,
}

#[derive(Debug)]
struct Stripe {
    /// Of a place: its turn, which is odd while it is taken, and two words for each layer.
    chunks: Box<[OnceLock<Box<[AtomicU64]>>]>,
    /// How many places there are, and which was claimed last: for the owner only.
    size: AtomicU64,
    last: AtomicU64,
    /// Locks the shared stripe.
    owner: Mutex<()>,
}

/// A place that is taken.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place<'a> {
    turn: &'a AtomicU64,
    words: &'a [AtomicU64],
    /// That of its stripe above its own.
    number: u64,
    /// The turn while it is taken.
    taken: u64,
}

impl Stays {
    /// For passes of so many layers, in stripes of so many chunks.
    pub(super) fn new(layers: usize, stripes: usize, chunks: usize) -> Self {
        let stripe = || Stripe {
            chunks: (0..chunks).map(|_| OnceLock::default()).collect(),
            size: AtomicU64::new(0),
            last: AtomicU64::new(0),
            owner: Mutex::default(),
        };
        Self { layers, stripes: (0..stripes).map(|_| stripe()).collect() }
    }

    /// A place for a call of a thread that has this stripe; none if as many as there can be are taken.
    #[inline]
    pub(super) fn claim(&self, number: usize) -> Option<Place<'_>> {
        let stripe = &self.stripes[number];
        let _owner = (number == SHARED).then(|| stripe.owner.lock());
        let last = stripe.last.load(Relaxed);
        let Place { turn, words, number: place, taken } = match self.free(stripe, last) {
            Some(place) => place,
            None => self.look_around(stripe, last)?,
        };
        turn.store(taken, Relaxed);
        Some(Place { turn, words, number: (number as u64) << NUMBER_BITS | place, taken })
    }

    /// The place of a call; none if it is not in.
    #[inline]
    pub(super) fn find(&self, pass: &Pass) -> Option<Place<'_>> {
        let [number, taken] = pass.words();
        let stripe = self.stripes.get((number >> NUMBER_BITS) as usize)?;
        let (turn, words) = self.at(stripe, number & ((1 << NUMBER_BITS) - 1))?;
        let is_in = taken & 1 == 1 && turn.load(Relaxed) == taken;
        is_in.then_some(Place { turn, words, number, taken })
    }

    #[cold]
    fn look_around<'a>(&self, stripe: &'a Stripe, last: u64) -> Option<Place<'a>> {
        let size = stripe.size.load(Relaxed);
        let mut scattered = (1..=TRIES).map(|n| {
            let picked = (last + n).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            ((u128::from(picked) * u128::from(size)) >> 64) as u64
        });
        let place = scattered.find_map(|place| self.free(stripe, place)).or_else(|| self.grow(stripe, size))?;
        stripe.last.store(place.number, Relaxed);
        Some(place)
    }

    /// A new chunk, and its first place.
    fn grow<'a>(&self, stripe: &'a Stripe, size: u64) -> Option<Place<'a>> {
        let (number, _) = split(size);
        let places = FIRST << number;
        let chunk = stripe.chunks.get(number)?;
        chunk.set((0..places * self.place_len()).map(|_| AtomicU64::new(0)).collect()).ok()?;
        stripe.size.store(size + places as u64, Relaxed);
        self.free(stripe, size)
    }

    /// A place of a stripe, as it will be when it is taken, if it is free.
    #[inline]
    fn free<'a>(&self, stripe: &'a Stripe, place: u64) -> Option<Place<'a>> {
        let (turn, words) = self.at(stripe, place)?;
        // Acquires that whoever left has read what is written over now.
        let before = turn.load(Acquire);
        (before & 1 == 0).then_some(Place { turn, words, number: place, taken: before | 1 })
    }

    #[inline]
    fn at<'a>(&self, stripe: &'a Stripe, place: u64) -> Option<(&'a AtomicU64, &'a [AtomicU64])> {
        let (chunk, place) = split(place);
        let len = self.place_len();
        stripe.chunks.get(chunk)?.get()?.get(place * len..(place + 1) * len)?.split_first()
    }

    const fn place_len(&self) -> usize {
        1 + 2 * self.layers
    }
}

/// The chunk of a place, and its number in there.
#[inline]
const fn split(place: u64) -> (usize, usize) {
    let from_first = place + FIRST as u64;
    let chunk = from_first.ilog2() - FIRST.ilog2();
    (chunk as usize, from_first as usize - (FIRST << chunk))
}

impl Place<'_> {
    /// What leads back to this place.
    #[inline]
    pub(super) const fn pass(&self) -> Pass {
        Pass::new(self.number, self.taken)
    }

    #[inline]
    pub(super) fn get(&self, layer: usize) -> Pass {
        Pass::new(self.words[2 * layer].load(Relaxed), self.words[2 * layer + 1].load(Relaxed))
    }

    #[inline]
    pub(super) fn set(&self, layer: usize, pass: &Pass) {
        let [a, b] = pass.words();
        self.words[2 * layer].store(a, Relaxed);
        self.words[2 * layer + 1].store(b, Relaxed);
    }

    /// Gives it up. Its pass leads nowhere from now on.
    #[inline]
    pub(super) fn give_up(self) {
        self.turn.store(self.taken.wrapping_add(1), Release);
    }
}

#[cfg(all(test, not(resile_loom)))]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against a map, with many in at once: what is found is what was kept, and once.
        #[test]
        fn each_pass_finds_what_was_kept_for_it_until_it_is_given_up(
            steps in prop::collection::vec((0_usize..3, any::<u64>()), 1..400),
        ) {
            let stays = Stays::new(2, 3, CHUNKS);
            let mut kept = HashMap::new();
            for (n, (stripe, pick)) in (0_u64..).zip(steps) {
                if pick % 3 > 0 || kept.is_empty() {
                    let place = stays.claim(stripe).unwrap();
                    place.set(0, &Pass::new(n, 1));
                    place.set(1, &Pass::new(n, 2));
                    prop_assert!(kept.insert(place.pass().words(), n).is_none());
                } else {
                    let [a, b] = *kept.keys().nth(pick as usize % kept.len()).unwrap();
                    let place = stays.find(&Pass::new(a, b)).unwrap();
                    let n = kept.remove(&[a, b]).unwrap();
                    prop_assert_eq!([place.get(0), place.get(1)], [Pass::new(n, 1), Pass::new(n, 2)]);
                    place.give_up();
                    prop_assert!(stays.find(&Pass::new(a, b)).is_none());
                }
            }
        }
    }

    #[test]
    fn a_stripe_keeps_to_a_few_times_the_places_that_are_taken_at_once() {
        let stays = Stays::new(1, 2, CHUNKS);
        let mut taken = std::collections::VecDeque::new();
        for _ in 0..1_000_000 {
            if taken.len() == 1000 {
                let pass: Pass = taken.pop_front().unwrap();
                stays.find(&pass).unwrap().give_up();
            }
            taken.push_back(stays.claim(1).unwrap().pass());
        }
        let size = stays.stripes[1].size.load(Relaxed);
        assert!(size <= 4096, "{size}");
    }

    #[test]
    fn no_more_are_in_than_there_are_places_and_one_more_when_one_has_left() {
        let stays = Stays::new(1, 2, 2);
        let passes: Vec<Pass> = std::iter::from_fn(|| stays.claim(1).map(|place| place.pass())).collect();
        assert!((FIRST * 2..=FIRST * 3).contains(&passes.len()), "{}", passes.len());
        for pass in &passes {
            stays.find(pass).unwrap().give_up();
        }
        assert!(stays.claim(1).is_some());
        assert!(stays.find(&Pass::new(7 << NUMBER_BITS, 1)).is_none());
        assert!(stays.find(&Pass::new((1 << NUMBER_BITS) + 99, 1)).is_none());
    }

    /// A pass that was never given led to a place that was free: it was given up, and so taken for good.
    #[test]
    fn no_pass_leads_to_a_free_place() {
        let stays = Stays::new(1, 2, CHUNKS);
        let first = stays.claim(1).unwrap();
        for (number, turn) in [(0, 0), (1, 0), (1, 1), (0, 3)] {
            assert!(stays.find(&Pass::new((1 << NUMBER_BITS) + number, turn)).is_none());
        }
        let pass = first.pass();
        first.give_up();
        let [number, turn] = pass.words();
        assert!((0..4).all(|more| stays.find(&Pass::new(number, turn + more)).is_none()));
    }
}
