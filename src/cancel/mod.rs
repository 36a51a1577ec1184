//! [`Cancel`]: a request to stop that says why.
//!
//! A task that is dropped half-way leaves no word. A token can be cancelled, but whoever finds it so cannot tell a client
//! that has gone from a server that shuts down. `Cancel` is a token with a reason: the first reason given is kept, and
//! everybody can read it, down to the [`Error`](crate::Error) of the call that it ended.
//!
//! ```
//! use resile::{Cancel, CancelReason, Policy};
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let server = Cancel::new();
//! let request = server.child();
//!
//! let policy = Policy::named("users").build()?;
//! let call = policy.call().cancel_on(&request).run(|| std::future::pending::<Result<(), &str>>());
//!
//! let (outcome, _) = tokio::join!(call, async { server.cancel_with(CancelReason::Shutdown) });
//! let error = outcome.unwrap_err();
//! assert!(error.is_cancelled());
//! assert_eq!(error.cancel_reason(), Some(&CancelReason::Shutdown));
//! assert_eq!(error.to_string(), "cancelled: shutdown");
//! # Ok(()) }
//! ```
//!
//! # How it decides
//!
//! The first reason wins, and no later one changes anything. Cancelling marks the token and everything below it with that
//! reason, and only then wakes who waits: whoever is woken finds all of it cancelled. A child that was cancelled before
//! its parent keeps its own reason, and so do its children; a child never cancels its parent.
//!
//! What a token was for being finished does not matter to it: cancelling then is recorded, and nobody listens. A call
//! that is ready in the same poll in which it is cancelled succeeds all the same.
//!
//! # Cancellation
//!
//! Waiting with [`cancelled`](Cancel::cancelled) can be dropped at any time. Dropping a token cancels nothing.
//!
//! # Cost
//!
//! [`is_cancelled`](Cancel::is_cancelled) is one atomic load, however many parents there are. A new token is two
//! allocations, and a child takes its parent's mutex when it is made and when it is dropped. A parent remembers at most
//! as many dropped children as it has living ones.
//!
//! # Not for
//!
//! Stopping what does not look: a loop without an `.await` has to ask `is_cancelled` itself.

#[cfg(all(test, resile_loom))]
mod loom;

use std::borrow::Cow;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};

use pin_project::pin_project;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::internal::sync::{Mutex, OnceLock};

/// A token that is cancelled once, with a reason; see the [module](self).
///
/// A cheap handle: clones are the same token, [children](Cancel::child) are cancelled with it.
#[derive(Clone, Default)]
pub struct Cancel(Arc<Node>);

/// 1. `reason` is set before anything else happens, so whoever sees any other sign of a cancellation can read it.
/// 2. No child is added once `reason` is set: both are looked at under the lock of `children`.
/// 3. One lock is held at a time, and nothing of the user's runs under it.
#[derive(Default)]
struct Node {
    reason: OnceLock<CancelReason>,
    /// Where waiters stand.
    token: CancellationToken,
    /// Kept alive by its children: it is what leads to them from further up.
    parent: Option<Arc<Node>>,
    children: Mutex<Children>,
}

#[derive(Default)]
struct Children {
    list: Vec<Weak<Node>>,
    /// About how many of them are gone.
    gone: usize,
}

/// Why something was cancelled.
///
/// ```
/// use resile::CancelReason;
/// assert_eq!(CancelReason::from("moved to another shard").to_string(), "moved to another shard");
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CancelReason {
    /// Whoever asked for it has gone away.
    ClientGone,
    /// The time for it is over.
    Deadline,
    /// The process, or the part of it that does the work, shuts down.
    Shutdown,
    /// Something newer has taken its place.
    Superseded,
    /// Something that it belongs together with has failed.
    SiblingFailed,
    /// A reason of your own.
    Custom(Cow<'static, str>),
    /// None was given.
    #[default]
    Unspecified,
}

impl fmt::Display for CancelReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ClientGone => "the client has gone",
            Self::Deadline => "a deadline passed",
            Self::Shutdown => "shutdown",
            Self::Superseded => "superseded",
            Self::SiblingFailed => "a sibling failed",
            Self::Custom(reason) => reason,
            Self::Unspecified => "no reason given",
        })
    }
}

