//! Polling by hand: a paused clock that moves when told, and wakers that remember.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use tokio::runtime::{Builder, EnterGuard, Runtime};

use super::script::Boom;

/// A runtime with a paused clock that nothing runs on.
pub struct Clock(Runtime);

impl Clock {
    pub fn paused() -> Self {
        let runtime = Builder::new_current_thread().enable_time().start_paused(true).build();
        Self(runtime.expect("a runtime can be built"))
    }

    /// Until the guard is dropped, futures that are polled on this thread find this clock.
    pub fn enter(&self) -> EnterGuard<'_> {
        self.0.enter()
    }

    /// Moves the clock and lets the timers that are due fire.
    pub fn advance(&self, time: Duration) {
        self.0.block_on(tokio::time::advance(time));
    }

    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.0.block_on(future)
    }
}

/// A waker that remembers whether it was woken.
#[derive(Clone, Debug, Default)]
pub struct Flag(Arc<Count>);

#[derive(Debug, Default)]
struct Count(AtomicU32);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl Flag {
    pub fn waker(&self) -> Waker {
        Waker::from(self.0.clone())
    }

    pub fn woken(&self) -> bool {
        self.0.0.load(Ordering::Relaxed) > 0
    }

    pub fn poll<F: Future + ?Sized>(&self, future: Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(&self.waker()))
    }
}

/// A waker that runs code of its own when it is woken and when it is dropped, neither of which may happen under a lock.
pub fn nosy(code: impl Fn() + Send + Sync + 'static) -> Waker {
    struct Nosy<F: Fn()>(F);

    impl<F: Fn() + Send + Sync> Wake for Nosy<F> {
        fn wake(self: Arc<Self>) {
            (self.0)();
        }
    }

    impl<F: Fn()> Drop for Nosy<F> {
        fn drop(&mut self) {
            (self.0)();
        }
    }

    Waker::from(Arc::new(Nosy(code)))
}

/// Polls once with a waker of its own.
pub fn poll_once<F: Future + ?Sized>(future: Pin<&mut F>) -> Poll<F::Output> {
    Flag::default().poll(future)
}

/// Runs code that may end in a [`Boom`]: `None` if it did. Any other panic goes on.
pub fn catch_boom<R>(code: impl FnOnce() -> R) -> Option<R> {
    match catch_unwind(AssertUnwindSafe(code)) {
        Ok(result) => Some(result),
        Err(panic) if panic.is::<Boom>() => None,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}
