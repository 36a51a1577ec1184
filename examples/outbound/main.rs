//! Outbound calls through good and bad weather: a real HTTP server on loopback that is healthy, slow, overloaded,
//! throttled, broken, gone, and back, and once well but called too often; called by a real HTTP client in five ways, so that you can see what a policy
//! buys, and what it costs.
//!
//! ```text
//! cargo run --release --example outbound              # the whole story, somewhat over a minute
//! cargo run --release --example outbound -- --quick   # the same in a quarter of the time
//! cargo run --release --example outbound -- --seed 7  # other dice for the server
//! cargo run --release --example outbound -- http://127.0.0.1:8080/health   # a server that is there already
//! ```
//!
//! Every contender has a server, a client and a state of its own; the servers follow one [`script`] with one seed. All
//! five run at the same time, at a rate that leaves the machine mostly idle; how late its timers were is measured and
//! said, since nothing below that means anything. The numbers are printed as a [`table`] and drawn as a [`chart`].
//!
//! Exits with 0 if everything ended and nothing is held any more, 1 if not, 2 if the arguments make no sense.

mod arguments;
mod capacity;
mod chart;
mod contenders;
mod drive;
mod progress;
mod resile_policy;
mod script;
mod server;
mod table;
mod tower_stack;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::time::Instant;

use crate::arguments::Arguments;
use crate::contenders::{Contender, NAMES, Target, contender};
use crate::drive::{Board, Tally, drive};
use crate::progress::Lag;
use crate::script::Script;
use crate::server::Server;
use crate::table::{Block, Report, Row};

/// Calls a second of each contender to a server of our own.
const PER_SECOND: u32 = 300;
/// The same to somebody else's, who was not asked.
const REMOTE_PER_SECOND: u32 = 100;
/// How long a server of ours may take to finish what its clients have left behind.
const SETTLE: Duration = Duration::from_secs(3);

/// One contender at work.
struct Lane {
    contender: Arc<dyn Contender>,
    server: Option<Server>,
    board: Arc<Board>,
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let arguments = match Arguments::parse(std::env::args().skip(1)) {
        Ok(Some(arguments)) => arguments,
        Ok(None) => {
            println!("{}", arguments::USAGE);
            return Ok(ExitCode::SUCCESS);
        }
        Err(error) => {
            eprintln!("{error}\n{}", arguments::USAGE);
            return Ok(ExitCode::from(2));
        }
    };
    let (script, per_second) = match (&arguments.url, arguments.quick) {
        (None, false) => (Script::story(Duration::from_secs(9), arguments.seed), PER_SECOND),
        (None, true) => (Script::story(Duration::from_millis(1_800), arguments.seed), PER_SECOND),
        (Some(_), false) => (Script::remote(Duration::from_secs(20), arguments.seed), REMOTE_PER_SECOND),
        (Some(_), true) => (Script::remote(Duration::from_secs(5), arguments.seed), REMOTE_PER_SECOND),
    };
    let script = Arc::new(script);

    let start = Instant::now() + Duration::from_millis(100);
    let mut lanes = Vec::new();
    for name in NAMES {
        let (server, target) = if let Some(url) = &arguments.url {
            (None, Target::Remote(url.clone()))
        } else {
            let server = Server::start(Arc::clone(&script), start).await?;
            let url = server.url();
            (Some(server), Target::Own(url))
        };
        let board = Arc::new(Board::new(&script)?);
        lanes.push(Lane { contender: contender(name, &target)?, server, board });
    }
    println!(
        "{} contenders, {per_second} calls a second each, for {:.0} s; seed {}",
        lanes.len(),
        script.lasts().as_secs_f64(),
        script.seed
    );

    let boards = lanes.iter().map(|lane| (lane.contender.name(), Arc::clone(&lane.board))).collect();
    let progress = tokio::spawn(progress::report(Arc::clone(&script), start, boards));
    let lag = tokio::spawn(progress::lag(start + script.lasts()));
    let mut drivers = Vec::new();
    for (index, lane) in (0_u32..).zip(&lanes) {
        // The contenders take turns within a gap, so that they don't all call in the same instant.
        let offset = Duration::from_secs(1) / per_second / lanes.len() as u32 * index;
        let (contender, board) = (Arc::clone(&lane.contender), Arc::clone(&lane.board));
        drivers.push(tokio::spawn(drive(contender, Arc::clone(&script), per_second, start + offset, board)));
    }
    let mut stuck = 0;
    for driver in drivers {
        stuck += driver.await?;
    }
    progress.await?;
    let lag = lag.await?;

    let report = report(&script, &lanes)?;
    println!("\n{report}\n");
    println!("{}", verdict_on_the_machine(lag));
    let path = chart_path();
    chart::draw(&report, &path).with_context(|| format!("cannot draw {}", path.display()))?;
    println!("chart: {}", path.display());
    println!();
    Ok(if leftovers(&lanes, stuck).await { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Puts the tallies of the lanes together, by phase and in all.
fn report(script: &Script, lanes: &[Lane]) -> anyhow::Result<Report> {
    let mut blocks: Vec<Block> = script
        .phases
        .iter()
        .map(|phase| Block { name: phase.name, story: phase.story.to_owned(), rows: Vec::new() })
        .collect();
    let story = format!("everything, {:.0} s", script.lasts().as_secs_f64());
    let mut all = Block { name: "in all", story, rows: Vec::new() };
    for lane in lanes {
        let name = lane.contender.name();
        let seen = lane.server.as_ref().map(Server::seen);
        let mut sum = Tally::new()?;
        for (index, (phase, tally)) in script.phases.iter().zip(lane.board.tallies()).enumerate() {
            sum.merge(&tally)?;
            let seen = seen.as_ref().map(|seen| seen[index]);
            blocks[index].rows.push(Row { name, tally, seen, lasted: phase.lasts });
        }
        all.rows.push(Row { name, tally: sum, seen: seen.map(|seen| seen.iter().sum()), lasted: script.lasts() });
    }
    if blocks.len() > 1 {
        blocks.push(all);
    }
    Ok(Report { blocks })
}

/// Says what is still held anywhere, and whether that is more than nothing where nothing is promised.
async fn leftovers(lanes: &[Lane], stuck: usize) -> bool {
    let settled = Instant::now() + SETTLE;
    let busy = || lanes.iter().filter_map(|lane| lane.server.as_ref()).any(|server| server.inside() > 0);
    while busy() && Instant::now() < settled {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    for lane in lanes {
        if let Some(server) = &lane.server {
            println!(
                "server of {:<9} {:>6} requests served in vain, for clients that had gone; {} still inside",
                lane.contender.name(),
                server.in_vain(),
                server.inside(),
            );
        }
    }
    let mut leaked = stuck > 0;
    println!("calls that never ended: {stuck}");
    for lane in lanes {
        if let Some(held) = lane.contender.held() {
            let name = lane.contender.name();
            println!("held by {name} at the end: {} permits in use, {} calls waiting", held.permits, held.waiting);
            leaked |= held.permits > 0 || held.waiting > 0;
        }
    }
    leaked
}

fn verdict_on_the_machine(lag: Lag) -> String {
    let judged = if lag.p99 < Duration::from_millis(10) { "it kept up" } else { "too busy: don't trust these numbers" };
    format!("this machine's timers were late by {:?} (p99), {:?} at worst: {judged}", lag.p99, lag.worst)
}

/// Beside everything else that cargo builds.
fn chart_path() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target"), PathBuf::from);
    target.join("outbound.svg")
}
