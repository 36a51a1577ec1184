//! How steps work together: who hears what, whose limit it was, and what is final.

mod support;

use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::FutureExt as _;
use resile::{
    ByPolicy, Call, Cancel, CircuitBreaker, Drain, Entry, ErrorKind, Gate, Guard, Key, Moment, Needs, OnRefusal,
    Outcome, Pass, Policy, PolicyBuilder, Priority, Reason, Refusal, Retry, RetryBudget, Semaphore, State, Stop,
    Ticket, TokenBucket, Verdict,
};
use support::bench::Bench;
use support::hand::{Clock, Flag, poll_once};
use support::journal::{Event, Heard, SUCCESS, TRANSIENT};
use support::ms;
use support::script::{
    Act, BAD, Boom, ERR, HANG, IGNORED, OK, PANIC_IN_CLOSURE, PANIC_IN_DROP, PANIC_IN_JUDGE, PANIC_IN_POLL, PERMANENT,
    Script, judge,
};
use support::watch::{Manner, Watched};
use tokio::time::{Instant, advance, sleep, timeout};
use tokio_util::sync::CancellationToken;

const HINT: Duration = ms(70);

/// A semaphore whose only permit is taken, with the guard that has it.
fn full(bench: &Bench) -> (Semaphore, Guard) {
    let semaphore = Semaphore::permits(1).build().unwrap();
    let permit = semaphore.try_acquire().unwrap();
    bench.watch(Watched::Semaphore(semaphore.clone()));
    (semaphore, permit)
}

fn breaker() -> CircuitBreaker {
    CircuitBreaker::builder().consecutive_failures(1).open_jitter(0.0).open_for(ms(1000)).build().unwrap()
}

fn no(reason: &'static str) -> Refusal {
    Refusal::new("gate", Reason::Other(reason))
}

// What gates hear.

/// What the caller does.
#[derive(Clone, Copy, Debug)]
enum Caller {
    Waits,
    /// Gives a deadline, in milliseconds.
    Deadline(u64),
    Cancels(u64),
    Drops(u64),
}

/// A way for a call to end, with a spy outside and one inside of some steps.
struct Ending {
    name: &'static str,
    steps: fn(PolicyBuilder, &Bench) -> PolicyBuilder,
    acts: &'static [Act],
    caller: Caller,
    outer: Heard,
    inner: &'static [Heard],
}

const OVERLOADED: Verdict = Verdict::Overloaded(Some(HINT));

fn nothing(policy: PolicyBuilder, _: &Bench) -> PolicyBuilder {
    policy
}

fn limit(policy: PolicyBuilder, _: &Bench) -> PolicyBuilder {
    policy.timeout(ms(30))
}

fn retry(policy: PolicyBuilder, _: &Bench) -> PolicyBuilder {
    policy.retry(Retry::constant(ms(20)).max_attempts(2))
}

fn refused(policy: PolicyBuilder, bench: &Bench) -> PolicyBuilder {
    policy.gate(bench.spy("gate").that(Manner::Refuses(no("no"), 1)))
}

fn queue(policy: PolicyBuilder, bench: &Bench) -> PolicyBuilder {
    policy.gate(bench.spy("gate").that(Manner::Queues))
}

fn queue_with_limit(policy: PolicyBuilder, bench: &Bench) -> PolicyBuilder {
    queue(limit(policy, bench), bench)
}

fn delay(policy: PolicyBuilder, bench: &Bench) -> PolicyBuilder {
    policy.gate(bench.spy("gate").that(Manner::Delays(ms(10))))
}

/// Lets the first attempt in, and not the second.
fn retry_then_refused(policy: PolicyBuilder, bench: &Bench) -> PolicyBuilder {
    let breaker = breaker();
    bench.watch(Watched::Spy(bench.spy("unused")));
    retry(policy, bench).gate(breaker)
}

/// The second attempt finds a bucket empty and has to wait for longer than there is time.
fn retry_then_queue(policy: PolicyBuilder, bench: &Bench) -> PolicyBuilder {
    let bucket = TokenBucket::per_second(10).burst(1).build().unwrap();
    limit(policy, bench).retry(Retry::constant(ms(20))).gate(bucket)
}

#[rustfmt::skip]
const ENDINGS: &[Ending] = {
    use Caller::{Cancels, Deadline, Drops, Waits};
    use Heard::{Abandoned, Judged, NotStarted};
    const fn row(
        name: &'static str,
        steps: fn(PolicyBuilder, &Bench) -> PolicyBuilder,
        acts: &'static [Act],
        caller: Caller,
        outer: Heard,
        inner: &'static [Heard],
    ) -> Ending {
        Ending { name, steps, acts, caller, outer, inner }
    }
    &[
        row("a value", nothing, &[OK], Waits, SUCCESS, &[SUCCESS]),
        row("a value after a wait", delay, &[OK.after(ms(5))], Waits, SUCCESS, &[SUCCESS]),
        row("a bad value", nothing, &[BAD], Waits, TRANSIENT, &[TRANSIENT]),
        row("an error", nothing, &[ERR], Waits, TRANSIENT, &[TRANSIENT]),
        row("a permanent error", retry, &[PERMANENT], Waits, Judged(Verdict::Permanent), &[Judged(Verdict::Permanent)]),
        row("an ignored error", retry, &[IGNORED], Waits, Judged(Verdict::Ignored), &[Judged(Verdict::Ignored)]),
        row("a peer that is full", nothing, &[Act::fault(OVERLOADED)], Waits, Judged(OVERLOADED), &[Judged(OVERLOADED)]),
        row("an error and a value", retry, &[ERR, OK], Waits, SUCCESS, &[TRANSIENT, SUCCESS]),
        row("two errors", retry, &[ERR], Waits, TRANSIENT, &[TRANSIENT, TRANSIENT]),
        row("a limit", limit, &[HANG], Waits, TRANSIENT, &[TRANSIENT]),
        row("a limit after an attempt", |p, b| retry(limit(p, b), b), &[ERR, HANG], Waits, TRANSIENT, &[TRANSIENT, TRANSIENT]),
        row("the limit of an attempt", |p, b| limit(retry(p, b), b), &[HANG, OK], Waits, SUCCESS, &[TRANSIENT, SUCCESS]),
        row("the caller's deadline", nothing, &[HANG], Deadline(30), Abandoned, &[Abandoned]),
        row("the caller's deadline in a queue", queue, &[OK], Deadline(30), NotStarted, &[]),
        row("the caller's deadline after an attempt", retry, &[ERR, HANG], Deadline(30), Abandoned, &[TRANSIENT, Abandoned]),
        row("a cancellation", nothing, &[HANG], Cancels(30), Abandoned, &[Abandoned]),
        row("a cancellation in a queue", queue, &[OK], Cancels(30), NotStarted, &[]),
        row("a cancellation in the backoff", retry, &[ERR], Cancels(10), Abandoned, &[TRANSIENT]),
        row("a drop", nothing, &[HANG], Drops(30), Abandoned, &[Abandoned]),
        row("a drop in a queue", queue, &[OK], Drops(30), NotStarted, &[]),
        row("a drop at a gate that delays", delay, &[OK], Drops(5), NotStarted, &[]),
        row("a drop in the backoff", retry, &[ERR], Drops(10), Abandoned, &[TRANSIENT]),
        row("a refusal further in", refused, &[OK], Waits, NotStarted, &[]),
        row("a refusal further in, in a retry", |p, b| refused(retry(p, b), b), &[OK], Waits, NotStarted, &[]),
        row("a refusal after an attempt", retry_then_refused, &[ERR], Waits, TRANSIENT, &[TRANSIENT]),
        row("no time to wait after an attempt", retry_then_queue, &[ERR], Waits, TRANSIENT, &[TRANSIENT]),
        row("a limit in a queue", queue_with_limit, &[OK], Waits, NotStarted, &[]),
        row("a panic in the closure", nothing, &[PANIC_IN_CLOSURE], Waits, TRANSIENT, &[TRANSIENT]),
        row("a panic in the future", nothing, &[PANIC_IN_POLL], Waits, TRANSIENT, &[TRANSIENT]),
        row("a panic in the judge", nothing, &[PANIC_IN_JUDGE], Waits, TRANSIENT, &[TRANSIENT]),
        row("a panic in the future's drop", nothing, &[PANIC_IN_DROP], Waits, TRANSIENT, &[TRANSIENT]),
        row("a panic after an attempt", retry, &[ERR, PANIC_IN_POLL], Waits, TRANSIENT, &[TRANSIENT, TRANSIENT]),
    ]
};

