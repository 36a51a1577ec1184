//! `Scope`: what ends together, in which way, and that nobody is left behind.

mod support;

use std::future::{Future, pending};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use futures::StreamExt;
use futures::future::poll_fn;
use parking_lot::Mutex;
use proptest::prelude::*;
use resile::context::{self, Context};
use resile::{Cancel, CancelReason, ChildEnd, Error, ErrorKind, Limit, Policy, Scope, ScopeEnd};
use support::hand::{Clock, Flag, catch_boom, poll_once};
use support::ms;
use support::script::Boom;
use tokio::time::{Instant, sleep};

type Ends = Vec<ChildEnd<u32, &'static str>>;

/// How each ended, in a word.
fn words(ends: &[ChildEnd<u32, &'static str>]) -> Vec<String> {
    ends.iter()
        .map(|end| match end {
            ChildEnd::Done(value) => format!("done {value}"),
            ChildEnd::Failed(error) => format!("failed {error}"),
            ChildEnd::Panicked(panic) => format!("panicked {}", panic.message().unwrap_or_default()),
            ChildEnd::Cancelled(reason) => format!("cancelled {reason}"),
            ChildEnd::CancelledWith(reason, error) => format!("cancelled {reason}, with {error}"),
            ChildEnd::Stuck => "stuck".to_owned(),
            _ => unreachable!(),
        })
        .collect()
}

async fn done(millis: u64, value: u32) -> Result<u32, &'static str> {
    sleep(ms(millis)).await;
    Ok(value)
}

async fn fail(millis: u64) -> Result<u32, &'static str> {
    sleep(ms(millis)).await;
    Err("no")
}

async fn panics(millis: u64) -> Result<u32, &'static str> {
    sleep(ms(millis)).await;
    std::panic::panic_any(Boom)
}

/// Counts how many of it live.
#[derive(Clone, Debug, Default)]
struct Living(Arc<AtomicU32>);

struct Life(Living);

impl Living {
    fn life(&self) -> Life {
        self.0.fetch_add(1, Relaxed);
        Life(self.clone())
    }

    fn count(&self) -> u32 {
        self.0.load(Relaxed)
    }

    async fn hang(self) -> Result<u32, &'static str> {
        let _life = self.life();
        pending().await
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Relaxed);
    }
}

#[tokio::test(start_paused = true)]
async fn values_come_in_the_order_in_which_they_were_asked_for() {
    let mut scope = Scope::new();
    for (millis, value) in [(30, 1), (10, 2), (20, 3)] {
        scope.spawn(done(millis, value));
    }
    assert_eq!(scope.len(), 3);
    assert_eq!(scope.join().await.unwrap(), [1, 2, 3]);
    assert!(Scope::<u32, ()>::new().join().await.unwrap().is_empty(), "an empty scope is left at once");
}

#[tokio::test(start_paused = true)]
async fn the_first_error_cancels_the_siblings_and_comes_with_their_outcomes() {
    let living = Living::default();
    let started = Instant::now();
    let mut scope = Scope::new();
    scope.spawn(done(5, 1));
    scope.spawn(living.clone().hang());
    scope.spawn(fail(10));
    scope.spawn(fail(20));
    let cancel = scope.cancel_handle();
    let end = scope.join().await.unwrap_err();
    assert_eq!(started.elapsed(), ms(10));
    assert_eq!(living.count(), 0);
    assert_eq!((end.first(), end.first_error()), (Some(2), Some(&"no")));
    assert_eq!(cancel.reason(), Some(CancelReason::SiblingFailed));
    assert_eq!(end.reason(), Some(&CancelReason::SiblingFailed));
    assert_eq!(end.to_string(), "child 2 of 4 failed");
    assert!(end.is_partial());
    assert_eq!(
        words(end.children()),
        ["done 1", "cancelled a sibling failed", "failed no", "cancelled a sibling failed"]
    );
    assert_eq!(end.into_values(), [1]);
}

