//! Nothing is left behind, wherever a call ends.
//!
//! The harness runs stacks of steps with scripted operations, polled by hand, and ends each call at each of its points:
//! before the first poll, after every poll, and after every progress (a permit granted, a timer fired) that the call has
//! not noticed yet. Whatever was held must be back then, and have come back from the inside out. It does so for every
//! single step, every pair and every triple, and for every way to make a call.

mod support;

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use resile::context;
use resile::{
    Acquire, Backoff, Call, CircuitBreaker, Drain, Entry, Error, Fair, FutureExt, Gate, Guard, Keyed, Layers,
    LeakyBucket, Outcome, Pass, Phase, Policy, PolicyBuilder, Quota, Rate, Refusal, Retry, RetryBudget, Semaphore,
    SlidingWindow, State, Ticket, TokenBucket, Verdict,
};
use support::hand::{Clock, Flag, catch_boom, poll_once};
use support::journal::{Heard, Journal, Passage};
use support::ms;
use support::script::{
    Act, Answer, BAD, ERR, HANG, IGNORED, OK, PANIC_IN_CLOSURE, PANIC_IN_DROP, PANIC_IN_JUDGE, PANIC_IN_POLL, Script,
    boom, judge,
};
use support::watch::{Manner, Reading, Spy, TENANT, Watched};
use tokio_util::sync::CancellationToken;

/// A kind of step.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Timeout,
    Retry,
    RetryRatio,
    RetryShare,
    /// A semaphore with a free permit.
    Free,
    /// A semaphore without: the call must queue, and is granted a permit later.
    Full,
    Closed,
    HalfOpen,
    /// A bucket with tokens.
    Tokens,
    /// A bucket without: the call must wait.
    Empty,
    /// A leaky bucket, a window and a quota without: the same.
    Leaky,
    Window,
    Quota,
    /// A drain that is open: the call has a name there.
    Drain,
    /// A drain that begins to close while the call waits for something further in.
    Draining,
    /// A bucket per key, with tokens and without.
    Keyed,
    KeyedEmpty,
    /// A bucket and a semaphore, both with what it takes.
    Layers,
    /// A semaphore without permits that is shared fairly: the call waits at the limit itself.
    FairPermits,
    /// A bucket that is shared fairly, where somebody else waits at the limit: the call waits in line.
    FairTokens,
    /// A gate of our own.
    Own,
    /// A gate of our own that names the moment until which the call must wait.
    OwnDelay,
}

const KINDS: [Kind; 13] = [
    Kind::Timeout,
    Kind::Retry,
    Kind::RetryRatio,
    Kind::RetryShare,
    Kind::Free,
    Kind::Full,
    Kind::Closed,
    Kind::HalfOpen,
    Kind::Tokens,
    Kind::Empty,
    Kind::Drain,
    Kind::Own,
    Kind::OwnDelay,
];

/// The other limiters wait in the same queue as the bucket, and what stands around other gates adds no way to wait but
/// for the line, so they stand in no triples.
const LIMITERS: [Kind; 8] = [
    Kind::Leaky,
    Kind::Window,
    Kind::Quota,
    Kind::Keyed,
    Kind::KeyedEmpty,
    Kind::Layers,
    Kind::FairPermits,
    Kind::FairTokens,
];

/// Between two attempts, for an empty bucket, at a gate that delays.
const STEP: Duration = ms(10);
const LIMIT: Duration = ms(40);
const DEADLINE: Duration = ms(25);
const TOKENS: u32 = 20;
const PROBES: u32 = 20;
const RESERVE: u64 = 10;
/// One before the first step, one after each.
const SPIES: [&str; 5] = ["spy 0", "spy 1", "spy 2", "spy 3", "spy 4"];

/// The operations with which every stack is run.
const ACTS: [&[Act]; 6] = [&[OK], &[ERR], &[OK.after_polls(1)], &[OK.after(STEP)], &[ERR, OK], &[HANG]];

fn singles() -> impl Iterator<Item = Vec<Kind>> {
    KINDS.into_iter().chain(LIMITERS).map(|kind| vec![kind])
}

fn pairs() -> impl Iterator<Item = Vec<Kind>> {
    KINDS.into_iter().flat_map(|outer| KINDS.into_iter().map(move |inner| vec![outer, inner]))
}

fn triples() -> impl Iterator<Item = Vec<Kind>> {
    pairs().flat_map(|pair| KINDS.into_iter().map(move |inner| [pair[0], pair[1], inner].to_vec()))
}

/// Each limiter outside and inside of everything, and of the other limiters.
fn limiters() -> impl Iterator<Item = Vec<Kind>> {
    let others = || KINDS.into_iter().chain(LIMITERS);
    LIMITERS
        .into_iter()
        .flat_map(move |limiter| others().flat_map(move |kind| [vec![limiter, kind], vec![kind, limiter]]))
}

fn stacks() -> impl Iterator<Item = Vec<Kind>> {
    std::iter::once(Vec::new()).chain(singles()).chain(pairs()).chain(limiters()).chain(triples())
}

/// A stack of steps with everything in it under watch.
struct World {
    journal: Journal,
    parts: Vec<Part>,
    spies: Vec<Spy>,
    /// Permits that are held so that a semaphore is full.
    held: Vec<(Semaphore, Option<Guard>)>,
    /// Drains that are still to close.
    closing: Vec<Drain>,
    /// Wait before the call for the same gate.
    ahead: Vec<(Running, Flag)>,
    /// Waits behind the call for the same gate.
    bystander: Option<(Pin<Box<Acquire>>, Flag)>,
    bystanders: bool,
}

/// A step as it was built.
#[derive(Clone, Debug)]
enum Part {
    Timeout,
    Retry(Option<RetryBudget>),
    Gate(Watched),
}

impl World {
    fn new(clock: &Clock, kinds: &[Kind], bystanders: bool) -> Self {
        let journal = Journal::default();
        let spies = SPIES[..=kinds.len()].iter().map(|name| Spy::new(name, &journal)).collect();
        let mut world = Self {
            journal,
            parts: Vec::new(),
            spies,
            held: Vec::new(),
            closing: Vec::new(),
            ahead: Vec::new(),
            bystander: None,
            bystanders,
        };
        for kind in kinds {
            let part = world.part(clock, *kind);
            world.parts.push(part);
        }
        world
    }

