//! How many instructions, clock reads and allocations does a call cost? Counted by callgrind, so the same on every run.
//!
//! Without the word `lap` the program runs itself under valgrind and prints the table. Each row is an operation in a
//! loop of a thousand and one of three thousand: what is printed is the difference, divided by two thousand, so that
//! neither the loop's surroundings nor anything that happens once is in it. `clock` counts calls of `clock_gettime`
//! (under valgrind a system call, whose instructions in the kernel are not counted), `alloc` those of the allocator.
//!
//! ```text
//! cargo bench --bench instructions -- [--check] [--annotate] [ROW..]
//! ```
//!
//! `--check` fails if a row is above its `must`; `--annotate` adds the functions that cost the most; a row is taken if
//! its name begins with one of the given ones.

mod support;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use resile::{Gate, Policy};
use support::{Within, World};

const LAPS: [u64; 2] = [1_000, 3_000];
const WARM_UP: u64 = 10;
/// The table's own cost of an unmeasured row, such as a first line of a group.
const BARE: &str = "ready/bare";

/// A row: an operation in a loop, and what it may cost.
struct Row {
    name: &'static str,
    start: fn() -> Lap,
    limits: Limits,
}

/// Does something so many times.
type Lap = Box<dyn FnMut(u64)>;

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

const ROWS: &[Row] = &[
    row(BARE, || repeat(|| support::succeed(support::ready())), Limits::NONE),
    row("ready/tokio timeout", || repeat(tokio_ready), Limits::NONE),
    row(
        "ready/no steps",
        || ready(support::no_steps()),
        Limits::OURS.instructions(80.0, 40.0).over_bare().clocks(0.0, 0.0),
    ),
    row("ready/stack", || ready(support::stack()), Limits::OURS.instructions(700.0, 400.0).clocks(2.0, 1.0)),
    row("pending/bare", || repeat(|| support::succeed(support::pending())), Limits::NONE),
    row("pending/tokio timeout", || repeat(tokio_pending), Limits::NONE),
    row("pending/no steps", || pending(support::no_steps()), Limits::OURS.clocks(0.0, 0.0)),
    row("pending/timeout", || pending(support::only_timeout()), Limits::OURS),
    row("pending/stack", || pending(support::stack()), Limits::OURS),
    row("step/timeout", || ready(support::only_timeout()), Limits::OURS),
    row("step/retry", || ready(support::only_retry()), Limits::OURS),
    row("step/breaker", || ready(support::only_gate(support::breaker())), Limits::OURS),
    row("step/bucket", || ready(support::only_gate(support::bucket())), Limits::OURS),
    row("step/semaphore", || ready(support::only_gate(support::semaphore())), Limits::OURS),
    row("gate/open", || gate(support::Open), Limits::OURS),
    row("gate/bucket", || gate(support::bucket()), Limits::OURS.instructions(60.0, 30.0).clocks(0.0, 0.0)),
    row("gate/semaphore", || gate(support::semaphore()), Limits::OURS.instructions(70.0, 40.0).clocks(0.0, 0.0)),
    row("gate/breaker", || gate(support::breaker()), Limits::OURS.instructions(90.0, 40.0).clocks(0.0, 0.0)),
];

const fn row(name: &'static str, start: fn() -> Lap, limits: Limits) -> Row {
    Row { name, start, limits }
}

fn repeat(mut once: impl FnMut() + 'static) -> Lap {
    Box::new(move |times| {
        for _ in 0..times {
            once();
        }
    })
}

fn ready(policy: Policy) -> Lap {
    repeat(move || support::succeed(policy.run(support::ready)))
}

fn pending(policy: Policy) -> Lap {
    repeat(move || support::succeed(policy.run(support::pending)))
}

fn tokio_ready() {
    support::succeed(async { tokio::time::timeout(Duration::from_millis(300), support::ready()).await? });
}

fn tokio_pending() {
    support::succeed(async { tokio::time::timeout(Duration::from_millis(300), support::pending()).await? });
}

fn gate(gate: impl Gate) -> Lap {
    let within = Arc::new(Within::new(gate));
    let policy = support::only_gate(within.clone());
    Box::new(move |times| {
        within.rounds.store(times, Ordering::Relaxed);
        support::succeed(policy.run(support::ready));
    })
}

fn main() -> ExitCode {
    // `cargo bench` adds a word of its own.
    let (options, words): (Vec<_>, Vec<_>) =
        std::env::args().skip(1).filter(|arg| arg != "--bench").partition(|arg| arg.starts_with("--"));
    match words.split_first() {
        Some((lap, names)) if lap == "lap" => {
            run(&chosen(names));
            ExitCode::SUCCESS
        }
        _ => report(&words, &options),
    }
}

fn chosen(names: &[String]) -> Vec<&'static Row> {
    let wanted = |row: &&Row| names.is_empty() || names.iter().any(|name| row.name.starts_with(name.as_str()));
    ROWS.iter().filter(wanted).collect()
}

