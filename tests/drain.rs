//! The drain: who is let in, how a closing goes on, what it reports, and that nobody and nothing keeps it from ending.

mod support;

use std::convert::Infallible;
use std::future::pending;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Context;
use std::time::Duration;

use futures::future::{join_all, poll_immediate};
use futures::{FutureExt as _, StreamExt as _};
use proptest::prelude::*;
use resile::{
    Cancel, CancelReason, Drain, Drained, ErrorKind, FutureExt as _, Guard, OnRefusal, Phase, Policy, Reason, Retry,
    RetryBudget, Semaphore, infallible,
};
use support::hand::{Clock, Flag, nosy, poll_once};
use support::ms;
use tokio::task::yield_now;
use tokio::time::{Instant, sleep};

const fn secs(count: u64) -> Duration {
    Duration::from_secs(count)
}

/// The numbers of a report.
fn numbers(report: &Drained) -> (u64, u64, u64) {
    (report.finished(), report.cancelled(), report.still_in())
}

/// The names in a report: how many of each, and for how long.
fn stuck(report: &Drained) -> Vec<(&str, u64, Duration)> {
    report.stuck().iter().map(|held| (held.name(), held.count(), held.longest())).collect()
}

/// Holds a place for some time, whatever happens.
fn hold_for(guard: Guard, time: Duration) {
    tokio::spawn(async move {
        sleep(time).await;
        guard.success();
    });
}

/// Begins to close in a task of its own.
async fn begin(drain: &Drain, grace: Duration) -> tokio::task::JoinHandle<Drained> {
    let closing = tokio::spawn(drain.close(grace));
    drain.closing().await;
    closing
}

// --- how a closing goes on

#[tokio::test(start_paused = true)]
async fn it_waits_for_what_is_in_and_not_a_moment_longer() {
    let drain = Drain::new();
    hold_for(drain.try_acquire().unwrap(), secs(3));
    hold_for(drain.track("request").unwrap(), secs(2));
    let start = Instant::now();
    let report = drain.close(secs(20)).await;
    assert_eq!(start.elapsed(), secs(3));
    assert_eq!((numbers(&report), report.took()), ((2, 0, 0), secs(3)));
    assert!(report.is_clean());
    assert_eq!(report.to_string(), "closed in 3s: 2 finished, 0 cancelled");
}

#[tokio::test(start_paused = true)]
async fn with_nobody_in_it_is_done_at_once() {
    for grace in [Duration::ZERO, secs(20), Duration::MAX] {
        let drain = Drain::new();
        let report = drain.close(grace).await;
        assert_eq!((numbers(&report), report.took()), ((0, 0, 0), Duration::ZERO));
        assert!(!drain.cancel_token().is_cancelled(), "there was nobody to cancel");
    }
}

#[tokio::test(start_paused = true)]
async fn when_the_grace_is_over_the_rest_is_cancelled_with_the_reason() {
    let drain = Drain::new();
    let policy = Policy::named("users").gate(drain.clone()).build().unwrap();
    let call = tokio::spawn({
        let token = drain.cancel_token();
        async move { policy.call().cancel_on(&token).run(pending::<Result<(), ()>>).await }
    });
    yield_now().await;
    let start = Instant::now();
    let report = drain.close(secs(20)).await;
    assert_eq!(start.elapsed(), secs(20));
    assert_eq!(numbers(&report), (0, 1, 0));
    let error = call.await.unwrap().unwrap_err();
    assert_eq!(error.cancel_reason(), Some(&CancelReason::Shutdown));
    assert_eq!(drain.cancel_token().reason(), Some(CancelReason::Shutdown));
}

#[tokio::test(start_paused = true)]
async fn what_does_not_end_when_told_is_reported_by_name() {
    let drain = Drain::builder().cancel_wait(secs(5)).build().unwrap();
    let old = drain.track("sse").unwrap();
    sleep(secs(10)).await;
    let young = drain.track("sse").unwrap();
    let (job, request) = (drain.track(format!("job {}", 7)), drain.acquire().await);
    hold_for(drain.try_acquire().unwrap(), secs(1));
    hold_for(drain.try_acquire().unwrap(), secs(22));

    let report = drain.close(secs(20)).await;
    assert_eq!((numbers(&report), report.took(), report.is_clean()), ((1, 1, 4), secs(25), false));
    assert_eq!(stuck(&report), [("sse", 2, secs(35)), ("job 7", 1, secs(25))]);
    assert_eq!(report.unnamed(), 1);
    let line = "closed in 25s: 1 finished, 1 cancelled, still in: sse ×2 for 35s, job 7 ×1 for 25s, 1 unnamed";
    assert_eq!(report.to_string(), line);

    drop((old, young, job, request));
    assert_eq!((drain.in_flight(), drain.phase()), (0, Phase::Done), "who is late is out all the same");
    assert_eq!(drain.closed().await, report, "and the report is what it was");
}

#[tokio::test(start_paused = true)]
async fn a_task_that_looks_at_the_token_can_clean_up_within_the_wait() {
    let drain = Drain::builder().cancel_wait(secs(5)).build().unwrap();
    let cleaned = tokio::spawn({
        let (guard, cancel) = (drain.track("session").unwrap(), drain.cancel_token());
        async move {
            let reason = cancel.cancelled().await;
            sleep(secs(4)).await;
            drop(guard);
            reason
        }
    });
    let report = drain.close(secs(1)).await;
    assert_eq!((numbers(&report), report.took()), ((0, 1, 0), secs(5)));
    assert_eq!(cleaned.await.unwrap(), CancelReason::Shutdown);
}

#[tokio::test(start_paused = true)]
async fn every_phase_can_be_read_and_awaited_from_any_task() {
    let drain = Drain::builder().cancel_wait(secs(5)).build().unwrap();
    let _stuck = drain.track("stuck").unwrap();
    let start = Instant::now();
    let seen = [Phase::Open, Phase::Closing, Phase::Cancelling, Phase::Done].map(|phase| {
        let drain = drain.clone();
        tokio::spawn(async move {
            drain.wait_for(phase).await;
            assert_eq!(drain.phase(), phase);
            start.elapsed()
        })
    });
    let closed = tokio::spawn(drain.closed());
    sleep(secs(1)).await;
    assert_eq!(drain.phase(), Phase::Open);
    let report = drain.close(secs(20)).await;
    let times = join_all(seen).await.into_iter().map(Result::unwrap).collect::<Vec<_>>();
    assert_eq!(times, [secs(0), secs(1), secs(21), secs(26)]);
    assert_eq!(closed.await.unwrap(), report);
    drain.wait_for(Phase::Cancelling).now_or_never().expect("a phase that it is past is there at once");
}