    fn part(&mut self, clock: &Clock, kind: Kind) -> Part {
        Part::Gate(match kind {
            Kind::Timeout => return Part::Timeout,
            Kind::Retry => return Part::Retry(None),
            Kind::RetryRatio => {
                let budget = RetryBudget::ratio(0.0).reserve_per_second(1).build();
                return Part::Retry(Some(budget.unwrap()));
            }
            // As many retries as calls in flight: none when all is over.
            Kind::RetryShare => return Part::Retry(Some(RetryBudget::share(1.0).floor(0).build().unwrap())),
            Kind::Free => Watched::Semaphore(Semaphore::permits(2).build().unwrap()),
            Kind::Full => {
                let semaphore = Semaphore::permits(1).build().unwrap();
                let permit = semaphore.try_acquire().unwrap();
                self.held.push((semaphore.clone(), Some(permit)));
                Watched::Semaphore(semaphore)
            }
            Kind::Closed => {
                let breaker = CircuitBreaker::builder().failure_rate(1.0).over_calls(64).min_calls(64);
                Watched::Breaker(breaker.build().unwrap())
            }
            Kind::HalfOpen => Watched::Breaker(half_open(clock, CircuitBreaker::builder().probes(PROBES))),
            Kind::Tokens => {
                let slow = Rate::new(1, Duration::from_secs(3600));
                Watched::Bucket(TokenBucket::at(slow).burst(TOKENS).build().unwrap())
            }
            Kind::Empty => {
                let bucket = TokenBucket::per_second(100).burst(1).build().unwrap();
                bucket.try_take(1).unwrap();
                Watched::Bucket(bucket)
            }
            Kind::Leaky => {
                let bucket = LeakyBucket::per_second(100).build().unwrap();
                bucket.try_take(1).unwrap();
                Watched::Leaky(bucket)
            }
            Kind::Window => {
                let window = SlidingWindow::at(Rate::new(1, STEP)).build().unwrap();
                window.try_take(1).unwrap();
                Watched::Window(window)
            }
            Kind::Quota => {
                let quota = Quota::from_first_use(1, STEP).build().unwrap();
                quota.try_take(1).unwrap();
                Watched::Quota(quota)
            }
            Kind::Drain => Watched::Drain(Drain::new()),
            Kind::Draining => {
                let drain = Drain::new();
                self.closing.push(drain.clone());
                Watched::Drain(drain)
            }
            Kind::Keyed | Kind::KeyedEmpty => {
                let settings = if kind == Kind::Keyed {
                    TokenBucket::at(Rate::new(1, Duration::from_secs(3600))).burst(TOKENS + 1)
                } else {
                    TokenBucket::per_second(100).burst(1)
                };
                let keyed = Keyed::by("tenant", settings).capacity(4).build().unwrap();
                keyed.try_take(TENANT, 1).unwrap();
                Watched::Keyed(keyed)
            }
            Kind::Layers => {
                let bucket = TokenBucket::at(Rate::new(1, Duration::from_secs(3600))).burst(TOKENS).build().unwrap();
                let semaphore = Semaphore::permits(2).build().unwrap();
                let layers = Layers::new().layer("tokens", bucket.clone()).layer("permits", semaphore.clone());
                Watched::Layers(layers.build().unwrap(), bucket, semaphore)
            }
            Kind::FairPermits => {
                let semaphore = Semaphore::permits(1).build().unwrap();
                self.held.push((semaphore.clone(), Some(semaphore.try_acquire().unwrap())));
                Watched::FairPermits(Fair::by("tenant", semaphore).build().unwrap())
            }
            Kind::FairTokens => {
                let fair = Fair::by("tenant", TokenBucket::per_second(100).burst(1)).build().unwrap();
                fair.limit().try_take(1).unwrap();
                let policy = Policy::named("other").gate(fair.clone()).build().unwrap();
                let answer = Script::new(&Journal::default(), [OK]);
                let mut call: Running = Box::pin(policy.call().owned().key("tenant", 1_u64).run(move || answer.make()));
                let flag = Flag::default();
                assert!(flag.poll(call.as_mut()).is_pending());
                self.ahead.push((call, flag));
                Watched::FairTokens(fair)
            }
            Kind::Own => Watched::Spy(Spy::new("own", &Journal::default())),
            Kind::OwnDelay => Watched::Spy(Spy::new("delay", &Journal::default()).that(Manner::Delays(STEP))),
        })
    }

    /// The stack as a policy, with a spy outside of each step and one inside of all.
    fn policy(&self, padding: usize) -> Policy {
        let mut builder = Policy::named("stack").gate(self.spies[0].clone());
        for _ in 0..padding {
            builder = builder.timeout(Duration::MAX);
        }
        for (part, spy) in self.parts.iter().zip(&self.spies[1..]) {
            builder = part.add_to(builder).gate(spy.clone());
        }
        builder.build().unwrap()
    }

    /// The stack as methods of a future, if there is no retry in it.
    fn one_shot(&self, operation: support::script::Operation, token: &CancellationToken) -> Running {
        let mut shot = operation.cancelled_by(token).through(&self.spies[self.parts.len()]);
        for (part, spy) in self.parts.iter().zip(&self.spies).rev() {
            shot = match part {
                Part::Timeout => shot.within(LIMIT),
                Part::Retry(_) => unreachable!("a future cannot be made again"),
                Part::Gate(Watched::Semaphore(gate)) => shot.through(gate),
                Part::Gate(Watched::Bucket(gate)) => shot.through(gate),
                Part::Gate(Watched::Leaky(gate)) => shot.through(gate),
                Part::Gate(Watched::Window(gate)) => shot.through(gate),
                Part::Gate(Watched::Quota(gate)) => shot.through(gate),
                Part::Gate(Watched::Breaker(gate)) => shot.through(gate),
                Part::Gate(Watched::Drain(drain)) => shot.through(&drain.part("call")),
                Part::Gate(Watched::Keyed(keyed)) => shot.through(keyed),
                Part::Gate(Watched::Layers(layers, ..)) => shot.through(layers),
                Part::Gate(Watched::FairPermits(fair)) => shot.through(fair),
                Part::Gate(Watched::FairTokens(fair)) => shot.through(fair),
                Part::Gate(Watched::Spy(gate)) => shot.through(gate),
                Part::Gate(Watched::Budget(_)) => unreachable!("a budget is no gate"),
            };
            shot = shot.through(spy);
        }
        Box::pin(context::scope(context::Context::new().key("tenant", TENANT), shot))
    }

