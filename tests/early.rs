//! Early ends: what is told of them, what is cleaned up after, and what goes on behind a shield.

use std::future::pending;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::FutureExt as _;
use resile::context::{self, Context};
use resile::early::{Interrupted, Stage, Why};
use resile::{
    Call, Cancel, CancelReason, Drain, Entry, Error, ErrorKind, Gate, Limit, Outcome, Pass, Policy, PolicyBuilder,
    Retry, Semaphore, Ticket, TokenBucket,
};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

type Log = Arc<Mutex<Vec<String>>>;

/// A policy whose early ends are written down, and asked about by `look`.
fn told(policy: PolicyBuilder) -> (Policy, Log) {
    let log = Log::default();
    let told = log.clone();
    let policy = policy.on_early_end(move |end| told.lock().unwrap().push(end.to_string()));
    (policy.build().unwrap(), log)
}

fn lines(log: &Log) -> Vec<String> {
    log.lock().unwrap().clone()
}

async fn never() -> Result<(), &'static str> {
    pending().await
}

#[tokio::test(start_paused = true)]
async fn a_drop_in_the_operation_is_told_with_what_it_gave_back() {
    let bucket = TokenBucket::per_second(5).build().unwrap();
    let (policy, log) =
        told(Policy::named("users").timeout(SECOND).gate(bucket).gate(Semaphore::permits(1)).timeout(300 * MS));
    let _ = timeout(100 * MS, policy.run(never)).await;
    assert_eq!(
        lines(&log),
        ["users: dropped after 100ms in the operation, in attempt 1 with 200ms left; gave back semaphore, bucket"]
    );
}

#[tokio::test(start_paused = true)]
async fn a_drop_in_a_queue_names_the_queue() {
    let semaphore = Semaphore::permits(1).build().unwrap();
    let (policy, log) = told(Policy::named("users").gate(TokenBucket::per_second(5)).gate(semaphore.clone()));
    let _held = semaphore.try_acquire().unwrap();
    let _ = timeout(100 * MS, policy.run(never)).await;
    assert_eq!(
        lines(&log),
        ["users: dropped after 100ms in the queue of semaphore, before the first attempt; gave back bucket"]
    );
}

