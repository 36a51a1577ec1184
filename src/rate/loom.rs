//! Models of the limiters, most of them of the token bucket, whose word is changed without a lock. The clock stands
//! still, so that tokens come from changes of rate and refunds alone.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use loom::thread::{self, JoinHandle};

use super::pace::Pace;
use super::purse::Purses;
use super::shell::Meter;
use super::word::{Book, Word};
use super::{LeakyBucket, Rate, SlidingWindow, TokenBucket};
use crate::call::Call;
use crate::error::Reason;
use crate::gate::{Entry, Gate, Outcome, Pass, Ticket};
use crate::internal::time::Moment;
use crate::loom::{advance, block_on, enter, explore, wait};

/// A token a second, all of the burst spent but so many.
fn bucket(burst: u32, left: u32) -> TokenBucket {
    let bucket = TokenBucket::per_second(1).burst(burst).build().unwrap();
    if left < burst {
        bucket.try_take(burst - left).unwrap();
    }
    bucket
}

/// Another thread's part in a model.
fn spawn<T: 'static>(bucket: &TokenBucket, part: impl FnOnce(&TokenBucket) -> T + 'static) -> JoinHandle<T> {
    let bucket = bucket.clone();
    thread::spawn(move || part(&bucket))
}

fn take(bucket: &TokenBucket) -> Result<(), Reason> {
    bucket.try_take(1).map_err(|refusal| refusal.reason())
}

/// The state after one token is taken, for those that undo it.
fn pass(bucket: &TokenBucket) -> Option<Pass> {
    match bucket.enter(&Call::alone(1, false)) {
        Entry::Pass(pass) => Some(pass),
        _ => None,
    }
}

fn queue(bucket: &TokenBucket, call: &Call) -> Ticket {
    match bucket.enter(call) {
        Entry::Wait(ticket, _) => ticket,
        other => panic!("{other:?}"),
    }
}

#[test]
fn one_token_goes_to_one_of_two() {
    explore(|| {
        let bucket = bucket(2, 1);
        let other = spawn(&bucket, take);
        let own = take(&bucket);
        let both = [own, other.join().unwrap()];
        assert_eq!(both.iter().filter(|taken| taken.is_ok()).count(), 1);
        assert!(both.contains(&Err(Reason::Busy)));
        assert_eq!(bucket.peek(), 0);
    });
}

/// L10: who took for later is seen by who still goes by an older reading of the clock.
#[test]
fn an_old_reading_of_the_clock_finds_no_token_that_a_newer_one_has_taken() {
    explore(|| {
        let bucket = bucket(1, 1);
        let old = Call::alone(1, false);
        let _ = old.now();
        advance(Duration::from_secs(1));
        let other = spawn(&bucket, |bucket| bucket.enter(&Call::alone(1, false)));
        let _ = bucket.enter(&old);
        assert!(matches!(other.join().unwrap(), Entry::Pass(_)), "one was there, and one more has come since");
        assert_eq!(bucket.peek(), 0);
    });
}

#[test]
fn a_change_of_rate_keeps_what_two_takers_leave() {
    explore(|| {
        let bucket = bucket(3, 3);
        let takers = [(); 2].map(|()| spawn(&bucket, take));
        bucket.set_rate(Rate::per_second(999_983)).unwrap();
        for taker in takers {
            assert_eq!(taker.join().unwrap(), Ok(()));
        }
        assert_eq!(bucket.peek(), 1);
    });
}

/// Back at the first rate, the word would be what it was before, and the taker may have read the other rate in between.
#[test]
fn a_rate_that_changes_there_and_back_keeps_what_a_taker_leaves() {
    for other in [Rate::per_second(3), Rate::new(3, Duration::from_secs(7))] {
        explore(move || {
            let bucket = bucket(3, 2);
            // Once converted, a state stays the same to the unit.
            bucket.set_rate(other).unwrap();
            bucket.set_rate(Rate::per_second(1)).unwrap();
            let there = spawn(&bucket, move |bucket| bucket.set_rate(other).unwrap());
            let taker = spawn(&bucket, take);
            there.join().unwrap();
            bucket.set_rate(Rate::per_second(1)).unwrap();
            assert_eq!(taker.join().unwrap(), Ok(()));
            assert_eq!(bucket.peek(), 1);
        });
    }
}