    /// Moves the world until the call is woken: a permit is granted first, else time passes. False if nothing helps.
    fn progress(&mut self, clock: &Clock, flag: &Flag) -> bool {
        self.closing.retain(|drain| {
            let begins = drain.in_flight() > 0;
            assert!(!begins || poll_once(pin!(drain.close(Duration::MAX))).is_pending());
            !begins
        });
        if flag.woken() {
            return true;
        }
        for _ in 0..12 {
            self.tend_ahead();
            self.tend_bystander();
            if flag.woken() {
                return true;
            }
            let granted = self.held.iter_mut().find(|(semaphore, permit)| permit.is_some() && semaphore.queued() > 0);
            match granted {
                Some((_, permit)) => *permit = None,
                None => clock.advance(STEP),
            }
            if flag.woken() {
                return true;
            }
        }
        false
    }

    /// Has those who came before the call go on.
    fn tend_ahead(&mut self) {
        self.ahead.retain_mut(|(call, flag)| {
            let ended = flag.woken() && {
                *flag = Flag::default();
                flag.poll(call.as_mut()).is_ready()
            };
            !ended
        });
    }

    /// Has somebody queue behind the call, and pass on what it is granted.
    fn tend_bystander(&mut self) {
        let mut queues = self.parts.iter().filter_map(|part| match part {
            Part::Gate(Watched::Semaphore(gate)) if gate.queued() == 1 => Some(gate.acquire()),
            Part::Gate(Watched::Bucket(gate)) if gate.queued() == 1 => Some(gate.acquire()),
            Part::Gate(Watched::Leaky(gate)) if gate.queued() == 1 => Some(gate.acquire()),
            Part::Gate(Watched::Window(gate)) if gate.queued() == 1 => Some(gate.acquire()),
            Part::Gate(Watched::Quota(gate)) if gate.queued() == 1 => Some(gate.acquire()),
            _ => None,
        });
        if self.bystanders
            && let Some(acquire) = queues.next_back()
        {
            let (mut acquire, flag) = (Box::pin(acquire), Flag::default());
            assert!(flag.poll(acquire.as_mut()).is_pending(), "nobody passes by who waits");
            self.bystander = Some((acquire, flag));
            self.bystanders = false;
        }
        if let Some((acquire, flag)) = &mut self.bystander
            && flag.woken()
        {
            *flag = Flag::default();
            if let Poll::Ready(guard) = flag.poll(acquire.as_mut()) {
                drop(guard.unwrap());
                self.bystander = None;
            }
        }
    }

    /// Everything is as it was, less what a call that went through has used up.
    fn assert_back(mut self, clock: &Clock) {
        self.journal.assert_nested();
        for (_, permit) in &mut self.held {
            *permit = None;
        }
        for _ in 0..5 {
            self.tend_bystander();
            if self.bystander.is_some() {
                clock.advance(STEP);
            }
        }
        assert!(self.bystander.is_none(), "who waited behind was not told");
        for _ in 0..3 {
            clock.advance(STEP);
            self.tend_ahead();
        }
        assert!(self.ahead.is_empty(), "who waited before was not told");
        clock.advance(Duration::from_secs(1));
        for (place, part) in self.parts.iter().enumerate() {
            let (outside, inside) = (SPIES[place], SPIES[place + 1]);
            let passages = self.journal.passages(inside);
            let count = |which: fn(&Passage) -> bool| passages.iter().filter(|passage| which(passage)).count() as u32;
            match part {
                Part::Timeout | Part::Retry(None) => {}
                Part::Retry(Some(budget)) => {
                    let first = self.journal.passages(outside).iter().filter(|passage| passage.started).count() as u32;
                    let retries = u64::from(count(|passage| passage.started) - first);
                    let available = budget.available();
                    assert!(available == 0 || available == RESERVE - retries, "{available} after {retries} retries");
                }
                Part::Gate(watched) => {
                    let judged = count(
                        |passage| matches!(passage.outcome, Outcome::Judged(verdict, _) if verdict != Verdict::Ignored),
                    );
                    let spent = count(|passage| Heard::from(passage.outcome) != Heard::NotStarted);
                    watched.assert_back(judged, spent);
                }
            }
        }
        for spy in &self.spies {
            assert_eq!(spy.out(), (0, 0));
        }
    }
}

impl Part {
    fn add_to(&self, builder: PolicyBuilder) -> PolicyBuilder {
        match self.clone() {
            Self::Timeout => builder.timeout(LIMIT),
            Self::Retry(budget) => {
                let retry = Retry::constant(STEP).max_attempts(2);
                builder.retry(match budget {
                    Some(budget) => retry.budget(budget),
                    None => retry,
                })
            }
            Self::Gate(Watched::Semaphore(gate)) => builder.gate(gate),
            Self::Gate(Watched::Bucket(gate)) => builder.gate(gate),
            Self::Gate(Watched::Leaky(gate)) => builder.gate(gate),
            Self::Gate(Watched::Window(gate)) => builder.gate(gate),
            Self::Gate(Watched::Quota(gate)) => builder.gate(gate),
            Self::Gate(Watched::Breaker(gate)) => builder.gate(gate),
            Self::Gate(Watched::Drain(drain)) => builder.gate(drain.part("call")),
            Self::Gate(Watched::Keyed(keyed)) => builder.gate(keyed),
            Self::Gate(Watched::Layers(layers, ..)) => builder.gate(layers),
            Self::Gate(Watched::FairPermits(fair)) => builder.gate(fair),
            Self::Gate(Watched::FairTokens(fair)) => builder.gate(fair),
            Self::Gate(Watched::Spy(gate)) => builder.gate(gate),
            Self::Gate(Watched::Budget(_)) => unreachable!("a budget is no gate"),
        }
    }
}

trait AssertBack {
    fn assert_back(&self, judged: u32, spent: u32);
}

impl AssertBack for Watched {
    /// The state of a gate after so many verdicts, and operations that were started.
    #[track_caller]
    fn assert_back(&self, judged: u32, spent: u32) {
        match self.read() {
            Reading::Semaphore { in_use, queued, .. } => assert_eq!((in_use, queued), (0, 0)),
            Reading::Bucket { tokens: 1, queued: 0 } => {}
            Reading::Bucket { tokens, queued } => assert_eq!((tokens, queued), (TOKENS - spent, 0)),
            Reading::Breaker { state: State::HalfOpen, places, .. } => assert_eq!(places, PROBES - judged),
            Reading::Breaker { state, calls, .. } => assert_eq!((state, calls), (State::Closed, judged.into())),
            Reading::Drain { in_flight, named, phase } => {
                assert_eq!((in_flight, named), (0, 0));
                assert!(phase == Phase::Open || phase == Phase::Done, "{phase:?} with nobody in");
            }
            Reading::Spy { passes, tickets } => assert_eq!((passes, tickets), (0, 0)),
            Reading::Budget { .. } => unreachable!("a budget is no gate"),
        }
    }
}