#[tokio::test(start_paused = true)]
async fn siblings_are_cancelled_although_nobody_polls_the_scope() {
    let living = Living::default();
    let mut scope = Scope::new();
    scope.spawn(living.clone().hang());
    scope.spawn(fail(10));
    sleep(ms(11)).await;
    assert_eq!(living.count(), 0);
    assert!(scope.join().await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_scope_that_keeps_going_lets_all_end() {
    let mut scope = Scope::new().keep_going();
    scope.spawn(fail(1));
    scope.spawn(done(10, 2));
    scope.spawn(fail(5));
    let end = scope.join().await.unwrap_err();
    assert_eq!(words(end.children()), ["failed no", "done 2", "failed no"]);
    assert_eq!((end.first(), end.reason(), end.is_partial()), (Some(0), None, false));
}

#[tokio::test(start_paused = true)]
async fn a_deadline_ends_all_and_says_so() {
    let living = Living::default();
    let started = Instant::now();
    let mut scope = Scope::new().deadline(ms(50)).deadline(ms(90));
    scope.spawn(done(5, 1));
    scope.spawn(living.clone().hang());
    let end = scope.join().await.unwrap_err();
    assert_eq!((started.elapsed(), living.count()), (ms(50), 0));
    assert_eq!(words(end.children()), ["done 1", "cancelled a deadline passed"]);
    assert_eq!((end.first(), end.reason()), (None, Some(&CancelReason::Deadline)));
    assert_eq!(end.to_string(), "1 of 2 children did not finish: a deadline passed");
}

#[tokio::test(start_paused = true)]
async fn with_a_deadline_of_zero_no_child_is_polled() {
    let started = Instant::now();
    let mut scope = Scope::new().deadline(Duration::ZERO).grace(ms(50));
    scope.spawn(async { unreachable!("it was polled") });
    let end = scope.join().await.unwrap_err();
    assert_eq!(started.elapsed(), Duration::ZERO);
    assert_eq!(words(end.children()), ["cancelled a deadline passed"]);
}

#[tokio::test(start_paused = true)]
async fn a_child_spawned_on_a_closed_scope_is_not_polled_but_counted() {
    let mut scope = Scope::new();
    scope.spawn(done(0, 1));
    assert!(scope.next().await.is_some());
    assert!(scope.cancel_with(CancelReason::Superseded));
    assert!(!scope.cancel_with(CancelReason::Shutdown));
    scope.spawn(async { unreachable!("it was polled") });
    let (index, end) = scope.next().await.unwrap();
    assert!(matches!((index, end), (1, ChildEnd::Cancelled(CancelReason::Superseded))));
    assert!(scope.next().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn cancelling_after_all_have_finished_changes_nothing() {
    let mut scope = Scope::new();
    scope.spawn(done(1, 1));
    sleep(ms(5)).await;
    scope.cancel_with(CancelReason::Shutdown);
    assert_eq!(scope.join().await.unwrap(), [1]);
}

#[tokio::test(start_paused = true)]
async fn a_child_that_cancels_from_inside_ends_at_its_next_await() {
    let mut scope = Scope::new();
    let (one, two) = (scope.cancel_handle(), scope.cancel_handle());
    scope.spawn(async move {
        one.cancel_with("enough");
        Ok(1)
    });
    scope.spawn(async move {
        two.cancel_with("too");
        sleep(ms(1)).await;
        Ok(2)
    });
    let end = scope.wait().await;
    assert_eq!(words(end.children()), ["done 1", "cancelled enough"]);
}

#[tokio::test(start_paused = true)]
async fn within_its_grace_a_child_ends_in_its_own_way() {
    let started = Instant::now();
    let mut scope = Scope::new().grace(ms(30));
    let heard = scope.cancel_handle();
    scope.spawn(async move {
        let reason = heard.cancelled().await;
        assert_eq!(reason, CancelReason::SiblingFailed);
        done(20, 1).await
    });
    scope.spawn(Living::default().hang());
    scope.spawn(fail(10));
    let end = scope.join().await.unwrap_err();
    assert_eq!(started.elapsed(), ms(40));
    assert_eq!(words(end.children()), ["done 1", "cancelled a sibling failed", "failed no"]);
}

#[tokio::test(start_paused = true)]
async fn a_panic_cancels_the_siblings_and_goes_on_in_join() {
    let living = Living::default();
    let make = |living: Living| {
        let mut scope = Scope::new();
        scope.spawn(living.hang());
        scope.spawn(panics(10));
        scope
    };
    let end = make(living.clone()).wait().await;
    assert_eq!(words(end.children()), ["cancelled a sibling failed", "panicked "]);
    assert_eq!((end.first(), end.first_error(), living.count()), (Some(1), None, 0));

    let scope = make(living.clone());
    let joined = tokio::spawn(async move { scope.join().await.is_ok() }).await;
    assert!(joined.unwrap_err().into_panic().is::<Boom>());
    assert_eq!(living.count(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_panic_is_a_value_with_its_message() {
    let mut scope = Scope::<u32, &str>::new().keep_going();
    scope.spawn(async { panic!("static") });
    scope.spawn(async { panic!("number {}", 7) });
    scope.spawn(done(5, 3));
    let ends = scope.wait().await.into_children();
    assert_eq!(words(&ends), ["panicked static", "panicked number 7", "done 3"]);
    let Some(ChildEnd::Panicked(panic)) = ends.into_iter().next() else { panic!() };
    assert!(panic.into_payload().is::<&str>());
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_the_drop_of_a_child_is_carried_too() {
    struct Bomb;
    impl Drop for Bomb {
        fn drop(&mut self) {
            std::panic::panic_any(Boom);
        }
    }
    let mut scope = Scope::new();
    scope.spawn(async {
        let _bomb = Bomb;
        pending::<Result<u32, &str>>().await
    });
    scope.spawn(fail(10));
    let end = scope.wait().await;
    assert_eq!(words(end.children()), ["panicked ", "failed no"]);
}

#[test]
fn dropping_a_scope_aborts_all_and_tells_whoever_listens() {
    let clock = Clock::paused();
    let living = Living::default();
    let cancel = clock.block_on(async {
        let mut scope = Scope::new();
        scope.spawn(living.clone().hang());
        scope.spawn({
            let living = living.clone();
            async move {
                let mut inner = Scope::new();
                inner.spawn(living.clone().hang());
                inner.spawn(living.hang());
                inner.join().await.map(|_| 0).map_err(|_| "inner")
            }
        });
        sleep(ms(1)).await;
        assert_eq!(living.count(), 3);
        let cancel = scope.cancel_handle();
        drop(scope);
        sleep(ms(1)).await;
        cancel
    });
    assert_eq!(living.count(), 0);
    assert_eq!(cancel.reason(), Some("the scope was dropped".into()));
}

#[test]
fn join_can_be_dropped_at_any_poll() {
    for polls in 0..4 {
        let clock = Clock::paused();
        let living = Living::default();
        clock.block_on(async {
            let mut scope = Scope::new().deadline(ms(100));
            scope.spawn(living.clone().hang());
            scope.spawn(done(1, 1));
            let mut join = Box::pin(scope.join());
            for _ in 0..polls {
                assert!(poll_once(join.as_mut()).is_pending());
                sleep(ms(1)).await;
            }
            drop(join);
            sleep(ms(1)).await;
        });
        assert_eq!(living.count(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn next_loses_nothing_when_it_is_dropped() {
    let mut scope = Scope::new();
    scope.spawn(done(10, 1));
    scope.spawn(done(20, 2));
    let mut got = Vec::new();
    while !scope.is_empty() {
        if let Ok(Some((index, end))) = tokio::time::timeout(ms(3), scope.next()).await {
            got.push((index, end.into_value()));
        }
    }
    assert_eq!(got, [(0, Some(1)), (1, Some(2))]);
}

#[tokio::test(start_paused = true)]
async fn children_inherit_the_context_narrowed_by_the_scope() {
    let policy = Policy::named("p").build().unwrap();
    let request = Context::new().deadline(ms(100)).key("tenant", "acme");
    context::scope(request, async move {
        let mut scope = Scope::<_, ()>::new().deadline(ms(50)).grace(ms(10));
        scope.spawn(async { Ok(context::current().unwrap().get_key("tenant").cloned().map(|_| None)) });
        scope.spawn(async move {
            let error = policy.run(pending::<Result<(), ()>>).await.unwrap_err();
            Ok(Some(error.limit()))
        });
        let got = scope.join().await.unwrap();
        assert_eq!(got, [Some(None), Some(Some(Limit::Context))]);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_sibling_s_failure_ends_the_calls_of_the_others_with_that_reason() {
    let policy = Policy::named("p").build().unwrap();
    let told = Arc::new(Mutex::new(None));
    let mut scope = Scope::<(), ()>::new().grace(ms(1));
    scope.spawn({
        let told = told.clone();
        async move {
            let error = policy.run(pending::<Result<(), ()>>).await.unwrap_err();
            *told.lock() = error.cancel_reason().cloned();
            Err(())
        }
    });
    scope.spawn(async { Err(()) });
    assert_eq!(scope.join().await.unwrap_err().first(), Some(1));
    assert_eq!(*told.lock(), Some(CancelReason::SiblingFailed));
}

#[tokio::test(start_paused = true)]
async fn a_scope_ends_with_its_context() {
    let client = Cancel::new();
    let request = context::scope(Context::new().cancel(&client), async {
        let mut scope = Scope::new();
        scope.spawn(Living::default().hang());
        scope.join().await.unwrap_err()
    });
    let (end, _) = tokio::join!(request, async { client.cancel_with(CancelReason::ClientGone) });
    assert_eq!(words(end.children()), ["cancelled the client has gone"]);

    let started = Instant::now();
    let request = context::scope(Context::new().deadline(ms(20)), async {
        let mut scope = Scope::new().deadline(ms(900));
        scope.spawn(Living::default().hang());
        scope.join().await.unwrap_err()
    });
    assert_eq!(words(request.await.children()), ["cancelled a deadline passed"]);
    assert_eq!(started.elapsed(), ms(20));
}

#[tokio::test(start_paused = true)]
async fn an_inner_scope_is_cancelled_with_the_outer_one_and_for_its_reason() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let mut outer = Scope::<(), &str>::new().grace(ms(5));
    outer.spawn({
        let seen = seen.clone();
        async move {
            let mut inner = Scope::new();
            inner.spawn(Living::default().hang());
            *seen.lock() = words(inner.wait().await.children());
            Ok(())
        }
    });
    outer.spawn(async { Err("no") });
    assert!(outer.join().await.is_err());
    assert_eq!(*seen.lock(), ["cancelled a sibling failed"]);

    // The other way round only its error counts.
    let mut outer = Scope::<u32, &str>::new();
    outer.spawn(async {
        let mut inner = Scope::new();
        inner.spawn(fail(1));
        inner.spawn(Living::default().hang());
        Ok(inner.join().await.unwrap_err().children().len() as u32)
    });
    outer.spawn(done(10, 7));
    assert_eq!(outer.join().await.unwrap(), [2, 7]);
}

/// Spawns a child that blocks its thread until it is let go, and waits until it does.
async fn spawn_stuck(scope: &mut Scope<u32, &'static str>, held: std::sync::mpsc::Receiver<()>) {
    let (begun, running) = tokio::sync::oneshot::channel();
    scope.spawn(async move {
        begun.send(()).unwrap();
        let _ = held.recv();
        Ok(1)
    });
    running.await.unwrap();
}

#[test]
fn a_child_that_never_awaits_is_left_behind_and_named() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap();
    let (go, held) = std::sync::mpsc::channel::<()>();
    let ends: Ends = runtime.block_on(async {
        let mut scope = Scope::new().stuck_after(Duration::from_millis(1));
        spawn_stuck(&mut scope, held).await;
        scope.cancel_with(CancelReason::Shutdown);
        let (_, stuck) = scope.next().await.unwrap();
        // The scope can still be used, as one that is closed.
        scope.spawn(Living::default().hang());
        let (_, late) = scope.next().await.unwrap();
        vec![stuck, late]
    });
    assert_eq!(words(&ends), ["stuck", "cancelled shutdown"]);
    drop(go);
}

#[test]
fn a_scope_outlives_the_runtime_of_its_children_without_hanging() {
    let mut scope = Scope::new();
    Clock::paused().block_on(async { scope.spawn(Living::default().hang()) });
    // The runtime is gone, and the child with it.
    let end = Clock::paused().block_on(scope.wait());
    assert_eq!(words(end.children()), ["cancelled shutdown"]);
}

#[tokio::test(start_paused = true)]
async fn a_greedy_child_cannot_put_off_its_end() {
    let mut scope = Scope::<u32, &str>::new();
    scope.spawn(async {
        loop {
            // Pending only when the whole cooperative budget is spent.
            tokio::task::consume_budget().await;
        }
    });
    tokio::task::yield_now().await;
    scope.cancel_with(CancelReason::Superseded);
    assert_eq!(words(scope.wait().await.children()), ["cancelled superseded"]);
}

#[tokio::test(start_paused = true)]
async fn map_streams_results_as_they_finish() {
    let pauses = [30, 10, 20];
    let mapped = Scope::new().map(pauses, 3, |pause| done(pause, pause as u32)).unwrap();
    let got: Vec<_> = mapped.map(|(index, end)| (index, end.into_value())).collect().await;
    assert_eq!(got, [(1, Some(10)), (2, Some(20)), (0, Some(30))]);
}

#[tokio::test(start_paused = true)]
async fn map_ends_at_the_deadline_with_what_is_there() {
    let started = Instant::now();
    let mut mapped = Scope::new().deadline(ms(25)).map(0.., 2, |n| done(10, n)).unwrap();
    let mut got = Vec::new();
    while let Some((_, end)) = mapped.next().await {
        got.push(end);
    }
    assert_eq!(started.elapsed(), ms(25));
    let deadline = "cancelled a deadline passed";
    assert_eq!(words(&got), ["done 0", "done 1", "done 2", "done 3", deadline, deadline]);
    assert!(mapped.is_partial());
    assert_eq!(mapped.into_rest().next(), Some(6), "what was not started can be had");
}

#[tokio::test(start_paused = true)]
async fn map_stops_at_the_first_error_unless_it_is_to_keep_going() {
    let child = |n: u32| if n == 2 { Box::pin(fail(1)) as Boxed } else { Box::pin(done(10, n)) };
    let end = Scope::new().map(0..6, 3, child).unwrap().wait().await;
    let sibling = "cancelled a sibling failed";
    assert_eq!(words(end.children()), [sibling, sibling, "failed no"]);
    assert_eq!((end.first_error(), end.is_partial()), (Some(&"no"), true));
    assert!(end.into_result().is_err());

    let end = Scope::new().keep_going().map(0..6, 3, child).unwrap().wait().await;
    assert_eq!(words(end.children()), ["done 0", "done 1", "failed no", "done 3", "done 4", "done 5"]);
    assert!(!end.is_partial());
}

type Boxed = std::pin::Pin<Box<dyn Future<Output = Result<u32, &'static str>> + Send>>;

#[tokio::test(start_paused = true)]
async fn a_map_of_nothing_or_with_a_deadline_of_zero_ends_at_once() {
    let end = Scope::new().map([], 3, |()| done(1, 1)).unwrap().wait().await;
    assert!(!end.is_partial());
    assert!(end.into_result().unwrap().is_empty());

    let end = Scope::new().deadline(Duration::ZERO).map([()], 3, |()| done(1, 1)).unwrap().wait().await;
    assert!(end.is_partial() && end.children().is_empty());
    assert_eq!(end.reason(), Some(&CancelReason::Deadline));
    assert!(end.into_result().is_err(), "what was not started is not done");
}

#[test]
fn a_limit_that_could_start_nothing_is_refused() {
    for limit in [0, usize::MAX] {
        let error = Scope::new().map([()], limit, |()| done(1, 1)).unwrap_err();
        assert_eq!(error.to_string(), format!("scope: limit must be 1 to 1048576, is {limit}"));
    }
}

#[tokio::test(start_paused = true)]
async fn a_slow_reader_holds_back_new_children() {
    let living = Living::default();
    let started = Arc::new(AtomicU32::new(0));
    let mut mapped = Scope::<u32, ()>::new()
        .map(0..10, 2, |n| {
            started.fetch_add(1, Relaxed);
            async move { Ok(n) }
        })
        .unwrap();
    assert_eq!(started.load(Relaxed), 0, "nothing before it is polled");
    mapped.next().await.unwrap();
    sleep(ms(50)).await;
    assert_eq!((started.load(Relaxed), mapped.scope().len()), (2, 1));
    assert_eq!(living.count(), 0);
}

#[test]
fn a_panic_in_the_closure_of_a_map_aborts_what_runs() {
    let clock = Clock::paused();
    let living = Living::default();
    clock.block_on(async {
        let hang = living.clone();
        let mapped = Scope::new().map([1, 2], 2, move |n| match n {
            1 => hang.clone().hang(),
            _ => std::panic::panic_any(Boom),
        });
        let wait = Box::pin(mapped.unwrap().wait());
        assert!(catch_boom(move || poll_once(pin!(wait))).is_none());
        sleep(ms(1)).await;
    });
    assert_eq!(living.count(), 0);
}

/// What a child of the property does: after so many milliseconds.
#[derive(Clone, Copy, Debug)]
enum Act {
    Done(u64),
    Fail(u64),
    Panic(u64),
    Hang,
}

impl Act {
    fn at(self) -> Option<u64> {
        match self {
            Self::Done(at) | Self::Fail(at) | Self::Panic(at) => Some(at),
            Self::Hang => None,
        }
    }

    async fn run(self) -> Result<u32, &'static str> {
        match self {
            Self::Done(at) => done(at, 1).await,
            Self::Fail(at) => fail(at).await,
            Self::Panic(at) => panics(at).await,
            Self::Hang => pending().await,
        }
    }
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    // Odd times for children, so that the deadline, an even one, meets nobody.
    let at = || (0..50_u64).prop_map(|half| half * 2 + 1);
    let act = prop_oneof![
        6 => at().prop_map(Act::Done),
        1 => at().prop_map(Act::Fail),
        1 => at().prop_map(Act::Panic),
        1 => Just(Act::Hang),
    ];
    proptest::collection::vec(act, 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_child_ends_once_and_as_the_clock_says(acts in acts(), deadline in 1..60_u64, keep_going: bool) {
        let deadline = deadline * 2;
        let failing = acts.iter().filter(|act| matches!(act, Act::Fail(_) | Act::Panic(_))).filter_map(|act| act.at());
        let first = failing.min().filter(|at| *at < deadline && !keep_going);
        let until = first.unwrap_or(deadline);
        // Nobody who ends in the same millisecond as the first failure can be foretold.
        prop_assume!(first.is_none_or(|first| acts.iter().filter(|act| act.at() == Some(first)).count() == 1));

        let (ends, took) = Clock::paused().block_on(async {
            let started = Instant::now();
            let mut scope = Scope::new().deadline(ms(deadline));
            if keep_going {
                scope = scope.keep_going();
            }
            for act in &acts {
                scope.spawn(act.run());
            }
            (scope.wait().await.into_children(), started.elapsed())
        });
        prop_assert_eq!(ends.len(), acts.len());
        for (act, end) in acts.iter().zip(&ends) {
            let fine = match (act, end) {
                (Act::Done(at), ChildEnd::Done(_)) | (Act::Fail(at), ChildEnd::Failed(_))
                    | (Act::Panic(at), ChildEnd::Panicked(_)) => *at <= until,
                (act, ChildEnd::Cancelled(reason)) => {
                    let told = if first.is_some() { CancelReason::SiblingFailed } else { CancelReason::Deadline };
                    act.at().is_none_or(|at| at > until) && *reason == told
                }
                _ => false,
            };
            prop_assert!(fine, "{act:?} ended as {end:?}");
        }
        let last = acts.iter().map(|act| act.at().map_or(until, |at| at.min(until))).max().unwrap_or(0);
        prop_assert_eq!(took, ms(last));
    }

    #[test]
    fn no_more_than_the_limit_are_in_flight(pauses in proptest::collection::vec(0..20_u64, 0..30), limit in 1..8_usize) {
        let living = Living::default();
        let most = Arc::new(AtomicU32::new(0));
        let end = Clock::paused().block_on(async {
            let child = |pause: u64| {
                let (living, most) = (living.clone(), most.clone());
                async move {
                    let _life = living.life();
                    most.fetch_max(living.count(), Relaxed);
                    done(pause, pause as u32).await
                }
            };
            Scope::new().map(pauses.clone(), limit, child).unwrap().wait().await
        });
        prop_assert!(most.load(Relaxed) as usize <= limit);
        prop_assert_eq!(end.into_result().unwrap(), pauses.iter().map(|pause| *pause as u32).collect::<Vec<_>>());
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Causes and effects

type Called = Error<&'static str>;

/// A child that does nothing but a call which only its scope can end.
fn calls() -> impl Future<Output = Result<u32, Called>> + Send + 'static {
    let policy = Policy::named("inner").build().unwrap();
    async move { policy.run(pending::<Result<u32, &'static str>>).await }
}

/// All children ended as an effect of this, and nothing else is told.
fn assert_effects(end: &ScopeEnd<u32, Called>, reason: &CancelReason) {
    assert_eq!((end.first(), end.reason()), (None, Some(reason)), "{end:?}");
    assert!(end.is_partial());
    for child in end.children() {
        let ChildEnd::CancelledWith(told, error) = child else { panic!("{child:?}") };
        assert_eq!(told, reason);
        if *reason == CancelReason::Deadline {
            assert_eq!((error.kind(), error.limit()), (ErrorKind::TimedOut, Some(Limit::Context)));
        } else {
            assert_eq!(error.cancel_reason(), Some(reason));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn calls_that_the_scopes_deadline_ends_are_no_failures() {
    let mut scope = Scope::<u32, Called>::new().deadline(ms(50));
    let handle = scope.cancel_handle();
    scope.spawn(calls());
    scope.spawn(calls());
    let end = scope.wait().await;
    assert_effects(&end, &CancelReason::Deadline);
    assert_eq!(handle.reason(), Some(CancelReason::Deadline));
    assert_eq!(end.to_string(), "2 of 2 children did not finish: a deadline passed");
}

#[tokio::test(start_paused = true)]
async fn calls_that_end_because_the_client_left_or_the_server_stops_are_no_failures() {
    for reason in [CancelReason::ClientGone, CancelReason::Shutdown] {
        let source = Cancel::new();
        context::scope(Context::new().cancel(&source), async {
            let mut scope = Scope::<u32, Called>::new();
            let handle = scope.cancel_handle();
            scope.spawn(calls());
            scope.spawn(calls());
            sleep(ms(10)).await;
            source.cancel_with(reason.clone());
            // At once, and for good.
            assert_eq!(handle.reason(), Some(reason.clone()));
            assert!(!handle.cancel_with("too late"));
            assert_effects(&scope.wait().await, &reason);
        })
        .await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_failure_before_the_end_is_the_first_and_what_follows_from_it_is_an_effect() {
    let mut scope = Scope::<u32, Called>::new();
    scope.spawn(calls());
    let policy = Policy::named("fails").build().unwrap();
    scope.spawn(async move { policy.run(|| async { Err::<u32, _>("no") }).await });
    let end = scope.wait().await;
    assert_eq!((end.first(), end.reason()), (Some(1), Some(&CancelReason::SiblingFailed)));
    assert!(matches!(&end.children()[0], ChildEnd::CancelledWith(CancelReason::SiblingFailed, _)));
    assert!(matches!(&end.children()[1], ChildEnd::Failed(_)));
}

#[tokio::test(start_paused = true)]
async fn the_first_reason_stays_when_a_second_source_is_cancelled() {
    let (client, server) = (Cancel::new(), Cancel::new());
    context::scope(Context::new().cancel(&client).cancel(&server), async {
        let mut scope = Scope::<u32, Called>::new();
        scope.spawn(calls());
        sleep(ms(10)).await;
        server.cancel_with(CancelReason::Shutdown);
        client.cancel_with(CancelReason::ClientGone);
        scope.cancel_with("too late");
        assert_effects(&scope.wait().await, &CancelReason::Shutdown);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_map_that_its_deadline_cuts_is_partial_however_its_children_notice() {
    let scope = Scope::<u32, Called>::new().keep_going().deadline(ms(50));
    let items = scope.map(0..3, 3, |n| async move { if n < 2 { Ok(n) } else { calls().await } }).unwrap();
    let end = items.wait().await;
    assert!(end.is_partial());
    assert_eq!(end.into_values(), [0, 1]);
}

#[tokio::test(start_paused = true)]
async fn what_a_panicking_child_would_have_made_is_missing() {
    let mut scope = Scope::<u32, &str>::new().keep_going();
    scope.spawn(panics(1));
    scope.spawn(done(5, 7));
    assert!(scope.wait().await.is_partial());
}

/// A panic that comes after the end cancels nobody, and is not what the scope failed of.
#[tokio::test(start_paused = true)]
async fn a_panic_after_the_end_is_not_the_first_failure() {
    let mut scope = Scope::<u32, &str>::new().grace(ms(100));
    scope.spawn(async {
        context::current().unwrap().cancelled().await;
        std::panic::panic_any(Boom)
    });
    tokio::task::yield_now().await;
    scope.cancel_with(CancelReason::ClientGone);
    let end = scope.wait().await;
    assert_eq!((end.first(), end.reason()), (None, Some(&CancelReason::ClientGone)));
}

#[tokio::test(start_paused = true)]
async fn an_item_that_is_lost_to_a_panic_makes_the_whole_partial() {
    let mut count = 0;
    let items = std::iter::from_fn(move || {
        count += 1;
        match count {
            1 => Some(1),
            2 => std::panic::panic_any(Boom),
            _ => None,
        }
    });
    let mut mapped = Scope::<u32, &str>::new().map(items, 1, |n| async move { Ok(n) }).unwrap();
    assert!(mapped.next().await.is_some());
    assert!(catch_boom(|| poll_once(pin!(mapped.next()))).is_none());
    assert!(mapped.next().await.is_none());
    assert!(mapped.is_partial());
}

/// Patience does not use the cooperative budget, the join does.
#[tokio::test(start_paused = true)]
async fn a_child_that_has_ended_is_not_given_up_because_the_budget_is_spent() {
    let mut scope = Scope::<u32, &str>::new().stuck_after(ms(1));
    let handle = scope.cancel_handle();
    scope.spawn(async move {
        handle.cancelled().await;
        Ok(1)
    });
    tokio::task::yield_now().await;
    assert!(poll_once(pin!(scope.next())).is_pending());
    scope.cancel_with("enough");
    assert!(poll_once(pin!(scope.next())).is_pending(), "now its patience runs");
    sleep(ms(5)).await;
    let end = poll_fn(|cx| {
        while tokio::task::coop::has_budget_remaining() {
            let _ = pin!(tokio::task::consume_budget()).poll(cx);
        }
        let flag = Flag::default();
        let end = flag.poll(pin!(scope.next()));
        std::task::Poll::Ready((end.is_pending(), flag.woken()))
    });
    assert_eq!(end.await, (true, true), "it could not look, and comes again");
    assert!(matches!(scope.next().await, Some((0, ChildEnd::Done(1)))));
}

#[tokio::test(start_paused = true)]
async fn the_source_of_an_end_is_the_first_error() {
    use std::error::Error as _;
    let mut scope = Scope::<(), std::io::Error>::new();
    scope.spawn(async { Ok(()) });
    scope.spawn(async { Err(std::io::Error::other("down")) });
    let end = scope.wait().await;
    assert_eq!(end.source().map(ToString::to_string), Some("down".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn a_stream_of_children_knows_that_one_of_them_was_cut() {
    let mut items =
        Scope::<u32, &str>::new().keep_going().map(0..2, 3, |item| done(10 * u64::from(item), item)).unwrap();
    assert!(matches!(items.next().await, Some((0, ChildEnd::Done(0)))));
    items.scope().cancel_with("enough");
    assert!(matches!(items.next().await, Some((1, ChildEnd::Cancelled(_)))));
    assert!(items.next().await.is_none());
    assert!(items.is_partial());
}

/// A child is given up once, also if several are.
#[test]
fn each_of_several_that_are_stuck_is_reported_once() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(3).enable_time().build().unwrap();
    let holds: Vec<_> = (0..2).map(|_| std::sync::mpsc::channel::<()>()).collect();
    let (senders, receivers): (Vec<_>, Vec<_>) = holds.into_iter().unzip();
    let ends = runtime.block_on(async {
        let mut scope = Scope::<u32, &str>::new().stuck_after(Duration::from_millis(1));
        for held in receivers {
            spawn_stuck(&mut scope, held).await;
        }
        scope.cancel_with(CancelReason::Shutdown);
        scope.wait().await
    });
    drop(senders);
    assert_eq!(words(&ends.into_children()), ["stuck", "stuck"]);
}

/// Whoever has the scope's handle hears of a deadline that is above the scope.
#[tokio::test(start_paused = true)]
async fn the_handle_of_a_scope_is_cancelled_when_its_deadline_passes() {
    let end = context::scope(Context::new().deadline(ms(10)), async {
        let mut scope = Scope::<u32, &str>::new();
        let handle = scope.cancel_handle();
        scope.spawn(pending());
        assert!(matches!(scope.next().await, Some((0, ChildEnd::Cancelled(_)))));
        handle.reason()
    });
    assert_eq!(end.await, Some(CancelReason::Deadline));
}

/// A token that is not the crate's own is not above the scope's, so the scope tells its own.
#[tokio::test(start_paused = true)]
async fn the_handle_of_a_scope_is_cancelled_when_a_token_of_others_is() {
    let token = tokio_util::sync::CancellationToken::new();
    let end = context::scope(Context::new().cancel(&token), async {
        let mut scope = Scope::<u32, &str>::new();
        let handle = scope.cancel_handle();
        scope.spawn(pending());
        token.cancel();
        assert!(matches!(scope.next().await, Some((0, ChildEnd::Cancelled(_)))));
        handle.is_cancelled()
    });
    assert!(end.await);
}
