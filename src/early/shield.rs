//! Shield: the operation goes on in a task although its caller has left, and holds its passes until it really ends.

#![allow(clippy::type_complexity, reason = "the types say what runs where, and nobody has to write them")]

use std::borrow::Borrow;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context as Task, Poll, ready};
use std::time::Duration;

use futures::FutureExt as _;
use pin_project::pin_project;
use tokio::task::JoinHandle;

use super::cleanup::{Clean, Cleaned, Cleaning, Interrupted};
use super::{DEFAULT_CLEANUP_LIMIT, Tasks, Why};
use crate::call::{Attempt, Call, CallBuilder};
use crate::cancel::CancelReason;
use crate::context::{self, Context};
use crate::error::{Cause, Error, ErrorKind, Stop};
use crate::ext::FewSteps;
use crate::internal::time::Moment;
use crate::policy::Policy;
use crate::run::{Make, Plain, Run, WithCall, sealed};
use crate::step::Steps;
use crate::verdict::{ByResult, Classify};

/// A call whose operation goes on although its caller has left; from [`CallBuilder::shield`].
#[derive(Debug)]
#[must_use = "a call does nothing until it is run"]
pub struct ShieldBuilder<C> {
    policy: Policy,
    judge: C,
    /// The caller's patience: deadline and cancellation.
    outer: Call,
    /// What the gates are to know.
    inner: Call,
}

impl<P: Steps + Borrow<Policy>, C> CallBuilder<P, C> {
    /// Has the operation go on to its end, whatever becomes of the caller.
    ///
    /// At its first poll the whole call, with its steps and retries, moves into a task. The caller gets the answer, or
    /// leaves: by dropping the future, by its deadline or its cancellation, its own or those of its
    /// [context](crate::context). None of these reaches the operation, nor what it calls in turn; keys, cost and priority
    /// do. So a caller who leaves is no [early end](crate::PolicyBuilder::on_early_end) of the call, which goes on. The
    /// policy's own limits hold, and so does what the [policy is cancelled
    /// on](crate::PolicyBuilder::cancel_on). Passes stay held until the operation really ends. The operation can ask how
    /// long its caller would still wait ([`Attempt::caller_remaining`]).
    ///
    /// *A limit of the policy cuts the operation behind the shield, too*: a transaction that is cut between `begin` and
    /// `commit` stays open on its connection. Give such an operation a [`cleanup`](ShieldBuilder::cleanup), or the policy
    /// no limit shorter than what must not be cut.
    ///
    /// A panic in the operation goes on in the caller, if it is still there.
    ///
    /// What is handed to `run` goes into a task, so it borrows nothing: the closure is `move` and owns what it uses, and
    /// clones it for each attempt's future, as in [`ShieldBuilder::run`].
    ///
    /// # Errors
    ///
    /// As [`run`](crate::Policy::run). Where the runtime has shut down meanwhile, the call was cancelled because of
    /// [`CancelReason::Shutdown`]. When the caller leaves, [`attempts`](Error::attempts) says how often the operation had
    /// been made by then: with 0 it may still be made later, since the call goes on.
    ///
    /// # Panics
    ///
    /// When it is first polled outside of a tokio runtime.
    ///
    /// ```
    /// use std::time::Duration;
    /// use resile::{Limit, Policy, Semaphore};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let permits = Semaphore::permits(1).build()?;
    /// let policy = Policy::named("payments").gate(permits.clone()).build()?;
    /// let pay = || async { tokio::time::sleep(Duration::from_secs(1)).await; Ok::<_, &str>("paid") };
    ///
    /// let error = policy.call().deadline(Duration::from_millis(10)).shield().run(pay).await.unwrap_err();
    /// assert_eq!(error.limit(), Some(Limit::Caller));
    /// assert_eq!(permits.in_use(), 1, "it is still being paid");
    ///
    /// policy.tasks().idle().await;
    /// assert_eq!(permits.in_use(), 0);
    /// # Ok(()) }
    /// ```
    pub fn shield(self) -> ShieldBuilder<C> {
        let (policy, judge, outer) = self.into_parts();
        let inner = outer.without_ends();
        ShieldBuilder { policy: policy.borrow().clone(), judge, outer, inner }
    }
}

