//! The walk of a call in through the steps and of its outcome back out. What a lane holds, it gives back.
//!
//! 1. `frames[..depth]` belong to the steps that the call has passed: a timeout keeps the deadline from before, a retry
//!    its count, a gate its pass. Nothing else is held, but for the ticket of a gate whose queue the call stands in,
//!    which lies in `frames[depth]`.
//! 2. `depth` goes down before a pass is handed back, so no pass is handed back twice, whatever panics. It may go down by
//!    more than one where the steps between have nothing to do.
//! 3. A clock reading belongs to one poll. It is forgotten when the next begins, and read when somebody asks.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use crate::call::Call;
use crate::context;
use crate::early::{EarlyEnd, Listeners, Stage, Why};
use crate::error::{Limit, Reason, Refusal, Stop};
use crate::gate::{Entry, Gate, Needs, Outcome, Pass, Ticket, Times};
use crate::internal::seldom::Seldom;
use crate::internal::time::{Moment, Timer};
use crate::retry::{Delays, Frame as RetryFrame, Plan, Situation};
use crate::step::{self, Kind, Outline, Step};
use crate::verdict::Verdict;

/// How many steps find room in the future itself; a policy with more allocates once per call.
pub(crate) const INLINE_STEPS: usize = 8;

/// What a step keeps while the call is further in.
type Frame = [u64; 2];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Not polled yet, and the caller has set nothing that could end it.
    Bare,
    /// The same, and polled: a context that it has not found at its first poll, it does not find later.
    StillBare,
    /// Not polled yet.
    Start,
    Done,
    /// Walking in, at step `depth`.
    Entering,
    /// In the queue of the gate at step `depth`.
    Queued,
    /// Just out of that queue again, because the call ended.
    Left,
    /// Between two attempts, until `until`.
    Backoff,
    /// About to enter for another attempt.
    Again,
    /// All steps are passed.
    Running,
}

/// How an attempt ended.
#[derive(Debug)]
pub(crate) enum End {
    Judged(Verdict),
    /// The deadline of a step passed, or of the caller (`None`).
    TimedOut(Option<usize>),
    /// The gate at this place said no.
    Refused(usize, Refusal),
    Cancelled,
}

impl End {
    /// Whether a retry may have something to do about it.
    #[inline]
    fn is_final(&self) -> bool {
        match self {
            Self::Judged(verdict) => !verdict.is_retryable(),
            Self::TimedOut(None) | Self::Cancelled => true,
            Self::TimedOut(Some(_)) | Self::Refused(..) => false,
        }
    }
}

/// Where the way out led.
#[derive(Debug)]
pub(crate) enum Out {
    /// To a retry, which has scheduled another attempt.
    Again,
    /// To the caller.
    Caller(Stop),
}

/// What a pause ended with.
enum Woken {
    Due,
    Deadline,
    Cancelled,
}

/// What few calls need.
#[derive(Debug, Default)]
struct Rare {
    /// The frames of a policy with more steps than find room.
    frames: Vec<Frame>,
    /// The delays of retries with a backoff of the user's own.
    delays: Delays,
}

/// The frames of a call, wherever they lie: nowhere until it begins.
#[derive(Debug)]
struct Frames {
    inline: Option<[Frame; INLINE_STEPS]>,
    rare: Seldom<Box<Rare>>,
}

impl Frames {
    #[inline]
    fn begin(&mut self, steps: usize) {
        if steps <= INLINE_STEPS {
            self.inline = Some([[0; 2]; INLINE_STEPS]);
        } else {
            self.spill(steps);
        }
    }

    #[cold]
    fn spill(&mut self, steps: usize) {
        self.rare.get_or_insert_default().frames = vec![[0; 2]; steps];
    }

    #[inline]
    fn get(&mut self) -> &mut [Frame] {
        match (&mut self.inline, &mut *self.rare) {
            (Some(frames), _) => frames,
            (None, Some(rare)) => &mut rare.frames,
            (None, None) => &mut [],
        }
    }
}

/// Everything about a call but the operation itself.
#[derive(Debug)]
pub(crate) struct Lane {
    call: Call,
    frames: Frames,
    /// The first poll; `NEVER` where no step reads the clock.
    begun: Moment,
    /// When the operation was made.
    started: Moment,
    /// When the attempt before was over.
    ended: Moment,
    /// The end of a backoff.
    until: Moment,
    /// How many times the operation was made.
    made: u32,
    depth: u32,
    phase: Phase,
    needs: Needs,
    /// The operation can't be made again.
    once: bool,
    /// The operation of this attempt was made: passes come back with its times.
    operating: bool,
    /// User code is running; still set in `drop`, it means a panic.
    in_user: bool,
}

