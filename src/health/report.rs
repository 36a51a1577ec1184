//! What signals say and what is answered: plain data.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use crate::breaker::State;
use crate::drain::Phase;

/// What one reading of a signal says.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Signal {
    /// Nothing is the matter.
    Good,
    /// Something is.
    Bad(Symptom),
    /// Neither: between the threshold of going bad and that of getting well. The state stays as it is; as the first
    /// reading it counts as good.
    Unclear,
}

impl Signal {
    /// A bad reading in words of your own.
    ///
    /// ```
    /// use resile::health::{Signal, Symptom};
    /// assert_eq!(Signal::bad("disk full"), Signal::Bad(Symptom::Other("disk full".into())));
    /// ```
    pub fn bad(symptom: impl Into<Cow<'static, str>>) -> Self {
        Self::Bad(Symptom::Other(symptom.into()))
    }
}

/// What is the matter, as data.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Symptom {
    /// Tasks wait long for their turn.
    Lagging {
        /// How long.
        lag: Duration,
        /// From when on that is bad.
        limit: Duration,
    },
    /// The signal takes long to be read, and holds up the thread on which that is done.
    Slow {
        /// How long it took, or has taken so far.
        took: Duration,
        /// From when on that is bad.
        limit: Duration,
    },
    /// A circuit breaker lets nothing through.
    Circuit(State),
    /// A queue is nearly full.
    Queue {
        /// How many wait.
        queued: u32,
        /// How many may.
        max_queue: u32,
    },
    /// The service lets nothing in any more.
    Draining(Phase),
    /// What a signal of your own says.
    Other(Cow<'static, str>),
}

impl fmt::Display for Symptom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lagging { lag, limit } => write!(f, "tasks wait {lag:?} for their turn, the limit is {limit:?}"),
            Self::Slow { took, limit } => write!(f, "reading it takes {took:?}, the limit is {limit:?}"),
            Self::Circuit(State::ForcedOpen) => f.write_str("the circuit is held open"),
            Self::Circuit(_) => f.write_str("the circuit is open"),
            Self::Queue { queued, max_queue } => write!(f, "{queued} wait in a queue for {max_queue}"),
            Self::Draining(Phase::Closing) => f.write_str("it is about to stop and finishes what it has"),
            Self::Draining(Phase::Cancelling) => f.write_str("it is about to stop and cancels what is left"),
            Self::Draining(_) => f.write_str("it has stopped"),
            Self::Other(symptom) => f.write_str(symptom),
        }
    }
}

/// What [`Health::live`](super::Health::live) and [`Health::ready`](super::Health::ready) answer: plain data, to be written in whatever format is asked for.
///
/// ```
/// use std::time::Duration;
/// use resile::health::{HealthReason, HealthReport, Signal};
/// use resile::Health;
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let health = Health::builder().signal("disk", || Signal::bad("full")).build()?;
/// tokio::time::advance(Duration::from_millis(100)).await;
///
/// let HealthReport { ok, reasons, .. } = health.ready();
/// assert!(!ok);
/// let HealthReason { signal, symptom, lasting, .. } = &reasons[0];
/// assert_eq!((signal.as_ref(), symptom.to_string().as_str()), ("disk", "full"));
/// assert_eq!(*lasting, Duration::from_millis(100));
/// assert_eq!(health.ready().to_string(), "not ok: disk: full (for 100ms)");
/// assert_eq!(health.live().to_string(), "ok");
/// # Ok(()) }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct HealthReport {
    /// Yes or no.
    pub ok: bool,
    /// Why not: none if it is a yes.
    pub reasons: Vec<HealthReason>,
}

/// One reason for a no.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct HealthReason {
    /// The name of the signal.
    pub signal: Cow<'static, str>,
    /// What is the matter, by its latest reading.
    pub symptom: Symptom,
    /// For how long: from the first bad reading on.
    pub lasting: Duration,
}

impl fmt::Display for HealthReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.ok { "ok" } else { "not ok" })?;
        for (place, reason) in self.reasons.iter().enumerate() {
            write!(f, "{}{reason}", if place == 0 { ": " } else { "; " })?;
        }
        Ok(())
    }
}

impl fmt::Display for HealthReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} (for {:?})", self.signal, self.symptom, self.lasting)
    }
}
