//! Shield: the operation goes on in a task although its caller has left, and holds its passes until it really ends.

use std::borrow::Borrow;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use pin_project::pin_project;
use tokio::task::JoinHandle;

use super::Tasks;
use crate::call::{Attempt, Call, CallBuilder};
use crate::cancel::CancelReason;
use crate::context;
use crate::error::{Cause, Error, ErrorKind, Stop};
use crate::ext::FewSteps;
use crate::policy::{Policy, Steps};
use crate::run::{Make, Once, Plain, Run, WithCall};
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
    /// on](crate::PolicyBuilder::cancel_on). Passes stay held until the operation really ends.
    ///
    /// A panic in the operation goes on in the caller, if it is still there.
    ///
    /// What is handed to `run` goes into a task, so it borrows nothing: the closure is `move` and owns what it uses, and
    /// clones it for each attempt's future, as in [`ShieldBuilder::run`].
    ///
    /// # Errors
    ///
    /// As [`run`](crate::Policy::run). Where the runtime has shut down meanwhile, the call was cancelled because of
    /// [`CancelReason::Shutdown`].
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
    pub fn run<O, F, T, E>(self, operation: O) -> Shield<Run<Policy, Plain<O>, F, C>, T, E>
    where
        O: FnMut() -> F + Send + 'static,
        F: Future<Output = Result<T, E>> + Send + 'static,
        C: Classify<T, E> + Send + 'static,
        T: Send + 'static,
        E: Send + 'static,
    {
        self.run_as(Plain(operation), None)
    }

    /// Runs an operation that sees its call; see [`Policy::run_with`].
    pub fn run_with<O, F, T, E>(self, operation: O) -> Shield<Run<Policy, WithCall<O>, F, C>, T, E>
    where
        O: FnMut(Attempt) -> F + Send + 'static,
        F: Future<Output = Result<T, E>> + Send + 'static,
        C: Classify<T, E> + Send + 'static,
        T: Send + 'static,
        E: Send + 'static,
    {
        self.run_as(WithCall(operation), None)
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
    pub fn run_once<F, T, E>(self, future: F) -> Shield<Run<Policy, Once, F, C>, T, E>
    where
        F: Future<Output = Result<T, E>> + Send + 'static,
        C: Classify<T, E> + Send + 'static,
        T: Send + 'static,
        E: Send + 'static,
    {
        self.run_as(Once, Some(future))
    }

    fn run_as<O, F, T, E>(self, make: O, operation: Option<F>) -> Shield<Run<Policy, O, F, C>, T, E>
    where
        O: Make<F> + Send + 'static,
        F: Future<Output = Result<T, E>> + Send + 'static,
        C: Classify<T, E> + Send + 'static,
        T: Send + 'static,
        E: Send + 'static,
    {
        let tasks = self.policy.tasks().clone();
        let detached = self.outer.is_detached();
        let run = Run::new(self.policy, self.judge, self.inner, make, operation);
        let shielded = Shielded { run: Some(run), task: None, tasks, detached };
        Shield { wait: Run::new(FewSteps::none(), ByResult, self.outer, Once, Some(shielded)) }
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
pub struct Shield<R, T, E>
where
    R: Future<Output = Result<T, Error<E>>> + Send + 'static,
    T: Send + 'static,
    E: Send + 'static,
{
    #[pin]
    wait: Run<FewSteps, Once, Shielded<R, T, E>, ByResult>,
}

impl<R, T, E> Future for Shield<R, T, E>
where
    R: Future<Output = Result<T, Error<E>>> + Send + 'static,
    T: Send + 'static,
    E: Send + 'static,
{
    type Output = Result<T, Error<E>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Poll::Ready(ready!(self.project().wait.poll(cx)).map_err(|error| match error.kind() {
            // What the operation's side came to stands as it is, the caller's own end without it.
            ErrorKind::Failed => error.into_inner().expect("a call that failed has an error"),
            _ => error.flatten(),
        }))
    }
}

impl<R, T, E> fmt::Debug for Shield<R, T, E>
where
    R: Future<Output = Result<T, Error<E>>> + Send + 'static,
    T: Send + 'static,
    E: Send + 'static,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shield").finish_non_exhaustive()
    }
}

/// The operation's side: a run that moves into a task when it is first polled.
#[pin_project]
#[must_use = "futures do nothing unless polled"]
struct Shielded<R, T, E> {
    run: Option<R>,
    task: Option<JoinHandle<Result<T, Error<E>>>>,
    tasks: Tasks,
    detached: bool,
}

impl<R, T, E> Future for Shielded<R, T, E>
where
    R: Future<Output = Result<T, Error<E>>> + Send + 'static,
    T: Send + 'static,
    E: Send + 'static,
{
    type Output = Result<T, Error<E>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        if let Some(run) = this.run.take() {
            let lasting = if *this.detached { None } else { context::current().map(|context| context.without_ends()) };
            *this.task = Some(this.tasks.spawn(context::run_in(lasting, run)));
        }
        let Some(task) = this.task else { panic!("polled again after it was ready") };
        // Outside of the cooperative budget, like the timer: an answer that is there must win over it.
        Poll::Ready(match ready!(Pin::new(&mut tokio::task::unconstrained(task)).poll(cx)) {
            Ok(result) => result,
            Err(end) => match end.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => Err(Error::new(Cause::Cancelled(CancelReason::Shutdown), None, 0, Stop::NoRetry)),
            },
        })
    }
}
