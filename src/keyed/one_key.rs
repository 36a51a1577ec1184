//! [`OneKey`]: the gate of one key among many.

use std::fmt;
use std::task::Context;

use super::enter::Who;
use super::id::{Id, KeyRef};
use super::{Keyed, Limiter, PerKey};
use crate::call::Call;
use crate::error::Refusal;
use crate::gate::{Acquire, Entry, Gate, Guard, Needs, Outcome, Pass, Ticket};

/// The gate of one key; from [`Keyed::of`].
pub struct OneKey<G: PerKey> {
    keyed: Keyed<G>,
    id: Id,
    key: crate::Key,
}

impl<G: PerKey> OneKey<G> {
    pub(super) fn new(keyed: Keyed<G>, key: KeyRef<'_>) -> Self {
        Self { id: keyed.0.secret.id(key), key: key.to_key(), keyed }
    }

    /// The key.
    #[must_use]
    pub fn key(&self) -> &crate::Key {
        &self.key
    }

    /// Waits for a pass.
    ///
    /// # Errors
    ///
    /// The future resolves to the refusal of the key's gate, or of the table.
    ///
    /// # Cancel safety
    ///
    /// Dropped, it loses its place in the queue and nothing else.
    pub fn acquire(&self) -> Acquire {
        Guard::acquire(self.clone())
    }

    /// Takes a pass if that needs no waiting.
    ///
    /// # Errors
    ///
    /// The refusal of the key's gate, or of the table.
    pub fn try_acquire(&self) -> Result<Guard, Refusal> {
        Guard::try_acquire(self.clone())
    }

    /// Waits for a pass that costs so much: permits, tokens or places of a window.
    ///
    /// # Errors
    ///
    /// As [`acquire`](Self::acquire).
    ///
    /// # Cancel safety
    ///
    /// As there.
    ///
    /// ```
    /// # use resile::{Keyed, Semaphore};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let acme = Keyed::by("tenant", Semaphore::permits(4)).build()?.of("acme");
    /// let three = acme.acquire_many(3).await?;
    /// assert!(acme.try_acquire_many(2).is_err());
    /// drop(three);
    /// assert!(acme.try_acquire_many(2).is_ok());
    /// # Ok(()) }
    /// ```
    pub fn acquire_many(&self, cost: u32) -> Acquire {
        Guard::enter(self.clone(), cost)
    }

    /// Takes a pass that costs so much if that needs no waiting.
    ///
    /// # Errors
    ///
    /// As [`try_acquire`](Self::try_acquire).
    ///
    /// ```
    /// # use resile::{Keyed, LeakyBucket};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let acme = Keyed::by("tenant", LeakyBucket::per_second(10)).build()?.of("acme");
    /// let _large = acme.try_acquire_many(3)?;
    /// let wait = acme.try_acquire_many(1).unwrap_err().retry_after().unwrap();
    /// assert_eq!(wait, std::time::Duration::from_millis(300));
    /// # Ok(()) }
    /// ```
    pub fn try_acquire_many(&self, cost: u32) -> Result<Guard, Refusal> {
        Guard::try_enter(self.clone(), cost)
    }

    fn who(&self) -> Who<'_> {
        Who { id: self.id, key: KeyRef::from(&self.key) }
    }
}

impl<G: Limiter> OneKey<G> {
    /// Takes `tokens` tokens; see [`Keyed::try_take`].
    ///
    /// # Errors
    ///
    /// As there.
    ///
    /// ```
    /// # use resile::{Keyed, SlidingWindow};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let acme = Keyed::by("tenant", SlidingWindow::per_minute(10)).build()?.of("acme");
    /// acme.try_take(10)?;
    /// assert!(acme.try_take(1).is_err());
    /// # Ok(()) }
    /// ```
    pub fn try_take(&self, tokens: u32) -> Result<(), Refusal> {
        self.keyed.try_take_at(self.who(), &Call::alone(tokens, false))
    }
}

impl<G: PerKey> Gate for OneKey<G> {
    fn enter(&self, call: &Call) -> Entry {
        self.keyed.0.enter(self.who(), call)
    }

    fn leave(&self, pass: Pass, outcome: Outcome) {
        self.keyed.0.leave(&pass, outcome);
    }

    fn poll_wait(&self, ticket: Ticket, call: &Call, cx: &mut Context<'_>) -> Entry {
        self.keyed.0.poll_wait(self.who(), &ticket, call, cx)
    }

    fn settle(&self, pass: &mut Pass, call: &Call, actual: u32) {
        self.keyed.0.settle(Some(self.who()), pass, call, actual);
    }

    fn abandon(&self, ticket: Ticket) {
        self.keyed.0.abandon(&ticket);
    }

    fn still(&self, pass: &Pass, call: &Call) -> Result<(), Refusal> {
        self.keyed.0.still(pass, call)
    }

    fn look(&self, call: &Call) -> Result<(), Refusal> {
        self.keyed.0.look(self.who(), call)
    }

    fn needs(&self) -> Needs {
        G::NEEDS
    }

    fn name(&self) -> &str {
        self.keyed.name()
    }
}

impl<G: PerKey> Clone for OneKey<G> {
    fn clone(&self) -> Self {
        Self { keyed: self.keyed.clone(), id: self.id, key: self.key.clone() }
    }
}

impl<G: PerKey> fmt::Debug for OneKey<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OneKey").field("keyed", &self.keyed).field("key", &self.key).finish_non_exhaustive()
    }
}