impl Lane {
    #[inline]
    pub(crate) fn new(call: Call, once: bool) -> Self {
        let phase = if call.is_bare() { Phase::Bare } else { Phase::Start };
        Self {
            call,
            frames: Frames { inline: None, rare: Seldom::NONE },
            begun: Moment::NEVER,
            started: Moment::NEVER,
            ended: Moment::NEVER,
            until: Moment::NEVER,
            made: 0,
            depth: 0,
            phase,
            needs: Needs::Nothing,
            once,
            operating: false,
            in_user: false,
        }
    }

    #[inline]
    pub(crate) fn call(&self) -> &Call {
        &self.call
    }

    pub(crate) fn call_mut(&mut self) -> &mut Call {
        self.phase = Phase::Start;
        &mut self.call
    }

    pub(crate) fn made(&self) -> u32 {
        self.made
    }

    /// How long the call has lasted, if anything of it was measured.
    pub(crate) fn elapsed(&self) -> Option<Duration> {
        (self.begun != Moment::NEVER).then(|| self.call.now().since(self.begun))
    }

    /// Runs user code; a panic in it leaves the mark by which [`Lane::give_back`] knows.
    #[inline]
    pub(crate) fn user<R>(&mut self, code: impl FnOnce() -> R) -> R {
        self.in_user = true;
        let result = code();
        self.in_user = false;
        result
    }

    /// A call that nothing but its operation can end, if its policy has no steps. It stays as it is until it is over:
    /// there is nothing to give back.
    #[inline]
    pub(crate) fn is_bare(&self) -> bool {
        (self.phase == Phase::Bare && !context::is_present()) || self.phase == Phase::StillBare
    }

    #[inline]
    pub(crate) fn stay_bare(&mut self) {
        self.phase = Phase::StillBare;
    }

    #[inline]
    pub(crate) fn end_bare(&mut self) {
        self.phase = Phase::Done;
    }

    /// The operation was made.
    #[inline]
    pub(crate) fn count(&mut self) {
        self.made += 1;
    }

    fn frame(&mut self, place: usize) -> &mut Frame {
        &mut self.frames.get()[place]
    }

