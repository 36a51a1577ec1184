//! The context of a request: what calls inherit, what wins, where it goes, and where it ends.

mod support;

use std::cell::RefCell;
use std::future::{Future, pending};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use resile::context::{self, Context};
use resile::{
    Call, Cancel, CancelReason, Entry, Error, FutureExt, Gate, Key, Limit, Outcome, Pass, Policy, Priority, Retry,
    Semaphore, Stop, Times,
};
use support::hand::poll_once;
use support::ms;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// A gate that notes what calls say and how they end.
#[derive(Clone, Default)]
struct Reader(Arc<Mutex<Vec<Said>>>, Arc<Mutex<Vec<Outcome>>>);

#[derive(Clone, Debug, PartialEq)]
struct Said {
    remaining: Duration,
    priority: Priority,
    tenant: Option<Key>,
    user: Option<Key>,
}

impl Gate for Reader {
    fn enter(&self, call: &Call) -> Entry {
        let (tenant, user) = (call.key("tenant").cloned(), call.key("user").cloned());
        self.0.lock().push(Said { remaining: call.remaining(), priority: call.priority(), tenant, user });
        Entry::Pass(Pass::default())
    }

    fn leave(&self, _: Pass, outcome: Outcome) {
        self.1.lock().push(outcome);
    }
}

impl Reader {
    fn policy(&self) -> Policy {
        Policy::named("reader").gate(self.clone()).build().unwrap()
    }

    fn last(&self) -> Said {
        self.0.lock().last().unwrap().clone()
    }
}

async fn hang() -> Result<(), ()> {
    pending().await
}

async fn done() -> Result<(), ()> {
    Ok(())
}

fn empty() -> Policy {
    Policy::named("empty").build().unwrap()
}

#[tokio::test(start_paused = true)]
async fn without_a_context_nothing_is_inherited() {
    let reader = Reader::default();
    reader.policy().run(done).await.unwrap();
    let nothing = Said { remaining: Duration::MAX, priority: Priority::Normal, tenant: None, user: None };
    assert_eq!(reader.last(), nothing);
    context::scope(Context::new(), reader.policy().run(done)).await.unwrap();
    assert_eq!(reader.last(), nothing, "nor from one that says nothing");
}

#[tokio::test(start_paused = true)]
async fn a_call_inherits_deadline_priority_and_keys() {
    let reader = Reader::default();
    let request = Context::new().deadline(ms(300)).priority(Priority::Low).key("tenant", "acme").key("user", 7_u32);
    context::scope(request, async { reader.policy().run(done).await.unwrap() }).await;
    let told =
        Said { remaining: ms(300), priority: Priority::Low, tenant: Some("acme".into()), user: Some(7_u32.into()) };
    assert_eq!(reader.last(), told);
}

