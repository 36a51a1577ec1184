//! What does a limit per key cost: to find it, to make it, to keep it?
//!
//! First come the figures that don't depend on the machine's load (allocations, bytes per key, the key flood), on which
//! the program fails if one is above its limit, then ratios of wall-clock times, which are only reported, then
//! criterion's account of each row. Other crates' keyed limiters are in `benches/peers`.

mod support;

use std::hint::black_box;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use criterion::Criterion;
use resile::{Gate, Keyed, Layers, OneKey, Semaphore, TokenBucket};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use support::World;
use support::laps::{self, Lap, repeat};
use support::rounds::{Effort, Line, print_head};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<std::alloc::System> = &INSTRUMENTED_SYSTEM;

const HOT: u64 = 1000;
const MANY: u64 = 1_000_000;
const SLOTS: u32 = 100_000;

fn main() -> ExitCode {
    let world = World::new();
    let _entered = world.enter();
    let within = figures() & flood();
    ratios(Effort::from_args());
    println!();
    times();
    if within { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// So fast that nobody is ever refused.
fn generous(capacity: u32) -> Keyed<TokenBucket> {
    Keyed::by("tenant", TokenBucket::per_second(1_000_000_000).burst(1_000_000_000)).capacity(capacity).build().unwrap()
}

/// A table with all of these keys in it.
fn filled(keys: u64) -> Keyed<TokenBucket> {
    // Room enough that no part of the table is full before the whole is.
    let keyed = generous((keys + keys / 8) as u32);
    (0..keys).for_each(|key| keyed.try_take(key, 1).unwrap());
    keyed
}

/// Numbers below `keys` in an order that no cache foresees.
fn uniform(keys: u64) -> impl FnMut() -> u64 {
    let mut state = 0_u64;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (u128::from(state).wrapping_mul(u128::from(keys)) >> 64) as u64
    }
}

fn take(keys: u64) -> Lap {
    let keyed = filled(keys);
    let mut next = uniform(keys);
    repeat(move || assert!(black_box(&keyed).try_take(next(), 1).is_ok()))
}

fn take_text() -> Lap {
    let keyed = generous(SLOTS);
    let keys: Vec<String> = (0..HOT).map(|key| format!("tenant-{key:09}")).collect();
    let mut next = uniform(HOT);
    repeat(move || assert!(black_box(&keyed).try_take(&keys[next() as usize], 1).is_ok()))
}

/// A key that was never seen, in a table that is full of keys that are as good as new.
fn churn() -> Lap {
    let keyed = generous(SLOTS);
    (0..u64::from(SLOTS) * 2).for_each(|key| _ = keyed.try_take(key, 1));
    let mut key = MANY;
    repeat(move || {
        key += 1;
        assert!(black_box(&keyed).try_take(key, 1).is_ok());
    })
}

fn one(key: &str) -> OneKey<TokenBucket> {
    let keyed = generous(SLOTS);
    (0..HOT).for_each(|key| keyed.try_take(key, 1).unwrap());
    keyed.of(key)
}

fn three_in_one() -> impl Gate {
    Layers::new().layer("ip", one("::1")).layer("tenant", one("acme")).layer("all", support::bucket()).build().unwrap()
}

fn figures() -> bool {
    print_head("per decision on a known key, and per key");
    let allocations = |mut lap: Lap| {
        lap(10_000);
        let region = Region::new(ALLOCATOR);
        lap(1_000);
        let change = region.change();
        (change.allocations + change.reallocations) as f64 / 1_000.0
    };
    let numbers = Line::new("allocations, number", allocations(take(HOT)), "").must(0.0, 0.0).print();
    let texts = Line::new("allocations, text", allocations(take_text()), "").must(0.0, 0.0).print();
    let layers = Line::new("allocations, three layers", allocations(laps::gate(three_in_one())), "").must(0.0, 0.0);
    let permits = Keyed::by("tenant", Semaphore::permits(8)).build().unwrap().of("acme");
    let permits = Line::new("allocations, semaphore", allocations(laps::gate(permits)), "").must(0.0, 0.0).print();
    let bytes = |fill: &dyn Fn()| {
        let region = Region::new(ALLOCATOR);
        fill();
        let change = region.change();
        (change.bytes_allocated as f64 + change.bytes_reallocated as f64 - change.bytes_deallocated as f64).round()
    };
    let million = u32::try_from(MANY).unwrap();
    let keyed = std::cell::RefCell::new(None);
    let bytes_bucket = bytes(&|| _ = keyed.replace(Some(generous(million)))) / MANY as f64;
    let keyed = keyed.into_inner().unwrap();
    let grown = bytes(&|| (0..MANY).for_each(|key| _ = keyed.try_take(key, 1)));
    let live = f64::from(keyed.stats().live) / MANY as f64;
    let per_key = Line::new("bytes per key, token bucket", bytes_bucket.round(), "B").must(120.0, 48.0).print();
    let flat = Line::new("bytes grown by a million keys", grown, "B").must(0.0, 0.0).print();
    Line::new("share of the table that they fill", (live * 1000.0).round() / 1000.0, "").print();
    let permits = permits & {
        let keyed = Keyed::by("tenant", Semaphore::permits(8)).capacity(10_000).build().unwrap();
        let grown = bytes(&|| (0..9_000_u64).for_each(|key| keyed.of(key).try_acquire().unwrap().success()));
        let per_key = grown / 9_000.0 + keyed.stats().bytes as f64 / 10_000.0;
        Line::new("bytes per key, semaphore", per_key.round(), "B").print()
    };
    numbers & texts & layers.print() & permits & per_key & flat
}

/// Ten million keys that somebody makes up, through a table of a hundred thousand, beside twenty that are limited.
fn flood() -> bool {
    const FLOOD: u64 = 10_000_000;
    const SLOW: Duration = Duration::from_micros(100);
    print_head("key flood: 10 million keys through 100,000 places");
    // A made-up key has its token back after a hundredth of a second; the greedy ones never stop asking.
    let keyed = Keyed::by("tenant", TokenBucket::per_second(100).burst(1)).capacity(SLOTS).build().unwrap();
    let preempted = preemptions();
    let begin = Instant::now();
    let region = Region::new(ALLOCATOR);
    let (mut admitted, mut refused) = ([0_u64; 20], 0_u64);
    let (mut slowest, mut slow, mut before) = (Duration::ZERO, 0_u64, begin);
    for n in 0..FLOOD {
        if n % 64 == 0 {
            let greedy = (n / 64) as usize % 20;
            admitted[greedy] += u64::from(keyed.try_take(u64::MAX - greedy as u64, 1).is_ok());
        } else {
            refused += u64::from(keyed.try_take(n, 1).is_err());
        }
        // One reading for each decision, so that none is left out.
        let now = Instant::now();
        let took = now - before;
        before = now;
        slowest = slowest.max(took);
        slow += u64::from(took >= SLOW);
    }
    let took = begin.elapsed();
    let change = region.change();
    let preempted = preemptions().zip(preempted).map(|(after, before)| after - before);
    let stats = keyed.stats();
    let allowed = 1 + (took.as_secs_f64() * 100.0).ceil() as u64;
    let most = admitted.iter().copied().max().unwrap_or_default();
    let limited = Line::new("most admitted of a limited key / allowed", most as f64 / allowed as f64, "×");
    let limited = limited.must(1.0, 1.0).print();
    let memory = Line::new("bytes allocated", change.bytes_allocated as f64, "B").must(0.0, 0.0).print();
    let live = Line::new("keys live", f64::from(stats.live), "").must(f64::from(SLOTS), f64::from(SLOTS)).print();
    Line::new("given up", stats.evicted as f64, "").print();
    Line::new("refused for want of room", refused as f64, "").print();
    Line::new("per key, with a reading of the clock", took.as_nanos() as f64 / FLOOD as f64, "ns").print();
    // Only the work of a decision has a bound, which is tested by counting. The rest is the machine's.
    Line::new("slowest decision", slowest.as_nanos() as f64 / 1e3, "µs").print();
    Line::new("decisions of 0.1 ms or more", slow as f64, "").print();
    if let Some(preempted) = preempted {
        Line::new("preemptions meanwhile", preempted as f64, "").print();
    }
    limited & memory & live
}

/// How often this thread had to make room for others, where that can be read.
fn preemptions() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/thread-self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("nonvoluntary_ctxt_switches:"))?;
    line.trim().parse().ok()
}

