//! The circuit breaker: when it opens, whom it lets in to find out, and what moves it and what does not.

mod support;

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::future::{Future as _, pending, ready};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Barrier, Mutex, OnceLock};
use std::time::Duration;

use futures::future::{join_all, poll_immediate};
use proptest::prelude::*;
use resile::{
    BreakerBuilder, Call, CircuitBreaker, Entry, ErrorKind, Gate, Guard, OnRefusal, Outcome, Pass, Policy, Reason,
    Refusal, Retry, Semaphore, State, Verdict,
};
use tokio::time::{Instant, advance, sleep};
use tokio_util::sync::CancellationToken;

const fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

const fn secs(count: u64) -> Duration {
    Duration::from_secs(count)
}

/// Opens for exactly 5 s, doubling up to a minute.
fn five_seconds() -> BreakerBuilder {
    CircuitBreaker::builder().open_for(secs(5)).max_open_for(secs(60)).open_jitter(0.0)
}

/// Opens at half of at least four calls in 16 s, for exactly 5 s.
fn by_rate() -> BreakerBuilder {
    five_seconds().failure_rate(0.5).over(secs(16)).min_calls(4)
}

/// Opens after so many failures in a row, for exactly 5 s.
fn in_a_row(failures: u32) -> BreakerBuilder {
    five_seconds().consecutive_failures(failures)
}

fn built(builder: BreakerBuilder) -> CircuitBreaker {
    builder.build().unwrap()
}

fn fail(breaker: &CircuitBreaker) {
    breaker.try_acquire().unwrap().failure();
}

fn succeed(breaker: &CircuitBreaker) {
    breaker.try_acquire().unwrap().success();
}

fn refusal(breaker: &CircuitBreaker) -> Refusal {
    breaker.try_acquire().unwrap_err()
}

/// Opens it, and lets its first period pass.
async fn half_open(builder: BreakerBuilder) -> CircuitBreaker {
    let breaker = built(builder.consecutive_failures(1));
    fail(&breaker);
    assert_eq!(breaker.state(), State::Open);
    advance(secs(5)).await;
    assert_eq!(breaker.state(), State::HalfOpen);
    breaker
}

/// As many probes as it gives out.
fn probes(breaker: &CircuitBreaker) -> Vec<Guard> {
    std::iter::from_fn(|| breaker.try_acquire().ok()).take(2000).collect()
}

fn gated(breaker: &CircuitBreaker) -> Policy {
    Policy::named("gated").gate(breaker.clone()).build().unwrap()
}

type Changes = Arc<Mutex<Vec<(State, State)>>>;

fn noting(builder: BreakerBuilder) -> (CircuitBreaker, Changes) {
    let changes = Changes::default();
    let noted = Arc::clone(&changes);
    (built(builder.on_change(move |from, to| noted.lock().unwrap().push((from, to)))), changes)
}

// ---------------------------------------------------------------------------------------------------------------------
// Closed: the rules

/// C10: the comparison is "at least".
#[tokio::test(start_paused = true)]
async fn it_opens_when_the_share_of_failures_reaches_the_rate() {
    let breaker = built(by_rate());
    for _ in 0..2 {
        succeed(&breaker);
    }
    fail(&breaker);
    assert_eq!(breaker.state(), State::Closed);
    fail(&breaker);
    assert_eq!(breaker.state(), State::Open);
}

#[tokio::test(start_paused = true)]
async fn a_share_below_the_rate_leaves_it_closed() {
    let breaker = built(by_rate().failure_rate(0.51));
    for _ in 0..500 {
        succeed(&breaker);
        fail(&breaker);
        succeed(&breaker);
    }
    assert_eq!(breaker.state(), State::Closed);
}

/// C10: undefined, not 0/0.
#[tokio::test(start_paused = true)]
async fn below_the_least_number_of_calls_there_is_no_rate() {
    let breaker = built(by_rate());
    for _ in 0..3 {
        fail(&breaker);
    }
    assert_eq!(breaker.state(), State::Closed);
    fail(&breaker);
    assert_eq!(breaker.state(), State::Open);
}

#[tokio::test(start_paused = true)]
async fn a_quick_success_never_opens_it() {
    let breaker = built(by_rate());
    for _ in 0..3 {
        fail(&breaker);
    }
    succeed(&breaker);
    assert_eq!(breaker.state(), State::Closed, "three of four have failed, but the fourth did not");
    fail(&breaker);
    assert_eq!(breaker.state(), State::Open);
}