#[tokio::test(start_paused = true)]
async fn waiting_for_a_phase_can_be_given_up() {
    let drain = Drain::new();
    for phase in [Phase::Closing, Phase::Cancelling, Phase::Done] {
        assert!(drain.wait_for(phase).now_or_never().is_none());
    }
    assert!(drain.closed().now_or_never().is_none());
    assert!(drain.close(secs(1)).await.is_clean());
}

// --- who is let in

#[tokio::test(start_paused = true)]
async fn once_closed_it_refuses_everybody_and_a_refusal_changes_nothing() {
    let drain = Drain::builder().named("api").build().unwrap();
    let part = drain.part("users");
    let guard = drain.track("first").unwrap();
    let closing = begin(&drain, secs(20)).await;

    let policy = Policy::named("users").gate(drain.clone()).build().unwrap();
    let ran = AtomicBool::new(false);
    let run = || infallible(async { ran.store(true, Ordering::Relaxed) });
    let error = policy.run(run).await.unwrap_err();
    let shot = run().through(&drain).await.unwrap_err();
    let spawned = drain.spawn("job", async {}).unwrap_err();
    let refusals = [
        drain.try_acquire().unwrap_err(),
        drain.acquire().await.unwrap_err(),
        drain.track("late").unwrap_err(),
        part.try_acquire().unwrap_err(),
        error.refusal().unwrap().clone(),
        shot.refusal().unwrap().clone(),
        spawned,
    ];
    for refusal in refusals {
        assert_eq!((refusal.gate(), refusal.reason(), refusal.retry_after()), ("api", Reason::Draining, None));
        assert_eq!(refusal.to_string(), "shutting down, no new work");
    }
    assert!(!ran.load(Ordering::Relaxed));
    assert_eq!((drain.in_flight(), drain.held().len()), (1, 1));
    drop(guard);
    assert_eq!(numbers(&closing.await.unwrap()), (1, 0, 0));
    assert_eq!(drain.try_acquire().unwrap_err().reason(), Reason::Draining);
}

