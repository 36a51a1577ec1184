//! The token bucket: how many get through when, who waits for how long, and what is told to those who may not.

mod support;

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::future::{Future, pending, ready};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use futures::future::{join, join_all, poll_immediate};
use proptest::prelude::*;
use resile::{Acquire, ErrorKind, Guard, OnRefusal, Policy, Rate, Reason, Refusal, Retry, Semaphore, TokenBucket};
use support::hand::Clock;
use tokio::time::{Instant, advance, sleep};

const YEAR: Duration = Duration::from_secs(365 * 86_400);

const fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

const fn secs(count: u64) -> Duration {
    Duration::from_secs(count)
}

const fn nanos(count: u64) -> Duration {
    Duration::from_nanos(count)
}

fn per_second(tokens: u64, burst: u32) -> TokenBucket {
    TokenBucket::per_second(tokens).burst(burst).build().unwrap()
}

fn drained(tokens: u64, burst: u32) -> TokenBucket {
    let bucket = per_second(tokens, burst);
    bucket.try_take(burst).unwrap();
    bucket
}

fn gated(bucket: &TokenBucket) -> Policy {
    Policy::named("gated").gate(bucket.clone()).build().unwrap()
}

fn told(bucket: &TokenBucket, tokens: u32) -> Duration {
    bucket.try_take(tokens).unwrap_err().retry_after().expect("it knows when")
}

