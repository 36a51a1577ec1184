//! Who looks after the soak: changes the limits each second, asks whether everything holds, and drains once.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use rand::SeedableRng as _;
use rand::rngs::SmallRng;
use resile::context::{self, Context};
use resile::{Drained, FutureExt as _, Phase, infallible};
use tokio::runtime::Handle;
use tokio::time::{Instant, sleep, sleep_until};

use crate::memory::{Memory, resident};
use crate::service::{Service, TASKS};
use crate::tally::End;

/// How often the invariants are asked for within a second.
const LOOKS: u32 = 20;
/// How long what was begun may take to end once nobody calls any more: the longest call takes half a second.
const SETTLE: Duration = Duration::from_secs(5);
/// So little that part of what is in flight has to be cancelled.
const GRACE: Duration = Duration::from_millis(10);

/// Watches for so many seconds.
pub async fn watch(service: &Arc<Service>, seconds: u64, seed: u64) -> anyhow::Result<Memory> {
    let mut dice = SmallRng::seed_from_u64(seed);
    let mut memory = Memory::default();
    let mut ended = 0;
    for second in 1..=seconds {
        service.change_limits(&mut dice)?;
        let until = Instant::now() + Duration::from_secs(1);
        if second == seconds / 2 {
            drain(service).await?;
        }
        for look in 1..=LOOKS {
            sleep_until(until - Duration::from_secs(1) / LOOKS * (LOOKS - look)).await;
            service.inspect().map_err(anyhow::Error::msg)?;
        }
        memory.look(second <= seconds.div_ceil(3));
        let now = service.tally.ended();
        println!("{}", line(second, now - ended, service));
        ensure!(now > ended, "no call ended within second {second}");
        ended = now;
    }
    memory.inspect().map_err(anyhow::Error::msg)?;
    Ok(memory)
}

fn line(second: u64, calls: u64, service: &Service) -> String {
    let permits = service.permits.each_ref().map(|permits| {
        let semaphore = &permits.semaphore;
        format!("{:>9}", format!("{}/{}+{}", semaphore.in_use(), semaphore.limit(), semaphore.queued()))
    });
    let breakers = service.breakers.each_ref().map(|breaker| format!("{:>12}", format!("{:?}", breaker.state())));
    let tenants = service.tenants.buckets.stats();
    format!(
        "{second:>3} s  {calls:>6} calls  in flight {:>4}  permits {}  tenants {:>2}-{:<2}  breakers {}  tasks {:>5}  {:>4} MiB",
        service.drain.in_flight(),
        permits.join(" "),
        tenants.live,
        tenants.pinned,
        breakers.join(" "),
        Handle::current().metrics().num_alive_tasks(),
        resident().unwrap_or(0) / 1024,
    )
}

/// Closes in the middle of the traffic, finds that nothing is held while everybody goes on calling, and opens again.
async fn drain(service: &Service) -> anyhow::Result<()> {
    let (report, same): (Drained, Drained) =
        tokio::join!(service.drain.close(GRACE), service.drain.close(Duration::MAX));
    println!("       drained: {report}");
    ensure!(report == same, "two who close get different reports: {report:?} and {same:?}");
    ensure!(report.still_in() == 0, "some did not get out of the drain");
    ensure!(report.finished() + report.cancelled() > 0, "nothing was in flight when the drain was closed");
    settle(service).await.context("after the drain was closed")?;
    let given = service.turnstiles.each_ref().map(|turnstile| turnstile.given());
    sleep(Duration::from_millis(300)).await;
    let later = service.turnstiles.each_ref().map(|turnstile| turnstile.given());
    ensure!(given == later, "calls came through a closed drain");
    ensure!(service.drain.phase() == Phase::Done && service.drain.reopen(), "the drain can't be opened again");
    Ok(())
}

/// Waits until nothing is held.
pub async fn settle(service: &Service) -> anyhow::Result<()> {
    let end = Instant::now() + SETTLE;
    loop {
        let held = service.held();
        if held.is_empty() {
            return Ok(());
        }
        if Instant::now() > end {
            bail!("still held: {}", held.join(", "));
        }
        sleep(Duration::from_millis(5)).await;
    }
}

/// Finds that everything has ended, and that everything still works.
pub async fn end(service: &Service) -> anyhow::Result<()> {
    settle(service).await.context("at the end")?;
    let end = Instant::now() + SETTLE;
    while Handle::current().metrics().num_alive_tasks() > 0 {
        ensure!(Instant::now() < end, "{} tasks are alive", Handle::current().metrics().num_alive_tasks());
        sleep(Duration::from_millis(5)).await;
    }
    let (begun, ended) = (service.tally.begun(), service.tally.ended());
    ensure!(begun == ended, "{begun} calls were begun and {ended} ended");
    if let Some(missing) = service.tally.missing() {
        bail!("{missing}: this was no soak");
    }
    ensure!(service.tally.total(End::Done) > TASKS, "hardly a call went well");
    ensure!(service.tenants.buckets.stats().overflowed > 0, "the tenants' table was never full: this was no soak");
    service.tenants.rest().await?;
    service.open_up();
    for policy in &service.policies {
        // Each turnstile refuses now and then.
        let mut result = Ok(());
        for _ in 0..3 {
            let call = policy.run(|| infallible(async {})).within(Duration::from_secs(1));
            result = context::scope(Context::new().key("tenant", "the last"), call).await;
            if result.is_ok() {
                break;
            }
        }
        ensure!(result.is_ok(), "{} does not work any more: {result:?}", policy.name());
    }
    service.inspect().map_err(anyhow::Error::msg)?;
    settle(service).await.context("after the last calls")
}
