//! Several limits on one call: all or none, and what a refusal says and costs.

mod support;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use proptest::prelude::*;
use resile::{
    Call, CircuitBreaker, Entry, Gate, Guard, Keyed, Layers, LayersBuilder, Outcome, Pass, Policy, Rate, Reason,
    Semaphore, State, TokenBucket,
};
use support::hand::{Clock, catch_boom};
use support::journal::Journal;
use support::script::boom;
use support::watch::Spy;

const HOUR: Duration = Duration::from_secs(3600);

fn hourly(burst: u32) -> TokenBucket {
    TokenBucket::at(Rate::new(1, HOUR)).burst(burst).build().unwrap()
}

fn enter(layers: &Layers) -> Result<Guard, (String, Reason, Option<Duration>)> {
    layers.try_acquire().map_err(|no| (no.gate().to_owned(), no.reason(), no.retry_after()))
}

#[tokio::test(start_paused = true)]
async fn a_call_pays_at_every_layer_or_at_none() {
    let (first, second, third) = (hourly(5), Semaphore::permits(2).build().unwrap(), hourly(1));
    let layers = Layers::new()
        .layer("first", first.clone())
        .layer("second", second.clone())
        .layer("third", third.clone())
        .build()
        .unwrap();
    let guard = enter(&layers).unwrap();
    assert_eq!((first.peek(), second.in_use(), third.peek()), (4, 1, 0));
    for _ in 0..3 {
        assert_eq!(enter(&layers).unwrap_err(), ("third".into(), Reason::Busy, Some(HOUR)));
    }
    assert_eq!((first.peek(), second.in_use()), (4, 1));
    guard.success();
    assert_eq!(second.in_use(), 0);
    assert_eq!(layers.refused().collect::<Vec<_>>(), [("first", 0), ("second", 0), ("third", 3)]);
}

#[tokio::test(start_paused = true)]
async fn the_refusal_names_the_first_and_waits_for_the_last() {
    let seconds = |per, burst| TokenBucket::at(Rate::new(1, Duration::from_secs(per))).burst(burst).build().unwrap();
    let (slow, quick, willing) = (seconds(7, 1), seconds(2, 1), seconds(100, 1));
    let layers = Layers::new()
        .layer("quick", quick.clone())
        .layer("willing", willing)
        .layer("slow", slow.clone())
        .build()
        .unwrap();
    quick.try_take(1).unwrap();
    slow.try_take(1).unwrap();
    let after = Duration::from_secs(7);
    assert_eq!(enter(&layers).unwrap_err(), ("quick".into(), Reason::Busy, Some(after)));
    tokio::time::advance(Duration::from_secs(2)).await;
    assert_eq!(enter(&layers).unwrap_err(), ("slow".into(), Reason::Busy, Some(Duration::from_secs(5))));
    tokio::time::advance(Duration::from_secs(5)).await;
    assert!(enter(&layers).is_ok(), "L17: waiting as told suffices");
}

/// After a calm time the first layer said no when it was entered, was looked at once more, and counted two refusals. Of
/// calls that might have waited it counted none.
#[tokio::test(start_paused = true)]
async fn each_refused_call_is_one_refusal_of_the_layer_that_says_no() {
    for patient in [false, true] {
        let per_tenant = Keyed::by("tenant", TokenBucket::at(Rate::new(1, HOUR)).burst(40)).build().unwrap();
        let layers = Layers::new().layer("tenant", per_tenant.clone()).layer("all", hourly(100)).build().unwrap();
        let policy = Policy::named("api").gate(layers).build().unwrap();
        let call = || {
            let call = policy.call().key("tenant", "acme");
            if patient { call } else { call.no_wait() }.run(|| async { Ok::<_, ()>(()) })
        };
        for _ in 0..40 {
            call().await.unwrap();
        }
        for refused in 1..4 {
            call().await.unwrap_err();
            assert_eq!(per_tenant.most_refused(1)[0].count, refused);
        }
    }
}

