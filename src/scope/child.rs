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
        let reason = self.context.cancel_reason()?;
        // For those who have the scope's handle: the deadline, and tokens that are not the crate's own, are not above it.
        self.cancel.cancel_with(reason.clone());
        Some(reason)
    }

    /// Waits until the scope is cancelled, by whomever.
    async fn closing(&self) -> CancelReason {
        let reason = self.context.cancelled().await;
        self.closed().unwrap_or(reason)
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

    /// A child has failed. If the scope was over before, that is an effect of its end: the reason is returned, and nothing
    /// is noted.
    fn failed(&self, index: usize) -> Option<CancelReason> {
        let over = self.closed();
        let is_cause = over.is_none() && (self.keep_going || self.cancel.cancel_with(CancelReason::SiblingFailed));
        if is_cause {
            // Where the scope keeps going, only the first is noted.
            let _ = self.first_failed.set(index);
            return None;
        }
        // Another child failed in this very moment, or something else ended the scope.
        over.or_else(|| self.closed())
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
            Poll::Ready(Err(error)) => Poll::Ready(match link.failed(*index) {
                None => ChildEnd::Failed(error),
                Some(reason) => ChildEnd::CancelledWith(reason, error),
            }),
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
