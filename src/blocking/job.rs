//! [`Job`]: what a closure sees of its caller, and the word from which it knows whether to begin at all.
//!
//! ```text
//! queued ──begin──▶ running ──end──▶ ended
//!    │                 │                │        the caller can leave at any time: a flag beside the three
//!    ▼                 ▼                ▼
//!  never runs     runs on, counted    nothing
//!                 as abandoned
//! ```
//!
//! 1. A job whose caller has left does not begin: beginning is a compare-and-swap from the queued state without flag.
//! 2. Leaving while it runs adds one to the abandoned, and only an end that sees the flag takes one away. The flag is set
//!    once, so the two come in pairs.
//! 3. What a job captured is dropped before its permit goes back, and the permit before its caller is answered: a caller
//!    that has its answer finds the place free.

use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::call::{instant, remaining};
use crate::context::{Context, Entered};
use crate::error::{Cause, Error, Stop};
use crate::gate::Guard;
use crate::internal::sync::{AcqRel, Acquire, AtomicI64, AtomicU8, Relaxed};
use crate::internal::time::Moment;
use crate::verdict::Verdict;

const QUEUED: u8 = 0;
const RUNNING: u8 = 1;
const ENDED: u8 = 2;
/// The flag beside the three.
const LEFT: u8 = 4;

/// What a caller offloads, boxed so that its future has a name.
pub(crate) type Code<T, E> = Box<dyn FnOnce(Job) -> Result<T, E> + Send>;

/// How many jobs run on although their callers have left.
#[derive(Debug)]
pub(crate) struct Abandoned(AtomicI64);

impl Abandoned {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self(AtomicI64::new(0)))
    }

    pub(crate) fn count(&self) -> u32 {
        // Below zero for the moment in which a job ends before its leaving is counted.
        self.0.load(Relaxed).max(0) as u32
    }
}

/// What a closure sees of its caller: whether anybody still waits, and how long.
///
/// Cheap to clone, so that it can be handed to what the closure itself splits its work among. A closure that takes long
/// looks at it every now and then and returns early; nothing can stop one that does not.
///
/// ```
/// use std::time::Duration;
/// use resile::Blocking;
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let blocking = Blocking::builder().build()?;
/// let lines = ["a", "b", "c"];
///
/// let read = blocking
///     .run(move |job| lines.iter().take_while(|_| !job.is_cancelled()).count())
///     .deadline(Duration::from_secs(1))
///     .await?;
/// assert_eq!(read, 3);
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Job(Arc<Shared>);

struct Shared {
    word: AtomicU8,
    abandoned: Arc<Abandoned>,
    deadline: Moment,
    /// If it has not begun by then, it must not.
    start_by: Moment,
}

impl Job {
    pub(crate) fn new(abandoned: Arc<Abandoned>, deadline: Moment, start_by: Moment) -> Self {
        Self(Arc::new(Shared { word: AtomicU8::new(QUEUED), abandoned, deadline, start_by }))
    }

    /// Whether the caller has left: it dropped the future, or was told that its deadline has passed.
    ///
    /// Cost: one load.
    ///
    /// ```
    /// # use resile::Blocking;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let blocking = Blocking::builder().build()?;
    /// let ((begin, begun), (end, told)) = (std::sync::mpsc::channel(), std::sync::mpsc::channel());
    /// let (say, said) = std::sync::mpsc::channel();
    /// let call = tokio::spawn(blocking.run(move |job| {
    ///     begin.send(job.is_cancelled()).unwrap();
    ///     told.recv().unwrap();
    ///     say.send(job.is_cancelled()).unwrap();
    /// }));
    /// tokio::task::yield_now().await;
    /// assert!(!begun.recv()?);
    /// call.abort();                                    // the caller leaves
    /// assert!(call.await.is_err());
    /// end.send(())?;
    /// assert!(said.recv()?);
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.word.load(Acquire) & LEFT != 0
    }

    /// When the caller must be answered: `None` if it set no deadline.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        instant(self.0.deadline)
    }

    /// What is left until then: zero if it has passed, [`Duration::MAX`] if there is no deadline.
    ///
    /// Cost: reads the clock, unless there is no deadline.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::Blocking;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let blocking = Blocking::builder().build()?;
    /// let left = blocking.run(|job| job.remaining()).deadline(Duration::from_secs(2)).await?;
    /// assert_eq!(left, Duration::from_secs(2), "for a statement timeout, say");
    /// assert_eq!(blocking.run(|job| job.remaining()).await?, Duration::MAX);
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn remaining(&self) -> Duration {
        remaining(self.0.deadline, Moment::now)
    }

    /// Whether the closure is to run.
    fn begin(&self) -> bool {
        let late = self.0.start_by != Moment::NEVER && Moment::now() >= self.0.start_by;
        !late && self.0.word.compare_exchange(QUEUED, RUNNING, AcqRel, Acquire).is_ok()
    }

    /// The closure is over: whether its caller had left.
    fn end(&self) -> bool {
        let left = self.0.word.fetch_or(ENDED, AcqRel) & LEFT != 0;
        if left {
            self.0.abandoned.0.fetch_sub(1, Relaxed);
        }
        left
    }

    /// The caller leaves: whether the job had begun.
    pub(crate) fn leave(&self) -> bool {
        let before = self.0.word.fetch_or(LEFT, AcqRel);
        if before == RUNNING {
            self.0.abandoned.0.fetch_add(1, Relaxed);
        }
        before != QUEUED
    }
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Job")
            .field("cancelled", &self.is_cancelled())
            .field("deadline", &self.0.deadline)
            .finish_non_exhaustive()
    }
}

