//! Several threads at the same work, side by side.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::World;
use super::laps::Lap;
use super::rounds::{Effort, median, timed};

/// A loop that each of so many threads starts for itself.
pub type Row<'a> = (usize, &'a (dyn Fn() -> Lap + Sync));

/// Nanoseconds per operation and thread of each row, the medians of rounds in which all threads really ran together;
/// `None` if the machine is too busy for that.
pub fn medians<const N: usize>(effort: Effort, rows: [Row<'_>; N]) -> Option<[f64; N]> {
    let times = rows.map(|(_, start)| {
        let world = World::new();
        let _entered = world.enter();
        let mut lap = start();
        effort.calibrate(|times| timed(|| lap(times)))
    });
    let mut samples = [const { Vec::new() }; N];
    let patience = effort.batch * (effort.rounds * 10 * N) as u32;
    let begun = Instant::now();
    while samples[0].len() < effort.rounds && begun.elapsed() < patience {
        let mut round = [0.0; N];
        let together = (0..N).all(|row| {
            let runs = run(rows[row], times[row]);
            round[row] = per_operation(&runs, times[row]);
            // Others use the machine too: what was not run side by side does not count.
            side_by_side(&runs)
        });
        if together {
            samples.iter_mut().zip(round).for_each(|(samples, time)| samples.push(time));
        }
    }
    (!samples[0].is_empty()).then(|| samples.map(median))
}

/// Nanoseconds per operation and thread.
fn per_operation(runs: &[(Instant, Instant)], times: u64) -> f64 {
    let took: Duration = runs.iter().map(|(start, end)| *end - *start).sum();
    took.as_nanos() as f64 / (runs.len() as u64 * times) as f64
}

/// Whether all were running for four fifths of the time in which any was.
fn side_by_side(runs: &[(Instant, Instant)]) -> bool {
    let starts = || runs.iter().map(|(start, _)| *start);
    let ends = || runs.iter().map(|(_, end)| *end);
    match (starts().min(), starts().max(), ends().min(), ends().max()) {
        (Some(first), Some(all), Some(until), Some(last)) => {
            until.saturating_duration_since(all) * 5 >= (last - first) * 4
        }
        _ => false,
    }
}

/// When each thread began and ended its loop.
fn run((threads, start): Row<'_>, times: u64) -> Vec<(Instant, Instant)> {
    let missing = AtomicUsize::new(threads);
    let run = || {
        let world = World::new();
        let _entered = world.enter();
        let mut lap = start();
        lap(100);
        // Spins, so that all are on a core when the last one comes.
        missing.fetch_sub(1, Ordering::AcqRel);
        while missing.load(Ordering::Acquire) > 0 {
            std::hint::spin_loop();
        }
        let begun = Instant::now();
        lap(times);
        (begun, Instant::now())
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
        threads.into_iter().map(|thread| thread.join().expect("a thread that ends well")).collect()
    })
}
