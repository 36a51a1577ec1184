//! Time limits: which one counts, when it fires, what the operation sees of it, and what can't starve or overflow it.

mod support;

use std::cell::Cell;
use std::convert::Infallible;
use std::future::{Future, pending, ready};
use std::pin::pin;
use std::sync::{Arc, Barrier, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures::future::{join, poll_immediate};
use resile::{
    Attempt, Call, CallBuilder, CircuitBreaker, Deadline, Entry, Error, ErrorKind, FutureExt, Gate, Limit, Moment,
    Outcome, Pass, Policy, Reason, Retry, Semaphore, State, Stop, TokenBucket, Verdict,
};
use support::hand::{Clock, poll_once};
use tokio::time::{Instant, advance, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

const YEAR: Duration = Duration::from_secs(365 * 86_400);

const fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

fn limited(limit: Duration) -> Policy {
    Policy::named("limited").timeout(limit).build().unwrap()
}

async fn never() -> Result<(), Infallible> {
    pending().await
}

async fn takes(time: Duration) -> Result<(), Infallible> {
    sleep(time).await;
    Ok(())
}

/// What is left of a call's time, and when it ends.
type Seen = (Duration, Option<Instant>);

/// Lets everybody in, and notes what it sees of each call and how that ended.
#[derive(Clone, Default)]
struct Notes {
    seen: Arc<Mutex<Vec<Seen>>>,
    ends: Arc<Mutex<Vec<Outcome>>>,
}

impl Notes {
    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    fn ends(&self) -> Vec<Outcome> {
        self.ends.lock().unwrap().clone()
    }
}

impl Gate for Notes {
    fn enter(&self, call: &Call) -> Entry {
        self.seen.lock().unwrap().push((call.remaining(), call.deadline()));
        Entry::Pass(Pass::default())
    }

    fn leave(&self, _: Pass, outcome: Outcome) {
        self.ends.lock().unwrap().push(outcome);
    }
}

/// One sleep would be over after thirty years, the most that tokio's wheel holds.
async fn forty_years() {
    for _ in 0..40 {
        sleep(YEAR).await;
    }
}

/// T1: tokio would fire after about thirty years.
#[tokio::test(start_paused = true)]
async fn a_limit_of_the_longest_duration_is_none() {
    let start = Instant::now();
    let call = || async {
        forty_years().await;
        Ok::<_, Infallible>(())
    };
    limited(Duration::MAX).run(call).await.unwrap();
    assert!(start.elapsed() >= YEAR * 40);
}

#[tokio::test(start_paused = true)]
async fn a_callers_deadline_of_the_longest_duration_is_none() {
    let policy = Policy::named("unlimited").build().unwrap();
    let left = policy
        .call()
        .deadline(Duration::MAX)
        .run_with(|call| async move {
            forty_years().await;
            Ok::<_, Infallible>((call.remaining(), call.deadline()))
        })
        .await;
    assert_eq!(left.unwrap(), (Duration::MAX, None));
}

/// T1: a sleep within a millisecond of the largest instant panics.
#[tokio::test(start_paused = true)]
async fn limits_near_the_end_of_the_clock_neither_panic_nor_fire() {
    let absurd = [
        Duration::MAX,
        Duration::MAX.saturating_sub(Duration::from_nanos(1)),
        Duration::from_secs(u64::MAX),
        Duration::from_secs(i64::MAX.unsigned_abs()),
        Duration::from_nanos(u64::MAX),
        Duration::from_nanos(u64::MAX - 1),
        Duration::from_nanos(u64::MAX / 4 * 3),
        YEAR * 584,
        YEAR * 438,
        YEAR * 437,
    ];
    for limit in absurd {
        limited(limit).run(|| takes(ms(5))).await.unwrap();
        limited(Duration::MAX).call().deadline(limit).run(|| takes(ms(5))).await.unwrap();
        takes(ms(5)).within(limit).await.unwrap();
    }
}

/// T1, T10: a limit beyond what tokio's wheel holds is neither early nor lost.
#[tokio::test(start_paused = true)]
async fn a_limit_of_a_century_fires_after_a_century() {
    let start = Instant::now();
    let error = limited(YEAR * 100).run(never).await.unwrap_err();
    assert!(error.is_timeout());
    assert!((YEAR * 100..YEAR * 100 + ms(3)).contains(&start.elapsed()), "{:?}", start.elapsed());
}

/// T2: tokio's own rule, at every depth.
#[tokio::test(start_paused = true)]
async fn a_value_that_is_ready_when_the_limit_passes_wins() {
    limited(ms(100)).run(|| takes(ms(100))).await.unwrap();
    limited(Duration::MAX).call().deadline(ms(100)).run(|| takes(ms(100))).await.unwrap();
    let nested = Policy::named("nested").timeout(ms(100)).timeout(ms(100)).build().unwrap();
    nested.run(|| takes(ms(100))).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_value_that_is_ready_long_after_the_limit_still_wins_the_poll_that_sees_both() {
    let policy = limited(ms(100));
    let mut run = pin!(policy.run(|| takes(ms(50))));
    assert!(poll_immediate(run.as_mut()).await.is_none());
    advance(Duration::from_secs(3600)).await;
    assert!(matches!(poll_immediate(run).await, Some(Ok(()))));
}

#[tokio::test(start_paused = true)]
async fn a_deadline_of_zero_lets_through_what_is_ready_at_once() {
    limited(Duration::MAX).call().deadline(Duration::ZERO).run(|| ready(Ok::<_, Infallible>(()))).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_deadline_of_zero_cuts_what_is_not_ready_without_passing_time() {
    let start = Instant::now();
    let error = limited(Duration::MAX).call().deadline(Duration::ZERO).run(never).await.unwrap_err();
    assert_eq!((error.limit(), error.attempts()), (Some(Limit::Caller), 1));
    assert_eq!(start.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn with_a_deadline_in_the_past_no_operation_is_made() {
    advance(Duration::from_secs(10)).await;
    let past = Instant::now().checked_sub(Duration::from_secs(5)).unwrap();
    let policy = limited(Duration::from_secs(1));
    let start = Instant::now();
    let error = policy.call().deadline(past).run(|| ready(Ok::<_, Infallible>(()))).await.unwrap_err();
    assert_eq!((error.limit(), error.attempts()), (Some(Limit::Caller), 0));
    assert_eq!(start.elapsed(), Duration::ZERO);
}

/// T3: a timer inside of the cooperative budget would never be polled.
#[tokio::test(start_paused = true)]
async fn an_operation_that_spends_the_whole_budget_in_each_poll_still_times_out() {
    let task = tokio::spawn(limited(ms(10)).into_run(async || -> Result<(), Infallible> {
        loop {
            tokio::task::consume_budget().await;
        }
    }));
    // The greedy task is never idle, so the clock has to be pushed.
    for _ in 0..20 {
        advance(ms(1)).await;
    }
    assert!(task.is_finished());
    assert!(task.await.unwrap().unwrap_err().is_timeout());
}

#[tokio::test(start_paused = true)]
async fn an_operation_that_spends_the_whole_budget_in_each_poll_can_still_be_cancelled() {
    let token = CancellationToken::new();
    let call = Policy::named("greedy").build().unwrap().call().owned().cancel_on(&token).run(
        async || -> Result<(), Infallible> {
            loop {
                tokio::task::consume_budget().await;
            }
        },
    );
    let task = tokio::spawn(call);
    tokio::task::yield_now().await;
    token.cancel();
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
    assert!(task.is_finished());
    assert!(task.await.unwrap().unwrap_err().is_cancelled());
}

/// T5: the earliest one wins and is named, wherever it stands.
#[tokio::test(start_paused = true)]
async fn the_error_names_the_limit_that_passed_first() {
    let step = |step, limit| Some(Limit::Step { step, limit });
    let cases = [
        (ms(100), ms(300), None, step(1, ms(100))),
        (ms(300), ms(100), None, step(2, ms(100))),
        (ms(300), ms(200), Some(ms(100)), Some(Limit::Caller)),
        (ms(300), ms(100), Some(ms(200)), step(2, ms(100))),
        (ms(100), ms(300), Some(ms(200)), step(1, ms(100))),
        // Of equal ones the outermost counts.
        (ms(100), ms(100), None, step(1, ms(100))),
        (ms(100), ms(100), Some(ms(100)), Some(Limit::Caller)),
    ];
    for (outer, inner, caller, expected) in cases {
        let start = Instant::now();
        let policy = Policy::named("nested").timeout(outer).timeout(inner).build().unwrap();
        let call = policy.call().deadline(caller.unwrap_or(Duration::MAX));
        let error = call.run(never).await.unwrap_err();
        assert_eq!(error.limit(), expected);
        assert_eq!(start.elapsed(), ms(100));
    }
}

#[tokio::test(start_paused = true)]
async fn an_inner_policy_that_is_given_the_deadline_keeps_it() {
    let outer = limited(ms(100));
    let inner = limited(Duration::from_secs(1));
    let start = Instant::now();
    let error = outer
        .run_with(|call| inner.call().deadline(call.deadline().unwrap()).run(never))
        .await
        .unwrap_err()
        .into_inner()
        .expect("the inner error arrives in the poll in which the outer limit passes");
    assert_eq!((error.limit(), start.elapsed()), (Some(Limit::Caller), ms(100)));
}

#[tokio::test(start_paused = true)]
async fn a_limit_inside_of_a_retry_begins_anew_with_each_attempt() {
    let policy = Policy::named("attempts").retry(Retry::immediate().max_attempts(3)).timeout(ms(100)).build().unwrap();
    let start = Instant::now();
    let seen = Mutex::new(Vec::new());
    let error = policy
        .run_with(|call| {
            seen.lock().unwrap().push((call.attempt(), call.remaining()));
            never()
        })
        .await
        .unwrap_err();
    assert_eq!((error.kind(), error.attempts(), error.stop()), (ErrorKind::TimedOut, 3, Stop::Attempts));
    assert_eq!(error.limit(), Some(Limit::Step { step: 2, limit: ms(100) }));
    assert_eq!(*seen.lock().unwrap(), [(1, ms(100)), (2, ms(100)), (3, ms(100))]);
    assert_eq!(start.elapsed(), ms(300));
}

#[tokio::test(start_paused = true)]
async fn the_limit_of_one_attempt_does_not_cut_the_pause_after_it() {
    let policy = Policy::named("pause")
        .retry(Retry::constant(Duration::from_secs(5)).max_attempts(2))
        .timeout(ms(100))
        .build()
        .unwrap();
    let start = Instant::now();
    let done = policy.run_with(|call| async move { if call.is_retry() { Ok(()) } else { Err("reset") } }).await;
    assert_eq!(done.unwrap(), ());
    assert_eq!(start.elapsed(), Duration::from_secs(5));
}

/// T6: each way to end has a kind of its own, and gates hear which it was.
#[tokio::test(start_paused = true)]
async fn a_step_limit_a_callers_deadline_and_a_cancellation_are_told_apart() {
    let notes = Notes::default();
    let policy = Policy::named("ends").timeout(ms(100)).gate(notes.clone()).build().unwrap();
    let token = CancellationToken::new();

    let step = policy.run(never).await.unwrap_err();
    let caller = policy.call().deadline(ms(50)).run(never).await.unwrap_err();
    let mut run = pin!(policy.call().cancel_on(&token).run(never));
    assert!(poll_immediate(run.as_mut()).await.is_none());
    token.cancel();
    let cancelled = run.await.unwrap_err();

    assert_eq!((step.kind(), step.limit()), (ErrorKind::TimedOut, Some(Limit::Step { step: 1, limit: ms(100) })));
    assert_eq!((caller.kind(), caller.limit()), (ErrorKind::TimedOut, Some(Limit::Caller)));
    assert_eq!((cancelled.kind(), cancelled.limit()), (ErrorKind::Cancelled, None));
    let ends = notes.ends();
    assert!(matches!(ends[0], Outcome::Judged(Verdict::Transient(None), times) if times.elapsed() == ms(100)));
    assert!(matches!(ends[1], Outcome::Abandoned(times) if times.elapsed() == ms(50)));
    assert!(matches!(ends[2], Outcome::Abandoned(times) if times.elapsed() == Duration::ZERO));
}

#[tokio::test(start_paused = true)]
async fn a_cancellation_in_the_instant_of_the_limit_has_one_meaning_for_caller_and_gates() {
    let notes = Notes::default();
    let policy = Policy::named("both").timeout(ms(100)).gate(notes.clone()).build().unwrap();
    let token = CancellationToken::new();
    let mut run = pin!(policy.call().cancel_on(&token).run(never));
    assert!(poll_immediate(run.as_mut()).await.is_none());
    advance(ms(100)).await;
    token.cancel();
    let error = run.await.unwrap_err();
    assert_eq!((error.kind(), error.limit()), (ErrorKind::Cancelled, None));
    assert!(matches!(notes.ends()[..], [Outcome::Abandoned(_)]));
}

#[tokio::test(start_paused = true)]
async fn a_value_wins_over_a_cancellation_and_a_limit_in_the_same_poll() {
    let token = CancellationToken::new();
    let policy = limited(ms(100));
    let mut run = pin!(policy.call().cancel_on(&token).run(|| takes(ms(100))));
    assert!(poll_immediate(run.as_mut()).await.is_none());
    advance(ms(100)).await;
    token.cancel();
    run.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_timeout_of_the_operations_own_is_its_failure_and_not_the_policys() {
    let policy = limited(Duration::from_secs(1));
    let error = policy.run(|| tokio::time::timeout(ms(10), never())).await.unwrap_err();
    assert_eq!((error.kind(), error.limit()), (ErrorKind::Failed, None));
    assert!(error.last().is_some());
}

/// T8: whoever wins, the permit comes back.
#[tokio::test(start_paused = true)]
async fn a_permit_granted_in_the_instant_of_the_limit_is_used_or_goes_back() {
    for waiter_first in [true, false] {
        for ready_at_once in [true, false] {
            let semaphore = Semaphore::permits(1).build().unwrap();
            let policy = Policy::named("grant").timeout(ms(100)).gate(semaphore.clone()).build().unwrap();
            let held = semaphore.try_acquire().unwrap();
            let holder = async {
                sleep(ms(100)).await;
                drop(held);
            };
            let waiter = async {
                let operation = || async move { if ready_at_once { Ok::<_, Infallible>(()) } else { pending().await } };
                policy.run(operation).await
            };
            let end = if waiter_first { join(waiter, holder).await.0 } else { join(holder, waiter).await.1 };
            match end {
                Ok(()) => assert!(ready_at_once),
                Err(error) => assert!(error.is_timeout()),
            }
            assert_eq!((semaphore.available(), semaphore.queued()), (1, 0));
        }
    }
}

/// T8: the grant lay ready before the caller was polled, so it counts although the time is up.
#[tokio::test(start_paused = true)]
async fn a_grant_that_is_noticed_after_the_limit_makes_no_operation_and_no_failure() {
    let semaphore = Semaphore::permits(1).build().unwrap();
    let breaker = CircuitBreaker::builder().consecutive_failures(1).build().unwrap();
    let policy = Policy::named("grant").gate(breaker.clone()).timeout(ms(100)).gate(semaphore.clone()).build().unwrap();
    let held = semaphore.try_acquire().unwrap();
    let mut run = pin!(policy.run(|| ready(Ok::<_, Infallible>(7))));
    assert!(poll_immediate(run.as_mut()).await.is_none());
    advance(ms(150)).await;
    drop(held);
    let error = poll_immediate(run).await.unwrap().unwrap_err();
    assert_eq!((error.limit(), error.attempts()), (Some(Limit::Step { step: 2, limit: ms(100) }), 0));
    assert_eq!((breaker.state(), semaphore.available()), (State::Closed, 1));
}

/// The pause was over in time, and is noticed when the limit is over, too: the clock decides.
#[tokio::test(start_paused = true)]
async fn a_pause_that_is_noticed_after_the_limit_begins_no_attempt() {
    let policy = Policy::named("late").timeout(ms(100)).retry(Retry::constant(ms(10))).build().unwrap();
    let made = Cell::new(0);
    let mut run = pin!(policy.run(|| {
        made.set(made.get() + 1);
        ready(Err::<(), _>("down"))
    }));
    assert!(poll_immediate(run.as_mut()).await.is_none());
    advance(ms(150)).await;
    let error = poll_immediate(run).await.unwrap().unwrap_err();
    assert_eq!((error.limit(), made.get()), (Some(Limit::Step { step: 1, limit: ms(100) }), 1));
    assert_eq!(error.last(), Some(&"down"));
}

#[tokio::test(start_paused = true)]
async fn a_pause_that_is_noticed_late_is_asked_for_the_least_time_again() {
    let retry = Retry::constant(ms(10)).min_attempt(ms(50));
    let policy = Policy::named("late").timeout(ms(100)).retry(retry).build().unwrap();
    let mut run = pin!(policy.run(|| ready(Err::<(), _>("down"))));
    assert!(poll_immediate(run.as_mut()).await.is_none());
    advance(ms(60)).await;
    let error = poll_immediate(run).await.unwrap().unwrap_err();
    assert_eq!((error.refusal().unwrap().reason(), error.attempts()), (Reason::TooLate, 1));
    assert_eq!(error.last(), Some(&"down"));
}

/// Moves the paused clock within one poll, as code that blocks its thread moves the real one.
fn block_for(time: Duration) {
    assert!(pin!(advance(time)).poll(&mut Context::from_waker(Waker::noop())).is_pending());
}

/// All attempts are made in one poll, so what the clock said at its beginning is long over.
#[tokio::test(start_paused = true)]
async fn between_attempts_of_one_poll_the_limits_are_compared_with_the_clock() {
    let blocks = || {
        block_for(ms(10));
        ready(Err::<(), _>("down"))
    };
    let policy = Policy::named("busy").timeout(ms(50)).retry(Retry::immediate().max_attempts(50)).build().unwrap();
    let error = policy.run(blocks).await.unwrap_err();
    assert_eq!((error.attempts(), error.stop(), error.elapsed()), (5, Stop::Deadline, Some(ms(50))));

    for (most, attempts) in [(0, 1), (15, 2)] {
        let retry = Retry::immediate().max_attempts(1000).max_elapsed(ms(most));
        let error = Policy::named("busy").retry(retry).build().unwrap().run(blocks).await.unwrap_err();
        assert_eq!((error.attempts(), error.stop()), (attempts, Stop::Elapsed));
    }
}

#[tokio::test(start_paused = true)]
async fn an_error_tells_the_time_that_an_operation_took_in_its_first_poll() {
    for verdict in [Verdict::Transient(None), Verdict::Permanent, Verdict::Ignored] {
        let policy = limited(Duration::from_secs(1));
        let judged = policy.classify(|_: &Result<(), &str>| verdict);
        let error = judged
            .run(|| {
                block_for(ms(20));
                ready(Err("down"))
            })
            .await
            .unwrap_err();
        assert_eq!(error.elapsed(), Some(ms(20)), "{verdict:?}");
    }
}

/// T4: a loop around `poll` may never let the runtime park, which is when it fires its timers.
#[test]
fn a_limit_holds_in_a_runtime_that_never_fires_its_timers() {
    let clock = Clock::paused();
    let _here = clock.enter();
    let policy = limited(ms(100));
    let mut run = pin!(policy.run(never));
    assert!(poll_once(run.as_mut()).is_pending());
    block_for(ms(99));
    assert!(poll_once(run.as_mut()).is_pending());
    block_for(ms(1));
    let Poll::Ready(Err(error)) = poll_once(run.as_mut()) else { panic!("the limit has passed") };
    assert!(error.is_timeout());
}

#[tokio::test(start_paused = true)]
async fn a_token_that_is_due_in_the_instant_of_the_limit_is_had() {
    let bucket = TokenBucket::per_second(10).burst(1).build().unwrap();
    bucket.try_take(1).unwrap();
    let policy = Policy::named("token").timeout(ms(100)).gate(bucket).build().unwrap();
    policy.run(|| ready(Ok::<_, Infallible>(()))).await.unwrap();
}

/// T9.
#[tokio::test(start_paused = true)]
async fn a_limit_counts_from_the_first_poll() {
    let policy = limited(ms(100));
    let run = policy.run(|| takes(ms(90)));
    let call = policy.call().deadline(ms(100)).run(|| takes(ms(90)));
    let one_shot = takes(ms(90)).within(ms(100));
    advance(Duration::from_secs(3600)).await;
    run.await.unwrap();
    call.await.unwrap();
    one_shot.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_deadline_by_instant_counts_whenever_the_call_is_polled() {
    let policy = limited(Duration::from_secs(1));
    let run = policy.call().deadline(Instant::now() + ms(100)).run(|| takes(ms(90)));
    advance(ms(50)).await;
    let start = Instant::now();
    assert_eq!(run.await.unwrap_err().limit(), Some(Limit::Caller));
    assert_eq!(start.elapsed(), ms(50));
}

/// T10: up to one millisecond for rounding up, one more off the tick.
#[tokio::test(start_paused = true)]
async fn a_limit_never_fires_early_and_at_most_two_milliseconds_late() {
    let limits = [1, 999, 1_000, 500_000, 999_999, 1_000_000, 1_000_001, 1_500_000, 7_300_001, 123_456_789];
    for nanos in limits {
        for offset in [0, 1, 123_456, 999_999] {
            advance(Duration::from_nanos(offset)).await;
            let limit = Duration::from_nanos(nanos);
            let start = Instant::now();
            assert!(limited(limit).run(never).await.unwrap_err().is_timeout());
            let late = start.elapsed().checked_sub(limit).expect("fired early");
            assert!(late <= ms(2), "{limit:?} fired {late:?} late");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_that_is_polled_late_says_how_long_it_really_lasted() {
    let policy = limited(ms(100));
    let mut run = pin!(policy.run(never));
    assert!(poll_immediate(run.as_mut()).await.is_none());
    advance(Duration::from_secs(60)).await;
    let error = run.await.unwrap_err();
    assert_eq!(error.limit(), Some(Limit::Step { step: 1, limit: ms(100) }));
    assert_eq!(error.elapsed(), Some(Duration::from_secs(60)));
}

#[tokio::test(start_paused = true)]
async fn the_operation_sees_the_deadline_and_what_is_left_of_it() {
    let start = Instant::now();
    let policy = Policy::named("seen")
        .timeout(ms(1000))
        .retry(Retry::constant(ms(250)).max_attempts(3))
        .timeout(ms(600))
        .build()
        .unwrap();
    let seen = Mutex::new(Vec::new());
    let error = policy
        .run_with(|call| {
            seen.lock().unwrap().push((call.remaining(), call.deadline().unwrap() - start));
            ready(Err::<(), _>("down"))
        })
        .await
        .unwrap_err();
    assert_eq!(error.attempts(), 3);
    assert_eq!(*seen.lock().unwrap(), [(ms(600), ms(600)), (ms(600), ms(850)), (ms(500), ms(1000))]);
}

#[tokio::test(start_paused = true)]
async fn what_is_left_shrinks_while_the_operation_runs_and_ends_at_zero() {
    let policy = limited(ms(100));
    let kept: Mutex<Option<Attempt>> = Mutex::new(None);
    let error = policy
        .run_with(|call| {
            *kept.lock().unwrap() = Some(call);
            async move {
                sleep(ms(30)).await;
                assert_eq!(call.remaining(), ms(70));
                pending::<Result<(), Infallible>>().await
            }
        })
        .await
        .unwrap_err();
    assert!(error.is_timeout());
    advance(Duration::from_secs(1)).await;
    assert_eq!(kept.lock().unwrap().unwrap().remaining(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn an_operation_without_a_limit_is_told_so() {
    let policy = Policy::named("unlimited").retry(Retry::immediate()).build().unwrap();
    let seen = policy.run_with(|call| ready(Ok::<_, Infallible>((call.remaining(), call.deadline())))).await;
    assert_eq!(seen.unwrap(), (Duration::MAX, None));
}

#[tokio::test(start_paused = true)]
async fn a_gate_sees_the_limit_of_the_steps_outside_of_it_only() {
    let notes = Notes::default();
    let policy = Policy::named("gates")
        .gate(notes.clone())
        .timeout(ms(200))
        .gate(notes.clone())
        .timeout(ms(100))
        .gate(notes.clone())
        .build()
        .unwrap();
    let start = Instant::now();
    policy.run(|| ready(Ok::<_, Infallible>(()))).await.unwrap();
    let at = |limit| (limit, Some(start + limit));
    assert_eq!(notes.seen(), [(Duration::MAX, None), at(ms(200)), at(ms(100))]);
}

#[tokio::test(start_paused = true)]
async fn a_callers_deadline_may_be_a_duration_or_either_instant() {
    advance(Duration::from_secs(10)).await;
    let policy = limited(Duration::from_secs(1));
    let start = Instant::now();
    let calls = [
        policy.call().deadline(ms(100)),
        policy.call().deadline(start + ms(100)),
        policy.call().deadline(start.into_std() + ms(100)),
    ];
    for call in calls {
        let seen = call.run_with(|call| ready(Ok::<_, Infallible>((call.remaining(), call.deadline())))).await.unwrap();
        assert_eq!(seen, (ms(100), Some(start + ms(100))));
    }
}

#[tokio::test(start_paused = true)]
async fn the_earliest_of_several_deadlines_counts_in_whatever_form_and_order() {
    let policy = limited(Duration::from_secs(1));
    for order in 0..3 {
        let start = Instant::now();
        let mut given = [Deadline::from(ms(200)), Deadline::from(start + ms(100)), Deadline::from(None)];
        given.rotate_left(order);
        let call = given.into_iter().fold(policy.call(), CallBuilder::deadline);
        assert!(call.run(never).await.unwrap_err().is_timeout());
        assert_eq!(start.elapsed(), ms(100));
    }
}

/// The one timer goes back as well as on: it was set for 5 s when the operation failed.
#[tokio::test(start_paused = true)]
async fn a_pause_is_not_delayed_by_a_later_limit_that_was_waited_for_before() {
    let policy = Policy::named("moved")
        .timeout(Duration::from_secs(10))
        .retry(Retry::constant(ms(10)).max_attempts(2))
        .timeout(Duration::from_secs(5))
        .build()
        .unwrap();
    let start = Instant::now();
    let done = policy.run_with(|call| async move {
        sleep(ms(1)).await;
        if call.is_retry() { Ok(Instant::now()) } else { Err("reset") }
    });
    assert_eq!(done.await.unwrap() - start, ms(12));
}

#[tokio::test(start_paused = true)]
async fn a_call_that_waits_for_many_things_in_turn_waits_for_each_as_long_as_it_takes() {
    let (semaphore, bucket) = (Semaphore::permits(1).build().unwrap(), TokenBucket::per_second(2).burst(1));
    let bucket = bucket.build().unwrap();
    bucket.try_take(1).unwrap();
    let held = semaphore.try_acquire().unwrap();
    tokio::spawn(async move {
        sleep(ms(700)).await;
        drop(held);
    });
    let policy = Policy::named("turns")
        .timeout(Duration::from_secs(10))
        .retry(Retry::constant(ms(100)).max_attempts(2))
        .gate(bucket)
        .gate(semaphore)
        .timeout(ms(50))
        .build()
        .unwrap();
    let start = Instant::now();
    let times = Mutex::new(Vec::new());
    let error = policy
        .run(|| {
            times.lock().unwrap().push(start.elapsed());
            never()
        })
        .await
        .unwrap_err();
    assert_eq!(error.limit(), Some(Limit::Step { step: 5, limit: ms(50) }));
    // The token at 500, the permit at 700; cut at 750; the pause to 850; the next token at 1000, cut at 1050.
    assert_eq!(*times.lock().unwrap(), [ms(700), ms(1000)]);
    assert_eq!(start.elapsed(), ms(1050));
}

#[tokio::test(start_paused = true)]
async fn time_out_in_a_queue_is_final_and_teaches_the_gates_nothing() {
    let notes = Notes::default();
    let semaphore = Semaphore::permits(1).build().unwrap();
    let _held = semaphore.try_acquire().unwrap();
    let policy = Policy::named("queued")
        .retry(Retry::immediate().max_attempts(5))
        .timeout(ms(100))
        .gate(notes.clone())
        .gate(semaphore.clone())
        .build()
        .unwrap();
    let start = Instant::now();
    let error = policy.run(never).await.unwrap_err();
    assert_eq!((error.kind(), error.attempts(), error.stop()), (ErrorKind::TimedOut, 0, Stop::Final));
    assert_eq!(start.elapsed(), ms(100));
    assert_eq!(notes.ends(), [Outcome::NotStarted]);
    assert_eq!(semaphore.queued(), 0);
}

#[tokio::test(start_paused = true)]
async fn the_operation_is_dropped_before_its_passes_go_back() {
    struct Bell(Notes, Arc<Mutex<Vec<usize>>>);
    impl Drop for Bell {
        fn drop(&mut self) {
            self.1.lock().unwrap().push(self.0.ends().len());
        }
    }
    let (notes, order) = (Notes::default(), Arc::default());
    let policy = Policy::named("order").timeout(ms(10)).gate(notes.clone()).build().unwrap();
    let bell = || {
        let bell = Bell(notes.clone(), Arc::clone(&order));
        async move {
            let _bell = bell;
            never().await
        }
    };
    let _ = policy.run(bell).await;
    let _ = policy.call().deadline(ms(5)).run(bell).await;
    assert_eq!(*order.lock().unwrap(), [0, 1], "no pass had gone back yet when the operation went");
}

/// One scale of time for the process, and a clock of its own for each paused runtime.
#[test]
fn paused_runtimes_that_have_gone_different_ways_keep_their_own_time() {
    let policy = Policy::named("shared")
        .timeout(Duration::from_secs(30))
        .retry(Retry::constant(Duration::from_secs(1)).max_attempts(2))
        .timeout(ms(100))
        .build()
        .unwrap();
    let together = Barrier::new(6);
    std::thread::scope(|scope| {
        for ahead in [0, 1, 30, 3600, 86_400, 10 * 365 * 86_400] {
            let (policy, together) = (&policy, &together);
            scope.spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
                runtime.unwrap().block_on(async {
                    advance(Duration::from_secs(ahead)).await;
                    together.wait();
                    for _ in 0..20 {
                        let (start, moment) = (Instant::now(), Moment::now());
                        let error: Error<Infallible> = policy.run(never).await.unwrap_err();
                        assert_eq!(error.limit(), Some(Limit::Step { step: 3, limit: ms(100) }));
                        assert_eq!(start.elapsed(), ms(1200));
                        assert_eq!(error.elapsed(), Some(ms(1200)));
                        assert_eq!(Moment::now().since(moment), ms(1200));
                    }
                });
            });
        }
    });
}

/// A paused clock may stand where the crate had not been used yet.
#[test]
fn a_runtime_whose_clock_stands_before_the_crates_first_use_works() {
    let paused = || tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    let early = paused();
    let before = early.block_on(async { Instant::now() });
    std::thread::scope(|scope| {
        // The first use of the crate, at a later reading of the real clock.
        scope.spawn(|| paused().block_on(async { limited(ms(10)).run(never).await }).unwrap_err());
    });
    early.block_on(async {
        assert_eq!(Instant::now(), before, "the early clock has not moved");
        let error = limited(ms(100)).run(never).await.unwrap_err();
        assert_eq!(error.elapsed(), Some(ms(100)));
        assert_eq!(before.elapsed(), ms(100));
        let at = before + ms(250);
        let seen = limited(ms(1000)).call().deadline(at).run_with(|call| ready(Ok::<_, ()>(call.deadline()))).await;
        assert_eq!(seen.unwrap(), Some(at));
    });
}

#[tokio::test(start_paused = true)]
async fn a_limit_fires_for_a_call_that_moves_between_tasks() {
    let policy = limited(ms(100));
    let mut run = Box::pin(policy.into_run(never));
    assert!(poll_immediate(run.as_mut()).await.is_none());
    // Trap: a delay that keeps its first waker sleeps for ever in another task.
    let end = tokio::spawn(run);
    sleep(ms(101)).await;
    assert!(end.is_finished());
    assert!(end.await.unwrap().unwrap_err().is_timeout());
}

#[tokio::test(start_paused = true)]
async fn a_call_that_needs_no_timer_needs_no_runtime() {
    let end = std::thread::spawn(|| {
        let policy = Policy::named("bare").timeout(ms(100)).retry(Retry::immediate()).build().unwrap();
        futures::FutureExt::now_or_never(policy.run(|| ready(Err::<(), _>("down"))))
    });
    assert_eq!(end.join().unwrap().expect("ready at once").unwrap_err().attempts(), 3);
}

#[tokio::test(start_paused = true)]
async fn an_instant_from_the_operations_side_sleeps_to_the_same_end() {
    let policy = limited(ms(100));
    let start = Instant::now();
    policy
        .run_with(|call| async move {
            sleep_until(call.deadline().unwrap()).await;
            Ok::<_, Infallible>(())
        })
        .await
        .unwrap();
    assert_eq!(start.elapsed(), ms(100));
}

/// Calls that had not waited put the next probe off each time, so that those which had were refused for ever.
#[tokio::test(start_paused = true)]
async fn an_estimate_that_was_too_high_comes_down_beside_calls_that_do_not_wait() {
    let permits = Semaphore::permits(1).build().unwrap();
    // A gate of the user's own is entered by the long way.
    let policy = Policy::named("p").timeout(ms(1000)).gate(permits.clone()).gate(Notes::default()).build().unwrap();
    let waits = async |time: Duration, deadline: Duration| {
        let held = permits.try_acquire().unwrap();
        let call = policy.call().deadline(deadline).run(|| takes(time));
        let (end, ()) = join(call, async {
            sleep(ms(5)).await;
            held.success();
        })
        .await;
        end
    };
    waits(ms(900), ms(1000)).await.unwrap();
    let start = Instant::now();
    while waits(ms(1), ms(500)).await.is_err() {
        policy.call().deadline(ms(100)).run(|| takes(ms(1))).await.unwrap();
        sleep(ms(50)).await;
        assert!(start.elapsed() < ms(3000), "the peer is quick again");
    }
}
