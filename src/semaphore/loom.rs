//! Models of the semaphore. Each ends with nothing left: no permit out, nobody queued, no flag set.

use std::pin::Pin;
use std::sync::atomic::AtomicU32;
use std::task::{Poll, Wake, Waker};

use ::loom::thread::{self, JoinHandle};
use futures::FutureExt;

use super::*;
use crate::guard::Guard;
use crate::loom::{advance, block_on, explore};

fn semaphore(permits: u32) -> Semaphore {
    Semaphore::permits(permits).build().unwrap()
}

/// Waits for permits, holds them for a step, and gives them back.
fn pass(semaphore: &Semaphore, permits: u32) -> Result<(), Reason> {
    let guard = block_on(semaphore.acquire_many(permits)).map_err(|refusal| refusal.reason())?;
    assert!(semaphore.in_use() >= permits);
    drop(guard);
    Ok(())
}

fn spawn_pass(semaphore: &Semaphore, permits: u32) -> JoinHandle<Result<(), Reason>> {
    let semaphore = semaphore.clone();
    thread::spawn(move || pass(&semaphore, permits))
}

/// Polls once and goes away, granted or not.
fn spawn_fickle(semaphore: &Semaphore, permits: u32) -> JoinHandle<()> {
    let semaphore = semaphore.clone();
    thread::spawn(move || drop(semaphore.acquire_many(permits).now_or_never()))
}

fn spawn_drop(guard: Guard) -> JoinHandle<()> {
    thread::spawn(move || drop(guard))
}

/// Enters and takes a place in the queue, as a call does in its first poll.
fn queue_up(semaphore: &Semaphore) -> Entry {
    let call = Call::alone(1, true);
    match semaphore.enter(&call) {
        Entry::Wait(ticket, _) => semaphore.poll_wait(ticket, &call, &mut Context::from_waker(Waker::noop())),
        entry => entry,
    }
}

fn assert_idle(semaphore: &Semaphore) {
    let word = semaphore.0.word.load(Acquire);
    assert_eq!(word & !CLOSED, u64::from(semaphore.limit()), "{:?}", Word(word));
    assert_eq!(semaphore.queued(), 0);
}

#[test]
fn one_permit_is_held_by_one_and_reaches_all() {
    explore(|| {
        let semaphore = semaphore(1);
        let inside = Arc::new(AtomicU32::new(0));
        let held = semaphore.try_acquire().unwrap();
        let callers = [(); 2].map(|()| {
            let (semaphore, inside) = (semaphore.clone(), inside.clone());
            thread::spawn(move || {
                let guard = block_on(semaphore.acquire()).unwrap();
                assert_eq!(inside.fetch_add(1, Relaxed), 0);
                assert_eq!(semaphore.in_use(), 1);
                inside.fetch_sub(1, Relaxed);
                drop(guard);
            })
        });
        drop(held);
        for caller in callers {
            caller.join().unwrap();
        }
        assert_idle(&semaphore);
    });
}

/// Whichever way a permit comes to the next: from the word, or granted in the queue and seen without the lock.
#[test]
fn what_was_done_with_a_permit_is_seen_by_whoever_has_it_next() {
    explore(|| {
        let semaphore = semaphore(1);
        let done = Arc::new(AtomicU64::new(0));
        let held = semaphore.try_acquire().unwrap();
        let callers = [(); 2].map(|()| {
            let (semaphore, done) = (semaphore.clone(), done.clone());
            thread::spawn(move || {
                let guard = block_on(semaphore.acquire()).unwrap();
                done.store(done.load(Relaxed) + 1, Relaxed);
                drop(guard);
            })
        });
        done.store(1, Relaxed);
        drop(held);
        for caller in callers {
            caller.join().unwrap();
        }
        assert_eq!(done.load(Relaxed), 3);
        assert_idle(&semaphore);
    });
}

#[test]
fn who_needs_two_permits_gets_both_of_those_that_come_back_one_by_one() {
    explore(|| {
        let semaphore = semaphore(2);
        let (one, two) = (semaphore.try_acquire().unwrap(), semaphore.try_acquire().unwrap());
        let waiter = spawn_pass(&semaphore, 2);
        let other = spawn_drop(one);
        drop(two);
        other.join().unwrap();
        assert_eq!(waiter.join().unwrap(), Ok(()));
        assert_idle(&semaphore);
    });
}

