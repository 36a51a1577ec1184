//! Leaving: each step hears how the attempt ended, a retry may turn the call round, and what is held goes back.

use super::{End, Lane, Out, Phase};
use crate::early::{EarlyEnd, Listeners, Why};
use crate::error::Stop;
use crate::gate::{Needs, Outcome, Pass, Times};
use crate::internal::time::Moment;
use crate::retry::{self, Plan, Situation};
use crate::step::{Kind, Limited, Outline, Pipeline, Step};
use crate::verdict::Verdict;

/// How a lane leaves its steps.
#[derive(Clone, Copy)]
enum Manner<'a> {
    /// The operation went well: only the steps of the mask have anything to record.
    Well { mask: u64, verdict: &'a Verdict, times: Times },
    /// The attempt ended otherwise. A retry may ask for another one, unless the end is `settled`.
    Ended { settled: bool },
    /// The call is dropped: no retry is asked.
    Dropped,
}

impl Lane {
    /// Tells the gates what the attempt has really cost.
    #[cold]
    pub(crate) fn settle(&mut self, steps: &[Step], actual: u32) {
        for (place, step) in steps[..self.depth as usize].iter().enumerate() {
            if let Some(gate) = step.as_gate() {
                let mut pass: Pass = self.frames.read(place);
                self.in_user = true;
                gate.settle(&mut pass, &self.call, actual);
                self.in_user = false;
                self.frames.write(place, pass);
            }
        }
    }

