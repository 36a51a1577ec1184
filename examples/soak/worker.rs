//! One of the two thousand: it calls, thinks, and calls again, until it is told to stop.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use resile::context::{self, Context};
use resile::{Cancel, CancelReason};

use crate::calls::{Plan, Way, call};
use crate::service::Service;
use crate::tally::End;
use crate::tenants::Tenants;

/// How long a task thinks between two calls, in milliseconds.
const THINKS: std::ops::Range<u64> = 100..400;
/// One call in so many is cut short.
const CUT: u32 = 100;
/// One call in so many panics.
const PANICS: u32 = 1_000;

/// What cuts a call short, after 0 to 20 ms.
#[derive(Clone, Copy)]
enum Cut {
    Drop,
    Cancel,
    Abort,
}

impl Cut {
    fn draw(dice: &mut SmallRng) -> Option<Self> {
        dice.random_ratio(1, CUT).then(|| match dice.random_range(0..3) {
            0 => Self::Drop,
            1 => Self::Cancel,
            _ => Self::Abort,
        })
    }
}

pub async fn work(service: Arc<Service>, seed: u64) {
    let mut dice = SmallRng::seed_from_u64(seed);
    while !service.stopped.load(Relaxed) {
        tokio::time::sleep(Duration::from_millis(dice.random_range(THINKS))).await;
        let way = Way::draw(&mut dice);
        service.tally.begin();
        let end = call_once(&service, way, &mut dice).await;
        service.tally.end(way, end);
    }
}

async fn call_once(service: &Arc<Service>, way: Way, dice: &mut SmallRng) -> End {
    // Those whose token is not the drain's are refused by it once it is closed, and run on until then.
    let cancel = if dice.random() { service.drain.cancel_token().child() } else { Cancel::new() };
    let plan = Plan {
        service: service.clone(),
        dice: SmallRng::from_rng(dice),
        panics: dice.random_ratio(1, PANICS),
        cancel: cancel.clone(),
    };
    let tenant = Context::new().key("tenant", Tenants::draw(dice));
    let call = context::scope(tenant, caught(call(way, plan)));
    let cut = Cut::draw(dice);
    let after = Duration::from_micros(dice.random_range(0..20_000));
    match cut {
        None => call.await,
        Some(Cut::Drop) => tokio::time::timeout(after, call).await.unwrap_or(End::Dropped),
        Some(Cut::Cancel) => {
            let cancelling = async {
                tokio::time::sleep(after).await;
                cancel.cancel_with(CancelReason::ClientGone);
            };
            tokio::join!(call, cancelling).0
        }
        Some(Cut::Abort) => {
            let task = tokio::spawn(call);
            tokio::time::sleep(after).await;
            task.abort();
            task.await.unwrap_or(End::Aborted)
        }
    }
}

/// A panic ends the call and not its task.
async fn caught(call: BoxFuture<'static, End>) -> End {
    AssertUnwindSafe(call).catch_unwind().await.unwrap_or(End::Panicked)
}
