//! How many instructions, clock reads and allocations does a call cost? Counted by callgrind, so the same on every run.
//!
//! Without the word `lap` the program runs itself under valgrind and prints the table. Each row is an operation in a
//! loop of a thousand and one of three thousand: what is printed is the difference, divided by two thousand, so that
//! neither the loop's surroundings nor anything that happens once is in it. `clock` counts calls of `clock_gettime`
//! (under valgrind a system call, whose instructions in the kernel are not counted), `alloc` those of the allocator.
//! With timers, a few instructions more or less depend on how the milliseconds fall.
//!
//! ```text
//! scripts/instructions [--check] [--annotate] [ROW..]
//! ```
//!
//! `--check` fails if a row is above its `must`; `--annotate` adds the functions and lines that cost the most; a row is
//! taken if its name begins with one of the given ones.

mod callgrind;
#[path = "../support/mod.rs"]
mod support;

use std::collections::HashMap;
use std::path::Path;
use std::process::ExitCode;

use callgrind::Profile;
use support::World;
use support::laps::{self, BARE, Lap, Row};

const LAPS: [u64; 2] = [1_000, 3_000];
const WARM_UP: u64 = 10;

/// What a row may cost.
#[derive(Clone, Copy)]
struct Limits {
    /// Instructions: must and aim.
    instructions: Option<(f64, f64)>,
    /// The limit is on what is added to the bare operation.
    over_bare: bool,
    /// Clock reads: must and aim.
    clocks: Option<(f64, f64)>,
    allocations: Option<f64>,
}

impl Limits {
    const NONE: Self = Self { instructions: None, over_bare: false, clocks: None, allocations: None };
    const OURS: Self = Self { allocations: Some(0.0), ..Self::NONE };

    /// Of a row by its name.
    fn of(row: &str) -> Self {
        match row {
            "ready/bare" | "pending/bare" | "ready/tokio timeout" | "pending/tokio timeout" => Self::NONE,
            "ready/no steps" => Self::OURS.instructions(85.0, 40.0).over_bare().clocks(0.0, 0.0),
            "ready/stack" => Self::OURS.instructions(690.0, 560.0).clocks(2.0, 1.0),
            "pending/stack" => Self::OURS.instructions(1540.0, 1300.0),
            "pending/no steps" => Self::OURS.clocks(0.0, 0.0),
            "gates/bucket" => Self::OURS.instructions(60.0, 30.0).clocks(0.0, 0.0),
            "gates/semaphore" => Self::OURS.instructions(70.0, 40.0).clocks(0.0, 0.0),
            "gates/breaker" => Self::OURS.instructions(90.0, 40.0).clocks(0.0, 0.0),
            "gates/drain" => Self::OURS.instructions(40.0, 25.0).clocks(0.0, 0.0),
            _ => Self::OURS,
        }
    }

    const fn instructions(mut self, must: f64, aim: f64) -> Self {
        self.instructions = Some((must, aim));
        self
    }

    const fn over_bare(mut self) -> Self {
        self.over_bare = true;
        self
    }

    const fn clocks(mut self, must: f64, aim: f64) -> Self {
        self.clocks = Some((must, aim));
        self
    }
}

fn main() -> ExitCode {
    // `cargo bench` adds a word of its own.
    let (options, words): (Vec<_>, Vec<_>) =
        std::env::args().skip(1).filter(|arg| arg != "--bench").partition(|arg| arg.starts_with("--"));
    match words.split_first() {
        Some((lap, names)) if lap == "lap" => {
            run(&rows(|row| names.iter().any(|name| name == row)));
            ExitCode::SUCCESS
        }
        _ => report(&words, &options),
    }
}

fn rows(wanted: impl Fn(&str) -> bool) -> Vec<Row> {
    laps::ALL.iter().copied().filter(|(row, _)| wanted(row)).collect()
}

/// The inner program: does each row's laps, for valgrind to count.
fn run(rows: &[Row]) {
    let world = World::new();
    let _entered = world.enter();
    for (_, start) in rows {
        let mut lap = start();
        lap(WARM_UP);
        // What was counted until here is dumped by itself.
        measured_lap(&mut lap, 0);
        for times in LAPS {
            measured_lap(&mut lap, times);
        }
    }
}

/// Valgrind knows this function by its name, and writes down the counts whenever it returns.
#[inline(never)]
fn measured_lap(lap: &mut Lap, times: u64) {
    lap(times);
}

/// What an operation costs.
#[derive(Clone, Copy)]
struct Cost {
    instructions: f64,
    clocks: f64,
    allocations: f64,
}

impl Cost {
    /// Of one operation, by the difference of two laps.
    fn per_operation([short, long]: &[Profile; 2]) -> Self {
        let per_operation = |of: &dyn Fn(&Profile) -> u64| (of(long) - of(short)) as f64 / (LAPS[1] - LAPS[0]) as f64;
        Self {
            instructions: per_operation(&|profile| profile.instructions),
            clocks: per_operation(&|profile| profile.calls_of(&["clock_gettime"])),
            allocations: per_operation(&|profile| profile.calls_of(ALLOCATORS)),
        }
    }
}

