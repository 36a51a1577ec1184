//! How a closing goes on: its phases, and the task that takes it through them whoever waits for it.
//!
//! 1. The phase moves under the lock of the [`State`] only, and each round goes from open to done once.
//! 2. A driver leaves its waker before it reads the count, under the lock where the last one out looks for it: that
//!    one is either seen gone or finds the waker.
//! 3. Who waits for a phase is told outside of the lock, after the word has moved.
//! 4. A driver that is dropped takes the closing to its end: nobody waits for a runtime that is gone.
//! 5. Whoever waits in `close` is a driver, too, by its own grace: so nobody waits for a runtime that stands still. Several
//!    drivers may take different steps at the same time, so what they tell only ever moves on.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use pin_project::{pin_project, pinned_drop};
use tokio::runtime::Handle;
use tokio::sync::{SetOnce, watch};

use super::course::{Account, Course, Next};
use super::names::Held;
use super::report::Drained;
use super::word::Word;
use super::{Phase, Shared};
use crate::cancel::{Cancel, CancelReason};
use crate::internal::queue::WakeList;
use crate::internal::sync::AcqRel;
use crate::internal::time::{Moment, Timer};

/// One life of a drain, from open to done: what those hold on to who wait for its phases.
#[derive(Debug)]
pub(super) struct Round {
    phase: watch::Sender<Phase>,
    /// Cancelled when it closes, for calls that stand in a queue or sleep behind the gate.
    pub(super) closing: Cancel,
    pub(super) cancel: Cancel,
    report: SetOnce<Drained>,
}

impl Round {
    pub(super) fn new() -> Arc<Self> {
        let phase = watch::Sender::new(Phase::Open);
        Arc::new(Self { phase, closing: Cancel::new(), cancel: Cancel::new(), report: SetOnce::new() })
    }

    /// Tells those who wait for a phase, unless they were told of a later one.
    fn tell(&self, phase: Phase) {
        self.phase.send_if_modified(|told| {
            let moves = *told < phase;
            if moves {
                *told = phase;
            }
            moves
        });
    }

    /// Waits until it has come to a phase, or past it.
    pub(super) async fn reached(self: Arc<Self>, phase: Phase) {
        let mut phases = self.phase.subscribe();
        // The sender is `self`, so this can't fail.
        let _ = phases.wait_for(|now| *now >= phase).await;
    }

    pub(super) async fn ended(self: Arc<Self>) -> Drained {
        self.report.wait().await.clone()
    }
}

/// What changes with the phase.
#[derive(Debug)]
pub(super) struct State {
    pub(super) round: Arc<Round>,
    /// The closing that is on its way.
    course: Option<Course>,
    /// Those of the drivers, by their numbers.
    wakers: Vec<(u64, Waker)>,
    drivers: u64,
}

impl State {
    pub(super) fn new() -> Self {
        Self { round: Round::new(), course: None, wakers: Vec::new(), drivers: 0 }
    }
}

/// What the driver has to do outside of the lock.
enum Step {
    Wait(Moment),
    Cancel(Arc<Round>),
    End {
        round: Arc<Round>,
        account: Account,
        held: Vec<Held>,
        /// Those in flight were to be told to stop.
        told: bool,
    },
    Over,
}

/// The time that a step goes by.
#[derive(Clone, Copy)]
enum Due {
    Now,
    /// There is no time left: whatever would have been waited for is due.
    All,
}

impl Shared {
    /// Closes, or joins a closing that is on its way.
    ///
    /// # Panics
    ///
    /// Outside of a runtime, before anything is changed.
    pub(super) fn close(self: &Arc<Self>, grace: Duration) -> Arc<Round> {
        let runtime = Handle::current();
        let (round, driver) = self.begin(grace);
        if let Some(driver) = driver {
            round.tell(Phase::Closing);
            runtime.spawn(driver);
            round.closing.cancel_with(CancelReason::Shutdown);
        }
        round
    }

