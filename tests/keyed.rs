//! One gate per key: whose limit is whose, what is forgotten and what never is, and what comes back to which key.

mod support;

use std::collections::HashMap;
use std::future::pending;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::task::Poll;
use std::time::Duration;

use futures::future::poll_immediate;
use proptest::prelude::*;
use resile::{
    Call, CircuitBreaker, Entry, Gate, Guard, Key, KeyRef, Keyed, Layers, Moment, Outcome, Pass, PerKey, Plan, Policy,
    Quota, Rate, Reason, Semaphore, SlidingWindow, State, TokenBucket,
};
use support::hand::{Clock, Flag, catch_boom};
use support::journal::Journal;
use support::ms;
use support::script::boom;
use support::watch::Spy;

const HOUR: Duration = Duration::from_secs(3600);

fn hourly(burst: u32) -> resile::TokenBucketBuilder {
    TokenBucket::at(Rate::new(1, HOUR)).burst(burst)
}

fn buckets(burst: u32, capacity: u32) -> Keyed<TokenBucket> {
    Keyed::by("tenant", hourly(burst)).capacity(capacity).build().unwrap()
}

fn semaphores(permits: u32, capacity: u32) -> Keyed<Semaphore> {
    Keyed::by("tenant", Semaphore::permits(permits)).capacity(capacity).build().unwrap()
}

fn reason<T>(result: Result<T, resile::Refusal>) -> Option<Reason> {
    result.err().map(|refusal| refusal.reason())
}

#[tokio::test(start_paused = true)]
async fn each_key_has_a_limit_of_its_own() {
    let keyed = buckets(2, 10);
    for key in ["a", "b", ""] {
        keyed.try_take(key, 2).unwrap();
        let refusal = keyed.try_take(key, 1).unwrap_err();
        assert_eq!((refusal.gate(), refusal.reason(), refusal.retry_after()), ("tenant", Reason::Busy, Some(HOUR)));
    }
    keyed.try_take(1_u64, 2).unwrap();
    keyed.try_take("1", 2).unwrap();
    assert_eq!(keyed.stats().live, 5);
}

