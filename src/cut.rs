//! [`OnCancel`]: a word from a future that is dropped half-way.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use pin_project::{pin_project, pinned_drop};

use crate::internal::time::Moment;

/// What there is to say about a future that was dropped before it was ready; see
/// [`FutureExt::on_cancel`](crate::FutureExt::on_cancel).
///
/// ```
/// # use std::sync::Mutex;
/// # use resile::FutureExt;
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() {
/// let told = Mutex::new(None);
/// drop(std::future::ready(42).on_cancel(|cut| *told.lock().unwrap() = Some(cut)));
/// assert!(!told.lock().unwrap().unwrap().was_polled(), "it has not begun");
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CutShort {
    polled: bool,
    elapsed: Duration,
}

impl CutShort {
    /// Whether it was ever polled: if not, it has not begun.
    #[must_use]
    pub const fn was_polled(&self) -> bool {
        self.polled
    }

    /// How long it ran, from its first poll: zero if there was none.
    #[must_use]
    pub const fn elapsed(&self) -> Duration {
        self.elapsed
    }
}

/// A future that tells when it is dropped half-way; from [`FutureExt::on_cancel`](crate::FutureExt::on_cancel).
#[pin_project(PinnedDrop)]
#[must_use = "futures do nothing unless polled"]
pub struct OnCancel<F, C: FnOnce(CutShort)> {
    #[pin]
    future: Option<F>,
    /// Gone once the future is ready, or has panicked.
    tell: Option<C>,
    /// The first poll; `NEVER` before.
    begun: Moment,
}

impl<F, C: FnOnce(CutShort)> OnCancel<F, C> {
    pub(crate) const fn new(future: F, tell: C) -> Self {
        Self { future: Some(future), tell: Some(tell), begun: Moment::NEVER }
    }
}

impl<F: Future, C: FnOnce(CutShort)> Future for OnCancel<F, C> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let Some(future) = this.future.as_pin_mut() else { panic!("polled again after it was dropped") };
        if *this.begun == Moment::NEVER {
            *this.begun = Moment::now();
        }
        // Put back only if it is pending: a panic is no cancellation.
        let tell = this.tell.take();
        let polled = future.poll(cx);
        if polled.is_pending() {
            *this.tell = tell;
        }
        polled
    }
}

#[pinned_drop]
impl<F, C: FnOnce(CutShort)> PinnedDrop for OnCancel<F, C> {
    fn drop(self: Pin<&mut Self>) {
        /// Tells after the future is gone, even if its drop panics.
        struct Tell<C: FnOnce(CutShort)>(Option<C>, Moment);

        impl<C: FnOnce(CutShort)> Drop for Tell<C> {
            fn drop(&mut self) {
                if let Some(tell) = self.0.take() {
                    let polled = self.1 != Moment::NEVER;
                    let elapsed = if polled { Moment::now().since(self.1) } else { Duration::ZERO };
                    tell(CutShort { polled, elapsed });
                }
            }
        }

        let mut this = self.project();
        let _tell = Tell(this.tell.take(), *this.begun);
        this.future.set(None);
    }
}

impl<F, C: FnOnce(CutShort)> fmt::Debug for OnCancel<F, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OnCancel").field("begun", &self.begun).finish_non_exhaustive()
    }
}
