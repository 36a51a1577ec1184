//! The journal: what operations and spies saw, in order, each entry with its time.

use std::sync::{Arc, Mutex, PoisonError};

use resile::{Moment, Outcome, Times, Verdict};
use tokio::time::Instant;

/// One entry.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Event {
    /// An operation was started: its closure was called, or its future was polled for the first time.
    Started(u32),
    /// The operation's future was dropped.
    Gone(u32),
    /// The operation's value or error was dropped.
    AnswerGone(u32),
    /// A spy gave a pass.
    Entered(&'static str),
    /// A spy gave a ticket.
    Queued(&'static str),
    /// A spy took a ticket back.
    Abandoned(&'static str),
    /// A spy took a pass back.
    Left(&'static str, Outcome),
}

/// What a gate hears, without the times.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Heard {
    Judged(Verdict),
    NotStarted,
    Abandoned,
}

/// The verdicts that tests are full of.
pub const SUCCESS: Heard = Heard::Judged(Verdict::Success);
pub const TRANSIENT: Heard = Heard::Judged(Verdict::Transient(None));

impl From<Outcome> for Heard {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Judged(verdict, _) => Self::Judged(verdict),
            Outcome::NotStarted => Self::NotStarted,
            Outcome::Abandoned(_) => Self::Abandoned,
            outcome => unreachable!("no test here leads to {outcome:?}"),
        }
    }
}

/// The time from a spy's pass to its return.
#[derive(Clone, Copy, Debug)]
pub struct Passage {
    pub outcome: Outcome,
    /// An operation was started in it.
    pub started: bool,
}

#[derive(Clone, Debug, Default)]
pub struct Journal(Arc<Mutex<Vec<(Instant, Event)>>>);

impl Journal {
    pub fn note(&self, event: Event) {
        self.entries().push((Instant::now(), event));
    }

    pub fn events(&self) -> Vec<Event> {
        self.entries().iter().map(|(_, event)| *event).collect()
    }

    pub fn timed(&self) -> Vec<(Instant, Event)> {
        self.entries().clone()
    }

    /// The events without what outcomes say of the time.
    pub fn kinds(&self) -> Vec<(Option<Heard>, Event)> {
        let times = Times::new(Moment::NEVER, Moment::NEVER);
        let events = self.events().into_iter().map(|event| match event {
            Event::Left(name, outcome) => (Some(outcome.into()), Event::Left(name, Outcome::Abandoned(times))),
            event => (None, event),
        });
        events.collect()
    }

    /// How many operations were started.
    pub fn starts(&self) -> u32 {
        self.entries().iter().filter(|(_, event)| matches!(event, Event::Started(_))).count() as u32
    }

    /// The operation that was started and not dropped yet.
    pub fn running(&self) -> Option<u32> {
        self.entries().iter().fold(None, |running, (_, event)| match event {
            Event::Started(number) => Some(*number),
            Event::Gone(number) if running == Some(*number) => None,
            _ => running,
        })
    }

    /// What a spy was told, in order.
    pub fn heard(&self, gate: &str) -> Vec<Heard> {
        self.passages(gate).iter().map(|passage| passage.outcome.into()).collect()
    }

    pub fn passages(&self, gate: &str) -> Vec<Passage> {
        let mut passages = Vec::new();
        let mut started = false;
        for (_, event) in self.entries().iter() {
            match event {
                Event::Entered(name) if *name == gate => started = false,
                Event::Started(_) => started = true,
                Event::Left(name, outcome) if *name == gate => passages.push(Passage { outcome: *outcome, started }),
                _ => {}
            }
        }
        passages
    }

    /// Passes go back in the opposite order of their giving, no pass goes back while an operation runs inside of it,
    /// and nothing is out at the end.
    #[track_caller]
    pub fn assert_nested(&self) {
        let (mut out, mut queued, mut running) = (Vec::new(), None, None);
        for event in self.events() {
            let fine = match event {
                Event::Entered(name) => {
                    out.push(name);
                    queued.take().is_none_or(|ticket| ticket == name) && running.is_none()
                }
                Event::Left(name, _) => out.pop() == Some(name) && queued.is_none() && running.is_none(),
                Event::Queued(name) => queued.replace(name).is_none() && running.is_none(),
                Event::Abandoned(name) => queued.take() == Some(name),
                Event::Started(number) => running.replace(number).is_none() && queued.is_none(),
                Event::Gone(number) => running.take().is_none_or(|started| started == number),
                Event::AnswerGone(_) => true,
            };
            assert!(fine, "{event:?} came too early or too often in {:#?}", self.events());
        }
        let left = (out, queued, running);
        assert!(left == (Vec::new(), None, None), "{left:?} were never given back in {:#?}", self.events());
    }

    fn entries(&self) -> std::sync::MutexGuard<'_, Vec<(Instant, Event)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
