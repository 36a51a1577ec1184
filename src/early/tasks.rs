//! [`Tasks`]: what a policy's calls have left running.

use std::fmt;
use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::Duration;

use futures::FutureExt;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio_util::task::TaskTracker;

use crate::internal::time::{Moment, Timer};

/// The tasks in which a policy's calls go on although their callers have left: cleanups and shielded operations.
///
/// ```
/// use std::time::Duration;
/// use resile::Policy;
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let policy = Policy::named("payments").build()?;
/// let pay = || async { tokio::time::sleep(Duration::from_secs(1)).await; Ok::<_, &str>("paid") };
/// let _ = tokio::time::timeout(Duration::from_millis(10), policy.call().shield().run(pay)).await;
///
/// assert_eq!(policy.tasks().running(), 1);
/// policy.tasks().idle().await;
/// assert_eq!(policy.tasks().running(), 0);
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Tasks(Arc<Counts>);

struct Counts {
    tracker: TaskTracker,
    cleaned: AtomicU64,
    failed: AtomicU64,
}

impl Tasks {
    pub(crate) fn new() -> Self {
        let tracker = TaskTracker::new();
        // It is only ever waited for to be empty.
        tracker.close();
        Self(Arc::new(Counts { tracker, cleaned: AtomicU64::new(0), failed: AtomicU64::new(0) }))
    }

    /// How many are running.
    #[must_use]
    pub fn running(&self) -> usize {
        self.0.tracker.len()
    }

    /// How many cleanups have run to their end.
    #[must_use]
    pub fn cleaned(&self) -> u64 {
        self.0.cleaned.load(Ordering::Relaxed)
    }

    /// How many cleanups have not: they took longer than they were given, panicked, or had no runtime to run in.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::Policy;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let policy = Policy::named("db").timeout(Duration::from_secs(1)).build()?;
    /// let call = policy.call().cleanup(|(), _| async { panic!("no connection") });
    /// call.run(|| ((), std::future::pending::<Result<(), &str>>())).await.unwrap_err();
    /// policy.tasks().idle().await;
    /// assert_eq!((policy.tasks().cleaned(), policy.tasks().failed()), (0, 1));
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.0.failed.load(Ordering::Relaxed)
    }

    /// Waits until none is running.
    ///
    /// # Cancel safety
    ///
    /// Nothing is lost if it is dropped.
    pub async fn idle(&self) {
        self.0.tracker.wait().await;
    }

    pub(super) fn spawn<F>(&self, future: F) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.0.tracker.spawn(future)
    }

    /// Runs a cleanup within its limit, and counts how it ended.
    pub(super) fn clean<F>(
        &self,
        runtime: Option<&Handle>,
        limit: Duration,
        cleanup: impl FnOnce() -> F + Send + 'static,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        /// A cleanup that is dropped has failed.
        struct Count {
            tasks: Tasks,
            clean: bool,
        }

        impl Count {
            async fn wait(mut self, cleanup: impl Future<Output = bool>) {
                self.clean = cleanup.await;
            }
        }

        impl Drop for Count {
            fn drop(&mut self) {
                let Counts { cleaned, failed, .. } = &*self.tasks.0;
                if self.clean { cleaned } else { failed }.fetch_add(1, Ordering::Relaxed);
            }
        }

        let count = Count { tasks: self.clone(), clean: false };
        let Some(runtime) = runtime else { return };
        let cleanup = AssertUnwindSafe(async { cleanup().await }).catch_unwind();
        let within = async move {
            let mut cleanup = pin!(cleanup);
            let (ends, mut timer, mut has_timers) = (Moment::now() + limit, pin!(Timer::idle()), true);
            poll_fn(move |cx| {
                if let Poll::Ready(end) = cleanup.as_mut().poll(cx) {
                    return Poll::Ready(end.is_ok());
                }
                if Moment::now() >= ends {
                    return Poll::Ready(false);
                }
                // There is no question by which to ask a runtime for timers. Without them the clock is compared whenever the
                // cleanup is polled.
                if has_timers {
                    match catch_unwind(AssertUnwindSafe(|| timer.as_mut().poll_until(ends, cx))) {
                        Ok(over) => return over.map(|()| false),
                        Err(_) => has_timers = false,
                    }
                }
                Poll::Pending
            })
            .await
        };
        self.0.tracker.spawn_on(count.wait(within), runtime);
    }
}

impl fmt::Debug for Tasks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tasks")
            .field("running", &self.running())
            .field("cleaned", &self.cleaned())
            .field("failed", &self.failed())
            .finish()
    }
}