impl<C> ShieldBuilder<C> {
    /// Runs the operation; see [`Policy::run`]. The closure is `move`, owns what it uses, and makes futures that own theirs.
    ///
    /// ```
    /// use std::sync::{Arc, Mutex};
    /// use resile::Policy;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let policy = Policy::named("payments").build()?;
    /// let ledger = Arc::new(Mutex::new(Vec::new()));
    ///
    /// let own = ledger.clone();
    /// let pay = move || {
    ///     let ledger = own.clone();
    ///     async move { Ok::<_, std::io::Error>(ledger.lock().unwrap().push(100)) }
    /// };
    /// policy.call().shield().run(pay).await?;
    /// assert_eq!(*ledger.lock().unwrap(), [100]);
    /// # Ok(()) }
    /// ```
    pub fn run<O, F, T, E>(self, operation: O) -> Shield<Tasked<Plain<O>, F, C>, T, E>
    where
        O: FnMut() -> F + Send + 'static,
        F: Future<Output = Result<T, E>> + Send + 'static,
        C: Classify<T, E> + Send + 'static,
        T: Send + 'static,
        E: Send + 'static,
    {
        self.run_as(Plain(operation), false)
    }

    /// Runs an operation that sees its call; see [`Policy::run_with`].
    pub fn run_with<O, F, T, E>(self, operation: O) -> Shield<Tasked<WithCall<O>, F, C>, T, E>
    where
        O: FnMut(Attempt) -> F + Send + 'static,
        F: Future<Output = Result<T, E>> + Send + 'static,
        C: Classify<T, E> + Send + 'static,
        T: Send + 'static,
        E: Send + 'static,
    {
        self.run_as(WithCall(operation), false)
    }

    /// Runs a future that cannot be made twice; see [`Policy::run_once`].
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::Policy;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let policy = Policy::named("payments").build()?;
    /// let pay = async {
    ///     tokio::time::sleep(Duration::from_secs(1)).await;
    ///     Ok::<_, &str>("paid")
    /// };
    /// let call = policy.call().shield().run_once(pay);
    /// assert!(tokio::time::timeout(Duration::from_millis(10), call).await.is_err());
    /// assert_eq!(policy.tasks().running(), 1, "it goes on");
    /// # Ok(()) }
    /// ```
    pub fn run_once<F, T, E>(self, future: F) -> Shield<Tasked<Given<F>, F, C>, T, E>
    where
        F: Future<Output = Result<T, E>> + Send + 'static,
        C: Classify<T, E> + Send + 'static,
        T: Send + 'static,
        E: Send + 'static,
    {
        self.run_as(Given(Some(future)), true)
    }

    /// Has an async `cleanup` end what the operation has begun, if it is cut behind the shield: by a limit of the policy, by
    /// what the policy is cancelled on, or by a panic. As [`CallBuilder::cleanup`], with the same rules for the handle.
    ///
    /// The cleanup may take 5 s unless [`within`](ShieldCleanupBuilder::within) says otherwise.
    ///
    /// ```
    /// use std::sync::{Arc, Mutex};
    /// use std::time::Duration;
    /// use resile::Policy;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let policy = Policy::named("db").timeout(Duration::from_millis(50)).build()?;
    /// let log = Arc::new(Mutex::new(Vec::new()));
    ///
    /// let transaction = log.clone();
    /// let call = policy.call().shield().cleanup(|log: Arc<Mutex<Vec<&str>>>, _| async move {
    ///     log.lock().unwrap().push("rollback");
    /// });
    /// let error = call
    ///     .run(move || {
    ///         let log = transaction.clone();
    ///         log.lock().unwrap().push("begin");
    ///         (log, async { tokio::time::sleep(Duration::from_secs(1)).await; Ok::<(), &str>(()) })
    ///     })
    ///     .await
    ///     .unwrap_err();
    /// assert!(error.is_timeout());
    /// policy.tasks().idle().await;
    /// assert_eq!(*log.lock().unwrap(), ["begin", "rollback"]);
    /// # Ok(()) }
    /// ```
    pub fn cleanup<H, R>(
        self,
        cleanup: impl Fn(H, Interrupted) -> R + Send + Sync + 'static,
    ) -> ShieldCleanupBuilder<C, H>
    where
        R: Future<Output = ()> + Send + 'static,
    {
        let clean = Box::new(move |handle, interrupted| cleanup(handle, interrupted).boxed());
        ShieldCleanupBuilder { shield: self, clean, limit: DEFAULT_CLEANUP_LIMIT }
    }