fn half_open(clock: &Clock, builder: resile::BreakerBuilder) -> CircuitBreaker {
    let builder = builder.consecutive_failures(1).open_for(ms(1)).open_jitter(0.0);
    let breaker = builder.probe_failure_rate(0.5).abandoned_after(Duration::from_secs(3600)).build().unwrap();
    breaker.try_acquire().unwrap().failure();
    clock.advance(ms(1));
    assert_eq!(breaker.state(), State::HalfOpen);
    breaker
}

/// A way to make a call.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    Run,
    Once,
    Deadline,
    /// With its cost said when its attempts have ended.
    Settled,
    /// Ended by its token instead of a drop.
    Cancelled,
    /// Ended by its context, which has a deadline too.
    InContext,
    /// With more steps than a call has room for.
    Spilled,
    /// By the methods of the future.
    OneShot,
    OneShotCancelled,
}

impl Form {
    fn is_cancelled(self) -> bool {
        matches!(self, Self::Cancelled | Self::InContext | Self::OneShotCancelled)
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Polls {
    Once,
    /// Each poll is followed by another one with another waker.
    Twice,
}

type Running = Pin<Box<dyn Future<Output = Result<Answer, Error<Answer>>>>>;

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Ended {
    /// With a result: `None` for a value.
    Ready(Option<resile::ErrorKind>),
    Panicked,
    /// Where it was to be cut.
    Cut,
    /// At an operation that never ends.
    Hanging,
}

impl Ended {
    fn with(result: Result<Answer, Error<Answer>>) -> Self {
        let kind = result.as_ref().err().map(Error::kind);
        catch_boom(|| drop(result));
        Self::Ready(kind)
    }
}

/// What came of a play.
struct Played {
    ended: Ended,
    journal: Journal,
    /// At how many points the call can be cut.
    points: usize,
}

/// One call, to be ended at one of its points.
#[derive(Debug)]
struct Play<'a> {
    kinds: &'a [Kind],
    acts: &'a [Act],
    form: Form,
    polls: Polls,
    bystanders: bool,
    /// The point at which the call ends, if it has not before.
    cut: Option<usize>,
}

/// Says which play was on when an assertion failed.
struct Trace<'a, 'b>(&'a Play<'b>);

impl Drop for Trace<'_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("in {:?}", self.0);
        }
    }
}

impl<'a> Play<'a> {
    fn new(kinds: &'a [Kind], acts: &'a [Act], form: Form) -> Self {
        Self { kinds, acts, form, polls: Polls::Once, bystanders: false, cut: None }
    }

    /// Plays it to its end, and then cut at each of its points.
    fn at_every_point(mut self, clock: &Clock) -> usize {
        let points = self.play(clock).points;
        for cut in 0..points {
            self.cut = Some(cut);
            let ended = self.play(clock).ended;
            // A token that is cancelled does not end what is ready all the same.
            assert!(ended == Ended::Cut || self.form.is_cancelled(), "{ended:?} at {self:?}");
        }
        points
    }

    fn play(&self, clock: &Clock) -> Played {
        let _trace = Trace(self);
        let mut world = World::new(clock, self.kinds, self.bystanders);
        let script = Script::new(&world.journal, self.acts);
        let token = CancellationToken::new();
        let mut call = self.call(&world, &script, &token);
        let mut points = 0;
        let mut flag = Flag::default();
        let mut is_cut = |flag: &Flag| {
            points += 1;
            let cut = self.cut == Some(points - 1);
            if cut && self.form.is_cancelled() {
                token.cancel();
                assert!(points == 1 || flag.woken(), "nobody was told of the cancellation");
            }
            cut
        };
        let ended = loop {
            if is_cut(&flag) {
                break Ended::Cut;
            }
            match self.poll(&mut call, &mut flag) {
                None => break Ended::Panicked,
                Some(Poll::Ready(result)) => break Ended::with(result),
                Some(Poll::Pending) => {}
            }
            world.tend_bystander();
            if is_cut(&flag) {
                break Ended::Cut;
            }
            if !world.progress(clock, &flag) {
                let running = world.journal.running();
                assert!(running.is_some_and(|attempt| script.act(attempt).hangs()), "the call was never woken");
                break Ended::Hanging;
            }
        };
        let ended = match ended {
            Ended::Cut if self.form.is_cancelled() => match self.poll(&mut call, &mut flag) {
                None => Ended::Panicked,
                Some(Poll::Ready(result)) => Ended::with(result),
                Some(Poll::Pending) => panic!("pending although cancelled"),
            },
            other => other,
        };
        catch_boom(|| drop(call));
        let journal = world.journal.clone();
        world.assert_back(clock);
        Played { ended, journal, points }
    }

    fn call(&self, world: &World, script: &Script, token: &CancellationToken) -> Running {
        let policy = world.policy(if self.form == Form::Spilled { 9 } else { 0 });
        let call = policy.call().owned().key("tenant", TENANT).classify(judge);
        let make = script.clone();
        match self.form {
            Form::Run | Form::Spilled => Box::pin(call.run(move || make.make())),
            Form::Once => Box::pin(call.run_once(script.make_ahead())),
            Form::Deadline => Box::pin(call.deadline(DEADLINE).run(move || make.make())),
            Form::Settled => {
                let cost = |_: &Result<Answer, Answer>| 1;
                Box::pin(call.settle(cost).run(move || make.make()))
            }
            Form::Cancelled => Box::pin(call.cancel_on(token).run(move || make.make())),
            Form::InContext => {
                let request = context::Context::new().deadline(DEADLINE).cancel(token).key("tenant", 7_u32);
                Box::pin(context::scope(request, call.run(move || make.make())))
            }
            Form::OneShot | Form::OneShotCancelled => world.one_shot(script.make_ahead(), token),
        }
    }

    /// Polls with a new waker each time: only the last one has to be woken. `None` if the operation panicked.
    fn poll(&self, call: &mut Running, flag: &mut Flag) -> Option<Poll<Result<Answer, Error<Answer>>>> {
        *flag = Flag::default();
        let polled = catch_boom(|| flag.poll(call.as_mut()));
        if self.polls == Polls::Once || flag.woken() || !matches!(polled, Some(Poll::Pending)) {
            return polled;
        }
        *flag = Flag::default();
        catch_boom(|| flag.poll(call.as_mut()))
    }
}

