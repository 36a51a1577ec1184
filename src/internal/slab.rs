//! Things in numbered places, for what is in the hands of callers.

/// Things in numbered places, which are used again. Each use has a turn, so that an old number is not taken for a new
/// one.
pub(crate) struct Slab<T> {
    places: Vec<Place<T>>,
    free: Option<u32>,
}

struct Place<T> {
    content: Option<T>,
    turn: u32,
    next: Option<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> Slab<T> {
    pub(crate) const fn new() -> Self {
        Self { places: Vec::new(), free: None }
    }

    pub(crate) fn insert(&mut self, content: T) -> (u32, u32) {
        if let Some(free) = self.free {
            let place = &mut self.places[free as usize];
            self.free = place.next;
            place.content = Some(content);
            return (free, place.turn);
        }
        self.places.push(Place { content: Some(content), turn: 0, next: None });
        (self.places.len() as u32 - 1, 0)
    }

    pub(crate) fn get_mut(&mut self, place: u32) -> Option<&mut T> {
        self.places.get_mut(place as usize)?.content.as_mut()
    }

    /// What is there since that turn.
    pub(crate) fn at(&mut self, place: u32, turn: u32) -> Option<&mut T> {
        self.places.get_mut(place as usize).filter(|place| place.turn == turn)?.content.as_mut()
    }

    pub(crate) fn remove(&mut self, place: u32) -> Option<T> {
        let free = self.free;
        let entry = self.places.get_mut(place as usize)?;
        let content = entry.content.take()?;
        entry.turn = entry.turn.wrapping_add(1);
        entry.next = free;
        self.free = Some(place);
        Some(content)
    }
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
}
