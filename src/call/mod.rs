//! What travels inward with a call, what the operation sees of it, and what the caller can say about it.

mod attempt;
mod builder;
mod deadline;
mod key;

use std::cell::Cell;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::cancel::CancelReason;
use crate::context;
use crate::error::Limit;
use crate::internal::seldom::Seldom;
use crate::internal::time::{Moment, nanos};
use crate::said::{self, Said, Waits};

pub use crate::said::CancelSource;
pub use attempt::Attempt;
pub(crate) use attempt::{instant, remaining};
pub use builder::CallBuilder;
pub use deadline::Deadline;
use deadline::When;
pub use key::Key;

/// A call on its way in, as gates see it.
///
/// A gate of your own decides by it:
///
/// ```
/// # use std::time::Duration;
/// # use resile::{Call, Entry, Gate, Outcome, Pass, Policy, Reason, Refusal};
/// struct OnlyIfTimeIsLeft;
/// impl Gate for OnlyIfTimeIsLeft {
///     fn enter(&self, call: &Call) -> Entry {
///         assert_eq!((call.attempt(), call.cost(), call.key("tenant")), (1, 3, Some(&7_u64.into())));
///         if call.remaining() < Duration::from_millis(100) {
///             return Entry::Refused(Refusal::new("time", Reason::TooLate));
///         }
///         Entry::Pass(Pass::default())
///     }
///     fn leave(&self, _: Pass, _: Outcome) {}
/// }
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let policy = Policy::named("api").gate(OnlyIfTimeIsLeft).build()?;
/// let call = || policy.call().cost(3).key("tenant", 7_u64);
/// assert!(call().deadline(Duration::from_secs(1)).run(|| async { Ok::<_, &str>(42) }).await.is_ok());
/// assert!(call().deadline(Duration::from_millis(50)).run(|| async { Ok::<_, &str>(42) }).await.is_err());
/// # Ok(()) }
/// ```
pub struct Call {
    /// The clock as read in this poll, or `NEVER` while nobody has asked.
    now: Cell<Moment>,
    deadline: Moment,
    /// The deadline of the caller and the context, without those of steps.
    caller: Moment,
    /// A deadline in nanoseconds from the first poll, which is still to come; `u64::MAX` if none is left to count.
    within: u64,
    /// How much time in nanoseconds must be left before `deadline` when a wait at a gate ends.
    spare: u64,
    /// Shared with the policy or the context that said it, until something is to be added.
    said: Seldom<Arc<Said>>,
    attempt: u32,
    cost: u32,
    priority: Option<Priority>,
    lane: u8,
    /// Where `deadline` comes from, but for the steps.
    origin: Origin,
    patient: Cell<bool>,
    detached: bool,
}

/// Where the deadline of a call comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    Caller,
    Context,
}

impl Call {
    #[inline]
    pub(crate) const fn new() -> Self {
        Self {
            now: Cell::new(Moment::NEVER),
            deadline: Moment::NEVER,
            caller: Moment::NEVER,
            within: u64::MAX,
            spare: 0,
            said: Seldom::NONE,
            attempt: 1,
            cost: 1,
            priority: None,
            lane: 0,
            origin: Origin::Caller,
            patient: Cell::new(true),
            detached: false,
        }
    }

    /// A call that is one way of using a gate alone: it inherits nothing, since it can end in a refusal only.
    pub(crate) fn alone(cost: u32, patient: bool) -> Self {
        let mut call = Self::new();
        call.cost = cost;
        call.patient.set(patient);
        call.detached = true;
        call
    }

    /// The time of this poll. The first gate that asks reads the clock, the others are handed the same reading.
    #[inline]
    pub fn now(&self) -> Moment {
        let now = self.now.get();
        if now == Moment::NEVER { self.read_clock() } else { now }
    }

    /// Which attempt this is, counted from 1.
    #[must_use]
    pub const fn attempt(&self) -> u32 {
        self.attempt
    }

    /// What the call costs, in permits or tokens: 1 unless the caller said otherwise.
    #[must_use]
    pub const fn cost(&self) -> u32 {
        self.cost
    }