/// Ends a call, with so many steps outside of it that do nothing.
async fn end(ending: &Ending, padding: usize) -> Bench {
    let bench = Bench::new();
    let mut policy = Policy::named("stack").gate(bench.spy("outer"));
    for _ in 0..padding {
        policy = policy.timeout(Duration::MAX);
    }
    let policy = (ending.steps)(policy, &bench).gate(bench.spy("inner")).build().unwrap();
    let script = Script::new(&bench.journal, ending.acts);
    let token = CancellationToken::new();
    let mut call = policy.call().cancel_on(&token);
    if let Caller::Deadline(millis) = ending.caller {
        call = call.deadline(ms(millis));
    }
    let mut run = Box::pin(AssertUnwindSafe(call.classify(judge).run(|| script.make())).catch_unwind());
    match ending.caller {
        Caller::Drops(millis) => assert!(timeout(ms(millis), run.as_mut()).await.is_err()),
        Caller::Cancels(millis) => {
            assert!(timeout(ms(millis), run.as_mut()).await.is_err());
            token.cancel();
            assert!(matches!(run.as_mut().now_or_never(), Some(Ok(Err(error))) if error.is_cancelled()));
        }
        _ => {
            let panic = run.as_mut().await.err();
            assert!(panic.is_none_or(|panic| panic.is::<Boom>()));
        }
    }
    drop(run);
    bench
}

#[tokio::test(start_paused = true)]
async fn every_gate_hears_how_the_call_ended() {
    for ending in ENDINGS {
        let bench = end(ending, 0).await;
        assert_eq!(bench.journal.heard("outer"), [ending.outer], "outside, at {}", ending.name);
        assert_eq!(bench.journal.heard("inner"), ending.inner, "inside, at {}", ending.name);
        bench.assert_back();
    }
}

