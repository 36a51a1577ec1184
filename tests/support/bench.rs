//! A bench: run a script under a policy, and say in one line what is to come of it.

use std::cell::RefCell;
use std::time::Duration;

use resile::{CallBuilder, Error, ErrorKind, Limit, Policy, Reason, Steps, Stop};
use tokio::time::Instant;

use super::journal::{Event, Heard, Journal};
use super::ms;
use super::script::{Act, Answer, Script, judge};
use super::watch::{Reading, Spy, Watch, Watched};

/// A journal, and the parts that are watched.
#[derive(Debug, Default)]
pub struct Bench {
    pub journal: Journal,
    watch: RefCell<Watch>,
    start: RefCell<Vec<Reading>>,
}

impl Bench {
    pub fn new() -> Self {
        Self::default()
    }

    /// A spy that is watched.
    pub fn spy(&self, name: &'static str) -> Spy {
        let spy = Spy::new(name, &self.journal);
        self.watch(Watched::Spy(spy.clone()));
        spy
    }

    /// Watches a part: it is to be found as it is now.
    pub fn watch(&self, part: Watched) {
        self.start.borrow_mut().push(part.read());
        self.watch.borrow_mut().0.push(part);
    }

    /// Runs a script under a policy.
    pub async fn run(&self, policy: &Policy, acts: impl Into<Vec<Act>>) -> Report<'_> {
        self.call(policy.call(), acts).await
    }

    /// Runs a script as a call about which more was said.
    pub async fn call<P: Steps, C>(&self, call: CallBuilder<P, C>, acts: impl Into<Vec<Act>>) -> Report<'_> {
        let script = Script::new(&self.journal, acts);
        let begun = Instant::now();
        let result = call.classify(judge).run(|| script.make()).await;
        Report { bench: self, result, begun, took: begun.elapsed() }
    }

    /// Runs a script's first act as a call that cannot be repeated.
    pub async fn once(&self, policy: &Policy, act: Act) -> Report<'_> {
        let script = Script::new(&self.journal, [act]);
        let begun = Instant::now();
        let result = policy.classify(judge).run_once(script.make_ahead()).await;
        Report { bench: self, result, begun, took: begun.elapsed() }
    }

    #[track_caller]
    pub fn assert_back(&self) {
        self.watch.borrow().assert_back_to(&self.start.borrow());
        self.journal.assert_nested();
    }
}

/// What came of a call. Each method asserts one thing about it.
#[derive(Debug)]
pub struct Report<'a> {
    bench: &'a Bench,
    pub result: Result<Answer, Error<Answer>>,
    begun: Instant,
    took: Duration,
}

#[allow(clippy::must_use_candidate, clippy::return_self_not_must_use, reason = "assertions may end anywhere")]
impl Report<'_> {
    /// It succeeded with the value of this attempt.
    #[track_caller]
    pub fn ok(self, attempt: u32) -> Self {
        let answer = self.result.as_ref().expect("it should have succeeded");
        assert_eq!(answer.attempt, attempt, "the value of another attempt");
        self
    }

    /// The operation failed, and there was no further attempt because of this.
    #[track_caller]
    pub fn failed(self, stop: Stop) -> Self {
        self.is(ErrorKind::Failed).stop(stop)
    }

    /// It timed out by the limit of a step, counted from 1.
    #[track_caller]
    pub fn timed_out(self, step: usize, limit: Duration) -> Self {
        let told = self.error().limit();
        assert!(matches!(told, Some(Limit::Step { step: at, limit: of }) if (at, of) == (step, limit)), "{told:?}");
        self.is(ErrorKind::TimedOut)
    }

    #[track_caller]
    pub fn timed_out_by_caller(self) -> Self {
        assert_eq!(self.error().limit(), Some(Limit::Caller));
        self.is(ErrorKind::TimedOut)
    }

    #[track_caller]
    pub fn cancelled(self) -> Self {
        self.is(ErrorKind::Cancelled)
    }

    #[track_caller]
    pub fn refused(self, gate: &str, reason: Reason) -> Self {
        let refusal = self.error().refusal().expect("it should have been refused");
        assert_eq!((refusal.gate(), refusal.reason()), (gate, reason));
        self.is(ErrorKind::Refused)
    }

    #[track_caller]
    fn is(self, kind: ErrorKind) -> Self {
        let error = self.error();
        assert_eq!(error.kind(), kind, "{error:?}");
        assert_eq!(error.limit().is_some(), kind == ErrorKind::TimedOut);
        assert_eq!(error.refusal().is_some(), kind == ErrorKind::Refused);
        self
    }

    /// Why there was no further attempt.
    #[track_caller]
    pub fn stop(self, stop: Stop) -> Self {
        assert_eq!(self.error().stop(), stop);
        self
    }

    /// The error has kept that of this attempt, or of none.
    #[track_caller]
    pub fn last(self, attempt: impl Into<Option<u32>>) -> Self {
        assert_eq!(self.error().last().map(|last| last.attempt), attempt.into(), "the last error kept");
        self
    }

    /// So many attempts were made, and the error says so.
    #[track_caller]
    pub fn attempts(self, attempts: u32) -> Self {
        assert_eq!(self.bench.journal.starts(), attempts, "attempts");
        if let Err(error) = &self.result {
            assert_eq!(error.attempts(), attempts, "attempts, by the error");
        }
        self
    }

    /// The pauses between the end of an attempt and the next one, in milliseconds.
    #[track_caller]
    pub fn delays<const N: usize>(self, delays: [u64; N]) -> Self {
        let (mut ended, mut told) = (None, Vec::new());
        for (at, event) in self.bench.journal.timed() {
            match event {
                Event::Started(_) => told.extend(ended.map(|ended| at.duration_since(ended))),
                Event::Gone(_) => ended = Some(at),
                _ => {}
            }
        }
        assert_eq!(told, delays.map(ms));
        self
    }

    /// When the attempts began, in milliseconds from the first poll on.
    #[track_caller]
    pub fn began<const N: usize>(self, times: [u64; N]) -> Self {
        let begun = self.bench.journal.timed().into_iter().filter(|(_, event)| matches!(event, Event::Started(_)));
        let begun: Vec<Duration> = begun.map(|(at, _)| at.duration_since(self.begun)).collect();
        assert_eq!(begun, times.map(ms));
        self
    }

    /// It lasted so many milliseconds, and the error says so if the policy reads the clock.
    #[track_caller]
    pub fn took(self, millis: u64) -> Self {
        assert_eq!(self.took, ms(millis));
        if let Err(error) = &self.result {
            assert!(error.elapsed().is_none_or(|elapsed| elapsed == ms(millis)), "{:?}", error.elapsed());
        }
        self
    }

    /// What a spy has heard, in order.
    #[track_caller]
    pub fn heard<const N: usize>(self, gate: &str, heard: [Heard; N]) -> Self {
        assert_eq!(self.bench.journal.heard(gate), heard, "what {gate} heard");
        self
    }

    /// Whatever is watched is as it was, the operations are gone, and all went back in order.
    #[track_caller]
    pub fn held_nothing(self) -> Self {
        self.bench.assert_back();
        self
    }

    #[track_caller]
    pub fn error(&self) -> &Error<Answer> {
        self.result.as_ref().expect_err("it should not have succeeded")
    }
}
