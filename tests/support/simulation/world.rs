//! The stack that a plan describes, and its events, one after the other.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context as Task, Poll, Waker};
use std::time::Duration;

use resile::context::{self, Context};
use resile::{
    Cancel, CancelReason, CircuitBreaker, Drain, Drained, Entry, Gate, Keyed, Layers, Outcome, Pass, Phase, Policy,
    Rate, Retry, Scope, Semaphore, SlidingWindow, State, Ticket, TokenBucket,
};
use tokio::time::{Instant, sleep};

use super::super::support::hand::{Clock, Flag};
use super::super::support::journal::Journal;
use super::super::support::ms;
use super::super::support::script::Boom;
use super::super::support::watch::Spy;
use super::Reached;
use super::model::{Call, Down, Ended, Model, in_name_of};
use super::plan::{Act, Caller, Event, Kind, SOURCES, World};

type Running = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The parts, as built.
#[derive(Clone)]
struct Stack {
    policy: Policy,
    semaphore: Semaphore,
    bucket: TokenBucket,
    keyed: Keyed<Semaphore>,
    drain: Drain,
    spy: Spy,
    world: World,
    sources: Vec<Cancel>,
    /// Has operations that hang answer.
    release: Cancel,
    model: Model,
    scopes: Arc<Mutex<Vec<ScopeModel>>>,
}

/// What is known of a scope.
#[derive(Default)]
struct ScopeModel {
    ends: Option<Instant>,
    lazy: bool,
    sources: Vec<usize>,
    keep_going: bool,
    /// When its deadline was seen to be past.
    overdue: Option<usize>,
    /// How its children ended, and at which event.
    children: Vec<Option<(usize, Child)>>,
    /// The reasons that calls of its children were cancelled for.
    reasons: Vec<CancelReason>,
    done: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Child {
    Well,
    Badly,
    Cut,
    Panicked,
}

struct Live {
    future: Running,
    flag: Flag,
    lazy: bool,
    /// The call, if it is one under the policy that waits for nobody's task.
    call: Option<usize>,
}

struct Closing {
    future: Pin<Box<dyn Future<Output = Drained> + Send>>,
    flag: Flag,
    lazy: bool,
    /// Who was in when it began, if it was the first.
    inside: Option<u64>,
}

fn build(world: &World, model: &Model, journal: &Journal) -> Stack {
    let semaphore = Semaphore::permits(world.permits).named("permits").build().unwrap();
    let told = model.clone();
    let breaker = CircuitBreaker::builder()
        .consecutive_failures(3)
        .open_for(ms(20))
        .probes(3)
        .on_change(move |from, to| {
            if (from, to) == (State::HalfOpen, State::Open) {
                told.reopened();
            }
            let mut known = told.know();
            known.half_open = (to == State::HalfOpen).then_some(known.bad);
            known.half_opened += usize::from(to == State::HalfOpen);
        })
        .build()
        .unwrap();
    let bucket = TokenBucket::per_second(200).burst(5).build().unwrap();
    let keyed = Keyed::by("tenant", Semaphore::permits(2)).capacity(3).build().unwrap();
    let drain = Drain::new();
    let spy = Spy::new("spy", journal);
    let mut policy = Policy::named("world");
    if world.drain {
        policy = policy.gate(drain.clone()).cancel_on(&drain);
    }
    if let Some(limit) = world.timeout {
        policy = policy.timeout(limit);
    }
    if let Some((pause, attempts)) = world.retry {
        let retry = if pause.is_zero() { Retry::immediate() } else { Retry::constant(pause) };
        policy = policy.retry(retry.max_attempts(attempts.min(40)));
    }
    if world.breaker {
        policy = policy.gate(breaker.clone());
    }
    policy = policy.gate(Ear(spy.clone(), model.clone()));
    if world.bucket {
        policy = policy.gate(bucket.clone());
    }
    if world.layered {
        let all = SlidingWindow::at(Rate::new(50, ms(100)));
        policy = policy
            .gate(Layers::new().layer("tenant", Keyed::by("tenant", TokenBucket::per_second(500))).layer("all", all));
    }
    if world.keyed {
        policy = policy.gate(keyed.clone());
    }
    policy = policy.gate(semaphore.clone());
    if let Some(limit) = world.attempt_timeout {
        policy = policy.timeout(limit);
    }
    let told = model.clone();
    let sources: Vec<_> = (0..SOURCES).map(|_| Cancel::new()).collect();
    let cancels = world.listener_cancels.map(|source| (source, sources[source].clone()));
    let listener = move |end: &resile::EarlyEnd<'_>| {
        told.reported(end.why());
        if let Some((source, cancel)) = &cancels {
            told.cancelled(*source, reason_of(*source));
            told.know().listener_cancelled += usize::from(cancel.cancel_with(reason_of(*source)));
        }
    };
    let policy = policy.on_early_end(listener).build().unwrap();
    model.know().pauses = world.retry.is_some_and(|(pause, _)| !pause.is_zero());
    let (release, scopes) = (Cancel::new(), Arc::default());
    let (world, model) = (world.clone(), model.clone());
    Stack { policy, semaphore, bucket, keyed, drain, spy, world, sources, release, model, scopes }
}

