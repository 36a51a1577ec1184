//! A child, which watches over its own end, and what binds it to its scope.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context as Task, Poll};
use std::time::Duration;

use pin_project::pin_project;
use tokio::task::unconstrained;

use super::ChildEnd;
use crate::cancel::{Cancel, CancelReason};
use crate::context::{self, Context, Scoped};
use crate::internal::time::Moment;

pub(super) type Waiting<T> = Pin<Box<dyn Future<Output = T> + Send + Sync>>;

/// What binds a child to its scope.
#[derive(Clone)]
pub(super) struct Link {
    pub(super) cancel: Cancel,
    /// That of the children.
    pub(super) context: Context,
    pub(super) grace: Duration,
    pub(super) keep_going: bool,
    pub(super) first_failed: Arc<OnceLock<usize>>,
}

impl Link {
    /// Why no child is to be started any more, if so.
    pub(super) fn closed(&self) -> Option<CancelReason> {
        let ends = self.context.ends();
        if ends != Moment::NEVER && ends <= Moment::now() {
            self.cancel.cancel_with(CancelReason::Deadline);
        }
        self.context.cancel_reason()
    }

    /// Waits until the scope is cancelled, by whomever.
    async fn closing(&self) -> CancelReason {
        if let Some(reason) = self.closed() {
            return reason;
        }
        let cancelled = self.context.cancelled();
        let Some(deadline) = self.context.get_deadline() else { return cancelled.await };
        if let Ok(reason) = tokio::time::timeout_at(deadline, cancelled).await {
            return reason;
        }
        self.cancel.cancel_with(CancelReason::Deadline);
        self.context.cancel_reason().unwrap_or(CancelReason::Deadline)
    }

    /// Waits until children are to be dropped. Outside of the cooperative budget, so that a greedy child can't put it off.
    fn cut(&self) -> Waiting<CancelReason> {
        let link = self.clone();
        Box::pin(unconstrained(async move {
            let reason = link.closing().await;
            pause(link.grace).await;
            reason
        }))
    }

    /// Waits until children are to be given up.
    pub(super) fn patience(&self, stuck_after: Duration) -> Waiting<()> {
        let cut = self.cut();
        Box::pin(unconstrained(async move {
            cut.await;
            tokio::time::sleep(stuck_after).await;
        }))
    }

    fn failed(&self, index: usize) {
        // Only the first is noted.
        let _ = self.first_failed.set(index);
        if !self.keep_going {
            self.cancel.cancel_with(CancelReason::SiblingFailed);
        }
    }
}

/// No pause at all for a zero one, which tokio would make a millisecond.
async fn pause(time: Duration) {
    if !time.is_zero() {
        tokio::time::sleep(time).await;
    }
}

/// The future of a child's task. It watches over its own end, so that nobody has to poll the scope meanwhile.
#[pin_project]
pub(super) struct Child<F> {
    #[pin]
    future: Scoped<F>,
    started: bool,
    cut: Option<Waiting<CancelReason>>,
    /// Dropped after the future, whose drop may panic.
    alarm: Alarm,
}

impl<F> Child<F> {
    pub(super) fn new(link: Link, index: usize, child: F) -> Self {
        let future = context::run_in(link.context.clone(), child);
        Self { future, started: false, cut: None, alarm: Alarm { link, index } }
    }
}

impl<F, T, E> Future for Child<F>
where
    F: Future<Output = Result<T, E>>,
{
    type Output = ChildEnd<T, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Task<'_>) -> Poll<ChildEnd<T, E>> {
        let this = self.project();
        let Alarm { link, index } = this.alarm;
        if !std::mem::replace(this.started, true) {
            if let Some(reason) = link.closed() {
                return Poll::Ready(ChildEnd::Cancelled(reason));
            }
        }
        match this.future.poll(cx) {
            Poll::Ready(Ok(value)) => Poll::Ready(ChildEnd::Done(value)),
            Poll::Ready(Err(error)) => {
                link.failed(*index);
                Poll::Ready(ChildEnd::Failed(error))
            }
            Poll::Pending => this.cut.get_or_insert_with(|| link.cut()).as_mut().poll(cx).map(ChildEnd::Cancelled),
        }
    }
}

/// Tells the siblings of a panic.
struct Alarm {
    link: Link,
    index: usize,
}

impl Drop for Alarm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.link.failed(self.index);
        }
    }
}