    /// Leaves the steps after an attempt, until a retry schedules another one or the caller is reached.
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "measured: a fifth of what a call without steps costs")]
    pub(crate) fn leave(&mut self, pipeline: Pipeline<'_>, end: &End) -> Out {
        let Pipeline { steps, outline } = pipeline;
        let out = match end {
            End::Judged(verdict) if verdict.is_healthy() && steps.len() <= Outline::MOST => {
                if self.waited {
                    self.sample(outline, false);
                }
                self.leave_well(pipeline, *verdict);
                Out::Caller(if outline.retries { Stop::Final } else { Stop::NoRetry })
            }
            end => self.leave_ended(pipeline, end),
        };
        if let Out::Caller(_) = out {
            self.phase = Phase::Done;
        }
        out
    }

    /// Almost all operations go well: no retry has a say then, and no deadline matters any more.
    fn leave_well(&mut self, pipeline: Pipeline<'_>, verdict: Verdict) {
        let manner = Manner::Well { mask: pipeline.outline.success_mask, verdict: &verdict, times: self.times() };
        self.leave_steps(pipeline.steps, manner, &mut Outcome::NotStarted, &mut Stop::Final);
    }

    /// Any other end: asks the retries, and tells the listeners if it was an early end of the call.
    #[cold]
    fn leave_ended(&mut self, pipeline: Pipeline<'_>, end: &End) -> Out {
        let Pipeline { steps, outline } = pipeline;
        // The operation, its judge or a gate of the user's may have taken long since the last reading.
        self.call.forget_time();
        if self.waited && matches!(end, End::TimedOut(_)) {
            self.sample(outline, true);
        }
        let told =
            outline.listeners.as_ref().and_then(|told| Some((told, self.early(steps, told, self.why(steps, end)?))));
        let out = self.ask_retries(pipeline, end);
        if let (Out::Caller(_), Some((told, early))) = (&out, told) {
            self.phase = Phase::Done;
            told.tell(&early);
        }
        out
    }

    fn ask_retries(&mut self, pipeline: Pipeline<'_>, end: &End) -> Out {
        let mut outcome = self.outcome(end);
        let manner = Manner::Ended { settled: self.operating && end.is_final() };
        let mut stop = Stop::NoRetry;
        while let Some((place, retry)) = self.leave_steps(pipeline.steps, manner, &mut outcome, &mut stop) {
            match self.ask_retry(retry, place, pipeline.outline, end, &mut outcome) {
                Ok(until) => {
                    self.repeat(until, outcome);
                    return Out::Again;
                }
                Err(why) => stop = why,
            }
        }
        Out::Caller(stop)
    }

    /// Leaves the steps from the innermost outwards, each with the outcome. Stops at a retry that is to be asked. This is
    /// the one place where passes go back, compiled once for each manner: a call that went well visits only the steps of
    /// the mask, any other one visits all.
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "measured: a call that goes well visits only what the mask says")]
    fn leave_steps<'a>(
        &mut self,
        steps: &'a [Step],
        manner: Manner<'_>,
        outcome: &mut Outcome,
        stop: &mut Stop,
    ) -> Option<(usize, &'a Plan)> {
        let earlier = Times { started: self.started, ended: self.ended };
        let Self { call, depth, frames, .. } = self;
        // One length for both, so that one check of a place serves for both.
        let frames = &mut frames.get()[..steps.len()];
        if let Manner::Well { mut mask, verdict, times } = manner {
            while mask != 0 {
                let place = steps.len() - 1 - mask.trailing_zeros() as usize;
                mask &= mask - 1;
                *depth = place as u32;
                steps[place].0.leave_well(frames[place], call, *verdict, times);
            }
            return None;
        }
        while let Some(place) = (*depth as usize).checked_sub(1) {
            let (kind, frame) = (&steps[place].0, frames[place]);
            if let (Kind::Retry(retry), Manner::Ended { settled }) = (kind, manner) {
                if !settled || retry.has_budget() {
                    return Some((place, retry));
                }
                *stop = Stop::Final;
            }
            // Before the pass goes back (invariant 2).
            *depth = place as u32;
            match kind {
                Kind::Timeout(_) => call.set_end(frame.read::<Limited>().outer),
                Kind::Retry(retry) => {
                    if let Manner::Dropped = manner {
                        let frame: retry::Frame = frame.read();
                        retry.leave(frame);
                        *outcome = outside(*outcome, frame, earlier, true);
                    }
                }
                gate => gate.leave(frame.read(), outcome),
            }
        }
        None
    }

    /// Lets the policy learn how long an operation takes, or how long it ran until a limit cut it.
    #[cold]
    fn sample(&self, outline: &Outline, was_cut: bool) {
        if self.operating && self.started != Moment::NEVER {
            let now = self.call.now();
            outline.least.sample(now.nanos_since(self.started), was_cut, now);
        }
    }

    /// Prepares another attempt.
    fn repeat(&mut self, until: Option<Moment>, outcome: Outcome) {
        if let Outcome::Judged(_, times) | Outcome::Abandoned(times) = outcome {
            self.ended = times.ended;
        }
        // A refused attempt was none: the number stays that of the next one to be made.
        if self.operating {
            self.call.next_attempt();
        }
        self.operating = false;
        self.waited = true;
        self.phase = if until.is_some() { Phase::Backoff } else { Phase::Again };
        self.until = until.unwrap_or(Moment::NEVER);
    }

    /// Asks a retry for another attempt. Its frame stays in the lane while a backoff of the user's own runs, which may
    /// panic.
    #[cold]
    fn ask_retry(
        &mut self,
        retry: &Plan,
        place: usize,
        outline: &Outline,
        end: &End,
        outcome: &mut Outcome,
    ) -> Result<Option<Moment>, Stop> {
        let started = !matches!(outcome, Outcome::NotStarted);
        let ended = end.seen_from(place, started);
        let (begun, once, least) = (self.begun, self.once, &outline.least);
        let situation = Situation { ended, started, place, call: &self.call, begun, once, least };
        let settled = retry.settle(self.frames.read(place), &situation);
        // From here on a panic finds it settled.
        self.frames.write(place, settled);
        let mut delays = self.frames.rare.as_mut().map(|rare| std::mem::take(&mut rare.delays)).unwrap_or_default();
        self.in_user = true;
        let next = retry.next(settled, &situation, &mut delays);
        self.in_user = false;
        if delays.is_running() {
            self.frames.rare.get_or_insert_default().delays = delays;
        }
        match next {
            Ok((next, until)) => {
                self.frames.write(place, next);
                Ok(until)
            }
            Err(stop) => {
                self.depth -= 1;
                retry.leave(settled);
                let earlier = Times { started: self.started, ended: self.ended };
                let given_up = matches!(end, End::TimedOut(None) | End::Cancelled(_));
                *outcome = outside(*outcome, settled, earlier, given_up);
                Err(stop)
            }
        }
    }

    /// What the gates hear.
    #[inline]
    fn outcome(&self, end: &End) -> Outcome {
        if !self.operating {
            return Outcome::NotStarted;
        }
        match end {
            End::Judged(verdict) => Outcome::Judged(*verdict, self.times()),
            End::TimedOut(Some(_)) => Outcome::Judged(Verdict::Transient(None), self.times()),
            End::TimedOut(None) | End::Cancelled(_) => Outcome::Abandoned(self.times()),
            End::Refused(..) => Outcome::NotStarted,
        }
    }

    #[inline]
    fn times(&self) -> Times {
        let ended = match self.needs {
            Needs::Nothing => self.started,
            Needs::Now => self.call.now(),
            Needs::Elapsed => self.call.read_clock(),
        };
        Times { started: self.started, ended }
    }

    /// Whether there is anything to [give back](Lane::give_back).
    #[inline]
    pub(crate) fn holds(&self) -> bool {
        !matches!(self.phase, Phase::Bare | Phase::StillBare | Phase::Start | Phase::Done)
    }

    /// Gives everything back when the call is dropped half-way.
    #[cold]
    pub(crate) fn give_back(&mut self, pipeline: Pipeline<'_>) {
        /// Goes on with the steps further out if one of them panics.
        struct Rest<'a>(&'a mut Lane, &'a [Step], Outcome);

        impl Rest<'_> {
            fn leave(&mut self) {
                self.0.leave_steps(self.1, Manner::Dropped, &mut self.2, &mut Stop::NoRetry);
            }
        }

        impl Drop for Rest<'_> {
            fn drop(&mut self) {
                self.leave();
            }
        }

        let Pipeline { steps, outline } = pipeline;
        self.call.forget_time();
        let outcome = if !self.operating {
            Outcome::NotStarted
        } else if self.in_user {
            Outcome::Judged(Verdict::Transient(None), self.times())
        } else {
            Outcome::Abandoned(self.times())
        };
        let why = if self.in_user { Why::Panicked } else { Why::Dropped };
        let told: Option<(&Listeners, EarlyEnd<'_>)> =
            outline.listeners.as_ref().map(|told| (told, self.early(steps, told, why)));
        let queued = self.phase == Phase::Queued;
        self.phase = Phase::Done;
        let mut rest = Rest(self, steps, outcome);
        if queued {
            rest.0.leave_queue(steps);
        }
        rest.leave();
        if let Some((told, early)) = told {
            told.tell(&early);
        }
    }
}

/// What gates outside of a retry hear: of an earlier attempt that did run, if the last one was not started.
#[inline]
fn outside(outcome: Outcome, frame: retry::Frame, earlier: Times, given_up: bool) -> Outcome {
    match outcome {
        Outcome::NotStarted if frame.ran() && given_up => Outcome::Abandoned(earlier),
        Outcome::NotStarted if frame.ran() => Outcome::Judged(Verdict::Transient(None), earlier),
        outcome => outcome,
    }
}