/// Every stack with every operation, ended at every point.
fn end_everywhere(stacks: impl Iterator<Item = Vec<Kind>>, acts: &[&[Act]], form: Form) {
    let clock = Clock::paused();
    let _entered = clock.enter();
    let mut points = 0;
    for kinds in stacks {
        for acts in acts {
            points += Play::new(&kinds, acts, form).at_every_point(&clock);
        }
    }
    assert!(points > 0);
}

#[test]
fn a_run_dropped_at_any_point_leaves_nothing_behind() {
    end_everywhere(stacks(), &ACTS, Form::Run);
}

#[test]
fn a_run_once_dropped_at_any_point_leaves_nothing_behind() {
    end_everywhere(stacks(), &ACTS, Form::Once);
}

#[test]
fn a_call_with_a_deadline_dropped_at_any_point_leaves_nothing_behind() {
    end_everywhere(stacks(), &ACTS, Form::Deadline);
}

#[test]
fn a_call_whose_cost_is_settled_dropped_at_any_point_leaves_nothing_behind() {
    end_everywhere(singles().chain(pairs()).chain(limiters()), &ACTS, Form::Settled);
}

#[test]
fn a_call_cancelled_at_any_point_leaves_nothing_behind() {
    end_everywhere(stacks(), &ACTS, Form::Cancelled);
}

#[test]
fn a_call_dropped_at_any_point_while_a_drain_closes_leaves_nothing_behind() {
    let stacks = || {
        let around = std::iter::once(Vec::new()).chain(singles()).chain(pairs());
        let around = around.map(|inner| [vec![Kind::Draining], inner].concat());
        around.chain(singles().map(|outer| [outer, vec![Kind::Draining, Kind::Retry]].concat()))
    };
    for form in [Form::Run, Form::Deadline, Form::Cancelled] {
        end_everywhere(stacks(), &ACTS, form);
    }
}

#[test]
fn a_call_cancelled_by_its_context_at_any_point_leaves_nothing_behind() {
    end_everywhere(singles().chain(pairs()), &ACTS, Form::InContext);
}

#[test]
fn a_call_with_many_steps_dropped_at_any_point_leaves_nothing_behind() {
    end_everywhere(singles().chain(pairs()), &ACTS, Form::Spilled);
}

#[test]
fn a_one_shot_dropped_at_any_point_leaves_nothing_behind() {
    let retries = |kind: &Kind| matches!(kind, Kind::Retry | Kind::RetryRatio | Kind::RetryShare);
    for form in [Form::OneShot, Form::OneShotCancelled] {
        end_everywhere(stacks().filter(|kinds| !kinds.iter().any(retries)), &ACTS, form);
    }
}

#[test]
fn a_panic_anywhere_in_the_operation_leaves_nothing_behind() {
    let acts: [&[Act]; 11] = [
        &[PANIC_IN_CLOSURE],
        &[PANIC_IN_POLL],
        &[PANIC_IN_JUDGE],
        &[PANIC_IN_DROP],
        &[PANIC_IN_POLL.after_polls(1)],
        &[PANIC_IN_DROP.after(STEP)],
        &[ERR, PANIC_IN_CLOSURE],
        &[ERR, PANIC_IN_DROP],
        &[BAD.panicking_answer(), OK],
        &[ERR.panicking_answer(), OK],
        &[ERR.panicking_answer(), HANG],
    ];
    for form in [Form::Run, Form::Deadline] {
        end_everywhere(singles().chain(pairs()), &acts, form);
    }
    end_everywhere(singles().chain(pairs()), &acts[1..6], Form::Once);
}

/// G8: an unexpected poll makes no attempt, takes no permit and counts nothing. G7: only the last waker is woken.
#[test]
fn a_spurious_poll_with_another_waker_changes_nothing() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    for kinds in stacks() {
        for acts in [&[OK][..], &[OK.after(STEP)], &[ERR, OK], &[ERR], &[HANG]] {
            for form in [Form::Run, Form::Deadline] {
                let plain = Play::new(&kinds, acts, form);
                let twice = Play { polls: Polls::Twice, ..Play::new(&kinds, acts, form) };
                let (plain, twice) = (plain.play(&clock), twice.play(&clock));
                assert_eq!(plain.ended, twice.ended, "{kinds:?} {acts:?}");
                assert_eq!(plain.journal.kinds(), twice.journal.kinds(), "{kinds:?} {acts:?}");
            }
        }
    }
}

/// S1: who is granted a permit and gone in the same instant hands it on.
#[test]
fn who_waits_behind_a_call_that_ends_at_any_point_is_served() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    for kinds in stacks().filter(|kinds| kinds.contains(&Kind::Full) || kinds.contains(&Kind::Empty)) {
        for acts in [&[OK][..], &[ERR, OK], &[HANG]] {
            for form in [Form::Run, Form::Cancelled] {
                let play = Play { bystanders: true, ..Play::new(&kinds, acts, form) };
                play.at_every_point(&clock);
            }
        }
    }
}

/// The operation was made inside of a pass if and only if its gate hears anything but `NotStarted`.
#[test]
fn not_started_is_only_said_where_no_operation_was_made() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    let acts: [&[Act]; 5] = [&[OK], &[ERR], &[HANG], &[IGNORED], &[ERR, HANG]];
    for kinds in singles().chain(pairs()) {
        for acts in acts {
            for form in [Form::Run, Form::Deadline, Form::Cancelled] {
                let mut play = Play::new(&kinds, acts, form);
                let points = play.play(&clock).points;
                for cut in (0..points).map(Some).chain([None]) {
                    play.cut = cut;
                    let journal = play.play(&clock).journal;
                    for gate in &SPIES[..=kinds.len()] {
                        for passage in journal.passages(gate) {
                            let heard = Heard::from(passage.outcome);
                            let told = passage.started == (heard != Heard::NotStarted);
                            assert!(told, "{gate} heard {heard:?} in {play:?}: {:#?}", journal.events());
                        }
                    }
                }
            }
        }
    }
}

fn scripted(policy: &Policy, script: &Script) -> Running {
    let make = script.clone();
    Box::pin(policy.call().owned().classify(judge).run(move || make.make()))
}