    fn run_as<M, F, T, E>(self, make: M, once: bool) -> Shield<Tasked<M, F, C>, T, E>
    where
        M: Make<F> + Send + 'static,
        F: Future<Output = Result<T, E>> + Send + 'static,
        C: Classify<T, E> + Send + 'static,
        T: Send + 'static,
        E: Send + 'static,
    {
        let tasks = self.policy.tasks().clone();
        let detached = self.outer.is_detached();
        let count = Arc::new(AtomicU32::new(0));
        let make = Counted { make, made: count.clone() };
        let run = Run::to_make(self.policy, self.judge, self.inner, make, once);
        let spawn = Spawn { run: Some(run), tasks, detached, start: spawn_run, tell: Run::told_caller };
        Shield { wait: Run::to_make(FewSteps::none(), ByResult, self.outer, spawn, true), made: count }
    }
}

/// A shielded call whose operation is cleaned up after if it is cut; from [`ShieldBuilder::cleanup`].
#[must_use = "a call does nothing until it is run"]
pub struct ShieldCleanupBuilder<C, H> {
    shield: ShieldBuilder<C>,
    clean: Box<Clean<H>>,
    limit: Duration,
}

impl<C, H: Send + 'static> ShieldCleanupBuilder<C, H> {
    /// How long the cleanup may take, after which it is dropped: 5 s by default. With zero it is polled once.
    pub fn within(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Runs an operation that makes a handle and a future; see [`ShieldBuilder::run`].
    pub fn run<O, F, T, E>(self, operation: O) -> Shield<Tasked<Cleaning<Plain<O>, H>, Cleaned<F, H>, C>, T, E>
    where
        O: FnMut() -> (H, F) + Send + 'static,
        F: Future<Output = Result<T, E>> + Send + 'static,
        C: Classify<T, E> + Send + 'static,
        T: Send + 'static,
        E: Send + 'static,
    {
        let tasks = self.shield.policy.tasks().clone();
        let make = Cleaning::new(Plain(operation), self.clean, self.limit, tasks);
        self.shield.run_as(make, false)
    }

    /// The same with an operation that sees its call; see [`ShieldBuilder::run_with`].
    pub fn run_with<O, F, T, E>(self, operation: O) -> Shield<Tasked<Cleaning<WithCall<O>, H>, Cleaned<F, H>, C>, T, E>
    where
        O: FnMut(Attempt) -> (H, F) + Send + 'static,
        F: Future<Output = Result<T, E>> + Send + 'static,
        C: Classify<T, E> + Send + 'static,
        T: Send + 'static,
        E: Send + 'static,
    {
        let tasks = self.shield.policy.tasks().clone();
        let make = Cleaning::new(WithCall(operation), self.clean, self.limit, tasks);
        self.shield.run_as(make, false)
    }
}

impl<C: fmt::Debug, H> fmt::Debug for ShieldCleanupBuilder<C, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShieldCleanupBuilder")
            .field("shield", &self.shield)
            .field("limit", &self.limit)
            .finish_non_exhaustive()
    }
}

/// Counts the operations that it makes, for the caller of a shield; stands in the type of a [`Shield`].
#[derive(Debug)]
pub struct Counted<M> {
    make: M,
    made: Arc<AtomicU32>,
}

impl<M> sealed::Sealed for Counted<M> {}

impl<M: Make<F>, F> Make<F> for Counted<M> {
    fn make(&mut self, attempt: Attempt) -> Option<F> {
        self.made.fetch_add(1, Relaxed);
        self.make.make(attempt)
    }