#[tokio::test(start_paused = true)]
async fn what_the_call_says_itself_wins_but_for_a_later_deadline() {
    let reader = Reader::default();
    let policy = reader.policy();
    let request = Context::new().deadline(ms(300)).priority(Priority::Low).key("tenant", "acme").key("user", 7_u32);
    context::scope(request, async {
        let call = policy.call().deadline(ms(500)).priority(Priority::Normal).key("tenant", "other");
        call.run(done).await.unwrap();
        let told = reader.last();
        assert_eq!((told.remaining, told.priority), (ms(300), Priority::Normal));
        assert_eq!((told.tenant, told.user), (Some("other".into()), Some(7_u32.into())));

        policy.call().deadline(ms(200)).run(done).await.unwrap();
        assert_eq!(reader.last().remaining, ms(200));
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn of_two_contexts_the_earlier_deadline_and_the_inner_rest_win() {
    let reader = Reader::default();
    let outer = Context::new().deadline(ms(300)).priority(Priority::Low).key("tenant", "outer").key("user", 1_u32);
    let inner = Context::new().deadline(ms(900)).priority(Priority::Critical).key("tenant", "inner");
    context::scope(outer.clone(), context::scope(inner.clone(), reader.policy().run(done))).await.unwrap();
    let told = Said {
        remaining: ms(300),
        priority: Priority::Critical,
        tenant: Some("inner".into()),
        user: Some(1_u32.into()),
    };
    assert_eq!(reader.last(), told);

    // A scope is nested where it is polled, not where it was made.
    let policy = reader.policy();
    let made_outside = context::scope(inner, policy.run(done));
    context::scope(outer, made_outside).await.unwrap();
    assert_eq!(reader.last(), told);

    context::scope(Context::new().deadline(ms(300)), async {
        context::scope(Context::new().deadline(ms(100)), reader.policy().run(done)).await.unwrap();
        assert_eq!(reader.last().remaining, ms(100));
        reader.policy().run(done).await.unwrap();
        assert_eq!(reader.last().remaining, ms(300), "the outer one is back");
    })
    .await;
    assert!(context::current().is_none());
}

#[tokio::test(start_paused = true)]
async fn a_deadline_that_passes_is_named_and_its_gates_hear_of_an_abandoned_call() {
    let reader = Reader::default();
    let policy = Policy::named("p").timeout(ms(900)).gate(reader.clone()).build().unwrap();
    let started = Instant::now();
    let error = context::scope(Context::new().deadline(ms(300)), policy.run(hang)).await.unwrap_err();
    assert_eq!(started.elapsed(), ms(300));
    assert_eq!(error.limit(), Some(Limit::Context));
    assert!(error.is_timeout() && !error.is_cancelled());
    assert_eq!(error.to_string(), "p: timed out: the deadline of the request passed in attempt 1");
    assert!(matches!(reader.1.lock()[..], [Outcome::Abandoned(Times { .. })]), "{:?}", reader.1.lock());
}

#[tokio::test(start_paused = true)]
async fn the_limit_that_is_named_is_the_earliest() {
    let policy = Policy::named("p").timeout(ms(400)).build().unwrap();
    let within = |deadline| Context::new().deadline(ms(deadline));
    let limit = |error: Error<()>| error.limit().unwrap();
    let error = context::scope(within(500), policy.run(hang)).await.unwrap_err();
    assert_eq!(limit(error), Limit::Step { step: 1, limit: ms(400) });
    let error = context::scope(within(500), policy.call().deadline(ms(300)).run(hang)).await.unwrap_err();
    assert_eq!(limit(error), Limit::Caller);
    let error = context::scope(within(200), policy.call().deadline(ms(300)).run(hang)).await.unwrap_err();
    assert_eq!(limit(error), Limit::Context);
    let error = context::scope(within(200), policy.call().deadline(ms(200)).run(hang)).await.unwrap_err();
    assert_eq!(limit(error), Limit::Caller, "of two at once the call's own");
}

#[tokio::test(start_paused = true)]
async fn no_backoff_is_slept_that_ends_after_the_deadline_of_the_request() {
    let policy = Policy::named("p").retry(Retry::constant(ms(200)).max_attempts(5)).build().unwrap();
    let started = Instant::now();
    let call = policy.run(|| async { Err::<(), _>("down") });
    let error = context::scope(Context::new().deadline(ms(300)), call).await.unwrap_err();
    assert_eq!((error.stop(), error.attempts(), started.elapsed()), (Stop::Deadline, 2, ms(200)));
}

#[tokio::test(start_paused = true)]
async fn with_a_deadline_that_has_passed_only_what_is_ready_at_once_succeeds() {
    context::scope(Context::new().deadline(Duration::ZERO), async {
        assert!(empty().run(done).await.is_ok());
        assert_eq!(empty().run(hang).await.unwrap_err().limit(), Some(Limit::Context));
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_cancellation_of_the_request_ends_its_calls_with_the_reason() {
    let reader = Reader::default();
    let client = Cancel::new();
    let request = context::scope(Context::new().cancel(&client), async {
        let error = reader.policy().run(hang).await.unwrap_err();
        assert_eq!(error.cancel_reason(), Some(&CancelReason::ClientGone));
        let error = reader.policy().run(hang).await.unwrap_err();
        assert_eq!((error.cancel_reason(), error.attempts()), (Some(&CancelReason::ClientGone), 0));
    });
    tokio::join!(request, async {
        tokio::time::sleep(ms(5)).await;
        client.cancel_with(CancelReason::ClientGone);
    });
    assert!(matches!(reader.1.lock()[..], [Outcome::Abandoned(_)]), "{:?}", reader.1.lock());
}

#[tokio::test(start_paused = true)]
async fn caller_policy_and_contexts_can_all_cancel() {
    let all: [Cancel; 4] = std::array::from_fn(|_| Cancel::new());
    for one in 0..4 {
        let [caller, policy, inner, outer] = all.each_ref().map(Cancel::child);
        let policy_of = Policy::named("p").cancel_on(&policy).build().unwrap();
        let call = policy_of.call().key("some", "key").cancel_on(&caller).run(hang);
        let call = context::scope(Context::new().cancel(&inner), call);
        let call = context::scope(Context::new().cancel(&outer), call);
        let (error, _) = tokio::join!(call, async { [&caller, &policy, &inner, &outer][one].cancel_with("this") });
        assert_eq!(error.unwrap_err().cancel_reason(), Some(&"this".into()));
    }
}

#[tokio::test(start_paused = true)]
async fn a_token_of_tokio_can_cancel_a_request() {
    let token = CancellationToken::new();
    let policy = empty();
    let call = context::scope(Context::new().cancel(&token), policy.run(hang));
    let (error, ()) = tokio::join!(call, async { token.cancel() });
    assert_eq!(error.unwrap_err().cancel_reason(), Some(&CancelReason::Unspecified));
}

#[tokio::test(start_paused = true)]
async fn two_calls_of_a_request_wait_side_by_side() {
    let client = Cancel::new();
    let policy = empty();
    let (one, two) = (policy.run(hang), policy.run(hang));
    let request = context::scope(Context::new().cancel(&client), async { tokio::join!(one, two) });
    let ((one, two), _) = tokio::join!(request, async { client.cancel() });
    assert!(one.unwrap_err().is_cancelled() && two.unwrap_err().is_cancelled());
}

#[tokio::test(start_paused = true)]
async fn a_policy_that_can_be_cancelled_cancels_every_call() {
    let (one, two) = (Cancel::new(), CancellationToken::new());
    let policy = Policy::named("p").cancel_on(&one).timeout(ms(10)).cancel_on(&two).build().unwrap();
    assert_eq!(policy.to_string(), "p: timeout 10ms, can be cancelled");
    assert!(policy.run(done).await.is_ok());
    one.cancel_with(CancelReason::Shutdown);
    for error in [policy.run(done).await, policy.clone().into_run(done).await, policy.run_once(done()).await] {
        assert_eq!(error.unwrap_err().cancel_reason(), Some(&CancelReason::Shutdown));
    }
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_policy_makes_no_further_attempt() {
    let shutdown = Cancel::new();
    let retry = Retry::immediate().max_attempts(5);
    let policy = Policy::named("p").retry(retry).cancel_on(&shutdown).build().unwrap();
    let call = policy.run(|| async {
        shutdown.cancel_with(CancelReason::Shutdown);
        Err::<(), _>("down")
    });
    let error = call.await.unwrap_err();
    assert_eq!((error.cancel_reason(), error.attempts()), (Some(&CancelReason::Shutdown), 1));
    assert_eq!(error.last(), Some(&"down"));
}

#[tokio::test(start_paused = true)]
async fn a_call_keeps_what_it_found_at_its_first_poll() {
    let policy = empty();
    let client = Cancel::new();
    let mut call = Box::pin(policy.run(hang));
    {
        let first = context::scope(Context::new().deadline(ms(300)).cancel(&client), async {
            assert!(poll_once(call.as_mut()).is_pending());
        });
        first.await;
    }
    client.cancel_with(CancelReason::ClientGone);
    assert_eq!(call.await.unwrap_err().cancel_reason(), Some(&CancelReason::ClientGone));

    let mut late = Box::pin(policy.run(hang));
    assert!(poll_once(late.as_mut()).is_pending());
    let request = context::scope(Context::new().deadline(ms(1)), async { poll_once(late.as_mut()).is_pending() });
    assert!(request.await);
    tokio::time::sleep(ms(10)).await;
    assert!(poll_once(late.as_mut()).is_pending(), "a context that comes later is not its own");
}

#[tokio::test(start_paused = true)]
async fn a_detached_call_inherits_nothing() {
    let reader = Reader::default();
    let client = Cancel::new();
    client.cancel();
    let request = Context::new().deadline(ms(1)).cancel(&client).priority(Priority::Low).key("tenant", "acme");
    context::scope(request, async {
        reader.policy().call().detached().run(done).await.unwrap();
        let nothing = Said { remaining: Duration::MAX, priority: Priority::Normal, tenant: None, user: None };
        assert_eq!(reader.last(), nothing);
        context::detach(reader.policy().run(done)).await.unwrap();
        assert_eq!(reader.last(), nothing);
        done().within(ms(5)).detached().await.unwrap();
        assert!(done().within(ms(5)).await.unwrap_err().is_cancelled());
        assert!(context::current().is_some(), "the others still do");
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_gate_alone_inherits_nothing() {
    let semaphore = Semaphore::permits(1).build().unwrap();
    let client = Cancel::new();
    client.cancel();
    context::scope(Context::new().deadline(Duration::ZERO).cancel(&client), async {
        let held = semaphore.acquire().await.unwrap();
        let (got, ()) = tokio::join!(semaphore.acquire(), async {
            tokio::time::sleep(ms(10)).await;
            held.success();
        });
        assert!(got.is_ok());
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_context_says_what_it_holds() {
    let client = Cancel::new();
    let request = Context::new().deadline(ms(300)).deadline(ms(500)).cancel(&client).key("a", 1_u32).key("a", 2_u32);
    assert_eq!(request.remaining(), ms(300));
    assert_eq!(request.get_deadline(), Some(Instant::now() + ms(300)));
    assert_eq!((request.get_priority(), request.get_key("a")), (None, Some(&2_u32.into())));
    assert_eq!((request.is_cancelled(), request.cancel_reason()), (false, None));
    client.cancel_with(CancelReason::Superseded);
    assert_eq!(request.clone().cancel_reason(), Some(CancelReason::Superseded));
    assert_eq!(request.cancelled().await, CancelReason::Superseded);
    assert!(format!("{request:?}").contains("Superseded"));

    let nothing = Context::default();
    assert_eq!((nothing.remaining(), nothing.get_deadline()), (Duration::MAX, None));
    assert_eq!(Context::new().deadline(Duration::MAX).get_deadline(), None);
    assert!(poll_once(pin!(nothing.cancelled())).is_pending());
}

#[tokio::test(start_paused = true)]
async fn a_context_goes_along_where_it_is_carried_and_nowhere_else() {
    let here = || context::current().and_then(|request| request.get_key("id").cloned());
    let request = Context::new().key("id", 1_u32);
    context::scope(request, async move {
        let id = Some(Key::from(1_u32));
        assert_eq!(here(), id);
        assert_eq!(context::spawn(async move { here() }).await.unwrap(), id);
        assert_eq!(context::spawn_blocking(here).await.unwrap(), id);
        assert_eq!(tokio::spawn(context::carry(async move { here() })).await.unwrap(), id);
        assert_eq!(tokio::spawn(async move { here() }).await.unwrap(), None);
        assert_eq!(tokio::task::spawn_blocking(here).await.unwrap(), None);
        let nested = context::spawn(async move { context::spawn_blocking(here).await.unwrap() });
        assert_eq!(nested.await.unwrap(), id);
    })
    .await;
    // What is carried is what was there when it was wrapped, also nothing.
    let carried = context::carry(async move { here() });
    assert_eq!(context::scope(Context::new().key("id", 2_u32), carried).await, None);
}

#[tokio::test(start_paused = true)]
async fn many_tasks_keep_their_contexts_apart() {
    let tasks = (0..50_u64).map(|id| {
        context::scope(Context::new().key("id", id), async move {
            for pause in 0..id % 7 {
                tokio::time::sleep(ms(pause)).await;
                assert_eq!(context::current().unwrap().get_key("id"), Some(&Key::Number(id)));
            }
        })
    });
    futures::future::join_all(tasks).await;
    assert!(context::current().is_none());
}

#[test]
fn a_panic_leaves_no_context_behind() {
    let scoped = context::scope(Context::new(), async { std::panic::panic_any(support::script::Boom) });
    assert!(support::hand::catch_boom(|| poll_once(Box::pin(scoped).as_mut())).is_none());
    assert!(context::current().is_none());
}

#[test]
fn a_future_is_dropped_in_its_context() {
    struct Dropped(Rc<RefCell<Vec<Option<Key>>>>);
    impl Drop for Dropped {
        fn drop(&mut self) {
            let id = context::current().and_then(|request| request.get_key("id").cloned());
            self.0.borrow_mut().push(id);
        }
    }
    let seen = Rc::new(RefCell::new(Vec::new()));
    let make = |polls: u32| {
        let dropped = Dropped(seen.clone());
        let future: std::pin::Pin<Box<dyn Future<Output = ()>>> = Box::pin(async move {
            let _dropped = dropped;
            if polls < 2 {
                pending::<()>().await;
            }
        });
        let mut scoped = Box::pin(context::scope(Context::new().key("id", polls), future));
        for _ in 0..polls.min(1) {
            let _ = poll_once(scoped.as_mut());
        }
    };
    (0..3).for_each(make);
    let ids = [0_u32, 1, 2].map(|id| Some(Key::from(id)));
    assert_eq!(*seen.borrow(), ids);
}

/// As often as a function that narrows the context it finds calls itself.
#[tokio::test(start_paused = true)]
async fn a_context_put_inside_of_itself_many_times_says_each_thing_once() {
    fn deeper(policy: &Policy, times: u32) -> std::pin::Pin<Box<dyn Future<Output = Error<()>> + '_>> {
        Box::pin(async move {
            if times == 0 {
                return policy.run(pending::<Result<(), ()>>).await.unwrap_err();
            }
            let found = context::current().unwrap().deadline(Duration::from_secs(1));
            context::scope(found, deeper(policy, times - 1)).await
        })
    }

    let (cancel, token) = (Cancel::new(), CancellationToken::new());
    let request = Context::new().cancel(&cancel).cancel(&token).key("tenant", "acme");
    let policy = Policy::named("users").build().unwrap();
    let call = context::scope(request, deeper(&policy, 64));
    let (error, _) = tokio::join!(call, async { cancel.cancel_with(CancelReason::ClientGone) });
    assert_eq!(error.cancel_reason(), Some(&CancelReason::ClientGone));
}

// ---------------------------------------------------------------------------------------------------------------
// Its deadline is an end like a cancellation

#[tokio::test(start_paused = true)]
async fn a_context_whose_deadline_has_passed_is_cancelled_with_that_reason() {
    let client = Cancel::new();
    let request = Context::new().cancel(&client).deadline(ms(10));
    let start = Instant::now();
    assert!(!request.is_cancelled() && request.cancel_reason().is_none());
    assert_eq!(request.cancelled().await, CancelReason::Deadline);
    assert_eq!(start.elapsed(), ms(10));
    client.cancel_with(CancelReason::ClientGone);
    assert!(request.is_cancelled());
    assert_eq!(request.clone().cancel_reason(), Some(CancelReason::Deadline), "the first one stays");
}

#[tokio::test(start_paused = true)]
async fn what_ended_a_context_before_anybody_noticed_its_deadline_comes_first() {
    let client = Cancel::new();
    let request = Context::new().cancel(&client).deadline(ms(10));
    client.cancel_with(CancelReason::ClientGone);
    tokio::time::advance(ms(20)).await;
    assert_eq!(request.cancel_reason(), Some(CancelReason::ClientGone));
}

#[tokio::test(start_paused = true)]
async fn a_call_that_its_contexts_deadline_ends_fixes_the_reason_for_all() {
    let client = Cancel::new();
    let policy = Policy::named("p").build().unwrap();
    let request = Context::new().cancel(&client).deadline(ms(10));
    let error = context::scope(request.clone(), policy.run(pending::<Result<(), ()>>)).await.unwrap_err();
    assert_eq!(error.limit(), Some(Limit::Context));
    client.cancel_with(CancelReason::ClientGone);
    assert_eq!(request.cancel_reason(), Some(CancelReason::Deadline));
}

#[tokio::test(start_paused = true)]
async fn a_blocking_closure_sees_that_the_deadline_has_passed() {
    let request = Context::new().deadline(ms(10));
    let told = context::scope(request, async {
        tokio::time::advance(ms(10)).await;
        context::current().unwrap().cancel_reason()
    });
    assert_eq!(told.await, Some(CancelReason::Deadline));
}

#[tokio::test(start_paused = true)]
async fn an_inner_context_that_ends_earlier_does_not_end_the_outer_one() {
    let outer = Context::new().deadline(ms(100));
    let inner = context::scope(outer.clone(), async {
        context::scope(Context::new().deadline(ms(10)), async { context::current().unwrap() }).await
    });
    let inner = inner.await;
    tokio::time::advance(ms(10)).await;
    assert_eq!(inner.cancel_reason(), Some(CancelReason::Deadline));
    assert!(!outer.is_cancelled());
}
