//! What a call can end in: [`Error`], the [`Refusal`] of a gate, and the [`ConfigError`] of a wrong setting.

mod config;
mod refusal;
mod text;
mod time;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::cancel::CancelReason;
use crate::verdict::Verdict;

pub(crate) use config::Faults;
pub use config::{ConfigError, Fault};
pub(crate) use refusal::Name;
pub use refusal::{Reason, Refusal};
pub(crate) use time::Time;

/// Nanoseconds that stand for "not known".
const UNKNOWN: u64 = u64::MAX;

/// Why a call did not succeed, with the operation's own error kept.
///
/// The error tells the ways to fail apart ([`Error::kind`]), counts the attempts, and hands the operation's last
/// error back, also when the call ended by a timeout or an empty budget. It puts no bound on `E`; where `E` is an
/// error, so is this, and its source is the operation's.
///
/// Size: that of an `Option<E>` and 80 bytes, rounded up to a word; it is made without allocating.
///
/// ```
/// use std::time::Duration;
/// use resile::{ErrorKind, Policy};
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let policy = Policy::named("slow").timeout(Duration::from_millis(10)).build()?;
///
/// let error = policy.run(|| std::future::pending::<Result<(), &str>>()).await.unwrap_err();
/// assert_eq!(error.kind(), ErrorKind::TimedOut);
/// assert_eq!(error.attempts(), 1);
/// assert_eq!(error.to_string(), "slow: timed out: the call exceeded 10ms in attempt 1");
/// # Ok(()) }
/// ```
pub struct Error<E> {
    last: Option<E>,
    cause: Cause,
    /// The policy's name, unless it has none.
    policy: Option<Arc<Name>>,
    elapsed: u64,
    attempts: u32,
    stop: Stop,
}

/// What ended the call, with its particulars.
#[derive(Clone, Debug)]
pub(crate) enum Cause {
    /// By this verdict.
    Failed(Verdict),
    /// With the message of the panic.
    Panicked(Arc<str>),
    TimedOut {
        limit: Limit,
        /// It was a limit of one attempt.
        of_attempt: bool,
    },
    Refused(Refusal),
    Cancelled(CancelReason),
}

impl Cause {
    pub(crate) const fn timed_out(limit: Limit) -> Self {
        Self::TimedOut { limit, of_attempt: false }
    }
}

/// The ways a call can fail.
///
/// ```
/// # use resile::{ErrorKind, Policy, Semaphore};
/// /// What a web service would answer.
/// fn status<E>(error: &resile::Error<E>) -> u16 {
///     match error.kind() {
///         ErrorKind::Refused => 503,
///         ErrorKind::TimedOut => 504,
///         _ => 502,
///     }
/// }
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let closed = Semaphore::permits(1).build()?;
/// closed.close();
/// let policy = Policy::named("users").gate(closed).build()?;
/// assert_eq!(status(&policy.run(|| async { Ok::<_, &str>(42) }).await.unwrap_err()), 503);
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The operation failed, and was not (or no longer) tried again.
    Failed,
    /// The operation panicked on a thread of its own, as an [offloaded](crate::blocking) one does. A panic on the
    /// caller's thread goes on unwinding instead.
    Panicked,
    /// A time limit of the policy or of the caller passed.
    TimedOut,
    /// A gate did not let the call in.
    Refused,
    /// The call was cancelled: by its caller, its policy, or its context.
    Cancelled,
}

/// The time limit that passed.
///
/// ```
/// # use std::time::Duration;
/// # use resile::{Limit, Policy};
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let policy = Policy::named("slow").timeout(Duration::from_secs(2)).build()?;
/// let never = || std::future::pending::<Result<(), &str>>();
/// let error = policy.run(never).await.unwrap_err();
/// assert_eq!(error.limit(), Some(Limit::Step { step: 1, limit: Duration::from_secs(2) }));
/// let error = policy.call().deadline(Duration::from_secs(1)).run(never).await.unwrap_err();
/// assert_eq!(error.limit(), Some(Limit::Caller));
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Limit {
    /// A timeout step of the policy.
    Step {
        /// Its place in the policy, outermost first, counted from 1.
        step: usize,
        /// How much time it gives.
        limit: Duration,
    },
    /// The deadline that the caller gave with the call.
    Caller,
    /// The deadline of the request being served, from the [context](crate::context) of the task.
    Context,
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Step { step, limit } => write!(f, "the limit of {} at step {step}", Time(*limit)),
            Self::Caller => f.write_str("the caller's deadline"),
            Self::Context => f.write_str("the deadline of the request"),
        }
    }
}

