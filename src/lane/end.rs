//! [`End`]: how an attempt ended, and what is reported about it.

use std::time::Duration;

use super::{Lane, Phase};
use crate::cancel::CancelReason;
use crate::drain;
use crate::early::{EarlyEnd, Listeners, Stage, Why};
use crate::error::{Limit, Refusal};
use crate::gate::Gate;
use crate::retry::Ended;
use crate::step::{Kind, Limited, Step};
use crate::verdict::Verdict;

/// How an attempt ended.
#[derive(Debug)]
pub(crate) enum End {
    Judged(Verdict),
    /// The deadline of a step passed, or of the caller (`None`).
    TimedOut(Option<usize>),
    /// The gate at this place said no.
    Refused(usize, Refusal),
    /// For the reason that was the first when it was noticed.
    Cancelled(CancelReason),
}

impl End {
    /// Whether a retry may have something to do about it.
    #[inline]
    pub(super) fn is_final(&self) -> bool {
        match self {
            Self::Judged(verdict) => !verdict.is_retryable(),
            Self::TimedOut(None) | Self::Cancelled(_) => true,
            Self::TimedOut(Some(_)) | Self::Refused(..) => false,
        }
    }

    /// The same as the retry at this place sees it. Only a limit inside of the retry leaves time for another attempt, and
    /// time out in a queue is final.
    pub(super) fn seen_from(&self, place: usize, started: bool) -> Ended {
        match self {
            Self::Judged(verdict) => Ended::Judged(*verdict),
            Self::TimedOut(Some(limit)) if *limit > place && started => Ended::Judged(Verdict::Transient(None)),
            Self::Refused(gate, refusal) if *gate > place && !refusal.reason().is_permanent() => {
                Ended::Refused(refusal.retry_after())
            }
            _ => Ended::Finally,
        }
    }
}

impl Lane {
    /// What the call ends in whose earliest deadline has passed.
    #[cold]
    pub(super) fn timed_out(&mut self, steps: &[Step]) -> End {
        let place = self.fired(steps);
        if place.is_none() {
            self.call.note_end();
        }
        End::TimedOut(place)
    }

    /// What the call ends in that was cancelled. The reason is asked for once, here: error, report and cleanup tell it.
    #[cold]
    pub(super) fn cancelled(&mut self, steps: &[Step]) -> End {
        match self.call.cancel_reason(self.frames.rare.as_ref().map(|rare| &rare.waits)) {
            Some(reason) => End::Cancelled(reason),
            None => self.timed_out(steps),
        }
    }

    /// The same for a call on its way in. If it is a drain's shutdown that cancelled it, and that drain's gate is still
    /// ahead, the gate's refusal tells better what happened: the call came too late, and nothing of it was done.
    #[cold]
    pub(super) fn cancelled_entering(&mut self, steps: &[Step]) -> End {
        let end = self.cancelled(steps);
        let depth = self.depth as usize;
        if !matches!(end, End::Cancelled(CancelReason::Shutdown)) || self.made > 0 {
            return end;
        }
        let ahead = steps.iter().enumerate().skip(depth);
        let closed = ahead.filter_map(|(place, step)| Some((place, step.as_drain()?)));
        let mut closed = closed.filter(|(_, drain)| drain.phase() != drain::Phase::Open);
        closed.next().map_or(end, |(place, drain)| End::Refused(place, drain.refuse()))
    }

    /// The step whose deadline is the earliest, or `None` if it is the caller's: the innermost one that narrowed it.
    fn fired(&mut self, steps: &[Step]) -> Option<usize> {
        let deadline = self.call.ends();
        let depth = self.depth as usize;
        (0..depth).rev().find(|place| {
            matches!(steps[*place].0, Kind::Timeout(_)) && self.frames.read::<Limited>(*place).outer != deadline
        })
    }

    /// What ended the call, if this is an early end.
    pub(crate) fn why(&self, steps: &[Step], end: &End) -> Option<Why> {
        match end {
            End::Judged(_) | End::Refused(..) => None,
            End::TimedOut(place) => Some(Why::TimedOut(self.limit(steps, *place))),
            End::Cancelled(reason) => Some(Why::Cancelled(reason.clone())),
        }
    }

    /// The time limit that passed: of a step, or of who called.
    pub(crate) fn limit(&self, steps: &[Step], place: Option<usize>) -> Limit {
        match place.map(|place| (place, &steps[place].0)) {
            Some((place, Kind::Timeout(limit))) => Limit::Step { step: place + 1, limit: Duration::from_nanos(*limit) },
            _ => self.call.limit(),
        }
    }

    /// The record of an early end, while everything still stands.
    pub(super) fn early<'a>(&self, steps: &'a [Step], told: &'a Listeners, why: Why) -> EarlyEnd<'a> {
        let depth = self.depth as usize;
        let stage = match self.phase {
            Phase::Running => Stage::Operating,
            Phase::Backoff | Phase::Again => Stage::Backoff,
            Phase::Queued | Phase::Left => Stage::Queued(steps[depth].as_gate().map_or("", Gate::name)),
            Phase::Bare | Phase::StillBare | Phase::Start | Phase::Entering | Phase::Done => Stage::Entering,
        };
        EarlyEnd {
            policy: told.policy(),
            passed: &steps[..depth],
            why,
            stage,
            attempts: self.made,
            elapsed: self.call.now().since(self.begun),
            remaining: self.call.remaining(),
        }
    }
}
