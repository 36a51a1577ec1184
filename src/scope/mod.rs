//! [`Scope`]: tasks that belong together, none of which outlives the block that started them.
//!
//! To load a page one asks three services at once. When the first says no, the other two work for nobody; when the
//! request is dropped, all three go on as tasks that nobody knows of. A scope holds such tasks: the first that fails
//! cancels the others, leaving it waits for all, and dropping it ends all.
//!
//! ```
//! use std::time::Duration;
//! use resile::{CancelReason, ChildEnd, Scope};
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() {
//! async fn load(part: &'static str, millis: u64) -> Result<&'static str, &'static str> {
//!     tokio::time::sleep(Duration::from_millis(millis)).await;
//!     if part == "cart" { Err("no cart") } else { Ok(part) }
//! }
//!
//! let mut page = Scope::new().deadline(Duration::from_secs(1));
//! page.spawn(load("user", 10));
//! page.spawn(load("news", 20));
//! assert_eq!(page.join().await.unwrap(), ["user", "news"]);
//!
//! let mut page = Scope::new().deadline(Duration::from_secs(1));
//! page.spawn(load("user", 10));
//! page.spawn(load("cart", 20));
//! page.spawn(load("news", 900));
//! let end = page.join().await.unwrap_err();
//! assert_eq!(end.first_error(), Some(&"no cart"));
//! assert!(matches!(end.children()[0], ChildEnd::Done("user")));
//! assert!(matches!(end.children()[2], ChildEnd::Cancelled(CancelReason::SiblingFailed)));
//! # }
//! ```
//!
//! Many things of one kind, so many at once, are for [`map`](Scope::map), which hands the results out as they come:
//!
//! ```
//! use std::time::Duration;
//! use resile::{ChildEnd, Scope};
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), resile::ConfigError> {
//! let scope = Scope::new().deadline(Duration::from_millis(25));
//! let mut sizes = scope.map(1..=10_u64, 2, |id| async move {
//!     tokio::time::sleep(Duration::from_millis(10)).await;
//!     Ok::<_, ()>(id * 100)
//! })?;
//!
//! let mut got = Vec::new();
//! while let Some((_, end)) = sizes.next().await {
//!     got.extend(end.into_value());
//! }
//! got.sort();
//! assert_eq!(got, [100, 200, 300, 400]);
//! assert!(sizes.is_partial());
//! # Ok(()) }
//! ```
//!
//! # How it decides
//!
//! | what happens | what comes of it |
//! | --- | --- |
//! | a child fails or panics | the others are cancelled with [`SiblingFailed`](CancelReason::SiblingFailed), unless the scope [keeps going](Scope::keep_going) |
//! | a child fails after the scope was cancelled | it counts as [cancelled with that error](ChildEnd::CancelledWith): an effect, which starts nothing |
//! | the deadline passes | all are cancelled with [`Deadline`](CancelReason::Deadline) |
//! | the [handle](Scope::cancel_handle) is cancelled, also by a child | all are cancelled with its reason, the child itself at its next await |
//! | the [context] in which the scope was made is cancelled, or its deadline passes | the same, with its reason |
//! | a child is spawned after any of these | it is never polled, and counts as cancelled |
//! | a deadline of zero | the same for all: none is polled, and the scope is left at once |
//! | it is cancelled after a child has finished | that child's result stays |
//! | a child ignores its cancellation | it is dropped where it stands when the [grace](Scope::grace) is over |
//! | a child cannot be dropped, since it never awaits | it is left behind as [`Stuck`](ChildEnd::Stuck), some time later |
//! | the scope is dropped | all are aborted, those of scopes within them too |
//!
//! The deadline of the scope, of its context, and the cancellation reach every call under a policy that a child makes:
//! children run in the context in which the scope was made, narrowed by the scope. A scope within a child is cancelled
//! with the one around it, with the same reason.
//!
//! | setting | default | why |
//! | --- | --- | --- |
//! | [`deadline`](Scope::deadline) | that of the context | a scope of a request is not to outlive it |
//! | [`grace`](Scope::grace) | zero | futures are made to be dropped |
//! | [`keep_going`](Scope::keep_going) | off | results that nobody will read need not be made |
//! | [`stuck_after`](Scope::stuck_after) | 1 s | far above what a task between two awaits should take |
//!
//! # Cancellation
//!
//! [`next`](Scope::next) can be dropped and called again. [`join`](Scope::join) and [`wait`](Scope::wait) own the scope:
//! dropping them drops it.
//!
//! # Cost
//!
//! A task per child, and a few allocations when it is first pending. A scope does not limit how many children it has; `map`
//! does.
//!
//! # Not for
//!
//! Work that goes on when the request is over: spawn that outside, and [`detach`](crate::context::detach) it. Nor for
//! children that borrow: they are tasks, and run on other threads.

mod child;
mod end;
mod map;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::future::{Future, poll_fn};
use std::sync::Arc;
use std::task::{Context as Task, Poll, ready};
use std::time::Duration;

use tokio::task::{Id, JoinSet};

use crate::call::Deadline;
use crate::cancel::{Cancel, CancelReason};
use crate::context;

use child::{Child, Link, Waiting};

pub use end::{ChildEnd, ChildPanic, ScopeEnd};
pub use map::Mapped;

/// How long a child that was to be dropped may take to be gone, by default.
const DEFAULT_STUCK_AFTER: Duration = Duration::from_secs(1);

/// A group of tasks that end together; see the [module](self).
#[must_use = "a scope that is dropped aborts its children"]
pub struct Scope<T, E> {
    tasks: JoinSet<ChildEnd<T, E>>,
    /// Which child each task is, until it has been reported.
    running: HashMap<Id, usize>,
    spawned: usize,
    link: Link,
    stuck_after: Duration,
    /// Over when children that still run are given up; made when there is something to wait for.
    patience: Option<Waiting<()>>,
    /// It is over; what still runs at the next look is given up.
    giving_up: bool,
}

impl<T, E> Scope<T, E> {
    /// A scope without children, in the context of here.
    pub fn new() -> Self {
        let (context, cancel) = context::current().unwrap_or_default().gather();
        Self {
            tasks: JoinSet::new(),
            running: HashMap::new(),
            spawned: 0,
            link: Link { cancel, context, grace: Duration::ZERO, keep_going: false, first_failed: Arc::default() },
            stuck_after: DEFAULT_STUCK_AFTER,
            patience: None,
            giving_up: false,
        }
    }

    /// When all children must be over: a [`Duration`] counts from now. Of several deadlines the earliest counts.
    ///
    /// Like all settings, it holds for children that are spawned later.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{CancelReason, Scope};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// let mut scope = Scope::<(), ()>::new().deadline(Duration::from_millis(50));
    /// scope.spawn(std::future::pending());
    /// let start = tokio::time::Instant::now();
    /// let end = scope.wait().await;
    /// assert_eq!(end.reason(), Some(&CancelReason::Deadline));
    /// assert_eq!(start.elapsed(), Duration::from_millis(50));
    /// # }
    /// ```
    pub fn deadline(mut self, deadline: impl Into<Deadline>) -> Self {
        self.link.context.narrow_by(deadline.into(), || self.link.cancel.clone());
        self
    }

    /// How long children that are cancelled may go on, to end in their own way: zero by default, so that they are dropped
    /// at once. It counts from when a child hears of it, also after the deadline.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{ChildEnd, Scope, context};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// let mut scope = Scope::<&str, ()>::new().grace(Duration::from_secs(1));
    /// scope.spawn(async {
    ///     context::current().unwrap().cancelled().await;
    ///     tokio::time::sleep(Duration::from_millis(300)).await;
    ///     Ok("said goodbye")
    /// });
    /// tokio::task::yield_now().await;
    /// scope.cancel_with("enough");
    /// assert!(matches!(scope.wait().await.children()[0], ChildEnd::Done("said goodbye")));
    /// # }
    /// ```
    pub const fn grace(mut self, grace: Duration) -> Self {
        self.link.grace = grace;
        self
    }

    /// Lets the others go on when a child fails or panics.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::Scope;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// let mut scope = Scope::new().keep_going();
    /// scope.spawn(async { Err("no") });
    /// scope.spawn(async {
    ///     tokio::time::sleep(Duration::from_millis(10)).await;
    ///     Ok(42)
    /// });
    /// let end = scope.wait().await;
    /// assert_eq!((end.children()[0].error(), end.children()[1].value()), (Some(&"no"), Some(&42)));
    /// # }
    /// ```
    pub const fn keep_going(mut self) -> Self {
        self.link.keep_going = true;
        self
    }

    /// How long to wait for a child that was to be dropped and does not come to an await: one second by default.
    pub const fn stuck_after(mut self, wait: Duration) -> Self {
        self.stuck_after = wait;
        self
    }

    /// Cancels all children, unless the scope was cancelled before: whether this was the first time.
    ///
    /// ```
    /// # use resile::{CancelReason, ChildEnd, Scope};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// let mut scope = Scope::<(), ()>::new();
    /// scope.spawn(std::future::pending());
    /// assert!(scope.cancel_with(CancelReason::ClientGone));
    /// assert!(!scope.cancel_with("too late"));
    /// assert!(matches!(scope.wait().await.children()[0], ChildEnd::Cancelled(CancelReason::ClientGone)));
    /// # }
    /// ```
    pub fn cancel_with(&self, reason: impl Into<CancelReason>) -> bool {
        self.link.cancel.cancel_with(reason)
    }

    /// A handle with which anybody can cancel all children, and see whether they are: also by the context in which the
    /// scope was made. A deadline shows once somebody has noticed that it has passed.
    ///
    /// ```
    /// use resile::{ChildEnd, Scope};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// let mut search = Scope::new();
    /// let found = search.cancel_handle();
    /// search.spawn(async move {
    ///     found.cancel_with("found");
    ///     Ok::<_, ()>(42)
    /// });
    /// search.spawn(std::future::pending());
    /// let end = search.wait().await;
    /// assert!(matches!(end.children()[0], ChildEnd::Done(42)));
    /// assert_eq!(end.reason(), Some(&"found".into()));
    /// # }
    /// ```
    #[must_use]
    pub fn cancel_handle(&self) -> Cancel {
        self.link.cancel.clone()
    }

    /// How many children have not been reported by [`next`](Scope::next).
    ///
    /// ```
    /// # use resile::Scope;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// let mut scope = Scope::<u32, ()>::new();
    /// scope.spawn(async { Ok(1) });
    /// scope.spawn(async { Ok(2) });
    /// assert_eq!(scope.len(), 2);
    /// scope.next().await;
    /// assert_eq!(scope.len(), 1);
    /// # }
    /// ```
    #[must_use]
    pub fn len(&self) -> usize {
        self.running.len()
    }

    /// Whether every child has been reported.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.running.is_empty()
    }
}

