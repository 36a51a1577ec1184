//! [`Offload`], the caller's side of a job: it waits at the entrance, then for the answer, and leaves when it must.

use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::mem;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;

use pin_project::{pin_project, pinned_drop};
use tokio::sync::oneshot;

use super::Bulkhead;
use super::compute::{Place, Pool};
use super::job::{Abandoned, Code, Job, Work};
use crate::call::Deadline;
use crate::cancel::CancelReason;
use crate::context::{self, Context};
use crate::error::{Cause, Error, Limit, Reason, Refusal, Stop};
use crate::gate::{Acquire, Guard};
use crate::internal::time::{Moment, Timer};
use crate::said::{Said, Waits};

/// A job on a thread of its own: a future, made by [`Blocking::run`](crate::Blocking::run),
/// [`Compute::run`](crate::Compute::run) and their like.
///
/// It does nothing until it is polled.
///
/// # Errors
///
/// It resolves to an [`Error`] of one of these kinds:
///
/// * [`Failed`](crate::ErrorKind::Failed): the closure returned an error, which is kept;
/// * [`Panicked`](crate::ErrorKind::Panicked): it panicked, with its message;
/// * [`TimedOut`](crate::ErrorKind::TimedOut): the [deadline](Offload::deadline) passed, or that of the context, with 0 attempts if the closure
///   had not begun, with 1 if it had (and perhaps still runs);
/// * [`Cancelled`](crate::ErrorKind::Cancelled): the [context](crate::context) of the caller's task was cancelled, with
///   attempts as above;
/// * [`Refused`](crate::ErrorKind::Refused): it never ran, since the queue was full, the longest wait was over, or the
///   place or its runtime was shut down.
///
/// # Cancel safety
///
/// Drop it at any time. Before the first poll nothing was taken. In the queue it leaves its place, and the closure is
/// dropped without having run. Once the closure runs, it is told by [`Job::is_cancelled`] and keeps its permit until it
/// really ends.
///
/// # Panics
///
/// Polled outside of a tokio runtime, if it is a [`Blocking`](crate::Blocking)'s or has a deadline. Nothing stays taken.
#[pin_project(PinnedDrop)]
#[must_use = "futures do nothing unless polled"]
pub struct Offload<T, E = Infallible> {
    #[pin]
    timer: Timer,
    /// Sends work to a thread. A function pointer, so that only the constructor needs to know that it can go to one.
    submit: fn(&mut Entrance, Work<T, E>) -> Option<Place>,
    entrance: Entrance,
    stage: Stage<T, E>,
    polled: bool,
    wanted: Option<Deadline>,
    deadline: Moment,
    /// Whose deadline it is.
    limit: Limit,
    /// The context of the caller, which the closure takes along.
    context: Option<Context>,
    /// What may cancel the context, to be waited for.
    said: Option<Arc<Said>>,
    waits: Waits,
    /// The longest wait in a pool's queue is over. A bulkhead's semaphore has a clock of its own.
    start_by: Moment,
}

/// Where a job gets its place and its thread.
enum Entrance {
    /// With the wait at its semaphore, which few jobs need.
    Bulkhead(Arc<Bulkhead>, Option<Pin<Box<Acquire>>>),
    Pool(Arc<Pool>),
}

enum Stage<T, E> {
    /// Not polled, or in the queue of a bulkhead.
    Outside(Code<T, E>),
    /// On the way to a thread, or on it.
    Inside(Inside<T, E>),
    Over,
}

struct Inside<T, E> {
    answer: oneshot::Receiver<Result<T, Error<E>>>,
    job: Job,
    /// In the queue of a pool.
    place: Option<Place>,
}

impl<T: Send + 'static, E: Send + 'static> Offload<T, E> {
    pub(super) fn at_bulkhead(bulkhead: Arc<Bulkhead>, code: Code<T, E>) -> Self {
        Self::new(Entrance::Bulkhead(bulkhead, None), code)
    }

    pub(super) fn at_pool(pool: Arc<Pool>, code: Code<T, E>) -> Self {
        Self::new(Entrance::Pool(pool), code)
    }

    fn new(entrance: Entrance, code: Code<T, E>) -> Self {
        Self {
            timer: Timer::idle(),
            submit: |entrance, work| entrance.submit(move || work.run()),
            entrance,
            stage: Stage::Outside(code),
            polled: false,
            wanted: None,
            deadline: Moment::NEVER,
            limit: Limit::Caller,
            context: None,
            said: None,
            waits: Waits::default(),
            start_by: Moment::NEVER,
        }
    }
}

