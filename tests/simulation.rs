//! The whole stack under random schedules, judged by a naive model; see `support/simulation`.
//!
//! `RESILE_SEEDS` says how many seeds are run, for hours if you like; `RESILE_SEED` runs one again. A seed that fails is
//! printed with the fewest events that show it. `RESILE_SURVEY` goes on after failures and counts them by kind.

mod support;

#[path = "support/simulation/mod.rs"]
mod simulation;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use simulation::Reached;

const SEEDS: u64 = 10_000;

/// Each must be taken somewhere, or the run proves less than it seems to.
const BRANCHES: [&str; 10] = [
    "a late poll",
    "a call from another clock",
    "a listener cancels a source",
    "a scope ends",
    "a source is cancelled",
    "an early end is told",
    "an operation panics",
    "the breaker is half open",
    "the drain closes on calls",
    "the drain is opened again",
];

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

#[test]
fn whatever_happens_the_stack_keeps_its_promises() {
    if let Some(seed) = number("RESILE_SEED") {
        if let Err(fault) = simulation::run(seed, &mut Reached::new()) {
            panic!("{fault}\n{}", simulation::explain(seed));
        }
        return;
    }
    let survey = std::env::var_os("RESILE_SURVEY").is_some();
    let seeds = number("RESILE_SEEDS").unwrap_or(SEEDS);
    let next = AtomicU64::new(0);
    let (all, faults) = (Mutex::new(Reached::new()), Mutex::new(BTreeMap::<String, Vec<u64>>::new()));
    let work = || {
        let mut reached = Reached::new();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds || !survey && !faults.lock().unwrap().is_empty() {
                break;
            }
            if let Err(fault) = simulation::run(seed, &mut reached) {
                let kind = simulation::kind(&fault).to_owned();
                faults.lock().unwrap().entry(kind).or_default().push(seed);
            }
        }
        let mut all = all.lock().unwrap();
        for (branch, count) in reached {
            *all.entry(branch).or_default() += count;
        }
    };
    thread::scope(|scope| {
        (0..thread::available_parallelism().map_or(1, usize::from)).for_each(|_| drop(scope.spawn(work)));
    });
    let faults = faults.into_inner().unwrap();
    for (kind, seeds) in &faults {
        eprintln!("{} times: {kind}\n{}", seeds.len(), simulation::explain(seeds[0]));
    }
    assert!(faults.is_empty());
    let all = all.into_inner().unwrap();
    for branch in BRANCHES {
        assert!(all.get(branch).is_some_and(|count| *count > 0), "never reached: {branch} in {all:?}");
    }
}
