//! Retry budgets: how many retries many calls get together, in both styles.

mod support;

use std::cell::Cell;
use std::convert::Infallible;
use std::future::{pending, ready};
use std::pin::pin;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::{join_all, poll_immediate};
use proptest::prelude::*;
use resile::{
    Call, Entry, Error, ErrorKind, Gate, OnRefusal, Outcome, Pass, Policy, Reason, Refusal, Retry, RetryBudget,
    Semaphore, Stop, Verdict,
};
use support::hand::Clock;
use tokio::time::{Instant, advance, sleep};
use tokio_util::sync::CancellationToken;

const fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

const fn secs(count: u64) -> Duration {
    Duration::from_secs(count)
}

/// Without a reserve, so that every retry has to be earned.
fn earned(ratio: f64) -> RetryBudget {
    RetryBudget::ratio(ratio).reserve_per_second(0).build().unwrap()
}

/// So many retries in ten seconds, and none are earned.
fn reserve(per_second: u32) -> RetryBudget {
    RetryBudget::ratio(0.0).reserve_per_second(per_second).build().unwrap()
}

fn share(share: f64, floor: u32) -> RetryBudget {
    RetryBudget::share(share).floor(floor).build().unwrap()
}

fn policy(retry: Retry, budget: &RetryBudget) -> Policy {
    Policy::named("budgeted").retry(retry.budget(budget.clone())).build().unwrap()
}

async fn succeed(policy: &Policy, calls: u32) {
    for _ in 0..calls {
        policy.run(|| ready(Ok::<_, Infallible>(()))).await.unwrap();
    }
}

async fn fail(policy: &Policy) -> Error<&'static str> {
    policy.run(|| ready(Err::<(), _>("down"))).await.unwrap_err()
}

/// How many retries so many failing calls get.
async fn retries(policy: &Policy, calls: u32) -> u32 {
    let mut retries = 0;
    for _ in 0..calls {
        retries += fail(policy).await.attempts() - 1;
    }
    retries
}

