//! How an attempt's result is judged: once, for every step.
//!
//! | verdict | means | retry | breaker | adaptive limit | budget |
//! | --- | --- | --- | --- | --- | --- |
//! | [`Success`](Verdict::Success) | it worked | no | success | sample | deposit |
//! | [`Transient`](Verdict::Transient) | the peer's fault, another try may help | yes | failure | drop | – |
//! | [`Overloaded`](Verdict::Overloaded) | the peer says it is full | yes, not before its hint | failure | drop | – |
//! | [`Permanent`](Verdict::Permanent) | the peer answered; trying again won't help | no | success | sample | deposit |
//! | [`Ignored`](Verdict::Ignored) | says nothing about the peer | no | nothing | none | – |
//! | [`NotSent`](Verdict::NotSent) | the request never left the client | yes, the first three times at no charge | failure | drop | – |
//! | [`Committed`](Verdict::Committed) | it failed after the peer had done the work | no | failure | drop | – |

use std::time::Duration;

use crate::error::{Error, ErrorKind};

/// What one attempt's result says about the peer; see the [module](self) for who does what with it.
///
/// The durations are hints of the peer: how long it asked to be left alone (`Retry-After`).
///
/// ```
/// use resile::Verdict;
///
/// assert!(Verdict::Transient(None).is_retryable());
/// assert!(Verdict::Permanent.is_healthy());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Verdict {
    /// The operation did what it was asked.
    Success,
    /// The peer or the way to it failed; another try may help, after the hint if there is one.
    Transient(Option<Duration>),
    /// The peer says that it is full; another try may help, but not before the hint.
    Overloaded(Option<Duration>),
    /// The peer is well and said no; trying again won't help.
    Permanent,
    /// Says nothing about the peer: a local mistake, a call that somebody cancelled.
    Ignored,
    /// The request never left the client: no connection, no stream. Trying again repeats nothing, so up to three such
    /// attempts of a call use up neither its `max_attempts` nor the retry budget. From the fourth on it is like
    /// `Transient(None)`.
    NotSent,
    /// The operation failed, but the peer may have done what it was asked: the answer was lost or broken. Trying again
    /// would do it twice, so no retry does.
    Committed,
}

impl Verdict {
    /// Whether another attempt may help.
    #[must_use]
    pub const fn is_retryable(self) -> bool {
        matches!(self, Self::Transient(_) | Self::Overloaded(_) | Self::NotSent)
    }

    /// Whether the peer is well: it succeeded, or it answered no for a good reason.
    #[must_use]
    pub const fn is_healthy(self) -> bool {
        matches!(self, Self::Success | Self::Permanent)
    }

    /// Whether the peer, or the way to it, failed.
    ///
    /// ```
    /// # use resile::Verdict;
    /// assert!(Verdict::NotSent.is_failure() && Verdict::Committed.is_failure());
    /// assert!(!Verdict::Permanent.is_failure() && !Verdict::Ignored.is_failure());
    /// ```
    #[must_use]
    pub const fn is_failure(self) -> bool {
        matches!(self, Self::Transient(_) | Self::Overloaded(_) | Self::NotSent | Self::Committed)
    }

    /// How long the peer asked to be left alone.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::Verdict;
    /// let verdict = Verdict::Overloaded(Some(Duration::from_secs(2)));
    /// assert_eq!(verdict.hint(), Some(Duration::from_secs(2)));
    /// assert_eq!((Verdict::Transient(None).hint(), Verdict::Permanent.hint()), (None, None));
    /// ```
    #[must_use]
    pub const fn hint(self) -> Option<Duration> {
        match self {
            Self::Transient(hint) | Self::Overloaded(hint) => hint,
            _ => None,
        }
    }
}

