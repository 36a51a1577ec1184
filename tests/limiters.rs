//! What holds for every limiter: the same claims about buckets, windows and quotas.

mod support;

use std::cell::Cell;
use std::fmt::Debug;
use std::future::{Future, ready};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use futures::StreamExt;
use futures::future::{join_all, poll_immediate};
use futures::stream::FuturesOrdered;
use proptest::prelude::*;
use resile::{
    Acquire, Guard, LeakyBucket, LimitFields, Policy, PolicyBuilder, Quota, Rate, Reason, Refusal, Retry, Semaphore,
    SlidingWindow, Snapshot, TokenBucket, Verdict,
};
use support::hand::{Clock, Flag, nosy};
use support::ms;
use tokio::time::{Instant, advance};

const fn secs(count: u64) -> Duration {
    Duration::from_secs(count)
}

const fn nanos(count: u64) -> Duration {
    Duration::from_nanos(count)
}

/// Changes a limit.
type Set<'a> = &'a dyn Fn(u64);

fn just_before(time: Duration) -> Duration {
    time.saturating_sub(nanos(1))
}

/// The surface that all limiters have.
trait Limiter: Debug {
    fn try_take(&self, tokens: u32) -> Result<(), Refusal>;
    fn acquire_many(&self, tokens: u32) -> Acquire;
    fn try_acquire_many(&self, tokens: u32) -> Result<Guard, Refusal>;
    fn peek(&self) -> u64;
    fn refund(&self, tokens: u32);
    fn queued(&self) -> u32;
    fn snapshot(&self) -> Snapshot;
    fn handle(&self) -> Box<dyn Fn() -> u32 + Send + Sync>;
    fn add_to(&self, policy: PolicyBuilder) -> PolicyBuilder;
}

macro_rules! limiters {
    ($($limiter:ident),*) => {$(
        impl Limiter for $limiter {
            fn try_take(&self, tokens: u32) -> Result<(), Refusal> {
                self.try_take(tokens)
            }
            fn acquire_many(&self, tokens: u32) -> Acquire {
                self.acquire_many(tokens)
            }
            fn try_acquire_many(&self, tokens: u32) -> Result<Guard, Refusal> {
                self.try_acquire_many(tokens)
            }
            fn peek(&self) -> u64 {
                self.peek().into()
            }
            fn refund(&self, tokens: u32) {
                self.refund(tokens);
            }
            fn queued(&self) -> u32 {
                self.queued()
            }
            fn snapshot(&self) -> Snapshot {
                self.snapshot()
            }
            fn handle(&self) -> Box<dyn Fn() -> u32 + Send + Sync> {
                let handle = self.clone();
                Box::new(move || handle.queued())
            }
            fn add_to(&self, policy: PolicyBuilder) -> PolicyBuilder {
                policy.gate(self.clone())
            }
        }
    )*};
}
limiters!(TokenBucket, LeakyBucket, SlidingWindow, Quota);

/// The largest cost that is there after idling, of all but the leaky bucket.
const LIMIT: u32 = 3;
const WINDOW: u64 = 1_000_000_000;
const KINDS: usize = 6;

/// About three a second, by every way to count, with a queue of so many.
fn limiter(kind: usize, max_queue: u32) -> Box<dyn Limiter> {
    let limit = LIMIT.into();
    // Half a second into a second of the calendar.
    let wall = SystemTime::UNIX_EPOCH + ms(1_700_000_000_500);
    match kind {
        0 => Box::new(TokenBucket::per_second(limit).burst(LIMIT).max_queue(max_queue).build().unwrap()),
        1 => Box::new(LeakyBucket::per_second(limit).max_queue(max_queue).build().unwrap()),
        2 => Box::new(SlidingWindow::per_second(limit).max_queue(max_queue).build().unwrap()),
        3 => Box::new(SlidingWindow::per_second(limit).exact_up_to(0).max_queue(max_queue).build().unwrap()),
        4 => Box::new(Quota::per_second(limit).wall_clock(wall).max_queue(max_queue).build().unwrap()),
        _ => Box::new(Quota::from_first_use(limit, secs(1)).max_queue(max_queue).build().unwrap()),
    }
}

fn all() -> impl Iterator<Item = Box<dyn Limiter>> {
    (0..KINDS).map(|kind| limiter(kind, 1000))
}

fn told(limiter: &dyn Limiter, tokens: u32) -> Duration {
    limiter.try_take(tokens).unwrap_err().retry_after().expect("it knows when")
}

/// Takes what is there.
fn drain(limiter: &dyn Limiter) {
    while limiter.try_take(1).is_ok() {}
}

fn gated(limiter: &dyn Limiter) -> Policy {
    limiter.add_to(Policy::named("gated")).build().unwrap()
}

// ---------------------------------------------------------------------------------------------------------------------
// Taking now

/// L17: to the nanosecond.
#[tokio::test(start_paused = true)]
async fn waiting_as_long_as_told_always_suffices_and_a_nanosecond_less_never() {
    for limiter in all() {
        for cost in [1, 1, 2, 3, 1, 3, 2, 1, 1, 1, 2].into_iter().cycle().take(300) {
            let Err(refusal) = limiter.try_take(cost) else { continue };
            let after = refusal.retry_after().unwrap();
            advance(just_before(after)).await;
            assert_eq!(told(&*limiter, cost), nanos(1), "{limiter:?}");
            advance(nanos(1)).await;
            limiter.try_take(cost).unwrap();
        }
    }
}