/// B2: a ratio that became an integer price gave 10,000 for 0.75, 5,000 for 0.4 and 3,333 for 0.3 in 10,000.
#[tokio::test(start_paused = true)]
async fn calls_that_went_well_earn_exactly_their_fraction_of_retries() {
    for (ratio, expected) in [(0.1, 100), (0.3, 300), (0.4, 400), (0.75, 750), (1.0, 1000), (2.0, 2000)] {
        let budget = earned(ratio);
        let policy = policy(Retry::immediate().max_attempts(2), &budget);
        succeed(&policy, 1000).await;
        assert_eq!(budget.available(), expected.into());
        assert_eq!(retries(&policy, 2500).await, expected, "{ratio}");
        assert_eq!(budget.available(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_fraction_below_one_retry_is_kept_until_it_is_one() {
    let budget = earned(0.3);
    let policy = policy(Retry::immediate().max_attempts(2), &budget);
    for expected in [0, 0, 0, 1, 0, 0, 1] {
        succeed(&policy, 1).await;
        assert_eq!(retries(&policy, 1).await, expected);
    }
}

#[tokio::test(start_paused = true)]
async fn an_outage_is_not_multiplied() {
    let budget = RetryBudget::ratio(0.1).build().unwrap();
    let policy = policy(Retry::immediate().max_attempts(4), &budget);
    succeed(&policy, 500).await;
    // Ten a second over ten seconds are in reserve, and a tenth of 500 has been earned.
    assert_eq!(retries(&policy, 1000).await, 150, "instead of 3000");
}

#[tokio::test(start_paused = true)]
async fn a_long_outage_gets_its_reserve_and_no_more() {
    let budget = RetryBudget::ratio(0.1).reserve_per_second(1).build().unwrap();
    let policy = policy(Retry::immediate().max_attempts(4), &budget);
    let mut made = 0;
    for _ in 0..600 {
        made += retries(&policy, 10).await;
        advance(ms(100)).await;
    }
    // One a second for a minute, and the ten that may be spent at once at the beginning.
    assert!((60..=70).contains(&made), "{made} retries for 6000 failed calls");
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_fails_now_and_then_has_all_its_failures_retried() {
    let budget = earned(0.2);
    let policy = policy(Retry::immediate(), &budget);
    let calls = Cell::new(0);
    succeed(&policy, 10).await;
    for _ in 0..500 {
        policy
            .run(|| {
                calls.set(calls.get() + 1);
                ready(if calls.get() % 10 == 0 { Err("hiccup") } else { Ok(()) })
            })
            .await
            .unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn policies_with_one_budget_draw_on_the_same_retries() {
    let budget = reserve(1);
    let one = policy(Retry::immediate().max_attempts(8), &budget);
    let two = policy(Retry::immediate().max_attempts(1000), &budget.clone());
    assert_eq!(retries(&one, 1).await, 7);
    assert_eq!(retries(&two, 1).await, 3);
    assert_eq!(retries(&one, 5).await, 0);
}

#[tokio::test(start_paused = true)]
async fn what_one_policy_earns_another_may_spend() {
    let budget = earned(1.0);
    succeed(&policy(Retry::immediate(), &budget), 5).await;
    assert_eq!(retries(&policy(Retry::immediate().max_attempts(100), &budget), 1).await, 5);
}

#[tokio::test(start_paused = true)]
async fn earnings_and_spendings_are_forgotten_after_a_while() {
    let budget = RetryBudget::ratio(1.0).reserve_per_second(0).expiry(secs(16)).build().unwrap();
    let policy = policy(Retry::immediate().max_attempts(2), &budget);
    succeed(&policy, 6).await;
    assert_eq!(retries(&policy, 2).await, 2);
    advance(secs(14)).await;
    assert_eq!(budget.available(), 4, "not yet");
    advance(secs(3)).await;
    assert_eq!(budget.available(), 0, "what was earned is gone");
    succeed(&policy, 3).await;
    assert_eq!(budget.available(), 3, "and so is what was spent");
}

#[tokio::test(start_paused = true)]
async fn only_answers_earn_something() {
    let budget = earned(1.0);
    let policy = Policy::named("answers")
        .retry(Retry::immediate().max_attempts(1).budget(budget.clone()))
        .timeout(ms(10))
        .build()
        .unwrap();
    for (verdict, earned) in [
        (Verdict::Success, 1),
        (Verdict::Permanent, 1),
        (Verdict::Ignored, 0),
        (Verdict::Transient(None), 0),
        (Verdict::Overloaded(None), 0),
    ] {
        let before = budget.available();
        let _ = policy.classify(|_: &Result<(), ()>| verdict).run(|| ready(Ok(()))).await;
        assert_eq!(budget.available() - before, earned, "{verdict:?}");
    }
    let before = budget.available();
    assert!(policy.run(pending::<Result<(), ()>>).await.unwrap_err().is_timeout());
    drop(poll_immediate(policy.run(pending::<Result<(), ()>>)).await);
    assert_eq!(budget.available(), before);
}

/// R8.
#[tokio::test(start_paused = true)]
async fn a_refusal_keeps_the_operations_error_and_waits_for_nothing() {
    for budget in [earned(0.1), share(0.0, 0)] {
        let start = Instant::now();
        let error = fail(&policy(Retry::constant(secs(5)), &budget)).await;
        assert_eq!((error.kind(), error.stop(), error.attempts()), (ErrorKind::Failed, Stop::Budget, 1));
        assert!(error.budget_exhausted());
        assert_eq!(error.into_inner(), Some("down"));
        assert_eq!(start.elapsed(), Duration::ZERO);
    }
}

/// B3: a refusal writes nothing.
#[tokio::test(start_paused = true)]
async fn refusals_cost_nothing() {
    let budget = earned(0.1);
    let policy = policy(Retry::immediate().max_attempts(2), &budget);
    succeed(&policy, 9).await;
    assert_eq!(retries(&policy, 100).await, 0);
    succeed(&policy, 1).await;
    assert_eq!(retries(&policy, 100).await, 1);
}

#[tokio::test(start_paused = true)]
async fn a_retry_that_another_limit_forbids_is_not_charged() {
    for budget in [reserve(1), share(0.0, 3)] {
        let available = budget.available();
        let deadline = Policy::named("deadline")
            .timeout(ms(100))
            .retry(Retry::constant(secs(1)).budget(budget.clone()))
            .build()
            .unwrap();
        assert_eq!(fail(&deadline).await.stop(), Stop::Deadline);
        assert_eq!(fail(&policy(Retry::constant(secs(1)).max_elapsed(ms(5)), &budget)).await.stop(), Stop::Elapsed);
        assert_eq!(fail(&policy(Retry::with([]), &budget)).await.stop(), Stop::Attempts);
        assert_eq!(fail(&policy(Retry::immediate().max_attempts(1), &budget)).await.stop(), Stop::Attempts);
        assert_eq!(budget.available(), available);
    }
}

/// B12: refunded, once.
#[tokio::test(start_paused = true)]
async fn a_call_dropped_in_its_pause_gives_its_retry_back() {
    for budget in [reserve(1), share(0.0, 3)] {
        let available = budget.available();
        let policy = policy(Retry::constant(secs(1)), &budget);
        let mut run = Box::pin(policy.run(|| ready(Err::<(), _>("down"))));
        assert!(poll_immediate(run.as_mut()).await.is_none());
        assert_eq!(budget.available(), available - 1, "it counts while it waits");
        drop(run);
        assert_eq!(budget.available(), available);
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_cancelled_in_its_pause_gives_its_retry_back() {
    for budget in [reserve(1), share(0.0, 3)] {
        let available = budget.available();
        let (policy, token) = (policy(Retry::constant(secs(1)), &budget), CancellationToken::new());
        let mut run = pin!(policy.call().cancel_on(&token).run(|| ready(Err::<(), _>("down"))));
        assert!(poll_immediate(run.as_mut()).await.is_none());
        assert_eq!(budget.available(), available - 1);
        token.cancel();
        assert!(run.await.unwrap_err().is_cancelled());
        assert_eq!(budget.available(), available);
    }
}

#[tokio::test(start_paused = true)]
async fn a_retry_whose_attempt_was_made_stays_spent_in_one_style_and_ends_in_the_other() {
    for (budget, spent) in [(reserve(1), 1), (share(0.0, 3), 0)] {
        let available = budget.available();
        let policy = policy(Retry::constant(secs(1)), &budget);
        let mut run = Box::pin(policy.run_with(|call| async move {
            if call.is_retry() { pending::<Result<(), &str>>().await } else { Err("down") }
        }));
        assert!(poll_immediate(run.as_mut()).await.is_none());
        advance(secs(1)).await;
        assert!(poll_immediate(run.as_mut()).await.is_none());
        assert_eq!(budget.available(), available - 1, "under way");
        drop(run);
        assert_eq!(budget.available(), available - spent);
    }
}

#[tokio::test(start_paused = true)]
async fn a_retry_that_a_gate_kept_from_being_made_is_given_back() {
    for budget in [reserve(1), share(0.0, 3)] {
        let available = budget.available();
        let semaphore = Semaphore::permits(1).max_queue(0).build().unwrap();
        let policy = Policy::named("kept")
            .retry(Retry::constant(secs(1)).budget(budget.clone()))
            .gate(semaphore.clone())
            .build()
            .unwrap();
        let mut run = pin!(policy.run(|| ready(Err::<(), _>("down"))));
        assert!(poll_immediate(run.as_mut()).await.is_none());
        let _held = semaphore.try_acquire().unwrap();
        let error = run.await.unwrap_err();
        assert_eq!(error.refusal().map(resile::Refusal::reason), Some(Reason::QueueFull));
        assert_eq!(budget.available(), available);
    }
}

#[tokio::test(start_paused = true)]
async fn a_retry_that_waited_in_a_queue_past_its_limit_is_given_back() {
    for budget in [reserve(1), share(0.0, 3)] {
        let available = budget.available();
        let semaphore = Semaphore::permits(1).build().unwrap();
        let policy = Policy::named("queued")
            .timeout(secs(5))
            .retry(Retry::constant(secs(1)).budget(budget.clone()))
            .gate(semaphore.clone())
            .build()
            .unwrap();
        let mut run = pin!(policy.run(|| ready(Err::<(), _>("down"))));
        assert!(poll_immediate(run.as_mut()).await.is_none());
        let _held = semaphore.try_acquire().unwrap();
        assert!(run.await.unwrap_err().is_timeout());
        assert_eq!(budget.available(), available);
    }
}

#[tokio::test(start_paused = true)]
async fn retried_refusals_are_given_back_since_nothing_was_made() {
    let budget = reserve(1);
    let semaphore = Semaphore::permits(1).max_queue(0).build().unwrap();
    let _held = semaphore.try_acquire().unwrap();
    let policy = Policy::named("refused")
        .timeout(ms(100))
        .retry(Retry::constant(ms(1)).on_refusal(OnRefusal::Retry).budget(budget.clone()))
        .gate(semaphore)
        .build()
        .unwrap();
    let error = policy.run(|| ready(Ok::<_, ()>(()))).await.unwrap_err();
    assert_eq!((error.kind(), error.stop()), (ErrorKind::Refused, Stop::Deadline));
    assert_eq!(budget.available(), 10);
}

/// A gate that refuses as often as it is told to, one asking after the other.
struct Moody(Mutex<Vec<bool>>);

impl Gate for Moody {
    fn enter(&self, _: &Call) -> Entry {
        if self.0.lock().unwrap().pop().unwrap_or(false) {
            return Entry::Refused(Refusal::new("moody", Reason::Busy));
        }
        Entry::Pass(Pass::default())
    }

    fn leave(&self, _: Pass, _: Outcome) {}
}

/// A policy around a gate that refuses where these say so.
fn moody(retry: Retry, budget: &RetryBudget, refuses: &[bool]) -> Policy {
    let gate = Moody(Mutex::new(refuses.iter().rev().copied().collect()));
    let retry = retry.on_refusal(OnRefusal::Retry).budget(budget.clone());
    Policy::named("moody").retry(retry).gate(gate).build().unwrap()
}

/// Nobody was called, so coming back adds nothing to anybody's load: it once cost a retry.
#[tokio::test(start_paused = true)]
async fn a_first_attempt_that_was_refused_before_costs_no_retry() {
    for budget in [earned(0.1), share(0.0, 0)] {
        let policy = moody(Retry::constant(ms(1)), &budget, &[true, true]);
        assert!(policy.run(|| ready(Ok::<_, Infallible>(()))).await.is_ok());
    }
}

#[tokio::test(start_paused = true)]
async fn a_retry_is_charged_once_however_often_it_is_refused_on_its_way() {
    for (budget, left) in [(reserve(1), 9), (share(0.0, 10), 10)] {
        let policy = moody(Retry::constant(ms(1)).max_attempts(2), &budget, &[true, false, true, true]);
        let held = Cell::new(0);
        let error = policy
            .run_with(|call| {
                if call.is_retry() {
                    held.set(budget.available());
                }
                ready(Err::<(), _>("down"))
            })
            .await
            .unwrap_err();
        assert_eq!((error.attempts(), error.stop()), (2, Stop::Attempts));
        assert_eq!((held.get(), budget.available()), (9, left));
    }
}

/// A call that has not been to the peer yet is none of the retries in flight while it waits.
#[tokio::test(start_paused = true)]
async fn only_what_was_made_before_counts_as_a_retry_while_it_waits() {
    for budget in [reserve(1), share(0.0, 10)] {
        for (refuses, waiting) in [(&[true][..], 10), (&[false][..], 9), (&[false, true][..], 9)] {
            let policy = moody(Retry::constant(secs(1)), &budget, refuses);
            let mut run = Box::pin(policy.run(|| ready(Err::<(), _>("down"))));
            for _ in 0..refuses.len() {
                assert!(poll_immediate(run.as_mut()).await.is_none());
                assert_eq!(budget.available(), waiting);
                if refuses.len() > 1 {
                    advance(ms(1001)).await;
                }
            }
            drop(run);
            if budget.available() < 10 {
                // The one retry that was made before the drop is spent where retries are counted over time.
                advance(secs(20)).await;
            }
            assert_eq!(budget.available(), 10);
        }
    }
}

/// Envoy once did not count retries that wait, so its budget shrank as an outage went on (B9).
#[tokio::test(start_paused = true)]
async fn retries_that_sleep_count_towards_the_share() {
    let budget = share(0.0, 3);
    let policy = policy(Retry::constant(secs(1)).max_attempts(2), &budget);
    let start = Instant::now();
    let calls = (0..10).map(|_| async {
        let error = fail(&policy).await;
        (error.stop(), start.elapsed())
    });
    let ends = join_all(calls).await;
    assert_eq!(ends.iter().filter(|end| **end == (Stop::Attempts, secs(1))).count(), 3);
    assert_eq!(ends.iter().filter(|end| **end == (Stop::Budget, Duration::ZERO)).count(), 7);
    assert_eq!(budget.available(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_share_is_one_of_all_calls_in_flight_those_that_wait_included() {
    let budget = share(0.25, 0);
    let policy = policy(Retry::constant(secs(1)).max_attempts(2), &budget);
    // Forty calls hang, four fail: eleven retries would be allowed.
    let hanging: Vec<_> = (0..40).map(|_| Box::pin(policy.run(pending::<Result<(), ()>>))).collect();
    let mut hanging = hanging;
    for run in &mut hanging {
        assert!(poll_immediate(run.as_mut()).await.is_none());
    }
    assert_eq!(budget.available(), 10);
    let failing = join_all((0..4).map(|_| fail(&policy)));
    let mut failing = pin!(failing);
    assert!(poll_immediate(failing.as_mut()).await.is_none());
    assert_eq!(budget.available(), 7, "a quarter of 44, less the four that sleep");
    drop(hanging);
    assert_eq!(budget.available(), 0, "a quarter of four is taken four times");
    assert!(failing.await.iter().all(|error| error.attempts() == 2), "what was granted stays granted");
    assert_eq!(budget.available(), 0);
}

#[tokio::test(start_paused = true)]
async fn the_floor_lets_a_quiet_service_retry() {
    let budget = share(0.1, 2);
    let policy = policy(Retry::immediate().max_attempts(5), &budget);
    assert_eq!(retries(&policy, 3).await, 12, "each retry ends before the next is asked for");
}

#[tokio::test(start_paused = true)]
async fn an_outage_under_load_keeps_its_share() {
    let budget = share(0.2, 3);
    let policy = policy(Retry::constant(ms(50)).max_attempts(4), &budget);
    let (now, most, made) = (Cell::new(0_u32), Cell::new(0), Cell::new(0));
    let calls = (0..100).map(|_| {
        policy.run_with(|call| {
            made.set(made.get() + 1);
            let retry = u32::from(call.is_retry());
            now.set(now.get() + retry);
            most.set(most.get().max(now.get()));
            let now = &now;
            async move {
                sleep(ms(10)).await;
                now.set(now.get() - retry);
                Err::<(), _>("down")
            }
        })
    });
    let ends = join_all(calls).await;
    assert!(ends.iter().all(Result::is_err));
    assert!(most.get() <= 20, "{} retries at once beside 100 calls", most.get());
    assert!(made.get() <= 100 + 20 * 3, "{} attempts", made.get());
    assert_eq!(budget.available(), 3, "nothing is in flight any more");
}

#[tokio::test(start_paused = true)]
async fn a_panic_takes_no_share_with_it() {
    let budget = share(0.0, 3);
    let policy = policy(Retry::constant(secs(1)).max_attempts(2), &budget);
    for _ in 0..5 {
        let policy = policy.clone();
        let run = policy.into_run({
            let mut made = 0;
            move || {
                made += 1;
                let made = made;
                async move {
                    assert!(made == 1, "boom");
                    Err::<(), _>("down")
                }
            }
        });
        assert!(tokio::spawn(run).await.unwrap_err().is_panic());
    }
    assert_eq!(budget.available(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_backoff_of_ones_own_that_panics_takes_no_share_with_it() {
    let budget = share(1.0, 0);
    let backoff = (0..).map(|_: u32| -> Duration { panic!("boom") });
    let policy = policy(Retry::with(backoff), &budget);
    let run = policy.clone().into_run(|| ready(Err::<(), _>("down")));
    assert!(tokio::spawn(run).await.unwrap_err().is_panic());
    assert_eq!(budget.available(), 0, "no call is in flight");
}

/// B1: a withdrawal that loads, compares and adds in steps granted 11 retries from 10 deposits.
#[test]
fn threads_that_draw_at_once_get_exactly_what_is_there() {
    // An hour's reserve, so that none of it comes back while the threads run.
    let reserved = RetryBudget::ratio(0.0).reserve_per_second(1).expiry(secs(3600)).build().unwrap();
    let policy = policy(Retry::immediate().max_attempts(2), &reserved);
    let retries = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..2000 {
                    let call = policy.run(|| ready(Err::<(), _>("down")));
                    let error = futures::FutureExt::now_or_never(call).unwrap().unwrap_err();
                    retries.fetch_add(error.attempts() - 1, Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(retries.into_inner(), 3600);
}

#[test]
fn threads_never_have_more_retries_in_flight_than_the_floor() {
    let budget = share(0.0, 2);
    let policy = policy(Retry::immediate().max_attempts(3), &budget);
    let (now, most) = (AtomicU32::new(0), AtomicU32::new(0));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..2000 {
                    let call = policy.run_with(|call| {
                        if call.is_retry() {
                            most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                            now.fetch_sub(1, Ordering::SeqCst);
                        }
                        ready(Err::<(), _>("down"))
                    });
                    let _ = futures::FutureExt::now_or_never(call).unwrap();
                }
            });
        }
    });
    assert!(most.into_inner() <= 2);
    assert_eq!(budget.available(), 2);
}

/// B8: two paused clocks stand for one that goes back and forth. What was spent is not paid out again.
#[test]
fn a_clock_that_goes_back_pays_nothing_twice() {
    let paused = || tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    let (late, early) = (paused(), paused());
    late.block_on(advance(secs(3600)));
    let budget = reserve(1);
    let policy = policy(Retry::immediate().max_attempts(1000), &budget);
    let retries = Mutex::new(Vec::new());
    for (runtime, ahead) in [(&late, 0), (&early, 0), (&late, 0), (&early, 60), (&late, 1), (&early, 1), (&late, 1)] {
        runtime.block_on(async {
            advance(secs(ahead)).await;
            let attempts = fail(&policy).await.attempts();
            retries.lock().unwrap().push(attempts - 1);
        });
    }
    // Ten at first; then, by neither clock, has the ten seconds' reserve come again.
    assert_eq!(*retries.lock().unwrap(), [10, 0, 0, 0, 0, 0, 0]);
    let after = late.block_on(async {
        advance(secs(10)).await;
        fail(&policy).await.attempts() - 1
    });
    assert_eq!(after, 10, "and it does come again");
}

#[tokio::test(start_paused = true)]
async fn a_budget_of_nothing_allows_nothing() {
    for budget in [earned(0.0), share(0.0, 0)] {
        let policy = policy(Retry::immediate(), &budget);
        succeed(&policy, 100).await;
        assert_eq!((budget.available(), retries(&policy, 10).await), (0, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn nested_retries_with_one_budget_are_charged_each() {
    let budget = reserve(1);
    let policy = Policy::named("nested")
        .retry(Retry::immediate().max_attempts(10).budget(budget.clone()))
        .retry(Retry::immediate().max_attempts(10).budget(budget.clone()))
        .build()
        .unwrap();
    let error = fail(&policy).await;
    assert_eq!((error.attempts(), error.stop()), (11, Stop::Budget), "ten retries in all");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Law: whatever is refused, fails or is dropped on the way, what is spent are the attempts made after the first, and
    /// in flight nothing is left.
    #[test]
    fn what_is_spent_are_the_attempts_after_the_first(
        refuses in proptest::collection::vec(any::<bool>(), 0..12),
        attempts in 1_u32..6,
        fails in 0_u32..6,
        polls in 0_usize..20,
        nested: bool,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(async {
            for (budget, spends) in [(RetryBudget::ratio(0.0).reserve_per_second(2).build().unwrap(), true), (share(0.0, 20), false)] {
                let gate = Moody(Mutex::new(refuses.clone()));
                let retry = || Retry::constant(ms(1)).max_attempts(attempts).on_refusal(OnRefusal::Retry);
                let policy = Policy::named("law").retry(retry().budget(budget.clone()));
                // The inner one has no budget of its own: what it makes, the outer one does not pay for.
                let policy = if nested { policy.retry(Retry::immediate().max_attempts(1)) } else { policy };
                let policy = policy.gate(gate).build().unwrap();
                let made = Cell::new(0_u32);
                let mut run = Box::pin(policy.run(|| {
                    made.set(made.get() + 1);
                    ready(if made.get() <= fails { Err("down") } else { Ok(()) })
                }));
                for _ in 0..polls {
                    if poll_immediate(run.as_mut()).await.is_some() {
                        break;
                    }
                    let waiting = u64::from(made.get() > 0);
                    let spent = if spends { u64::from(made.get().saturating_sub(1)) } else { 0 };
                    prop_assert_eq!(20 - budget.available(), spent + waiting, "while it waits");
                    advance(ms(2)).await;
                }
                drop(run);
                let spent = if spends { u64::from(made.get().saturating_sub(1)) } else { 0 };
                prop_assert_eq!(20 - budget.available(), spent, "at the end");
            }
            Ok(())
        })?;
    }
}

/// Waits a millisecond before the first retry, and panics before the second.
struct Panics;

impl resile::Backoff for Panics {
    fn delays(&self) -> Box<dyn Iterator<Item = Duration> + Send> {
        Box::new((0..).map(|n| if n == 0 { ms(1) } else { panic!("boom") }))
    }
}

/// The attempt that was charged has been settled when the backoff is asked for the next one.
#[tokio::test(start_paused = true)]
async fn a_backoff_that_panics_costs_the_budget_what_was_made_and_no_more() {
    let budget = share(1.0, 5);
    let policy = policy(Retry::with(Panics), &budget);
    let before = budget.available();
    let mut call = Box::pin(policy.run(|| ready(Err::<(), _>(()))));
    assert!(poll_immediate(call.as_mut()).await.is_none(), "it pauses");
    advance(ms(2)).await;
    let end = std::panic::AssertUnwindSafe(call.as_mut()).catch_unwind().await;
    assert!(end.is_err());
    drop(call);
    assert_eq!(budget.available(), before, "nothing is in flight");
}

/// The latest one is given back, so that what was spent before expires when it does.
#[tokio::test(start_paused = true)]
async fn a_retry_that_comes_back_is_the_latest() {
    let budget = reserve(1);
    let policy = policy(Retry::constant(secs(4)).max_attempts(2), &budget);
    assert!(policy.run(|| ready(Err::<(), _>(()))).await.is_err());
    assert_eq!(budget.available(), 9);
    advance(secs(1)).await;
    let mut dropped = Box::pin(policy.run(|| ready(Err::<(), _>(()))));
    assert!(poll_immediate(dropped.as_mut()).await.is_none());
    advance(secs(2)).await;
    assert_eq!(budget.available(), 8);
    drop(dropped);
    advance(secs(4)).await;
    assert_eq!(budget.available(), 10, "eleven seconds after the one that was made");
}

/// What was spent by a clock that is ahead counts as spent now, once.
#[test]
fn what_was_spent_by_a_clock_that_is_ahead_counts_once() {
    let budget = reserve(1);
    let policy = policy(Retry::immediate().max_attempts(4), &budget);
    let (ahead, behind) = (Clock::paused(), Clock::paused());
    ahead.advance(secs(3600));
    ahead.block_on(async {
        assert!(policy.run(|| ready(Err::<(), _>(()))).await.is_err());
        advance(secs(3)).await;
        assert!(policy.run(|| ready(Err::<(), _>(()))).await.is_err());
        assert_eq!(budget.available(), 4);
    });
    let _entered = behind.enter();
    assert_eq!(budget.available(), 4);
}
