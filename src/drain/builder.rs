//! [`DrainBuilder`]: the settings of a drain.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use super::closing::State;
use super::names::Names;
use super::{Drain, Shared};
use crate::error::{ConfigError, Faults, Name};
use crate::gate::IntoGate;
use crate::internal::sync::{AtomicU64, Mutex};
use crate::internal::time::nanos;

/// How long those are waited for that were told to stop.
///
/// Enough for a rollback or the last words of a protocol. With the 20 s of grace that fit most services it ends before
/// the 30 s after which Kubernetes kills.
const DEFAULT_CANCEL_WAIT: Duration = Duration::from_secs(5);

pub(super) const LONGEST_CANCEL_WAIT: Duration = Duration::from_secs(24 * 60 * 60);

/// How many names are kept: half a megabyte when full, and more lines than anybody reads.
const DEFAULT_MAX_NAMES: u32 = 4_096;

const MOST_NAMES: u32 = 1 << 20;

/// Settings of a [`Drain`].
#[derive(Clone, Debug)]
#[must_use = "a builder does nothing until it is built"]
pub struct DrainBuilder {
    cancel_wait: Duration,
    max_names: u32,
    name: Name,
}

impl DrainBuilder {
    pub(super) const fn new() -> Self {
        Self { cancel_wait: DEFAULT_CANCEL_WAIT, max_names: DEFAULT_MAX_NAMES, name: Name::Static("drain") }
    }

    /// How long those are waited for that did not end within the grace and were told to stop: 5 s by default, at most a
    /// day. With zero nobody is.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::Drain;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let drain = Drain::builder().cancel_wait(Duration::from_secs(2)).build()?;
    /// let _forgotten = drain.track("reindex")?;
    /// let report = drain.close(Duration::from_secs(20)).await;
    /// assert_eq!((report.still_in(), report.took()), (1, Duration::from_secs(22)));
    /// # Ok(()) }
    /// ```
    pub const fn cancel_wait(mut self, wait: Duration) -> Self {
        self.cancel_wait = wait;
        self
    }

    /// How many names are kept at once: 4,096 by default, at most 1,048,576.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::Drain;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let drain = Drain::builder().max_names(1).build()?;
    /// let _places = (drain.track("first")?, drain.track("second")?);
    /// let report = drain.close(Duration::ZERO).await;
    /// assert_eq!((report.still_in(), report.stuck().len(), report.unnamed()), (2, 1, 1));
    /// # Ok(()) }
    /// ```
    pub const fn max_names(mut self, names: u32) -> Self {
        self.max_names = names;
        self
    }

    /// The name that refusals carry: `drain` by default.
    pub fn named(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.name = Name::from(name.into());
        self
    }

    /// The drain.
    ///
    /// # Errors
    ///
    /// A `cancel_wait` above a day, or more than 1,048,576 names.
    pub fn build(self) -> Result<Drain, ConfigError> {
        let mut faults = Faults::of("drain");
        faults.check(self.cancel_wait <= LONGEST_CANCEL_WAIT, "cancel_wait", &self.cancel_wait, "0 to 24h");
        faults.check(self.max_names <= MOST_NAMES, "max_names", &self.max_names, "0 to 1048576");
        faults.into_result()?;
        Ok(self.into_drain())
    }

    pub(super) fn into_drain(self) -> Drain {
        Drain(Arc::new(Shared {
            word: AtomicU64::new(0),
            state: Mutex::new(State::new()),
            names: Mutex::new(Names::new(self.max_names)),
            cancel_wait: nanos(self.cancel_wait),
            name: self.name,
        }))
    }
}

impl IntoGate for DrainBuilder {
    type Gate = Drain;

    fn into_gate(self) -> Result<Drain, ConfigError> {
        self.build()
    }
}
