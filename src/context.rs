//! The context of a request: its deadline, cancellation, priority and keys, for all that is done to serve it.
//!
//! A request comes with a deadline, and the client that sent it may go away. Both concern every call that is made for it,
//! however deep inside, and nobody wants to hand them through each function. So they are put around the task once, and
//! every call under a policy finds them there.
//!
//! ```
//! use std::time::Duration;
//! use resile::context::{self, Context};
//! use resile::{Limit, Policy, Priority};
//!
//! async fn load(policy: &Policy) -> Result<u32, resile::Error<&'static str>> {
//!     policy.run(|| std::future::pending()).await
//! }
//!
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let policy = Policy::named("users").timeout(Duration::from_secs(5)).build()?;
//! let request = Context::new().deadline(Duration::from_millis(300)).priority(Priority::High).key("tenant", "acme");
//!
//! let error = context::scope(request, load(&policy)).await.unwrap_err();
//! assert_eq!(error.limit(), Some(Limit::Context));
//! assert_eq!(error.elapsed(), Some(Duration::from_millis(300)));
//! # Ok(()) }
//! ```
//!
//! # How it decides
//!
//! A call looks for a context at its first poll and keeps what it found. A scope within a scope adds to it:
//!
//! | | two contexts | a context and what the call says itself |
//! | --- | --- | --- |
//! | deadline | the earlier one | the earlier one |
//! | cancellation | either | either |
//! | priority | the inner one, if it says one | the call's, if it says one |
//! | key | the inner one's value for it | the call's value for it |
//!
//! A call that the context's deadline ends has timed out by [`Limit::Context`](crate::Limit::Context), and its gates hear
//! that it was abandoned, as for a deadline of the caller's. A call that the context's cancellation ends tells the
//! reason.
//!
//! It holds for policies, for the methods of [`FutureExt`](crate::FutureExt) and for [scopes](crate::Scope). A gate that
//! is used alone, through a [`Guard`](crate::Guard), inherits nothing: it can end in a refusal only. Nor does a call that
//! says [`detached`](crate::CallBuilder::detached), or what runs within [`detach`].
//!
//! A context stays with its task. To take it along, spawn with [`spawn`], [`spawn_blocking`] or a scope, or wrap what is
//! spawned with [`carry`].
//!
//! # Cancellation
//!
//! A context does not stop code by itself: it ends the calls made in it. Code that makes none can ask
//! [`current`] whether it [is cancelled](Context::is_cancelled).
//!
//! # Cost
//!
//! A call that finds none pays for one look at a thread-local flag, two instructions. One that finds one reads it and
//! clones an `Arc`; it allocates if it has keys or tokens of its own besides, or when it has to wait.
//!
//! # Not for
//!
//! Values that a function needs to do its work: those are arguments.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use pin_project::{pin_project, pinned_drop};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::call::{Deadline, Key, Priority};
use crate::cancel::{Cancel, CancelReason};
use crate::internal::time::{Moment, Timer};
use crate::said::{self, CancelSource, Said, Waits};

thread_local! {
    /// Whether `CURRENT` is there: a plain flag is looked at without initialising anything.
    static PRESENT: Cell<bool> = const { Cell::new(false) };
    static CURRENT: RefCell<Option<Context>> = const { RefCell::new(None) };
}

/// What holds for everything that is done to serve a request; see the [module](self).
///
/// Cheap to clone.
#[derive(Clone)]
#[must_use = "a context does nothing until something is run in it"]
pub struct Context {
    deadline: Moment,
    /// Cancelled once somebody has noticed that `deadline` has passed: its place in the order of ends. Belongs to the
    /// context that set the deadline, which may be further out.
    expiry: Option<Cancel>,
    priority: Option<Priority>,
    said: Option<Arc<Said>>,
}

impl Context {
    /// A context that says nothing.
    pub const fn new() -> Self {
        Self { deadline: Moment::NEVER, expiry: None, priority: None, said: None }
    }

    /// When all of it must be over: a [`Duration`] counts from now. Of several the earliest counts.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::context::Context;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// let request = Context::new().deadline(Duration::from_secs(2)).deadline(Duration::from_secs(5));
    /// tokio::time::advance(Duration::from_millis(500)).await;
    /// assert_eq!(request.remaining(), Duration::from_millis(1500));
    /// # }
    /// ```
    pub fn deadline(mut self, deadline: impl Into<Deadline>) -> Self {
        self.narrow(deadline.into());
        self
    }