/// Whoever has too little time left was told so after a calm time, and that it is busy otherwise.
#[tokio::test(start_paused = true)]
async fn a_refusal_has_the_same_reason_calm_or_wary_and_whoever_asks() {
    let bucket = hourly(1);
    let layers = Layers::new().layer("bucket", bucket.clone()).layer("other", hourly(1)).build().unwrap();
    let policy = Policy::named("api").gate(layers).build().unwrap();
    let call = || policy.call().deadline(Duration::from_secs(1)).run(|| async { Ok::<_, ()>(()) });
    call().await.unwrap();
    for _ in 0..3 {
        let error = call().await.unwrap_err();
        let refusal = error.refusal().unwrap();
        assert_eq!((refusal.gate(), refusal.reason()), ("bucket", Reason::Busy));
        assert_eq!(refusal.retry_after(), Some(HOUR));
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_that_has_passed_layers_waits_further_in() {
    let permits = Semaphore::permits(1).build().unwrap();
    let layers = Layers::new().layer("all", hourly(5));
    let policy = Policy::named("api").gate(layers).gate(permits.clone()).build().unwrap();
    let held = permits.try_acquire().unwrap();
    let run = policy.run(|| async { Ok::<_, ()>(()) });
    let ((), ran) = tokio::join!(
        async {
            tokio::task::yield_now().await;
            assert_eq!(permits.queued(), 1);
            drop(held);
        },
        run
    );
    ran.unwrap();
}

/// Calm or wary, a refusal says and costs the same.
#[tokio::test(start_paused = true)]
async fn the_first_refusal_after_a_calm_time_costs_nothing_either() {
    for calls_before in [0, 5, 31, 32, 40] {
        let (first, last) = (hourly(100), Semaphore::permits(1).build().unwrap());
        let layers = Layers::new().layer("first", first.clone()).layer("last", last.clone()).build().unwrap();
        let refused = |layers: &Layers| {
            let held = last.try_acquire().unwrap();
            let before = first.peek();
            assert_eq!(enter(layers).unwrap_err(), ("last".into(), Reason::Busy, None));
            assert_eq!((first.peek(), last.queued()), (before, 0));
            drop(held);
        };
        refused(&layers);
        (0..calls_before).for_each(|_| enter(&layers).unwrap().success());
        refused(&layers);
        refused(&layers);
        assert_eq!(first.peek(), 100 - calls_before);
    }
}

#[tokio::test(start_paused = true)]
async fn who_does_not_know_when_leaves_the_advice_open() {
    let (bucket, semaphore) = (hourly(1), Semaphore::permits(1).build().unwrap());
    let layers = Layers::new().layer("bucket", bucket.clone()).layer("permits", semaphore.clone()).build().unwrap();
    bucket.try_take(1).unwrap();
    let held = semaphore.try_acquire().unwrap();
    assert_eq!(enter(&layers).unwrap_err(), ("bucket".into(), Reason::Busy, None));
    drop(held);
    assert_eq!(enter(&layers).unwrap_err(), ("bucket".into(), Reason::Busy, Some(HOUR)));
}

#[tokio::test(start_paused = true)]
async fn costs_and_keys_hold_at_each_layer() {
    let per = |key, burst| Keyed::by(key, TokenBucket::at(Rate::new(1, HOUR)).burst(burst)).build().unwrap();
    let (tenants, users) = (per("tenant", 10), per("user", 4));
    let layers = Layers::new().layer("tenant", tenants.clone()).layer("user", users.clone());
    let policy = Policy::named("api").gate(layers).build().unwrap();
    let call = |cost, user: &'static str| {
        let call = policy.call().key("tenant", "acme").cost(cost);
        let call = if user.is_empty() { call } else { call.key("user", user) };
        let ran = call.run(|| async { Ok::<_, ()>(()) });
        async { ran.await.map_err(|error| error.refusal().map(|no| (no.gate().to_owned(), no.reason())).unwrap()) }
    };
    call(4, "anna").await.unwrap();
    assert_eq!(call(1, "anna").await, Err(("user".into(), Reason::Busy)));
    assert_eq!(call(5, "bert").await, Err(("user".into(), Reason::CostAboveLimit { cost: 5, limit: 4 })));
    assert_eq!(call(1, "").await, Err(("user".into(), Reason::NoKey("user"))));
    assert_eq!(tenants.with("acme", TokenBucket::peek), Some(6));
    assert_eq!(users.with("bert", TokenBucket::peek), None);
    call(4, "bert").await.unwrap();
    assert_eq!(call(3, "carl").await, Err(("tenant".into(), Reason::Busy)));
    assert_eq!(users.with("carl", TokenBucket::peek), None);
}

#[tokio::test(start_paused = true)]
async fn a_patient_call_is_refused_rather_than_queued() {
    let (bucket, semaphore) = (hourly(5), Semaphore::permits(1).build().unwrap());
    let layers = Layers::new().layer("bucket", bucket.clone()).layer("permits", semaphore.clone()).build().unwrap();
    let held = semaphore.try_acquire().unwrap();
    let refusal = layers.acquire().await.unwrap_err();
    assert_eq!((refusal.gate(), semaphore.queued(), bucket.peek()), ("permits", 0, 5));
    drop(held);
    layers.acquire().await.unwrap().success();
    // Alone, nobody has looked at it before.
    let alone = Layers::new().layer("permits", semaphore.clone()).build().unwrap();
    let held = semaphore.try_acquire().unwrap();
    assert!(alone.acquire().await.is_err());
    assert_eq!(semaphore.queued(), 0);
    drop(held);
}

/// Says no only when it is entered.
struct Blind(Reason);

impl Gate for Blind {
    fn enter(&self, _: &Call) -> Entry {
        match self.0 {
            Reason::Other("boom") => boom(),
            reason => Entry::Refused(resile::Refusal::new("blind", reason)),
        }
    }

    fn leave(&self, _: Pass, _: Outcome) {}
}

#[tokio::test(start_paused = true)]
async fn a_late_no_or_a_panic_gives_back_what_was_taken() {
    for reason in [Reason::Other("late"), Reason::Other("boom")] {
        let (bucket, semaphore) = (hourly(5), Semaphore::permits(1).build().unwrap());
        let breaker = CircuitBreaker::builder().consecutive_failures(1).open_for(Duration::from_secs(1)).probes(1);
        let breaker = breaker.open_jitter(0.0).build().unwrap();
        breaker.try_acquire().unwrap().failure();
        tokio::time::advance(Duration::from_secs(1)).await;
        let journal = Journal::default();
        let layers = Layers::new()
            .layer("bucket", bucket.clone())
            .layer("permits", semaphore.clone())
            .layer("breaker", breaker.clone())
            .layer("spy", Spy::new("spy", &journal))
            .layer("blind", Blind(reason))
            .build()
            .unwrap();
        match catch_boom(|| enter(&layers).map(drop)) {
            Some(refused) => assert_eq!(refused, Err(("blind".into(), reason, None))),
            None => assert_eq!(reason, Reason::Other("boom")),
        }
        assert_eq!((bucket.peek(), semaphore.in_use()), (5, 0));
        assert_eq!(breaker.state(), State::HalfOpen);
        assert!(breaker.try_acquire().is_ok(), "the probe's place is back");
        journal.assert_nested();
    }
}

/// Panics when it is left, or settled.
struct Brittle(&'static str);

impl Gate for Brittle {
    fn enter(&self, _: &Call) -> Entry {
        Entry::Pass(Pass::default())
    }

    fn leave(&self, _: Pass, _: Outcome) {
        if self.0 == "left" {
            boom()
        }
    }

    fn settle(&self, _: &mut Pass, _: &Call, _: u32) {
        if self.0 == "settled" {
            boom()
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_layer_that_panics_keeps_nobody_from_being_left() {
    for when in ["left", "settled"] {
        let (outer, inner) = (Semaphore::permits(1).build().unwrap(), Semaphore::permits(1).build().unwrap());
        let layers = Layers::new().layer("outer", outer.clone()).layer("brittle", Brittle(when));
        let layers = layers.layer("inner", inner.clone()).build().unwrap();
        // As often as there are places, and more.
        for _ in 0..100 {
            let mut guard = enter(&layers).unwrap();
            assert_eq!((outer.in_use(), inner.in_use()), (1, 1));
            assert_eq!(catch_boom(|| guard.settle(2)).is_none(), when == "settled");
            assert_eq!(catch_boom(|| guard.success()).is_none(), when == "left");
            assert_eq!((outer.in_use(), inner.in_use()), (0, 0));
        }
    }
}

/// Goes through the layers that it is itself a layer of, on its way in and out.
#[derive(Default)]
struct Nested(Arc<OnceLock<Layers>>, AtomicBool);

impl Nested {
    fn go_through(&self) {
        if !self.1.swap(true, Ordering::Relaxed) {
            enter(self.0.get().unwrap()).unwrap().success();
            self.1.store(false, Ordering::Relaxed);
        }
    }
}

impl Gate for Nested {
    fn enter(&self, _: &Call) -> Entry {
        self.go_through();
        Entry::Pass(Pass::default())
    }

    fn leave(&self, _: Pass, _: Outcome) {
        self.go_through();
    }
}

#[tokio::test(start_paused = true)]
async fn layers_that_are_entered_again_on_the_way_in_or_out_keep_the_passes_apart() {
    let (journal, nested) = (Journal::default(), Nested::default());
    let cell = nested.0.clone();
    let layers = Layers::new()
        .layer("outer", Spy::new("outer", &journal))
        .layer("nested", nested)
        .layer("inner", Spy::new("inner", &journal))
        .build()
        .unwrap();
    cell.set(layers.clone()).expect("it is set once");
    let held: Vec<Guard> = (0..50).map(|_| enter(&layers).unwrap()).collect();
    held.into_iter().for_each(Guard::success);
    // Each of the 50 has gone through twice more.
    assert_eq!(["outer", "inner"].map(|name| journal.passages(name).len()), [150, 150]);
}

/// Threads that come and go, so that those who own a place change, and passes that are left on any of them.
#[tokio::test(start_paused = true)]
async fn passes_outlive_the_thread_that_took_them() {
    let permits = Semaphore::permits(10_000).build().unwrap();
    let layers = Layers::new().layer("permits", permits.clone()).build().unwrap();
    let mut held: Vec<Guard> = Vec::new();
    for round in 0..20_u32 {
        let (ended, going_on) = std::thread::scope(|scope| {
            let leaves = std::mem::take(&mut held);
            let ends = scope.spawn(move || leaves.into_iter().for_each(Guard::success));
            let threads: Vec<_> = (0..6)
                .map(|_| scope.spawn(|| (0..round).map(|_| enter(&layers).unwrap()).collect::<Vec<_>>()))
                .collect();
            let taken: Vec<Guard> = threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
            (ends.join(), taken)
        });
        ended.unwrap();
        assert_eq!(permits.in_use(), 6 * round);
        held = going_on;
    }
    drop(held);
    assert_eq!(permits.in_use(), 0);
}

/// A look at a bucket that has no more than what lies ahead said no to the thread that it lies with.
#[tokio::test(start_paused = true)]
async fn a_look_finds_what_the_thread_has_taken_ahead() {
    let bucket = TokenBucket::at(Rate::new(1, HOUR)).burst(8).batch(2).build().unwrap();
    let permits = Semaphore::permits(1).build().unwrap();
    let layers = Layers::new().layer("permits", permits.clone()).layer("bucket", bucket.clone()).build().unwrap();
    let held = permits.try_acquire().unwrap();
    assert!(enter(&layers).is_err(), "from now on the bucket is looked at");
    drop(held);
    bucket.try_take(1).unwrap();
    // One lies ahead if the thread has a purse, or else in the bucket.
    bucket.try_take(6).unwrap();
    enter(&layers).unwrap().success();
    assert_eq!(enter(&layers).unwrap_err(), ("bucket".into(), Reason::Busy, Some(HOUR)));
}

#[tokio::test(start_paused = true)]
async fn every_layer_hears_how_the_call_ended_inner_to_outer() {
    let journal = Journal::default();
    let breaker = CircuitBreaker::builder().consecutive_failures(1).build().unwrap();
    let layers = Layers::new()
        .layer("outer", Spy::new("outer", &journal))
        .layer("breaker", breaker.clone())
        .layer("inner", Spy::new("inner", &journal))
        .build()
        .unwrap();
    enter(&layers).unwrap().success();
    enter(&layers).unwrap().failure();
    journal.assert_nested();
    assert_eq!(breaker.state(), State::Open);
    assert_eq!(enter(&layers).unwrap_err().1, Reason::CircuitOpen);
    assert_eq!(journal.passages("inner").len(), 2);
    // The refusal came after a calm time: the outer layer was entered, and left as if nothing had been.
    let outer = journal.passages("outer");
    assert_eq!((outer.len(), outer[2].outcome), (3, Outcome::NotStarted));
}

#[test]
fn wrong_settings_are_told_with_their_layer() {
    assert_eq!(Layers::new().build().unwrap_err().to_string(), "layers: layers must be 1 to 16, is 0");
    let many = |count| (0..count).fold(Layers::new(), |layers: LayersBuilder, _| layers.layer("bucket", hourly(1)));
    assert!(many(16).build().is_ok());
    assert!(many(17).build().is_err());
    let wrong = Layers::new().layer("all", Semaphore::permits(0)).build().unwrap_err();
    assert!(wrong.to_string().starts_with(r#"layers, layer "all": semaphore: permits must be "#), "{wrong}");
}

#[tokio::test(start_paused = true)]
async fn threads_that_race_for_the_last_never_get_more_than_there_is() {
    let (wide, narrow) = (hourly(1000), hourly(100));
    let layers = Layers::new().layer("wide", wide.clone()).layer("narrow", narrow.clone()).build().unwrap();
    let took: u32 = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| (0..500).filter(|_| enter(&layers).map(Guard::success).is_ok()).count() as u32))
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    assert_eq!((took, narrow.peek()), (100, 0));
    // A token may be lost where one was taken between the taking and the giving back, but none is made.
    assert!(wide.peek() <= 900, "{}", wide.peek());
}

proptest! {
    /// Against three counters: what is taken is taken from all, and only when all have it; the advice is the longest.
    #[test]
    fn layers_decide_like_counters_that_are_all_asked_first(
        bursts in proptest::array::uniform3(1_u32..6),
        calls in proptest::collection::vec((0_u64..3, 0_u64..3000, 1_u32..4), 1..60),
    ) {
        let clock = Clock::paused();
        let _entered = clock.enter();
        let per = |key, burst| Keyed::by(key, TokenBucket::per_second(1).burst(burst)).build().unwrap();
        let (tenants, users) = (per("tenant", bursts[0]), per("user", bursts[1]));
        let all = TokenBucket::per_second(1).burst(bursts[2]).build().unwrap();
        let layers = Layers::new().layer("tenant", tenants).layer("user", users).layer("all", all).build().unwrap();
        let policy = Policy::named("api").gate(layers).build().unwrap();
        // By hand: a bucket per tenant, per user and for all.
        let bucket = |burst| TokenBucket::per_second(1).burst(burst).build().unwrap();
        let tenants: Vec<TokenBucket> = (0..3).map(|_| bucket(bursts[0])).collect();
        let users: Vec<TokenBucket> = (0..2).map(|_| bucket(bursts[1])).collect();
        let all = bucket(bursts[2]);
        for (tenant, millis, cost) in calls {
            clock.advance(Duration::from_millis(millis));
            let user = (tenant + millis) % 2;
            let three = [("tenant", &tenants[tenant as usize]), ("user", &users[user as usize]), ("all", &all)];
            let nos: Vec<_> = three
                .iter()
                .filter(|(_, bucket)| cost > bucket.peek())
                .map(|(name, bucket)| (*name, bucket.try_take(cost).unwrap_err()))
                .collect();
            let call = policy.call().key("tenant", tenant).key("user", user).cost(cost).no_wait();
            let answer = clock.block_on(call.run(|| async { Ok::<_, ()>(()) }));
            match nos.first() {
                None => {
                    prop_assert!(answer.is_ok());
                    for (_, bucket) in three {
                        bucket.try_take(cost).unwrap();
                    }
                }
                Some((name, first)) => {
                    let error = answer.unwrap_err();
                    let refusal = error.refusal().unwrap();
                    prop_assert_eq!((refusal.gate(), refusal.reason()), (*name, first.reason()));
                    let longest = nos.iter().map(|(_, no)| no.retry_after()).reduce(|a, b| Some(a?.max(b?)));
                    prop_assert_eq!(refusal.retry_after(), longest.flatten());
                }
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_call_has_really_cost_is_told_to_every_layer() {
    let (first, second) = (hourly(100), hourly(50));
    let per_tenant = Keyed::by("tenant", TokenBucket::at(Rate::new(1, HOUR)).burst(70)).build().unwrap();
    let layers = Layers::new().layer("first", first.clone()).layer("second", second.clone());
    let layers = layers.layer("tenant", per_tenant.clone()).build().unwrap();
    let policy = Policy::named("api").gate(layers.clone()).build().unwrap();
    let call = || policy.call().key("tenant", "acme").cost(10).settle(|cost: &Result<u32, ()>| cost.unwrap());
    let left = || [first.peek(), second.peek(), per_tenant.with("acme", TokenBucket::peek).unwrap()];
    call().run(|| async { Ok(3) }).await.unwrap();
    assert_eq!(left(), [97, 47, 67]);
    call().run(|| async { Ok(30) }).await.unwrap();
    assert_eq!(left(), [67, 17, 37]);
}

#[tokio::test(start_paused = true)]
async fn a_guard_of_layers_can_be_settled_again_and_again() {
    let (first, second) = (hourly(100), hourly(50));
    let layers = Layers::new().layer("first", first.clone()).layer("second", second.clone()).build().unwrap();
    let mut guard = layers.try_acquire_many(10).unwrap();
    for actual in [2, 20, 20, 0, 5] {
        guard.settle(actual);
        assert_eq!((first.peek(), second.peek()), (100 - actual, 50 - actual));
    }
    guard.success();
    assert_eq!((first.peek(), second.peek()), (95, 45));
}

/// Layers look at all before they enter any. The look must see through a clock that was ahead, too, or nobody enters.
#[test]
fn a_limiter_that_a_clock_from_ahead_has_emptied_is_not_empty_for_layers() {
    let windows = resile::SlidingWindow::per_second(1).build().unwrap();
    let rough = resile::SlidingWindow::per_second(1).exact_up_to(0).build().unwrap();
    let bucket = TokenBucket::per_second(1).burst(1).build().unwrap();
    let quota = resile::Quota::from_first_use(1, Duration::from_secs(1)).build().unwrap();
    let layers = Layers::new().layer("log", windows).layer("counts", rough).layer("bucket", bucket);
    let layers = layers.layer("quota", quota).build().unwrap();
    let (ahead, behind) = (Clock::paused(), Clock::paused());
    ahead.advance(HOUR);
    ahead.block_on(async { enter(&layers).unwrap().success() });
    let _entered = behind.enter();
    assert!(enter(&layers).is_err(), "what was taken counts as taken now");
    behind.advance(Duration::from_secs(2));
    enter(&layers).unwrap().success();
}
