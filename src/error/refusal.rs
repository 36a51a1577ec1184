//! [`Refusal`]: a gate's no.

use std::borrow::Cow;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use super::time::Time;
use super::{UNKNOWN, known};
use crate::internal::time::nanos;

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

/// Compared by text.
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
    why: Why,
    after: u64,
}

/// The reason, with what only its text tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    Plain(Reason),
    /// Busy, since a rate is used up.
    Rate,
    /// The queue's longest wait is over, in nanoseconds.
    Waited(u64),
    /// The wait would be longer than this, in nanoseconds: the longest that the gate allows, or what the deadline leaves.
    TooLong {
        most: u64,
        is_deadline: bool,
    },
    /// The table of keys has this many entries, all of them busy.
    Keys(u32),
    /// Less time is left than an operation takes, in nanoseconds.
    Least {
        left: u64,
        takes: u64,
    },
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
            Self::Draining => "shutting down, no new work",
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
    /// assert_eq!(refusal.to_string(), "refused by \"maintenance\": back at noon, retry in 1m");
    /// ```
    #[must_use]
    pub fn new(gate: impl Into<Cow<'static, str>>, reason: Reason) -> Self {
        Self::by(Name::from(gate.into()), reason)
    }

    pub(crate) const fn by(gate: Name, reason: Reason) -> Self {
        Self { gate, why: Why::Plain(reason), after: UNKNOWN }
    }

    /// Says that it is a rate that is used up.
    pub(crate) fn of_rate(self) -> Self {
        match self.why {
            Why::Plain(Reason::Busy) => Self { why: Why::Rate, ..self },
            _ => self,
        }
    }

    /// Says how long a waiter may wait, or could have waited until its deadline.
    pub(crate) fn with_wait(self, most: Duration, is_deadline: bool) -> Self {
        let most = nanos(most);
        match self.why {
            Why::Plain(Reason::QueueTimeout) => Self { why: Why::Waited(most), ..self },
            Why::Plain(Reason::TooLate) => Self { why: Why::TooLong { most, is_deadline }, ..self },
            _ => self,
        }
    }

    /// Says how many keys there is room for.
    pub(crate) fn with_capacity(self, keys: u32) -> Self {
        Self { why: Why::Keys(keys), ..self }
    }

    /// An operation that would have had too little time.
    pub(crate) fn of_time(gate: &'static str, left: u64, takes: u64) -> Self {
        Self { gate: Name::Static(gate), why: Why::Least { left, takes }, after: UNKNOWN }
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
        self.after = nanos(wait);
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
        match self.why {
            Why::Plain(reason) => reason,
            Why::Rate => Reason::Busy,
            Why::Waited(_) => Reason::QueueTimeout,
            Why::TooLong { .. } | Why::Least { .. } => Reason::TooLate,
            Why::Keys(_) => Reason::KeySpaceFull,
        }
    }

    /// Whether a rate is used up: the caller comes too often, and not to a peer that has no place free. A web service
    /// answers 429 to the one and 503 to the other.
    ///
    /// ```
    /// # use resile::{Reason, Semaphore, TokenBucket};
    /// let (bucket, permits) = (TokenBucket::per_second(10).burst(1).build()?, Semaphore::permits(1).build()?);
    /// let _held = (bucket.try_take(1)?, permits.try_acquire()?);
    /// let (often, full) = (bucket.try_take(1).unwrap_err(), permits.try_acquire().unwrap_err());
    /// assert_eq!((often.reason(), full.reason()), (Reason::Busy, Reason::Busy));
    /// assert!(often.is_rate_limited() && !full.is_rate_limited());
    /// assert!(often.to_string().starts_with(r#"rate limit "bucket" exceeded, retry in "#));
    /// assert_eq!(full.to_string(), r#"no permit of "semaphore" is free"#);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn is_rate_limited(&self) -> bool {
        self.why == Why::Rate
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
        let gate = self.gate();
        let time = |nanos: u64| Time(Duration::from_nanos(nanos));
        match self.why {
            Why::Rate => write!(f, "rate limit {gate:?} exceeded")?,
            Why::Waited(most) => return write!(f, "waited {} in the queue of {gate:?}, the most allowed", time(most)),
            Why::TooLong { most, is_deadline } => {
                match self.retry_after() {
                    Some(wait) => write!(f, "would wait {} for {gate:?}, longer than ", Time(wait))?,
                    None => write!(f, "would wait too long for {gate:?}, longer than ")?,
                }
                let limit = if is_deadline { "what the deadline leaves," } else { "its max_wait" };
                return write!(f, "{limit} {}", time(most));
            }
            Why::Keys(keys) => return write!(f, "keyed {gate:?}: table full ({keys} keys busy)"),
            Why::Least { left, takes } => {
                return write!(f, "{} left, less than the {} that an attempt takes", time(left), time(takes));
            }
            Why::Plain(Reason::Busy) => write!(f, "no permit of {gate:?} is free")?,
            Why::Plain(Reason::Draining) => return Reason::Draining.fmt(f),
            Why::Plain(reason) => write!(f, "refused by {gate:?}: {reason}")?,
        }
        match self.retry_after() {
            Some(after) => write!(f, ", retry in {}", Time(after)),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Refusal {}
