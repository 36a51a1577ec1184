//! How a call ends before its operation does: by a drop, with a cleanup, or behind a shield.
//!
//! Async Rust cancels by dropping. What was here is gone at once; what the operation has begun elsewhere is not: a query
//! that nobody waits for goes on at the server, and a transaction hangs between `begin` and `commit`. So there are three
//! ways to end early, and the caller chooses:
//!
//! | | the operation | its passes | use it when |
//! | --- | --- | --- | --- |
//! | drop: [`run`](crate::Policy::run) | is dropped | go back at once | being half done does no harm: reads, anything idempotent |
//! | drop and clean up: [`cleanup`](crate::CallBuilder::cleanup) | is dropped, then a task of your own ends what it has begun | go back at once | the peer has a way to be told: `cancel_query`, `rollback`, a request that undoes it |
//! | shield: [`shield`](crate::CallBuilder::shield) | goes on to its end in a task | stay held until then | half of it is worse than none or all: transactions, payments |
//!
//! All three hold for whatever ends a call early: its future is dropped, its caller cancels, a deadline passes.
//! A [timeout step](crate::PolicyBuilder::timeout) of the policy cuts the operation behind a shield too: it is a rule about
//! the operation, not about the caller's patience. That is a trap for transactions: one that is cut between `begin` and
//! `commit` is left open on its connection. Give the shield a [cleanup](ShieldBuilder::cleanup) that rolls it back.
//!
//! *Dropped is not rolled back.* What the operation has sent is at the peer, and a drop takes none of it back. A batch that
//! went out as one message (`begin; ..; commit`) is committed although nobody waits for its answer. A server goes on with
//! a query whose connection was closed. A transaction that was begun and not ended stays open on its connection, for
//! whoever uses that next. The repository's tests show each of these on a real Postgres (`tests/postgres.rs`).
//!
//! What runs on in tasks is counted by the policy: see [`Policy::tasks`](crate::Policy::tasks).
//!
//! # Being told
//!
//! A policy can tell of every call that ended early, with where it stood and what it gave back:
//!
//! ```
//! use std::sync::{Arc, Mutex};
//! use std::time::Duration;
//! use resile::{Policy, Semaphore};
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let log = Arc::new(Mutex::new(Vec::new()));
//! let told = log.clone();
//! let policy = Policy::named("users")
//!     .timeout(Duration::from_secs(2))
//!     .gate(Semaphore::permits(8))
//!     .on_early_end(move |end| told.lock().unwrap().push(end.to_string()))
//!     .build()?;
//!
//! let call = policy.run(|| std::future::pending::<Result<(), &str>>());
//! let _ = tokio::time::timeout(Duration::from_millis(300), call).await;
//! assert_eq!(
//!     *log.lock().unwrap(),
//!     ["users: dropped after 300ms in the operation, in attempt 1 with 1.7s left; gave back semaphore"]
//! );
//! # Ok(()) }
//! ```
//!
//! # Cost
//!
//! Nothing for calls that end by themselves. A policy with a listener reads the clock once per call. A cleanup costs an
//! allocation per call, a shield those of a task.

mod cleanup;
mod shield;
mod tasks;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::cancel::CancelReason;
use crate::error::{Limit, Name};
use crate::step::Step;

pub use cleanup::{Cleaned, Cleaning, CleanupBuilder, Interrupted};
pub use shield::{Counted, Given, Shield, ShieldBuilder, ShieldCleanupBuilder};
pub use tasks::Tasks;

/// How long a cleanup may take by default: time for one round trip to a peer in trouble, not for a vigil.
const DEFAULT_CLEANUP_LIMIT: Duration = Duration::from_secs(5);

/// What ended a call early.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Why {
    /// Its future was dropped.
    Dropped,
    /// Somebody cancelled it.
    Cancelled(CancelReason),
    /// A time limit passed.
    TimedOut(Limit),
    /// The operation, or another piece of the user's code, panicked.
    Panicked,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dropped => f.write_str("dropped"),
            Self::Cancelled(CancelReason::Unspecified) => f.write_str("cancelled"),
            Self::Cancelled(reason) => write!(f, "cancelled ({reason})"),
            Self::TimedOut(limit) => write!(f, "timed out ({limit})"),
            Self::Panicked => f.write_str("panicked"),
        }
    }
}

/// Where a call stood when it ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stage<'a> {
    /// On its way in, before the operation was made.
    Entering,
    /// In the queue of the gate of this name.
    Queued(&'a str),
    /// Its operation was running.
    Operating,
    /// Between two attempts.
    Backoff,
}

