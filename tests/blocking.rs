//! What `Blocking` and `Compute` promise, wherever a job ends and whenever its caller leaves.
//!
//! Jobs are held by channels, futures are polled by hand on a paused clock, and a thread that has to be waited for is
//! waited for by what it says, never by time.

mod support;

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind, panic_any};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Barrier};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::Duration;

use futures::future::join_all;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use resile::context::{self, Context as Request};
use resile::{
    Blocking, BlockingBuilder, ByPolicy, Cancel, CancelReason, CircuitBreaker, Compute, ComputeBuilder, Error,
    ErrorKind, Job, Key, Limit, Offload, Policy, Reason, Retry, State,
};
use support::hand::{Clock, catch_boom, poll_once};
use support::ms;
use support::script::boom;

/// Where a job can be run: what holds for one holds for the other.
#[derive(Clone, Debug)]
enum Place {
    Blocking(Blocking),
    Compute(Compute),
}

impl Place {
    fn run<T, C>(&self, code: C) -> Offload<T>
    where
        C: FnOnce(Job) -> T + Send + 'static,
        T: Send + 'static,
    {
        match self {
            Self::Blocking(place) => place.run(code),
            Self::Compute(place) => place.run(code),
        }
    }

    fn try_run<T, E, C>(&self, code: C) -> Offload<T, E>
    where
        C: FnOnce(Job) -> Result<T, E> + Send + 'static,
        T: Send + 'static,
        E: Send + 'static,
    {
        match self {
            Self::Blocking(place) => place.try_run(code),
            Self::Compute(place) => place.try_run(code),
        }
    }

    /// Running, queued, abandoned.
    fn counts(&self) -> (u32, u32, u32) {
        match self {
            Self::Blocking(place) => (place.running(), place.queued(), place.abandoned()),
            Self::Compute(place) => (place.running(), place.queued(), place.abandoned()),
        }
    }

    fn close(&self) {
        match self {
            Self::Blocking(place) => place.close(),
            Self::Compute(place) => place.close(),
        }
    }

    fn threads(&self) -> u32 {
        match self {
            Self::Blocking(place) => place.threads(),
            Self::Compute(place) => place.threads(),
        }
    }

    fn name(&self) -> &str {
        match self {
            Self::Blocking(place) => place.name(),
            Self::Compute(place) => place.name(),
        }
    }

    /// Every thread can be had at once, so every permit has come back.
    fn assert_all_back(&self) {
        let together = Arc::new(Barrier::new(self.threads() as usize));
        let jobs = (0..self.threads()).map(|_| {
            let together = together.clone();
            self.run(move |_| together.wait().is_leader())
        });
        for end in wait(join_all(jobs)) {
            end.unwrap();
        }
        assert_eq!(self.counts(), (0, 0, 0));
    }
}

fn places(blocking: BlockingBuilder, compute: ComputeBuilder) -> [Place; 2] {
    [Place::Blocking(blocking.build().unwrap()), Place::Compute(compute.build().unwrap())]
}

/// Both, with so many threads and places in the queue.
fn both(threads: u32, max_queue: u32) -> [Place; 2] {
    places(
        Blocking::builder().threads(threads).max_queue(max_queue),
        Compute::builder().threads(threads).max_queue(max_queue),
    )
}

/// Wakes a thread that sleeps.
struct Bell {
    thread: Thread,
    rung: AtomicBool,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.rung.store(true, Ordering::Release);
        self.thread.unpark();
    }
}

impl Bell {
    fn here() -> Arc<Self> {
        Arc::new(Self { thread: thread::current(), rung: AtomicBool::new(false) })
    }

    fn poll<F: Future + ?Sized>(self: &Arc<Self>, future: Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(&Waker::from(self.clone())))
    }

    /// Sleeps until it is rung.
    fn rest(&self) {
        while !self.rung.swap(false, Ordering::Acquire) {
            thread::park();
        }
    }
}

/// Waits for a future without a runtime, whose clock therefore stands.
fn wait<F: Future>(future: F) -> F::Output {
    let (mut future, bell) = (pin!(future), Bell::here());
    loop {
        if let Poll::Ready(output) = bell.poll(future.as_mut()) {
            return output;
        }
        bell.rest();
    }
}

/// A job that has begun and ends when it is told: with whether its caller had left by then.
struct Held {
    future: Pin<Box<Offload<bool>>>,
    begun: Receiver<()>,
    end: Sender<()>,
    /// Says whether the caller had left, once the job has ended.
    ended: Receiver<bool>,
}

impl Held {
    /// On its way, polled once.
    fn new(place: &Place) -> Self {
        Self::with(place, |job| job)
    }

    fn with(place: &Place, more: impl FnOnce(Offload<bool>) -> Offload<bool>) -> Self {
        let ((start, begun), (end, told), (say, ended)) = (channel(), channel::<()>(), channel());
        let future = place.run(move |job| {
            start.send(()).unwrap();
            // A test that fails drops its end, which ends the job too.
            told.recv().ok();
            let left = job.is_cancelled();
            say.send(left).ok();
            left
        });
        let mut future = Box::pin(more(future));
        assert!(poll_once(future.as_mut()).is_pending());
        Self { future, begun, end, ended }
    }

    fn running(self) -> Self {
        self.begun.recv().unwrap();
        self
    }

    fn finish(self) -> bool {
        self.end.send(()).unwrap();
        wait(self.future).unwrap()
    }
}

