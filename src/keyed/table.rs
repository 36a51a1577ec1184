//! A table of fixed capacity: where each id's entry lies, and a hand that goes round for entries to give up.
//!
//! 1. Entries lie in slots and never move; the index, open addressing with linear probing, says in which one. So a slot's
//!    number leads to its entry for as long as that is in the table.
//! 2. The index is never more than three quarters full. Removing closes the gap (Knuth 6.4, algorithm R), so there are
//!    no tombstones, and an id that is not there is found missing after a few places.
//! 3. Memory is asked for once, when the table is made, and touched as it is used. Nothing is ever moved to grow.
//!
//! Its owner holds a lock around it.

use super::id::Id;

const NIL: u32 = u32::MAX;
/// A place in the index: a tag of 8 bits, and the slot's number plus 1 in the others; 0 for nothing.
const SLOT_BITS: u32 = 24;
const SLOT: u32 = (1 << SLOT_BITS) - 1;
/// The most entries of one table.
pub(super) const MOST: u32 = SLOT - 1;

#[derive(Debug)]
pub(super) struct Table<V> {
    index: Box<[u32]>,
    slots: Vec<Slot<V>>,
    capacity: u32,
    /// The first free slot among those that were used before; the next one is in its place.
    free: u32,
    len: u32,
    hand: u32,
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
        let places = capacity as usize + capacity as usize / 3 + 2;
        Self {
            index: vec![0; places].into_boxed_slice(),
            slots: Vec::with_capacity(capacity as usize),
            capacity,
            free: NIL,
            len: 0,
            hand: 0,
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
        self.index.len() * size_of::<u32>() + self.capacity as usize * size_of::<Slot<V>>()
    }

    #[inline]
    fn home(&self, place: u64) -> usize {
        (((place >> 32) * self.index.len() as u64) >> 32) as usize
    }

    #[inline]
    fn tag(id: Id) -> u32 {
        (id.place as u32 >> 8) << SLOT_BITS
    }

    #[inline]
    fn after(&self, place: usize) -> usize {
        if place + 1 == self.index.len() { 0 } else { place + 1 }
    }

    /// The slot of an id.
    #[inline]
    pub(super) fn find(&self, id: Id) -> Option<u32> {
        let (mut place, tag) = (self.home(id.place), Self::tag(id));
        loop {
            let entry = self.index[place];
            if entry == 0 {
                return None;
            }
            if entry & !SLOT == tag {
                let slot = (entry & SLOT) - 1;
                let found = &self.slots[slot as usize];
                if found.place == id.place && found.rest == id.rest {
                    return Some(slot);
                }
            }
            place = self.after(place);
        }
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

    /// Adds an entry. The owner has checked that it isn't there and that there is room.
    pub(super) fn insert(&mut self, id: Id, mark: u32, value: V) -> u32 {
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
        let mut place = self.home(id.place);
        while self.index[place] != 0 {
            place = self.after(place);
        }
        self.index[place] = Self::tag(id) | (slot + 1);
        self.len += 1;
        slot
    }

    /// Takes an entry out.
    pub(super) fn remove(&mut self, slot: u32) -> Option<V> {
        let entry = self.slots.get_mut(slot as usize)?;
        let value = entry.value.take()?;
        let place = std::mem::replace(&mut entry.place, self.free.into());
        self.free = slot;
        self.len -= 1;
        let mut gap = self.home(place);
        while self.index[gap] & SLOT != slot + 1 {
            gap = self.after(gap);
        }
        self.close(gap);
        Some(value)
    }

    /// Moves up into the gap whatever would not be found any more behind it.
    fn close(&mut self, mut gap: usize) {
        self.index[gap] = 0;
        let mut place = self.after(gap);
        while self.index[place] != 0 {
            let slot = (self.index[place] & SLOT) - 1;
            let home = self.home(self.slots[slot as usize].place);
            // Whether its home lies cyclically in (gap, place]: then it can stay.
            let stays = if gap <= place { gap < home && home <= place } else { gap < home || home <= place };
            if !stays {
                self.index[gap] = self.index[place];
                self.index[place] = 0;
                gap = place;
            }
            place = self.after(place);
        }
    }

    /// Moves the hand on to the next slot that was ever used, and round.
    pub(super) fn advance(&mut self) -> u32 {
        let slot = self.hand;
        self.hand = if slot as usize + 1 < self.slots.len() { slot + 1 } else { 0 };
        slot
    }
}

#[cfg(all(test, not(resile_loom)))]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn id(place: u64, rest: u32) -> Id {
        Id { place, rest }
    }

    #[test]
    fn keys_with_the_same_place_and_tag_are_told_apart() {
        let mut table = Table::new(100);
        let slots: Vec<u32> = (0..100).map(|n| table.insert(id(7 << 32, n), 5, u64::from(n))).collect();
        assert!(table.is_full());
        for (n, slot) in slots.iter().enumerate() {
            assert_eq!((table.find(id(7 << 32, n as u32)), table.mark(*slot)), (Some(*slot), Some(5)));
        }
        assert_eq!(table.find(id(7 << 32, 100)), None);
        assert_eq!(slots.iter().rev().map(|slot| table.remove(*slot).unwrap()).sum::<u64>(), 4950);
        assert_eq!((table.len(), table.find(id(7 << 32, 0))), (0, None));
    }

    #[derive(Clone, Debug)]
    enum Op {
        Insert(u64, u32),
        Remove(usize),
        Advance,
    }

    fn op() -> impl Strategy<Value = Op> {
        // Few places, so that probes are long and wrap.
        let place = prop_oneof![0_u64..4, Just(u64::MAX), Just(u64::MAX << 33)].prop_map(|n| n.rotate_right(16));
        prop_oneof![
            4 => (place, 0_u32..6).prop_map(|(place, rest)| Op::Insert(place, rest)),
            3 => (0_usize..64).prop_map(Op::Remove),
            1 => Just(Op::Advance),
        ]
    }

    proptest! {
        #[test]
        fn the_table_behaves_like_a_map_and_its_slots_stay(
            ops in proptest::collection::vec(op(), 0..200),
            capacity in 1_u32..16,
        ) {
            let mut table = Table::new(capacity);
            let mut map: HashMap<(u64, u32), (u32, usize)> = HashMap::new();
            for (turn, op) in ops.into_iter().enumerate() {
                match op {
                    Op::Insert(place, rest) => {
                        if !table.is_full() && table.find(id(place, rest)).is_none() {
                            map.insert((place, rest), (table.insert(id(place, rest), 0, turn), turn));
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