/// A gate that checks what it hears.
struct Ear(Spy, Model);

impl Gate for Ear {
    fn enter(&self, call: &resile::Call) -> Entry {
        self.1.entered();
        self.0.enter(call)
    }

    fn leave(&self, pass: Pass, outcome: Outcome) {
        self.1.left(outcome);
        self.0.leave(pass, outcome);
    }

    fn abandon(&self, ticket: Ticket) {
        self.0.abandon(ticket);
    }
}

/// Why a source cancels.
fn reason_of(source: usize) -> CancelReason {
    match source {
        0 => CancelReason::ClientGone,
        1 => CancelReason::Superseded,
        _ => CancelReason::Custom("own".into()),
    }
}

/// An operation is there.
struct Alive {
    model: Model,
    call: usize,
    well: bool,
    /// What its drop cancels.
    cancels: Option<(usize, Cancel)>,
}

impl Drop for Alive {
    fn drop(&mut self) {
        self.model.gone(self.call, self.well);
        if let Some((source, cancel)) = self.cancels.take() {
            self.model.cancelled(source, reason_of(source));
            cancel.cancel_with(reason_of(source));
        }
    }
}

/// Moves the clock from within a poll, as a computation does.
fn block(time: Duration) {
    let _ = pin!(tokio::time::advance(time)).poll(&mut Task::from_waker(Waker::noop()));
}

impl Stack {
    /// Makes an operation.
    fn operate(&self, call: usize, act: Act) -> impl Future<Output = Result<u32, Down>> + Send + use<> {
        self.model.made(call);
        self.model.began(call);
        let cancels = match act {
            Act::HangsAndCancels(source) => Some((source, self.sources[source].clone())),
            _ => None,
        };
        let alive = Alive { model: self.model.clone(), call, well: false, cancels };
        if matches!(act, Act::PanicsInClosure | Act::PanicsInPoll) {
            self.model.know().panics += 1;
        }
        if act == Act::PanicsInClosure {
            resume_unwind(Box::new(Boom));
        }
        let release = self.release.clone();
        async move {
            // As a whole, since dropping it tells.
            let mut alive = alive;
            match act {
                Act::Good | Act::PanicsInClosure => {}
                Act::Bad => return Err(Down),
                Act::GoodAfter(time) => sleep(time).await,
                Act::BadAfter(time) => {
                    sleep(time).await;
                    return Err(Down);
                }
                Act::BlocksAndFails(time) => {
                    block(time);
                    return Err(Down);
                }
                Act::Hangs | Act::HangsAndCancels(_) => {
                    release.cancelled().await;
                }
                Act::PanicsInPoll => resume_unwind(Box::new(Boom)),
                Act::Spends => {
                    for _ in 0..300 {
                        tokio::task::consume_budget().await;
                    }
                }
            }
            alive.well = true;
            Ok(1)
        }
    }

