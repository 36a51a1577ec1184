//! [`Step`]: one entry of a policy, checked and ready to be walked.

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::breaker::CircuitBreaker;
use crate::call::Call;
use crate::drain::{Drain, DrainPart};
use crate::early::Listeners;
use crate::error::{Name, Reason, Refusal, Time};
use crate::gate::{Entry, Gate, Needs, Outcome, Pass};
use crate::internal::time::{TIMER_GRAIN, nanos};
use crate::least_time::LeastTime;
use crate::rate::TokenBucket;
use crate::retry::Plan;
use crate::said::Said;
use crate::semaphore::Semaphore;

/// One step of a policy: it can be drawn.
#[derive(Clone)]
pub struct Step(pub(crate) Kind);

/// What is known of a policy before any call comes.
#[derive(Debug)]
pub struct Outline {
    /// There are no steps, and nothing is said about its calls.
    pub(crate) bare: bool,
    /// The most that any step needs of the clock.
    pub(crate) needs: Needs,
    /// Whether one of them retries.
    pub(crate) retries: bool,
    /// A bit for each of the first [`Outline::MOST`] steps that wants to hear of an operation that went well.
    pub(crate) hearers: u64,
    /// What is said about each of its calls.
    pub(crate) said: Option<Arc<Said>>,
    /// Who wants to be told of early ends.
    pub(crate) listeners: Option<Listeners>,
    /// How much time an operation needs.
    pub(crate) least: LeastTime,
    /// How much time the retries want an attempt to have, in nanoseconds, with the grain of a timer; 0 if none says.
    pub(crate) retry_least: u64,
    /// The policy's name, for its errors; none if it is empty.
    pub(crate) name: Option<Arc<Name>>,
}

impl Outline {
    /// How many steps it has bits for.
    pub(crate) const MOST: usize = 64;

    /// Of no steps.
    pub(crate) const fn none() -> Self {
        Self {
            bare: true,
            needs: Needs::Nothing,
            retries: false,
            hearers: 0,
            said: None,
            listeners: None,
            least: LeastTime::none(),
            retry_least: 0,
            name: None,
        }
    }

    pub(crate) fn of(steps: &[Step], said: Option<Arc<Said>>, listeners: Option<Listeners>) -> Self {
        let told = if listeners.is_some() { Needs::Now } else { Needs::Nothing };
        let bit = |(place, step): (usize, &Step)| u64::from(step.hears_of_good()) << place;
        Self {
            bare: steps.is_empty() && said.is_none() && listeners.is_none(),
            needs: steps.iter().map(Step::needs).fold(told, Needs::max),
            retries: steps.iter().any(|step| matches!(step.0, Kind::Retry(_))),
            hearers: steps.iter().take(Self::MOST).enumerate().map(bit).sum(),
            said,
            listeners,
            least: LeastTime::none(),
            retry_least: steps.iter().map(Step::retry_least).max().unwrap_or(0),
            name: None,
        }
    }

    /// The same for a policy of this name, whose operations need so much time: learned unless it is given.
    pub(crate) fn of_policy(self, name: &Name, steps: &[Step], min_attempt: Option<Duration>) -> Self {
        let name = (!name.as_str().is_empty()).then(|| Arc::new(name.clone()));
        Self { least: LeastTime::new(steps.iter().filter_map(Step::limit), min_attempt), name, ..self }
    }
}

/// What a step does. The built-in gates have arms of their own, so that the walk calls them directly: an indirect call
/// costs what a whole uncontended permit does. Two words each, so that steps and frames are walked with one index.
#[derive(Clone)]
pub(crate) enum Kind {
    /// A limit in nanoseconds.
    Timeout(u64),
    Retry(Arc<Plan>),
    Semaphore(Semaphore),
    Breaker(CircuitBreaker),
    Bucket(TokenBucket),
    Drain(Drain),
    Part(DrainPart),
    Gate(Arc<Box<dyn Gate>>),
}

impl Step {
    pub(crate) fn timeout(limit: Duration) -> Self {
        Self(Kind::Timeout(nanos(limit)))
    }

    pub(crate) fn retry(plan: Plan) -> Self {
        Self(Kind::Retry(Arc::new(plan)))
    }

    pub(crate) fn gate<G: Gate>(gate: G) -> Self {
        // Handles are moved, not cloned: a guard's cost is one clone.
        let mut gate = Some(gate);
        let kind = take(&mut gate)
            .map(Kind::Semaphore)
            .or_else(|| take(&mut gate).map(Kind::Breaker))
            .or_else(|| take(&mut gate).map(Kind::Bucket))
            .or_else(|| take(&mut gate).map(Kind::Drain))
            .or_else(|| take(&mut gate).map(Kind::Part))
            .or_else(|| gate.take().map(|gate| Kind::Gate(Arc::new(Box::new(gate)))));
        Self(kind.expect("a gate is of one type"))
    }

    pub(crate) fn is_retry(&self) -> bool {
        matches!(self.0, Kind::Retry(_))
    }

