//! An API with three layers of limits (per tenant, per plan, per endpoint), twenty honest tenants who use it as agreed,
//! and somebody who floods it under 100,000 made-up names. The honest ones must not notice.
//!
//! ```text
//! cargo run --release --example tenants
//! ```
//!
//! The server is axum on loopback, the tenants call it with reqwest, the flood comes pipelined over plain connections,
//! all in this process. What was admitted over time is drawn as an SVG beside everything else that cargo builds.
//!
//! Exits with 0 if no request of an honest tenant was refused or failed, and with 1 otherwise.

mod chart;
mod clients;
mod limits;
mod server;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::time::Instant;

use crate::clients::{FLOOD, HONEST};
use crate::limits::Limits;
use crate::server::Server;

/// How long the tenants work before the flood begins, and after it.
const CALM: Duration = Duration::from_secs(2);
/// A flood that takes longer than this on a slow machine is cut short.
const LONGEST: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let limits = Arc::new(Limits::new()?);
    let server = Server::start(Arc::clone(&limits)).await?;
    let before = resident();
    let tenants: Vec<_> = (0..HONEST).map(|number| clients::tenant(server.address, number)).collect();
    tokio::time::sleep(CALM).await;
    println!("{HONEST} tenants at work; the flood begins");

    let flood_began = Instant::now();
    let flood = clients::flood(server.address, flood_began + LONGEST).await?;
    let flooded = flood_began.elapsed();
    tokio::time::sleep(CALM).await;
    let mut honest = clients::Answers::default();
    for tenant in tenants {
        honest.add(tenant.stop().await?);
    }

    println!("\nhonest tenants: {} of {} requests answered", honest.answered, honest.sent);
    println!(
        "the flood: {} of {} requests under as many names let in, in {:.1} s",
        flood.answered,
        flood.sent,
        flooded.as_secs_f64()
    );
    let refused = limits.refused();
    println!("refused by layer: {}", refused.map(|(layer, count)| format!("{layer} {count}")).join(", "));
    println!(
        "decisions: {} over HTTP, {:.0} a second during the flood; {:.2} million a second by the limits alone",
        server.seen(),
        flood.sent as f64 / flooded.as_secs_f64(),
        Limits::decisions_per_second()? / 1e6
    );
    let table = limits.tenants.stats();
    println!(
        "table of tenants: {} of {} names live, {} given up, {} bytes from first to last",
        table.live, table.capacity, table.evicted, table.bytes
    );
    if let (Some(before), Some(after)) = (before, resident()) {
        println!("memory of the process: {before} KiB before, {after} KiB after");
    }
    for (what, keys) in [
        ("busiest tenants", limits.tenants.heaviest(5)),
        ("busiest plans", limits.plans.heaviest(3)),
        ("most refused plans", limits.plans.most_refused(3)),
    ] {
        let keys: Vec<String> = keys.iter().map(|top| format!("{} {}", limits::show(&top.key), top.count)).collect();
        println!("{what}: {}", keys.join(", "));
    }

    let path = chart_path();
    chart::draw(&server.slices(), &path).with_context(|| format!("cannot draw {}", path.display()))?;
    println!("chart: {}", path.display());
    if flood.sent < FLOOD {
        println!("this machine was too slow for the whole flood");
    }
    let untouched = honest.sent > 0 && honest.answered == honest.sent;
    println!("{}", if untouched { "the honest tenants did not notice" } else { "HONEST TENANTS WERE REFUSED" });
    Ok(if untouched { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What the process has in memory, in KiB, where the system tells.
fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// Beside everything else that cargo builds.
fn chart_path() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target"), PathBuf::from);
    target.join("tenants.svg")
}
