//! What the public types are: `Send`, `Sync`, `Clone`, `'static`, `Debug`, and how large.
//!
//! Positive claims are generic functions that would not compile otherwise. Negative ones ask the compiler which of two
//! methods it picks, and are tests.

use std::cell::Cell;
use std::fmt::Debug;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use resile::context::{Context as RequestContext, Scoped};
use resile::run::Plain;
use resile::{
    Acquire, Attempt, ByPolicy, ByResult, Call, CallBuilder, Cancel, CancelReason, Cancelled, ChildEnd, ChildPanic,
    CircuitBreaker, ConfigError, CutShort, Deadline, Drain, DrainBuilder, DrainPart, Drained, Entry, Erased, Error,
    ErrorKind, Fault, FewSteps, Finding, FutureExt, Gate, Guard, Held, Jitter, Judged, Key, KeyRef, Keyed,
    KeyedBuilder, KeyedStats, Layers, LayersBuilder, LeakyBucket, Limit, LimitFields, Mapped, Moment, OnCancel, OneKey,
    OneShot, Outcome, Pass, Phase, Plan, Policy, PolicyBuilder, Priority, Quota, Rate, Reason, Refusal, Retry,
    RetryBudget, Run, Scope, ScopeEnd, Semaphore, SlidingWindow, Snapshot, State, Stop, Ticket, Times, TokenBucket,
    TopKey, Verdict,
};
use tokio::task::LocalSet;
use tokio_util::sync::CancellationToken;

/// Whether the type of a value implements a trait: a method with a bound is preferred to one of a trait on a reference.
macro_rules! implements {
    ($value:expr, $bound:path) => {{
        #[allow(dead_code, reason = "one of the two is not used")]
        struct Asked<'a, T>(&'a T);
        #[allow(dead_code, reason = "one of the two is not used")]
        trait Otherwise {
            fn answer(&self) -> bool {
                let _ = self;
                false
            }
        }
        impl<T> Otherwise for &Asked<'_, T> {}
        #[allow(dead_code, reason = "one of the two is not used")]
        impl<T: $bound> Asked<'_, T> {
            fn answer(&self) -> bool {
                let _ = self.0;
                true
            }
        }
        (&Asked(&$value)).answer()
    }};
}

fn assert_value<T: Clone + Debug + Send + Sync + Unpin + 'static>() {}
fn assert_shared<T: Debug + Send + Sync + Unpin + 'static>() {}
fn assert_send<T: Send>(value: T) -> T {
    value
}
fn assert_static<T: Send + 'static>(value: T) -> T {
    value
}

#[test]
fn handles_and_values_are_cloned_shared_and_kept_everywhere() {
    assert_value::<Policy>();
    assert_value::<Semaphore>();
    assert_value::<CircuitBreaker>();
    assert_value::<TokenBucket>();
    assert_value::<LeakyBucket>();
    assert_value::<SlidingWindow>();
    assert_value::<Quota>();
    assert_value::<Snapshot>();
    assert_value::<LimitFields>();
    assert_value::<Keyed<TokenBucket>>();
    assert_value::<OneKey<CircuitBreaker>>();
    assert_value::<Plan<Semaphore>>();
    assert_value::<Layers>();
    assert_value::<KeyRef<'static>>();
    assert_value::<KeyedStats>();
    assert_value::<TopKey>();
    assert_value::<RetryBudget>();
    assert_value::<Retry>();
    assert_value::<Refusal>();
    assert_value::<Reason>();
    assert_value::<ConfigError>();
    assert_value::<Fault>();
    assert_value::<Finding>();
    assert_value::<Key>();
    assert_value::<Priority>();
    assert_value::<Deadline>();
    assert_value::<Attempt>();
    assert_value::<Moment>();
    assert_value::<Verdict>();
    assert_value::<Outcome>();
    assert_value::<Times>();
    assert_value::<Jitter>();
    assert_value::<Rate>();
    assert_value::<State>();
    assert_value::<Stop>();
    assert_value::<Limit>();
    assert_value::<ErrorKind>();
    assert_value::<ByResult>();
    assert_value::<ByPolicy>();
    assert_value::<Judged<'static, ByResult>>();
    assert_value::<Cancel>();
    assert_value::<CancelReason>();
    assert_value::<RequestContext>();
    assert_value::<CutShort>();
    assert_value::<Drain>();
    assert_value::<DrainBuilder>();
    assert_value::<DrainPart>();
    assert_value::<Drained>();
    assert_value::<Held>();
    assert_value::<Phase>();

    assert_shared::<KeyedBuilder<TokenBucket>>();
    assert_shared::<LayersBuilder>();
    assert_shared::<Scope<(), ()>>();
    assert_shared::<ScopeEnd<(), ()>>();
    assert_shared::<ChildEnd<(), ()>>();
    assert_shared::<ChildPanic>();
    assert_shared::<Mapped<(), (), std::ops::Range<u32>, fn(u32) -> Ready>>();
    assert_shared::<PolicyBuilder>();
    assert_shared::<Error<()>>();
    assert_shared::<Erased>();
    assert_shared::<Entry>();
    assert_shared::<Guard>();
    assert_shared::<FewSteps>();
}

