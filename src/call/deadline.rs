//! [`Deadline`]: when a call must be over, in whatever way its caller knows it.

use std::time::Duration;

use tokio::time::Instant;

use crate::internal::time::Moment;

/// When a call must be over: a duration from its first poll, or an instant.
///
/// Durations too long for the clock mean no deadline.
///
/// ```
/// # use std::time::Duration;
/// # use resile::Policy;
/// # use tokio::time::Instant;
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let policy = Policy::named("users").build()?;
/// let at = Instant::now() + Duration::from_secs(2);
/// let call = policy.call().deadline(at).run_with(|call| async move { Ok::<_, std::io::Error>(call.deadline()) });
/// assert_eq!(call.await?, Some(at));
/// let call = policy.call().deadline(None).run_with(|call| async move { Ok::<_, std::io::Error>(call.deadline()) });
/// assert_eq!(call.await?, None);
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Deadline(pub(super) When);

#[derive(Clone, Copy, Debug)]
pub(super) enum When {
    After(Duration),
    At(Moment),
}

impl Deadline {
    /// The moment, for those who have no first poll: a duration counts from now.
    pub(crate) fn counted_now(self) -> Moment {
        match self.0 {
            When::After(after) => Moment::now() + after,
            When::At(at) => at,
        }
    }
}

impl From<Duration> for Deadline {
    fn from(after: Duration) -> Self {
        Self(When::After(after))
    }
}

impl From<Instant> for Deadline {
    fn from(at: Instant) -> Self {
        Self(When::At(at.into()))
    }
}

impl From<std::time::Instant> for Deadline {
    fn from(at: std::time::Instant) -> Self {
        Self(When::At(at.into()))
    }
}

/// As [`Call::deadline`](super::Call::deadline) and [`Attempt::deadline`](super::Attempt::deadline) tell it: `None` is no deadline.
impl From<Option<Instant>> for Deadline {
    fn from(at: Option<Instant>) -> Self {
        Self(When::At(at.map_or(Moment::NEVER, Moment::from)))
    }
}
