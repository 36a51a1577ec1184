//! [`ConfigError`]: wrong settings, all at once.

use std::borrow::Cow;
use std::fmt;

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
///     "policy users: step 1 (retry): max_attempts must be 1 to 1000, is 0"
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
///
/// ```
/// # use resile::Semaphore;
/// let error = Semaphore::permits(0).build().unwrap_err();
/// let fault = &error.faults()[0];
/// assert_eq!((fault.place(), fault.field(), fault.value()), ("semaphore", "permits", "0"));
/// assert_eq!(fault.allowed(), "1 to 2147483647");
/// ```
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
        write!(f, "{}: {} must be {}, is {}", self.place, self.field, self.allowed, self.value)
    }
}

/// Collects faults while something is checked, so that all are told at once.
#[derive(Clone, Debug)]
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

    /// Takes over the faults of a part, told under its place in the whole: `place` makes that of its own place and the
    /// one in the part.
    pub(crate) fn absorb(&mut self, place: impl Fn(&str, &str) -> String, part: ConfigError) {
        let own = &self.place;
        let told = |fault: Fault| Fault { place: place(own, &fault.place), ..fault };
        self.faults.extend(part.faults.into_iter().map(told));
    }

    pub(crate) fn into_result(self) -> Result<(), ConfigError> {
        if self.faults.is_empty() { Ok(()) } else { Err(ConfigError { faults: self.faults }) }
    }
}