#[test]
fn a_pass_a_ticket_and_a_guard_are_not_cloned() {
    assert!(!implements!(Pass::default(), Clone));
    assert!(!implements!(Ticket::default(), Clone));
    let semaphore = Semaphore::permits(1).build().unwrap();
    assert!(!implements!(semaphore.try_acquire().unwrap(), Clone));
}

#[test]
fn a_gate_and_a_source_of_delays_are_object_safe() {
    fn gates(_: &dyn Gate) {}
    fn delays(_: &dyn resile::Backoff) {}
    gates(&Semaphore::permits(1).build().unwrap());
    delays(&[Duration::ZERO]);
}

type Ready = std::future::Ready<Result<(), ()>>;

/// A future and an error of one's own choice.
struct Operation<E, X>(std::marker::PhantomData<(E, X)>);

impl<E, X> Future for Operation<E, X> {
    type Output = Result<(), E>;

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
        Poll::Pending
    }
}

fn operation<E, X>() -> Operation<E, X> {
    Operation(std::marker::PhantomData)
}

#[test]
fn what_waits_for_a_drain_is_sent_to_any_task_and_holds_no_borrow() {
    let drain = Drain::new();
    drop(assert_static(drain.close(Duration::ZERO)));
    drop(assert_static(drain.closed()));
    drop(assert_static(drain.closing()));
    drop(assert_static(drain.wait_for(Phase::Done)));
}

/// A closure that holds what cannot be sent. Inside of one function the compiler does not know that yet.
fn local_closure() -> impl FnMut() -> Operation<(), ()> {
    let local = Rc::new(());
    move || {
        let _ = &local;
        operation()
    }
}

fn local_judge() -> impl Fn(&Result<(), ()>) -> Verdict {
    let local = Rc::new(());
    move |_| {
        let _ = &local;
        Verdict::Success
    }
}

fn policy() -> Policy {
    Policy::named("any").build().unwrap()
}

#[test]
fn a_run_is_send_exactly_when_operation_future_error_and_judge_are() {
    let policy = policy();
    assert!(implements!(policy.run(operation::<(), ()>), Send));
    assert!(implements!(policy.run_once(operation::<(), ()>()), Send));
    assert!(implements!(policy.clone().into_run(operation::<(), ()>), Send));
    assert!(!implements!(policy.run(local_closure()), Send), "the closure holds an Rc");
    assert!(!implements!(policy.run(operation::<(), Rc<()>>), Send), "the future holds an Rc");
    assert!(!implements!(policy.run(operation::<Rc<()>, ()>), Send), "the error is an Rc");
    assert!(!implements!(policy.classify(local_judge()).run(operation::<(), ()>), Send), "the judge holds an Rc");
    assert!(!implements!(policy.run_once(operation::<(), Rc<()>>()), Send));
    assert!(!implements!(policy.run_once(operation::<Rc<()>, ()>()), Send));
}

#[test]
fn a_one_shot_is_send_exactly_when_its_future_and_error_are() {
    let limit = Duration::from_secs(1);
    assert!(implements!(operation::<(), ()>().within(limit), Send));
    assert!(!implements!(operation::<(), Rc<()>>().within(limit), Send));
    assert!(!implements!(operation::<Rc<()>, ()>().within(limit), Send));
}

