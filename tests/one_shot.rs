//! Limits, gates and cancellation as methods of any future.

use std::convert::Infallible;
use std::future::{pending, ready};
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::poll_immediate;
use resile::{
    Call, CircuitBreaker, Entry, Error, ErrorKind, FutureExt, Gate, Limit, Outcome, Pass, Reason, Semaphore, State,
    Stop, TokenBucket, infallible,
};
use tokio::time::{Instant, advance, sleep};
use tokio_util::sync::CancellationToken;

const fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

async fn takes(time: Duration) -> Result<u32, Infallible> {
    sleep(time).await;
    Ok(42)
}

async fn never() -> Result<u32, Infallible> {
    pending().await
}

/// Notes under its name who came in and how it ended.
#[derive(Clone)]
struct Notes(&'static str, Arc<Mutex<Vec<String>>>);

impl Gate for Notes {
    fn enter(&self, _: &Call) -> Entry {
        self.1.lock().unwrap().push(format!("{} in", self.0));
        Entry::Pass(Pass::default())
    }

    fn leave(&self, _: Pass, outcome: Outcome) {
        self.1.lock().unwrap().push(match outcome {
            Outcome::Judged(verdict, _) => format!("{} {verdict:?}", self.0),
            Outcome::NotStarted => format!("{} not started", self.0),
            Outcome::Abandoned(_) => format!("{} abandoned", self.0),
            outcome => unreachable!("no test here leads to {outcome:?}"),
        });
    }
}

#[tokio::test(start_paused = true)]
async fn each_method_wraps_what_stands_before_it() {
    let journal = Arc::default();
    let gate = |name| Notes(name, Arc::clone(&journal));
    let end = takes(ms(5)).through(&gate("inner")).through(&gate("outer")).await;
    assert_eq!(end.unwrap(), 42);
    assert_eq!(*journal.lock().unwrap(), ["outer in", "inner in", "inner Success", "outer Success"]);
}

#[tokio::test(start_paused = true)]
async fn a_limit_before_a_gate_leaves_its_queue_out_and_one_after_it_does_not() {
    let semaphore = Semaphore::permits(1).build().unwrap();
    let hold = |time| {
        let held = semaphore.try_acquire().unwrap();
        tokio::spawn(async move {
            sleep(time).await;
            drop(held);
        });
    };
    hold(ms(100));
    assert_eq!(takes(ms(40)).within(ms(50)).through(&semaphore).await.unwrap(), 42);

    hold(ms(100));
    let error = takes(ms(40)).through(&semaphore).within(ms(50)).await.unwrap_err();
    assert_eq!((error.kind(), error.attempts()), (ErrorKind::TimedOut, 0));
    assert_eq!(semaphore.queued(), 0);
}

#[tokio::test(start_paused = true)]
async fn the_earliest_of_several_limits_counts() {
    let start = Instant::now();
    let error = never().within(ms(300)).within(ms(100)).within(ms(200)).await.unwrap_err();
    assert_eq!(start.elapsed(), ms(100));
    assert_eq!(error.limit(), Some(Limit::Step { step: 2, limit: ms(100) }), "counted from the outermost");
}

#[tokio::test(start_paused = true)]
async fn one_flat_error_tells_what_ended_it() {
    let breaker = CircuitBreaker::builder().consecutive_failures(1).build().unwrap();
    let token = CancellationToken::new();
    let failed: Error<&str> = ready(Err::<(), _>("down")).within(ms(5)).await.unwrap_err();
    assert_eq!((failed.kind(), failed.stop(), failed.into_inner()), (ErrorKind::Failed, Stop::NoRetry, Some("down")));
    let timed_out = never().through(&breaker).within(ms(5)).await.unwrap_err();
    assert_eq!((timed_out.kind(), timed_out.elapsed()), (ErrorKind::TimedOut, Some(ms(5))));
    let refused = never().through(&breaker).within(ms(5)).await.unwrap_err();
    assert_eq!(refused.refusal().unwrap().reason(), Reason::CircuitOpen);
    token.cancel();
    let cancelled = never().through(&breaker).cancelled_by(&token).await.unwrap_err();
    assert_eq!((cancelled.kind(), cancelled.attempts()), (ErrorKind::Cancelled, 0));
}

#[tokio::test(start_paused = true)]
async fn a_gate_hears_how_it_ended() {
    let journal = Arc::default();
    let gate = Notes("gate", Arc::clone(&journal));
    let token = CancellationToken::new();
    ready(Ok::<_, ()>(())).through(&gate).await.unwrap();
    ready(Err::<(), _>(())).through(&gate).await.unwrap_err();
    never().within(ms(5)).through(&gate).await.unwrap_err();
    {
        let mut dropped = Box::pin(never().through(&gate));
        assert!(poll_immediate(dropped.as_mut()).await.is_none());
    }
    let mut cancelled = pin!(never().through(&gate).cancelled_by(&token));
    assert!(poll_immediate(cancelled.as_mut()).await.is_none());
    token.cancel();
    cancelled.await.unwrap_err();
    let ends: Vec<_> = journal.lock().unwrap().iter().filter(|note| *note != "gate in").cloned().collect();
    let expected = ["Success", "Transient(None)", "Transient(None)", "abandoned", "abandoned"];
    assert_eq!(ends, expected.map(|end| format!("gate {end}")));
}

#[tokio::test(start_paused = true)]
async fn cancelling_wakes_and_ends_it_wherever_it_stands_in_the_chain() {
    for late in [false, true] {
        let token = CancellationToken::new();
        let shot = if late {
            never().within(ms(500)).within(ms(600)).cancelled_by(&token)
        } else {
            never().cancelled_by(&token).within(ms(500)).within(ms(600))
        };
        let task = tokio::spawn(shot);
        sleep(ms(10)).await;
        token.cancel();
        let start = Instant::now();
        assert!(task.await.unwrap().unwrap_err().is_cancelled());
        assert_eq!(start.elapsed(), Duration::ZERO);
    }
}

#[tokio::test(start_paused = true)]
async fn of_several_tokens_the_first_one_counts() {
    let (one, two) = (CancellationToken::new(), CancellationToken::new());
    let mut shot = pin!(never().cancelled_by(&one).cancelled_by(&two));
    assert!(poll_immediate(shot.as_mut()).await.is_none());
    two.cancel();
    assert!(shot.await.unwrap_err().is_cancelled());
    assert!(!one.is_cancelled());
}

#[tokio::test(start_paused = true)]
async fn a_value_that_is_ready_wins_over_everything_outside() {
    let token = CancellationToken::new();
    assert_eq!(ready(Ok::<_, ()>(1)).within(Duration::ZERO).await.unwrap(), 1);
    let mut shot = pin!(takes(ms(50)).within(ms(50)).cancelled_by(&token));
    assert!(poll_immediate(shot.as_mut()).await.is_none());
    advance(ms(50)).await;
    token.cancel();
    assert_eq!(shot.await.unwrap(), 42);
}

#[tokio::test(start_paused = true)]
async fn the_clock_starts_at_the_first_poll_and_nothing_happens_before() {
    let journal = Arc::default();
    let shot = takes(ms(90)).within(ms(100)).through(&Notes("gate", Arc::clone(&journal)));
    advance(Duration::from_secs(60)).await;
    assert!(journal.lock().unwrap().is_empty());
    shot.await.unwrap();
    drop(takes(ms(90)).through(&Notes("gate", Arc::clone(&journal))));
    assert_eq!(journal.lock().unwrap().len(), 2, "one that is dropped unpolled has asked nobody");
}

#[tokio::test(start_paused = true)]
async fn a_future_that_cannot_fail_is_wrapped_first() {
    let answer = infallible(async { 42 }).within(ms(100)).await;
    assert_eq!(answer.unwrap(), 42);
    let error: Error<Infallible> = infallible(pending::<u32>()).within(ms(100)).await.unwrap_err();
    assert!(error.is_timeout());
    let error = infallible(sleep(ms(200))).within(ms(100)).await.unwrap_err();
    assert!(error.is_timeout() && error.last().is_none());
}

#[tokio::test(start_paused = true)]
async fn a_panic_gives_the_passes_back_as_failed() {
    let breaker = CircuitBreaker::builder().consecutive_failures(1).build().unwrap();
    let semaphore = Semaphore::permits(1).build().unwrap();
    let shot = async { if true { panic!("boom") } else { Ok::<(), ()>(()) } }.through(&semaphore).through(&breaker);
    assert!(tokio::spawn(shot).await.unwrap_err().is_panic());
    assert_eq!((semaphore.available(), breaker.state()), (1, State::Open));
}

#[tokio::test(start_paused = true)]
async fn every_kind_of_gate_can_stand_in_the_chain() {
    let breaker = CircuitBreaker::builder().build().unwrap();
    let bucket = TokenBucket::per_second(10).burst(1).build().unwrap();
    let semaphore = Semaphore::permits(1).build().unwrap();
    let start = Instant::now();
    for _ in 0..3 {
        let shot = takes(ms(1)).within(ms(5)).through(&semaphore).through(&bucket).through(&breaker).within(ms(500));
        assert_eq!(shot.await.unwrap(), 42);
    }
    assert_eq!(start.elapsed(), ms(201));
    assert_eq!((breaker.counts().calls, semaphore.available()), (3, 1));
}

#[tokio::test(start_paused = true)]
async fn a_long_chain_works_like_a_short_one() {
    let journal = Arc::default();
    let gate = Notes("gate", Arc::clone(&journal));
    let mut shot = takes(ms(5)).within(ms(1000));
    for _ in 0..20 {
        shot = shot.through(&gate).within(ms(1000));
    }
    assert_eq!(shot.await.unwrap(), 42);
    let journal = journal.lock().unwrap();
    assert_eq!(journal.iter().filter(|note| *note == "gate in").count(), 20);
    assert_eq!(journal.iter().filter(|note| *note == "gate Success").count(), 20);
}

#[tokio::test(start_paused = true)]
async fn a_chain_may_borrow_what_it_works_on() {
    let semaphore = Semaphore::permits(1).build().unwrap();
    let mut list = vec![1, 2];
    async {
        list.push(3);
        Ok::<_, Infallible>(())
    }
    .through(&semaphore)
    .within(ms(5))
    .await
    .unwrap();
    assert_eq!(list, [1, 2, 3]);
}

#[tokio::test(start_paused = true)]
async fn a_chain_can_be_printed_and_moved_into_a_task() {
    let semaphore = Semaphore::permits(1).build().unwrap();
    let shot = takes(ms(5)).through(&semaphore).within(ms(50));
    assert!(format!("{shot:?}").contains("OneShot"));
    assert_eq!(tokio::spawn(shot).await.unwrap().unwrap(), 42);
}
