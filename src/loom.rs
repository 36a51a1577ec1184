//! How the models run, and those of a pass on its way through [`Guard`], `Acquire` and [`Run`](crate::Run).
//!
//! Loom runs a model again and again, once for each order in which its threads can take their steps on the atomics and
//! the mutexes of `internal::sync`. A wake-up that is lost ends as a deadlock, which loom reports. The models of a part
//! stand beside it, in `semaphore/loom.rs` and so on.
//!
//! What is not of `internal::sync` is no step: counters of the models' own are plain atomics, and tokio's clock is read
//! but stands still unless a model moves it, so that a model takes the same turns whenever it is run.

use std::future::{Future, poll_fn};
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use futures::FutureExt;
use loom::sync::Notify;
use loom::thread;

use crate::breaker::CircuitBreaker;
use crate::call::Call;
use crate::error::{ErrorKind, Reason, Refusal};
use crate::gate::{Entry, Gate, Guard, Outcome, Pass, Ticket};
use crate::policy::Policy;
use crate::retry::{Retry, RetryBudget};
use crate::semaphore::Semaphore;

/// Runs a model in every order of its steps with at most two preemptions, or as many as `LOOM_MAX_PREEMPTIONS` says.
pub(crate) fn explore(model: impl Fn() + Send + Sync + 'static) {
    let clock = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let _paused = clock.enter();
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(2);
    builder.max_branches = 10_000;
    builder.check(model);
}

/// Moves the clock on. It never goes back, so a model has to make what it measures against.
pub(crate) fn advance(time: Duration) {
    let _ = tokio::time::advance(time).now_or_never();
}

/// Polls a future until it is ready, sleeping in between. A sleep may end by itself, once for each future.
pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    struct Bell(Notify);

    impl Wake for Bell {
        fn wake(self: Arc<Self>) {
            self.0.notify();
        }
    }

    let bell = Arc::new(Bell(Notify::new()));
    let waker = Waker::from(bell.clone());
    // Kept from being dropped by the panic that reports a deadlock: its drop would take steps where none are left.
    let mut future = ManuallyDrop::new(Box::pin(future));
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            drop(ManuallyDrop::into_inner(future));
            return output;
        }
        bell.0.wait();
    }
}

/// Enters a gate, waiting as a task does that has no timer.
pub(crate) fn enter(gate: &impl Gate, cost: u32) -> Result<Pass, Refusal> {
    let call = Call::alone(cost, true);
    match gate.enter(&call) {
        Entry::Pass(pass) => Ok(pass),
        Entry::Refused(refusal) => Err(refusal),
        Entry::Wait(ticket, _) => wait(gate, &call, ticket),
    }
}

/// Waits with a ticket until it has come to something.
pub(crate) fn wait(gate: &impl Gate, call: &Call, ticket: Ticket) -> Result<Pass, Refusal> {
    let mut kept = Some(ticket);
    block_on(poll_fn(|cx| match gate.poll_wait(kept.take().unwrap(), call, cx) {
        Entry::Pass(pass) => Poll::Ready(Ok(pass)),
        Entry::Refused(refusal) => Poll::Ready(Err(refusal)),
        Entry::Wait(ticket, _) => {
            kept = Some(ticket);
            Poll::Pending
        }
    }))
}

/// A semaphore that keeps accounts of what it gives and takes back.
struct Counting {
    semaphore: Semaphore,
    /// Passes that are out.
    passes: AtomicU32,
    /// Tickets that are out.
    tickets: AtomicU32,
}

impl Counting {
    fn new(permits: u32) -> Arc<Self> {
        let semaphore = Semaphore::permits(permits).build().unwrap();
        Arc::new(Self { semaphore, passes: AtomicU32::new(0), tickets: AtomicU32::new(0) })
    }

    fn note(&self, entry: Entry) -> Entry {
        match &entry {
            Entry::Pass(_) => self.passes.fetch_add(1, Relaxed),
            Entry::Wait(..) => self.tickets.fetch_add(1, Relaxed),
            Entry::Refused(_) => 0,
        };
        entry
    }

    fn assert_idle(&self) {
        assert_eq!((self.passes.load(Relaxed), self.tickets.load(Relaxed)), (0, 0));
        assert_eq!((self.semaphore.in_use(), self.semaphore.queued()), (0, 0));
    }
}

fn less_one(count: &AtomicU32) {
    assert!(count.fetch_sub(1, Relaxed) > 0, "given back twice");
}

