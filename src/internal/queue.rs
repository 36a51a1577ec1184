//! The one waiter queue: who waits, in which order, and who has been served but has not noticed yet.
//!
//! The queue is a ring in the order of arrival, kept under its owner's mutex. It knows nothing of permits or tokens: the
//! owner decides when the head fits and calls [`Queue::serve_head`].
//!
//! 1. Waiters are numbered as they come and served in that order, so a number below that of the first in the ring is one
//!    that was served, or that left, or is among the few rejected ones that are remembered until they have noticed.
//!    A rejected waiter that is recalled, since it fits after all, keeps its place: it stands before the whole ring.
//! 2. Hence [`Queue::progress`] is all that a waiter needs to see that it was served. The owner publishes it in an atomic,
//!    and the waiter takes no lock.
//! 3. A served waiter's grant belongs to its key: whoever has the key and doesn't use it must give the grant back.
//! 4. Wakers are cloned, woken and dropped outside of the lock: those are user code.
//! 5. Who leaves from the middle leaves an empty place in the ring. The first place is never empty, and the ring grows
//!    only while more than three quarters of its places are taken.

use std::collections::{BTreeMap, VecDeque};
use std::task::Waker;

use super::time::Moment;

/// How many may stand in a queue by default.
///
/// A bound of memory (about a megabyte when full), not of patience: nobody should wait behind sixteen thousand others,
/// and a queue's own `max_queue` says how many are worth keeping.
pub(crate) const DEFAULT_MAX_QUEUE: u32 = 16_384;
/// The longest queue that can be asked for.
pub(crate) const LONGEST_QUEUE: u32 = 1 << 24;

/// Set in a queue's progress while a waiter was rejected and has not noticed, or was recalled: then the lock tells more.
const REJECTIONS: u64 = 1 << 63;

/// A waiter's number: at one in a nanosecond they last for three centuries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key(u64);

impl Key {
    pub(crate) const fn to_bits(self) -> u64 {
        self.0
    }

    pub(crate) const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// Whether a queue that has come so far has served this waiter. If not, its lock is needed to know more.
    #[inline]
    pub(crate) const fn is_served(self, progress: u64) -> bool {
        self.0 < progress && progress < REJECTIONS
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    /// In the queue; `head` if nobody stands before it.
    Waiting { head: bool },
    /// Taken out of the queue with what it asked for.
    Served,
    /// Taken out of the queue because it can never be served.
    Rejected,
}

#[derive(Debug)]
struct Place {
    key: Key,
    /// When the waiter means to give up, for owners that ask.
    until: Moment,
    waker: Option<Waker>,
    need: u32,
    /// The waiter has left.
    empty: bool,
}

#[derive(Debug)]
pub(crate) struct Queue {
    places: VecDeque<Place>,
    /// How many places are taken.
    len: u32,
    /// The number of the next to come.
    next: u64,
    /// What all waiters together ask for.
    weight: u64,
    /// Those that were rejected and have not noticed.
    rejected: BTreeMap<Key, Place>,
    /// Those of them that wait again, before all of the ring. Apart, since many may be rejected while somebody has to be
    /// found first.
    recalled: BTreeMap<Key, Place>,
}

impl Queue {
    pub(crate) const fn new() -> Self {
        Self {
            places: VecDeque::new(),
            len: 0,
            next: 0,
            weight: 0,
            rejected: BTreeMap::new(),
            recalled: BTreeMap::new(),
        }
    }

    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn weight(&self) -> u64 {
        self.weight
    }

    /// How far the queue has come: see invariants 1 and 2.
    pub(crate) fn progress(&self) -> u64 {
        let Key(first) = self.first();
        if self.rejected.is_empty() && self.recalled.is_empty() { first } else { first | REJECTIONS }
    }

    /// Appends a waiter. The owner has checked its bound.
    pub(crate) fn push(&mut self, need: u32, until: Moment, waker: Option<Waker>) -> Key {
        if self.places.len() == self.places.capacity() && self.len as usize <= self.places.len() / 4 * 3 {
            self.places.retain(|place| !place.empty);
        }
        let key = Key(self.next);
        self.places.push_back(Place { key, until, waker, need, empty: false });
        self.next += 1;
        self.len += 1;
        self.weight += u64::from(need);
        key
    }

    /// What the first waiter asks for.
    pub(crate) fn head(&self) -> Option<u32> {
        self.head_place().map(|place| place.need)
    }

    /// What each waiter asks for, from the first to the last.
    pub(crate) fn needs(&self) -> impl Iterator<Item = u32> + '_ {
        let ring = self.places.iter().filter(|place| !place.empty);
        self.recalled.values().chain(ring).map(|place| place.need)
    }