/// Something captured by a closure: says when it is dropped, and whether the closure had run.
struct Captured {
    ran: bool,
    gone: Sender<bool>,
}

impl Captured {
    fn new() -> (Self, Receiver<bool>) {
        let (gone, seen) = channel();
        (Self { ran: false, gone }, seen)
    }

    fn run(mut self) {
        self.ran = true;
    }
}

impl Drop for Captured {
    fn drop(&mut self) {
        self.gone.send(self.ran).ok();
    }
}

/// Panics when it is dropped.
struct Spiteful;

impl Drop for Spiteful {
    fn drop(&mut self) {
        boom();
    }
}

/// Tells when it is dropped how many jobs run.
struct Counts {
    place: Place,
    running: Sender<u32>,
}

impl Drop for Counts {
    fn drop(&mut self) {
        self.running.send(self.place.counts().0).ok();
    }
}

/// Panics when it is woken.
struct Grumpy;

impl Wake for Grumpy {
    fn wake(self: Arc<Self>) {
        boom();
    }
}

fn refused<T: std::fmt::Debug, E: std::fmt::Debug>(result: Result<T, Error<E>>, name: &str, reason: Reason) {
    let error = result.unwrap_err();
    let refusal = error.refusal().expect("it should have been refused");
    assert_eq!((refusal.gate(), refusal.reason(), error.attempts()), (name, reason, 0));
}

fn timed_out<T: std::fmt::Debug, E: std::fmt::Debug>(result: Result<T, Error<E>>, attempts: u32) {
    let error = result.unwrap_err();
    assert_eq!((error.kind(), error.limit(), error.attempts()), (ErrorKind::TimedOut, Some(Limit::Caller), attempts));
}

fn ready<F: Future>(future: Pin<&mut F>) -> F::Output {
    match poll_once(future) {
        Poll::Ready(output) => output,
        Poll::Pending => panic!("it should be ready"),
    }
}

// ---------------------------------------------------------------------------------------------------------------
// How a job ends

#[test]
fn a_job_returns_its_value_and_its_permit() {
    let clock = Clock::paused();
    let _inside = clock.enter();
    for place in both(2, 4) {
        assert_eq!(wait(place.run(|_| 42)).unwrap(), 42);
        assert_eq!(place.counts(), (0, 0, 0));
        place.assert_all_back();
    }
}

#[test]
fn an_error_of_the_closure_is_kept() {
    let clock = Clock::paused();
    let _inside = clock.enter();
    for place in both(1, 4) {
        let error = wait(place.try_run(|_| "many".parse::<u32>())).unwrap_err();
        assert_eq!((error.kind(), error.attempts()), (ErrorKind::Failed, 1));
        assert_eq!(error.to_string(), "failed in attempt 1");
        assert!(std::error::Error::source(&error).unwrap().is::<std::num::ParseIntError>());
        place.assert_all_back();
    }
}

#[test]
fn a_panic_is_an_error_with_its_message_and_takes_no_thread_along() {
    let clock = Clock::paused();
    let _inside = clock.enter();
    for place in both(1, 4) {
        let error = wait(place.run(|_| -> u32 { panic!("no such table") })).unwrap_err();
        assert_eq!((error.kind(), error.panic_message()), (ErrorKind::Panicked, Some("no such table")));
        assert_eq!(error.to_string(), "panicked in attempt 1: no such table");
        let number = 7;
        let error = wait(place.run(move |_| -> u32 { panic!("number {number}") })).unwrap_err();
        assert_eq!(error.panic_message(), Some("number 7"));
        let error = wait(place.run(|_| -> u32 { panic_any(7_u32) })).unwrap_err();
        assert_eq!(error.panic_message(), Some("its payload is no text"));
        let error = wait(place.run(|_| -> u32 { panic_any(Spiteful) })).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Panicked, "its payload panics when dropped");
        place.assert_all_back();
    }
}

#[test]
fn a_panic_in_the_drop_of_what_was_captured_is_a_panic_of_the_job() {
    let clock = Clock::paused();
    let _inside = clock.enter();
    for place in both(1, 4) {
        let captured = Spiteful;
        let error = wait(place.run(move |_| drop(captured))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Panicked);
        place.assert_all_back();
    }
}

/// Otherwise a caller without a queue that runs one job after the other would be refused now and then.
#[test]
fn the_permit_is_back_before_the_caller_has_its_answer() {
    let clock = Clock::paused();
    let _inside = clock.enter();
    for place in both(1, 0) {
        for turn in 0..200 {
            assert_eq!(wait(place.run(move |_| turn)).unwrap(), turn);
            assert_eq!(place.counts(), (0, 0, 0));
        }
    }
}