impl<T: Send + 'static, E: Send + 'static> Scope<T, E> {
    /// Starts a child. Children are counted from 0, in the order in which they are spawned.
    ///
    /// On a scope that was cancelled or is past its deadline the future is dropped unpolled, and the child counts as
    /// cancelled.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    ///
    /// ```
    /// # use resile::{ChildEnd, Scope};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// let mut scope = Scope::<u32, ()>::new();
    /// scope.spawn(async { Ok(1) });
    /// assert!(matches!(scope.next().await, Some((0, ChildEnd::Done(1)))));
    /// scope.cancel_with("enough");
    /// scope.spawn(async { unreachable!("never polled") });
    /// assert!(matches!(scope.next().await, Some((1, ChildEnd::Cancelled(_)))));
    /// # }
    /// ```
    pub fn spawn<F>(&mut self, child: F)
    where
        F: Future<Output = Result<T, E>> + Send + 'static,
    {
        let (index, link) = (self.spawned, self.link.clone());
        self.giving_up = false;
        let task = self.tasks.spawn(Child::new(link, index, child));
        self.running.insert(task.id(), index);
        self.spawned += 1;
    }

    /// Waits for the next child that ends, and says which it was: `None` when all were reported.
    ///
    /// # Cancel safety
    ///
    /// Nothing is lost if it is dropped.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::Scope;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// let mut scope = Scope::<u64, ()>::new();
    /// for millis in [30, 10, 20] {
    ///     scope.spawn(async move {
    ///         tokio::time::sleep(Duration::from_millis(millis)).await;
    ///         Ok(millis)
    ///     });
    /// }
    /// let mut order = Vec::new();
    /// while let Some((child, _)) = scope.next().await {
    ///     order.push(child);
    /// }
    /// assert_eq!(order, [1, 2, 0]);
    /// # }
    /// ```
    pub async fn next(&mut self) -> Option<(usize, ChildEnd<T, E>)> {
        poll_fn(|cx| self.poll_ended(cx)).await
    }

