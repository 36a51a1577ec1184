//! [`Compute`]: threads for work that computes, with a bounded queue in front of them.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use tokio::runtime::Handle;

use super::job::{Abandoned, Job, quietly};
use super::offload::Offload;
use super::{DEFAULT_QUEUE, MOST_THREADS, check_size};
use crate::error::{ConfigError, Faults, Name, Reason, Refusal};
use crate::gate::{Gate, Guard};
use crate::internal::time::{Moment, nanos};
use crate::semaphore::Semaphore;

/// Runs work that computes on threads of its own, as many as there are cores, with a bounded queue before them.
///
/// A computation on the threads of the runtime keeps everything else there from running; on tokio's blocking pool, of
/// hundreds of threads, computations take the cores from each other. Here so many run as there are cores, the next ones
/// wait in order, and what is too much is refused.
///
/// ```
/// use resile::Compute;
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let compute = Compute::builder().threads(2).max_queue(16).build()?;
///
/// let sum = compute.run(|_| (1..=1000_u64).sum::<u64>()).await?;
/// assert_eq!(sum, 500_500);
///
/// let error = compute.run(|_| -> u32 { panic!("no such table") }).await.unwrap_err();
/// assert_eq!(error.panic_message(), Some("no such table"));
/// assert_eq!((compute.running(), compute.queued()), (0, 0));
/// # Ok(()) }
/// ```
///
/// A cheap handle: clones share the threads. What is said of cancellation, panics and errors in the [module](super)
/// holds here too.
///
/// # How it decides
///
/// At its first poll a job gets a thread that is free, or a place in the queue, or is refused. A thread that has ended
/// a job takes the next one itself: no caller need be polled for it. A job whose caller has left, whose
/// [deadline](Offload::deadline) or whose longest wait is over gives its place back and never runs.
///
/// # Shutdown
///
/// The threads live as long as the last handle; a caller that waits has one. When the last is dropped, idle threads end
/// at once, and a thread whose job runs on for nobody ends after it. Dropping does not wait for that, so it may happen
/// anywhere, also in a job. [`close`](Compute::close) sends away who waits or comes. A process that exits cuts off what
/// still runs; to wait for it, keep the callers' futures and await them.
///
/// # Time
///
/// A job runs in the context of its caller's runtime, so [`Job::remaining`] reads the same clock, and `Handle::current()`
/// is there. A paused clock does not know that a thread computes: while all tasks wait for jobs, it jumps to the next
/// timer. [`Blocking`](super::Blocking) holds it still.
///
/// # Cost
///
/// Four allocations, two short locks, and a wake-up in each direction, which is what counts: about what `spawn_blocking`
/// takes, ten to twenty microseconds on two shared cores. It is worth it for what computes for a tenth of a millisecond
/// or more.
///
/// # Not for
///
/// What waits (files, locks, clients that block): it would keep a core's thread idle. That is for
/// [`Blocking`](super::Blocking). Nor does it split one computation among the cores: call rayon's `par_iter` inside of a
/// job for that. The job's thread sleeps meanwhile, and the queue before it bounds how many of those there are at once.
/// (It is not built on rayon because its queue would stand in front of rayon's, which has no bound, and would leave that
/// one empty.)
#[derive(Clone)]
pub struct Compute(Arc<Pool>);

/// What the handles share. Dropped with the last one, it ends the threads.
pub(crate) struct Pool {
    queue: Arc<Queue>,
    /// As many as jobs can be inside, running and waiting. Nobody waits for one.
    seats: Semaphore,
    abandoned: Arc<Abandoned>,
    threads: u32,
    max_queue: u32,
    /// In nanoseconds; the largest number for no limit.
    max_wait: u64,
}

/// What the threads share.
struct Queue {
    jobs: Mutex<Jobs>,
    bell: Condvar,
}

struct Jobs {
    /// By the order in which they came.
    waiting: BTreeMap<u64, Box<dyn FnOnce() + Send>>,
    next: u64,
    closed: bool,
}

/// A place in the queue.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place(u64);

/// Settings of a [`Compute`].
#[derive(Clone, Debug)]
#[must_use = "a builder does nothing until it is built"]
pub struct ComputeBuilder {
    threads: u32,
    max_queue: u32,
    max_wait: Option<Duration>,
    name: Name,
}

impl ComputeBuilder {
    /// How many threads: as many as there are cores by default, at most 4,096.
    pub const fn threads(mut self, threads: u32) -> Self {
        self.threads = threads;
        self
    }