#[tokio::test(start_paused = true)]
async fn a_call_under_a_policy_is_in_flight_until_it_ends_or_is_dropped() {
    let drain = Drain::new();
    let policy = Policy::named("users").gate(drain.part("users")).timeout(secs(1)).gate(drain.clone()).build().unwrap();
    assert_eq!(policy.to_string(), "users: users → timeout 1s → drain");
    let in_flight = || (drain.in_flight(), drain.held().len());
    assert_eq!(policy.run(|| async { Ok::<_, ()>(in_flight()) }).await.unwrap(), (2, 1));
    assert_eq!(in_flight(), (0, 0));
    assert!(policy.run(pending::<Result<(), ()>>).await.unwrap_err().is_timeout());
    assert_eq!(in_flight(), (0, 0));
    let call = Box::pin(policy.run(pending::<Result<(), ()>>));
    let mut call = Some(call);
    assert!(poll_immediate(call.as_mut().unwrap()).await.is_none());
    assert_eq!(in_flight(), (2, 1));
    call = None;
    assert!(call.is_none());
    assert_eq!(in_flight(), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn who_comes_above_the_bound_of_names_is_counted_without() {
    let drain = Drain::builder().max_names(1).cancel_wait(Duration::ZERO).build().unwrap();
    let guards = ["a", "b", "c"].map(|name| drain.track(name).unwrap());
    assert_eq!((drain.in_flight(), drain.held().len()), (3, 1));
    let report = drain.close(Duration::ZERO).await;
    assert_eq!((stuck(&report), report.unnamed()), (vec![("a", 1, Duration::ZERO)], 2));
    drop(guards);
    assert_eq!((drain.in_flight(), drain.held().len()), (0, 0));
    let none = Drain::builder().max_names(0).build().unwrap();
    let _guard = none.track("a").unwrap();
    assert_eq!((none.in_flight(), none.held().len()), (1, 0));
}

#[test]
fn wrong_settings_are_told_all_at_once() {
    let error = Drain::builder().cancel_wait(secs(86_401)).max_names(1 << 21).build().unwrap_err();
    assert_eq!(
        error.to_string(),
        "drain: cancel_wait must be 0 to 24h, is 86401s; drain: max_names must be 0 to 1048576, is 2097152"
    );
    let within = Policy::named("users").gate(Drain::builder().cancel_wait(Duration::MAX)).build().unwrap_err();
    assert_eq!(within.faults()[0].place(), "policy users: step 1 (drain)");
}

// --- retries and queues inside

#[tokio::test(start_paused = true)]
async fn a_retry_around_it_makes_no_further_attempt() {
    let drain = Drain::new();
    let retry = Retry::constant(secs(1)).max_attempts(10).on_refusal(OnRefusal::Retry);
    let policy = Policy::named("users").retry(retry).gate(drain.clone()).build().unwrap();
    let call = tokio::spawn(policy.into_run(|| async { Err::<(), _>("down") }));
    sleep(ms(1500)).await;
    let report = drain.close(secs(20)).await;
    assert_eq!(numbers(&report), (0, 0, 0), "in backoff it holds no place");
    let error = call.await.unwrap().unwrap_err();
    assert_eq!((error.attempts(), error.last()), (2, Some(&"down")));
    assert_eq!(error.refusal().unwrap().reason(), Reason::Draining);
}

#[tokio::test(start_paused = true)]
async fn a_retry_inside_of_it_stops_too_and_its_budget_is_given_back() {
    let budget = RetryBudget::share(1.0).build().unwrap();
    let before = budget.available();
    let drain = Drain::new();
    let retry = Retry::constant(secs(1)).max_attempts(10).budget(budget.clone());
    let policy = Policy::named("users").gate(drain.clone()).retry(retry).build().unwrap();
    let call = tokio::spawn(policy.into_run(|| async { Err::<(), _>("down") }));
    sleep(ms(1500)).await;
    let report = drain.close(secs(20)).await;
    assert_eq!((numbers(&report), report.took()), ((1, 0, 0), Duration::ZERO), "nobody waits for a sleeper");
    let error = call.await.unwrap().unwrap_err();
    assert_eq!((error.kind(), error.attempts(), error.last()), (ErrorKind::Refused, 2, Some(&"down")));
    assert_eq!(error.refusal().unwrap().reason(), Reason::Draining);
    assert_eq!(budget.available(), before);
}

#[tokio::test(start_paused = true)]
async fn a_retry_without_delay_stops_as_well() {
    let drain = Drain::new();
    let policy = Policy::named("users").gate(drain.clone()).retry(Retry::immediate().max_attempts(10)).build().unwrap();
    let made = Arc::new(AtomicU32::new(0));
    let call = tokio::spawn(policy.into_run({
        let made = made.clone();
        move || {
            made.fetch_add(1, Ordering::Relaxed);
            async {
                sleep(secs(1)).await;
                Err::<(), _>("down")
            }
        }
    }));
    sleep(ms(1500)).await;
    let report = drain.close(secs(20)).await;
    assert_eq!((numbers(&report), report.took()), ((1, 0, 0), ms(500)), "the attempt on its way was let finish");
    assert_eq!((call.await.unwrap().unwrap_err().attempts(), made.load(Ordering::Relaxed)), (2, 2));
}

#[tokio::test(start_paused = true)]
async fn who_waits_in_a_queue_inside_is_refused_when_its_turn_comes() {
    for named in [false, true] {
        let drain = Drain::new();
        let semaphore = Semaphore::permits(1).build().unwrap();
        let builder = Policy::named("users");
        let builder = if named { builder.gate(drain.part("users")) } else { builder.gate(drain.clone()) };
        let policy = builder.gate(semaphore.clone()).build().unwrap();
        let [first, second] = [secs(2), secs(2)].map(|time| {
            tokio::spawn(policy.clone().into_run(move || async move {
                sleep(time).await;
                Ok::<_, Infallible>(())
            }))
        });
        sleep(secs(1)).await;
        assert_eq!((semaphore.in_use(), semaphore.queued()), (1, 1));
        let report = drain.close(secs(20)).await;
        assert_eq!((numbers(&report), report.took()), ((2, 0, 0), secs(1)));
        first.await.unwrap().unwrap();
        let error = second.await.unwrap().unwrap_err();
        assert_eq!((error.attempts(), error.refusal().unwrap().reason()), (0, Reason::Draining));
        assert_eq!((semaphore.in_use(), semaphore.queued(), drain.in_flight()), (0, 0, 0));
    }
}

// --- tasks

#[tokio::test(start_paused = true)]
async fn a_spawned_task_has_a_place_until_it_ends() {
    let drain = Drain::new();
    let task = drain.spawn("sum", async {
        sleep(secs(2)).await;
        41 + 1
    });
    assert_eq!((drain.in_flight(), drain.held()[0].name()), (1, "sum"));
    assert_eq!(numbers(&drain.close(secs(20)).await), (1, 0, 0));
    assert_eq!(task.unwrap().await.unwrap(), Ok(42));
}

/// Notes what happened to it, and whether the drain still counted it then.
struct Witness(Drain, Arc<Mutex<Vec<u64>>>);

impl Drop for Witness {
    fn drop(&mut self) {
        self.1.lock().unwrap().push(self.0.in_flight());
    }
}

#[tokio::test(start_paused = true)]
async fn a_spawned_task_is_dropped_when_the_grace_is_over_and_its_place_after_it() {
    let drain = Drain::builder().cancel_wait(secs(5)).build().unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let witness = Witness(drain.clone(), seen.clone());
    let task = drain.spawn("stream", async move {
        let _witness = witness;
        pending::<()>().await;
    });
    let report = drain.close(secs(20)).await;
    assert_eq!((numbers(&report), report.took()), ((0, 1, 0), secs(20)));
    assert_eq!(task.unwrap().await.unwrap(), Err(CancelReason::Shutdown));
    assert_eq!(*seen.lock().unwrap(), [1], "the work is gone before its place is");
}

#[tokio::test(start_paused = true)]
async fn a_task_that_is_ready_when_it_is_cancelled_is_not_lost() {
    let drain = Drain::new();
    let task = drain.spawn("just in time", {
        let cancel = drain.cancel_token();
        async move { cancel.cancelled().await }
    });
    assert_eq!(numbers(&drain.close(Duration::ZERO).await), (0, 1, 0));
    assert_eq!(task.unwrap().await.unwrap(), Ok(CancelReason::Shutdown));
}

#[tokio::test(start_paused = true)]
async fn panics_and_aborts_give_the_place_back() {
    let drain = Drain::new();
    let panicking = drain.spawn("panics", async { support::script::boom() }).unwrap();
    let aborted = drain.spawn("aborted", pending::<()>()).unwrap();
    let unpolled = drain.spawn("aborted before its first poll", pending::<()>()).unwrap();
    unpolled.abort();
    assert!(panicking.await.unwrap_err().is_panic());
    aborted.abort();
    assert!(aborted.await.unwrap_err().is_cancelled());
    assert!(unpolled.await.unwrap_err().is_cancelled());
    assert_eq!((drain.in_flight(), drain.held().len()), (0, 0));
}

#[test]
fn to_spawn_outside_of_a_runtime_panics_and_takes_nothing() {
    let drain = Drain::new();
    let spawned = catch_unwind(AssertUnwindSafe(|| drain.spawn("job", async {}).map(drop)));
    assert!(spawned.is_err());
    assert_eq!((drain.in_flight(), drain.held().len()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn what_is_refused_is_dropped_unpolled() {
    let drain = Drain::new();
    drain.close(Duration::ZERO).await;
    let seen = Arc::new(Mutex::new(Vec::new()));
    let witness = Witness(drain.clone(), seen.clone());
    let refused = drain.spawn("late", async move {
        let _witness = witness;
        unreachable!("it is not polled");
    });
    assert!(refused.is_err());
    assert_eq!(*seen.lock().unwrap(), [0]);
}

// --- unusual ways to close

#[tokio::test(start_paused = true)]
async fn a_grace_of_zero_cancels_at_once() {
    let drain = Drain::builder().cancel_wait(secs(5)).build().unwrap();
    let task = drain.spawn("job", pending::<()>()).unwrap();
    let report = drain.close(Duration::ZERO).await;
    assert_eq!((numbers(&report), report.took()), ((0, 1, 0), Duration::ZERO));
    assert_eq!(task.await.unwrap(), Err(CancelReason::Shutdown));
}

#[tokio::test(start_paused = true)]
async fn with_no_time_at_all_it_reports_what_is_in() {
    let drain = Drain::builder().cancel_wait(Duration::ZERO).build().unwrap();
    let task = drain.spawn("job", pending::<()>()).unwrap();
    let report = drain.close(Duration::ZERO).await;
    assert_eq!((numbers(&report), report.took()), ((0, 0, 1), Duration::ZERO));
    assert_eq!(task.await.unwrap(), Err(CancelReason::Shutdown), "it was told all the same");
    assert_eq!(drain.in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn all_who_close_get_the_same_report_and_the_grace_that_ends_first_holds() {
    let drain = Drain::builder().cancel_wait(secs(5)).build().unwrap();
    let _stuck = drain.track("stuck").unwrap();
    let start = Instant::now();
    let graces = [Duration::MAX, secs(30), secs(10), secs(20)];
    let closers = graces.map(|grace| tokio::spawn(drain.close(grace)));
    let reports = join_all(closers).await.into_iter().map(Result::unwrap).collect::<Vec<_>>();
    assert_eq!(start.elapsed(), secs(15));
    assert!(reports.iter().all(|report| *report == reports[0]));
    assert_eq!(drain.close(secs(99)).now_or_never(), Some(reports[0].clone()), "also when it is over");
    assert_eq!(numbers(&reports[0]), (0, 0, 1));
}

#[tokio::test(start_paused = true)]
async fn a_second_close_cuts_the_grace_short_and_a_third_does_not_lengthen_it() {
    let drain = Drain::builder().cancel_wait(secs(5)).build().unwrap();
    let _stuck = drain.track("stuck").unwrap();
    let start = Instant::now();
    let closing = begin(&drain, Duration::MAX).await;
    sleep(secs(3600)).await;
    assert_eq!(drain.phase(), Phase::Closing, "the longest grace is none that ends");
    let second = tokio::spawn(drain.close(Duration::ZERO));
    drain.wait_for(Phase::Cancelling).await;
    assert_eq!(start.elapsed(), secs(3600));
    sleep(secs(1)).await;
    let third = tokio::spawn(drain.close(secs(60)));
    assert_eq!(closing.await.unwrap(), second.await.unwrap());
    assert_eq!(third.await.unwrap().took(), secs(3605));
}

#[tokio::test(start_paused = true)]
async fn closing_goes_on_when_its_future_is_dropped() {
    let drain = Drain::builder().cancel_wait(secs(5)).build().unwrap();
    let task = drain.spawn("job", pending::<()>()).unwrap();
    let mut closing = Box::pin(drain.close(secs(20)));
    assert!(poll_immediate(&mut closing).await.is_none());
    drop(closing);
    let report = drain.closed().await;
    assert_eq!((numbers(&report), report.took()), ((0, 1, 0), secs(20)));
    assert_eq!(task.await.unwrap(), Err(CancelReason::Shutdown));
}

#[tokio::test(start_paused = true)]
async fn a_close_that_was_never_polled_is_none() {
    let drain = Drain::new();
    drop(drain.close(Duration::ZERO));
    assert_eq!(drain.phase(), Phase::Open);
    drain.try_acquire().unwrap().success();
}

#[tokio::test(start_paused = true)]
async fn who_is_in_and_waits_for_the_closing_waits_for_itself_but_not_for_ever() {
    let drain = Drain::builder().cancel_wait(secs(5)).build().unwrap();
    let guard = drain.track("closes itself").unwrap();
    let report = drain.close(secs(20)).await;
    assert_eq!(stuck(&report), [("closes itself", 1, secs(25))]);
    drop(guard);
    let drain = Drain::new();
    let inner = drain.clone();
    let task = drain.spawn("closes itself", async move { inner.close(secs(20)).await });
    assert_eq!(numbers(&drain.closed().await), (0, 1, 0), "a task of its own is dropped");
    assert_eq!(task.unwrap().await.unwrap(), Err(CancelReason::Shutdown));
}

#[test]
fn to_close_outside_of_a_runtime_panics_and_changes_nothing() {
    let drain = Drain::new();
    let closed = catch_unwind(AssertUnwindSafe(|| drain.close(secs(1)).now_or_never()));
    assert!(closed.is_err());
    assert_eq!(drain.phase(), Phase::Open);
    drain.try_acquire().unwrap().success();
}

fn paused() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap()
}

#[test]
fn a_runtime_that_is_shut_down_does_not_leave_it_half_closed() {
    let (drain, runtime) = (Drain::new(), paused());
    let guard = drain.track("elsewhere").unwrap();
    assert!(runtime.block_on(async { poll_immediate(drain.close(secs(20))).await }).is_none());
    drop(runtime);
    let report = paused().block_on(drain.closed());
    assert_eq!((numbers(&report), drain.phase()), ((0, 0, 1), Phase::Done));
    assert_eq!(drain.cancel_token().reason(), Some(CancelReason::Shutdown));
    drop(guard);
    assert_eq!(drain.in_flight(), 0);
}

#[test]
fn a_runtime_without_timers_does_not_leave_it_half_closed() {
    let drain = Drain::new();
    let _stuck = drain.track("stuck").unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    assert_eq!(numbers(&runtime.block_on(drain.close(secs(20)))), (0, 0, 1));
}

#[test]
fn it_can_be_closed_on_one_thread_and_left_on_another() {
    let drain = Drain::new();
    let guard = drain.track("thread").unwrap();
    let (told, wait) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        wait.recv().unwrap();
        drop(guard);
    });
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap();
    let report = runtime.block_on(async {
        let closing = begin(&drain, Duration::MAX).await;
        told.send(()).unwrap();
        closing.await.unwrap()
    });
    assert_eq!(numbers(&report), (1, 0, 0));
    thread.join().unwrap();
}

// --- opening again

#[tokio::test(start_paused = true)]
async fn it_opens_again_only_when_it_is_done() {
    let drain = Drain::builder().cancel_wait(secs(5)).build().unwrap();
    let _stuck = drain.track("stuck").unwrap();
    assert!(!drain.reopen(), "it is open");
    let closing = begin(&drain, secs(20)).await;
    assert!(!drain.reopen(), "who was told to leave can't be told to stay");
    drain.wait_for(Phase::Cancelling).await;
    assert!(!drain.reopen());
    closing.await.unwrap();
    assert!(drain.reopen() && !drain.reopen());
    assert_eq!((drain.phase(), drain.in_flight()), (Phase::Open, 1));
}

#[tokio::test(start_paused = true)]
async fn opened_again_it_is_as_new_but_for_who_is_still_in() {
    let drain = Drain::builder().cancel_wait(secs(5)).build().unwrap();
    let stubborn = drain.track("stubborn").unwrap();
    let (old_token, old_closing) = (drain.cancel_token(), drain.closing());
    drain.close(secs(1)).await;
    assert!(drain.reopen());

    assert!(old_token.is_cancelled() && !drain.cancel_token().is_cancelled());
    old_closing.now_or_never().expect("a wait is about the opening in which it began");
    assert!(drain.closing().now_or_never().is_none());
    assert!(drain.closed().now_or_never().is_none());

    let task = drain.spawn("new", pending::<()>()).unwrap();
    sleep(secs(4)).await;
    assert!(!task.is_finished());
    let closing = begin(&drain, secs(10)).await;
    drop(stubborn);
    let report = closing.await.unwrap();
    assert_eq!((numbers(&report), report.took()), ((1, 1, 0), secs(10)));
}

#[tokio::test(start_paused = true)]
async fn it_closes_and_opens_under_load_without_losing_count() {
    let drain = Drain::new();
    let admitted = Arc::new(AtomicU32::new(0));
    let stop = Cancel::new();
    let workers = (0..20).map(|n| {
        let (drain, admitted, stop) = (drain.clone(), admitted.clone(), stop.clone());
        tokio::spawn(async move {
            while !stop.is_cancelled() {
                if let Ok(guard) = drain.track(if n % 2 == 0 { "even" } else { "odd" }) {
                    admitted.fetch_add(1, Ordering::Relaxed);
                    sleep(ms(3 + n)).await;
                    drop(guard);
                }
                sleep(ms(1)).await;
            }
        })
    });
    let workers = workers.collect::<Vec<_>>();
    for _ in 0..50 {
        sleep(ms(40)).await;
        let before = drain.in_flight();
        let report = drain.close(secs(1)).await;
        assert_eq!(numbers(&report), (before, 0, 0));
        assert_eq!((drain.in_flight(), drain.held().len()), (0, 0));
        let so_far = admitted.load(Ordering::Relaxed);
        sleep(ms(40)).await;
        assert_eq!(admitted.load(Ordering::Relaxed), so_far, "nobody is let in while it is closed");
        assert!(drain.reopen());
    }
    stop.cancel();
    join_all(workers).await.into_iter().for_each(Result::unwrap);
    assert!(admitted.load(Ordering::Relaxed) > 1000);
}

// --- with a server and with streams

/// A request over an HTTP/1 connection in memory: the connection ends by itself once the drain has closed.
#[tokio::test(start_paused = true)]
async fn a_hyper_connection_finishes_its_request_and_ends() {
    let drain = Drain::new();
    let (here, there) = tokio::io::duplex(4096);
    let service = hyper::service::service_fn(|_| async {
        sleep(secs(2)).await;
        Ok::<_, Infallible>(hyper::Response::new(String::from("slow")))
    });
    let connection = drain.spawn("connection", {
        let closing = drain.closing();
        async move {
            let io = hyper_util::rt::TokioIo::new(there);
            let mut connection =
                std::pin::pin!(hyper::server::conn::http1::Builder::new().serve_connection(io, service));
            tokio::select! {
                served = connection.as_mut() => return served,
                () = closing => connection.as_mut().graceful_shutdown(),
            }
            connection.await
        }
    });
    let (mut sender, client) =
        hyper::client::conn::http1::handshake::<_, String>(hyper_util::rt::TokioIo::new(here)).await.unwrap();
    tokio::spawn(client);
    let answer = sender.send_request(hyper::Request::new(String::new()));
    let answer = tokio::spawn(answer);
    sleep(secs(1)).await;
    let report = drain.close(secs(20)).await;
    assert_eq!((numbers(&report), report.took()), ((1, 0, 0), secs(1)));
    assert_eq!(answer.await.unwrap().unwrap().status(), 200);
    connection.unwrap().await.unwrap().unwrap().unwrap();
    assert!(sender.ready().await.is_err(), "the connection is closed");
}

#[tokio::test(start_paused = true)]
async fn an_open_stream_ends_by_the_token_and_one_that_does_not_by_the_bound() {
    let drain = Drain::builder().cancel_wait(secs(5)).build().unwrap();
    let ticks = |guard: Guard| {
        futures::stream::unfold(guard, |guard| async {
            sleep(secs(1)).await;
            Some(((), guard))
        })
    };
    let polite = ticks(drain.track("polite").unwrap()).take_until(drain.cancel_token().cancelled());
    let rude = ticks(drain.track("rude").unwrap());
    let polite = tokio::spawn(polite.count());
    let rude = tokio::spawn(rude.count());
    let report = drain.close(ms(9_500)).await;
    assert_eq!((numbers(&report), report.took()), ((0, 1, 1), ms(14_500)));
    assert_eq!(stuck(&report), [("rude", 1, ms(14_500))]);
    assert_eq!(polite.await.unwrap(), 9);
    rude.abort();
    assert!(rude.await.is_err());
    assert_eq!(drain.in_flight(), 0);
}

// --- against a naive model

#[derive(Clone, Debug)]
enum Deed {
    Enter {
        named: bool,
    },
    /// Of those that are in, one leaves.
    Leave(usize),
    Close(u64),
    Pass(u64),
    Reopen,
}

fn deeds() -> impl Strategy<Value = Vec<Deed>> {
    let deed = prop_oneof![
        3 => any::<bool>().prop_map(|named| Deed::Enter { named }),
        3 => any::<usize>().prop_map(Deed::Leave),
        1 => (0..40_u64).prop_map(Deed::Close),
        2 => (0..30_u64).prop_map(Deed::Pass),
        1 => Just(Deed::Reopen),
    ];
    proptest::collection::vec(deed, 0..60)
}

const WAIT: u64 = 10;

/// A drain as one would write it without threads, in milliseconds.
#[derive(Debug)]
struct Model {
    now: u64,
    phase: Phase,
    /// Whether each of those that are in has a name.
    within: Vec<bool>,
    began: u64,
    ends: u64,
    finished: u64,
    cancelled: u64,
    /// The token is cancelled.
    told: bool,
    /// Finished, cancelled, stuck with a name, stuck without, time.
    report: Option<[u64; 5]>,
}

impl Model {
    fn settle(&mut self) {
        let closing = matches!(self.phase, Phase::Closing | Phase::Cancelling);
        if closing && (self.within.is_empty() || self.phase == Phase::Cancelling && self.now >= self.ends) {
            self.phase = Phase::Done;
            let named = self.within.iter().filter(|named| **named).count() as u64;
            let unnamed = self.within.len() as u64 - named;
            self.report = Some([self.finished, self.cancelled, named, unnamed, self.now - self.began]);
        } else if self.phase == Phase::Closing && self.now >= self.ends {
            (self.phase, self.told) = (Phase::Cancelling, true);
            self.ends = self.now + WAIT;
        }
    }

    /// Whether it was let in or out, or opened.
    fn apply(&mut self, deed: &Deed) -> bool {
        match deed {
            Deed::Enter { named } => {
                let open = self.phase == Phase::Open;
                self.within.extend(open.then_some(*named));
                return open;
            }
            Deed::Leave(which) => {
                if self.within.is_empty() {
                    return false;
                }
                self.within.remove(which % self.within.len());
                self.finished += u64::from(self.phase == Phase::Closing);
                self.cancelled += u64::from(self.phase == Phase::Cancelling);
            }
            Deed::Close(grace) => match self.phase {
                Phase::Open => {
                    (self.phase, self.began, self.ends) = (Phase::Closing, self.now, self.now + grace);
                    (self.finished, self.cancelled) = (0, 0);
                }
                Phase::Closing => self.ends = self.ends.min(self.now + grace),
                Phase::Cancelling | Phase::Done => {}
            },
            Deed::Pass(time) => self.now += time,
            Deed::Reopen => {
                if self.phase != Phase::Done {
                    return false;
                }
                (self.phase, self.told, self.report) = (Phase::Open, false, None);
            }
        }
        true
    }
}

async fn compare(deeds: Vec<Deed>) {
    let drain = Drain::builder().cancel_wait(ms(WAIT)).build().unwrap();
    let mut guards = Vec::new();
    let mut model = Model {
        now: 0,
        phase: Phase::Open,
        within: Vec::new(),
        began: 0,
        ends: 0,
        finished: 0,
        cancelled: 0,
        told: false,
        report: None,
    };
    for deed in &deeds {
        let expected = model.apply(deed);
        let done = match deed {
            Deed::Enter { named } => {
                let guard = if *named { drain.track("named") } else { drain.try_acquire() };
                let entered = guard.is_ok();
                guards.extend(guard);
                entered
            }
            Deed::Leave(_) if guards.is_empty() => false,
            Deed::Leave(which) => {
                drop(guards.remove(which % guards.len()));
                true
            }
            Deed::Close(grace) => {
                drop(poll_immediate(drain.close(ms(*grace))).await);
                true
            }
            Deed::Pass(time) => {
                tokio::time::advance(ms(*time)).await;
                true
            }
            Deed::Reopen => drain.reopen(),
        };
        assert_eq!(done, expected, "{deed:?} of {deeds:?}");
        // As often as the driver may have to be polled.
        for _ in 0..4 {
            yield_now().await;
        }
        model.settle();
        model.settle();
        assert_eq!((drain.phase(), drain.in_flight()), (model.phase, model.within.len() as u64), "{deeds:?}");
        assert_eq!(drain.cancel_token().is_cancelled(), model.told, "{deeds:?}");
        let report = drain.closed().now_or_never().map(|report| {
            let [named, unnamed] = [report.still_in() - report.unnamed(), report.unnamed()];
            [report.finished(), report.cancelled(), named, unnamed, report.took().as_millis() as u64]
        });
        assert_eq!(report, model.report, "{deeds:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    #[test]
    fn it_does_what_the_naive_model_does(deeds in deeds()) {
        paused().block_on(compare(deeds));
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Nobody waits for what can only be refused, nor for a runtime that stands still

#[tokio::test(start_paused = true)]
async fn a_call_that_sleeps_when_it_closes_is_refused_at_once() {
    for named in [false, true] {
        let drain = Drain::new();
        let policy = Policy::named("users");
        let policy = if named { policy.gate(drain.part("users")) } else { policy.gate(drain.clone()) };
        let policy = policy.retry(Retry::constant(secs(10))).build().unwrap();
        let call = tokio::spawn(policy.into_run(|| async { Err::<(), _>("down") }));
        sleep(ms(10)).await;
        assert_eq!(drain.close(secs(20)).await.took(), Duration::ZERO);
        let error = call.await.unwrap().unwrap_err();
        assert_eq!((error.refusal().unwrap().reason(), error.attempts()), (Reason::Draining, 1));
        assert_eq!(error.last(), Some(&"down"));
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_that_stands_in_a_queue_when_it_closes_is_refused_at_once() {
    let drain = Drain::new();
    let semaphore = Semaphore::permits(1).build().unwrap();
    let policy = Policy::named("users").gate(drain.clone()).gate(semaphore.clone()).build().unwrap();
    let _held = semaphore.try_acquire().unwrap();
    let call = tokio::spawn(policy.into_run(|| async { Ok::<_, ()>(()) }));
    sleep(ms(10)).await;
    assert_eq!(semaphore.queued(), 1);
    assert_eq!(drain.close(Duration::MAX).await.took(), Duration::ZERO);
    let error = call.await.unwrap().unwrap_err();
    assert_eq!((error.refusal().unwrap().reason(), error.attempts()), (Reason::Draining, 0));
    assert_eq!(semaphore.queued(), 0);
}

/// An attempt that runs goes on; a second closing after a reopening is heard, too.
#[tokio::test(start_paused = true)]
async fn a_call_hears_of_the_closing_of_a_later_round() {
    let drain = Drain::new();
    let policy = Policy::named("users").gate(drain.clone()).retry(Retry::constant(secs(10)).max_attempts(9));
    let policy = policy.build().unwrap();
    let call = tokio::spawn(policy.into_run(|| async { Err::<(), _>("down") }));
    sleep(ms(10)).await;
    // Stuck in the first round, in flight again in the second one.
    let other = Drain::new();
    assert!(other.close(Duration::ZERO).await.is_clean() && other.reopen());
    assert_eq!(drain.close(secs(20)).await.took(), Duration::ZERO);
    assert!(call.await.unwrap().is_err());
    assert!(drain.reopen());
    let semaphore = Semaphore::permits(1).build().unwrap();
    let policy = Policy::named("users").gate(drain.clone()).gate(semaphore.clone()).build().unwrap();
    let _held = semaphore.try_acquire().unwrap();
    let call = tokio::spawn(policy.into_run(|| async { Ok::<_, ()>(()) }));
    sleep(ms(10)).await;
    assert_eq!(drain.close(secs(20)).await.took(), Duration::ZERO);
    assert!(call.await.unwrap().is_err());
}

#[test]
fn whoever_closes_takes_the_closing_on_although_the_runtime_of_the_first_stands_still() {
    for leaves in [false, true] {
        let drain = Drain::builder().cancel_wait(secs(5)).build().unwrap();
        let place = drain.try_acquire().unwrap();
        let (first, second) = (Clock::paused(), Clock::paused());
        let mut closing = Box::pin(drain.close(secs(20)));
        first.block_on(async { assert!(poll_once(closing.as_mut()).is_pending()) });
        // From here on nobody drives the first runtime.
        let mut place = Some(place);
        let report = second.block_on(async {
            let start = Instant::now();
            let closes = drain.close(Duration::ZERO);
            let ends = async {
                sleep(secs(1)).await;
                if leaves {
                    place = None;
                }
                std::future::pending::<()>().await;
            };
            let report = tokio::select! {
                report = tokio::time::timeout(secs(60), closes) => report.expect("it does not hang"),
                () = ends => unreachable!(),
            };
            assert_eq!(start.elapsed(), secs(if leaves { 1 } else { 5 }));
            report
        });
        assert_eq!(numbers(&report), if leaves { (0, 1, 0) } else { (0, 0, 1) });
        assert!(drain.cancel_token().is_cancelled());
        assert_eq!(first.block_on(closing), report);
    }
}

// ---------------------------------------------------------------------------------------------------------------
// As a source of cancellation

#[tokio::test(start_paused = true)]
async fn a_policy_that_is_cancelled_on_a_drain_follows_its_rounds() {
    let drain = Drain::builder().cancel_wait(ms(10)).build().unwrap();
    let policy = Policy::named("users").gate(drain.clone()).cancel_on(&drain).build().unwrap();
    let call = || policy.clone().into_run(|| async { Ok::<_, ()>(7) });
    let reason = |error: resile::Error<()>| error.refusal().map(resile::Refusal::reason);
    for _ in 0..3 {
        assert_eq!(call().await.unwrap(), 7);
        let place = drain.try_acquire().unwrap();
        let report = drain.close(Duration::ZERO).await;
        assert_eq!(numbers(&report), (0, 0, 1));
        // Somebody was cancelled, and still a new call hears what it hears otherwise.
        assert_eq!(reason(call().await.unwrap_err()), Some(Reason::Draining));
        drop(place);
        assert!(drain.reopen());
    }
    let running = tokio::spawn(policy.clone().into_run(std::future::pending::<Result<(), ()>>));
    sleep(ms(1)).await;
    assert_eq!(numbers(&drain.close(Duration::ZERO).await), (0, 1, 0));
    assert_eq!(running.await.unwrap().unwrap_err().cancel_reason(), Some(&CancelReason::Shutdown));
}

/// What was told to stop in one round stays told, although it is polled only after the next one has begun.
#[tokio::test(start_paused = true)]
async fn a_call_that_was_cancelled_in_a_round_stays_cancelled_after_a_reopening() {
    let drain = Drain::builder().cancel_wait(Duration::ZERO).build().unwrap();
    let policy = Policy::named("users").gate(drain.clone()).cancel_on(&drain).build().unwrap();
    let mut run = Box::pin(policy.run(std::future::pending::<Result<(), ()>>));
    assert!(poll_once(run.as_mut()).is_pending());
    assert_eq!(numbers(&drain.close(Duration::ZERO).await), (0, 0, 1));
    assert!(drain.reopen());
    let std::task::Poll::Ready(Err(error)) = poll_once(run.as_mut()) else { panic!("it was cancelled") };
    assert_eq!(error.cancel_reason(), Some(&CancelReason::Shutdown));
}

// --- what the world sees of it

/// A deadlock if any of it happened under the drain's lock.
#[test]
fn a_waker_may_use_the_drain_when_it_is_woken_and_when_it_is_dropped() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    let drain = Drain::new();
    let uses = || {
        let drain = drain.clone();
        nosy(move || drop((drain.cancel_token(), drain.held())))
    };
    let held = [drain.track("one").unwrap(), drain.track("two").unwrap()];
    let (mut first, mut second) = (Box::pin(drain.close(secs(10))), Box::pin(drain.close(secs(20))));
    for _ in 0..2 {
        assert!(first.as_mut().poll(&mut Context::from_waker(&uses())).is_pending());
        assert!(second.as_mut().poll(&mut Context::from_waker(&uses())).is_pending());
    }
    drop(second);
    // One who is in more of a hurry wakes the others.
    assert!(poll_once(Box::pin(drain.close(secs(5))).as_mut()).is_pending());
    assert!(first.as_mut().poll(&mut Context::from_waker(&uses())).is_pending());
    held.into_iter().for_each(Guard::success);
    assert!(first.as_mut().poll(&mut Context::from_waker(&uses())).is_ready());
    assert!(drain.reopen());
}

#[tokio::test(start_paused = true)]
async fn whoever_waits_for_the_end_is_asleep_until_something_happens_and_leaves_nothing_behind() {
    let drain = Drain::builder().cancel_wait(secs(60)).build().unwrap();
    let held = drain.try_acquire().unwrap();
    let alive = Arc::new(());
    let waker = {
        let alive = alive.clone();
        nosy(move || _ = &alive)
    };
    let mut closing = Box::pin(drain.close(secs(10)));
    assert!(closing.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
    drop((closing, waker));
    assert_eq!(Arc::strong_count(&alive), 1, "its waker went with it");

    for grace in [secs(60), Duration::ZERO] {
        let (mut closing, mut polls) = (Box::pin(drain.close(grace)), 0);
        let counted = std::future::poll_fn(|cx| {
            polls += 1;
            closing.as_mut().poll(cx)
        });
        assert!(tokio::time::timeout(secs(5), counted).await.is_err());
        assert!(polls < 10, "polled {polls} times");
    }
    held.success();
    assert_eq!(drain.close(secs(1)).await.still_in(), 0);
}

/// The runtime of the one who began the closing stands still.
#[test]
fn when_the_last_one_leaves_any_who_closes_is_woken_and_ends_it() {
    let (still, runs) = (Clock::paused(), Clock::paused());
    let drain = Drain::new();
    let held = drain.try_acquire().unwrap();
    let mut first = {
        let _entered = still.enter();
        let mut first = Box::pin(drain.close(secs(100)));
        assert!(poll_once(first.as_mut()).is_pending());
        first
    };
    let _entered = runs.enter();
    let (mut second, flag) = (Box::pin(drain.close(secs(100))), Flag::default());
    assert!(flag.poll(second.as_mut()).is_pending());
    held.success();
    assert!(flag.woken());
    assert!(poll_once(second.as_mut()).is_ready() && poll_once(first.as_mut()).is_ready());
}

#[tokio::test(start_paused = true)]
async fn no_operation_is_made_for_a_call_that_listens_to_a_drain_whose_grace_is_over() {
    let drain = Drain::new();
    let held = drain.try_acquire().unwrap();
    let closing = begin(&drain, Duration::ZERO).await;
    yield_now().await;
    assert_eq!(drain.phase(), Phase::Cancelling);
    let policy = Policy::named("late").build().unwrap();
    let made = AtomicU32::new(0);
    let call = policy.call().cancel_on(&drain).run(|| {
        made.fetch_add(1, Ordering::Relaxed);
        pending::<Result<(), ()>>()
    });
    let error = call.await.unwrap_err();
    assert_eq!((error.cancel_reason(), error.attempts()), (Some(&CancelReason::Shutdown), 0));
    assert_eq!(made.load(Ordering::Relaxed), 0);
    held.success();
    let report = closing.await.unwrap();
    assert_eq!((report.cancelled(), report.still_in(), report.is_clean()), (1, 0, false), "it was told to stop");
}

#[tokio::test(start_paused = true)]
async fn a_call_may_listen_to_two_drains() {
    for which in 0..2 {
        let drains = [Drain::new(), Drain::new()];
        let held = drains[which].try_acquire().unwrap();
        let policy = Policy::named("two").cancel_on(&drains[0]).build().unwrap();
        let call = policy.call().cancel_on(&drains[1]).run(pending::<Result<(), ()>>);
        let closing = begin(&drains[which], ms(10)).await;
        let error = call.await.unwrap_err();
        assert_eq!(error.cancel_reason(), Some(&CancelReason::Shutdown));
        held.success();
        closing.await.unwrap();
    }
}

/// A named part counts like the drain itself.
#[tokio::test(start_paused = true)]
async fn a_call_that_is_behind_a_named_drain_in_a_queue_does_not_begin_after_the_close() {
    let drain = Drain::new();
    let semaphore = Semaphore::permits(1).build().unwrap();
    let permit = semaphore.try_acquire().unwrap();
    let policy = Policy::named("part").gate(drain.part("requests")).gate(semaphore.clone()).build().unwrap();
    let mut call = Box::pin(policy.run(|| async { Ok::<_, ()>(()) }));
    assert!(poll_once(call.as_mut()).is_pending());
    let closing = begin(&drain, secs(1)).await;
    permit.success();
    let error = call.await.unwrap_err();
    assert_eq!(error.refusal().map(resile::Refusal::reason), Some(Reason::Draining));
    assert!(closing.await.unwrap().is_clean());
}

/// The round from before was given up on while the call stood in the queue; the next one's close must reach it.
#[test]
fn a_call_in_a_queue_hears_of_the_close_after_a_reopen() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    let drain = Drain::builder().cancel_wait(ms(1)).build().unwrap();
    let semaphore = Semaphore::permits(1).build().unwrap();
    let _permit = semaphore.try_acquire().unwrap();
    let other = Drain::builder().named("other").build().unwrap();
    let policy = Policy::named("queued").gate(other.clone()).gate(drain.clone()).gate(semaphore).build().unwrap();
    let mut call = Box::pin(policy.run(|| async { Ok::<_, ()>(()) }));
    assert!(poll_once(call.as_mut()).is_pending());
    let report = clock.block_on(drain.close(Duration::ZERO));
    assert_eq!(report.still_in(), 1);
    assert!(drain.reopen());
    let flag = Flag::default();
    assert!(flag.poll(call.as_mut()).is_pending(), "it is open again");
    assert!(!flag.woken());
    let mut closing = Box::pin(drain.close(secs(1)));
    assert!(poll_once(closing.as_mut()).is_pending());
    assert!(flag.woken());
    let std::task::Poll::Ready(end) = poll_once(call.as_mut()) else { panic!("it is told at once") };
    let error = end.unwrap_err();
    assert_eq!(error.refusal().map(|refusal| (refusal.gate(), refusal.reason())), Some(("drain", Reason::Draining)));
    assert_eq!(other.in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_close_tells_better_than_its_cancellation_but_no_other_reason() {
    let drain = Drain::new();
    let held = drain.try_acquire().unwrap();
    let closing = begin(&drain, Duration::ZERO).await;
    yield_now().await;
    let gone = Cancel::new();
    gone.cancel_with(CancelReason::ClientGone);
    let policy = Policy::named("late").gate(drain.clone()).build().unwrap();
    let error = policy.call().cancel_on(&gone).run(pending::<Result<(), ()>>).await.unwrap_err();
    assert_eq!(error.cancel_reason(), Some(&CancelReason::ClientGone));
    let error = policy.call().cancel_on(&drain).run(pending::<Result<(), ()>>).await.unwrap_err();
    assert_eq!(error.refusal().map(resile::Refusal::reason), Some(Reason::Draining));
    held.success();
    closing.await.unwrap();
}

#[test]
fn the_largest_settings_are_allowed() {
    let drain = Drain::builder().cancel_wait(secs(24 * 3600)).max_names(1_048_576).build();
    assert!(drain.is_ok());
    let faults = Drain::builder().cancel_wait(secs(24 * 3600 + 1)).max_names(1_048_577).build().unwrap_err();
    assert_eq!(faults.to_string().matches("must be").count(), 2, "{faults}");
}
