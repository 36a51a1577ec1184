//! The semaphore: order, weight, bounds of its queue, change of its limit, and that permits are neither lost nor made.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::{Future, pending, ready};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use futures::future::poll_immediate;
use proptest::prelude::*;
use resile::{Acquire, ErrorKind, Guard, Policy, Reason, Refusal, Semaphore};
use tokio::task::unconstrained;
use tokio::time::{Instant, advance, sleep};

const fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

fn permits(count: u32) -> Semaphore {
    Semaphore::permits(count).build().unwrap()
}

/// A waiter that is polled by hand, with a waker that counts.
struct Waiter {
    acquire: Pin<Box<Acquire>>,
    woken: Arc<Woken>,
}

#[derive(Default)]
struct Woken(AtomicUsize);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl Waiter {
    /// Comes to the semaphore and finds that it has to wait.
    fn queued(semaphore: &Semaphore, cost: u32) -> Self {
        let mut waiter = Self { acquire: Box::pin(semaphore.acquire_many(cost)), woken: Arc::default() };
        assert!(waiter.poll().is_none(), "has to wait");
        waiter
    }

    fn poll(&mut self) -> Option<Result<Guard, Refusal>> {
        let waker = Waker::from(self.woken.clone());
        match self.acquire.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(end) => Some(end),
            Poll::Pending => None,
        }
    }

    fn woken(&self) -> usize {
        self.woken.0.load(Ordering::SeqCst)
    }

    fn granted(&mut self) -> Guard {
        self.poll().expect("ready").expect("granted")
    }

    fn refused(&mut self) -> Reason {
        self.poll().expect("ready").expect_err("refused").reason()
    }
}

fn reason(taken: Result<Guard, Refusal>) -> Reason {
    taken.unwrap_err().reason()
}

#[test]
fn waiters_are_served_in_the_order_in_which_they_came() {
    let semaphore = permits(1);
    let mut held = Some(semaphore.try_acquire().unwrap());
    let mut waiters: Vec<_> = (0..10).map(|_| Waiter::queued(&semaphore, 1)).collect();
    for place in 0..10 {
        drop(held.take());
        let woken: Vec<_> = waiters.iter().map(Waiter::woken).collect();
        assert_eq!(woken.iter().sum::<usize>(), place + 1, "one at a time");
        assert_eq!(woken[place], 1);
        for later in &mut waiters[place + 1..] {
            assert!(later.poll().is_none());
        }
        held = Some(waiters[place].granted());
    }
}

/// A rival's holder that came back at once had two million turns in a second and the waiter none.
#[tokio::test(start_paused = true)]
async fn a_task_that_comes_back_at_once_does_not_pass_a_waiter_by() {
    let semaphore = permits(1);
    let turns = Arc::new(Mutex::new(Vec::new()));
    let greedy = |name: &'static str| {
        let (semaphore, turns) = (semaphore.clone(), Arc::clone(&turns));
        async move {
            for _ in 0..100 {
                let permit = semaphore.acquire().await.unwrap();
                turns.lock().unwrap().push(name);
                tokio::task::yield_now().await;
                drop(permit);
            }
        }
    };
    let tasks = [tokio::spawn(greedy("a")), tokio::spawn(greedy("b")), tokio::spawn(greedy("c"))];
    for task in tasks {
        task.await.unwrap();
    }
    let turns = turns.lock().unwrap();
    assert!(turns[..297].chunks(3).all(|three| *three == ["a", "b", "c"]), "in turn: {turns:?}");
}

#[test]
fn a_freed_permit_belongs_to_the_waiter_before_it_has_noticed() {
    let semaphore = permits(1);
    let held = semaphore.try_acquire().unwrap();
    let mut waiter = Waiter::queued(&semaphore, 1);
    drop(held);
    assert_eq!(reason(semaphore.try_acquire()), Reason::Busy);
    let mut late = Waiter::queued(&semaphore, 1);
    let permit = waiter.granted();
    assert!(late.poll().is_none());
    drop(permit);
    drop(late.granted());
    assert_eq!(semaphore.available(), 1);
}

/// S10: tokio's answered Pending on the 129th poll of a task, so a single poll was no "try".
#[tokio::test(start_paused = true)]
async fn an_uncontended_permit_is_had_in_one_poll_however_often_it_is_asked_for() {
    let semaphore = permits(1);
    let policy = Policy::named("often").gate(semaphore.clone()).build().unwrap();
    for _ in 0..1000 {
        drop(poll_immediate(unconstrained(semaphore.acquire())).await.expect("at once").unwrap());
        poll_immediate(policy.run(|| ready(Ok::<_, Infallible>(())))).await.expect("at once").unwrap();
    }
}

/// What is always ready never lets go of the thread, unless it spends the task's budget.
#[tokio::test]
async fn a_loop_that_acquires_lets_other_tasks_of_its_thread_run() {
    let semaphore = permits(1);
    let done = Arc::new(AtomicU32::new(0));
    let other = tokio::spawn({
        let done = done.clone();
        async move { done.store(1, Ordering::Relaxed) }
    });
    let mut rounds = 0;
    while done.load(Ordering::Relaxed) == 0 {
        drop(semaphore.acquire().await.unwrap());
        rounds += 1;
        assert!(rounds < 1000, "the other task never ran");
    }
    other.await.unwrap();
}

/// It has not entered yet when it waits for its task's turn, so nothing is held then.
#[tokio::test]
async fn an_acquire_that_waits_for_its_tasks_turn_holds_nothing() {
    let semaphore = permits(1);
    while tokio::task::coop::has_budget_remaining() {
        tokio::task::consume_budget().await;
        if !tokio::task::coop::has_budget_remaining() {
            break;
        }
    }
    let mut acquire = pin!(semaphore.acquire());
    assert!(poll_immediate(acquire.as_mut()).await.is_none());
    assert_eq!((semaphore.in_use(), semaphore.queued()), (0, 0));
    acquire.await.unwrap().success();
}