/// A breaker that opens at the first failure, and whose listener panics at one change.
fn breaker_with_a_bad_listener(at: State) -> CircuitBreaker {
    let breaker = CircuitBreaker::builder()
        .consecutive_failures(1)
        .open_for(STEP)
        .open_jitter(0.0)
        .probes(1)
        .abandoned_after(STEP)
        .on_change(move |_, to| {
            if to == at {
                boom();
            }
        });
    breaker.build().unwrap()
}

#[test]
fn a_listener_that_panics_while_a_call_is_dropped_loses_no_pass_further_out() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    let journal = Journal::default();
    let semaphore = Semaphore::permits(1).build().unwrap();
    let policy = Policy::named("stack")
        .gate(Spy::new("outer", &journal))
        .gate(semaphore.clone())
        .gate(breaker_with_a_bad_listener(State::Open))
        .gate(Spy::new("inner", &journal))
        .build()
        .unwrap();
    let mut call = scripted(&policy, &Script::new(&journal, [HANG]));
    assert!(poll_once(call.as_mut()).is_pending());
    clock.advance(STEP);

    assert!(catch_boom(|| drop(call)).is_none(), "the panic goes on");
    assert_eq!(semaphore.available(), 1);
    journal.assert_nested();
    assert_eq!(journal.heard("outer"), [Heard::Abandoned]);
}

#[test]
fn a_listener_that_panics_as_a_result_goes_out_loses_no_pass_further_out() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    let journal = Journal::default();
    let semaphore = Semaphore::permits(1).build().unwrap();
    let breaker = breaker_with_a_bad_listener(State::Open);
    let policy = Policy::named("stack")
        .gate(Spy::new("outer", &journal))
        .gate(semaphore.clone())
        .gate(breaker.clone())
        .build()
        .unwrap();
    let mut call = scripted(&policy, &Script::new(&journal, [ERR]));
    assert!(catch_boom(|| poll_once(call.as_mut())).is_none());
    drop(call);

    assert_eq!(semaphore.available(), 1);
    journal.assert_nested();
    assert_ne!(journal.heard("outer"), [Heard::NotStarted], "the operation ran");
    assert_eq!(breaker.state(), State::Open, "and the breaker has changed all the same");
}

#[test]
fn a_listener_that_panics_as_a_probe_is_let_in_loses_no_probe_place() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    let journal = Journal::default();
    let breaker = breaker_with_a_bad_listener(State::HalfOpen);
    breaker.try_acquire().unwrap().failure();
    clock.advance(STEP);
    let policy = Policy::named("stack").gate(Spy::new("outer", &journal)).gate(breaker.clone()).build().unwrap();

    let mut call = scripted(&policy, &Script::new(&journal, [OK]));
    assert!(catch_boom(|| poll_once(call.as_mut())).is_none());
    drop(call);
    journal.assert_nested();
    assert_eq!(breaker.state(), State::HalfOpen);
    let mut call = scripted(&policy, &Script::new(&journal, [OK]));
    assert!(matches!(poll_once(call.as_mut()), Poll::Ready(Ok(_))), "the one place is free");
    assert_eq!(breaker.state(), State::Closed);
}

/// C13: the listener is called with no lock held, after the change.
#[test]
fn a_listener_may_ask_and_use_its_breaker() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    let own: Arc<OnceLock<CircuitBreaker>> = Arc::default();
    let told: Arc<Mutex<Vec<(State, State)>>> = Arc::default();
    let (inside, tell) = (own.clone(), told.clone());
    let breaker = CircuitBreaker::builder()
        .consecutive_failures(1)
        .open_for(STEP)
        .open_jitter(0.0)
        .probes(1)
        .on_change(move |from, to| {
            let breaker = inside.get().unwrap();
            assert_eq!(breaker.state(), to);
            assert_eq!(breaker.counts().failures, 0);
            drop(breaker.try_acquire());
            tell.lock().unwrap().push((from, to));
        })
        .build()
        .unwrap();
    own.set(breaker.clone()).unwrap();

    let journal = Journal::default();
    let semaphore = Semaphore::permits(1).build().unwrap();
    let policy = Policy::named("stack").gate(semaphore.clone()).gate(breaker.clone()).build().unwrap();
    for acts in [[ERR], [OK]] {
        let mut call = scripted(&policy, &Script::new(&journal, acts));
        assert!(poll_once(call.as_mut()).is_ready());
        clock.advance(STEP);
    }
    let expected = [(State::Closed, State::Open), (State::Open, State::HalfOpen), (State::HalfOpen, State::Closed)];
    assert_eq!(*told.lock().unwrap(), expected);
    assert_eq!(semaphore.available(), 1);
}

/// A waker that panics when it is woken, or when the last of it is dropped.
struct Bomb {
    at_drop: bool,
}

impl Bomb {
    fn waker(at_drop: bool) -> Waker {
        Waker::from(Arc::new(Self { at_drop }))
    }
}

impl Wake for Bomb {
    fn wake(self: Arc<Self>) {
        if !self.at_drop {
            boom();
        }
    }
}

impl Drop for Bomb {
    fn drop(&mut self) {
        if self.at_drop && !std::thread::panicking() {
            boom();
        }
    }
}

/// A semaphore of one permit inside of a spy, and a call that has the permit.
fn call_with_the_permit(journal: &Journal, act: Act) -> (Semaphore, Running) {
    let semaphore = Semaphore::permits(1).build().unwrap();
    let policy = Policy::named("stack").gate(Spy::new("outer", journal)).gate(semaphore.clone()).build().unwrap();
    let mut call = scripted(&policy, &Script::new(journal, [act]));
    assert!(poll_once(call.as_mut()).is_pending());
    (semaphore, call)
}

/// G6: a neighbour's waker is user code.
#[test]
fn a_waker_that_panics_while_a_call_is_dropped_loses_no_pass_further_out() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    let journal = Journal::default();
    let (semaphore, call) = call_with_the_permit(&journal, HANG);
    let mut neighbour = Box::pin(semaphore.acquire());
    assert!(neighbour.as_mut().poll(&mut Context::from_waker(&Bomb::waker(false))).is_pending());

    assert!(catch_boom(|| drop(call)).is_none());
    journal.assert_nested();
    assert!(matches!(poll_once(neighbour.as_mut()), Poll::Ready(Ok(_))), "the permit was granted all the same");
    assert_eq!(semaphore.available(), 1);
}

