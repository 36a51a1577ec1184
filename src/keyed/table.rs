//! A table of fixed capacity: where each id's entry lies, and a hand that goes round for entries to give up.
//!
//! 1. Entries lie in slots and never move; the index says in which one. So a slot's number leads to its entry for as long
//!    as that is in the table.
//! 2. The index is buckets of 16 places, 11 of which are taken on average if the table is full. An id has two buckets and
//!    goes to the emptier one (Azar, Broder, Karlin and Upfal 1994), so it is found, or found missing, after 32 places at
//!    most. In a full table one bucket in 6,000 has 15 entries, and one in the square of that is full; so both are full
//!    for one id in 10^15, and then there is no room for it.
//! 3. The places of a bucket that are taken come first, so a search ends at the first free one.
//! 4. Memory is asked for once, when the table is made, and touched as it is used. Nothing is ever moved to grow.
//!
//! Its owner holds a lock around it.

use super::id::Id;

const NIL: u32 = u32::MAX;
/// A place in the index: a tag of 8 bits, and the slot's number plus 1 in the others; 0 for nothing.
const SLOT_BITS: u32 = 24;
const SLOT: u32 = (1 << SLOT_BITS) - 1;
/// The most entries of one table.
pub(super) const MOST: u32 = SLOT - 1;
/// Places of a bucket: a line of the cache.
const WIDTH: usize = 16;
/// How many of them are taken on average if the table is full.
const TAKEN: u32 = 11;

type Bucket = [u32; WIDTH];

#[derive(Debug)]
pub(super) struct Table<V> {
    index: Box<[Bucket]>,
    slots: Vec<Slot<V>>,
    capacity: u32,
    /// The first free slot among those that were used before; the next one is in its place.
    free: u32,
    len: u32,
    hand: u32,
    looked: Looked,
}

/// Flat, and aligned to half a cache line, so that an entry of 16 bytes is read with one miss.
#[derive(Debug)]
#[repr(align(32))]
struct Slot<V> {
    place: u64,
    rest: u32,
    /// A note of the owner's.
    mark: u32,
    value: Option<V>,
}

impl<V> Table<V> {
    /// A table for so many entries, 1 to [`MOST`].
    pub(super) fn new(capacity: u32) -> Self {
        Self {
            index: vec![[0; WIDTH]; capacity.div_ceil(TAKEN) as usize].into_boxed_slice(),
            slots: Vec::with_capacity(capacity as usize),
            capacity,
            free: NIL,
            len: 0,
            hand: 0,
            looked: Looked::default(),
        }
    }

    pub(super) fn len(&self) -> u32 {
        self.len
    }

    pub(super) fn is_full(&self) -> bool {
        self.len == self.capacity
    }

    /// What is taken in all by a table of this capacity.
    pub(super) fn bytes(&self) -> usize {
        self.index.len() * size_of::<Bucket>() + self.capacity as usize * size_of::<Slot<V>>()
    }

    #[inline]
    fn first(&self, place: u64) -> usize {
        (((place >> 32) * self.index.len() as u64) >> 32) as usize
    }