/// Why there was no further attempt.
///
/// It is told where there is an error to tell it: when attempts end on an `Ok` that was judged bad, the caller gets that
/// `Ok` and nothing else.
///
/// ```
/// # use resile::{Policy, Retry, Stop, Verdict};
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let policy = Policy::named("users").retry(Retry::immediate()).build()?;
/// let down = || async { Err::<(), _>("down") };
/// assert_eq!(policy.run(down).await.unwrap_err().stop(), Stop::Attempts);
/// assert_eq!(policy.run_once(down()).await.unwrap_err().stop(), Stop::NoRetry);
/// let final_one = policy.classify(|_: &Result<(), &str>| Verdict::Permanent).run(down).await.unwrap_err();
/// assert_eq!(final_one.stop(), Stop::Final);
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Stop {
    /// There is no retry step around what failed, or the call was made to run once.
    NoRetry,
    /// The verdict said that another try won't help, or a refusal or a limit was final.
    Final,
    /// `max_attempts` were made, the backoff had no further delay, or a gate refused a thousand times.
    Attempts,
    /// The next attempt would have begun after `max_elapsed`.
    Elapsed,
    /// The next attempt could not have begun, or not lasted `min_attempt`, before the deadline.
    Deadline,
    /// The retry budget was empty.
    Budget,
}

impl<E> Error<E> {
    pub(crate) fn new(cause: Cause, last: Option<E>, attempts: u32, stop: Stop) -> Self {
        Self { last, cause, policy: None, elapsed: UNKNOWN, attempts, stop }
    }

    pub(crate) fn of_policy(mut self, name: Option<&Arc<Name>>) -> Self {
        self.policy = name.cloned();
        self
    }

    pub(crate) fn with_elapsed(mut self, elapsed: Option<Duration>) -> Self {
        self.elapsed = elapsed.map_or(UNKNOWN, crate::internal::time::nanos);
        self
    }

    pub(crate) fn with_attempts(mut self, attempts: u32) -> Self {
        self.attempts = attempts;
        self
    }