/// S9
#[test]
fn nobody_takes_a_permit_past_a_waiter() {
    explore(|| {
        let semaphore = semaphore(1);
        let held = semaphore.try_acquire().unwrap();
        let mut acquire = Box::pin(semaphore.acquire());
        assert!(poll_idly(&mut acquire).is_pending());
        let other = spawn_drop(held);
        let greedy = {
            let semaphore = semaphore.clone();
            thread::spawn(move || semaphore.try_acquire().map_err(|refusal| refusal.reason()).map(drop))
        };
        let guard = block_on(acquire).unwrap();
        assert_eq!(greedy.join().unwrap(), Err(Reason::Busy));
        other.join().unwrap();
        drop(guard);
        assert_idle(&semaphore);
    });
}

/// S16
#[test]
fn the_one_place_in_a_queue_goes_to_one_of_two() {
    explore(|| {
        let semaphore = Semaphore::permits(1).max_queue(1).build().unwrap();
        let held = semaphore.try_acquire().unwrap();
        let callers = [(); 2].map(|()| {
            let semaphore = semaphore.clone();
            thread::spawn(move || match queue_up(&semaphore) {
                Entry::Wait(ticket, _) => Some(ticket),
                entry => {
                    assert!(matches!(&entry, Entry::Refused(refusal) if refusal.reason() == Reason::QueueFull));
                    None
                }
            })
        });
        let tickets: Vec<Ticket> = callers.into_iter().filter_map(|caller| caller.join().unwrap()).collect();
        assert_eq!(tickets.len(), 1);
        for ticket in tickets {
            semaphore.abandon(ticket);
        }
        drop(held);
        assert_idle(&semaphore);
    });
}

#[test]
fn a_waiter_that_runs_out_of_time_as_it_is_granted_loses_no_permit() {
    explore(|| {
        let semaphore = Semaphore::permits(1).max_wait(Duration::from_secs(1)).build().unwrap();
        let held = semaphore.try_acquire().unwrap();
        let Entry::Wait(ticket, Some(_)) = queue_up(&semaphore) else { panic!("the permit is out") };
        let other = spawn_drop(held);
        advance(Duration::from_secs(1));
        match semaphore.poll_wait(ticket, &Call::alone(1, true), &mut Context::from_waker(Waker::noop())) {
            Entry::Pass(pass) => semaphore.leave(pass, Outcome::NotStarted),
            Entry::Refused(refusal) => assert_eq!(refusal.reason(), Reason::QueueTimeout),
            Entry::Wait(..) => panic!("its time is over"),
        }
        other.join().unwrap();
        assert_idle(&semaphore);
    });
}

/// S1
#[test]
fn a_waiter_granted_while_it_is_dropped_passes_its_permit_on() {
    explore(|| {
        let semaphore = semaphore(1);
        let held = semaphore.try_acquire().unwrap();
        let fickle = spawn_fickle(&semaphore, 1);
        let patient = spawn_pass(&semaphore, 1);
        drop(held);
        fickle.join().unwrap();
        assert_eq!(patient.join().unwrap(), Ok(()));
        assert_idle(&semaphore);
    });
}

/// S1, S2: what was granted to one dropped large request is enough for two small ones.
#[test]
fn a_large_waiter_granted_while_it_is_dropped_passes_all_its_permits_on() {
    explore(|| {
        let semaphore = semaphore(2);
        let held = semaphore.try_acquire_many(2).unwrap();
        let mut large = Box::pin(semaphore.acquire_many(2));
        assert!(poll_idly(&mut large).is_pending());
        let small = spawn_pass(&semaphore, 1);
        let other = spawn_drop(held);
        drop(large);
        other.join().unwrap();
        assert_eq!(small.join().unwrap(), Ok(()));
        assert_idle(&semaphore);
    });
}

/// S2
#[test]
fn a_large_head_that_goes_away_lets_the_small_ones_behind_it_pass() {
    explore(|| {
        let semaphore = semaphore(2);
        let held = semaphore.try_acquire().unwrap();
        let mut large = Box::pin(semaphore.acquire_many(2));
        assert!(poll_idly(&mut large).is_pending());
        let small = [1, 1].map(|permits| spawn_pass(&semaphore, permits));
        drop(large);
        // The one permit that is free is enough for both, one after the other.
        for small in small {
            assert_eq!(small.join().unwrap(), Ok(()));
        }
        drop(held);
        assert_idle(&semaphore);
    });
}

