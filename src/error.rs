//! What a call can end in: [`Error`], the [`Refusal`] of a gate, and the [`ConfigError`] of a wrong setting.

use std::borrow::Cow;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use crate::cancel::CancelReason;

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
/// assert_eq!(error.to_string(), "timed out in attempt 1: the limit of 10ms at step 1 passed");
/// # Ok(()) }
/// ```
pub struct Error<E> {
    last: Option<E>,
    cause: Cause,
    hint: u64,
    elapsed: u64,
    attempts: u32,
    stop: Stop,
}

/// What ended the call, with its particulars.
#[derive(Clone, Debug)]
pub(crate) enum Cause {
    Failed,
    /// With the message of the panic.
    Panicked(Arc<str>),
    TimedOut(Limit),
    Refused(Refusal),
    Cancelled(CancelReason),
}

/// The ways a call can fail.
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
            Self::Step { step, limit } => write!(f, "the limit of {limit:?} at step {step}"),
            Self::Caller => f.write_str("the caller's deadline"),
            Self::Context => f.write_str("the deadline of the request"),
        }
    }
}

/// Why there was no further attempt.
///
/// It is told where there is an error to tell it: when attempts end on an `Ok` that was judged bad, the caller gets that
/// `Ok` and nothing else.
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
        Self { last, cause, hint: UNKNOWN, elapsed: UNKNOWN, attempts, stop }
    }

    pub(crate) fn with_hint(mut self, hint: Option<Duration>) -> Self {
        self.hint = hint.map_or(UNKNOWN, crate::internal::time::nanos);
        self
    }

    pub(crate) fn with_elapsed(mut self, elapsed: Option<Duration>) -> Self {
        self.elapsed = elapsed.map_or(UNKNOWN, crate::internal::time::nanos);
        self
    }

    /// Which of the ways it was.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self.cause {
            Cause::Failed => ErrorKind::Failed,
            Cause::Panicked(_) => ErrorKind::Panicked,
            Cause::TimedOut(_) => ErrorKind::TimedOut,
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
            Cause::TimedOut(limit) => Some(*limit),
            _ => None,
        }
    }

    /// Who refused and why, if that is how the call ended.
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
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        match &self.cause {
            Cause::Refused(refusal) => refusal.retry_after(),
            _ => known(self.hint),
        }
    }

    /// How many times the operation was started.
    #[must_use]
    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    /// How long the call lasted, from its first poll; `None` if no step of the policy reads the clock.
    #[must_use]
    pub fn elapsed(&self) -> Option<Duration> {
        known(self.elapsed)
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
    #[must_use]
    pub fn last(&self) -> Option<&E> {
        self.last.as_ref()
    }

    /// Gives the operation's last error back.
    #[must_use]
    pub fn into_inner(self) -> Option<E> {
        self.last
    }

    /// Changes the operation's error and keeps all the rest.
    #[must_use]
    pub fn map<F>(self, f: impl FnOnce(E) -> F) -> Error<F> {
        Error {
            last: self.last.map(f),
            cause: self.cause,
            hint: self.hint,
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
    /// Attempts, time and [`Stop`] are the outer call's.
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
        let Self { last, cause, hint, elapsed, attempts, stop } = self;
        match (cause, last) {
            (Cause::Failed, Some(inner)) => Error { elapsed, attempts, stop, ..inner },
            (cause, inner) => Error { last: inner.and_then(|inner| inner.last), cause, hint, elapsed, attempts, stop },
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

/// Says what happened to the call; what happened to the operation is for [`source`](std::error::Error::source).
impl<E> fmt::Display for Error<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let attempts = self.attempts;
        match &self.cause {
            Cause::Failed => {
                write!(f, "the operation failed in attempt {attempts}")?;
                f.write_str(match self.stop {
                    Stop::NoRetry | Stop::Final => "",
                    Stop::Attempts => ", the last one allowed",
                    Stop::Elapsed => " and the time for retries is used up",
                    Stop::Deadline => " and no further one fits before the deadline",
                    Stop::Budget => " and the retry budget is empty",
                })
            }
            Cause::Panicked(message) => write!(f, "the operation panicked in attempt {attempts}: {message}"),
            Cause::TimedOut(limit) if attempts == 0 => write!(f, "timed out before the first attempt: {limit} passed"),
            Cause::TimedOut(limit) => write!(f, "timed out in attempt {attempts}: {limit} passed"),
            Cause::Refused(refusal) => fmt::Display::fmt(refusal, f),
            Cause::Cancelled(CancelReason::Unspecified) => f.write_str("cancelled"),
            Cause::Cancelled(reason) => write!(f, "cancelled: {reason}"),
        }
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

/// The name of a gate or a policy: cheap to clone, since refusals carry it.
#[derive(Clone, Eq)]
pub(crate) enum Name {
    Static(&'static str),
    Shared(Arc<str>),
}

impl Name {
    pub(crate) fn as_str(&self) -> &str {
        match self {
            Self::Static(name) => name,
            Self::Shared(name) => name,
        }
    }
}

impl Hash for Name {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.as_str().hash(state);
    }
}

/// By what it says, wherever that lies.
impl PartialEq for Name {
    fn eq(&self, other: &Self) -> bool {
        self.as_str() == other.as_str()
    }
}

impl From<Cow<'static, str>> for Name {
    fn from(name: Cow<'static, str>) -> Self {
        match name {
            Cow::Borrowed(name) => Self::Static(name),
            Cow::Owned(name) => Self::Shared(name.into()),
        }
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

/// A gate's no: who refused, why, and when to come back.
///
/// ```
/// use resile::{Reason, Semaphore};
///
/// let semaphore = Semaphore::permits(1).named("db").build()?;
/// let held = semaphore.try_acquire()?;
///
/// let refusal = semaphore.try_acquire().unwrap_err();
/// assert_eq!(refusal.gate(), "db");
/// assert_eq!(refusal.reason(), Reason::Busy);
/// assert_eq!(refusal.retry_after(), None, "nobody knows when a permit comes back");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    gate: Name,
    reason: Reason,
    after: u64,
}

/// Why a gate refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// Nothing is free now, and the caller did not want to wait.
    Busy,
    /// As many callers wait as the queue may hold.
    QueueFull,
    /// The caller waited as long as the gate allows.
    QueueTimeout,
    /// It could not be served before its deadline, or within the longest wait that the gate allows.
    TooLate,
    /// The call costs more than the gate ever has at once: waiting won't help.
    CostAboveLimit {
        /// What the call costs.
        cost: u32,
        /// The most that can be had at once.
        limit: u32,
    },
    /// The call costs nothing, which a limiter does not let by uncharged.
    ZeroCost,
    /// The circuit is open.
    CircuitOpen,
    /// The circuit is half open, and all its probes are on their way.
    Probing,
    /// The circuit is held open by hand.
    ForcedOpen,
    /// The gate was closed for good.
    Closed,
    /// Every entry of a table of keys is in use, and the call's key has none.
    KeySpaceFull,
    /// The gate works by this key, and the call has none of that name.
    NoKey(&'static str),
    /// The service takes no more work: it is shutting down.
    Draining,
    /// A reason of a gate of your own.
    Other(&'static str),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Busy => "nothing is free now",
            Self::QueueFull => "the queue is full",
            Self::QueueTimeout => "the longest wait is over",
            Self::TooLate => "it could not be served in time",
            Self::CostAboveLimit { cost, limit } => return write!(f, "a cost of {cost} is above the limit of {limit}"),
            Self::ZeroCost => "a call that costs nothing can't be charged",
            Self::CircuitOpen => "the circuit is open",
            Self::Probing => "the circuit is half open and its probes are on their way",
            Self::ForcedOpen => "the circuit is held open",
            Self::Closed => "it is closed",
            Self::KeySpaceFull => "there is no room for another key",
            Self::NoKey(key) => return write!(f, "the call has no key {key:?}"),
            Self::Draining => "it takes no more work",
            Self::Other(reason) => reason,
        })
    }
}

impl Refusal {
    /// A refusal by a gate of your own, named for those who read the error.
    ///
    /// ```
    /// use std::time::Duration;
    /// use resile::{Reason, Refusal};
    ///
    /// let refusal = Refusal::new("maintenance", Reason::Other("back at noon")).after(Duration::from_secs(60));
    /// assert_eq!(refusal.to_string(), "refused by maintenance: back at noon, try again in 60s");
    /// ```
    #[must_use]
    pub fn new(gate: impl Into<Cow<'static, str>>, reason: Reason) -> Self {
        Self::by(Name::from(gate.into()), reason)
    }

    pub(crate) const fn by(gate: Name, reason: Reason) -> Self {
        Self { gate, reason, after: UNKNOWN }
    }

    /// The same in another name.
    pub(crate) fn in_name_of(self, gate: &Name) -> Self {
        Self { gate: gate.clone(), ..self }
    }

    /// The same with another advice when to come back, or none.
    pub(crate) fn coming_after(self, wait: Option<Duration>) -> Self {
        let without = Self { after: UNKNOWN, ..self };
        match wait {
            Some(wait) => without.after(wait),
            None => without,
        }
    }

    /// The same with an advice when to come back.
    #[must_use]
    pub const fn after(mut self, wait: Duration) -> Self {
        self.after = crate::internal::time::nanos(wait);
        self
    }

    /// The name of the gate that refused.
    #[must_use]
    pub fn gate(&self) -> &str {
        self.gate.as_str()
    }

    /// Why it refused.
    #[must_use]
    pub fn reason(&self) -> Reason {
        self.reason
    }

    /// How long to wait before it makes sense to come back; `None` if nobody knows, or if it never will.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        known(self.after)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "refused by {}: {}", self.gate(), self.reason)?;
        match self.retry_after() {
            Some(after) => write!(f, ", try again in {after:?}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Refusal {}

/// Every wrong setting of what was built, each with its field, its value and the allowed range.
///
/// ```
/// use std::time::Duration;
/// use resile::{Policy, Retry, Semaphore};
///
/// let error = Policy::named("users")
///     .retry(Retry::exponential(Duration::from_millis(50)).max_attempts(0))
///     .gate(Semaphore::permits(0))
///     .build()
///     .unwrap_err();
/// assert_eq!(error.faults().len(), 2);
/// assert_eq!(
///     error.faults()[0].to_string(),
///     "policy users: step 1 (retry): max_attempts is 0, allowed is 1 to 1000"
/// );
/// ```
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.list())]
pub struct ConfigError {
    faults: Vec<Fault>,
}

impl ConfigError {
    /// All faults, in the order of the steps.
    #[must_use]
    pub fn faults(&self) -> &[Fault] {
        &self.faults
    }

    fn list(&self) -> String {
        self.faults.iter().map(Fault::to_string).collect::<Vec<_>>().join("; ")
    }
}

/// One wrong setting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    place: String,
    field: &'static str,
    value: String,
    allowed: Cow<'static, str>,
}

impl Fault {
    /// What was being built, such as `policy users: step 1 (retry)`.
    #[must_use]
    pub fn place(&self) -> &str {
        &self.place
    }

    /// The setting.
    #[must_use]
    pub fn field(&self) -> &str {
        self.field
    }

    /// The value that it was given.
    #[must_use]
    pub fn value(&self) -> &str {
        &self.value
    }

    /// What would be allowed.
    #[must_use]
    pub fn allowed(&self) -> &str {
        &self.allowed
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} is {}, allowed is {}", self.place, self.field, self.value, self.allowed)
    }
}

/// Collects faults while something is checked, so that all are told at once.
#[derive(Debug)]
pub(crate) struct Faults {
    place: Cow<'static, str>,
    faults: Vec<Fault>,
}

impl Faults {
    pub(crate) fn of(place: impl Into<Cow<'static, str>>) -> Self {
        Self { place: place.into(), faults: Vec::new() }
    }

    pub(crate) const fn at(place: &'static str) -> Self {
        Self { place: Cow::Borrowed(place), faults: Vec::new() }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.faults.is_empty()
    }

    /// Notes a fault unless `fine`, which is to be a condition that is true for good values: a NaN makes it false.
    pub(crate) fn check(
        &mut self,
        fine: bool,
        field: &'static str,
        value: &dyn fmt::Debug,
        allowed: impl Into<Cow<'static, str>>,
    ) {
        if !fine {
            let value = format!("{value:?}");
            self.faults.push(Fault { place: self.place.clone().into_owned(), field, value, allowed: allowed.into() });
        }
    }

    /// Takes over the faults of a part, told under its own place in the whole.
    pub(crate) fn absorb(&mut self, place: &str, part: ConfigError) {
        let place = format!("{}: {place}", self.place);
        self.faults.extend(part.faults.into_iter().map(|fault| Fault { place: place.clone(), ..fault }));
    }

    pub(crate) fn into_result(self) -> Result<(), ConfigError> {
        if self.faults.is_empty() { Ok(()) } else { Err(ConfigError { faults: self.faults }) }
    }
}