#[tokio::test(start_paused = true)]
async fn a_limit_that_passes_in_a_queue_names_the_queue_too() {
    let semaphore = Semaphore::permits(1).build().unwrap();
    let (policy, log) = told(Policy::named("users").timeout(50 * MS).gate(semaphore.clone()));
    let _held = semaphore.try_acquire().unwrap();
    let error = policy.run(never).await.unwrap_err();
    assert!(error.is_timeout());
    assert_eq!(
        lines(&log),
        [
            "users: timed out (the limit of 50ms at step 1) after 50ms in the queue of semaphore, before the first attempt \
          with 0ns left"
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn a_drop_between_two_attempts_is_told_as_such() {
    let (policy, log) = told(Policy::named("users").retry(Retry::constant(SECOND).max_attempts(3)));
    let _ = timeout(100 * MS, policy.run(|| async { Err::<(), _>("reset") })).await;
    assert_eq!(lines(&log), ["users: dropped after 100ms between two attempts, in attempt 1"]);
}

#[tokio::test(start_paused = true)]
async fn a_cancellation_is_told_with_its_reason() {
    let cancel = Cancel::new();
    let (policy, log) = told(Policy::named("users").gate(Semaphore::permits(1)));
    let call = policy.call().cancel_on(&cancel).run(never);
    let (error, _) = tokio::join!(call, async {
        sleep(20 * MS).await;
        cancel.cancel_with(CancelReason::ClientGone)
    });
    assert_eq!(error.unwrap_err().cancel_reason(), Some(&CancelReason::ClientGone));
    let [line] = &lines(&log)[..] else { panic!("one line") };
    assert!(line.starts_with("users: cancelled (") && line.contains("after 20ms in the operation"), "{line}");
}

#[tokio::test(start_paused = true)]
async fn a_call_cancelled_before_it_began_is_told_on_its_way_in() {
    let cancel = Cancel::new();
    cancel.cancel_with(CancelReason::Superseded);
    let ends = Arc::new(Mutex::new(Vec::new()));
    let log = ends.clone();
    let policy = Policy::named("users")
        .on_early_end(move |end| {
            assert_eq!(end.stage(), Stage::Entering);
            assert_eq!((end.attempts(), end.given_back().count()), (0, 0));
            log.lock().unwrap().push(end.why().clone());
        })
        .build()
        .unwrap();
    assert!(policy.call().cancel_on(&cancel).run(never).await.is_err());
    assert_eq!(*ends.lock().unwrap(), [Why::Cancelled(CancelReason::Superseded)]);
}

#[tokio::test(start_paused = true)]
async fn the_callers_deadline_and_that_of_the_context_are_told_apart() {
    let ends = Arc::new(Mutex::new(Vec::new()));
    let log = ends.clone();
    let policy = Policy::named("users")
        .on_early_end(move |end| log.lock().unwrap().push((end.why().clone(), end.remaining())))
        .build()
        .unwrap();
    assert!(policy.call().deadline(10 * MS).run(never).await.is_err());
    assert!(context::scope(Context::new().deadline(10 * MS), policy.run(never)).await.is_err());
    assert_eq!(
        *ends.lock().unwrap(),
        [(Why::TimedOut(Limit::Caller), Duration::ZERO), (Why::TimedOut(Limit::Context), Duration::ZERO)]
    );
}

#[tokio::test(start_paused = true)]
async fn a_panic_is_told_when_its_passes_are_back() {
    let semaphore = Semaphore::permits(1).build().unwrap();
    let free = semaphore.clone();
    let ends = Arc::new(Mutex::new(Vec::new()));
    let log = ends.clone();
    let policy = Policy::named("users")
        .gate(semaphore)
        .on_early_end(move |end| log.lock().unwrap().push((end.why().clone(), free.available())))
        .build()
        .unwrap();
    let call = policy.run(|| async { if true { panic!("boom") } else { Ok::<(), &str>(()) } });
    assert!(std::panic::AssertUnwindSafe(call).catch_unwind().await.is_err());
    assert_eq!(*ends.lock().unwrap(), [(Why::Panicked, 1)]);
}

#[tokio::test(start_paused = true)]
async fn what_ends_by_itself_is_not_told() {
    let (policy, log) = told(
        Policy::named("users").retry(Retry::immediate().max_attempts(2)).gate(Semaphore::permits(1)).timeout(10 * MS),
    );
    assert_eq!(policy.run(|| async { Ok::<_, &str>(7) }).await.unwrap(), 7);
    assert!(policy.run(|| async { Err::<(), _>("reset") }).await.is_err());
    // The first attempt times out, the second one succeeds: the call did not end early.
    let mut made = 0;
    let second = policy.run(|| {
        made += 1;
        let first = made == 1;
        async move { if first { never().await } else { Ok(()) } }
    });
    second.await.unwrap();
    drop(policy.run(never));
    assert_eq!(lines(&log), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn all_listeners_are_told() {
    let count = Arc::new(AtomicU32::new(0));
    let (a, b) = (count.clone(), count.clone());
    let policy = Policy::named("users")
        .on_early_end(move |_| _ = a.fetch_add(1, Ordering::Relaxed))
        .on_early_end(move |_| _ = b.fetch_add(10, Ordering::Relaxed))
        .build()
        .unwrap();
    let _ = timeout(MS, policy.run(never)).await;
    assert_eq!(count.load(Ordering::Relaxed), 11);
}

/// A cleanup that writes down what it was told.
fn noting(
    log: &Log,
) -> impl Fn(&'static str, Interrupted) -> futures::future::Ready<()> + Send + Sync + 'static + use<> {
    let log = log.clone();
    move |handle, end| {
        let line = format!("{handle}: {} in attempt {} after {:?}", end.why(), end.attempt(), end.elapsed());
        log.lock().unwrap().push(line);
        futures::future::ready(())
    }
}

#[tokio::test(start_paused = true)]
async fn a_dropped_operation_is_cleaned_up_after_with_its_handle() {
    let log = Log::default();
    let policy = Policy::named("db").build().unwrap();
    let call = policy.call().cleanup(noting(&log)).run(|| ("query", never()));
    let _ = timeout(30 * MS, call).await;
    policy.tasks().idle().await;
    assert_eq!(lines(&log), ["query: dropped in attempt 1 after 30ms"]);
    assert_eq!((policy.tasks().cleaned(), policy.tasks().failed()), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn each_attempt_that_is_cut_is_cleaned_up_after_and_told_why() {
    let log = Log::default();
    let policy = Policy::named("db").retry(Retry::immediate().max_attempts(2)).timeout(10 * MS).build().unwrap();
    let call = policy
        .call()
        .cleanup(noting(&log))
        .run_with(|call| (if call.is_retry() { "second" } else { "first" }, never()));
    assert!(call.await.unwrap_err().is_timeout());
    policy.tasks().idle().await;
    assert_eq!(
        lines(&log),
        [
            "first: timed out (the limit of 10ms at step 2) in attempt 1 after 10ms",
            "second: timed out (the limit of 10ms at step 2) in attempt 2 after 10ms"
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_operation_is_cleaned_up_after_with_the_reason() {
    let log = Log::default();
    let policy = Policy::named("db").build().unwrap();
    let cancel = Cancel::new();
    let call = policy.call().cancel_on(&cancel).cleanup(noting(&log)).run(|| ("query", never()));
    let (error, _) = tokio::join!(call, async { cancel.cancel_with(CancelReason::Shutdown) });
    assert!(error.unwrap_err().is_cancelled());
    policy.tasks().idle().await;
    let [line] = &lines(&log)[..] else { panic!("one line") };
    assert!(line.starts_with("query: cancelled (") && line.contains("shut"), "{line}");
}

#[tokio::test(start_paused = true)]
async fn what_ends_by_itself_is_not_cleaned_up_after() {
    let log = Log::default();
    let policy = Policy::named("db").build().unwrap();
    policy.call().cleanup(noting(&log)).run(|| ("good", async { Ok::<_, &str>(()) })).await.unwrap();
    policy.call().cleanup(noting(&log)).run(|| ("bad", async { Err::<(), _>("no") })).await.unwrap_err();
    drop(policy.call().cleanup(noting(&log)).run(|| ("never polled", never())));
    policy.tasks().idle().await;
    assert_eq!(lines(&log), [""; 0]);
    assert_eq!((policy.tasks().cleaned(), policy.tasks().failed()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_panic_of_the_operation_is_cleaned_up_after() {
    let log = Log::default();
    let policy = Policy::named("db").build().unwrap();
    let operation = || ("query", async { if true { panic!("boom") } else { Ok::<(), &str>(()) } });
    let call = policy.call().cleanup(noting(&log)).run(operation);
    assert!(std::panic::AssertUnwindSafe(call).catch_unwind().await.is_err());
    policy.tasks().idle().await;
    assert_eq!(lines(&log), ["query: panicked in attempt 1 after 0ns"]);
}

#[tokio::test(start_paused = true)]
async fn a_cleanup_that_hangs_or_panics_is_counted_and_holds_nothing() {
    let semaphore = Semaphore::permits(1).build().unwrap();
    let policy = Policy::named("db").gate(semaphore.clone()).build().unwrap();
    let hanging = policy.call().cleanup(|(), _| pending()).within(SECOND).run(|| ((), never()));
    let _ = timeout(MS, hanging).await;
    assert_eq!((semaphore.available(), policy.tasks().running()), (1, 1));
    let since = Instant::now();
    policy.tasks().idle().await;
    assert_eq!(since.elapsed(), SECOND);

    let panicking = policy.call().cleanup(|(), _| async { panic!("boom") }).run(|| ((), never()));
    let _ = timeout(MS, panicking).await;
    policy.tasks().idle().await;
    assert_eq!((policy.tasks().cleaned(), policy.tasks().failed()), (0, 2));
}

#[test]
fn a_cleanup_without_a_runtime_is_counted_as_failed() {
    let policy = Policy::named("db").build().unwrap();
    let mut call = Box::pin(policy.call().cleanup(|(), _| async {}).run(|| ((), never())));
    assert!(call.as_mut().now_or_never().is_none());
    drop(call);
    assert_eq!((policy.tasks().cleaned(), policy.tasks().failed()), (0, 1));
}

#[tokio::test(start_paused = true)]
async fn a_shielded_operation_goes_on_and_holds_its_passes_until_it_really_ends() {
    let semaphore = Semaphore::permits(1).build().unwrap();
    let drain = Drain::new();
    let policy = Policy::named("payments").gate(drain.clone()).gate(semaphore.clone()).build().unwrap();
    let (done, paid) = oneshot::channel();
    let mut done = Some(done);
    let pay = move || {
        let done = done.take();
        async move {
            sleep(SECOND).await;
            let _ = done.map(|done| done.send(()));
            Ok::<_, &str>("paid")
        }
    };
    assert!(timeout(10 * MS, policy.call().shield().run(pay)).await.is_err());
    assert_eq!((semaphore.in_use(), drain.in_flight(), policy.tasks().running()), (1, 1, 1));
    paid.await.expect("it goes on");
    policy.tasks().idle().await;
    assert_eq!((semaphore.in_use(), drain.in_flight()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_caller_who_stays_gets_the_answer_of_a_shielded_call() {
    let policy = Policy::named("payments").retry(Retry::immediate().max_attempts(3)).build().unwrap();
    assert_eq!(policy.call().shield().run(|| async { Ok::<_, &str>(7) }).await.unwrap(), 7);
    let error = policy.call().shield().run(|| async { Err::<(), _>("declined") }).await.unwrap_err();
    assert_eq!((error.kind(), error.attempts(), error.into_inner()), (ErrorKind::Failed, 3, Some("declined")));
    assert_eq!(policy.call().shield().run_once(async { Ok::<_, &str>(8) }).await.unwrap(), 8);
    let attempt = policy.call().shield().run_with(|call| async move { Ok::<_, &str>(call.attempt()) });
    assert_eq!(attempt.await.unwrap(), 1);
}

#[tokio::test(start_paused = true)]
async fn neither_the_callers_deadline_nor_cancellation_nor_context_reaches_a_shielded_operation() {
    let policy = Policy::named("payments").build().unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = seen.clone();
    let pay = move || {
        let log = log.clone();
        async move {
            let request = context::current();
            let tenant = request.as_ref().and_then(|request| request.get_key("tenant").cloned());
            let remaining = request.map_or(Duration::MAX, |request| request.remaining());
            sleep(SECOND).await;
            log.lock().unwrap().push((tenant, remaining));
            Ok::<_, &str>(())
        }
    };
    let cancel = Cancel::new();
    let request = Context::new().deadline(20 * MS).key("tenant", 7_u32).cancel(&cancel);

    let late = policy.call().deadline(10 * MS).shield().run(pay.clone()).await.unwrap_err();
    assert_eq!(late.limit(), Some(Limit::Caller));
    let late: Error<&str> = context::scope(request.clone(), policy.call().shield().run(pay.clone())).await.unwrap_err();
    assert_eq!(late.limit(), Some(Limit::Context));
    let call = policy.call().cancel_on(&cancel).shield().run(pay);
    let (gone, _) = tokio::join!(call, async { cancel.cancel_with(CancelReason::ClientGone) });
    assert_eq!(gone.unwrap_err().cancel_reason(), Some(&CancelReason::ClientGone));

    policy.tasks().idle().await;
    let seen = seen.lock().unwrap();
    assert_eq!(*seen, [(None, Duration::MAX), (Some(7_u32.into()), Duration::MAX), (None, Duration::MAX)]);
}

#[tokio::test(start_paused = true)]
async fn a_timeout_step_of_the_policy_cuts_a_shielded_operation() {
    let policy = Policy::named("payments").timeout(50 * MS).build().unwrap();
    let error = policy.call().shield().run(never).await.unwrap_err();
    assert!(matches!(error.limit(), Some(Limit::Step { step: 1, .. })));
    assert_eq!(policy.tasks().running(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_shielded_call_that_was_never_polled_does_nothing() {
    let policy = Policy::named("payments").build().unwrap();
    drop(policy.call().shield().run(never));
    assert_eq!(policy.tasks().running(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_panic_behind_a_shield_goes_on_in_the_caller_and_gives_the_passes_back() {
    let semaphore = Semaphore::permits(1).build().unwrap();
    let policy = Policy::named("payments").gate(semaphore.clone()).build().unwrap();
    let pay = || async { if true { panic!("boom") } else { Ok::<(), &str>(()) } };
    let call = policy.call().shield().run(pay);
    let panic = std::panic::AssertUnwindSafe(call).catch_unwind().await.unwrap_err();
    assert_eq!(panic.downcast_ref(), Some(&"boom"));
    assert_eq!((semaphore.available(), policy.tasks().running()), (1, 0));
}

/// What went wrong in a first draft: the permit came back with the caller, while the work went on.
#[tokio::test(start_paused = true)]
async fn callers_who_leave_can_not_pile_up_more_work_than_there_are_permits() {
    let running = Arc::new(AtomicU32::new(0));
    let most = Arc::new(AtomicU32::new(0));
    let policy = Policy::named("payments").gate(Semaphore::permits(2).max_queue(100)).build().unwrap();
    for _ in 0..20 {
        let (running, most) = (running.clone(), most.clone());
        let pay = move || {
            let (running, most) = (running.clone(), most.clone());
            async move {
                most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                sleep(100 * MS).await;
                running.fetch_sub(1, Ordering::SeqCst);
                Ok::<_, &str>(())
            }
        };
        let _ = timeout(MS, policy.call().shield().run(pay)).await;
    }
    policy.tasks().idle().await;
    assert_eq!((most.load(Ordering::SeqCst), running.load(Ordering::SeqCst)), (2, 0));
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_a_backoff_or_a_gate_is_told_as_one() {
    struct Trap(bool);

    impl Gate for Trap {
        fn enter(&self, _: &Call) -> Entry {
            assert!(!self.0, "boom");
            Entry::Wait(Ticket::default(), None)
        }
        fn poll_wait(&self, _: Ticket, _: &Call, _: &mut std::task::Context<'_>) -> Entry {
            panic!("boom")
        }
        fn leave(&self, _: Pass, _: Outcome) {}
        fn name(&self) -> &'static str {
            "trap"
        }
    }

    let ends = Arc::new(Mutex::new(Vec::new()));
    let begin = || {
        let log = ends.clone();
        Policy::named("users")
            .gate(Semaphore::permits(1))
            .on_early_end(move |end| log.lock().unwrap().push((end.why().clone(), end.attempts())))
    };
    let policies = [
        begin().gate(Trap(true)).build().unwrap(),
        begin().gate(Trap(false)).build().unwrap(),
        begin().retry(Retry::with(std::iter::repeat_with(|| -> Duration { panic!("boom") }))).build().unwrap(),
    ];
    for policy in policies {
        let call = policy.run(|| async { Err::<(), _>("reset") });
        assert!(std::panic::AssertUnwindSafe(call).catch_unwind().await.is_err());
    }
    assert_eq!(*ends.lock().unwrap(), [(Why::Panicked, 0), (Why::Panicked, 0), (Why::Panicked, 1)]);
}

/// An operation that is ready at its fourth poll.
async fn in_four_polls() -> Result<(), &'static str> {
    for _ in 0..3 {
        tokio::task::yield_now().await;
    }
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn dropped_after_any_poll_a_call_with_a_cleanup_cleans_up_once_or_was_over() {
    for polls in 0..=4 {
        let log = Log::default();
        let semaphore = Semaphore::permits(1).build().unwrap();
        let policy = Policy::named("db").gate(semaphore.clone()).build().unwrap();
        let mut call = Box::pin(policy.call().cleanup(noting(&log)).run(|| ("query", in_four_polls())));
        let over = (0..polls).any(|_| call.as_mut().now_or_never().is_some());
        drop(call);
        assert_eq!((over, semaphore.available()), (polls == 4, 1), "after {polls} polls");
        policy.tasks().idle().await;
        assert_eq!(lines(&log).len(), usize::from((1..4).contains(&polls)), "after {polls} polls");
    }
}

#[tokio::test(start_paused = true)]
async fn dropped_after_any_poll_a_shielded_call_runs_to_its_end_or_never_began() {
    for polls in 0..=3 {
        let ended = Arc::new(AtomicU32::new(0));
        let semaphore = Semaphore::permits(1).build().unwrap();
        let policy = Policy::named("payments").gate(semaphore.clone()).build().unwrap();
        let count = ended.clone();
        let mut call = Box::pin(policy.call().shield().run(move || {
            let count = count.clone();
            async move {
                in_four_polls().await?;
                count.fetch_add(1, Ordering::Relaxed);
                Ok::<_, &str>(())
            }
        }));
        for _ in 0..polls {
            assert!(call.as_mut().now_or_never().is_none());
            tokio::task::yield_now().await;
        }
        drop(call);
        policy.tasks().idle().await;
        assert_eq!(
            (ended.load(Ordering::Relaxed), semaphore.available()),
            (u32::from(polls > 0), 1),
            "after {polls} polls"
        );
    }
}

/// The answer waits in the task's handle, whose poll keeps to the cooperative budget; the caller's deadline does not.
#[tokio::test(start_paused = true)]
async fn an_answer_that_is_there_wins_over_the_deadline_although_the_budget_is_spent() {
    let policy = Policy::named("payments").build().unwrap();
    let pay = || async {
        sleep(MS).await;
        Ok::<_, &str>("paid")
    };
    let mut call = Box::pin(policy.call().deadline(10 * MS).shield().run(pay));
    assert!(call.as_mut().now_or_never().is_none());
    sleep(20 * MS).await;
    let mut end = None;
    std::future::poll_fn(|cx| {
        while tokio::task::coop::has_budget_remaining() {
            let _ = std::pin::pin!(tokio::task::consume_budget()).poll(cx);
        }
        if let std::task::Poll::Ready(ready) = call.as_mut().poll(cx) {
            end = Some(ready);
        }
        std::task::Poll::Ready(())
    })
    .await;
    assert_eq!(end.expect("it is ready").unwrap(), "paid");
}

// ---------------------------------------------------------------------------------------------------------------
// What the caller of a shield is told, and what the operation sees of it

#[tokio::test(start_paused = true)]
async fn a_shielded_call_that_only_queued_was_no_attempt() {
    let semaphore = Semaphore::permits(1).build().unwrap();
    let policy = Policy::named("payments").gate(semaphore.clone()).build().unwrap();
    let held = semaphore.try_acquire().unwrap();
    let call = policy.call().deadline(SECOND).shield();
    let error = call.run(|| async { Ok::<_, &str>(()) }).await.unwrap_err();
    assert_eq!((error.limit(), error.attempts()), (Some(Limit::Caller), 0));
    drop(held);
    policy.tasks().idle().await;
    let error = policy.call().deadline(SECOND).shield().run_once(never()).await.unwrap_err();
    assert_eq!((error.limit(), error.attempts()), (Some(Limit::Caller), 1));
}

#[test]
fn a_shielded_operation_that_was_lost_with_its_runtime_was_an_attempt() {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let policy = Policy::named("payments").build().unwrap();
    let mut call = Box::pin(policy.call().shield().run(never));
    let first = runtime();
    first.block_on(async {
        assert!(call.as_mut().now_or_never().is_none());
        tokio::task::yield_now().await;
    });
    drop(first);
    let error = runtime().block_on(call).unwrap_err();
    assert_eq!((error.cancel_reason(), error.attempts()), (Some(&CancelReason::Shutdown), 1));
}

#[tokio::test(start_paused = true)]
async fn behind_a_shield_the_caller_can_be_seen_and_does_not_count() {
    let policy = Policy::named("payments").timeout(50 * MS).build().unwrap();
    let seen = policy
        .call()
        .deadline(10 * MS)
        .shield()
        .run_with(|call| async move { Ok::<_, &str>((call.caller_remaining(), call.remaining())) });
    assert_eq!(seen.await.unwrap(), (10 * MS, 50 * MS));
    let by_context = context::scope(Context::new().deadline(20 * MS), async {
        let call = policy.call().shield();
        call.run_with(|call| async move { Ok::<_, &str>(call.caller_remaining()) }).await
    });
    assert_eq!(by_context.await.unwrap(), 20 * MS);
    let plain = policy.run_with(|call| async move { Ok::<_, &str>(call.caller_remaining()) }).await;
    assert_eq!(plain.unwrap(), Duration::MAX);
}

/// The trap: a limit of the policy cuts behind the shield, too.
#[tokio::test(start_paused = true)]
async fn a_shielded_transaction_that_a_limit_cuts_is_rolled_back_once() {
    for (takes, expected) in [(10, ["begin", "commit"]), (1000, ["begin", "rollback"])] {
        let policy = Policy::named("db").timeout(50 * MS).build().unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let own = log.clone();
        let call = policy.call().shield().cleanup(|log: Arc<Mutex<Vec<&'static str>>>, cut: Interrupted| async move {
            assert!(matches!(cut.why(), Why::TimedOut(_)));
            log.lock().unwrap().push("rollback");
        });
        let end = call.run(move || {
            let log = own.clone();
            let transaction = log.clone();
            (log, async move {
                transaction.lock().unwrap().push("begin");
                sleep(takes * MS).await;
                transaction.lock().unwrap().push("commit");
                Ok::<_, &str>(())
            })
        });
        let end = end.await;
        policy.tasks().idle().await;
        assert_eq!(end.is_ok(), takes == 10);
        assert_eq!(*log.lock().unwrap(), expected);
        assert_eq!(policy.tasks().cleaned(), u64::from(takes == 1000));
    }
}

/// There is no paused clock without timers.
#[test]
fn a_cleanup_runs_in_a_runtime_without_timers() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let policy = Policy::named("db").build().unwrap();
        for yields in [false, true] {
            let call = policy.call().cleanup(move |(), _| async move {
                if yields {
                    tokio::task::yield_now().await;
                }
            });
            let mut call = Box::pin(call.run(|| ((), never())));
            assert!(call.as_mut().now_or_never().is_none());
            drop(call);
            policy.tasks().idle().await;
        }
        assert_eq!((policy.tasks().cleaned(), policy.tasks().failed()), (2, 0));
    });
}

#[tokio::test(start_paused = true)]
async fn a_listener_that_panics_about_an_early_end_is_not_told_of_another() {
    let told = Arc::new(Mutex::new(Vec::new()));
    let notes = told.clone();
    let policy = Policy::named("db").timeout(MS).on_early_end(move |end| {
        notes.lock().unwrap().push(end.to_string());
        panic!("boom");
    });
    let policy = policy.build().unwrap();
    let mut call = Box::pin(policy.run(std::future::pending::<Result<(), ()>>));
    assert!(std::panic::AssertUnwindSafe(call.as_mut()).catch_unwind().await.is_err());
    drop(call);
    assert_eq!(told.lock().unwrap().len(), 1, "{told:?}");
}
