//! A soak: two thousand tasks call through every gate at once, in every way there is, for a minute; some are cut short,
//! some panic, the limits change each second, and in the middle all of it is drained and opened again.
//!
//! ```text
//! cargo run --release --example soak              # a minute
//! cargo run --example soak -- --quick             # 8 seconds, with debug assertions
//! cargo run --release --example soak -- --seed 7  # the same dice again, though not the same interleaving
//! ```
//!
//! The [`service`] has the gates and the policies over them, one gate being a user's own [`turnstile`] that keeps a book
//! of its passes; every call has one of its [`tenants`], half of whom are made up. The operations sleep 0 to 20 ms, and at times fail, are slow, or hang. [`calls`] has the ways of
//! calling, and a [`worker`] makes them: of a hundred calls one is cut short, by dropping its future, by a `Cancel`, or by
//! aborting its task, and of a thousand one panics.
//!
//! Here is what is [`watch`]ed, in real time and on all cores:
//!
//! * no more permits are out than the highest limit there has been, no queue is longer than its bound, nothing has gone
//!   below zero, and every pass is either inside or came back, once: twenty times a second;
//! * calls end in every second, so nothing is wedged;
//! * while the drain is closed, nothing at all is held, although everybody goes on calling;
//! * a table of tenants never has more entries than it has room for, and all are as good as new once nobody calls;
//! * at the end nothing is held, no task is alive, every call that was begun has ended, each policy still works, and
//!   memory has stayed where it was when a third of the time was over, but for 4 MiB.
//!
//! Exits with 0 if all that holds, 1 and a message if not, 2 if the arguments make no sense.

mod arguments;
mod calls;
mod memory;
mod service;
mod tally;
mod tenants;
mod turnstile;
mod watch;
mod worker;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use tokio::task::JoinSet;

use crate::arguments::Arguments;
use crate::service::{Service, TASKS};

/// Panics that nobody planned.
static SURPRISES: AtomicU64 = AtomicU64::new(0);

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = match Arguments::parse(std::env::args().skip(1)) {
        Ok(Some(arguments)) => arguments,
        Ok(None) => {
            println!("{}", arguments::USAGE);
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("{error}\n{}", arguments::USAGE);
            return ExitCode::from(2);
        }
    };
    println!("{TASKS} tasks, {:?}, --seed {}", arguments.lasting(), arguments.seed);
    hush_planned_panics();
    match soak(arguments).await {
        Ok(()) => {
            println!("everything held, and nothing is held");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error:#}; to throw the same dice: --seed {}", arguments.seed);
            ExitCode::FAILURE
        }
    }
}

async fn soak(arguments: Arguments) -> anyhow::Result<()> {
    let service = Arc::new(Service::new(arguments.seed)?);
    let mut workers = JoinSet::new();
    for number in 1..=TASKS {
        workers.spawn(worker::work(service.clone(), arguments.seed.wrapping_mul(TASKS).wrapping_add(number)));
    }
    let memory = watch::watch(&service, arguments.seconds, arguments.seed).await?;

    service.stopped.store(true, Relaxed);
    let ended = tokio::time::timeout(Duration::from_secs(10), async {
        while let Some(worker) = workers.join_next().await {
            worker.context("a worker has panicked")?;
        }
        anyhow::Ok(())
    });
    ended.await.context("calls go on that should have ended long ago")??;
    watch::end(&service).await?;

    println!("\n{}\n", service.tally);
    let [cleaned, failed] = service.policies.iter().fold([0, 0], |[cleaned, failed], policy| {
        [cleaned + policy.tasks().cleaned(), failed + policy.tasks().failed()]
    });
    let given: u64 = service.turnstiles.iter().map(|turnstile| turnstile.given()).sum();
    println!("ended early, by the policies' records: {}", service.early);
    println!("cleanups: {cleaned} ran to their end, {failed} failed as they were to");
    println!("turnstiles: {given} passes given, and each came back once");
    let [buckets, permits] = [service.tenants.buckets.stats(), service.tenants.permits.stats()];
    println!("tenants' buckets: {} given up, {} found no room", buckets.evicted, buckets.overflowed);
    println!("tenants' permits: {} given up, {} found no room", permits.evicted, permits.overflowed);
    println!("memory: {} KiB when warm, at most {} KiB later", memory.warm, memory.after);
    let surprises = SURPRISES.load(Relaxed);
    ensure!(surprises == 0, "{surprises} panics were not planned");
    Ok(())
}

/// Keeps the soak's own panics off the screen, and counts all others.
fn hush_planned_panics() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let message = panic.payload().downcast_ref::<String>();
        if message.is_none_or(|message| message != calls::PLANNED) {
            SURPRISES.fetch_add(1, Relaxed);
            tell(panic);
        }
    }));
}
