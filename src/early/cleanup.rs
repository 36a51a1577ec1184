//! Drop and clean up: what an operation has begun elsewhere is ended by a task of the user's own.

use std::borrow::Borrow;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use pin_project::{pin_project, pinned_drop};
use tokio::runtime::Handle;

use super::{DEFAULT_CLEANUP_LIMIT, Tasks, Why};
use crate::call::{Attempt, CallBuilder};
use crate::internal::time::Moment;
use crate::policy::Policy;
use crate::run::{Make, Plain, Run, WithCall, sealed};
use crate::step::Steps;

/// What a cleanup is told about the attempt that was cut short.
///
/// ```
/// # use std::sync::{Arc, Mutex};
/// # use std::time::Duration;
/// # use resile::{Interrupted, Policy, Why};
/// type Log = Arc<Mutex<Vec<Interrupted>>>;
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let log = Log::default();
/// let policy = Policy::named("db").timeout(Duration::from_secs(1)).build()?;
/// let call = policy.call().cleanup(|log: Log, cut| async move { log.lock().unwrap().push(cut) });
/// call.run(|| (log.clone(), std::future::pending::<Result<(), &str>>())).await.unwrap_err();
///
/// policy.tasks().idle().await;
/// let cut = &log.lock().unwrap()[0];
/// assert!(matches!(cut.why(), Why::TimedOut(_)));
/// assert_eq!((cut.attempt(), cut.elapsed()), (1, Duration::from_secs(1)));
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Interrupted {
    why: Why,
    attempt: u32,
    elapsed: Duration,
}

impl Interrupted {
    /// What ended it.
    #[must_use]
    pub fn why(&self) -> &Why {
        &self.why
    }

    /// Which attempt it was, counted from 1.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// How long the operation had run.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.elapsed
    }
}

/// A call whose operation is cleaned up after if it is cut short; from [`CallBuilder::cleanup`].
#[must_use = "a call does nothing until it is run"]
pub struct CleanupBuilder<P, C, H> {
    call: CallBuilder<P, C>,
    clean: Box<Clean<H>>,
    limit: Duration,
}

pub(super) type Clean<H> = dyn Fn(H, Interrupted) -> BoxFuture<'static, ()> + Send + Sync;