#[test]
fn an_error_is_send_and_static_exactly_when_the_operations_is() {
    fn holds<E: Debug + Send + Sync + Unpin + 'static>() {
        assert_shared::<Error<E>>();
    }
    holds::<std::io::Error>();
    assert!(!implements!(None::<Error<Rc<()>>>, Send));
    assert!(!implements!(None::<Error<Cell<()>>>, Sync));
}

#[test]
fn a_run_is_unpin_exactly_when_its_future_is() {
    let policy = policy();
    assert!(!implements!(policy.run(|| async { Ok::<_, ()>(()) }), Unpin));
}

#[test]
fn futures_are_debug_whatever_is_in_them() {
    let policy = policy();
    let future = || async { Ok::<(), Cell<()>>(()) };
    assert!(implements!(policy.run(future), Debug));
    assert!(implements!(policy.run_once(future()), Debug));
    assert!(implements!(future().within(Duration::from_secs(1)), Debug));
    assert!(implements!(Semaphore::permits(1).build().unwrap().acquire(), Debug));
    assert!(implements!(Semaphore::permits(1).build().unwrap().try_acquire().unwrap(), Debug));
}

#[test]
fn a_wait_and_a_guard_move_into_tasks() {
    fn assert_moves<T: Debug + Send + 'static>() {}
    assert_moves::<Acquire>();
    assert_moves::<Guard>();
    assert_moves::<Cancelled>();
    assert_moves::<Scoped<Ready>>();
    assert_moves::<OnCancel<Ready, fn(CutShort)>>();
    assert_moves::<OneShot<Ready>>();
    assert_moves::<Run<Policy, Plain<fn() -> Ready>, Ready, ByResult>>();
    assert_moves::<CallBuilder<Policy, ByResult>>();
    assert_moves::<Call>();
}

#[tokio::test(start_paused = true)]
async fn an_operation_may_borrow_what_its_caller_has() {
    let policy = policy();
    let (names, count) = (vec![String::from("ann"), String::from("bob")], Cell::new(0));
    let first = policy
        .run(|| async {
            count.set(count.get() + 1);
            names.first().ok_or("nobody")
        })
        .await;
    assert_eq!(first.unwrap(), "ann");
    let second = policy.run(async || names.get(1).ok_or("nobody")).await;
    assert_eq!((second.unwrap().as_str(), count.get()), ("bob", 1));
    let name = policy.run_once(async { names.last().ok_or("nobody") }).await;
    assert_eq!(name.unwrap(), "bob");
}

#[tokio::test(start_paused = true)]
async fn a_policy_moves_into_a_task_and_is_borrowed_there() {
    let policy = Policy::named("busy").timeout(Duration::from_secs(1)).gate(Semaphore::permits(1)).build().unwrap();
    let task = tokio::spawn(async move {
        let name = String::from("ann");
        let judge = |result: &Result<usize, ()>| if result.is_ok() { Verdict::Success } else { Verdict::Permanent };
        let token = CancellationToken::new();
        let call = policy.call().key("name", name.as_str()).cancel_on(&token).classify(judge);
        let length = call.run_with(|attempt| std::future::ready(Ok(name.len() * attempt.attempt() as usize))).await;
        length.unwrap() + policy.run(|| async { Ok::<_, ()>(name.len()) }).await.unwrap()
    });
    assert_eq!(task.await.unwrap(), 6);
}

#[tokio::test(start_paused = true)]
async fn a_run_that_owns_its_policy_is_spawned_as_it_is() {
    let policy = policy();
    let runs = [
        tokio::spawn(policy.clone().into_run(|| async { Ok::<_, ()>(1) })),
        tokio::spawn(policy.classify(ByResult).into_run(|| async { Ok::<_, ()>(2) })),
    ];
    let call = tokio::spawn(assert_static(policy.call().cost(2).owned().run(|| async { Ok::<_, ()>(3) })));
    drop(policy);
    let mut sum = call.await.unwrap().unwrap();
    for run in runs {
        sum += run.await.unwrap().unwrap();
    }
    assert_eq!(sum, 6);
}

#[tokio::test(start_paused = true)]
async fn a_guard_moves_into_a_task_and_goes_back_there() {
    let semaphore = Semaphore::permits(1).build().unwrap();
    let guard = semaphore.acquire().await.unwrap();
    let task = tokio::spawn(async move { guard.success() });
    task.await.unwrap();
    assert_eq!(semaphore.available(), 1);
    let wait = tokio::spawn(semaphore.acquire());
    drop(wait.await.unwrap().unwrap());
    assert_eq!(semaphore.available(), 1);
}