    /// Waits for all children and returns what they made, in the order in which they were spawned.
    ///
    /// # Errors
    ///
    /// How each child ended, if not every one is done: some failed, or were cancelled. Without
    /// [`keep_going`](Scope::keep_going), that comes soon after the first failure.
    ///
    /// # Panics
    ///
    /// If a child panicked, its panic goes on here, once all others have ended. [`wait`](Scope::wait) has it as a value.
    pub async fn join(self) -> Result<Vec<T>, ScopeEnd<T, E>> {
        self.wait().await.into_result()
    }

    /// Waits for all children and says how each ended, whatever that was.
    ///
    /// ```
    /// # use resile::{ChildEnd, Scope};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// let mut scope = Scope::new().keep_going();
    /// scope.spawn(async { Ok(1) });
    /// scope.spawn(async { Err("no") });
    /// scope.spawn(async { panic!("a bug") });
    /// let end = scope.wait().await;
    /// assert_eq!((end.first(), end.first_error()), (Some(1), Some(&"no")));
    /// assert!(matches!(&end.children()[2], ChildEnd::Panicked(panic) if panic.message().unwrap() == "a bug"));
    /// # }
    /// ```
    pub async fn wait(mut self) -> ScopeEnd<T, E> {
        let mut ended = BTreeMap::new();
        while let Some((index, end)) = self.next().await {
            ended.insert(index, end);
        }
        self.finish(ended, false)
    }