impl<P: Steps + Borrow<Policy>, C> CallBuilder<P, C> {
    /// Has an async `cleanup` end what the operation has begun, if the operation is cut short.
    ///
    /// The operation's closure then makes two things: a handle and the future. If the future is dropped before it is
    /// ready (the call was dropped or cancelled, a limit passed, it panicked), the cleanup gets the handle and an account
    /// of what happened, and runs in a task of its own, whose [limit](CleanupBuilder::within) is 5 s by default. If
    /// the future ends by itself, the handle is dropped and there is no cleanup. A retry makes a handle per attempt.
    ///
    /// A cleanup that panics or takes too long changes nothing about the call, which has ended by then; it is counted in
    /// [`Policy::tasks`]. Neither does it hold the call's passes: it runs while they go back or after.
    ///
    /// So it runs beside whatever comes next, and *the handle should own what it acts on until the cleanup is over*. A
    /// cancel token of Postgres names the connection, not the query: if the connection goes to somebody else when the
    /// call ends, the cancel may hit the next query on it. With an `Arc` of the connection in the handle, it goes
    /// back to its pool when the cleanup is done.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use std::time::Duration;
    /// use resile::Policy;
    /// use tokio::sync::Notify;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let policy = Policy::named("db").timeout(Duration::from_secs(1)).build()?;
    /// let server = Arc::new(Notify::new());
    ///
    /// let query = policy
    ///     .call()
    ///     .cleanup(|server: Arc<Notify>, _| async move { server.notify_one() })
    ///     .within(Duration::from_secs(2))
    ///     .run(|| (server.clone(), std::future::pending::<Result<(), &str>>()));
    /// assert!(query.await.unwrap_err().is_timeout());
    ///
    /// server.notified().await;
    /// policy.tasks().idle().await;
    /// assert_eq!(policy.tasks().cleaned(), 1);
    /// # Ok(()) }
    /// ```
    pub fn cleanup<H, R>(self, cleanup: impl Fn(H, Interrupted) -> R + Send + Sync + 'static) -> CleanupBuilder<P, C, H>
    where
        R: Future<Output = ()> + Send + 'static,
    {
        let clean = Box::new(move |handle, interrupted| cleanup(handle, interrupted).boxed());
        CleanupBuilder { call: self, clean, limit: DEFAULT_CLEANUP_LIMIT }
    }
}

impl<P: Steps + Borrow<Policy>, C, H: Send + 'static> CleanupBuilder<P, C, H> {
    /// How long the cleanup may take, after which it is dropped: 5 s by default. With zero it is polled once.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::Policy;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let policy = Policy::named("db").timeout(Duration::from_secs(1)).build()?;
    /// let call = policy.call().cleanup(|(), _| std::future::pending()).within(Duration::from_secs(2));
    /// call.run(|| ((), std::future::pending::<Result<(), &str>>())).await.unwrap_err();
    ///
    /// let start = tokio::time::Instant::now();
    /// policy.tasks().idle().await;
    /// assert_eq!(start.elapsed(), Duration::from_secs(2));
    /// assert_eq!((policy.tasks().cleaned(), policy.tasks().failed()), (0, 1));
    /// # Ok(()) }
    /// ```
    pub fn within(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Runs an operation that makes a handle and a future; see [`Policy::run`](crate::Policy::run).
    pub fn run<O, F, T, E>(self, operation: O) -> Run<P, Cleaning<Plain<O>, H>, Cleaned<F, H>, C>
    where
        O: FnMut() -> (H, F),
        F: Future<Output = Result<T, E>>,
    {
        self.run_as(Plain(operation))
    }

    /// The same with an operation that sees its call; see [`Policy::run_with`](crate::Policy::run_with).
    ///
    /// Each attempt can have a handle of its own:
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{Policy, Retry};
    /// # use std::sync::{Arc, Mutex};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let cut = Arc::new(Mutex::new(Vec::new()));
    /// let told = cut.clone();
    /// let twice = Retry::immediate().max_attempts(2);
    /// let policy = Policy::named("db").retry(twice).timeout(Duration::from_secs(1)).build()?;
    /// let call = policy.call().cleanup(move |query, _| {
    ///     told.lock().unwrap().push(query);
    ///     async {}
    /// });
    /// let query = |call: resile::Attempt| (call.attempt(), std::future::pending::<Result<(), &str>>());
    /// assert!(call.run_with(query).await.is_err());
    /// policy.tasks().idle().await;
    /// assert_eq!(*cut.lock().unwrap(), [1, 2]);
    /// # Ok(()) }
    /// ```
    pub fn run_with<O, F, T, E>(self, operation: O) -> Run<P, Cleaning<WithCall<O>, H>, Cleaned<F, H>, C>
    where
        O: FnMut(Attempt) -> (H, F),
        F: Future<Output = Result<T, E>>,
    {
        self.run_as(WithCall(operation))
    }

    fn run_as<M, F, T, E>(self, make: M) -> Run<P, Cleaning<M, H>, Cleaned<F, H>, C>
    where
        F: Future<Output = Result<T, E>>,
    {
        let tasks = self.call.policy().tasks().clone();
        self.call.run_as(Cleaning::new(make, self.clean, self.limit, tasks), None)
    }
}

impl<P: fmt::Debug, C: fmt::Debug, H> fmt::Debug for CleanupBuilder<P, C, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CleanupBuilder").field("call", &self.call).field("limit", &self.limit).finish_non_exhaustive()
    }
}

/// What the attempts of a call share.
struct Cleanup<H> {
    clean: Box<Clean<H>>,
    limit: Duration,
    tasks: Tasks,
}