#[tokio::test(start_paused = true)]
async fn more_steps_than_a_call_has_room_for_change_nothing() {
    for ending in ENDINGS {
        let (plain, spilled) = (end(ending, 0).await, end(ending, 12).await);
        assert_eq!(plain.journal.kinds(), spilled.journal.kinds(), "{}", ending.name);
        spilled.assert_back();
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_that_is_never_polled_asks_nobody() {
    let bench = Bench::new();
    let policy = Policy::named("stack").gate(bench.spy("outer")).build().unwrap();
    drop(policy.run(|| async { Ok::<_, ()>(()) }));
    assert_eq!(bench.journal.events(), []);
}

#[tokio::test(start_paused = true)]
async fn passes_go_back_from_the_inside_out_and_after_the_operation() {
    let bench = Bench::new();
    let policy = Policy::named("stack").gate(bench.spy("a")).gate(bench.spy("b")).gate(bench.spy("c")).build().unwrap();
    bench.run(&policy, [OK]).await.ok(1);
    let order: Vec<Event> = bench.journal.events();
    assert!(matches!(
        order[..],
        [
            Event::Entered("a"),
            Event::Entered("b"),
            Event::Entered("c"),
            Event::Started(1),
            Event::Gone(1),
            Event::Left("c", _),
            Event::Left("b", _),
            Event::Left("a", _),
            Event::AnswerGone(1),
        ]
    ));
}

#[tokio::test(start_paused = true)]
async fn the_time_of_an_operation_leaves_out_queues_and_backoff() {
    let bench = Bench::new();
    let policy = Policy::named("stack")
        .gate(bench.spy("outer"))
        .retry(Retry::constant(ms(20)))
        .gate(bench.spy("delay").that(Manner::Delays(ms(10))))
        .timeout(ms(40))
        .build()
        .unwrap();
    bench.run(&policy, [ERR.after(ms(7)), HANG, OK.after(ms(3))]).await.ok(3).took(7 + 40 + 3 + 30 + 40);
    let times = |gate| {
        let elapsed = bench.journal.passages(gate).into_iter().map(|passage| match passage.outcome {
            Outcome::Judged(_, times) | Outcome::Abandoned(times) => times.elapsed(),
            _ => panic!("all were started"),
        });
        elapsed.collect::<Vec<_>>()
    };
    assert_eq!(times("delay"), [ms(7), ms(40), ms(3)]);
    assert_eq!(times("outer"), [ms(3)], "the last attempt's, as is the verdict");
}

// Deadlines.

#[tokio::test(start_paused = true)]
async fn the_earlier_of_two_limits_fires_and_is_named() {
    for (outer, inner, step, limit) in [(50, 20, 3, 20), (20, 50, 1, 20), (30, 30, 1, 30)] {
        let bench = Bench::new();
        let policy =
            Policy::named("limits").timeout(ms(outer)).gate(bench.spy("between")).timeout(ms(inner)).build().unwrap();
        bench.run(&policy, [HANG]).await.timed_out(step, ms(limit)).stop(Stop::NoRetry).took(limit).held_nothing();
    }
}

#[tokio::test(start_paused = true)]
async fn the_callers_deadline_is_told_from_a_limit_and_wins_a_tie() {
    for (caller, step, by_caller) in [(20, 30, true), (30, 20, false), (30, 30, true)] {
        let bench = Bench::new();
        let policy = Policy::named("limits").timeout(ms(step)).build().unwrap();
        let report = bench.call(policy.call().deadline(ms(caller)), [HANG]).await.attempts(1).took(caller.min(step));
        let report = if by_caller { report.timed_out_by_caller() } else { report.timed_out(1, ms(step)) };
        report.held_nothing();
    }
}

#[tokio::test(start_paused = true)]
async fn the_callers_deadline_needs_no_step_that_reads_the_clock() {
    let bench = Bench::new();
    let policy = Policy::named("bare").build().unwrap();
    bench.call(policy.call().deadline(ms(30)), [HANG]).await.timed_out_by_caller().took(30).held_nothing();
}

#[tokio::test(start_paused = true)]
async fn a_limit_of_an_attempt_is_retried_and_that_of_the_whole_is_final() {
    let bench = Bench::new();
    let whole = |limit| {
        Policy::named("canonical")
            .timeout(limit)
            .retry(Retry::constant(ms(10)).max_attempts(3))
            .timeout(ms(30))
            .build()
            .unwrap()
    };
    let report = bench.run(&whole(ms(1000)), [HANG]).await;
    report.timed_out(3, ms(30)).stop(Stop::Attempts).attempts(3).began([0, 40, 80]).took(110).held_nothing();

    let bench = Bench::new();
    let report = bench.run(&whole(ms(60)), [HANG]).await;
    report.timed_out(1, ms(60)).stop(Stop::Final).attempts(2).began([0, 40]).took(60).held_nothing();
}

/// A limit inside of a retry is no limit on the backoff around it.
#[tokio::test(start_paused = true)]
async fn a_limit_is_lifted_when_its_attempt_is_over() {
    let bench = Bench::new();
    let policy = Policy::named("narrow").retry(Retry::constant(ms(100))).timeout(ms(20)).build().unwrap();
    bench.run(&policy, [ERR, HANG, OK.after(ms(19))]).await.ok(3).delays([100, 100]).took(239).held_nothing();
}

/// T2: at the instant the time is up the value wins, and the smallest limit lets through what is ready at once.
#[tokio::test(start_paused = true)]
async fn a_result_wins_over_a_limit_that_passes_in_the_same_poll() {
    let bench = Bench::new();
    let policy = Policy::named("limits").timeout(ms(20)).build().unwrap();
    bench.run(&policy, [OK.after(ms(20))]).await.ok(1).took(20).held_nothing();

    let bench = Bench::new();
    let policy = Policy::named("limits").timeout(Duration::from_nanos(1)).build().unwrap();
    bench.run(&policy, [OK, HANG]).await.ok(1).took(0).held_nothing();
}

#[tokio::test(start_paused = true)]
async fn no_operation_is_made_after_its_deadline_has_passed() {
    let bench = Bench::new();
    let policy = Policy::named("late").build().unwrap();
    bench.call(policy.call().deadline(Instant::now()), [OK]).await.ok(1).took(0).held_nothing();
    let past = Instant::now();
    advance(ms(50)).await;
    let bench = Bench::new();
    bench.call(policy.call().deadline(past), [HANG]).await.timed_out_by_caller().took(0).held_nothing();
}

/// T9.
#[tokio::test(start_paused = true)]
async fn a_deadline_given_as_a_duration_counts_from_the_first_poll_and_an_instant_stands() {
    let policy = Policy::named("late").timeout(ms(100)).build().unwrap();
    let made = Instant::now();
    let relative = policy.call().deadline(ms(30)).run(std::future::pending::<Result<(), ()>>);
    let tokio = policy.call().deadline(made + ms(30)).run(std::future::pending::<Result<(), ()>>);
    let std = policy.call().deadline((made + ms(30)).into_std()).run(std::future::pending::<Result<(), ()>>);
    let limit = policy.run(std::future::pending::<Result<(), ()>>);
    advance(ms(20)).await;
    let at_end = |run| async move {
        let _: Result<(), resile::Error<()>> = run;
        made.elapsed()
    };
    let (tokio, std, relative, limit) = tokio::join!(
        async { at_end(tokio.await).await },
        async { at_end(std.await).await },
        async { at_end(relative.await).await },
        async { at_end(limit.await).await },
    );
    assert_eq!((tokio, std, relative, limit), (ms(30), ms(30), ms(50), ms(120)));
}

/// T1.
#[tokio::test(start_paused = true)]
async fn limits_too_long_for_the_clock_are_none() {
    let bench = Bench::new();
    let policy =
        Policy::named("long").timeout(Duration::MAX).timeout(Duration::from_secs(u64::MAX / 4)).build().unwrap();
    let call = policy.call().deadline(Duration::MAX);
    bench.call(call, [OK.after(Duration::from_secs(86_400 * 365))]).await.ok(1).held_nothing();
}

#[tokio::test(start_paused = true)]
async fn the_operation_sees_what_is_left() {
    let policy = Policy::named("left").timeout(ms(100)).retry(Retry::constant(ms(10))).timeout(ms(40)).build().unwrap();
    let seen = Mutex::new(Vec::new());
    let run = policy.call().deadline(ms(60)).run_with(|attempt| {
        seen.lock().unwrap().push((attempt.attempt(), attempt.is_retry(), attempt.remaining()));
        assert_eq!(attempt.deadline(), Some(Instant::now() + attempt.remaining()));
        std::future::ready(Err::<(), _>("down"))
    });
    let error = run.await.unwrap_err();
    assert_eq!(*seen.lock().unwrap(), [(1, false, ms(40)), (2, true, ms(40)), (3, true, ms(40))]);
    assert_eq!(error.stop(), Stop::Attempts);
    let free = Policy::named("free").build().unwrap();
    let left = free.run_with(|attempt| async move { Ok::<_, ()>((attempt.remaining(), attempt.deadline())) }).await;
    assert_eq!(left.unwrap(), (Duration::MAX, None));
}

/// R5: the delay is not slept first.
#[tokio::test(start_paused = true)]
async fn a_delay_that_does_not_fit_before_a_deadline_ends_the_call_at_once() {
    for (left, stop, took) in [(20, Stop::Deadline, 0), (21, Stop::Attempts, 20)] {
        let bench = Bench::new();
        let policy =
            Policy::named("tight").timeout(ms(left)).retry(Retry::constant(ms(20)).max_attempts(2)).build().unwrap();
        bench.run(&policy, [ERR]).await.failed(stop).last(if took > 0 { 2 } else { 1 }).took(took).held_nothing();

        let bench = Bench::new();
        let policy = Policy::named("tight").retry(Retry::constant(ms(20)).max_attempts(2)).build().unwrap();
        bench.call(policy.call().deadline(ms(left)), [ERR]).await.failed(stop).took(took).held_nothing();
    }
}

/// T3: an operation that spends the whole cooperative budget in each poll can't starve its own limit.
#[tokio::test(start_paused = true)]
async fn a_greedy_operation_does_not_starve_its_limit() {
    let policy = Policy::named("greedy").timeout(ms(50)).build().unwrap();
    let given_up = Arc::new(AtomicU32::new(0));
    let seen = given_up.clone();
    tokio::spawn(async move {
        for _ in 0..100 {
            advance(ms(1)).await;
        }
        seen.store(1, Ordering::Relaxed);
    });
    let run = policy.run(|| async {
        while given_up.load(Ordering::Relaxed) == 0 {
            tokio::task::consume_budget().await;
        }
        Ok::<_, ()>(())
    });
    assert!(run.await.unwrap_err().is_timeout());
}

// Cancellation by a token.

#[test]
fn a_cancellation_wins_over_a_limit_and_loses_to_a_result_in_the_same_poll() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    for (act, expected) in [(HANG, Some(ErrorKind::Cancelled)), (OK.after(ms(20)), None)] {
        let bench = Bench::new();
        let policy = Policy::named("limits").timeout(ms(20)).build().unwrap();
        let token = CancellationToken::new();
        let script = Script::new(&bench.journal, [act]);
        let call = policy.call().deadline(ms(20)).cancel_on(&token).classify(judge);
        let mut run = Box::pin(call.run(|| script.make()));
        assert!(poll_once(run.as_mut()).is_pending());
        clock.advance(ms(20));
        token.cancel();
        let Poll::Ready(result) = poll_once(run.as_mut()) else { panic!("all is up") };
        assert_eq!(result.err().map(|error| error.kind()), expected);
        bench.assert_back();
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_cancelled_before_it_is_polled_asks_nobody() {
    let bench = Bench::new();
    let policy = Policy::named("stack").gate(bench.spy("outer")).build().unwrap();
    let token = CancellationToken::new();
    token.cancel();
    bench.call(policy.call().cancel_on(&token), [OK]).await.cancelled().attempts(0).held_nothing();
    assert_eq!(bench.journal.events(), []);
}

/// R6.
#[tokio::test(start_paused = true)]
async fn no_attempt_is_made_after_the_caller_has_cancelled() {
    for delay in [Duration::ZERO, ms(20)] {
        let policy = Policy::named("retries").retry(Retry::constant(delay)).build().unwrap();
        let (token, made) = (CancellationToken::new(), AtomicU32::new(0));
        let run = policy.call().cancel_on(&token).run(|| {
            made.fetch_add(1, Ordering::Relaxed);
            token.cancel();
            std::future::ready(Err::<(), _>("down"))
        });
        let error = run.await.unwrap_err();
        assert_eq!((error.kind(), error.last(), error.attempts()), (ErrorKind::Cancelled, Some(&"down"), 1));
        assert_eq!(made.load(Ordering::Relaxed), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_cancelled_as_it_is_granted_never_starts() {
    let bench = Bench::new();
    let (semaphore, permit) = full(&bench);
    let policy = Policy::named("stack").gate(bench.spy("outer")).gate(semaphore.clone()).build().unwrap();
    let token = CancellationToken::new();
    let script = Script::new(&bench.journal, [OK]);
    let mut run = pin!(policy.call().cancel_on(&token).classify(judge).run(|| script.make()));
    assert!(poll_once(run.as_mut()).is_pending());
    drop(permit);
    token.cancel();
    let error = run.await.unwrap_err();
    assert!(error.is_cancelled() && error.attempts() == 0);
    assert_eq!((bench.journal.heard("outer"), semaphore.available()), (vec![Heard::NotStarted], 1));
}

#[tokio::test(start_paused = true)]
async fn of_several_tokens_the_first_one_counts() {
    let bench = Bench::new();
    let policy = Policy::named("tokens").timeout(ms(100)).build().unwrap();
    let tokens = [CancellationToken::new(), CancellationToken::new()];
    let second = tokens[1].clone();
    tokio::spawn(async move {
        sleep(ms(30)).await;
        second.cancel();
    });
    let call = policy.call().cancel_on(&tokens[0]).cancel_on(&tokens[1]);
    bench.call(call, [HANG]).await.cancelled().took(30).held_nothing();
}

// Refusals, queues, and what a retry makes of them.

#[tokio::test(start_paused = true)]
async fn a_refusal_inside_of_a_retry_is_final() {
    let bench = Bench::new();
    let gate = bench.spy("gate").that(Manner::Refuses(no("not now").after(ms(30)), 1));
    let policy = Policy::named("stack").retry(Retry::constant(ms(10))).gate(gate).build().unwrap();
    let report = bench.run(&policy, [OK]).await;
    assert_eq!(report.error().retry_after(), Some(ms(30)));
    report.refused("gate", Reason::Other("not now")).stop(Stop::Final).attempts(0).took(0).held_nothing();
}

#[tokio::test(start_paused = true)]
async fn a_refusal_is_retried_when_asked_but_not_before_its_advice() {
    for (advice, waits) in [(None, 10), (Some(ms(5)), 10), (Some(ms(30)), 30), (Some(ms(200)), 100)] {
        let bench = Bench::new();
        let refusal = advice.map_or(no("not now"), |advice| no("not now").after(advice));
        let gate = bench.spy("gate").that(Manner::Refuses(refusal, 1));
        let retry = Retry::constant(ms(10)).max_hint(ms(100)).on_refusal(OnRefusal::Retry);
        let policy = Policy::named("stack").retry(retry).gate(gate).build().unwrap();
        bench.run(&policy, [OK]).await.ok(1).attempts(1).took(waits).held_nothing();
    }
}

#[tokio::test(start_paused = true)]
async fn refusals_use_up_no_attempts() {
    let bench = Bench::new();
    let gate = bench.spy("gate").that(Manner::Refuses(no("not now"), 9));
    let retry = Retry::constant(ms(10)).max_attempts(2).on_refusal(OnRefusal::Retry);
    let policy = Policy::named("stack").retry(retry).gate(gate.clone()).build().unwrap();
    let report = bench.run(&policy, [Act::fault(Verdict::Transient(None)), OK]).await;
    report.ok(2).attempts(2).took(100).held_nothing();
    assert_eq!(gate.asked(), 11);
}

#[tokio::test(start_paused = true)]
async fn a_refusal_that_cannot_change_is_final_even_when_refusals_are_retried() {
    let retry = || Retry::constant(ms(10)).on_refusal(OnRefusal::Retry);
    let closed = Semaphore::permits(1).build().unwrap();
    closed.close();
    let narrow = Semaphore::permits(2).build().unwrap();
    let bucket = TokenBucket::per_second(1).burst(2).build().unwrap();
    let above = Reason::CostAboveLimit { cost: 3, limit: 2 };
    let policy = |gate: PolicyBuilder| gate.build().unwrap();
    for (policy, gate, reason) in [
        (policy(Policy::named("stack").retry(retry()).gate(closed)), "semaphore", Reason::Closed),
        (policy(Policy::named("stack").retry(retry()).gate(narrow)), "semaphore", above),
        (policy(Policy::named("stack").retry(retry()).gate(bucket)), "bucket", above),
    ] {
        let bench = Bench::new();
        bench.call(policy.call().cost(3), [OK]).await.refused(gate, reason).stop(Stop::Final).took(0).held_nothing();
    }
}

#[tokio::test(start_paused = true)]
async fn time_out_in_a_queue_is_final_though_a_retry_stands_outside() {
    let bench = Bench::new();
    let (semaphore, _permit) = full(&bench);
    let policy = Policy::named("stack")
        .retry(Retry::constant(ms(10)).on_refusal(OnRefusal::Retry))
        .gate(bench.spy("before"))
        .timeout(ms(30))
        .gate(semaphore)
        .build()
        .unwrap();
    let report = bench.run(&policy, [OK]).await;
    let report = report.timed_out(3, ms(30)).stop(Stop::Final).last(None).attempts(0).took(30);
    report.heard("before", [Heard::NotStarted]).held_nothing();
}

#[tokio::test(start_paused = true)]
async fn a_refusal_after_a_wait_in_a_queue_is_one_of_the_gate() {
    let bench = Bench::new();
    let semaphore = Semaphore::permits(1).max_wait(ms(30)).build().unwrap();
    let _permit = semaphore.try_acquire().unwrap();
    bench.watch(Watched::Semaphore(semaphore.clone()));
    let policy = Policy::named("stack").timeout(ms(100)).gate(semaphore).build().unwrap();
    let report = bench.run(&policy, [OK]).await;
    report.refused("semaphore", Reason::QueueTimeout).attempts(0).took(30).held_nothing();
}

#[tokio::test(start_paused = true)]
async fn a_bucket_that_cannot_serve_before_the_deadline_refuses_at_once() {
    let bench = Bench::new();
    let bucket = TokenBucket::per_second(10).burst(1).build().unwrap();
    bucket.try_take(1).unwrap();
    let policy = Policy::named("stack").timeout(ms(50)).gate(bucket.clone()).build().unwrap();
    let report = bench.run(&policy, [OK]).await;
    assert_eq!(report.error().retry_after(), Some(ms(100)));
    report.refused("bucket", Reason::TooLate).attempts(0).took(0).held_nothing();
    assert_eq!(bucket.queued(), 0);
}

/// R10: each attempt takes its own permit, and the backoff has none.
#[tokio::test(start_paused = true)]
async fn a_gate_inside_of_a_retry_is_passed_anew_by_each_attempt() {
    let bench = Bench::new();
    let policy = Policy::named("stack")
        .gate(bench.spy("outer"))
        .retry(Retry::constant(ms(10)))
        .gate(bench.spy("inner"))
        .build()
        .unwrap();
    let report = bench.run(&policy, [ERR, ERR, OK]).await.ok(3).attempts(3).delays([10, 10]);
    report.heard("outer", [SUCCESS]).heard("inner", [TRANSIENT, TRANSIENT, SUCCESS]).held_nothing();
}

#[tokio::test(start_paused = true)]
async fn a_permit_inside_of_a_retry_is_free_in_the_backoff_and_one_outside_is_not() {
    let inside = Semaphore::permits(1).build().unwrap();
    let outside = Semaphore::permits(1).build().unwrap();
    let policy = Policy::named("stack")
        .gate(outside.clone())
        .retry(Retry::constant(ms(10)))
        .gate(inside.clone())
        .build()
        .unwrap();
    let bench = Bench::new();
    let script = Script::new(&bench.journal, [ERR]);
    let mut run = Box::pin(policy.classify(judge).run(|| script.make()));
    assert!(poll_once(run.as_mut()).is_pending());
    assert_eq!((outside.available(), inside.available()), (0, 1));
    drop(run);
    assert_eq!((outside.available(), inside.available()), (1, 1));
}

/// The last error is kept whatever ends the call.
#[tokio::test(start_paused = true)]
async fn the_last_error_is_kept_when_a_later_attempt_ends_otherwise() {
    let retry = || Retry::constant(ms(10));
    let policy = |policy: PolicyBuilder| policy.build().unwrap();

    let bench = Bench::new();
    let report = bench.run(&policy(Policy::named("whole").timeout(ms(50)).retry(retry())), [ERR, HANG]).await;
    report.timed_out(1, ms(50)).last(1).attempts(2).held_nothing();

    let bench = Bench::new();
    let attempt = policy(Policy::named("attempt").retry(retry().max_attempts(2)).timeout(ms(30)));
    bench.run(&attempt, [ERR, HANG]).await.timed_out(2, ms(30)).last(1).attempts(2).held_nothing();

    let bench = Bench::new();
    let report = bench.run(&policy(Policy::named("refused").retry(retry()).gate(breaker())), [ERR]).await;
    report.refused("breaker", Reason::CircuitOpen).last(1).attempts(1).held_nothing();

    let bench = Bench::new();
    let plain = policy(Policy::named("plain").retry(retry()));
    let report = bench.call(plain.call().deadline(ms(50)), [ERR, ERR, HANG]).await;
    report.timed_out_by_caller().last(2).attempts(3).held_nothing();

    let bench = Bench::new();
    let token = CancellationToken::new();
    let (call, cancel) = (plain.call().cancel_on(&token), token.clone());
    tokio::spawn(async move {
        sleep(ms(15)).await;
        cancel.cancel();
    });
    bench.call(call, [ERR]).await.cancelled().last(2).attempts(2).held_nothing();
}

#[tokio::test(start_paused = true)]
async fn a_hint_of_the_peer_is_waited_for_up_to_its_cap() {
    let hint = |verdict| [Act::fault(verdict), OK];
    for (acts, cap, delay) in [
        (hint(Verdict::Overloaded(Some(ms(70)))), ms(1000), 70),
        (hint(Verdict::Transient(Some(ms(70)))), ms(1000), 70),
        (hint(Verdict::Overloaded(Some(ms(5)))), ms(1000), 10),
        (hint(Verdict::Overloaded(Some(Duration::MAX))), ms(50), 50),
    ] {
        let bench = Bench::new();
        let policy = Policy::named("hints").retry(Retry::constant(ms(10)).max_hint(cap)).build().unwrap();
        bench.run(&policy, acts).await.ok(2).delays([delay]).held_nothing();
    }
}

/// R8.
#[tokio::test(start_paused = true)]
async fn an_empty_budget_ends_the_call_at_once_with_the_last_error_marked() {
    let ratio = RetryBudget::ratio(0.0).reserve_per_second(0).build().unwrap();
    let share = RetryBudget::share(0.0).floor(0).build().unwrap();
    for budget in [ratio, share] {
        let bench = Bench::new();
        bench.watch(Watched::Budget(budget.clone()));
        let policy = Policy::named("poor").retry(Retry::constant(ms(10)).budget(budget)).build().unwrap();
        let report = bench.run(&policy, [ERR]).await;
        assert!(report.error().budget_exhausted());
        report.failed(Stop::Budget).last(1).attempts(1).took(0).held_nothing();
    }
}

/// B12: charged when scheduled, refunded once if its attempt is never made.
#[tokio::test(start_paused = true)]
async fn a_retry_that_is_never_made_is_refunded() {
    let ratio = RetryBudget::ratio(0.0).reserve_per_second(1).build().unwrap();
    let share = RetryBudget::share(0.0).floor(5).build().unwrap();
    for (budget, used) in [(ratio, 1), (share, 0)] {
        let policy = Policy::named("backs off").retry(Retry::constant(ms(10)).budget(budget.clone())).build().unwrap();
        let start = budget.available();
        for (acts, polls, cost) in [([ERR, HANG], 1, 0), ([ERR, HANG], 2, used)] {
            let before = budget.available();
            let script = Script::new(&Bench::new().journal, acts);
            let mut run = Box::pin(policy.classify(judge).run(|| script.make()));
            for _ in 0..polls {
                assert!(poll_once(run.as_mut()).is_pending());
                assert_eq!(budget.available(), before - 1, "it counts while it sleeps and while it runs");
                sleep(ms(10)).await;
            }
            drop(run);
            assert_eq!(before - budget.available(), cost);
        }
        assert_eq!(start - budget.available(), used);
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_that_runs_once_is_not_retried_and_says_so() {
    let bench = Bench::new();
    let policy = Policy::named("once").retry(Retry::constant(ms(10))).gate(bench.spy("inner")).build().unwrap();
    let report = bench.once(&policy, ERR).await.failed(Stop::NoRetry).last(1).attempts(1).took(0);
    report.heard("inner", [TRANSIENT]).held_nothing();
    let bench = Bench::new();
    bench.once(&policy, OK.after(ms(5))).await.ok(1).took(5).held_nothing();
    let bench = Bench::new();
    bench.once(&policy, PERMANENT).await.failed(Stop::Final).held_nothing();
}

/// R9.
#[tokio::test(start_paused = true)]
async fn nested_policies_do_not_multiply_attempts_with_a_judge_of_their_own() {
    let retry = || Retry::constant(ms(10)).max_attempts(3);
    let inner = Policy::named("inner").retry(retry()).build().unwrap();
    let outer = Policy::named("outer").retry(retry()).build().unwrap();
    let made = AtomicU32::new(0);
    let fails = || {
        made.fetch_add(1, Ordering::Relaxed);
        std::future::ready(Err::<(), _>("down"))
    };
    let error = outer.classify(ByPolicy).run(|| inner.run(fails)).await.unwrap_err();
    assert_eq!((made.swap(0, Ordering::Relaxed), error.attempts(), error.stop()), (3, 1, Stop::Final));
    assert_eq!(error.into_inner().map(|inner| (inner.attempts(), inner.stop())), Some((3, Stop::Attempts)));

    let error = outer.run(|| inner.run(fails)).await.unwrap_err();
    assert_eq!((made.load(Ordering::Relaxed), error.attempts()), (9, 3), "without it they do");
}

#[tokio::test(start_paused = true)]
async fn a_policy_inside_that_tried_once_may_be_tried_again() {
    let inner = Policy::named("inner").timeout(ms(30)).build().unwrap();
    let outer = Policy::named("outer").retry(Retry::constant(ms(10)).max_attempts(3)).build().unwrap();
    let bench = Bench::new();
    let script = Script::new(&bench.journal, [HANG, ERR, OK]);
    let answer = outer.classify(ByPolicy).run(|| inner.classify(judge).run(|| script.make())).await.unwrap();
    assert_eq!((answer.attempt, bench.journal.starts()), (3, 3));
}

#[tokio::test(start_paused = true)]
async fn nested_retries_in_one_policy_multiply() {
    let bench = Bench::new();
    let policy = Policy::named("nested")
        .retry(Retry::constant(ms(100)).max_attempts(2))
        .gate(bench.spy("between"))
        .retry(Retry::constant(ms(10)).max_attempts(2))
        .build()
        .unwrap();
    let report = bench.run(&policy, [ERR]).await.failed(Stop::Attempts).last(4).attempts(4).delays([10, 100, 10]);
    report.heard("between", [TRANSIENT, TRANSIENT]).held_nothing();
}

// Passes that no longer hold.

/// Runs a call until it waits, opens the breaker, and ends the wait.
async fn opened_meanwhile(policy: &Policy, bench: &Bench, breaker: &CircuitBreaker, end_wait: impl FnOnce()) {
    let script = Script::new(&bench.journal, [ERR, OK]);
    let mut run = Box::pin(policy.classify(judge).run(|| script.make()));
    assert!(poll_once(run.as_mut()).is_pending());
    let attempts = bench.journal.starts();
    breaker.try_acquire().unwrap().failure();
    breaker.try_acquire().unwrap_err();
    end_wait();
    let error = run.await.unwrap_err();
    assert_eq!(error.refusal().map(Refusal::reason), Some(Reason::CircuitOpen), "{error:?}");
    assert!(error.retry_after().is_some_and(|after| after <= ms(2000)));
    assert_eq!(bench.journal.starts(), attempts, "the operation was reached");
    bench.journal.assert_nested();
}

fn lenient() -> CircuitBreaker {
    let breaker =
        CircuitBreaker::builder().consecutive_failures(2).open_jitter(0.0).open_for(ms(2000)).build().unwrap();
    breaker.try_acquire().unwrap().failure();
    breaker
}

#[tokio::test(start_paused = true)]
async fn a_breaker_that_opens_while_a_call_queues_behind_it_refuses_the_call() {
    let bench = Bench::new();
    let (semaphore, permit) = full(&bench);
    let breaker = lenient();
    let policy = Policy::named("stack")
        .gate(bench.spy("outer"))
        .gate(breaker.clone())
        .gate(semaphore.clone())
        .gate(bench.spy("inner"))
        .build()
        .unwrap();
    opened_meanwhile(&policy, &bench, &breaker, || drop(permit)).await;
    assert_eq!((bench.journal.heard("outer"), bench.journal.heard("inner")), (vec![Heard::NotStarted], vec![]));
    assert_eq!(semaphore.available(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_breaker_that_opens_while_a_call_waits_for_a_token_refuses_the_call() {
    let bench = Bench::new();
    let breaker = lenient();
    let bucket = TokenBucket::per_second(10).burst(1).build().unwrap();
    bucket.try_take(1).unwrap();
    let policy = Policy::named("stack").gate(breaker.clone()).gate(bucket.clone()).build().unwrap();
    opened_meanwhile(&policy, &bench, &breaker, || {}).await;
    assert_eq!(bucket.peek(), 1, "the token is put back");
}

#[tokio::test(start_paused = true)]
async fn a_breaker_that_opens_during_the_backoff_inside_of_it_refuses_the_next_attempt() {
    let bench = Bench::new();
    let breaker = lenient();
    let policy = Policy::named("stack").gate(breaker.clone()).retry(Retry::constant(ms(10))).build().unwrap();
    opened_meanwhile(&policy, &bench, &breaker, || {}).await;
}

/// The retry is told of refusals by gates inside of it, and this one stands outside.
#[tokio::test(start_paused = true)]
async fn a_refusal_of_a_gate_outside_of_a_retry_is_final_whatever_the_retry_says() {
    let bench = Bench::new();
    let breaker = lenient();
    let retry = Retry::constant(ms(10)).max_attempts(5).on_refusal(OnRefusal::Retry);
    let policy = Policy::named("stack").gate(breaker.clone()).retry(retry).build().unwrap();
    let start = Instant::now();
    opened_meanwhile(&policy, &bench, &breaker, || {}).await;
    assert_eq!(start.elapsed(), ms(10), "one backoff");
}

#[tokio::test(start_paused = true)]
async fn a_breaker_that_has_closed_again_meanwhile_lets_the_call_go_on() {
    let bench = Bench::new();
    let (semaphore, permit) = full(&bench);
    let breaker = lenient();
    let policy = Policy::named("stack").gate(breaker.clone()).gate(semaphore).build().unwrap();
    let script = Script::new(&bench.journal, [OK]);
    let mut run = Box::pin(policy.classify(judge).run(|| script.make()));
    assert!(poll_once(run.as_mut()).is_pending());
    breaker.try_acquire().unwrap().failure();
    breaker.reset();
    drop(permit);
    assert_eq!(run.await.unwrap().attempt, 1);
    assert_eq!(breaker.counts().calls, 0, "it was let in under another generation");
}

#[tokio::test(start_paused = true)]
async fn a_failure_counted_in_an_earlier_generation_opens_nothing() {
    let breaker = breaker();
    let policy = Policy::named("stack").gate(breaker.clone()).build().unwrap();
    let bench = Bench::new();
    let script = Script::new(&bench.journal, [ERR.after_polls(1)]);
    let mut run = Box::pin(policy.classify(judge).run(|| script.make()));
    assert!(poll_once(run.as_mut()).is_pending());
    breaker.reset();
    breaker.force_open();
    breaker.reset();
    assert!(poll_once(run.as_mut()).is_ready());
    assert_eq!(breaker.state(), State::Closed);
}

// Values.

#[tokio::test(start_paused = true)]
async fn a_bad_value_comes_back_as_a_value_when_attempts_end() {
    let budget = RetryBudget::share(0.0).floor(0).build().unwrap();
    let limited = Retry::constant(ms(10)).max_attempts(2);
    for (retry, attempts) in [(limited, 2), (Retry::constant(ms(10)).budget(budget), 1)] {
        let bench = Bench::new();
        let policy = Policy::named("bad").retry(retry).gate(bench.spy("inner")).build().unwrap();
        let report = bench.run(&policy, [BAD]).await.ok(attempts).attempts(attempts);
        assert!(bench.journal.heard("inner").iter().all(|heard| *heard == TRANSIENT));
        report.held_nothing();
    }
}

#[tokio::test(start_paused = true)]
async fn a_bad_value_is_dropped_before_the_next_attempt() {
    let bench = Bench::new();
    let policy = Policy::named("bad").retry(Retry::immediate()).build().unwrap();
    let report = bench.run(&policy, [BAD, OK]).await.ok(2);
    let order = bench.journal.events();
    assert_eq!(order, [Event::Started(1), Event::Gone(1), Event::AnswerGone(1), Event::Started(2), Event::Gone(2)]);
    report.held_nothing();
}

#[tokio::test(start_paused = true)]
async fn a_bad_value_is_no_last_error() {
    let bench = Bench::new();
    let policy = Policy::named("bad").timeout(ms(50)).retry(Retry::constant(ms(10))).build().unwrap();
    bench.run(&policy, [ERR, BAD, HANG]).await.timed_out(1, ms(50)).last(1).attempts(3).held_nothing();
}

// What gates see.

/// Notes the calls it sees.
#[derive(Clone, Default)]
struct Looks(Arc<Mutex<Vec<Seen>>>);

#[derive(Debug, PartialEq)]
struct Seen {
    attempt: u32,
    cost: u32,
    priority: Priority,
    tenant: Option<Key>,
    shard: Option<Key>,
    remaining: Duration,
    may_wait: bool,
}

impl Gate for Looks {
    fn enter(&self, call: &Call) -> Entry {
        self.0.lock().unwrap().push(Seen {
            attempt: call.attempt(),
            cost: call.cost(),
            priority: call.priority(),
            tenant: call.key("tenant").cloned(),
            shard: call.key("shard").cloned(),
            remaining: call.remaining(),
            may_wait: call.may_wait(),
        });
        assert_eq!(call.deadline().map(Moment::from), (call.ends() != Moment::NEVER).then(|| call.ends()));
        Entry::Pass(Pass::default())
    }

    fn leave(&self, _: Pass, _: Outcome) {}
}

#[tokio::test(start_paused = true)]
async fn a_gate_sees_what_the_caller_said() {
    let looks = Looks::default();
    let policy =
        Policy::named("stack").retry(Retry::constant(ms(10))).timeout(ms(30)).gate(looks.clone()).build().unwrap();
    let bench = Bench::new();
    bench.run(&policy, [OK]).await.ok(1).held_nothing();
    let call = policy.call().key("tenant", "acme").key("shard", 7_u64).key("tenant", String::from("other"));
    let call = call.priority(Priority::Critical).cost(3).deadline(ms(35)).no_wait();
    bench.call(call, [ERR, OK]).await.ok(2).held_nothing();

    let said = |attempt, remaining| Seen {
        attempt,
        cost: 3,
        priority: Priority::Critical,
        tenant: Some("other".into()),
        shard: Some(7_u64.into()),
        remaining: ms(remaining),
        may_wait: false,
    };
    let plain = Seen {
        attempt: 1,
        cost: 1,
        priority: Priority::Normal,
        tenant: None,
        shard: None,
        remaining: ms(30),
        may_wait: true,
    };
    assert_eq!(*looks.0.lock().unwrap(), [plain, said(1, 30), said(2, 25)]);
}

#[tokio::test(start_paused = true)]
async fn a_cost_is_taken_at_each_gate_and_a_cost_of_zero_is_refused_where_tokens_are_counted() {
    for (cost, left) in [(1, 4), (3, 2), (5, 0)] {
        let semaphore = Semaphore::permits(5).build().unwrap();
        let bucket = TokenBucket::per_second(1).burst(5).build().unwrap();
        let policy = Policy::named("stack").gate(semaphore.clone()).gate(bucket.clone()).build().unwrap();
        let mut run = Box::pin(policy.call().cost(cost).run(std::future::pending::<Result<(), ()>>));
        assert!(poll_once(run.as_mut()).is_pending());
        assert_eq!((semaphore.available(), bucket.peek()), (left, left));
        drop(run);
        assert_eq!((semaphore.available(), bucket.peek()), (5, left), "tokens of what ran are spent");
    }
    let semaphore = Semaphore::permits(5).build().unwrap();
    let bucket = TokenBucket::per_second(1).burst(5).build().unwrap();
    let policy = Policy::named("stack").gate(semaphore.clone()).gate(bucket.clone()).build().unwrap();
    let error = policy.call().cost(0).run(std::future::pending::<Result<(), ()>>).await.unwrap_err();
    assert_eq!(error.refusal().map(resile::Refusal::reason), Some(resile::Reason::ZeroCost));
    assert_eq!((semaphore.available(), bucket.peek()), (5, 5));
}

#[tokio::test(start_paused = true)]
async fn a_costly_call_waits_for_all_of_its_cost() {
    let bench = Bench::new();
    let semaphore = Semaphore::permits(3).build().unwrap();
    let (one, two) = (semaphore.try_acquire().unwrap(), semaphore.try_acquire_many(2).unwrap());
    let policy = Policy::named("stack").gate(semaphore.clone()).build().unwrap();
    let script = Script::new(&bench.journal, [HANG]);
    let mut run = Box::pin(policy.call().cost(3).classify(judge).run(|| script.make()));
    assert!(poll_once(run.as_mut()).is_pending());
    drop(two);
    assert!(poll_once(run.as_mut()).is_pending());
    assert_eq!((bench.journal.starts(), semaphore.queued()), (0, 1));
    drop(one);
    assert!(poll_once(run.as_mut()).is_pending());
    assert_eq!((bench.journal.starts(), semaphore.queued(), semaphore.in_use()), (1, 0, 3));
    drop(run);
    assert_eq!(semaphore.available(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_call_that_does_not_wait_is_refused_where_it_would_have_to() {
    let bench = Bench::new();
    let (semaphore, _permit) = full(&bench);
    let bucket = TokenBucket::per_second(10).burst(1).build().unwrap();
    bucket.try_take(1).unwrap();
    let own = bench.spy("own").that(Manner::Delays(ms(30)));
    let policy = |gate: PolicyBuilder| gate.build().unwrap();
    for (policy, gate, advice) in [
        (policy(Policy::named("stack").gate(semaphore.clone())), "semaphore", None),
        (policy(Policy::named("stack").gate(bucket.clone())), "bucket", Some(ms(100))),
        (policy(Policy::named("stack").gate(own.clone())), "own", Some(ms(30))),
    ] {
        let report = bench.call(policy.call().no_wait(), [OK]).await;
        assert_eq!(report.error().retry_after(), advice, "{gate}");
        report.refused(gate, Reason::Busy).attempts(0).took(0).held_nothing();
    }
    assert_eq!(bucket.queued(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_token_that_comes_back_goes_to_who_waits_at_once() {
    let bucket = TokenBucket::per_second(1).burst(1).build().unwrap();
    let bench = Bench::new();
    let (semaphore, _permit) = full(&bench);
    let first = Policy::named("first").gate(bucket.clone()).gate(semaphore).build().unwrap();
    let mut first = Box::pin(first.call().owned().run(|| std::future::ready(Ok::<_, ()>(()))));
    assert!(poll_once(first.as_mut()).is_pending());
    let (mut second, flag) = (Box::pin(bucket.acquire()), Flag::default());
    assert!(flag.poll(second.as_mut()).is_pending());
    drop(first);
    assert!(flag.woken());
    let start = Instant::now();
    second.await.unwrap().success();
    assert_eq!(start.elapsed(), Duration::ZERO);
}

/// Lets in the tenth time it is asked, and names a moment gone by until then.
#[derive(Clone, Default)]
struct Hurries(Arc<AtomicU32>);

impl Gate for Hurries {
    fn enter(&self, call: &Call) -> Entry {
        if self.0.fetch_add(1, Ordering::Relaxed) < 10 {
            return Entry::Wait(Ticket::default(), Some(call.now()));
        }
        Entry::Pass(Pass::default())
    }

    fn leave(&self, _: Pass, _: Outcome) {}
}

/// B4: it is asked again after a tick.
#[tokio::test(start_paused = true)]
async fn a_gate_that_names_a_moment_gone_by_is_not_asked_in_a_spin() {
    let gate = Hurries::default();
    let policy = Policy::named("stack").gate(gate.clone()).build().unwrap();
    let mut run = Box::pin(policy.run(|| async { Ok::<_, ()>(()) }));
    assert!(poll_once(run.as_mut()).is_pending());
    assert!(gate.0.load(Ordering::Relaxed) <= 3);
    timeout(ms(100), run).await.unwrap().unwrap();
}

/// A gate of ten lines, with the defaults of the trait: it is asked anew.
#[derive(Clone)]
struct Opens(Moment);

impl Gate for Opens {
    fn enter(&self, call: &Call) -> Entry {
        if call.now() < self.0 {
            return Entry::Wait(Ticket::default(), Some(self.0));
        }
        Entry::Pass(Pass::default())
    }

    fn leave(&self, _: Pass, _: Outcome) {}
}

#[tokio::test(start_paused = true)]
async fn a_gate_with_the_defaults_can_have_calls_wait_for_a_moment() {
    let opens = Opens(Moment::now() + ms(30));
    let bench = Bench::new();
    let policy = Policy::named("stack").gate(opens.clone()).build().unwrap();
    bench.run(&policy, [OK]).await.ok(1).took(30).held_nothing();
    let bench = Bench::new();
    let policy = Policy::named("stack").timeout(ms(10)).gate(Opens(Moment::now() + ms(30))).build().unwrap();
    bench.run(&policy, [OK]).await.timed_out(1, ms(10)).attempts(0).took(10).held_nothing();
    Guard::acquire(Opens(Moment::now() + ms(30))).await.unwrap().success();
}

#[tokio::test(start_paused = true)]
async fn a_shared_gate_shares_its_state_between_policies() {
    let bench = Bench::new();
    let semaphore = Semaphore::permits(1).build().unwrap();
    let one = Policy::named("one").gate(semaphore.clone()).build().unwrap();
    let shared: Arc<dyn Gate> = Arc::new(semaphore.clone());
    let two = Policy::named("two").gate(shared).build().unwrap();
    let mut run = Box::pin(one.run(std::future::pending::<Result<(), ()>>));
    assert!(poll_once(run.as_mut()).is_pending());
    bench.call(two.call().no_wait(), [OK]).await.refused("semaphore", Reason::Busy).held_nothing();
    drop(run);
    bench.call(two.call().no_wait(), [OK]).await.ok(1).held_nothing();
}

/// The same gate twice in one policy takes twice.
#[tokio::test(start_paused = true)]
async fn the_same_gate_may_stand_twice_in_a_policy() {
    let bench = Bench::new();
    let semaphore = Semaphore::permits(2).build().unwrap();
    bench.watch(Watched::Semaphore(semaphore.clone()));
    let policy = Policy::named("twice").gate(semaphore.clone()).retry(Retry::immediate()).gate(semaphore.clone());
    bench.run(&policy.build().unwrap(), [ERR, OK]).await.ok(2).held_nothing();
}

/// Many calls through one stack, some of them dropped: each ends, and all comes back.
#[tokio::test(start_paused = true)]
async fn calls_that_compete_all_end_and_leave_nothing_behind() {
    let semaphore = Semaphore::permits(2).build().unwrap();
    let bucket = TokenBucket::per_second(1000).burst(2).build().unwrap();
    let budget = RetryBudget::share(1.0).build().unwrap();
    let policy = Policy::named("busy")
        .timeout(ms(10_000))
        .retry(Retry::constant(ms(3)).budget(budget.clone()))
        .gate(bucket.clone())
        .gate(semaphore.clone())
        .timeout(ms(20))
        .build()
        .unwrap();
    let mut calls = tokio::task::JoinSet::new();
    for number in 0_u64..200 {
        let policy = policy.clone();
        calls.spawn(async move {
            let script = Script::new(&Bench::new().journal, [ERR.after(ms(number % 4)), OK.after(ms(number % 7))]);
            let run = policy.classify(judge).run(|| script.make());
            if number % 5 == 0 {
                timeout(ms(number), run).await.is_ok_and(|end| end.is_ok())
            } else {
                run.await.is_ok()
            }
        });
    }
    let ended = calls.join_all().await;
    assert_eq!(ended.len(), 200);
    assert!(ended.iter().filter(|ok| **ok).count() >= 160, "whoever was not dropped succeeded");
    assert_eq!((semaphore.available(), semaphore.queued(), bucket.queued(), budget.available()), (2, 0, 0, 3));
}

/// It is over, although its future still exists: a second operation would be one that nobody counts.
#[test]
fn a_call_that_is_polled_again_after_a_panic_makes_no_second_operation() {
    let clock = Clock::paused();
    let _here = clock.enter();
    let semaphore = Semaphore::permits(1).build().unwrap();
    for policy in [Policy::named("bare"), Policy::named("gated").timeout(ms(100)).gate(semaphore.clone())] {
        let policy = policy.build().unwrap();
        for acts in [[PANIC_IN_CLOSURE, OK], [PANIC_IN_POLL, OK], [PANIC_IN_JUDGE, OK]] {
            let bench = Bench::new();
            let script = Script::new(&bench.journal, acts);
            let made = AtomicU32::new(0);
            let mut run = Box::pin(policy.classify(judge).run(|| {
                made.fetch_add(1, Ordering::Relaxed);
                script.make()
            }));
            let panic = |run: &mut _| {
                std::panic::catch_unwind(AssertUnwindSafe(|| poll_once(std::pin::Pin::as_mut(run)))).err()
            };
            assert!(panic(&mut run).expect("the act").is::<Boom>());
            let again = panic(&mut run).expect("it is over");
            assert!(!again.is::<Boom>());
            drop(run);
            assert_eq!((made.load(Ordering::Relaxed), semaphore.in_use()), (1, 0));
        }
    }
}

/// What a call in a queue is told when what is left of its limit is no longer enough.
#[tokio::test(start_paused = true)]
async fn a_call_leaves_a_queue_when_too_little_is_left_by_the_strictest_rule() {
    for (own, retry, leaves) in [(300, 0, 700), (0, 400, 600), (300, 400, 600), (500, 400, 500)] {
        let semaphore = Semaphore::permits(1).build().unwrap();
        let _permit = semaphore.try_acquire().unwrap();
        let policy = Policy::named("short").timeout(ms(1000)).min_attempt(ms(own));
        let policy =
            policy.retry(Retry::constant(ms(10)).min_attempt(ms(retry))).gate(semaphore.clone()).build().unwrap();
        let start = Instant::now();
        let error = policy.run(std::future::pending::<Result<(), ()>>).await.unwrap_err();
        assert_eq!(error.refusal().map(resile::Refusal::reason), Some(resile::Reason::TooLate), "{own} {retry}");
        let took = start.elapsed();
        assert!((ms(leaves)..=ms(leaves + 1)).contains(&took), "{own} {retry}: {took:?}");
        assert_eq!(semaphore.queued(), 0);
    }
}

/// Notes how each pass came back.
#[derive(Clone, Default)]
struct Notes(Arc<Mutex<Vec<Outcome>>>);

impl Notes {
    fn take(&self) -> Vec<Outcome> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

impl Gate for Notes {
    fn enter(&self, _: &Call) -> Entry {
        Entry::Pass(Pass::default())
    }

    fn leave(&self, _: Pass, outcome: Outcome) {
        self.0.lock().unwrap().push(outcome);
    }

    fn needs(&self) -> Needs {
        Needs::Now
    }
}

#[tokio::test(start_paused = true)]
async fn a_gate_that_asks_for_the_time_gets_it_also_of_a_call_that_has_waited() {
    for limit in [None, Some(ms(500))] {
        let notes = Notes::default();
        let mut policy = Policy::named("waits");
        if let Some(limit) = limit {
            policy = policy.timeout(limit);
        }
        let policy = policy.gate(notes.clone()).gate(Opens(Moment::now() + ms(30))).build().unwrap();
        policy.run(|| sleep(ms(20)).map(Ok::<_, ()>)).await.unwrap();
        let [Outcome::Judged(Verdict::Success, times)] = notes.take()[..] else { panic!("one good call") };
        assert_eq!(times.ended.since(times.started), ms(20), "{limit:?}");
    }
}

/// Settles, and panics when told to.
#[derive(Clone, Default)]
struct Settles(Arc<AtomicU32>);

impl Gate for Settles {
    fn enter(&self, _: &Call) -> Entry {
        Entry::Pass(Pass::default())
    }

    fn leave(&self, _: Pass, _: Outcome) {}

    fn settle(&self, _: &mut Pass, _: &Call, actual: u32) {
        self.0.fetch_add(actual, Ordering::Relaxed);
        assert_ne!(actual, 13, "boom");
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_call_has_cost_is_settled_before_the_pause_and_a_panic_there_is_a_panic() {
    let (notes, settles) = (Notes::default(), Settles::default());
    let policy = Policy::named("costs")
        .retry(Retry::constant(ms(10)).max_attempts(2))
        .gate(notes.clone())
        .gate(settles.clone())
        .build()
        .unwrap();
    let cost = |result: &Result<u32, u32>| result.unwrap_or_else(|cost| cost);
    let end = policy.call().settle(cost).run(|| async { Err::<u32, _>(5) }).await;
    assert_eq!((end.unwrap_err().attempts(), settles.0.load(Ordering::Relaxed)), (2, 10), "polled again after a pause");
    notes.take();
    let call = AssertUnwindSafe(policy.call().settle(cost).run(|| async { Ok::<_, u32>(13) }));
    assert!(call.catch_unwind().await.is_err());
    assert!(matches!(notes.take()[..], [Outcome::Judged(Verdict::Transient(None), _)]), "as a panic of the operation");
}

/// Has calls wait for ever, and panics when one gives up.
#[derive(Clone, Default)]
struct Clings(Arc<AtomicU32>);

impl Gate for Clings {
    fn enter(&self, _: &Call) -> Entry {
        Entry::Wait(Ticket::default(), None)
    }

    fn poll_wait(&self, ticket: Ticket, _: &Call, _: &mut Context<'_>) -> Entry {
        Entry::Wait(ticket, None)
    }

    fn leave(&self, _: Pass, _: Outcome) {}

    fn abandon(&self, _: Ticket) {
        self.0.fetch_add(1, Ordering::Relaxed);
        panic!("boom");
    }
}

#[test]
fn a_ticket_is_given_back_once_also_to_a_gate_that_panics_about_it() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    for ends in 0..3 {
        let (drain, cancel, clings) = (Drain::new(), Cancel::new(), Clings::default());
        let policy = Policy::named("clings").timeout(ms(50)).gate(drain.clone()).gate(clings.clone()).build().unwrap();
        let mut call = Box::pin(policy.call().cancel_on(&cancel).run(std::future::pending::<Result<(), ()>>));
        assert!(poll_once(call.as_mut()).is_pending());
        match ends {
            0 => drop(poll_once(Box::pin(drain.close(ms(10))).as_mut())),
            1 => _ = cancel.cancel(),
            _ => clock.advance(ms(51)),
        }
        let polled = std::panic::catch_unwind(AssertUnwindSafe(|| poll_once(call.as_mut())));
        assert!(polled.is_err(), "{ends}");
        let dropped = std::panic::catch_unwind(AssertUnwindSafe(|| drop(call)));
        assert_eq!((dropped.is_ok(), clings.0.load(Ordering::Relaxed), drain.in_flight()), (true, 1, 0), "{ends}");
    }
}

/// What is learned about the time an operation takes comes from operations, not from the wait of an attempt that was never
/// made.
#[tokio::test(start_paused = true)]
async fn an_attempt_that_timed_out_in_a_queue_says_nothing_about_how_long_operations_take() {
    let semaphore = Semaphore::permits(1).build().unwrap();
    let policy = Policy::named("queued").timeout(ms(1000)).retry(Retry::constant(ms(10))).gate(semaphore.clone());
    let policy = policy.build().unwrap();
    let mut first = Box::pin(policy.run(|| async {
        sleep(ms(5)).await;
        Err::<(), _>(())
    }));
    assert!(timeout(ms(7), first.as_mut()).await.is_err());
    let permit = semaphore.try_acquire().unwrap();
    let error = first.await.unwrap_err();
    assert_eq!((error.kind(), error.attempts()), (ErrorKind::TimedOut, 1));
    let next = policy.run(|| sleep(ms(5)).map(Ok::<_, ()>));
    let (end, ()) = futures::future::join(next, async {
        sleep(ms(100)).await;
        permit.success();
    })
    .await;
    end.unwrap();
}

/// A policy without a limit learns from calls that bring one.
#[tokio::test(start_paused = true)]
async fn what_an_operation_takes_is_learned_from_calls_with_a_deadline_of_their_own() {
    let semaphore = Semaphore::permits(1).build().unwrap();
    let policy = Policy::named("own").gate(semaphore.clone()).build().unwrap();
    let after = |permit: Guard, time: u64| async move {
        sleep(ms(time)).await;
        permit.success();
    };
    let permit = semaphore.try_acquire().unwrap();
    let slow = policy.call().deadline(ms(1000)).run(|| sleep(ms(300)).map(Ok::<_, ()>));
    futures::future::join(slow, after(permit, 50)).await.0.unwrap();
    let permit = semaphore.try_acquire().unwrap();
    let late = policy.call().deadline(ms(350)).run(|| sleep(ms(300)).map(Ok::<_, ()>));
    let error = futures::future::join(late, after(permit, 100)).await.0.unwrap_err();
    assert_eq!(error.refusal().map(Refusal::reason), Some(Reason::TooLate));
    assert_eq!(error.attempts(), 0);
}