/// Judges results. Closures over `&Result<T, E>` are judges; so is any type that implements this.
///
/// A judge is called once per attempt, with no lock held, and sees the value as well as the error: a `503` that came
/// back as `Ok(response)` can be called [`Verdict::Overloaded`].
///
/// ```
/// use resile::{Classify, Verdict};
///
/// struct ByStatus;
///
/// impl<E> Classify<u16, E> for ByStatus {
///     fn classify(&self, result: &Result<u16, E>) -> Verdict {
///         match result {
///             Ok(429 | 503) => Verdict::Overloaded(None),
///             Ok(500..) | Err(_) => Verdict::Transient(None),
///             Ok(400..) => Verdict::Permanent,
///             Ok(_) => Verdict::Success,
///         }
///     }
/// }
///
/// assert_eq!(ByStatus.classify(&Ok::<_, ()>(404)), Verdict::Permanent);
/// ```
pub trait Classify<T, E> {
    /// The verdict on one attempt's result.
    fn classify(&self, result: &Result<T, E>) -> Verdict;

    /// What the attempt has really cost, if that is to be [settled](crate::CallBuilder::settle).
    #[doc(hidden)]
    #[inline]
    fn cost(&self, result: &Result<T, E>) -> Option<u32> {
        let _ = result;
        None
    }
}

impl<T, E, F> Classify<T, E> for F
where
    F: Fn(&Result<T, E>) -> Verdict,
{
    fn classify(&self, result: &Result<T, E>) -> Verdict {
        self(result)
    }
}

/// The judge of a policy that was given none: `Ok` is [`Verdict::Success`], `Err` is [`Verdict::Transient`].
///
/// ```
/// use resile::{ByResult, Classify, Verdict};
///
/// assert_eq!(ByResult.classify(&Err::<(), _>("reset")), Verdict::Transient(None));
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct ByResult;

impl<T, E> Classify<T, E> for ByResult {
    #[inline]
    fn classify(&self, result: &Result<T, E>) -> Verdict {
        match result {
            Ok(_) => Verdict::Success,
            Err(_) => Verdict::Transient(None),
        }
    }
}

/// A judge that also reads from the result what the attempt has cost; from
/// [`CallBuilder::settle`](crate::CallBuilder::settle).
#[derive(Clone, Copy, Debug)]
pub struct Settled<C, S> {
    pub(crate) judge: C,
    pub(crate) cost: S,
}

impl<T, E, C, S> Classify<T, E> for Settled<C, S>
where
    C: Classify<T, E>,
    S: Fn(&Result<T, E>) -> u32,
{
    #[inline]
    fn classify(&self, result: &Result<T, E>) -> Verdict {
        self.judge.classify(result)
    }

    #[inline]
    fn cost(&self, result: &Result<T, E>) -> Option<u32> {
        Some((self.cost)(result))
    }
}

/// The judge for an operation that is itself run by a policy, so that nested retries don't multiply unseen.
///
/// An inner policy that has already tried more than once is not asked again, and one that refused says nothing about
/// the peer: both are [`Verdict::Ignored`]. A single failed or timed-out try is [`Verdict::Transient`].
///
/// ```
/// use resile::{ByPolicy, Policy, Retry};
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let inner = Policy::named("inner").retry(Retry::immediate().max_attempts(3)).build()?;
/// let outer = Policy::named("outer").retry(Retry::immediate().max_attempts(3)).build()?;
///
/// let made = std::cell::Cell::new(0);
/// let end = outer
///     .classify(ByPolicy)
///     .run(|| inner.run(|| async { made.set(made.get() + 1); Err::<(), _>("down") }))
///     .await;
/// assert!(end.is_err());
/// assert_eq!(made.get(), 3, "three, not nine");
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct ByPolicy;

impl<T, E> Classify<T, Error<E>> for ByPolicy {
    fn classify(&self, result: &Result<T, Error<E>>) -> Verdict {
        match result {
            Ok(_) => Verdict::Success,
            Err(error) => match error.kind() {
                ErrorKind::Failed | ErrorKind::TimedOut if error.attempts() == 1 => {
                    Verdict::Transient(error.retry_after())
                }
                _ => Verdict::Ignored,
            },
        }
    }
}