/// Makes operations with a cleanup; stands in the type of a [`Run`].
pub struct Cleaning<M, H> {
    make: M,
    cleanup: Arc<Cleanup<H>>,
}

impl<M, H> Cleaning<M, H> {
    pub(super) fn new(make: M, clean: Box<Clean<H>>, limit: Duration, tasks: Tasks) -> Self {
        Self { make, cleanup: Arc::new(Cleanup { clean, limit, tasks }) }
    }
}

impl<M, H> fmt::Debug for Cleaning<M, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cleaning").finish_non_exhaustive()
    }
}

impl<M, H> sealed::Sealed for Cleaning<M, H> {}

impl<M, F, H> Make<Cleaned<F, H>> for Cleaning<M, H>
where
    M: Make<(H, F)>,
    H: Send + 'static,
{
    fn make(&mut self, attempt: Attempt) -> Option<Cleaned<F, H>> {
        let (handle, future) = self.make.make(attempt)?;
        let pending = Pending {
            handle,
            cleanup: self.cleanup.clone(),
            attempt: attempt.attempt(),
            begun: Moment::now(),
            runtime: Handle::try_current().ok(),
            why: None,
            begin: Pending::clean,
        };
        Some(Cleaned { future: Some(future), pending: Some(pending) })
    }

    fn give_up(&mut self, operation: Pin<&mut Cleaned<F, H>>, why: impl FnOnce() -> Why) {
        if let Some(pending) = operation.project().pending {
            pending.why = Some(why());
        }
    }
}

/// What there is to clean up as long as the operation is not ready.
struct Pending<H> {
    handle: H,
    cleanup: Arc<Cleanup<H>>,
    attempt: u32,
    begun: Moment,
    runtime: Option<Handle>,
    why: Option<Why>,
    /// A function pointer, so that only who makes this needs to know that the handle can go to another thread.
    begin: fn(Self),
}

impl<H: Send + 'static> Pending<H> {
    fn clean(self) {
        let Self { handle, cleanup, attempt, begun, runtime, why, begin: _ } = self;
        let interrupted =
            Interrupted { why: why.unwrap_or(Why::Dropped), attempt, elapsed: Moment::now().since(begun) };
        let (tasks, limit) = (cleanup.tasks.clone(), cleanup.limit);
        tasks.clean(runtime.as_ref(), limit, move || (cleanup.clean)(handle, interrupted));
    }
}

/// An operation with a cleanup.
#[pin_project(PinnedDrop)]
#[must_use = "futures do nothing unless polled"]
pub struct Cleaned<F, H> {
    #[pin]
    future: Option<F>,
    /// Gone once the future is ready.
    pending: Option<Pending<H>>,
}

impl<F: Future, H> Future for Cleaned<F, H> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let Some(future) = this.future.as_pin_mut() else { panic!("polled again after it was dropped") };
        // Taken back if it comes back: that it doesn't is how a panic is known.
        if let Some(pending) = this.pending {
            pending.why = Some(Why::Panicked);
        }
        let polled = future.poll(cx);
        match this.pending {
            Some(pending) if polled.is_pending() => pending.why = None,
            pending => *pending = None,
        }
        polled
    }
}

#[pinned_drop]
impl<F, H> PinnedDrop for Cleaned<F, H> {
    fn drop(self: Pin<&mut Self>) {
        /// Cleans up after the future is gone, even if its drop panics.
        struct After<H>(Option<Pending<H>>);

        impl<H> Drop for After<H> {
            fn drop(&mut self) {
                if let Some(pending) = self.0.take() {
                    (pending.begin)(pending);
                }
            }
        }

        let mut this = self.project();
        let _after = After(this.pending.take());
        this.future.set(None);
    }
}

impl<F, H> fmt::Debug for Cleaned<F, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cleaned").field("pending", &self.pending.is_some()).finish_non_exhaustive()
    }
}