#[test]
fn permits_are_taken_by_weight() {
    let semaphore = permits(10);
    let seven = semaphore.try_acquire_many(7).unwrap();
    assert_eq!((semaphore.in_use(), semaphore.available()), (7, 3));
    assert_eq!(reason(semaphore.try_acquire_many(4)), Reason::Busy);
    let three = semaphore.try_acquire_many(3).unwrap();
    assert_eq!(semaphore.available(), 0);
    drop(seven);
    assert_eq!(semaphore.available(), 7);
    drop(three);
    assert_eq!(semaphore.available(), 10);
}

#[tokio::test(start_paused = true)]
async fn a_call_takes_as_many_permits_as_it_costs() {
    let semaphore = permits(10);
    let policy = Policy::named("cost").gate(semaphore.clone()).build().unwrap();
    let seen = policy.call().cost(4).run(|| ready(Ok::<_, Infallible>(semaphore.in_use()))).await;
    assert_eq!((seen.unwrap(), semaphore.in_use()), (4, 0));
    let seen = policy.call().cost(0).run(|| ready(Ok::<_, Infallible>(semaphore.in_use()))).await;
    assert_eq!(seen.unwrap(), 0);
}

/// S3: tokio waits for ever.
#[tokio::test(start_paused = true)]
async fn more_than_the_limit_is_refused_at_once_as_never() {
    let semaphore = permits(3);
    let never = Reason::CostAboveLimit { cost: 4, limit: 3 };
    assert_eq!(reason(semaphore.try_acquire_many(4)), never);
    let refusal = poll_immediate(semaphore.acquire_many(4)).await.expect("at once").unwrap_err();
    assert_eq!((refusal.reason(), refusal.retry_after()), (never, None));
    let policy = Policy::named("never").gate(semaphore.clone()).build().unwrap();
    let error = policy.call().cost(4).run(|| ready(Ok::<_, ()>(()))).await.unwrap_err();
    assert_eq!(error.refusal().unwrap().reason(), never);
    assert_eq!(reason(semaphore.try_acquire_many(u32::MAX)), Reason::CostAboveLimit { cost: u32::MAX, limit: 3 });
    assert_eq!(semaphore.available(), 3);
}

#[test]
fn the_largest_semaphore_counts_right() {
    let most = (1 << 31) - 1;
    let semaphore = permits(most);
    let all = semaphore.try_acquire_many(most).unwrap();
    assert_eq!((semaphore.in_use(), semaphore.available()), (most, 0));
    assert_eq!(reason(semaphore.try_acquire()), Reason::Busy);
    drop(all);
    assert_eq!(semaphore.available(), most);
}

/// S9: a try does not pass either.
#[test]
fn a_large_request_at_the_head_holds_up_small_ones_behind_it() {
    let semaphore = permits(3);
    let (one, _other) = (semaphore.try_acquire().unwrap(), semaphore.try_acquire().unwrap());
    let mut large = Waiter::queued(&semaphore, 2);
    let mut small = Waiter::queued(&semaphore, 1);
    assert_eq!(semaphore.available(), 1, "free, but not for the taking");
    assert_eq!(reason(semaphore.try_acquire()), Reason::Busy);
    drop(one);
    drop(large.granted());
    drop(small.granted());
}

/// S2: a waiter for two holds none of them while it waits.
#[test]
fn a_large_request_that_leaves_the_head_lets_small_ones_pass() {
    let semaphore = permits(3);
    let _two = semaphore.try_acquire_many(2).unwrap();
    let large = Waiter::queued(&semaphore, 2);
    let (mut one, mut two) = (Waiter::queued(&semaphore, 1), Waiter::queued(&semaphore, 1));
    drop(large);
    assert_eq!((one.woken(), two.woken()), (1, 0));
    let first = one.granted();
    assert!(two.poll().is_none());
    drop(first);
    drop(two.granted());
    assert_eq!(semaphore.in_use(), 2);
}

/// Trap: a notification that does not add up wakes one waiter for two slots.
#[test]
fn as_many_waiters_are_woken_as_permits_came_back() {
    let semaphore = permits(4);
    let all = semaphore.try_acquire_many(4).unwrap();
    let mut waiters: Vec<_> = (0..6).map(|_| Waiter::queued(&semaphore, 1)).collect();
    drop(all);
    assert_eq!(waiters.iter().map(Waiter::woken).collect::<Vec<_>>(), [1, 1, 1, 1, 0, 0]);
    let granted: Vec<_> = waiters[..4].iter_mut().map(Waiter::granted).collect();
    assert_eq!((granted.len(), semaphore.queued()), (4, 2));
}

/// S1, S7: whoever leaves with a grant in hand passes it on.
#[test]
fn a_waiter_dropped_after_its_grant_passes_it_to_the_next() {
    let semaphore = permits(1);
    let held = semaphore.try_acquire().unwrap();
    let mut waiters: VecDeque<_> = (0..5).map(|_| Waiter::queued(&semaphore, 1)).collect();
    drop(held);
    for _ in 0..4 {
        let granted = waiters.pop_front().unwrap();
        assert_eq!(granted.woken(), 1);
        drop(granted);
    }
    assert_eq!((waiters[0].woken(), semaphore.in_use(), semaphore.queued()), (1, 1, 0));
    drop(waiters);
    assert_eq!(semaphore.available(), 1);
}

