//! What an error says to those who read it: the policy's name, what happened, and what to do.

use std::fmt;

use super::{Cause, Error, Limit, Stop, Time};
use crate::cancel::CancelReason;
use crate::verdict::Verdict;

/// Says what happened to the call, under the policy's name; what happened to the operation is for
/// [`source`](std::error::Error::source).
impl<E> fmt::Display for Error<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.policy().is_empty() {
            write!(f, "{}: ", self.policy())?;
        }
        let attempts = self.attempts;
        let when = |f: &mut fmt::Formatter<'_>| match attempts {
            0 => f.write_str(" before the first attempt"),
            attempts => write!(f, " in attempt {attempts}"),
        };
        match &self.cause {
            Cause::Failed(verdict) => self.fmt_failed(*verdict, f),
            Cause::Panicked(message) => write!(f, "panicked in attempt {attempts}: {message}"),
            Cause::TimedOut { limit: Limit::Step { limit, .. }, of_attempt: true } => {
                write!(f, "timed out: attempt {attempts} exceeded {}", Time(*limit))
            }
            Cause::TimedOut { limit: Limit::Step { limit, .. }, .. } => {
                write!(f, "timed out: the call exceeded {}", Time(*limit))?;
                when(f)
            }
            Cause::TimedOut { limit, .. } => {
                write!(f, "timed out: {limit} passed")?;
                when(f)
            }
            Cause::Refused(refusal) => fmt::Display::fmt(refusal, f),
            Cause::Cancelled(reason) => {
                f.write_str("cancelled")?;
                when(f)?;
                if *reason == CancelReason::Unspecified { Ok(()) } else { write!(f, ": {reason}") }
            }
        }
    }
}

impl<E> Error<E> {
    fn fmt_failed(&self, verdict: Verdict, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let attempts = self.attempts;
        match self.stop {
            Stop::NoRetry => return write!(f, "failed in attempt {attempts}"),
            Stop::Final => {
                let verdict = match verdict {
                    Verdict::Permanent => "permanent",
                    Verdict::Committed => "it may have been done",
                    _ => "ignored",
                };
                return write!(f, "failed in attempt {attempts}, not retried: {verdict}");
            }
            Stop::Attempts => write!(f, "failed after {attempts} of {attempts} attempts")?,
            Stop::Elapsed | Stop::Deadline | Stop::Budget => {
                write!(f, "failed after {attempts} {}", if attempts == 1 { "attempt" } else { "attempts" })?;
            }
        }
        if let Some(elapsed) = self.elapsed() {
            write!(f, " in {}", Time(elapsed))?;
        }
        f.write_str(match self.stop {
            Stop::Elapsed => ": the time for retries is used up",
            Stop::Deadline => ": no further one fits before the deadline",
            Stop::Budget => ": the retry budget is empty",
            _ => "",
        })
    }
}