    /// One call under the policy, from its first poll on. Says how it ended, and for which reason it was cancelled.
    async fn call(
        self,
        who: Caller,
        within: Option<Instant>,
        known: Arc<AtomicUsize>,
    ) -> (Ended, Option<CancelReason>) {
        let now = Instant::now();
        let mut ends = who.deadline.map(|time| now + time).into_iter().chain(within).min();
        let shielded = matches!(who.kind, Kind::Shield);
        let deadline = ends;
        if let Some(limit) = self.world.timeout {
            ends = Some(ends.map_or(now + limit, |ends| ends.min(now + limit)));
        }
        // What is shielded goes on after its caller's deadline.
        let sources = [&who.sources[..], &who.context_sources].concat();
        let call = Call {
            ends: ends.filter(|_| !shielded),
            sources,
            drain: self.world.drain,
            began: self.model.know().event,
            under: true,
            shielded,
            ..Call::default()
        };
        let call = self.model.call(call);
        known.store(call, Ordering::Relaxed);
        let mut said = self.policy.call().owned().key("tenant", who.tenant);
        if let Some(deadline) = deadline.filter(|_| who.deadline.is_some()) {
            said = said.deadline(deadline);
        }
        for source in &who.sources {
            said = said.cancel_on(&self.sources[*source]);
        }
        let (stack, acts) = (self.clone(), who.acts.clone());
        let mut attempt = 0;
        let mut operation = move || {
            let act = acts[attempt.min(acts.len() - 1)];
            attempt += 1;
            stack.operate(call, act)
        };
        let result = match who.kind {
            Kind::Shield => Named(call, Some(Box::pin(said.shield().run(operation)))).await,
            Kind::Cleanup => {
                let run = said.cleanup(|(), _| async {}).run(move || ((), operation()));
                Named(call, Some(Box::pin(run))).await
            }
            _ => Named(call, Some(Box::pin(said.run(operation)))).await,
        };
        match result {
            Ok(_) => (Ended::Well, None),
            Err(error) => {
                (self.model.ended(call, &error, matches!(who.kind, Kind::Scope { .. })), error.cancel_reason().cloned())
            }
        }
    }

    fn start(&self, who: Caller, clock: &Clock) -> Option<Live> {
        let within = who.context_deadline.map(|time| Instant::now() + time);
        let mut request = Context::new();
        if let Some(deadline) = within {
            request = request.deadline(deadline);
        }
        for source in &who.context_sources {
            request = request.cancel(&self.sources[*source]);
        }
        let _entered = clock.enter();
        let (stack, lazy) = (self.clone(), who.lazy);
        let known = Arc::new(AtomicUsize::new(usize::MAX));
        let (future, call): (Running, _) = match who.kind {
            Kind::Scope { children, under_policy, keep_going } => {
                (Box::pin(context::scope(request, stack.scope(who, within, children, under_policy, keep_going))), None)
            }
            kind => {
                let call = stack.call(who, within, known.clone());
                let watched = !matches!(kind, Kind::Shield);
                (Box::pin(context::scope(request, async move { drop(call.await) })), watched.then_some(known))
            }
        };
        let mut live = Live { future, flag: Flag::default(), lazy, call: None };
        let done = poll(&mut live);
        live.call = call.map(|call| call.load(Ordering::Relaxed));
        (!done).then_some(live)
    }