#[test]
fn as_many_jobs_run_as_there_are_threads_and_the_others_wait_in_order() {
    let clock = Clock::paused();
    let _inside = clock.enter();
    for place in both(2, 8) {
        let (first, second) = (Held::new(&place).running(), Held::new(&place).running());
        let (order, seen) = channel();
        let waiting: Vec<_> = (0..4)
            .map(|number| {
                let order = order.clone();
                let mut job = Box::pin(place.run(move |_| order.send(number).unwrap()));
                assert!(poll_once(job.as_mut()).is_pending());
                job
            })
            .collect();
        assert_eq!(place.counts(), (2, 4, 0));
        assert!(!first.finish());
        for job in waiting {
            wait(job).unwrap();
        }
        assert_eq!(place.counts(), (1, 0, 0));
        assert_eq!(seen.try_iter().collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert!(!second.finish());
        place.assert_all_back();
    }
}

#[test]
fn what_is_too_much_is_refused_at_once() {
    let clock = Clock::paused();
    let _inside = clock.enter();
    for place in both(1, 1) {
        let held = Held::new(&place).running();
        let mut waiting = Box::pin(place.run(|_| ()));
        assert!(poll_once(waiting.as_mut()).is_pending());

        let (captured, gone) = Captured::new();
        let mut refusal = Box::pin(place.run(move |_| captured.run()));
        refused(ready(refusal.as_mut()), place.name(), Reason::QueueFull);
        assert_eq!(gone.try_recv(), Ok(false), "the closure is gone with the answer");
        assert_eq!(place.counts(), (1, 1, 0));
        held.finish();
        wait(waiting).unwrap();
        place.assert_all_back();
    }
}

#[test]
fn the_longest_wait_in_the_queue_is_bounded() {
    let clock = Clock::paused();
    let _inside = clock.enter();
    for place in places(Blocking::builder().threads(1).max_wait(ms(50)), Compute::builder().threads(1).max_wait(ms(50)))
    {
        let held = Held::new(&place).running();
        let (captured, gone) = Captured::new();
        let mut waiting = Box::pin(place.run(move |_| captured.run()));
        assert!(poll_once(waiting.as_mut()).is_pending());
        clock.advance(ms(49));
        assert!(poll_once(waiting.as_mut()).is_pending());
        clock.advance(ms(2));
        refused(ready(waiting.as_mut()), place.name(), Reason::QueueTimeout);
        assert_eq!(gone.try_recv(), Ok(false));
        assert_eq!(place.counts(), (1, 0, 0));
        held.finish();
        place.assert_all_back();
    }
}

#[test]
fn a_job_that_has_begun_knows_no_longest_wait() {
    let clock = Clock::paused();
    let _inside = clock.enter();
    for place in places(Blocking::builder().threads(1).max_wait(ms(50)), Compute::builder().threads(1).max_wait(ms(50)))
    {
        let mut held = Held::new(&place).running();
        clock.advance(ms(500));
        assert!(poll_once(held.future.as_mut()).is_pending());
        assert!(!held.finish());
        place.assert_all_back();
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Deadlines

#[test]
fn a_deadline_that_has_passed_lets_nothing_begin() {
    let clock = Clock::paused();
    let _inside = clock.enter();
    let now = tokio::time::Instant::now();
    for place in both(1, 4) {
        for deadline in [now, now - ms(5)] {
            let (captured, gone) = Captured::new();
            let mut job = Box::pin(place.run(move |_| captured.run()).deadline(deadline));
            timed_out(ready(job.as_mut()), 0);
            assert_eq!(gone.try_recv(), Ok(false));
        }
        timed_out(ready(pin!(place.run(|_| ()).deadline(Duration::ZERO))), 0);
        place.assert_all_back();
    }
}

#[test]
fn a_deadline_in_the_queue_is_told_when_it_passes_and_the_job_never_runs() {
    let clock = Clock::paused();
    let _inside = clock.enter();
    for place in both(1, 4) {
        let held = Held::new(&place).running();
        let (captured, gone) = Captured::new();
        let mut waiting = Box::pin(place.run(move |_| captured.run()).deadline(ms(50)));
        assert!(poll_once(waiting.as_mut()).is_pending());
        clock.advance(ms(49));
        assert!(poll_once(waiting.as_mut()).is_pending());
        clock.advance(ms(2));
        timed_out(ready(waiting.as_mut()), 0);
        assert_eq!(gone.try_recv(), Ok(false));
        assert_eq!(place.counts(), (1, 0, 0), "its place is free although the future is still there");
        held.finish();
        place.assert_all_back();
    }
}

#[test]
fn a_deadline_that_passes_while_the_job_runs_is_told_and_the_permit_stays() {
    let clock = Clock::paused();
    let _inside = clock.enter();
    for place in both(1, 4) {
        let mut held = Held::with(&place, |job| job.deadline(ms(50))).running();
        clock.advance(ms(51));
        timed_out(ready(held.future.as_mut()), 1);
        assert_eq!(place.counts(), (1, 0, 1));
        held.end.send(()).unwrap();
        assert!(held.ended.recv().unwrap(), "the job was told");
        place.assert_all_back();
    }
}

#[test]
fn an_answer_that_is_there_wins_over_a_deadline_in_the_same_poll() {
    let clock = Clock::paused();
    let _inside = clock.enter();
    for place in both(1, 4) {
        let mut held = Held::with(&place, |job| job.deadline(ms(50))).running();
        let bell = Bell::here();
        assert!(bell.poll(held.future.as_mut()).is_pending());
        held.end.send(()).unwrap();
        bell.rest();
        clock.advance(ms(100));
        assert!(!ready(held.future.as_mut()).unwrap());
        place.assert_all_back();
    }
}

#[test]
fn a_job_knows_its_deadline_and_reads_the_clock_of_its_caller() {
    let clock = Clock::paused();
    let _inside = clock.enter();
    clock.advance(Duration::from_secs(3600));
    let at = tokio::time::Instant::now() + ms(70);
    for place in both(1, 4) {
        assert_eq!(wait(place.run(|job| job.remaining()).deadline(ms(70))).unwrap(), ms(70));
        assert_eq!(wait(place.run(|job| job.deadline()).deadline(at)).unwrap(), Some(at));
        assert_eq!(wait(place.run(|job| (job.deadline(), job.remaining()))).unwrap(), (None, Duration::MAX));
        assert_eq!(wait(place.run(|job| job.deadline()).deadline(None)).unwrap(), None);
        assert_eq!(wait(place.run(|job| job.deadline()).deadline(Duration::MAX)).unwrap(), None);
    }
}

/// The caller is not polled in time: the thread itself finds that it is too late.
#[test]
fn a_thread_runs_no_job_whose_time_is_over() {
    let clock = Clock::paused();
    let _inside = clock.enter();
    for (max_wait, deadline) in [(ms(1000), ms(50)), (ms(50), ms(1000))] {
        let place = Place::Compute(Compute::builder().threads(1).max_wait(max_wait).build().unwrap());
        let held = Held::new(&place).running();
        let (captured, gone) = Captured::new();
        let mut late = Box::pin(place.run(move |_| captured.run()).deadline(deadline));
        assert!(poll_once(late.as_mut()).is_pending());
        clock.advance(ms(60));
        held.finish();
        assert_eq!(gone.recv(), Ok(false));
        let end = wait(late);
        if deadline < max_wait {
            timed_out(end, 0);
        } else {
            refused(end, place.name(), Reason::QueueTimeout);
        }
        place.assert_all_back();
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Callers that leave

#[test]
fn dropped_before_its_first_poll_a_job_has_taken_nothing() {
    let clock = Clock::paused();
    let _inside = clock.enter();
    for place in both(1, 4) {
        let (captured, gone) = Captured::new();
        drop(place.run(move |_| captured.run()).deadline(ms(5)));
        assert_eq!(gone.try_recv(), Ok(false));
        assert_eq!(place.counts(), (0, 0, 0));
        place.assert_all_back();
    }
}

#[test]
fn dropped_in_the_queue_a_job_leaves_its_place_and_never_runs() {
    let clock = Clock::paused();
    let _inside = clock.enter();
    for place in both(1, 1) {
        let held = Held::new(&place).running();
        let (captured, gone) = Captured::new();
        let mut leaves = Box::pin(place.run(move |_| captured.run()));
        assert!(poll_once(leaves.as_mut()).is_pending());
        assert_eq!(place.counts(), (1, 1, 0));
        drop(leaves);
        assert_eq!(gone.try_recv(), Ok(false), "dropped where the caller is");
        assert_eq!(place.counts(), (1, 0, 0));

        let mut next = Box::pin(place.run(|_| 7));
        assert!(poll_once(next.as_mut()).is_pending(), "the one place in the queue is free again");
        held.finish();
        assert_eq!(wait(next).unwrap(), 7);
        place.assert_all_back();
    }
}

#[test]
fn dropped_with_a_permit_that_it_has_not_noticed_a_job_passes_it_on() {
    let clock = Clock::paused();
    let _inside = clock.enter();
    let place = Place::Blocking(Blocking::builder().threads(1).build().unwrap());
    let held = Held::new(&place).running();
    let (captured, gone) = Captured::new();
    let mut leaves = Box::pin(place.run(move |_| captured.run()));
    let mut next = Box::pin(place.run(|_| 7));
    assert!(poll_once(leaves.as_mut()).is_pending());
    assert!(poll_once(next.as_mut()).is_pending());
    held.finish();
    assert_eq!(place.counts(), (1, 1, 0), "granted to the first in line");
    drop(leaves);
    assert_eq!(gone.try_recv(), Ok(false));
    assert_eq!(wait(next).unwrap(), 7);
    place.assert_all_back();
}

#[test]
fn dropped_while_it_runs_a_job_is_told_and_keeps_its_permit_to_the_end() {
    let clock = Clock::paused();
    let _inside = clock.enter();
    for place in both(1, 0) {
        let held = Held::new(&place).running();
        drop(held.future);
        assert_eq!(place.counts(), (1, 0, 1));
        refused(ready(pin!(place.run(|_| ()))), place.name(), Reason::QueueFull);
        held.end.send(()).unwrap();
        assert!(held.ended.recv().unwrap());
    }
}

#[test]
fn what_a_job_that_was_left_has_returned_is_dropped_with_the_permit_held() {
    let clock = Clock::paused();
    let _inside = clock.enter();
    for place in both(1, 4) {
        let ((start, begun), (end, told), (running, counted)) = (channel(), channel::<()>(), channel());
        let counts = Counts { place: place.clone(), running };
        let mut job = Box::pin(place.run(move |_| {
            start.send(()).unwrap();
            told.recv().ok();
            (counts, Spiteful)
        }));
        assert!(poll_once(job.as_mut()).is_pending());
        begun.recv().unwrap();
        drop(job);
        end.send(()).unwrap();
        assert_eq!(counted.recv(), Ok(1), "dropped with the result, whose other half panics");
        place.assert_all_back();
    }
}

#[test]
fn dropped_when_it_is_answered_a_job_drops_its_result_where_the_caller_is() {
    let clock = Clock::paused();
    let _inside = clock.enter();
    for place in both(1, 4) {
        let (end, told) = channel::<()>();
        let (captured, gone) = Captured::new();
        let mut job = Box::pin(place.run(move |_| {
            told.recv().ok();
            (captured, Spiteful)
        }));
        let bell = Bell::here();
        assert!(bell.poll(job.as_mut()).is_pending());
        end.send(()).unwrap();
        bell.rest();
        assert_eq!(place.counts(), (0, 0, 0));
        assert!(gone.try_recv().is_err());
        assert!(catch_boom(|| drop(job)).is_none(), "the drop of a result is the caller's own");
        assert_eq!(gone.try_recv(), Ok(false));
        place.assert_all_back();
    }
}

#[test]
fn a_panic_in_the_drop_of_a_closure_that_never_ran_ends_no_thread() {
    let clock = Clock::paused();
    let _inside = clock.enter();
    let place = Place::Compute(Compute::builder().threads(1).build().unwrap());
    let held = Held::new(&place).running();
    let (captured, gone) = Captured::new();
    let captured = (captured, Spiteful);
    let mut late = Box::pin(place.run(move |_| drop(captured)).deadline(ms(5)));
    assert!(poll_once(late.as_mut()).is_pending());
    clock.advance(ms(50));
    held.finish();
    assert_eq!(gone.recv(), Ok(false), "dropped by the thread");
    timed_out(wait(late), 0);
    place.assert_all_back();
}

#[test]
fn a_waker_that_panics_ends_no_thread() {
    let clock = Clock::paused();
    let _inside = clock.enter();
    for place in both(1, 4) {
        let (end, told) = channel::<()>();
        let mut job = Box::pin(place.run(move |_| told.recv().is_ok()));
        let waker = Waker::from(Arc::new(Grumpy));
        assert!(job.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        end.send(()).unwrap();
        place.assert_all_back();
        assert!(wait(job).unwrap());
    }
}

/// One thread in all of tokio's pool, so that what has a permit waits for it.
fn one_thread() -> tokio::runtime::Runtime {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_time().start_paused(true).max_blocking_threads(1).build().unwrap()
}

#[test]
fn a_job_whose_caller_leaves_while_tokio_has_no_thread_for_it_never_runs() {
    let runtime = one_thread();
    let _inside = runtime.enter();
    let place = Place::Blocking(Blocking::builder().threads(2).build().unwrap());
    let held = Held::new(&place).running();
    let (captured, gone) = Captured::new();
    let mut left = Box::pin(place.run(move |_| captured.run()));
    assert!(poll_once(left.as_mut()).is_pending());
    assert_eq!(place.counts(), (2, 0, 0));
    drop(left);
    assert_eq!(place.counts(), (2, 0, 0), "the permit is in the closure, which is in tokio's queue");
    held.finish();
    assert_eq!(gone.recv(), Ok(false));
    assert_eq!(wait(place.run(|_| 7)).unwrap(), 7);
    assert_eq!(place.counts(), (0, 0, 0));
}

#[test]
fn a_job_whose_deadline_passes_while_tokio_has_no_thread_for_it_never_runs() {
    let runtime = one_thread();
    let _inside = runtime.enter();
    let place = Place::Blocking(Blocking::builder().threads(2).build().unwrap());
    let held = Held::new(&place).running();
    let (captured, gone) = Captured::new();
    let mut late = Box::pin(place.run(move |_| captured.run()).deadline(ms(50)));
    assert!(poll_once(late.as_mut()).is_pending());
    runtime.block_on(tokio::time::advance(ms(60)));
    held.finish();
    assert_eq!(gone.recv(), Ok(false), "the thread itself found that it is too late");
    timed_out(wait(late), 0);
    assert_eq!(wait(place.run(|_| 7)).unwrap(), 7);
    assert_eq!(place.counts(), (0, 0, 0));
}

#[test]
fn whatever_a_caller_does_every_permit_comes_back() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap();
    let _inside = runtime.enter();
    for place in both(3, 64) {
        let mut random = StdRng::seed_from_u64(7);
        let ran = Arc::new(AtomicU32::new(0));
        for _ in 0..20 {
            let tasks: Vec<_> = (0..40)
                .map(|_| {
                    let (polls, end, yields) =
                        (random.random_range(0..4), random.random_range(0..8), random.random_range(0..4));
                    let (place, ran) = (place.clone(), ran.clone());
                    tokio::spawn(async move {
                        let mut job = Box::pin(place.try_run(move |job| {
                            ran.fetch_add(1, Ordering::Relaxed);
                            for _ in 0..yields {
                                thread::yield_now();
                            }
                            match end {
                                0 => panic!("as told"),
                                1 => Err("as told"),
                                _ => Ok(job.is_cancelled()),
                            }
                        }));
                        if polls == 3 {
                            drop(job.await);
                            return;
                        }
                        for _ in 0..polls {
                            if poll_fn(|cx| Poll::Ready(job.as_mut().poll(cx))).await.is_ready() {
                                return;
                            }
                            tokio::task::yield_now().await;
                        }
                    })
                })
                .collect();
            for task in tasks {
                wait(task).unwrap();
            }
        }
        assert!(ran.load(Ordering::Relaxed) > 0);
        place.assert_all_back();
    }
}

// ---------------------------------------------------------------------------------------------------------------
// The pool's threads

#[test]
fn a_thread_takes_the_next_job_without_its_caller_being_polled() {
    let clock = Clock::paused();
    let _inside = clock.enter();
    let place = Place::Compute(Compute::builder().threads(1).build().unwrap());
    let first = Held::new(&place).running();
    let second = Held::new(&place);
    first.end.send(()).unwrap();
    let second = second.running();
    drop(first);
    second.finish();
    place.assert_all_back();
}

thread_local! {
    /// Says that a thread has ended.
    static LAST_WORDS: RefCell<Option<Captured>> = const { RefCell::new(None) };
}

/// Has every thread of a pool say when it ends.
fn last_words(compute: &Compute) -> Receiver<bool> {
    let (gone, seen) = channel();
    let together = Arc::new(Barrier::new(compute.threads() as usize));
    let jobs = (0..compute.threads()).map(|_| {
        let (together, gone) = (together.clone(), gone.clone());
        compute.run(move |_| {
            together.wait();
            LAST_WORDS.with_borrow_mut(|words| *words = Some(Captured { ran: true, gone }));
        })
    });
    for end in wait(join_all(jobs)) {
        end.unwrap();
    }
    seen
}

#[test]
fn the_threads_end_with_the_last_handle() {
    let compute = Compute::builder().threads(3).build().unwrap();
    let ended = last_words(&compute);
    let other = compute.clone();
    drop(compute);
    assert_eq!(wait(other.run(|_| 7)).unwrap(), 7);
    assert!(ended.try_recv().is_err());
    drop(other);
    assert_eq!(ended.iter().count(), 3, "the channel is closed by the last of them");
}

#[test]
fn a_thread_whose_job_runs_on_for_nobody_ends_after_it() {
    let compute = Compute::builder().threads(2).build().unwrap();
    let ended = last_words(&compute);
    let place = Place::Compute(compute);
    let held = Held::new(&place).running();
    drop((held.future, place));
    assert_eq!(ended.recv(), Ok(true), "the idle one does not wait");
    assert!(ended.try_recv().is_err());
    held.end.send(()).unwrap();
    assert!(held.ended.recv().unwrap());
    assert_eq!(ended.iter().count(), 1);
}

#[test]
fn a_caller_that_waits_keeps_the_threads() {
    let compute = Compute::builder().threads(1).build().unwrap();
    let ended = last_words(&compute);
    let place = Place::Compute(compute);
    let held = Held::new(&place).running();
    let mut next = Box::pin(place.run(|_| 7));
    assert!(poll_once(next.as_mut()).is_pending());
    drop(place);
    held.finish();
    assert_eq!(wait(next).unwrap(), 7);
    assert_eq!(ended.iter().count(), 1);
}

#[test]
fn the_last_handle_may_be_dropped_in_a_job() {
    let compute = Compute::builder().threads(1).build().unwrap();
    let ended = last_words(&compute);
    let inner = compute.clone();
    let mut job = Box::pin(compute.run(move |job| {
        while !job.is_cancelled() {
            thread::yield_now();
        }
        drop(inner);
    }));
    assert!(poll_once(job.as_mut()).is_pending());
    // It must have begun, or else it would be withdrawn with its handle.
    while compute.running() == 0 {
        thread::yield_now();
    }
    drop((job, compute));
    assert_eq!(ended.iter().count(), 1);
}

#[test]
fn a_pool_needs_no_runtime_unless_there_is_a_limit_of_time() {
    let compute = Compute::builder().threads(1).build().unwrap();
    assert_eq!(wait(compute.run(|_| 7)).unwrap(), 7);
    assert!(wait(compute.run(|_| tokio::runtime::Handle::try_current().is_err())).unwrap());
}

#[test]
fn a_job_runs_in_the_context_of_its_callers_runtime() {
    let clock = Clock::paused();
    let _inside = clock.enter();
    for place in both(1, 4) {
        assert!(wait(place.run(|_| tokio::runtime::Handle::try_current().is_ok())).unwrap());
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Closing and shutting down

#[test]
fn closed_it_refuses_who_waits_or_comes_and_lets_finish_what_runs() {
    let clock = Clock::paused();
    let _inside = clock.enter();
    for place in both(1, 4) {
        let held = Held::new(&place).running();
        let (captured, gone) = Captured::new();
        let mut waiting = Box::pin(place.run(move |_| captured.run()));
        assert!(poll_once(waiting.as_mut()).is_pending());
        place.close();
        refused(ready(waiting.as_mut()), place.name(), Reason::Closed);
        assert_eq!(gone.try_recv(), Ok(false));
        refused(ready(pin!(place.run(|_| ()))), place.name(), Reason::Closed);
        place.close();
        assert!(!held.finish());
        assert_eq!(place.counts(), (0, 0, 0));
    }
}

#[test]
fn a_runtime_that_goes_away_answers_callers_elsewhere() {
    let runtime = one_thread();
    let handle = runtime.handle().clone();
    let _inside = handle.enter();
    let place = Place::Blocking(Blocking::builder().threads(2).build().unwrap());
    let held = Held::new(&place).running();
    runtime.shutdown_background();

    let (captured, gone) = Captured::new();
    let mut late = Box::pin(place.run(move |_| captured.run()));
    refused(ready(late.as_mut()), place.name(), Reason::Closed);
    assert_eq!(gone.try_recv(), Ok(false));
    assert!(!held.finish(), "what runs is left alone, and its caller is answered");
    assert_eq!(place.counts(), (0, 0, 0));
}

#[test]
fn a_runtime_that_is_dropped_tells_its_jobs_and_waits_for_them() {
    let runtime = one_thread();
    let place = Place::Blocking(Blocking::builder().threads(1).build().unwrap());
    let ((start, begun), (say, said)) = (channel(), channel());
    let job = place.run(move |job| {
        start.send(()).unwrap();
        while !job.is_cancelled() {
            thread::yield_now();
        }
        say.send(()).unwrap();
    });
    runtime.spawn(job);
    runtime.block_on(tokio::task::yield_now());
    begun.recv().unwrap();
    drop(runtime);
    assert_eq!(said.try_recv(), Ok(()), "the drop has waited");
    assert_eq!(place.counts(), (0, 0, 0));
}

#[test]
fn polled_outside_of_a_runtime_it_panics_and_holds_nothing() {
    let place = Place::Blocking(Blocking::builder().threads(1).build().unwrap());
    let mut job = Box::pin(place.run(|_| ()));
    assert!(catch_unwind(AssertUnwindSafe(|| poll_once(job.as_mut()).is_ready())).is_err());
    assert_eq!(place.counts(), (0, 0, 0));
    drop(job);
    let clock = Clock::paused();
    let _inside = clock.enter();
    place.assert_all_back();
}

// ---------------------------------------------------------------------------------------------------------------
// In a context

#[test]
fn a_job_takes_the_context_of_its_caller_along() {
    let clock = Clock::paused();
    let _inside = clock.enter();
    for place in both(1, 4) {
        let request = Request::new().key("tenant", 7_u32).deadline(ms(70));
        let job = place.run(|job| (context::current().unwrap().get_key("tenant").cloned(), job.remaining()));
        assert_eq!(wait(context::scope(request.clone(), job)).unwrap(), (Some(Key::Number(7)), ms(70)));
        let job = place.run(|job| job.remaining()).deadline(ms(50));
        assert_eq!(wait(context::scope(request.clone(), job)).unwrap(), ms(50), "the earlier one");
        let job = context::detach(place.run(|job| (context::current().is_none(), job.remaining())));
        assert_eq!(wait(context::scope(request, job)).unwrap(), (true, Duration::MAX));
        assert!(wait(place.run(|_| context::current().is_none())).unwrap(), "it does not stay with the thread");
        let error = wait(context::scope(Request::new(), place.run(|_| -> u32 { panic!("as told") })));
        assert!(error.is_err() && wait(place.run(|_| context::current().is_none())).unwrap());
        place.assert_all_back();
    }
}

#[test]
fn the_deadline_of_the_context_is_named() {
    let clock = Clock::paused();
    let _inside = clock.enter();
    for place in both(1, 4) {
        let held = Held::new(&place).running();
        let request = Request::new().deadline(ms(50));
        let mut queued = Box::pin(context::scope(request, place.run(|_| ()).deadline(ms(70))));
        assert!(poll_once(queued.as_mut()).is_pending());
        clock.advance(ms(51));
        let error = ready(queued.as_mut()).unwrap_err();
        assert_eq!((error.limit(), error.attempts()), (Some(Limit::Context), 0));
        held.finish();
        place.assert_all_back();
    }
}

#[test]
fn a_cancelled_context_ends_a_job_with_its_reason_wherever_it_is() {
    let clock = Clock::paused();
    let _inside = clock.enter();
    for place in both(1, 4) {
        let client = Cancel::new();
        let request = Request::new().cancel(&client);
        let ((start, begun), (end, told)) = (channel(), channel::<()>());
        let job = place.run(move |_| {
            start.send(()).unwrap();
            told.recv().ok();
        });
        let mut running = Box::pin(context::scope(request.clone(), job));
        let (captured, gone) = Captured::new();
        let mut queued = Box::pin(context::scope(request.clone(), place.run(move |_| captured.run())));
        let bell = Bell::here();
        assert!(bell.poll(running.as_mut()).is_pending());
        begun.recv().unwrap();
        assert!(bell.poll(queued.as_mut()).is_pending());

        client.cancel_with(CancelReason::ClientGone);
        bell.rest();
        for (error, attempts) in [(ready(running.as_mut()), 1), (ready(queued.as_mut()), 0)] {
            let error = error.unwrap_err();
            assert_eq!((error.cancel_reason(), error.attempts()), (Some(&CancelReason::ClientGone), attempts));
        }
        assert_eq!(gone.try_recv(), Ok(false));
        assert_eq!(place.counts(), (1, 0, 1));

        let (captured, gone) = Captured::new();
        let mut late = Box::pin(context::scope(request, place.run(move |_| captured.run())));
        assert!(ready(late.as_mut()).unwrap_err().is_cancelled());
        assert_eq!(gone.try_recv(), Ok(false));
        end.send(()).unwrap();
        place.assert_all_back();
    }
}

#[test]
fn what_was_granted_in_time_does_not_begin_once_its_caller_is_cancelled_or_late() {
    let clock = Clock::paused();
    let _inside = clock.enter();
    let place = Place::Blocking(Blocking::builder().threads(1).build().unwrap());
    for late in [false, true] {
        let client = Cancel::new();
        let request = Request::new().cancel(&client).deadline(ms(50));
        let held = Held::new(&place).running();
        let (captured, gone) = Captured::new();
        let mut granted = Box::pin(context::scope(request, place.run(move |_| captured.run())));
        assert!(poll_once(granted.as_mut()).is_pending());
        held.finish();
        assert_eq!(place.counts(), (1, 0, 0), "granted");
        if late {
            clock.advance(ms(51));
        } else {
            client.cancel();
        }
        let error = ready(granted.as_mut()).unwrap_err();
        assert_eq!((error.is_cancelled(), error.is_timeout(), error.attempts()), (!late, late, 0));
        assert_eq!(gone.try_recv(), Ok(false));
        assert_eq!(place.counts(), (0, 0, 0));
    }
    place.assert_all_back();
}

// ---------------------------------------------------------------------------------------------------------------
// In a policy

#[tokio::test(start_paused = true)]
async fn a_queue_that_is_full_says_nothing_about_the_peer() {
    let blocking = Blocking::builder().threads(1).max_queue(0).build().unwrap();
    let breaker = CircuitBreaker::builder().consecutive_failures(1).build().unwrap();
    let policy = Policy::named("reports").retry(Retry::immediate()).gate(breaker.clone()).build().unwrap();
    let held = Held::new(&Place::Blocking(blocking.clone())).running();

    let end = policy.classify(ByPolicy).run(|| blocking.try_run(|_| Ok::<_, std::io::Error>(7))).await;
    let error = end.map_err(Error::flatten).unwrap_err();
    assert_eq!((error.attempts(), error.refusal().unwrap().reason()), (0, Reason::QueueFull), "it never began");
    assert_eq!(breaker.state(), State::Closed);
    held.finish();
}

#[tokio::test(start_paused = true)]
async fn an_error_of_the_closure_is_retried_as_any_other() {
    let blocking = Blocking::builder().threads(1).build().unwrap();
    let policy = Policy::named("reports").retry(Retry::immediate().max_attempts(3)).build().unwrap();
    let tried = Arc::new(AtomicU32::new(0));
    let end = policy
        .classify(ByPolicy)
        .run(|| {
            let tried = tried.clone();
            blocking.try_run(move |_| match tried.fetch_add(1, Ordering::Relaxed) {
                2 => Ok(7),
                number => Err(number),
            })
        })
        .await;
    assert_eq!(end.map_err(Error::flatten).unwrap(), 7);
    assert_eq!(tried.load(Ordering::Relaxed), 3);
}

#[tokio::test(start_paused = true)]
async fn two_errors_are_made_one_by_what_has_ended_the_call() {
    let blocking = Blocking::builder().threads(1).build().unwrap();
    let policy = Policy::named("reports").timeout(ms(50)).build().unwrap();

    let error = policy.run(|| blocking.try_run(|_| Err::<(), _>("no"))).await.map_err(Error::flatten).unwrap_err();
    assert_eq!((error.kind(), error.into_inner()), (ErrorKind::Failed, Some("no")));
    let error = policy.run(|| blocking.run(|_| panic!("a bug"))).await.map_err(Error::<Error<_>>::flatten);
    assert_eq!(error.unwrap_err().panic_message(), Some("a bug"));
}

#[test]
fn a_timeout_of_the_policy_tells_the_job() {
    let clock = Clock::paused();
    let _inside = clock.enter();
    for place in both(1, 4) {
        let policy = Policy::named("reports").timeout(ms(50)).build().unwrap();
        let ((start, begun), (say, said)) = (channel(), channel());
        let mut call = Box::pin(policy.run_with(|call| {
            let (start, say) = (start.clone(), say.clone());
            let job = place.run(move |job| {
                start.send(job.remaining()).unwrap();
                while !job.is_cancelled() {
                    thread::yield_now();
                }
                say.send(()).unwrap();
            });
            job.deadline(call.deadline())
        }));
        assert!(poll_once(call.as_mut()).is_pending());
        assert_eq!(begun.recv(), Ok(ms(50)));
        clock.advance(ms(51));
        let error = ready(call.as_mut()).map_err(Error::flatten).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        said.recv().unwrap();
        drop(call);
        place.assert_all_back();
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Settings

#[test]
fn wrong_settings_are_told_all_at_once() {
    let blocking = Blocking::builder().threads(0).max_queue(1 << 25).max_wait(Duration::ZERO).build().unwrap_err();
    let compute = Compute::builder().threads(0).max_queue(1 << 25).max_wait(Duration::ZERO).build().unwrap_err();
    for (error, place) in [(blocking, "blocking"), (compute, "compute")] {
        let told: Vec<_> = error.faults().iter().map(ToString::to_string).collect();
        assert_eq!(
            told,
            [
                format!("{place}: threads must be 1 to 4096, is 0"),
                format!("{place}: max_queue must be 0 to 16777216, is 33554432"),
                format!("{place}: max_wait must be 1ms or more; max_queue(0) lets nobody wait, is 0ns"),
            ]
        );
    }
    assert!(Blocking::builder().threads(4097).build().is_err());
    assert!(Compute::builder().threads(4097).max_queue(u32::MAX).build().is_err());
}

#[test]
fn a_pool_has_a_thread_for_each_core_and_a_name_of_its_own() {
    let compute = Compute::builder().named("images\0").build().unwrap();
    assert_eq!(compute.threads() as usize, thread::available_parallelism().unwrap().get());
    assert_eq!(compute.to_string(), format!("images\0 {}", compute.threads()));
    let name = wait(compute.run(|_| thread::current().name().map(str::to_owned))).unwrap();
    assert!(name.unwrap().starts_with("images  "));
    let blocking = Blocking::builder().named("files").build().unwrap();
    assert_eq!((blocking.to_string().as_str(), blocking.threads()), ("files 32", 32));
    assert_eq!((blocking.max_queue(), compute.max_queue()), (1024, 1024));
    assert!(!blocking.is_closed() && !compute.is_closed());
}
