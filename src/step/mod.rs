//! [`Step`]: one entry of a policy, checked and ready to be walked.

mod kind;
mod pipeline;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::call::Call;
use crate::drain::Drain;
use crate::error::{Reason, Refusal, Time};
use crate::gate::{Entry, Framed, Gate, Needs};
use crate::internal::time::{Moment, TIMER_GRAIN, nanos};
use crate::retry::Plan;

pub(crate) use kind::Kind;
pub(crate) use pipeline::sealed;
pub use pipeline::{Outline, Pipeline, Steps};

/// One step of a policy: it can be drawn.
#[derive(Clone)]
pub struct Step(pub(crate) Kind);

/// What a step keeps while the call is further in, read and written as the type of that step: a timeout's [`Limited`], a
/// retry's [`Frame`](crate::retry::Frame), a gate's pass or ticket.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Frame([u64; 2]);

impl Frame {
    pub(crate) const EMPTY: Self = Self([0; 2]);

    #[inline]
    pub(crate) fn of(content: impl Framed) -> Self {
        Self(content.to_words())
    }

    #[inline]
    pub(crate) fn read<T: Framed>(self) -> T {
        T::from_words(self.0)
    }
}

/// What a timeout keeps while the call is further in: the deadline outside of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limited {
    pub(crate) outer: Moment,
}

impl Framed for Limited {
    #[inline]
    fn to_words(self) -> [u64; 2] {
        [self.outer.nanos(), 0]
    }

    #[inline]
    fn from_words([outer, _]: [u64; 2]) -> Self {
        Self { outer: Moment::from_nanos(outer) }
    }
}

impl Step {
    pub(crate) fn timeout(limit: Duration) -> Self {
        Self(Kind::Timeout(nanos(limit)))
    }

    pub(crate) fn retry(plan: Plan) -> Self {
        Self(Kind::Retry(Arc::new(plan)))
    }

    pub(crate) fn gate<G: Gate>(gate: G) -> Self {
        Self(Kind::gate(gate))
    }

    pub(crate) fn is_retry(&self) -> bool {
        matches!(self.0, Kind::Retry(_))
    }

    /// The drain, if the step is one or a named handle of one.
    pub(crate) fn as_drain(&self) -> Option<&Drain> {
        match &self.0 {
            Kind::Drain(drain) => Some(drain),
            Kind::NamedDrain(named) => Some(named.drain()),
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
        self.0.as_gate()
    }

    /// The gate, if it is one whose pass can become invalid during a wait.
    pub(crate) fn as_revalidating_gate(&self) -> Option<&dyn Gate> {
        if self.0.revalidates() { self.as_gate() } else { None }
    }

    fn records_success(&self) -> bool {
        self.0.records_success()
    }

    /// How much time a retry wants an attempt to have, in nanoseconds, and a timer's grain.
    fn retry_least(&self) -> u64 {
        match &self.0 {
            Kind::Retry(plan) if plan.min_attempt() > 0 => plan.min_attempt().saturating_add(TIMER_GRAIN),
            _ => 0,
        }
    }

    /// How much of the clock the step needs, on the way in or out.
    pub(crate) fn needs(&self) -> Needs {
        match &self.0 {
            Kind::Timeout(_) => Needs::Now,
            Kind::Retry(plan) => plan.needs(),
            _ => self.as_gate().map_or(Needs::Nothing, Gate::needs),
        }
    }
}

/// Enters a gate; refuses instead of waiting if the call may not wait.
pub(crate) fn enter(gate: &dyn Gate, call: &Call, may_wait: bool) -> Entry {
    match gate.enter(call) {
        entry @ Entry::Wait(..) if !may_wait => Entry::Refused(refuse(gate, call, entry)),
        entry => entry,
    }
}

/// Turns a wait into a refusal.
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
        self.0.debug(f).unwrap_or_else(|| write!(f, "Step({self})"))
    }
}