    /// A scope of children that make calls under the policy, or do without. It is made, and its deadline begins, in the
    /// first poll.
    async fn scope(self, who: Caller, within: Option<Instant>, children: usize, under_policy: bool, keep_going: bool) {
        let mut scope = Scope::<u32, Down>::new();
        let mut ends = within;
        if let Some(deadline) = who.deadline {
            let deadline = Instant::now() + deadline;
            ends = Some(ends.map_or(deadline, |ends| ends.min(deadline)));
            scope = scope.deadline(deadline);
        }
        if keep_going {
            scope = scope.keep_going();
        }
        let number = {
            let mut scopes = self.scopes.lock().unwrap();
            let sources = who.context_sources.clone();
            scopes.push(ScopeModel {
                ends,
                lazy: who.lazy,
                sources,
                keep_going,
                children: vec![None; children],
                ..ScopeModel::default()
            });
            scopes.len() - 1
        };
        for child in 0..children {
            let mut own = who.clone();
            own.acts.rotate_left(child % who.acts.len());
            (own.deadline, own.sources) = (None, Vec::new());
            let stack = self.clone();
            scope.spawn(async move {
                let mut note = ChildNote { stack: stack.clone(), scope: number, child, how: None };
                if !under_policy {
                    let known = stack.model.call(Call::default());
                    let end = stack.operate(known, own.acts[0]).await;
                    note.how = Some(if end.is_ok() { Child::Well } else { Child::Badly });
                    return end;
                }
                let (end, reason) = stack.clone().call(own, ends, Arc::default()).await;
                if let Some(reason) = reason.clone() {
                    stack.scopes.lock().unwrap()[number].reasons.push(reason);
                }
                let by_drain = reason == Some(CancelReason::Shutdown) && stack.world.drain;
                note.how = Some(match end {
                    Ended::Well => Child::Well,
                    Ended::Cut if !by_drain => Child::Cut,
                    Ended::Badly | Ended::Cut => Child::Badly,
                });
                if end == Ended::Well { Ok(1) } else { Err(Down) }
            });
        }
        let end = scope.wait().await;
        let mut scopes = self.scopes.lock().unwrap();
        self.judge(&mut scopes[number], end.reason(), end.is_partial());
    }

    /// A scope has ended: its reason must be the first, and it is partial if something is missing.
    fn judge(&self, scope: &mut ScopeModel, reason: Option<&CancelReason>, partial: bool) {
        scope.done = true;
        let mut known = self.model.know();
        if scope.overdue.is_none() && scope.ends.is_some_and(|ends| ends <= Instant::now()) {
            scope.overdue = Some(known.event);
        }
        // A deadline counts from when somebody has noticed it, and nobody does while the scope is not polled.
        if scope.lazy && scope.overdue.is_some() {
            return;
        }
        let mut causes: Vec<(usize, CancelReason)> =
            scope.sources.iter().filter_map(|source| known.cancelled[*source].clone()).collect();
        causes.extend(scope.overdue.map(|at| (at, CancelReason::Deadline)));
        if !scope.keep_going {
            let failed =
                scope.children.iter().flatten().filter(|(_, how)| matches!(how, Child::Badly | Child::Panicked));
            causes.extend(failed.map(|(at, _)| (*at, CancelReason::SiblingFailed)));
        }
        // Within the grain of the clock, either may be noticed first.
        let near = |at: &usize| {
            let then = known.instants.get(*at - 1).copied().unwrap_or_else(Instant::now);
            scope.ends.is_some_and(|ends| ends <= then && then <= ends + ms(2))
        };
        if causes.iter().any(|(at, reason)| *reason != CancelReason::Deadline && near(at)) {
            return;
        }
        let first_at = causes.iter().map(|(at, _)| *at).min();
        let mut first: Vec<CancelReason> =
            causes.iter().filter(|(at, _)| Some(*at) == first_at).map(|(_, reason)| reason.clone()).collect();
        first.dedup();
        if first.len() <= 1 && reason != first.first() {
            let children = &scope.children;
            known
                .faults
                .push(format!("not the scope's first reason: {reason:?}, which was {first:?}; children {children:?}"));
        }
        // The scope may have been over before the first cause: then nothing was cut.
        let cut = |(at, how): &(usize, Child)| match how {
            Child::Well => Some(false),
            Child::Cut | Child::Panicked => Some(true),
            // Of two things in one event either may have been first.
            Child::Badly => match first_at {
                Some(first) if first < *at => Some(true),
                Some(first) if first == *at && (causes.len() > 1 || scope.keep_going) => None,
                _ => Some(false),
            },
        };
        let cuts: Vec<Option<bool>> =
            scope.children.iter().map(|child| child.as_ref().map_or(Some(true), cut)).collect();
        let missing = cuts.contains(&Some(true));
        if (missing || !cuts.contains(&None)) && partial != missing {
            known.faults.push(format!("partial is wrong: it says {partial}; children {:?}", scope.children));
        }
        if let Some(other) = scope.reasons.iter().find(|other| Some(*other) != reason) {
            if !self.world.drain {
                known.faults.push(format!("scope and call differ: {reason:?} and {other:?}"));
            }
        }
    }
}