    fn give_up(&mut self, operation: Pin<&mut F>, why: impl FnOnce() -> Why) {
        self.make.give_up(operation, why);
    }
}

/// An operation that is already a future; stands in the type of a [`Shield`].
#[derive(Debug)]
pub struct Given<F>(Option<F>);

impl<F> sealed::Sealed for Given<F> {}

impl<F> Make<F> for Given<F> {
    fn make(&mut self, _: Attempt) -> Option<F> {
        self.0.take()
    }
}

/// The caller's side of a call behind a shield; from [`ShieldBuilder::run`].
///
/// # Cancel safety
///
/// Dropped before its first poll, the operation is never made. Dropped later, the operation goes on in its task, and its
/// result is dropped there.
#[pin_project]
#[must_use = "futures do nothing unless polled"]
pub struct Shield<R, T, E> {
    #[pin]
    wait: Run<FewSteps, Spawn<R, T, E>, Shielded<T, E>, ByResult, Error<E>>,
    /// How often the operation was made.
    made: Arc<AtomicU32>,
}

impl<R, T, E> Future for Shield<R, T, E> {
    type Output = Result<T, Error<E>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Task<'_>) -> Poll<Self::Output> {
        let this = self.project();
        Poll::Ready(ready!(this.wait.poll(cx)).map_err(|error| match error.kind() {
            // What the operation's side came to stands as it is, unless its task was lost with its runtime.
            ErrorKind::Failed => {
                let error = error.into_inner().expect("a call that failed has an error");
                let was_lost = error.stop() == Stop::NoRetry && error.attempts() == 0 && error.is_cancelled();
                if was_lost { error.with_attempts(this.made.load(Relaxed)) } else { error }
            }
            // The caller's own end: waiting was no attempt.
            _ => error.flatten().with_attempts(this.made.load(Relaxed)),
        }))
    }
}

impl<R, T, E> fmt::Debug for Shield<R, T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shield").field("made", &self.made).finish_non_exhaustive()
    }
}

/// A call that runs in a task.
type Tasked<M, F, C> = Run<Policy, Counted<M>, F, C>;
type Handle<T, E> = JoinHandle<Result<T, Error<E>>>;

/// Moves a call into a task when its caller is first polled. How a task is spawned is a function pointer, so that only
/// the constructor needs to know that all of it can go to another thread.
pub(crate) struct Spawn<R, T, E> {
    run: Option<R>,
    tasks: Tasks,
    detached: bool,
    start: fn(&Tasks, Option<Context>, R) -> Handle<T, E>,
    tell: fn(&mut R, Moment),
}

fn spawn_run<R, T, E>(tasks: &Tasks, context: Option<Context>, run: R) -> Handle<T, E>
where
    R: Future<Output = Result<T, Error<E>>> + Send + 'static,
    T: Send + 'static,
    E: Send + 'static,
{
    tasks.spawn(context::run_in(context, run))
}

impl<R, T, E> sealed::Sealed for Spawn<R, T, E> {}

impl<R, T, E> Make<Shielded<T, E>> for Spawn<R, T, E> {
    fn make(&mut self, caller: Attempt) -> Option<Shielded<T, E>> {
        let mut run = self.run.take()?;
        (self.tell)(&mut run, caller.ends());
        let lasting = if self.detached { None } else { context::current().map(|context| context.without_ends()) };
        Some(Shielded((self.start)(&self.tasks, lasting, run)))
    }
}

/// The operation's side.
#[must_use = "futures do nothing unless polled"]
struct Shielded<T, E>(Handle<T, E>);

impl<T, E> Future for Shielded<T, E> {
    type Output = Result<T, Error<E>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Task<'_>) -> Poll<Self::Output> {
        // Outside of the cooperative budget, like the timer: an answer that is there must win over it.
        Poll::Ready(match ready!(Pin::new(&mut tokio::task::unconstrained(&mut self.0)).poll(cx)) {
            Ok(result) => result,
            Err(end) => match end.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => Err(Error::new(Cause::Cancelled(CancelReason::Shutdown), None, 0, Stop::NoRetry)),
            },
        })
    }
}