impl<T, E> Offload<T, E> {
    /// When the caller must be answered: a [`Duration`](std::time::Duration) from the first poll, an instant, or what
    /// [`Attempt::deadline`](crate::Attempt::deadline) says. None by default.
    ///
    /// When it passes, the caller is told at once. A job that has not begun by then never does; one that runs is told
    /// by its flag. An answer that is there in the same poll wins.
    ///
    /// ```
    /// use std::time::Duration;
    /// use resile::{Blocking, Policy};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let blocking = Blocking::builder().build()?;
    /// let policy = Policy::named("thumbnails").timeout(Duration::from_secs(2)).build()?;
    ///
    /// let left = policy
    ///     .run_with(|call| blocking.run(|job| job.remaining()).deadline(call.deadline()))
    ///     .await?;
    /// assert_eq!(left, Duration::from_secs(2), "the closure knows what the policy allows");
    /// # Ok(()) }
    /// ```
    pub fn deadline(mut self, deadline: impl Into<Deadline>) -> Self {
        self.wanted = Some(deadline.into());
        self
    }
}

impl Entrance {
    fn poll_enter(&mut self, cx: &mut std::task::Context<'_>) -> Poll<Result<Guard, Refusal>> {
        match self {
            Self::Bulkhead(_, Some(acquire)) => acquire.as_mut().poll(cx),
            Self::Bulkhead(bulkhead, acquire @ None) => match bulkhead.semaphore.try_acquire() {
                Ok(permit) => Poll::Ready(Ok(permit)),
                Err(_) => acquire.insert(Box::pin(bulkhead.semaphore.acquire())).as_mut().poll(cx),
            },
            Self::Pool(pool) => Poll::Ready(pool.enter()),
        }
    }

    /// Leaves the queue, or gives up a permit that was granted and not used.
    fn leave(&mut self) {
        if let Self::Bulkhead(_, acquire) = self {
            *acquire = None;
        }
    }

    /// Sends a job to a thread: its place, if it stands in a queue.
    fn submit(&mut self, job: impl FnOnce() + Send + 'static) -> Option<Place> {
        match self {
            Self::Bulkhead(_, acquire) => {
                *acquire = None;
                drop(tokio::task::spawn_blocking(job));
                None
            }
            Self::Pool(pool) => pool.submit(job),
        }
    }

    fn abandoned(&self) -> Arc<Abandoned> {
        match self {
            Self::Bulkhead(bulkhead, _) => bulkhead.abandoned.clone(),
            Self::Pool(pool) => pool.abandoned(),
        }
    }

    fn refusal(&self, reason: Reason) -> Refusal {
        match self {
            Self::Bulkhead(bulkhead, _) => bulkhead.refusal(reason),
            Self::Pool(pool) => pool.refusal(reason),
        }
    }
}

impl<T, E> Offload<T, E> {
    /// Sends the closure to a thread.
    fn start(self: Pin<&mut Self>, permit: Guard) {
        let this = self.project();
        let Stage::Outside(code) = mem::replace(this.stage, Stage::Over) else { return };
        if let Entrance::Pool(pool) = this.entrance {
            *this.start_by = pool.give_up();
        }
        let (sender, answer) = oneshot::channel();
        let job = Job::new(this.entrance.abandoned(), *this.deadline, (*this.start_by).min(*this.deadline));
        let work = Work { code, permit, answer: sender, job: job.clone(), context: this.context.take() };
        let place = (this.submit)(this.entrance, work);
        *this.stage = Stage::Inside(Inside { answer, job, place });
    }

    /// The caller goes away: whether the closure had begun.
    fn leave(self: Pin<&mut Self>) -> bool {
        let this = self.project();
        let stage = mem::replace(this.stage, Stage::Over);
        this.entrance.leave();
        let Stage::Inside(inside) = stage else { return false };
        let begun = inside.job.leave();
        if let (Entrance::Pool(pool), Some(place)) = (&*this.entrance, inside.place) {
            drop(pool.withdraw(place));
        }
        begun
    }

    /// At the first poll: what the caller and the context of its task allow.
    fn settle(self: Pin<&mut Self>) {
        let this = self.project();
        *this.polled = true;
        if let Some(wanted) = this.wanted.take() {
            *this.deadline = wanted.counted_now();
        }
        if let Some(context) = context::is_present().then(context::current).flatten() {
            if context.ends() < *this.deadline {
                (*this.deadline, *this.limit) = (context.ends(), Limit::Context);
            }
            *this.said = context.said().cloned();
            *this.context = Some(context);
        }
    }

