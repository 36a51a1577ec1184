//! One limit shared by keys: who is served when, and what is left behind when somebody goes.

mod support;

use std::future::Future;
use std::num::NonZeroU32;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use proptest::prelude::*;
use resile::{Call, Entry, Fair, Gate, KeyRef, Outcome, Pass, Policy, Reason, Refusal, Semaphore, Ticket, TokenBucket};
use support::hand::{Clock, Flag, catch_boom};
use support::journal::Journal;
use support::ms;
use support::script::boom;
use support::watch::{Manner, Spy};

type Running = Pin<Box<dyn Future<Output = Result<(), resile::Error<()>>>>>;
type Order = Arc<Mutex<Vec<(u64, u32)>>>;

/// A call of a tenant that notes its number when it is let in, and holds its permit for so long.
fn call(policy: &Policy, order: &Order, tenant: u64, number: u32, holds: Duration) -> Running {
    let order = order.clone();
    let call = policy.call().owned().key("tenant", tenant);
    Box::pin(call.run(move || {
        order.lock().unwrap().push((tenant, number));
        async move {
            tokio::time::sleep(holds).await;
            Ok(())
        }
    }))
}

fn gated<G: resile::Gate>(fair: &Fair<G>) -> Policy {
    Policy::named("shared").gate(fair.clone()).build().unwrap()
}

/// Starts all calls in this order and has them end.
async fn run_all(policy: &Policy, tenants: &[u64]) -> Vec<u64> {
    let order = Order::default();
    let calls = (0..).zip(tenants).map(|(number, tenant)| call(policy, &order, *tenant, number, ms(10)));
    for done in futures::future::join_all(calls).await {
        done.unwrap();
    }
    let order = order.lock().unwrap();
    // In order within each tenant.
    for tenant in tenants {
        let numbers: Vec<u32> = order.iter().filter(|(of, _)| of == tenant).map(|(_, number)| *number).collect();
        assert!(numbers.is_sorted(), "{order:?}");
    }
    order.iter().map(|(tenant, _)| *tenant).collect()
}