/// How many of single tokens are there for the taking.
fn takes(bucket: &TokenBucket) -> u32 {
    (0..100_000).take_while(|_| bucket.try_take(1).is_ok()).count() as u32
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
    fn queued(bucket: &TokenBucket, cost: u32) -> Self {
        let mut waiter = Self { acquire: Box::pin(bucket.acquire_many(cost)), woken: Arc::default() };
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
}

// ---------------------------------------------------------------------------------------------------------------------
// Taking now

#[tokio::test(start_paused = true)]
async fn a_new_bucket_is_full() {
    assert_eq!(takes(&per_second(10, 7)), 7);
    assert_eq!(per_second(10, 7).peek(), 7);
}

/// L1: governor once let one more through.
#[tokio::test(start_paused = true)]
async fn after_a_long_idle_time_exactly_the_burst_passes() {
    for idle in [secs(1), secs(3600), YEAR, YEAR * 20] {
        let bucket = drained(10, 7);
        advance(idle).await;
        assert_eq!((bucket.peek(), takes(&bucket)), (7, 7), "{idle:?}");
        assert_eq!(told(&bucket, 1), ms(100));
    }
}

#[tokio::test(start_paused = true)]
async fn tokens_come_one_by_one() {
    let bucket = drained(10, 7);
    for _ in 0..50 {
        advance(ms(99)).await;
        assert_eq!(bucket.peek(), 0);
        assert!(bucket.try_take(1).is_err());
        advance(ms(1)).await;
        assert_eq!(bucket.peek(), 1);
        bucket.try_take(1).unwrap();
    }
    advance(ms(350)).await;
    assert_eq!((bucket.peek(), takes(&bucket)), (3, 3));
    assert_eq!(told(&bucket, 1), ms(50), "the half of one is kept");
}

/// L2.
#[tokio::test(start_paused = true)]
async fn more_than_the_burst_is_never_and_the_burst_itself_is_now_or_later() {
    let bucket = per_second(10, 5);
    let never = Reason::CostAboveLimit { cost: 6, limit: 5 };
    let refusal = bucket.try_take(6).unwrap_err();
    assert_eq!((refusal.reason(), refusal.retry_after()), (never, None));
    assert_eq!(bucket.try_acquire_many(6).unwrap_err().reason(), never);
    let refusal = poll_immediate(bucket.acquire_many(6)).await.expect("at once").unwrap_err();
    assert_eq!(refusal.reason(), never);
    let error = gated(&bucket).call().cost(6).run(|| ready(Ok::<_, ()>(()))).await.unwrap_err();
    assert_eq!(error.refusal().unwrap().reason(), never);
    assert_eq!(bucket.try_take(u32::MAX).unwrap_err().reason(), Reason::CostAboveLimit { cost: u32::MAX, limit: 5 });
    assert_eq!(bucket.peek(), 5, "nothing was taken");
    bucket.try_take(5).unwrap();
    assert_eq!(told(&bucket, 5), ms(500));
    let start = Instant::now();
    bucket.acquire_many(5).await.unwrap().success();
    assert_eq!(start.elapsed(), ms(500));
}

#[tokio::test(start_paused = true)]
async fn tokens_are_taken_all_or_none() {
    let bucket = per_second(10, 5);
    bucket.try_take(3).unwrap();
    assert_eq!(told(&bucket, 3), ms(100));
    assert_eq!(bucket.peek(), 2);
    bucket.try_take(2).unwrap();
}

/// Nobody passes uncharged, not even a bucket that is full.
#[tokio::test(start_paused = true)]
async fn a_cost_of_nothing_is_refused_and_takes_nothing() {
    let bucket = per_second(10, 1);
    let refusal = bucket.try_take(0).unwrap_err();
    assert_eq!((refusal.reason(), refusal.retry_after()), (Reason::ZeroCost, None));
    assert_eq!(bucket.acquire_many(0).await.unwrap_err().reason(), Reason::ZeroCost);
    let error = gated(&bucket).call().cost(0).run(|| ready(Ok::<_, ()>(()))).await.unwrap_err();
    assert_eq!(error.refusal().unwrap().reason(), Reason::ZeroCost);
    assert_eq!(bucket.peek(), 1);
}

/// L7.
#[tokio::test(start_paused = true)]
async fn refusals_and_looks_change_nothing() {
    let bucket = drained(1, 3);
    advance(ms(300)).await;
    for _ in 0..1000 {
        assert_eq!((told(&bucket, 1), told(&bucket, 3)), (ms(700), ms(2700)));
        assert!(bucket.try_take(4).is_err());
        assert_eq!((bucket.peek(), bucket.queued(), bucket.burst()), (0, 0, 3));
    }
    advance(ms(700)).await;
    bucket.try_take(1).unwrap();
}

/// L17: to the nanosecond, whatever the rate.
#[tokio::test(start_paused = true)]
async fn waiting_as_long_as_told_always_suffices_and_a_nanosecond_less_never() {
    let rates = [
        Rate::per_second(1),
        Rate::per_second(7),
        Rate::per_second(999_983),
        Rate::per_second(1_000_000_000),
        Rate::new(3, secs(7)),
        Rate::per_minute(1),
        Rate::new(1, secs(366 * 86_400)),
        Rate::new(999_999_937, secs(1)),
    ];
    for rate in rates {
        let bucket = TokenBucket::at(rate).burst(3).build().unwrap();
        bucket.try_take(3).unwrap();
        for tokens in [1, 1, 2, 3, 1, 3, 2, 1] {
            let after = told(&bucket, tokens);
            assert!(after > Duration::ZERO);
            advance(after.saturating_sub(nanos(1))).await;
            assert_eq!(told(&bucket, tokens), nanos(1), "{rate:?}");
            advance(nanos(1)).await;
            bucket.try_take(tokens).unwrap();
        }
    }
}

/// L4: no fraction of a nanosecond is lost.
#[tokio::test(start_paused = true)]
async fn the_rate_is_exact_for_who_comes_when_told() {
    for (rate, exact) in [
        (Rate::new(3, secs(7)), secs(7) * 1000),
        (Rate::per_second(7), secs(3000) / 7),
        (Rate::per_second(999_983), secs(3000) / 999_983),
    ] {
        let bucket = TokenBucket::at(rate).burst(1).build().unwrap();
        bucket.try_take(1).unwrap();
        let start = Instant::now();
        for _ in 0..3000 {
            advance(told(&bucket, 1)).await;
            bucket.try_take(1).unwrap();
        }
        assert!(start.elapsed().abs_diff(exact) <= nanos(2), "{:?} for {exact:?}", start.elapsed());
    }
}

/// L3, L5.
#[tokio::test(start_paused = true)]
async fn a_clock_at_its_ends_neither_panics_nor_opens_the_flood() {
    let bucket = drained(1_000_000_000, 1000);
    for _ in 0..10 {
        advance(YEAR * 40).await;
        let most = takes(&bucket);
        assert!(most <= 1000, "{most}");
        let _ = (bucket.peek(), bucket.try_take(1000), bucket.set_rate(Rate::per_second(1)));
        bucket.refund(u32::MAX);
    }
}

/// L11; trap: a stale reading of the clock refilled the bucket.
#[test]
fn threads_that_take_at_once_get_the_burst_and_no_more() {
    for burst in [1, 1000] {
        // A token in two hours, so that none comes while the threads run.
        let bucket = TokenBucket::at(Rate::new(1, secs(7200))).burst(burst).build().unwrap();
        let taken = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..2000 {
                        if bucket.try_take(1).is_ok() {
                            taken.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        assert_eq!(taken.into_inner(), burst);
    }
}

/// A clock that goes back a little can only deny more. Two paused clocks stand for one.
#[test]
fn a_clock_that_goes_back_gives_nothing_twice() {
    let paused = || tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    let (late, early) = (paused(), paused());
    late.block_on(advance(secs(9)));
    let bucket = per_second(1, 5);
    assert_eq!(early.block_on(async { takes(&bucket) }), 5);
    assert_eq!(late.block_on(async { takes(&bucket) }), 5);
    for _ in 0..10 {
        assert_eq!(early.block_on(async { takes(&bucket) }), 0);
        assert_eq!(late.block_on(async { takes(&bucket) }), 0);
    }
    late.block_on(advance(secs(2)));
    early.block_on(advance(secs(2)));
    assert_eq!(early.block_on(async { takes(&bucket) }), 0);
    assert_eq!(late.block_on(async { takes(&bucket) }), 2);
}

/// Tests of one process share a bucket in a static, each on a clock of its own. What a runtime that is far ahead has taken
/// is dated back: the other one waits for tokens as from an empty bucket, and owes what was owed.
#[test]
fn a_bucket_that_a_runtime_far_ahead_has_emptied_fills_elsewhere() {
    let (ahead, behind) = (Clock::paused(), Clock::paused());
    ahead.advance(secs(3600));
    let bucket = per_second(1, 5);
    ahead.block_on(async {
        assert_eq!(takes(&bucket), 5);
        assert_eq!(told(&bucket, 1), secs(1));
    });
    behind.block_on(async {
        assert_eq!(told(&bucket, 1), secs(1));
        advance(secs(2)).await;
        assert_eq!(takes(&bucket), 2);
    });
    let bucket = per_second(1, 5);
    ahead.block_on(async {
        let mut guard = bucket.try_acquire().unwrap();
        guard.settle(8);
        guard.success();
        assert_eq!(told(&bucket, 1), secs(4));
    });
    behind.block_on(async { assert_eq!(told(&bucket, 1), secs(4), "three are owed") });
}

/// The scale of a bucket is 36 years long, a paused clock is not.
#[tokio::test(start_paused = true)]
async fn a_bucket_works_for_as_long_as_the_clock_goes() {
    let bucket = per_second(10, 5);
    for _ in 0..6 {
        // Where the scale begins anew, it is as after an empty one.
        assert!(matches!(takes(&bucket), 0 | 5));
        assert!(told(&bucket, 1).abs_diff(ms(100)) <= nanos(1));
        advance(told(&bucket, 1)).await;
        bucket.try_take(1).unwrap();
        for _ in 0..10 {
            advance(secs(365 * 86_400)).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_default_burst_is_a_tenth_of_a_second_and_at_least_one() {
    for (rate, burst) in [(1, 1), (10, 1), (500, 50), (1_000_000, 100_000), (1_000_000_000, 100_000_000)] {
        assert_eq!(TokenBucket::per_second(rate).build().unwrap().burst(), burst);
    }
    assert_eq!(TokenBucket::at(Rate::per_minute(1)).build().unwrap().burst(), 1);
}

// ---------------------------------------------------------------------------------------------------------------------
// Waiting

#[tokio::test(start_paused = true)]
async fn waiters_are_served_in_order_each_at_its_time() {
    let bucket = drained(10, 1);
    let start = Instant::now();
    let order = RefCell::new(Vec::new());
    let waiters = (0..20).map(|number| {
        let (bucket, order) = (&bucket, &order);
        async move {
            bucket.acquire().await.unwrap().success();
            order.borrow_mut().push((number, start.elapsed()));
        }
    });
    join_all(waiters).await;
    let expected: Vec<_> = (0..20).map(|number| (number, ms(100) * (number + 1))).collect();
    assert_eq!(order.into_inner(), expected);
}

/// Trap: small costs passed a large one by, for ever.
#[tokio::test(start_paused = true)]
async fn a_large_cost_waits_for_its_tokens_and_small_ones_wait_behind_it() {
    let bucket = drained(10, 5);
    let start = Instant::now();
    let at = |cost| {
        let bucket = &bucket;
        async move {
            bucket.acquire_many(cost).await.unwrap().success();
            start.elapsed()
        }
    };
    let impatient = async {
        for _ in 0..50 {
            let _ = bucket.try_take(1);
            sleep(ms(10)).await;
        }
    };
    let (times, ()) = join(join_all([at(5), at(1), at(2), at(1)]), impatient).await;
    assert_eq!(times, [ms(500), ms(600), ms(800), ms(900)]);
}

#[tokio::test(start_paused = true)]
async fn a_newcomer_is_told_the_time_behind_all_who_wait() {
    let bucket = drained(1, 3);
    let mut waiters: Vec<_> = [1, 3, 2].map(|cost| Waiter::queued(&bucket, cost)).into();
    assert_eq!((told(&bucket, 1), told(&bucket, 3)), (secs(7), secs(9)));
    waiters.remove(1);
    assert_eq!(told(&bucket, 1), secs(4));
}

/// A waiter whose task is not run holds up nobody: it is granted what was due, and others go on.
#[tokio::test(start_paused = true)]
async fn a_newcomer_behind_a_waiter_that_does_not_come_is_let_in() {
    let bucket = drained(1, 5);
    let mut waiter = Waiter::queued(&bucket, 1);
    advance(secs(60)).await;
    bucket.try_take(1).unwrap();
    waiter.poll().expect("its turn was long ago").unwrap().success();
}

/// Like a `select!` that keeps its acquire while the handler of another arm takes a minute, or one that is forgotten.
#[tokio::test(start_paused = true)]
async fn heads_that_do_not_come_delay_nobody_and_keep_their_own() {
    for absent in [1, 2, 5] {
        let bucket = drained(1000, 1);
        let start = Instant::now();
        let mut heads: Vec<_> = (0..absent).map(|_| Waiter::queued(&bucket, 1)).collect();
        bucket.acquire().await.unwrap().success();
        assert_eq!(start.elapsed(), ms(absent + 1), "when it was told");
        advance(secs(60)).await;
        for head in &mut heads {
            head.poll().expect("granted when it was due").unwrap().success();
        }
        assert_eq!((bucket.queued(), takes(&bucket)), (0, 1));
    }
    let bucket = drained(1000, 1);
    std::mem::forget(Waiter::queued(&bucket, 1));
    let start = Instant::now();
    bucket.acquire().await.unwrap().success();
    assert_eq!(start.elapsed(), ms(2));
}

#[tokio::test(start_paused = true)]
async fn a_grant_that_is_never_fetched_goes_back() {
    let bucket = TokenBucket::at(Rate::new(1, secs(10))).burst(1).build().unwrap();
    bucket.try_take(1).unwrap();
    let absent = Waiter::queued(&bucket, 1);
    advance(secs(10)).await;
    assert!(bucket.try_take(1).is_err(), "granted");
    drop(absent);
    bucket.try_take(1).unwrap();
}

/// A rival's waiter kept its reservation: those behind stayed where they were.
#[tokio::test(start_paused = true)]
async fn a_head_that_leaves_moves_the_others_up() {
    let bucket = drained(1, 3);
    let start = Instant::now();
    let mut head = Box::pin(bucket.acquire_many(3));
    assert!(poll_immediate(head.as_mut()).await.is_none());
    let small = async {
        bucket.acquire().await.unwrap().success();
        start.elapsed()
    };
    let leave = async move {
        sleep(ms(500)).await;
        drop(head);
    };
    assert_eq!(join(small, leave).await.0, secs(1), "instead of four");
}

#[tokio::test(start_paused = true)]
async fn a_head_that_leaves_when_its_successor_is_due_wakes_it_at_once() {
    let bucket = drained(1, 3);
    let start = Instant::now();
    let mut head = Box::pin(bucket.acquire_many(3));
    assert!(poll_immediate(head.as_mut()).await.is_none());
    let small = async {
        bucket.acquire().await.unwrap().success();
        start.elapsed()
    };
    let leave = async move {
        sleep(ms(2500)).await;
        drop(head);
    };
    assert_eq!(join(small, leave).await.0, ms(2500));
}

/// L8: a place in the queue is no reservation.
#[tokio::test(start_paused = true)]
async fn waiters_that_leave_cost_nothing() {
    let bucket = drained(1, 1);
    let mut gone: Vec<_> = (0..1000).map(|_| Waiter::queued(&bucket, 1)).collect();
    let start = Instant::now();
    let last = async {
        bucket.acquire().await.unwrap().success();
        start.elapsed()
    };
    let mut last = pin!(last);
    assert!(poll_immediate(last.as_mut()).await.is_none());
    for place in [500, 0, 900, 1] {
        drop(gone.remove(place));
    }
    drop(gone);
    assert_eq!((last.await, bucket.queued()), (secs(1), 0));
}

/// L8: also in the instant in which it is due.
#[tokio::test(start_paused = true)]
async fn a_waiter_that_leaves_when_it_is_due_has_taken_nothing() {
    let bucket = drained(1, 1);
    let waiter = Waiter::queued(&bucket, 1);
    advance(secs(1)).await;
    drop(waiter);
    assert_eq!(bucket.peek(), 1);
    bucket.try_take(1).unwrap();
}

/// L15: only the head holds a timer, and nobody spins.
#[tokio::test(start_paused = true)]
async fn a_waiter_is_polled_when_it_comes_when_it_is_first_and_when_it_is_due() {
    let bucket = drained(10, 1);
    let polls = (0..50).map(|_| {
        let bucket = bucket.clone();
        tokio::spawn(async move {
            let mut polls = 0;
            let mut acquire = pin!(bucket.acquire());
            std::future::poll_fn(|cx| {
                polls += 1;
                acquire.as_mut().poll(cx).map(|end| end.unwrap().success())
            })
            .await;
            polls
        })
    });
    for (number, task) in join_all(polls).await.into_iter().enumerate() {
        let polls = task.unwrap();
        assert!(polls <= 3, "waiter {number} was polled {polls} times");
    }
}

/// L16: a rival slept first and refused then.
#[tokio::test(start_paused = true)]
async fn who_cannot_be_served_before_its_deadline_is_refused_at_once_with_the_time() {
    let bucket = drained(1, 1);
    let policy = Policy::named("late").timeout(ms(2500)).gate(bucket.clone()).build().unwrap();
    let start = Instant::now();
    let mut waiting: Vec<_> = (0..2).map(|_| Box::pin(policy.run(|| ready(Ok::<_, ()>(start.elapsed()))))).collect();
    for run in &mut waiting {
        assert!(poll_immediate(run.as_mut()).await.is_none());
    }
    let error = policy.run(|| ready(Ok::<_, ()>(()))).await.unwrap_err();
    assert_eq!((error.kind(), error.attempts(), start.elapsed()), (ErrorKind::Refused, 0, Duration::ZERO));
    assert_eq!(error.refusal().unwrap().reason(), Reason::TooLate);
    assert_eq!(error.retry_after(), Some(secs(3)));
    let served: Vec<_> = join_all(waiting).await.into_iter().map(Result::unwrap).collect();
    assert_eq!(served, [secs(1), secs(2)], "the refused one took nobody's place");
}

#[tokio::test(start_paused = true)]
async fn a_callers_deadline_that_is_too_near_is_refused_at_once_too() {
    let bucket = drained(1, 1);
    let error = gated(&bucket).call().deadline(ms(999)).run(|| ready(Ok::<_, ()>(()))).await.unwrap_err();
    assert_eq!(error.refusal().unwrap().reason(), Reason::TooLate);
    gated(&bucket).call().deadline(ms(1000)).run(|| ready(Ok::<_, ()>(()))).await.unwrap();
}

/// L16.
#[tokio::test(start_paused = true)]
async fn who_would_wait_longer_than_the_longest_wait_is_refused_at_once() {
    let bucket = TokenBucket::per_second(1).burst(1).max_wait(secs(2)).build().unwrap();
    bucket.try_take(1).unwrap();
    let start = Instant::now();
    let _waiting: Vec<_> = (0..2).map(|_| Waiter::queued(&bucket, 1)).collect();
    for _ in 0..100 {
        let refusal = bucket.acquire().await.unwrap_err();
        assert_eq!((refusal.reason(), refusal.retry_after()), (Reason::TooLate, Some(secs(3))));
    }
    assert_eq!((start.elapsed(), bucket.queued()), (Duration::ZERO, 2));
}

#[tokio::test(start_paused = true)]
async fn absurd_longest_waits_are_none_or_nothing() {
    let bucket = TokenBucket::per_second(1).burst(1).max_wait(Duration::MAX).build().unwrap();
    bucket.try_take(1).unwrap();
    bucket.acquire().await.unwrap().success();
    let bucket = TokenBucket::per_second(1).burst(1).max_wait(Duration::ZERO).build().unwrap();
    bucket.acquire().await.unwrap().success();
    assert_eq!(bucket.acquire().await.unwrap_err().reason(), Reason::TooLate);
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_refuses_at_once_with_the_time() {
    let bucket = TokenBucket::per_second(1).burst(1).max_queue(3).build().unwrap();
    bucket.try_take(1).unwrap();
    let mut waiting: Vec<_> = (0..3).map(|_| Waiter::queued(&bucket, 1)).collect();
    let refusal = bucket.acquire().await.unwrap_err();
    assert_eq!((refusal.reason(), refusal.retry_after()), (Reason::QueueFull, Some(secs(4))));
    waiting.pop();
    let _waiter = Waiter::queued(&bucket, 1);
}

#[tokio::test(start_paused = true)]
async fn without_a_queue_nobody_waits() {
    let bucket = TokenBucket::per_second(1).burst(1).max_queue(0).build().unwrap();
    bucket.acquire().await.unwrap().success();
    let refusal = bucket.acquire().await.unwrap_err();
    assert_eq!((refusal.reason(), refusal.retry_after()), (Reason::QueueFull, Some(secs(1))));
}

#[tokio::test(start_paused = true)]
async fn a_call_that_would_rather_not_wait_is_refused_with_the_time() {
    let bucket = drained(1, 1);
    let error = gated(&bucket).call().no_wait().run(|| ready(Ok::<_, ()>(()))).await.unwrap_err();
    assert_eq!(error.refusal().unwrap().reason(), Reason::Busy);
    assert_eq!(error.retry_after(), Some(secs(1)));
}

/// With 10,000 queued at one a second, a rival's newcomer was told 9,999.999 s.
#[tokio::test(start_paused = true)]
async fn ten_thousand_callers_are_told_what_they_can_act_on() {
    let bucket = drained(1, 1);
    let policy = Policy::named("flood").timeout(secs(5)).gate(bucket.clone()).build().unwrap();
    let start = Instant::now();
    let calls = (0..10_000).map(|_| async {
        let end = policy.run(|| ready(Ok::<_, Infallible>(()))).await;
        (end, start.elapsed())
    });
    let ends = join_all(calls).await;
    let served: Vec<_> = ends.iter().filter(|(end, _)| end.is_ok()).map(|(_, at)| *at).collect();
    assert_eq!(served, [secs(1), secs(2), secs(3), secs(4), secs(5)]);
    for (end, at) in &ends {
        if let Err(error) = end {
            assert_eq!(error.refusal().unwrap().reason(), Reason::TooLate);
            assert_eq!((error.retry_after(), *at), (Some(secs(6)), Duration::ZERO));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_queue_without_settings_is_bounded_all_the_same() {
    let bucket = drained(1, 1);
    let mut waiting: Vec<_> = (0..16_384).map(|_| Box::pin(bucket.acquire())).collect();
    for waiter in &mut waiting {
        assert!(poll_immediate(waiter.as_mut()).await.is_none());
    }
    assert_eq!(bucket.acquire().await.unwrap_err().reason(), Reason::QueueFull);
    assert_eq!(bucket.queued(), 16_384);
    drop(waiting);
    assert_eq!(bucket.queued(), 0);
}

/// A waiter in the middle whose deadline passes leaves in time, whatever those before it do.
#[tokio::test(start_paused = true)]
async fn a_waiter_behind_the_head_leaves_when_its_time_is_up() {
    let bucket = drained(1, 1);
    let policy = Policy::named("time").timeout(ms(2000)).gate(bucket.clone()).build().unwrap();
    let start = Instant::now();
    let head = bucket.acquire();
    let second = async { (policy.run(|| ready(Ok::<_, ()>(()))).await.unwrap_err(), start.elapsed()) };
    let slower = async {
        sleep(ms(500)).await;
        bucket.set_rate(Rate::per_minute(1)).unwrap();
    };
    let ((head, (second, at)), ()) = join(join(head, second), slower).await;
    head.unwrap().success();
    assert_eq!((second.kind(), at), (ErrorKind::TimedOut, ms(2000)));
    assert_eq!(start.elapsed(), ms(30_500), "half a token at the new rate");
}

// ---------------------------------------------------------------------------------------------------------------------
// In the long run

async fn seconds_for(bucket: &TokenBucket, tokens: u32) -> Duration {
    let start = Instant::now();
    for _ in 0..tokens {
        bucket.acquire().await.unwrap().success();
    }
    start.elapsed()
}

fn assert_near(took: Duration, exact: Duration) {
    assert!(took >= exact && took <= exact + ms(2), "{took:?} for {exact:?}");
}

/// Waits in whole milliseconds gave a rival's only caller 955 of 5000 a second.
#[tokio::test(start_paused = true)]
async fn one_caller_who_waits_gets_the_whole_rate() {
    let bucket = TokenBucket::per_second(5000).build().unwrap();
    bucket.try_take(500).unwrap();
    assert_near(seconds_for(&bucket, 25_000).await, secs(5));
    for (rate, burst, tokens) in [(7, 2, 700), (1000, 1, 3000), (999, 3, 2997), (40_000, 100, 40_000)] {
        let bucket = drained(rate, burst);
        assert_near(seconds_for(&bucket, tokens).await, secs(tokens.into()) / rate as u32);
    }
}

/// The timer rounds each wait up to a millisecond: that may make one token late, but not all that follow.
#[tokio::test(start_paused = true)]
async fn waits_that_end_off_the_tick_do_not_add_up() {
    for rate in [7, 15, 300, 700, 999] {
        let bucket = drained(rate, 1);
        assert_near(seconds_for(&bucket, 10 * rate as u32).await, secs(10));
    }
}

#[tokio::test(start_paused = true)]
async fn several_callers_who_wait_get_the_whole_rate_in_turn() {
    let bucket = drained(1000, 10);
    let start = Instant::now();
    let counts = join_all((0..4).map(|_| async {
        let mut count = 0;
        while start.elapsed() < secs(5) {
            bucket.acquire().await.unwrap().success();
            count += 1;
        }
        count
    }))
    .await;
    let sum: u32 = counts.iter().sum();
    assert!((4990..=5010).contains(&sum), "{counts:?}");
    assert!(counts.iter().all(|count| (1240..=1260).contains(count)), "{counts:?}");
}

#[tokio::test(start_paused = true)]
async fn a_call_that_comes_back_when_told_gets_through() {
    let bucket = TokenBucket::per_second(2).burst(1).max_queue(0).build().unwrap();
    let retry = Retry::immediate().on_refusal(OnRefusal::Retry).max_attempts(2);
    let policy = Policy::named("told").retry(retry).gate(bucket).build().unwrap();
    let start = Instant::now();
    for _ in 0..10 {
        policy.run(|| ready(Ok::<_, ()>(()))).await.unwrap();
    }
    assert_eq!(start.elapsed(), ms(4500));
}

// ---------------------------------------------------------------------------------------------------------------------
// Giving back

#[tokio::test(start_paused = true)]
async fn a_refund_never_fills_a_bucket_over_its_burst() {
    let bucket = drained(1, 5);
    bucket.refund(2);
    assert_eq!((bucket.peek(), takes(&bucket)), (2, 2));
    bucket.refund(5);
    bucket.refund(5);
    bucket.refund(u32::MAX);
    assert_eq!((bucket.peek(), takes(&bucket)), (5, 5));
}

#[tokio::test(start_paused = true)]
async fn a_refund_serves_who_waits_at_once() {
    let bucket = drained(1, 2);
    let mut waiters: Vec<_> = (0..3).map(|_| Waiter::queued(&bucket, 1)).collect();
    bucket.refund(2);
    assert_eq!(waiters[0].woken(), 1);
    waiters[0].poll().expect("its turn").unwrap().success();
    assert_eq!(waiters[1].woken(), 1, "and the next");
    waiters[1].poll().expect("its turn").unwrap().success();
    assert!(waiters[2].poll().is_none());
}

#[tokio::test(start_paused = true)]
async fn a_token_of_a_call_that_never_reached_its_operation_comes_back() {
    let bucket = per_second(1, 3);
    let semaphore = Semaphore::permits(1).max_queue(1).build().unwrap();
    let held = semaphore.try_acquire().unwrap();
    let policy = Policy::named("inner").timeout(ms(100)).gate(bucket.clone()).gate(semaphore).build().unwrap();
    // Dropped in the inner queue, out of time in it, and refused by it.
    let mut queued = Box::pin(policy.run(pending::<Result<(), ()>>));
    assert!(poll_immediate(queued.as_mut()).await.is_none());
    assert_eq!(bucket.peek(), 2);
    let error = policy.call().no_wait().run(pending::<Result<(), ()>>).await.unwrap_err();
    assert!(error.is_refused());
    assert_eq!(bucket.peek(), 2);
    drop(queued);
    assert_eq!(bucket.peek(), 3);
    assert!(policy.run(pending::<Result<(), ()>>).await.unwrap_err().is_timeout());
    assert_eq!(bucket.peek(), 3);
    drop(held);
}

/// A policy in which calls take a token and then wait for a permit that somebody holds.
fn in_front_of_a_queue(bucket: &TokenBucket) -> (Policy, Guard) {
    let semaphore = Semaphore::permits(1).build().unwrap();
    let held = semaphore.try_acquire().unwrap();
    (Policy::named("inner").gate(bucket.clone()).gate(semaphore).build().unwrap(), held)
}

#[tokio::test(start_paused = true)]
async fn a_token_comes_back_although_somebody_has_taken_since() {
    let bucket = per_second(1, 3);
    let (policy, _held) = in_front_of_a_queue(&bucket);
    let mut queued = Box::pin(policy.run(pending::<Result<(), ()>>));
    assert!(poll_immediate(queued.as_mut()).await.is_none());
    bucket.try_take(1).unwrap();
    drop(queued);
    assert_eq!(bucket.peek(), 2);
}

/// Under overload nearly all who wait further in leave, the oldest first.
#[tokio::test(start_paused = true)]
async fn tokens_of_many_that_leave_a_queue_further_in_come_back_in_any_order() {
    for held in [0, 200] {
        for order in [false, true] {
            let bucket = per_second(500, 500);
            let (policy, _held) = in_front_of_a_queue(&bucket);
            let mut queued: Vec<_> = (0..500).map(|_| Box::pin(policy.run(pending::<Result<(), ()>>))).collect();
            for run in &mut queued {
                assert!(poll_immediate(run.as_mut()).await.is_none());
            }
            advance(ms(held)).await;
            if order {
                queued.reverse();
            }
            queued.into_iter().for_each(drop);
            assert_eq!(bucket.peek(), 500, "held for {held} ms: what has accrued is there, too");
        }
    }
}

/// What comes back must never let more through than if it had not been taken: the refill may have been lost to a bucket
/// that would have been full.
#[tokio::test(start_paused = true)]
async fn what_accrued_while_a_token_was_held_does_not_come_back_with_it() {
    let bucket = per_second(1, 2);
    let (policy, _held) = in_front_of_a_queue(&bucket);
    let mut queued = Box::pin(policy.run(pending::<Result<(), ()>>));
    assert!(poll_immediate(queued.as_mut()).await.is_none());
    advance(secs(1)).await;
    assert_eq!(takes(&bucket), 2);
    drop(queued);
    assert_eq!(takes(&bucket), 0, "three would have started at once");
}

/// What came back must not lie there while somebody waits for it.
#[tokio::test(start_paused = true)]
async fn a_token_that_comes_back_goes_to_who_waits_at_once() {
    let bucket = per_second(1, 1);
    let (policy, _held) = in_front_of_a_queue(&bucket);
    let mut queued = Box::pin(policy.run(pending::<Result<(), ()>>));
    assert!(poll_immediate(queued.as_mut()).await.is_none());
    let start = Instant::now();
    let waiter = async {
        bucket.acquire().await.unwrap().success();
        start.elapsed()
    };
    let leave = async move {
        sleep(ms(100)).await;
        drop(queued);
    };
    assert_eq!(join(waiter, leave).await.0, ms(100));
}

#[tokio::test(start_paused = true)]
async fn a_token_whose_operation_was_made_stays_spent() {
    let bucket = per_second(1, 3);
    let policy = gated(&bucket);
    let mut run = Box::pin(policy.run(pending::<Result<(), ()>>));
    assert!(poll_immediate(run.as_mut()).await.is_none());
    drop(run);
    assert_eq!(bucket.peek(), 2);
    let _ = policy.run(|| ready(Err::<(), ()>(()))).await;
    drop(bucket.try_acquire().unwrap());
    assert_eq!(bucket.peek(), 0);
}

/// L9.
#[tokio::test(start_paused = true)]
async fn of_two_buckets_both_give_a_token_or_neither() {
    let (wide, narrow) = (per_second(1, 5), per_second(1, 1));
    let policy = Policy::named("both").gate(wide.clone()).gate(narrow.clone()).build().unwrap();
    policy.run(|| ready(Ok::<_, ()>(()))).await.unwrap();
    for _ in 0..10 {
        assert!(policy.call().no_wait().run(|| ready(Ok::<_, ()>(()))).await.unwrap_err().is_refused());
    }
    assert_eq!((wide.peek(), narrow.peek()), (4, 0));
}

// ---------------------------------------------------------------------------------------------------------------------
// Changing the rate

/// L12: what has come at the old rate is there.
#[tokio::test(start_paused = true)]
async fn a_change_of_rate_keeps_the_tokens_that_are_there() {
    let bucket = drained(10, 10);
    advance(ms(550)).await;
    bucket.set_rate(Rate::per_second(1)).unwrap();
    assert_eq!((bucket.peek(), takes(&bucket)), (5, 5));
    let after = told(&bucket, 1);
    assert!(after.abs_diff(ms(500)) <= nanos(2), "half a token is kept, too: {after:?}");
    bucket.set_rate(Rate::per_second(1000)).unwrap();
    assert!(told(&bucket, 1) <= ms(1));
    advance(secs(1)).await;
    assert_eq!(bucket.peek(), 10);
}

/// L12.
#[tokio::test(start_paused = true)]
async fn a_higher_rate_wakes_who_sleeps() {
    let bucket = TokenBucket::at(Rate::new(1, secs(3600))).burst(1).build().unwrap();
    bucket.try_take(1).unwrap();
    let start = Instant::now();
    let waiters = join_all((0..3).map(|_| async {
        bucket.acquire().await.unwrap().success();
        start.elapsed()
    }));
    let faster = async {
        sleep(secs(5)).await;
        bucket.set_rate(Rate::per_second(10)).unwrap();
    };
    let times = join(waiters, faster).await.0;
    assert!(times.iter().zip(1..).all(|(at, n)| at.abs_diff(secs(5) + ms(100) * n) <= ms(1)), "{times:?}");
}

#[tokio::test(start_paused = true)]
async fn a_lower_rate_refuses_who_would_now_wait_too_long() {
    let bucket = TokenBucket::per_second(1).burst(1).max_wait(secs(3)).build().unwrap();
    bucket.try_take(1).unwrap();
    let start = Instant::now();
    let waiter = async { (bucket.acquire().await.map(drop), start.elapsed()) };
    let slower = async {
        sleep(ms(500)).await;
        bucket.set_rate(Rate::per_minute(1)).unwrap();
    };
    let (end, at) = join(waiter, slower).await.0;
    let refusal = end.unwrap_err();
    assert_eq!((refusal.reason(), at), (Reason::TooLate, ms(500)));
    assert!(refusal.retry_after().unwrap().abs_diff(secs(30)) <= nanos(100), "{refusal}");
    assert_eq!(bucket.queued(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_wrong_rate_changes_nothing() {
    let bucket = drained(1, 1);
    for rate in [Rate::per_second(0), Rate::new(1, Duration::ZERO), Rate::per_second(u64::MAX)] {
        let error = bucket.set_rate(rate).unwrap_err();
        assert_eq!(error.faults()[0].field(), "rate");
        assert_eq!(told(&bucket, 1), secs(1));
    }
}

#[tokio::test(start_paused = true)]
async fn a_change_to_the_same_rate_changes_nothing() {
    let bucket = drained(7, 3);
    advance(ms(100)).await;
    let before = told(&bucket, 3);
    for _ in 0..100 {
        bucket.set_rate(Rate::per_second(7)).unwrap();
    }
    assert_eq!(told(&bucket, 3), before);
}

/// A moment that never comes was taken for a reading of the clock, and the limiter was spent until then.
#[tokio::test(start_paused = true)]
async fn what_is_no_reading_of_a_clock_is_refused() {
    let bucket = TokenBucket::per_second(10).burst(3).build().unwrap();
    let window = resile::SlidingWindow::per_second(3).build().unwrap();
    assert!(
        bucket.try_take_at(1, resile::Moment::NEVER).is_err() && window.try_take_at(1, resile::Moment::NEVER).is_err()
    );
    assert_eq!((bucket.peek(), window.peek()), (3, 3));
}

/// Takers on other threads see the old pace or the new one, never half of each.
#[test]
fn threads_that_take_during_a_change_of_rate_get_no_more_than_the_burst() {
    let bucket = TokenBucket::at(Rate::new(1, secs(7200))).burst(1000).build().unwrap();
    let taken = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..2000 {
                    if bucket.try_take(1).is_ok() {
                        taken.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        scope.spawn(|| {
            for round in 0..2000 {
                bucket.set_rate(Rate::new(1, secs(7200 + round % 7 * 1000))).unwrap();
            }
        });
    });
    assert_eq!(taken.into_inner(), 1000);
}

struct Bomb(AtomicBool);

impl Wake for Bomb {
    fn wake(self: Arc<Self>) {
        assert!(!self.0.load(Ordering::Relaxed), "boom");
    }
}

/// The token of the first in line was lost with the panic of the second one's waker.
#[tokio::test(start_paused = true)]
async fn a_waker_that_panics_costs_nobody_a_token() {
    let bucket = drained(1, 1);
    let mut first = Waiter::queued(&bucket, 1);
    let bomb = Arc::new(Bomb(AtomicBool::new(false)));
    let waker = Waker::from(bomb.clone());
    let mut second = Box::pin(bucket.acquire());
    assert!(second.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
    advance(secs(2)).await;
    bomb.0.store(true, Ordering::Relaxed);
    let polled = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        first.acquire.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready()
    }));
    assert!(polled.is_err());
    drop((first, second));
    assert_eq!((bucket.queued(), takes(&bucket)), (0, 1));
}

/// Who came just then kept a place that it did not know of, and a token went there.
#[tokio::test(start_paused = true)]
async fn a_waker_that_panics_leaves_no_place_to_who_comes_then() {
    let bucket = drained(1, 1);
    let bomb = Arc::new(Bomb(AtomicBool::new(false)));
    let waker = Waker::from(bomb.clone());
    let mut first = Box::pin(bucket.acquire());
    assert!(first.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
    advance(secs(1)).await;
    bomb.0.store(true, Ordering::Relaxed);
    let mut newcomer = Box::pin(bucket.acquire());
    let polled = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        newcomer.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready()
    }));
    assert!(polled.is_err());
    drop(newcomer);
    assert_eq!(bucket.queued(), 0);
    assert!(poll_immediate(first).await.unwrap().is_ok());
}

// ---------------------------------------------------------------------------------------------------------------------
// Whatever happens

#[derive(Clone, Debug)]
enum Op {
    Wait(u64),
    Take(u32),
    Come(u32),
    Leave(usize),
    Poll(usize),
    Rate(u64),
}

fn op(burst: u32) -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0_u64..3_000_000_000).prop_map(Op::Wait),
        2 => (1..=burst + 1).prop_map(Op::Take),
        4 => (1..=burst).prop_map(Op::Come),
        1 => any::<usize>().prop_map(Op::Leave),
        6 => any::<usize>().prop_map(Op::Poll),
        1 => (1_u64..20).prop_map(Op::Rate),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Laws: in no interval more is had at once than the burst and what came in it at the highest rate, nor in the whole
    /// with what was waited for; who waits is served in order, whether or not those before it come;
    /// a newcomer who finds nobody waiting and comes back when told is served.
    #[test]
    fn whatever_happens_the_bound_and_the_order_hold(
        (burst, ops) in (1_u32..5).prop_flat_map(|burst| (Just(burst), proptest::collection::vec(op(burst), 0..100))),
        rate in 1_u64..20,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let bucket = per_second(rate, burst);
            let start = Instant::now();
            let highest = Cell::new(rate);
            let mut waiters: Vec<(u32, Waiter)> = Vec::new();
            // What was had at once, and when; and what was waited for.
            let mut granted: Vec<(u128, u32)> = Vec::new();
            let mut fetched = 0_u128;
            for op in ops {
                let now = start.elapsed().as_nanos();
                match op {
                    Op::Wait(time) => advance(nanos(time)).await,
                    Op::Take(cost) => match bucket.try_take(cost) {
                        Ok(()) => {
                            prop_assert_eq!(bucket.queued(), 0, "nobody passes a waiter by");
                            granted.push((now, cost));
                        }
                        Err(refusal) if cost <= burst && waiters.is_empty() => {
                            advance(refusal.retry_after().unwrap()).await;
                            prop_assert!(bucket.try_take(cost).is_ok());
                            granted.push((start.elapsed().as_nanos(), cost));
                        }
                        // Behind a head that is due and has not come, nobody knows when.
                        Err(refusal) => prop_assert!(refusal.retry_after().is_none() || cost <= burst),
                    },
                    Op::Come(cost) => {
                        let mut waiter = Waiter { acquire: Box::pin(bucket.acquire_many(cost)), woken: Arc::default() };
                        match waiter.poll() {
                            None => waiters.push((cost, waiter)),
                            Some(end) => {
                                prop_assert!(end.is_ok() && bucket.queued() == 0);
                                granted.push((now, cost));
                            }
                        }
                    }
                    Op::Leave(which) if !waiters.is_empty() => drop(waiters.remove(which % waiters.len())),
                    Op::Poll(which) if !waiters.is_empty() => {
                        // Those before one that was served were served, too; they may start when they want.
                        let place = which % waiters.len();
                        if let Some(end) = waiters[place].1.poll() {
                            prop_assert!(end.is_ok());
                            fetched += u128::from(waiters.remove(place).0);
                            for (cost, mut before) in waiters.drain(..place) {
                                prop_assert!(before.poll().is_some_and(|end| end.is_ok()), "served out of turn");
                                fetched += u128::from(cost);
                            }
                        }
                    }
                    Op::Rate(rate) => {
                        bucket.set_rate(Rate::per_second(rate)).unwrap();
                        highest.set(highest.get().max(rate));
                    }
                    Op::Leave(_) | Op::Poll(_) => {}
                }
                prop_assert!(bucket.queued() as usize <= waiters.len());
                prop_assert!(bucket.peek() <= burst);
                // Of the whole time no more than allowed, whenever it was fetched.
                let came = (start.elapsed().as_nanos() * u128::from(highest.get())).div_ceil(1_000_000_000);
                let sum = fetched + granted.iter().map(|(_, cost)| u128::from(*cost)).sum::<u128>();
                prop_assert!(sum <= u128::from(burst) + came, "{sum} by now");
            }
            for (place, (from, _)) in granted.iter().enumerate() {
                let mut sum = 0;
                for (to, cost) in &granted[place..] {
                    sum += u128::from(*cost);
                    let came = ((to - from) * u128::from(highest.get())).div_ceil(1_000_000_000);
                    prop_assert!(sum <= u128::from(burst) + came, "{} in {} ns", sum, to - from);
                }
            }
            // Whoever still waits gets it, one after the other.
            for (_, mut waiter) in waiters {
                for _ in 0..burst {
                    advance(ms(1001)).await;
                }
                prop_assert!(waiter.poll().is_some_and(|end| end.is_ok()));
            }
            Ok(())
        })?;
    }
}

fn batched() -> TokenBucket {
    TokenBucket::per_second(1).burst(100).batch(20).build().unwrap()
}

/// Whether or not the thread has a purse, what it takes ahead comes to it.
#[tokio::test(start_paused = true)]
async fn a_thread_alone_at_a_batched_bucket_gets_the_burst_and_then_the_rate() {
    let bucket = batched();
    assert_eq!(takes(&bucket), 100);
    assert_eq!(told(&bucket, 1), secs(1));
    let start = Instant::now();
    for waited in 1..=3 {
        let _token = bucket.acquire().await.unwrap();
        assert_eq!(start.elapsed(), secs(waited));
    }
}

#[tokio::test(start_paused = true)]
async fn a_token_out_of_a_batch_that_was_not_used_goes_back() {
    let (bucket, closed) = (batched(), Semaphore::permits(1).build().unwrap());
    closed.close();
    let policy = Policy::named("both").gate(bucket.clone()).gate(closed).build().unwrap();
    for _ in 0..10 {
        policy.run(|| ready(Ok::<_, Infallible>(()))).await.unwrap_err();
    }
    assert_eq!(takes(&bucket), 100);
}

#[tokio::test(start_paused = true)]
async fn a_batched_bucket_refuses_costs_of_nothing_and_above_the_burst() {
    let bucket = batched();
    for _ in 0..2 {
        assert_eq!(bucket.try_take(0).unwrap_err().reason(), Reason::ZeroCost);
        assert_eq!(bucket.try_acquire_many(0).unwrap_err().reason(), Reason::ZeroCost);
        let reason = Reason::CostAboveLimit { cost: 101, limit: 100 };
        assert_eq!(bucket.try_take(101).unwrap_err().reason(), reason);
        assert_eq!(bucket.try_acquire_many(101).unwrap_err().reason(), reason);
        bucket.try_take(1).unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_token_out_of_a_batch_goes_back_when_its_call_is_dropped_in_a_queue_further_in() {
    let (bucket, busy) = (batched(), Semaphore::permits(1).build().unwrap());
    let _held = busy.try_acquire().unwrap();
    let policy = Policy::named("both").gate(bucket.clone()).gate(busy).build().unwrap();
    for _ in 0..10 {
        assert!(poll_immediate(policy.run(|| ready(Ok::<_, Infallible>(())))).await.is_none());
    }
    assert_eq!(takes(&bucket), 100);
}

/// However many there are, and wherever their tokens lie.
#[test]
fn threads_at_a_batched_bucket_get_no_more_than_the_burst_and_leave_no_more_than_their_batches() {
    let bucket = TokenBucket::at(Rate::per_hour(2)).burst(10_000).batch(100).build().unwrap();
    let purses = (std::thread::available_parallelism().map_or(1, std::num::NonZero::get) as u32 + 2).min(16);
    let taken: u32 = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..purses + 2).map(|_| scope.spawn(|| takes(&bucket))).collect();
        handles.into_iter().map(|handle| handle.join().unwrap()).sum()
    });
    assert!(taken <= 10_000 && taken + purses * 100 >= 10_000, "{taken}");
}

/// Only the head heard that the rate had been raised: those behind it slept until the moments that they had been told.
#[tokio::test(start_paused = true)]
async fn who_waits_behind_others_comes_earlier_when_all_do() {
    let passes = |bucket: &TokenBucket, start: Instant| {
        let waits = (0..4).map(|_| bucket.acquire()).collect::<Vec<_>>();
        let waits = waits.into_iter().map(move |wait| {
            tokio::spawn(async move {
                wait.await.unwrap().success();
                start.elapsed()
            })
        });
        waits.collect::<Vec<_>>()
    };
    let bucket = TokenBucket::at(Rate::new(1, Duration::from_secs(3600))).burst(1).build().unwrap();
    bucket.try_take(1).unwrap();
    let waiting = passes(&bucket, Instant::now());
    sleep(ms(1000)).await;
    bucket.set(TokenBucket::per_second(10).burst(1)).unwrap();
    for (place, waits) in (1..).zip(waiting) {
        assert!(waits.await.unwrap() <= ms(1000 + 102 * place), "number {place}");
    }

    let bucket = TokenBucket::per_second(1).burst(1).build().unwrap();
    bucket.try_take(1).unwrap();
    let mut waiting = passes(&bucket, Instant::now());
    sleep(ms(500)).await;
    waiting.remove(1).abort();
    for (place, waits) in (1..).zip(waiting) {
        assert!(waits.await.unwrap() <= ms(1002 * place), "number {place}");
    }
}