#[tokio::test(start_paused = true)]
async fn a_call_without_the_key_is_refused_and_charged_to_nobody() {
    let keyed = buckets(5, 10);
    let policy = Policy::named("api").gate(keyed.clone()).build().unwrap();
    for call in [policy.call(), policy.call().key("user", "acme"), policy.call().key("Tenant", "acme")] {
        let error = call.run(|| async { Ok::<_, ()>(()) }).await.unwrap_err();
        assert_eq!(error.refusal().unwrap().reason(), Reason::NoKey("tenant"));
        assert_eq!(error.to_string(), r#"api: refused by "tenant": the call has no key "tenant""#);
    }
    assert_eq!(keyed.stats().live, 0);
    policy.call().key("tenant", "acme").cost(5).run(|| async { Ok::<_, ()>(()) }).await.unwrap();
    assert_eq!(keyed.with("acme", TokenBucket::peek), Some(0));
}

#[tokio::test(start_paused = true)]
async fn a_key_takes_the_same_room_whatever_its_length() {
    let keyed = buckets(1, 1000);
    let before = keyed.stats().bytes;
    let huge = "x".repeat(1 << 20);
    let longer = format!("{huge}x");
    keyed.try_take(&huge, 1).unwrap();
    keyed.try_take(&longer, 1).unwrap();
    assert!(keyed.try_take(&huge, 1).is_err());
    assert_eq!((keyed.stats().live, keyed.stats().bytes), (2, before));
    assert!(before < 1000 * 38 + 6000, "{before}, the two sketches included");
    for top in keyed.most_refused(10) {
        assert!(matches!(top.key, Key::Text(text) if text.len() <= 46));
    }
}

#[test]
fn wrong_settings_are_told_with_their_place() {
    let told = |wrong: Result<Keyed<TokenBucket>, resile::ConfigError>| wrong.unwrap_err().to_string();
    let zero = Keyed::by("tenant", hourly(1)).capacity(0).build();
    assert_eq!(told(zero), "keyed \"tenant\": capacity must be 1 to 268435456, is 0");
    assert!(Keyed::by("tenant", hourly(1)).capacity(268_435_457).build().is_err());
    let both = Keyed::by("tenant", hourly(0)).overflow(TokenBucket::per_second(0)).build();
    assert_eq!(both.unwrap_err().faults().len(), 2);
    assert!(
        told(Keyed::by("tenant", hourly(0)).build()).starts_with(r#"keyed "tenant", each key: bucket: burst must be "#)
    );
    assert!(Plan::new(hourly(0)).is_err());
}

#[tokio::test(start_paused = true)]
async fn only_what_is_as_good_as_new_makes_room() {
    let keyed = Keyed::by("tenant", TokenBucket::per_second(1).burst(2)).capacity(3).build().unwrap();
    keyed.try_take("one", 1).unwrap();
    keyed.try_take("two", 2).unwrap();
    keyed.try_take("also two", 2).unwrap();
    assert_eq!(reason(keyed.try_take("new", 1)), Some(Reason::KeySpaceFull));
    tokio::time::advance(ms(999)).await;
    assert_eq!(reason(keyed.try_take("new", 1)), Some(Reason::KeySpaceFull), "not yet full again");
    tokio::time::advance(ms(1)).await;
    keyed.try_take("new", 2).unwrap();
    assert_eq!(keyed.with("one", |_| ()), None, "it was as good as new");
    assert_eq!((keyed.with("two", TokenBucket::peek), keyed.with("also two", TokenBucket::peek)), (Some(1), Some(1)));
    let stats = keyed.stats();
    assert_eq!((stats.capacity, stats.live, stats.evicted, stats.overflowed), (3, 3, 1, 2));
}

#[tokio::test(start_paused = true)]
async fn a_new_key_that_is_refused_takes_no_room() {
    let keyed = buckets(2, 10);
    assert_eq!(reason(keyed.try_take("a", 3)), Some(Reason::CostAboveLimit { cost: 3, limit: 2 }));
    assert_eq!(keyed.stats().live, 0);
}

#[tokio::test(start_paused = true)]
async fn a_flood_of_keys_neither_grows_the_table_nor_frees_who_is_limited() {
    let keyed = Keyed::by("tenant", TokenBucket::per_second(10).burst(5)).capacity(1000).build().unwrap();
    let slow = buckets(5, 1000);
    let bytes = keyed.stats().bytes;
    for key in ["greedy", "worse"] {
        keyed.try_take(key, 5).unwrap();
        slow.try_take(key, 5).unwrap();
    }
    let mut passed = [0; 2];
    for made_up in 0..200_000_u64 {
        passed[0] += u32::from(keyed.try_take(made_up, 1).is_ok());
        passed[1] += u32::from(slow.try_take(made_up, 1).is_ok());
        if made_up % 1000 == 0 {
            tokio::time::advance(ms(10)).await;
            if keyed.try_take("greedy", 1).is_ok() {
                assert!(keyed.try_take("greedy", 2).is_err(), "no more than has come since");
            }
            assert_eq!(reason(slow.try_take("worse", 1)), Some(Reason::Busy));
            assert!(keyed.stats().live <= 1000 && slow.stats().live <= 1000);
        }
    }
    assert_eq!(passed[1], 998, "whoever came first has an entry for an hour, the others have none");
    assert!(passed[0] > 15_000, "{} made room in time", passed[0]);
    assert_eq!((keyed.stats().bytes, slow.stats().bytes), (bytes, bytes));
    assert_eq!(slow.with("greedy", TokenBucket::peek), Some(0));
}

#[tokio::test(start_paused = true)]
async fn threads_flood_and_nobody_gets_more_than_the_burst() {
    let keyed = buckets(5, 64);
    let took: u32 = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4_u64)
            .map(|thread| {
                let keyed = &keyed;
                scope.spawn(move || {
                    let mut took = 0;
                    for n in 0..20_000 {
                        let _ = keyed.try_take(1_000_000 + (n * 4 + thread) % 500, 1);
                        took += u32::from(keyed.try_take("greedy", 1).is_ok());
                    }
                    took
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    assert!(took <= 5, "{took}");
    assert_eq!(keyed.stats().live, 64);
}

#[tokio::test(start_paused = true)]
async fn keys_without_room_can_share_a_gate() {
    let keyed = Keyed::by("tenant", hourly(5)).capacity(2).overflow(hourly(3)).named("limits").build().unwrap();
    keyed.try_take("a", 1).unwrap();
    keyed.try_take("b", 1).unwrap();
    keyed.try_take("c", 2).unwrap();
    keyed.try_take("d", 1).unwrap();
    let refusal = keyed.try_take("e", 1).unwrap_err();
    assert_eq!((refusal.gate(), refusal.reason()), ("limits", Reason::Busy));
    keyed.try_take("a", 4).unwrap();
    assert_eq!((keyed.stats().live, keyed.stats().overflowed), (2, 3));

    let permits =
        Keyed::by("tenant", Semaphore::permits(5)).capacity(1).overflow(Semaphore::permits(1)).build().unwrap();
    let held = permits.of("a").try_acquire().unwrap();
    let shared = permits.of("b").try_acquire().unwrap();
    assert_eq!(reason(permits.of("c").try_acquire()), Some(Reason::Busy));
    drop(shared);
    let again = permits.of("c").try_acquire().unwrap();
    drop((held, again));
    assert_eq!(permits.stats().pinned, 0);
}

#[tokio::test(start_paused = true)]
async fn who_waits_at_a_key_is_served_in_order_and_keeps_the_entry_in_place() {
    let keyed = Keyed::by("tenant", TokenBucket::per_second(10).burst(1)).capacity(1).build().unwrap();
    keyed.try_take("a", 1).unwrap();
    let one = keyed.of("a");
    let start = tokio::time::Instant::now();
    let (mut first, mut second) = (pin!(one.acquire()), pin!(one.acquire()));
    assert!(poll_immediate(first.as_mut()).await.is_none() && poll_immediate(second.as_mut()).await.is_none());
    assert_eq!(keyed.stats().pinned, 1);
    assert_eq!(reason(keyed.try_take("b", 1)), Some(Reason::KeySpaceFull));
    first.await.unwrap().success();
    assert_eq!(start.elapsed(), ms(100));
    second.await.unwrap().success();
    assert_eq!(start.elapsed(), ms(200));
    assert_eq!(keyed.stats().pinned, 0);
    assert!(keyed.try_take("a", 1).is_err(), "its state is a word again, and the same");
    tokio::time::advance(ms(100)).await;
    keyed.try_take("b", 1).unwrap();
    assert_eq!(keyed.stats().live, 1);
}

#[tokio::test(start_paused = true)]
async fn a_pass_finds_its_own_entry_however_the_table_has_changed() {
    let keyed = semaphores(2, 100);
    let held: Vec<(u64, Guard)> = (0..50).map(|key| (key, keyed.of(key).try_acquire().unwrap())).collect();
    for made_up in 1000..3000_u64 {
        keyed.of(made_up).try_acquire().unwrap().success();
    }
    assert_eq!((keyed.stats().live, keyed.stats().pinned), (100, 50));
    for (key, guard) in held {
        assert_eq!(keyed.with(key, Semaphore::in_use), Some(1));
        drop(guard);
        assert_eq!(keyed.with(key, Semaphore::in_use), Some(0));
    }
    assert_eq!(keyed.stats().pinned, 0);
    assert_eq!(keyed.sweep(1000), 100);
    assert_eq!(keyed.stats().live, 0);
}

#[tokio::test(start_paused = true)]
async fn what_came_to_nothing_goes_back_to_its_key_and_to_no_other() {
    let keyed = Keyed::by("tenant", TokenBucket::per_second(1).burst(4)).capacity(1).build().unwrap();
    let full = Semaphore::permits(1).max_queue(0).build().unwrap();
    let policy = Policy::named("api").gate(keyed.clone()).gate(full.clone()).build().unwrap();
    let permit = full.try_acquire().unwrap();
    let call = policy.call().key("tenant", "a").cost(1).run(|| async { Ok::<_, ()>(()) }).await;
    assert!(call.is_err());
    assert_eq!(keyed.with("a", TokenBucket::peek), Some(4));
    drop(permit);

    // A pass of a key that is forgotten meanwhile.
    let waits = Semaphore::permits(1).build().unwrap();
    let policy = Policy::named("api").gate(keyed.clone()).gate(waits.clone()).build().unwrap();
    let permit = waits.try_acquire().unwrap();
    {
        let mut call = pin!(policy.call().key("tenant", "b").run(|| async { Ok::<_, ()>(()) }));
        assert!(poll_immediate(call.as_mut()).await.is_none());
        assert_eq!(keyed.with("b", TokenBucket::peek), Some(3));
        tokio::time::advance(Duration::from_secs(1)).await;
        keyed.try_take("c", 1).unwrap();
        assert_eq!(keyed.with("b", |_| ()), None);
    }
    assert_eq!(keyed.with("c", TokenBucket::peek), Some(3), "nothing of another's");
    drop(permit);
}

#[tokio::test(start_paused = true)]
async fn a_refund_reaches_a_bucket_at_which_somebody_waits_by_now() {
    let keyed = buckets(1, 10);
    let busy = Semaphore::permits(1).build().unwrap();
    let permit = busy.try_acquire().unwrap();
    let policy = Policy::named("api").gate(keyed.clone()).gate(busy.clone()).build().unwrap();
    let mut call = Box::pin(policy.call().key("tenant", "a").run(|| async { Ok::<_, ()>(()) }));
    assert!(poll_immediate(call.as_mut()).await.is_none());
    let mut waiter = pin!(keyed.of("a").acquire());
    assert!(poll_immediate(waiter.as_mut()).await.is_none());
    drop(call);
    let start = tokio::time::Instant::now();
    waiter.await.unwrap().success();
    assert_eq!(start.elapsed(), Duration::ZERO, "the token that came back");
    assert_eq!(keyed.stats().pinned, 0);
    drop(permit);
}

#[tokio::test(start_paused = true)]
async fn keys_have_their_plans_and_follow_them() {
    let gold = Plan::new(hourly(10)).unwrap();
    let golden: Arc<std::sync::Mutex<Vec<&str>>> = Arc::default();
    let keyed = Keyed::by("tenant", hourly(2))
        .plans({
            let (gold, golden) = (gold.clone(), golden.clone());
            move |key| golden.lock().unwrap().iter().any(|name| KeyRef::Text(name) == key).then(|| gold.clone())
        })
        .build()
        .unwrap();
    golden.lock().unwrap().push("rich");
    keyed.try_take("rich", 8).unwrap();
    keyed.try_take("poor", 1).unwrap();
    assert!(keyed.try_take("poor", 2).is_err());

    gold.set(hourly(5)).unwrap();
    keyed.plan().set(hourly(4)).unwrap();
    assert_eq!(reason(keyed.try_take("rich", 6)), Some(Reason::CostAboveLimit { cost: 6, limit: 5 }));
    keyed.try_take("rich", 2).unwrap();
    assert!(keyed.try_take("rich", 1).is_err(), "what was spent stays spent");
    keyed.try_take("poor", 1).unwrap();
    assert!(keyed.try_take("poor", 1).is_err(), "a larger burst is room, not tokens");
    keyed.try_take("new", 4).unwrap();

    golden.lock().unwrap().push("poor");
    assert_eq!(reason(keyed.try_take("poor", 5)), Some(Reason::CostAboveLimit { cost: 5, limit: 4 }));
    keyed.reassign();
    assert_eq!(reason(keyed.try_take("poor", 5)), Some(Reason::Busy));
    assert!(gold.set(hourly(0)).is_err());
    assert_eq!(reason(keyed.try_take("poor", 5)), Some(Reason::Busy));
}

/// How many more a key is let in for.
fn passes<G: PerKey>(keyed: &Keyed<G>) -> usize {
    std::iter::from_fn(|| keyed.of("a").try_acquire().ok()).take(100).map(Guard::success).count()
}

#[tokio::test(start_paused = true)]
async fn a_plan_reaches_windows_and_quotas_that_are_in_use() {
    // From a log to counters, too.
    let windows = Keyed::by("tenant", SlidingWindow::per_minute(3)).build().unwrap();
    assert_eq!(passes(&windows), 3);
    windows.plan().set(SlidingWindow::per_minute(5)).unwrap();
    assert_eq!(passes(&windows), 2);
    windows.plan().set(SlidingWindow::per_minute(9).exact_up_to(0)).unwrap();
    assert_eq!(passes(&windows), 4);
    windows.plan().set(SlidingWindow::per_minute(1)).unwrap();
    assert_eq!(passes(&windows), 0);

    let quotas = Keyed::by("tenant", Quota::per_day(3)).build().unwrap();
    assert_eq!(passes(&quotas), 3);
    quotas.plan().set(Quota::per_day(5)).unwrap();
    assert_eq!(passes(&quotas), 2);
    quotas.plan().set(Quota::per_hour(50)).unwrap();
    assert_eq!(passes(&quotas), 0, "windows of another length are not taken over while in use");
}

#[tokio::test(start_paused = true)]
async fn a_plan_reaches_who_waits_and_permits_that_are_out() {
    let keyed = Keyed::by("tenant", Semaphore::permits(1)).build().unwrap();
    let held = keyed.of("a").try_acquire().unwrap();
    let mut waiter = pin!(keyed.of("a").acquire());
    assert!(poll_immediate(waiter.as_mut()).await.is_none());
    keyed.plan().set(Semaphore::permits(2)).unwrap();
    assert!(keyed.of("a").try_acquire().is_err(), "who calls brings the news, and the waiter comes first");
    let second = poll_immediate(waiter.as_mut()).await.expect("a permit").unwrap();
    assert_eq!(keyed.with("a", Semaphore::limit), Some(2));
    drop((held, second));

    let slow = Keyed::by("tenant", hourly(1)).build().unwrap();
    slow.try_take("a", 1).unwrap();
    let mut waiter = pin!(slow.of("a").acquire());
    assert!(poll_immediate(waiter.as_mut()).await.is_none());
    slow.plan().set(TokenBucket::per_second(10).burst(1)).unwrap();
    let _ = slow.try_take("a", 1);
    let start = tokio::time::Instant::now();
    waiter.await.unwrap().success();
    assert!(start.elapsed() <= ms(101));
}

#[tokio::test(start_paused = true)]
async fn a_plan_that_nobody_can_change_any_more_still_holds() {
    let keyed = Keyed::by("tenant", hourly(1)).plans(|_| Some(Plan::new(hourly(3)).unwrap())).build().unwrap();
    keyed.try_take("a", 2).unwrap();
    assert!(keyed.try_take("a", 2).is_err());
    keyed.try_take("a", 1).unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_breaker_per_key_opens_for_that_key_and_is_kept_until_it_has_closed() {
    let breaker = CircuitBreaker::builder().consecutive_failures(2).probes(1).open_for(ms(100)).open_jitter(0.0);
    let keyed = Keyed::by("peer", breaker).capacity(2).build().unwrap();
    for _ in 0..2 {
        keyed.of("bad").try_acquire().unwrap().failure();
        keyed.of("good").try_acquire().unwrap().success();
    }
    let refusal = keyed.of("bad").try_acquire().unwrap_err();
    assert_eq!((refusal.gate(), refusal.reason(), refusal.retry_after()), ("peer", Reason::CircuitOpen, Some(ms(100))));
    for made_up in 0..100_u64 {
        keyed.of(made_up).try_acquire().unwrap().success();
    }
    assert_eq!(keyed.with("bad", CircuitBreaker::state), Some(State::Open));
    tokio::time::advance(ms(100)).await;
    let probe = keyed.of("bad").try_acquire().unwrap();
    assert_eq!(reason(keyed.of("bad").try_acquire()), Some(Reason::Probing));
    probe.success();
    assert_eq!(keyed.with("bad", CircuitBreaker::state), Some(State::Closed));
    assert_eq!(keyed.sweep(10), 2);
}

#[tokio::test(start_paused = true)]
async fn a_breaker_with_a_count_in_its_window_is_not_forgotten() {
    let breaker = CircuitBreaker::builder().failure_rate(0.5).over(Duration::from_secs(10)).min_calls(2);
    let keyed = Keyed::by("peer", breaker).capacity(1).build().unwrap();
    let pass = keyed.of("a").try_acquire().unwrap();
    assert_eq!(reason(keyed.of("b").try_acquire()), Some(Reason::KeySpaceFull), "K4: a pass is out");
    pass.failure();
    assert_eq!(reason(keyed.of("b").try_acquire()), Some(Reason::KeySpaceFull));
    tokio::time::advance(Duration::from_secs(10)).await;
    keyed.of("b").try_acquire().unwrap().success();
    assert_eq!(keyed.with("a", |_| ()), None);
}

#[tokio::test(start_paused = true)]
async fn a_breaker_with_failures_in_a_row_or_forced_open_is_not_forgotten() {
    let breaker = CircuitBreaker::builder().consecutive_failures(2);
    let keyed = Keyed::by("peer", breaker).capacity(1).build().unwrap();
    keyed.of("a").try_acquire().unwrap().failure();
    assert_eq!(reason(keyed.of("b").try_acquire()), Some(Reason::KeySpaceFull));
    keyed.of("a").try_acquire().unwrap().failure();
    assert_eq!(keyed.with("a", CircuitBreaker::state), Some(State::Open));
    keyed.with("a", CircuitBreaker::reset).unwrap();
    assert_eq!(reason(keyed.of("b").try_acquire()), None);
    keyed.with("b", CircuitBreaker::force_open).unwrap();
    assert_eq!(reason(keyed.of("a").try_acquire()), Some(Reason::KeySpaceFull));
}

/// A gate whose every method uses the table that it is in.
struct Nosy {
    table: Arc<OnceLock<Keyed<Nosy>>>,
    asked: Arc<AtomicU32>,
    used: AtomicBool,
}

impl Nosy {
    fn look_around(&self) {
        self.asked.fetch_add(1, Relaxed);
        if let Some(table) = self.table.get() {
            assert!(table.stats().live <= 2);
        }
    }
}

impl Gate for Nosy {
    fn enter(&self, _: &Call) -> Entry {
        self.look_around();
        self.used.store(true, Relaxed);
        Entry::Pass(Pass::new(1, 2))
    }

    fn leave(&self, pass: Pass, _: Outcome) {
        self.look_around();
        assert_eq!(pass, Pass::new(1, 2));
        self.used.store(false, Relaxed);
    }
}

impl PerKey for Nosy {
    fn another(&self) -> Self {
        self.look_around();
        Self { table: self.table.clone(), asked: self.asked.clone(), used: AtomicBool::new(false) }
    }

    fn is_fresh(&self, _: Moment) -> bool {
        self.look_around();
        !self.used.load(Relaxed)
    }

    fn adopt(&self, _: &Self) {
        self.look_around();
    }
}

impl Drop for Nosy {
    fn drop(&mut self) {
        self.look_around();
    }
}

#[tokio::test(start_paused = true)]
async fn code_of_users_runs_under_no_lock() {
    let (table, asked) = (Arc::new(OnceLock::new()), Arc::new(AtomicU32::new(0)));
    let nosy = || Nosy { table: table.clone(), asked: asked.clone(), used: AtomicBool::new(false) };
    let keyed = Keyed::by("tenant", nosy())
        .plans({
            let table = table.clone();
            move |_| {
                table
                    .get()
                    .and_then(|table: &Keyed<Nosy>| Some(Plan::clone(table.plan())).filter(|_| table.stats().live < 9))
            }
        })
        .capacity(2)
        .build()
        .unwrap();
    assert!(table.set(keyed.clone()).is_ok());
    for key in 0..50_u64 {
        let pass = keyed.of(key).try_acquire().unwrap();
        assert_eq!(keyed.stats().pinned, 1);
        drop(pass);
        keyed.reassign();
        if key % 5 == 0 {
            keyed.plan().set(nosy()).unwrap();
        }
        keyed.of(key).try_acquire().unwrap().success();
        assert_eq!(keyed.with(key, |gate| gate.used.load(Relaxed)), Some(false));
    }
    keyed.sweep(10);
    assert_eq!((keyed.stats().live, keyed.stats().pinned), (0, 0));
    assert!(asked.load(Relaxed) > 300);
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_code_of_users_pins_nothing() {
    static BOOM: AtomicU32 = AtomicU32::new(0);
    struct Bomb;
    fn stage(stage: u32) {
        if BOOM.load(Relaxed) == stage {
            boom();
        }
    }
    impl Gate for Bomb {
        fn enter(&self, _: &Call) -> Entry {
            stage(1);
            Entry::Pass(Pass::default())
        }
        fn leave(&self, _: Pass, _: Outcome) {
            stage(2);
        }
    }
    impl PerKey for Bomb {
        fn another(&self) -> Self {
            stage(3);
            Self
        }
        fn is_fresh(&self, _: Moment) -> bool {
            stage(4);
            true
        }
        fn adopt(&self, _: &Self) {
            stage(5);
        }
    }
    let keyed = Keyed::by("tenant", Bomb)
        .plans(|_| {
            stage(6);
            None
        })
        .capacity(1)
        .build()
        .unwrap();
    for turn in 1..=6 {
        keyed.of("old").try_acquire().unwrap().success();
        keyed.plan().set(Bomb).unwrap();
        BOOM.store(turn, Relaxed);
        let key = if turn == 5 { "old" } else { "new" };
        let ran = catch_boom(|| keyed.of(key).try_acquire().unwrap().success());
        assert!(ran.is_none(), "stage {turn}");
        BOOM.store(0, Relaxed);
        assert_eq!(keyed.stats().pinned, 0, "stage {turn}");
        keyed.of("another").try_acquire().unwrap().success();
    }
}

#[tokio::test(start_paused = true)]
async fn the_heaviest_and_the_most_refused_are_named() {
    let keyed = Keyed::by("tenant", TokenBucket::per_second(1).burst(100_000)).capacity(20_000).build().unwrap();
    for n in 0..20_000_u64 {
        keyed.try_take("heavy", 2).unwrap();
        keyed.try_take("medium", 1).unwrap();
        keyed.try_take(n % 5000, 1).unwrap();
    }
    let _ = keyed.try_take("greedy", 100_001);
    let _ = keyed.try_take("greedy", 100_001);
    let _ = keyed.try_take(7_u64, 100_001);
    let names = |keys: Vec<resile::TopKey>| keys.into_iter().map(|top| top.key).collect::<Vec<_>>();
    assert_eq!(names(keyed.heaviest(2)), [Key::from("heavy"), Key::from("medium")]);
    let heavy = &keyed.heaviest(1)[0];
    assert!(heavy.count.abs_diff(40_000) <= heavy.error + 5 * 8 * 200, "{heavy:?}");
    let refused = keyed.most_refused(5);
    assert_eq!((refused[0].count, refused[0].error), (2, 0));
    assert_eq!(names(refused), [Key::from("greedy"), Key::from(7_u32)]);
}

/// A look said yes to every new key: so each call of a flood took a token of the layers before, and put it back only if
/// nobody else had taken one since.
#[tokio::test(start_paused = true)]
async fn a_look_knows_that_there_is_no_room() {
    for shared in [false, true] {
        let journal = Journal::default();
        let first = Spy::new("first", &journal);
        let mut per_tenant = Keyed::by("tenant", TokenBucket::per_second(1).burst(2)).capacity(1);
        if shared {
            per_tenant = per_tenant.overflow(hourly(1));
        }
        let per_tenant = per_tenant.build().unwrap();
        let layers = Layers::new().layer("first", first.clone()).layer("tenant", per_tenant.clone()).build().unwrap();
        let policy = Policy::named("api").gate(layers).build().unwrap();
        let call = |tenant: u64| policy.call().key("tenant", tenant).run(|| async { Ok::<_, ()>(()) });
        per_tenant.try_take("busy", 1).unwrap();
        if shared {
            per_tenant.try_take("other", 1).unwrap();
        }
        assert!(call(0).await.is_err());
        let asked = first.asked();
        for made_up in 1..100 {
            let error = call(made_up).await.unwrap_err();
            let reason = if shared { Reason::Busy } else { Reason::KeySpaceFull };
            assert_eq!(error.refusal().map(resile::Refusal::reason), Some(reason));
        }
        assert_eq!(first.asked(), asked, "nothing is taken where nothing can come of it");
        tokio::time::advance(Duration::from_secs(1)).await;
        call(100).await.unwrap();
        assert_eq!(per_tenant.with("busy", |_| ()), None, "there is room by now");
    }
}

/// Layers that refuse look before they enter, and a look went by the old settings: whoever was refused by them never
/// entered, and so never followed.
#[tokio::test(start_paused = true)]
async fn new_settings_reach_a_key_that_is_only_looked_at() {
    let rich = Plan::new(TokenBucket::per_second(1000).burst(10)).unwrap();
    let is_rich = Arc::new(AtomicBool::new(false));
    let (plan, paid) = (rich.clone(), is_rich.clone());
    let buckets = Keyed::by("tenant", hourly(1)).plans(move |_| paid.load(Relaxed).then(|| plan.clone()));
    let buckets = buckets.build().unwrap();
    let permits = semaphores(1, 10);
    let layers = |gate: &dyn Fn(resile::LayersBuilder) -> resile::LayersBuilder| {
        let layers = gate(Layers::new().layer("all", TokenBucket::per_second(1000).burst(100))).build().unwrap();
        Policy::named("api").gate(layers).build().unwrap()
    };
    let run = |policy: &Policy| {
        let call = policy.call().owned().key("tenant", "a");
        call.run(|| async { Ok::<_, ()>(()) })
    };

    let policy = layers(&|layers| layers.layer("tenant", buckets.clone()));
    run(&policy).await.unwrap();
    assert!(run(&policy).await.is_err() && run(&policy).await.is_err());
    buckets.plan().set(TokenBucket::per_second(1000).burst(5)).unwrap();
    assert!(run(&policy).await.is_err(), "it follows, and has no token yet");
    tokio::time::advance(ms(1)).await;
    run(&policy).await.unwrap();
    assert!(run(&policy).await.is_err());
    buckets.plan().set(hourly(1)).unwrap();
    assert!(run(&policy).await.is_err());
    is_rich.store(true, Relaxed);
    buckets.reassign();
    assert!(run(&policy).await.is_err());
    tokio::time::advance(ms(1)).await;
    run(&policy).await.unwrap();

    let policy = layers(&|layers| layers.layer("tenant", permits.clone()));
    let held = permits.of("a").try_acquire().unwrap();
    assert!(run(&policy).await.is_err() && run(&policy).await.is_err());
    permits.plan().set(Semaphore::permits(2)).unwrap();
    run(&policy).await.unwrap();
    drop(held);
    assert_eq!((permits.stats().pinned, buckets.stats().pinned), (0, 0));
}

/// Of gates that have to be asked, eight were looked at where sixty-four had been said.
#[tokio::test(start_paused = true)]
async fn a_sweep_looks_at_as_many_entries_as_it_is_told_and_goes_round_once() {
    let (buckets, permits) = (buckets(5, 300), semaphores(1, 300));
    for key in 0..300_u64 {
        buckets.try_take(key, 1).unwrap();
        permits.of(key).try_acquire().unwrap().success();
    }
    tokio::time::advance(HOUR).await;
    assert_eq!((buckets.sweep(100), permits.sweep(100)), (100, 100));
    assert_eq!((buckets.sweep(u32::MAX), permits.sweep(u32::MAX)), (200, 200));
}

/// K6: whatever a call waits for, dropped at any point it leaves no pass, no place in a queue and no pin behind.
#[test]
fn a_call_dropped_at_any_point_leaves_nothing_behind() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    for cut in 0..8 {
        for keys in [["a", "a"], ["a", "b"]] {
            let buckets = Keyed::by("tenant", TokenBucket::per_second(100).burst(1)).capacity(2).build().unwrap();
            let permits = semaphores(1, 2);
            let policy = Policy::named("api").gate(buckets.clone()).gate(permits.clone()).build().unwrap();
            let _ = (buckets.try_take("a", 1), buckets.try_take("b", 1));
            let mut held = Some(permits.of(keys[0]).try_acquire().unwrap());
            let call = |key| Box::pin(policy.call().key("tenant", key).run(pending::<Result<(), ()>>));
            let (mut first, mut second) = (call(keys[0]), call(keys[1]));
            for point in 0..cut {
                let flag = Flag::default();
                assert!(flag.poll(first.as_mut()).is_pending());
                assert!(flag.poll(second.as_mut()).is_pending());
                if point == 4 {
                    held = None;
                } else {
                    clock.advance(ms(10));
                }
            }
            drop(first);
            clock.advance(ms(100));
            assert!(Flag::default().poll(second.as_mut()).is_pending());
            drop(second);
            drop(held);
            assert_eq!((buckets.stats().pinned, permits.stats().pinned), (0, 0), "cut {cut}");
            for key in keys {
                assert_eq!(permits.with(key, |gate| (gate.in_use(), gate.queued())).unwrap_or((0, 0)), (0, 0));
            }
            clock.advance(ms(100));
            assert_eq!(
                (buckets.sweep(10), permits.sweep(10)),
                (buckets.stats().evicted as u32, permits.stats().evicted as u32)
            );
            assert_eq!((buckets.stats().live, permits.stats().live), (0, 0));
        }
    }
}

#[test]
fn grants_that_race_drops_go_to_the_next() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    let keyed = semaphores(1, 1);
    let one = keyed.of("a");
    let held = one.try_acquire().unwrap();
    let (mut first, mut second) = (Box::pin(one.acquire()), Box::pin(one.acquire()));
    let flags = [Flag::default(), Flag::default()];
    assert!(flags[0].poll(first.as_mut()).is_pending() && flags[1].poll(second.as_mut()).is_pending());
    drop(held);
    assert!(flags[0].woken() && !flags[1].woken());
    drop(first);
    assert!(flags[1].woken());
    let Poll::Ready(Ok(guard)) = flags[1].poll(second.as_mut()) else { panic!("granted") };
    assert_eq!(keyed.stats().pinned, 1);
    guard.success();
    assert_eq!((keyed.stats().pinned, keyed.with("a", Semaphore::in_use)), (0, Some(0)));
}

/// A key follows a change of plan at its next call.
fn follow(bucket: &TokenBucket, its_rate: &mut u64, rate: u64) {
    if *its_rate != rate {
        bucket.set_rate(Rate::per_second(rate)).unwrap();
        *its_rate = rate;
    }
}

#[derive(Clone, Debug)]
enum Op {
    Take(u64, u32),
    Wait(u64),
    Drop(usize),
    Advance(u64),
    Rate(u64),
    Sweep,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (0_u64..9, 1_u32..5).prop_map(|(key, tokens)| Op::Take(key, tokens)),
        2 => (0_u64..9).prop_map(Op::Wait),
        2 => (0_usize..8).prop_map(Op::Drop),
        4 => (1_u64..2000).prop_map(Op::Advance),
        1 => (1_u64..4).prop_map(Op::Rate),
        1 => Just(Op::Sweep),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Against a bucket for each key that is never forgotten: the same answer to every question, but that a key is
    /// refused while as many others are in use as there is room for, and never otherwise.
    #[test]
    fn a_bounded_table_decides_as_an_unbounded_one(
        ops in proptest::collection::vec(op(), 0..150),
        capacity in 1_u32..6,
    ) {
        let clock = Clock::paused();
        let _entered = clock.enter();
        let builder = |rate| TokenBucket::per_second(rate).burst(4);
        let keyed = Keyed::by("tenant", builder(1)).capacity(capacity).build().unwrap();
        let mut model: HashMap<u64, (TokenBucket, u64)> = HashMap::new();
        let mut rate = 1;
        let mut waiters = Vec::new();
        for op in ops {
            match op {
                Op::Take(key, tokens) => {
                    let busy: Vec<u64> = model
                        .iter()
                        .filter(|(key, (bucket, _))| {
                            // A waiter that was granted what it waits for holds its key until it has fetched it.
                            bucket.peek() < 4 || waiters.iter().any(|(waits, _)| waits == *key)
                        })
                        .map(|(key, _)| *key)
                        .collect();
                    let before: Vec<Option<u32>> = (0..9_u64).map(|key| keyed.with(key, TokenBucket::peek)).collect();
                    let (own, its_rate) = model.entry(key).or_insert_with(|| (builder(rate).build().unwrap(), rate));
                    follow(own, its_rate, rate);
                    match keyed.try_take(key, tokens) {
                        Err(refusal) if refusal.reason() == Reason::KeySpaceFull => {
                            prop_assert!(!busy.contains(&key) && busy.len() == capacity as usize, "{key}: {busy:?}");
                        }
                        answer => {
                            prop_assert!(busy.contains(&key) || busy.len() < capacity as usize || before[key as usize].is_some());
                            let told = |answer: &Result<(), resile::Refusal>| {
                                answer.as_ref().err().map(|no| (no.reason(), no.retry_after().unwrap_or_default()))
                            };
                            match (told(&answer), told(&own.try_take(tokens))) {
                                (Some((a, after)), Some((b, later))) => {
                                    prop_assert_eq!(a, b);
                                    prop_assert!(after.abs_diff(later) <= Duration::from_nanos(100));
                                }
                                (a, b) => prop_assert_eq!(a, b),
                            }
                            if answer.is_err() {
                                let after: Vec<Option<u32>> = (0..9_u64).map(|key| keyed.with(key, TokenBucket::peek)).collect();
                                prop_assert_eq!(before, after, "a refusal changes nothing");
                            }
                        }
                    }
                }
                Op::Wait(key) if waiters.len() < 4 && model.get(&key).is_some_and(|(bucket, _)| bucket.peek() == 0) => {
                    let (own, its_rate) = model.get_mut(&key).unwrap();
                    follow(own, its_rate, rate);
                    let mut pair = (Box::pin(keyed.of(key).acquire()), Box::pin(own.acquire()));
                    let flag = Flag::default();
                    let polled = (flag.poll(pair.0.as_mut()).is_pending(), flag.poll(pair.1.as_mut()).is_pending());
                    prop_assert_eq!(polled, (true, true));
                    waiters.push((key, pair));
                }
                Op::Drop(which) if !waiters.is_empty() => {
                    let which = which % waiters.len();
                    drop(waiters.remove(which));
                }
                Op::Wait(_) | Op::Drop(_) => {}
                // Whoever waits has not been polled since, so it holds its key.
                // A little more, so that no bucket is full at the very nanosecond: a change of rate rounds.
                Op::Advance(millis) => clock.advance(ms(millis) + Duration::from_nanos(137)),
                Op::Rate(new) => {
                    rate = new;
                    keyed.plan().set(builder(rate)).unwrap();
                }
                Op::Sweep => {
                    keyed.sweep(100);
                }
            }
            let stats = keyed.stats();
            prop_assert!(stats.live <= capacity && stats.pinned as usize <= waiters.len());
        }
        drop(waiters);
        prop_assert_eq!(keyed.stats().pinned, 0);
    }
}

/// Whatever is asked before is what is found after: plans are asked for once per key and change.
#[tokio::test(start_paused = true)]
async fn plans_are_asked_once_for_a_key_until_they_are_assigned_anew() {
    let asked = Arc::new(AtomicU64::new(0));
    let count = asked.clone();
    let keyed = Keyed::by("tenant", hourly(100))
        .plans(move |_| {
            count.fetch_add(1, Relaxed);
            None
        })
        .build()
        .unwrap();
    (0..10).for_each(|_| keyed.try_take("a", 1).unwrap());
    assert_eq!(asked.load(Relaxed), 1);
    keyed.reassign();
    (0..10).for_each(|_| keyed.try_take("a", 1).unwrap());
    assert_eq!(asked.load(Relaxed), 2);
    assert_eq!(keyed.with("a", TokenBucket::peek), Some(80));
}

#[tokio::test(start_paused = true)]
async fn what_a_call_has_really_cost_is_told_to_its_key() {
    let keyed = buckets(100, 10);
    let policy = Policy::named("models").gate(keyed.clone()).build().unwrap();
    for (actual, left) in [(3, 97), (40, 57), (70, 0)] {
        let call = policy.call().key("tenant", "acme").cost(10).settle(|cost: &Result<u32, ()>| cost.unwrap());
        call.run(|| async move { Ok(actual) }).await.unwrap();
        assert_eq!(keyed.with("acme", TokenBucket::peek), Some(left));
    }
    assert_eq!(keyed.try_take("acme", 1).unwrap_err().retry_after(), Some(14 * HOUR));
    assert_eq!((keyed.stats().pinned, keyed.with("other", TokenBucket::peek)), (0, None));
}

#[tokio::test(start_paused = true)]
async fn a_guard_of_one_key_can_be_settled_again_and_again() {
    let windows = Keyed::by("tenant", SlidingWindow::per_second(50)).build().unwrap();
    let buckets = buckets(50, 10);
    let (bucket, window) = (buckets.of("acme"), windows.of("acme"));
    let (mut bucket, mut window) = (bucket.try_acquire().unwrap(), window.try_acquire().unwrap());
    for actual in [2, 20, 20, 0, 5] {
        bucket.settle(actual);
        window.settle(actual);
        assert_eq!(buckets.with("acme", TokenBucket::peek), Some(50 - actual));
    }
    drop((bucket, window));
    assert_eq!(buckets.with("acme", TokenBucket::peek), Some(45));
    assert_eq!(windows.with("acme", SlidingWindow::peek), Some(45));
    assert_eq!((buckets.stats().pinned, windows.stats().pinned), (0, 0));
}

/// Its entry may have been given up meanwhile, and be another's.
#[tokio::test(start_paused = true)]
async fn a_late_settlement_is_charged_to_no_other_key() {
    let second = Duration::from_secs(1);
    let keyed = Keyed::by("tenant", TokenBucket::per_second(10).burst(10)).capacity(1).build().unwrap();
    let mut guard = keyed.of("a").try_acquire().unwrap();
    tokio::time::advance(second).await;
    keyed.try_take("b", 1).unwrap();
    guard.settle(4);
    guard.settle(0);
    assert_eq!(keyed.with("b", TokenBucket::peek), Some(9), "there is no room for what the other owes");

    tokio::time::advance(second).await;
    guard.settle(6);
    assert_eq!(keyed.with("a", TokenBucket::peek), Some(4), "there is now");

    tokio::time::advance(second).await;
    keyed.try_take("b", 1).unwrap();
    tokio::time::advance(second).await;
    guard.settle(9);
    assert_eq!(keyed.with("a", TokenBucket::peek), Some(7), "six were paid before");
}

/// Two follow at once, and the one with the older settings is the slower.
#[tokio::test(start_paused = true)]
async fn the_settings_that_were_set_last_are_those_that_hold() {
    type Meanwhile = Arc<std::sync::Mutex<Option<Box<dyn FnOnce() + Send>>>>;

    struct Door {
        width: AtomicU32,
        meanwhile: Meanwhile,
    }

    impl Door {
        fn wide(width: u32, meanwhile: &Meanwhile) -> Self {
            Self { width: AtomicU32::new(width), meanwhile: meanwhile.clone() }
        }
    }

    impl Gate for Door {
        fn enter(&self, _: &Call) -> Entry {
            Entry::Pass(Pass::default())
        }
        fn leave(&self, _: Pass, _: Outcome) {}
    }

    impl PerKey for Door {
        fn another(&self) -> Self {
            Self::wide(self.width.load(Relaxed), &self.meanwhile)
        }
        fn is_fresh(&self, _: Moment) -> bool {
            false
        }
        fn adopt(&self, settings: &Self) {
            let meanwhile = self.meanwhile.lock().unwrap().take();
            if let Some(other) = meanwhile {
                other();
            }
            self.width.store(settings.width.load(Relaxed), Relaxed);
        }
    }

    let meanwhile = Meanwhile::default();
    let keyed = Keyed::by("tenant", Door::wide(1, &meanwhile)).capacity(1).build().unwrap();
    let pass_by = move |keyed: &Keyed<Door>| drop(keyed.of("a").try_acquire().unwrap());
    pass_by(&keyed);
    keyed.plan().set(Door::wide(2, &meanwhile)).unwrap();
    let (other, doors) = (keyed.clone(), meanwhile.clone());
    *meanwhile.lock().unwrap() = Some(Box::new(move || {
        other.plan().set(Door::wide(3, &doors)).unwrap();
        pass_by(&other);
    }));
    pass_by(&keyed);
    assert_eq!(keyed.with("a", |door| door.width.load(Relaxed)), Some(3));
    assert_eq!(keyed.stats().pinned, 0);
}

/// Two sweeps meet at one gate: the one that comes too late has the last handle of it. It used to be dropped under the
/// lock of its part of the table, which it asks for here.
#[tokio::test(start_paused = true)]
async fn a_gate_that_another_has_given_up_meanwhile_is_dropped_under_no_lock() {
    struct Late {
        table: Arc<OnceLock<Keyed<Late>>>,
        asked: Arc<AtomicU32>,
        dropped: Arc<AtomicU32>,
    }

    impl Gate for Late {
        fn enter(&self, _: &Call) -> Entry {
            Entry::Pass(Pass::default())
        }
        fn leave(&self, _: Pass, _: Outcome) {}
    }

    impl PerKey for Late {
        fn another(&self) -> Self {
            Self { table: self.table.clone(), asked: self.asked.clone(), dropped: self.dropped.clone() }
        }
        fn is_fresh(&self, _: Moment) -> bool {
            if self.asked.fetch_add(1, Relaxed) == 0 {
                self.table.get().unwrap().sweep(1);
            }
            true
        }
    }

    impl Drop for Late {
        fn drop(&mut self) {
            if let Some(table) = self.table.get() {
                assert!(table.stats().live <= 1);
                self.dropped.fetch_add(1, Relaxed);
            }
        }
    }

    let (table, asked, dropped) = (Arc::new(OnceLock::new()), Arc::default(), Arc::default());
    let late = Late { table: Arc::clone(&table), asked, dropped: Arc::clone(&dropped) };
    let keyed = Keyed::by("tenant", late).capacity(1).build().unwrap();
    assert!(table.set(keyed.clone()).is_ok());
    dropped.store(0, Relaxed);
    keyed.of("a").try_acquire().unwrap().success();
    keyed.of("b").try_acquire().unwrap().success();
    assert_eq!((keyed.stats().evicted, dropped.load(Relaxed)), (1, 1));
}

/// A key that was there used to be refused as one without room after eight rounds of asking.
#[tokio::test(start_paused = true)]
async fn plans_that_are_assigned_anew_all_the_time_hold_up_nobody() {
    let (table, asked) = (Arc::new(OnceLock::<Keyed<TokenBucket>>::new()), Arc::new(AtomicU32::new(0)));
    let keyed = Keyed::by("tenant", hourly(10))
        .plans({
            let (table, asked) = (table.clone(), asked.clone());
            move |_| {
                asked.fetch_add(1, Relaxed);
                table.get().unwrap().reassign();
                None
            }
        })
        .capacity(1)
        .build()
        .unwrap();
    assert!(table.set(keyed.clone()).is_ok());
    for calls in 1..=10 {
        keyed.try_take("a", 1).unwrap();
        assert_eq!(asked.load(Relaxed), calls, "once for each call");
    }
    assert_eq!(reason(keyed.try_take("a", 1)), Some(Reason::Busy));
    assert_eq!(keyed.stats().overflowed, 0);
}

/// A gate that says it can be forgotten, and is used by somebody in that very moment.
#[derive(Clone, Default)]
struct UsedMeanwhile(Arc<OnceLock<Keyed<UsedMeanwhile>>>, Arc<AtomicBool>);

impl Gate for UsedMeanwhile {
    fn enter(&self, _: &Call) -> Entry {
        Entry::Pass(Pass::default())
    }

    fn leave(&self, _: Pass, _: Outcome) {}
}

impl PerKey for UsedMeanwhile {
    fn another(&self) -> Self {
        self.clone()
    }

    fn is_fresh(&self, _: Moment) -> bool {
        if let (true, Some(keyed)) = (self.1.swap(false, Relaxed), self.0.get()) {
            keyed.of("a").try_acquire().unwrap().success();
        }
        true
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_used_since_it_said_that_it_can_go_stays() {
    let gate = UsedMeanwhile::default();
    let keyed = Keyed::by("tenant", gate.clone()).capacity(4).build().unwrap();
    gate.0.set(keyed.clone()).unwrap_or_else(|_| panic!("once"));
    keyed.of("a").try_acquire().unwrap().success();
    gate.1.store(true, Relaxed);
    assert_eq!((keyed.sweep(1), keyed.stats().live), (0, 1), "its answer is out of date");
    assert_eq!((keyed.sweep(1), keyed.stats().live), (1, 0));
}

/// Each keyed limiter beside separate ones that are never forgotten: the same answer to every question, whatever the calls
/// cost, while keys come and go. A key that finds no room is not asked about.
macro_rules! decides_as_separate_ones {
    ($name:ident, $limiter:expr) => {
        proptest! {
            #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

            #[test]
            fn $name(ops in proptest::collection::vec((0_u64..6, 1_u32..5, 0_u64..1500), 1..120), capacity in 1_u32..5) {
                let clock = Clock::paused();
                let _entered = clock.enter();
                // Made once, since a calendar is read from the clock of the wall.
                let one = $limiter.build().unwrap();
                let keyed = Keyed::by("tenant", one.another()).capacity(capacity).build().unwrap();
                let mut separate = HashMap::new();
                for (key, cost, time) in ops {
                    // A little more, so that nothing is due at the very nanosecond at which it is asked for.
                    clock.advance(ms(time) + Duration::from_nanos(137));
                    let told = |answer: Result<(), resile::Refusal>| {
                        answer.err().map(|no| (no.reason(), no.retry_after().unwrap_or_default()))
                    };
                    let answer = told(keyed.try_take(key, cost));
                    if answer.is_some_and(|(reason, _)| reason == Reason::KeySpaceFull) {
                        continue;
                    }
                    let own = separate.entry(key).or_insert_with(|| one.another());
                    let alone = told(own.try_take(cost));
                    prop_assert_eq!(answer.map(|(no, _)| no), alone.map(|(no, _)| no), "key {}, cost {}", key, cost);
                    let [here, there] = [answer, alone].map(|no| no.map_or(Duration::ZERO, |(_, after)| after));
                    prop_assert!(here.abs_diff(there) <= Duration::from_micros(1), "{here:?} and {there:?}");
                }
            }
        }
    };
}
decides_as_separate_ones!(token_buckets_decide_as_separate_ones, TokenBucket::per_second(2).burst(4));
decides_as_separate_ones!(leaky_buckets_decide_as_separate_ones, resile::LeakyBucket::per_second(3));
decides_as_separate_ones!(windows_decide_as_separate_ones, SlidingWindow::per_second(4));
decides_as_separate_ones!(estimated_windows_decide_as_separate_ones, SlidingWindow::per_second(4).estimated());
decides_as_separate_ones!(quotas_decide_as_separate_ones, Quota::per_second(4));

/// New keys whose first call costs more than 1 were refused for ever, with no time.
#[tokio::test(start_paused = true)]
async fn a_large_first_call_of_a_leaky_bucket_passes_and_the_next_is_told_when() {
    let keyed = Keyed::by("tenant", resile::LeakyBucket::per_second(10)).build().unwrap();
    keyed.try_take("a", 3).unwrap();
    let refusal = keyed.try_take("a", 1).unwrap_err();
    assert_eq!((refusal.reason(), refusal.retry_after()), (Reason::Busy, Some(ms(300))));
}

#[tokio::test(start_paused = true)]
async fn a_new_plan_of_a_quota_may_carry_over_from_a_window_of_before() {
    let keyed = Keyed::by("tenant", resile::Quota::per_day(5)).build().unwrap();
    keyed.try_take("a", 1).unwrap();
    keyed.plan().set(resile::Quota::per_day(5).carry_over(5)).unwrap();
    keyed.try_take("a", 1).unwrap();
    tokio::time::advance(Duration::from_secs(24 * 3600)).await;
    assert!(keyed.try_take("a", 9).is_err());
    keyed.try_take("a", 8).unwrap();
}

/// What is as good as new is given up for another key, whatever kind it is.
#[tokio::test(start_paused = true)]
async fn every_kind_of_limiter_is_given_up_once_it_has_rested() {
    macro_rules! rests {
        ($($limiter:expr),*) => {$({
            let keyed = Keyed::by("tenant", $limiter).capacity(1).build().unwrap();
            keyed.try_take("a", 1).unwrap();
            assert_eq!(keyed.try_take("b", 1).unwrap_err().reason(), Reason::KeySpaceFull, stringify!($limiter));
            tokio::time::advance(Duration::from_secs(3)).await;
            keyed.try_take("b", 1).unwrap();
        })*};
    }
    rests!(
        TokenBucket::per_second(1),
        resile::LeakyBucket::per_second(1),
        SlidingWindow::per_second(1),
        SlidingWindow::per_second(1).exact_up_to(0),
        Quota::from_first_use(1, Duration::from_secs(1))
    );
}