    /// What may cancel all of it. Of several the first that is cancelled counts.
    ///
    /// ```
    /// # use resile::context::Context;
    /// # use resile::{Cancel, CancelReason};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// let (client, server) = (Cancel::new(), Cancel::new());
    /// let request = Context::new().cancel(&client).cancel(&server);
    /// assert!(!request.is_cancelled());
    /// server.cancel_with(CancelReason::Shutdown);
    /// assert_eq!(request.cancel_reason(), Some(CancelReason::Shutdown));
    /// # }
    /// ```
    pub fn cancel(mut self, source: &impl CancelSource) -> Self {
        said::own(&mut self.said).watch(source);
        self
    }

    /// How important it is, where a call does not say.
    pub const fn priority(mut self, priority: Priority) -> Self {
        self.priority = Some(priority);
        self
    }

    /// What it is about, for gates that work by key. A key given twice has the later value.
    ///
    /// ```
    /// # use resile::context::Context;
    /// let request = Context::new().key("tenant", "acme").key("user", 7_u32).key("user", 8_u32);
    /// assert_eq!(request.get_key("tenant"), Some(&"acme".into()));
    /// assert_eq!(request.get_key("user"), Some(&8_u32.into()));
    /// ```
    pub fn key(mut self, name: &'static str, value: impl Into<Key>) -> Self {
        said::own(&mut self.said).set_key(name, value.into());
        self
    }

    /// The deadline, if there is one.
    #[must_use]
    pub fn get_deadline(&self) -> Option<Instant> {
        if self.deadline == Moment::NEVER { None } else { self.deadline.to_instant() }
    }

    /// What is left until the deadline: [`Duration::MAX`] if there is none.
    #[must_use]
    pub fn remaining(&self) -> Duration {
        if self.deadline == Moment::NEVER { Duration::MAX } else { self.deadline.since(Moment::now()) }
    }

    /// The priority, if one was said.
    #[must_use]
    pub const fn get_priority(&self) -> Option<Priority> {
        self.priority
    }

    /// The value of a key.
    #[must_use]
    pub fn get_key(&self, name: &str) -> Option<&Key> {
        self.said.as_ref()?.key(name)
    }

    /// Whether it was cancelled, or its deadline has passed.
    ///
    /// Cost: reads the clock if there is a deadline.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.said.as_ref().is_some_and(|said| said.is_cancelled()) || self.is_over()
    }

    /// Why it was cancelled: the reason of the first of its sources, or [`CancelReason::Deadline`] if its deadline passed
    /// before. `None` if nothing has ended it. The first answer is the last one.
    ///
    /// A deadline ends it when somebody notices that it has passed: a call in it, a scope, or a question like this one.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::context::Context;
    /// # use resile::{Cancel, CancelReason};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// let client = Cancel::new();
    /// let request = Context::new().cancel(&client).deadline(Duration::from_secs(1));
    /// tokio::time::advance(Duration::from_secs(1)).await;
    /// assert_eq!(request.cancel_reason(), Some(CancelReason::Deadline));
    /// client.cancel_with(CancelReason::ClientGone);
    /// assert_eq!(request.cancel_reason(), Some(CancelReason::Deadline), "it stays the first one");
    /// # }
    /// ```
    #[must_use]
    pub fn cancel_reason(&self) -> Option<CancelReason> {
        // What was cancelled before somebody notices the deadline comes first.
        if self.is_over() && self.said.as_ref().is_none_or(|said| !said.is_cancelled()) {
            self.expire();
        }
        let said = self.said.as_ref().and_then(|said| said.first());
        let expired = self.expiry.as_ref().and_then(Cancel::record);
        said.into_iter().chain(expired).min_by_key(|record| record.number).map(|record| record.reason)
    }

    /// Waits until it is cancelled or its deadline passes, and says why. It waits forever if it has neither.
    ///
    /// # Cancel safety
    ///
    /// Nothing is lost if it is dropped.
    ///
    /// # Panics
    ///
    /// With a deadline, when it is polled outside of a tokio runtime with its time driver on.
    ///
    /// ```
    /// use resile::context::Context;
    /// use resile::{Cancel, CancelReason};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// let client = Cancel::new();
    /// let request = Context::new().cancel(&client);
    /// let (reason, _) = tokio::join!(request.cancelled(), async { client.cancel_with(CancelReason::ClientGone) });
    /// assert_eq!(reason, CancelReason::ClientGone);
    /// # }
    /// ```
    pub fn cancelled(&self) -> impl Future<Output = CancelReason> + Send + Unpin + 'static {
        let (context, mut waits) = (self.clone(), Waits::default());
        let mut timer: Option<Pin<Box<Timer>>> = None;
        std::future::poll_fn(move |cx| {
            if let Some(reason) = context.cancel_reason() {
                return Poll::Ready(reason);
            }
            let cancelled = context.said.as_ref().is_some_and(|said| waits.is_over(said, cx));
            let over = cancelled
                || context.deadline != Moment::NEVER && {
                    let timer = timer.get_or_insert_with(|| Box::pin(Timer::idle()));
                    timer.as_mut().poll_until(context.deadline, cx).is_ready()
                };
            if over { Poll::Ready(context.cancel_reason().unwrap_or_default()) } else { Poll::Pending }
        })
    }

    fn is_over(&self) -> bool {
        self.deadline != Moment::NEVER && self.deadline <= Moment::now()
    }

    /// Notes that its deadline has passed.
    pub(crate) fn expire(&self) {
        if let Some(expiry) = &self.expiry {
            expiry.cancel_with(CancelReason::Deadline);
        }
    }

    pub(crate) const fn ends(&self) -> Moment {
        self.deadline
    }

    /// What it says but for what could end it.
    pub(crate) fn without_ends(&self) -> Self {
        let said = self.said.as_ref().and_then(|said| said.only_keys());
        Self { deadline: Moment::NEVER, expiry: None, priority: self.priority, said }
    }

    pub(crate) const fn said(&self) -> Option<&Arc<Said>> {
        self.said.as_ref()
    }

    pub(crate) fn narrow(&mut self, deadline: Deadline) {
        self.narrow_by(deadline, Cancel::new);
    }

    /// The same, with what is cancelled when that deadline passes.
    pub(crate) fn narrow_by(&mut self, deadline: Deadline, expiry: impl FnOnce() -> Cancel) {
        let deadline = deadline.counted_now();
        if deadline < self.deadline {
            (self.deadline, self.expiry) = (deadline, Some(expiry()));
        }
    }

    /// The same context with one token in the place of all that may end it so far, and that token. Tokens that are not
    /// the crate's own stay beside it.
    pub(crate) fn gather(mut self) -> (Self, Cancel) {
        let (mut parents, mut rest) = self.said.as_ref().map(|said| said.split_cancels()).unwrap_or_default();
        parents.extend(self.expiry.clone());
        let cancel = Cancel::child_of(parents.into_iter());
        rest.watch(&cancel);
        self.said = Some(Arc::new(rest));
        (self, cancel)
    }

    /// This one inside of another.
    pub(crate) fn within(mut self, outer: &Self) -> Self {
        if outer.deadline < self.deadline {
            (self.deadline, self.expiry) = (outer.deadline, outer.expiry.clone());
        }
        self.priority = self.priority.or(outer.priority);
        said::add(&mut self.said, outer.said());
        self
    }
}