    /// The round that closes, and its driver, unless somebody else has that.
    pub(super) fn begin(self: &Arc<Self>, grace: Duration) -> (Arc<Round>, Option<Driver>) {
        let now = Moment::now();
        let grace_ends = now + grace;
        let (mut driver, mut wakers) = (None, Vec::new());
        let mut state = self.state.lock();
        let round = state.round.clone();
        if let Some(course) = &mut state.course {
            if course.hurry(grace_ends) {
                wakers = std::mem::take(&mut state.wakers);
            }
        } else if self.read().phase() == Phase::Open {
            let in_flight = self.move_locked(Phase::Open, Phase::Closing);
            state.course = Some(Course::new(now, grace_ends, in_flight));
            driver = Some(Driver::new(self.clone()));
        }
        drop(state);
        wake_all(wakers);
        (round, driver)
    }

    /// With the lock held, so that nobody else moves the phase: how many were in flight at that step.
    fn move_locked(&self, from: Phase, to: Phase) -> u64 {
        Word(self.word.fetch_add(Word::step(from, to), AcqRel)).in_flight()
    }

    /// Takes the closing one step on. To wait for more, a driver needs its number and a waker.
    fn step(&self, due: Due, number: u64, waker: Option<Waker>) -> Step {
        let now = Moment::now();
        let mut state = self.state.lock();
        let unused = state.replace_waker(number, waker);
        let step = self.step_locked(&mut state, due, now);
        drop(state);
        drop(unused);
        step
    }

    fn step_locked(&self, state: &mut State, due: Due, now: Moment) -> Step {
        let Some(course) = &mut state.course else { return Step::Over };
        let word = self.read();
        let due = match due {
            Due::Now => now,
            Due::All => Moment::NEVER,
        };
        match course.next(due, word.in_flight()) {
            Next::Wait(until) => Step::Wait(until),
            Next::Cancel => {
                let in_flight = self.move_locked(word.phase(), Phase::Cancelling);
                course.cancel(in_flight, now.plus_nanos(self.cancel_wait));
                Step::Cancel(state.round.clone())
            }
            Next::End => {
                let told = course.has_told();
                // Names come and go under their lock, so those that are read here are among those counted.
                let names = self.names.lock();
                let in_flight = self.move_locked(word.phase(), Phase::Done);
                let held = names.all(now);
                drop(names);
                let account = course.end(now, in_flight);
                state.course = None;
                Step::End { round: state.round.clone(), account, held, told }
            }
        }
    }

    /// The last one is out.
    #[cold]
    pub(super) fn wake_driver(&self) {
        let wakers = std::mem::take(&mut self.state.lock().wakers);
        wake_all(wakers);
    }

    /// The current round, and whether it has come so far that its work is told to stop.
    pub(super) fn stopping(&self) -> (Arc<Round>, bool) {
        let state = self.state.lock();
        (state.round.clone(), self.read().phase() == Phase::Cancelling)
    }

    pub(super) fn reopen(&self) -> bool {
        let fresh = Round::new();
        let mut state = self.state.lock();
        if self.read().phase() != Phase::Done {
            return false;
        }
        let old = std::mem::replace(&mut state.round, fresh);
        self.move_locked(Phase::Done, Phase::Open);
        drop(state);
        drop(old);
        true
    }
}

impl State {
    /// Leaves a driver's waker, or takes it away; what is not needed any more is to be dropped outside of the lock.
    fn replace_waker(&mut self, number: u64, waker: Option<Waker>) -> Option<Waker> {
        let at = self.wakers.iter().position(|(other, _)| *other == number);
        match (at, waker) {
            (Some(at), Some(waker)) => Some(std::mem::replace(&mut self.wakers[at].1, waker)),
            (Some(at), None) => Some(self.wakers.swap_remove(at).1),
            (None, Some(waker)) => {
                self.wakers.push((number, waker));
                None
            }
            (None, None) => None,
        }
    }
}

/// Wakes all drivers, also if a waker panics.
fn wake_all(wakers: Vec<(u64, Waker)>) {
    let mut list = WakeList::default();
    for (_, waker) in wakers {
        list.push(Some(waker));
    }
    list.wake();
}

