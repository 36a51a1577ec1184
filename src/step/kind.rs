//! [`Kind`]: what a step does, and the list of gates that are called without an indirect call.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use super::Frame;
use crate::breaker::CircuitBreaker;
use crate::call::Call;
use crate::drain::{Drain, DrainPart};
use crate::gate::{Entry, FastGate, Gate, Outcome, Pass, Times};
use crate::internal::time::Moment;
use crate::rate::TokenBucket;
use crate::retry::Plan;
use crate::semaphore::Semaphore;
use crate::verdict::Verdict;

/// Moves the gate out if it is of type `T`.
fn take<T: 'static>(gate: &mut dyn Any) -> Option<T> {
    gate.downcast_mut::<Option<T>>()?.take()
}

/// The kinds of step and their dispatch, from one list of gates.
macro_rules! kinds {
    ($($kind:ident($gate:ty)),+ $(,)?) => {
        /// What a step does. The built-in gates are variants of this enum rather than of one inside it: looking up two
        /// tags costs the lane a tenth of a call's instructions (measured).
        #[derive(Clone)]
        pub(crate) enum Kind {
            /// A limit in nanoseconds.
            Timeout(u64),
            Retry(Arc<Plan>),
            $($kind($gate),)+
            /// Any other gate. Boxed twice, so that a step is two words.
            Gate(Arc<Box<dyn Gate>>),
        }

        impl Kind {
            /// Moves the handle in; nothing is cloned.
            pub(super) fn gate<G: Gate>(gate: G) -> Self {
                let mut gate = Some(gate);
                $(if let Some(gate) = take::<$gate>(&mut gate) {
                    return Self::$kind(gate);
                })+
                Self::Gate(Arc::new(Box::new(gate.expect("no arm above has moved it out"))))
            }

            /// The gate, if it is one.
            pub(crate) fn as_gate(&self) -> Option<&dyn Gate> {
                match self {
                    Self::Timeout(_) | Self::Retry(_) => None,
                    $(Self::$kind(gate) => Some(gate),)+
                    Self::Gate(gate) => Some(&***gate),
                }
            }

            /// Whether it has anything to do when the operation went well. A limit that did not pass has not.
            pub(super) fn records_success(&self) -> bool {
                match self {
                    Self::Timeout(_) => false,
                    Self::Retry(plan) => plan.has_budget(),
                    $(Self::$kind(_) => <$gate as FastGate>::RECORDS_SUCCESS,)+
                    Self::Gate(_) => true,
                }
            }

            /// Whether its pass can become invalid during a wait.
            pub(super) fn revalidates(&self) -> bool {
                match self {
                    Self::Timeout(_) | Self::Retry(_) => false,
                    $(Self::$kind(_) => <$gate as FastGate>::REVALIDATES,)+
                    Self::Gate(_) => true,
                }
            }

            /// Enters the step if that takes no wait, no lock and no user code. A timeout narrows `ends`.
            #[inline(always)]
            #[allow(clippy::inline_always, reason = "measured: the dispatch belongs into the lane's loop")]
            pub(crate) fn enter_now(&self, cost: u32, now: Moment, ends: &mut Moment) -> Option<Frame> {
                match self {
                    Self::Timeout(limit) => {
                        let outer = *ends;
                        *ends = outer.min(now.plus_nanos(*limit));
                        Some(Frame::of(super::Limited { outer }))
                    }
                    Self::Retry(plan) => Some(Frame::of(plan.enter())),
                    $(Self::$kind(gate) => gate.enter_now(cost, now).map(Frame::of),)+
                    Self::Gate(_) => None,
                }
            }

            /// Leaves the step after an operation that went well.
            #[inline(always)]
            #[allow(clippy::inline_always, reason = "measured: the dispatch belongs into the lane's loop")]
            pub(crate) fn leave_well(&self, frame: Frame, call: &Call, verdict: Verdict, times: Times) {
                match self {
                    Self::Timeout(_) => {}
                    Self::Retry(plan) => plan.leave_well(frame.read(), call),
                    $(Self::$kind(gate) => gate.leave_well(frame.read(), verdict, times),)+
                    Self::Gate(gate) => gate.leave(frame.read(), Outcome::Judged(verdict, times)),
                }
            }

            /// Enters a gate, whatever that takes.
            #[inline]
            pub(crate) fn enter(&self, call: &Call) -> Entry {
                match self {
                    Self::Timeout(_) | Self::Retry(_) => unreachable!("only gates are entered alone"),
                    $(Self::$kind(gate) => gate.enter(call),)+
                    Self::Gate(gate) => gate.enter(call),
                }
            }

            /// Leaves a gate after any end. Timeouts and retries keep nothing that has to be given back here.
            #[inline]
            pub(crate) fn leave(&self, pass: Pass, outcome: &Outcome) {
                match self {
                    Self::Timeout(_) | Self::Retry(_) => {}
                    $(Self::$kind(gate) => gate.leave_as(pass, outcome),)+
                    Self::Gate(gate) => gate.leave(pass, *outcome),
                }
            }

            /// Prints a gate.
            pub(super) fn debug(&self, f: &mut fmt::Formatter<'_>) -> Option<fmt::Result> {
                match self {
                    $(Self::$kind(gate) => Some(fmt::Debug::fmt(gate, f)),)+
                    Self::Timeout(_) | Self::Retry(_) | Self::Gate(_) => None,
                }
            }
        }
    };
}

// To add a gate to the fast path, implement `FastGate` for it and add a line here.
kinds! {
    Semaphore(Semaphore),
    Breaker(CircuitBreaker),
    Bucket(TokenBucket),
    Drain(Drain),
    NamedDrain(DrainPart),
}