/// L7.
#[tokio::test(start_paused = true)]
async fn refusals_and_looks_change_nothing() {
    for limiter in all() {
        drain(&*limiter);
        advance(ms(10)).await;
        let before = (limiter.snapshot(), limiter.peek(), told(&*limiter, 1));
        for _ in 0..100 {
            for cost in [0, 2, 3, u32::MAX] {
                assert!(limiter.try_take(cost).is_err());
                assert!(limiter.try_acquire_many(cost).is_err());
            }
            limiter.refund(0);
        }
        assert_eq!((limiter.snapshot(), limiter.peek(), told(&*limiter, 1)), before);
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_and_more_than_can_be_are_refused_for_what_they_are() {
    for (kind, limiter) in all().enumerate() {
        let costly = if kind == 1 { u32::MAX } else { LIMIT + 1 };
        for refusal in [
            limiter.try_take(costly).unwrap_err(),
            limiter.acquire_many(costly).await.unwrap_err(),
            gated(&*limiter)
                .call()
                .cost(costly)
                .run(|| ready(Ok::<_, ()>(())))
                .await
                .unwrap_err()
                .refusal()
                .unwrap()
                .clone(),
        ] {
            assert!(matches!(refusal.reason(), Reason::CostAboveLimit { cost, .. } if cost == costly), "{refusal}");
            assert_eq!(refusal.retry_after(), None, "waiting won't help");
        }
        for refusal in [limiter.try_take(0).unwrap_err(), limiter.acquire_many(0).await.unwrap_err()] {
            assert_eq!((refusal.reason(), refusal.retry_after()), (Reason::ZeroCost, None));
        }
        assert_eq!(limiter.peek(), limiter.snapshot().limit(), "nothing was taken");
    }
}

/// L1, L14.
#[tokio::test(start_paused = true)]
async fn after_idling_for_a_year_the_limit_passes_and_no_more() {
    for limiter in all() {
        for _ in 0..5 {
            let limit = limiter.snapshot().limit();
            assert_eq!(limiter.peek(), limit);
            let took = (0..100).take_while(|_| limiter.try_take(1).is_ok()).count();
            assert_eq!(took as u64, limit, "{limiter:?}");
            advance(secs(365 * 86_400)).await;
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Waiting

/// What a newcomer is told behind others is when it is served, whatever those before it cost.
#[tokio::test(start_paused = true)]
async fn waiters_are_served_in_order_each_when_a_newcomer_was_told() {
    for limiter in all() {
        drain(&*limiter);
        let start = Instant::now();
        let costs = [1, 3, 2, 2, 1, 1, 3, 3, 1, 2];
        let mut waiters = Vec::new();
        let mut expected = Vec::new();
        for cost in costs {
            expected.push(told(&*limiter, cost));
            let mut waiter = Box::pin(limiter.acquire_many(cost));
            assert!(poll_immediate(waiter.as_mut()).await.is_none());
            waiters.push(waiter);
        }
        assert!(expected.is_sorted());
        let served = join_all(waiters.into_iter().map(|waiter| async move {
            waiter.await.unwrap().success();
            start.elapsed()
        }));
        for (place, (at, told)) in served.await.into_iter().zip(expected).enumerate() {
            // Each wait ends up to a millisecond late.
            let late = at.checked_sub(told).unwrap_or_else(|| panic!("{limiter:?}: {at:?} before {told:?}"));
            assert!(late <= ms(2) * (place as u32 + 1), "{limiter:?}: {place} came {late:?} late");
        }
        assert_eq!(limiter.queued(), 0);
    }
}

/// L16.
#[tokio::test(start_paused = true)]
async fn who_cannot_be_served_before_its_deadline_is_refused_at_once_with_the_time() {
    for limiter in all() {
        drain(&*limiter);
        let after = told(&*limiter, 1);
        let start = Instant::now();
        let call = || gated(&*limiter);
        let near = call().call().deadline(just_before(after)).run(|| ready(Ok::<_, ()>(()))).await.unwrap_err();
        assert_eq!(near.refusal().map(Refusal::reason), Some(Reason::TooLate));
        assert_eq!((near.retry_after(), start.elapsed()), (Some(after), Duration::ZERO));
        call().call().deadline(after + ms(2)).run(|| ready(Ok::<_, ()>(()))).await.unwrap();
        assert!(start.elapsed() >= after);
    }
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_refuses_at_once_with_the_time() {
    for kind in 0..KINDS {
        let limiter = limiter(kind, 2);
        drain(&*limiter);
        let mut waiting: Vec<_> = (0..2).map(|_| Box::pin(limiter.acquire_many(1))).collect();
        for waiter in &mut waiting {
            assert!(poll_immediate(waiter.as_mut()).await.is_none());
        }
        let after = told(&*limiter, 1);
        let refusal = limiter.acquire_many(1).await.unwrap_err();
        assert_eq!((refusal.reason(), refusal.retry_after()), (Reason::QueueFull, Some(after)));
        let seen = limiter.snapshot();
        assert_eq!((seen.remaining(), seen.retry_after(), seen.reset()), (0, Some(after), after));
        drop(waiting);
        assert_eq!(limiter.queued(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_head_that_leaves_moves_the_others_up() {
    for limiter in all() {
        drain(&*limiter);
        let alone = told(&*limiter, 1);
        let mut head = Box::pin(limiter.acquire_many(3));
        assert!(poll_immediate(head.as_mut()).await.is_none());
        let start = Instant::now();
        let (mut second, flag) = (Box::pin(limiter.acquire_many(1)), Flag::default());
        assert!(flag.poll(second.as_mut()).is_pending());
        drop(head);
        assert!(flag.woken());
        second.await.unwrap().success();
        assert!(start.elapsed() <= alone + ms(2), "{limiter:?}: {:?} for {alone:?}", start.elapsed());
    }
}

/// Only the head holds a timer.
#[tokio::test(start_paused = true)]
async fn nobody_spins_in_a_queue() {
    for limiter in all() {
        let polls: FuturesOrdered<_> = (0..30)
            .map(|_| {
                let mut wait = Box::pin(limiter.acquire_many(1));
                async move {
                    let mut polls = 0;
                    std::future::poll_fn(|cx| {
                        polls += 1;
                        wait.as_mut().poll(cx).map(|end| end.unwrap().success())
                    })
                    .await;
                    polls
                }
            })
            .collect();
        let polls: Vec<u32> = polls.collect().await;
        assert!(polls.iter().all(|polls| *polls <= 3), "{limiter:?}: {polls:?}");
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Giving back and settling

#[tokio::test(start_paused = true)]
async fn what_a_call_took_that_never_reached_its_operation_comes_back() {
    for limiter in all() {
        let semaphore = Semaphore::permits(1).build().unwrap();
        let _held = semaphore.try_acquire().unwrap();
        let policy = limiter.add_to(Policy::named("inner")).gate(semaphore).build().unwrap();
        let before = limiter.peek();
        for _ in 0..10 {
            assert!(policy.call().no_wait().run(|| ready(Ok::<_, ()>(()))).await.unwrap_err().is_refused());
            assert_eq!(limiter.peek(), before, "{limiter:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_refunded_is_there_and_never_more_than_the_limit() {
    for limiter in all() {
        let limit = limiter.snapshot().limit();
        drain(&*limiter);
        limiter.refund(1);
        assert_eq!(limiter.peek(), 1);
        limiter.refund(u32::MAX);
        limiter.refund(u32::MAX);
        assert_eq!(limiter.peek(), limit);
        drain(&*limiter);
        let mut waiter = Box::pin(limiter.acquire_many(1));
        assert!(poll_immediate(waiter.as_mut()).await.is_none());
        limiter.refund(1);
        poll_immediate(waiter.as_mut()).await.expect("its turn").unwrap().success();
    }
}

#[tokio::test(start_paused = true)]
async fn a_cost_that_was_estimated_too_high_comes_back() {
    for limiter in all().filter(|limiter| limiter.snapshot().limit() > 1) {
        let limit = limiter.snapshot().limit();
        let mut guard = limiter.try_acquire_many(LIMIT).unwrap();
        for actual in [2, 2, 1, 3, 0, 1] {
            guard.settle(actual);
            assert_eq!(limiter.peek(), limit - u64::from(actual), "{limiter:?}");
        }
        guard.success();
        assert_eq!(limiter.peek(), limit - 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_cost_that_was_estimated_too_low_is_owed() {
    for limiter in all() {
        let mut guard = limiter.try_acquire_many(1).unwrap();
        guard.settle(1 + 3 * LIMIT);
        guard.failure();
        assert_eq!(limiter.peek(), 0);
        let after = told(&*limiter, 1);
        // Two of those that are owed were there, and no window is longer than a second.
        assert!(after > ms(400), "{limiter:?}: {after:?}");
        advance(just_before(after)).await;
        assert_eq!(told(&*limiter, 1), nanos(1), "{limiter:?}");
        advance(nanos(1)).await;
        limiter.try_take(1).unwrap();
    }
}

/// Who waits waits longer, or is told so.
#[tokio::test(start_paused = true)]
async fn a_settled_cost_that_makes_a_waiter_late_has_it_refused() {
    for limiter in all() {
        let mut guard = limiter.try_acquire_many(1).unwrap();
        drain(&*limiter);
        let policy = gated(&*limiter);
        let (mut call, flag) =
            (Box::pin(policy.call().deadline(ms(1100)).run(|| ready(Ok::<_, ()>(())))), Flag::default());
        assert!(flag.poll(call.as_mut()).is_pending());
        guard.settle(1000);
        assert!(flag.woken());
        let Poll::Ready(end) = flag.poll(call.as_mut()) else {
            // A window forgets what is owed, after its length.
            assert!(format!("{limiter:?}").starts_with("SlidingWindow"), "{limiter:?}");
            continue;
        };
        assert_eq!(end.unwrap_err().refusal().map(Refusal::reason), Some(Reason::TooLate));
        assert_eq!(limiter.queued(), 0);
    }
}

/// Each limiter that an attempt has passed is told, of each attempt.
#[tokio::test(start_paused = true)]
async fn a_call_settles_what_its_attempts_have_cost() {
    let (outer, inner) = (TokenBucket::per_second(1).burst(100), SlidingWindow::per_second(100));
    let (outer, inner) = (outer.build().unwrap(), inner.build().unwrap());
    let policy = Policy::named("costly").gate(outer.clone()).retry(Retry::immediate().max_attempts(2));
    let policy = policy.gate(inner.clone()).build().unwrap();
    let call = || {
        let call = policy.call().cost(10).classify(|_: &Result<u32, u32>| Verdict::Transient(None));
        call.settle(|result: &Result<u32, u32>| *result.as_ref().unwrap_or_else(|cost| cost))
    };
    let attempts = Cell::new(0);
    let attempt = || {
        attempts.set(attempts.get() + 1);
        ready(if attempts.get() == 1 { Err(3) } else { Ok(25) })
    };
    assert_eq!(call().run(attempt).await.unwrap(), 25);
    assert_eq!((attempts.get(), outer.peek(), inner.peek()), (2, 75, 72));
    drop(poll_immediate(call().run(std::future::pending)).await);
    assert_eq!((outer.peek(), inner.peek()), (65, 62), "as estimated");
}

#[tokio::test(start_paused = true)]
async fn gates_that_count_no_costs_take_no_notice_of_a_settled_one() {
    let semaphore = Semaphore::permits(3).build().unwrap();
    let mut guard = semaphore.try_acquire_many(2).unwrap();
    guard.settle(1);
    assert_eq!(semaphore.in_use(), 2);
    drop(guard);
    assert_eq!(semaphore.in_use(), 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Changing the limit

#[tokio::test(start_paused = true)]
async fn a_higher_limit_serves_who_waits_and_a_lower_one_sends_away_who_asks_too_much() {
    let slow = Rate::new(2, secs(3600));
    let leaky = LeakyBucket::at(slow).build().unwrap();
    let exact = SlidingWindow::at(slow).build().unwrap();
    let weighted = SlidingWindow::at(slow).exact_up_to(0).build().unwrap();
    let quota = Quota::per_hour(2).build().unwrap();
    let all: [(&dyn Limiter, Set<'_>); 4] = [
        (&leaky, &|count| leaky.set_rate(Rate::new(count, secs(3600))).unwrap()),
        (&exact, &|count| exact.set_rate(Rate::new(count, secs(3600))).unwrap()),
        (&weighted, &|count| weighted.set_rate(Rate::new(count, secs(3600))).unwrap()),
        (&quota, &|count| quota.set_limit(count).unwrap()),
    ];
    for (limiter, set) in all {
        drain(limiter);
        let (mut first, flag) = (Box::pin(limiter.acquire_many(2)), Flag::default());
        let mut second = Box::pin(limiter.acquire_many(1));
        assert!(flag.poll(first.as_mut()).is_pending());
        assert!(poll_immediate(second.as_mut()).await.is_none());
        set(1);
        assert!(flag.woken());
        match flag.poll(first.as_mut()) {
            // A leaky bucket takes any cost.
            Poll::Pending => drop(first),
            Poll::Ready(end) => {
                assert_eq!(end.unwrap_err().reason(), Reason::CostAboveLimit { cost: 2, limit: 1 });
            }
        }
        set(60_000);
        advance(secs(1)).await;
        poll_immediate(second.as_mut()).await.expect("its turn").unwrap().success();
        assert_eq!(limiter.queued(), 0, "{limiter:?}");
    }
}

/// Each change of a quota to less and back once gave the difference anew.
#[tokio::test(start_paused = true)]
async fn a_limit_that_is_lowered_and_raised_again_gives_nothing_twice() {
    let hour = SlidingWindow::at(Rate::per_hour(5));
    let (exact, weighted) = (hour.clone().build().unwrap(), hour.exact_up_to(0).build().unwrap());
    let (quota, first_use) = (Quota::per_hour(5).build(), Quota::from_first_use(5, secs(3600)).build());
    let (quota, first_use) = (quota.unwrap(), first_use.unwrap());
    let all: [(&dyn Limiter, Set<'_>); 4] = [
        (&exact, &|count| exact.set_rate(Rate::per_hour(count)).unwrap()),
        (&weighted, &|count| weighted.set_rate(Rate::per_hour(count)).unwrap()),
        (&quota, &|count| quota.set_limit(count).unwrap()),
        (&first_use, &|count| first_use.set_limit(count).unwrap()),
    ];
    for (limiter, set) in all {
        limiter.try_take(4).unwrap();
        let mut unused = limiter.try_acquire_many(1).unwrap();
        for _ in 0..3 {
            set(2);
            assert_eq!(limiter.peek(), 0, "{limiter:?}");
            set(5);
            assert_eq!(limiter.peek(), 0, "{limiter:?}");
        }
        set(2);
        unused.settle(0);
        assert_eq!(limiter.peek(), 0, "{limiter:?}: four of two are still used");
        set(5);
        assert_eq!(limiter.peek(), 1, "{limiter:?}");
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// What the front door tells

#[tokio::test(start_paused = true)]
async fn a_snapshot_says_what_can_be_taken_and_when_there_is_more() {
    for limiter in all() {
        for step in [0, 1, 100_000_000, 333_333_333, 333_333_334, 700_000_000, 1_500_000_000] {
            advance(nanos(step)).await;
            let seen = limiter.snapshot();
            assert_eq!((seen.remaining(), seen.limit()), (limiter.peek(), limiter.snapshot().limit()));
            assert_eq!(seen.retry_after() == Some(Duration::ZERO), seen.remaining() > 0);
            if let Ok(remaining @ 1..) = u32::try_from(seen.remaining()) {
                limiter.try_take(remaining).unwrap();
            }
            assert_eq!(told(&*limiter, 1), seen.reset(), "{limiter:?}");
            assert_eq!(limiter.snapshot().retry_after(), Some(seen.reset()));
        }
    }
}

/// L17, also for clients that know seconds only.
#[tokio::test(start_paused = true)]
async fn waiting_the_seconds_that_are_told_always_suffices() {
    for limiter in all() {
        for (place, cost) in [1, 3, 2, 1, 3, 1, 2].into_iter().cycle().take(50).enumerate() {
            advance(ms(place as u64 * 37)).await;
            drain(&*limiter);
            let refusal = limiter.try_take(cost).unwrap_err();
            let fields = limiter.snapshot().fields().refused(&refusal);
            let (service, after) = (fields.service.unwrap(), fields.retry_after.unwrap());
            assert_eq!(LimitFields::from(&refusal).retry_after.map(|told| told.0 <= after.0), Some(true));
            // The draft wants no answer to send a client back before the effective window is over.
            assert!(service.remaining == 0 && service.reset.unwrap() <= after.0);
            advance(secs(service.reset.unwrap())).await;
            assert!(limiter.peek() > 0);
            advance(secs(after.0 - service.reset.unwrap())).await;
            limiter.try_take(cost).unwrap();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn fields_are_written_as_the_draft_says() {
    let odd = TokenBucket::per_second(1).burst(9).named("a \"quoted\\ näme\n").build().unwrap();
    let fields = odd.snapshot().fields();
    let mut policy = fields.policy.unwrap();
    assert_eq!(policy.to_string(), r#""a \"quoted\\ n?me?";q=9;w=9"#);
    assert_eq!(fields.service.unwrap().to_string(), r#""a \"quoted\\ n?me?";r=9;t=1"#);
    assert_eq!(fields.retry_after, None);
    policy.unit = Some("content-bytes".into());
    policy.quota = u64::MAX;
    policy.window = 0;
    assert_eq!(policy.to_string(), r#""a \"quoted\\ n?me?";q=999999999999999;qu="content-bytes";w=1"#);

    let month = Quota::per_month(10).wall_clock(SystemTime::UNIX_EPOCH + secs(1_709_164_800)).build().unwrap();
    month.try_take(10).unwrap();
    let fields = month.snapshot().fields();
    assert_eq!(fields.policy.unwrap().to_string(), r#""quota";q=10;w=2505600"#, "29 days");
    assert_eq!(fields.service.unwrap().to_string(), r#""quota";r=0;t=86400"#);
    assert_eq!(fields.retry_after.unwrap().to_string(), "86400");

    // RFC 4648, section 10.
    for (key, told) in [
        ("", "::"),
        ("f", ":Zg==:"),
        ("fo", ":Zm8=:"),
        ("foo", ":Zm9v:"),
        ("foob", ":Zm9vYg==:"),
        ("fooba", ":Zm9vYmE=:"),
    ] {
        let fields = month.snapshot().fields().partitioned(key);
        assert_eq!(fields.policy.unwrap().to_string(), format!(r#""quota";q=10;w=2505600;pk={told}"#));
    }
    policy.partition = Some(vec![0xfb, 0xff, 0xbf].into());
    assert!(policy.to_string().ends_with(";w=1;pk=:+/+/:"));

    let semaphore = Semaphore::permits(1).build().unwrap();
    let _held = semaphore.try_acquire().unwrap();
    let told = LimitFields::from(&semaphore.try_acquire().unwrap_err()).partitioned("one of two");
    assert_eq!(told.service.unwrap().to_string(), r#""semaphore";r=0;pk=:b25lIG9mIHR3bw==:"#);
    let fields = LimitFields::from(&semaphore.try_acquire().unwrap_err());
    assert_eq!(fields.service.unwrap().to_string(), r#""semaphore";r=0"#);
    assert_eq!((fields.policy, fields.retry_after), (None, None));
}

// ---------------------------------------------------------------------------------------------------------------------
// In the long run

/// A rival's waits in whole milliseconds gave the only caller 955 of 5000 a second.
#[tokio::test(start_paused = true)]
async fn a_leaky_bucket_keeps_its_rate_however_fast() {
    for (rate, calls) in [(7, 70), (999, 4995), (5000, 25_000), (40_000, 80_000)] {
        let bucket = LeakyBucket::per_second(rate).build().unwrap();
        bucket.try_take(1).unwrap();
        let start = Instant::now();
        for _ in 0..calls {
            bucket.acquire().await.unwrap().success();
        }
        let exact = secs(calls) / rate as u32;
        assert!(start.elapsed() >= exact.saturating_sub(ms(2)) && start.elapsed() <= exact + ms(2), "{rate}/s");
    }
}

#[tokio::test(start_paused = true)]
async fn a_leaky_bucket_spaces_by_what_a_call_costs() {
    let bucket = LeakyBucket::per_second(10).build().unwrap();
    let start = Instant::now();
    let mut times = Vec::new();
    for cost in [1, 5, 1, 2, 1] {
        bucket.acquire_many(cost).await.unwrap().success();
        times.push(start.elapsed());
    }
    assert_eq!(times, [0, 100, 600, 700, 900].map(ms));
}

/// L13.
#[tokio::test(start_paused = true)]
async fn twice_the_limit_passes_at_the_boundary_of_a_quota_and_not_of_a_window() {
    let wall = SystemTime::UNIX_EPOCH + ms(1_999_999);
    let quota = Quota::per_second(100).wall_clock(wall).build().unwrap();
    let window = SlidingWindow::per_second(100).build().unwrap();
    quota.try_take(100).unwrap();
    window.try_take(100).unwrap();
    advance(ms(1)).await;
    quota.try_take(100).unwrap();
    assert!(window.try_take(1).is_err());
}

#[tokio::test(start_paused = true)]
async fn what_a_quota_leaves_over_is_carried_over_up_to_its_bound() {
    let wall = SystemTime::UNIX_EPOCH + secs(86_400);
    let quota = Quota::per_day(10).carry_over(15).wall_clock(wall).build().unwrap();
    quota.try_take(4).unwrap();
    let mut seen = Vec::new();
    for _ in 0..3 {
        advance(secs(86_400)).await;
        seen.push(quota.peek());
    }
    assert_eq!(seen, [16, 25, 25]);
    quota.try_take(25).unwrap();
    assert_eq!(quota.try_take(25).unwrap_err().retry_after(), Some(secs(3 * 86_400)));
    assert!(matches!(quota.try_take(26).unwrap_err().reason(), Reason::CostAboveLimit { cost: 26, limit: 25 }));
}

#[tokio::test(start_paused = true)]
async fn a_quota_follows_the_calendar_of_its_place() {
    // 31 December 2023, 23:30 UTC.
    let wall = SystemTime::UNIX_EPOCH + secs(1_704_067_200 - 1800);
    let hour = secs(3600);
    let places = [
        (Quota::per_month(1), ms(1_800_000)),
        (Quota::per_month(1).east_of_utc(hour), hour * (31 * 48 - 1) / 2),
        (Quota::per_month(1).west_of_utc(5 * hour), 5 * hour + hour / 2),
        (Quota::per_day(1).east_of_utc(hour * 11 / 2), hour * 19),
        (Quota::per_hour(1), hour / 2),
        (Quota::per_minute(1), secs(60)),
    ];
    for (quota, exact) in places {
        let quota = quota.wall_clock(wall).build().unwrap();
        quota.try_take(1).unwrap();
        assert_eq!(told(&quota, 1), exact, "{quota:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_quota_from_first_use_begins_when_it_is_used() {
    let quota = Quota::from_first_use(2, secs(10)).build().unwrap();
    advance(secs(7)).await;
    quota.try_take(1).unwrap();
    advance(secs(6)).await;
    quota.try_take(1).unwrap();
    assert_eq!(told(&quota, 1), secs(4));
    advance(secs(4 + 3)).await;
    assert_eq!(quota.snapshot().reset(), secs(10), "the next has not begun");
    quota.try_take(2).unwrap();
    assert_eq!(told(&quota, 1), secs(10));
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
}

fn op() -> impl Strategy<Value = Op> {
    let wait = prop_oneof![Just(0), Just(1), 0..WINDOW, 0..3 * WINDOW, Just(WINDOW)];
    prop_oneof![
        4 => wait.prop_map(Op::Wait),
        2 => (1..=LIMIT).prop_map(Op::Take),
        4 => (1..=LIMIT).prop_map(Op::Come),
        1 => any::<usize>().prop_map(Op::Leave),
        6 => any::<usize>().prop_map(Op::Poll),
    ]
}

/// How many may go from one moment to another, both included, the last of which costs so much.
fn allowed(kind: usize, from: u64, to: u64, last: u32) -> u64 {
    let (time, limit) = (to - from, u64::from(LIMIT));
    match kind {
        0 => limit + (time * limit).div_ceil(WINDOW),
        // Paced, but for a timer's grain.
        1 => u64::from(last) + ((time + 2_000_000) * limit).div_ceil(WINDOW),
        2 if time < WINDOW => limit,
        3 if time <= WINDOW => limit + time * limit / WINDOW,
        // Windows begin half a second after the quota is built.
        4 if (from + WINDOW / 2) / WINDOW == (to + WINDOW / 2) / WINDOW => limit,
        // No more than two windows can touch a stretch that is shorter.
        4 | 5 if time < WINDOW => 2 * limit,
        _ => u64::MAX,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Laws: in no interval is more had at once than allowed; who waits is served in order; nobody passes a waiter by; a newcomer who
    /// finds nobody waiting and comes back when told is served; who leaves, leaves nothing behind.
    #[test]
    fn whatever_happens_the_bound_and_the_order_hold(
        kind in 0..KINDS, ops in proptest::collection::vec(op(), 0..80),
    ) {
        let clock = Clock::paused();
        let _entered = clock.enter();
        let limiter = limiter(kind, 1000);
        let start = Instant::now();
        let elapsed = || start.elapsed().as_nanos() as u64;
        let mut waiters: Vec<(u32, Pin<Box<Acquire>>)> = Vec::new();
        let mut granted: Vec<(u64, u32)> = Vec::new();
        for op in ops {
            match op {
                Op::Wait(time) => clock.advance(nanos(time)),
                Op::Take(cost) => match limiter.try_take(cost) {
                    Ok(()) => {
                        prop_assert_eq!(limiter.queued(), 0, "nobody passes a waiter by");
                        granted.push((elapsed(), cost));
                    }
                    Err(refusal) if waiters.is_empty() => {
                        clock.advance(refusal.retry_after().unwrap());
                        prop_assert!(limiter.try_take(cost).is_ok());
                        granted.push((elapsed(), cost));
                    }
                    Err(_) => {}
                },
                Op::Come(cost) => {
                    let mut waiter = Box::pin(limiter.acquire_many(cost));
                    match Flag::default().poll(waiter.as_mut()) {
                        Poll::Pending => waiters.push((cost, waiter)),
                        Poll::Ready(end) => {
                            prop_assert!(end.is_ok() && limiter.queued() == 0);
                            granted.push((elapsed(), cost));
                        }
                    }
                }
                Op::Leave(which) if !waiters.is_empty() => drop(waiters.remove(which % waiters.len())),
                Op::Poll(which) if !waiters.is_empty() => {
                    // Where calls go out one at a time, those that come late are behind those that came.
                    let place = if kind == 1 { 0 } else { which % waiters.len() };
                    if let Poll::Ready(end) = Flag::default().poll(waiters[place].1.as_mut()) {
                        prop_assert!(end.is_ok());
                        let cost = waiters.remove(place).0;
                        if kind == 1 {
                            granted.push((elapsed(), cost));
                        }
                        for (_, mut before) in waiters.drain(..place) {
                            let polled = Flag::default().poll(before.as_mut());
                            prop_assert!(matches!(polled, Poll::Ready(Ok(_))), "served out of turn");
                        }
                    }
                }
                Op::Leave(_) | Op::Poll(_) => {}
            }
            prop_assert!(limiter.queued() as usize <= waiters.len());
            prop_assert!(limiter.peek() <= limiter.snapshot().limit());
        }
        for (place, (from, _)) in granted.iter().enumerate() {
            let mut sum = 0;
            for (to, cost) in &granted[place..] {
                sum += u64::from(*cost);
                let allowed = allowed(kind, *from, *to, *cost);
                prop_assert!(sum <= allowed, "{} of {} in {} ns", sum, allowed, to - from);
            }
        }
        // Whoever still waits gets it, one after the other.
        for (_, mut waiter) in waiters {
            // Where calls go out one at a time, one that comes late is let out behind those that came.
            let rounds = if kind == 1 { 40 } else { 1 };
            let served = (0..rounds).any(|_| {
                clock.advance(secs(2));
                matches!(Flag::default().poll(waiter.as_mut()), Poll::Ready(Ok(_)))
            });
            prop_assert!(served);
        }
    }

    /// Who waits, and a newcomer behind them, goes when that was told, also if others owe by then or have given back.
    #[test]
    fn whatever_is_settled_or_given_back_nobody_misses_its_turn(
        kind in 0..KINDS, carried in any::<bool>(), ops in proptest::collection::vec((op(), 0_u32..15), 0..60),
    ) {
        let clock = Clock::paused();
        let _entered = clock.enter();
        let limiter: Box<dyn Limiter> = match kind {
            4 if carried => Box::new(Quota::per_second(LIMIT.into()).carry_over(4).build().unwrap()),
            kind => limiter(kind, 1000),
        };
        let (mut guards, mut waiters) = (Vec::new(), Vec::new());
        for (op, number) in ops {
            match op {
                Op::Wait(time) => clock.advance(nanos(time)),
                Op::Take(cost) => guards.extend(limiter.try_acquire_many(cost)),
                Op::Come(cost) => {
                    let mut waiter = Box::pin(limiter.acquire_many(cost));
                    match Flag::default().poll(waiter.as_mut()) {
                        Poll::Pending => waiters.push(waiter),
                        Poll::Ready(end) => guards.push(end.unwrap()),
                    }
                }
                Op::Leave(which) if !waiters.is_empty() => drop(waiters.remove(which % waiters.len())),
                Op::Poll(which) if !guards.is_empty() => {
                    let which = which % guards.len();
                    guards[which].settle(number);
                }
                Op::Poll(_) => limiter.refund(number / 7),
                Op::Leave(_) => {}
            }
        }
        // Those that were granted something while they were not polled fetch it.
        waiters.retain_mut(|waiter| match Flag::default().poll(waiter.as_mut()) {
            Poll::Pending => true,
            Poll::Ready(end) => {
                guards.push(end.unwrap());
                false
            }
        });
        let start = Instant::now();
        // None if it went at once.
        let told = limiter.try_take(1).err().and_then(|refusal| refusal.retry_after()).unwrap_or_default();
        let late = ms(2) * (waiters.len() as u32 + 1);
        for waiter in waiters {
            let served = clock.block_on(async { tokio::time::timeout(secs(86_400), waiter).await });
            served.expect("it is woken in time").unwrap().success();
        }
        prop_assert!(start.elapsed() <= told + late, "{:?} for {:?}", start.elapsed(), told);
        clock.advance((told + late).saturating_sub(start.elapsed()));
        prop_assert!(told.is_zero() || limiter.try_take(1).is_ok(), "{:?} after {:?}", limiter, told);
    }
}

/// What had been foreseen for a waiter that is served was kept while others took at once, and told the next ones a time at
/// which nothing was there.
#[test]
fn what_was_foreseen_for_a_waiter_is_forgotten_when_others_take_at_once() {
    for phase in 0..20 {
        let clock = Clock::paused();
        let _entered = clock.enter();
        let window = SlidingWindow::per_second(3).estimated().build().unwrap();
        clock.advance(ms(50 * phase));
        window.try_take(3).unwrap();
        let mut one = Box::pin(window.acquire_many(1));
        assert!(Flag::default().poll(one.as_mut()).is_pending());
        assert!(window.try_take(1).is_err(), "somebody waits");
        clock.advance(ms(1476));
        let _ = window.try_take(1);
        let mut two = Box::pin(window.acquire_many(2));
        if Flag::default().poll(two.as_mut()).is_ready() {
            continue;
        }
        let start = Instant::now();
        let told = window.try_take(1).unwrap_err().retry_after().unwrap();
        clock.block_on(two).unwrap().success();
        clock.advance((told + ms(2)).saturating_sub(start.elapsed()));
        assert!(window.try_take(1).is_ok(), "phase {phase}: it came when it was told, after {told:?}");
    }
}

/// A bucket of a thousand a second told its clients one a second, and a request that was too large by itself that nothing
/// was left.
#[tokio::test(start_paused = true)]
async fn fields_tell_the_rate_and_not_the_burst_and_no_more_than_is_known() {
    let bucket = TokenBucket::per_second(1000).burst(1).build().unwrap();
    assert_eq!(bucket.snapshot().fields().policy.unwrap().to_string(), r#""bucket";q=1000;w=1"#);
    let large = bucket.try_take(2).unwrap_err();
    assert!(matches!(large.reason(), Reason::CostAboveLimit { .. }));
    let fields = LimitFields::from(&large);
    assert!(fields.service.is_none_or(|service| !service.to_string().contains("r=0")), "one token is there");
}

/// What had been foreseen for those who wait was in the time of the clock that was ahead, and told others an hour.
#[test]
fn a_clock_that_was_ahead_is_forgotten_with_what_was_foreseen_by_it() {
    let window = SlidingWindow::per_second(1).build().unwrap();
    let (ahead, behind) = (Clock::paused(), Clock::paused());
    ahead.advance(secs(3600));
    let entered = ahead.enter();
    window.try_take(1).unwrap();
    let mut waiting: Vec<_> = (0..3).map(|_| Box::pin(window.acquire())).collect();
    for waiter in &mut waiting {
        assert!(Flag::default().poll(waiter.as_mut()).is_pending());
    }
    drop(entered);
    let entered = behind.enter();
    let after = window.try_take(1).unwrap_err().retry_after().unwrap();
    assert!(after <= secs(5), "{after:?}");
    drop(entered);
    let _entered = ahead.enter();
    drop(waiting);
}

/// A grant that was fetched late was charged twice, and the waiter stood first again with no end to its wait.
#[tokio::test(start_paused = true)]
async fn a_late_poll_of_a_leaky_bucket_costs_one_place_and_keeps_its_longest_wait() {
    let bucket = LeakyBucket::per_second(10).build().unwrap();
    let late = next_at(&bucket);
    advance(ms(105)).await;
    assert!(poll_immediate(late).await.unwrap().is_ok(), "its turn has come, and nobody else's");
    assert_eq!(bucket.try_take(1).unwrap_err().retry_after(), Some(ms(100)));

    let bucket = LeakyBucket::per_second(10).max_wait(ms(250)).build().unwrap();
    bucket.try_take(1).unwrap();
    let mut waiting: Vec<_> = (0..2).map(|_| Box::pin(bucket.acquire())).collect();
    for waiter in &mut waiting {
        assert!(Flag::default().poll(waiter.as_mut()).is_pending());
    }
    // Both are due. The second comes first, and takes the place that is there; the first would be let out too late.
    advance(ms(205)).await;
    assert!(poll_immediate(waiting.remove(1)).await.unwrap().is_ok());
    let first = waiting.remove(0);
    let start = Instant::now();
    assert_eq!(first.await.unwrap_err().reason(), Reason::TooLate);
    assert!(start.elapsed() <= ms(50), "{:?}", start.elapsed());
}

/// Lets a hundred through that are polled late: each time the runtime has been busy for `step`, and in addition for `holds`
/// after each that goes. Returns when they went.
fn late_departures(
    bucket: &LeakyBucket,
    clock: &Clock,
    step: Duration,
    holds: Duration,
    newest_first: bool,
) -> Vec<Duration> {
    let mut waiting: Vec<_> = (0..100).map(|_| (Box::pin(bucket.acquire()), Flag::default())).collect();
    for (waits, flag) in &mut waiting {
        assert!(flag.poll(waits.as_mut()).is_pending());
    }
    if newest_first {
        waiting.reverse();
    }
    let (start, mut went) = (Instant::now(), vec![Duration::ZERO]);
    while !waiting.is_empty() {
        assert!(start.elapsed() < secs(100), "{} are left", waiting.len());
        let woken: Vec<bool> = waiting.iter().map(|(_, flag)| flag.woken()).collect();
        clock.advance(step);
        let mut woken = woken.into_iter();
        waiting.retain_mut(|(waits, flag)| {
            if woken.next() != Some(true) {
                return true;
            }
            *flag = Flag::default();
            let Poll::Ready(end) = flag.poll(waits.as_mut()) else { return true };
            end.unwrap().success();
            went.push(start.elapsed());
            clock.advance(holds);
            false
        });
    }
    went
}

/// What was fetched late was taken anew each time, so that on a busy runtime nobody was let through at all.
#[test]
fn a_leaky_bucket_keeps_its_rate_and_its_distance_on_a_busy_runtime() {
    let busy = [(8, 0), (25, 0), (1, 8), (1, 15), (3, 8), (3, 30)];
    for (per_second, (step, holds), newest_first) in [10_u32, 50, 100, 500, 5000]
        .into_iter()
        .flat_map(|rate| busy.map(|busy| [(rate, busy, false), (rate, busy, true)]))
        .flatten()
    {
        let clock = Clock::paused();
        let _entered = clock.enter();
        let bucket = LeakyBucket::per_second(per_second.into()).build().unwrap();
        bucket.try_take(1).unwrap();
        let went = late_departures(&bucket, &clock, ms(step), ms(holds), newest_first);
        let interval = secs(1) / per_second;
        // The timer fires up to a step late, the poll comes a step later.
        let slowest = interval + 2 * ms(step) + ms(holds) + ms(2);
        assert!(went[100] <= 100 * slowest, "{per_second} a second, busy for {step} and {holds} ms: {:?}", went[100]);
        if (per_second, step, holds) == (5000, 8, 0) {
            assert!(went[100] <= ms(200), "ten go each time, as many as the grain of timers holds: {:?}", went[100]);
        }
        for (place, from) in went.iter().enumerate() {
            for (more, to) in went[place..].iter().enumerate() {
                let span = to.saturating_sub(*from);
                let allowed = 1 + (span + ms(2)).as_nanos().div_ceil(interval.as_nanos());
                assert!((more as u128) < allowed, "{} in {span:?} at {per_second} a second", more + 1);
            }
        }
        assert_eq!(bucket.queued(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_set_of_a_bucket_changes_all_but_the_batch_or_nothing() {
    let bucket = TokenBucket::per_second(10).burst(4).build().unwrap();
    let fault = bucket.set(TokenBucket::per_second(20).burst(8).batch(4)).unwrap_err();
    assert!(fault.to_string().contains("batch must be 1") || fault.to_string().contains("batch must be 0"), "{fault}");
    assert_eq!((bucket.burst(), bucket.peek()), (4, 4));
    bucket.try_take(4).unwrap();
    bucket.set(TokenBucket::per_second(20).burst(8).max_queue(0)).unwrap();
    assert_eq!(bucket.acquire().await.unwrap_err().reason(), Reason::QueueFull, "nobody waits any more");
}

#[tokio::test(start_paused = true)]
async fn fields_of_a_refusal_name_the_limiter_that_refused_in_both_items() {
    let bucket = TokenBucket::per_second(2).burst(2).named("inner").build().unwrap();
    bucket.try_take(2).unwrap();
    assert_eq!(bucket.snapshot().window(), secs(1));
    let refusal = Refusal::new("outer", Reason::Busy);
    let fields = bucket.snapshot().fields().refused(&refusal);
    assert_eq!(fields.policy.unwrap().to_string(), r#""outer";q=2;w=1"#);
    assert!(fields.service.unwrap().to_string().starts_with(r#""outer";r=0"#));
}

/// Takes what is there, and waits for the next.
fn next_at(bucket: &LeakyBucket) -> Pin<Box<Acquire>> {
    bucket.try_take(1).unwrap();
    let mut waits = Box::pin(bucket.acquire());
    assert!(Flag::default().poll(waits.as_mut()).is_pending());
    waits
}

/// Waiters at a leaky bucket that have slept through their turns, all of whom have been polled since: one went.
fn late_waiters(bucket: &LeakyBucket, clock: &Clock, waiters: u32, after: Duration) -> Vec<(Pin<Box<Acquire>>, Flag)> {
    bucket.try_take(1).unwrap();
    let mut waiting: Vec<_> = (0..waiters).map(|_| (Box::pin(bucket.acquire()), Flag::default())).collect();
    for (waits, flag) in &mut waiting {
        assert!(flag.poll(waits.as_mut()).is_pending());
    }
    clock.advance(after);
    poll_all(&mut waiting);
    waiting
}

/// Polls all, and takes out those that are served: how many that were.
fn poll_all(waiting: &mut Vec<(Pin<Box<Acquire>>, Flag)>) -> usize {
    let before = waiting.len();
    waiting.retain_mut(|(waits, flag)| {
        *flag = Flag::default();
        match flag.poll(waits.as_mut()) {
            Poll::Ready(end) => _ = end.map(Guard::success),
            Poll::Pending => return true,
        }
        false
    });
    before - waiting.len()
}

/// Those that gave up stood in everybody's way for as long as they would have taken.
#[test]
fn late_waiters_that_give_up_leave_nothing_behind() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    let bucket = LeakyBucket::per_second(100).build().unwrap();
    let mut waiting = late_waiters(&bucket, &clock, 1000, secs(11));
    assert_eq!(waiting.len(), 999);
    let told = |bucket: &LeakyBucket| bucket.try_take(1).unwrap_err().retry_after().unwrap();
    assert_eq!(told(&bucket), secs(10), "behind all of them");
    for _ in 0..3 {
        assert_eq!(poll_all(&mut waiting), 0);
    }
    assert_eq!(told(&bucket), secs(10), "however often they ask");
    drop(waiting.remove(0));
    assert!(waiting[0].1.woken(), "its turn comes earlier");
    waiting.truncate(499);
    assert_eq!(told(&bucket), secs(5));
    drop(waiting);
    assert_eq!(bucket.try_take(1).unwrap_err().retry_after(), Some(ms(10)));

    let bucket = LeakyBucket::per_second(100).max_wait(secs(12)).build().unwrap();
    let mut waiting = late_waiters(&bucket, &clock, 1000, secs(11));
    while !waiting.is_empty() {
        clock.advance(ms(5));
        poll_all(&mut waiting);
    }
    assert!(bucket.try_take(1).unwrap_err().retry_after().unwrap() <= ms(10), "those that were refused don't count");
}

#[test]
fn late_waiters_are_told_anew_when_the_rate_changes() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    let bucket = LeakyBucket::at(Rate::new(1, secs(60))).build().unwrap();
    let mut waiting = late_waiters(&bucket, &clock, 5, secs(400));
    assert_eq!(waiting.len(), 4);
    bucket.set_rate(Rate::per_second(1000)).unwrap();
    let start = Instant::now();
    while !waiting.is_empty() {
        assert!(start.elapsed() < ms(50), "{} still wait", waiting.len());
        clock.advance(ms(2));
        let at = waiting.iter().position(|(_, flag)| flag.woken());
        if let Some(mut woken) = at.map(|at| vec![waiting.remove(at)]) {
            poll_all(&mut woken);
            waiting.append(&mut woken);
        }
    }
}

/// With a grant that nobody fetched, what came back was lost.
#[test]
fn what_comes_back_to_a_leaky_bucket_counts_also_while_somebody_does_not_come() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    let bucket = LeakyBucket::per_second(1).build().unwrap();
    let mut absent = next_at(&bucket);
    clock.advance(secs(100));
    bucket.try_take(100).unwrap();
    bucket.refund(99);
    assert_eq!(bucket.try_take(1).unwrap_err().retry_after(), Some(secs(1)));
    clock.advance(secs(1));
    let mut guard = bucket.try_acquire_many(100).unwrap();
    guard.settle(1);
    guard.success();
    assert_eq!(bucket.try_take(1).unwrap_err().retry_after(), Some(secs(1)));
    clock.advance(secs(1));
    let mut guard = bucket.try_acquire().unwrap();
    guard.settle(100);
    guard.success();
    clock.advance(secs(50));
    assert!(Flag::default().poll(absent.as_mut()).is_pending(), "what is owed is paid first, also by who is late");
}

/// The head was woken when it had been told, although it could go earlier since another had left.
#[test]
fn the_head_is_woken_when_one_that_was_granted_tokens_leaves() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    let bucket = TokenBucket::per_second(1).burst(10).build().unwrap();
    bucket.try_take(10).unwrap();
    let mut leaves = Box::pin(bucket.acquire_many(5));
    assert!(Flag::default().poll(leaves.as_mut()).is_pending());
    let (mut head, flag) = (Box::pin(bucket.acquire_many(10)), Flag::default());
    assert!(flag.poll(head.as_mut()).is_pending());
    clock.advance(secs(5));
    assert_eq!(bucket.queued(), 2);
    let _serves = bucket.try_take(1);
    assert_eq!(bucket.queued(), 1);
    drop(leaves);
    assert!(flag.woken());
    let start = Instant::now();
    assert!(clock.block_on(head).is_ok() && start.elapsed() <= secs(5));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Law: each call keeps the distance to the one before that its cost asks for, less the grain of timers, however
    /// late waiters are polled and whoever leaves.
    #[test]
    fn calls_of_any_cost_keep_their_distance_at_a_leaky_bucket(
        per_second in prop_oneof![Just(1_u64), Just(50), Just(100), Just(5000)],
        ops in proptest::collection::vec((0_u8..6, 0_usize..8, 1_u32..40, 0_u64..120), 1..80),
    ) {
        let clock = Clock::paused();
        let _entered = clock.enter();
        let bucket = LeakyBucket::per_second(per_second).max_wait(secs(20)).build().unwrap();
        let interval = 1_000_000_000 / per_second;
        let start = Instant::now();
        let mut waiting: Vec<(u32, Pin<Box<Acquire>>)> = Vec::new();
        // When the next may go.
        let mut next = 0_u64;
        for (op, which, cost, wait) in ops {
            let mut went = None;
            match op {
                0 => clock.advance(ms(wait)),
                1 => clock.advance(nanos(wait * interval / 7)),
                2 => went = bucket.try_take(cost).is_ok().then_some(cost),
                3 => {
                    let mut waits = Box::pin(bucket.acquire_many(cost));
                    match Flag::default().poll(waits.as_mut()) {
                        Poll::Pending => waiting.push((cost, waits)),
                        Poll::Ready(end) => went = end.is_ok().then_some(cost),
                    }
                }
                4 if !waiting.is_empty() => drop(waiting.remove(which % waiting.len())),
                5 if !waiting.is_empty() => {
                    let place = which % waiting.len();
                    if let Poll::Ready(end) = Flag::default().poll(waiting[place].1.as_mut()) {
                        let (cost, _) = waiting.remove(place);
                        went = end.is_ok().then_some(cost);
                    }
                }
                _ => {}
            }
            if let Some(cost) = went {
                let now = start.elapsed().as_nanos() as u64;
                prop_assert!(next <= now + 10, "{} ns early", next - now);
                next = next.max(now.saturating_sub(2_000_000)) + u64::from(cost) * interval;
            }
        }
    }
}

/// G6: wakers are user code. Whatever finds that a waiter is due wakes it with no lock held, and drops its waker so.
#[test]
fn a_waker_may_come_back_to_the_limiter_whoever_wakes_it() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    for trigger in 0..8 {
        for limiter in all() {
            drain(&*limiter);
            let woken = Arc::new(AtomicU32::new(0));
            let looks = || {
                let (handle, woken) = (limiter.handle(), woken.clone());
                nosy(move || _ = woken.fetch_add(1 + handle(), Ordering::Relaxed))
            };
            let mut waiting: Vec<_> = (0..4).map(|_| Box::pin(limiter.acquire_many(1))).collect();
            for waits in &mut waiting {
                for _ in 0..2 {
                    // The waker of before is dropped.
                    assert!(waits.as_mut().poll(&mut Context::from_waker(&looks())).is_pending());
                }
            }
            let mut other = Box::pin(limiter.acquire_many(1));
            assert!(other.as_mut().poll(&mut Context::from_waker(&looks())).is_pending());
            if trigger < 7 {
                clock.advance(secs(3));
            }
            woken.store(0, Ordering::Relaxed);
            match trigger {
                0 => _ = limiter.try_take(1),
                1 => _ = Flag::default().poll(Box::pin(limiter.acquire_many(1)).as_mut()),
                2 => _ = Flag::default().poll(other.as_mut()),
                3 => drop(waiting.pop()),
                4 => limiter.refund(1),
                5 => _ = limiter.peek(),
                6 => _ = limiter.snapshot(),
                _ => waiting.clear(),
            }
            assert!(woken.load(Ordering::Relaxed) > 0, "{limiter:?} {trigger}");
        }
    }
}

/// A queue of a limiter whose rate falls sends away those that would wait too long, and tells the next.
#[tokio::test(start_paused = true)]
async fn the_bounds_of_a_queue_change_with_a_set_of_the_bucket() {
    let bucket = TokenBucket::per_second(10).burst(1).build().unwrap();
    bucket.try_take(1).unwrap();
    bucket.set(TokenBucket::per_second(10).burst(1).max_wait(ms(50))).unwrap();
    assert_eq!(bucket.acquire().await.unwrap_err().reason(), Reason::TooLate);
}

#[test]
fn a_quota_tells_its_limit() {
    assert_eq!(Quota::per_day(12_345).build().unwrap().limit(), 12_345);
}

/// Each kind was closed for an hour in all other runtimes.
#[test]
fn a_limiter_that_a_clock_from_ahead_has_emptied_fills_again_by_the_clock_that_is_behind() {
    let (ahead, behind) = (Clock::paused(), Clock::paused());
    ahead.advance(secs(3600));
    for limiter in all() {
        ahead.block_on(async { drain(&*limiter) });
        let _entered = behind.enter();
        assert!(limiter.try_take(1).is_err(), "{limiter:?}: what was taken counts as taken now");
        behind.advance(secs(2));
        assert!(limiter.try_take(1).is_ok(), "{limiter:?}");
    }
}

/// What comes back to a log is the oldest that still counts.
#[tokio::test(start_paused = true)]
async fn what_has_expired_does_not_come_back_to_a_window() {
    let window = SlidingWindow::per_second(10).build().unwrap();
    window.try_take(3).unwrap();
    advance(ms(500)).await;
    window.try_take(5).unwrap();
    advance(ms(700)).await;
    window.refund(3);
    assert_eq!(window.peek(), 8);
}

/// Threads read the clock at slightly different times, which is no other clock.
#[test]
fn a_clock_that_is_a_little_behind_dates_nothing_back() {
    let (ahead, behind) = (Clock::paused(), Clock::paused());
    ahead.advance(ms(500));
    let window = SlidingWindow::per_second(3).build().unwrap();
    ahead.block_on(async { window.try_take(3).unwrap() });
    let _entered = behind.enter();
    assert!(window.try_take(1).is_err());
    behind.advance(ms(1200));
    assert!(window.try_take(1).is_err(), "what was taken at 0.5 s counts until 1.5 s");
    behind.advance(ms(400));
    assert!(window.try_take(1).is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_log_takes_a_limit_of_65_536_and_no_more() {
    let window = SlidingWindow::per_second(65_536).build().unwrap();
    assert!(window.is_exact() && SlidingWindow::per_second(65_537).build().is_err());
    window.set_rate(Rate::per_second(65_536)).unwrap();
    assert!(window.set_rate(Rate::per_second(65_537)).is_err());
}

#[tokio::test(start_paused = true)]
async fn large_settlements_up_and_down_leave_a_window_as_it_was() {
    for window in [SlidingWindow::per_second(10), SlidingWindow::per_second(10).exact_up_to(0)] {
        let window = window.build().unwrap();
        let mut guards: Vec<_> = (0..3).map(|_| window.try_acquire().unwrap()).collect();
        for guard in &mut guards {
            guard.settle(u32::MAX);
            guard.settle(u32::MAX - 1);
            guard.settle(u32::MAX);
        }
        for guard in &mut guards {
            guard.settle(1);
        }
        assert_eq!(window.peek(), 7, "{window:?}");
    }
}

/// A change of anything made a newcomer pass by a waiter that was granted its place and not polled yet.
#[test]
fn who_was_granted_a_place_keeps_it_whatever_changes_before_it_is_polled() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    for change in 0..4 {
        let bucket = LeakyBucket::per_second(1).build().unwrap();
        let mut first = next_at(&bucket);
        let mut second = Box::pin(bucket.acquire());
        assert!(Flag::default().poll(second.as_mut()).is_pending());
        clock.advance(secs(1));
        assert!(bucket.try_take(1).is_err(), "this grants the first its place");
        match change {
            0 => bucket.refund(0),
            1 => bucket.set_rate(Rate::per_second(1)).unwrap(),
            2 => drop(Box::pin(bucket.acquire())),
            _ => _ = bucket.try_take_at(1, resile::Moment::from(Instant::now() - nanos(1000))),
        }
        assert_eq!(bucket.peek(), 0);
        assert!(bucket.try_take(1).is_err(), "{change}");
        assert!(Flag::default().poll(second.as_mut()).is_pending(), "{change}");
        assert!(Flag::default().poll(first.as_mut()).is_ready(), "{change}");
        clock.advance(secs(1));
        assert!(Flag::default().poll(second.as_mut()).is_ready(), "{change}");
    }
}

/// Its moments were those of the other clock, and nobody was let in until then.
#[test]
fn a_schedule_made_by_a_clock_that_is_ahead_is_dated_back_with_the_rest() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    let bucket = LeakyBucket::per_second(1).build().unwrap();
    let granted = next_at(&bucket);
    clock.advance(secs(1));
    assert!(bucket.try_take(1).is_err());
    let _far = bucket.try_take_at(1, resile::Moment::now() + secs(3600));
    let told = bucket.try_take(1).unwrap_err().retry_after().unwrap();
    assert!(told <= secs(3), "{told:?}");
    let start = Instant::now();
    clock.block_on(granted).unwrap().success();
    clock.block_on(bucket.acquire()).unwrap().success();
    assert!(start.elapsed() <= secs(4), "{:?}", start.elapsed());
}

#[test]
fn who_is_alone_and_was_granted_a_place_is_passed_by_by_nobody() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    let bucket = LeakyBucket::per_second(1).build().unwrap();
    let mut waits = next_at(&bucket);
    clock.advance(secs(1));
    for _ in 0..3 {
        assert!(bucket.try_take(1).is_err());
    }
    assert!(Flag::default().poll(waits.as_mut()).is_ready());
}

/// A refusal for a deadline names the deadline's time, one for the limiter's longest wait that.
#[tokio::test(start_paused = true)]
async fn a_refusal_says_which_wait_was_too_long() {
    let bucket = TokenBucket::per_second(1).burst(1).max_wait(secs(5)).build().unwrap();
    let policy = Policy::named("told").gate(bucket.clone()).build().unwrap();
    bucket.try_take(1).unwrap();
    let error = policy.call().deadline(ms(50)).run(|| ready(Ok::<_, ()>(()))).await.unwrap_err().to_string();
    assert!(error.contains("50ms") && !error.contains("max_wait"), "{error}");
    let error = policy.call().cost(1).deadline(secs(60)).run(|| ready(Ok::<_, ()>(())));
    let rest: Vec<_> = (0..5).map(|_| Box::pin(bucket.acquire())).collect();
    for mut waits in rest {
        assert!(Flag::default().poll(waits.as_mut()).is_pending());
        std::mem::forget(waits);
    }
    let error = error.await.unwrap_err().to_string();
    assert!(error.contains("max_wait 5s"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn tokens_taken_at_another_rate_do_not_come_back() {
    let bucket = TokenBucket::per_second(10).burst(10).build().unwrap();
    let semaphore = Semaphore::permits(5).build().unwrap();
    let _permits = semaphore.try_acquire_many(5).unwrap();
    let policy = Policy::named("queued").gate(bucket.clone()).gate(semaphore).build().unwrap();
    let mut call = Box::pin(policy.call().cost(5).run(|| ready(Ok::<_, ()>(()))));
    assert!(poll_immediate(call.as_mut()).await.is_none());
    advance(nanos(1)).await;
    bucket.set_rate(Rate::per_second(20)).unwrap();
    drop(call);
    assert_eq!(bucket.peek(), 5);
}

/// What is owed lies far ahead, and is not taken for another clock's.
#[tokio::test(start_paused = true)]
async fn a_debt_outlives_a_change_of_the_rate() {
    let bucket = TokenBucket::per_second(10).burst(1).build().unwrap();
    let mut guard = bucket.try_acquire().unwrap();
    guard.settle(1000);
    guard.success();
    bucket.set_rate(Rate::per_second(20)).unwrap();
    for _ in 0..2 {
        let told = bucket.try_take(1).unwrap_err().retry_after().unwrap();
        assert!(told > secs(49) && told < secs(51), "{told:?}");
    }
}

/// With one granted and not there, what is charged and what comes back moves the turns of those that come then.
#[test]
fn turns_behind_one_that_does_not_come_move_with_what_is_settled() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    let bucket = LeakyBucket::per_second(1).build().unwrap();
    let absent = next_at(&bucket);
    clock.advance(secs(1));
    assert!(bucket.try_take(1).is_err(), "it is granted");
    clock.advance(secs(1));
    let told = || bucket.try_take(1).unwrap_err().retry_after().unwrap();
    let mut guard = bucket.try_acquire().unwrap();
    assert_eq!(told(), secs(1));
    guard.settle(4);
    assert_eq!(told(), secs(4));
    guard.settle(2);
    assert_eq!(told(), secs(2));
    drop(absent);
    assert_eq!(told(), secs(2), "it had taken nothing");
    drop(guard);
}

/// What was granted to a waiter that went without it is there for others, of every kind that had taken it.
#[test]
fn what_was_granted_and_never_fetched_comes_back() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    for limiter in all() {
        drain(&*limiter);
        let mut leaves: Vec<_> = (0..3).map(|_| Box::pin(limiter.acquire_many(1))).collect();
        for waits in &mut leaves {
            assert!(Flag::default().poll(waits.as_mut()).is_pending());
        }
        while limiter.queued() > 0 {
            clock.advance(ms(50));
            let _grants = limiter.peek();
        }
        let before = limiter.peek();
        drop(leaves);
        assert!(limiter.peek() > before, "{limiter:?}");
    }
}

/// What comes back to a bucket that is idle anyway, or a turn that has gone by, is nobody's turn that is still to come.
#[test]
fn who_was_granted_its_turn_in_time_keeps_it_whatever_comes_back() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    for refunds in [true, false] {
        let bucket = LeakyBucket::per_second(1).build().unwrap();
        bucket.try_take(1).unwrap();
        let mut waiting: Vec<_> = (0..2).map(|_| Box::pin(bucket.acquire())).collect();
        for waits in &mut waiting {
            assert!(Flag::default().poll(waits.as_mut()).is_pending());
        }
        if refunds {
            drop(waiting.remove(1));
            clock.advance(secs(1));
            assert_eq!(bucket.peek(), 0);
            bucket.refund(1);
        } else {
            clock.advance(secs(2));
            assert_eq!(bucket.peek(), 0);
            drop(waiting.remove(0));
        }
        assert!(bucket.try_take(1).is_err(), "{refunds}: it is another's turn");
        let mut own = waiting.remove(0);
        assert!(Flag::default().poll(own.as_mut()).is_ready(), "{refunds}");
    }
}