const ALLOCATORS: &[&str] = &["malloc", "calloc", "realloc", "posix_memalign", "aligned_alloc"];

/// The outer program: runs the inner one under valgrind and prints the table.
fn report(names: &[String], options: &[String]) -> ExitCode {
    let check = options.iter().any(|option| option == "--check");
    if !check && !callgrind::installed() {
        eprintln!("instructions: not counted: there is no valgrind");
        return ExitCode::SUCCESS;
    }
    let wanted = |row: &str| names.is_empty() || names.iter().any(|name| row.starts_with(name.as_str()));
    // The bare operation is what others are measured against.
    let counted = match count(&rows(|row| row == BARE || wanted(row))) {
        Ok(counted) => counted,
        Err(problem) => {
            eprintln!("instructions: not counted: {problem}");
            return ExitCode::FAILURE;
        }
    };
    let above = print(&counted);
    if options.iter().any(|option| option == "--annotate") {
        for (row, [_, profile]) in counted.iter().filter(|(row, _)| wanted(row)) {
            annotate(row, profile);
        }
    }
    if check && !above.is_empty() {
        eprintln!("instructions: above the limit: {}", above.join(", "));
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn count(rows: &[Row]) -> Result<Vec<(&'static str, [Profile; 2])>, String> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("instructions");
    let mut args = vec!["lap"];
    args.extend(rows.iter().map(|(row, _)| row));
    callgrind::count(&folder, "measured_lap", &args)?;
    let read = |nth| Profile::read(&callgrind::dump(&folder, nth)).map_err(|error| error.to_string());
    // Each row has three dumps, the first of which is what led up to it.
    rows.iter()
        .zip((0..).step_by(3))
        .map(|((row, _), first)| Ok((*row, [read(first + 1)?, read(first + 2)?])))
        .collect()
}

/// Prints the table, and returns the names of the rows above their limits.
fn print(counted: &[(&'static str, [Profile; 2])]) -> Vec<&'static str> {
    let costs: Vec<(&str, Cost)> = counted.iter().map(|(row, laps)| (*row, Cost::per_operation(laps))).collect();
    let bare = costs.iter().find(|(row, _)| *row == BARE).map_or(0.0, |(_, cost)| cost.instructions);
    let mut above = Vec::new();
    println!(
        "{:<24}{:>8}{:>12}{:>6}{:>8}{:>6}{:>6}{:>8}{:>6}",
        "per operation", "instr", "must", "aim", "clock", "must", "aim", "alloc", "must"
    );
    for (row, cost) in costs {
        let Limits { instructions, over_bare, clocks, allocations } = Limits::of(row);
        let counts = cost.instructions - if over_bare { bare } else { 0.0 };
        let too_much = instructions.is_some_and(|(must, _)| counts.round() > must)
            || clocks.is_some_and(|(must, _)| cost.clocks > must)
            || allocations.is_some_and(|must| cost.allocations > must);
        if too_much {
            above.push(row);
        }
        println!(
            "{:<24}{:>8.0}{:>12}{:>6}{:>8}{:>6}{:>6}{:>8}{:>6}{}",
            row,
            cost.instructions,
            instructions.map_or(String::new(), |(must, _)| format!("{}{must}", if over_bare { "bare + " } else { "" })),
            shown(instructions.map(|(_, aim)| aim)),
            cost.clocks,
            shown(clocks.map(|(must, _)| must)),
            shown(clocks.map(|(_, aim)| aim)),
            cost.allocations,
            shown(allocations),
            if too_much { "  above" } else { "" },
        );
    }
    above
}

fn shown(limit: Option<f64>) -> String {
    limit.map_or(String::new(), |limit| limit.to_string())
}

/// Prints where a row's instructions are.
fn annotate(row: &str, profile: &Profile) {
    println!("\n{row}: instructions per operation by function, with what is inlined; calls per operation");
    for (name, count) in most(&profile.functions, 25) {
        let calls = profile.calls.get(name).map_or(0.0, |calls| *calls as f64 / LAPS[1] as f64);
        println!("{count:>8.1}{calls:>6.1}  {name}");
    }
    println!("\n{row}: instructions per operation by line, wherever it is inlined");
    for ((file, line), count) in most(&profile.lines, 50) {
        let parts: Vec<&str> = file.rsplit('/').take(3).collect();
        println!("{count:>8.1}  {}:{line}", parts.into_iter().rev().collect::<Vec<_>>().join("/"));
    }
}

/// The greatest counts, per operation.
fn most<K>(counts: &HashMap<K, u64>, first: usize) -> Vec<(&K, f64)> {
    let mut counts: Vec<(&K, f64)> = counts.iter().map(|(key, count)| (key, *count as f64 / LAPS[1] as f64)).collect();
    counts.sort_by(|(_, a), (_, b)| b.total_cmp(a));
    counts.truncate(first);
    counts
}