impl From<Cow<'static, str>> for CancelReason {
    fn from(reason: Cow<'static, str>) -> Self {
        Self::Custom(reason)
    }
}

impl From<&'static str> for CancelReason {
    fn from(reason: &'static str) -> Self {
        Self::Custom(reason.into())
    }
}

impl From<String> for CancelReason {
    fn from(reason: String) -> Self {
        Self::Custom(reason.into())
    }
}

impl Cancel {
    /// A token that is not cancelled.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A token that is cancelled when this one is, with the same reason, and can be cancelled alone before.
    ///
    /// ```
    /// # use resile::{Cancel, CancelReason};
    /// let server = Cancel::new();
    /// let (one, other) = (server.child(), server.child());
    /// one.cancel_with(CancelReason::ClientGone);
    /// assert!(!server.is_cancelled() && !other.is_cancelled());
    ///
    /// server.cancel_with(CancelReason::Shutdown);
    /// assert_eq!(other.reason(), Some(CancelReason::Shutdown));
    /// assert_eq!(one.reason(), Some(CancelReason::ClientGone), "the first one given");
    /// assert!(server.child().is_cancelled(), "also whoever comes later");
    /// ```
    #[must_use]
    pub fn child(&self) -> Self {
        let mut child = Node::default();
        child.parent = Some(self.0.clone());
        let child = Arc::new(child);
        let mut children = self.0.children.lock();
        match self.0.reason.get() {
            None => children.list.push(Arc::downgrade(&child)),
            Some(reason) => {
                drop(children);
                child.mark(reason);
                child.token.cancel();
            }
        }
        Self(child)
    }

    /// Cancels without saying why; see [`cancel_with`](Cancel::cancel_with).
    ///
    /// ```
    /// # use resile::{Cancel, CancelReason};
    /// let cancel = Cancel::new();
    /// assert_eq!(cancel.reason(), None);
    /// assert!(cancel.cancel());
    /// assert_eq!(cancel.reason(), Some(CancelReason::Unspecified));
    /// ```
    #[allow(clippy::must_use_candidate, reason = "who was first is rarely of interest")]
    pub fn cancel(&self) -> bool {
        self.cancel_with(CancelReason::Unspecified)
    }

    /// Cancels this token and its children, unless it was cancelled before: whether this was the first time.
    ///
    /// When it returns, the token and everything below it are cancelled, also if somebody else was first.
    ///
    /// ```
    /// use resile::{Cancel, CancelReason};
    /// let cancel = Cancel::new();
    /// assert!(cancel.cancel_with(CancelReason::ClientGone));
    /// assert!(!cancel.cancel_with("too late"));
    /// assert_eq!(cancel.reason(), Some(CancelReason::ClientGone));
    /// ```
    pub fn cancel_with(&self, reason: impl Into<CancelReason>) -> bool {
        let first = self.0.reason.set(reason.into()).is_ok();
        self.0.clone().spread();
        first
    }

    /// Why it was cancelled; `None` if it was not.
    #[must_use]
    pub fn reason(&self) -> Option<CancelReason> {
        self.0.reason.get().cloned()
    }

    /// Whether it was cancelled. Cost: one atomic load.
    #[must_use]
    #[inline]
    pub fn is_cancelled(&self) -> bool {
        self.0.reason.get().is_some()
    }

    /// Waits until it is cancelled, and says why.
    ///
    /// # Cancel safety
    ///
    /// Nothing is lost if it is dropped.
    ///
    /// ```
    /// use resile::{Cancel, CancelReason};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// let cancel = Cancel::new();
    /// let told = tokio::spawn(cancel.cancelled());
    /// cancel.cancel_with(CancelReason::Superseded);
    /// assert_eq!(told.await.unwrap(), CancelReason::Superseded);
    /// # }
    /// ```
    pub fn cancelled(&self) -> Cancelled {
        Cancelled { cancel: self.clone(), wait: None }
    }

