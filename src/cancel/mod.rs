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
//! assert_eq!(error.to_string(), "users: cancelled in attempt 1: shutdown");
//! # Ok(()) }
//! ```
//!
//! # How it decides
//!
//! The first reason wins, and no later one changes anything. Cancelling marks the token and everything below it with that
//! reason in one step, and only then wakes the waiters: a waiter that is woken finds all of it cancelled. A child that was
//! cancelled before its parent keeps its own reason, and so do its children; a child never cancels its parent.
//!
//! Every cancellation in the process has a number. Where several tokens can end something (the request's, the scope's,
//! the policy's, the call's), the one with the smallest number is the reason, whoever asks and whenever.
//!
//! A token may be cancelled after its work is done: the cancellation is recorded and changes nothing. A call that is ready
//! in the same poll in which it is cancelled succeeds all the same.
//!
//! # Cancellation
//!
//! Waiting with [`cancelled`](Cancel::cancelled) can be dropped at any time. Dropping a token cancels nothing.
//!
//! # Cost
//!
//! [`is_cancelled`](Cancel::is_cancelled) is one atomic load, however many parents there are. A new token is one
//! allocation, and a child takes its parent's mutex when it is made and when it is dropped. A parent remembers at most
//! as many dropped children as it has living ones. Cancellations follow one another: each holds one lock of the process
//! while it marks what is below the token.
//!
//! # Not for
//!
//! Stopping what does not look: a loop without an `.await` has to ask `is_cancelled` itself.

#[cfg(all(test, resile_loom))]
mod loom;

use std::any::Any;
use std::borrow::Cow;
use std::fmt;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};

use smallvec::SmallVec;
use tokio_util::sync::CancellationToken;

use crate::internal::slab::Slab;
use crate::internal::sync::{Mutex, OnceLock};

/// A token that is cancelled once, with a reason; see the [module](self).
///
/// A cheap handle: clones are the same token, [children](Cancel::child) are cancelled with it.
#[derive(Clone, Default)]
pub struct Cancel(Arc<Node>);

/// 1. A node's `end` is set once, with the lock of [`numbered`] held: all that a cancellation marks is marked before the
///    next one draws its number.
/// 2. No child and no waiter is added once `end` is set: both are looked at under the node's lock, which the canceller
///    takes after it has set `end`.
/// 3. The order of locks is: numbers, then one node. Nothing of the user's runs under either, and no node is dropped.
#[derive(Default)]
struct Node {
    end: OnceLock<Record>,
    /// Kept alive by their children: they are what leads to them from further up.
    parents: SmallVec<[Arc<Node>; 1]>,
    links: Mutex<Links>,
    /// The same for code that takes a tokio-util token; made when one is asked for.
    token: std::sync::OnceLock<CancellationToken>,
}

/// A cancellation.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    /// Its place in the order of all cancellations of the process.
    pub(crate) number: u64,
    pub(crate) reason: CancelReason,
}

#[derive(Default)]
struct Links {
    children: Vec<Weak<Node>>,
    /// About how many of them are gone.
    gone: usize,
    waiters: Slab<Waker>,
}

/// Draws the next number, and holds its lock while something is done by it.
pub(crate) fn numbered<R>(act: impl FnOnce(u64) -> R) -> R {
    #[cfg(not(all(test, resile_loom)))]
    static NUMBERS: Mutex<u64> = Mutex::new(0);
    #[cfg(all(test, resile_loom))]
    ::loom::lazy_static! {
        static ref NUMBERS: Mutex<u64> = Mutex::new(0);
    }
    let mut last = NUMBERS.lock();
    *last += 1;
    act(*last)
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
        let child = Node::below(SmallVec::from_buf([self.0.clone()]));
        self.0.adopt(&child);
        Self(child)
    }

    /// A child of several tokens: of those that are cancelled already, the first one gives the reason.
    pub(crate) fn child_of(parents: impl Iterator<Item = Self>) -> Self {
        let child = Node::below(parents.map(|parent| parent.0).collect());
        // No cancellation comes in between, so what is found here is the first.
        numbered(|_| {
            let first = child.parents.iter().filter_map(|parent| parent.end.get()).min_by_key(|end| end.number);
            match first {
                Some(first) => child.mark(first),
                None => child.parents.iter().for_each(|parent| parent.adopt(&child)),
            }
        });
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
        let reason = reason.into();
        let marked = numbered(|number| {
            let first = self.0.end.get().is_none();
            first.then(|| mark_all(&self.0, &Record { number, reason }))
        });
        let Some(marked) = marked else { return false };
        marked.wake();
        true
    }

    /// Why it was cancelled; `None` if it was not.
    #[must_use]
    pub fn reason(&self) -> Option<CancelReason> {
        self.0.end.get().map(|end| end.reason.clone())
    }

    /// The cancellation; `None` if there was none.
    pub(crate) fn record(&self) -> Option<Record> {
        self.0.end.get().cloned()
    }

    /// Whether it was cancelled. Cost: one atomic load.
    #[must_use]
    #[inline]
    pub fn is_cancelled(&self) -> bool {
        self.0.end.get().is_some()
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
        Cancelled(Wait::for_(self.clone()))
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
        let token = self.0.token.get_or_init(CancellationToken::new);
        // A canceller that found no token has set the end before it looked.
        if self.is_cancelled() {
            token.cancel();
        }
        token.child_token()
    }
}

