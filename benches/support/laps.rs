//! What is measured, each as a loop: `ready`, `pending`, `steps` and `gates`.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use resile::context::{self, Context};
use resile::{Call, Cancel, Drain, Entry, Gate, Moment, Outcome, Pass, Policy, Times, Verdict};

use super::succeed;

/// Does something so many times.
pub type Lap = Box<dyn FnMut(u64)>;

/// A row's name, and how its loop is started.
pub type Row = (&'static str, fn() -> Lap);

/// The bare operation: what all others are measured against.
pub const BARE: &str = "ready/bare";

/// All rows, by group and name. Each is to be started, and run, in a [`World`](super::World).
pub const ALL: &[Row] = &[
    (BARE, || repeat(|| succeed!(super::ready()))),
    ("ready/tokio timeout", tokio_ready),
    ("ready/no steps", || ready(super::no_steps())),
    ("ready/stack", || ready(super::stack())),
    ("ready/stack in a context", in_a_context),
    ("pending/bare", || repeat(|| succeed!(super::pending()))),
    ("pending/tokio timeout", tokio_pending),
    ("pending/no steps", || pending(super::no_steps())),
    ("pending/timeout", || pending(super::only_timeout())),
    ("pending/stack", || pending(super::stack())),
    ("steps/timeout", || ready(super::only_timeout())),
    ("steps/retry", || ready(super::only_retry())),
    ("steps/breaker", || ready(super::only_gate(super::breaker()))),
    ("steps/bucket", || ready(super::only_gate(super::bucket()))),
    ("steps/semaphore", || ready(super::only_gate(super::semaphore()))),
    ("gates/open", || gate(Open)),
    ("gates/bucket", || gate(super::bucket())),
    ("gates/semaphore", || gate(super::semaphore())),
    ("gates/breaker", || gate(super::breaker())),
    ("gates/drain", || gate(Drain::new())),
];

pub fn start(name: &str) -> Lap {
    ALL.iter().find(|(row, _)| *row == name).map(|(_, start)| start()).expect("the name of a row")
}

pub fn repeat(mut once: impl FnMut() + 'static) -> Lap {
    Box::new(move |times| {
        for _ in 0..times {
            once();
        }
    })
}

pub fn ready(policy: Policy) -> Lap {
    repeat(move || succeed!(policy.run(super::ready)))
}

pub fn pending(policy: Policy) -> Lap {
    repeat(move || succeed!(policy.run(super::pending)))
}

/// A request of one call: its context is put around it too.
fn in_a_context() -> Lap {
    let (policy, client) = (super::stack(), Cancel::new());
    let request = Context::new().deadline(Duration::from_secs(3600)).cancel(&client).key("tenant", 7_u32);
    repeat(move || succeed!(context::scope(request.clone(), policy.run(super::ready))))
}

fn tokio_ready() -> Lap {
    repeat(|| succeed!(async { tokio::time::timeout(Duration::from_millis(300), super::ready()).await? }))
}

fn tokio_pending() -> Lap {
    repeat(|| succeed!(async { tokio::time::timeout(Duration::from_millis(300), super::pending()).await? }))
}

/// In and out of a gate, with the clock read once for all.
pub fn gate(gate: impl Gate) -> Lap {
    let within = Arc::new(Within { gate, rounds: AtomicU64::new(0) });
    let policy = super::only_gate(within.clone());
    Box::new(move |times| {
        within.rounds.store(times, Ordering::Relaxed);
        succeed!(policy.run(super::ready));
    })
}

/// Measures a gate from within: only a policy makes calls, so this one, being entered, enters and leaves the inner gate
/// as often as asked.
struct Within<G> {
    gate: G,
    rounds: AtomicU64,
}

impl<G: Gate> Gate for Within<G> {
    fn enter(&self, call: &Call) -> Entry {
        let now = call.now();
        for _ in 0..self.rounds.load(Ordering::Relaxed) {
            in_and_out(&self.gate, call, now);
        }
        Entry::Pass(Pass::default())
    }

    fn leave(&self, _: Pass, _: Outcome) {}
}

#[inline]
fn in_and_out(gate: &impl Gate, call: &Call, now: Moment) {
    match black_box(gate).enter(black_box(call)) {
        Entry::Pass(pass) => {
            let outcome = Outcome::Judged(black_box(Verdict::Success), Times::new(now, now));
            black_box(gate).leave(pass, outcome);
        }
        _ => super::failed(),
    }
}

/// A gate that does nothing.
struct Open;

impl Gate for Open {
    #[inline]
    fn enter(&self, _: &Call) -> Entry {
        Entry::Pass(Pass::default())
    }

    #[inline]
    fn leave(&self, _: Pass, _: Outcome) {}
}