/// The inner program: does each row's laps, for valgrind to count.
fn run(rows: &[&Row]) {
    let world = World::new();
    let _entered = world.enter();
    for row in rows {
        let mut lap = (row.start)();
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
#[derive(Clone, Copy, Default)]
struct Cost {
    instructions: f64,
    clocks: f64,
    allocations: f64,
}

impl Cost {
    /// Of one operation, by the difference of two laps.
    fn per_operation([short, long]: [Self; 2]) -> Self {
        let times = (LAPS[1] - LAPS[0]) as f64;
        Self {
            instructions: (long.instructions - short.instructions) / times,
            clocks: (long.clocks - short.clocks) / times,
            allocations: (long.allocations - short.allocations) / times,
        }
    }
}

/// The outer program: runs the inner one under valgrind and prints the table.
fn report(names: &[String], options: &[String]) -> ExitCode {
    let check = options.iter().any(|option| option == "--check");
    let rows = chosen(names);
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("instructions");
    if let Err(problem) = count(&rows, &folder) {
        eprintln!("instructions: not counted: {problem}");
        return if check { ExitCode::FAILURE } else { ExitCode::SUCCESS };
    }
    let counted: Vec<(&Row, Cost)> = rows.iter().enumerate().map(|(index, row)| (*row, read(&folder, index))).collect();
    let above = print(&counted);
    if options.iter().any(|option| option == "--annotate") {
        for (index, row) in rows.iter().enumerate() {
            annotate(row, &dump(&folder, index, 1));
        }
    }
    if check && !above.is_empty() {
        eprintln!("instructions: above the limit: {}", above.join(", "));
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn count(rows: &[&Row], folder: &Path) -> Result<(), String> {
    let failed = |error: std::io::Error| error.to_string();
    let _not_there_yet = fs::remove_dir_all(folder);
    fs::create_dir_all(folder).map_err(failed)?;
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--dump-after=*measured_lap*"])
        .arg(format!("--callgrind-out-file={}", folder.join("dump").display()))
        .arg(std::env::current_exe().map_err(failed)?)
        .arg("lap")
        .args(rows.iter().map(|row| row.name))
        .output()
        .map_err(|error| format!("valgrind: {error}"))?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

/// Where the counts of a row's lap are: each row has three dumps, the first of which is what led up to it.
fn dump(folder: &Path, row: usize, lap: usize) -> PathBuf {
    folder.join(format!("dump.{}", row * (LAPS.len() + 1) + lap + 2))
}

fn read(folder: &Path, row: usize) -> Cost {
    Cost::per_operation([0, 1].map(|lap| {
        let path = dump(folder, row, lap);
        parse(&fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
    }))
}

/// Reads what is needed of callgrind's format: the total, and how often some functions were called.
fn parse(text: &str) -> Cost {
    let mut cost = Cost::default();
    let mut names = HashMap::new();
    let mut callee = "";
    for line in text.lines() {
        if let Some(function) = line.strip_prefix("cfn=").or_else(|| line.strip_prefix("fn=")) {
            // `(7) clock_gettime@@GLIBC_2.17` the first time, then `(7)`; `malloc'2` for a recursion.
            let (id, name) = function.split_once(' ').unwrap_or((function, ""));
            let name = name.split(['@', '\'']).next().unwrap_or(name);
            let known = names.entry(id).or_insert(name);
            if line.starts_with('c') {
                callee = known;
            }
        } else if let Some(calls) = line.strip_prefix("calls=") {
            let calls = number(calls);
            match callee {
                "clock_gettime" => cost.clocks += calls,
                "malloc" | "calloc" | "realloc" | "posix_memalign" | "aligned_alloc" => cost.allocations += calls,
                _ => {}
            }
        } else if let Some(total) = line.strip_prefix("totals:").or_else(|| line.strip_prefix("summary:")) {
            cost.instructions = number(total.trim());
        }
    }
    cost
}

/// The number that a line begins with.
fn number(text: &str) -> f64 {
    text.split(' ').next().and_then(|first| first.parse().ok()).unwrap_or(f64::NAN)
}

/// Prints the table, and returns the names of the rows above their limits.
fn print(counted: &[(&Row, Cost)]) -> Vec<&'static str> {
    let costs: HashMap<&str, Cost> = counted.iter().map(|(row, cost)| (row.name, *cost)).collect();
    let bare = costs.get(BARE).map_or(0.0, |cost| cost.instructions);
    let mut above = Vec::new();
    println!(
        "{:<24}{:>8}{:>8}{:>8}  {:>6}{:>6}{:>6}  {:>6}{:>6}",
        "per operation", "instr", "must", "aim", "clock", "must", "aim", "alloc", "must"
    );
    for (row, cost) in counted {
        let Limits { instructions, over_bare, clocks, allocations } = row.limits;
        let limited = if over_bare { cost.instructions - bare } else { cost.instructions };
        let too_much = instructions.is_some_and(|(must, _)| limited.round() > must)
            || clocks.is_some_and(|(must, _)| cost.clocks > must)
            || allocations.is_some_and(|must| cost.allocations > must);
        if too_much {
            above.push(row.name);
        }
        let plus = if over_bare { "bare + " } else { "" };
        let shown = |limit: Option<f64>| limit.map_or(String::new(), |limit| limit.to_string());
        println!(
            "{:<24}{:>8.0}{:>8}{:>8}  {:>6}{:>6}{:>6}  {:>6}{:>6}{}",
            row.name,
            cost.instructions,
            instructions.map_or(String::new(), |(must, _)| format!("{plus}{must}")),
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

fn annotate(row: &Row, dump: &Path) {
    println!("\n{}, {} operations", row.name, LAPS[1]);
    match Command::new("callgrind_annotate").arg("--auto=no").arg(dump).output() {
        Ok(output) => println!("{}", String::from_utf8_lossy(&output.stdout)),
        Err(error) => eprintln!("instructions: callgrind_annotate: {error}"),
    }
}