#[test]
fn a_waiter_in_the_middle_leaves_without_a_trace() {
    let semaphore = permits(1);
    let held = semaphore.try_acquire().unwrap();
    let (mut first, middle, mut last) =
        (Waiter::queued(&semaphore, 1), Waiter::queued(&semaphore, 1), Waiter::queued(&semaphore, 1));
    drop(middle);
    assert_eq!(semaphore.queued(), 2);
    drop(held);
    drop(first.granted());
    drop(last.granted());
    assert_eq!((semaphore.available(), semaphore.queued()), (1, 0));
}

#[test]
fn waiters_that_are_gone_cost_no_capacity() {
    let semaphore = permits(2);
    for _ in 0..1000 {
        let held = semaphore.try_acquire_many(2).unwrap();
        let waiters: Vec<_> = (0..5).map(|_| Waiter::queued(&semaphore, 1)).collect();
        drop(held);
        drop(waiters);
    }
    assert_eq!((semaphore.available(), semaphore.queued()), (2, 0));
}

/// S11.
#[test]
fn a_waiter_that_is_dropped_frees_its_waker_then() {
    let semaphore = permits(1);
    let _held = semaphore.try_acquire().unwrap();
    let waiter = Waiter::queued(&semaphore, 1);
    let woken = waiter.woken.clone();
    assert_eq!(Arc::strong_count(&woken), 3);
    drop(waiter);
    assert_eq!(Arc::strong_count(&woken), 1);
}

#[test]
fn an_acquire_that_was_never_polled_takes_nothing() {
    let semaphore = permits(1);
    let idle = semaphore.acquire();
    assert_eq!((semaphore.available(), semaphore.queued()), (1, 0));
    drop(idle);
    assert_eq!(semaphore.available(), 1);
}

/// G8.
#[test]
fn polls_that_nobody_asked_for_change_nothing() {
    let semaphore = permits(1);
    let held = semaphore.try_acquire().unwrap();
    let mut waiter = Waiter::queued(&semaphore, 1);
    for _ in 0..100 {
        assert!(waiter.poll().is_none());
    }
    assert_eq!((semaphore.queued(), semaphore.in_use()), (1, 1));
    drop(held);
    assert_eq!(waiter.woken(), 1);
    drop(waiter.granted());
}

/// G7: the waker of the last poll is the one that counts.
#[test]
fn a_waiter_that_moved_to_another_task_is_woken_there() {
    let semaphore = permits(1);
    let held = semaphore.try_acquire().unwrap();
    let mut waiter = Waiter::queued(&semaphore, 1);
    let first = std::mem::take(&mut waiter.woken);
    assert!(waiter.poll().is_none());
    assert_eq!(Arc::strong_count(&first), 1, "the old waker is not kept");
    drop(held);
    assert_eq!((first.0.load(Ordering::SeqCst), waiter.woken()), (0, 1));
}

/// G6: wakers are user code, so they are woken and dropped with no lock held.
#[test]
fn a_waker_may_come_back_to_the_semaphore() {
    struct Nosy(Semaphore, AtomicUsize);
    impl Nosy {
        fn look(&self) {
            let _ = (self.0.queued(), self.0.try_acquire().is_ok(), self.0.resize(3));
            self.1.fetch_add(1, Ordering::SeqCst);
        }
    }
    impl Wake for Nosy {
        fn wake(self: Arc<Self>) {
            self.look();
        }
    }
    impl Drop for Nosy {
        fn drop(&mut self) {
            self.look();
        }
    }
    let semaphore = permits(2);
    let poll = |acquire: &mut Pin<Box<Acquire>>| {
        let waker = Waker::from(Arc::new(Nosy(semaphore.clone(), AtomicUsize::new(0))));
        acquire.as_mut().poll(&mut Context::from_waker(&waker)).map(|end| end.unwrap())
    };
    let held = semaphore.try_acquire_many(2).unwrap();
    let mut waiters: Vec<_> = (0..5).map(|_| Box::pin(semaphore.acquire_many(2))).collect();
    for waiter in &mut waiters {
        assert!(poll(waiter).is_pending());
        assert!(poll(waiter).is_pending(), "the waker of before is dropped");
    }
    drop(waiters.pop());
    drop(held);
    for waiter in &mut waiters {
        let Poll::Ready(guard) = poll(waiter) else { panic!("its turn") };
        drop(guard);
    }
    assert_eq!((semaphore.in_use(), semaphore.queued()), (0, 0));

    let held = semaphore.try_acquire_many(3).unwrap();
    let (mut one, mut two) = (Box::pin(semaphore.acquire()), Box::pin(semaphore.acquire_many(3)));
    assert!(poll(&mut one).is_pending() && poll(&mut two).is_pending());
    semaphore.resize(4).unwrap();
    assert!(poll(&mut one).is_ready());
    semaphore.close();
    let waker = Waker::from(Arc::new(Nosy(semaphore.clone(), AtomicUsize::new(0))));
    assert!(two.as_mut().poll(&mut Context::from_waker(&waker)).map(|end| end.is_err()) == Poll::Ready(true));
    drop(held);
}

