//! What a call can end in: what the error says, what it keeps, and how it fits the errors of others.

use std::error::Error as StdError;
use std::future::{pending, ready};
use std::io;
use std::pin::pin;
use std::time::Duration;

use futures::future::poll_immediate;

use resile::{
    Cancel, CancelReason, CircuitBreaker, Drain, Erased, Error, ErrorKind, Fair, Keyed, Layers, Limit, Policy,
    PolicyBuilder, Rate, Reason, Refusal, Retry, RetryBudget, Semaphore, SlidingWindow, Stop, TokenBucket, Verdict,
};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

const fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

fn retrying(retry: Retry) -> Policy {
    Policy::named("retrying").retry(retry).build().unwrap()
}

async fn down(policy: &Policy) -> Error<&'static str> {
    policy.run(|| ready(Err::<(), _>("down"))).await.unwrap_err()
}

/// One error of each kind and each reason to stop, with what it says.
async fn all() -> Vec<(Error<&'static str>, &'static str)> {
    let semaphore = Semaphore::permits(1).max_queue(1).named("db").build().unwrap();
    let _held = semaphore.try_acquire().unwrap();
    let plain = Policy::named("plain").build().unwrap();
    let limited = Policy::named("limited").timeout(ms(10)).build().unwrap();
    let queued = Policy::named("queued").timeout(ms(10)).gate(semaphore.clone()).build().unwrap();
    let tight = Policy::named("tight").timeout(ms(10)).retry(Retry::constant(ms(20))).build().unwrap();
    let hangs = pending::<Result<(), &'static str>>;
    let token = CancellationToken::new();
    token.cancel();
    vec![
        (down(&plain).await, "plain: failed in attempt 1"),
        (down(&retrying(Retry::immediate())).await, "retrying: failed after 3 of 3 attempts"),
        (
            plain.classify(|_: &Result<(), &str>| Verdict::Permanent).run(|| ready(Err("down"))).await.unwrap_err(),
            "plain: failed in attempt 1",
        ),
        (
            down(&retrying(Retry::constant(ms(5)).max_elapsed(ms(7)))).await,
            "retrying: failed after 2 attempts in 5ms: the time for retries is used up",
        ),
        (down(&tight).await, "tight: failed after 1 attempt in 0ns: no further one fits before the deadline"),
        (
            down(&retrying(Retry::immediate().budget(RetryBudget::share(0.0).floor(0).build().unwrap()))).await,
            "retrying: failed after 1 attempt: the retry budget is empty",
        ),
        (queued.run(hangs).await.unwrap_err(), "queued: timed out: the call exceeded 10ms before the first attempt"),
        (limited.run(hangs).await.unwrap_err(), "limited: timed out: the call exceeded 10ms in attempt 1"),
        (
            plain.call().deadline(ms(5)).run(hangs).await.unwrap_err(),
            "plain: timed out: the caller's deadline passed in attempt 1",
        ),
        (queued.call().no_wait().run(hangs).await.unwrap_err(), r#"queued: no permit of "db" is free"#),
        (plain.call().cancel_on(&token).run(hangs).await.unwrap_err(), "plain: cancelled before the first attempt"),
    ]
}

#[tokio::test(start_paused = true)]
async fn each_error_says_what_happened_in_one_sentence() {
    for (error, text) in all().await {
        assert_eq!(error.to_string(), text);
        assert!(text.starts_with(char::is_lowercase) && !text.ends_with('.'));
    }
}

/// What an operator finds in a log, one row a kind: who, what, and what to do.
#[tokio::test(start_paused = true)]
async fn an_operator_reads_who_it_was_and_when_to_come_back() {
    let hangs = pending::<Result<(), &'static str>>;
    let payments = |step: &dyn Fn(PolicyBuilder) -> PolicyBuilder| step(Policy::named("payments")).build().unwrap();
    let takes = |time| {
        move || async move {
            sleep(time).await;
            Err::<(), _>("down")
        }
    };
    let mut rows: Vec<(String, &str)> = Vec::new();

    let policy = payments(&|it| it.timeout(ms(5000)).retry(Retry::constant(ms(300))));
    let error = policy.run(takes(ms(200))).await.unwrap_err();
    rows.push((error.to_string(), "payments: failed after 3 of 3 attempts in 1.2s"));
    let permanent = policy.classify(|_: &Result<(), &str>| Verdict::Permanent);
    let error = permanent.run(|| ready(Err("down"))).await.unwrap_err();
    rows.push((error.to_string(), "payments: failed in attempt 1, not retried: permanent"));

    let policy = payments(&|it| it.retry(Retry::immediate()).timeout(ms(300)));
    rows.push((policy.run(hangs).await.unwrap_err().to_string(), "payments: timed out: attempt 3 exceeded 300ms"));
    let policy = payments(&|it| it.timeout(ms(300)));
    let text = "payments: timed out: the call exceeded 300ms in attempt 1";
    rows.push((policy.run(hangs).await.unwrap_err().to_string(), text));

    for (rate, text) in [
        (Rate::new(36, Duration::from_secs(7)), "payments: rate limit \"bucket\" exceeded, retry in 195ms"),
        (Rate::new(1, Duration::from_secs(29_610)), "payments: rate limit \"bucket\" exceeded, retry in 8h 13m 30s"),
    ] {
        let policy = payments(&|it| it.gate(TokenBucket::at(rate).burst(1)));
        let call = || policy.call().no_wait();
        call().run(|| ready(Ok::<_, &str>(()))).await.unwrap();
        rows.push((call().run(hangs).await.unwrap_err().to_string(), text));
    }

    let db = Semaphore::permits(1).max_wait(ms(50)).named("db").build().unwrap();
    let held = db.try_acquire().unwrap();
    let policy = payments(&|it| it.gate(db.clone()));
    let text = r#"payments: waited 50ms in the queue of "db", the most allowed"#;
    rows.push((policy.run(hangs).await.unwrap_err().to_string(), text));
    let text = r#"payments: no permit of "db" is free"#;
    rows.push((policy.call().no_wait().run(hangs).await.unwrap_err().to_string(), text));
    drop(held);
    let policy = payments(&|it| it.gate(TokenBucket::per_second(5).burst(1).max_wait(ms(150))));
    policy.run(|| ready(Ok::<_, &str>(()))).await.unwrap();
    let text = r#"payments: would wait 200ms for "bucket", longer than its max_wait 150ms"#;
    rows.push((policy.run(hangs).await.unwrap_err().to_string(), text));

    let drain = Drain::new();
    drain.close(Duration::ZERO).await;
    let policy = payments(&|it| it.gate(drain.clone()));
    rows.push((policy.run(hangs).await.unwrap_err().to_string(), "payments: shutting down, no new work"));

    let tenants = Keyed::by("tenant", Semaphore::permits(1)).capacity(1).build().unwrap();
    let _busy = tenants.of("a").try_acquire().unwrap();
    let policy = payments(&|it| it.gate(tenants.clone()));
    let text = r#"payments: keyed "tenant": table full (1 keys busy)"#;
    rows.push((policy.call().key("tenant", "b").run(hangs).await.unwrap_err().to_string(), text));
    let text = r#"payments: refused by "tenant": the call has no key "tenant""#;
    rows.push((policy.run(hangs).await.unwrap_err().to_string(), text));

    let policy = payments(&|it| it);
    let handle = Cancel::new();
    let mut run = pin!(policy.call().cancel_on(&handle).run(hangs));
    assert!(poll_immediate(run.as_mut()).await.is_none());
    handle.cancel_with(CancelReason::ClientGone);
    rows.push((run.await.unwrap_err().to_string(), "payments: cancelled in attempt 1: the client has gone"));

    let breaker = CircuitBreaker::builder().named("ledger").build().unwrap();
    breaker.force_open();
    let policy = payments(&|it| it.gate(breaker.clone()));
    let text = r#"payments: refused by "ledger": the circuit is held open"#;
    rows.push((policy.run(hangs).await.unwrap_err().to_string(), text));

    let nameless = Policy::named("").build().unwrap();
    rows.push((down(&nameless).await.to_string(), "failed in attempt 1"));
    for (read, text) in rows {
        assert_eq!(read, text);
    }
}

/// The same for who builds a policy: the step and what stands at it.
#[test]
fn a_config_error_names_the_step_and_the_gate() {
    let policy = Policy::named("payments")
        .timeout(ms(900))
        .retry(Retry::immediate().max_attempts(0))
        .gate(CircuitBreaker::builder().failure_rate(2.0))
        .gate(Semaphore::permits(0))
        .timeout(Duration::ZERO)
        .gate(Keyed::by("tenant", Semaphore::permits(0)))
        .gate(Fair::by("tenant", TokenBucket::per_second(0)))
        .gate(Layers::new().layer("all", SlidingWindow::per_second(0)));
    let error = policy.build().unwrap_err();
    let read: Vec<_> = error.faults().iter().map(ToString::to_string).collect();
    assert_eq!(
        read,
        [
            "policy payments: step 2 (retry): max_attempts must be 1 to 1000, is 0",
            "policy payments: step 3 (breaker): failure_rate must be above 0 up to 1, is 2.0",
            "policy payments: step 4 (semaphore): permits must be 1 to 2147483647, is 0",
            "policy payments: step 5 (timeout): limit must be above 0, is 0ns",
            r#"policy payments: step 6 (keyed "tenant", each key: semaphore): permits must be 1 to 2147483647, is 0"#,
            "policy payments: step 7 (fair by tenant: bucket): rate must be 1 to 10^9 per second, over a period up to 366 days, is 0 per 1s",
            r#"policy payments: step 8 (layers, layer "all": window): rate must be 1 to 10^9 per second, over a period up to 366 days, is 0 per 1s"#,
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn each_error_is_of_one_kind() {
    for (error, _) in all().await {
        let kinds = [error.is_timeout(), error.is_refused(), error.is_cancelled(), error.kind() == ErrorKind::Failed];
        assert_eq!(kinds.iter().filter(|is| **is).count(), 1, "{error}");
        assert_eq!(error.limit().is_some(), error.is_timeout());
        assert_eq!(error.refusal().is_some(), error.is_refused());
        assert_eq!(error.budget_exhausted(), error.stop() == Stop::Budget);
    }
}

#[tokio::test(start_paused = true)]
async fn the_operations_error_comes_back_from_every_error_that_has_one() {
    for (error, text) in all().await {
        let last = (error.kind() == ErrorKind::Failed).then_some("down");
        assert_eq!(error.last(), last.as_ref(), "{text}");
        assert_eq!(error.into_inner(), last, "{text}");
    }
}

/// Fails once, and then ends otherwise.
async fn after_a_failure(then: ErrorKind) -> Error<String> {
    let token = CancellationToken::new();
    let semaphore = Semaphore::permits(1).max_queue(0).build().unwrap();
    let policy = Policy::named("then")
        .retry(Retry::constant(ms(10)).max_attempts(2))
        .gate(semaphore.clone())
        .timeout(ms(50))
        .build()
        .unwrap();
    let operation = |call: resile::Attempt| async move {
        if call.is_retry() { pending::<Result<(), String>>().await } else { Err("first".to_owned()) }
    };
    let mut run = pin!(policy.call().cancel_on(&token).run_with(operation));
    assert!(poll_immediate(run.as_mut()).await.is_none());
    let held = (then == ErrorKind::Refused).then(|| semaphore.try_acquire().unwrap());
    if then == ErrorKind::Cancelled {
        sleep(ms(20)).await;
        token.cancel();
    }
    let error = run.await.unwrap_err();
    drop(held);
    assert_eq!(error.kind(), then);
    error
}

#[tokio::test(start_paused = true)]
async fn an_error_that_came_before_is_kept_however_the_call_ended() {
    for (then, attempts) in [(ErrorKind::TimedOut, 2), (ErrorKind::Refused, 1), (ErrorKind::Cancelled, 1)] {
        let error = after_a_failure(then).await;
        assert_eq!((error.attempts(), error.last().map(String::as_str)), (attempts, Some("first")), "{then:?}");
        assert_eq!(error.into_inner(), Some("first".to_owned()));
    }
}

#[tokio::test(start_paused = true)]
async fn attempts_are_the_times_that_the_operation_was_started() {
    let expected = [1, 3, 1, 2, 1, 1, 0, 1, 1, 0, 0];
    for ((error, text), attempts) in all().await.into_iter().zip(expected) {
        assert_eq!(error.attempts(), attempts, "{text}");
    }
}

#[tokio::test(start_paused = true)]
async fn each_error_says_why_there_was_no_further_attempt() {
    use Stop::{Attempts, Budget, Deadline, Elapsed, NoRetry};
    let expected = [NoRetry, Attempts, NoRetry, Elapsed, Deadline, Budget, NoRetry, NoRetry, NoRetry, NoRetry, NoRetry];
    for ((error, text), stop) in all().await.into_iter().zip(expected) {
        assert_eq!(error.stop(), stop, "{text}");
    }
    let policy = retrying(Retry::immediate());
    let error = policy.classify(|_: &Result<(), ()>| Verdict::Permanent).run(|| ready(Err(()))).await.unwrap_err();
    assert_eq!(error.stop(), Stop::Final);
}

#[tokio::test(start_paused = true)]
async fn the_limit_says_whose_it_was() {
    let policy = Policy::named("limits").retry(Retry::immediate().max_attempts(1)).timeout(ms(10)).build().unwrap();
    let error = policy.run(pending::<Result<(), ()>>).await.unwrap_err();
    assert_eq!(error.limit(), Some(Limit::Step { step: 2, limit: ms(10) }));
    assert_eq!(error.limit().unwrap().to_string(), "the limit of 10ms at step 2");
    let error = policy.call().deadline(ms(5)).run(pending::<Result<(), ()>>).await.unwrap_err();
    assert_eq!(error.limit().unwrap().to_string(), "the caller's deadline");
}

#[tokio::test(start_paused = true)]
async fn the_time_to_come_back_is_the_gates_or_the_peers() {
    let bucket = TokenBucket::per_second(1).burst(1).max_queue(0).build().unwrap();
    bucket.try_take(1).unwrap();
    let policy = Policy::named("when").gate(bucket).build().unwrap();
    let error = policy.run(|| ready(Ok::<_, ()>(()))).await.unwrap_err();
    assert_eq!(error.retry_after(), error.refusal().unwrap().retry_after());
    assert!(error.retry_after() > Some(ms(999)));

    let plain = Policy::named("plain").build().unwrap();
    for (verdict, after) in [
        (Verdict::Overloaded(Some(ms(70))), Some(ms(70))),
        (Verdict::Transient(Some(Duration::ZERO)), Some(Duration::ZERO)),
        (Verdict::Transient(None), None),
        (Verdict::Permanent, None),
    ] {
        let error = plain.classify(|_: &Result<(), ()>| verdict).run(|| ready(Err(()))).await.unwrap_err();
        assert_eq!(error.retry_after(), after);
    }
    let error = plain.call().deadline(ms(1)).run(pending::<Result<(), ()>>).await.unwrap_err();
    assert_eq!(error.retry_after(), None);
}

#[tokio::test(start_paused = true)]
async fn the_hint_of_an_earlier_attempt_is_not_that_of_a_later_one() {
    let policy = retrying(Retry::immediate().max_attempts(2));
    let error = policy
        .classify(|result: &Result<(), u32>| Verdict::Transient((*result == Err(1)).then_some(ms(5))))
        .run_with(|call| ready(Err(call.attempt())))
        .await
        .unwrap_err();
    assert_eq!((error.retry_after(), error.into_inner()), (None, Some(2)));
}

#[tokio::test(start_paused = true)]
async fn the_time_a_call_took_is_known_where_a_step_reads_the_clock() {
    let operation = || async {
        sleep(ms(30)).await;
        Err::<(), _>("down")
    };
    let timed = Policy::named("timed").timeout(Duration::from_secs(1)).build().unwrap();
    assert_eq!(timed.run(operation).await.unwrap_err().elapsed(), Some(ms(30)));
    let unmeasured = Policy::named("unmeasured").build().unwrap();
    assert_eq!(unmeasured.run(operation).await.unwrap_err().elapsed(), None);
    let start = tokio::time::Instant::now();
    let retried = Policy::named("retried").timeout(Duration::from_secs(1)).retry(Retry::constant(ms(10))).build();
    let error = retried.unwrap().run(operation).await.unwrap_err();
    assert_eq!((error.elapsed(), start.elapsed()), (Some(ms(110)), ms(110)));
}

/// No bound on `E` for anything but what needs it.
#[tokio::test(start_paused = true)]
async fn an_operations_error_may_be_anything() {
    struct Opaque(#[allow(dead_code, reason = "only carried")] std::rc::Rc<()>);
    let policy = retrying(Retry::immediate().max_attempts(2));
    let error = policy.run(|| ready(Err::<(), _>(Opaque(std::rc::Rc::new(()))))).await.err().unwrap();
    assert_eq!(error.to_string(), "retrying: failed after 2 of 2 attempts");
    assert_eq!((error.kind(), error.attempts()), (ErrorKind::Failed, 2));
    assert!(error.map(|Opaque(_)| 7).into_inner() == Some(7));

    let local = String::from("borrowed");
    let error: Error<&str> = policy.run(|| ready(Err::<(), _>(local.as_str()))).await.unwrap_err();
    assert_eq!(error.last(), Some(&"borrowed"));
}

#[tokio::test(start_paused = true)]
async fn the_source_is_the_operations_error() {
    let policy = Policy::named("source").timeout(ms(10)).retry(Retry::constant(ms(4))).build().unwrap();
    let error = policy.run(|| ready(Err::<(), _>(io::Error::other("reset")))).await.unwrap_err();
    let source = error.source().unwrap();
    assert_eq!(source.to_string(), "reset");
    assert!(source.downcast_ref::<io::Error>().is_some());

    let error = policy.run(pending::<Result<(), io::Error>>).await.unwrap_err();
    assert!(error.source().is_none());

    let error = policy
        .run_with(|call| async move {
            if call.is_retry() { pending().await } else { Err::<(), _>(io::Error::other("reset")) }
        })
        .await
        .unwrap_err();
    assert!(error.is_timeout());
    assert_eq!(error.source().unwrap().to_string(), "reset", "what came before the timeout");
}

#[tokio::test(start_paused = true)]
async fn an_error_passes_through_a_question_mark() {
    async fn load(policy: &Policy) -> Result<u32, Box<dyn StdError + Send + Sync>> {
        Ok(policy.run(|| ready(Err(io::Error::other("reset")))).await?)
    }
    async fn through_anyhow(policy: &Policy) -> anyhow::Result<u32> {
        Ok(policy.run(|| ready(Err(io::Error::other("reset")))).await?)
    }
    let policy = Policy::named("mark").build().unwrap();
    let error = load(&policy).await.unwrap_err();
    assert_eq!(error.downcast::<Error<io::Error>>().unwrap().into_inner().unwrap().to_string(), "reset");
    let error = through_anyhow(&policy).await.unwrap_err();
    assert_eq!(format!("{error:#}"), "mark: failed in attempt 1: reset");
    assert!(error.chain().any(|cause| cause.downcast_ref::<io::Error>().is_some()));
}

/// `anyhow::Error` and boxed errors are no errors themselves.
#[tokio::test(start_paused = true)]
async fn an_erased_error_is_an_error_whatever_it_was() {
    async fn load(policy: &Policy) -> anyhow::Result<u32> {
        let operation = async || -> anyhow::Result<u32> { Err(anyhow::anyhow!("no such table").context("loading")) };
        Ok(policy.run(operation).await.map_err(Error::erase)?)
    }
    let policy = retrying(Retry::immediate().max_attempts(2));
    let error = load(&policy).await.unwrap_err();
    let chain: Vec<_> = error.chain().map(ToString::to_string).collect();
    assert_eq!(chain, ["retrying: failed after 2 of 2 attempts", "loading", "no such table"]);

    let boxed = || ready(Err::<(), Box<dyn StdError + Send + Sync>>(Box::new(io::Error::other("reset"))));
    let error: Error<Erased> = policy.run(boxed).await.map_err(Error::erase).unwrap_err();
    assert_eq!((error.attempts(), error.stop()), (2, Stop::Attempts));
    assert_eq!(error.source().unwrap().to_string(), "reset");
    let inner = error.into_inner().unwrap().into_inner();
    assert!(inner.downcast::<io::Error>().is_ok(), "nothing is lost");
}

#[tokio::test(start_paused = true)]
async fn a_text_can_be_erased_too() {
    let policy = Policy::named("text").build().unwrap();
    let error = down(&policy).await.erase();
    assert_eq!(error.source().unwrap().to_string(), "down");
}

#[tokio::test(start_paused = true)]
async fn a_change_of_the_operations_error_keeps_the_rest() {
    let policy = Policy::named("map").timeout(ms(50)).retry(Retry::constant(ms(10)).max_attempts(2)).build().unwrap();
    let judge = |_: &Result<(), &str>| Verdict::Transient(Some(ms(20)));
    let error = policy.classify(judge).run(|| ready(Err("down"))).await.unwrap_err();
    let (text, elapsed) = (error.to_string(), error.elapsed());
    let error = error.map(str::len);
    assert_eq!((error.to_string(), error.elapsed(), error.last()), (text, elapsed, Some(&4)));
    assert_eq!((error.attempts(), error.stop(), error.retry_after()), (2, Stop::Attempts, Some(ms(20))));
}

#[tokio::test(start_paused = true)]
async fn an_error_can_be_printed_for_programmers() {
    let policy = retrying(Retry::immediate().max_attempts(2));
    let text = format!("{:?}", down(&policy).await);
    for part in ["Failed", "\"down\"", "attempts: 2", "Attempts"] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[test]
fn a_refusal_says_who_why_and_when() {
    let refusal = |reason| Refusal::new("db", reason);
    for (refusal, text) in [
        (refusal(Reason::Busy), r#"no permit of "db" is free"#),
        (refusal(Reason::QueueFull), r#"refused by "db": the queue is full"#),
        (refusal(Reason::QueueTimeout), r#"refused by "db": the longest wait is over"#),
        (refusal(Reason::TooLate), r#"refused by "db": it could not be served in time"#),
        (
            refusal(Reason::CostAboveLimit { cost: 3, limit: 2 }),
            r#"refused by "db": a cost of 3 is above the limit of 2"#,
        ),
        (refusal(Reason::CircuitOpen), r#"refused by "db": the circuit is open"#),
        (refusal(Reason::Probing), r#"refused by "db": the circuit is half open and its probes are on their way"#),
        (refusal(Reason::ForcedOpen), r#"refused by "db": the circuit is held open"#),
        (refusal(Reason::Closed), r#"refused by "db": it is closed"#),
        (refusal(Reason::Other("moon phase")), r#"refused by "db": moon phase"#),
        (refusal(Reason::Busy).after(ms(1500)), r#"no permit of "db" is free, retry in 1.5s"#),
    ] {
        assert_eq!(refusal.to_string(), text);
        assert_eq!(refusal.gate(), "db");
        assert!(refusal.source().is_none());
    }
}

#[test]
fn a_refusal_is_a_value() {
    let refusal = Refusal::new(String::from("made at run time"), Reason::Busy).after(ms(5));
    assert_eq!(refusal.clone(), refusal);
    assert_ne!(refusal.clone().after(ms(6)), refusal);
    assert_eq!(
        (refusal.gate(), refusal.reason(), refusal.retry_after()),
        ("made at run time", Reason::Busy, Some(ms(5)))
    );
    let boxed: Box<dyn StdError + Send + Sync> = refusal.into();
    assert!(boxed.downcast_ref::<Refusal>().is_some());
}

/// A test that compares refusals can't know whether the gate's name was a literal.
#[test]
fn refusals_that_say_the_same_are_equal() {
    let (literal, made) = (Refusal::new("db", Reason::Busy), Refusal::new(String::from("db"), Reason::Busy));
    assert_eq!(literal, made);
    let semaphore = Semaphore::permits(1).named(String::from("db")).build().unwrap();
    let _held = semaphore.try_acquire().unwrap();
    assert_eq!(semaphore.try_acquire().unwrap_err(), literal);
}