#[test]
fn tokens_come_back_in_any_order_and_whoever_takes_meanwhile() {
    explore(|| {
        let bucket = bucket(4, 3);
        let (first, second) = (pass(&bucket).unwrap(), pass(&bucket).unwrap());
        let taker = spawn(&bucket, take);
        let other = spawn(&bucket, move |bucket| bucket.leave(second, Outcome::NotStarted));
        bucket.leave(first, Outcome::NotStarted);
        other.join().unwrap();
        assert_eq!(taker.join().unwrap(), Ok(()));
        assert_eq!(bucket.peek(), 2);
    });
}

#[test]
fn a_token_that_comes_back_during_a_change_of_rate_is_worth_one() {
    explore(|| {
        let bucket = bucket(2, 2);
        let unused = pass(&bucket).unwrap();
        let other = spawn(&bucket, |bucket| bucket.set_rate(Rate::per_second(999_983)).unwrap());
        bucket.leave(unused, Outcome::NotStarted);
        other.join().unwrap();
        let left = bucket.peek();
        assert!(left == 1 || left == 2, "{left}");
    });
}

#[test]
fn a_head_that_goes_away_wakes_the_next() {
    explore(|| {
        let bucket = bucket(1, 0);
        let call = Call::alone(1, true);
        let head = queue(&bucket, &call);
        let next = spawn(&bucket, |bucket| {
            let call = Call::alone(1, true);
            let mut kept = Some(queue(bucket, &call));
            // Behind the head it is told a later moment than as the head.
            let soonest = call.now() + Duration::from_secs(1);
            block_on(poll_fn(|cx| match bucket.poll_wait(kept.take().unwrap(), &call, cx) {
                Entry::Wait(ticket, Some(due)) if due <= soonest => {
                    bucket.abandon(ticket);
                    Poll::Ready(())
                }
                Entry::Wait(ticket, Some(_)) => {
                    kept = Some(ticket);
                    Poll::Pending
                }
                other => panic!("{other:?}"),
            }));
        });
        bucket.abandon(head);
        next.join().unwrap();
        assert_eq!((bucket.queued(), bucket.peek()), (0, 0));
    });
}

#[test]
fn a_head_that_is_served_wakes_the_next() {
    explore(|| {
        let bucket = bucket(2, 0);
        let waiters = [(); 2].map(|()| spawn(&bucket, |bucket| enter(bucket, 1).map(drop)));
        bucket.refund(2);
        for waiter in waiters {
            waiter.join().unwrap().unwrap();
        }
        assert_eq!((bucket.queued(), bucket.peek()), (0, 0));
    });
}

#[test]
fn a_token_that_comes_back_goes_to_the_head_at_once() {
    explore(|| {
        let bucket = bucket(1, 1);
        let unused = pass(&bucket).unwrap();
        let waiter = spawn(&bucket, |bucket| enter(bucket, 1).map(drop));
        bucket.leave(unused, Outcome::NotStarted);
        waiter.join().unwrap().unwrap();
        assert_eq!((bucket.queued(), bucket.peek()), (0, 0));
    });
}

/// Who waits is never passed by: the token that comes back is the head's, however many ask meanwhile.
#[test]
fn nobody_takes_a_token_past_the_head() {
    explore(|| {
        let bucket = bucket(1, 0);
        let call = Call::alone(1, true);
        let ticket = queue(&bucket, &call);
        let refund = spawn(&bucket, |bucket| bucket.refund(1));
        let other = spawn(&bucket, take);
        assert!(wait(&bucket, &call, ticket).is_ok());
        refund.join().unwrap();
        assert_eq!(other.join().unwrap(), Err(Reason::Busy));
        assert_eq!((bucket.queued(), bucket.peek()), (0, 0));
    });
}

/// G6
#[test]
fn wakers_are_woken_and_dropped_with_no_lock_held() {
    struct Nosy(TokenBucket, Arc<AtomicU32>);

    impl Wake for Nosy {
        fn wake(self: Arc<Self>) {
            drop(self);
        }
    }

    impl Drop for Nosy {
        fn drop(&mut self) {
            let _ = self.0.queued();
            self.1.fetch_add(1, Relaxed);
        }
    }

    explore(|| {
        let bucket = bucket(1, 0);
        let call = Call::alone(1, true);
        let gone = Arc::new(AtomicU32::new(0));
        let ticket = queue(&bucket, &call);
        let [bits, give_up] = ticket.words();
        for _ in 0..2 {
            let waker = Waker::from(Arc::new(Nosy(bucket.clone(), gone.clone())));
            let _ = bucket.poll_wait(Ticket::new(bits, give_up), &call, &mut Context::from_waker(&waker));
        }
        let other = spawn(&bucket, |bucket| bucket.set_rate(Rate::per_second(2)).unwrap());
        bucket.abandon(ticket);
        other.join().unwrap();
        assert_eq!(gone.load(Relaxed), 2);
        assert_eq!(bucket.queued(), 0);
    });
}

