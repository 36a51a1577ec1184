//! Retries: when the next attempt is made, when it is not, and what the caller gets then.

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::future::{pending, ready};
use std::pin::pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::poll_immediate;
use proptest::prelude::*;
use resile::{
    ByPolicy, Call, CircuitBreaker, Entry, Error, ErrorKind, Gate, Jitter, Keyed, Limit, OnRefusal, Outcome, Pass,
    Policy, Reason, Refusal, Retry, RetryBudget, Semaphore, State, Stop, TokenBucket, Verdict,
};
use tokio::time::{Instant, advance, sleep};
use tokio_util::sync::CancellationToken;

const fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

const fn secs(count: u64) -> Duration {
    Duration::from_secs(count)
}

fn retrying(retry: Retry) -> Policy {
    Policy::named("retrying").retry(retry).build().unwrap()
}

/// The times between the attempts of an operation that always fails in no time.
async fn pauses(policy: &Policy) -> (Vec<Duration>, Error<&'static str>) {
    let made = RefCell::new(Vec::new());
    let operation = || {
        made.borrow_mut().push(Instant::now());
        ready(Err::<(), _>("down"))
    };
    let error = policy.run(operation).await.unwrap_err();
    let made = made.into_inner();
    assert_eq!(made.len(), error.attempts() as usize);
    assert_eq!(made.last(), Some(&Instant::now()), "no time passes after the last attempt");
    (made.windows(2).map(|pair| pair[1] - pair[0]).collect(), error)
}

async fn pauses_of(retry: Retry) -> Vec<Duration> {
    let (pauses, error) = pauses(&retrying(retry)).await;
    assert_eq!((error.kind(), error.stop()), (ErrorKind::Failed, Stop::Attempts));
    pauses
}

fn millis(all: &[u64]) -> Vec<Duration> {
    all.iter().copied().map(ms).collect()
}

#[tokio::test(start_paused = true)]
async fn constant_backoff_waits_the_same_each_time() {
    assert_eq!(pauses_of(Retry::constant(ms(70)).max_attempts(5)).await, millis(&[70; 4]));
}

#[tokio::test(start_paused = true)]
async fn linear_backoff_grows_by_its_first_delay() {
    assert_eq!(pauses_of(Retry::linear(ms(10)).max_attempts(6)).await, millis(&[10, 20, 30, 40, 50]));
}

#[tokio::test(start_paused = true)]
async fn exponential_backoff_doubles_or_grows_by_its_factor() {
    let exponential = || Retry::exponential(ms(10)).jitter(Jitter::None).max_attempts(6);
    assert_eq!(pauses_of(exponential()).await, millis(&[10, 20, 40, 80, 160]));
    assert_eq!(pauses_of(exponential().factor(1.0)).await, millis(&[10; 5]));
    assert_eq!(pauses_of(exponential().factor(3.0)).await, millis(&[10, 30, 90, 270, 810]));
    assert_eq!(pauses_of(exponential().factor(1.5)).await[..2], millis(&[10, 15]));
}

#[tokio::test(start_paused = true)]
async fn fibonacci_backoff_adds_the_two_before() {
    assert_eq!(pauses_of(Retry::fibonacci(ms(10)).max_attempts(8)).await, millis(&[10, 10, 20, 30, 50, 80, 130]));
}

#[tokio::test(start_paused = true)]
async fn an_iterator_of_durations_is_a_backoff() {
    let fixed = Retry::with([ms(5), ms(1), ms(9)]);
    assert_eq!(pauses_of(fixed.max_attempts(10)).await, millis(&[5, 1, 9]));
    let squares = Retry::with((1..).map(|n: u32| ms(1) * n * n));
    assert_eq!(pauses_of(squares.max_attempts(5)).await, millis(&[1, 4, 9, 16]));
    assert_eq!(pauses_of(Retry::with(vec![ms(3)]).max_attempts(1)).await, []);
}

#[tokio::test(start_paused = true)]
async fn a_backoff_of_ones_own_starts_anew_for_each_call() {
    let policy = retrying(Retry::with([ms(5), ms(7)]).max_attempts(10));
    for _ in 0..3 {
        assert_eq!(pauses(&policy).await.0, millis(&[5, 7]));
    }
}

#[tokio::test(start_paused = true)]
async fn a_backoff_that_ends_ends_the_call_with_the_last_error() {
    let (pauses, error) = pauses(&retrying(Retry::with([ms(5)]).max_attempts(10))).await;
    assert_eq!((pauses, error.attempts(), error.stop()), (millis(&[5]), 2, Stop::Attempts));
    assert_eq!(error.into_inner(), Some("down"));
    let (_, error) = self::pauses(&retrying(Retry::with(Vec::new()))).await;
    assert_eq!((error.attempts(), error.stop()), (1, Stop::Attempts));
}

#[tokio::test(start_paused = true)]
async fn an_inner_backoff_of_ones_own_starts_anew_for_each_outer_attempt() {
    let policy = Policy::named("nested")
        .retry(Retry::with([ms(100)]).max_attempts(9))
        .retry(Retry::with([ms(1), ms(2)]).max_attempts(9))
        .build()
        .unwrap();
    assert_eq!(pauses(&policy).await.0, millis(&[1, 2, 100, 1, 2]));
}

/// R1: what no float or integer holds is exactly the cap, never zero and no panic.
#[tokio::test(start_paused = true)]
async fn a_delay_that_overflows_is_exactly_the_cap() {
    let all =
        pauses_of(Retry::exponential(ms(1)).factor(100.0).jitter(Jitter::None).max_delay(ms(500)).max_attempts(1000))
            .await;
    assert_eq!(all[..3], millis(&[1, 100, 500]));
    assert!(all[2..].iter().all(|pause| *pause == ms(500)));
    for retry in [Retry::linear(Duration::MAX), Retry::fibonacci(Duration::MAX)] {
        assert_eq!(pauses_of(retry.max_delay(ms(500)).max_attempts(101)).await, millis(&[500; 100]));
    }
    let own = Retry::with(std::iter::repeat(Duration::MAX));
    assert_eq!(pauses_of(own.max_attempts(3)).await, [secs(30), secs(30)], "the default cap");
}

/// What is drawn as 60 s is waited for 60 s: the default cap gives way to a first delay that is longer.
#[tokio::test(start_paused = true)]
async fn the_first_delay_is_waited_as_written_unless_a_cap_is_set() {
    assert_eq!(pauses_of(Retry::constant(secs(60)).max_attempts(3)).await, [secs(60), secs(60)]);
    let growing = Retry::exponential(secs(60)).jitter(Jitter::None).max_attempts(3);
    assert_eq!(pauses_of(growing).await, [secs(60), secs(60)]);
}