/// Notes how a child ended, whatever happened to it.
struct ChildNote {
    stack: Stack,
    scope: usize,
    child: usize,
    how: Option<Child>,
}

impl Drop for ChildNote {
    fn drop(&mut self) {
        let event = self.stack.model.know().event;
        let how = if std::thread::panicking() { Child::Panicked } else { self.how.unwrap_or(Child::Cut) };
        self.stack.scopes.lock().unwrap()[self.scope].children[self.child] = Some((event, how));
    }
}

/// A call, polled and dropped in its own name.
struct Named<F>(usize, Option<Pin<Box<F>>>);

impl<F: Future> Future for Named<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Task<'_>) -> Poll<F::Output> {
        let Self(call, future) = &mut *self;
        in_name_of(*call, || future.as_mut().unwrap().as_mut().poll(cx))
    }
}

impl<F> Drop for Named<F> {
    fn drop(&mut self) {
        let Self(call, future) = self;
        in_name_of(*call, || drop(future.take()));
    }
}

/// Polls it, with a new flag: whether it is over. A panic of user code ends it.
fn poll(live: &mut Live) -> bool {
    live.flag = Flag::default();
    let flag = live.flag.clone();
    match catch_unwind(AssertUnwindSafe(|| flag.poll(live.future.as_mut()).is_ready())) {
        Ok(done) => done,
        Err(panic) if panic.is::<Boom>() => true,
        Err(panic) => resume_unwind(panic),
    }
}

struct Run<'a> {
    clock: Clock,
    stack: Stack,
    live: Vec<Live>,
    closings: Vec<Closing>,
    reached: &'a mut Reached,
}