impl Gate for Counting {
    fn enter(&self, call: &Call) -> Entry {
        self.note(self.semaphore.enter(call))
    }

    fn leave(&self, pass: Pass, outcome: Outcome) {
        less_one(&self.passes);
        self.semaphore.leave(pass, outcome);
    }

    fn poll_wait(&self, ticket: Ticket, call: &Call, cx: &mut Context<'_>) -> Entry {
        less_one(&self.tickets);
        self.note(self.semaphore.poll_wait(ticket, call, cx))
    }

    fn abandon(&self, ticket: Ticket) {
        less_one(&self.tickets);
        self.semaphore.abandon(ticket);
    }
}

#[test]
fn a_guard_dropped_by_another_thread_gives_its_pass_back_once() {
    explore(|| {
        let gate = Counting::new(1);
        let guard = Guard::try_acquire(gate.clone()).unwrap();
        let other = thread::spawn(move || drop(guard));
        block_on(Guard::acquire(gate.clone())).unwrap().success();
        other.join().unwrap();
        gate.assert_idle();
    });
}

#[test]
fn an_acquire_dropped_as_it_is_granted_gives_its_pass_back_once() {
    explore(|| {
        let gate = Counting::new(1);
        let guard = Guard::try_acquire(gate.clone()).unwrap();
        let fickle = {
            let gate = gate.clone();
            thread::spawn(move || drop(Guard::acquire(gate).now_or_never()))
        };
        let patient = {
            let gate = gate.clone();
            thread::spawn(move || block_on(Guard::acquire(gate)).unwrap().success())
        };
        drop(guard);
        fickle.join().unwrap();
        patient.join().unwrap();
        gate.assert_idle();
    });
}

/// Between a gate that was passed and one whose queue it stands in, a call holds a pass and a ticket.
#[test]
fn a_run_dropped_as_it_is_granted_gives_back_what_it_held_at_every_step() {
    explore(|| {
        let (outer, inner) = (Counting::new(2), Counting::new(1));
        let policy = Policy::named("model").gate(outer.clone()).gate(inner.clone()).build().unwrap();
        let guard = Guard::try_acquire(inner.clone()).unwrap();
        let fickle = {
            let policy = policy.clone();
            thread::spawn(move || drop(policy.run(|| async { Ok::<_, ()>(()) }).now_or_never()))
        };
        let patient = thread::spawn(move || block_on(policy.run(|| async { Ok::<_, ()>(()) })).unwrap());
        drop(guard);
        fickle.join().unwrap();
        patient.join().unwrap();
        outer.assert_idle();
        inner.assert_idle();
    });
}

#[test]
fn nobody_walks_from_a_queue_to_a_peer_whose_breaker_has_opened_meanwhile() {
    explore(|| {
        let breaker = CircuitBreaker::builder().build().unwrap();
        let gate = Counting::new(1);
        let policy = Policy::named("model").gate(breaker.clone()).gate(gate.clone()).build().unwrap();
        let guard = Guard::try_acquire(gate.clone()).unwrap();
        let made = AtomicU32::new(0);
        let mut run = Box::pin(policy.run(|| async { Ok::<_, ()>(made.fetch_add(1, Relaxed)) }));
        assert!(run.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        let other = thread::spawn(move || {
            breaker.force_open();
            drop(guard);
        });
        let error = block_on(run.as_mut()).unwrap_err();
        assert_eq!(error.refusal().map(Refusal::reason), Some(Reason::ForcedOpen));
        assert_eq!(made.load(Relaxed), 0);
        other.join().unwrap();
        gate.assert_idle();
    });
}

#[test]
fn a_retry_dropped_in_a_queue_is_refunded_once() {
    explore(|| {
        let gate = Counting::new(1);
        let budget = RetryBudget::share(0.0).floor(1).build().unwrap();
        let retry = Retry::immediate().max_attempts(2).budget(budget.clone());
        let policy = Policy::named("model").retry(retry).gate(gate.clone()).build().unwrap();
        let other = {
            let gate = gate.clone();
            thread::spawn(move || block_on(Guard::acquire(gate)).unwrap().success())
        };
        let end = policy.run(|| async { Err::<(), _>(()) }).now_or_never();
        assert!(end.is_none_or(|end| end.unwrap_err().kind() == ErrorKind::Failed));
        other.join().unwrap();
        assert_eq!(budget.available(), 1);
        gate.assert_idle();
    });
}
