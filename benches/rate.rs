//! What does a limiter's decision cost?
//!
//! First allocations, on which the program fails if there are any, then wall-clock times, which are only reported, then
//! criterion's account of each row. Comparisons with another crate are in `peers`.

mod support;

use std::hint::black_box;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use criterion::Criterion;
use resile::{LeakyBucket, Moment, Quota, Rate, Refusal, SlidingWindow, TokenBucket};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use support::laps::{self, Lap, Row};
use support::rounds::{Effort, Line, print_head, timed};
use support::{World, together};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<std::alloc::System> = &INSTRUMENTED_SYSTEM;

/// All rows, by group and name. As a gate a limiter is entered and left, by a clock that stands still, as it does where
/// it is given.
const ROWS: &[Row] = &[
    ("gate/token bucket", || laps::gate(support::bucket())),
    ("gate/token bucket, batched", || laps::gate(support::batched_bucket())),
    ("gate/sliding window, counters", || laps::gate(counters())),
    ("gate/quota per second", || laps::gate(quota())),
    ("given/token bucket", || given(support::bucket())),
    ("given/token bucket, batched", || given(support::batched_bucket())),
    ("take/token bucket, batched", || take(support::batched_bucket(), TokenBucket::try_take)),
    ("take/token bucket", || take(support::bucket(), TokenBucket::try_take)),
    ("take/token bucket, refused", || take(empty(), TokenBucket::try_take)),
    ("take/leaky bucket", || take(leaky(), LeakyBucket::try_take)),
    ("take/sliding window, log", || take(log(), SlidingWindow::try_take)),
    ("take/sliding window, counters", || take(counters(), SlidingWindow::try_take)),
    ("take/quota per second", || take(quota(), Quota::try_take)),
];

fn main() -> ExitCode {
    let world = World::new();
    let _entered = world.enter();
    let within = allocations();
    ratios(Effort::from_args());
    println!();
    times();
    if within { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Whether no decision allocates.
fn allocations() -> bool {
    print_head("allocations per decision");
    let mut within = true;
    for (name, start) in ROWS {
        let mut lap = start();
        lap(5_000);
        let region = Region::new(ALLOCATOR);
        lap(10_000);
        let change = region.change();
        let each = (change.allocations + change.reallocations) as f64 / 10_000.0;
        // The lap of a gate makes a policy's call once.
        within &= Line::new(name, each.floor(), "").must(0.0, 0.0).print();
    }
    within
}

fn ratios(effort: Effort) {
    print_head("wall clock, interleaved medians");
    let clock = laps::repeat(|| _ = black_box(tokio::time::Instant::now()));
    let word = AtomicU64::new(0);
    let swap = laps::repeat(move || {
        let seen = black_box(&word).load(Ordering::Acquire);
        _ = black_box(word.compare_exchange_weak(seen, seen + 1, Ordering::AcqRel, Ordering::Acquire));
    });
    let [clock, swap, given, given_batched, gate_batched, taken, taken_batched, refused] = effort.medians([
        clock,
        swap,
        start("given/token bucket"),
        start("given/token bucket, batched"),
        start("gate/token bucket, batched"),
        start("take/token bucket"),
        start("take/token bucket, batched"),
        start("take/token bucket, refused"),
    ]);
    Line::new("one reading of the clock", clock, "ns").print();
    Line::new("one compare-and-swap", swap, "ns").print();
    Line::new("token bucket, clock given", given, "ns").must(6.0, 3.0).print();
    Line::new("token bucket, clock given / one swap", given / swap, "×").print();
    Line::new("token bucket, batched, clock given", given_batched, "ns").must(6.0, 3.0).print();
    Line::new("token bucket, batched, as a gate", gate_batched, "ns").print();
    Line::new("token bucket", taken, "ns").print();
    Line::new("token bucket, batched", taken_batched, "ns").print();
    Line::new("token bucket, over the clock", taken - clock, "ns").print();
    Line::new("token bucket, refused", refused, "ns").print();

    let (bucket, loose) = (support::bucket(), support::batched_bucket());
    let exact = || take(bucket.clone(), TokenBucket::try_take);
    let loose = || take(loose.clone(), TokenBucket::try_take);
    if let Some([alone, shared, batched]) = together::medians(effort, [(1, &exact), (2, &exact), (2, &loose)]) {
        Line::new("token bucket, one thread", alone, "ns").print();
        Line::new("token bucket, two threads", shared, "ns").print();
        Line::new("token bucket, batched, two threads", batched, "ns").must(6.0, 6.0).print();
    } else {
        println!("  the machine is too busy to run two threads side by side");
    }
}

/// Criterion's rows.
fn times() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .configure_from_args();
    for name in ["given", "take", "gate"] {
        let mut group = criterion.benchmark_group(format!("rate/{name}"));
        for (case, start) in
            ROWS.iter().filter_map(|(row, start)| Some((row.strip_prefix(name)?.strip_prefix('/')?, start)))
        {
            let mut lap = start();
            group.bench_function(case, |bencher| bencher.iter_custom(|times| timed(|| lap(times))));
        }
        group.finish();
    }
    criterion.final_summary();
}

fn start(name: &str) -> Lap {
    ROWS.iter().find(|(row, _)| *row == name).map(|(_, start)| start()).expect("the name of a row")
}

/// Asks again and again for one token.
fn take<L: 'static>(limiter: L, take: fn(&L, u32) -> Result<(), Refusal>) -> Lap {
    laps::repeat(move || _ = black_box(take(black_box(&limiter), 1)))
}

/// The same by a clock that stands still.
fn given(bucket: TokenBucket) -> Lap {
    let now = Moment::now();
    laps::repeat(move || _ = black_box(black_box(&bucket).try_take_at(1, black_box(now))))
}

fn empty() -> TokenBucket {
    let bucket = TokenBucket::at(Rate::per_day(1)).burst(1).build().expect("a valid bucket");
    bucket.try_take(1).expect("a token");
    bucket
}

/// As fast as the clock's grain, so that hardly anybody is refused.
fn leaky() -> LeakyBucket {
    LeakyBucket::per_second(1_000_000_000).build().expect("a valid bucket")
}

/// A window in which a loop takes about as many as are allowed.
fn log() -> SlidingWindow {
    SlidingWindow::at(Rate::new(1000, Duration::from_micros(40))).build().expect("a valid window")
}

fn counters() -> SlidingWindow {
    SlidingWindow::per_second(1_000_000_000).estimated().build().expect("a valid window")
}

fn quota() -> Quota {
    Quota::per_second(1_000_000_000).build().expect("a valid quota")
}
