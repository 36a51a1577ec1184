//! The way out: each step hears how it ended, a retry may turn the call round, and what is held goes back.

use std::time::Duration;

use super::{End, Lane, Out, Phase};
use crate::early::{EarlyEnd, Listeners, Stage, Why};
use crate::error::{Limit, Stop};
use crate::gate::{Gate, Needs, Outcome, Pass, Times};
use crate::internal::time::Moment;
use crate::retry::{Frame as RetryFrame, Plan, Situation};
use crate::step::{Kind, Outline, Step};
use crate::verdict::Verdict;

impl Lane {
    /// Tells the gates what the attempt has really cost.
    #[cold]
    pub(crate) fn settle(&mut self, steps: &[Step], actual: u32) {
        for (place, step) in steps[..self.depth as usize].iter().enumerate() {
            if let Some(gate) = step.as_gate() {
                let [a, b] = *self.frame(place);
                let mut pass = Pass::new(a, b);
                self.in_user = true;
                gate.settle(&mut pass, &self.call, actual);
                self.in_user = false;
                *self.frame(place) = pass.words();
            }
        }
    }

    /// Leaves the steps from the innermost outwards, each with the outcome, until a retry calls for another attempt or
    /// the caller is reached. Every step's end passes through here or through [`Lane::give_back`].
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "measured: a fifth of what a call without steps costs")]
    pub(crate) fn walk_out(&mut self, steps: &[Step], outline: &Outline, end: &End) -> Out {
        let out = match end {
            End::Judged(verdict) if verdict.is_healthy() && steps.len() <= Outline::MOST => {
                if self.waited {
                    self.sample(outline, false);
                }
                self.leave_well(steps, outline.hearers, *verdict);
                Out::Caller(if outline.retries { Stop::Final } else { Stop::NoRetry })
            }
            end => self.end_otherwise(steps, outline, end),
        };
        if let Out::Caller(_) = out {
            self.phase = Phase::Done;
        }
        out
    }

    /// After an operation that went well, as almost all do: no retry has a say, and no deadline matters any more.
    fn leave_well(&mut self, steps: &[Step], mut hearers: u64, verdict: Verdict) {
        let times = self.times();
        let frames = self.frames.get();
        // One length for both, so that one check of a place serves for both.
        let frames = &mut frames[..steps.len()];
        while hearers != 0 {
            let place = hearers.ilog2() as usize;
            hearers ^= 1 << place;
            self.depth = place as u32;
            let [a, b] = frames[place];
            match &steps[place].0 {
                Kind::Timeout(_) | Kind::Bucket(_) => {}
                Kind::Retry(retry) => retry.leave_well([a, b], &self.call),
                Kind::Semaphore(gate) => gate.give_back(a),
                Kind::Breaker(gate) => gate.hear_good(a, b, times),
                Kind::Drain(gate) => gate.give_back(),
                Kind::Part(gate) => gate.give_back(a),
                Kind::Gate(gate) => gate.leave(Pass::new(a, b), Outcome::Judged(verdict, times)),
            }
        }
    }

    /// Lets the policy learn how long an operation takes, or how long it ran until a limit cut it.
    #[cold]
    fn sample(&self, outline: &Outline, was_cut: bool) {
        if self.operating && self.started != Moment::NEVER {
            let now = self.call.now();
            outline.least.sample(now.nanos_since(self.started), was_cut, now);
        }
    }

    /// The same, and tells whom it may concern if that was an early end of the call.
    #[cold]
    fn end_otherwise(&mut self, steps: &[Step], outline: &Outline, end: &End) -> Out {
        // The operation, its judge or a gate of the user's may have taken long since the last reading.
        self.call.forget_time();
        if self.waited && matches!(end, End::TimedOut(_)) {
            self.sample(outline, true);
        }
        let told =
            outline.listeners.as_ref().and_then(|told| Some((told, self.early(steps, told, self.why(steps, end)?))));
        let out = self.leave_steps(steps, outline, end);
        if let (Out::Caller(_), Some((told, early))) = (&out, told) {
            self.phase = Phase::Done;
            told.tell(&early);
        }
        out
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
    fn early<'a>(&self, steps: &'a [Step], told: &'a Listeners, why: Why) -> EarlyEnd<'a> {
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

    fn leave_steps(&mut self, steps: &[Step], outline: &Outline, end: &End) -> Out {
        let mut outcome = self.outcome(end);
        let settled = self.operating && end.is_final();
        let mut stop = Stop::NoRetry;
        loop {
            let asked = self.leave_up_to_retry(steps, &outcome, settled, &mut stop);
            let Some((place, retry)) = asked else { return Out::Caller(stop) };
            match self.ask_retry(retry, place, outline, end, &mut outcome) {
                Ok(until) => {
                    self.again(until, outcome);
                    return Out::Again;
                }
                Err(why) => stop = why,
            }
        }
    }

    /// Leaves timeouts and gates, and retries that have nothing to do about a settled end; stops at one that has.
    #[inline]
    fn leave_up_to_retry<'a>(
        &mut self,
        steps: &'a [Step],
        outcome: &Outcome,
        settled: bool,
        stop: &mut Stop,
    ) -> Option<(usize, &'a Plan)> {
        let Self { call, depth, .. } = self;
        let passed = *depth as usize;
        let frames = self.frames.get();
        for (step, &mut [a, b]) in steps[..passed].iter().zip(&mut frames[..passed]).rev() {
            if let Kind::Retry(retry) = &step.0 {
                if !settled || retry.has_budget() {
                    return Some((*depth as usize - 1, retry));
                }
                *stop = Stop::Final;
            }
            *depth -= 1;
            let pass = Pass::new(a, b);
            match &step.0 {
                Kind::Timeout(_) => call.set_end(Moment::from_nanos(a)),
                Kind::Retry(_) => {}
                Kind::Semaphore(gate) => gate.give_back(a),
                Kind::Breaker(gate) => gate.hear(a, b, outcome),
                Kind::Bucket(gate) => gate.hear(&pass, outcome),
                Kind::Drain(gate) => gate.give_back(),
                Kind::Part(gate) => gate.give_back(a),
                Kind::Gate(gate) => gate.leave(pass, *outcome),
            }
        }
        None
    }

    fn again(&mut self, until: Option<Moment>, outcome: Outcome) {
        if let Outcome::Judged(_, times) | Outcome::Abandoned(times) = outcome {
            self.ended = times.ended;
        }
        // What was refused was no attempt: the number stays that of the next one to be made.
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
        let frame = RetryFrame::from_words(*self.frame(place));
        let (begun, once, least) = (self.begun, self.once, &outline.least);
        let situation = Situation { end, started, place, call: &self.call, begun, once, least };
        let settled = retry.settle(frame, &situation);
        // From here on a panic finds it settled.
        self.frames.get()[place] = settled.to_words();
        let mut delays = self.frames.rare.as_mut().map(|rare| std::mem::take(&mut rare.delays)).unwrap_or_default();
        self.in_user = true;
        let next = retry.next(settled, &situation, &mut delays);
        self.in_user = false;
        if delays.is_running() {
            self.frames.rare.get_or_insert_default().delays = delays;
        }
        match next {
            Ok((next, until)) => {
                *self.frame(place) = next.to_words();
                Ok(until)
            }
            Err(stop) => {
                self.depth -= 1;
                retry.leave(settled);
                *outcome = self.outside(*outcome, settled, matches!(end, End::TimedOut(None) | End::Cancelled(_)));
                Err(stop)
            }
        }
    }

    /// What gates outside of a retry hear: that the last attempt was not started is not the whole truth for them if an
    /// earlier one was.
    #[inline]
    fn outside(&self, outcome: Outcome, frame: RetryFrame, given_up: bool) -> Outcome {
        if !matches!(outcome, Outcome::NotStarted) || !frame.ran() {
            return outcome;
        }
        let times = Times { started: self.started, ended: self.ended };
        if given_up { Outcome::Abandoned(times) } else { Outcome::Judged(Verdict::Transient(None), times) }
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
    pub(crate) fn give_back(&mut self, steps: &[Step], outline: &Outline) {
        /// Goes on with the steps further out if one of them panics.
        struct Rest<'a>(&'a mut Lane, &'a [Step], Outcome);

        impl Drop for Rest<'_> {
            fn drop(&mut self) {
                self.0.give_back_passes(self.1, &mut self.2);
            }
        }

        self.call.forget_time();
        let outcome = if !self.operating {
            Outcome::NotStarted
        } else if self.in_user {
            Outcome::Judged(Verdict::Transient(None), self.times())
        } else {
            Outcome::Abandoned(self.times())
        };
        let why = if self.in_user { Why::Panicked } else { Why::Dropped };
        let told = outline.listeners.as_ref().map(|told| (told, self.early(steps, told, why)));
        let queued = self.phase == Phase::Queued;
        self.phase = Phase::Done;
        let mut rest = Rest(self, steps, outcome);
        if queued {
            rest.0.leave_queue(steps);
        }
        rest.0.give_back_passes(steps, &mut rest.2);
        if let Some((told, early)) = told {
            told.tell(&early);
        }
    }

    fn give_back_passes(&mut self, steps: &[Step], outcome: &mut Outcome) {
        while self.depth > 0 {
            self.depth -= 1;
            let place = self.depth as usize;
            let frame = *self.frame(place);
            if let Kind::Retry(retry) = &steps[place].0 {
                let frame = RetryFrame::from_words(frame);
                retry.leave(frame);
                *outcome = self.outside(*outcome, frame, true);
            } else if let Some(gate) = steps[place].as_gate() {
                gate.leave(Pass::new(frame[0], frame[1]), *outcome);
            }
        }
    }
}
