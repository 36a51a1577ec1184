//! Models of the table: two who make, use and give up entries at once. The clock stands still.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use loom::thread;

use super::{Keyed, PerKey};
use crate::call::Call;
use crate::error::Reason;
use crate::gate::{Entry, Gate, Outcome, Pass, Ticket};
use crate::internal::time::Moment;
use crate::loom::explore;
use crate::rate::TokenBucket;

/// Lets one in at a time, without steps of its own, so that all steps of a model are the table's.
struct One(Arc<AtomicU32>, AtomicU32);

impl Gate for One {
    fn enter(&self, _: &Call) -> Entry {
        if self.1.swap(1, Relaxed) == 1 {
            return Entry::Refused(crate::error::Refusal::new("one", Reason::Busy));
        }
        Entry::Pass(Pass::new(7, 8))
    }

    fn leave(&self, pass: Pass, _: Outcome) {
        assert_eq!(pass, Pass::new(7, 8));
        assert_eq!(self.1.swap(0, Relaxed), 1);
    }
}

impl PerKey for One {
    fn another(&self) -> Self {
        self.0.fetch_add(1, Relaxed);
        Self(self.0.clone(), AtomicU32::new(0))
    }

    fn is_fresh(&self, _: Moment) -> bool {
        self.1.load(Relaxed) == 0
    }
}

fn ones(capacity: u32) -> Keyed<One> {
    Keyed::by("key", One(Arc::default(), AtomicU32::new(0))).capacity(capacity).build().unwrap()
}

fn enter<G: PerKey>(keyed: &Keyed<G>, key: u64) -> Result<Pass, Reason> {
    match keyed.of(key).enter(&Call::alone(1, false)) {
        Entry::Pass(pass) => Ok(pass),
        Entry::Refused(refusal) => Err(refusal.reason()),
        Entry::Wait(..) => panic!("nobody waits"),
    }
}

fn leave<G: PerKey>(keyed: &Keyed<G>, pass: Pass) {
    keyed.leave(pass, Outcome::NotStarted);
}

/// Two make an entry for the same key: it is one, with one pass.
#[test]
fn one_key_has_one_entry() {
    explore(|| {
        let keyed = ones(2);
        let other = keyed.clone();
        let thread = thread::spawn(move || enter(&other, 1));
        let own = enter(&keyed, 1);
        let both = [own, thread.join().unwrap()];
        assert_eq!(keyed.stats().live, 1);
        let passes: Vec<Pass> = both.into_iter().filter_map(Result::ok).collect();
        assert_eq!((passes.len(), keyed.stats().pinned), (1, 1));
        passes.into_iter().for_each(|pass| leave(&keyed, pass));
        assert_eq!(keyed.stats().pinned, 0);
        assert!(enter(&keyed, 1).is_ok());
    });
}

/// K4: get-or-create against evict. Whoever holds a pass of a key keeps its entry, so that there is no second one.
#[test]
fn an_entry_that_somebody_enters_is_not_given_up() {
    explore(|| {
        let keyed = ones(1);
        leave(&keyed, enter(&keyed, 1).unwrap());
        let other = keyed.clone();
        let thread = thread::spawn(move || enter(&other, 2).map(|pass| leave(&other, pass)));
        let first = enter(&keyed, 1);
        if first.is_ok() {
            assert_eq!(enter(&keyed, 1), Err(Reason::Busy), "the same gate, still");
        } else {
            assert_eq!(first, Err(Reason::KeySpaceFull));
        }
        let other = thread.join().unwrap();
        assert!(first.is_ok() || other.is_ok());
        assert!(keyed.stats().live <= 1);
        first.into_iter().for_each(|pass| leave(&keyed, pass));
        assert_eq!(keyed.stats().pinned, 0);
        assert!(enter(&keyed, 3).is_ok());
    });
}

/// The same for an entry whose state is a word: a bucket that is not full is not given up.
#[test]
fn two_keys_that_race_for_one_place_get_one_allowance() {
    explore(|| {
        let keyed = Keyed::by("key", TokenBucket::per_second(1).burst(1)).capacity(1).build().unwrap();
        let other = keyed.clone();
        let thread = thread::spawn(move || enter(&other, 2).is_ok());
        let own = [enter(&keyed, 1).is_ok(), enter(&keyed, 1).is_ok()];
        let took = u32::from(own[0]) + u32::from(own[1]) + u32::from(thread.join().unwrap());
        assert_eq!(took, 1, "the first who comes, and nobody after");
        assert_eq!((keyed.stats().live, keyed.stats().pinned), (1, 0));
    });
}

/// A wait gives the word a bucket of its own, and the last who leaves makes it a word again.
#[test]
fn a_wait_that_begins_and_ends_beside_a_taker_loses_no_token() {
    explore(|| {
        let keyed = Keyed::by("key", TokenBucket::per_second(1).burst(2)).capacity(1).build().unwrap();
        keyed.try_take(1_u64, 1).unwrap();
        let other = keyed.clone();
        let thread = thread::spawn(move || match other.of(1_u64).enter(&Call::alone(2, true)) {
            Entry::Wait(ticket, _) => {
                let [a, b] = ticket.words();
                other.abandon(Ticket::new(a, b));
            }
            _ => panic!("there is one token"),
        });
        let took = keyed.try_take(1_u64, 1).is_ok();
        thread.join().unwrap();
        assert_eq!(keyed.stats().pinned, 0);
        assert_eq!(keyed.with(1_u64, TokenBucket::peek), Some(u32::from(!took)));
        assert_eq!(keyed.try_take(1_u64, 1).is_ok(), !took);
    });
}

/// A change of plan that meets a call reaches the key by the next one, and no token is made of it.
#[test]
fn a_change_of_plan_beside_a_call_makes_no_token() {
    explore(|| {
        let keyed = Keyed::by("key", TokenBucket::per_second(1).burst(2)).capacity(1).build().unwrap();
        keyed.try_take(1_u64, 1).unwrap();
        let other = keyed.clone();
        let thread = thread::spawn(move || other.plan().set(TokenBucket::per_second(3).burst(5)).unwrap());
        let took = keyed.try_take(1_u64, 1).is_ok();
        thread.join().unwrap();
        assert!(took);
        assert_eq!(keyed.try_take(1_u64, 1).map_err(|no| no.reason()), Err(Reason::Busy));
        assert_eq!(keyed.with(1_u64, TokenBucket::burst), Some(5));
    });
}