/// Trap: a jitter that is added after the cap exceeds it.
#[tokio::test(start_paused = true)]
async fn the_cap_holds_after_jitter() {
    for jitter in [Jitter::Full, Jitter::Equal, Jitter::Decorrelated] {
        for seed in 0..20 {
            let retry = Retry::exponential(ms(400)).jitter(jitter).max_delay(ms(500)).seed(seed).max_attempts(20);
            for pause in pauses_of(retry).await {
                assert!(pause <= ms(500), "{jitter:?}: {pause:?}");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn full_jitter_takes_anything_up_to_the_delay() {
    let all = pauses_of(Retry::constant(secs(10)).jitter(Jitter::Full).seed(3).max_attempts(201)).await;
    assert!(all.iter().all(|pause| *pause <= secs(10)));
    for (from, to) in [(0, 1), (4, 6), (9, 10)] {
        assert!(all.iter().any(|pause| (secs(from)..secs(to)).contains(pause)), "none between {from} s and {to} s");
    }
}

#[tokio::test(start_paused = true)]
async fn equal_jitter_keeps_half_of_the_delay() {
    let all = pauses_of(Retry::constant(secs(10)).jitter(Jitter::Equal).seed(3).max_attempts(201)).await;
    assert!(all.iter().all(|pause| (secs(5)..=secs(10)).contains(pause)));
    for (from, to) in [(5, 6), (9, 10)] {
        assert!(all.iter().any(|pause| (secs(from)..secs(to)).contains(pause)), "none between {from} s and {to} s");
    }
}

#[tokio::test(start_paused = true)]
async fn decorrelated_jitter_lies_between_the_first_delay_and_three_times_the_one_before() {
    for seed in 0..20 {
        let retry = Retry::exponential(secs(1)).jitter(Jitter::Decorrelated).max_delay(secs(60)).seed(seed);
        let mut before = secs(1);
        for pause in pauses_of(retry.max_attempts(50)).await {
            assert!(pause >= secs(1) && pause <= (before * 3).min(secs(60)) + ms(3), "{pause:?} after {before:?}");
            before = pause;
        }
    }
}

/// A hint is the peer's wish for one pause, and says nothing of the next.
#[tokio::test(start_paused = true)]
async fn a_hint_does_not_stretch_the_decorrelated_delays_after_it() {
    for seed in 0..20 {
        let policy = retrying(Retry::exponential(secs(1)).jitter(Jitter::Decorrelated).seed(seed).max_attempts(3));
        let made = RefCell::new(Vec::new());
        let _ = policy
            .classify(|result: &Result<(), u32>| Verdict::Transient((*result == Err(1)).then_some(secs(50))))
            .run_with(|call| {
                made.borrow_mut().push(Instant::now());
                ready(Err(call.attempt()))
            })
            .await;
        let made = made.into_inner();
        assert!((secs(50)..=secs(52)).contains(&(made[1] - made[0])), "the hint, and the spread");
        assert!(made[2] - made[1] <= secs(9) + ms(1), "three times three times the first: {:?}", made[2] - made[1]);
    }
}

/// The bounds are the same "whatever the strategy": without a first delay to start from, every pause would be nothing.
#[tokio::test(start_paused = true)]
async fn decorrelated_jitter_starts_from_the_first_delay_of_a_backoff_of_ones_own() {
    let retry = Retry::with(std::iter::repeat(secs(1))).jitter(Jitter::Decorrelated).seed(1);
    for pause in pauses_of(retry.max_attempts(20)).await {
        assert!(pause >= secs(1), "{pause:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_seed_makes_every_call_of_a_policy_repeatable() {
    for jitter in [Jitter::Full, Jitter::Equal, Jitter::Decorrelated] {
        let build = || retrying(Retry::exponential(secs(1)).jitter(jitter).seed(42).max_attempts(10));
        let (one, two) = (build(), build());
        for _ in 0..5 {
            assert_eq!(pauses(&one).await.0, pauses(&two).await.0);
        }
    }
}

/// Trap: a generator that is cloned with its state gives every request the same delays, and they stay in step.
#[tokio::test(start_paused = true)]
async fn each_call_draws_delays_of_its_own() {
    let policy = retrying(Retry::constant(secs(10)).jitter(Jitter::Full).seed(42).max_attempts(6));
    let mut all = Vec::new();
    for _ in 0..10 {
        // Clones share the count of calls.
        all.push(pauses(&policy.clone()).await.0);
    }
    let other = retrying(Retry::constant(secs(10)).jitter(Jitter::Full).seed(43).max_attempts(6));
    all.push(pauses(&other).await.0);
    for (place, one) in all.iter().enumerate() {
        assert!(all[place + 1..].iter().all(|two| one != two), "two calls with the same delays");
    }
}

#[tokio::test(start_paused = true)]
async fn calls_that_fail_together_do_not_come_back_together() {
    let policy = retrying(Retry::constant(secs(10)).jitter(Jitter::Full).seed(7).max_attempts(2));
    let calls = (0..100).map(|_| pauses(&policy));
    let mut at: Vec<Duration> = futures::future::join_all(calls).await.into_iter().map(|(all, _)| all[0]).collect();
    at.sort_unstable();
    for second in 0..10 {
        let here = at.iter().filter(|at| (secs(second)..secs(second + 1)).contains(at)).count();
        assert!((2..=25).contains(&here), "{here} of 100 in second {second}");
    }
}

/// A policy whose operation fails with this verdict, the times between its attempts, and the error.
async fn judged(retry: Retry, verdict: Verdict) -> (Vec<Duration>, Error<&'static str>) {
    let policy = retrying(retry);
    let made = RefCell::new(Vec::new());
    let error = policy
        .classify(|_: &Result<(), &str>| verdict)
        .run(|| {
            made.borrow_mut().push(Instant::now());
            ready(Err("down"))
        })
        .await
        .unwrap_err();
    let made = made.into_inner();
    (made.windows(2).map(|pair| pair[1] - pair[0]).collect(), error)
}

#[tokio::test(start_paused = true)]
async fn a_hint_of_the_peer_makes_the_pause_longer_and_never_shorter() {
    for verdict in [Verdict::Transient, Verdict::Overloaded] {
        let retry = || Retry::constant(ms(50)).max_attempts(3);
        assert_eq!(judged(retry(), verdict(Some(ms(200)))).await.0, millis(&[200, 200]));
        assert_eq!(judged(retry(), verdict(Some(ms(20)))).await.0, millis(&[50, 50]));
        assert_eq!(judged(retry(), verdict(Some(Duration::ZERO))).await.0, millis(&[50, 50]));
        assert_eq!(judged(retry(), verdict(None)).await.0, millis(&[50, 50]));
        assert_eq!(judged(Retry::immediate(), verdict(Some(ms(20)))).await.0, millis(&[20, 20]));
    }
}

/// Trap: the hint was shown to the callback while the strategy's own delay was slept.
#[tokio::test(start_paused = true)]
async fn no_attempt_is_made_before_the_hint_whatever_the_jitter() {
    for jitter in [Jitter::None, Jitter::Full, Jitter::Equal, Jitter::Decorrelated] {
        for seed in 0..10 {
            let retry = Retry::exponential(secs(1)).jitter(jitter).seed(seed).max_attempts(6);
            let (pauses, _) = judged(retry, Verdict::Overloaded(Some(ms(1500)))).await;
            assert!(pauses.iter().all(|pause| *pause >= ms(1500)), "{jitter:?}: {pauses:?}");
        }
    }
}

/// All who were told "2 s" once came back in the same instant.
#[tokio::test(start_paused = true)]
async fn callers_who_were_told_the_same_do_not_come_back_together() {
    for (jitter, most) in [(Jitter::Full, 100), (Jitter::Equal, 50), (Jitter::Decorrelated, 200)] {
        let retry = Retry::exponential(ms(100)).jitter(jitter).seed(7).max_attempts(2);
        let (policy, same) = (retrying(retry.clone()), retrying(retry));
        let mut all = Vec::new();
        for _ in 0..200 {
            let pause = told(&policy, secs(2)).await;
            assert!((secs(2)..=secs(2) + ms(most + 1)).contains(&pause), "{jitter:?}: {pause:?}");
            assert_eq!(told(&same, secs(2)).await, pause, "the seed decides");
            all.push(pause);
        }
        all.sort();
        let most_together = all.chunk_by(|one, other| one == other).map(<[Duration]>::len).max().unwrap();
        assert!(most_together <= 20, "{jitter:?}: {most_together} of 200 in the same millisecond");
        assert!(all[199] > all[0] + ms(most) * 8 / 10, "{jitter:?}: only from {:?} to {:?}", all[0], all[199]);
    }
}

/// The pause of a call that the peer gives this hint.
async fn told(policy: &Policy, hint: Duration) -> Duration {
    let start = Instant::now();
    let judge = |_: &Result<(), ()>| Verdict::Overloaded(Some(hint));
    let _ = policy.classify(judge).run(|| ready(Err(()))).await;
    start.elapsed()
}

#[tokio::test(start_paused = true)]
async fn a_hint_is_spread_within_its_own_cap_and_that_of_the_delay() {
    let retry = Retry::exponential(secs(60)).max_delay(ms(30)).max_hint(ms(500)).max_attempts(2);
    for seed in 0..50 {
        let pause = told(&retrying(retry.clone().seed(seed)), secs(9)).await;
        assert!((ms(500)..=ms(531)).contains(&pause), "{pause:?}");
        let elapsed = retry.clone().seed(seed).max_elapsed(ms(510));
        assert!(told(&retrying(elapsed), secs(9)).await <= ms(511), "what is spread counts towards the longest time");
    }
}

#[tokio::test(start_paused = true)]
async fn a_hint_shorter_than_the_delay_changes_nothing() {
    for jitter in [Jitter::Equal, Jitter::Decorrelated] {
        for seed in 0..20 {
            let policy = || retrying(Retry::exponential(ms(100)).jitter(jitter).seed(seed).max_attempts(2));
            assert_eq!(told(&policy(), ms(40)).await, told(&policy(), Duration::ZERO).await);
        }
    }
}

/// R4: a garbled header must not park a call for years, nor make it hammer.
#[tokio::test(start_paused = true)]
async fn a_hint_is_cut_to_the_longest_that_is_honoured() {
    let retry = || Retry::constant(ms(50)).max_attempts(2);
    for hint in [secs(61), secs(86_400 * 365 * 50), Duration::MAX] {
        assert_eq!(judged(retry(), Verdict::Overloaded(Some(hint))).await.0, [secs(60)]);
        assert_eq!(judged(retry().max_hint(ms(300)), Verdict::Transient(Some(hint))).await.0, [ms(300)]);
        assert_eq!(judged(retry().max_hint(Duration::ZERO), Verdict::Transient(Some(hint))).await.0, [ms(50)]);
    }
}

#[tokio::test(start_paused = true)]
async fn the_error_passes_the_last_hint_on_uncut() {
    let (_, error) = judged(Retry::immediate().max_hint(ms(1)), Verdict::Overloaded(Some(secs(300)))).await;
    assert_eq!(error.retry_after(), Some(secs(300)));
}

/// R5: a delay that can't be followed by an attempt is not slept.
#[tokio::test(start_paused = true)]
async fn a_delay_that_does_not_fit_before_the_deadline_is_not_slept() {
    let policy = |limit| {
        let retry = Retry::constant(ms(100)).max_attempts(10);
        Policy::named("fit").timeout(limit).retry(retry).build().unwrap()
    };
    for (limit, attempts) in [(99, 1), (100, 1), (101, 2), (200, 2), (250, 3), (1000, 10)] {
        let start = Instant::now();
        let (pauses, error) = pauses(&policy(ms(limit))).await;
        let stop = if attempts == 10 { Stop::Attempts } else { Stop::Deadline };
        assert_eq!((error.kind(), error.attempts(), error.stop()), (ErrorKind::Failed, attempts, stop), "{limit}");
        assert_eq!(start.elapsed(), ms(100) * (attempts - 1));
        assert_eq!(pauses.len() as u32, attempts - 1);
        assert_eq!(error.into_inner(), Some("down"), "the operation's error, not a timeout");
    }
}

#[tokio::test(start_paused = true)]
async fn a_callers_deadline_counts_for_delays_too() {
    let policy = retrying(Retry::constant(ms(100)).max_attempts(10));
    let start = Instant::now();
    let error = policy.call().deadline(ms(150)).run(|| ready(Err::<(), _>("down"))).await.unwrap_err();
    assert_eq!((error.attempts(), error.stop(), start.elapsed()), (2, Stop::Deadline, ms(100)));
}

#[tokio::test(start_paused = true)]
async fn a_hint_that_reaches_past_the_deadline_ends_the_call_at_once() {
    let policy = Policy::named("hint").timeout(secs(10)).retry(Retry::immediate()).build().unwrap();
    let start = Instant::now();
    let error = policy
        .classify(|_: &Result<(), &str>| Verdict::Overloaded(Some(secs(30))))
        .run(|| ready(Err("full")))
        .await
        .unwrap_err();
    assert_eq!((error.attempts(), error.stop(), start.elapsed()), (1, Stop::Deadline, Duration::ZERO));
    assert_eq!(error.retry_after(), Some(secs(30)));
}

#[tokio::test(start_paused = true)]
async fn a_retry_that_would_have_less_than_the_least_time_is_not_made() {
    for (least, attempts) in [(0, 4), (99, 4), (100, 4), (101, 3), (201, 2), (300, 2), (301, 1), (10_000, 1)] {
        let retry = Retry::constant(ms(100)).min_attempt(ms(least)).max_attempts(10);
        let policy = Policy::named("least").timeout(ms(400)).retry(retry).build().unwrap();
        let (_, error) = pauses(&policy).await;
        assert_eq!((error.attempts(), error.stop()), (attempts, Stop::Deadline), "{least}");
    }
}

#[tokio::test(start_paused = true)]
async fn no_retry_begins_after_the_longest_time_since_the_start() {
    for (longest, attempts) in [(0, 1), (99, 1), (100, 2), (199, 2), (200, 3)] {
        let (_, error) = pauses(&retrying(Retry::constant(ms(100)).max_elapsed(ms(longest)).max_attempts(10))).await;
        assert_eq!((error.attempts(), error.stop()), (attempts, Stop::Elapsed), "{longest}");
        assert_eq!(error.into_inner(), Some("down"));
    }
}

#[tokio::test(start_paused = true)]
async fn the_longest_time_cuts_no_attempt_short() {
    let policy = retrying(Retry::immediate().max_elapsed(ms(100)).max_attempts(10));
    let start = Instant::now();
    let error = policy
        .run(|| async {
            sleep(ms(1500)).await;
            Err::<(), _>("slow")
        })
        .await
        .unwrap_err();
    assert_eq!((error.attempts(), error.stop(), start.elapsed()), (1, Stop::Elapsed, ms(1500)));
}

/// Trap: a server's delay skipped the check of the time, so that retries went on for ever.
#[tokio::test(start_paused = true)]
async fn hints_count_towards_the_longest_time() {
    let retry = Retry::constant(ms(1)).max_elapsed(secs(5)).max_attempts(1000);
    let (pauses, error) = judged(retry, Verdict::Overloaded(Some(secs(2)))).await;
    assert_eq!((pauses, error.stop()), (vec![secs(2), secs(2)], Stop::Elapsed));
}

/// R6.
#[tokio::test(start_paused = true)]
async fn a_cancellation_in_the_pause_ends_the_call_at_once_with_the_last_error() {
    let token = CancellationToken::new();
    let policy = retrying(Retry::constant(secs(10)));
    let made = Cell::new(0);
    let mut run = pin!(policy.call().cancel_on(&token).run(|| {
        made.set(made.get() + 1);
        ready(Err::<(), _>("down"))
    }));
    assert!(poll_immediate(run.as_mut()).await.is_none());
    advance(secs(1)).await;
    token.cancel();
    let start = Instant::now();
    let error = run.await.unwrap_err();
    assert_eq!((error.kind(), error.attempts(), start.elapsed()), (ErrorKind::Cancelled, 1, Duration::ZERO));
    assert_eq!(error.last(), Some(&"down"));
    assert_eq!(made.get(), 1);
}

/// R6.
#[tokio::test(start_paused = true)]
async fn a_call_cancelled_before_its_first_poll_makes_no_attempt() {
    let token = CancellationToken::new();
    let policy = retrying(Retry::immediate());
    let run = policy.call().cancel_on(&token).run(|| -> std::future::Ready<Result<(), ()>> { panic!("made") });
    token.cancel();
    let error = run.await.unwrap_err();
    assert_eq!((error.kind(), error.attempts(), error.last()), (ErrorKind::Cancelled, 0, None));
}

#[tokio::test(start_paused = true)]
async fn an_operation_that_cancels_its_own_call_gets_no_further_attempt() {
    let token = CancellationToken::new();
    let policy = retrying(Retry::immediate().max_attempts(5));
    let error = policy
        .call()
        .cancel_on(&token)
        .run(|| {
            token.cancel();
            ready(Err::<(), _>("down"))
        })
        .await
        .unwrap_err();
    assert_eq!((error.kind(), error.attempts(), error.into_inner()), (ErrorKind::Cancelled, 1, Some("down")));
}

/// R7: the first one counts.
#[tokio::test(start_paused = true)]
async fn the_number_of_attempts_includes_the_first() {
    for attempts in [1, 2, 7, 1000] {
        let (_, error) = pauses(&retrying(Retry::immediate().max_attempts(attempts))).await;
        assert_eq!((error.attempts(), error.stop()), (attempts, Stop::Attempts));
    }
    let (_, error) = pauses(&retrying(Retry::immediate())).await;
    assert_eq!(error.attempts(), 3, "the default");
}

/// R8.
#[tokio::test(start_paused = true)]
async fn an_empty_budget_returns_the_operations_error_marked_and_at_once() {
    let budget = RetryBudget::ratio(0.0).reserve_per_second(0).build().unwrap();
    let policy = retrying(Retry::constant(secs(10)).budget(budget));
    let start = Instant::now();
    let (_, error) = pauses(&policy).await;
    assert!(error.budget_exhausted());
    assert_eq!((error.kind(), error.attempts(), start.elapsed()), (ErrorKind::Failed, 1, Duration::ZERO));
    assert_eq!(error.into_inner(), Some("down"));
}

/// R9: the product of two layers is not tried.
#[tokio::test(start_paused = true)]
async fn a_policy_inside_of_a_policy_does_not_multiply_its_attempts() {
    let inner = retrying(Retry::immediate().max_attempts(4));
    let outer = retrying(Retry::immediate().max_attempts(4));
    let made = Cell::new(0);
    let operation = || {
        made.set(made.get() + 1);
        ready(Err::<(), _>("down"))
    };
    let error = outer.classify(ByPolicy).run(|| inner.run(operation)).await.unwrap_err();
    assert_eq!((made.get(), error.attempts(), error.stop()), (4, 1, Stop::Final));
    assert_eq!(error.into_inner().unwrap().into_inner(), Some("down"));
}

#[tokio::test(start_paused = true)]
async fn an_inner_policy_that_tried_once_is_tried_again() {
    let inner = Policy::named("inner").timeout(ms(10)).build().unwrap();
    let outer = retrying(Retry::immediate().max_attempts(3));
    let error = outer.classify(ByPolicy).run(|| inner.run(|| ready(Err::<(), _>("down")))).await.unwrap_err();
    assert_eq!(error.attempts(), 3);
    let error = outer.classify(ByPolicy).run(|| inner.run(pending::<Result<(), ()>>)).await.unwrap_err();
    assert_eq!(error.attempts(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_refusal_inside_of_an_inner_policy_is_not_tried_again() {
    let semaphore = Semaphore::permits(1).max_queue(0).build().unwrap();
    let _held = semaphore.try_acquire().unwrap();
    let inner = Policy::named("inner").gate(semaphore).build().unwrap();
    let outer = retrying(Retry::immediate().max_attempts(3));
    let error = outer.classify(ByPolicy).run(|| inner.run(|| ready(Ok::<_, ()>(())))).await.unwrap_err();
    assert_eq!((error.attempts(), error.stop()), (1, Stop::Final));
}

#[tokio::test(start_paused = true)]
async fn retry_steps_one_inside_of_the_other_multiply_and_count_on() {
    let policy = Policy::named("nested")
        .retry(Retry::constant(ms(100)).max_attempts(2))
        .retry(Retry::constant(ms(1)).max_attempts(3))
        .build()
        .unwrap();
    let seen = RefCell::new(Vec::new());
    let error = policy
        .run_with(|call| {
            seen.borrow_mut().push(call.attempt());
            ready(Err::<(), _>("down"))
        })
        .await
        .unwrap_err();
    assert_eq!((error.attempts(), error.stop()), (6, Stop::Attempts));
    assert_eq!(*seen.borrow(), [1, 2, 3, 4, 5, 6]);
}

/// Lets everybody in, and notes the order of comings and goings.
#[derive(Clone, Default)]
struct Notes(Arc<Mutex<Vec<String>>>);

impl Notes {
    fn add(&self, note: impl Into<String>) {
        self.0.lock().unwrap().push(note.into());
    }

    fn all(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
}

impl Gate for Notes {
    fn enter(&self, call: &Call) -> Entry {
        self.add(format!("in {}", call.attempt()));
        Entry::Pass(Pass::default())
    }

    fn leave(&self, _: Pass, outcome: Outcome) {
        self.add(match outcome {
            Outcome::Judged(verdict, _) => format!("{verdict:?}"),
            Outcome::NotStarted => "not started".into(),
            Outcome::Abandoned(_) => "abandoned".into(),
            outcome => unreachable!("no test here leads to {outcome:?}"),
        });
    }
}

/// R10: nothing is held through a pause.
#[tokio::test(start_paused = true)]
async fn each_attempt_passes_the_gates_inside_anew() {
    let notes = Notes::default();
    let semaphore = Semaphore::permits(1).build().unwrap();
    let policy = Policy::named("anew")
        .retry(Retry::constant(ms(100)).max_attempts(2))
        .gate(notes.clone())
        .gate(semaphore.clone())
        .build()
        .unwrap();
    let mut run = pin!(policy.run_with(|call| ready(if call.is_retry() { Ok(()) } else { Err("reset") })));
    assert!(poll_immediate(run.as_mut()).await.is_none());
    assert_eq!(semaphore.available(), 1, "in the pause");
    run.await.unwrap();
    assert_eq!(notes.all(), ["in 1", "Transient(None)", "in 2", "Success"]);
}

#[tokio::test(start_paused = true)]
async fn a_gate_outside_of_the_retry_is_passed_once_and_hears_the_end() {
    let notes = Notes::default();
    let policy = Policy::named("outside").gate(notes.clone()).retry(Retry::immediate()).build().unwrap();
    policy.run_with(|call| ready(if call.attempt() == 3 { Ok(()) } else { Err("reset") })).await.unwrap();
    assert_eq!(notes.all(), ["in 1", "Success"]);
}

#[tokio::test(start_paused = true)]
async fn only_verdicts_that_say_so_are_tried_again() {
    for verdict in [Verdict::Permanent, Verdict::Ignored, Verdict::Success] {
        let (_, error) = judged(Retry::immediate(), verdict).await;
        assert_eq!((error.attempts(), error.stop()), (1, Stop::Final), "{verdict:?}");
        assert_eq!(error.into_inner(), Some("down"));
    }
    for verdict in [Verdict::Transient(None), Verdict::Overloaded(None)] {
        assert_eq!(judged(Retry::immediate(), verdict).await.1.attempts(), 3, "{verdict:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_bad_value_is_tried_again_and_the_last_one_comes_back() {
    let policy = retrying(Retry::immediate().max_attempts(3));
    let by_status = |status: &Result<u16, Infallible>| match status {
        Ok(500..) => Verdict::Overloaded(None),
        _ => Verdict::Success,
    };
    let last = policy.classify(by_status).run_with(|call| ready(Ok(500 + call.attempt() as u16))).await;
    assert_eq!(last.unwrap(), 503);
    let good = policy.classify(by_status).run_with(|call| ready(Ok(if call.is_retry() { 200 } else { 500 }))).await;
    assert_eq!(good.unwrap(), 200);
}

#[tokio::test(start_paused = true)]
async fn an_error_after_bad_values_is_the_callers() {
    let policy = retrying(Retry::immediate().max_attempts(3));
    let error = policy
        .classify(|_: &Result<u16, &str>| Verdict::Transient(None))
        .run_with(|call| ready(if call.attempt() == 3 { Err("reset") } else { Ok(503) }))
        .await
        .unwrap_err();
    assert_eq!((error.attempts(), error.into_inner()), (3, Some("reset")));
}

#[tokio::test(start_paused = true)]
async fn a_bad_value_is_dropped_before_the_next_attempt() {
    struct Response(u32, Arc<Mutex<Vec<u32>>>);
    impl Drop for Response {
        fn drop(&mut self) {
            self.1.lock().unwrap().push(self.0);
        }
    }
    let dropped: Arc<Mutex<Vec<u32>>> = Arc::default();
    let policy = retrying(Retry::constant(ms(10)).max_attempts(3));
    let last = policy
        .classify(|_: &Result<Response, ()>| Verdict::Transient(None))
        .run_with(|call| {
            assert_eq!(dropped.lock().unwrap().len(), call.attempt() as usize - 1);
            ready(Ok(Response(call.attempt(), Arc::clone(&dropped))))
        })
        .await
        .unwrap();
    assert_eq!((last.0, &dropped.lock().unwrap()[..]), (3, &[1, 2][..]));
}

/// The timeouts that come after an error do not hide it.
#[tokio::test(start_paused = true)]
async fn an_attempt_that_times_out_is_tried_again_and_keeps_the_error_before() {
    let policy = Policy::named("late").retry(Retry::immediate().max_attempts(3)).timeout(ms(50)).build().unwrap();
    let error = policy
        .run_with(|call| async move { if call.is_retry() { pending().await } else { Err::<(), _>("reset") } })
        .await
        .unwrap_err();
    assert_eq!((error.kind(), error.attempts(), error.stop()), (ErrorKind::TimedOut, 3, Stop::Attempts));
    assert_eq!(error.into_inner(), Some("reset"));
}

#[tokio::test(start_paused = true)]
async fn a_limit_outside_of_the_retry_and_a_callers_deadline_are_final() {
    let policy = Policy::named("final").timeout(ms(100)).retry(Retry::immediate().max_attempts(9)).build().unwrap();
    let error = policy.run(pending::<Result<(), ()>>).await.unwrap_err();
    assert_eq!((error.attempts(), error.limit()), (1, Some(Limit::Step { step: 1, limit: ms(100) })));
    let error = policy.call().deadline(ms(50)).run(pending::<Result<(), ()>>).await.unwrap_err();
    assert_eq!((error.attempts(), error.limit()), (1, Some(Limit::Caller)));
}

/// Traps: the first attempt was made with the future, the next one before the pause.
#[tokio::test(start_paused = true)]
async fn each_attempt_is_made_when_it_is_due_and_not_before() {
    let start = Instant::now();
    let made = RefCell::new(Vec::new());
    let policy = retrying(Retry::constant(secs(1)).max_attempts(2));
    let mut run = pin!(policy.run(|| {
        made.borrow_mut().push(start.elapsed());
        async { Err::<(), _>("down") }
    }));
    advance(secs(5)).await;
    assert!(made.borrow().is_empty(), "not before the first poll");
    assert!(poll_immediate(run.as_mut()).await.is_none());
    assert_eq!(*made.borrow(), [secs(5)]);
    run.await.unwrap_err();
    assert_eq!(*made.borrow(), [secs(5), secs(6)]);
}

#[tokio::test(start_paused = true)]
async fn the_operation_of_the_attempt_before_is_gone_when_the_pause_begins() {
    let alive = Arc::new(());
    let policy = retrying(Retry::constant(secs(1)).max_attempts(2));
    let mut run = pin!(policy.run(|| {
        let alive = Arc::clone(&alive);
        async move {
            tokio::task::yield_now().await;
            drop(alive.clone());
            Err::<(), _>("down")
        }
    }));
    assert!(poll_immediate(run.as_mut()).await.is_none());
    assert_eq!(Arc::strong_count(&alive), 2);
    assert!(poll_immediate(run.as_mut()).await.is_none());
    assert_eq!(Arc::strong_count(&alive), 1);
}

#[tokio::test(start_paused = true)]
async fn a_delay_of_nothing_is_no_sleep_at_all() {
    let start = Instant::now();
    for retry in [
        Retry::immediate(),
        Retry::constant(Duration::ZERO),
        Retry::exponential(Duration::ZERO),
        Retry::fibonacci(secs(9)).max_delay(Duration::ZERO),
        Retry::with(std::iter::repeat(Duration::ZERO)),
    ] {
        let policy = retrying(retry.max_attempts(1000));
        // Ready in one poll: no timer, no yield.
        let error = poll_immediate(policy.run(|| ready(Err::<(), _>("down")))).await.unwrap().unwrap_err();
        assert_eq!(error.attempts(), 1000);
    }
    assert_eq!(start.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_pause_is_never_shorter_than_its_delay() {
    for nanos in [1, 999, 1_000_001, 1_500_000, 7_000_001] {
        advance(Duration::from_nanos(123_457)).await;
        for pause in pauses_of(Retry::constant(Duration::from_nanos(nanos)).max_attempts(4)).await {
            assert!(pause >= Duration::from_nanos(nanos), "{pause:?} for {nanos} ns");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_pause_that_nobody_polls_in_time_is_over_when_somebody_does() {
    let policy = retrying(Retry::constant(secs(1)).max_attempts(2));
    let mut run = pin!(policy.run_with(|call| ready(if call.is_retry() { Ok(()) } else { Err("reset") })));
    assert!(poll_immediate(run.as_mut()).await.is_none());
    advance(secs(3600)).await;
    assert!(matches!(poll_immediate(run).await, Some(Ok(()))));
}

/// G8.
#[tokio::test(start_paused = true)]
async fn polls_that_nobody_asked_for_make_no_attempt() {
    let made = Cell::new(0);
    let policy = retrying(Retry::constant(secs(1)).max_attempts(2));
    let mut run = pin!(policy.run(|| {
        made.set(made.get() + 1);
        async {
            sleep(secs(1)).await;
            Err::<(), _>("down")
        }
    }));
    for second in 0..30 {
        for _ in 0..5 {
            let _ = poll_immediate(run.as_mut()).await;
            assert_eq!(made.get(), if second < 20 { 1 } else { 2 });
        }
        advance(ms(100)).await;
    }
    assert!(poll_immediate(run).await.is_some());
}

/// A gate that always refuses.
struct Shut(Refusal);

impl Gate for Shut {
    fn enter(&self, _: &Call) -> Entry {
        Entry::Refused(self.0.clone())
    }

    fn leave(&self, _: Pass, _: Outcome) {
        panic!("nobody was let in");
    }
}

/// The error of a call that was refused, and when it was over.
async fn refused(retry: Retry, refusal: Refusal) -> (Error<()>, Duration) {
    let policy = Policy::named("refused").retry(retry).gate(Shut(refusal)).build().unwrap();
    let start = Instant::now();
    let error = policy.run(|| ready(Ok::<(), ()>(()))).await.unwrap_err();
    assert_eq!((error.kind(), error.attempts()), (ErrorKind::Refused, 0));
    (error, start.elapsed())
}

#[tokio::test(start_paused = true)]
async fn a_refusal_is_final_unless_asked_otherwise() {
    let refusal = Refusal::new("shut", Reason::CircuitOpen).after(ms(10));
    let (error, took) = refused(Retry::constant(ms(50)), refusal).await;
    assert_eq!((error.stop(), took), (Stop::Final, Duration::ZERO));
    assert_eq!(error.retry_after(), Some(ms(10)));
}

#[tokio::test(start_paused = true)]
async fn a_refusal_that_is_tried_again_is_not_asked_before_its_advice() {
    let retry = |until| Retry::constant(ms(50)).on_refusal(OnRefusal::Retry).max_elapsed(until);
    let refusal = |after| Refusal::new("shut", Reason::Busy).after(after);
    let (error, took) = refused(retry(ms(450)), refusal(ms(200))).await;
    assert_eq!((error.stop(), took), (Stop::Elapsed, ms(400)));
    assert_eq!(refused(retry(ms(120)), refusal(ms(20))).await.1, ms(100));
    assert_eq!(refused(retry(secs(130)), refusal(secs(86_400))).await.1, secs(120), "cut like any hint");
    assert_eq!(refused(retry(ms(120)), Refusal::new("shut", Reason::QueueFull)).await.1, ms(100), "no advice");
}

#[tokio::test(start_paused = true)]
async fn a_refused_call_comes_back_until_its_deadline_leaves_no_room() {
    let retry = Retry::constant(ms(50)).on_refusal(OnRefusal::Retry).max_attempts(1);
    let policy = |retry| {
        let shut = Shut(Refusal::new("shut", Reason::QueueFull));
        Policy::named("patient").timeout(secs(1)).retry(retry).gate(shut).build().unwrap()
    };
    for (retry, gives_up) in [(retry.clone(), 950), (retry.min_attempt(ms(200)), 800)] {
        let start = Instant::now();
        let error = policy(retry).run(|| ready(Ok::<(), ()>(()))).await.unwrap_err();
        assert_eq!((error.kind(), error.stop(), error.attempts()), (ErrorKind::Refused, Stop::Deadline, 0));
        assert_eq!(start.elapsed(), ms(gives_up));
    }
}

/// It was refused at a gate of the user's own, which the call does not pass in the short way, and let in without one.
#[tokio::test(start_paused = true)]
async fn a_first_attempt_that_has_not_waited_is_made_however_little_time_there_is() {
    struct Open;
    impl Gate for Open {
        fn enter(&self, _: &Call) -> Entry {
            Entry::Pass(Pass::default())
        }
        fn leave(&self, _: Pass, _: Outcome) {}
    }
    let retry = || Retry::constant(ms(10)).min_attempt(ms(300));
    let short = Policy::named("short").timeout(ms(100)).retry(retry());
    for policy in [short, Policy::named("own").timeout(ms(100)).retry(retry()).gate(Open)] {
        let end = policy.build().unwrap().run(|| ready(Ok::<_, ()>(()))).await;
        assert!(end.is_ok(), "{end:?}");
    }
}

/// The peer worked for callers who could not wait for its answer, while others could have been served.
#[tokio::test(start_paused = true)]
async fn an_attempt_is_not_begun_after_a_queue_that_left_too_little_time() {
    for (least, queued, made) in [(300, 600, 1), (300, 700, 1), (300, 701, 0), (0, 999, 1)] {
        let semaphore = Semaphore::permits(1).build().unwrap();
        let policy = Policy::named("late")
            .timeout(secs(1))
            .retry(Retry::constant(ms(10)).min_attempt(ms(least)).on_refusal(OnRefusal::Retry))
            .gate(semaphore.clone())
            .timeout(ms(200))
            .build()
            .unwrap();
        let held = semaphore.try_acquire().unwrap();
        let mut run = pin!(policy.run(|| ready(Ok::<_, ()>(()))));
        assert!(poll_immediate(run.as_mut()).await.is_none());
        advance(ms(queued)).await;
        drop(held);
        let end = poll_immediate(run).await.unwrap();
        assert_eq!(u32::from(end.is_ok()), made, "{least} {queued}");
        if let Err(error) = end {
            let refusal = error.refusal().unwrap();
            assert_eq!((refusal.gate(), refusal.reason(), error.attempts()), ("retry", Reason::TooLate, 0));
            assert_eq!(error.stop(), Stop::Final);
        }
        assert_eq!(semaphore.in_use(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_refusal_that_cannot_change_is_final() {
    let closed = Semaphore::permits(1).build().unwrap();
    closed.close();
    let tenants = Keyed::by("tenant", Semaphore::permits(1)).build().unwrap();
    let bucket = TokenBucket::per_second(1).burst(2).build().unwrap();
    let policy = |gate: Arc<dyn Gate>| {
        let retry = Retry::constant(secs(30)).on_refusal(OnRefusal::Retry);
        Policy::named("final").retry(retry).gate(gate).build().unwrap()
    };
    let start = Instant::now();
    for (gate, cost, reason) in [
        (Arc::new(closed) as Arc<dyn Gate>, 1, Reason::Closed),
        (Arc::new(tenants), 1, Reason::NoKey("tenant")),
        (Arc::new(bucket.clone()), 0, Reason::ZeroCost),
        (Arc::new(bucket), 3, Reason::CostAboveLimit { cost: 3, limit: 2 }),
    ] {
        assert!(reason.is_permanent());
        let error = policy(gate).call().cost(cost).run(|| ready(Ok::<_, ()>(()))).await.unwrap_err();
        assert_eq!((error.refusal().unwrap().reason(), error.stop()), (reason, Stop::Final));
    }
    assert_eq!(start.elapsed(), Duration::ZERO);
}

/// Without a deadline something else has to end it; and what has no delay must not spin.
#[tokio::test(start_paused = true)]
async fn a_call_is_refused_a_thousand_times_at_most_and_never_twice_in_a_millisecond() {
    for (retry, took) in [(Retry::constant(ms(50)), secs(50)), (Retry::immediate(), secs(1))] {
        let shut = Refusal::new("shut", Reason::QueueFull);
        let (error, elapsed) = refused(retry.on_refusal(OnRefusal::Retry).max_attempts(1), shut).await;
        assert_eq!((error.stop(), elapsed), (Stop::Attempts, took));
    }
}

/// A gate that refuses these askings, counted from 1.
struct Refuses(&'static [u32], AtomicU32);

impl Gate for Refuses {
    fn enter(&self, _: &Call) -> Entry {
        if self.0.contains(&(self.1.fetch_add(1, Ordering::Relaxed) + 1)) {
            return Entry::Refused(Refusal::new("moody", Reason::Busy));
        }
        Entry::Pass(Pass::default())
    }

    fn leave(&self, _: Pass, _: Outcome) {}
}

/// A policy around such a gate.
fn moody(retry: Retry, refuses: &'static [u32]) -> Policy {
    let gate = Refuses(refuses, AtomicU32::new(0));
    Policy::named("moody").retry(retry.on_refusal(OnRefusal::Retry)).gate(gate).build().unwrap()
}

/// The operation was told that it was tried before when all that had happened was a refusal.
#[tokio::test(start_paused = true)]
async fn what_was_refused_is_no_attempt_in_any_count() {
    let policy = moody(Retry::constant(ms(1)).max_attempts(2), &[1, 2, 4]);
    let seen = RefCell::new(Vec::new());
    let error = policy
        .run_with(|call| {
            seen.borrow_mut().push((call.attempt(), call.is_retry()));
            ready(Err::<(), _>("down"))
        })
        .await
        .unwrap_err();
    assert_eq!(seen.into_inner(), [(1, false), (2, true)]);
    assert_eq!((error.kind(), error.stop(), error.attempts()), (ErrorKind::Failed, Stop::Attempts, 2));
}

#[tokio::test(start_paused = true)]
async fn a_refused_attempt_is_followed_by_the_same_delay_again() {
    let exponential = Retry::exponential(ms(10)).jitter(Jitter::None);
    for retry in [exponential, Retry::with([ms(10), ms(20), ms(40)])] {
        // Asked at 0, 10, 20 (and made), 30, 40 (made), 60, 80, 100 (made), 140 (made).
        let policy = moody(retry.max_attempts(4), &[1, 2, 4, 6, 7]);
        let start = Instant::now();
        let made = RefCell::new(Vec::new());
        let error = policy
            .run(|| {
                made.borrow_mut().push(start.elapsed());
                ready(Err::<(), _>("down"))
            })
            .await
            .unwrap_err();
        assert_eq!((made.into_inner(), error.attempts()), (millis(&[20, 40, 100, 140]), 4));
    }
}

#[tokio::test(start_paused = true)]
async fn refusals_that_cannot_change_stay_final() {
    for reason in [Reason::Closed, Reason::CostAboveLimit { cost: 3, limit: 2 }] {
        let retry = Retry::constant(ms(50)).on_refusal(OnRefusal::Retry);
        let (error, took) = refused(retry, Refusal::new("shut", reason)).await;
        assert_eq!((error.stop(), took), (Stop::Final, Duration::ZERO), "{reason:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_refused_by_a_bucket_comes_back_when_it_was_told() {
    let bucket = TokenBucket::per_second(1).burst(1).max_queue(0).build().unwrap();
    bucket.try_take(1).unwrap();
    let policy = Policy::named("told")
        .retry(Retry::immediate().on_refusal(OnRefusal::Retry).max_attempts(2))
        .gate(bucket)
        .build()
        .unwrap();
    let start = Instant::now();
    policy.run(|| ready(Ok::<_, ()>(()))).await.unwrap();
    assert_eq!(start.elapsed(), secs(1));
}

#[tokio::test(start_paused = true)]
async fn a_refusal_by_a_gate_outside_of_the_retry_is_never_tried_again() {
    let policy = Policy::named("outside")
        .gate(Shut(Refusal::new("shut", Reason::Busy)))
        .retry(Retry::immediate().on_refusal(OnRefusal::Retry))
        .build()
        .unwrap();
    let error = policy.run(|| ready(Ok::<(), ()>(()))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
}

#[tokio::test(start_paused = true)]
async fn a_refusal_after_a_failed_attempt_keeps_its_error() {
    let semaphore = Semaphore::permits(1).max_queue(0).build().unwrap();
    let policy = Policy::named("kept").retry(Retry::immediate()).gate(semaphore.clone()).build().unwrap();
    let held = RefCell::new(None);
    let error = policy.classify(|_: &Result<(), &str>| Verdict::Transient(Some(ms(10)))).run(|| ready(Err("reset")));
    let thief = async {
        tokio::task::yield_now().await;
        *held.borrow_mut() = Some(semaphore.try_acquire().unwrap());
    };
    let (end, ()) = futures::future::join(error, thief).await;
    let error = end.unwrap_err();
    assert_eq!((error.kind(), error.attempts(), error.last()), (ErrorKind::Refused, 1, Some(&"reset")));
}

#[tokio::test(start_paused = true)]
async fn run_once_knows_no_retry() {
    let policy = retrying(Retry::immediate().max_attempts(5));
    let error = policy.run_once(ready(Err::<(), _>("down"))).await.unwrap_err();
    assert_eq!((error.attempts(), error.stop()), (1, Stop::NoRetry));
    let error = policy.call().run_once(ready(Err::<(), _>("down"))).await.unwrap_err();
    assert_eq!((error.attempts(), error.stop()), (1, Stop::NoRetry));
}

#[tokio::test(start_paused = true)]
async fn without_a_retry_step_a_failure_says_so() {
    let policy = Policy::named("plain").timeout(secs(1)).build().unwrap();
    let error = policy.run(|| ready(Err::<(), _>("down"))).await.unwrap_err();
    assert_eq!((error.attempts(), error.stop(), error.kind()), (1, Stop::NoRetry, ErrorKind::Failed));
}

#[tokio::test(start_paused = true)]
async fn a_judge_is_asked_once_per_attempt() {
    let asked = Cell::new(0);
    let policy = Policy::named("judge")
        .retry(Retry::immediate().max_attempts(3))
        .gate(Notes::default())
        .gate(Notes::default())
        .build()
        .unwrap();
    let _ = policy
        .classify(|result: &Result<(), &str>| {
            asked.set(asked.get() + 1);
            if result.is_ok() { Verdict::Success } else { Verdict::Transient(None) }
        })
        .run(|| ready(Err("down")))
        .await;
    assert_eq!(asked.get(), 3);
}

fn backoff() -> impl Strategy<Value = Retry> {
    let delay = || prop_oneof![Just(Duration::ZERO), (0_u64..2_000_000_000).prop_map(Duration::from_nanos)];
    prop_oneof![
        delay().prop_map(Retry::constant),
        delay().prop_map(Retry::linear),
        delay().prop_map(Retry::fibonacci),
        (delay(), 1.0..100.0).prop_map(|(first, factor)| Retry::exponential(first).factor(factor)),
        proptest::collection::vec(delay(), 0..6).prop_map(Retry::with),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Laws: never more attempts than allowed; none begins at the deadline or later, or with less than the least time;
    /// no pause is longer than the longest delay and hint together, or shorter than the hint; no time is slept for nothing.
    #[test]
    fn whatever_the_settings_the_limits_hold(
        retry in backoff(),
        jitter in prop_oneof![Just(Jitter::None), Just(Jitter::Full), Just(Jitter::Equal), Just(Jitter::Decorrelated)],
        attempts in 1_u32..20,
        longest in 0_u64..3_000,
        least in 0_u64..1_000,
        limit in 0_u64..10_000,
        hint in proptest::option::of(0_u64..5_000),
        takes in 0_u64..300,
        seed: u64,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let retry = retry.jitter(jitter).seed(seed).max_attempts(attempts).max_delay(ms(longest)).min_attempt(ms(least));
            // A constant delay above the cap is a fault.
            let Ok(policy) = Policy::named("law").timeout(ms(limit)).retry(retry.max_hint(ms(2_000))).build() else {
                return Ok(());
            };
            let start = Instant::now();
            let times = RefCell::new(Vec::new());
            let error = policy
                .classify(|_: &Result<(), ()>| Verdict::Transient(hint.map(ms)))
                .run(|| {
                    times.borrow_mut().push(start.elapsed());
                    async {
                        if takes > 0 {
                            sleep(ms(takes)).await;
                        }
                        Err(())
                    }
                })
                .await
                .unwrap_err();
            let times = times.into_inner();
            prop_assert!(times.len() <= attempts as usize);
            for pair in times.windows(2) {
                prop_assert!(pair[1] + ms(least) <= ms(limit) + ms(2), "{:?} of {limit} ms", pair[1]);
                let pause = pair[1].saturating_sub(pair[0]);
                prop_assert!(pause <= ms(takes + longest + hint.unwrap_or(0).min(2_000)) + ms(3), "{pause:?}");
                prop_assert!(pause >= ms(takes + hint.unwrap_or(0).min(2_000)), "{pause:?}");
            }
            let ended = if error.is_timeout() { ms(limit) } else { *times.last().unwrap() + ms(takes) };
            prop_assert!(start.elapsed() <= ended + ms(2));
            Ok(())
        })?;
    }
}

/// It stood in the queue of the bucket until its attempt would have had too little time, and was refused then.
#[tokio::test(start_paused = true)]
async fn who_would_have_too_little_time_after_a_queue_is_told_at_its_door() {
    let retry = Retry::constant(ms(10)).min_attempt(ms(400));
    let bucket = TokenBucket::per_second(10).burst(1);
    let policy = Policy::named("queued").timeout(ms(1500)).retry(retry).gate(bucket).build().unwrap();
    let start = tokio::time::Instant::now();
    let calls = (0..30).map(|_| async {
        let end = policy.run(|| std::future::ready(Ok::<_, ()>(()))).await;
        (end.map_err(|error| error.refusal().map(resile::Refusal::reason)), start.elapsed())
    });
    let ends = futures::future::join_all(calls).await;
    let (served, refused): (Vec<_>, Vec<_>) = ends.into_iter().partition(|(end, _)| end.is_ok());
    // One at once, and one in each tenth of the 1.1 s, less the grain of a timer.
    assert_eq!((served.len(), refused.len()), (11, 19));
    for (end, took) in refused {
        assert_eq!((end, took), (Err(Some(resile::Reason::TooLate)), ms(0)));
    }
}

/// It grows from one delay to the next, or it would lie between the first and three times the first for ever.
#[tokio::test(start_paused = true)]
async fn decorrelated_jitter_grows_with_the_delay_before() {
    let retry = Retry::constant(ms(10)).jitter(Jitter::Decorrelated).max_attempts(40).seed(7);
    let pauses = pauses_of(retry.max_delay(ms(10_000))).await;
    assert!(pauses.iter().any(|pause| *pause > ms(200)), "{pauses:?}");
}

/// Each of two retries in one policy has delays of its own.
#[tokio::test(start_paused = true)]
async fn two_backoffs_of_ones_own_in_one_policy_do_not_share_their_delays() {
    let (outer, inner) = (Retry::with([ms(1000), ms(2000)]), Retry::with([ms(1), ms(2)]));
    let policy = Policy::named("two").retry(outer.max_attempts(3)).retry(inner.max_attempts(3)).build().unwrap();
    let (pauses, _) = pauses(&policy).await;
    assert_eq!(pauses, millis(&[1, 2, 1000, 1, 2, 2000, 1, 2]));
}

/// What the policy says an operation needs counts already when the next attempt is scheduled, to the nanosecond.
#[tokio::test(start_paused = true)]
async fn an_attempt_that_would_have_too_little_time_is_not_waited_for() {
    for (pause, attempts, took) in [(800, 2, 800), (801, 1, 0)] {
        let policy = Policy::named("short").timeout(ms(1000)).min_attempt(ms(200));
        let policy = policy.retry(Retry::constant(ms(pause)).max_attempts(2)).build().unwrap();
        let start = Instant::now();
        let error = policy.run(|| ready(Err::<(), _>("no"))).await.unwrap_err();
        assert_eq!((error.attempts(), start.elapsed()), (attempts, ms(took)));
        assert_eq!(error.stop(), if attempts == 1 { Stop::Deadline } else { Stop::Attempts });
    }
}

/// Runs an operation whose attempts get these verdicts, the last one again and again; returns how many were made.
async fn made_of(policy: &Policy, verdicts: &[Verdict]) -> (u32, Stop) {
    let made = Cell::new(0);
    let error = policy
        .run(|| {
            made.set(made.get() + 1);
            ready(Err::<(), _>(verdicts[(made.get() as usize - 1).min(verdicts.len() - 1)]))
        })
        .judged(|result| *result.as_ref().unwrap_err())
        .await
        .unwrap_err();
    (made.get(), error.stop())
}

/// R12: what never left the client can be sent again without harm, but not for ever.
#[tokio::test(start_paused = true)]
async fn three_attempts_that_were_not_sent_are_neither_counted_nor_charged() {
    for max_attempts in [1, 2, 5] {
        let budget = RetryBudget::ratio(0.0).reserve_per_second(1).build().unwrap();
        let full = budget.available();
        let retry = Retry::immediate().max_attempts(max_attempts).budget(budget.clone());
        let policy = retrying(retry);
        assert_eq!(made_of(&policy, &[Verdict::NotSent]).await, (max_attempts + 3, Stop::Attempts));
        assert_eq!(full - budget.available(), u64::from(max_attempts) - 1, "charged for those that count");
    }
}

/// R12: an empty budget does not hold up what costs the peer nothing.
#[tokio::test(start_paused = true)]
async fn an_empty_budget_still_allows_attempts_that_were_not_sent() {
    let budget = RetryBudget::ratio(0.0).reserve_per_second(0).build().unwrap();
    let policy = retrying(Retry::immediate().max_attempts(10).budget(budget));
    assert_eq!(made_of(&policy, &[Verdict::NotSent]).await, (4, Stop::Budget));
    let sent_at_last = [Verdict::NotSent, Verdict::NotSent, Verdict::Transient(None)];
    assert_eq!(made_of(&policy, &sent_at_last).await, (3, Stop::Budget));
}

/// R12: the three are for the whole call, wherever they come.
#[tokio::test(start_paused = true)]
async fn attempts_that_were_not_sent_may_lie_between_others() {
    let policy = retrying(Retry::immediate().max_attempts(3));
    let (sent, not) = (Verdict::Transient(None), Verdict::NotSent);
    assert_eq!(made_of(&policy, &[not, sent, not, sent, not, sent]).await, (6, Stop::Attempts));
    assert_eq!(made_of(&policy, &[not, not, not, not, sent]).await, (6, Stop::Attempts), "the fourth counts");
}

/// R12: a delay is waited all the same, the one before the attempt that was not sent.
#[tokio::test(start_paused = true)]
async fn an_attempt_that_was_not_sent_does_not_make_the_delays_grow() {
    let retry = Retry::exponential(ms(100)).jitter(Jitter::None).max_attempts(2);
    let start = Instant::now();
    let verdicts = [Verdict::NotSent, Verdict::NotSent, Verdict::NotSent, Verdict::Transient(None)];
    assert_eq!(made_of(&retrying(retry), &verdicts).await.0, 5);
    assert_eq!(start.elapsed(), ms(4 * 100));
}

/// R11: what the peer may have done is not done twice.
#[tokio::test(start_paused = true)]
async fn what_may_have_been_committed_is_not_tried_again() {
    let policy = retrying(Retry::immediate().max_attempts(5));
    assert_eq!(made_of(&policy, &[Verdict::Committed]).await, (1, Stop::Final));
    let once_not_sent = [Verdict::NotSent, Verdict::Committed];
    assert_eq!(made_of(&policy, &once_not_sent).await, (2, Stop::Final));
    let error = policy.run(|| ready(Err::<(), _>("reset"))).judged(|_| Verdict::Committed).await.unwrap_err();
    assert_eq!(error.to_string(), "retrying: failed in attempt 1, not retried: it may have been done");
}

/// R11, R12: both are failures of the peer, or of the way to it.
#[tokio::test(start_paused = true)]
async fn a_breaker_counts_what_was_not_sent_and_what_was_lost_after_it_was_done() {
    for verdict in [Verdict::NotSent, Verdict::Committed] {
        let breaker = CircuitBreaker::builder().consecutive_failures(2).build().unwrap();
        let policy = Policy::named("counted").gate(breaker.clone()).build().unwrap();
        for state in [State::Closed, State::Open] {
            assert_eq!(made_of(&policy, &[verdict]).await.0, 1);
            assert_eq!(breaker.state(), state);
        }
    }
}