impl Run<'_> {
    fn reach(&mut self, branch: &'static str) {
        *self.reached.entry(branch).or_default() += 1;
    }

    /// Lets tasks run, and polls everybody who was woken, until nobody is.
    fn settle(&mut self, lazy_too: bool) {
        for _ in 0..200 {
            self.clock.block_on(async {
                for _ in 0..3 {
                    tokio::task::yield_now().await;
                }
            });
            let _entered = self.clock.enter();
            let mut anybody = false;
            self.live.retain_mut(|live| {
                if !live.flag.woken() || live.lazy && !lazy_too {
                    return true;
                }
                anybody = true;
                !poll(live)
            });
            let mut closings = std::mem::take(&mut self.closings);
            closings.retain_mut(|closing| {
                if !closing.flag.woken() || closing.lazy && !lazy_too {
                    return true;
                }
                anybody = true;
                !self.poll_closing(closing)
            });
            self.closings = closings;
            if !anybody {
                return;
            }
        }
        self.stack.model.know().faults.push("somebody is woken again and again".into());
    }

    fn poll_closing(&self, closing: &mut Closing) -> bool {
        closing.flag = Flag::default();
        let flag = closing.flag.clone();
        let Poll::Ready(report) = flag.poll(closing.future.as_mut()) else { return false };
        let sum = report.finished() + report.cancelled() + report.still_in();
        if closing.inside.is_some_and(|inside| inside != sum) {
            let fault = format!("the drain's numbers don't add up: {:?} were in, {report:?}", closing.inside);
            self.stack.model.know().faults.push(fault);
        }
        true
    }

    fn happen(&mut self, event: &Event) {
        match event {
            Event::Start(who) => {
                let entered = self.clock.enter();
                let live = self.stack.start(who.clone(), &self.clock);
                drop(entered);
                self.live.extend(live);
            }
            Event::Advance(time) => self.clock.advance(*time),
            Event::Poll(which) if !self.live.is_empty() => {
                let which = which % self.live.len();
                if self.live[which].lazy && self.live[which].flag.woken() {
                    self.reach("a late poll");
                }
                let entered = self.clock.enter();
                let done = poll(&mut self.live[which]);
                if done {
                    drop(self.live.swap_remove(which));
                }
                drop(entered);
            }
            Event::Drop(which) if !self.live.is_empty() => {
                let _entered = self.clock.enter();
                drop(self.live.swap_remove(which % self.live.len()));
            }
            Event::Poll(_) | Event::Drop(_) => {}
            Event::Cancel(source) => {
                let reason = reason_of(*source);
                self.stack.model.cancelled(*source, reason.clone());
                if self.stack.sources[*source].cancel_with(reason) {
                    self.reach("a source is cancelled");
                }
            }
            Event::Resize(permits) => self.stack.semaphore.resize(*permits).unwrap(),
            Event::NewPlan(permits) => {
                self.stack.keyed.plan().set(Semaphore::permits(*permits)).unwrap();
            }
            Event::Close(grace) => self.close(*grace),
            Event::Reopen => {
                if self.stack.drain.reopen() {
                    self.reach("the drain is opened again");
                }
            }
            Event::Elsewhere(ahead) => self.elsewhere(*ahead),
        }
    }

    fn close(&mut self, grace: Duration) {
        let first = self.stack.drain.phase() == Phase::Open;
        let _entered = self.clock.enter();
        let inside = self.stack.drain.in_flight();
        // Every second closer sleeps on: those who wait must not depend on it.
        let lazy = self.closings.len() % 2 == 1;
        let future = Box::pin(self.stack.drain.close(grace));
        let mut closing = Closing { future, flag: Flag::default(), lazy, inside: first.then_some(inside) };
        if !self.poll_closing(&mut closing) {
            self.closings.push(closing);
        }
        if !first || !self.stack.world.drain {
            return;
        }
        let idle = {
            let known = self.stack.model.know();
            let stands = |live: &&Live| {
                live.call.and_then(|call| known.calls.get(call)).is_some_and(|call| call.alive == 0 && call.drain)
                    && !live.flag.woken()
            };
            self.live.iter().filter(stands).count()
        };
        if idle > 0 {
            let fault = format!("waits though it can only be refused: {idle} when the drain closes");
            self.stack.model.know().faults.push(fault);
        }
        *self.reached.entry("the drain closes on calls").or_default() += u64::from(inside > 0);
    }

    /// Another runtime, whose clock is ahead, uses the same limits.
    fn elsewhere(&mut self, ahead: Duration) {
        // A clock that goes back ends leases before their time.
        self.stack.model.know().bad += 1;
        let other = Clock::paused();
        other.advance(ahead);
        let call = self.stack.model.call(Call::default());
        let stack = self.stack.clone();
        let told = other.block_on(async move {
            let own = stack.clone();
            stack.policy.call().key("tenant", 0_u64).no_wait().run(move || own.operate(call, Act::Good)).await.is_ok()
        });
        if told {
            self.reach("a call from another clock");
        }
    }

    /// What is true after each event.
    fn check(&mut self, event: usize) -> Result<(), String> {
        let mut known = self.stack.model.know();
        if self.stack.world.drain
            && self.stack.drain.phase() > Phase::Closing
            && known.drained.last().is_none_or(|(_, over)| *over)
        {
            known.drained.push((event, false));
        }
        if self.stack.drain.phase() == Phase::Open {
            if let Some((_, over)) = known.drained.last_mut() {
                *over = true;
            }
        }
        let entered = self.clock.enter();
        let now = Instant::now();
        drop(entered);
        known.instants.push(now);
        for scope in self.stack.scopes.lock().unwrap().iter_mut().filter(|scope| !scope.done && scope.overdue.is_none())
        {
            scope.overdue = scope.ends.filter(|ends| *ends <= now).map(|_| event);
        }
        if let Some(fault) = known.faults.first() {
            return Err(fault.clone());
        }
        let held = self.stack.semaphore.in_use() as usize;
        let under = known.calls.iter().filter(|call| call.under).map(|call| call.alive).sum::<usize>();
        if under > held {
            return Err(format!("more operations than permits: {under} and {held}"));
        }
        Ok(())
    }

    /// Everybody is let go, and nothing may be left behind.
    fn end(&mut self) -> Result<(), String> {
        self.stack.release.cancel();
        self.settle(true);
        for step in [ms(1), ms(50), ms(300), ms(5000), ms(30_000), ms(61_000)].repeat(60) {
            self.clock.advance(step);
            self.settle(true);
            if self.live.is_empty() && self.closings.is_empty() && self.stack.policy.tasks().running() == 0 {
                break;
            }
        }
        if let Some(fault) = self.stack.model.know().faults.first() {
            return Err(fault.clone());
        }
        if !self.live.is_empty() || !self.closings.is_empty() {
            return Err(format!("nobody wakes them: {} calls and {} closers", self.live.len(), self.closings.len()));
        }
        let Stack { semaphore, spy, drain, bucket, policy, model, .. } = &self.stack;
        if policy.tasks().running() > 0 {
            return Err(format!("left behind: {} tasks", policy.tasks().running()));
        }
        if (semaphore.in_use(), semaphore.queued(), drain.in_flight(), spy.out()) != (0, 0, 0, (0, 0)) {
            let (held, waiting) = (semaphore.in_use(), semaphore.queued());
            return Err(format!(
                "left behind: {held} permits, {waiting} waiters, {} in the drain, {:?} passes",
                drain.in_flight(),
                spy.out()
            ));
        }
        if model.know().alive > 0 {
            return Err("left behind: operations".into());
        }
        // The first look finds a clock that has gone back, from which it fills again.
        for _ in 0..2 {
            self.clock.advance(ms(30_000));
            let _entered = self.clock.enter();
            let _ = bucket.peek();
        }
        let _entered = self.clock.enter();
        if bucket.peek() != 5 {
            return Err(format!("the bucket never fills: {} of 5", bucket.peek()));
        }
        Ok(())
    }
}