impl Node {
    fn below(parents: SmallVec<[Arc<Self>; 1]>) -> Arc<Self> {
        let mut node = Self::default();
        node.parents = parents;
        Arc::new(node)
    }

    /// Marks it by a cancellation, its own or one further up, unless it was cancelled before.
    fn mark(&self, record: &Record) {
        // An error says that it was, which is as good.
        let _ = self.end.set(record.clone());
    }

    /// Takes in a child that nobody else knows yet.
    fn adopt(&self, child: &Arc<Self>) {
        let mut links = self.links.lock();
        match self.end.get() {
            None => links.children.push(Arc::downgrade(child)),
            Some(record) => child.mark(record),
        }
    }

    /// One child fewer. The list is swept when half of it is gone, so that each costs the same in the long run.
    fn child_gone(&self) {
        let Links { children, gone, .. } = &mut *self.links.lock();
        *gone += 1;
        if *gone * 2 > children.len() {
            children.retain(|child| child.strong_count() > 0);
            children.shrink_to(children.len() * 2);
            *gone = 0;
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // A list of its own, since a long line of parents would be a deep recursion.
        let mut above = std::mem::take(&mut self.parents);
        while let Some(parent) = above.pop() {
            parent.child_gone();
            if let Some(mut parent) = Arc::into_inner(parent) {
                above.append(&mut parent.parents);
            }
        }
    }
}

/// What a cancellation has marked, to be woken when no lock is held.
struct Marked {
    nodes: Vec<Arc<Node>>,
    waiters: Vec<Waker>,
}

/// Marks a node and all that is below it. Called with the lock of the numbers held.
fn mark_all(node: &Arc<Node>, record: &Record) -> Marked {
    node.mark(record);
    let mut marked = Marked { nodes: vec![node.clone()], waiters: Vec::new() };
    let mut next = 0;
    while let Some(node) = marked.nodes.get(next) {
        let Links { children, mut waiters, .. } = std::mem::take(&mut *node.links.lock());
        marked.waiters.extend(waiters.drain());
        for child in children {
            // What was cancelled before has marked what is below it.
            if let Some(child) = child.upgrade() {
                // Dropped after the locks are released, in case this is its last handle.
                child.mark(record);
                marked.nodes.push(child);
            }
        }
        next += 1;
    }
    marked
}

impl Marked {
    /// Wakes all. A waker is user code and may panic: the others are woken all the same, and the first panic goes on.
    fn wake(self) {
        let mut panic: Option<Box<dyn Any + Send>> = None;
        let mut run = |code: &mut dyn FnMut()| {
            if let Err(payload) = catch_unwind(AssertUnwindSafe(code)) {
                panic.get_or_insert(payload);
            }
        };
        for waker in self.waiters {
            let mut waker = Some(waker);
            run(&mut || waker.take().into_iter().for_each(Waker::wake));
        }
        for token in self.nodes.iter().filter_map(|node| node.token.get()) {
            run(&mut || token.cancel());
        }
        if let Some(payload) = panic {
            // A second panic while one unwinds would abort.
            if !std::thread::panicking() {
                resume_unwind(payload);
            }
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
        f.debug_struct("Cancel").field("reason", &self.reason()).finish()
    }
}

/// Waits for a cancellation; from [`Cancel::cancelled`].
#[must_use = "futures do nothing unless polled"]
pub struct Cancelled(Wait);

impl Future for Cancelled {
    type Output = CancelReason;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<CancelReason> {
        if self.0.is_over(cx.waker()) { Poll::Ready(self.0.cancel.reason().unwrap_or_default()) } else { Poll::Pending }
    }
}

/// A place among a token's waiters.
pub(crate) struct Wait {
    cancel: Cancel,
    /// The place, once there is one.
    place: Option<(u32, u32)>,
}

impl Wait {
    pub(crate) const fn for_(cancel: Cancel) -> Self {
        Self { cancel, place: None }
    }

    pub(crate) const fn token(&self) -> &Cancel {
        &self.cancel
    }

    /// Whether the token was cancelled. If not, this waker is woken when it is.
    pub(crate) fn is_over(&mut self, waker: &Waker) -> bool {
        if self.cancel.is_cancelled() {
            return true;
        }
        let node = &self.cancel.0;
        // A waker is user code: cloned before the lock is taken, dropped after it is released.
        let mut spare = Some(waker.clone());
        let mut links = node.links.lock();
        if node.end.get().is_some() {
            return true;
        }
        match self.place.and_then(|(place, turn)| links.waiters.at(place, turn)) {
            Some(there) => spare = spare.map(|waker| std::mem::replace(there, waker)),
            None => self.place = spare.take().map(|waker| links.waiters.insert(waker)),
        }
        drop(links);
        drop(spare);
        false
    }
}

impl fmt::Debug for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wait").field("cancel", &self.cancel).finish_non_exhaustive()
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        let Some((place, turn)) = self.place else { return };
        let mut links = self.cancel.0.links.lock();
        let waker = links.waiters.at(place, turn).is_some().then(|| links.waiters.remove(place)).flatten();
        drop(links);
        drop(waker);
    }
}

impl fmt::Debug for Cancelled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cancelled").field("cancel", &self.0.cancel).finish_non_exhaustive()
    }
}

#[cfg(all(test, not(resile_loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_parent_remembers_no_more_dropped_children_than_living_ones() {
        let parent = Cancel::new();
        let mut living = Vec::new();
        let remembered = || parent.0.links.lock().children.len();
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
        assert!(parent.0.links.lock().children.capacity() <= 4);
    }
}