    /// A tokio-util token that is cancelled when this one is, for code that takes one. Cancelling the returned token
    /// cancels nothing else.
    ///
    /// ```
    /// let cancel = resile::Cancel::new();
    /// let (token, other) = (cancel.token(), cancel.token());
    /// other.cancel();
    /// assert!(!cancel.is_cancelled() && !token.is_cancelled());
    /// cancel.cancel();
    /// assert!(token.is_cancelled());
    /// ```
    #[must_use]
    pub fn token(&self) -> CancellationToken {
        self.0.token.child_token()
    }

    /// The wait alone, without a reason in the end.
    pub(crate) fn wait(&self) -> WaitForCancellationFutureOwned {
        self.0.token.clone().cancelled_owned()
    }
}

impl Node {
    /// Gives it a reason, if it has none.
    fn mark(&self, reason: &CancelReason) {
        // An error says that it has one, which is as good.
        let _ = self.reason.set(reason.clone());
    }

    /// Marks everything below, then wakes all waiters.
    fn spread(self: Arc<Self>) {
        let mut nodes = vec![self];
        let mut next = 0;
        while let Some(node) = nodes.get(next) {
            let children: Vec<Arc<Self>> = node.children.lock().list.iter().filter_map(Weak::upgrade).collect();
            if let Some(reason) = node.reason.get() {
                for child in &children {
                    child.mark(reason);
                }
            }
            nodes.extend(children);
            next += 1;
        }
        // Not before all are marked: whoever comes by meanwhile goes the same way, and is not to find it cut short.
        for node in &nodes {
            *node.children.lock() = Children::default();
        }
        for node in nodes {
            node.token.cancel();
        }
    }

    /// One child fewer. The list is swept when half of it is gone, so that each costs the same in the long run.
    fn child_gone(&self) {
        let Children { list, gone } = &mut *self.children.lock();
        *gone += 1;
        if *gone * 2 > list.len() {
            list.retain(|child| child.strong_count() > 0);
            list.shrink_to(list.len() * 2);
            *gone = 0;
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // A loop, since a long line of parents would be a deep recursion.
        let mut above = self.parent.take();
        while let Some(parent) = above {
            parent.child_gone();
            above = Arc::into_inner(parent).and_then(|mut parent| parent.parent.take());
        }
    }
}

/// Two are equal if they are handles of the same token.
impl PartialEq for Cancel {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Cancel {}

impl fmt::Debug for Cancel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cancel").field("reason", &self.0.reason.get()).finish()
    }
}

/// Waits for a cancellation; from [`Cancel::cancelled`].
#[pin_project]
#[must_use = "futures do nothing unless polled"]
pub struct Cancelled {
    cancel: Cancel,
    /// Made when there is something to wait for.
    #[pin]
    wait: Option<WaitForCancellationFutureOwned>,
}

impl Future for Cancelled {
    type Output = CancelReason;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<CancelReason> {
        let mut this = self.project();
        loop {
            if let Some(reason) = this.cancel.reason() {
                return Poll::Ready(reason);
            }
            match this.wait.as_mut().as_pin_mut() {
                None => this.wait.set(Some(this.cancel.wait())),
                Some(wait) => ready!(wait.poll(cx)),
            }
        }
    }
}

impl fmt::Debug for Cancelled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cancelled").field("cancel", &self.cancel).finish_non_exhaustive()
    }
}

#[cfg(all(test, not(resile_loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_parent_remembers_no_more_dropped_children_than_living_ones() {
        let parent = Cancel::new();
        let mut living = Vec::new();
        let remembered = || parent.0.children.lock().list.len();
        for round in 0..1_000 {
            let child = parent.child();
            if round % 10 == 0 {
                living.push(child);
            }
            assert!(remembered() <= 2 * living.len() + 1, "{} of {}", remembered(), living.len());
        }
        while living.pop().is_some() {
            assert!(remembered() <= 2 * living.len(), "{} of {}", remembered(), living.len());
        }
        assert!(parent.0.children.lock().list.capacity() <= 4);
    }
}
