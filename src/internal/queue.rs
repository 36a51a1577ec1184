//! The one waiter queue: who waits, in which order, and who has been served but has not noticed yet.
//!
//! The queue is a linked list through a slab, kept under its owner's mutex. It knows nothing of permits or tokens: the
//! owner decides when the head fits and calls [`Queue::serve_head`].
//!
//! 1. A waiter is in the list exactly while it is `Waiting`; its slot lives until its owner removes it.
//! 2. A served waiter's grant belongs to its slot: whoever removes a `Served` slot without using it must give it back.
//! 3. Wakers are cloned, woken and dropped outside of the lock: those are user code.
//! 4. Keys carry a generation, so a slot that was used again is never mistaken for the old waiter's.

use std::task::Waker;

use smallvec::SmallVec;

const NIL: u32 = u32::MAX;

/// How many may stand in a queue unless told otherwise.
///
/// A bound of memory (about a megabyte when full), not of patience: nobody should wait behind sixteen thousand others,
/// and a queue's own `max_queue` says how many are worth keeping.
pub(crate) const DEFAULT_MAX_QUEUE: u32 = 16_384;
/// The longest queue that can be asked for.
pub(crate) const LONGEST_QUEUE: u32 = 1 << 24;

/// A place in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    index: u32,
    generation: u32,
}

impl Key {
    pub(crate) fn to_bits(self) -> u64 {
        u64::from(self.index) << 32 | u64::from(self.generation)
    }

    pub(crate) fn from_bits(bits: u64) -> Self {
        Self { index: (bits >> 32) as u32, generation: bits as u32 }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    /// In the list; `head` if nobody stands before it.
    Waiting { head: bool },
    /// Taken out of the list with what it asked for.
    Served,
    /// Taken out of the list because it can never be served.
    Rejected,
    /// No such waiter (any more).
    Gone,
}

#[derive(Debug)]
enum State {
    Free,
    Waiting,
    Served,
    Rejected,
}

#[derive(Debug)]
struct Slot {
    state: State,
    generation: u32,
    need: u32,
    before: u32,
    /// The next waiter, or the next free slot.
    after: u32,
    waker: Option<Waker>,
}

#[derive(Debug)]
pub(crate) struct Queue {
    slots: Vec<Slot>,
    free: u32,
    head: u32,
    tail: u32,
    len: u32,
    /// What all waiters together ask for.
    weight: u64,
}

impl Queue {
    pub(crate) const fn new() -> Self {
        Self { slots: Vec::new(), free: NIL, head: NIL, tail: NIL, len: 0, weight: 0 }
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

    /// Appends a waiter. The owner has checked its bound.
    pub(crate) fn push(&mut self, need: u32) -> Key {
        let index = self.take_slot();
        let before = self.tail;
        let slot = &mut self.slots[index as usize];
        slot.state = State::Waiting;
        slot.need = need;
        slot.before = before;
        slot.after = NIL;
        let generation = slot.generation;
        match before {
            NIL => self.head = index,
            before => self.slots[before as usize].after = index,
        }
        self.tail = index;
        self.len += 1;
        self.weight += u64::from(need);
        Key { index, generation }
    }

    /// What the first waiter asks for.
    pub(crate) fn head(&self) -> Option<u32> {
        (self.head != NIL).then(|| self.slots[self.head as usize].need)
    }

    /// Takes the first waiter out of the list with its grant; its waker is to be woken after the lock is released.
    pub(crate) fn serve_head(&mut self) -> Option<Waker> {
        self.settle_head(State::Served)
    }

    /// Takes the first waiter out of the list with a refusal.
    pub(crate) fn reject_head(&mut self) -> Option<Waker> {
        self.settle_head(State::Rejected)
    }

    fn settle_head(&mut self, state: State) -> Option<Waker> {
        let index = self.head;
        if index == NIL {
            return None;
        }
        self.unlink(index);
        let slot = &mut self.slots[index as usize];
        slot.state = state;
        slot.waker.take()
    }

    /// The first waiter's waker, to tell it that it has become the first. It leaves a new one when it polls.
    pub(crate) fn take_head_waker(&mut self) -> Option<Waker> {
        (self.head != NIL).then(|| self.slots[self.head as usize].waker.take()).flatten()
    }

    pub(crate) fn status(&self, key: Key) -> Status {
        match self.find(key) {
            None => Status::Gone,
            Some(slot) => match slot.state {
                State::Waiting => Status::Waiting { head: self.head == key.index },
                State::Served => Status::Served,
                State::Rejected => Status::Rejected,
                State::Free => Status::Gone,
            },
        }
    }

    /// Leaves a waker, and takes back whichever one is not needed: to be dropped after the lock is released.
    #[must_use]
    pub(crate) fn leave_waker(&mut self, key: Key, waker: Waker) -> Option<Waker> {
        match self.slots.get_mut(key.index as usize) {
            Some(slot) if slot.generation == key.generation => match &slot.waker {
                Some(old) if old.will_wake(&waker) => Some(waker),
                _ => slot.waker.replace(waker),
            },
            _ => Some(waker),
        }
    }

    /// Ends a wait: what the waiter had come to, and its waker, to be dropped after the lock is released.
    pub(crate) fn remove(&mut self, key: Key) -> (Status, u32, Option<Waker>) {
        let status = self.status(key);
        if status == Status::Gone {
            return (status, 0, None);
        }
        if matches!(status, Status::Waiting { .. }) {
            self.unlink(key.index);
        }
        let free = self.free;
        let slot = &mut self.slots[key.index as usize];
        let waker = slot.waker.take();
        let need = slot.need;
        slot.state = State::Free;
        slot.generation = slot.generation.wrapping_add(1);
        slot.after = free;
        self.free = key.index;
        (status, need, waker)
    }

    fn find(&self, key: Key) -> Option<&Slot> {
        self.slots.get(key.index as usize).filter(|slot| slot.generation == key.generation)
    }

    fn take_slot(&mut self) -> u32 {
        if self.free != NIL {
            let index = self.free;
            self.free = self.slots[index as usize].after;
            return index;
        }
        let index = self.slots.len() as u32;
        self.slots.push(Slot { state: State::Free, generation: 0, need: 0, before: NIL, after: NIL, waker: None });
        index
    }

    fn unlink(&mut self, index: u32) {
        let (before, after, need) = {
            let slot = &self.slots[index as usize];
            (slot.before, slot.after, slot.need)
        };
        match before {
            NIL => self.head = after,
            before => self.slots[before as usize].after = after,
        }
        match after {
            NIL => self.tail = before,
            after => self.slots[after as usize].before = before,
        }
        self.len -= 1;
        self.weight -= u64::from(need);
    }
}

/// Wakers collected under a lock, to be woken in order once it is released.
#[derive(Debug, Default)]
pub(crate) struct WakeList(SmallVec<[Waker; 4]>);

impl WakeList {
    pub(crate) fn push(&mut self, waker: Option<Waker>) {
        self.0.extend(waker);
    }