/// S8
#[test]
fn closing_ends_a_wait_whatever_the_release_does_meanwhile() {
    explore(|| {
        let semaphore = semaphore(1);
        let held = semaphore.try_acquire().unwrap();
        let waiter = spawn_pass(&semaphore, 1);
        let other = spawn_drop(held);
        semaphore.close();
        other.join().unwrap();
        let end = waiter.join().unwrap();
        assert!(matches!(end, Ok(()) | Err(Reason::Closed)), "{end:?}");
        assert_closed(&semaphore);
    });
}

/// S8: whoever comes just before the closing must not begin to wait just after it.
#[test]
fn closing_ends_a_wait_for_a_permit_that_never_comes() {
    explore(|| {
        let semaphore = semaphore(1);
        let held = semaphore.try_acquire().unwrap();
        let waiter = spawn_pass(&semaphore, 1);
        semaphore.close();
        assert_eq!(waiter.join().unwrap(), Err(Reason::Closed));
        drop(held);
        assert_closed(&semaphore);
    });
}

/// S8
#[test]
fn a_waiter_dropped_while_it_is_closed_leaves_nothing_behind() {
    explore(|| {
        let semaphore = semaphore(1);
        let held = semaphore.try_acquire().unwrap();
        let fickle = spawn_fickle(&semaphore, 1);
        let other = spawn_drop(held);
        semaphore.close();
        fickle.join().unwrap();
        other.join().unwrap();
        assert_closed(&semaphore);
    });
}

/// S8
#[test]
fn a_semaphore_that_is_resized_while_it_is_closed_stays_closed() {
    explore(|| {
        let semaphore = semaphore(1);
        let held = semaphore.try_acquire().unwrap();
        let waiter = spawn_pass(&semaphore, 1);
        let other = {
            let semaphore = semaphore.clone();
            thread::spawn(move || semaphore.resize(2).unwrap())
        };
        semaphore.close();
        other.join().unwrap();
        let end = waiter.join().unwrap();
        assert!(matches!(end, Ok(()) | Err(Reason::Closed)), "{end:?}");
        drop(held);
        assert_closed(&semaphore);
    });
}

fn assert_closed(semaphore: &Semaphore) {
    assert!(semaphore.is_closed());
    assert_eq!(semaphore.try_acquire().unwrap_err().reason(), Reason::Closed);
    assert_idle(semaphore);
}

#[test]
fn a_limit_that_is_raised_serves_who_waits() {
    explore(|| {
        let semaphore = semaphore(1);
        let held = semaphore.try_acquire().unwrap();
        let waiter = spawn_pass(&semaphore, 1);
        semaphore.resize(2).unwrap();
        assert_eq!(waiter.join().unwrap(), Ok(()));
        drop(held);
        assert_idle(&semaphore);
    });
}

#[test]
fn a_limit_that_is_lowered_below_the_head_lets_those_behind_it_pass() {
    explore(|| {
        let semaphore = semaphore(3);
        let held = semaphore.try_acquire().unwrap();
        let mut large = Box::pin(semaphore.acquire_many(3));
        assert!(poll_idly(&mut large).is_pending());
        let small = spawn_pass(&semaphore, 1);
        semaphore.resize(2).unwrap();
        assert_eq!(small.join().unwrap(), Ok(()));
        let refusal = block_on(large).unwrap_err();
        assert_eq!(refusal.reason(), Reason::CostAboveLimit { cost: 3, limit: 2 });
        drop(held);
        assert_idle(&semaphore);
    });
}

/// A served waiter sees so without the lock, unless somebody was rejected: those must not take it for a grant.
#[test]
fn who_is_rejected_as_others_are_served_does_not_think_it_was_served() {
    explore(|| {
        let semaphore = semaphore(2);
        let held = semaphore.try_acquire_many(2).unwrap();
        let small = spawn_pass(&semaphore, 1);
        let mut large = Box::pin(semaphore.acquire_many(2));
        let first = poll_idly(&mut large);
        let other = spawn_drop(held);
        semaphore.resize(1).unwrap();
        other.join().unwrap();
        match block_on(large) {
            Ok(guard) => {
                assert!(first.is_ready() || semaphore.in_use() >= 2);
                drop(guard);
            }
            Err(refusal) => assert_eq!(refusal.reason(), Reason::CostAboveLimit { cost: 2, limit: 1 }),
        }
        assert_eq!(small.join().unwrap(), Ok(()));
        assert_idle(&semaphore);
    });
}

