//! [`Outcome`]: what a gate hears when its pass comes back.

use std::time::Duration;

use crate::internal::time::Moment;
use crate::verdict::Verdict;

/// How a call ended, as its gates hear it, each once.
///
/// ```
/// # use std::sync::{Arc, Mutex};
/// # use std::time::Duration;
/// # use resile::{Call, Entry, Gate, Outcome, Pass, Policy, Semaphore, Verdict};
/// #[derive(Default)]
/// struct Log(Mutex<Vec<Outcome>>);
/// impl Gate for Log {
///     fn enter(&self, _: &Call) -> Entry {
///         Entry::Pass(Pass::default())
///     }
///     fn leave(&self, _: Pass, outcome: Outcome) {
///         self.0.lock().unwrap().push(outcome);
///     }
/// }
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let (log, permits) = (Arc::new(Log::default()), Semaphore::permits(1).build()?);
/// let policy = Policy::named("users").gate(log.clone()).gate(permits.clone()).build()?;
///
/// let _ = policy.run(|| async { Ok::<_, &str>(42) }).await;
/// let hangs = policy.run(|| std::future::pending::<Result<(), &str>>());
/// let _ = tokio::time::timeout(Duration::from_secs(1), hangs).await;
/// permits.close();
/// let _ = policy.run(|| async { Ok::<_, &str>(42) }).await;
///
/// let log = log.0.lock().unwrap();
/// assert!(matches!(log[0], Outcome::Judged(Verdict::Success, _)));
/// assert!(matches!(log[1], Outcome::Abandoned(times) if times.elapsed() == Duration::from_secs(1)));
/// assert!(matches!(log[2], Outcome::NotStarted));
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// The operation ran to its end, or a timeout step cut it, or it panicked (both are `Transient`).
    Judged(Verdict, Times),
    /// The call ended before its operation was made: refused further in, or out of time in a queue. What was taken
    /// comes back, and nothing is learnt.
    NotStarted,
    /// The caller dropped or cancelled the call while its operation ran, or the caller's own deadline passed.
    Abandoned(Times),
}

/// When the operation was started and when it ended; queues and backoff are not in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Times {
    /// When the operation's future was made.
    pub started: Moment,
    /// When the outcome was known. Equal to `started` if the operation was ready at once and no gate of the policy
    /// [needs](super::Gate::needs) the difference.
    pub ended: Moment,
}

impl Times {
    /// An operation that was started and ended at these moments: for tests of gates.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{Moment, Times};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// let started = Moment::now();
    /// tokio::time::advance(Duration::from_secs(1)).await;
    /// assert_eq!(Times::new(started, Moment::now()).elapsed(), Duration::from_secs(1));
    /// # }
    /// ```
    #[must_use]
    pub const fn new(started: Moment, ended: Moment) -> Self {
        Self { started, ended }
    }

    /// How long the operation took.
    #[must_use]
    pub const fn elapsed(&self) -> Duration {
        self.ended.since(self.started)
    }
}
