//! What does a call cost when nothing goes wrong?
//!
//! First come the figures that don't depend on the machine's load (allocations, sizes; for instructions and clock reads
//! see `scripts/instructions`), on which the program fails if one is above its limit, then ratios of wall-clock times,
//! which are only reported, then criterion's account of each row.

mod support;

use std::process::ExitCode;
use std::time::Duration;

use criterion::Criterion;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use support::World;
use support::laps::{self, BARE, Row};
use support::rounds::{Effort, Line, print_head, timed};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<std::alloc::System> = &INSTRUMENTED_SYSTEM;

fn main() -> ExitCode {
    let world = World::new();
    let _entered = world.enter();
    let within = figures();
    ratios(Effort::from_args());
    println!();
    times();
    if within { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Allocations and sizes: whether all are within their limits.
fn figures() -> bool {
    print_head("per call");
    let allocations = |row| {
        let mut lap = laps::start(row);
        lap(10);
        let region = Region::new(ALLOCATOR);
        lap(1_000);
        let change = region.change();
        (change.allocations + change.reallocations) as f64 / 1_000.0
    };
    let ready = Line::new("allocations, stack ready", allocations("ready/stack"), "").must(0.0, 0.0).print();
    let pending = Line::new("allocations, stack pending", allocations("pending/stack"), "").must(0.0, 0.0).print();

    let policy = support::stack();
    let own = size_of_val(&support::ready());
    let added = size_of_val(&policy.run(support::ready)) - own;
    let tokio = size_of_val(&tokio::time::timeout(Duration::ZERO, support::ready())) - own;
    let size = Line::new("future, beside the operation's own", added as f64, "B").must(420.0, 300.0).print();
    Line::new("that of tokio's timeout", tokio as f64, "B").print();
    ready && pending && size
}

fn ratios(effort: Effort) {
    print_head("wall clock, interleaved medians");
    let clock = laps::repeat(|| _ = std::hint::black_box(tokio::time::Instant::now()));
    let [clock, bare, no_steps, tokio, stack] = effort.medians([
        clock,
        laps::start(BARE),
        laps::start("ready/no steps"),
        laps::start("ready/tokio timeout"),
        laps::start("ready/stack"),
    ]);
    Line::new("one reading of the clock", clock, "ns").print();
    Line::new("ready: bare", bare, "ns").print();
    Line::new("ready: no steps", no_steps, "ns").print();
    Line::new("ready: tokio's timeout", tokio, "ns").print();
    Line::new("ready: stack", stack, "ns").print();
    Line::new("ready: stack / one reading of the clock", stack / clock, "×").must(3.4, 2.2).print();

    let [bare, tokio, timeout, stack] = effort.medians([
        laps::start("pending/bare"),
        laps::start("pending/tokio timeout"),
        laps::start("pending/timeout"),
        laps::start("pending/stack"),
    ]);
    Line::new("pending: bare", bare, "ns").print();
    Line::new("pending: tokio's timeout", tokio, "ns").print();
    Line::new("pending: timeout", timeout, "ns").print();
    Line::new("pending: stack", stack, "ns").print();
    let added = |row: f64| (row - bare) / (tokio - bare);
    Line::new("pending: timeout / tokio's, over bare", added(timeout), "×").print();
    Line::new("pending: stack / tokio's timeout, over bare", added(stack), "×").must(1.7, 1.2).print();
}

/// Criterion's rows, the bare operation first in each group.
fn times() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    for name in ["ready", "pending", "steps", "gates"] {
        let mut rows: Vec<Row> = laps::ALL.iter().filter_map(|row| case(name, row)).collect();
        if rows.iter().all(|(case, _)| *case != "bare") {
            rows.insert(0, ("bare", || laps::start(BARE)));
        }
        let mut group = criterion.benchmark_group(format!("overhead/{name}"));
        for (case, start) in rows {
            let mut lap = start();
            group.bench_function(case, |bencher| bencher.iter_custom(|times| timed(|| lap(times))));
        }
        group.finish();
    }
    criterion.final_summary();
}

/// A row under its name within a group, if it is of that group.
fn case(group: &str, (name, start): &Row) -> Option<Row> {
    Some((name.strip_prefix(group)?.strip_prefix('/')?, *start))
}