/// S1, T8
#[test]
fn a_permit_granted_to_one_that_gives_up_reaches_the_next() {
    explore(|| {
        let semaphore = Semaphore::permits(1).max_wait(Duration::from_secs(1)).build().unwrap();
        let held = semaphore.try_acquire().unwrap();
        let Entry::Wait(late, Some(_)) = queue_up(&semaphore) else { panic!("the permit is out") };
        advance(Duration::from_secs(1));
        let patient = spawn_pass(&semaphore, 1);
        let other = spawn_drop(held);
        match semaphore.poll_wait(late, &Call::alone(1, true), &mut Context::from_waker(Waker::noop())) {
            Entry::Pass(pass) => semaphore.leave(pass, Outcome::NotStarted),
            Entry::Refused(refusal) => assert_eq!(refusal.reason(), Reason::QueueTimeout),
            Entry::Wait(..) => panic!("its time is over"),
        }
        other.join().unwrap();
        assert_eq!(patient.join().unwrap(), Ok(()));
        assert_idle(&semaphore);
    });
}

/// S12
#[test]
fn a_limit_lowered_and_raised_again_during_releases_loses_nobody() {
    explore(|| {
        let semaphore = semaphore(2);
        let held = semaphore.try_acquire_many(2).unwrap();
        let waiter = spawn_pass(&semaphore, 2);
        let other = spawn_drop(held);
        semaphore.resize(1).unwrap();
        semaphore.resize(2).unwrap();
        other.join().unwrap();
        let end = waiter.join().unwrap();
        assert!(matches!(end, Ok(()) | Err(Reason::CostAboveLimit { cost: 2, limit: 1 })), "{end:?}");
        assert_eq!(semaphore.limit(), 2);
        assert_idle(&semaphore);
    });
}

/// S12
#[test]
fn a_limit_lowered_below_what_is_out_grants_nothing_until_enough_came_back() {
    explore(|| {
        let semaphore = semaphore(2);
        let (one, two) = (semaphore.try_acquire().unwrap(), semaphore.try_acquire().unwrap());
        semaphore.resize(1).unwrap();
        let waiter = {
            let semaphore = semaphore.clone();
            thread::spawn(move || {
                let guard = block_on(semaphore.acquire()).unwrap();
                assert_eq!(semaphore.in_use(), 1);
                drop(guard);
            })
        };
        let other = spawn_drop(one);
        drop(two);
        other.join().unwrap();
        waiter.join().unwrap();
        assert_idle(&semaphore);
    });
}

/// A request that came past the check before the limit was lowered once stood at the head of the queue for good.
#[test]
fn a_request_that_a_lowered_limit_overtakes_is_refused() {
    explore(|| {
        let semaphore = semaphore(2);
        let held = semaphore.try_acquire().unwrap();
        let large = spawn_pass(&semaphore, 2);
        semaphore.resize(1).unwrap();
        drop(held);
        let end = large.join().unwrap();
        assert!(matches!(end, Ok(()) | Err(Reason::CostAboveLimit { cost: 2, limit: 1 })), "{end:?}");
        assert_idle(&semaphore);
    });
}

/// G7
#[test]
fn the_waker_that_was_left_last_is_the_one_woken() {
    explore(|| {
        let semaphore = semaphore(1);
        let held = semaphore.try_acquire().unwrap();
        let mut acquire = Box::pin(semaphore.acquire());
        assert!(poll_idly(&mut acquire).is_pending());
        let other = spawn_drop(held);
        drop(block_on(acquire).unwrap());
        other.join().unwrap();
        assert_idle(&semaphore);
    });
}

/// G6
#[test]
fn wakers_are_woken_and_dropped_with_no_lock_held() {
    struct Nosy(Semaphore);

    impl Wake for Nosy {
        fn wake(self: Arc<Self>) {
            drop(self);
        }
    }

    impl Drop for Nosy {
        fn drop(&mut self) {
            drop(self.0.try_acquire());
            let _ = self.0.queued();
        }
    }

    explore(|| {
        let semaphore = semaphore(1);
        let held = semaphore.try_acquire().unwrap();
        let mut acquire = Box::pin(semaphore.acquire());
        for _ in 0..2 {
            let waker = Waker::from(Arc::new(Nosy(semaphore.clone())));
            let _ = acquire.as_mut().poll(&mut Context::from_waker(&waker));
        }
        let other = spawn_drop(held);
        drop(acquire);
        other.join().unwrap();
        assert_idle(&semaphore);
    });
}

fn poll_idly(acquire: &mut Pin<Box<crate::guard::Acquire>>) -> Poll<()> {
    acquire.as_mut().poll(&mut Context::from_waker(Waker::noop())).map(|_| ())
}
