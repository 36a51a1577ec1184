//! The same work by this crate and by its peers: one thread, nothing goes wrong, interleaved medians.
//!
//! Each table has the peers' times and what multiple of them this crate takes. The peers' settings are those of the
//! stack in `support`, as far as they go; where a peer does less, its row says so.

mod stacks;
#[path = "../support/mod.rs"]
mod support;

use std::hint::black_box;
use std::sync::Arc;

use backon::Retryable;
use failsafe::futures::CircuitBreaker;
use foldhash::fast::RandomState as FastHasher;
use governor::RateLimiter;
use governor::clock::{FakeRelativeClock, MonotonicClock, QuantaClock};
use resile::{Keyed, Moment, TokenBucket};
use stacks::{backoff, by_hand, quota, with_tower};
use support::World;
use support::laps::{self, Lap, repeat};
use support::rounds::Effort;
use support::{pending, ready, succeed, together};
use tower::{Service, ServiceExt};

fn main() {
    let world = World::new();
    let _entered = world.enter();
    let effort = Effort::from_args();
    keyed(effort, "a limit per key, 1,000 hot keys", 1_000);
    keyed(effort, "a limit per key, a million keys", 1_000_000);
    gates(effort);
    steps(effort);
    whole_stacks(effort);
}

/// One token of a key's bucket, of so many keys in an order that no cache foresees. Governor's table has no bound.
fn keyed(effort: Effort, title: &str, keys: u64) {
    compare(
        effort,
        title,
        [
            ("resile", {
                let bucket = TokenBucket::per_second(1_000_000_000).burst(1_000_000_000);
                let keyed = Keyed::by("key", bucket).capacity((keys + keys / 8) as u32).build().expect("fine settings");
                (0..keys).for_each(|key| keyed.try_take(key, 1).expect("room"));
                let mut next = uniform(keys);
                repeat(move || assert!(black_box(&keyed).try_take(next(), 1).is_ok()))
            }),
            ("governor, a fast hasher, the standard clock", {
                let limiter =
                    RateLimiter::dashmap_with_clock_and_hasher(quota(), MonotonicClock, FastHasher::default());
                (0..keys).for_each(|key| assert!(limiter.check_key(&key).is_ok()));
                let mut next = uniform(keys);
                repeat(move || assert!(black_box(&limiter).check_key(&next()).is_ok()))
            }),
            ("governor, a fast hasher, its default clock (TSC)", {
                let clock = QuantaClock::default();
                let limiter = RateLimiter::dashmap_with_clock_and_hasher(quota(), clock, FastHasher::default());
                (0..keys).for_each(|key| assert!(limiter.check_key(&key).is_ok()));
                let mut next = uniform(keys);
                repeat(move || assert!(black_box(&limiter).check_key(&next()).is_ok()))
            }),
            ("governor, as it comes", {
                let limiter = RateLimiter::dashmap_with_clock(quota(), QuantaClock::default());
                (0..keys).for_each(|key| assert!(limiter.check_key(&key).is_ok()));
                let mut next = uniform(keys);
                repeat(move || assert!(black_box(&limiter).check_key(&next()).is_ok()))
            }),
        ],
    );
}

/// Numbers below `keys` in an order that no cache foresees.
fn uniform(keys: u64) -> impl FnMut() -> u64 {
    let mut state = 0_u64;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((u128::from(state) * u128::from(keys)) >> 64) as u64
    }
}