fn ratios(effort: Effort) {
    print_head("wall clock, interleaved medians");
    let clock = repeat(|| _ = black_box(tokio::time::Instant::now()));
    let [clock, hot, text, many, fresh] = effort.medians([clock, take(HOT), take_text(), take(MANY), churn()]);
    Line::new("reading the clock", clock, "ns").print();
    Line::new("1,000 hot keys, number", hot, "ns").print();
    Line::new("1,000 hot keys, text of 16", text, "ns").print();
    Line::new("a million keys, number", many, "ns").print();
    Line::new("new key in a full table", fresh, "ns").print();
    Line::new("new key / hot key", fresh / hot, "×").must(10.0, 5.0).print();

    let [first, second, third, layers] = effort.medians([
        laps::gate(one("::1")),
        laps::gate(one("acme")),
        laps::gate(support::bucket()),
        laps::gate(three_in_one()),
    ]);
    let [permits] =
        effort.medians([laps::gate(Keyed::by("tenant", Semaphore::permits(8)).build().unwrap().of("acme"))]);
    Line::new("one key, clock given", first, "ns").print();
    Line::new("a semaphore per key, in and out", permits, "ns").print();
    Line::new("three single decisions, clock given", first + second + third, "ns").print();
    Line::new("three layers, clock given", layers, "ns").print();
    Line::new("three layers / three single, clock given", layers / (first + second + third), "×")
        .must(1.3, 1.0)
        .print();
    let single = first + second + third + 3.0 * clock;
    Line::new("three layers / three single, each with its clock", (layers + clock) / single, "×")
        .must(1.3, 1.0)
        .print();
}

fn times() {
    let mut criterion = Criterion::default().configure_from_args().warm_up_time(Duration::from_millis(500));
    let mut group = criterion.benchmark_group("keyed");
    group.sample_size(20).measurement_time(Duration::from_secs(1));
    let rows: [laps::Row; 6] = [
        ("hot numbers", || take(HOT)),
        ("hot texts", take_text),
        ("million numbers", || take(MANY)),
        ("churn", churn),
        ("one key, clock given", || laps::gate(one("acme"))),
        ("three layers, clock given", || laps::gate(three_in_one())),
    ];
    for (name, start) in rows {
        let mut lap = start();
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|times| {
                let start = Instant::now();
                lap(times);
                start.elapsed()
            });
        });
    }
    group.finish();
    criterion.final_summary();
}