    /// Brings the call to the operation: through the steps, their queues, and the pause before a retry.
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "measured: a fifth of what a call without steps costs")]
    pub(crate) fn poll_in(
        &mut self,
        steps: &[Step],
        outline: &Outline,
        timer: Pin<&mut Timer>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), End>> {
        if matches!(self.phase, Phase::Bare | Phase::Start) {
            let now = self.start(steps, outline);
            if !self.call.is_cancelled() && self.walk_in_at_once(steps, now) {
                self.arrive(steps, now);
                return Poll::Ready(Ok(()));
            }
        }
        if self.phase == Phase::Running {
            return Poll::Ready(Ok(()));
        }
        self.poll_steps(steps, timer, cx)
    }

    #[inline(always)]
    #[allow(clippy::inline_always, reason = "measured: a fifth of what a call without steps costs")]
    fn start(&mut self, steps: &[Step], outline: &Outline) -> Moment {
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

    /// Enters the steps from `depth` on that let the call in at once; whether those were all. This much is compiled into
    /// one loop: it is the way in of almost all calls.
    fn walk_in_at_once(&mut self, steps: &[Step], now: Moment) -> bool {
        let Self { call, depth, .. } = self;
        let cost = call.cost();
        let mut ends = call.ends();
        let mut passed = *depth as usize;
        let mut frames = self.frames.get()[passed..].iter_mut();
        for step in &steps[passed..] {
            let Some(frame) = frames.next() else { break };
            let pass = match &step.0 {
                Kind::Timeout(limit) => {
                    let before = ends;
                    ends = before.min(now.plus_nanos(*limit));
                    Some(Pass::new(before.nanos(), 0))
                }
                Kind::Retry(retry) => Some(retry.enter()),
                Kind::Semaphore(gate) => gate.enter_at_once(cost),
                Kind::Breaker(gate) => gate.enter_at_once(),
                Kind::Bucket(gate) => gate.enter_at_once(cost, now),
                Kind::Drain(gate) => gate.enter_at_once(),
                Kind::Part(_) | Kind::Gate(_) => None,
            };
            let Some(pass) = pass else { break };
            *frame = pass.words();
            passed += 1;
        }
        call.set_end(ends);
        *depth = passed as u32;
        passed == steps.len()
    }

    /// Enters the steps from `depth` on, up to the first one that makes the call wait or refuses it.
    fn walk_in(&mut self, steps: &[Step]) -> Result<(), Refusal> {
        while !self.walk_in_at_once(steps, self.now()) {
            let place = self.depth as usize;
            let gate = steps[place].as_gate().expect("all but gates are entered at once");
            self.in_user = true;
            let entry = step::enter(gate, &self.call, self.call.may_wait());
            self.in_user = false;
            match entry {
                Entry::Pass(pass) => {
                    *self.frame(place) = pass.words();
                    self.depth += 1;
                }
                Entry::Wait(ticket, _) => {
                    *self.frame(place) = ticket.words();
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

    /// What the budgets of retries were charged for is made.
    #[cold]
    fn arrive_again(&mut self, steps: &[Step]) {
        for (place, step) in steps.iter().enumerate() {
            if let Kind::Retry(_) = step.0 {
                let frame = self.frame(place);
                *frame = RetryFrame::from_words(*frame).attempt_made().to_words();
            }
        }
    }

    /// After a queue: the retry that makes no attempt with as little time as is left.
    fn too_late(&mut self, steps: &[Step]) -> Option<usize> {
        let mut ends = self.call.ends();
        for (place, step) in steps.iter().enumerate().rev() {
            match &step.0 {
                // What the deadline was outside of it.
                Kind::Timeout(_) => ends = Moment::from_nanos(self.frame(place)[0]),
                Kind::Retry(retry) if !retry.leaves_time(self.call.now(), ends) => return Some(place),
                _ => {}
            }
        }
        None
    }

    fn poll_steps(
        &mut self,
        steps: &[Step],
        mut timer: Pin<&mut Timer>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), End>> {
        let waited = self.phase == Phase::Queued;
        loop {
            match self.phase {
                Phase::Entering => {
                    // No attempt begins after the caller has cancelled.
                    if self.call.is_cancelled() {
                        return Poll::Ready(Err(End::Cancelled));
                    }
                    if let Err(refusal) = self.walk_in(steps) {
                        return Poll::Ready(Err(End::Refused(self.depth as usize, refusal)));
                    }
                    if self.phase == Phase::Entering {
                        let late = if waited { self.too_late(steps) } else { None };
                        if let Some(place) = late {
                            let refusal = Refusal::new("retry", Reason::TooLate);
                            return Poll::Ready(Err(End::Refused(place, refusal)));
                        }
                        self.arrive(steps, self.now());
                    }
                }
                Phase::Queued => {
                    if let Err(end) = ready!(self.poll_queue(steps, timer.as_mut(), cx)) {
                        return Poll::Ready(Err(end));
                    }
                }
                Phase::Backoff => match ready!(self.poll_pause(timer.as_mut(), self.until, cx)) {
                    Woken::Due => self.phase = Phase::Again,
                    Woken::Deadline => return Poll::Ready(Err(End::TimedOut(self.fired(steps)))),
                    Woken::Cancelled => return Poll::Ready(Err(End::Cancelled)),
                },
                Phase::Again => {
                    self.phase = Phase::Entering;
                    if let Err(end) = self.ask_still(steps) {
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

    /// The step whose deadline is the earliest, or `None` if it is the caller's: the innermost one that narrowed it.
    fn fired(&mut self, steps: &[Step]) -> Option<usize> {
        let deadline = self.call.ends().nanos();
        let depth = self.depth as usize;
        (0..depth).rev().find(|place| matches!(steps[*place].0, Kind::Timeout(_)) && self.frame(*place)[0] != deadline)
    }

    /// Asks the gate whose queue the call stands in, and waits if it says so. What the gate says wins over a deadline
    /// that passes in the same poll.
    fn poll_queue(&mut self, steps: &[Step], timer: Pin<&mut Timer>, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        let place = self.depth as usize;
        let gate = steps[place].as_gate().expect("only gates have queues");
        let [a, b] = *self.frame(place);
        self.in_user = true;
        let entry = gate.poll_wait(Ticket::new(a, b), &self.call, cx);
        self.in_user = false;
        match entry {
            Entry::Pass(pass) => {
                *self.frame(place) = pass.words();
                self.depth += 1;
                self.phase = Phase::Entering;
                Poll::Ready(self.ask_still(steps))
            }
            Entry::Refused(refusal) => {
                self.phase = Phase::Entering;
                Poll::Ready(Err(End::Refused(place, refusal)))
            }
            Entry::Wait(ticket, at) => {
                *self.frame(place) = ticket.words();
                // A gate that names a moment gone by is asked again after a tick, not in a spin.
                let at = at.map_or(Moment::NEVER, |at| at.max(self.call.now().plus_nanos(1)));
                let end = match ready!(self.poll_pause(timer, at, cx)) {
                    Woken::Due => return Poll::Ready(Ok(())),
                    Woken::Deadline => End::TimedOut(self.fired(steps)),
                    Woken::Cancelled => End::Cancelled,
                };
                self.phase = Phase::Left;
                self.leave_queue(steps);
                Poll::Ready(Err(end))
            }
        }
    }

    fn leave_queue(&mut self, steps: &[Step]) {
        let place = self.depth as usize;
        if let Some(gate) = steps[place].as_gate() {
            let [a, b] = *self.frame(place);
            gate.abandon(Ticket::new(a, b));
        }
    }

    /// After a wait or an attempt, asks the gates that were passed before it whether their passes still hold.
    fn ask_still(&mut self, steps: &[Step]) -> Result<(), End> {
        for (place, step) in steps[..self.depth as usize].iter().enumerate() {
            if let Some(gate) = step.as_revoking_gate() {
                let [a, b] = *self.frame(place);
                gate.still(&Pass::new(a, b), &self.call).map_err(|refusal| End::Refused(place, refusal))?;
            }
        }
        Ok(())
    }

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

    /// While the operation is pending: waits for what could end it.
    #[inline]
    pub(crate) fn poll_interrupt(&mut self, steps: &[Step], timer: Pin<&mut Timer>, cx: &mut Context<'_>) -> Poll<End> {
        Poll::Ready(match ready!(self.poll_pause(timer, Moment::NEVER, cx)) {
            Woken::Cancelled => End::Cancelled,
            _ => End::TimedOut(self.fired(steps)),
        })
    }

    /// Waits until a moment, the deadline or the caller's cancellation, by the one timer.
    #[inline]
    fn poll_pause(&mut self, timer: Pin<&mut Timer>, until: Moment, cx: &mut Context<'_>) -> Poll<Woken> {
        if self.call.poll_cancelled(cx) {
            return Poll::Ready(Woken::Cancelled);
        }
        let deadline = self.call.ends();
        let at = until.min(deadline);
        // What is due by this poll's reading needs no timer: tokio's would make it a millisecond.
        if self.call.read().is_none_or(|now| now < at) {
            ready!(timer.poll_until(at, cx));
            self.call.read_clock();
        }
        Poll::Ready(if deadline <= until { Woken::Deadline } else { Woken::Due })
    }

    /// Leaves the steps from the innermost outwards, each with the outcome, until a retry calls for another attempt or
    /// the caller is reached. Every step's end passes through here or through [`Lane::give_back`].
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "measured: a fifth of what a call without steps costs")]
    pub(crate) fn walk_out(&mut self, steps: &[Step], outline: &Outline, end: &End) -> Out {
        let out = match end {
            End::Judged(verdict) if verdict.is_healthy() && steps.len() <= Outline::MOST => {
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

    /// The same, and tells whom it may concern if that was an early end of the call.
    #[cold]
    fn end_otherwise(&mut self, steps: &[Step], outline: &Outline, end: &End) -> Out {
        let told =
            outline.listeners.as_ref().and_then(|told| Some((told, self.early(steps, told, self.why(steps, end)?))));
        let out = self.leave_steps(steps, end);
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
            End::Cancelled => Some(self.call.cancelled().map_or_else(Why::TimedOut, Why::Cancelled)),
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

    fn leave_steps(&mut self, steps: &[Step], end: &End) -> Out {
        let mut outcome = self.outcome(end);
        let settled = self.operating && end.is_final();
        let mut stop = Stop::NoRetry;
        loop {
            let asked = self.leave_up_to_retry(steps, &outcome, settled, &mut stop);
            let Some((place, retry)) = asked else { return Out::Caller(stop) };
            match self.ask_retry(retry, place, end, &mut outcome) {
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
        end: &End,
        outcome: &mut Outcome,
    ) -> Result<Option<Moment>, Stop> {
        let started = !matches!(outcome, Outcome::NotStarted);
        let frame = RetryFrame::from_words(*self.frame(place));
        let situation = Situation { end, started, place, call: &self.call, begun: self.begun, once: self.once };
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
                *outcome = self.outside(*outcome, settled, matches!(end, End::TimedOut(None) | End::Cancelled));
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
            End::TimedOut(None) | End::Cancelled => Outcome::Abandoned(self.times()),
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

    /// Hands the pass of the only step to a guard, which gives it back instead.
    pub(crate) fn take_pass(&mut self) -> Pass {
        self.depth = 0;
        self.phase = Phase::Done;
        let [a, b] = *self.frame(0);
        Pass::new(a, b)
    }
}