    /// Wakes all. Call it with no lock held.
    pub(crate) fn wake(mut self) {
        self.0.reverse();
        self.wake_rest();
    }

    fn wake_rest(&mut self) {
        while let Some(waker) = self.0.pop() {
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
        let keys: Vec<Key> = (1..=3).map(|need| queue.push(need)).collect();
        assert_eq!(queue.head(), Some(1));
        assert_eq!(queue.remove(keys[1]).0, Status::Waiting { head: false });
        queue.serve_head();
        assert_eq!(queue.head(), Some(3));
        assert_eq!(queue.remove(keys[0]).0, Status::Served);
        queue.reject_head();
        assert_eq!(queue.remove(keys[2]).0, Status::Rejected);
        assert_eq!((queue.len(), queue.weight()), (0, 0));
        assert_eq!(queue.remove(keys[2]).0, Status::Gone);
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

    #[derive(Clone, Debug)]
    enum Op {
        Push(u32),
        Serve,
        Reject,
        Remove(usize),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            3 => (1_u32..9).prop_map(Op::Push),
            1 => Just(Op::Serve),
            1 => Just(Op::Reject),
            2 => (0_usize..64).prop_map(Op::Remove),
        ]
    }

    proptest! {
        #[test]
        fn the_queue_behaves_like_a_list_of_its_waiters(ops in proptest::collection::vec(op(), 0..200)) {
            let mut queue = Queue::new();
            let mut list: VecDeque<(Key, u32)> = VecDeque::new();
            let mut all: Vec<(Key, Status)> = Vec::new();
            let settle = |all: &mut Vec<(Key, Status)>, key: Key, to: Status| {
                all.iter_mut().filter(|(other, _)| *other == key).for_each(|(_, status)| *status = to);
            };
            for op in ops {
                match op {
                    Op::Push(need) => {
                        let key = queue.push(need);
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
                        if let Some((key, _)) = list.pop_front() {
                            settle(&mut all, key, Status::Rejected);
                        }
                    }
                    Op::Remove(which) if !all.is_empty() => {
                        let key = all[which % all.len()].0;
                        queue.remove(key);
                        list.retain(|(other, _)| *other != key);
                        settle(&mut all, key, Status::Gone);
                    }
                    Op::Remove(_) => {}
                }
                prop_assert_eq!(queue.len() as usize, list.len());
                prop_assert_eq!(queue.weight(), list.iter().map(|(_, need)| u64::from(*need)).sum::<u64>());
                prop_assert_eq!(queue.head(), list.front().map(|(_, need)| *need));
                for (key, status) in &all {
                    let expected = match status {
                        Status::Waiting { .. } => Status::Waiting { head: list.front().map(|(head, _)| head) == Some(key) },
                        other => *other,
                    };
                    prop_assert_eq!(queue.status(*key), expected);
                }
            }
        }
    }
}
