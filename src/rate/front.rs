//! What the front door tells its callers: [`Snapshot`], and the [`LimitFields`] made of it or of a refusal.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use crate::error::{Name, Reason, Refusal};

/// The largest integer that a structured field can hold.
const LARGEST: u64 = 999_999_999_999_999;

/// A limiter at one moment: the limit, what remains of it, and when there is more.
///
/// ```
/// use std::time::Duration;
/// use resile::TokenBucket;
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let bucket = TokenBucket::per_second(2).burst(10).build()?;
/// bucket.try_take(9)?;
/// let seen = bucket.snapshot();
/// assert_eq!((seen.limit(), seen.remaining()), (10, 1));
/// assert_eq!((seen.reset(), seen.retry_after()), (Duration::from_millis(500), Some(Duration::ZERO)));
///
/// bucket.try_take(1)?;
/// assert_eq!(bucket.snapshot().retry_after(), Some(Duration::from_millis(500)));
/// # Ok(()) }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    pub(super) name: Name,
    pub(super) limit: u64,
    pub(super) remaining: u64,
    pub(super) window: Duration,
    pub(super) reset: Duration,
    pub(super) retry_after: Option<Duration>,
}

impl Snapshot {
    /// The limiter's name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.name.as_str()
    }

    /// How many can go at once after a long idle time: the burst of a bucket, the limit of a window. What a quota carries
    /// over is not in it, but in what remains.
    #[must_use]
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// How many are there for a newcomer: none while others wait.
    #[must_use]
    pub fn remaining(&self) -> u64 {
        self.remaining
    }

    /// How long the limit holds for: the length of the window, or the time in which an empty bucket fills.
    #[must_use]
    pub fn window(&self) -> Duration {
        self.window
    }

    /// How long it takes until more than what remains can have gone: with nothing left, until the next one can go.
    /// Zero only if a head of the queue is due that has not come yet.
    #[must_use]
    pub fn reset(&self) -> Duration {
        self.reset
    }

    /// How long a newcomer who needs one has to wait: zero if one is there, `None` if nobody knows.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        self.retry_after
    }

    /// The fields to send with an answer.
    #[must_use]
    pub fn fields(&self) -> LimitFields {
        LimitFields::from(self)
    }
}

/// What a server tells its client about a limit, as the values of HTTP fields.
///
/// The names are those of draft-ietf-httpapi-ratelimit-headers-11; writing them into a response is the caller's part.
/// Times are rounded up and counts down, so waiting the told time always suffices, and who keeps to what is told is
/// never refused by the limit it is told of. Numbers above 10<sup>15</sup> - 1, the largest that such a field can hold,
/// are told as that; characters that it cannot hold stand as `?`.
///
/// From a [`Snapshot`] come all fields, with `Retry-After` only if nothing remains; [`refused`](Self::refused) adds
/// what a refusal says. A refusal alone knows no policy. Whose limit it is, is told only if
/// [`partitioned`](Self::partitioned) says so: the key of a limiter never gets into a field by itself.
///
/// ```
/// use resile::TokenBucket;
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let bucket = TokenBucket::per_second(2).burst(9).named("search").build()?;
/// bucket.try_take(8)?;
/// let fields = bucket.snapshot().fields();
/// assert_eq!(fields.policy.as_ref().unwrap().to_string(), r#""search";q=9;w=5"#);
/// assert_eq!(fields.service.as_ref().unwrap().to_string(), r#""search";r=1;t=1"#);
/// assert!(fields.retry_after.is_none());
///
/// let refusal = bucket.try_take(4).unwrap_err();   // there in one and a half seconds
/// let fields = fields.refused(&refusal);
/// assert_eq!(fields.retry_after.unwrap().to_string(), "2");
/// # Ok(()) }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LimitFields {
    /// The value of `RateLimit-Policy`: what is allowed.
    pub policy: Option<QuotaPolicy>,
    /// The value of `RateLimit`: what is left of it.
    pub service: Option<ServiceLimit>,
    /// The value of `Retry-After`.
    pub retry_after: Option<RetryAfter>,
}

/// One item of a `RateLimit-Policy` field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuotaPolicy {
    /// The name that the items of both fields share.
    pub name: Cow<'static, str>,
    /// `q`: how much is allowed in a window.
    pub quota: u64,
    /// `w`: the length of the window in seconds, at least 1.
    pub window: u64,
    /// `qu`: what is counted, requests by default; the draft also knows `content-bytes`.
    pub unit: Option<Cow<'static, str>>,
    /// `pk`: whose quota it is, in any bytes.
    pub partition: Option<Cow<'static, [u8]>>,
}

/// One item of a `RateLimit` field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceLimit {
    /// The name that the items of both fields share.
    pub name: Cow<'static, str>,
    /// `r`: how much is left.
    pub remaining: u64,
    /// `t`: for how many seconds no more than that can be used.
    pub reset: Option<u64>,
    /// `pk`: whose it is, in any bytes.
    pub partition: Option<Cow<'static, [u8]>>,
}

/// The value of a `Retry-After` field: so many seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RetryAfter(pub u64);

impl RetryAfter {
    /// The next whole second.
    #[must_use]
    pub const fn from_wait(wait: Duration) -> Self {
        Self(seconds(wait))
    }
}

const fn seconds(time: Duration) -> u64 {
    time.as_secs().saturating_add((time.subsec_nanos() > 0) as u64)
}

