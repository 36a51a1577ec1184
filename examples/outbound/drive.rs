//! The callers: an open loop that makes a call each time one is due, whether or not earlier ones have ended, and
//! measures each from the moment it was *due* until its end. A slow server can't slow its callers down, and a call that
//! was started late has waited.

use std::sync::Arc;
use std::time::Duration;

use hdrhistogram::Histogram;
use parking_lot::Mutex;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::contenders::{Ask, Contender, DEADLINE, Ending};
use crate::script::Script;

/// A call that ends this much after its deadline has outlived it; less is the granularity of timers.
pub const SLACK: Duration = Duration::from_millis(50);
/// A call that has not ended this long after the last one was made never will.
const PATIENCE: Duration = Duration::from_secs(5);

/// What became of the calls that were due in one phase.
#[derive(Clone, Debug)]
pub struct Tally {
    pub calls: u64,
    /// Ended with the right answer before the deadline.
    pub good: u64,
    /// Ended by the client's own rules.
    pub refused: u64,
    /// Ended after deadline and slack, however they ended.
    pub outlived: u64,
    pub attempts: u64,
    /// The time that callers have waited for calls that were not good.
    pub lost: Duration,
    /// Times of all calls in microseconds, the failed ones too.
    times: Histogram<u64>,
}

impl Tally {
    pub fn new() -> anyhow::Result<Self> {
        Ok(Self {
            calls: 0,
            good: 0,
            refused: 0,
            outlived: 0,
            attempts: 0,
            lost: Duration::ZERO,
            times: Histogram::new(3)?,
        })
    }

    fn add(&mut self, end: &End) {
        self.calls += 1;
        let good = end.ending == Ending::Good && end.took <= DEADLINE;
        self.good += u64::from(good);
        self.lost += if good { Duration::ZERO } else { end.took };
        self.refused += u64::from(end.ending == Ending::Refused);
        self.outlived += u64::from(end.took > DEADLINE + SLACK);
        self.attempts += u64::from(end.attempts);
        self.times.record(end.took.as_micros() as u64).expect("the histogram grows");
    }

    pub fn merge(&mut self, other: &Self) -> anyhow::Result<()> {
        self.calls += other.calls;
        self.good += other.good;
        self.refused += other.refused;
        self.outlived += other.outlived;
        self.attempts += other.attempts;
        self.lost += other.lost;
        Ok(self.times.add(&other.times)?)
    }

    /// A count as a share of the calls; 0 when there were none.
    pub fn share(&self, count: u64) -> f64 {
        if self.calls == 0 { 0.0 } else { count as f64 / self.calls as f64 }
    }

    /// The time that a caller has waited for a call that was not good, on average.
    pub fn lost_per_failure(&self) -> Duration {
        self.lost.div_f64((self.calls - self.good).max(1) as f64)
    }

    /// The time that this share of the calls did not exceed.
    pub fn quantile(&self, share: f64) -> Duration {
        Duration::from_micros(self.times.value_at_quantile(share))
    }
}

/// The tallies of one contender, phase by phase: written by the driver, read by who reports progress.
#[derive(Debug)]
pub struct Board(Mutex<Vec<Tally>>);

impl Board {
    pub fn new(script: &Script) -> anyhow::Result<Self> {
        Ok(Self(Mutex::new(script.phases.iter().map(|_| Tally::new()).collect::<anyhow::Result<_>>()?)))
    }

    /// The share of good calls among those of this phase that have ended.
    pub fn good(&self, phase: usize) -> f64 {
        let tallies = self.0.lock();
        tallies[phase].share(tallies[phase].good)
    }

    pub fn tallies(&self) -> Vec<Tally> {
        self.0.lock().clone()
    }
}

/// How one call ended.
struct End {
    phase: usize,
    ending: Ending,
    took: Duration,
    attempts: u32,
}

/// Makes `per_second` calls a second, or a phase's multiple of that, from `start` to the end of the script, waits for the last to end, and returns how
/// many never did.
pub async fn drive(
    contender: Arc<dyn Contender>,
    script: Arc<Script>,
    per_second: u32,
    start: Instant,
    board: Arc<Board>,
) -> usize {
    let note = |end: Result<End, tokio::task::JoinError>| match end {
        Ok(end) => board.0.lock()[end.phase].add(&end),
        // A panic in a contender is a bug of this example: let it be seen.
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    };
    let gap = Duration::from_secs(1) / per_second;
    let mut calls = JoinSet::new();
    let mut since = Duration::ZERO;
    for item in 0_u64.. {
        if since >= script.lasts() {
            break;
        }
        let (due, (phase, _)) = (start + since, script.at(since));
        since += gap / script.phases[phase].load;
        loop {
            tokio::select! {
                biased;
                () = sleep_until(due) => break,
                Some(end) = calls.join_next() => note(end),
            }
        }
        let contender = Arc::clone(&contender);
        calls.spawn(async move {
            let ask = Ask::new(item);
            let ending = contender.call(ask.clone()).await;
            End { phase, ending, took: due.elapsed(), attempts: ask.attempts() }
        });
    }
    let patience = Instant::now() + PATIENCE;
    while let Ok(Some(end)) = timeout_at(patience, calls.join_next()).await {
        note(end);
    }
    calls.len()
}
