//! What the service's `main` does, and what is checked afterwards.

use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::Context as _;
use resile::{CancelReason, Drain, Drained, Phase};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep, timeout};

use crate::client::{Load, STREAMS};
use crate::server;

/// Twice what the slowest request takes.
const GRACE: Duration = Duration::from_millis(1_500);
const CANCEL_WAIT: Duration = Duration::from_millis(500);
/// What a machine with other things to do may take on top.
const MARGIN: Duration = Duration::from_secs(1);
const UNDER_LOAD: Duration = Duration::from_secs(1);

pub async fn tell() -> anyhow::Result<ExitCode> {
    let drain = Drain::builder().named("shop").cancel_wait(CANCEL_WAIT).build()?;
    let mut terminate = signal(SignalKind::terminate())?;

    let server = server::start(drain.clone()).await?;
    let job = drain.spawn("reindex", reindex())?;
    legacy(&drain)?;
    let load = Load::start(server.address);
    tokio::spawn(kill_ourselves());

    terminate.recv().await.context("no signal came")?;
    let told = Instant::now();
    println!("SIGTERM, with {} in flight:", drain.in_flight());
    for held in drain.held() {
        println!("  {held}");
    }
    println!("then:");
    let phases = tokio::spawn(narrate(drain.clone(), told));

    let report = drain.close(GRACE).await;
    let took = told.elapsed();
    phases.await?;
    println!("{report}");

    // The server is done, so its clients are: they have read what was sent, or there is nobody to answer.
    let seen = timeout(MARGIN, load.finish()).await.context("a client hangs")?;
    let reindexed = job.await?;
    let accepted = server.ledger.lock().clone();
    println!("clients: {seen}");
    Ok(judge(&[
        ("requests were in flight when the signal came", report.finished() > 0),
        ("every accepted request was answered in full", accepted.iter().all(|id| seen.answered.contains(id))),
        ("nothing was answered that was not accepted", seen.answered.iter().all(|id| accepted.contains(id))),
        ("every stream ended with a goodbye", seen.streams == (STREAMS, 0)),
        ("the job was stopped and knows why", reindexed == Err(CancelReason::Shutdown)),
        ("only streams, the server behind them and the job were cancelled", report.cancelled() == STREAMS + 2),
        ("what listens to nobody is in the report by name", names(&report) == ["legacy import"]),
        ("the bound held", took <= GRACE + CANCEL_WAIT + MARGIN),
    ]))
}

async fn narrate(drain: Drain, told: Instant) {
    for phase in [Phase::Closing, Phase::Cancelling, Phase::Done] {
        drain.wait_for(phase).await;
        println!("  {phase:?} after {:.2?}", told.elapsed());
    }
}

fn names(report: &Drained) -> Vec<&str> {
    report.stuck().iter().map(resile::Held::name).collect()
}

/// A job without end that can be dropped at any time.
async fn reindex() {
    loop {
        sleep(Duration::from_millis(20)).await;
    }
}

/// A thread that nobody can stop: it is counted, so that it is not forgotten.
fn legacy(drain: &Drain) -> anyhow::Result<()> {
    let place = drain.track("legacy import")?;
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(3_600));
        drop(place);
    });
    Ok(())
}

/// What an orchestrator does, after some time under load.
async fn kill_ourselves() {
    sleep(UNDER_LOAD).await;
    let kill = format!("kill -TERM {}", std::process::id());
    let killed = tokio::task::spawn_blocking(|| Command::new("sh").arg("-c").arg(kill).status()).await;
    assert!(killed.is_ok_and(|status| status.is_ok_and(|status| status.success())), "the signal can't be sent");
}

fn judge(claims: &[(&str, bool)]) -> ExitCode {
    for (claim, holds) in claims {
        println!("{} {claim}", if *holds { "ok    " } else { "FAILED" });
    }
    if claims.iter().all(|(_, holds)| *holds) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