#[test]
fn a_waker_that_panics_neither_loses_permits_nor_wedges_the_queue() {
    struct Bomb;
    impl Wake for Bomb {
        fn wake(self: Arc<Self>) {
            panic!("boom");
        }
    }
    let semaphore = permits(1);
    let held = semaphore.try_acquire().unwrap();
    let waker = Waker::from(Arc::new(Bomb));
    let mut bomb = Box::pin(semaphore.acquire());
    assert!(bomb.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
    let mut next = Waiter::queued(&semaphore, 1);
    assert!(catch_unwind(AssertUnwindSafe(|| drop(held))).is_err());
    drop(bomb);
    drop(next.granted());
    assert_eq!((semaphore.available(), semaphore.queued()), (1, 0));
}

/// S16: the bound is looked at before anybody parks.
#[test]
fn a_full_queue_refuses_at_once() {
    let semaphore = Semaphore::permits(1).max_queue(2).build().unwrap();
    let held = semaphore.try_acquire().unwrap();
    let (mut one, two) = (Waiter::queued(&semaphore, 1), Waiter::queued(&semaphore, 1));
    let mut late = Waiter { acquire: Box::pin(semaphore.acquire()), woken: Arc::default() };
    assert_eq!(late.refused(), Reason::QueueFull);
    assert_eq!(semaphore.queued(), 2);
    drop(two);
    let mut three = Waiter::queued(&semaphore, 1);
    drop(held);
    drop(one.granted());
    drop(three.granted());
}

#[test]
fn who_has_been_served_takes_no_place_in_the_queue() {
    let semaphore = Semaphore::permits(1).max_queue(1).build().unwrap();
    let held = semaphore.try_acquire().unwrap();
    let mut served = Waiter::queued(&semaphore, 1);
    drop(held);
    let mut next = Waiter::queued(&semaphore, 1);
    drop(served.granted());
    drop(next.granted());
}

#[test]
fn without_a_queue_nobody_waits() {
    let semaphore = Semaphore::permits(1).max_queue(0).build().unwrap();
    let held = semaphore.try_acquire().unwrap();
    let mut refused = Waiter { acquire: Box::pin(semaphore.acquire()), woken: Arc::default() };
    assert_eq!(refused.refused(), Reason::QueueFull);
    drop(held);
    assert!(semaphore.try_acquire().is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_waiter_gives_up_after_the_longest_wait_and_not_before() {
    let semaphore = Semaphore::permits(1).max_wait(ms(100)).build().unwrap();
    let _held = semaphore.try_acquire().unwrap();
    let start = Instant::now();
    assert_eq!(semaphore.acquire().await.unwrap_err().reason(), Reason::QueueTimeout);
    assert_eq!(start.elapsed(), ms(100));
    assert_eq!(semaphore.queued(), 0);
}

#[tokio::test(start_paused = true)]
async fn the_longest_wait_is_each_waiters_own_and_lets_the_others_move_up() {
    let semaphore = Semaphore::permits(2).max_wait(ms(100)).build().unwrap();
    let _one = semaphore.try_acquire().unwrap();
    let mut large = pin!(semaphore.acquire_many(2));
    assert!(poll_immediate(large.as_mut()).await.is_none());
    advance(ms(60)).await;
    let small = async {
        let start = Instant::now();
        let permit = semaphore.acquire().await;
        (permit.map(drop), start.elapsed())
    };
    let (large, small) = futures::future::join(large, small).await;
    assert_eq!(large.unwrap_err().reason(), Reason::QueueTimeout);
    assert_eq!(small, (Ok(()), ms(40)), "served when the large one gave up");
}

#[tokio::test(start_paused = true)]
async fn a_deadline_before_the_longest_wait_is_a_timeout_and_one_after_it_a_refusal() {
    let semaphore = Semaphore::permits(1).max_wait(ms(100)).build().unwrap();
    let _held = semaphore.try_acquire().unwrap();
    for (limit, kind) in [(50, ErrorKind::TimedOut), (150, ErrorKind::Refused)] {
        let policy = Policy::named("wait").timeout(ms(limit)).gate(semaphore.clone()).build().unwrap();
        let start = Instant::now();
        let error = policy.run(|| ready(Ok::<_, ()>(()))).await.unwrap_err();
        assert_eq!((error.kind(), error.attempts(), start.elapsed()), (kind, 0, ms(limit.min(100))));
    }
}

#[tokio::test(start_paused = true)]
async fn a_permit_that_comes_in_the_instant_of_giving_up_is_had() {
    let semaphore = Semaphore::permits(1).max_wait(ms(100)).build().unwrap();
    let held = semaphore.try_acquire().unwrap();
    let mut waiter = pin!(semaphore.acquire());
    assert!(poll_immediate(waiter.as_mut()).await.is_none());
    advance(ms(100)).await;
    drop(held);
    assert!(waiter.await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_longest_wait_of_nothing_lets_nobody_wait() {
    let semaphore = Semaphore::permits(1).max_wait(Duration::ZERO).build().unwrap();
    let _held = semaphore.try_acquire().unwrap();
    assert!(poll_immediate(semaphore.acquire()).await.expect("at once").is_err());
}

#[tokio::test(start_paused = true)]
async fn an_absurd_longest_wait_is_none() {
    let semaphore = Semaphore::permits(1).max_wait(Duration::MAX).build().unwrap();
    let held = semaphore.try_acquire().unwrap();
    tokio::spawn(async move {
        sleep(Duration::from_secs(86_400 * 365)).await;
        drop(held);
    });
    assert!(semaphore.acquire().await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_call_that_would_rather_not_wait_is_refused_where_it_would_have_to() {
    let semaphore = permits(1);
    let policy = Policy::named("patience").gate(semaphore.clone()).build().unwrap();
    policy.call().no_wait().run(|| ready(Ok::<_, ()>(()))).await.unwrap();
    let _held = semaphore.try_acquire().unwrap();
    let error = policy.call().no_wait().run(|| ready(Ok::<_, ()>(()))).await.unwrap_err();
    assert_eq!(error.refusal().unwrap().reason(), Reason::Busy);
}

#[test]
fn raising_the_limit_serves_the_queue_at_once() {
    let semaphore = permits(1);
    let _held = semaphore.try_acquire().unwrap();
    let mut waiters: Vec<_> = (0..4).map(|_| Waiter::queued(&semaphore, 1)).collect();
    semaphore.resize(3).unwrap();
    assert_eq!(waiters.iter().map(Waiter::woken).collect::<Vec<_>>(), [1, 1, 0, 0]);
    let granted = (waiters[0].granted(), waiters[1].granted());
    assert_eq!((semaphore.limit(), semaphore.in_use(), semaphore.queued()), (3, 3, 2));
    drop(granted);
}

/// S12: nothing is taken away, nothing granted until enough came back, nothing underflows.
#[test]
fn lowering_the_limit_below_what_is_in_use_grants_nothing_until_enough_came_back() {
    let semaphore = permits(4);
    let mut held: Vec<_> = (0..4).map(|_| semaphore.try_acquire().unwrap()).collect();
    let mut waiter = Waiter::queued(&semaphore, 1);
    semaphore.resize(2).unwrap();
    assert_eq!((semaphore.limit(), semaphore.in_use(), semaphore.available()), (2, 4, 0));
    for _ in 0..2 {
        held.pop();
        assert!(waiter.poll().is_none());
        assert_eq!(reason(semaphore.try_acquire()), Reason::Busy);
    }
    held.pop();
    let granted = waiter.granted();
    assert_eq!((semaphore.in_use(), semaphore.available()), (2, 0));
    drop((held, granted));
    assert_eq!(semaphore.available(), 2);
}

/// Trap: a limiter that shrinks by queueing for permits itself blocks all who come after.
#[test]
fn lowering_the_limit_within_what_is_free_is_done_at_once() {
    let semaphore = permits(10);
    let _held = semaphore.try_acquire_many(3).unwrap();
    semaphore.resize(5).unwrap();
    assert_eq!((semaphore.available(), semaphore.queued()), (2, 0));
    assert!(semaphore.try_acquire_many(2).is_ok());
}

#[test]
fn a_waiter_for_more_than_the_new_limit_is_refused_and_lets_the_others_on() {
    let semaphore = permits(4);
    let held = semaphore.try_acquire_many(4).unwrap();
    let (mut large, mut small) = (Waiter::queued(&semaphore, 3), Waiter::queued(&semaphore, 1));
    semaphore.resize(2).unwrap();
    assert_eq!(large.woken(), 1);
    assert_eq!(large.refused(), Reason::CostAboveLimit { cost: 3, limit: 2 });
    drop(held);
    drop(small.granted());
}

#[test]
fn a_waiter_for_more_than_the_new_limit_is_refused_when_it_reaches_the_head() {
    let semaphore = permits(4);
    let held = semaphore.try_acquire_many(4).unwrap();
    let (first, mut large, mut last) =
        (Waiter::queued(&semaphore, 1), Waiter::queued(&semaphore, 3), Waiter::queued(&semaphore, 1));
    semaphore.resize(2).unwrap();
    assert!(large.poll().is_none());
    drop(first);
    assert_eq!(large.refused(), Reason::CostAboveLimit { cost: 3, limit: 2 });
    drop(held);
    drop(last.granted());
    assert_eq!((semaphore.available(), semaphore.queued()), (2, 0));
}

/// A refusal as never must be true: the limit that it names is below the cost.
#[test]
fn a_waiter_that_was_too_large_for_a_while_is_not_told_that_it_is_too_large_for_more() {
    let semaphore = permits(4);
    let held = semaphore.try_acquire_many(4).unwrap();
    let mut large = Waiter::queued(&semaphore, 3);
    semaphore.resize(2).unwrap();
    semaphore.resize(5).unwrap();
    drop(held);
    drop(large.poll().expect("ready").expect("it has kept its place"));
    assert_eq!((semaphore.available(), semaphore.queued()), (5, 0));
}

/// It stood in line before the small one, and has waited since then.
#[tokio::test(start_paused = true)]
async fn a_waiter_keeps_its_place_and_its_longest_wait_over_a_limit_that_goes_down_and_up() {
    let semaphore = Semaphore::permits(4).max_wait(ms(100)).build().unwrap();
    let mut held: Vec<_> = (0..4).map(|_| semaphore.try_acquire().unwrap()).collect();
    let mut large = Waiter::queued(&semaphore, 3);
    advance(ms(60)).await;
    semaphore.resize(2).unwrap();
    let mut small = Waiter::queued(&semaphore, 1);
    semaphore.resize(4).unwrap();
    assert_eq!(semaphore.queued(), 2);
    assert!(large.poll().is_none());
    held.pop();
    assert!(small.poll().is_none(), "the large one is first");
    advance(ms(40)).await;
    assert_eq!(reason(large.poll().expect("ready")), Reason::QueueTimeout);
    drop(small.poll().expect("ready").unwrap());
    assert_eq!((semaphore.in_use(), semaphore.queued()), (3, 0));
}

#[test]
fn a_wrong_limit_changes_nothing() {
    let semaphore = permits(2);
    for limit in [0, 1 << 31, u32::MAX] {
        let error = semaphore.resize(limit).unwrap_err();
        assert_eq!(error.faults()[0].field(), "permits");
    }
    assert_eq!(semaphore.limit(), 2);
}

/// S8.
#[test]
fn closing_refuses_who_waits_and_who_comes_and_lets_who_is_in_finish() {
    let semaphore = permits(1);
    let held = semaphore.try_acquire().unwrap();
    let mut waiters: Vec<_> = (0..3).map(|_| Waiter::queued(&semaphore, 1)).collect();
    semaphore.close();
    assert!(semaphore.is_closed());
    for waiter in &mut waiters {
        assert_eq!(waiter.woken(), 1);
        assert_eq!(waiter.refused(), Reason::Closed);
    }
    assert_eq!(reason(semaphore.try_acquire()), Reason::Closed);
    assert_eq!(semaphore.in_use(), 1);
    drop(held);
    assert_eq!((semaphore.in_use(), semaphore.queued()), (0, 0));
    assert_eq!(reason(semaphore.try_acquire()), Reason::Closed, "free or not");
}

/// S8.
#[test]
fn a_closed_semaphore_stays_closed_whatever_its_size() {
    let semaphore = permits(1);
    semaphore.close();
    semaphore.close();
    semaphore.resize(10).unwrap();
    assert!(semaphore.is_closed());
    assert_eq!((semaphore.limit(), reason(semaphore.try_acquire())), (10, Reason::Closed));
    let mut late = Waiter { acquire: Box::pin(semaphore.acquire()), woken: Arc::default() };
    assert_eq!(late.refused(), Reason::Closed);
}

#[test]
fn a_waiter_granted_before_the_close_may_use_its_permit() {
    let semaphore = permits(1);
    let held = semaphore.try_acquire().unwrap();
    let mut waiter = Waiter::queued(&semaphore, 1);
    drop(held);
    semaphore.close();
    drop(waiter.granted());
    assert_eq!(semaphore.in_use(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_call_that_waits_when_the_semaphore_is_closed_is_told_so() {
    let semaphore = permits(1);
    let _held = semaphore.try_acquire().unwrap();
    let policy = Policy::named("closed").gate(semaphore.clone()).build().unwrap();
    let mut run = pin!(policy.run(|| ready(Ok::<_, ()>(()))));
    assert!(poll_immediate(run.as_mut()).await.is_none());
    semaphore.close();
    assert_eq!(run.await.unwrap_err().refusal().unwrap().reason(), Reason::Closed);
}

/// Trap: each clone, or each policy, had a limit of its own.
#[tokio::test(start_paused = true)]
async fn clones_and_policies_share_the_permits() {
    let semaphore = permits(1);
    let one = Policy::named("one").gate(semaphore.clone()).build().unwrap();
    let two = Policy::named("two").gate(semaphore.clone()).build().unwrap().clone();
    let mut hanging = Box::pin(one.run(pending::<Result<(), ()>>));
    assert!(poll_immediate(hanging.as_mut()).await.is_none());
    let error = two.call().no_wait().run(|| ready(Ok::<_, ()>(()))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    drop(hanging);
    two.run(|| ready(Ok::<_, ()>(()))).await.unwrap();
}

/// S13.
#[tokio::test(start_paused = true)]
async fn calls_that_have_not_begun_hold_nothing() {
    let semaphore = permits(1);
    let policy = Policy::named("idle").gate(semaphore.clone()).build().unwrap();
    let idle: Vec<_> = (0..10).map(|_| policy.run(|| ready(Ok::<_, ()>(())))).collect();
    assert_eq!(semaphore.available(), 1);
    for run in idle {
        run.await.unwrap();
    }
}

/// S15, trap: a permit was kept until the caller dropped the response future.
#[tokio::test(start_paused = true)]
async fn a_permit_is_free_when_the_operation_is_over_not_when_the_future_is_dropped() {
    let semaphore = permits(1);
    let policy = Policy::named("over").gate(semaphore.clone()).build().unwrap();
    let mut run = pin!(policy.run(|| ready(Ok::<_, ()>(()))));
    assert!(poll_immediate(run.as_mut()).await.is_some());
    assert_eq!(semaphore.available(), 1);
}

/// S14: documented, and bounded by the longest wait.
#[tokio::test(start_paused = true)]
async fn a_task_that_waits_for_itself_is_let_go_by_the_longest_wait() {
    let semaphore = Semaphore::permits(1).max_wait(ms(100)).build().unwrap();
    let policy = Policy::named("again").gate(semaphore.clone()).build().unwrap();
    let error = policy.run(|| policy.run(|| ready(Ok::<_, ()>(())))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Failed);
    assert_eq!(error.into_inner().unwrap().refusal().unwrap().reason(), Reason::QueueTimeout);
    assert_eq!(semaphore.available(), 1);
}

/// S6: however a guard ends, it gives back what it took, once.
#[test]
fn capacity_is_the_same_after_every_way_to_end() {
    let semaphore = permits(3);
    for _ in 0..100 {
        semaphore.try_acquire_many(2).unwrap().success();
        semaphore.try_acquire_many(2).unwrap().failure();
        semaphore.try_acquire_many(2).unwrap().ignore();
        drop(semaphore.try_acquire_many(2).unwrap());
        let caught = catch_unwind(AssertUnwindSafe(|| {
            let _permit = semaphore.try_acquire_many(2).unwrap();
            std::panic::resume_unwind(Box::new(()));
        }));
        assert!(caught.is_err());
    }
    assert_eq!(semaphore.available(), 3);
}

/// G9.
#[test]
fn a_guard_that_is_forgotten_costs_its_permits_and_nothing_else() {
    let semaphore = permits(3);
    std::mem::forget(semaphore.try_acquire_many(2).unwrap());
    assert_eq!((semaphore.in_use(), semaphore.available()), (2, 1));
    assert!(semaphore.try_acquire().is_ok());
    semaphore.resize(5).unwrap();
    assert_eq!(semaphore.available(), 3);
}

#[test]
fn refusals_name_the_semaphore() {
    let semaphore = Semaphore::permits(1).named("database").build().unwrap();
    let _held = semaphore.try_acquire().unwrap();
    assert_eq!(semaphore.try_acquire().unwrap_err().to_string(), r#"no permit of "database" is free"#);
}

/// What many tasks that come and go agree on.
struct Stress {
    semaphore: Semaphore,
    inside: AtomicU32,
    granted: AtomicU32,
}

impl Stress {
    const MOST: u32 = 8;

    async fn come_and_go(&self, mut random: u64) {
        for _ in 0..300 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let draw = random >> 33;
            let cost = (draw % 3 + 1) as u32;
            // One in four leaves if it would have to wait, at this moment or a little later.
            let patience = if draw % 4 == 0 { (draw / 4 % 3) as u32 } else { u32::MAX };
            let Some(guard) = self.acquire(cost, patience).await else { continue };
            self.granted.fetch_add(1, Ordering::Relaxed);
            let inside = self.inside.fetch_add(cost, Ordering::SeqCst) + cost;
            assert!(inside <= Self::MOST, "{inside} permits out");
            if draw % 5 == 0 {
                tokio::task::yield_now().await;
            }
            self.inside.fetch_sub(cost, Ordering::SeqCst);
            drop(guard);
        }
    }

    async fn acquire(&self, cost: u32, patience: u32) -> Option<Guard> {
        let mut acquire = pin!(self.semaphore.acquire_many(cost));
        let mut polls = 0;
        std::future::poll_fn(|cx| match acquire.as_mut().poll(cx) {
            Poll::Ready(end) => Poll::Ready(Some(end.unwrap())),
            Poll::Pending if polls >= patience => Poll::Ready(None),
            Poll::Pending => {
                polls += 1;
                if patience < u32::MAX {
                    cx.waker().wake_by_ref();
                }
                Poll::Pending
            }
        })
        .await
    }
}

/// Many tasks on several threads come, wait, leave half-way and change the limit: nothing is lost or made, and never
/// are more in than the highest limit.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn permits_are_conserved_under_stress() {
    let stress =
        Arc::new(Stress { semaphore: permits(Stress::MOST), inside: AtomicU32::new(0), granted: AtomicU32::new(0) });
    let tasks: Vec<_> = (0..64)
        .map(|seed| {
            let stress = Arc::clone(&stress);
            tokio::spawn(async move { stress.come_and_go(seed).await })
        })
        .collect();
    // Never below the largest cost.
    for limit in (3..=Stress::MOST).cycle().take(2000) {
        stress.semaphore.resize(limit).unwrap();
        tokio::task::yield_now().await;
    }
    stress.semaphore.resize(Stress::MOST).unwrap();
    for task in tasks {
        task.await.unwrap();
    }
    let semaphore = &stress.semaphore;
    assert_eq!((semaphore.in_use(), semaphore.available(), semaphore.queued()), (0, Stress::MOST, 0));
    assert!(stress.granted.load(Ordering::Relaxed) > 10_000);
}

#[derive(Clone, Debug)]
enum Op {
    Come(u32),
    Try(u32),
    Leave(usize),
    Poll(usize),
    GiveBack(usize),
    Resize(u32),
    Close,
    Pass(Duration),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0_u32..6).prop_map(Op::Come),
        1 => (0_u32..6).prop_map(Op::Try),
        2 => any::<usize>().prop_map(Op::Leave),
        2 => any::<usize>().prop_map(Op::Poll),
        4 => any::<usize>().prop_map(Op::GiveBack),
        1 => (1_u32..6).prop_map(Op::Resize),
        1 => prop_oneof![9 => (0_u64..15).prop_map(|time| Op::Pass(ms(time))), 1 => Just(Op::Close)],
    ]
}

/// A list of who waits and a sum of what is out.
#[derive(Default)]
struct Model {
    limit: u32,
    closed: bool,
    used: u32,
    now: Duration,
    /// How long anybody waits.
    patience: Duration,
    waiting: VecDeque<Waits>,
    /// Who was served and has not noticed, and who was refused and has not noticed.
    served: Vec<Waits>,
    refused: Vec<Waits>,
}

#[derive(Clone, Copy)]
struct Waits {
    number: usize,
    cost: u32,
    until: Duration,
    /// It was told once that there is news, and there is none any more.
    recalled: bool,
}

impl Model {
    fn serve(&mut self) {
        while let Some(&head) = self.waiting.front() {
            if head.cost > self.limit {
                self.refused.push(head);
            } else if self.used + head.cost <= self.limit {
                self.used += head.cost;
                self.served.push(head);
            } else {
                return;
            }
            self.waiting.pop_front();
        }
    }

    /// Those who were refused and have not noticed are back in their places if they fit now.
    fn resize(&mut self, limit: u32) {
        self.limit = limit;
        if !self.closed {
            let back = self.refused.iter().filter(|waits| waits.cost <= limit);
            self.waiting.extend(back.map(|waits| Waits { recalled: true, ..*waits }));
            self.refused.retain(|waits| waits.cost > limit);
            self.waiting.make_contiguous().sort_by_key(|waits| waits.number);
        }
    }

    fn close(&mut self) {
        self.closed = true;
        self.refused.extend(self.waiting.drain(..));
    }

    fn fits(&self, cost: u32) -> bool {
        !self.closed && self.waiting.is_empty() && self.used + cost <= self.limit
    }

    /// What a call hears that comes now: nothing if it has to wait.
    fn come(&mut self, number: usize, cost: u32) -> Option<Result<(), Reason>> {
        if self.closed {
            Some(Err(Reason::Closed))
        } else if cost > self.limit {
            Some(Err(Reason::CostAboveLimit { cost, limit: self.limit }))
        } else if self.fits(cost) {
            self.used += cost;
            Some(Ok(()))
        } else {
            self.waiting.push_back(Waits { number, cost, until: self.now + self.patience, recalled: false });
            None
        }
    }

    /// What a waiter hears that asks again.
    fn poll(&mut self, number: usize) -> Option<Result<(), Reason>> {
        if take(&mut self.served, number).is_some() {
            return Some(Ok(()));
        }
        if let Some(waits) = take(&mut self.refused, number) {
            let (cost, limit) = (waits.cost, self.limit);
            return Some(Err(if self.closed { Reason::Closed } else { Reason::CostAboveLimit { cost, limit } }));
        }
        let place = self.waiting.iter().position(|waits| waits.number == number)?;
        if self.now < self.waiting[place].until {
            return None;
        }
        self.waiting.remove(place);
        self.serve();
        Some(Err(Reason::QueueTimeout))
    }

    fn leave(&mut self, number: usize) {
        if let Some(waits) = take(&mut self.served, number) {
            self.used -= waits.cost;
        }
        take(&mut self.refused, number);
        self.waiting.retain(|waits| waits.number != number);
        self.serve();
    }
}

fn take(list: &mut Vec<Waits>, number: usize) -> Option<Waits> {
    let place = list.iter().position(|waits| waits.number == number)?;
    Some(list.swap_remove(place))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    /// Law: it does what a naive list does, after each step.
    #[test]
    fn the_semaphore_behaves_like_a_list_of_its_waiters(
        ops in proptest::collection::vec(op(), 0..80),
        limit in 1_u32..6,
        patience in prop_oneof![Just(Duration::MAX), Just(ms(20))],
    ) {
        let clock = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let _entered = clock.enter();
        let semaphore = Semaphore::permits(limit).max_wait(patience).build().unwrap();
        let mut model = Model { limit, patience: patience.min(ms(1_000_000)), ..Model::default() };
        // With each its number and its cost.
        let mut waiters: Vec<(usize, u32, Waiter)> = Vec::new();
        let mut guards: Vec<(u32, Guard)> = Vec::new();
        for (number, op) in ops.into_iter().enumerate() {
            match op {
                Op::Come(cost) => {
                    let mut waiter = Waiter { acquire: Box::pin(semaphore.acquire_many(cost)), woken: Arc::default() };
                    let end = waiter.poll();
                    prop_assert_eq!(heard(end.as_ref()), model.come(number, cost));
                    match end {
                        None => waiters.push((number, cost, waiter)),
                        Some(end) => guards.extend(end.map(|guard| (cost, guard))),
                    }
                }
                Op::Try(cost) => match semaphore.try_acquire_many(cost) {
                    Ok(guard) => {
                        prop_assert!(model.fits(cost));
                        model.used += cost;
                        guards.push((cost, guard));
                    }
                    Err(_) => prop_assert!(!model.fits(cost)),
                },
                Op::Leave(which) if !waiters.is_empty() => {
                    let (number, _, waiter) = waiters.swap_remove(which % waiters.len());
                    drop(waiter);
                    model.leave(number);
                }
                Op::Poll(which) if !waiters.is_empty() => {
                    let place = which % waiters.len();
                    let (number, cost, waiter) = &mut waiters[place];
                    waiter.woken = Arc::default();
                    let end = waiter.poll();
                    prop_assert_eq!(heard(end.as_ref()), model.poll(*number));
                    if let Some(end) = end {
                        guards.extend(end.map(|guard| (*cost, guard)));
                        waiters.swap_remove(place);
                    }
                }
                Op::GiveBack(which) if !guards.is_empty() => {
                    let (cost, guard) = guards.swap_remove(which % guards.len());
                    drop(guard);
                    model.used -= cost;
                    model.serve();
                }
                Op::Resize(limit) => {
                    semaphore.resize(limit).unwrap();
                    model.resize(limit);
                    model.serve();
                }
                Op::Close => {
                    semaphore.close();
                    model.close();
                }
                Op::Pass(time) => {
                    clock.block_on(advance(time));
                    model.now += time;
                }
                Op::Leave(_) | Op::Poll(_) | Op::GiveBack(_) => {}
            }
            prop_assert_eq!(semaphore.in_use(), model.used);
            prop_assert_eq!(semaphore.queued() as usize, model.waiting.len());
            prop_assert_eq!(semaphore.available(), model.limit.saturating_sub(model.used));
            for (number, _, waiter) in &waiters {
                match model.waiting.iter().find(|waits| waits.number == *number) {
                    None => prop_assert!(waiter.woken() > 0, "there is news"),
                    Some(waits) if model.now < waits.until && !waits.recalled => {
                        prop_assert_eq!(waiter.woken(), 0, "there is no news");
                    }
                    // Its timer may ring a tick later.
                    Some(_) => {}
                }
            }
        }
        drop((guards, waiters));
        prop_assert_eq!((semaphore.in_use(), semaphore.queued()), (0, 0));
    }
}

fn heard(end: Option<&Result<Guard, Refusal>>) -> Option<Result<(), Reason>> {
    end.map(|end| end.as_ref().map(drop).map_err(Refusal::reason))
}

/// It was sent away when the limit fell, and has not been polled since.
#[test]
fn a_larger_limit_calls_nobody_back_to_a_semaphore_that_is_closed() {
    let semaphore = permits(3);
    let _held = semaphore.try_acquire().unwrap();
    let mut waiter = Box::pin(semaphore.acquire_many(3));
    assert!(waiter.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    semaphore.resize(2).unwrap();
    semaphore.close();
    semaphore.resize(3).unwrap();
    assert!(matches!(waiter.as_mut().poll(&mut Context::from_waker(Waker::noop())), Poll::Ready(Err(_))));
    assert_eq!(semaphore.queued(), 0);
}