    /// The drain, if it is one or a named part of one.
    pub(crate) fn as_drain(&self) -> Option<&Drain> {
        match &self.0 {
            Kind::Drain(drain) => Some(drain),
            Kind::Part(part) => Some(part.drain()),
            _ => None,
        }
    }

    /// The time limit in nanoseconds, if it is one.
    pub(crate) fn limit(&self) -> Option<u64> {
        match self.0 {
            Kind::Timeout(limit) => Some(limit),
            _ => None,
        }
    }

    /// The gate, if it is one.
    pub(crate) fn as_gate(&self) -> Option<&dyn Gate> {
        match &self.0 {
            Kind::Timeout(_) | Kind::Retry(_) => None,
            Kind::Semaphore(gate) => Some(gate),
            Kind::Breaker(gate) => Some(gate),
            Kind::Bucket(gate) => Some(gate),
            Kind::Drain(gate) => Some(gate),
            Kind::Part(gate) => Some(gate),
            Kind::Gate(gate) => Some(&***gate),
        }
    }

    /// Enters it as a gate.
    #[inline]
    pub(crate) fn enter(&self, call: &Call) -> Entry {
        match &self.0 {
            Kind::Bucket(gate) => gate.enter(call),
            _ => self.as_gate().expect("a gate is entered").enter(call),
        }
    }

    /// Leaves it as a gate.
    #[inline]
    pub(crate) fn leave(&self, pass: Pass, outcome: &Outcome) {
        match &self.0 {
            Kind::Bucket(gate) => gate.hear(&pass, outcome),
            _ => self.as_gate().expect("a gate is left").leave(pass, *outcome),
        }
    }

    /// Whether it has anything to do when the operation went well: a limit that did not pass and a token that is spent
    /// have not.
    fn hears_of_good(&self) -> bool {
        match &self.0 {
            Kind::Timeout(_) | Kind::Bucket(_) => false,
            Kind::Retry(plan) => plan.has_budget(),
            Kind::Semaphore(_) | Kind::Breaker(_) | Kind::Drain(_) | Kind::Part(_) | Kind::Gate(_) => true,
        }
    }

    /// How much time a retry wants an attempt to have, in nanoseconds, and a timer's grain.
    fn retry_least(&self) -> u64 {
        match &self.0 {
            Kind::Retry(plan) if plan.min_attempt() > 0 => plan.min_attempt().saturating_add(TIMER_GRAIN),
            _ => 0,
        }
    }

    /// The gate, if it is one whose pass may stop holding during a wait: those that have a `still` of their own.
    pub(crate) fn as_revoking_gate(&self) -> Option<&dyn Gate> {
        match &self.0 {
            Kind::Timeout(_) | Kind::Retry(_) | Kind::Semaphore(_) | Kind::Bucket(_) => None,
            Kind::Breaker(_) | Kind::Drain(_) | Kind::Part(_) | Kind::Gate(_) => self.as_gate(),
        }
    }

    /// How much of the clock the step needs, on the way in or out.
    pub(crate) fn needs(&self) -> Needs {
        match &self.0 {
            Kind::Timeout(_) | Kind::Bucket(_) => Needs::Now,
            Kind::Retry(plan) => plan.needs(),
            _ => self.as_gate().map_or(Needs::Nothing, Gate::needs),
        }
    }
}

/// Takes the gate out if it is of this type.
fn take<T: 'static>(gate: &mut dyn Any) -> Option<T> {
    gate.downcast_mut::<Option<T>>()?.take()
}

/// Enters a gate that may not have been told that its caller won't wait, or doesn't look.
pub(crate) fn enter(gate: &dyn Gate, call: &Call, may_wait: bool) -> Entry {
    match gate.enter(call) {
        entry @ Entry::Wait(..) if !may_wait => Entry::Refused(refuse(gate, call, entry)),
        entry => entry,
    }
}

/// The no that an entry without a pass is for a call that won't wait.
#[cold]
pub(crate) fn refuse(gate: &dyn Gate, call: &Call, entry: Entry) -> Refusal {
    let (ticket, at) = match entry {
        Entry::Refused(refusal) => return refusal,
        Entry::Wait(ticket, at) => (ticket, at),
        Entry::Pass(_) => unreachable!("a pass is no refusal"),
    };
    gate.abandon(ticket);
    let refusal = Refusal::new(gate.name().to_owned(), Reason::Busy);
    match at {
        Some(at) => refusal.after(at.since(call.now())),
        None => refusal,
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::Timeout(limit) => write!(f, "timeout {}", Time(Duration::from_nanos(*limit))),
            Kind::Retry(plan) => plan.fmt(f),
            _ => self.as_gate().map_or(Ok(()), |gate| gate.draw(f)),
        }
    }
}

impl fmt::Debug for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::Semaphore(gate) => fmt::Debug::fmt(gate, f),
            Kind::Breaker(gate) => fmt::Debug::fmt(gate, f),
            Kind::Bucket(gate) => fmt::Debug::fmt(gate, f),
            Kind::Drain(gate) => fmt::Debug::fmt(gate, f),
            Kind::Part(gate) => fmt::Debug::fmt(gate, f),
            _ => write!(f, "Step({self})"),
        }
    }
}