    /// Another one than the first, if there is another.
    #[inline]
    fn second(&self, place: u64) -> usize {
        let (first, second) = (self.first(place), self.first(place.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        if second != first {
            second
        } else if first + 1 < self.index.len() {
            first + 1
        } else {
            0
        }
    }

    #[inline]
    fn tag(id: Id) -> u32 {
        (id.place as u32 >> 8) << SLOT_BITS
    }

    /// The slot of an id.
    #[inline]
    pub(super) fn find(&self, id: Id) -> Option<u32> {
        self.find_in(self.first(id.place), id).or_else(|| self.find_in(self.second(id.place), id))
    }

    #[inline]
    fn find_in(&self, bucket: usize, id: Id) -> Option<u32> {
        for entry in self.index[bucket] {
            self.looked.at(1);
            if entry == 0 {
                return None;
            }
            if entry & !SLOT == Self::tag(id) {
                let slot = (entry & SLOT) - 1;
                let found = &self.slots[slot as usize];
                if found.place == id.place && found.rest == id.rest {
                    return Some(slot);
                }
            }
        }
        None
    }

    #[inline]
    pub(super) fn get(&self, slot: u32) -> Option<&V> {
        self.slots.get(slot as usize)?.value.as_ref()
    }

    #[inline]
    pub(super) fn get_mut(&mut self, slot: u32) -> Option<&mut V> {
        self.slots.get_mut(slot as usize)?.value.as_mut()
    }

    pub(super) fn mark(&self, slot: u32) -> Option<u32> {
        self.slots.get(slot as usize).map(|slot| slot.mark)
    }

    pub(super) fn set_mark(&mut self, slot: u32, mark: u32) {
        if let Some(slot) = self.slots.get_mut(slot as usize) {
            slot.mark = mark;
        }
    }

    /// Where an id would go: the bucket, and the place in it.
    fn place_for(&self, id: Id) -> Option<(usize, usize)> {
        if self.is_full() {
            return None;
        }
        let places = [self.first(id.place), self.second(id.place)].map(|bucket| {
            let taken = self.index[bucket].iter().position(|entry| *entry == 0).unwrap_or(WIDTH);
            self.looked.at(WIDTH.min(taken + 1));
            (bucket, taken)
        });
        let [first, second] = places;
        let emptier = if second.1 < first.1 { second } else { first };
        (emptier.1 < WIDTH).then_some(emptier)
    }

    /// Whether there is room for an id that isn't there.
    pub(super) fn has_room_for(&self, id: Id) -> bool {
        self.place_for(id).is_some()
    }

    /// Adds an entry. The owner has checked that it isn't there and that there is room.
    pub(super) fn insert(&mut self, id: Id, mark: u32, value: V) -> Option<u32> {
        let (bucket, place) = self.place_for(id)?;
        let slot = self.free;
        let entry = Slot { place: id.place, rest: id.rest, mark, value: Some(value) };
        let slot = if slot == NIL {
            self.slots.push(entry);
            self.slots.len() as u32 - 1
        } else {
            let old = std::mem::replace(&mut self.slots[slot as usize], entry);
            self.free = old.place as u32;
            slot
        };
        self.index[bucket][place] = Self::tag(id) | (slot + 1);
        self.len += 1;
        Some(slot)
    }

    /// Takes an entry out.
    pub(super) fn remove(&mut self, slot: u32) -> Option<V> {
        let entry = self.slots.get_mut(slot as usize)?;
        let value = entry.value.take()?;
        let place = std::mem::replace(&mut entry.place, self.free.into());
        self.free = slot;
        self.len -= 1;
        for bucket in [self.first(place), self.second(place)] {
            let bucket = &mut self.index[bucket];
            self.looked.at(WIDTH);
            if let Some(gap) = bucket.iter().position(|entry| entry & SLOT == slot + 1) {
                let last = bucket.iter().rposition(|entry| *entry != 0).unwrap_or(gap);
                bucket[gap] = bucket[last];
                bucket[last] = 0;
                break;
            }
        }
        Some(value)
    }

    /// How many places and entries were looked at since this was last asked.
    #[cfg(all(test, not(resile_loom)))]
    pub(super) fn looked(&self) -> usize {
        self.looked.0.take()
    }

    /// Moves the hand on to the next slot that was ever used, and round.
    pub(super) fn advance(&mut self) -> u32 {
        self.looked.at(1);
        let slot = self.hand;
        self.hand = if slot as usize + 1 < self.slots.len() { slot + 1 } else { 0 };
        slot
    }
}

/// How many places and entries were looked at, for the tests of the bound.
#[derive(Debug, Default)]
struct Looked(#[cfg(all(test, not(resile_loom)))] std::cell::Cell<usize>);

impl Looked {
    #[inline]
    #[allow(clippy::unused_self, reason = "it counts in tests only")]
    fn at(&self, more: usize) {
        #[cfg(all(test, not(resile_loom)))]
        self.0.set(self.0.get() + more);
        let _ = more;
    }
}

#[cfg(all(test, not(resile_loom)))]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;
    use crate::internal::rng::mix;

    fn id(place: u64, rest: u32) -> Id {
        Id { place, rest }
    }

    #[test]
    fn keys_with_the_same_place_and_tag_are_told_apart() {
        let mut table = Table::new(100);
        let mut insert = |n| table.insert(id(7 << 32, n), 5, u64::from(n));
        let slots: Vec<u32> = (0..32).map(|n| insert(n).unwrap()).collect();
        assert_eq!(insert(32), None, "both buckets are full");
        assert!(!table.is_full() && !table.has_room_for(id(7 << 32, 33)));
        for (n, slot) in slots.iter().enumerate() {
            assert_eq!((table.find(id(7 << 32, n as u32)), table.mark(*slot)), (Some(*slot), Some(5)));
        }
        assert_eq!(table.find(id(7 << 32, 33)), None);
        assert_eq!(slots.iter().rev().map(|slot| table.remove(*slot).unwrap()).sum::<u64>(), 496);
        assert_eq!((table.len(), table.find(id(7 << 32, 0))), (0, None));
    }

    /// Tables of many sizes that stay full while ids come and go, some by turns, some by chance.
    #[test]
    fn there_is_room_for_every_id_as_long_as_the_table_is_not_full() {
        for capacity in [1, 2, 12, 13, 24, 25, 40, 100, 1000, 30_000] {
            let mut table = Table::new(capacity);
            let (mut slots, mut fullest) = (Vec::new(), 0);
            for n in 0..u64::from(capacity) * 4 + 2000 {
                if table.is_full() {
                    let which = if n % 2 == 0 { n } else { mix(n) } % u64::from(capacity);
                    assert!(table.remove(slots.swap_remove(which as usize)).is_some());
                }
                let slot = table.insert(id(mix(n), 0), 0, n);
                slots.push(slot.expect("the table is not full"));
                let taken = |bucket: &Bucket| bucket.iter().filter(|entry| **entry != 0).count();
                if n % 1000 == 0 {
                    fullest = table.index.iter().map(taken).max().unwrap_or(0).max(fullest);
                }
            }
            assert!(fullest < WIDTH, "{fullest} in a bucket of {capacity}");
        }
    }

    #[derive(Clone, Debug)]
    enum Op {
        Insert(u64, u32),
        Remove(usize),
        Advance,
    }

    fn op() -> impl Strategy<Value = Op> {
        // Few places, so that buckets are shared and become full.
        let place = prop_oneof![0_u64..4, Just(u64::MAX), Just(u64::MAX << 33)].prop_map(|n| n.rotate_right(16));
        prop_oneof![
            4 => (place, 0_u32..12).prop_map(|(place, rest)| Op::Insert(place, rest)),
            3 => (0_usize..64).prop_map(Op::Remove),
            1 => Just(Op::Advance),
        ]
    }

    proptest! {
        #[test]
        fn the_table_behaves_like_a_map_and_its_slots_stay(
            ops in proptest::collection::vec(op(), 0..300),
            capacity in 1_u32..60,
        ) {
            let mut table = Table::new(capacity);
            let mut map: HashMap<(u64, u32), (u32, usize)> = HashMap::new();
            for (turn, op) in ops.into_iter().enumerate() {
                match op {
                    Op::Insert(place, rest) => {
                        if table.has_room_for(id(place, rest)) && table.find(id(place, rest)).is_none() {
                            map.insert((place, rest), (table.insert(id(place, rest), 0, turn).unwrap(), turn));
                        }
                    }
                    Op::Remove(which) if !map.is_empty() => {
                        let key = *map.keys().nth(which % map.len()).unwrap();
                        let (slot, turn) = map.remove(&key).unwrap();
                        prop_assert_eq!(table.remove(slot), Some(turn));
                        prop_assert_eq!(table.remove(slot), None);
                    }
                    Op::Remove(_) => {}
                    Op::Advance => {
                        prop_assert!(table.advance() < capacity);
                    }
                }
                prop_assert_eq!(table.len() as usize, map.len());
                prop_assert_eq!(table.is_full(), map.len() == capacity as usize);
                for ((place, rest), (slot, turn)) in &map {
                    prop_assert_eq!(table.find(id(*place, *rest)), Some(*slot));
                    prop_assert_eq!(table.get(*slot), Some(turn));
                }
            }
        }
    }
}
