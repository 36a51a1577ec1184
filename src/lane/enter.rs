//! Entering: through the steps to the operation.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use super::{End, Lane, Phase, Woken};
use crate::error::Refusal;
use crate::gate::{Entry, Needs};
use crate::internal::time::{Moment, Timer};
use crate::retry;
use crate::step::{self, Kind, Outline, Pipeline, Step};

impl Lane {
    /// Brings the call to the operation: through the steps, their queues, and the pause before a retry.
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "measured: a fifth of what a call without steps costs")]
    pub(crate) fn poll_enter(
        &mut self,
        pipeline: Pipeline<'_>,
        timer: Pin<&mut Timer>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), End>> {
        let Pipeline { steps, outline } = pipeline;
        if matches!(self.phase, Phase::Bare | Phase::Start) {
            let now = self.start(pipeline);
            if !self.call.is_cancelled() && self.enter_fast(steps, now) && self.has_time(outline, now) {
                self.arrive(steps, now);
                return Poll::Ready(Ok(()));
            }
        }
        if self.phase == Phase::Running {
            return Poll::Ready(Ok(()));
        }
        self.poll_phases(pipeline, timer, cx)
    }

    /// The first poll: reads the clock if a step needs it, and takes over what the policy and the context say.
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "measured: a fifth of what a call without steps costs")]
    fn start(&mut self, pipeline: Pipeline<'_>) -> Moment {
        let Pipeline { steps, outline } = pipeline;
        self.frames.begin(steps.len());
        self.needs = outline.needs;
        if self.needs >= Needs::Now {
            self.begun = self.call.read_clock();
        }
        self.call.start(outline.said.as_ref());
        self.phase = Phase::Entering;
        self.begun
    }

    /// The time, if a step asks for it.
    #[inline]
    fn now(&self) -> Moment {
        if self.needs >= Needs::Now { self.call.now() } else { Moment::NEVER }
    }

    /// Enters the steps from `depth` on that admit the call at once, and returns whether those were all. Almost all calls
    /// take only this one loop.
    fn enter_fast(&mut self, steps: &[Step], now: Moment) -> bool {
        let Self { call, depth, .. } = self;
        let cost = call.cost();
        let mut ends = call.ends();
        let mut passed = *depth as usize;
        // One length for both, so that one check of a place serves for both.
        let frames = &mut self.frames.get()[..steps.len()];
        while passed < steps.len() {
            let Some(frame) = steps[passed].0.enter_now(cost, now, &mut ends) else { break };
            frames[passed] = frame;
            passed += 1;
        }
        call.set_end(ends);
        *depth = passed as u32;
        passed == steps.len()
    }

    /// Enters the steps from `depth` on, up to the first one that refuses the call or makes it wait.
    fn enter_steps(&mut self, pipeline: Pipeline<'_>) -> Result<(), Refusal> {
        let Pipeline { steps, outline } = pipeline;
        while !self.enter_fast(steps, self.now()) {
            let place = self.depth as usize;
            let gate = steps[place].as_gate().expect("all but gates are entered at once");
            self.call.set_spare(self.spare(outline));
            self.in_user = true;
            let entry = step::enter(gate, &self.call, self.call.may_wait());
            self.in_user = false;
            match entry {
                Entry::Pass(pass) => {
                    self.frames.write(place, pass);
                    self.depth += 1;
                }
                Entry::Wait(ticket, _) => {
                    self.frames.write(place, ticket);
                    self.phase = Phase::Queued;
                    return Ok(());
                }
                Entry::Refused(refusal) => return Err(refusal),
            }
        }
        Ok(())
    }

    /// All steps are passed: the operation's own clock starts.
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "measured: a fifth of what a call without steps costs")]
    fn arrive(&mut self, steps: &[Step], now: Moment) {
        self.phase = Phase::Running;
        self.operating = true;
        self.count();
        self.started = now;
        if self.call.attempt() > 1 {
            self.arrive_again(steps);
        }
    }

    /// Marks the attempts that budgets were charged for as made.
    #[cold]
    fn arrive_again(&mut self, steps: &[Step]) {
        for (place, step) in steps.iter().enumerate() {
            if let Kind::Retry(_) = step.0 {
                let frame: retry::Frame = self.frames.read(place);
                self.frames.write(place, frame.attempt_made());
            }
        }
    }

    /// Whether a call that has waited for nothing may make its operation by the reading it came in with. Its deadline is
    /// not over, and leaves the time that the policy fixes. Without a reading (`NEVER`) this is true only if there is no
    /// deadline; otherwise the slow path reads the clock and decides.
    #[inline]
    fn has_time(&self, outline: &Outline, now: Moment) -> bool {
        now.plus_nanos(outline.least.fixed()) <= self.call.ends()
    }

    /// Is there still time for the operation that is about to be made? Asked once for each, whatever led to it, by a
    /// fresh reading: user code may have run since the last one, or the task may have been polled late.
    fn check_time(&mut self, pipeline: Pipeline<'_>) -> Result<(), End> {
        let ends = self.call.ends();
        if ends == Moment::NEVER {
            return Ok(());
        }
        let now = self.call.read_clock();
        if let Some(end) = self.too_late(pipeline, now) {
            return Err(end);
        }
        // Only those that waited are refused by the rule, so only they can show that it has become too strict.
        if self.waited {
            pipeline.outline.least.start(now, ends);
        }
        Ok(())
    }

    /// Everything but a first poll that finds all steps open.
    fn poll_phases(
        &mut self,
        pipeline: Pipeline<'_>,
        mut timer: Pin<&mut Timer>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), End>> {
        let Pipeline { steps, .. } = pipeline;
        loop {
            match self.phase {
                Phase::Entering => {
                    // No attempt begins after the caller has cancelled.
                    if self.call.is_cancelled() {
                        return Poll::Ready(Err(self.cancelled_entering(steps)));
                    }
                    if let Err(refusal) = self.enter_steps(pipeline) {
                        return Poll::Ready(Err(End::Refused(self.depth as usize, refusal)));
                    }
                    if self.phase == Phase::Entering {
                        if let Err(end) = self.check_time(pipeline) {
                            return Poll::Ready(Err(end));
                        }
                        let reads = self.needs >= Needs::Now || self.call.ends() != Moment::NEVER;
                        self.arrive(steps, if reads { self.call.now() } else { Moment::NEVER });
                    }
                }
                Phase::Queued => {
                    if let Err(end) = ready!(self.poll_queue(pipeline, timer.as_mut(), cx)) {
                        return Poll::Ready(Err(end));
                    }
                }
                Phase::Backoff => {
                    if let Some(end) = self.poll_closing(steps, cx) {
                        return Poll::Ready(Err(end));
                    }
                    match ready!(self.poll_pause(timer.as_mut(), self.until, cx)) {
                        Woken::Due => self.phase = Phase::Again,
                        Woken::Deadline => return Poll::Ready(Err(self.timed_out(steps))),
                        Woken::Cancelled => return Poll::Ready(Err(self.cancelled(steps))),
                    }
                }
                Phase::Again => {
                    self.phase = Phase::Entering;
                    if let Err(end) = self.revalidate(steps) {
                        return Poll::Ready(Err(end));
                    }
                }
                Phase::Running => return Poll::Ready(Ok(())),
                Phase::Bare | Phase::StillBare | Phase::Start | Phase::Left | Phase::Done => {
                    panic!("polled again after it was ready")
                }
            }
        }
    }
}