/// A caller of `close`: it drives the closing by its own grace, and waits for the report.
#[pin_project(PinnedDrop)]
pub(super) struct Closer {
    #[pin]
    timer: Timer,
    shared: Arc<Shared>,
    round: Arc<Round>,
    number: u64,
    /// Before this moment others drive, unless the last one leaves.
    due: Moment,
    has_timers: bool,
}

impl Closer {
    pub(super) fn new(shared: Arc<Shared>, round: Arc<Round>, grace: Duration) -> Self {
        let mut state = shared.state.lock();
        state.drivers += 1;
        let number = state.drivers;
        drop(state);
        let due = Moment::now() + grace;
        Self { timer: Timer::idle(), shared, round, number, due, has_timers: true }
    }

    /// Drives as far as it goes now. The waker is woken when there is more to do.
    pub(super) fn poll_drive(self: Pin<&mut Self>, cx: &mut Context<'_>) {
        let mut this = self.project();
        loop {
            let own = cx.waker().clone();
            let mut state = this.shared.state.lock();
            let over = !Arc::ptr_eq(&state.round, this.round) || this.round.report.get().is_some();
            let (waker, spare) = if over { (None, Some(own)) } else { (Some(own), None) };
            let unused = state.replace_waker(*this.number, waker);
            let is_last = this.shared.read().in_flight() == 0;
            drop(state);
            drop((unused, spare));
            if over {
                return;
            }
            if is_last || *this.due <= Moment::now() {
                match this.shared.step(Due::Now, *this.number, Some(cx.waker().clone())) {
                    Step::Wait(until) => *this.due = until.max(Moment::now().plus_nanos(1)),
                    step => {
                        tell(step);
                        continue;
                    }
                }
            }
            if !*this.has_timers {
                return;
            }
            // A runtime without timers panics, and can't be asked: others have to drive then.
            match catch_unwind(AssertUnwindSafe(|| this.timer.as_mut().poll_until(*this.due, cx))) {
                Ok(Poll::Ready(())) => {}
                Ok(Poll::Pending) => return,
                Err(_) => *this.has_timers = false,
            }
        }
    }
}

#[pinned_drop]
impl PinnedDrop for Closer {
    fn drop(self: Pin<&mut Self>) {
        let unused = self.shared.state.lock().replace_waker(self.number, None);
        drop(unused);
    }
}

/// Takes a closing from its beginning to its end; a task of its own.
#[pin_project(PinnedDrop)]
#[must_use = "a driver that is dropped ends the closing"]
pub(super) struct Driver {
    #[pin]
    timer: Timer,
    shared: Arc<Shared>,
    over: bool,
}

impl Driver {
    fn new(shared: Arc<Shared>) -> Self {
        Self { timer: Timer::idle(), shared, over: false }
    }
}

impl Future for Driver {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut this = self.project();
        while !*this.over {
            match this.shared.step(Due::Now, 0, Some(cx.waker().clone())) {
                Step::Wait(until) => ready!(this.timer.as_mut().poll_until(until, cx)),
                step => *this.over = tell(step),
            }
        }
        Poll::Ready(())
    }
}

#[pinned_drop]
impl PinnedDrop for Driver {
    fn drop(self: Pin<&mut Self>) {
        while !self.over && !tell(self.shared.step(Due::All, 0, None)) {}
    }
}

/// Tells those who wait for it of a step; whether it was the last.
fn tell(step: Step) -> bool {
    match step {
        Step::Wait(_) => false,
        Step::Cancel(round) => {
            round.cancel.cancel_with(CancelReason::Shutdown);
            round.tell(Phase::Cancelling);
            false
        }
        Step::End { round, account, held, told } => {
            // Another driver may be about to say so; the report must not come first.
            if told {
                round.cancel.cancel_with(CancelReason::Shutdown);
            }
            // A round ends once, so this can't fail.
            let _ = round.report.set(Drained::new(account, Held::group(held)));
            round.tell(Phase::Done);
            true
        }
        Step::Over => true,
    }
}