    /// When the first waiter means to give up.
    pub(crate) fn head_until(&self) -> Option<Moment> {
        self.head_place().map(|place| place.until)
    }

    fn head_place(&self) -> Option<&Place> {
        self.recalled.values().next().or(self.places.front())
    }

    fn stand_first(&mut self, place: Place) {
        self.len += 1;
        self.weight += u64::from(place.need);
        self.recalled.insert(place.key, place);
    }

    /// Whether a rejected waiter asks for no more than this.
    pub(crate) fn can_recall(&self, most: u32) -> bool {
        self.rejected.values().any(|place| place.need <= most)
    }

    /// Lets rejected waiters that ask for no more than this wait again, in the places that they had.
    pub(crate) fn recall(&mut self, most: u32) {
        for (key, place) in std::mem::take(&mut self.rejected) {
            if place.need <= most {
                self.stand_first(place);
            } else {
                self.rejected.insert(key, place);
            }
        }
    }

    /// Takes the first waiter out with its grant; its waker is to be woken after the lock is released.
    pub(crate) fn serve_head(&mut self) -> Option<Waker> {
        self.pop()?.waker
    }

    /// The same, with its key. There must be a first waiter.
    pub(crate) fn grant_head(&mut self) -> (Key, Option<Waker>) {
        let place = self.pop().expect("there is a head");
        (place.key, place.waker)
    }

    /// Takes the first waiter out with a refusal.
    pub(crate) fn reject_head(&mut self) -> Option<Waker> {
        let mut place = self.pop()?;
        let waker = place.waker.take();
        self.rejected.insert(place.key, place);
        waker
    }

    fn pop(&mut self) -> Option<Place> {
        let place = match self.recalled.pop_first() {
            Some((_, place)) => place,
            None => self.places.pop_front()?,
        };
        self.len -= 1;
        self.weight -= u64::from(place.need);
        self.skip_empty();
        Some(place)
    }

    fn skip_empty(&mut self) {
        while self.places.front().is_some_and(|place| place.empty) {
            self.places.pop_front();
        }
    }

    /// The first waiter's waker, to tell it that it has become the first. It leaves a new one when it polls.
    pub(crate) fn take_head_waker(&mut self) -> Option<Waker> {
        self.recalled.values_mut().next().or(self.places.front_mut())?.waker.take()
    }

    /// What a waiter has come to. Who has left is as good as rejected.
    pub(crate) fn status(&self, key: Key) -> Status {
        if self.rejected.contains_key(&key) {
            Status::Rejected
        } else if key < self.first() && !self.recalled.contains_key(&key) {
            Status::Served
        } else if self.recalled.contains_key(&key) || self.find(key).is_some() {
            Status::Waiting { head: self.head_place().is_some_and(|head| head.key == key) }
        } else {
            Status::Rejected
        }
    }

    /// The number of the first waiter, or of the next to come.
    fn first(&self) -> Key {
        self.places.front().map_or(Key(self.next), |place| place.key)
    }

    /// When a waiter means to give up.
    pub(crate) fn until(&self, key: Key) -> Moment {
        let place = self.recalled.get(&key).or(self.find(key).map(|index| &self.places[index]));
        place.map_or(Moment::NEVER, |place| place.until)
    }

    /// Leaves a waker, and takes back whichever one is not needed: to be dropped after the lock is released.
    #[must_use]
    pub(crate) fn leave_waker(&mut self, key: Key, waker: Waker) -> Option<Waker> {
        let index = self.find(key);
        let ring = index.and_then(|index| self.places.get_mut(index));
        let Some(place) = self.recalled.get_mut(&key).or(ring) else { return Some(waker) };
        match &mut place.waker {
            Some(old) if old.will_wake(&waker) => Some(waker),
            place => place.replace(waker),
        }
    }

    /// Ends a wait: what the waiter had come to, and its waker, to be dropped after the lock is released.
    pub(crate) fn remove(&mut self, key: Key) -> (Status, Option<Waker>) {
        let status = self.status(key);
        let mut waker = None;
        match status {
            Status::Waiting { head: true } => waker = self.serve_head(),
            Status::Waiting { head: false } => {
                if let Some(place) = self.recalled.remove(&key) {
                    waker = place.waker;
                    self.len -= 1;
                    self.weight -= u64::from(place.need);
                } else if let Some(index) = self.find(key) {
                    let place = &mut self.places[index];
                    place.empty = true;
                    waker = place.waker.take();
                    self.len -= 1;
                    self.weight -= u64::from(place.need);
                    // The first of the ring is not the head while somebody is recalled.
                    self.skip_empty();
                }
            }
            Status::Rejected => {
                self.rejected.remove(&key);
            }
            Status::Served => {}
        }
        (status, waker)
    }

