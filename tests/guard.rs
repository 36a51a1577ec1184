//! A gate alone: what its guard says when it goes back, once, however it goes.

use std::convert::Infallible;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Context;
use std::time::Duration;

use futures::future::poll_immediate;
use resile::{
    Acquire, Call, CircuitBreaker, Entry, Gate, Guard, Moment, Needs, Outcome, Pass, Reason, Refusal, Semaphore, State,
    Ticket, TokenBucket, Verdict,
};
use tokio::time::{Instant, advance, sleep};

const fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

/// Lets everybody in with a number, and notes which pass came back how.
#[derive(Clone, Default)]
struct Notes {
    next: Arc<AtomicUsize>,
    ends: Arc<Mutex<Vec<(u64, Outcome)>>>,
}

impl Notes {
    fn ends(&self) -> Vec<(u64, Outcome)> {
        self.ends.lock().unwrap().clone()
    }

    fn last(&self) -> Outcome {
        self.ends().last().expect("one came back").1
    }
}

impl Gate for Notes {
    fn enter(&self, _: &Call) -> Entry {
        Entry::Pass(Pass::new(self.next.fetch_add(1, Ordering::SeqCst) as u64, 0))
    }

    fn leave(&self, pass: Pass, outcome: Outcome) {
        self.ends.lock().unwrap().push((pass.words()[0], outcome));
    }
}

