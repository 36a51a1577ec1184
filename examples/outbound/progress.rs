//! What is said while the calls are made, and how far the machine can be believed.

use std::fmt::Write as _;
use std::io::{IsTerminal as _, Write as _, stderr};
use std::sync::Arc;
use std::time::Duration;

use hdrhistogram::Histogram;
use tokio::time::{Instant, sleep_until};

use crate::drive::Board;
use crate::script::Script;

/// Reports on standard error until the script has ended: a line that is written over and over on a terminal, a line for
/// each phase elsewhere.
pub async fn report(script: Arc<Script>, start: Instant, boards: Vec<(&'static str, Arc<Board>)>) {
    let terminal = stderr().is_terminal();
    let mut ends = start;
    for (index, phase) in script.phases.iter().enumerate() {
        let begins = ends;
        ends += phase.lasts;
        let mut next = if terminal { begins } else { ends };
        loop {
            next = next.min(ends);
            sleep_until(next).await;
            let mut line = format!(
                "[{:>3.0} of {:.0} s] {:<10}  in time:",
                (next - start).as_secs_f64(),
                script.lasts().as_secs_f64(),
                phase.name
            );
            for (name, board) in &boards {
                // Writing to a string can't fail.
                let _ = write!(line, "  {name} {:>5.1} %", 100.0 * board.good(index));
            }
            let over = next == ends;
            let (before, after) = if terminal { ("\r", if over { "\n" } else { "" }) } else { ("", "\n") };
            // Nor does it matter if nobody listens.
            let _ = write!(stderr(), "{before}{line}{after}");
            if over {
                break;
            }
            next += Duration::from_millis(250);
        }
    }
}

/// How late timers were.
#[derive(Clone, Copy, Debug)]
pub struct Lag {
    pub p99: Duration,
    pub worst: Duration,
}

/// Measures until `ends` how late the runtime wakes somebody who has asked for a certain time. This is the noise in all
/// other numbers: the callers, the policies' timers and the server are woken no better.
pub async fn lag(ends: Instant) -> Lag {
    let mut late = Histogram::<u64>::new_with_bounds(1, 60_000_000, 3).expect("the bounds are in order");
    let mut next = Instant::now();
    while next < ends {
        next = Instant::now() + Duration::from_millis(5);
        sleep_until(next).await;
        late.saturating_record(next.elapsed().as_micros() as u64);
    }
    Lag { p99: Duration::from_micros(late.value_at_quantile(0.99)), worst: Duration::from_micros(late.max()) }
}
