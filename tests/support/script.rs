//! Operations that do as they are told: a list of acts, one per attempt, the last one repeated.

use std::future::Future;
use std::panic::resume_unwind;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use resile::Verdict;
use tokio::time::Sleep;

use super::journal::{Event, Journal};

/// What one attempt does.
#[derive(Clone, Copy, Debug)]
pub struct Act {
    polls: u32,
    sleep: Option<Duration>,
    end: End,
    panics: Option<Where>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Value(Verdict),
    Fault(Verdict),
    Never,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Where {
    Closure,
    Poll,
    Judge,
    Drop,
    AnswerDrop,
}

/// Ready at once with a value.
pub const OK: Act = Act::ending(End::Value(Verdict::Success));
/// Ready at once with an error that may pass.
pub const ERR: Act = Act::ending(End::Fault(Verdict::Transient(None)));
/// Ready at once with a value that is judged bad.
pub const BAD: Act = Act::ending(End::Value(Verdict::Transient(None)));
/// Ready at once with an error that no other attempt will mend.
pub const PERMANENT: Act = Act::ending(End::Fault(Verdict::Permanent));
/// Ready at once with an error that says nothing about the peer.
pub const IGNORED: Act = Act::ending(End::Fault(Verdict::Ignored));
/// Never ready.
pub const HANG: Act = Act::ending(End::Never);
pub const PANIC_IN_CLOSURE: Act = OK.panicking(Where::Closure);
pub const PANIC_IN_POLL: Act = OK.panicking(Where::Poll);
pub const PANIC_IN_JUDGE: Act = OK.panicking(Where::Judge);
/// The operation's future panics when it is dropped.
pub const PANIC_IN_DROP: Act = OK.panicking(Where::Drop);

impl Act {
    const fn ending(end: End) -> Self {
        Self { polls: 0, sleep: None, end, panics: None }
    }

    const fn panicking(self, place: Where) -> Self {
        Self { panics: Some(place), ..self }
    }

    /// The same, after so many polls that are pending and wake at once.
    pub const fn after_polls(self, polls: u32) -> Self {
        Self { polls, ..self }
    }

    /// The same, after so long a time.
    pub const fn after(self, sleep: Duration) -> Self {
        Self { sleep: Some(sleep), ..self }
    }

    /// The same with a value or error that panics when it is dropped.
    pub const fn panicking_answer(self) -> Self {
        self.panicking(Where::AnswerDrop)
    }

    /// An error with any verdict.
    pub const fn fault(verdict: Verdict) -> Self {
        Self::ending(End::Fault(verdict))
    }

    pub fn hangs(self) -> bool {
        self.end == End::Never
    }
}

/// The panic of a script. It is thrown without the hook, so that it is not printed.
#[derive(Debug)]
pub struct Boom;

pub fn boom() -> ! {
    resume_unwind(Box::new(Boom))
}

/// The value or the error of an attempt.
#[derive(Debug)]
pub struct Answer {
    /// Of which attempt, counted from 1.
    pub attempt: u32,
    verdict: Verdict,
    panics: Option<Where>,
    journal: Journal,
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.journal.note(Event::AnswerGone(self.attempt));
        if self.panics == Some(Where::AnswerDrop) && !std::thread::panicking() {
            boom();
        }
    }
}

/// The judge of scripted operations.
pub fn judge(result: &Result<Answer, Answer>) -> Verdict {
    let (Ok(answer) | Err(answer)) = result;
    if answer.panics == Some(Where::Judge) {
        boom();
    }
    answer.verdict
}

#[derive(Clone, Debug)]
pub struct Script(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    acts: Vec<Act>,
    made: AtomicU32,
    journal: Journal,
}

impl Script {
    pub fn new(journal: &Journal, acts: impl Into<Vec<Act>>) -> Self {
        let acts = acts.into();
        assert!(!acts.is_empty(), "a script has at least one act");
        Self(Arc::new(Inner { acts, made: AtomicU32::new(0), journal: journal.clone() }))
    }

    /// The act of an attempt, counted from 1.
    pub fn act(&self, attempt: u32) -> Act {
        let last = self.0.acts.len() - 1;
        self.0.acts[last.min(attempt as usize - 1)]
    }

    /// Makes the operation of the next attempt, as a closure does.
    pub fn make(&self) -> Operation {
        let mut operation = self.make_ahead();
        operation.start();
        if operation.act.panics == Some(Where::Closure) {
            boom();
        }
        operation
    }

    /// Makes an operation that counts as started when it is first polled: for those that run once.
    pub fn make_ahead(&self) -> Operation {
        let attempt = self.0.made.fetch_add(1, Ordering::Relaxed) + 1;
        let act = self.act(attempt);
        Operation { attempt, act, sleep: None, started: false, journal: self.0.journal.clone() }
    }
}

/// The future of one attempt.
#[derive(Debug)]
pub struct Operation {
    attempt: u32,
    act: Act,
    sleep: Option<Pin<Box<Sleep>>>,
    started: bool,
    journal: Journal,
}

impl Operation {
    fn start(&mut self) {
        if !self.started {
            self.started = true;
            self.journal.note(Event::Started(self.attempt));
        }
    }
}

impl Future for Operation {
    type Output = Result<Answer, Answer>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.start();
        if let Some(polls) = self.act.polls.checked_sub(1) {
            self.act.polls = polls;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if let Some(time) = self.act.sleep {
            ready!(self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep(time))).as_mut().poll(cx));
            self.act.sleep = None;
        }
        if self.act.panics == Some(Where::Poll) {
            boom();
        }
        let panics = self.act.panics;
        let answer = |verdict| Answer { attempt: self.attempt, verdict, panics, journal: self.journal.clone() };
        match self.act.end {
            End::Value(verdict) => Poll::Ready(Ok(answer(verdict))),
            End::Fault(verdict) => Poll::Ready(Err(answer(verdict))),
            End::Never => Poll::Pending,
        }
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        self.journal.note(Event::Gone(self.attempt));
        if self.act.panics == Some(Where::Drop) && !std::thread::panicking() {
            boom();
        }
    }
}