#[test]
fn a_waker_that_panics_as_a_result_goes_out_loses_no_pass_further_out() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    let journal = Journal::default();
    let (semaphore, mut call) = call_with_the_permit(&journal, OK.after_polls(1));
    let mut neighbour = Box::pin(semaphore.acquire());
    assert!(neighbour.as_mut().poll(&mut Context::from_waker(&Bomb::waker(false))).is_pending());

    assert!(catch_boom(|| poll_once(call.as_mut())).is_none());
    drop(call);
    journal.assert_nested();
    drop(neighbour);
    assert_eq!((semaphore.available(), semaphore.queued()), (1, 0));
}

#[test]
fn a_waker_that_panics_when_it_is_replaced_or_dropped_leaves_nothing_behind() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    let bucket = TokenBucket::per_second(100).burst(1).build().unwrap();
    let semaphore = Semaphore::permits(1).build().unwrap();
    let permit = semaphore.try_acquire().unwrap();
    for replaced in [true, false] {
        bucket.try_take(1).unwrap();
        let waits = Policy::named("stack").gate(bucket.clone()).build().unwrap();
        let queues = Policy::named("stack").gate(semaphore.clone()).build().unwrap();
        for policy in [waits, queues] {
            let mut call = scripted(&policy, &Script::new(&Journal::default(), [OK]));
            let waker = Bomb::waker(true);
            assert!(call.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
            std::mem::forget(waker);
            if replaced {
                let _ = catch_boom(|| poll_once(call.as_mut()));
            }
            let _ = catch_boom(|| drop(call));
        }
        assert_eq!((bucket.queued(), semaphore.queued()), (0, 0));
        clock.advance(STEP);
        assert_eq!(bucket.peek(), 1);
    }
    drop(permit);
    assert_eq!(semaphore.available(), 1);
}

/// An operation that uses the gates of its own call while it is dropped: they are still taken.
#[test]
fn the_operation_is_gone_before_its_passes_are() {
    struct Asks(Semaphore, Arc<AtomicU32>);
    impl Drop for Asks {
        fn drop(&mut self) {
            assert!(self.0.try_acquire().is_err(), "the permit was given back too early");
            self.1.fetch_add(1, Ordering::Relaxed);
        }
    }

    let clock = Clock::paused();
    let _entered = clock.enter();
    let dropped = Arc::new(AtomicU32::new(0));
    let semaphore = Semaphore::permits(1).build().unwrap();
    let policy = Policy::named("stack").timeout(LIMIT).gate(semaphore.clone()).timeout(STEP).build().unwrap();
    for cut in [true, false] {
        let mut call = Box::pin(policy.run(|| {
            let asks = Asks(semaphore.clone(), dropped.clone());
            async move {
                std::future::pending::<()>().await;
                drop(asks);
                Ok::<_, ()>(())
            }
        }));
        assert!(poll_once(call.as_mut()).is_pending());
        if cut {
            clock.advance(STEP);
            assert!(matches!(poll_once(call.as_mut()), Poll::Ready(Err(error)) if error.is_timeout()));
        }
        drop(call);
        assert_eq!(semaphore.available(), 1);
    }
    assert_eq!(dropped.load(Ordering::Relaxed), 2);
}

/// Where the user's own gate or backoff panics.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Panics {
    Enter,
    PollWait,
    Abandon,
    Still,
    Leave,
    Backoff,
}

impl Gate for Panics {
    fn enter(&self, _: &Call) -> Entry {
        match self {
            Self::Enter => boom(),
            Self::PollWait | Self::Abandon => Entry::Wait(Ticket::default(), None),
            _ => Entry::Pass(Pass::default()),
        }
    }

    fn poll_wait(&self, ticket: Ticket, _: &Call, _: &mut Context<'_>) -> Entry {
        if *self == Self::PollWait {
            boom();
        }
        Entry::Wait(ticket, None)
    }

    fn abandon(&self, _: Ticket) {
        if *self == Self::Abandon {
            boom();
        }
    }

    fn still(&self, _: &Pass, _: &Call) -> Result<(), Refusal> {
        if *self == Self::Still {
            boom();
        }
        Ok(())
    }

    fn leave(&self, _: Pass, _: Outcome) {
        if *self == Self::Leave {
            boom();
        }
    }
}

impl Backoff for Panics {
    fn delays(&self) -> Box<dyn Iterator<Item = Duration> + Send> {
        if *self == Self::Backoff {
            boom();
        }
        Box::new(std::iter::repeat(STEP))
    }
}

#[test]
fn a_gate_or_a_backoff_that_panics_loses_nothing_further_out() {
    use Panics::{Abandon, Backoff, Enter, Leave, PollWait, Still};
    let clock = Clock::paused();
    let _entered = clock.enter();
    for panics in [Enter, PollWait, Abandon, Still, Leave, Backoff] {
        for act in [ERR, HANG] {
            let journal = Journal::default();
            let budget = RetryBudget::share(1.0).floor(0).build().unwrap();
            let semaphore = Semaphore::permits(1).build().unwrap();
            let policy = Policy::named("stack")
                .gate(Spy::new("outer", &journal))
                .gate(semaphore.clone())
                .retry(Retry::with(panics).budget(budget.clone()))
                .gate(panics)
                .gate(Spy::new("delay", &journal).that(Manner::Delays(STEP)))
                .build()
                .unwrap();
            let mut call = scripted(&policy, &Script::new(&journal, [act]));
            let mut seen = 0;
            for _ in 0..4 {
                match catch_boom(|| poll_once(call.as_mut())) {
                    Some(Poll::Pending) => clock.advance(STEP),
                    Some(Poll::Ready(_)) => break,
                    None => {
                        seen += 1;
                        break;
                    }
                }
            }
            seen += u32::from(catch_boom(|| drop(call)).is_none());
            let expected = u32::from(panics != Backoff || !act.hangs());
            assert_eq!(seen, expected, "{panics:?}");
            journal.assert_nested();
            assert_eq!((semaphore.available(), budget.available()), (1, 0), "{panics:?}");
        }
    }
}

#[test]
fn a_waker_that_panics_as_a_token_comes_back_loses_no_pass_further_out() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    let journal = Journal::default();
    let bucket = TokenBucket::per_second(1).burst(1).build().unwrap();
    let policy = Policy::named("stack")
        .gate(Spy::new("outer", &journal))
        .gate(bucket.clone())
        .gate(Spy::new("queue", &journal).that(Manner::Queues))
        .build()
        .unwrap();
    let mut call = scripted(&policy, &Script::new(&journal, [OK]));
    assert!(poll_once(call.as_mut()).is_pending());
    let mut neighbour = Box::pin(bucket.acquire());
    assert!(neighbour.as_mut().poll(&mut Context::from_waker(&Bomb::waker(false))).is_pending());
    assert!(catch_boom(|| drop(call)).is_none());
    journal.assert_nested();
    assert!(matches!(poll_once(neighbour.as_mut()), Poll::Ready(Ok(_))), "the token is there");
}