fn shared(name: &Name) -> Cow<'static, str> {
    match name {
        Name::Static(name) => Cow::Borrowed(name),
        Name::Shared(name) => Cow::Owned(String::from(&**name)),
    }
}

impl LimitFields {
    /// Adds what a refusal says. The time is never before that at which more can be had at all.
    #[must_use]
    pub fn refused(mut self, refusal: &Refusal) -> Self {
        let reset = self.service.as_ref().and_then(|service| service.reset).unwrap_or(0);
        // A limiter in another has a name of its own; its client knows it by that which refused.
        let name = || Cow::Owned(refusal.gate().to_owned());
        self.policy.iter_mut().for_each(|policy| policy.name = name());
        self.service.iter_mut().for_each(|service| service.name = name());
        self.retry_after = refusal.retry_after().map(|after| RetryAfter(seconds(after).max(reset)));
        self
    }

    /// Says in both items whose limit it is, for a client that has several of one name. Clients and whoever stands between
    /// can read it: say what they may know, such as a public name or a hash with a secret, never a credential.
    ///
    /// ```
    /// use resile::TokenBucket;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let bucket = TokenBucket::per_second(2).burst(9).named("search").build()?;
    /// let fields = bucket.snapshot().fields().partitioned(b"trial121323");
    /// assert_eq!(fields.policy.unwrap().to_string(), r#""search";q=9;w=5;pk=:dHJpYWwxMjEzMjM=:"#);
    /// assert_eq!(fields.service.unwrap().to_string(), r#""search";r=9;t=1;pk=:dHJpYWwxMjEzMjM=:"#);
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn partitioned(mut self, key: impl Into<Vec<u8>>) -> Self {
        let key: Cow<'static, [u8]> = Cow::Owned(key.into());
        if let Some(policy) = &mut self.policy {
            policy.partition = Some(key.clone());
        }
        if let Some(service) = &mut self.service {
            service.partition = Some(key);
        }
        self
    }
}

impl From<&Snapshot> for LimitFields {
    fn from(seen: &Snapshot) -> Self {
        let name = shared(&seen.name);
        // A field counts in whole seconds: of a shorter window it tells how much fits into one.
        let second = u128::from(crate::internal::time::nanos(Duration::from_secs(1)));
        let (window, quota) = match seen.window.as_nanos() {
            0 => (1, seen.limit),
            short if short < second => (1, u64::try_from(u128::from(seen.limit) * second / short).unwrap_or(u64::MAX)),
            _ => (seconds(seen.window), seen.limit),
        };
        let retry_after = if seen.remaining > 0 { None } else { seen.retry_after.map(RetryAfter::from_wait) };
        Self {
            policy: Some(QuotaPolicy { name: name.clone(), quota, window, unit: None, partition: None }),
            service: Some(ServiceLimit {
                name,
                remaining: seen.remaining,
                reset: Some(seconds(seen.reset)),
                partition: None,
            }),
            retry_after,
        }
    }
}

impl From<&Refusal> for LimitFields {
    fn from(refusal: &Refusal) -> Self {
        let retry_after = refusal.retry_after().map(RetryAfter::from_wait);
        let reset = retry_after.map(|after| after.0);
        // That nothing is left is known only where it is so for every request, whatever it costs.
        let is_used_up = match refusal.reason() {
            Reason::CostAboveLimit { .. } | Reason::ZeroCost | Reason::NoKey(_) | Reason::TooLate => false,
            _ => !refusal.is_rate_limited(),
        };
        let name = || Cow::Owned(refusal.gate().to_owned());
        let service = is_used_up.then(|| ServiceLimit { name: name(), remaining: 0, reset, partition: None });
        Self { policy: None, service, retry_after }
    }
}

impl fmt::Display for QuotaPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{};q={}", Quoted(&self.name), self.quota.min(LARGEST))?;
        if let Some(unit) = &self.unit {
            write!(f, ";qu={}", Quoted(unit))?;
        }
        write!(f, ";w={}", self.window.clamp(1, LARGEST))?;
        write_partition(f, self.partition.as_deref())
    }
}

impl fmt::Display for ServiceLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{};r={}", Quoted(&self.name), self.remaining.min(LARGEST))?;
        if let Some(reset) = self.reset {
            write!(f, ";t={}", reset.min(LARGEST))?;
        }
        write_partition(f, self.partition.as_deref())
    }
}

impl fmt::Display for RetryAfter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// A string as structured fields write it.
struct Quoted<'a>(&'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use fmt::Write;

        f.write_char('"')?;
        for character in self.0.chars() {
            match character {
                '"' | '\\' => write!(f, "\\{character}")?,
                ' '..='~' => f.write_char(character)?,
                _ => f.write_char('?')?,
            }
        }
        f.write_char('"')
    }
}

fn write_partition(f: &mut fmt::Formatter<'_>, key: Option<&[u8]>) -> fmt::Result {
    key.map_or(Ok(()), |key| write!(f, ";pk={}", Bytes(key)))
}

/// Bytes as structured fields write them: in base64.
struct Bytes<'a>(&'a [u8]);

impl fmt::Display for Bytes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use fmt::Write;

        const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        f.write_char(':')?;
        for bytes in self.0.chunks(3) {
            let mut three = [0; 4];
            three[1..=bytes.len()].copy_from_slice(bytes);
            let bits = u32::from_be_bytes(three);
            for place in 0..4 {
                let digit = DIGITS[(bits >> (18 - 6 * place) & 63) as usize];
                f.write_char(if place <= bytes.len() { digit.into() } else { '=' })?;
            }
        }
        f.write_char(':')
    }
}
