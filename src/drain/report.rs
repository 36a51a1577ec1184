//! What a closing came to.

use std::fmt;
use std::time::Duration;

use super::course::Account;
use super::names::{Held, whole_millis};

/// The report of [`Drain::close`](super::Drain::close): what became of everything that was in flight when it began.
///
/// The numbers are exact: `finished + cancelled + still_in` were in flight at the step that closed the drain.
///
/// ```
/// use std::time::Duration;
/// use resile::Drain;
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let drain = Drain::new();
/// let _forgotten = drain.track("reindex")?;
///
/// let report = drain.close(Duration::from_secs(20)).await;
/// assert!(!report.is_clean());
/// assert_eq!(report.stuck()[0].name(), "reindex");
/// assert_eq!(report.to_string(), "closed in 25s: 0 finished, 0 cancelled, still in: reindex ×1 for 25s");
/// # Ok(()) }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drained {
    account: Account,
    stuck: Vec<Held>,
}

impl Drained {
    pub(crate) const fn new(account: Account, stuck: Vec<Held>) -> Self {
        Self { account, stuck }
    }

    /// How many ended within the grace.
    #[must_use]
    pub fn finished(&self) -> u64 {
        self.account.finished
    }

    /// How many ended after they were told to, within [`cancel_wait`](super::DrainBuilder::cancel_wait).
    #[must_use]
    pub fn cancelled(&self) -> u64 {
        self.account.cancelled
    }

    /// How many did not end at all, named or not.
    #[must_use]
    pub fn still_in(&self) -> u64 {
        self.account.stuck
    }

    /// Those of them that have a name, one line for each name, the one first that came first.
    #[must_use]
    pub fn stuck(&self) -> &[Held] {
        &self.stuck
    }

    /// How many of those that did not end have no name.
    #[must_use]
    pub fn unnamed(&self) -> u64 {
        self.still_in() - self.stuck.iter().map(Held::count).sum::<u64>()
    }

    /// How long it took.
    #[must_use]
    pub fn took(&self) -> Duration {
        self.account.took
    }

    /// Whether all finished within the grace.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::Drain;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let drain = Drain::new();
    /// let request = drain.acquire().await?;
    /// tokio::spawn(async move {
    ///     tokio::time::sleep(Duration::from_secs(3)).await;
    ///     request.success();
    /// });
    /// let report = drain.close(Duration::from_secs(20)).await;
    /// assert!(report.is_clean());
    /// assert_eq!((report.finished(), report.took()), (1, Duration::from_secs(3)), "and no longer than it took");
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.cancelled() == 0 && self.still_in() == 0
    }
}

impl fmt::Display for Drained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let took = whole_millis(self.took());
        write!(f, "closed in {took:?}: {} finished, {} cancelled", self.finished(), self.cancelled())?;
        let mut between = ", still in: ";
        for held in &self.stuck {
            write!(f, "{between}{held}")?;
            between = ", ";
        }
        match self.unnamed() {
            0 => Ok(()),
            unnamed => write!(f, "{between}{unnamed} unnamed"),
        }
    }
}