impl fmt::Display for Stage<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Entering => f.write_str("on the way in"),
            Self::Queued(gate) => write!(f, "in the queue of {gate}"),
            Self::Operating => f.write_str("in the operation"),
            Self::Backoff => f.write_str("between two attempts"),
        }
    }
}

/// The record of a call that ended early: by a drop, a cancellation, a time limit or a panic. Failures and refusals are
/// no early ends.
///
/// It is made when all passes have gone back.
///
/// ```
/// # use std::sync::{Arc, Mutex};
/// # use std::time::Duration;
/// # use resile::{Limit, Policy, Semaphore, Stage, Why};
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let seen = Arc::new(Mutex::new(0));
/// let count = seen.clone();
/// let db = Semaphore::permits(1).named("db").build()?;
/// let policy = Policy::named("users")
///     .gate(db.clone())
///     .on_early_end(move |end| {
///         assert_eq!((end.why(), end.stage()), (&Why::TimedOut(Limit::Caller), Stage::Queued("db")));
///         assert_eq!((end.attempts(), end.elapsed()), (0, Duration::from_secs(1)));
///         assert_eq!(end.given_back().count(), 0);
///         *count.lock().unwrap() += 1;
///     })
///     .build()?;
///
/// let _held = db.acquire().await?;
/// assert!(policy.call().deadline(Duration::from_secs(1)).run(|| async { Ok::<_, &str>(42) }).await.is_err());
/// assert_eq!(*seen.lock().unwrap(), 1);
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct EarlyEnd<'a> {
    pub(crate) policy: &'a str,
    /// The steps that the call had passed.
    pub(crate) passed: &'a [Step],
    pub(crate) why: Why,
    pub(crate) stage: Stage<'a>,
    pub(crate) attempts: u32,
    pub(crate) elapsed: Duration,
    pub(crate) remaining: Duration,
}

impl<'a> EarlyEnd<'a> {
    /// The policy's name.
    #[must_use]
    pub fn policy(&self) -> &'a str {
        self.policy
    }

    /// What ended it, and who.
    #[must_use]
    pub fn why(&self) -> &Why {
        &self.why
    }

    /// Where it stood.
    #[must_use]
    pub fn stage(&self) -> Stage<'a> {
        self.stage
    }

    /// How many times the operation was made.
    #[must_use]
    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    /// How long the call had lasted, from its first poll.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.elapsed
    }

    /// What was left until the deadline that applied where it stood: zero if it has passed, [`Duration::MAX`] if there
    /// was none.
    #[must_use]
    pub fn remaining(&self) -> Duration {
        self.remaining
    }

    /// The names of the gates that a pass went back to, innermost first.
    pub fn given_back(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.passed.iter().rev().filter_map(|step| Some(step.as_gate()?.name()))
    }
}

impl fmt::Display for EarlyEnd<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { policy, why, stage, attempts, elapsed, remaining, .. } = self;
        write!(f, "{policy}: {why} after {elapsed:?} {stage}")?;
        match attempts {
            0 => f.write_str(", before the first attempt")?,
            attempts => write!(f, ", in attempt {attempts}")?,
        }
        if *remaining < Duration::MAX {
            write!(f, " with {remaining:?} left")?;
        }
        for (nth, gate) in self.given_back().enumerate() {
            write!(f, "{}{gate}", if nth == 0 { "; gave back " } else { ", " })?;
        }
        Ok(())
    }
}

impl fmt::Debug for EarlyEnd<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EarlyEnd")
            .field("policy", &self.policy)
            .field("why", &self.why)
            .field("stage", &self.stage)
            .field("attempts", &self.attempts)
            .field("elapsed", &self.elapsed)
            .field("remaining", &self.remaining)
            .finish_non_exhaustive()
    }
}

type Tell = dyn Fn(&EarlyEnd<'_>) + Send + Sync;

/// Who wants to be told of a policy's early ends.
#[derive(Clone)]
pub(crate) struct Listeners {
    policy: Name,
    tell: Vec<Arc<Tell>>,
}

impl Listeners {
    pub(crate) fn of(policy: Name) -> Self {
        Self { policy, tell: Vec::new() }
    }

    pub(crate) fn add(&mut self, tell: Arc<Tell>) {
        self.tell.push(tell);
    }

    pub(crate) fn policy(&self) -> &str {
        self.policy.as_str()
    }

    pub(crate) fn tell(&self, end: &EarlyEnd<'_>) {
        self.tell.iter().for_each(|tell| tell(end));
    }
}

impl fmt::Debug for Listeners {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Listeners").field(&self.tell.len()).finish()
    }
}