    /// Which of the ways it was.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self.cause {
            Cause::Failed(_) => ErrorKind::Failed,
            Cause::Panicked(_) => ErrorKind::Panicked,
            Cause::TimedOut { .. } => ErrorKind::TimedOut,
            Cause::Refused(_) => ErrorKind::Refused,
            Cause::Cancelled(_) => ErrorKind::Cancelled,
        }
    }

    /// Whether a time limit passed, the policy's or the caller's.
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        self.kind() == ErrorKind::TimedOut
    }

    /// Whether a gate did not let the call in.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        self.kind() == ErrorKind::Refused
    }

    /// Whether the call was cancelled; [`cancel_reason`](Error::cancel_reason) says why.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.kind() == ErrorKind::Cancelled
    }

    /// The message of the panic, if that is how the call ended.
    #[must_use]
    pub fn panic_message(&self) -> Option<&str> {
        match &self.cause {
            Cause::Panicked(message) => Some(message),
            _ => None,
        }
    }

    /// The time limit that passed, if that is how the call ended.
    #[must_use]
    pub fn limit(&self) -> Option<Limit> {
        match &self.cause {
            Cause::TimedOut { limit, .. } => Some(*limit),
            _ => None,
        }
    }

    /// Who refused and why, if that is how the call ended.
    ///
    /// ```
    /// # use resile::{Policy, Reason, Semaphore};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let db = Semaphore::permits(1).named("db").build()?;
    /// let policy = Policy::named("users").gate(db.clone()).build()?;
    /// let _held = db.try_acquire()?;
    /// let error = policy.call().no_wait().run(|| async { Ok::<_, &str>(42) }).await.unwrap_err();
    /// let refusal = error.refusal().unwrap();
    /// assert_eq!((refusal.gate(), refusal.reason()), ("db", Reason::Busy));
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn refusal(&self) -> Option<&Refusal> {
        match &self.cause {
            Cause::Refused(refusal) => Some(refusal),
            _ => None,
        }
    }

    /// Why the call was cancelled, if that is how it ended: [`CancelReason::Unspecified`] if nobody said.
    #[must_use]
    pub fn cancel_reason(&self) -> Option<&CancelReason> {
        match &self.cause {
            Cause::Cancelled(reason) => Some(reason),
            _ => None,
        }
    }

    /// How long to wait before another call makes sense: the refusing gate's advice, or the peer's hint.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{Policy, TokenBucket, Verdict};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let bucket = TokenBucket::per_second(10).burst(1).build()?;
    /// let policy = Policy::named("users").gate(bucket).build()?;
    /// let judged = policy.classify(|_: &Result<(), &str>| Verdict::Overloaded(Some(Duration::from_secs(5))));
    /// let error = judged.run(|| async { Err("full") }).await.unwrap_err();
    /// assert_eq!(error.retry_after(), Some(Duration::from_secs(5)), "what the peer said");
    /// let error = judged.call().no_wait().run(|| async { Err("full") }).await.unwrap_err();
    /// assert_eq!(error.retry_after(), Some(Duration::from_millis(100)), "what the bucket said");
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        match &self.cause {
            Cause::Refused(refusal) => refusal.retry_after(),
            Cause::Failed(verdict) => verdict.hint(),
            _ => None,
        }
    }

    /// How many times the operation was started.
    ///
    /// ```
    /// # use resile::{Policy, Semaphore};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let closed = Semaphore::permits(1).build()?;
    /// closed.close();
    /// let policy = Policy::named("users").gate(closed).build()?;
    /// let error = policy.run(|| async { Ok::<_, &str>(42) }).await.unwrap_err();
    /// assert_eq!(error.attempts(), 0, "it was never begun, so it can safely be done elsewhere");
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    /// How long the call lasted, from its first poll; `None` if no step of the policy reads the clock then. Timeouts do,
    /// and most gates; a semaphore does not, nor does a retry that limits no time.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::Policy;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let timed = Policy::named("timed").timeout(Duration::from_secs(2)).build()?;
    /// let error = timed.run(|| std::future::pending::<Result<(), &str>>()).await.unwrap_err();
    /// assert_eq!(error.elapsed(), Some(Duration::from_secs(2)));
    /// let bare = Policy::named("bare").build()?;
    /// assert_eq!(bare.run(|| async { Err::<(), _>("no") }).await.unwrap_err().elapsed(), None);
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn elapsed(&self) -> Option<Duration> {
        known(self.elapsed)
    }

    /// The name of the policy; empty if it has none, or if no policy was there.
    #[must_use]
    pub fn policy(&self) -> &str {
        self.policy.as_ref().map_or("", |name| name.as_str())
    }

    /// Why there was no further attempt.
    #[must_use]
    pub fn stop(&self) -> Stop {
        self.stop
    }

    /// Whether an empty retry budget is what kept the call from being tried again.
    #[must_use]
    pub fn budget_exhausted(&self) -> bool {
        self.stop == Stop::Budget
    }

    /// The operation's last error. Also there when a later attempt timed out, was refused or was cancelled.
    ///
    /// If the operation is itself a call under a policy, and a limit of the outer policy cuts it between two attempts, its
    /// last error is lost: the outer call drops the inner future without a result. Give the inner policy a limit of its
    /// own to keep it.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{Policy, Retry};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let policy = Policy::named("users").timeout(Duration::from_secs(1)).retry(Retry::immediate()).build()?;
    /// let error = policy
    ///     .run_with(|call| async move {
    ///         if call.is_retry() { std::future::pending().await } else { Err::<(), _>("reset") }
    ///     })
    ///     .await
    ///     .unwrap_err();
    /// assert!(error.is_timeout());
    /// assert_eq!(error.last(), Some(&"reset"), "of the first attempt");
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn last(&self) -> Option<&E> {
        self.last.as_ref()
    }

    /// Gives the operation's last error back.
    ///
    /// ```
    /// # use resile::Policy;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let policy = Policy::named("config").build()?;
    /// let error = policy.run(|| async { "many".parse::<u32>() }).await.unwrap_err();
    /// let inner: Option<std::num::ParseIntError> = error.into_inner();
    /// assert_eq!(inner.unwrap().to_string(), "invalid digit found in string");
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn into_inner(self) -> Option<E> {
        self.last
    }

    /// Changes the operation's error and keeps all the rest.
    ///
    /// ```
    /// # use resile::{ErrorKind, Policy};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let policy = Policy::named("users").build()?;
    /// let error = policy.run(|| async { Err::<(), _>("down") }).await.unwrap_err().map(std::io::Error::other);
    /// assert_eq!((error.kind(), error.attempts()), (ErrorKind::Failed, 1));
    /// assert_eq!(error.last().unwrap().to_string(), "down");
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn map<F>(self, f: impl FnOnce(E) -> F) -> Error<F> {
        Error {
            last: self.last.map(f),
            cause: self.cause,
            policy: self.policy,
            elapsed: self.elapsed,
            attempts: self.attempts,
            stop: self.stop,
        }
    }

    /// Makes an error of any `E` that can be boxed, such as `anyhow::Error` or `Box<dyn Error + Send + Sync>`, which
    /// are not errors themselves.
    ///
    /// ```
    /// use resile::{Error, Policy};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// async fn load(policy: &Policy) -> anyhow::Result<u32> {
    ///     Ok(policy.run(|| async { anyhow::bail!("no such table") }).await.map_err(Error::erase)?)
    /// }
    ///
    /// let policy = Policy::named("db").build().unwrap();
    /// let error = load(&policy).await.unwrap_err();
    /// assert_eq!(error.root_cause().to_string(), "no such table");
    /// # }
    /// ```
    #[must_use]
    pub fn erase(self) -> Error<Erased>
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        self.map(|error| Erased(error.into()))
    }
}