impl Default for Context {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("deadline", &self.deadline)
            .field("priority", &self.priority)
            .field("keys", &self.said.as_ref().map_or(&[][..], |said| said.keys()))
            .field("cancel_reason", &self.cancel_reason())
            .finish_non_exhaustive()
    }
}

/// Whether there is a context here.
#[inline]
pub(crate) fn is_present() -> bool {
    PRESENT.get()
}

/// Reads the context, if there is one.
pub(crate) fn with<R>(read: impl FnOnce(&Context) -> R) -> Option<R> {
    // Where the thread's values are gone already, there is no context either.
    CURRENT.try_with(|current| current.borrow().as_ref().map(read)).ok().flatten()
}

/// The context of the request that is being served here, if there is one.
///
/// ```
/// use resile::context::{self, Context};
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() {
/// assert!(context::current().is_none());
/// context::scope(Context::new().key("tenant", 7_u32), async {
///     let request = context::current().unwrap();
///     assert_eq!(request.get_key("tenant"), Some(&7_u32.into()));
/// })
/// .await;
/// # }
/// ```
#[must_use]
pub fn current() -> Option<Context> {
    with(Context::clone)
}

/// Runs a future in a context, and in the one that is already there.
///
/// ```
/// # use std::time::Duration;
/// # use resile::Priority;
/// # use resile::context::{self, Context};
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() {
/// let request = Context::new().deadline(Duration::from_secs(1)).priority(Priority::High);
/// context::scope(request, async {
///     let part = Context::new().deadline(Duration::from_secs(5)).priority(Priority::Low);
///     let both = context::scope(part, async { context::current().unwrap() }).await;
///     assert_eq!(both.remaining(), Duration::from_secs(1), "the earlier one");
///     assert_eq!(both.get_priority(), Some(Priority::Low), "the inner one");
/// })
/// .await;
/// # }
/// ```
pub fn scope<F: Future>(context: Context, future: F) -> Scoped<F> {
    Scoped { future: Some(future), context: Some(context), nested: false }
}

/// Has a future take along the context of here to wherever it is polled, or that there is none.
///
/// ```
/// use resile::context::{self, Context};
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() {
/// context::scope(Context::new().key("tenant", 7_u32), async {
///     let mut tasks = tokio::task::JoinSet::new();
///     tasks.spawn(context::carry(async { context::current().is_some() }));
///     tasks.spawn(async { context::current().is_some() });
///     let found = tasks.join_all().await;
///     assert!(found.contains(&true) && found.contains(&false));
/// })
/// .await;
/// # }
/// ```
pub fn carry<F: Future>(future: F) -> Scoped<F> {
    Scoped { future: Some(future), context: current(), nested: true }
}

/// Runs a future in exactly this context, or in none.
pub(crate) fn run_in<F>(context: impl Into<Option<Context>>, future: F) -> Scoped<F> {
    Scoped { future: Some(future), context: context.into(), nested: true }
}

/// Runs a future without a context, whatever is around it: for what must go on when the request is over.
///
/// ```
/// use resile::context::{self, Context};
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() {
/// context::scope(Context::new().key("tenant", 7_u32), async {
///     assert!(context::detach(async { context::current() }).await.is_none());
/// })
/// .await;
/// # }
/// ```
pub fn detach<F: Future>(future: F) -> Scoped<F> {
    Scoped { future: Some(future), context: None, nested: true }
}

/// As [`tokio::spawn`], with the context of here.
///
/// # Panics
///
/// Outside of a tokio runtime.
///
/// ```
/// use std::time::Duration;
/// use resile::context::{self, Context};
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() {
/// context::scope(Context::new().deadline(Duration::from_secs(1)), async {
///     let told = context::spawn(async { context::current().unwrap().remaining() });
///     assert_eq!(told.await.unwrap(), Duration::from_secs(1));
/// })
/// .await;
/// # }
/// ```
pub fn spawn<F>(future: F) -> JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    tokio::spawn(carry(future))
}

/// As [`tokio::task::spawn_blocking`], with the context of here: the closure can ask [`current`] what time is left, and
/// whether it is still wanted.
///
/// # Panics
///
/// Outside of a tokio runtime.
///
/// ```
/// use resile::context::{self, Context};
/// use resile::{Cancel, CancelReason};
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() {
/// let client = Cancel::new();
/// client.cancel_with(CancelReason::ClientGone);
/// context::scope(Context::new().cancel(&client), async {
///     let told = context::spawn_blocking(|| context::current().unwrap().cancel_reason());
///     assert_eq!(told.await.unwrap(), Some(CancelReason::ClientGone));
/// })
/// .await;
/// # }
/// ```
pub fn spawn_blocking<R: Send + 'static>(work: impl FnOnce() -> R + Send + 'static) -> JoinHandle<R> {
    let mut context = current();
    tokio::task::spawn_blocking(move || {
        let _here = Entered::new(&mut context);
        work()
    })
}

/// A future in a context; from [`scope`], [`carry`] and [`detach`].
///
/// # Cancel safety
///
/// It is dropped in its context too.
#[pin_project(PinnedDrop)]
#[must_use = "futures do nothing unless polled"]
pub struct Scoped<F> {
    #[pin]
    future: Option<F>,
    context: Option<Context>,
    /// Whether what is around it has been looked at.
    nested: bool,
}

impl<F: Future> Future for Scoped<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> Poll<F::Output> {
        let mut this = self.project();
        if !std::mem::replace(this.nested, true) {
            nest(this.context);
        }
        let _here = Entered::new(this.context);
        let Some(future) = this.future.as_mut().as_pin_mut() else { panic!("polled again after it was ready") };
        let polled = future.poll(cx);
        if polled.is_ready() {
            this.future.set(None);
        }
        polled
    }
}

#[pinned_drop]
impl<F> PinnedDrop for Scoped<F> {
    fn drop(self: Pin<&mut Self>) {
        let mut this = self.project();
        if this.future.is_some() {
            if !*this.nested {
                nest(this.context);
            }
            let _here = Entered::new(this.context);
            this.future.set(None);
        }
    }
}

impl<F> fmt::Debug for Scoped<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scoped").field("context", &self.context).finish_non_exhaustive()
    }
}

fn nest(context: &mut Option<Context>) {
    if let Some(outer) = current() {
        *context = context.take().map(|context| context.within(&outer));
    }
}

/// While it lives, the context is that of the thread; then what was there before comes back.
pub(crate) struct Entered<'a>(&'a mut Option<Context>);

impl<'a> Entered<'a> {
    pub(crate) fn new(context: &'a mut Option<Context>) -> Self {
        swap(context);
        Self(context)
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        swap(self.0);
    }
}

fn swap(context: &mut Option<Context>) {
    let _ = CURRENT.try_with(|current| {
        let mut current = current.borrow_mut();
        std::mem::swap(&mut *current, context);
        PRESENT.set(current.is_some());
    });
}