#[tokio::test(start_paused = true)]
async fn operations_that_are_not_send_run_on_a_local_set() {
    let policy = Policy::named("local").timeout(Duration::from_secs(1)).retry(Retry::immediate()).build().unwrap();
    let tried = Rc::new(Cell::new(0));
    let seen = tried.clone();
    let local = LocalSet::new();
    let task = local.spawn_local(async move {
        let run = policy.run(|| {
            let tried = tried.clone();
            async move {
                tokio::task::yield_now().await;
                tried.set(tried.get() + 1);
                if tried.get() < 2 { Err(Rc::new("reset")) } else { Ok(Rc::new("done")) }
            }
        });
        *run.await.unwrap()
    });
    assert_eq!(local.run_until(task).await.unwrap(), "done");
    assert_eq!(seen.get(), 2);
}

/// A middleware whose future has a name and is not boxed.
#[derive(Clone)]
struct Resilient<S> {
    policy: Policy,
    inner: S,
}

struct Request<S, R> {
    service: S,
    request: R,
}

impl<S, R> Request<S, R>
where
    S: tower::Service<R>,
    R: Clone,
{
    fn call(&mut self) -> S::Future {
        self.service.call(self.request.clone())
    }
}

impl<S, R, T, E> tower::Service<R> for Resilient<S>
where
    S: tower::Service<R, Response = T, Error = E> + Clone + 'static,
    S::Future: Future<Output = Result<T, E>> + 'static,
    R: Clone + 'static,
{
    type Response = T;
    type Error = Error<E>;
    type Future = Run<Policy, Plain<Box<dyn FnMut() -> S::Future>>, S::Future, ByResult>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: R) -> Self::Future {
        let mut request = Request { service: self.inner.clone(), request };
        self.policy.clone().into_run(Box::new(move || request.call()))
    }
}

/// The same for a peer that is a function: nothing is boxed.
#[derive(Clone)]
struct Peer {
    policy: Policy,
    ask: fn() -> Ready,
}

impl tower::Service<()> for Peer {
    type Response = ();
    type Error = Error<()>;
    type Future = Run<Policy, Plain<fn() -> Ready>, Ready, ByResult>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, (): ()) -> Self::Future {
        self.policy.clone().into_run(self.ask)
    }
}

#[tokio::test(start_paused = true)]
async fn a_run_is_the_named_future_of_a_service() {
    use tower::ServiceExt;

    let policy = Policy::named("service").retry(Retry::immediate()).build().unwrap();
    let inner = tower::service_fn(|request: u32| std::future::ready(Ok::<_, std::io::Error>(request + 1)));
    let service = Resilient { policy: policy.clone(), inner };
    assert_eq!(service.oneshot(41).await.unwrap(), 42);

    let peer = Peer { policy, ask: || std::future::ready(Err(())) };
    let future = assert_send(peer.oneshot(()));
    assert_eq!(tokio::spawn(future).await.unwrap().unwrap_err().attempts(), 3);
}

#[test]
fn what_travels_is_small() {
    let most = [
        ("Error<()>", size_of::<Error<()>>(), 88),
        ("Error<Box<()>>", size_of::<Error<Box<()>>>(), 88),
        ("Error<[u64; 4]>", size_of::<Error<[u64; 4]>>(), size_of::<Option<[u64; 4]>>() + 80),
        ("Refusal", size_of::<Refusal>(), 56),
        ("Entry", size_of::<Entry>(), 56),
        ("Outcome", size_of::<Outcome>(), 48),
        ("Guard", size_of::<Guard>(), 64),
        ("Attempt", size_of::<Attempt>(), 24),
        ("Policy", size_of::<Policy>(), size_of::<usize>()),
        ("Pass", size_of::<Pass>(), 16),
        ("Ticket", size_of::<Ticket>(), 16),
        ("Moment", size_of::<Moment>(), 8),
    ];
    for (name, size, most) in most {
        println!("{name} {size}");
        assert!(size <= most, "{name} has {size} bytes");
    }
}

