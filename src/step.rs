//! [`Step`]: one entry of a policy, checked and ready to be walked.

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::breaker::CircuitBreaker;
use crate::call::Call;
use crate::error::{Reason, Refusal};
use crate::gate::{Entry, Gate, Needs};
use crate::internal::time::nanos;
use crate::rate::TokenBucket;
use crate::retry::Plan;
use crate::semaphore::Semaphore;

/// One step of a policy: it can be drawn.
#[derive(Clone)]
pub struct Step(pub(crate) Kind);

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
        let any = &gate as &dyn Any;
        Self(if let Some(semaphore) = any.downcast_ref::<Semaphore>() {
            Kind::Semaphore(semaphore.clone())
        } else if let Some(breaker) = any.downcast_ref::<CircuitBreaker>() {
            Kind::Breaker(breaker.clone())
        } else if let Some(bucket) = any.downcast_ref::<TokenBucket>() {
            Kind::Bucket(bucket.clone())
        } else {
            Kind::Gate(Arc::new(Box::new(gate)))
        })
    }

    /// The gate, if it is one.
    pub(crate) fn as_gate(&self) -> Option<&dyn Gate> {
        match &self.0 {
            Kind::Timeout(_) | Kind::Retry(_) => None,
            Kind::Semaphore(gate) => Some(gate),
            Kind::Breaker(gate) => Some(gate),
            Kind::Bucket(gate) => Some(gate),
            Kind::Gate(gate) => Some(&***gate),
        }
    }

    /// How much of the clock the step needs.
    pub(crate) fn needs(&self) -> Needs {
        match &self.0 {
            Kind::Timeout(_) => Needs::Now,
            Kind::Retry(plan) => plan.needs(),
            _ => self.as_gate().map_or(Needs::Nothing, Gate::needs),
        }
    }
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
            Kind::Timeout(limit) => write!(f, "timeout {:?}", Duration::from_nanos(*limit)),
            Kind::Retry(plan) => plan.fmt(f),
            Kind::Semaphore(gate) => fmt::Display::fmt(gate, f),
            Kind::Breaker(gate) => fmt::Display::fmt(gate, f),
            Kind::Bucket(gate) => fmt::Display::fmt(gate, f),
            Kind::Gate(gate) => f.write_str(gate.name()),
        }
    }
}

impl fmt::Debug for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::Semaphore(gate) => fmt::Debug::fmt(gate, f),
            Kind::Breaker(gate) => fmt::Debug::fmt(gate, f),
            Kind::Bucket(gate) => fmt::Debug::fmt(gate, f),
            _ => write!(f, "Step({self})"),
        }
    }
}