/// A closure with all that it holds, on its way to a thread.
///
/// Dropped without having run, it gives back in the order of its fields, and the caller finds its answer gone.
pub(crate) struct Work<T, E> {
    pub(crate) code: Code<T, E>,
    pub(crate) permit: Guard,
    pub(crate) answer: oneshot::Sender<Result<T, Error<E>>>,
    pub(crate) job: Job,
    /// In which the closure runs.
    pub(crate) context: Option<Context>,
}

impl<T, E> Work<T, E> {
    /// Runs the closure, or does not if that is no longer wanted. Does not panic, whatever closure, result and waker do:
    /// the thread of a pool would end by it.
    pub(crate) fn run(self) {
        let Self { code, permit, answer, job, mut context } = self;
        if !job.begin() {
            quietly(move || drop(code));
            drop(permit);
            return;
        }
        let own = job.clone();
        let here = Entered::new(&mut context);
        // The closure is gone with what it captured; what others share with it is for its author to keep whole.
        let result = match catch_unwind(AssertUnwindSafe(move || code(own))) {
            Ok(result) => result.map_err(|error| failed(Cause::Failed(Verdict::Transient(None)), Some(error))),
            Err(payload) => Err(failed(Cause::Panicked(message(payload)), None)),
        };
        drop(here);
        if job.end() {
            // Nobody wants it, and dropping it is the last thing the job does with its permit.
            quietly(move || drop(result));
            drop(permit);
        } else {
            drop(permit);
            // The caller may have left in this very moment. Then it is dropped here, outside of the permit.
            quietly(move || drop(answer.send(result)));
        }
    }
}

fn failed<E>(cause: Cause, last: Option<E>) -> Error<E> {
    Error::new(cause, last, 1, Stop::NoRetry)
}

/// What a panic said.
fn message(payload: Box<dyn Any + Send>) -> Arc<str> {
    let message = if let Some(text) = payload.downcast_ref::<&str>() {
        Arc::from(*text)
    } else if let Some(text) = payload.downcast_ref::<String>() {
        Arc::from(text.as_str())
    } else {
        Arc::from("its payload is no text")
    };
    quietly(move || drop(payload));
    message
}

/// Runs what may panic in somebody's drop, which is nothing that this thread should end by.
pub(crate) fn quietly(code: impl FnOnce()) {
    if let Err(payload) = catch_unwind(AssertUnwindSafe(code)) {
        // The payload's own drop may panic, and so on.
        std::mem::forget(payload);
    }
}

#[cfg(all(test, resile_loom))]
mod loom {
    use std::sync::atomic::AtomicBool;

    use ::loom::thread;

    use super::*;
    use crate::loom::explore;

    fn job(abandoned: &Arc<Abandoned>) -> Job {
        Job::new(abandoned.clone(), Moment::NEVER, Moment::NEVER)
    }

    #[test]
    fn a_job_either_runs_or_was_left_before_and_nothing_stays_counted() {
        explore(|| {
            let abandoned = Abandoned::new();
            let job = job(&abandoned);
            let worker = {
                let job = job.clone();
                thread::spawn(move || job.begin().then(|| job.end()))
            };
            let had_begun = job.leave();
            let ran = worker.join().unwrap();
            assert_eq!(ran.is_some(), had_begun);
            assert_eq!(abandoned.0.load(Acquire), 0);
        });
    }

    #[test]
    fn of_two_that_would_run_a_job_one_does() {
        explore(|| {
            let abandoned = Abandoned::new();
            let job = job(&abandoned);
            let ran = Arc::new(AtomicBool::new(false));
            let workers = [(); 2].map(|()| {
                let (job, ran) = (job.clone(), ran.clone());
                thread::spawn(move || {
                    if job.begin() {
                        assert!(!ran.swap(true, Relaxed));
                        job.end();
                    }
                })
            });
            for worker in workers {
                worker.join().unwrap();
            }
            assert!(ran.load(Relaxed));
            assert_eq!(abandoned.count(), 0);
        });
    }
}