fn enter(gate: &Notes) -> Guard {
    Guard::try_acquire(gate.clone()).unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_guard_goes_back_with_what_is_said() {
    let gate = Notes::default();
    let said = |outcome| match outcome {
        Outcome::Judged(verdict, _) => verdict,
        other => panic!("{other:?}"),
    };
    enter(&gate).success();
    assert_eq!(said(gate.last()), Verdict::Success);
    enter(&gate).failure();
    assert_eq!(said(gate.last()), Verdict::Transient(None));
    enter(&gate).ignore();
    assert_eq!(said(gate.last()), Verdict::Ignored);
    for verdict in [Verdict::Permanent, Verdict::Overloaded(Some(ms(5))), Verdict::Transient(Some(ms(1)))] {
        enter(&gate).finish(verdict);
        assert_eq!(said(gate.last()), verdict);
    }
    drop(enter(&gate));
    assert!(matches!(gate.last(), Outcome::Abandoned(_)));
}

#[tokio::test(start_paused = true)]
async fn each_guard_goes_back_once_with_its_own_pass() {
    let gate = Notes::default();
    let (one, two, three) = (enter(&gate), enter(&gate), enter(&gate));
    two.success();
    drop(three);
    one.failure();
    let passes: Vec<_> = gate.ends().into_iter().map(|(pass, _)| pass).collect();
    assert_eq!(passes, [1, 2, 0]);
}

#[tokio::test(start_paused = true)]
async fn a_guard_dropped_by_a_panic_counts_as_a_failure() {
    let gate = Notes::default();
    let caught = catch_unwind(AssertUnwindSafe(|| {
        let _guard = enter(&gate);
        resume_unwind(Box::new("boom"));
    }));
    assert!(caught.is_err());
    assert!(matches!(gate.last(), Outcome::Judged(Verdict::Transient(None), _)));
    assert_eq!(gate.ends().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_task_that_panics_with_a_guard_counts_as_a_failure() {
    let breaker = CircuitBreaker::builder().consecutive_failures(1).build().unwrap();
    let guard = breaker.acquire().await.unwrap();
    let task = tokio::spawn(async move {
        let _guard = guard;
        sleep(ms(1)).await;
        panic!("boom");
    });
    assert!(task.await.unwrap_err().is_panic());
    assert_eq!(breaker.state(), State::Open);
}

#[tokio::test(start_paused = true)]
async fn a_task_that_is_aborted_with_a_guard_counts_as_abandoned() {
    let (breaker, semaphore) =
        (CircuitBreaker::builder().consecutive_failures(1).build().unwrap(), Semaphore::permits(1).build().unwrap());
    let guards = (breaker.acquire().await.unwrap(), semaphore.acquire().await.unwrap());
    let task = tokio::spawn(async move {
        let _guards = guards;
        std::future::pending::<()>().await;
    });
    tokio::task::yield_now().await;
    task.abort();
    assert!(task.await.unwrap_err().is_cancelled());
    assert_eq!((breaker.state(), semaphore.available()), (State::Closed, 1));
}

/// It owns its handle of the gate, so it outlives the handle that it came from.
#[tokio::test(start_paused = true)]
async fn a_guard_moves_into_tasks_and_threads() {
    fn is_static(guard: Guard) -> impl Send + Sync + std::fmt::Debug + 'static {
        guard
    }
    let semaphore = Semaphore::permits(2).build().unwrap();
    let guard = {
        let handle = semaphore.clone();
        handle.try_acquire().unwrap()
    };
    assert_eq!(semaphore.available(), 1);
    tokio::spawn(async move { drop(is_static(guard)) }).await.unwrap();
    assert_eq!(semaphore.available(), 2);
    let guard = semaphore.try_acquire().unwrap();
    std::thread::spawn(move || guard.success()).join().unwrap();
    assert_eq!(semaphore.available(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_guard_tells_how_long_it_was_held() {
    let gate = Notes::default();
    let elapsed = || match gate.last() {
        Outcome::Judged(_, times) | Outcome::Abandoned(times) => times.elapsed(),
        _ => panic!("it was"),
    };
    let guard = enter(&gate);
    advance(ms(70)).await;
    guard.success();
    assert_eq!(elapsed(), ms(70));
    let guard = Guard::acquire(gate.clone()).await.unwrap();
    advance(ms(30)).await;
    drop(guard);
    assert_eq!(elapsed(), ms(30));
}

#[tokio::test(start_paused = true)]
async fn the_time_in_a_queue_is_not_part_of_that() {
    let breaker = CircuitBreaker::builder().slow_calls(ms(100), 1.0).min_calls(1).build().unwrap();
    let acquire = breaker.acquire();
    advance(ms(500)).await;
    acquire.await.unwrap().success();
    assert_eq!((breaker.state(), breaker.counts().slow), (State::Closed, 0));
}

#[tokio::test(start_paused = true)]
async fn a_guard_of_each_built_in_gate_gives_back_what_it_took() {
    let semaphore = Semaphore::permits(3).build().unwrap();
    let many = semaphore.acquire_many(2).await.unwrap();
    assert_eq!(semaphore.available(), 1);
    many.success();
    assert_eq!(semaphore.available(), 3);

    let bucket = TokenBucket::per_second(1).burst(3).build().unwrap();
    bucket.acquire_many(2).await.unwrap().success();
    drop(bucket.try_acquire().unwrap());
    assert_eq!(bucket.peek(), 0, "tokens are spent, whatever came of it");

    let breaker = CircuitBreaker::builder().build().unwrap();
    breaker.acquire().await.unwrap().success();
    breaker.acquire().await.unwrap().failure();
    assert_eq!((breaker.counts().calls, breaker.counts().failures), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn an_acquire_of_each_built_in_gate_is_refused_by_its_name() {
    let semaphore = Semaphore::permits(1).max_queue(0).named("s").build().unwrap();
    let bucket = TokenBucket::per_second(1).burst(1).max_queue(0).named("t").build().unwrap();
    let breaker = CircuitBreaker::builder().consecutive_failures(1).named("b").build().unwrap();
    let _permit = semaphore.acquire().await.unwrap();
    bucket.try_take(1).unwrap();
    breaker.acquire().await.unwrap().failure();
    let refusals = [
        (semaphore.acquire().await, semaphore.try_acquire(), "s", Reason::QueueFull, Reason::Busy),
        (bucket.acquire().await, bucket.try_acquire(), "t", Reason::QueueFull, Reason::Busy),
        (breaker.acquire().await, breaker.try_acquire(), "b", Reason::CircuitOpen, Reason::CircuitOpen),
    ];
    for (waited, tried, name, if_waited, if_tried) in refusals {
        let (waited, tried) = (waited.unwrap_err(), tried.unwrap_err());
        assert_eq!((waited.gate(), waited.reason()), (name, if_waited));
        assert_eq!((tried.gate(), tried.reason()), (name, if_tried));
    }
}

#[tokio::test(start_paused = true)]
async fn an_acquire_does_nothing_until_it_is_polled() {
    let gate = Notes::default();
    drop(Guard::acquire(gate.clone()));
    assert_eq!(gate.next.load(Ordering::SeqCst), 0);
    assert!(gate.ends().is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_acquire_that_is_over_leaves_the_pass_to_its_guard() {
    let gate = Notes::default();
    let mut acquire = Box::pin(Guard::acquire(gate.clone()));
    let guard = poll_immediate(acquire.as_mut()).await.unwrap().unwrap();
    drop(acquire);
    assert!(gate.ends().is_empty(), "the guard still holds it");
    guard.success();
    assert_eq!(gate.ends().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_guard_is_no_part_of_the_acquire_that_made_it() {
    let semaphore = Semaphore::permits(1).build().unwrap();
    let held = semaphore.acquire().await.unwrap();
    let mut acquire = Box::pin(semaphore.acquire());
    assert!(poll_immediate(acquire.as_mut()).await.is_none());
    drop(held);
    let guard = poll_immediate(acquire.as_mut()).await.unwrap().unwrap();
    drop(acquire);
    assert_eq!(semaphore.available(), 0);
    drop(guard);
    assert_eq!(semaphore.available(), 1);
}

/// A gate whose callers wait for a moment, which lets the defaults do the rest.
struct Opening(Moment);

impl Gate for Opening {
    fn enter(&self, call: &Call) -> Entry {
        if call.now() < self.0 { Entry::Wait(Ticket::default(), Some(self.0)) } else { Entry::Pass(Pass::default()) }
    }

    fn leave(&self, _: Pass, _: Outcome) {}

    fn name(&self) -> &'static str {
        "opening"
    }
}

#[tokio::test(start_paused = true)]
async fn any_gate_can_be_waited_for() {
    let start = Instant::now();
    let guard = Guard::acquire(Opening(Moment::now() + ms(70))).await.unwrap();
    assert_eq!(start.elapsed(), ms(70));
    guard.success();
}

#[tokio::test(start_paused = true)]
async fn any_gate_can_be_tried_and_says_when_it_would_open() {
    let opening = Arc::new(Opening(Moment::now() + ms(70)));
    let refusal = Guard::try_acquire(Arc::clone(&opening)).unwrap_err();
    assert_eq!((refusal.gate(), refusal.reason(), refusal.retry_after()), ("opening", Reason::Busy, Some(ms(70))));
    advance(ms(70)).await;
    assert!(Guard::try_acquire(opening).is_ok());
}

/// A gate that never answers, and counts the tickets that are out.
#[derive(Clone, Default)]
struct Deaf(Arc<AtomicUsize>);

impl Gate for Deaf {
    fn enter(&self, _: &Call) -> Entry {
        self.0.fetch_add(1, Ordering::SeqCst);
        Entry::Wait(Ticket::new(7, 9), None)
    }

    fn poll_wait(&self, ticket: Ticket, _: &Call, _: &mut Context<'_>) -> Entry {
        assert_eq!(ticket.words(), [7, 9]);
        Entry::Wait(ticket, None)
    }

    fn leave(&self, _: Pass, _: Outcome) {
        panic!("nobody was let in");
    }

    fn abandon(&self, ticket: Ticket) {
        assert_eq!(ticket.words(), [7, 9]);
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[tokio::test(start_paused = true)]
async fn a_ticket_goes_back_once_when_its_acquire_is_dropped_or_only_tried() {
    let deaf = Deaf::default();
    let mut acquire = Box::pin(Guard::acquire(deaf.clone()));
    for _ in 0..3 {
        assert!(poll_immediate(acquire.as_mut()).await.is_none());
    }
    assert_eq!(deaf.0.load(Ordering::SeqCst), 1);
    drop(acquire);
    assert_eq!(deaf.0.load(Ordering::SeqCst), 0);
    let refusal = Guard::try_acquire(deaf.clone()).unwrap_err();
    assert_eq!((refusal.reason(), refusal.retry_after()), (Reason::Busy, None));
    assert_eq!(deaf.0.load(Ordering::SeqCst), 0);
}

/// What a gate needs of the clock is all that is read for it.
#[tokio::test(start_paused = true)]
async fn a_gate_that_needs_no_time_may_be_given_any() {
    #[derive(Clone, Default)]
    struct Timeless(Notes);
    impl Gate for Timeless {
        fn enter(&self, call: &Call) -> Entry {
            self.0.enter(call)
        }
        fn leave(&self, pass: Pass, outcome: Outcome) {
            self.0.leave(pass, outcome);
        }
        fn needs(&self) -> Needs {
            Needs::Nothing
        }
    }
    let gate = Timeless::default();
    Guard::try_acquire(gate.clone()).unwrap().success();
    drop(Guard::acquire(gate.clone()).await.unwrap());
    assert_eq!(gate.0.ends().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_guard_and_an_acquire_can_be_printed() {
    let semaphore = Semaphore::permits(1).named("db").build().unwrap();
    let acquire: Acquire = semaphore.acquire();
    assert!(format!("{acquire:?}").contains("db"));
    let guard = acquire.await.unwrap();
    assert!(format!("{guard:?}").contains("db"));
}

#[tokio::test(start_paused = true)]
async fn polling_an_acquire_after_it_was_ready_panics_and_takes_nothing() {
    let semaphore = Semaphore::permits(2).build().unwrap();
    let mut acquire = pin!(semaphore.acquire());
    let _guard = poll_immediate(acquire.as_mut()).await.unwrap().unwrap();
    let again = catch_unwind(AssertUnwindSafe(|| {
        let waker = futures::task::noop_waker();
        acquire.as_mut().poll(&mut Context::from_waker(&waker)).is_ready()
    }));
    assert!(again.is_err());
    assert_eq!(semaphore.available(), 1);
}

#[tokio::test(start_paused = true)]
async fn an_acquire_is_a_future_like_any_other() {
    use resile::FutureExt;
    let semaphore = Semaphore::permits(1).build().unwrap();
    let held = semaphore.try_acquire().unwrap();
    let error = semaphore.acquire().within(ms(20)).await.unwrap_err();
    assert!(error.is_timeout());
    assert_eq!(semaphore.queued(), 0);
    drop(held);
    let guard = semaphore.acquire().within(ms(20)).await.unwrap();
    assert_eq!(semaphore.available(), 0);
    drop(guard);
    let nobody: Result<Infallible, Refusal> = Err(Refusal::new("x", Reason::Closed));
    assert!(std::future::ready(nobody).through(&semaphore).await.unwrap_err().last().is_some());
}