    /// How many jobs may wait for a thread: 1,024 by default, at most 16,777,216. With 0 a job that finds no thread
    /// free is refused.
    ///
    /// ```
    /// # use resile::{Compute, Reason};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let compute = Compute::builder().threads(1).max_queue(0).build()?;
    /// let (end, told) = std::sync::mpsc::channel();
    /// let first = tokio::spawn(compute.run(move |_| told.recv()));
    /// tokio::task::yield_now().await;
    ///
    /// let error = compute.run(|_| 42).await.unwrap_err();
    /// assert_eq!(error.refusal().unwrap().reason(), Reason::QueueFull);
    /// end.send("over")?;
    /// assert_eq!(first.await??, Ok("over"));
    /// # Ok(()) }
    /// ```
    pub const fn max_queue(mut self, jobs: u32) -> Self {
        self.max_queue = jobs;
        self
    }

    /// How long a job may wait for a thread: no limit by default, at least a millisecond.
    pub const fn max_wait(mut self, wait: Duration) -> Self {
        self.max_wait = Some(wait);
        self
    }

    /// The name that refusals and threads carry: `compute` by default.
    pub fn named(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.name = Name::from(name.into());
        self
    }

    /// Starts the threads.
    ///
    /// # Errors
    ///
    /// Threads outside of 1 to 4,096 or more than the system starts, a queue above 16,777,216, a wait below a
    /// millisecond.
    pub fn build(self) -> Result<Compute, ConfigError> {
        let mut faults = Faults::of("compute");
        check_size(&mut faults, self.threads, self.max_queue, self.max_wait);
        faults.into_result()?;
        let name = self.name.as_str();
        // Fits: both are far below half of the most permits.
        let seats = Semaphore::permits(self.threads + self.max_queue).max_queue(0).named(name.to_owned()).build()?;
        let jobs = Jobs { waiting: BTreeMap::new(), next: 0, closed: false };
        let queue = Arc::new(Queue { jobs: Mutex::new(jobs), bell: Condvar::new() });
        // From here on an error drops the pool, which ends the threads that were started.
        let pool = Pool {
            queue,
            seats,
            abandoned: Abandoned::new(),
            threads: self.threads,
            max_queue: self.max_queue,
            max_wait: self.max_wait.map_or(u64::MAX, nanos),
        };
        for number in 1..=self.threads {
            let queue = pool.queue.clone();
            // The name of a thread may hold no zero byte.
            let name = format!("{name} {number}").replace('\0', " ");
            if let Err(error) = thread::Builder::new().name(name).spawn(move || queue.work()) {
                let mut faults = Faults::of("compute");
                faults.check(false, "threads", &self.threads, format!("what the system starts ({error})"));
                faults.into_result()?;
            }
        }
        Ok(Compute(Arc::new(pool)))
    }
}

impl Compute {
    /// Begins a pool with a thread for each core.
    pub fn builder() -> ComputeBuilder {
        let cores = thread::available_parallelism().map_or(1, |cores| u32::try_from(cores.get()).unwrap_or(u32::MAX));
        ComputeBuilder {
            threads: cores.min(MOST_THREADS),
            max_queue: DEFAULT_QUEUE,
            max_wait: None,
            name: Name::Static("compute"),
        }
    }

    /// Runs a closure on one of the threads; see [`Offload`] for how it can end.
    pub fn run<T, C>(&self, code: C) -> Offload<T>
    where
        C: FnOnce(Job) -> T + Send + 'static,
        T: Send + 'static,
    {
        self.try_run(move |job| Ok::<_, Infallible>(code(job)))
    }

    /// Runs a closure that can fail: its error is kept in the one that the future ends in.
    ///
    /// ```
    /// use resile::{Compute, ErrorKind};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let compute = Compute::builder().threads(1).build()?;
    /// let error = compute.try_run(|_| "many".parse::<u32>()).await.unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::Failed);
    /// assert_eq!(error.into_inner().unwrap().to_string(), "invalid digit found in string");
    /// # Ok(()) }
    /// ```
    pub fn try_run<T, E, C>(&self, code: C) -> Offload<T, E>
    where
        C: FnOnce(Job) -> Result<T, E> + Send + 'static,
        T: Send + 'static,
        E: Send + 'static,
    {
        Offload::at_pool(self.0.clone(), Box::new(code))
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.0.seats.name()
    }

    /// How many threads there are.
    #[must_use]
    pub fn threads(&self) -> u32 {
        self.0.threads
    }

    /// How many jobs run.
    #[must_use]
    pub fn running(&self) -> u32 {
        let queued = self.queued();
        self.0.seats.in_use().saturating_sub(queued)
    }