#[tokio::test(start_paused = true)]
async fn a_backlog_of_one_key_does_not_hold_up_the_others() {
    let fair = Fair::by("tenant", Semaphore::permits(1)).build().unwrap();
    let order = run_all(&gated(&fair), &[1, 1, 1, 1, 1, 1, 2, 3, 2]).await;
    // One runs and one waits at the limit before there is a line.
    assert_eq!(order, [1, 1, 2, 3, 1, 2, 1, 1, 1]);
    assert_eq!((fair.limit().in_use(), fair.limit().queued(), fair.queued()), (0, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn tokens_go_round_as_permits_do() {
    let fair = Fair::by("tenant", TokenBucket::per_second(10).burst(1)).build().unwrap();
    let start = tokio::time::Instant::now();
    let order = run_all(&gated(&fair), &[1, 1, 1, 1, 1, 2, 2]).await;
    assert_eq!(order, [1, 1, 2, 1, 2, 1, 1]);
    assert!(start.elapsed() < ms(620), "no slower than the rate: {:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn shares_go_by_weight() {
    let weights = |tenant: KeyRef<'_>| NonZeroU32::new(if tenant == KeyRef::Number(1) { 3 } else { 1 }).unwrap();
    let fair = Fair::by("tenant", Semaphore::permits(1)).weights(weights).build().unwrap();
    let tenants: Vec<u64> = (0..80).map(|n| 1 + n % 2).collect();
    let order = run_all(&gated(&fair), &tenants).await;
    let of_one = order[2..42].iter().filter(|tenant| **tenant == 1).count();
    assert_eq!(of_one, 30);
}

#[tokio::test(start_paused = true)]
async fn the_line_is_bounded_in_all_and_per_key() {
    let fair =
        Fair::by("tenant", Semaphore::permits(1)).max_queue(3).max_queue_per_key(2).named("line").build().unwrap();
    let policy = gated(&fair);
    let order = Order::default();
    let mut calls: Vec<Running> = Vec::new();
    let mut start = |tenant: u64| {
        let mut call = call(&policy, &order, tenant, 0, ms(10));
        match Flag::default().poll(call.as_mut()) {
            Poll::Pending => {
                calls.push(call);
                None
            }
            Poll::Ready(done) => {
                Some(done.unwrap_err().refusal().map(|no| (no.gate().to_owned(), no.reason())).unwrap())
            }
        }
    };
    let full = Some(("line".to_owned(), Reason::QueueFull));
    for _ in 0..4 {
        assert_eq!(start(1), None, "one runs, one is at the limit, two in line");
    }
    assert_eq!(start(1), full);
    assert_eq!(start(2), None);
    assert_eq!(start(3), full);
    assert_eq!(fair.queued(), 3);
    let impatient = policy.call().key("tenant", 9_u64).no_wait().run(|| async { Ok::<_, ()>(()) }).await;
    assert_eq!(impatient.unwrap_err().refusal().unwrap().reason(), Reason::Busy);
    let nameless = policy.run(|| async { Ok::<_, ()>(()) }).await;
    assert_eq!(nameless.unwrap_err().refusal().unwrap().reason(), Reason::NoKey("tenant"));
    drop(calls);
    assert_eq!((fair.limit().in_use(), fair.limit().queued(), fair.queued()), (0, 0, 0));
}

/// A branch of a `select!` whose handler takes long keeps its wait, but doesn't poll it.
#[tokio::test(start_paused = true)]
async fn who_is_called_and_not_polled_is_passed_over_and_keeps_its_place() {
    let fair = Fair::by("tenant", Semaphore::permits(1)).build().unwrap();
    let (policy, order) = (gated(&fair), Order::default());
    let holds = fair.limit().try_acquire().unwrap();
    let mut away: Vec<Running> = (0..3).map(|number| call(&policy, &order, number, 0, ms(50))).collect();
    for waits in &mut away {
        assert!(Flag::default().poll(waits.as_mut()).is_pending());
    }
    let others = tokio::task::LocalSet::new();
    let served = others.run_until(async {
        let started = tokio::time::Instant::now();
        let later: Vec<_> =
            (1..3).map(|number| tokio::task::spawn_local(call(&policy, &order, 0, number, ms(5)))).collect();
        tokio::time::sleep(ms(1)).await;
        drop(holds);
        for done in later {
            done.await.unwrap().unwrap();
        }
        started.elapsed()
    });
    let took = served.await;
    assert!(took <= ms(50 + 3 * 10 + 20), "one look of five that wait, and then three that don't come: {took:?}");
    assert_eq!(*order.lock().unwrap(), [(0, 1), (0, 2)]);
    // The last that went away comes first, and then two of its key who were there after the one that comes next.
    let now = |tenant: u64, number: u32| call(&policy, &order, tenant, number, ms(1));
    let ends =
        futures::future::join5(away.pop().unwrap(), now(1, 8), now(0, 9), away.pop().unwrap(), away.pop().unwrap());
    assert!(tokio::time::timeout(ms(500), ends).await.is_ok());
    let order = order.lock().unwrap();
    let place = |tenant: u64, number: u32| order.iter().position(|it| *it == (tenant, number)).unwrap();
    assert!(place(1, 0) < place(1, 8) && place(0, 0) < place(0, 9), "{order:?}");
    assert_eq!((fair.limit().in_use(), fair.limit().queued(), fair.queued()), (0, 0, 0));
}

/// The place at the limit goes to another, who comes once and then no more: the one that had it must look after that one.
#[tokio::test(start_paused = true)]
async fn who_had_to_step_aside_goes_on_without_the_one_that_does_not_come() {
    for returns in [false, true] {
        let fair = Fair::by("tenant", Semaphore::permits(2)).build().unwrap();
        let (policy, order) = (gated(&fair), Order::default());
        let holds = fair.limit().try_acquire_many(2).unwrap();
        let large = |tenant: u64| {
            let call = policy.call().owned().key("tenant", tenant).cost(2);
            Box::pin(call.run(|| std::future::ready(Ok::<_, ()>(()))))
        };
        let mut away = call(&policy, &order, 2, 0, ms(1));
        if returns {
            // It is called first, passed over, and comes back once.
            assert!(Flag::default().poll(away.as_mut()).is_pending());
        }
        let tasks = tokio::task::LocalSet::new();
        tasks
            .run_until(async {
                let waits = tokio::task::spawn_local(large(1));
                tokio::time::sleep(ms(100)).await;
                assert!(Flag::default().poll(away.as_mut()).is_pending());
                tokio::time::sleep(ms(100)).await;
                drop(holds);
                tokio::time::timeout(ms(100), waits).await.expect("in time").unwrap().unwrap();
            })
            .await;
        drop(away);
        assert_eq!((fair.limit().in_use(), fair.limit().queued(), fair.queued()), (0, 0, 0));
    }
}

/// What is never polled again and never dropped holds nobody up either.
#[tokio::test(start_paused = true)]
async fn a_hundred_that_are_forgotten_stop_nobody() {
    let fair = Fair::by("tenant", TokenBucket::per_second(1000).burst(1)).build().unwrap();
    let (policy, order) = (gated(&fair), Order::default());
    fair.limit().try_take(1).unwrap();
    for number in 0..100 {
        let mut waits = call(&policy, &order, u64::from(number % 7), number, ms(1));
        assert!(Flag::default().poll(waits.as_mut()).is_pending());
        std::mem::forget(waits);
    }
    for number in 100..120 {
        let call = call(&policy, &order, u64::from(number % 7), number, ms(1));
        assert!(tokio::time::timeout(Duration::from_secs(3), call).await.is_ok(), "call {number}");
    }
    let quick = call(&policy, &order, 3, 200, ms(1));
    assert!(tokio::time::timeout(ms(5), quick).await.is_ok(), "those who did not come are known by now");
    tokio::time::sleep(ms(5)).await;
    policy.call().key("tenant", 1_u64).no_wait().run(|| async { Ok::<_, ()>(()) }).await.unwrap();
    policy.call().key("tenant", 1_u64).no_wait().run(|| async { Ok::<_, ()>(()) }).await.unwrap_err();
}

/// One task polls all its waits whenever one is woken: asking and answering must not keep it awake for ever.
#[tokio::test(start_paused = true)]
async fn asking_who_is_there_does_not_keep_a_task_awake() {
    let fair = Fair::by("tenant", Semaphore::permits(1)).build().unwrap();
    let (policy, order) = (gated(&fair), Order::default());
    let holds = fair.limit().try_acquire().unwrap();
    let mut waits: Vec<Running> = (0..5).map(|number| call(&policy, &order, 0, number, ms(1))).collect();
    let mut polls = 0;
    let all = std::future::poll_fn(|cx| {
        polls += 1;
        for waits in &mut waits {
            assert!(waits.as_mut().poll(cx).is_pending());
        }
        Poll::<()>::Pending
    });
    assert!(tokio::time::timeout(Duration::from_secs(1), all).await.is_err());
    assert!(polls < 300, "polled {polls} times in a second");
    drop(holds);
}

/// It would have made all turns as long as its cost while it waited to be refused.
#[tokio::test(start_paused = true)]
async fn who_can_never_be_let_in_does_not_stand_in_line() {
    let fair = Fair::by("tenant", Semaphore::permits(3)).build().unwrap();
    let (policy, order) = (gated(&fair), Order::default());
    let holds = fair.limit().try_acquire_many(3).unwrap();
    let mut first = call(&policy, &order, 1, 1, ms(10));
    assert!(Flag::default().poll(first.as_mut()).is_pending());
    let huge = policy.call().key("tenant", 2_u64).cost(4).run(|| async { Ok::<_, ()>(()) });
    let Some(Err(error)) = futures::future::poll_immediate(huge).await else { panic!("it is told at once") };
    assert_eq!(error.refusal().unwrap().reason(), Reason::CostAboveLimit { cost: 4, limit: 3 });
    fair.limit().close();
    let late = policy.call().key("tenant", 3_u64).run(|| async { Ok::<_, ()>(()) });
    let Some(Err(error)) = futures::future::poll_immediate(late).await else { panic!("it is told at once") };
    assert_eq!(error.refusal().unwrap().reason(), Reason::Closed);
    drop((holds, first));
    assert_eq!((fair.limit().in_use(), fair.limit().queued(), fair.queued()), (0, 0, 0));
}

/// Callers of one tenant that come back as soon as they are served, until the time is up: what they got.
async fn loop_until(
    policy: Policy,
    tenant: u64,
    cost: u32,
    callers: u32,
    end: tokio::time::Instant,
    holds: Duration,
) -> u64 {
    let got = std::cell::Cell::new(0);
    let one = async || {
        while tokio::time::Instant::now() < end {
            let call = policy.call().key("tenant", tenant).cost(cost);
            let done = call
                .run(async || {
                    tokio::time::sleep(holds).await;
                    Ok::<_, ()>(())
                })
                .await;
            if done.is_ok() && tokio::time::Instant::now() <= end {
                got.set(got.get() + u64::from(cost));
            }
        }
    };
    futures::future::join_all((0..callers).map(|_| one())).await;
    got.get()
}

/// The one with the large calls had nearly everything: a turn was as long as the largest cost in line.
#[tokio::test(start_paused = true)]
async fn large_calls_get_no_more_than_small_ones() {
    for (costs, weights, callers) in [
        ([100, 1], [1, 1], [1, 100]),
        ([100, 1], [1, 10], [1, 100]),
        ([1000, 1], [1, 1], [5, 5]),
        ([1000, 7], [3, 1], [1, 300]),
        ([40, 60], [1, 1], [3, 3]),
    ] {
        let weigh =
            move |tenant: KeyRef<'_>| NonZeroU32::new(weights[usize::from(tenant == KeyRef::Number(1))]).unwrap();
        let bucket = TokenBucket::per_second(2000).burst(1000);
        let policy = gated(&Fair::by("tenant", bucket).weights(weigh).build().unwrap());
        // What lies in the bucket goes to a third.
        policy.call().key("tenant", 9_u64).cost(1000).run(async || Ok::<_, ()>(())).await.unwrap();
        let end = tokio::time::Instant::now() + ms(40_000);
        let own = |tenant: u64| {
            let place = tenant as usize;
            loop_until(policy.clone(), tenant, costs[place], callers[place], end, Duration::ZERO)
        };
        let (one, two) = tokio::join!(own(0), own(1));
        let share = one as f64 / (one + two) as f64;
        let fair = f64::from(weights[0]) / f64::from(weights[0] + weights[1]);
        assert!((share / fair - 1.0).abs() <= 0.05, "{costs:?} {weights:?}: {one} and {two}");
        assert!(one + two >= 79_000, "and nothing is left over: {one} and {two}");
    }
}

/// A limit that counts who is inside shares its places, too.
#[tokio::test(start_paused = true)]
async fn permits_are_shared_whatever_the_calls_cost() {
    for (costs, callers) in [([8, 1], [20, 20]), ([3, 1], [20, 20]), ([8, 8], [1, 30])] {
        let policy = gated(&Fair::by("tenant", Semaphore::permits(16)).build().unwrap());
        let end = tokio::time::Instant::now() + ms(60_000);
        let own = |tenant: u64| {
            let place = tenant as usize;
            loop_until(policy.clone(), tenant, costs[place], callers[place], end, ms(10))
        };
        let (one, two) = tokio::join!(own(0), own(1));
        let all = 16.0 * 6000.0;
        assert!((one + two) as f64 >= 0.9 * all, "{costs:?}: {one} and {two}");
        // One caller that comes back can hold one call at a time; with more there is always somebody of both.
        if callers[0] > 1 {
            assert!((one as f64 / two as f64 - 1.0).abs() <= 0.05, "{costs:?}: {one} and {two}");
        }
    }
}

/// It waited for the call of cost 1000 that stood at the limit.
#[tokio::test(start_paused = true)]
async fn a_small_call_of_a_quiet_key_does_not_wait_for_a_large_one() {
    let policy = gated(&Fair::by("tenant", TokenBucket::per_second(500).burst(1000)).build().unwrap());
    let own =
        |tenant: u64, cost: u32| policy.call().owned().key("tenant", tenant).cost(cost).run(async || Ok::<_, ()>(()));
    own(1, 1000).await.unwrap();
    let large: Vec<_> = (0..3).map(|_| tokio::spawn(own(1, 1000))).collect();
    tokio::time::sleep(ms(1)).await;
    let start = tokio::time::Instant::now();
    own(2, 1).await.unwrap();
    assert!(start.elapsed() <= ms(5), "{:?}", start.elapsed());
    for large in large {
        large.await.unwrap().unwrap();
    }
    assert!(start.elapsed() <= ms(6010), "and they lose nothing by it: {:?}", start.elapsed());
}

/// In line it would have waited for its deadline.
#[tokio::test(start_paused = true)]
async fn who_cannot_be_served_in_time_is_told_at_the_door() {
    let fair = Fair::by("tenant", TokenBucket::per_second(10).burst(1)).build().unwrap();
    let policy = gated(&fair);
    let own = |tenant: u64, deadline| {
        policy.call().owned().key("tenant", tenant).deadline(deadline).run(async || Ok::<_, ()>(()))
    };
    let waiting: Vec<_> = (0..20).map(|_| tokio::spawn(own(1, ms(60_000)))).collect();
    tokio::time::sleep(ms(1)).await;
    let start = tokio::time::Instant::now();
    let error = own(1, ms(1000)).await.unwrap_err();
    assert_eq!(error.refusal().map(resile::Refusal::reason), Some(Reason::TooLate));
    assert_eq!(start.elapsed(), Duration::ZERO);
    own(2, ms(1000)).await.unwrap();
    for waiting in waiting {
        waiting.await.unwrap().unwrap();
    }
}

/// New keys that went on coming passed everybody who had had anything before, for as long as they came.
#[tokio::test(start_paused = true)]
async fn keys_that_come_once_each_do_not_starve_those_who_come_again() {
    for cost in [1, 2] {
        let policy = gated(&Fair::by("tenant", TokenBucket::per_second(100).burst(2)).build().unwrap());
        let once = |tenant: u64, cost: u32| {
            policy.call().owned().key("tenant", tenant).cost(cost).run(async || Ok::<_, ()>(()))
        };
        let crowd = async {
            // Twice what the limit lets by.
            let mut calls = Vec::new();
            for tenant in 100..1100_u64 {
                calls.push(tokio::spawn(once(tenant, 1)));
                tokio::time::sleep(ms(5)).await;
            }
        };
        let again = async {
            tokio::time::sleep(ms(100)).await;
            once(1, 1).await.unwrap();
            let start = tokio::time::Instant::now();
            once(1, cost).await.unwrap();
            start.elapsed()
        };
        let ((), waited) = tokio::join!(crowd, again);
        assert!(waited < ms(2500), "a call of cost {cost} waited {waited:?}");
    }
}

/// A newcomer was told nothing of the many others that had just come, too.
#[tokio::test(start_paused = true)]
async fn at_the_door_the_calls_of_other_new_keys_count() {
    let policy = gated(&Fair::by("tenant", TokenBucket::per_second(1).burst(1)).build().unwrap());
    let own =
        |tenant: u64| policy.call().owned().key("tenant", tenant).deadline(ms(5000)).run(async || Ok::<_, ()>(()));
    let first: Vec<_> = (0..100).map(|tenant| tokio::spawn(own(tenant))).collect();
    tokio::time::sleep(ms(1)).await;
    let start = tokio::time::Instant::now();
    let error = own(1000).await.unwrap_err();
    assert_eq!(
        (error.refusal().map(resile::Refusal::reason), start.elapsed()),
        (Some(Reason::TooLate), Duration::ZERO)
    );
    first.iter().for_each(tokio::task::JoinHandle::abort);
}

/// The first in line waits there.
#[test]
fn a_limit_in_which_nobody_may_wait_is_a_fault() {
    let error = Fair::by("tenant", Semaphore::permits(1).max_queue(0)).build().unwrap_err();
    let told = "fair by tenant: max_queue must be 1 or more in the limit inside, where the first in line waits, is 0";
    assert_eq!(error.to_string(), told);
    assert!(Fair::by("tenant", TokenBucket::per_second(1).max_queue(0)).build().is_err());
}

#[test]
fn wrong_settings_are_told() {
    let wrong = Fair::by("tenant", Semaphore::permits(0)).max_queue(u32::MAX).max_queue_per_key(0).build();
    assert_eq!(wrong.unwrap_err().faults().len(), 3);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Calls that are dropped at any time leave nothing behind, and everybody else is served.
    #[test]
    fn whoever_stays_is_served_whoever_goes(
        ops in proptest::collection::vec((0_u64..4, 0_usize..8, 0_u32..4), 1..80),
        permits in 1_u32..3,
    ) {
        let clock = Clock::paused();
        let _entered = clock.enter();
        let fair = Fair::by("tenant", Semaphore::permits(permits)).build().unwrap();
        let policy = gated(&fair);
        let order = Order::default();
        let mut calls: Vec<(Running, Flag)> = Vec::new();
        for (number, (tenant, which, what)) in (0..).zip(ops) {
            match what {
                0 | 1 => {
                    let (mut call, flag) = (call(&policy, &order, tenant, number, ms(5)), Flag::default());
                    if flag.poll(call.as_mut()).is_pending() {
                        calls.push((call, flag));
                    }
                }
                2 if !calls.is_empty() => drop(calls.remove(which % calls.len())),
                _ => clock.advance(ms(5)),
            }
            // Whoever was woken is polled, once.
            calls.retain_mut(|(call, flag)| {
                if !flag.woken() {
                    return true;
                }
                *flag = Flag::default();
                flag.poll(call.as_mut()).is_pending()
            });
            prop_assert!(fair.limit().in_use() <= permits);
        }
        for _ in 0..1000 {
            if calls.is_empty() {
                break;
            }
            clock.advance(ms(5));
            calls.retain_mut(|(call, flag)| {
                if !flag.woken() {
                    return true;
                }
                *flag = Flag::default();
                flag.poll(call.as_mut()).is_pending()
            });
        }
        prop_assert!(calls.is_empty(), "{} were never served", calls.len());
        prop_assert_eq!((fair.limit().in_use(), fair.limit().queued(), fair.queued()), (0, 0, 0));
    }
}

/// The limit's own ticket must not be taken for one of the line.
#[test]
fn a_limit_that_has_an_impatient_call_wait_gets_its_ticket_back() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    let limit = Spy::new("limit", &Journal::default()).that(Manner::Delays(ms(10)));
    let fair = Fair::by("tenant", limit.clone()).build().unwrap();
    let policy = gated(&fair);
    let mut impatient = Box::pin(policy.call().key("tenant", 1_u64).no_wait().run(|| async { Ok::<_, ()>(()) }));
    let Poll::Ready(end) = Flag::default().poll(impatient.as_mut()) else { panic!("it does not wait") };
    assert_eq!(end.unwrap_err().refusal().map(resile::Refusal::reason), Some(Reason::Busy));
    assert_eq!(limit.out(), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn what_a_call_has_really_cost_is_told_to_the_limit() {
    let fair = Fair::by("tenant", TokenBucket::per_second(1).burst(100)).build().unwrap();
    let policy = gated(&fair);
    for (actual, left) in [(3, 97), (40, 57)] {
        let call = policy.call().key("tenant", 1_u64).cost(10).settle(|cost: &Result<u32, ()>| cost.unwrap());
        call.run(|| async move { Ok(actual) }).await.unwrap();
        assert_eq!(fair.limit().peek(), left);
    }
}

/// The permit of the first was lost with the panic of the next one's waker.
#[test]
fn a_waker_that_panics_costs_nobody_a_permit() {
    struct Bomb;
    impl std::task::Wake for Bomb {
        fn wake(self: Arc<Self>) {
            panic!("boom");
        }
    }
    let clock = Clock::paused();
    let _inside = clock.enter();
    let semaphore = Semaphore::permits(1).build().unwrap();
    let fair = Fair::by("tenant", semaphore.clone()).build().unwrap();
    let (policy, order) = (gated(&fair), Order::default());
    let held = semaphore.try_acquire().unwrap();
    let mut first = call(&policy, &order, 1, 1, ms(10));
    let mut next = call(&policy, &order, 2, 2, ms(10));
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    assert!(first.as_mut().poll(&mut cx).is_pending());
    let bomb = std::task::Waker::from(Arc::new(Bomb));
    assert!(next.as_mut().poll(&mut std::task::Context::from_waker(&bomb)).is_pending());
    drop(held);
    let polled = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| first.as_mut().poll(&mut cx).is_ready()));
    assert!(polled.is_err());
    drop((first, next));
    assert_eq!((semaphore.in_use(), semaphore.queued(), fair.queued()), (0, 0, 0));
}

/// A place that nobody has in hand would have stopped the limit for good.
#[test]
fn user_code_that_panics_at_the_door_leaves_no_place_behind() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    let bucket = TokenBucket::per_second(10).burst(1).build().unwrap();
    let weigh = |tenant: KeyRef<'_>| if tenant == KeyRef::Number(1) { boom() } else { NonZeroU32::MIN };
    let fair = Fair::by("tenant", bucket.clone()).weights(weigh).build().unwrap();
    let (policy, order) = (gated(&fair), Order::default());
    bucket.try_take(1).unwrap();
    // One panics with a place at the limit, and one in line, behind another.
    let mut calls = Vec::new();
    for _ in 0..2 {
        let mut unweighed = call(&policy, &order, 1, 1, ms(10));
        assert!(catch_boom(|| Flag::default().poll(unweighed.as_mut()).is_ready()).is_none());
        drop(unweighed);
        assert_eq!(bucket.queued() as usize, calls.len());
        let mut waits = call(&policy, &order, 2, 2, ms(10));
        assert!(Flag::default().poll(waits.as_mut()).is_pending());
        calls.push(waits);
    }
    assert_eq!((bucket.queued(), fair.queued()), (1, 1));
    for served in 1..=2 {
        clock.advance(ms(100));
        for call in &mut calls {
            let _ = Flag::default().poll(call.as_mut());
        }
        assert_eq!(order.lock().unwrap().len(), served);
    }
}

/// A gate in which one may wait, and which does something while that one asks.
#[derive(Default)]
struct Narrow {
    waiting: AtomicU32,
    meanwhile: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    panics: AtomicBool,
}

impl Gate for Narrow {
    fn enter(&self, _: &Call) -> Entry {
        if self.waiting.fetch_add(1, Relaxed) == 0 {
            return Entry::Wait(Ticket::new(0, 0), None);
        }
        self.waiting.fetch_sub(1, Relaxed);
        Entry::Refused(Refusal::new("narrow", Reason::QueueFull))
    }

    fn poll_wait(&self, ticket: Ticket, _: &Call, _: &mut Context<'_>) -> Entry {
        let meanwhile = self.meanwhile.lock().unwrap().take();
        if let Some(code) = meanwhile {
            code();
        }
        Entry::Wait(ticket, None)
    }

    fn abandon(&self, _: Ticket) {
        self.waiting.fetch_sub(1, Relaxed);
        if self.panics.swap(false, Relaxed) {
            boom();
        }
    }

    fn leave(&self, _: Pass, _: Outcome) {}
}

type Tied = Mutex<Option<Pin<Box<dyn Future<Output = ()> + Send>>>>;

/// Polls a call as soon as it is woken, as another thread may.
struct AtOnce(Tied);

impl Wake for AtOnce {
    fn wake(self: Arc<Self>) {
        let call = self.0.lock().unwrap().take();
        if let Some(mut call) = call {
            let _ = call.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            *self.0.lock().unwrap() = Some(call);
        }
    }
}

/// The next was woken first, came at once, and found the place of the one before still taken.
#[test]
fn who_is_called_finds_the_place_at_the_limit_free() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    let fair = Fair::by("tenant", Narrow::default()).build().unwrap();
    let policy = gated(&fair);
    let refused = Arc::new(AtomicU32::new(0));
    let start = move |policy: &Policy, tenant: u64, cost: u32| {
        let (refused, call) = (refused.clone(), policy.call().owned().key("tenant", tenant).cost(cost));
        let run = async move {
            let end = call.run(std::future::pending::<Result<(), ()>>).await;
            refused.fetch_add(u32::from(end.is_err()), Relaxed);
            assert!(end.is_ok(), "{end:?}");
        };
        Box::pin(run) as Pin<Box<dyn Future<Output = ()> + Send>>
    };
    let mut large = start(&policy, 1, 10);
    let tied = Arc::new(AtOnce(Mutex::new(None)));
    let (own, second) = (tied.clone(), start.clone());
    let inside = policy.clone();
    *fair.limit().meanwhile.lock().unwrap() = Some(Box::new(move || {
        // A small call goes before it.
        let mut small = second(&inside, 2, 1);
        assert!(small.as_mut().poll(&mut Context::from_waker(&Waker::from(own.clone()))).is_pending());
        *own.0.lock().unwrap() = Some(small);
    }));
    assert!(Flag::default().poll(large.as_mut()).is_pending());
    assert_eq!((fair.limit().waiting.load(Relaxed), fair.queued()), (1, 1), "the small one waits at the limit");
    drop(large);
    drop(tied.0.lock().unwrap().take());
    assert_eq!((fair.limit().waiting.load(Relaxed), fair.queued()), (0, 0));
}

/// It stood in line when the limit panicked, and nobody had its place in hand.
#[test]
fn a_limit_that_panics_when_somebody_steps_aside_leaves_no_place_behind() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    let fair = Fair::by("tenant", Narrow::default()).build().unwrap();
    let policy = gated(&fair);
    let start = |tenant: u64, cost: u32| {
        Box::pin(policy.call().key("tenant", tenant).cost(cost).run(std::future::pending::<Result<(), ()>>))
    };
    let mut large = start(1, 10);
    assert!(Flag::default().poll(large.as_mut()).is_pending());
    fair.limit().panics.store(true, Relaxed);
    let mut small = start(2, 1);
    assert!(catch_boom(|| Flag::default().poll(small.as_mut()).is_pending()).is_none());
    drop(small);
    assert!(Flag::default().poll(large.as_mut()).is_pending());
    assert_eq!((fair.limit().waiting.load(Relaxed), fair.queued()), (1, 0), "the large one is at the limit again");
    drop(large);
    assert_eq!((fair.limit().waiting.load(Relaxed), fair.queued()), (0, 0));
}

/// A window gives all it has at once, so what is in line comes in steps.
#[tokio::test(start_paused = true)]
async fn at_the_door_of_a_window_the_steps_are_counted() {
    let fair = Fair::by("tenant", resile::SlidingWindow::per_second(2)).build().unwrap();
    let (policy, order) = (gated(&fair), Order::default());
    fair.limit().try_take(2).unwrap();
    let mut waiting: Vec<Running> = (0..5).map(|number| call(&policy, &order, 1, number, ms(1))).collect();
    for waits in &mut waiting {
        assert!(Flag::default().poll(waits.as_mut()).is_pending());
    }
    for (deadline, refused) in [(1500, true), (2500, false)] {
        let more = policy.call().key("tenant", 1_u64).deadline(ms(deadline)).run(|| async { Ok::<_, ()>(()) });
        let told = futures::future::poll_immediate(Box::pin(more).as_mut()).await;
        assert_eq!(told.is_some(), refused, "{deadline} ms");
    }
}