    /// How important the caller says the call is, or the [context](crate::context).
    #[must_use]
    pub const fn priority(&self) -> Priority {
        match self.priority {
            Some(priority) => priority,
            None => Priority::Normal,
        }
    }

    /// The value that the caller gave for a key, or the [context](crate::context).
    #[must_use]
    pub fn key(&self, name: &str) -> Option<&Key> {
        self.said.as_ref()?.key(name)
    }

    /// The earliest deadline on the way to here: [`Moment::NEVER`] if there is none.
    #[must_use]
    pub const fn ends(&self) -> Moment {
        self.deadline
    }

    /// The earliest deadline on the way to here.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        instant(self.deadline)
    }

    /// What is left until the deadline: [`Duration::MAX`] if there is none.
    #[must_use]
    pub fn remaining(&self) -> Duration {
        remaining(self.deadline, || self.now())
    }

    /// Whether the call may be made to wait, or would rather be refused.
    #[must_use]
    pub fn may_wait(&self) -> bool {
        self.patient.get()
    }

    /// Has the call refused by whatever would have it wait, until what is returned is dropped.
    #[inline]
    pub(crate) fn in_haste(&self) -> InHaste<'_> {
        InHaste { call: self, patient: self.patient.replace(false) }
    }

    /// Which of several attempts in flight this is: 0 for the first. Hedges will have others.
    #[must_use]
    pub const fn lane(&self) -> u8 {
        self.lane
    }

    /// Forgets the reading of an earlier poll.
    #[inline]
    pub(crate) fn forget_time(&self) {
        self.now.set(Moment::NEVER);
    }

    /// Reads the clock whether or not this poll already has.
    #[inline(never)]
    pub(crate) fn read_clock(&self) -> Moment {
        let now = Moment::now();
        self.now.set(now);
        now
    }

    /// At the first poll: turns a deadline that was given as a duration into a moment, and inherits from the policy and
    /// the context.
    #[inline]
    pub(crate) fn start(&mut self, said: Option<&Arc<Said>>) {
        if self.within != u64::MAX {
            self.narrow_to(self.now().plus_nanos(self.within));
            self.within = u64::MAX;
        }
        if said.is_some() {
            said::add(&mut self.said, said);
        }
        if context::is_present() {
            self.inherit();
        }
    }

    /// Narrows the deadline that the call has outside of all steps.
    fn narrow_to(&mut self, deadline: Moment) {
        self.deadline = self.deadline.min(deadline);
        self.caller = self.caller.min(deadline);
    }

    /// Until when a caller waits that does not end this call.
    pub(crate) fn set_caller_end(&mut self, ends: Moment) {
        self.caller = self.caller.min(ends);
    }

    #[cold]
    fn inherit(&mut self) {
        if self.detached {
            return;
        }
        context::with(|context| {
            if context.ends() < self.deadline {
                self.narrow_to(context.ends());
                self.origin = Origin::Context;
            }
            self.priority = self.priority.or(context.get_priority());
            said::add(&mut self.said, context.said());
        });
    }

    /// The limit that has passed if it was that of no step.
    pub(crate) fn limit(&self) -> Limit {
        if self.origin == Origin::Context { Limit::Context } else { Limit::Caller }
    }

    /// Narrows the deadline to that of a step, or widens it to what it was before.
    #[inline]
    pub(crate) fn set_end(&mut self, deadline: Moment) {
        self.deadline = deadline;
    }

    /// Whether the caller has set nothing that could end it.
    #[inline]
    pub(crate) fn is_bare(&self) -> bool {
        self.deadline == Moment::NEVER && self.within == u64::MAX && self.said.is_none()
    }

    /// Narrows the deadline before the first poll: of several the earliest counts.
    pub(crate) fn narrow(&mut self, deadline: Deadline) {
        match deadline.0 {
            When::After(after) => self.within = self.within.min(nanos(after)),
            When::At(at) => self.narrow_to(at),
        }
    }

    /// Says how much time an operation needs, for gates that know when a call's turn will come.
    pub(crate) fn set_spare(&mut self, nanos: u64) {
        self.spare = nanos;
    }

    /// The latest moment at which a wait at a gate may end and still be of use.
    pub(crate) fn latest_entry(&self) -> Moment {
        if self.deadline == Moment::NEVER { Moment::NEVER } else { self.deadline.minus_nanos(self.spare) }
    }

    pub(crate) fn next_attempt(&mut self) {
        self.attempt = self.attempt.saturating_add(1);
    }

    pub(crate) fn view(&self) -> Attempt {
        Attempt { deadline: self.deadline, caller: self.caller, number: self.attempt, lane: self.lane }
    }

    /// Whether the caller has cancelled, without waiting for it.
    #[inline]
    pub(crate) fn is_cancelled(&self) -> bool {
        match &*self.said {
            None => false,
            Some(said) => said.is_cancelled(),
        }
    }

    /// What may cancel it, if anything may.
    #[inline]
    pub(crate) fn cancels(&self) -> Option<&Said> {
        self.said.as_deref().filter(|said| said.can_cancel())
    }

    /// Why it was cancelled, by the first of its sources; `None` if by a deadline that it inherits and that has passed.
    /// A scope cancels its children at their deadline: whichever of the two they notice first, it is one.
    pub(crate) fn cancel_reason(&self, waits: Option<&Waits>) -> Option<CancelReason> {
        // The tokens that are waited for may be those of a round that is over.
        let waited = || waits.and_then(Waits::first);
        let said = || self.said.as_ref().and_then(|said| said.first());
        let first = said().into_iter().chain(waited()).min_by_key(|record| record.number);
        let reason = first.map_or(CancelReason::Unspecified, |record| record.reason);
        (reason != CancelReason::Deadline || self.read_clock() < self.deadline).then_some(reason)
    }

    /// Tells the context that the deadline which it gave has passed, so that all its users name the same end.
    pub(crate) fn note_end(&self) {
        if self.origin == Origin::Context {
            context::with(|context| {
                if context.ends() == self.deadline {
                    context.expire();
                }
            });
        }
    }

    pub(crate) fn set_key(&mut self, name: &'static str, value: Key) {
        said::own(&mut self.said).set_key(name, value);
    }

    pub(crate) fn watch(&mut self, source: &impl CancelSource) {
        said::own(&mut self.said).watch(source);
    }

    pub(crate) fn detach(&mut self) {
        self.detached = true;
    }

    pub(crate) const fn is_detached(&self) -> bool {
        self.detached
    }

    /// The same call, to be made once more. Not `Clone`: a gate sees one call and must not keep it.
    pub(crate) fn duplicate(&self) -> Self {
        Self { now: self.now.clone(), said: self.said.clone(), patient: self.patient.clone(), ..*self }
    }

    /// The same call before its first poll, but for what could end it.
    pub(crate) fn without_ends(&self) -> Self {
        let mut call = Self::new();
        *call.said = self.said.as_ref().and_then(|said| said.only_keys());
        call.cost = self.cost;
        call.priority = self.priority;
        call.patient.set(self.patient.get());
        call.detached = self.detached;
        call
    }
}

/// A call that will not wait for now.
pub(crate) struct InHaste<'a> {
    call: &'a Call,
    patient: bool,
}

impl Drop for InHaste<'_> {
    #[inline]
    fn drop(&mut self) {
        self.call.patient.set(self.patient);
    }
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Call")
            .field("attempt", &self.attempt)
            .field("deadline", &self.deadline)
            .field("cost", &self.cost)
            .field("priority", &self.priority())
            .field("keys", &self.said.as_ref().map_or(&[][..], |said| said.keys()))
            .finish_non_exhaustive()
    }
}

/// How important a call is to its caller. Gates that shed load refuse the least important first.
///
/// ```
/// # use resile::Priority;
/// assert!(Priority::Low < Priority::default() && Priority::High < Priority::Critical);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Priority {
    /// Can be dropped without anybody noticing: prefetching, batch work.
    Low,
    /// Somebody would notice.
    #[default]
    Normal,
    /// Somebody is waiting for it.
    High,
    /// Everything else depends on it.
    Critical,
}
