//! Policies for a single future, spelled as methods of it.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::TryFuture;
use pin_project::pin_project;
use smallvec::SmallVec;

use crate::call::{Call, CancelSource};
use crate::cut::{CutShort, OnCancel};
use crate::error::Error;
use crate::gate::Gate;
use crate::run::{Once, Run};
use crate::step::{Outline, Pipeline, Step, Steps, sealed};
use crate::verdict::ByResult;

/// Limits, gates and cancellation for any future of a `Result`, without a [`Policy`](crate::Policy).
///
/// Each method but [`on_cancel`](FutureExt::on_cancel) wraps what stands before it, and all of them together make one
/// flat future with one [`Error`](crate::Error). The future is polled once to its end, so there is no retry. A future
/// whose output is no `Result` goes through [`infallible`] first.
///
/// ```
/// use std::time::Duration;
/// use resile::{CircuitBreaker, FutureExt};
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # async fn query() -> Result<Vec<u32>, std::io::Error> { Ok(vec![1, 2]) }
/// let breaker = CircuitBreaker::builder().build()?;
/// let rows = query().through(&breaker).within(Duration::from_secs(1)).await?;
/// assert_eq!(rows, [1, 2]);
/// # Ok(()) }
/// ```
pub trait FutureExt: Future + Sized {
    /// Limits the time from the first poll on; see [`PolicyBuilder::timeout`](crate::PolicyBuilder::timeout).
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::FutureExt;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// let query = std::future::pending::<Result<(), &str>>().within(Duration::from_millis(20));
    /// let error = query.await.unwrap_err();
    /// assert!(error.is_timeout());
    /// assert_eq!(error.elapsed(), Some(Duration::from_millis(20)));
    /// # }
    /// ```
    fn within(self, limit: Duration) -> OneShot<Self>
    where
        Self: TryFuture,
    {
        OneShot::new(self).within(limit)
    }

    /// Passes a gate first.
    ///
    /// ```
    /// # use resile::{FutureExt, Semaphore};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let permits = Semaphore::permits(4).build()?;
    /// let inside = permits.clone();
    /// let query = async { Ok::<_, std::io::Error>(inside.in_use()) };
    /// assert_eq!(query.through(&permits).await?, 1);
    /// assert_eq!(permits.in_use(), 0);
    /// # Ok(()) }
    /// ```
    fn through<G: Gate + Clone>(self, gate: &G) -> OneShot<Self>
    where
        Self: TryFuture,
    {
        OneShot::new(self).through(gate)
    }

    /// Ends when the token is cancelled; see [`CallBuilder::cancel_on`](crate::CallBuilder::cancel_on).
    ///
    /// ```
    /// # use resile::{Cancel, CancelReason, FutureExt};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// let client = Cancel::new();
    /// let query = std::future::pending::<Result<(), &str>>().cancelled_by(&client);
    /// let (end, _) = tokio::join!(query, async { client.cancel_with(CancelReason::ClientGone) });
    /// assert_eq!(end.unwrap_err().cancel_reason(), Some(&CancelReason::ClientGone));
    /// # }
    /// ```
    fn cancelled_by(self, source: &impl CancelSource) -> OneShot<Self>
    where
        Self: TryFuture,
    {
        OneShot::new(self).cancelled_by(source)
    }

    /// Runs `tell` if the future is dropped before it is ready: after it is gone, also if it was never polled. Any future
    /// will do, it need not be of a `Result`.
    ///
    /// It is not run when the future is ready, nor when it panics. It must be short and must not block, since it runs
    /// wherever the future happens to be dropped, perhaps outside of a runtime; what takes longer belongs in a task.
    ///
    /// # Panics
    ///
    /// A panic in `tell` comes out of the drop. While another panic unwinds, as when the future's own drop has panicked,
    /// that aborts the process.
    ///
    /// ```
    /// use std::time::Duration;
    /// use resile::FutureExt;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// let query = std::future::pending::<Result<(), &str>>().on_cancel(|cut| {
    ///     assert!(cut.was_polled());
    ///     assert_eq!(cut.elapsed(), Duration::from_millis(20));
    ///     println!("the query was cut short after {:?}", cut.elapsed());
    /// });
    /// assert!(query.within(Duration::from_millis(20)).await.is_err());
    /// # }
    /// ```
    fn on_cancel<C: FnOnce(CutShort)>(self, tell: C) -> OnCancel<Self, C> {
        OnCancel::new(self, tell)
    }
}