fn gates(effort: Effort) {
    compare(
        effort,
        "bucket, taking one token",
        [
            ("resile", {
                let bucket = support::bucket();
                repeat(move || assert!(black_box(&bucket).try_take(1).is_ok()))
            }),
            ("resile, batched", {
                let bucket = support::batched_bucket();
                repeat(move || assert!(black_box(&bucket).try_take(1).is_ok()))
            }),
            ("governor, its default clock (TSC)", {
                let limiter = RateLimiter::direct(quota());
                repeat(move || assert!(black_box(&limiter).check().is_ok()))
            }),
            ("governor, the standard clock", {
                let limiter = RateLimiter::direct_with_clock(quota(), MonotonicClock);
                repeat(move || assert!(black_box(&limiter).check().is_ok()))
            }),
        ],
    );
    compare(
        effort,
        "bucket, taking one token, the clock given",
        [
            ("resile", {
                let (bucket, now) = (support::bucket(), Moment::now());
                repeat(move || assert!(black_box(&bucket).try_take_at(1, black_box(now)).is_ok()))
            }),
            ("resile, entering and leaving as a gate", laps::gate(support::bucket())),
            ("governor, a clock that stands still", {
                let limiter = RateLimiter::direct_with_clock(quota(), FakeRelativeClock::default());
                repeat(move || assert!(black_box(&limiter).check().is_ok()))
            }),
        ],
    );
    let (bucket, batched) = (support::bucket(), support::batched_bucket());
    let limiter = Arc::new(RateLimiter::direct_with_clock(quota(), MonotonicClock));
    compare_together(
        effort,
        "bucket, two threads taking one token each, the standard clock",
        [
            ("resile", &move || {
                let bucket = bucket.clone();
                repeat(move || assert!(black_box(&bucket).try_take(1).is_ok()))
            }),
            ("resile, batched", &move || {
                let bucket = batched.clone();
                repeat(move || assert!(black_box(&bucket).try_take(1).is_ok()))
            }),
            ("governor", &move || {
                let limiter = limiter.clone();
                repeat(move || assert!(black_box(&limiter).check().is_ok()))
            }),
        ],
    );
    compare(
        effort,
        "semaphore around a ready operation",
        [
            ("resile", laps::ready(support::only_gate(support::semaphore()))),
            ("tokio", {
                let semaphore = tokio::sync::Semaphore::new(64);
                repeat(move || {
                    succeed!(async {
                        let _permit = semaphore.acquire().await.map_err(std::io::Error::other)?;
                        ready().await
                    });
                })
            }),
            ("tower", {
                let mut service = tower::ServiceBuilder::new().concurrency_limit(64).service_fn(|()| ready());
                repeat(move || succeed!(async { service.ready().await?.call(()).await }))
            }),
        ],
    );
    compare(
        effort,
        "breaker around a ready operation",
        [
            ("resile, rate over 30 s", laps::ready(support::only_gate(support::breaker()))),
            ("failsafe, consecutive failures", {
                let breaker = stacks::breaker();
                repeat(move || succeed!(breaker.call(ready())))
            }),
            ("failsafe, its default rate over 30 s", {
                let breaker = failsafe::Config::new().build();
                repeat(move || succeed!(breaker.call(ready())))
            }),
        ],
    );
}

fn steps(effort: Effort) {
    compare(
        effort,
        "retry around a ready operation",
        [
            ("resile", laps::ready(support::only_retry())),
            ("backon", {
                let backoff = backoff();
                repeat(move || succeed!(ready.retry(black_box(backoff)).sleep(tokio::time::sleep)))
            }),
        ],
    );
    compare(
        effort,
        "timeout of a ready operation",
        [("resile", laps::ready(support::only_timeout())), ("tokio", laps::start("ready/tokio timeout"))],
    );
    compare(
        effort,
        "timeout of an operation that is pending once",
        [("resile", laps::pending(support::only_timeout())), ("tokio", laps::start("pending/tokio timeout"))],
    );
}

fn whole_stacks(effort: Effort) {
    compare(
        effort,
        "stack, ready",
        [
            ("resile", laps::ready(support::stack())),
            ("tokio, backon, failsafe, governor by hand", {
                let stack = by_hand();
                repeat(move || succeed!(stack.run(ready)))
            }),
            ("tower, without breaker and bucket", {
                let mut service = with_tower(ready);
                repeat(move || succeed!(async { service.ready().await?.call(()).await }))
            }),
        ],
    );
    compare(
        effort,
        "stack, pending once",
        [
            ("resile", laps::pending(support::stack())),
            ("tokio, backon, failsafe, governor by hand", {
                let stack = by_hand();
                repeat(move || succeed!(stack.run(pending)))
            }),
            ("tower, without breaker and bucket", {
                let mut service = with_tower(pending);
                repeat(move || succeed!(async { service.ready().await?.call(()).await }))
            }),
        ],
    );
}

/// Measures rows on two threads each, the first of which is ours.
fn compare_together<const N: usize>(effort: Effort, title: &str, rows: [(&str, &(dyn Fn() -> Lap + Sync)); N]) {
    println!("\n{title}");
    match together::medians(effort, rows.map(|(_, start)| (2, start))) {
        None => println!("  the machine is too busy to run two threads side by side"),
        Some(times) => print_all(rows.map(|(name, _)| name), times),
    }
}

/// Measures rows side by side, the first of which is ours.
fn compare<const N: usize>(effort: Effort, title: &str, rows: [(&str, Lap); N]) {
    println!("\n{title}");
    let names = rows.each_ref().map(|(name, _)| *name);
    print_all(names, effort.medians(rows.map(|(_, lap)| lap)));
}

fn print_all<const N: usize>(names: [&str; N], times: [f64; N]) {
    for (name, time) in names.into_iter().zip(times) {
        println!("  {name:<44}{time:>9.1} ns{:>8.2} ×", times[0] / time);
    }
}