pub fn run(world: &World, events: &[Event], reached: &mut Reached) -> Result<(), String> {
    let clock = Clock::paused();
    let model = Model::new(SOURCES);
    let journal = Journal::default();
    let stack = {
        let _entered = clock.enter();
        build(world, &model, &journal)
    };
    let mut run = Run { clock, stack, live: Vec::new(), closings: Vec::new(), reached };
    let mut result = Ok(());
    for (number, event) in events.iter().enumerate() {
        run.stack.model.know().event = number + 1;
        run.happen(event);
        run.settle(false);
        result = run.check(number + 1);
        if result.is_err() {
            break;
        }
    }
    if result.is_ok() {
        run.stack.model.know().event = events.len() + 1;
        result = run.end();
    }
    let (half_opened, panics, listener_cancelled, reports) = {
        let known = run.stack.model.know();
        let reports = known.calls.iter().map(|call| call.reports.len()).sum();
        (known.half_opened, known.panics, known.listener_cancelled, reports)
    };
    let branches = [
        ("a scope ends", run.stack.scopes.lock().unwrap().iter().filter(|scope| scope.done).count()),
        ("the breaker is half open", half_opened),
        ("an operation panics", panics),
        ("a listener cancels a source", listener_cancelled),
        ("an early end is told", reports),
    ];
    for (branch, count) in branches {
        *run.reached.entry(branch).or_default() += count as u64;
    }
    let entered = run.clock.enter();
    run.live.clear();
    run.closings.clear();
    drop(entered);
    result
}
