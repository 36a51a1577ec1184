//! What became of the calls, by the way in which they were made.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use resile::{Error, ErrorKind, Why};

use crate::calls::Way;

/// How a call ended, as its task saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Done,
    Failed,
    Refused,
    TimedOut,
    Cancelled,
    /// Its future was dropped on the way.
    Dropped,
    /// Its task was aborted.
    Aborted,
    Panicked,
}

impl End {
    const ALL: [Self; 8] = [
        Self::Done,
        Self::Failed,
        Self::Refused,
        Self::TimedOut,
        Self::Cancelled,
        Self::Dropped,
        Self::Aborted,
        Self::Panicked,
    ];

    pub fn of<T, E>(result: &Result<T, Error<E>>) -> Self {
        result.as_ref().map_or_else(|error| Self::of_kind(error.kind()), |_| Self::Done)
    }

    pub fn of_kind(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::Panicked => Self::Panicked,
            ErrorKind::TimedOut => Self::TimedOut,
            ErrorKind::Refused => Self::Refused,
            ErrorKind::Cancelled => Self::Cancelled,
            _ => Self::Failed,
        }
    }
}

/// A line for each way, a column for each end.
#[derive(Debug, Default)]
pub struct Tally {
    begun: AtomicU64,
    ends: [[AtomicU64; End::ALL.len()]; Way::ALL.len()],
}

impl Tally {
    pub fn begin(&self) {
        self.begun.fetch_add(1, Relaxed);
    }

    pub fn end(&self, way: Way, end: End) {
        self.ends[way as usize][end as usize].fetch_add(1, Relaxed);
    }

    pub fn begun(&self) -> u64 {
        self.begun.load(Relaxed)
    }

    pub fn ended(&self) -> u64 {
        self.ends.iter().flatten().map(|count| count.load(Relaxed)).sum()
    }

    pub fn total(&self, end: End) -> u64 {
        Way::ALL.iter().map(|way| self.count(*way, end)).sum()
    }

    fn count(&self, way: Way, end: End) -> u64 {
        self.ends[way as usize][end as usize].load(Relaxed)
    }

    /// What never happened, although the soak is about it.
    pub fn missing(&self) -> Option<String> {
        let way = Way::ALL.into_iter().find(|way| self.count(*way, End::Done) == 0);
        let end = End::ALL.into_iter().find(|end| self.total(*end) == 0);
        way.map(|way| format!("no call by {way:?} was done")).or(end.map(|end| format!("no call ended as {end:?}")))
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>10}", "")?;
        for end in End::ALL {
            write!(f, "{:>11}", format!("{end:?}").to_lowercase())?;
        }
        for way in Way::ALL {
            write!(f, "\n{:>10}", format!("{way:?}").to_lowercase())?;
            for end in End::ALL {
                write!(f, "{:>11}", self.count(way, end))?;
            }
        }
        write!(f, "\n{:>10}", "all")?;
        for end in End::ALL {
            write!(f, "{:>11}", self.total(end))?;
        }
        Ok(())
    }
}

/// The records of early ends that the policies have told of.
#[derive(Debug, Default)]
pub struct Early([AtomicU64; 4]);

impl Early {
    pub fn count(&self, why: &Why) {
        let place = match why {
            Why::Dropped => 0,
            Why::Cancelled(_) => 1,
            Why::TimedOut(_) => 2,
            _ => 3,
        };
        self.0[place].fetch_add(1, Relaxed);
    }
}

impl fmt::Display for Early {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [dropped, cancelled, late, panicked] = self.0.each_ref().map(|count| count.load(Relaxed));
        write!(f, "{dropped} dropped, {cancelled} cancelled, {late} out of time, {panicked} panicked")
    }
}
