//! What was measured, as text: a block for each phase, a line in it for each contender.

use std::fmt::{self, Write as _};
use std::time::Duration;

use crate::drive::{SLACK, Tally};

/// One contender in one phase.
#[derive(Clone, Debug)]
pub struct Row {
    pub name: &'static str,
    pub tally: Tally,
    /// Requests that reached the server, if it is ours to ask.
    pub seen: Option<u64>,
    pub lasted: Duration,
}

impl Row {
    /// Requests that the server saw in a second.
    pub fn load(&self) -> Option<f64> {
        Some(self.seen? as f64 / self.lasted.as_secs_f64())
    }

    pub fn attempts_per_call(&self) -> f64 {
        self.tally.share(self.tally.attempts)
    }
}

/// A phase, or all of them.
#[derive(Clone, Debug)]
pub struct Block {
    pub name: &'static str,
    pub story: String,
    pub rows: Vec<Row>,
}

/// All blocks, displayed as the table.
#[derive(Clone, Debug)]
pub struct Report {
    pub blocks: Vec<Block>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for block in &self.blocks {
            writeln!(f, "{}: {}", block.name, block.story)?;
            writeln!(f, "{HEAD}")?;
            for row in &block.rows {
                writeln!(f, "{}", line(row)?)?;
            }
            writeln!(f)?;
        }
        writeln!(f, "in time    complete, right, and before the deadline")?;
        writeln!(f, "p50 ..     of all calls, the failed ones too, from the moment each was due")?;
        writeln!(f, "lost       how long callers waited for a call that failed, on average")?;
        writeln!(f, "tries      attempts that the client made, per call")?;
        writeln!(f, "load       requests that reached the server, per second and per call")?;
        writeln!(f, "refused    ended early by the client's own rules")?;
        write!(f, "outlived   ended more than {} ms after the deadline", SLACK.as_millis())
    }
}

const HEAD: &str = "               calls   in time       p50       p99     p99.9      lost   tries      load    /call   refused  outlived";

fn line(row: &Row) -> Result<String, fmt::Error> {
    let tally = &row.tally;
    let mut line = String::new();
    write!(line, "  {:<9} {:>8}  {:>6.2} %", row.name, tally.calls, 100.0 * tally.share(tally.good))?;
    for quantile in [0.5, 0.99, 0.999] {
        write!(line, " {:>9}", time(tally.quantile(quantile)))?;
    }
    let lost = if tally.good == tally.calls { "-".to_owned() } else { time(tally.lost_per_failure()) };
    write!(line, " {lost:>9}  {:>6.2}", row.attempts_per_call())?;
    match (row.load(), row.seen) {
        (Some(load), Some(seen)) => write!(line, "   {load:>5.0}/s  {:>7.2}", tally.share(seen))?,
        _ => write!(line, "   {:>7}  {:>7}", "-", "-")?,
    }
    write!(line, "  {:>8}  {:>8}", tally.refused, tally.outlived)?;
    Ok(line)
}

/// Three digits, and a unit that keeps them readable.
fn time(time: Duration) -> String {
    let ms = time.as_secs_f64() * 1e3;
    match ms {
        ..10.0 => format!("{ms:.2} ms"),
        ..100.0 => format!("{ms:.1} ms"),
        _ => format!("{ms:.0} ms"),
    }
}
