//! Wall-clock times on a machine that others use too: rows take turns in many batches, so that a neighbour's load falls
//! on all of them alike, and what is reported is each row's median. The batches are short, so that most of them run
//! without being preempted. Ratios of such medians can be trusted, the nanoseconds less.

use std::time::{Duration, Instant};

use super::laps::Lap;

/// How long to measure.
#[derive(Clone, Copy)]
pub struct Effort {
    pub rounds: usize,
    pub batch: Duration,
}

impl Effort {
    /// Less with `--quick` among the arguments.
    pub fn from_args() -> Self {
        if std::env::args().any(|arg| arg == "--quick") {
            Self { rounds: 31, batch: Duration::from_millis(1) }
        } else {
            Self { rounds: 101, batch: Duration::from_millis(1) }
        }
    }

    /// Nanoseconds per operation of each lap: the medians of interleaved rounds.
    pub fn medians<const N: usize>(self, mut laps: [Lap; N]) -> [f64; N] {
        let times = laps.each_mut().map(|lap| self.calibrate(|times| timed(|| lap(times))));
        self.medians_of(|row| timed(|| laps[row](times[row])).as_nanos() as f64 / times[row] as f64)
    }

    /// The medians of `N` rows that are measured in turn.
    pub fn medians_of<const N: usize>(self, mut measure: impl FnMut(usize) -> f64) -> [f64; N] {
        let mut samples = [const { Vec::new() }; N];
        for round in 0..self.rounds {
            for turn in 0..N {
                // No row always comes after the same one.
                let row = if round % 2 == 0 { turn } else { N - 1 - turn };
                samples[row].push(measure(row));
            }
        }
        samples.map(median)
    }

    /// How many times fill a batch.
    pub fn calibrate(self, mut run: impl FnMut(u64) -> Duration) -> u64 {
        let mut times = 1;
        loop {
            let took = run(times);
            if took >= self.batch / 4 {
                let per_batch = self.batch.as_secs_f64() / took.as_secs_f64() * times as f64;
                return (per_batch as u64).max(1);
            }
            times *= 2;
        }
    }
}

pub fn timed(run: impl FnOnce()) -> Duration {
    let start = Instant::now();
    run();
    start.elapsed()
}

pub fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

/// The head of a table of [`Line`]s.
pub fn print_head(title: &str) {
    println!("\n{title:<58}{:>10}{:>8}{:>8}", "", "must", "aim");
}

/// One figure beside what it must be and what it is meant to be.
pub struct Line<'a> {
    pub what: &'a str,
    pub figure: f64,
    pub unit: &'a str,
    /// At most.
    pub must: Option<f64>,
    pub aim: Option<f64>,
}

impl<'a> Line<'a> {
    pub const fn new(what: &'a str, figure: f64, unit: &'a str) -> Self {
        Self { what, figure, unit, must: None, aim: None }
    }

    pub const fn must(mut self, must: f64, aim: f64) -> Self {
        (self.must, self.aim) = (Some(must), Some(aim));
        self
    }

    /// Prints it, and whether it is within its `must`.
    pub fn print(self) -> bool {
        let limit = |limit: Option<f64>| limit.map_or(String::new(), |limit| limit.to_string());
        let within = self.must.is_none_or(|must| self.figure <= must);
        let figure = match self.unit {
            "×" => format!("{:.2} ×", self.figure),
            "ns" => format!("{:.1} ns", self.figure),
            unit => format!("{} {unit}", self.figure),
        };
        let note = if within { "" } else { "  above" };
        println!("  {:<44}{figure:>14}{:>8}{:>8}{note}", self.what, limit(self.must), limit(self.aim));
        within
    }
}
