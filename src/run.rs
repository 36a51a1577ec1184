//! [`Run`], the one future: it brings the call to the operation, polls it, and brings the outcome back.
//!
//! The way in and out is the lane's; what is left for here is the operation itself.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures::future::TryFuture;
use pin_project::{pin_project, pinned_drop};

use crate::call::{Attempt, Call};
use crate::early::Why;
use crate::error::{Cause, Error, Stop};
use crate::internal::seldom::Seldom;
use crate::internal::time::{Moment, Timer};
use crate::lane::{End, Lane, Out};
use crate::step::{Outline, Pipeline, Step, Steps};
use crate::verdict::{ByResult, Classify, Verdict};

/// A call under a policy: a future, made by [`Policy::run`](crate::Policy::run) and its like.
///
/// It does nothing until it is polled. It holds at most one timer, made when something is first pending, and allocates
/// nothing unless the policy has more than eight steps or a retry with a backoff of your own, or the call was given keys
/// or a token.
///
/// `P` holds the policy (a reference, or the policy itself), `O` makes the operation, `F` is the operation's future, `C`
/// judges its results, and `E` is the operation's error. It is `Send` exactly when those are.
///
/// # Cancel safety
///
/// Drop it at any time. The operation is dropped first, then every pass goes back, inner to outer: an operation that
/// was running counts as [abandoned](crate::Outcome::Abandoned), one that had not been made as
/// [not started](crate::Outcome::NotStarted).
///
/// # Panics
///
/// A panic in the operation, its closure or the judge goes on unwinding; the passes come back when the future is
/// dropped, as after a transient failure. Polling again after it was ready or panicked panics, and so does waiting
/// outside of a tokio runtime with its time driver on.
#[pin_project]
#[must_use = "futures do nothing unless polled"]
pub struct Run<P, O, F, C, E = <F as TryFuture>::Error>
where
    P: Steps,
{
    #[pin]
    core: Core<P, O, F, E>,
    judge: C,
}

/// Everything but the judge, which may still be exchanged for another.
#[pin_project(PinnedDrop)]
struct Core<P, O, F, E>
where
    P: Steps,
{
    #[pin]
    operation: Option<F>,
    #[pin]
    timer: Timer,
    lane: Lane,
    /// The error of the attempt before.
    /// By a parameter of its own: as `F::Error`, whether this is `Send` would hang on how `F` is proved to be a future, which
    /// the compiler can't do for borrowed types in a task.
    last: Seldom<E>,
    make: O,
    policy: P,
}

impl<P, O, F, C, E> Run<P, O, F, C, E>
where
    P: Steps,
{
    /// With an operation that is there, or with one to be made.
    #[inline]
    pub(crate) fn new(policy: P, judge: C, call: Call, make: O, operation: Option<F>) -> Self {
        let lane = Lane::new(call, operation.is_some());
        Self { core: Core { operation, timer: Timer::idle(), lane, last: Seldom::NONE, make, policy }, judge }
    }

    /// With an operation that is still to be made, perhaps once only.
    pub(crate) fn to_make(policy: P, judge: C, call: Call, make: O, once: bool) -> Self {
        let lane = Lane::new(call, once);
        Self { core: Core { operation: None, timer: Timer::idle(), lane, last: Seldom::NONE, make, policy }, judge }
    }

    /// Before the first poll only: until when a caller waits that does not end this call.
    pub(crate) fn told_caller(&mut self, ends: Moment) {
        if ends != Moment::NEVER {
            self.call_mut().set_caller_end(ends);
        }
    }

    /// Before the first poll only.
    pub(crate) fn call_mut(&mut self) -> &mut Call {
        self.core.lane.call_mut()
    }

    /// Before the first poll only.
    pub(crate) fn policy_mut(&mut self) -> &mut P {
        &mut self.core.policy
    }
}