    /// The longest wait is over: leaves the queue of a pool, unless the job has just left it for a thread.
    fn leave_queue(self: Pin<&mut Self>) -> bool {
        let this = self.project();
        let (Entrance::Pool(pool), Stage::Inside(inside)) = (&*this.entrance, &mut *this.stage) else { return false };
        let work = inside.place.take().and_then(|place| pool.withdraw(place));
        let left = work.is_some();
        if left {
            *this.stage = Stage::Over;
        }
        drop(work);
        left
    }

    fn refused(&self, reason: Reason) -> Error<E> {
        let refusal = self.entrance.refusal(reason);
        Error::new(Cause::Refused(refusal), None, 0, Stop::Final)
    }

    fn timed_out(&self, begun: bool) -> Error<E> {
        Error::new(Cause::timed_out(self.limit), None, begun.into(), Stop::Final)
    }

    fn cancelled(reason: CancelReason, begun: bool) -> Error<E> {
        Error::new(Cause::Cancelled(reason), None, begun.into(), Stop::Final)
    }

    /// The closure was dropped without having run: the clock says why.
    fn unanswered(&self) -> Error<E> {
        let (deadline, start_by) = (self.deadline, self.start_by);
        if deadline.min(start_by) == Moment::NEVER {
            return self.refused(Reason::Closed);
        }
        let now = Moment::now();
        if now >= deadline {
            self.timed_out(false)
        } else if now >= start_by {
            self.refused(Reason::QueueTimeout)
        } else {
            self.refused(Reason::Closed)
        }
    }
}

impl<T, E> Future for Offload<T, E> {
    type Output = Result<T, Error<E>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> Poll<Self::Output> {
        if !self.polled {
            self.as_mut().settle();
        }
        loop {
            let mut this = self.as_mut().project();
            match this.stage {
                Stage::Outside(_) => {
                    // Also what was granted in time does not begin when that is noticed too late.
                    if let Some(reason) = this.said.as_ref().and_then(|said| said.cancel_reason()) {
                        self.as_mut().leave();
                        return Poll::Ready(Err(Self::cancelled(reason, false)));
                    }
                    if *this.deadline != Moment::NEVER && Moment::now() >= *this.deadline {
                        self.as_mut().leave();
                        return Poll::Ready(Err(self.timed_out(false)));
                    }
                    match this.entrance.poll_enter(cx) {
                        Poll::Pending => {}
                        Poll::Ready(Ok(permit)) => {
                            self.as_mut().start(permit);
                            continue;
                        }
                        Poll::Ready(Err(refusal)) => {
                            self.as_mut().leave();
                            return Poll::Ready(Err(Error::new(Cause::Refused(refusal), None, 0, Stop::Final)));
                        }
                    }
                }
                // Outside of the cooperative budget, like the timer: an answer that is there must win over it.
                Stage::Inside(inside) => match Pin::new(&mut tokio::task::unconstrained(&mut inside.answer)).poll(cx) {
                    Poll::Pending => {}
                    Poll::Ready(answer) => {
                        *this.stage = Stage::Over;
                        return Poll::Ready(answer.unwrap_or_else(|_| Err(self.unanswered())));
                    }
                },
                Stage::Over => panic!("polled after it was ready"),
            }
            if let Some(said) = this.said {
                if this.waits.is_over(said, cx) {
                    let reason = said.cancel_reason().unwrap_or_default();
                    let begun = self.leave();
                    return Poll::Ready(Err(Self::cancelled(reason, begun)));
                }
            }
            let queued = match this.stage {
                Stage::Inside(inside) => inside.place.is_some(),
                _ => false,
            };
            let until = if queued { (*this.deadline).min(*this.start_by) } else { *this.deadline };
            if this.timer.as_mut().poll_until(until, cx).is_pending() {
                return Poll::Pending;
            }
            if until == *this.deadline {
                let begun = self.as_mut().leave();
                return Poll::Ready(Err(self.timed_out(begun)));
            }
            if self.as_mut().leave_queue() {
                return Poll::Ready(Err(self.refused(Reason::QueueTimeout)));
            }
        }
    }
}

#[pinned_drop]
impl<T, E> PinnedDrop for Offload<T, E> {
    fn drop(self: Pin<&mut Self>) {
        self.leave();
    }
}

impl<T, E> fmt::Debug for Offload<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stage = match self.stage {
            Stage::Outside(_) => "outside",
            Stage::Inside(_) => "inside",
            Stage::Over => "over",
        };
        f.debug_struct("Offload").field("stage", &stage).field("deadline", &self.deadline).finish_non_exhaustive()
    }
}