/// G8: a future that is polled after its end panics, and takes nothing.
#[test]
fn a_poll_after_the_end_panics_and_takes_nothing() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    let world = World::new(&clock, &[Kind::Free, Kind::Tokens], false);
    let script = Script::new(&world.journal, [OK]);
    let mut call = scripted(&world.policy(0), &script);
    assert!(poll_once(call.as_mut()).is_ready());
    let again = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| poll_once(call.as_mut())));
    assert!(again.is_err());
    drop(call);
    assert_eq!(world.journal.starts(), 1);
    world.assert_back(&clock);
}

/// Whatever can be waited for alone, as it is waited for alone.
const GATES: [Kind; 12] = [
    Kind::Free,
    Kind::Full,
    Kind::Closed,
    Kind::HalfOpen,
    Kind::Tokens,
    Kind::Empty,
    Kind::Leaky,
    Kind::Window,
    Kind::Quota,
    Kind::Drain,
    Kind::Own,
    Kind::OwnDelay,
];

fn acquire(part: &Part) -> Acquire {
    match part {
        Part::Gate(Watched::Semaphore(gate)) => gate.acquire(),
        Part::Gate(Watched::Bucket(gate)) => gate.acquire(),
        Part::Gate(Watched::Leaky(gate)) => gate.acquire(),
        Part::Gate(Watched::Window(gate)) => gate.acquire(),
        Part::Gate(Watched::Quota(gate)) => gate.acquire(),
        Part::Gate(Watched::Breaker(gate)) => gate.acquire(),
        Part::Gate(Watched::Drain(drain)) => drain.part("guard").acquire(),
        Part::Gate(Watched::Spy(gate)) => Guard::acquire(gate.clone()),
        other => unreachable!("{other:?} is no gate"),
    }
}

type Finish = fn(Guard);

/// How a guard is ended, what its gate hears, and whether that is a verdict and uses a token up.
const ENDS: [(Finish, Heard, u32); 6] = [
    (Guard::success, Heard::Judged(Verdict::Success), 1),
    (Guard::failure, Heard::Judged(Verdict::Transient(None)), 1),
    (Guard::ignore, Heard::Judged(Verdict::Ignored), 0),
    (|guard| guard.finish(Verdict::Permanent), Heard::Judged(Verdict::Permanent), 1),
    (drop, Heard::Abandoned, 0),
    (panic_with, Heard::Judged(Verdict::Transient(None)), 1),
];

fn panic_with(guard: Guard) {
    let held = catch_boom(move || {
        let _held = guard;
        boom();
    });
    assert!(held.is_none());
}

#[test]
fn a_guard_ends_in_what_is_said_and_gives_back_all_but_the_token() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    for kind in GATES {
        for (end, _, judged) in ENDS {
            let mut world = World::new(&clock, &[kind], true);
            let mut wait = Box::pin(acquire(&world.parts[0]));
            let guard = loop {
                let flag = Flag::default();
                match flag.poll(wait.as_mut()) {
                    Poll::Ready(guard) => break guard.unwrap(),
                    Poll::Pending => assert!(world.progress(&clock, &flag)),
                }
            };
            drop(wait);
            end(guard);
            let Part::Gate(gate) = world.parts.remove(0) else { unreachable!("a gate") };
            world.assert_back(&clock);
            gate.assert_back(judged, 1);
        }
    }
}

#[test]
fn a_gate_hears_what_is_said_of_a_guard() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    for (end, heard, _) in ENDS {
        let journal = Journal::default();
        let spy = Spy::new("alone", &journal);
        let guard = Guard::try_acquire(spy).unwrap();
        clock.advance(STEP);
        end(guard);
        assert_eq!(journal.heard("alone"), [heard]);
        let passage = journal.passages("alone")[0];
        if let Outcome::Judged(_, times) | Outcome::Abandoned(times) = passage.outcome {
            assert_eq!(times.elapsed(), STEP);
        }
    }
}

#[test]
fn a_wait_for_a_guard_dropped_at_any_point_leaves_nothing_behind() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    for kind in GATES {
        for cut in 0..6 {
            let mut world = World::new(&clock, &[kind], true);
            let mut wait = Box::pin(acquire(&world.parts[0]));
            let mut points = 0..cut;
            let mut spent = 0;
            while points.next().is_some() {
                let flag = Flag::default();
                if let Poll::Ready(guard) = flag.poll(wait.as_mut()) {
                    drop(guard.unwrap());
                    spent = 1;
                    break;
                }
                world.tend_bystander();
                if points.next().is_some() {
                    assert!(world.progress(&clock, &flag));
                }
            }
            drop(wait);
            let Part::Gate(gate) = world.parts.remove(0) else { unreachable!("a gate") };
            world.assert_back(&clock);
            gate.assert_back(0, spent);
        }
    }
}

/// G9: a call that is leaked keeps what it has, and nothing else suffers.
#[test]
fn a_leaked_call_keeps_its_permit_and_nothing_else() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    let semaphore = Semaphore::permits(2).build().unwrap();
    let policy = Policy::named("stack").gate(semaphore.clone()).build().unwrap();
    let mut call = scripted(&policy, &Script::new(&Journal::default(), [HANG]));
    assert!(poll_once(call.as_mut()).is_pending());
    std::mem::forget(call);
    assert_eq!(semaphore.available(), 1);
    drop(semaphore.try_acquire().unwrap());
    assert_eq!(semaphore.available(), 1);
}

/// A policy has 64 steps at most, a chain of methods has no such limit.
#[test]
fn a_one_shot_with_very_many_gates_leaves_nothing_behind() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    for (act, ready) in [(OK, true), (HANG, false)] {
        let journal = Journal::default();
        let semaphore = Semaphore::permits(300).build().unwrap();
        let mut shot = Script::new(&journal, [act]).make_ahead().within(LIMIT);
        for _ in 0..300 {
            shot = shot.through(&semaphore);
        }
        let mut shot = Box::pin(shot.through(&Spy::new("outer", &journal)));
        assert_eq!(poll_once(shot.as_mut()).is_ready(), ready);
        assert_eq!(semaphore.in_use(), if ready { 0 } else { 300 });
        drop(shot);
        assert_eq!(semaphore.in_use(), 0);
        journal.assert_nested();
    }
}