impl<P, O, F, E> Run<P, O, F, ByResult, E>
where
    P: Steps,
{
    /// Judges the results with a closure whose argument needs no type: the operation has already named it.
    ///
    /// The same judge as with [`Policy::classify`](crate::Policy::classify), said after the operation. A judge that is
    /// shared, or behind an `Arc`, is borrowed by the closure.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use resile::{ByResult, Classify, Policy, Retry, Verdict};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let policy = Policy::named("pages").retry(Retry::immediate().max_attempts(3)).build()?;
    /// let tried = std::cell::Cell::new(0);
    /// let get = || async {
    ///     tried.set(tried.get() + 1);
    ///     Ok::<u16, std::io::Error>(if tried.get() < 3 { 503 } else { 200 })
    /// };
    ///
    /// let status = policy
    ///     .run(get)
    ///     .judged(|result| match result {
    ///         Ok(500..) | Err(_) => Verdict::Transient(None),
    ///         Ok(_) => Verdict::Success,
    ///     })
    ///     .await?;
    /// assert_eq!((status, tried.get()), (200, 3));
    ///
    /// let shared = Arc::new(ByResult);
    /// assert_eq!(policy.run(get).judged(|result| shared.classify(result)).await?, 200);
    /// # Ok(()) }
    /// ```
    pub fn judged<T, J>(self, judge: J) -> Run<P, O, F, J, E>
    where
        F: Future<Output = Result<T, E>>,
        J: Fn(&Result<T, E>) -> Verdict,
    {
        Run { core: self.core, judge }
    }
}

impl<P, O, F, C, T, E> Future for Run<P, O, F, C, E>
where
    P: Steps,
    O: Make<F>,
    F: Future<Output = Result<T, E>>,
    C: Classify<T, E>,
{
    type Output = Result<T, Error<E>>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        this.core.poll(this.judge, cx)
    }
}

impl<P, O, F, T, E> Core<P, O, F, E>
where
    P: Steps,
    O: Make<F>,
    F: Future<Output = Result<T, E>>,
{
    #[inline]
    fn poll<C>(self: Pin<&mut Self>, judge: &C, cx: &mut Context<'_>) -> Poll<Result<T, Error<E>>>
    where
        C: Classify<T, E>,
    {
        let bare = self.policy.pipeline().outline.bare && self.lane.is_bare();
        if bare { self.poll_bare(judge, cx) } else { self.poll_lane(judge, cx) }
    }

    /// No steps, no deadline, no token: there is only the operation.
    #[inline]
    fn poll_bare<C>(self: Pin<&mut Self>, judge: &C, cx: &mut Context<'_>) -> Poll<Result<T, Error<E>>>
    where
        C: Classify<T, E>,
    {
        let mut this = self.project();
        // Over unless it turns out to be pending: so it is after a panic, too.
        this.lane.end_bare();
        if this.operation.is_none() {
            this.operation.set(this.make.make(this.lane.call().view()));
        }
        let Some(operation) = this.operation.as_mut().as_pin_mut() else { return Poll::Pending };
        let Poll::Ready(result) = operation.poll(cx) else {
            this.lane.stay_bare();
            return Poll::Pending;
        };
        this.operation.set(None);
        let verdict = judge.classify(&result);
        Poll::Ready(result.map_err(|last| {
            this.lane.count();
            failed(this.lane, this.policy.pipeline().outline, verdict, last, Stop::NoRetry)
        }))
    }

    /// In through the steps, the operation, and out again, as often as a retry asks.
    #[inline(never)]
    fn poll_lane<C>(self: Pin<&mut Self>, judge: &C, cx: &mut Context<'_>) -> Poll<Result<T, Error<E>>>
    where
        C: Classify<T, E>,
    {
        let mut this = self.project();
        let pipeline = this.policy.pipeline();
        let Pipeline { steps, outline } = pipeline;
        this.lane.assert_sound();
        this.lane.call().forget_time();
        loop {
            let end = if let Err(end) = ready!(this.lane.poll_enter(pipeline, this.timer.as_mut(), cx)) {
                end
            } else {
                let attempt = this.lane.call().view();
                let judged = this.lane.user(|| {
                    if this.operation.is_none() {
                        this.operation.set(this.make.make(attempt));
                    }
                    let polled = this.operation.as_mut().as_pin_mut().map(|operation| operation.poll(cx));
                    let Some(Poll::Ready(result)) = polled else { return None };
                    this.operation.set(None);
                    Some((judge.classify(&result), judge.cost(&result), result))
                });
                if let Some((verdict, cost, result)) = judged {
                    if let Some(cost) = cost {
                        this.lane.settle(steps, cost);
                    }
                    match this.lane.leave(pipeline, &End::Judged(verdict)) {
                        Out::Caller(stop) => {
                            return Poll::Ready(result.map_err(|last| failed(this.lane, outline, verdict, last, stop)));
                        }
                        // A value that was judged bad is dropped before the next attempt, an error is kept.
                        Out::Again => result.err().into_iter().for_each(|error| **this.last = Some(error)),
                    }
                    continue;
                }
                ready!(this.lane.poll_interrupt(steps, this.timer.as_mut(), cx))
            };
            // The operation is given up before its passes are, like in a drop.
            if let Some(operation) = this.operation.as_mut().as_pin_mut() {
                this.make.give_up(operation, || this.lane.why(steps, &end).unwrap_or(Why::Dropped));
            }
            this.lane.user(|| this.operation.set(None));
            if let Out::Caller(stop) = this.lane.leave(pipeline, &end) {
                return Poll::Ready(Err(ended(this.lane, pipeline, end, this.last.take(), stop)));
            }
        }
    }
}

/// The operation failed and is not tried again.
#[cold]
fn failed<E>(lane: &Lane, outline: &Outline, verdict: Verdict, last: E, stop: Stop) -> Error<E> {
    let error = Error::new(Cause::Failed(verdict), Some(last), lane.made(), stop);
    error.of_policy(outline.name.as_ref()).with_elapsed(lane.elapsed())
}

/// The call ended some other way.
#[cold]
fn ended<E>(lane: &Lane, pipeline: Pipeline<'_>, end: End, last: Option<E>, stop: Stop) -> Error<E> {
    let Pipeline { steps, outline } = pipeline;
    let cause = match end {
        End::TimedOut(place) => {
            let of_attempt = place.is_some_and(|place| steps[..place].iter().any(Step::is_retry)) && lane.made() > 0;
            Cause::TimedOut { limit: lane.limit(steps, place), of_attempt }
        }
        End::Refused(_, refusal) => Cause::Refused(refusal),
        End::Cancelled(reason) => Cause::Cancelled(reason),
        End::Judged(_) => unreachable!("a judged operation has a result"),
    };
    Error::new(cause, last, lane.made(), stop).of_policy(outline.name.as_ref()).with_elapsed(lane.elapsed())
}

#[pinned_drop]
impl<P, O, F, E> PinnedDrop for Core<P, O, F, E>
where
    P: Steps,
{
    #[inline]
    fn drop(self: Pin<&mut Self>) {
        /// Gives the passes back after the operation is gone, even if its drop panics.
        struct GiveBack<'a, P: Steps>(&'a mut Lane, &'a P);

        impl<P: Steps> Drop for GiveBack<'_, P> {
            #[inline]
            fn drop(&mut self) {
                self.0.give_back(self.1.pipeline());
            }
        }

        let mut this = self.project();
        if this.lane.holds() {
            let _passes = GiveBack(this.lane, &*this.policy);
            this.operation.set(None);
        }
    }
}

impl<P, O, F, C, E> fmt::Debug for Run<P, O, F, C, E>
where
    P: Steps,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Run").field("lane", &self.core.lane).finish_non_exhaustive()
    }
}

