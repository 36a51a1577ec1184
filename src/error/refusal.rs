//! [`Refusal`]: a gate's no.

use std::borrow::Cow;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use super::{UNKNOWN, known};

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

impl Reason {
    /// Whether the same call would be refused for ever: coming back is no use, to this gate or with these arguments.
    ///
    /// A retry that comes [back after refusals](crate::OnRefusal::Retry) treats these as final.
    ///
    /// ```
    /// # use resile::Reason;
    /// assert!(Reason::NoKey("tenant").is_permanent() && Reason::Draining.is_permanent());
    /// assert!(!Reason::CircuitOpen.is_permanent());
    /// ```
    #[must_use]
    pub const fn is_permanent(self) -> bool {
        match self {
            Self::CostAboveLimit { .. } | Self::ZeroCost | Self::NoKey(_) | Self::Closed | Self::Draining => true,
            Self::Busy
            | Self::QueueFull
            | Self::QueueTimeout
            | Self::TooLate
            | Self::CircuitOpen
            | Self::Probing
            | Self::ForcedOpen
            | Self::KeySpaceFull
            | Self::Other(_) => false,
        }
    }
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
    ///
    /// What a web service would say in a header:
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{Reason, Refusal};
    /// let refusal = Refusal::new("quota", Reason::Other("used up")).after(Duration::from_millis(1500));
    /// let header = refusal.retry_after().map(|wait| wait.as_secs_f64().ceil());
    /// assert_eq!(header, Some(2.0));
    /// assert_eq!(Refusal::new("gate", Reason::Closed).retry_after(), None);
    /// ```
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