/// What is owed is neither lost nor counted twice, however takers and payers meet.
#[test]
fn a_cost_that_is_settled_as_others_take_is_charged_once() {
    explore(|| {
        let bucket = bucket(5, 4);
        let mut settled = pass(&bucket).unwrap();
        let takers = [(); 2].map(|()| spawn(&bucket, take));
        bucket.settle(&mut settled, &Call::alone(2, false), 2);
        let taken: Vec<_> = takers.map(|taker| taker.join().unwrap()).into();
        assert_eq!(taken, [Ok(()); 2]);
        assert_eq!(bucket.peek(), 0);
        bucket.settle(&mut settled, &Call::alone(1, false), 1);
        assert_eq!(bucket.peek(), 1);
    });
}

#[test]
fn what_is_owed_outlasts_a_change_of_rate_that_races_with_it() {
    explore(|| {
        let bucket = bucket(3, 1);
        let mut settled = pass(&bucket).unwrap();
        let other = spawn(&bucket, |bucket| bucket.set_rate(Rate::per_second(999_983)).unwrap());
        bucket.settle(&mut settled, &Call::alone(3, false), 3);
        other.join().unwrap();
        bucket.refund(2);
        assert_eq!(bucket.peek(), 0, "two were owed");
        bucket.refund(1);
        assert_eq!(bucket.peek(), 1);
    });
}

#[test]
fn of_two_who_come_at_once_a_leaky_bucket_lets_one_by() {
    explore(|| {
        let bucket = LeakyBucket::per_second(1).build().unwrap();
        // One of them takes without the lock, the other with it.
        let other = {
            let bucket = bucket.clone();
            thread::spawn(move || bucket.try_take(1).is_ok())
        };
        let own = bucket.try_take(3).is_ok();
        assert!(own ^ other.join().unwrap());
    });
}

/// The queue is one for all limiters; this is it around a machine that lies under the lock.
#[test]
fn a_window_that_is_refunded_serves_both_who_wait() {
    for exact_up_to in [0, 2] {
        explore(move || {
            let window = SlidingWindow::per_second(2).exact_up_to(exact_up_to).build().unwrap();
            window.try_take(2).unwrap();
            let waiters = [(); 2].map(|()| {
                let window = window.clone();
                thread::spawn(move || enter(&window, 1).map(drop))
            });
            window.refund(2);
            for waiter in waiters {
                waiter.join().unwrap().unwrap();
            }
            assert_eq!((window.queued(), window.peek()), (0, 0));
        });
    }
}

/// A thread keeps what it takes ahead; both together take what there is.
#[test]
fn what_two_threads_take_ahead_is_taken_from_the_bucket() {
    explore(|| {
        let pace = Pace::new(Rate::per_second(1), 9, false).unwrap();
        let word = Arc::new(Word::<false>::batched(pace, Purses::new(2, 3)));
        let take = |word: &Word<false>, stripe| {
            (0..2).filter(|_| word.take_batched(stripe, Moment::now(), 1).is_some()).count() as u64
        };
        let other = thread::spawn({
            let word = word.clone();
            move || take(&word, 1)
        });
        let waits = thread::spawn({
            let word = word.clone();
            move || [true, false].map(|waiting| word.set_waiting(waiting))
        });
        let both = take(&word, 2) + other.join().unwrap();
        waits.join().unwrap();
        assert_eq!(both + u64::from(word.ahead()) + word.facts(&mut Book::default(), Moment::now()).remaining, 9);
    });
}

/// One was granted and did not come; whoever fetches and whoever leaves, each token goes to one.
#[test]
fn a_grant_that_is_given_up_while_others_come_is_had_by_one_of_them() {
    explore(|| {
        let bucket = bucket(1, 0);
        let call = Call::alone(1, true);
        let head = queue(&bucket, &call);
        bucket.refund(1);
        let next = spawn(&bucket, |bucket| enter(bucket, 1).map(drop));
        bucket.abandon(head);
        next.join().unwrap().unwrap();
        assert_eq!((bucket.queued(), bucket.peek()), (0, 0));
    });
}