#[test]
fn a_run_adds_no_more_than_420_bytes_to_its_operation() {
    let policy = Policy::named("canonical")
        .timeout(Duration::from_secs(2))
        .retry(Retry::exponential(Duration::from_millis(50)).budget(RetryBudget::ratio(0.1).build().unwrap()))
        .gate(CircuitBreaker::builder())
        .gate(TokenBucket::per_second(500))
        .gate(Semaphore::permits(64))
        .timeout(Duration::from_millis(300))
        .build()
        .unwrap();
    let operation = || async {
        let kept = [0_u8; 100];
        std::future::pending::<()>().await;
        Ok::<_, u64>(kept)
    };
    let run = policy.run(operation);
    let added = size_of_val(&run) - size_of_val(&operation());
    println!("{added}");
    assert!(added <= 420, "{added}");
}

#[test]
fn offloaded_jobs_and_health_are_handles_and_values_like_the_others() {
    use resile::health::{Check, HealthReason, HealthReport, Signal, Symptom};
    use resile::{Blocking, Compute, Health, Job, Offload};

    assert_value::<Blocking>();
    assert_value::<Compute>();
    assert_value::<Job>();
    assert_value::<Health>();
    assert_value::<HealthReport>();
    assert_value::<HealthReason>();
    assert_value::<Signal>();
    assert_value::<Symptom>();
    assert_shared::<Check>();

    let compute = Compute::builder().threads(1).build().unwrap();
    let job = assert_static(compute.run(|_| Cell::new(0)));
    assert!(!implements!(job, Sync), "what it is to run need not be");
    assert!(!implements!(job, Unpin));
    assert!(!implements!(job, Clone));
    assert!(!implements!(None::<Offload<Rc<()>>>, Send));
}

// ---------------------------------------------------------------------------------------------------------------
// Borrowed types in tasks: `&'static str` becomes a reference of any lifetime where the compiler asks whether a task can be
// sent, and what is `Send` for `'static` types only is not `Send` then.

type Text = Result<&'static str, &'static str>;

async fn text() -> Text {
    Ok("text")
}

/// On the clock of the wall: a paused one would run ahead of the threads that work here.
#[tokio::test]
async fn calls_with_borrowed_values_and_errors_can_be_awaited_in_tasks() {
    use resile::{Blocking, Compute};

    let policy = Policy::named("p").timeout(Duration::from_secs(60)).build().unwrap();
    let (blocking, compute) = (Blocking::builder().build().unwrap(), Compute::builder().threads(1).build().unwrap());
    let gate = Semaphore::permits(1).build().unwrap();

    let own = policy.clone();
    let shields = tokio::spawn(async move {
        own.call().shield().run(text).await.unwrap();
        own.call().shield().run_with(|_| text()).await.unwrap();
        own.call().shield().run_once(text()).await.unwrap();
        own.run(|| own.call().shield().run(text)).await.unwrap()
    });
    assert_eq!(shields.await.unwrap(), "text");

    let own = policy.clone();
    let jobs = tokio::spawn(async move {
        own.run(|| blocking.try_run(|_| -> Text { Ok("text") })).await.unwrap();
        own.run(|| compute.try_run(|_| -> Text { Ok("text") })).await.unwrap();
        blocking.try_run(|_| -> Text { Ok("text") }).through(&gate).await.unwrap();
        let (one, other) =
            tokio::join!(blocking.try_run(|_| -> Text { Ok("text") }), compute.try_run(|_| -> Text { Ok("text") }),);
        one.and(other).unwrap()
    });
    assert_eq!(jobs.await.unwrap(), "text");

    let own = policy.clone();
    let cleanups = tokio::spawn(async move {
        let call = own.call().cleanup(|_: &'static str, _| async {});
        call.run(|| ("handle", text())).await.unwrap();
        own.call().shield().cleanup(|_: &'static str, _| async {}).run(|| ("handle", text())).await.unwrap()
    });
    assert_eq!(cleanups.await.unwrap(), "text");

    let (outer, inner) = (policy.clone(), policy);
    let nested = tokio::spawn(async move {
        outer.run(|| inner.run(text)).await.unwrap();
        outer.classify(ByPolicy).run(|| inner.run(text)).await.unwrap()
    });
    assert_eq!(nested.await.unwrap(), "text");
}