    /// How many jobs wait for a thread.
    #[must_use]
    pub fn queued(&self) -> u32 {
        self.0.queue.jobs.lock().waiting.len() as u32
    }

    /// How many jobs may wait.
    #[must_use]
    pub fn max_queue(&self) -> u32 {
        self.0.max_queue
    }

    /// How many jobs run on although their callers have left: they have not looked at their flag yet, or never do.
    #[must_use]
    pub fn abandoned(&self) -> u32 {
        self.0.abandoned.count()
    }

    /// Closes it for good: whoever waits or comes is refused, whatever runs finishes, and then the threads end.
    ///
    /// ```
    /// # use resile::{Compute, Reason};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let compute = Compute::builder().threads(1).build()?;
    /// let (end, told) = std::sync::mpsc::channel();
    /// let ((begin, begun), other) = (std::sync::mpsc::channel(), compute.clone());
    /// let runs = tokio::spawn(compute.run(move |_| {
    ///     begin.send(()).unwrap();
    ///     told.recv()
    /// }));
    /// let waits = tokio::spawn(other.run(|_| 42));
    /// tokio::task::yield_now().await;
    /// begun.recv()?;
    ///
    /// compute.close();
    /// assert_eq!(waits.await?.unwrap_err().refusal().unwrap().reason(), Reason::Closed);
    /// end.send("over")?;
    /// assert_eq!(runs.await??, Ok("over"));
    /// # Ok(()) }
    /// ```
    pub fn close(&self) {
        self.0.queue.close();
    }

    /// Whether it was closed.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.0.queue.jobs.lock().closed
    }
}

impl fmt::Debug for Compute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compute")
            .field("name", &self.0.seats.name())
            .field("threads", &self.0.threads)
            .field("running", &self.running())
            .field("queued", &self.queued())
            .field("closed", &self.is_closed())
            .finish_non_exhaustive()
    }
}

impl fmt::Display for Compute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.0.seats.name(), self.0.threads)
    }
}

impl Pool {
    /// A seat, if there is one and the pool is not closed.
    pub(super) fn enter(&self) -> Result<Guard, Refusal> {
        if self.queue.jobs.lock().closed {
            return Err(self.refusal(Reason::Closed));
        }
        self.seats.try_acquire().map_err(|_| self.refusal(Reason::QueueFull))
    }

    /// When a job that comes now has waited long enough.
    pub(super) fn give_up(&self) -> Moment {
        match self.max_wait {
            u64::MAX => Moment::NEVER,
            wait => Moment::now().plus_nanos(wait),
        }
    }

    /// Puts a job into the queue, in the context of the runtime that this is called in. A closed pool drops it.
    pub(super) fn submit(&self, job: impl FnOnce() + Send + 'static) -> Option<Place> {
        let runtime = Handle::try_current().ok();
        let job = Box::new(move || {
            let _context = runtime.as_ref().map(Handle::enter);
            job();
        });
        let mut jobs = self.queue.jobs.lock();
        if jobs.closed {
            drop(jobs);
            return None;
        }
        let place = jobs.next;
        jobs.next += 1;
        jobs.waiting.insert(place, job);
        drop(jobs);
        self.queue.bell.notify_one();
        Some(Place(place))
    }

    /// Takes a job back that no thread has taken. The caller drops it.
    pub(super) fn withdraw(&self, place: Place) -> Option<Box<dyn FnOnce() + Send>> {
        self.queue.jobs.lock().waiting.remove(&place.0)
    }

    pub(super) fn abandoned(&self) -> Arc<Abandoned> {
        self.abandoned.clone()
    }

    pub(super) fn refusal(&self, reason: Reason) -> Refusal {
        Refusal::new(self.seats.name().to_owned(), reason)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.queue.close();
    }
}

impl Queue {
    /// What each thread does.
    fn work(&self) {
        while let Some(job) = self.next() {
            job();
        }
    }

    /// The next job, as soon as there is one; none once the pool is closed.
    fn next(&self) -> Option<Box<dyn FnOnce() + Send>> {
        let mut jobs = self.jobs.lock();
        loop {
            if let Some((_, job)) = jobs.waiting.pop_first() {
                return Some(job);
            }
            if jobs.closed {
                return None;
            }
            self.bell.wait(&mut jobs);
        }
    }

    fn close(&self) {
        let mut jobs = self.jobs.lock();
        jobs.closed = true;
        let waiting = std::mem::take(&mut jobs.waiting);
        drop(jobs);
        self.bell.notify_all();
        for job in waiting.into_values() {
            quietly(move || drop(job));
        }
    }
}
