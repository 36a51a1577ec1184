//! [`Attempt`]: what the operation sees of its call.

use std::time::Duration;

use tokio::time::Instant;

use crate::internal::time::Moment;

pub(crate) fn instant(deadline: Moment) -> Option<Instant> {
    if deadline == Moment::NEVER { None } else { deadline.to_instant() }
}

pub(crate) fn remaining(deadline: Moment, now: impl FnOnce() -> Moment) -> Duration {
    if deadline == Moment::NEVER { Duration::MAX } else { deadline.since(now()) }
}

/// What the operation sees of its call: a small copy that it may keep.
///
/// ```
/// use std::time::Duration;
/// use resile::{Policy, Retry};
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let policy = Policy::named("users")
///     .timeout(Duration::from_secs(2))
///     .retry(Retry::constant(Duration::from_millis(500)).max_attempts(3))
///     .build()?;
///
/// let left = policy
///     .run_with(|call| async move { if call.is_retry() { Ok(call.remaining()) } else { Err("reset") } })
///     .await
///     .unwrap();
/// assert_eq!(left, Duration::from_millis(1500));
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Attempt {
    pub(super) deadline: Moment,
    pub(super) caller: Moment,
    pub(super) number: u32,
    pub(super) lane: u8,
}

impl Attempt {
    /// Which attempt this is, counted from 1.
    #[must_use]
    pub const fn attempt(&self) -> u32 {
        self.number
    }

    /// Whether the operation was tried before.
    #[must_use]
    pub const fn is_retry(&self) -> bool {
        self.number > 1
    }

    /// The earliest deadline that applies: `None` if there is none.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        instant(self.deadline)
    }

    /// What is left until the deadline, to pass on as a header or a statement timeout: zero if it has passed,
    /// [`Duration::MAX`] if there is none.
    ///
    /// Cost: reads the clock, unless there is no deadline.
    #[must_use]
    pub fn remaining(&self) -> Duration {
        remaining(self.deadline, Moment::now)
    }

    /// How long the caller would still wait: what is left until the deadline of the call or its context, without the limits
    /// of the policy. Zero if it has passed, [`Duration::MAX`] if there is none.
    ///
    /// Behind a [shield](crate::CallBuilder::shield) the caller's deadline does not end the operation, and this is how to
    /// see it: an operation may choose to do less when nobody waits for its answer.
    ///
    /// ```
    /// use std::time::Duration;
    /// use resile::Policy;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let policy = Policy::named("payments").timeout(Duration::from_secs(5)).build()?;
    /// let call = policy.call().deadline(Duration::from_secs(1)).shield();
    /// let seen = call.run_with(|call| async move { Ok::<_, ()>((call.caller_remaining(), call.remaining())) });
    /// assert_eq!(seen.await.unwrap(), (Duration::from_secs(1), Duration::from_secs(5)));
    /// # Ok(()) }
    /// ```
    ///
    /// Cost: reads the clock, unless there is no deadline.
    #[must_use]
    pub fn caller_remaining(&self) -> Duration {
        remaining(self.caller, Moment::now)
    }

    pub(crate) const fn ends(&self) -> Moment {
        self.deadline
    }

    /// Which of several attempts in flight this is: 0 for the first. Hedges will have others.
    #[must_use]
    pub const fn lane(&self) -> u8 {
        self.lane
    }
}