    fn finish(&self, ended: BTreeMap<usize, ChildEnd<T, E>>, cut: bool) -> ScopeEnd<T, E> {
        let first = self.link.first_failed.get().copied();
        let first = first.and_then(|first| ended.keys().position(|index| *index == first));
        ScopeEnd::new(ended.into_values().collect(), first, self.link.context.cancel_reason(), cut)
    }

    fn poll_ended(&mut self, cx: &mut Task<'_>) -> Poll<Option<(usize, ChildEnd<T, E>)>> {
        loop {
            let (id, end) = match self.tasks.poll_join_next_with_id(cx) {
                Poll::Ready(Some(Ok((id, end)))) => (id, end),
                Poll::Ready(Some(Err(error))) => (error.id(), self.unexpected(error)),
                Poll::Ready(None) => return Poll::Ready(self.next_stuck()),
                Poll::Pending => {
                    if !self.giving_up {
                        let patience = self.patience.get_or_insert_with(|| self.link.patience(self.stuck_after));
                        ready!(patience.as_mut().poll(cx));
                        self.patience = None;
                        self.giving_up = true;
                    }
                    // Patience does not keep to the cooperative budget, and the join above does: when that is spent, it has
                    // not looked, and a child may well have ended.
                    if !tokio::task::coop::has_budget_remaining() {
                        cx.waker().wake_by_ref();
                        return Poll::Pending;
                    }
                    // Whatever still runs is left to itself: the tasks are told to abort, if they ever listen.
                    self.tasks = JoinSet::new();
                    self.giving_up = false;
                    continue;
                }
            };
            if let Some(index) = self.running.remove(&id) {
                return Poll::Ready(Some((index, end)));
            }
        }
    }

    /// A task that ended otherwise than by itself: by a panic, or with its runtime.
    fn unexpected(&self, error: tokio::task::JoinError) -> ChildEnd<T, E> {
        match error.try_into_panic() {
            Ok(payload) => ChildEnd::Panicked(ChildPanic::new(payload)),
            Err(_) => ChildEnd::Cancelled(self.link.context.cancel_reason().unwrap_or(CancelReason::Shutdown)),
        }
    }

    /// One of those that were given up.
    fn next_stuck(&mut self) -> Option<(usize, ChildEnd<T, E>)> {
        let (id, index) = self.running.iter().map(|(id, index)| (*id, *index)).min_by_key(|(_, index)| *index)?;
        self.running.remove(&id);
        Some((index, ChildEnd::Stuck))
    }
}

impl<T, E> Default for Scope<T, E> {
    fn default() -> Self {
        Self::new()
    }
}

/// What children have started elsewhere hears of it too.
impl<T, E> Drop for Scope<T, E> {
    fn drop(&mut self) {
        if !self.running.is_empty() {
            self.link.cancel.cancel_with("the scope was dropped");
        }
    }
}

impl<T, E> fmt::Debug for Scope<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scope")
            .field("spawned", &self.spawned)
            .field("running", &self.running.len())
            .field("context", &self.link.context)
            .finish_non_exhaustive()
    }
}
