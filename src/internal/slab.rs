//! Things in numbered places, for what is in the hands of callers.

/// Things in numbered places, which are used again. Each use has a turn, so that an old number is not taken for a new
/// one.
///
/// It grows by pieces, each twice as large as the one before, and nothing is ever moved: a vector that moves its millions
/// when it grows would make one caller wait for all of them, and those behind the lock as well.
pub(crate) struct Slab<T> {
    pieces: Vec<Vec<Place<T>>>,
    /// How many places there are.
    len: u32,
    free: Option<u32>,
}

struct Place<T> {
    content: Option<T>,
    turn: u32,
    next: Option<u32>,
}

/// The size of the first piece, a power of two.
const FIRST: u32 = 16;

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> Slab<T> {
    pub(crate) const fn new() -> Self {
        Self { pieces: Vec::new(), len: 0, free: None }
    }

    pub(crate) fn insert(&mut self, content: T) -> (u32, u32) {
        if let Some(free) = self.free {
            if let Some(place) = self.place(free) {
                place.content = Some(content);
                let (turn, next) = (place.turn, place.next);
                self.free = next;
                return (free, turn);
            }
        }
        let (number, (piece, _)) = (self.len, whereabouts(self.len));
        if piece == self.pieces.len() {
            self.pieces.push(Vec::with_capacity((FIRST as usize) << piece));
        }
        self.pieces[piece].push(Place { content: Some(content), turn: 0, next: None });
        self.len += 1;
        (number, 0)
    }

    fn place(&mut self, number: u32) -> Option<&mut Place<T>> {
        let (piece, at) = whereabouts(number);
        self.pieces.get_mut(piece)?.get_mut(at)
    }

    pub(crate) fn get_mut(&mut self, place: u32) -> Option<&mut T> {
        self.place(place)?.content.as_mut()
    }

    /// What is there since that turn.
    pub(crate) fn at(&mut self, place: u32, turn: u32) -> Option<&mut T> {
        self.place(place).filter(|place| place.turn == turn)?.content.as_mut()
    }

    /// Takes everything out. The places are gone, so an old number finds nothing.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = T> + use<T> {
        std::mem::take(self).pieces.into_iter().flatten().filter_map(|place| place.content)
    }

    pub(crate) fn remove(&mut self, place: u32) -> Option<T> {
        let free = self.free;
        let entry = self.place(place)?;
        let content = entry.content.take()?;
        entry.turn = entry.turn.wrapping_add(1);
        entry.next = free;
        self.free = Some(place);
        Some(content)
    }
}

/// The piece that a place lies in, and where in it.
fn whereabouts(number: u32) -> (usize, usize) {
    let number = u64::from(number) + u64::from(FIRST);
    let piece = number.ilog2() - FIRST.ilog2();
    (piece as usize, (number - (u64::from(FIRST) << piece)) as usize)
}

#[cfg(all(test, not(resile_loom)))]
mod tests {
    use super::*;

    #[test]
    fn places_are_used_again_and_their_turns_told_apart() {
        let mut slab = Slab::new();
        let first = slab.insert("a");
        let second = slab.insert("b");
        assert_eq!(slab.at(first.0, first.1), Some(&mut "a"));
        assert_eq!(slab.get_mut(second.0), Some(&mut "b"));
        assert_eq!(slab.remove(first.0), Some("a"));
        assert_eq!(slab.remove(first.0), None);
        let third = slab.insert("c");
        assert_eq!(third.0, first.0);
        assert_eq!(slab.at(first.0, first.1), None);
        assert_eq!(slab.at(third.0, third.1), Some(&mut "c"));
        assert_eq!(slab.remove(7), None);
    }

    #[test]
    fn every_place_that_is_free_is_used_again() {
        let mut slab = Slab::new();
        (0..100).for_each(|n| assert_eq!(slab.insert(n), (n, 0)));
        for turn in 1..4 {
            (0..100).for_each(|place| assert!(slab.remove(place).is_some()));
            let mut again: Vec<(u32, u32)> = (0..100).map(|n| slab.insert(n)).collect();
            again.sort_unstable();
            assert!(again.into_iter().eq((0..100).map(|place| (place, turn))));
        }
        assert_eq!(slab.insert(100), (100, 0));
    }

    #[test]
    fn it_grows_without_moving_anything() {
        let mut slab = Slab::new();
        // What lies behind a piece keeps it from growing where it is.
        let mut behind = Vec::new();
        let at: Vec<*const u32> = (0..10_000)
            .map(|n| {
                assert_eq!(slab.insert(n), (n, 0));
                behind.push(Box::new([0_u8; 100]));
                std::ptr::from_ref(slab.get_mut(n).unwrap())
            })
            .collect();
        for (n, at) in (0..).zip(at) {
            let found = slab.get_mut(n).unwrap();
            assert_eq!((std::ptr::from_ref(found), *found), (at, n));
        }
        assert!(slab.pieces.iter().all(|piece| piece.capacity() < 2 * 10_000));
        assert_eq!(whereabouts(u32::MAX), (28, 15));
    }
}