/// Makes the operation's future for each attempt.
///
/// Implemented by [`Plain`], [`WithCall`] and [`Once`], which stand in the type of a [`Run`].
pub trait Make<F>: sealed::Sealed {
    #[doc(hidden)]
    fn make(&mut self, attempt: Attempt) -> Option<F>;

    /// It is about to be dropped before it is ready.
    #[doc(hidden)]
    #[inline]
    fn give_up(&mut self, operation: Pin<&mut F>, why: impl FnOnce() -> Why) {
        let _ = (operation, why);
    }
}

pub(crate) mod sealed {
    pub trait Sealed {}
    impl<O> Sealed for super::Plain<O> {}
    impl<O> Sealed for super::WithCall<O> {}
    impl Sealed for super::Once {}
}

/// An operation made by a closure without arguments.
#[derive(Clone, Copy, Debug)]
pub struct Plain<O>(pub(crate) O);

impl<O, F> Make<F> for Plain<O>
where
    O: FnMut() -> F,
{
    #[inline]
    fn make(&mut self, _: Attempt) -> Option<F> {
        Some(self.0())
    }
}

/// An operation made by a closure that is given its [`Attempt`].
#[derive(Clone, Copy, Debug)]
pub struct WithCall<O>(pub(crate) O);

impl<O, F> Make<F> for WithCall<O>
where
    O: FnMut(Attempt) -> F,
{
    #[inline]
    fn make(&mut self, attempt: Attempt) -> Option<F> {
        Some(self.0(attempt))
    }
}

/// An operation that is already a future and cannot be made again.
#[derive(Clone, Copy, Debug)]
pub struct Once;

impl<F> Make<F> for Once {
    #[inline]
    fn make(&mut self, _: Attempt) -> Option<F> {
        None
    }
}