#[tokio::test(start_paused = true)]
async fn a_time_window_forgets_what_is_older_than_it() {
    let breaker = built(by_rate());
    for _ in 0..3 {
        fail(&breaker);
    }
    advance(ms(14_900)).await;
    assert_eq!(breaker.counts().failures, 3);
    advance(ms(1_100)).await;
    assert_eq!(breaker.counts().failures, 0);
    for _ in 0..3 {
        fail(&breaker);
    }
    assert_eq!(breaker.state(), State::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_time_window_slides_over_slow_traffic() {
    let breaker = built(by_rate());
    // One call in four seconds: never four in a window.
    for _ in 0..100 {
        fail(&breaker);
        advance(ms(5_400)).await;
    }
    advance(secs(16)).await;
    for _ in 0..3 {
        fail(&breaker);
        advance(ms(4_900)).await;
        assert_eq!(breaker.state(), State::Closed);
    }
    fail(&breaker);
    assert_eq!(breaker.state(), State::Open);
}

/// A rival's window had no age.
#[tokio::test(start_paused = true)]
async fn three_failures_a_day_and_one_failure_are_no_outage() {
    for over in [ms(1), secs(1), secs(16), secs(3600)] {
        let breaker = built(by_rate().over(over));
        for _ in 0..3 {
            fail(&breaker);
        }
        advance(secs(86_400)).await;
        fail(&breaker);
        assert_eq!((breaker.state(), breaker.counts().calls), (State::Closed, 1), "{over:?}");
    }
}

/// G10: an index of a window that has come round must not pass for the present one.
#[tokio::test(start_paused = true)]
async fn no_idle_time_brings_old_failures_back() {
    for power in 4..36 {
        // Slices of a millisecond.
        let breaker = built(by_rate().over(ms(16)));
        for _ in 0..3 {
            fail(&breaker);
        }
        advance(ms(1 << power)).await;
        assert_eq!(breaker.counts().calls, 0, "after 2^{power} ms");
    }
}

/// A rival tripped on the count of errors alone.
#[tokio::test(start_paused = true)]
async fn one_error_in_a_thousand_is_no_outage_whatever_the_traffic() {
    let breaker = built(CircuitBreaker::builder());
    for second in 0..9 {
        for call in 0..10_000 {
            if call % 1000 == 999 { fail(&breaker) } else { succeed(&breaker) }
        }
        advance(secs(1)).await;
        assert_eq!(breaker.state(), State::Closed, "second {second}");
    }
    assert_eq!((breaker.counts().calls, breaker.counts().failures), (90_000, 90));
}

/// Trap: a window that only grows can't trip after a long healthy time.
#[tokio::test(start_paused = true)]
async fn the_last_calls_slide_however_many_were_good_before() {
    let breaker = built(by_rate().over_calls(10).min_calls(10));
    for _ in 0..10_000 {
        succeed(&breaker);
    }
    for _ in 0..4 {
        fail(&breaker);
    }
    assert_eq!(breaker.state(), State::Closed);
    fail(&breaker);
    assert_eq!(breaker.state(), State::Open, "five of the last ten");
}

#[tokio::test(start_paused = true)]
async fn failures_that_have_slid_out_of_the_last_calls_do_not_count() {
    let breaker = built(by_rate().over_calls(10).min_calls(10));
    for _ in 0..5 {
        succeed(&breaker);
    }
    for _ in 0..50 {
        for _ in 0..4 {
            fail(&breaker);
        }
        for _ in 0..6 {
            succeed(&breaker);
        }
    }
    assert_eq!((breaker.state(), breaker.counts().failures, breaker.counts().calls), (State::Closed, 4, 10));
}

/// Trap: nothing could trip before the window was full.
#[tokio::test(start_paused = true)]
async fn the_last_calls_may_be_judged_before_they_are_all_there() {
    let breaker = built(by_rate().over_calls(100).min_calls(3));
    fail(&breaker);
    fail(&breaker);
    assert_eq!(breaker.state(), State::Closed);
    fail(&breaker);
    assert_eq!(breaker.state(), State::Open);
}

#[tokio::test(start_paused = true)]
async fn failures_in_a_row_open_it_and_a_success_between_them_does_not() {
    let breaker = built(in_a_row(3));
    for _ in 0..100 {
        fail(&breaker);
        fail(&breaker);
        succeed(&breaker);
    }
    assert_eq!(breaker.state(), State::Closed);
    for _ in 0..3 {
        fail(&breaker);
    }
    assert_eq!(breaker.state(), State::Open);
}

#[tokio::test(start_paused = true)]
async fn a_row_is_not_broken_by_what_says_nothing() {
    let breaker = built(in_a_row(2));
    fail(&breaker);
    breaker.try_acquire().unwrap().ignore();
    drop(breaker.try_acquire().unwrap());
    fail(&breaker);
    assert_eq!(breaker.state(), State::Open);
}

#[tokio::test(start_paused = true)]
async fn a_row_alone_knows_no_rate() {
    let breaker = built(in_a_row(2));
    for _ in 0..1000 {
        succeed(&breaker);
        fail(&breaker);
    }
    assert_eq!(breaker.state(), State::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_row_and_a_rate_each_open_it() {
    let both = || built(by_rate().consecutive_failures(3));
    let row = both();
    for _ in 0..97 {
        succeed(&row);
    }
    for _ in 0..3 {
        fail(&row);
    }
    assert_eq!(row.state(), State::Open);
    let rate = both();
    for _ in 0..2 {
        succeed(&rate);
        fail(&rate);
    }
    assert_eq!(rate.state(), State::Open);
}

/// Takes a passage and gives it back well, after this time.
async fn slowly(breaker: &CircuitBreaker, time: Duration) {
    let guard = breaker.try_acquire().unwrap();
    advance(time).await;
    guard.success();
}

#[tokio::test(start_paused = true)]
async fn slow_calls_open_it_whatever_came_of_them() {
    let breaker = built(by_rate().slow_calls(ms(100), 0.5));
    for _ in 0..2 {
        slowly(&breaker, ms(99)).await;
    }
    slowly(&breaker, ms(100)).await;
    assert_eq!((breaker.state(), breaker.counts().slow), (State::Closed, 1));
    slowly(&breaker, ms(100)).await;
    assert_eq!(breaker.state(), State::Open);
}

#[tokio::test(start_paused = true)]
async fn slow_calls_have_a_rate_of_their_own() {
    let breaker = built(by_rate().slow_calls(ms(100), 1.0));
    slowly(&breaker, ms(10)).await;
    for _ in 0..50 {
        slowly(&breaker, ms(300)).await;
    }
    assert_eq!(breaker.state(), State::Closed, "all but one");
    advance(secs(16)).await;
    for _ in 0..4 {
        slowly(&breaker, ms(300)).await;
    }
    assert_eq!(breaker.state(), State::Open);
}

#[tokio::test(start_paused = true)]
async fn time_in_a_queue_does_not_make_a_call_slow() {
    let breaker = built(by_rate().min_calls(1).slow_calls(ms(100), 0.1));
    let semaphore = Semaphore::permits(1).build().unwrap();
    let policy = Policy::named("queue").gate(breaker.clone()).gate(semaphore).build().unwrap();
    let operation = || async {
        sleep(ms(50)).await;
        Ok::<_, Infallible>(())
    };
    let ends = join_all((0..10).map(|_| policy.run(operation))).await;
    assert!(ends.iter().all(Result::is_ok));
    assert_eq!((breaker.counts().calls, breaker.counts().slow), (10, 0));
}

#[tokio::test(start_paused = true)]
async fn as_it_is_it_opens_at_half_of_twenty_calls_for_about_half_a_second() {
    let breaker = built(CircuitBreaker::builder());
    for _ in 0..19 {
        fail(&breaker);
    }
    assert_eq!(breaker.state(), State::Closed);
    fail(&breaker);
    let after = refusal(&breaker).retry_after().unwrap();
    assert!((ms(450)..=ms(500)).contains(&after), "{after:?}");
}

/// With a minute as the longest period the breaker drew an outage out by up to as much.
#[tokio::test(start_paused = true)]
async fn as_it_is_an_outage_is_drawn_out_by_five_seconds_at_most() {
    let breaker = built(CircuitBreaker::builder().consecutive_failures(1).probes(1).open_jitter(0.0));
    assert_eq!(periods(&breaker, 6).await, [500, 1000, 2000, 4000, 5000, 5000].map(ms));
}

/// After an hour of steady traffic half of the window has to fail.
#[tokio::test(start_paused = true)]
async fn as_it_is_an_outage_is_noticed_after_about_five_seconds() {
    let breaker = built(CircuitBreaker::builder());
    for _ in 0..2000 {
        succeed(&breaker);
        advance(ms(10)).await;
    }
    let start = Instant::now();
    while breaker.try_acquire().map(Guard::failure).is_ok() {
        advance(ms(10)).await;
    }
    assert!((secs(4)..=secs(6)).contains(&start.elapsed()), "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn verdicts_count_as_the_table_says() {
    for (verdict, calls, failures) in [
        (Verdict::Success, 1, 0),
        (Verdict::Permanent, 1, 0),
        (Verdict::Ignored, 0, 0),
        (Verdict::Transient(Some(secs(1))), 1, 1),
        (Verdict::Overloaded(None), 1, 1),
    ] {
        let breaker = built(by_rate());
        let _ = gated(&breaker).classify(|_: &Result<(), ()>| verdict).run(|| ready(Err(()))).await;
        assert_eq!((breaker.counts().calls, breaker.counts().failures), (calls, failures), "{verdict:?}");
        breaker.try_acquire().unwrap().finish(verdict);
        assert_eq!((breaker.counts().calls, breaker.counts().failures), (calls * 2, failures * 2), "{verdict:?}");
    }
}

/// Through tower, a hundred thousand answers of 503 left a rival's closed.
#[tokio::test(start_paused = true)]
async fn bad_answers_that_are_values_open_it() {
    let breaker = built(by_rate());
    let policy = gated(&breaker);
    let judge = |status: &Result<u16, Infallible>| match status {
        Ok(500..) => Verdict::Transient(None),
        _ => Verdict::Success,
    };
    for _ in 0..4 {
        assert_eq!(policy.classify(judge).run(|| ready(Ok(503))).await.unwrap(), 503);
    }
    assert_eq!(breaker.state(), State::Open);
}

#[tokio::test(start_paused = true)]
async fn counting_on_many_threads_loses_nothing() {
    for builder in [by_rate().over(secs(3600)), by_rate().over_calls(1_000_000)] {
        let breaker = built(builder.failure_rate(1.0).slow_calls(secs(3600), 1.0));
        succeed(&breaker);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for call in 0..1000 {
                        if call % 4 == 0 { fail(&breaker) } else { succeed(&breaker) }
                    }
                });
            }
        });
        assert_eq!((breaker.counts().calls, breaker.counts().failures), (8001, 2000));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Open

/// C14.
#[tokio::test(start_paused = true)]
async fn an_open_circuit_does_not_touch_the_operation() {
    let breaker = built(in_a_row(1));
    fail(&breaker);
    let error = gated(&breaker).run(|| -> std::future::Ready<Result<(), ()>> { panic!("made") }).await.unwrap_err();
    assert_eq!((error.kind(), error.attempts()), (ErrorKind::Refused, 0));
    assert_eq!(error.refusal().unwrap().reason(), Reason::CircuitOpen);
    assert_eq!(error.retry_after(), Some(secs(5)));
}

#[tokio::test(start_paused = true)]
async fn the_advice_of_an_open_circuit_is_exact() {
    let breaker = built(in_a_row(1));
    fail(&breaker);
    advance(ms(1234)).await;
    assert_eq!(refusal(&breaker).retry_after(), Some(ms(3766)));
    advance(ms(3766).saturating_sub(Duration::from_nanos(1))).await;
    assert_eq!(refusal(&breaker).retry_after(), Some(Duration::from_nanos(1)));
    advance(Duration::from_nanos(1)).await;
    assert!(breaker.try_acquire().is_ok());
}

#[tokio::test(start_paused = true)]
async fn an_open_circuit_becomes_half_open_by_the_clock_without_a_call() {
    let (breaker, changes) = noting(in_a_row(1));
    fail(&breaker);
    advance(ms(4999)).await;
    assert_eq!(breaker.state(), State::Open);
    advance(ms(1)).await;
    assert_eq!(breaker.state(), State::HalfOpen);
    assert_eq!(*changes.lock().unwrap(), [(State::Closed, State::Open), (State::Open, State::HalfOpen)]);
}

/// The periods for which it opens, one failed probe after the other.
async fn periods(breaker: &CircuitBreaker, count: usize) -> Vec<Duration> {
    let mut all = Vec::new();
    for _ in 0..count {
        fail(breaker);
        all.push(refusal(breaker).retry_after().unwrap());
        advance(all[all.len() - 1]).await;
    }
    all
}

#[tokio::test(start_paused = true)]
async fn open_periods_grow_up_to_their_cap() {
    let breaker = built(in_a_row(1).probes(1));
    let expected: Vec<_> = [5, 10, 20, 40, 60, 60, 60].into_iter().map(secs).collect();
    assert_eq!(periods(&breaker, 7).await, expected);
    let breaker = built(in_a_row(1).probes(1).open_for(secs(1)).open_growth(3.0).max_open_for(secs(20)));
    let expected: Vec<_> = [1, 3, 9, 20, 20].into_iter().map(secs).collect();
    assert_eq!(periods(&breaker, 5).await, expected);
    let breaker = built(in_a_row(1).probes(1).open_growth(1.0));
    assert_eq!(periods(&breaker, 5).await, [secs(5); 5]);
}

#[tokio::test(start_paused = true)]
async fn the_growth_of_open_periods_overflows_nothing() {
    let day = secs(86_400);
    let breaker = built(in_a_row(1).probes(1).open_growth(100.0).max_open_for(day));
    let all = periods(&breaker, 1100).await;
    assert_eq!((all[0], all[1], all[3], all[1099]), (secs(5), secs(500), day, day));
}

#[tokio::test(start_paused = true)]
async fn open_periods_start_small_again_once_it_has_closed() {
    let breaker = built(in_a_row(1).probes(1));
    periods(&breaker, 3).await;
    succeed(&breaker);
    assert_eq!(breaker.state(), State::Closed);
    assert_eq!(periods(&breaker, 2).await, [secs(5), secs(10)]);
    breaker.reset();
    assert_eq!(periods(&breaker, 1).await, [secs(5)]);
}

#[tokio::test(start_paused = true)]
async fn a_cap_below_the_first_period_counts_as_that() {
    let breaker = built(in_a_row(1).probes(1).max_open_for(secs(1)));
    assert_eq!(periods(&breaker, 3).await, [secs(5); 3]);
}

#[tokio::test(start_paused = true)]
async fn jitter_takes_off_up_to_its_share_of_each_period() {
    let mut shares = Vec::new();
    for seed in 0..50 {
        let breaker = built(in_a_row(1).probes(1).open_growth(1.0).open_jitter(0.2).seed(seed));
        for period in periods(&breaker, 4).await {
            assert!((secs(4)..=secs(5)).contains(&period), "{period:?}");
            shares.push(period);
        }
    }
    assert!(shares.iter().any(|period| *period < ms(4200)) && shares.iter().any(|period| *period > ms(4800)));
}

#[tokio::test(start_paused = true)]
async fn a_seed_makes_the_periods_repeatable() {
    let seeded = |seed| built(in_a_row(1).probes(1).open_jitter(0.5).seed(seed));
    let first = periods(&seeded(7), 6).await;
    assert_eq!(first, periods(&seeded(7), 6).await);
    assert_ne!(first, periods(&seeded(8), 6).await);
}

/// C15.
#[tokio::test(start_paused = true)]
async fn the_shortest_periods_and_the_widest_jitter_work() {
    for seed in 0..200 {
        let builder = in_a_row(1).probes(1).open_for(ms(1)).open_growth(1.0).open_jitter(1.0).seed(seed);
        let breaker = built(builder);
        for _ in 0..5 {
            fail(&breaker);
            while let Err(refusal) = breaker.try_acquire() {
                let after = refusal.retry_after().unwrap();
                assert!(after > Duration::ZERO && after <= ms(1));
                advance(after).await;
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn failures_that_come_in_late_do_not_prolong_the_period() {
    let breaker = built(in_a_row(1));
    let late: Vec<_> = (0..3).map(|_| breaker.try_acquire().unwrap()).collect();
    fail(&breaker);
    for guard in late {
        advance(secs(1)).await;
        guard.failure();
    }
    assert_eq!(refusal(&breaker).retry_after(), Some(secs(2)));
}

/// Trap: any late success closed it.
#[tokio::test(start_paused = true)]
async fn a_success_that_comes_in_late_does_not_close_it() {
    let breaker = built(in_a_row(1));
    let late = breaker.try_acquire().unwrap();
    fail(&breaker);
    late.success();
    assert_eq!(breaker.state(), State::Open);
}

/// C16.
#[tokio::test(start_paused = true)]
async fn refusals_have_no_chain_of_causes() {
    let breaker = built(in_a_row(1).named("peer"));
    fail(&breaker);
    let policy = gated(&breaker);
    for _ in 0..10 {
        let error = policy.run(|| ready(Err::<(), _>(std::io::Error::other("down")))).await.unwrap_err();
        assert!(std::error::Error::source(&error).is_none());
        assert_eq!(error.to_string(), r#"gated: refused by "peer": the circuit is open, retry in 5s"#);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Half open

/// C1: reserved at admission, not counted at the end.
#[tokio::test(start_paused = true)]
async fn half_open_admits_its_probes_and_no_more() {
    for count in [1, 3, 1000] {
        let breaker = half_open(in_a_row(1).probes(count)).await;
        let inside = Cell::new(0);
        let calls = (0..1500).map(|_| {
            gated(&breaker).into_run(|| {
                inside.set(inside.get() + 1);
                async {
                    sleep(ms(50)).await;
                    Ok::<_, Infallible>(())
                }
            })
        });
        let ends = join_all(calls).await;
        assert_eq!(inside.get(), count);
        let refused = ends.iter().filter(|end| {
            end.as_ref().is_err_and(|error| error.refusal().is_some_and(|refusal| refusal.reason() == Reason::Probing))
        });
        assert_eq!(refused.count() as u32, 1500 - count);
        assert_eq!(breaker.state(), State::Closed);
    }
}

/// C1, trap: the losers of the race to half-open reset its count. Each thread has a clock of its own that is well past
/// the open period.
#[test]
fn threads_that_race_to_half_open_get_its_probes_and_no_more() {
    for round in 0..50 {
        let breaker = built(in_a_row(1).probes(3).seed(round));
        fail(&breaker);
        let (together, admitted) = (Barrier::new(4), AtomicU32::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
                    runtime.unwrap().block_on(async {
                        advance(secs(10)).await;
                        together.wait();
                        let guards = probes(&breaker);
                        admitted.fetch_add(guards.len() as u32, Ordering::SeqCst);
                        together.wait();
                        drop(guards);
                    });
                });
            }
        });
        assert_eq!(admitted.into_inner(), 3);
    }
}

/// C2.
#[tokio::test(start_paused = true)]
async fn a_dropped_probe_gives_its_place_back_and_votes_for_nothing() {
    let breaker = half_open(in_a_row(1).probes(1)).await;
    let policy = gated(&breaker);
    for _ in 0..100 {
        drop(breaker.try_acquire().unwrap());
        let mut run = Box::pin(policy.run(pending::<Result<(), ()>>));
        assert!(poll_immediate(run.as_mut()).await.is_none());
        assert_eq!(refusal(&breaker).reason(), Reason::Probing);
        drop(run);
    }
    assert_eq!(breaker.state(), State::HalfOpen);
    succeed(&breaker);
    assert_eq!(breaker.state(), State::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_probe_gives_its_place_back_and_votes_for_nothing() {
    let breaker = half_open(in_a_row(1).probes(1)).await;
    let token = CancellationToken::new();
    let policy = gated(&breaker);
    let mut run = pin!(policy.call().cancel_on(&token).run(pending::<Result<(), ()>>));
    assert!(poll_immediate(run.as_mut()).await.is_none());
    token.cancel();
    assert!(run.await.unwrap_err().is_cancelled());
    assert!(policy.call().deadline(ms(10)).run(pending::<Result<(), ()>>).await.unwrap_err().is_timeout());
    assert_eq!((breaker.state(), probes(&breaker).len()), (State::HalfOpen, 1));
}

/// C3: one report tells of six days half-open and 49,607 refusals.
#[tokio::test(start_paused = true)]
async fn a_probe_that_hangs_loses_its_place_after_its_lease() {
    let breaker = half_open(in_a_row(1).probes(1).probe_lease(secs(10))).await;
    let hung = breaker.try_acquire().unwrap();
    advance(secs(9)).await;
    assert_eq!(refusal(&breaker).retry_after(), Some(secs(1)));
    advance(secs(1)).await;
    let next = breaker.try_acquire().unwrap();
    hung.failure();
    assert_eq!(breaker.state(), State::HalfOpen, "a late verdict moves nothing");
    assert_eq!(probes(&breaker).len(), 0, "and frees no place of others");
    next.success();
    assert_eq!(breaker.state(), State::Closed);
}

/// It once was the end of the lease, half a minute away unless said: whoever heeded it missed every deadline.
#[tokio::test(start_paused = true)]
async fn the_advice_while_probing_is_a_quarter_of_the_time_that_the_youngest_probe_has_been_out() {
    let breaker = half_open(in_a_row(1).probes(2)).await;
    let _first = breaker.try_acquire().unwrap();
    advance(ms(40)).await;
    let _second = breaker.try_acquire().unwrap();
    assert_eq!(
        (refusal(&breaker).reason(), refusal(&breaker).retry_after()),
        (Reason::Probing, Some(ms(10))),
        "and no spin"
    );
    advance(ms(40)).await;
    assert_eq!(refusal(&breaker).retry_after(), Some(ms(10)));
    advance(ms(400)).await;
    assert_eq!(refusal(&breaker).retry_after(), Some(ms(110)));
}

#[tokio::test(start_paused = true)]
async fn the_advice_while_probing_ends_with_the_first_lease_or_with_half_open() {
    let breaker = half_open(in_a_row(1).probes(2).probe_lease(secs(10)).half_open_for(secs(13))).await;
    let _first = breaker.try_acquire().unwrap();
    advance(secs(4)).await;
    let _second = breaker.try_acquire().unwrap();
    advance(ms(5500)).await;
    assert_eq!(refusal(&breaker).retry_after(), Some(ms(500)), "the first lease");
    advance(ms(500)).await;
    let _third = breaker.try_acquire().unwrap();
    advance(ms(2900)).await;
    assert_eq!(refusal(&breaker).retry_after(), Some(ms(100)), "the second lease would end sooner, but half-open does");
}

/// A call that honours advice and has a deadline is there when the probes' answer is.
#[tokio::test(start_paused = true)]
async fn who_is_refused_while_it_probes_comes_back_in_time() {
    let breaker = half_open(in_a_row(1).probes(1)).await;
    let policy = Policy::named("patient")
        .timeout(secs(1))
        .retry(Retry::exponential(ms(20)).on_refusal(OnRefusal::Retry))
        .gate(breaker.clone())
        .build()
        .unwrap();
    let probe = policy.run(|| async {
        sleep(ms(300)).await;
        Ok::<_, ()>(0)
    });
    let others = futures::future::join_all((1..20).map(|n| policy.run(move || ready(Ok::<_, ()>(n)))));
    let (probe, others) = futures::future::join(probe, others).await;
    assert_eq!(probe.unwrap(), 0);
    assert!(others.iter().all(Result::is_ok), "{others:?}");
}

/// A rival's hung probe shed every call with a retry-after of zero, for ever.
#[tokio::test(start_paused = true)]
async fn probes_that_hang_for_ever_neither_wedge_it_nor_advise_zero() {
    let breaker = half_open(in_a_row(1).probes(2)).await;
    let mut admitted = 0;
    let start = Instant::now();
    while start.elapsed() < secs(3600) {
        match breaker.try_acquire() {
            Ok(guard) => {
                std::mem::forget(guard);
                admitted += 1;
            }
            Err(refusal) => {
                let after = refusal.retry_after().expect("it knows when");
                assert!(after > Duration::ZERO);
                advance(after).await;
            }
        }
    }
    assert!(admitted > 50, "{admitted} probes in an hour");
}

/// C4: the last one that says nothing must not wedge it.
#[tokio::test(start_paused = true)]
async fn a_probe_that_says_nothing_gives_its_place_back() {
    let breaker = half_open(in_a_row(1).probes(2)).await;
    succeed(&breaker);
    for _ in 0..100 {
        breaker.try_acquire().unwrap().ignore();
        let judge = |_: &Result<(), ()>| Verdict::Ignored;
        let _ = gated(&breaker).classify(judge).run(|| ready(Err(()))).await;
    }
    assert_eq!(breaker.state(), State::HalfOpen);
    succeed(&breaker);
    assert_eq!(breaker.state(), State::Closed);
}

/// C5.
#[tokio::test(start_paused = true)]
async fn a_probe_that_panics_gives_its_place_back_and_counts_as_failed() {
    let breaker = half_open(in_a_row(1).probes(4).probe_failure_rate(0.5)).await;
    let run = || gated(&breaker).into_run(|| async { if true { panic!("boom") } else { Ok::<(), ()>(()) } });
    assert!(tokio::spawn(run()).await.unwrap_err().is_panic());
    assert_eq!((breaker.state(), probes(&breaker).len()), (State::HalfOpen, 3));
    assert!(tokio::spawn(run()).await.unwrap_err().is_panic());
    assert_eq!(breaker.state(), State::Open);
}

/// C5: the same for whatever user code panics.
#[tokio::test(start_paused = true)]
async fn a_probe_whose_closure_or_judge_panics_gives_its_place_back() {
    let breaker = half_open(in_a_row(1).probes(3).probe_failure_rate(1.0)).await;
    let closure = gated(&breaker).into_run(|| -> std::future::Ready<Result<(), ()>> { panic!("boom") });
    assert!(tokio::spawn(closure).await.unwrap_err().is_panic());
    let judge = |_: &Result<(), ()>| -> Verdict { panic!("boom") };
    let judged = gated(&breaker).classify(judge).into_run(|| ready(Ok(())));
    assert!(tokio::spawn(judged).await.unwrap_err().is_panic());
    assert_eq!((breaker.state(), probes(&breaker).len()), (State::HalfOpen, 1));
}

#[tokio::test(start_paused = true)]
async fn a_probe_that_an_inner_gate_refuses_is_no_evidence() {
    let breaker = half_open(in_a_row(1).probes(1)).await;
    let semaphore = Semaphore::permits(1).max_queue(0).build().unwrap();
    let _held = semaphore.try_acquire().unwrap();
    let policy = Policy::named("inner").gate(breaker.clone()).gate(semaphore).build().unwrap();
    for _ in 0..10 {
        assert!(policy.run(|| ready(Ok::<(), ()>(()))).await.unwrap_err().is_refused());
    }
    assert_eq!((breaker.state(), probes(&breaker).len()), (State::HalfOpen, 1));
}

/// C6, trap: a slow old failure opened it again, an old success closed it, and either made room for more probes.
#[tokio::test(start_paused = true)]
async fn results_of_an_older_state_move_nothing() {
    let breaker = built(in_a_row(1).probes(2));
    let mut old: Vec<_> = (0..8).map(|_| breaker.try_acquire().unwrap()).collect();
    fail(&breaker);
    advance(secs(5)).await;
    assert_eq!(breaker.state(), State::HalfOpen);
    let probing = probes(&breaker);
    assert_eq!(probing.len(), 2);
    for guard in old.drain(..6) {
        guard.success();
    }
    for guard in old {
        guard.failure();
    }
    assert_eq!((breaker.state(), probes(&breaker).len()), (State::HalfOpen, 0));
    for probe in probing {
        probe.success();
    }
    assert_eq!(breaker.state(), State::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_failure_from_before_it_opened_does_not_count_once_it_has_closed() {
    let breaker = built(in_a_row(1).probes(1));
    let old = breaker.try_acquire().unwrap();
    fail(&breaker);
    advance(secs(5)).await;
    succeed(&breaker);
    assert_eq!(breaker.state(), State::Closed);
    old.failure();
    assert_eq!(breaker.state(), State::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_success_from_before_it_opened_is_not_counted_once_it_has_closed() {
    let breaker = built(by_rate().consecutive_failures(2).probes(1));
    let old: Vec<_> = (0..50).map(|_| breaker.try_acquire().unwrap()).collect();
    fail(&breaker);
    fail(&breaker);
    advance(secs(5)).await;
    succeed(&breaker);
    fail(&breaker);
    for guard in old {
        guard.success();
    }
    assert_eq!((breaker.counts().calls, breaker.counts().failures), (1, 1));
    fail(&breaker);
    assert_eq!(breaker.state(), State::Open, "nor does it break a row");
}

#[tokio::test(start_paused = true)]
async fn probes_of_an_earlier_half_open_state_do_not_count_in_a_later_one() {
    let breaker = half_open(in_a_row(1).probes(2).probe_failure_rate(0.5)).await;
    let (old, other) = (breaker.try_acquire().unwrap(), breaker.try_acquire().unwrap());
    other.failure();
    assert_eq!(breaker.state(), State::Open);
    advance(secs(10)).await;
    assert_eq!((breaker.state(), probes(&breaker).len()), (State::HalfOpen, 2));
    old.success();
    assert_eq!((breaker.state(), probes(&breaker).len()), (State::HalfOpen, 2));
}

#[tokio::test(start_paused = true)]
async fn probes_are_judged_by_ratio_as_soon_as_it_is_certain() {
    let four = || half_open(in_a_row(1).probes(4).probe_failure_rate(0.5));
    let breaker = four().await;
    fail(&breaker);
    succeed(&breaker);
    assert_eq!(breaker.state(), State::HalfOpen);
    fail(&breaker);
    assert_eq!(breaker.state(), State::Open, "two of four have failed");
    let breaker = four().await;
    fail(&breaker);
    succeed(&breaker);
    succeed(&breaker);
    assert_eq!(breaker.state(), State::HalfOpen);
    succeed(&breaker);
    assert_eq!(breaker.state(), State::Closed, "one of four");
    let breaker = four().await;
    for _ in 0..3 {
        assert_eq!(breaker.state(), State::HalfOpen);
        succeed(&breaker);
    }
    assert_eq!(breaker.state(), State::Closed, "the fourth can't change it");
}

#[tokio::test(start_paused = true)]
async fn a_rate_of_one_asks_every_probe_to_fail() {
    let breaker = half_open(in_a_row(1).probes(2).probe_failure_rate(1.0)).await;
    fail(&breaker);
    assert_eq!(breaker.state(), State::HalfOpen);
    succeed(&breaker);
    assert_eq!(breaker.state(), State::Closed);
}

#[tokio::test(start_paused = true)]
async fn the_smallest_rate_asks_every_probe_to_succeed() {
    let breaker = half_open(in_a_row(1).probes(3).probe_failure_rate(f64::MIN_POSITIVE)).await;
    succeed(&breaker);
    succeed(&breaker);
    fail(&breaker);
    assert_eq!(breaker.state(), State::Open);
}

/// C11: neither the closed window's counts nor its length matter.
#[tokio::test(start_paused = true)]
async fn half_open_counts_its_probes_and_nothing_else() {
    let breaker = built(by_rate().over(ms(1)).min_calls(100).probes(2).consecutive_failures(50));
    for _ in 0..50 {
        fail(&breaker);
    }
    advance(secs(5)).await;
    succeed(&breaker);
    advance(secs(20)).await;
    succeed(&breaker);
    assert_eq!(breaker.state(), State::Closed);
    assert_eq!((breaker.counts().calls, breaker.counts().failures), (0, 0), "closed, it starts from nothing");
}

#[tokio::test(start_paused = true)]
async fn a_slow_probe_is_no_good_sign_where_slow_calls_count() {
    let breaker = half_open(in_a_row(1).probes(1).slow_calls(ms(100), 0.5)).await;
    slowly(&breaker, ms(100)).await;
    assert_eq!(breaker.state(), State::Open);
    advance(secs(10)).await;
    slowly(&breaker, ms(99)).await;
    assert_eq!(breaker.state(), State::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_half_open_state_that_lasts_too_long_opens_again_as_of_when_it_was_due() {
    let breaker = half_open(in_a_row(1).probes(3).half_open_for(secs(30))).await;
    let _probe = breaker.try_acquire().unwrap();
    advance(secs(29)).await;
    assert_eq!(breaker.state(), State::HalfOpen);
    // Due at 30 s, noticed at 34 s; the second period is 10 s.
    advance(secs(5)).await;
    assert_eq!(breaker.state(), State::Open);
    assert_eq!(refusal(&breaker).retry_after(), Some(secs(6)));
    advance(secs(6)).await;
    assert_eq!(breaker.state(), State::HalfOpen);
}

#[tokio::test(start_paused = true)]
async fn an_expiry_that_nobody_noticed_in_time_costs_no_further_wait() {
    let (breaker, changes) = noting(in_a_row(1).half_open_for(secs(30)));
    fail(&breaker);
    advance(secs(5)).await;
    let _probe = breaker.try_acquire().unwrap();
    changes.lock().unwrap().clear();
    advance(secs(3600)).await;
    assert!(breaker.try_acquire().is_ok(), "long half open again");
    assert_eq!(*changes.lock().unwrap(), [(State::HalfOpen, State::Open), (State::Open, State::HalfOpen)]);
}

#[tokio::test(start_paused = true)]
async fn half_open_waits_for_its_first_probe_as_long_as_it_takes() {
    let breaker = half_open(in_a_row(1)).await;
    advance(secs(86_400)).await;
    assert_eq!((breaker.state(), probes(&breaker).len()), (State::HalfOpen, 3));
}

/// Trap: probes further apart than the window left neither permits nor a verdict.
#[tokio::test(start_paused = true)]
async fn probes_that_come_far_apart_never_wedge_it() {
    for apart in [1, 20, 29, 31, 59, 61, 300] {
        let breaker = half_open(by_rate().over(secs(1)).probes(3)).await;
        let start = Instant::now();
        while start.elapsed() < secs(7200) && breaker.state() != State::Closed {
            if let Ok(guard) = breaker.try_acquire() {
                guard.success();
            }
            advance(secs(apart)).await;
        }
        assert_eq!(breaker.state(), State::Closed, "{apart} s apart");
        assert!(breaker.try_acquire().is_ok());
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Callers who give up

/// A rival counted each as a failure, and opened.
#[tokio::test(start_paused = true)]
async fn callers_who_give_up_on_a_healthy_peer_do_not_open_it() {
    let breaker = built(in_a_row(5));
    let policy = gated(&breaker);
    let healthy = || async {
        sleep(ms(50)).await;
        Ok::<_, Infallible>(())
    };
    for _ in 0..5 {
        let token = CancellationToken::new();
        let (cancelled, ()) = futures::future::join(policy.call().cancel_on(&token).run(healthy), async {
            sleep(ms(10)).await;
            token.cancel();
        })
        .await;
        assert!(cancelled.unwrap_err().is_cancelled());
        assert!(policy.call().deadline(ms(10)).run(healthy).await.unwrap_err().is_timeout());
        let mut dropped = Box::pin(policy.run(healthy));
        assert!(poll_immediate(dropped.as_mut()).await.is_none());
        advance(ms(10)).await;
        drop(dropped);
        let guard = breaker.try_acquire().unwrap();
        advance(ms(10)).await;
        drop(guard);
    }
    assert_eq!(breaker.state(), State::Closed);
    assert_eq!(breaker.counts().calls, 0);
}

/// C8: a peer that hangs must not stay unseen because every caller gives up before it answers.
#[tokio::test(start_paused = true)]
async fn callers_who_give_up_on_a_peer_that_hangs_open_it() {
    let breakers = || (in_a_row(5), by_rate().min_calls(5));
    for builder in [breakers().0, breakers().1] {
        let breaker = built(builder);
        let policy = gated(&breaker);
        for call in 0..5 {
            assert_eq!(breaker.state(), State::Closed, "after {call}");
            let hangs = pending::<Result<(), ()>>;
            match call % 3 {
                0 => assert!(policy.call().deadline(secs(2)).run(hangs).await.unwrap_err().is_timeout()),
                1 => {
                    let mut dropped = Box::pin(policy.run(hangs));
                    assert!(poll_immediate(dropped.as_mut()).await.is_none());
                    advance(secs(2)).await;
                    drop(dropped);
                }
                _ => {
                    let token = CancellationToken::new();
                    let mut run = pin!(policy.call().cancel_on(&token).run(hangs));
                    assert!(poll_immediate(run.as_mut()).await.is_none());
                    advance(secs(2)).await;
                    token.cancel();
                    assert!(run.await.unwrap_err().is_cancelled());
                }
            }
        }
        assert_eq!(breaker.state(), State::Open);
    }
}

#[tokio::test(start_paused = true)]
async fn what_counts_as_given_up_late_is_the_slow_threshold_or_a_setting_or_a_second() {
    let cases = [
        (in_a_row(1), secs(1)),
        (in_a_row(1).slow_calls(ms(200), 1.0), ms(200)),
        (in_a_row(1).slow_calls(ms(200), 1.0).abandoned_after(secs(3)), secs(3)),
        (in_a_row(1).abandoned_after(ms(50)), ms(50)),
    ];
    for (builder, after) in cases {
        let breaker = built(builder);
        let guard = breaker.try_acquire().unwrap();
        advance(after.saturating_sub(Duration::from_nanos(1))).await;
        drop(guard);
        assert_eq!(breaker.state(), State::Closed, "{after:?}");
        let guard = breaker.try_acquire().unwrap();
        advance(after).await;
        drop(guard);
        assert_eq!(breaker.state(), State::Open, "{after:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn time_in_a_queue_does_not_count_as_given_up_late() {
    let breaker = built(in_a_row(1));
    let semaphore = Semaphore::permits(1).build().unwrap();
    let held = semaphore.try_acquire().unwrap();
    let policy = Policy::named("queue").gate(breaker.clone()).gate(semaphore).build().unwrap();
    let mut queued = Box::pin(policy.run(pending::<Result<(), ()>>));
    assert!(poll_immediate(queued.as_mut()).await.is_none());
    advance(secs(60)).await;
    drop(held);
    assert!(poll_immediate(queued.as_mut()).await.is_none());
    drop(queued);
    assert_eq!(breaker.state(), State::Closed);
}

/// C9: only the caller's own limit means that he gave up; the policy's says that the peer is too slow.
#[tokio::test(start_paused = true)]
async fn a_limit_of_the_policy_that_cuts_the_operation_is_a_failure() {
    let breaker = built(in_a_row(1));
    let policy = Policy::named("cut").gate(breaker.clone()).timeout(ms(10)).build().unwrap();
    assert!(policy.run(pending::<Result<(), ()>>).await.unwrap_err().is_timeout());
    assert_eq!(breaker.state(), State::Open);
}

#[tokio::test(start_paused = true)]
async fn a_probe_given_up_late_counts_as_failed() {
    let breaker = half_open(in_a_row(1).probes(1)).await;
    let probe = breaker.try_acquire().unwrap();
    advance(secs(1)).await;
    drop(probe);
    assert_eq!(breaker.state(), State::Open);
}

// ---------------------------------------------------------------------------------------------------------------------
// From a queue

/// Trap: a queued caller reached the peer after its circuit had opened.
#[tokio::test(start_paused = true)]
async fn nobody_walks_from_a_queue_into_a_peer_whose_circuit_has_opened() {
    let breaker = built(in_a_row(1));
    let semaphore = Semaphore::permits(1).build().unwrap();
    let policy = Policy::named("queue").gate(breaker.clone()).gate(semaphore.clone()).build().unwrap();
    let held = semaphore.try_acquire().unwrap();
    let made = Cell::new(0);
    let mut queued = pin!(policy.run(|| {
        made.set(made.get() + 1);
        ready(Ok::<_, ()>(()))
    }));
    assert!(poll_immediate(queued.as_mut()).await.is_none());
    fail(&breaker);
    advance(secs(2)).await;
    drop(held);
    let error = queued.await.unwrap_err();
    assert_eq!(error.refusal().unwrap().reason(), Reason::CircuitOpen);
    assert_eq!((error.retry_after(), error.attempts(), made.get()), (Some(secs(3)), 0, 0));
    assert_eq!(semaphore.available(), 1);
}

#[tokio::test(start_paused = true)]
async fn nobody_walks_from_a_pause_into_a_peer_whose_circuit_has_opened() {
    let breaker = built(in_a_row(1));
    let retry = Retry::constant(secs(1));
    let policy = Policy::named("pause").gate(breaker.clone()).retry(retry).build().unwrap();
    let mut run = pin!(policy.run(|| ready(Err::<(), _>("reset"))));
    assert!(poll_immediate(run.as_mut()).await.is_none());
    fail(&breaker);
    let error = run.await.unwrap_err();
    assert_eq!(error.refusal().unwrap().reason(), Reason::CircuitOpen);
    assert_eq!((error.attempts(), error.into_inner()), (1, Some("reset")));
}

#[tokio::test(start_paused = true)]
async fn who_waited_while_it_opened_and_closed_again_may_go_on() {
    let breaker = built(in_a_row(1).probes(1));
    let semaphore = Semaphore::permits(1).build().unwrap();
    let policy = Policy::named("queue").gate(breaker.clone()).gate(semaphore.clone()).build().unwrap();
    let held = semaphore.try_acquire().unwrap();
    let mut queued = pin!(policy.run(|| ready(Ok::<_, ()>(()))));
    assert!(poll_immediate(queued.as_mut()).await.is_none());
    fail(&breaker);
    advance(secs(5)).await;
    succeed(&breaker);
    assert_eq!(breaker.state(), State::Closed);
    drop(held);
    queued.await.unwrap();
}

/// Whatever its state, what a queued caller is told is not to come back at once.
#[tokio::test(start_paused = true)]
async fn who_waited_while_it_became_half_open_is_no_probe() {
    let breaker = built(in_a_row(1).probes(1));
    let semaphore = Semaphore::permits(1).build().unwrap();
    let policy = Policy::named("queue").gate(breaker.clone()).gate(semaphore.clone()).build().unwrap();
    for with_probe in [false, true] {
        breaker.reset();
        let held = semaphore.try_acquire().unwrap();
        let mut queued = Box::pin(policy.run(|| ready(Ok::<_, ()>(()))));
        assert!(poll_immediate(queued.as_mut()).await.is_none());
        fail(&breaker);
        advance(secs(5)).await;
        let probe = with_probe.then(|| breaker.try_acquire().unwrap());
        drop(held);
        let error = queued.await.unwrap_err();
        assert_eq!(error.refusal().unwrap().reason(), Reason::Probing);
        assert_ne!(error.retry_after(), Some(Duration::ZERO));
        drop(probe);
        assert_eq!(probes(&breaker).len(), 1, "it took no probe's place");
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// By hand

#[tokio::test(start_paused = true)]
async fn forced_open_it_refuses_until_somebody_says_otherwise() {
    let breaker = built(in_a_row(1));
    breaker.force_open();
    for _ in 0..5 {
        let refusal = refusal(&breaker);
        assert_eq!((refusal.reason(), refusal.retry_after()), (Reason::ForcedOpen, None));
        advance(secs(86_400)).await;
        assert_eq!(breaker.state(), State::ForcedOpen);
    }
    breaker.reset();
    assert_eq!(breaker.state(), State::Closed);
    succeed(&breaker);
}

#[tokio::test(start_paused = true)]
async fn forced_closed_it_lets_everything_through_uncounted() {
    let breaker = built(in_a_row(1));
    breaker.force_closed();
    for _ in 0..100 {
        fail(&breaker);
    }
    assert_eq!(breaker.state(), State::ForcedClosed);
    breaker.reset();
    assert_eq!((breaker.state(), breaker.counts().failures), (State::Closed, 0));
}

/// C12: a period that ends after that is of an older state.
#[tokio::test(start_paused = true)]
async fn what_was_due_before_it_was_forced_does_not_happen() {
    let breaker = built(in_a_row(1));
    fail(&breaker);
    breaker.force_open();
    advance(secs(60)).await;
    assert_eq!(breaker.state(), State::ForcedOpen);

    let breaker = half_open(in_a_row(1).half_open_for(secs(10))).await;
    let probe = breaker.try_acquire().unwrap();
    breaker.force_closed();
    advance(secs(60)).await;
    assert_eq!(breaker.state(), State::ForcedClosed);
    probe.failure();
    assert_eq!(breaker.state(), State::ForcedClosed);
}

/// C12, C6.
#[tokio::test(start_paused = true)]
async fn what_was_on_its_way_before_a_reset_does_not_count_after_it() {
    let breaker = built(in_a_row(1));
    let closed = breaker.try_acquire().unwrap();
    breaker.force_closed();
    let forced = breaker.try_acquire().unwrap();
    breaker.reset();
    closed.failure();
    forced.failure();
    assert_eq!(breaker.state(), State::Closed);
    let closed = breaker.try_acquire().unwrap();
    breaker.reset();
    closed.failure();
    assert_eq!(breaker.state(), State::Closed, "also where the state did not change");
}

#[tokio::test(start_paused = true)]
async fn a_reset_forgets_what_was_counted() {
    for builder in [by_rate(), by_rate().over_calls(10), in_a_row(4)] {
        let breaker = built(builder);
        for _ in 0..3 {
            fail(&breaker);
        }
        breaker.reset();
        assert_eq!((breaker.counts().calls, breaker.counts().failures), (0, 0));
        for _ in 0..3 {
            fail(&breaker);
            assert_eq!(breaker.state(), State::Closed, "what failed before the reset is forgotten");
        }
        fail(&breaker);
        assert_eq!(breaker.state(), State::Open);
    }
}

#[tokio::test(start_paused = true)]
async fn a_reset_closes_it_from_every_state() {
    let breaker = built(in_a_row(1));
    fail(&breaker);
    breaker.reset();
    assert_eq!(breaker.state(), State::Closed);
    let breaker = half_open(in_a_row(1)).await;
    breaker.reset();
    assert_eq!(breaker.state(), State::Closed);
    succeed(&breaker);
}

#[tokio::test(start_paused = true)]
async fn an_observer_refuses_nothing_and_says_what_it_would_have() {
    let (breaker, changes) = noting(in_a_row(2).probes(1).observe_only());
    let policy = gated(&breaker);
    for _ in 0..10 {
        let error = policy.run(|| ready(Err::<(), _>("down"))).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Failed);
    }
    assert_eq!((breaker.state(), breaker.counts().would_refuse), (State::Open, 8));
    advance(secs(5)).await;
    let _probe = breaker.try_acquire().unwrap();
    succeed(&breaker);
    assert_eq!((breaker.state(), breaker.counts().would_refuse), (State::HalfOpen, 9));
    assert_eq!(*changes.lock().unwrap(), [(State::Closed, State::Open), (State::Open, State::HalfOpen)]);
}

#[tokio::test(start_paused = true)]
async fn an_observer_lets_nobody_out_of_a_queue_down() {
    let breaker = built(in_a_row(1).observe_only());
    let semaphore = Semaphore::permits(1).build().unwrap();
    let policy = Policy::named("queue").gate(breaker.clone()).gate(semaphore.clone()).build().unwrap();
    let held = semaphore.try_acquire().unwrap();
    let mut queued = pin!(policy.run(|| ready(Ok::<_, ()>(()))));
    assert!(poll_immediate(queued.as_mut()).await.is_none());
    fail(&breaker);
    drop(held);
    queued.await.unwrap();
}

// ---------------------------------------------------------------------------------------------------------------------
// Listeners and waiting

#[tokio::test(start_paused = true)]
async fn a_listener_hears_each_change_once_and_in_order() {
    use State::{Closed, ForcedClosed, ForcedOpen, HalfOpen, Open};
    let (breaker, changes) = noting(in_a_row(1).probes(1));
    fail(&breaker);
    advance(secs(5)).await;
    fail(&breaker);
    advance(secs(10)).await;
    succeed(&breaker);
    breaker.force_open();
    breaker.force_open();
    breaker.force_closed();
    breaker.reset();
    breaker.reset();
    let expected = [
        (Closed, Open),
        (Open, HalfOpen),
        (HalfOpen, Open),
        (Open, HalfOpen),
        (HalfOpen, Closed),
        (Closed, ForcedOpen),
        (ForcedOpen, ForcedClosed),
        (ForcedClosed, Closed),
    ];
    assert_eq!(*changes.lock().unwrap(), expected);
}

/// C7.
#[test]
fn threads_that_cross_the_threshold_together_cause_one_change() {
    for _ in 0..50 {
        let (breaker, changes) = noting(in_a_row(4).open_for(secs(3600)).max_open_for(secs(3600)));
        let together = Barrier::new(4);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let guards: Vec<_> = (0..50).map(|_| breaker.try_acquire().unwrap()).collect();
                    together.wait();
                    guards.into_iter().for_each(Guard::failure);
                });
            }
        });
        assert_eq!(*changes.lock().unwrap(), [(State::Closed, State::Open)]);
    }
}

/// C13: called with no lock held.
#[tokio::test(start_paused = true)]
async fn a_listener_may_call_back() {
    let slot: Arc<OnceLock<CircuitBreaker>> = Arc::default();
    let heard = Arc::new(Mutex::new(Vec::new()));
    let breaker = {
        let (slot, heard) = (Arc::clone(&slot), Arc::clone(&heard));
        built(in_a_row(1).on_change(move |from, to| {
            let breaker = slot.get().unwrap();
            heard.lock().unwrap().push((from, to));
            let _ = (breaker.state(), breaker.counts(), breaker.try_acquire().map(Guard::failure));
            if to == State::Open {
                breaker.force_open();
            }
        }))
    };
    slot.set(breaker.clone()).unwrap();
    fail(&breaker);
    assert_eq!(breaker.state(), State::ForcedOpen);
    assert_eq!(*heard.lock().unwrap(), [(State::Closed, State::Open), (State::Open, State::ForcedOpen)]);
}

#[tokio::test(start_paused = true)]
async fn a_listener_that_panics_breaks_nothing() {
    let breaker = built(in_a_row(1).probes(1).on_change(|_, to| assert!(to != State::Open, "boom")));
    assert!(catch_unwind(AssertUnwindSafe(|| fail(&breaker))).is_err());
    assert_eq!(breaker.state(), State::Open);
    advance(secs(5)).await;
    succeed(&breaker);
    assert_eq!(breaker.state(), State::Closed);
}

#[tokio::test(start_paused = true)]
async fn waiting_for_a_state_ends_when_somebody_causes_it() {
    let breaker = built(in_a_row(1));
    breaker.wait_for(State::Closed).await;
    let waiting: Vec<_> = (0..3)
        .map(|_| {
            tokio::spawn({
                let breaker = breaker.clone();
                async move { breaker.wait_for(State::Open).await }
            })
        })
        .collect();
    tokio::task::yield_now().await;
    assert!(waiting.iter().all(|task| !task.is_finished()));
    fail(&breaker);
    for task in waiting {
        task.await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn waiting_for_a_state_ends_when_the_clock_causes_it() {
    let breaker = built(in_a_row(1));
    fail(&breaker);
    let start = Instant::now();
    breaker.wait_for(State::HalfOpen).await;
    assert_eq!(start.elapsed(), secs(5));
    let _probe = breaker.try_acquire().unwrap();
    breaker.wait_for(State::Open).await;
    assert_eq!(start.elapsed(), secs(65));
}

/// The end of half-open is not known before its first probe; who began to wait earlier must hear of it all the same.
#[tokio::test(start_paused = true)]
async fn waiting_for_the_end_of_half_open_may_begin_before_its_first_probe() {
    let breaker = half_open(in_a_row(1).half_open_for(secs(30))).await;
    let waiting = tokio::spawn({
        let breaker = breaker.clone();
        async move { breaker.wait_for(State::Open).await }
    });
    tokio::task::yield_now().await;
    let probe = breaker.try_acquire().unwrap();
    sleep(secs(31)).await;
    assert!(waiting.is_finished(), "the half-open state was over a second ago");
    drop(probe);
}

#[tokio::test(start_paused = true)]
async fn waiting_that_is_dropped_leaves_nothing_behind() {
    let breaker = built(in_a_row(1));
    for _ in 0..10 {
        let mut waiting = Box::pin(breaker.wait_for(State::Open));
        assert!(poll_immediate(waiting.as_mut()).await.is_none());
        drop(waiting);
    }
    fail(&breaker);
    assert_eq!(breaker.state(), State::Open);
}

#[tokio::test(start_paused = true)]
async fn clones_and_policies_share_the_state() {
    let breaker = built(in_a_row(2));
    let (one, two) = (gated(&breaker), gated(&breaker.clone()));
    let _ = one.run(|| ready(Err::<(), ()>(()))).await;
    let _ = two.run(|| ready(Err::<(), ()>(()))).await;
    assert!(one.run(|| ready(Ok::<_, ()>(()))).await.unwrap_err().is_refused());
}

/// A gate outside of the breaker hears that nothing was started when the breaker refuses.
#[tokio::test(start_paused = true)]
async fn gates_outside_of_an_open_circuit_are_left_without_a_verdict() {
    #[derive(Clone, Default)]
    struct Notes(Arc<Mutex<Vec<Outcome>>>);
    impl Gate for Notes {
        fn enter(&self, _: &Call) -> Entry {
            Entry::Pass(Pass::default())
        }
        fn leave(&self, _: Pass, outcome: Outcome) {
            self.0.lock().unwrap().push(outcome);
        }
    }
    let (notes, breaker) = (Notes::default(), built(in_a_row(1)));
    let policy = Policy::named("outside").gate(notes.clone()).gate(breaker.clone()).build().unwrap();
    fail(&breaker);
    let _ = policy.run(|| ready(Ok::<_, ()>(()))).await;
    assert_eq!(*notes.0.lock().unwrap(), [Outcome::NotStarted]);
}

#[derive(Clone, Debug)]
enum Op {
    Wait(u64),
    Come,
    End(usize, u8),
    Force(bool),
    Reset,
    Look,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0_u64..20_000).prop_map(Op::Wait),
        8 => Just(Op::Come),
        8 => (any::<usize>(), 0_u8..5).prop_map(|(which, how)| Op::End(which, how)),
        1 => any::<bool>().prop_map(Op::Force),
        1 => Just(Op::Reset),
        2 => Just(Op::Look),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Laws: changes follow the arrows and each begins where the one before ended; advice is never to come back at
    /// once, and following it helps; half-open never has more inside than its probes; a refusal moves nothing.
    #[test]
    fn whatever_happens_the_breaker_keeps_its_laws(
        ops in proptest::collection::vec(op(), 0..150),
        count in 1_u32..5,
        row in 1_u32..4,
        jitter in 0.0..1.0_f64,
        seed: u64,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let builder = CircuitBreaker::builder().consecutive_failures(row).probes(count).open_jitter(jitter).seed(seed);
            let (breaker, changes) = noting(builder);
            let out: RefCell<Vec<(Guard, usize)>> = RefCell::default();
            for op in ops {
                let forced = matches!(op, Op::Force(_) | Op::Reset);
                let before = changes.lock().unwrap().len();
                match op {
                    Op::Wait(time) => advance(ms(time)).await,
                    Op::Come => match breaker.try_acquire() {
                        Ok(guard) => {
                            let era = changes.lock().unwrap().len();
                            out.borrow_mut().push((guard, era));
                            if breaker.state() == State::HalfOpen {
                                let probing = out.borrow().iter().filter(|(_, other)| *other == era).count();
                                // Those whose lease is over may still be here, at most one more round for each.
                                prop_assert!(probing as u32 <= count * 3, "{probing} probes");
                            }
                        }
                        Err(refusal) => {
                            let era = changes.lock().unwrap().len();
                            if let Some(after) = refusal.retry_after() {
                                prop_assert!(after > Duration::ZERO);
                            }
                            prop_assert!(breaker.try_acquire().is_err());
                            prop_assert_eq!(changes.lock().unwrap().len(), era);
                        }
                    },
                    Op::End(which, how) if !out.borrow().is_empty() => {
                        let count = out.borrow().len();
                        let (guard, _) = out.borrow_mut().swap_remove(which % count);
                        match how {
                            0 => drop(guard),
                            1 => guard.ignore(),
                            2 => guard.success(),
                            _ => guard.failure(),
                        }
                    }
                    Op::End(..) => {}
                    Op::Force(true) => breaker.force_open(),
                    Op::Force(false) => breaker.force_closed(),
                    Op::Reset => breaker.reset(),
                    Op::Look => assert_eq!(breaker.state(), breaker.state()),
                }
                let changes = changes.lock().unwrap();
                for pair in changes.windows(2) {
                    prop_assert_eq!(pair[0].1, pair[1].0);
                }
                for change in &changes[before..] {
                    use State::{Closed, HalfOpen, Open};
                    let legal = matches!(change, (Closed, Open) | (Open, HalfOpen) | (HalfOpen, Open | Closed));
                    prop_assert!(legal || forced, "{:?}", change);
                }
            }
            Ok(())
        })?;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Shares that no float holds, listeners in order, another runtime's clock

#[tokio::test(start_paused = true)]
async fn a_rate_is_reached_by_exactly_the_count_that_it_stands_for() {
    for percent in 1..=100 {
        let rate = f64::from(percent) / 100.0;
        let breaker = built(CircuitBreaker::builder().failure_rate(rate).over_calls(100).min_calls(100));
        let slow = built(CircuitBreaker::builder().slow_calls(ms(10), rate).over_calls(100).min_calls(100));
        for breaker in [&breaker, &slow] {
            (percent..100).for_each(|_| breaker.try_acquire().unwrap().success());
        }
        for count in 1..=percent {
            for breaker in [&breaker, &slow] {
                assert_eq!(breaker.state(), State::Closed, "{} of {percent} %", count - 1);
            }
            breaker.try_acquire().unwrap().failure();
            let guard = slow.try_acquire().unwrap();
            advance(ms(10)).await;
            guard.success();
        }
        assert_eq!((breaker.state(), slow.state()), (State::Open, State::Open), "{percent} %");
    }
}

#[tokio::test(start_paused = true)]
async fn a_probe_rate_is_reached_by_exactly_the_count_that_it_stands_for() {
    for percent in 1..=100_u32 {
        let builder = in_a_row(1).probes(100).probe_failure_rate(f64::from(percent) / 100.0);
        let breaker = half_open(builder).await;
        for count in 1..=percent {
            assert_eq!(breaker.state(), State::HalfOpen, "{} of {percent} %", count - 1);
            breaker.try_acquire().unwrap().failure();
        }
        assert_eq!(breaker.state(), State::Open, "{percent} %");
    }
}

/// One call a minute at a healthy peer was refused every second time, for ever.
#[tokio::test(start_paused = true)]
async fn a_peer_with_few_calls_that_go_well_closes_its_circuit() {
    let breaker = half_open(in_a_row(1)).await;
    for _ in 0..3 {
        breaker.try_acquire().unwrap().success();
        advance(secs(61)).await;
    }
    assert_eq!(breaker.state(), State::Closed);
}

/// A thread that has changed the state tells of it late, and another one has changed it meanwhile.
#[test]
fn the_last_change_that_a_listener_hears_is_the_last_one() {
    use std::sync::mpsc::channel;

    let ((slow, is_slow), (go, may_go)) = (channel(), channel());
    let (slow, may_go) = (Mutex::new(slow), Mutex::new(may_go));
    let heard = Arc::new(Mutex::new(Vec::new()));
    let log = heard.clone();
    let breaker = in_a_row(1).on_change(move |_, to| {
        if to == State::Open {
            slow.lock().unwrap().send(()).unwrap();
            may_go.lock().unwrap().recv().unwrap();
        }
        log.lock().unwrap().push(to);
    });
    let breaker = built(breaker);
    let fails = std::thread::spawn({
        let breaker = breaker.clone();
        move || breaker.try_acquire().unwrap().failure()
    });
    is_slow.recv().unwrap();
    breaker.reset();
    go.send(()).unwrap();
    fails.join().unwrap();
    assert_eq!(breaker.state(), State::Closed);
    assert_eq!(*heard.lock().unwrap(), [State::Open, State::Closed]);
}

#[test]
fn a_change_that_a_listener_makes_is_told_after_it_and_a_panic_hides_none() {
    let heard = Arc::new(Mutex::new(Vec::new()));
    let (log, own) = (heard.clone(), Arc::new(Mutex::new(None::<CircuitBreaker>)));
    let inner = own.clone();
    let breaker = built(in_a_row(1).on_change(move |_, to| {
        log.lock().unwrap().push(to);
        let breaker = inner.lock().unwrap().take();
        if let Some(breaker) = breaker {
            breaker.reset();
            assert_eq!(log.lock().unwrap().len(), 1, "not within itself");
            std::panic::panic_any(support::script::Boom);
        }
    }));
    *own.lock().unwrap() = Some(breaker.clone());
    assert!(support::hand::catch_boom(|| breaker.force_open()).is_none());
    assert_eq!(*heard.lock().unwrap(), [State::ForcedOpen, State::Closed]);
    breaker.force_closed();
    assert_eq!(heard.lock().unwrap().len(), 3);
}

/// Tests of one process share a breaker in a static, each on a clock of its own.
#[test]
fn a_breaker_that_a_runtime_far_ahead_has_opened_is_half_open_within_a_period_elsewhere() {
    let (ahead, behind) = (support::hand::Clock::paused(), support::hand::Clock::paused());
    let breaker = built(in_a_row(1).open_for(secs(2)).max_open_for(secs(5)).open_jitter(0.0));
    ahead.advance(secs(3600));
    ahead.block_on(async { breaker.try_acquire().unwrap().failure() });
    behind.block_on(async {
        let refusal = breaker.try_acquire().unwrap_err();
        assert!(refusal.retry_after().unwrap() <= secs(5));
        advance(secs(5)).await;
        breaker.try_acquire().unwrap().success();
    });
}

/// The clock is read again when a call ends that had an operation ready in its first poll, if a rule asks for its time.
#[tokio::test(start_paused = true)]
async fn an_operation_that_blocks_in_its_only_poll_is_slow() {
    let breaker = built(five_seconds().slow_calls(ms(100), 0.5).min_calls(2));
    let policy = Policy::named("blocking").gate(breaker.clone()).build().unwrap();
    for _ in 0..2 {
        let call = policy.run(|| async {
            poll_immediate(pin!(advance(ms(100)))).await;
            Ok::<_, ()>(())
        });
        call.await.unwrap();
    }
    assert_eq!(breaker.state(), State::Open);
}

#[tokio::test(start_paused = true)]
async fn an_abandoned_call_is_slow_from_the_slow_threshold_on() {
    for (lasted, state) in [(99, State::Closed), (100, State::Open)] {
        // Two abandoned calls are failures; whether they were slow, too, is the question.
        let rates = five_seconds().failure_rate(1.0).slow_calls(ms(100), 0.5).abandoned_after(ms(50));
        let breaker = built(rates.min_calls(4));
        for _ in 0..2 {
            succeed(&breaker);
        }
        let policy = Policy::named("slow").gate(breaker.clone()).build().unwrap();
        for _ in 0..2 {
            let call = policy.call().deadline(ms(lasted)).run(pending::<Result<(), ()>>);
            call.await.unwrap_err();
        }
        assert_eq!(breaker.state(), state, "after {lasted} ms");
    }
}

/// Good calls that come back in another generation than the first must count, or the share of the bad ones is wrong.
#[tokio::test(start_paused = true)]
async fn after_it_has_closed_again_good_calls_count_as_before() {
    let breaker = built(by_rate().probes(1));
    for _ in 0..4 {
        fail(&breaker);
    }
    advance(secs(5)).await;
    succeed(&breaker);
    assert_eq!((breaker.state(), breaker.counts().calls), (State::Closed, 0));
    for end in [succeed, succeed, fail, fail] {
        end(&breaker);
    }
    assert_eq!(breaker.state(), State::Open, "two of four failed");
    let breaker = built(in_a_row(2).probes(1));
    fail(&breaker);
    fail(&breaker);
    advance(secs(5)).await;
    succeed(&breaker);
    fail(&breaker);
    succeed(&breaker);
    fail(&breaker);
    assert_eq!(breaker.state(), State::Closed, "not two in a row");
}

/// Asks a breaker, as the gates do in front of which a queue stands, without entering it.
#[derive(Debug)]
struct Asks(CircuitBreaker);

impl Gate for Asks {
    fn enter(&self, call: &Call) -> Entry {
        self.0.look(call).map_or_else(Entry::Refused, |()| Entry::Pass(Pass::new(0, 0)))
    }

    fn leave(&self, _: Pass, _: Outcome) {}
}

#[tokio::test(start_paused = true)]
async fn looking_at_a_breaker_tells_whether_it_would_let_in_and_takes_no_place() {
    let asks = |breaker: &CircuitBreaker| {
        let policy = Policy::named("asks").gate(Asks(breaker.clone())).build().unwrap();
        async move {
            let end = policy.run(|| ready(Ok::<_, ()>(()))).await;
            end.err().and_then(|error| error.refusal().map(|refusal| (refusal.reason(), refusal.retry_after())))
        }
    };
    let breaker = built(in_a_row(1).probes(1));
    assert_eq!(asks(&breaker).await, None);
    fail(&breaker);
    assert_eq!(asks(&breaker).await, Some((Reason::CircuitOpen, Some(secs(5)))));
    advance(secs(5)).await;
    assert_eq!(asks(&breaker).await, None);
    assert_eq!(breaker.state(), State::HalfOpen, "the period is over");
    let probe = breaker.try_acquire().unwrap();
    assert_eq!(asks(&breaker).await.unwrap().0, Reason::Probing);
    probe.success();
    assert_eq!(asks(&breaker).await, None);
    breaker.force_open();
    assert_eq!(asks(&breaker).await, Some((Reason::ForcedOpen, None)));
    breaker.force_closed();
    assert_eq!(asks(&breaker).await, None);
    let watches = built(in_a_row(1).observe_only());
    fail(&watches);
    assert_eq!((watches.state(), asks(&watches).await), (State::Open, None));
}

#[test]
fn a_breaker_draws_its_rules() {
    let drawn = |builder: BreakerBuilder| built(builder).to_string();
    assert_eq!(drawn(by_rate()), "breaker 50 % of 4 in 16s");
    assert_eq!(drawn(in_a_row(3)), "breaker 3 in a row");
    assert_eq!(
        drawn(in_a_row(3).failure_rate(0.25).over_calls(40).slow_calls(ms(200), 0.5)),
        "breaker 3 in a row or 25 % of the last 40 or 50 % above 200ms of the last 40"
    );
    assert_eq!(
        drawn(five_seconds().consecutive_failures(9).slow_calls(ms(200), 0.5).over_calls(8)),
        "breaker 9 in a row or 50 % above 200ms of the last 8"
    );
    assert_eq!(drawn(by_rate().slow_calls(ms(200), 0.5)), "breaker 50 % of 4 in 16s or 50 % above 200ms of 4 in 16s");
}

/// Nothing but a change ends this wait, so it needs no timer, which would move a paused clock by centuries.
#[test]
fn waiting_for_a_state_that_no_clock_brings_needs_no_timer() {
    let breaker = built(in_a_row(1));
    let mut waits = Box::pin(breaker.wait_for(State::Open));
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    assert!(waits.as_mut().poll(&mut cx).is_pending());
    breaker.force_open();
    let mut waits = Box::pin(breaker.wait_for(State::Closed));
    assert!(waits.as_mut().poll(&mut cx).is_pending());
}
