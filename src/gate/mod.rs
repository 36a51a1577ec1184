//! Gates: rules of admission that hand out passes and take each of them back exactly once.
//!
//! Semaphore, circuit breaker and token bucket are gates, and so is whatever implements [`Gate`]:
//!
//! ```
//! use std::sync::atomic::{AtomicBool, Ordering};
//! use resile::{Call, Entry, Gate, Outcome, Pass, Policy, Reason, Refusal};
//!
//! struct Maintenance(AtomicBool);
//!
//! impl Gate for Maintenance {
//!     fn enter(&self, _: &Call) -> Entry {
//!         if self.0.load(Ordering::Relaxed) {
//!             return Entry::Refused(Refusal::new("maintenance", Reason::Other("back soon")));
//!         }
//!         Entry::Pass(Pass::default())
//!     }
//!     fn leave(&self, _: Pass, _: Outcome) {}
//! }
//!
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), resile::ConfigError> {
//! let policy = Policy::named("users").gate(Maintenance(AtomicBool::new(true))).build()?;
//! let error = policy.run(|| async { Ok::<_, ()>(42) }).await.unwrap_err();
//! assert_eq!(error.to_string(), r#"users: refused by "maintenance": back soon"#);
//! # Ok(()) }
//! ```
//!
//! The life of a pass: [`Gate::enter`] gives it, perhaps after a wait in which the call holds a [`Ticket`] and
//! [`Gate::poll_wait`] is asked again; after any further wait, and before another attempt of a retry inside, the gate is
//! asked whether it [still](Gate::still) holds; and [`Gate::leave`] takes it back with the [`Outcome`], also when the
//! call is dropped at whatever await point or panics. A ticket that does not become a pass goes to [`Gate::abandon`].

mod fast;
mod outcome;
mod pass;

use std::fmt;
use std::sync::Arc;
use std::task::Context;

use crate::call::Call;
use crate::error::{ConfigError, Refusal};
use crate::internal::time::Moment;

pub use crate::guard::{Acquire, Guard};
pub(crate) use fast::FastGate;
pub use outcome::{Outcome, Times};
pub(crate) use pass::{Framed, Underway};
pub use pass::{Pass, Ticket};

/// A rule of admission.
///
/// Everything is called with no lock held and must not block. A gate that only ever lets in or refuses needs
/// [`enter`](Gate::enter) and [`leave`](Gate::leave); one that lets callers wait for a known moment can return
/// [`Entry::Wait`] with that moment and will be asked again then.
pub trait Gate: Send + Sync + 'static {
    /// Lets a call in, makes it wait, or refuses it. A refusal must change nothing.
    fn enter(&self, call: &Call) -> Entry;

    /// Takes a pass back: called exactly once for each pass that was given.
    fn leave(&self, pass: Pass, outcome: Outcome);

    /// Asked again by a call that waits: at once, so that the gate can keep a waker; and when its task was woken, or when
    /// the moment came that was given with the ticket. To go on waiting, return the ticket again, having kept a waker of
    /// `cx` if no moment is given.
    ///
    /// The default asks [`enter`](Gate::enter) anew, which serves gates whose tickets mean nothing.
    ///
    /// A gate that opens at a known moment can do with the default:
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{Call, Entry, Gate, Guard, Moment, Outcome, Pass, Ticket};
    /// struct OpensAt(Moment);
    /// impl Gate for OpensAt {
    ///     fn enter(&self, call: &Call) -> Entry {
    ///         if call.now() < self.0 {
    ///             return Entry::Wait(Ticket::default(), Some(self.0));
    ///         }
    ///         Entry::Pass(Pass::default())
    ///     }
    ///     fn leave(&self, _: Pass, _: Outcome) {}
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let start = tokio::time::Instant::now();
    /// Guard::acquire(OpensAt(Moment::now() + Duration::from_secs(2))).await?.success();
    /// assert_eq!(start.elapsed(), Duration::from_secs(2));
    /// # Ok(()) }
    /// ```
    fn poll_wait(&self, ticket: Ticket, call: &Call, cx: &mut Context<'_>) -> Entry {
        let _ = (ticket, cx);
        self.enter(call)
    }

    /// Is told what a pass has really cost, where that is known only afterwards: the pass stays out. Gates that use their
    /// tokens up charge or put back the difference, and gates around others pass it on; the default does nothing.
    ///
    /// A guard's call says nothing but what the gate itself knows.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use std::sync::atomic::{AtomicU32, Ordering};
    /// # use resile::{Call, Entry, Gate, Guard, Outcome, Pass};
    /// struct Bytes(AtomicU32);
    /// impl Gate for Bytes {
    ///     fn enter(&self, _: &Call) -> Entry {
    ///         Entry::Pass(Pass::default())
    ///     }
    ///     fn leave(&self, _: Pass, _: Outcome) {}
    ///     fn settle(&self, _: &mut Pass, _: &Call, actual: u32) {
    ///         self.0.fetch_add(actual, Ordering::Relaxed);
    ///     }
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let bytes = Arc::new(Bytes(AtomicU32::new(0)));
    /// let mut guard = Guard::acquire(bytes.clone()).await?;
    /// guard.settle(250);
    /// assert_eq!(bytes.0.load(Ordering::Relaxed), 250);
    /// # Ok(()) }
    /// ```
    fn settle(&self, pass: &mut Pass, call: &Call, actual: u32) {
        let _ = (pass, call, actual);
    }

    /// Takes back the ticket of a call that stopped waiting.
    fn abandon(&self, ticket: Ticket) {
        let _ = ticket;
    }

    /// Whether a pass that was given before a wait still holds after it, or before another attempt of a retry inside.
    ///
    /// # Errors
    ///
    /// The refusal that the call is to end with. The pass then goes to [`leave`](Gate::leave) as usual.
    ///
    /// One attempt has found out that it makes no sense to try again:
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use std::sync::atomic::{AtomicBool, Ordering};
    /// # use resile::{Call, Entry, Gate, Outcome, Pass, Policy, Reason, Refusal, Retry};
    /// struct Switch(AtomicBool);
    /// impl Gate for Switch {
    ///     fn enter(&self, _: &Call) -> Entry {
    ///         Entry::Pass(Pass::default())
    ///     }
    ///     fn leave(&self, _: Pass, _: Outcome) {}
    ///     fn still(&self, _: &Pass, _: &Call) -> Result<(), Refusal> {
    ///         let off = self.0.load(Ordering::Relaxed);
    ///         if off { Err(Refusal::new("switch", Reason::Other("switched off"))) } else { Ok(()) }
    ///     }
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let switch = Arc::new(Switch(AtomicBool::new(false)));
    /// let policy = Policy::named("users").gate(switch.clone()).retry(Retry::immediate()).build()?;
    /// let attempt = || async { switch.0.store(true, Ordering::Relaxed); Err::<(), _>("gone") };
    /// let error = policy.run(attempt).await.unwrap_err();
    /// assert_eq!((error.attempts(), error.is_refused(), error.last()), (1, true, Some(&"gone")));
    /// # Ok(()) }
    /// ```
    fn still(&self, pass: &Pass, call: &Call) -> Result<(), Refusal> {
        let _ = (pass, call);
        Ok(())
    }

    /// Whether [`enter`](Gate::enter) would let the call in at this moment without a wait. Changes nothing.
    ///
    /// It is for those who have to ask several gates before they enter any, such as [`Layers`](crate::Layers). The
    /// default knows nothing and says yes.
    ///
    /// # Errors
    ///
    /// The refusal that it would give to a call that does not want to wait.
    ///
    /// A gate around another, at which nobody waits:
    ///
    /// ```
    /// # use resile::{Call, Entry, Gate, Guard, Outcome, Pass, Reason, Semaphore};
    /// struct IfFree(Semaphore);
    /// impl Gate for IfFree {
    ///     fn enter(&self, call: &Call) -> Entry {
    ///         match self.0.look(call) {
    ///             Ok(()) => self.0.enter(call),
    ///             Err(refusal) => Entry::Refused(refusal),
    ///         }
    ///     }
    ///     fn leave(&self, pass: Pass, outcome: Outcome) {
    ///         self.0.leave(pass, outcome);
    ///     }
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let permits = Semaphore::permits(1).build()?;
    /// let _held = Guard::acquire(IfFree(permits.clone())).await?;
    /// let refusal = Guard::acquire(IfFree(permits.clone())).await.unwrap_err();
    /// assert_eq!((refusal.reason(), permits.queued()), (Reason::Busy, 0));
    /// # Ok(()) }
    /// ```
    fn look(&self, call: &Call) -> Result<(), Refusal> {
        let _ = call;
        Ok(())
    }

    /// How much of the clock [`leave`](Gate::leave) needs; a call reads no clock that nobody needs.
    fn needs(&self) -> Needs {
        Needs::Elapsed
    }

    /// How many may wait in it, if it bounds that.
    #[doc(hidden)]
    fn places(&self) -> Option<u32> {
        None
    }

    /// When this call could be let in at the earliest if others that cost so much went before, if that is a matter of
    /// time.
    #[doc(hidden)]
    fn due(&self, before: u64, call: &Call) -> Option<Moment> {
        let _ = (before, call);
        None
    }

    /// How the gate is called in a drawn policy.
    #[allow(clippy::unnecessary_literal_bound, reason = "others return a name that they own")]
    fn name(&self) -> &str {
        "gate"
    }

    /// Draws the gate as a step of a drawn policy: its [name](Gate::name) alone unless it has more to say.
    ///
    /// ```
    /// use std::fmt;
    /// use resile::{Call, Entry, Gate, Outcome, Pass, Policy};
    ///
    /// struct Sample { percent: u8 }
    ///
    /// impl Gate for Sample {
    ///     # fn enter(&self, _: &Call) -> Entry { Entry::Pass(Pass::default()) }
    ///     # fn leave(&self, _: Pass, _: Outcome) {}
    ///     // ...
    ///     fn name(&self) -> &str {
    ///         "sample"
    ///     }
    ///     fn draw(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    ///         write!(f, "{} {} %", self.name(), self.percent)
    ///     }
    /// }
    ///
    /// let policy = Policy::named("users").gate(Sample { percent: 5 }).build()?;
    /// assert_eq!(policy.to_string(), "users: sample 5 %");
    /// # Ok::<(), resile::ConfigError>(())
    /// ```
    ///
    /// # Errors
    ///
    /// That of the formatter.
    fn draw(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The answer of [`Gate::enter`].
#[derive(Debug)]
#[must_use]
#[non_exhaustive]
pub enum Entry {
    /// Come in.
    Pass(Pass),
    /// Wait, and ask again when woken or at that moment.
    Wait(Ticket, Option<Moment>),
    /// Not now.
    Refused(Refusal),
}

/// How much of the clock a gate needs when a pass comes back.
///
/// ```
/// # use resile::{Call, Entry, Gate, Needs, Outcome, Pass, Policy};
/// struct Open(Needs);
/// impl Gate for Open {
///     fn enter(&self, _: &Call) -> Entry {
///         Entry::Pass(Pass::default())
///     }
///     fn leave(&self, _: Pass, _: Outcome) {}
///     fn needs(&self) -> Needs {
///         self.0
///     }
/// }
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// for (needs, reads) in [(Needs::Nothing, false), (Needs::Now, true)] {
///     let policy = Policy::named("users").gate(Open(needs)).build()?;
///     let error = policy.run(|| async { Err::<(), _>("no") }).await.unwrap_err();
///     assert_eq!(error.elapsed().is_some(), reads);
/// }
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Needs {
    /// None: it may be given any times.
    Nothing,
    /// About what time it is: a reading from the same poll will do.
    Now,
    /// How long the operation took, to the clock's grain.
    Elapsed,
}

/// A pointer to a gate is that gate.
macro_rules! pointer {
    ($pointer:ident) => {
        impl<G: Gate + ?Sized> Gate for $pointer<G> {
            fn enter(&self, call: &Call) -> Entry {
                (**self).enter(call)
            }

            fn leave(&self, pass: Pass, outcome: Outcome) {
                (**self).leave(pass, outcome);
            }

            fn poll_wait(&self, ticket: Ticket, call: &Call, cx: &mut Context<'_>) -> Entry {
                (**self).poll_wait(ticket, call, cx)
            }

            fn settle(&self, pass: &mut Pass, call: &Call, actual: u32) {
                (**self).settle(pass, call, actual);
            }

            fn abandon(&self, ticket: Ticket) {
                (**self).abandon(ticket);
            }

            fn still(&self, pass: &Pass, call: &Call) -> Result<(), Refusal> {
                (**self).still(pass, call)
            }

            fn look(&self, call: &Call) -> Result<(), Refusal> {
                (**self).look(call)
            }

            fn places(&self) -> Option<u32> {
                (**self).places()
            }

            fn due(&self, before: u64, call: &Call) -> Option<Moment> {
                (**self).due(before, call)
            }

            fn needs(&self) -> Needs {
                (**self).needs()
            }

            fn name(&self) -> &str {
                (**self).name()
            }

            fn draw(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                (**self).draw(f)
            }
        }
    };
}

pointer!(Arc);
pointer!(Box);

/// What [`gate`](crate::PolicyBuilder::gate) takes: a gate, or the builder of one.
///
/// ```
/// # use resile::{ConfigError, IntoGate, Semaphore};
/// /// Settings of a service, with a gate among them.
/// struct Settings {
///     at_once: u32,
/// }
/// impl IntoGate for Settings {
///     type Gate = Semaphore;
///     fn into_gate(self) -> Result<Semaphore, ConfigError> {
///         Semaphore::permits(self.at_once).named("settings").build()
///     }
/// }
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let policy = resile::Policy::named("users").gate(Settings { at_once: 8 }).build()?;
/// assert_eq!(policy.to_string(), "users: settings 8");
/// # Ok(()) }
/// ```
pub trait IntoGate {
    /// The gate that it becomes.
    type Gate: Gate;

    /// Builds the gate.
    ///
    /// # Errors
    ///
    /// Every wrong setting of a builder. A gate that exists is valid.
    fn into_gate(self) -> Result<Self::Gate, ConfigError>;
}

impl<G: Gate> IntoGate for G {
    type Gate = G;

    fn into_gate(self) -> Result<G, ConfigError> {
        Ok(self)
    }
}

/// The gate is shared, as by a clone of its handle.
macro_rules! by_reference {
    ($($gate:ty),+ $(,)?) => {$(
        impl crate::gate::IntoGate for &$gate {
            type Gate = $gate;

            fn into_gate(self) -> Result<$gate, crate::error::ConfigError> {
                Ok(self.clone())
            }
        }
    )+};
}
pub(crate) use by_reference;
