//! A task that has a place while it lives, and is dropped when the grace is over.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use pin_project::pin_project;

use crate::cancel::{Cancel, CancelReason, Cancelled};
use crate::gate::Guard;

/// Its fields are dropped in this order: the work is gone before its place is.
#[pin_project]
pub(super) struct Job<F> {
    #[pin]
    work: F,
    #[pin]
    cancelled: Cancelled,
    _place: Guard,
}

impl<F> Job<F> {
    pub(super) fn new(work: F, cancel: &Cancel, place: Guard) -> Self {
        Self { work, cancelled: cancel.cancelled(), _place: place }
    }
}

impl<F: Future> Future for Job<F> {
    type Output = Result<F::Output, CancelReason>;

    /// What is ready in the poll in which it is cancelled is not lost.
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        if let Poll::Ready(output) = this.work.poll(cx) {
            return Poll::Ready(Ok(output));
        }
        this.cancelled.poll(cx).map(Err)
    }
}
