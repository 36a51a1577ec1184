//! What a seed says: a policy and who calls it, and what happens.

use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::super::support::ms;

const NANO: Duration = Duration::from_nanos(1);
const YEAR: Duration = Duration::from_secs(365 * 86_400);

/// The parts of the stack that all callers share.
#[derive(Clone, Debug)]
#[allow(clippy::struct_excessive_bools, reason = "each says whether a part is there")]
pub struct World {
    /// Outermost, if there.
    pub drain: bool,
    pub timeout: Option<Duration>,
    /// The pause, and how many attempts.
    pub retry: Option<(Duration, u32)>,
    pub breaker: bool,
    pub bucket: bool,
    pub keyed: bool,
    pub layered: bool,
    pub permits: u32,
    pub attempt_timeout: Option<Duration>,
    /// The source that the listener of early ends cancels when it is told of one.
    pub listener_cancels: Option<usize>,
}

/// What an operation does, the next for each attempt.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Act {
    Good,
    Bad,
    GoodAfter(Duration),
    BadAfter(Duration),
    /// Takes the time in its first poll, as a computation does.
    BlocksAndFails(Duration),
    Hangs,
    /// Hangs, and when it is dropped it cancels a source.
    HangsAndCancels(usize),
    PanicsInClosure,
    PanicsInPoll,
    /// Spends the cooperative budget of its task, again and again.
    Spends,
}

#[derive(Clone, Copy, Debug)]
pub enum Kind {
    Call,
    Shield,
    Cleanup,
    /// With so many children, each a call by itself, or none of the policy's business.
    Scope {
        children: usize,
        under_policy: bool,
        keep_going: bool,
    },
}

#[derive(Clone, Debug)]
pub struct Caller {
    pub kind: Kind,
    pub acts: Vec<Act>,
    pub tenant: u64,
    pub deadline: Option<Duration>,
    /// In a context with this deadline.
    pub context_deadline: Option<Duration>,
    /// Which sources may cancel it, and which its context.
    pub sources: Vec<usize>,
    pub context_sources: Vec<usize>,
    /// It is polled only when told, however often it is woken.
    pub lazy: bool,
}

#[derive(Clone, Debug)]
pub enum Event {
    Start(Caller),
    Advance(Duration),
    /// Polls a caller, woken or not.
    Poll(usize),
    Drop(usize),
    Cancel(usize),
    Resize(u32),
    NewPlan(u32),
    Close(Duration),
    Reopen,
    /// Somebody in another runtime, whose clock is that far ahead, uses the same limits.
    Elsewhere(Duration),
}

/// How many sources of cancellations there are.
pub const SOURCES: usize = 3;

fn one_of<T: Clone>(rng: &mut SmallRng, all: &[T]) -> T {
    all[rng.random_range(0..all.len())].clone()
}

fn maybe<T: Clone>(rng: &mut SmallRng, likely: f64, all: &[T]) -> Option<T> {
    rng.random_bool(likely).then(|| one_of(rng, all))
}

pub fn of_seed(seed: u64) -> (World, Vec<Event>) {
    let rng = &mut SmallRng::seed_from_u64(seed);
    let world = World {
        drain: rng.random_bool(0.5),
        timeout: maybe(rng, 0.6, &[ms(1), ms(20), ms(50), ms(1000)]),
        retry: maybe(rng, 0.7, &[(Duration::ZERO, 1000), (ms(10), 3), (ms(15), 5), (ms(10_000), 3)]),
        breaker: rng.random_bool(0.5),
        bucket: rng.random_bool(0.3),
        keyed: rng.random_bool(0.3),
        layered: rng.random_bool(0.2),
        permits: rng.random_range(1..4),
        attempt_timeout: maybe(rng, 0.4, &[ms(5), ms(30), ms(300)]),
        listener_cancels: maybe(rng, 0.1, &[0, 1, 2]),
    };
    let events = (0..rng.random_range(10..50)).map(|_| event(rng)).collect();
    (world, events)
}

fn event(rng: &mut SmallRng) -> Event {
    let which = rng.random_range(0..12);
    match rng.random_range(0..100) {
        0..34 => Event::Start(caller(rng)),
        34..60 => Event::Advance(one_of(
            rng,
            &[Duration::ZERO, NANO, Duration::from_micros(999), ms(1), ms(5), ms(10), ms(20), ms(49), ms(1000)],
        )),
        60..64 => Event::Advance(one_of(rng, &[ms(30_000), ms(61_000), YEAR])),
        64..76 => Event::Poll(which),
        76..82 => Event::Drop(which),
        82..90 => Event::Cancel(which % SOURCES),
        90..92 => Event::Resize(rng.random_range(1..5)),
        92..93 => Event::NewPlan(rng.random_range(1..4)),
        93..96 => Event::Close(one_of(rng, &[Duration::ZERO, ms(10), ms(1000)])),
        96..98 => Event::Reopen,
        _ => Event::Elsewhere(one_of(rng, &[Duration::ZERO, ms(3_600_000), YEAR])),
    }
}

fn caller(rng: &mut SmallRng) -> Caller {
    let limits = [Duration::ZERO, ms(1), ms(5), ms(20), ms(45), ms(2000)];
    let sources = |rng: &mut SmallRng, likely| (0..SOURCES).filter(|_| rng.random_bool(likely)).collect();
    let kind = match rng.random_range(0..10) {
        0..5 => Kind::Call,
        5 => Kind::Shield,
        6 => Kind::Cleanup,
        _ => Kind::Scope {
            children: rng.random_range(1..4),
            under_policy: rng.random_bool(0.7),
            keep_going: rng.random_bool(0.3),
        },
    };
    Caller {
        kind,
        acts: (0..rng.random_range(1..4)).map(|_| act(rng)).collect(),
        tenant: rng.random_range(0..4),
        deadline: maybe(rng, 0.4, &limits),
        context_deadline: maybe(rng, 0.3, &limits),
        sources: sources(rng, 0.3),
        context_sources: sources(rng, 0.2),
        lazy: rng.random_bool(0.25),
    }
}

fn act(rng: &mut SmallRng) -> Act {
    let time = one_of(rng, &[NANO, ms(1), ms(9), ms(20), ms(100)]);
    match rng.random_range(0..20) {
        0..4 => Act::Good,
        4..7 => Act::Bad,
        7..12 => Act::GoodAfter(time),
        12..14 => Act::BadAfter(time),
        14 => Act::BlocksAndFails(time),
        15..17 => Act::Hangs,
        17 => Act::HangsAndCancels(rng.random_range(0..SOURCES)),
        18 => one_of(rng, &[Act::PanicsInClosure, Act::PanicsInPoll]),
        _ => Act::Spends,
    }
}
