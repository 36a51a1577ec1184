//! What makes the server a server: few workers, a bounded line in front of them, and no free lunch.
//!
//! - A fixed number of workers; a request keeps one busy for its whole service time.
//! - A bounded number of places. Who finds none is turned away at once.
//! - The fuller the house, the slower the work: past the workers, each request in line costs memory, cache and lock
//!   contention. So overload lowers the throughput instead of leaving it at its best.
//! - Work that was begun is finished, and work that was taken is begun, whether or not anybody still waits for it. A
//!   client that gives up and tries again has doubled the load, not moved it. This is what feeds a retry storm.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinSet;

const WORKERS: usize = 16;
/// Requests inside at once, in work or in line.
const PLACES: usize = 160;
/// The time of one request in an empty house, on average. With the workers it makes 640 requests a second.
const SERVICE: Duration = Duration::from_millis(25);
/// How many times longer a request takes in a full house than in an empty one.
const CROWDED: f64 = 2.0;

/// The workers of one server and the line before them.
#[derive(Debug)]
pub struct Capacity {
    workers: Arc<Semaphore>,
    inside: AtomicUsize,
    /// Requests that were served although the client had gone.
    in_vain: AtomicU64,
    jobs: Mutex<JoinSet<()>>,
}

impl Capacity {
    pub fn new() -> Self {
        Self {
            workers: Arc::new(Semaphore::new(WORKERS)),
            inside: AtomicUsize::new(0),
            in_vain: AtomicU64::new(0),
            jobs: Mutex::new(JoinSet::new()),
        }
    }

    /// A place inside, or none if the house is full.
    pub fn place(self: &Arc<Self>) -> Option<Place> {
        self.inside
            .fetch_update(Relaxed, Relaxed, |inside| (inside < PLACES).then_some(inside + 1))
            .is_ok()
            .then(|| Place(Arc::clone(self)))
    }

    /// Requests in work, in line, or hanging.
    pub fn inside(&self) -> usize {
        self.inside.load(Relaxed)
    }

    pub fn in_vain(&self) -> u64 {
        self.in_vain.load(Relaxed)
    }

    /// The process dies, and everything that it was doing with it.
    pub fn crash(&self) {
        self.jobs.lock().abort_all();
    }

    fn slowdown(&self) -> f64 {
        let line = self.inside().saturating_sub(WORKERS);
        1.0 + (CROWDED - 1.0) * line as f64 / (PLACES - WORKERS) as f64
    }
}

/// A place inside, given back when dropped.
#[derive(Debug)]
pub struct Place(Arc<Capacity>);

impl Place {
    /// Stands in line for a worker, and has `times` the usual work done, or `at_least` this much. The work is a task of
    /// its own: it goes on when this future is dropped, and keeps the place until it is done.
    ///
    /// `None` if the server crashed meanwhile.
    pub async fn work(self, times: f64, at_least: Duration) -> Option<()> {
        let (done, told) = oneshot::channel();
        let capacity = Arc::clone(&self.0);
        let job = async move {
            let Ok(_worker) = Arc::clone(&self.0.workers).acquire_owned().await else { return };
            let takes = SERVICE.mul_f64(times * self.0.slowdown()).max(at_least);
            tokio::time::sleep(takes).await;
            if done.send(()).is_err() {
                self.0.in_vain.fetch_add(1, Relaxed);
            }
        };
        {
            let mut jobs = capacity.jobs.lock();
            while jobs.try_join_next().is_some() {}
            jobs.spawn(job);
        }
        told.await.ok()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.inside.fetch_sub(1, Relaxed);
    }
}