    /// Where a waiter stands in the ring.
    fn find(&self, key: Key) -> Option<usize> {
        let index = self.places.binary_search_by_key(&key, |place| place.key).ok()?;
        (!self.places[index].empty).then_some(index)
    }
}

/// Wakers collected under a lock, to be woken in order once it is released. Mostly it is one.
#[derive(Debug, Default)]
pub(crate) struct WakeList {
    first: Option<Waker>,
    others: Vec<Waker>,
}

impl WakeList {
    #[inline]
    pub(crate) fn push(&mut self, waker: Option<Waker>) {
        if self.first.is_none() {
            self.first = waker;
        } else {
            self.others.extend(waker);
        }
    }

    /// Wakes all. Call it with no lock held.
    #[inline]
    pub(crate) fn wake(mut self) {
        self.others.reverse();
        self.wake_rest();
    }

    #[inline]
    fn wake_rest(&mut self) {
        if let Some(first) = self.first.take() {
            first.wake();
        }
        while let Some(waker) = self.others.pop() {
            waker.wake();
        }
    }
}

/// A waker is user code and may panic; the others are woken all the same.
impl Drop for WakeList {
    fn drop(&mut self) {
        self.wake_rest();
    }
}

#[cfg(all(test, not(resile_loom)))]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn waiters_are_served_in_order_and_leave_nothing_behind() {
        let mut queue = Queue::new();
        let keys: Vec<Key> = (1..=3).map(|need| queue.push(need, Moment::NEVER, None)).collect();
        assert_eq!(queue.head(), Some(1));
        assert_eq!(queue.remove(keys[1]).0, Status::Waiting { head: false });
        queue.serve_head();
        assert_eq!(queue.head(), Some(3));
        assert_eq!(queue.remove(keys[0]).0, Status::Served);
        queue.reject_head();
        assert_eq!(queue.remove(keys[2]).0, Status::Rejected);
        assert_eq!((queue.len(), queue.weight()), (0, 0));
        assert!(queue.places.is_empty() && queue.rejected.is_empty());
    }

    #[test]
    fn a_place_takes_forty_bytes() {
        assert_eq!(size_of::<Place>(), 40);
    }

    #[test]
    fn those_who_come_and_go_behind_one_who_stays_take_no_memory() {
        let mut queue = Queue::new();
        let first = queue.push(1, Moment::NEVER, None);
        for _ in 0..1000 {
            let key = queue.push(1, Moment::NEVER, None);
            queue.remove(key);
        }
        assert!(queue.places.capacity() <= 8, "{}", queue.places.capacity());
        assert_eq!(queue.status(first), Status::Waiting { head: true });
    }

    #[test]
    fn the_ring_grows_only_while_three_quarters_of_it_are_taken() {
        let mut queue = Queue::new();
        let mut keys = VecDeque::new();
        let mut most = 0;
        for round in 0..10_000_u32 {
            keys.push_back(queue.push(1, Moment::NEVER, None));
            // Leaves one from the middle, mostly.
            if round % 10 > 0 && keys.len() > 200 {
                queue.remove(keys.remove(keys.len() / 2).unwrap());
            }
            if keys.len() > 300 {
                queue.serve_head();
                keys.pop_front();
            }
            most = most.max(keys.len());
            assert_eq!(queue.len() as usize, keys.len());
            assert!(queue.places.capacity() <= (most * 8 / 3).max(4), "{} for {most}", queue.places.capacity());
        }
    }

    #[test]
    fn whoever_was_rejected_keeps_the_others_from_seeing_their_grant_only_until_it_knows() {
        let mut queue = Queue::new();
        let [served, rejected] = [1, 2].map(|need| queue.push(need, Moment::NEVER, None));
        queue.serve_head();
        assert!(served.is_served(queue.progress()) && !rejected.is_served(queue.progress()));
        queue.reject_head();
        assert!(!served.is_served(queue.progress()) && !rejected.is_served(queue.progress()));
        assert_eq!(queue.status(served), Status::Served);
        queue.remove(rejected);
        assert!(served.is_served(queue.progress()));
    }

    #[test]
    fn a_panicking_waker_does_not_keep_the_others_asleep() {
        use std::sync::Arc;
        use std::sync::atomic::{AtomicUsize, Ordering};
        use std::task::Wake;

        struct Count(AtomicUsize);
        impl Wake for Count {
            fn wake(self: Arc<Self>) {
                self.0.fetch_add(1, Ordering::SeqCst);
            }
        }
        struct Bomb;
        impl Wake for Bomb {
            fn wake(self: Arc<Self>) {
                panic!("boom");
            }
        }
        let count = Arc::new(Count(AtomicUsize::new(0)));
        let mut list = WakeList::default();
        list.push(Some(Waker::from(count.clone())));
        list.push(Some(Waker::from(Arc::new(Bomb))));
        list.push(Some(Waker::from(count.clone())));
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| list.wake())).is_err());
        assert_eq!(count.0.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn a_recalled_waiter_stands_where_it_stood_before() {
        let mut queue = Queue::new();
        let [first, second, third] = [3, 1, 1].map(|need| queue.push(need, Moment::NEVER, None));
        queue.reject_head();
        queue.serve_head();
        assert!(!queue.can_recall(2) && queue.can_recall(3));
        queue.recall(3);
        assert_eq!((queue.head(), queue.len(), queue.weight()), (Some(3), 2, 4));
        assert_eq!(queue.status(first), Status::Waiting { head: true });
        assert_eq!(queue.status(second), Status::Served, "it has not noticed yet");
        assert_eq!(queue.status(third), Status::Waiting { head: false });
        queue.serve_head();
        assert_eq!(queue.status(first), Status::Served);
        assert!(first.is_served(queue.progress()) && second.is_served(queue.progress()));
        assert_eq!((queue.head(), queue.len(), queue.weight()), (Some(1), 1, 1));
    }

    #[derive(Clone, Debug)]
    enum Op {
        Push(u32),
        Serve,
        Reject,
        Recall(u32),
        Remove(usize),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            3 => (1_u32..9).prop_map(Op::Push),
            1 => Just(Op::Serve),
            1 => Just(Op::Reject),
            1 => (1_u32..9).prop_map(Op::Recall),
            2 => (0_usize..64).prop_map(Op::Remove),
        ]
    }

    proptest! {
        #[test]
        fn the_queue_behaves_like_a_list_of_its_waiters(ops in proptest::collection::vec(op(), 0..200)) {
            let mut queue = Queue::new();
            let mut list: VecDeque<(Key, u32)> = VecDeque::new();
            let mut all: Vec<(Key, Status)> = Vec::new();
            let mut rejected: Vec<(Key, u32)> = Vec::new();
            let settle = |all: &mut Vec<(Key, Status)>, key: Key, to: Status| {
                all.iter_mut().filter(|(other, _)| *other == key).for_each(|(_, status)| *status = to);
            };
            for op in ops {
                match op {
                    Op::Push(need) => {
                        let key = queue.push(need, Moment::NEVER, None);
                        prop_assert!(all.iter().all(|(other, _)| *other != key), "a key was given twice");
                        list.push_back((key, need));
                        all.push((key, Status::Waiting { head: false }));
                    }
                    Op::Serve => {
                        queue.serve_head();
                        if let Some((key, _)) = list.pop_front() {
                            settle(&mut all, key, Status::Served);
                        }
                    }
                    Op::Reject => {
                        queue.reject_head();
                        if let Some((key, need)) = list.pop_front() {
                            settle(&mut all, key, Status::Rejected);
                            rejected.push((key, need));
                        }
                    }
                    Op::Recall(most) => {
                        queue.recall(most);
                        let back: Vec<(Key, u32)> = rejected.iter().filter(|(_, need)| *need <= most).copied().collect();
                        rejected.retain(|(_, need)| *need > most);
                        for (key, _) in &back {
                            settle(&mut all, *key, Status::Waiting { head: false });
                        }
                        list.extend(back);
                        list.make_contiguous().sort_by_key(|(key, _)| *key);
                    }
                    Op::Remove(which) if !all.is_empty() => {
                        // A key is used up by its removal.
                        let (key, status) = all.swap_remove(which % all.len());
                        let removed = queue.remove(key).0;
                        prop_assert_eq!(std::mem::discriminant(&removed), std::mem::discriminant(&status));
                        list.retain(|(other, _)| *other != key);
                        rejected.retain(|(other, _)| *other != key);
                    }
                    Op::Remove(_) => {}
                }
                prop_assert_eq!(queue.len() as usize, list.len());
                prop_assert_eq!(queue.weight(), list.iter().map(|(_, need)| u64::from(*need)).sum::<u64>());
                prop_assert_eq!(queue.head(), list.front().map(|(_, need)| *need));
                prop_assert!(queue.needs().eq(list.iter().map(|(_, need)| *need)));
                for (key, status) in &all {
                    let expected = match status {
                        Status::Waiting { .. } => Status::Waiting { head: list.front().map(|(head, _)| head) == Some(key) },
                        other => *other,
                    };
                    prop_assert_eq!(queue.status(*key), expected);
                    let seen = key.is_served(queue.progress());
                    prop_assert!(!seen || expected == Status::Served, "the quick look errs on the safe side");
                    if queue.rejected.is_empty() && queue.recalled.is_empty() {
                        prop_assert_eq!(seen, expected == Status::Served);
                    }
                }
            }
        }
    }
}