impl<F: Future> FutureExt for F {}

/// A future with limits and gates around it; from [`FutureExt`].
///
/// # Cancel safety
///
/// As [`Run`]: drop it at any time.
#[pin_project]
#[must_use = "futures do nothing unless polled"]
pub struct OneShot<F, E = <F as TryFuture>::Error> {
    #[pin]
    run: Run<FewSteps, Once, F, ByResult, E>,
}

/// The steps of a one-shot future, outermost first. More than four are kept on the heap.
#[derive(Debug)]
pub struct FewSteps {
    steps: SmallVec<[Step; 4]>,
    outline: Outline,
}

impl FewSteps {
    pub(crate) fn none() -> Self {
        Self { steps: SmallVec::new(), outline: Outline::none() }
    }
}

impl sealed::Sealed for FewSteps {}

impl Steps for FewSteps {
    fn pipeline(&self) -> Pipeline<'_> {
        Pipeline { steps: &self.steps, outline: &self.outline }
    }
}

impl<F: TryFuture> OneShot<F> {
    fn new(future: F) -> Self {
        let steps = FewSteps::none();
        Self { run: Run::new(steps, ByResult, Call::new(), Once, Some(future)) }
    }

    /// Limits the time of all that stands before it.
    ///
    /// Said after a gate, it limits the wait there too:
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{FutureExt, Semaphore};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let permits = Semaphore::permits(1).build()?;
    /// let _held = permits.acquire().await?;
    /// let query = async { Ok::<_, &str>(42) };
    /// let error = query.through(&permits).within(Duration::from_millis(20)).await.unwrap_err();
    /// assert!(error.is_timeout());
    /// assert_eq!(error.attempts(), 0);
    /// # Ok(()) }
    /// ```
    pub fn within(self, limit: Duration) -> Self {
        self.inside(Step::timeout(limit))
    }

    /// Passes a gate before all that stands before it.
    ///
    /// Said after a limit, its queue is not in it:
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{FutureExt, Semaphore};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let permits = Semaphore::permits(1).build()?;
    /// let held = permits.acquire().await?;
    /// let query = async { Ok::<_, &str>(42) }.within(Duration::from_millis(20)).through(&permits);
    /// let query = tokio::spawn(query);
    /// tokio::time::sleep(Duration::from_secs(1)).await;
    /// held.success();
    /// assert_eq!(query.await?.unwrap(), 42);
    /// # Ok(()) }
    /// ```
    pub fn through<G: Gate + Clone>(self, gate: &G) -> Self {
        self.inside(Step::gate(gate.clone()))
    }

    /// Ends when the token is cancelled.
    pub fn cancelled_by(mut self, source: &impl CancelSource) -> Self {
        self.run.call_mut().watch(source);
        self
    }

    /// Inherits nothing from the [context](crate::context) of the task; see
    /// [`CallBuilder::detached`](crate::CallBuilder::detached).
    pub fn detached(mut self) -> Self {
        self.run.call_mut().detach();
        self
    }

    fn inside(mut self, step: Step) -> Self {
        let few = self.run.policy_mut();
        few.steps.insert(0, step);
        few.outline = Outline::of(&few.steps, None, None);
        self
    }
}

impl<F, T, E> Future for OneShot<F, E>
where
    F: Future<Output = Result<T, E>>,
{
    type Output = Result<T, Error<E>>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.project().run.poll(cx)
    }
}

impl<F, E> fmt::Debug for OneShot<F, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OneShot").field("run", &self.run).finish()
    }
}

/// Makes a future of a `Result` out of one that cannot fail, so that it can be run under a policy.
///
/// # Errors
///
/// None: the error cannot be made.
///
/// ```
/// use std::time::Duration;
/// use resile::{FutureExt, infallible};
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() {
/// let answer = infallible(async { 42 }).within(Duration::from_secs(1)).await;
/// assert_eq!(answer.unwrap(), 42);
/// # }
/// ```
pub async fn infallible<F: IntoFuture>(future: F) -> Result<F::Output, std::convert::Infallible> {
    Ok(future.await)
}