impl<E> Error<Error<E>> {
    /// Makes one error of two, for an operation that ends in an [`Error`] itself: what an inner policy or an
    /// [offloaded](crate::blocking) job ended in, if that is why the call failed, and otherwise what ended the call.
    /// Attempts, time and [`Stop`] are the outer call's. If the inner one had not begun its operation, as in a queue, the
    /// last attempt does not count.
    ///
    /// ```
    /// use resile::{ErrorKind, Policy, Reason, Semaphore};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let full = Semaphore::permits(1).max_queue(0).build()?;
    /// let inner = Policy::named("inner").gate(full.clone()).build()?;
    /// let outer = Policy::named("outer").build()?;
    ///
    /// let _held = full.try_acquire()?;
    /// let error = outer.run(|| inner.run(|| async { Ok::<_, std::io::Error>(42) })).await.unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::Failed);
    /// let error = error.flatten();
    /// assert_eq!(error.refusal().unwrap().reason(), Reason::QueueFull);
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn flatten(self) -> Error<E> {
        let Self { last, cause, policy, elapsed, attempts, stop } = self;
        match (cause, last) {
            (Cause::Failed(_), Some(inner)) => {
                let attempts = if inner.attempts == 0 { attempts.saturating_sub(1) } else { attempts };
                let policy = inner.policy.clone().or(policy);
                Error { policy, elapsed, attempts, stop, ..inner }
            }
            (cause, inner) => {
                Error { last: inner.and_then(|inner| inner.last), cause, policy, elapsed, attempts, stop }
            }
        }
    }
}

fn known(nanos: u64) -> Option<Duration> {
    (nanos != UNKNOWN).then_some(Duration::from_nanos(nanos))
}

impl<E: fmt::Debug> fmt::Debug for Error<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Error")
            .field("cause", &self.cause)
            .field("last", &self.last)
            .field("attempts", &self.attempts)
            .field("elapsed", &self.elapsed())
            .field("stop", &self.stop)
            .finish_non_exhaustive()
    }
}

impl<E: std::error::Error + 'static> std::error::Error for Error<E> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.last.as_ref().map(|error| error as _)
    }
}

/// A boxed error that is an error itself, as [`Error::erase`] makes it.
#[derive(Debug)]
pub struct Erased(Box<dyn std::error::Error + Send + Sync>);

impl Erased {
    /// The boxed error.
    ///
    /// With the type that it had:
    ///
    /// ```
    /// # use resile::{Error, Policy};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let policy = Policy::named("config").build()?;
    /// let error = policy.run(|| async { "many".parse::<u32>() }).await.map_err(Error::erase).unwrap_err();
    /// let inner = error.into_inner().unwrap().into_inner();
    /// assert!(inner.downcast::<std::num::ParseIntError>().is_ok());
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn into_inner(self) -> Box<dyn std::error::Error + Send + Sync> {
        self.0
    }
}

impl fmt::Display for Erased {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl std::error::Error for Erased {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source()
    }
}
