//! What is true, told by those who do it: operations, callers, and whoever cancels.

use std::cell::Cell;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use resile::{CancelReason, Error, Limit, Outcome, Verdict, Why};
use tokio::time::Instant;

/// How long a breaker waits for a probe.
pub const LEASE: Duration = Duration::from_secs(30);

thread_local! {
    /// Who is being polled or dropped.
    static CURRENT: Cell<Option<usize>> = const { Cell::new(None) };
}

/// Does something in the name of a call, which listeners and spies ask for.
pub fn in_name_of<R>(call: usize, what: impl FnOnce() -> R) -> R {
    struct Back(Option<usize>);
    impl Drop for Back {
        fn drop(&mut self) {
            CURRENT.set(self.0);
        }
    }
    let _back = Back(CURRENT.replace(Some(call)));
    what()
}

/// The error of an operation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Down;

/// Everything that is known, shared by all who tell.
#[derive(Clone, Default)]
pub struct Model(Arc<Mutex<Known>>);

#[derive(Default)]
pub struct Known {
    /// Which event is going on.
    pub event: usize,
    pub calls: Vec<Call>,
    /// The first cancellation of each source: when, and why.
    pub cancelled: Vec<Option<(usize, CancelReason)>>,
    /// In which order they came.
    pub orders: Vec<usize>,
    /// Whether there is a pause between two attempts.
    pub pauses: bool,
    /// When it was after each event.
    pub instants: Vec<Instant>,
    /// When the drain began to cancel, each time, and whether it was opened again.
    pub drained: Vec<(usize, bool)>,
    /// Operations that are there, and all that ended badly or were cut.
    pub alive: usize,
    /// Who is inside of the breaker, in a queue or at the peer.
    pub inside: usize,
    pub bad: u64,
    /// The same when the breaker became half open.
    pub half_open: Option<u64>,
    pub half_opened: usize,
    pub panics: usize,
    pub listener_cancelled: usize,
    pub faults: Vec<String>,
}

/// One call under the policy.
#[derive(Default)]
pub struct Call {
    /// When it must be over, as far as its callers said.
    pub ends: Option<Instant>,
    pub sources: Vec<usize>,
    pub drain: bool,
    pub shielded: bool,
    /// It goes through the policy.
    pub under: bool,
    pub began: usize,
    pub alive: usize,
    pub made: u32,
    /// When it was let in, and how many operations had been made by then.
    pub entered: Option<Instant>,
    pub made_before: u32,
    pub well: u32,
    pub reports: Vec<Why>,
}

/// How a call of a scope's child, or the child itself, ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Ended {
    Well,
    /// By its own fault.
    Badly,
    /// Cut by somebody, or by time.
    Cut,
}

impl Model {
    pub fn new(sources: usize) -> Self {
        let model = Self::default();
        model.know().cancelled = vec![None; sources];
        model
    }

    pub fn know(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn call(&self, call: Call) -> usize {
        let mut known = self.know();
        known.calls.push(call);
        known.calls.len() - 1
    }

    /// An operation is made.
    pub fn made(&self, call: usize) {
        let now = Instant::now();
        let mut known = self.know();
        known.calls[call].made += 1;
        if let Some(late) =
            known.calls[call].ends.and_then(|ends| now.checked_duration_since(ends)).filter(|late| !late.is_zero())
        {
            let attempt = known.calls[call].made;
            let after = match (attempt, known.pauses) {
                (1, _) => "its queue",
                (_, true) => "a pause",
                _ => "another attempt",
            };
            let fault = format!("begins too late after {after}: attempt {attempt} of call {call}, by {late:?}");
            known.faults.push(fault);
        }
    }

    pub fn began(&self, call: usize) {
        let mut known = self.know();
        known.calls[call].alive += 1;
        known.alive += 1;
    }

    /// An operation is gone, which ended well or not.
    pub fn gone(&self, call: usize, well: bool) {
        let mut known = self.know();
        known.calls[call].alive -= 1;
        known.alive -= 1;
        known.bad += u64::from(!well);
        known.calls[call].well += u32::from(well);
    }

    pub fn reported(&self, why: &Why) {
        if let Some(call) = CURRENT.get() {
            self.know().calls[call].reports.push(why.clone());
        }
    }

    pub fn cancelled(&self, source: usize, reason: CancelReason) {
        let mut known = self.know();
        let event = known.event;
        if known.cancelled[source].is_none() {
            known.cancelled[source] = Some((event, reason));
            known.orders.push(source);
        }
    }

    /// A gate lets the call in.
    pub fn entered(&self) {
        self.know().inside += 1;
        if let Some(call) = CURRENT.get() {
            let mut known = self.know();
            let call = &mut known.calls[call];
            (call.made_before, call.well, call.entered) = (call.made, 0, Some(Instant::now()));
        }
    }

    fn entered_at(&self) -> Option<Instant> {
        CURRENT.get().and_then(|call| self.know().calls[call].entered)
    }

    /// A gate is told how it went: it must be what the peer did.
    pub fn left(&self, outcome: Outcome) {
        self.know().inside -= 1;
        // A breaker takes a probe that is away for longer than its lease for lost.
        if self.entered_at().is_none_or(|at| at.elapsed() >= LEASE) {
            self.know().bad += 1;
        }
        let Some(number) = CURRENT.get() else { return };
        let mut known = self.know();
        let call = &known.calls[number];
        let (made, well) = (call.made - call.made_before, call.well);
        let fine = match outcome {
            Outcome::NotStarted => made == 0,
            Outcome::Judged(Verdict::Success, _) => (made, well) == (1, 1),
            Outcome::Judged(..) | Outcome::Abandoned(_) => made == 1,
            _ => false,
        };
        if !fine {
            known
                .faults
                .push(format!("a gate hears what the peer did not do: {outcome:?} for {made} made and {well} well"));
        }
    }

    /// A call has ended with an error: it must be about what came first. What cancels a scope is not known here.
    pub fn ended(&self, call: usize, error: &Error<Down>, in_scope: bool) -> Ended {
        let mut known = self.know();
        let Known { event, calls, cancelled, orders, drained, faults, .. } = &mut *known;
        let of = &calls[call];
        let told = match (error.cancel_reason(), error.limit()) {
            (Some(reason), _) => Some(Why::Cancelled(reason.clone())),
            (None, Some(limit)) => Some(Why::TimedOut(limit)),
            _ => None,
        };
        if let (Some(told), Some(report)) = (&told, of.reports.last()) {
            if told != report {
                faults.push(format!("report and error differ: {report:?} and {told:?}"));
            }
        }
        if let Some(reason) = error.cancel_reason() {
            let mine = orders.iter().filter(|source| of.sources.contains(source));
            let sources = mine.filter_map(|source| cancelled[*source].clone());
            let drain = drained.iter().find(|(at, _)| of.drain && *at >= of.began);
            let first = sources.chain(drain.map(|(at, _)| (*at, CancelReason::Shutdown))).min_by_key(|(at, _)| *at);
            match first {
                _ if in_scope => {}
                Some((_, first)) if first == *reason => {}
                // What is shielded goes on, and ends with what ends it, if nobody has looked.
                Some(_) if of.shielded && of.drain && *reason == CancelReason::Shutdown => {}
                // The drain began to cancel in the same event, perhaps in this one.
                first
                    if of.drain
                        && *reason == CancelReason::Shutdown
                        && first.as_ref().is_none_or(|(at, _)| *at == drain.map_or(*event, |(at, _)| *at)) => {}
                first => faults.push(format!("not the first reason: {reason:?} for {first:?}")),
            }
        }
        if error.attempts() > of.made {
            faults.push(format!("attempts that nobody made: {} of {}", error.attempts(), of.made));
        }
        match (error.cancel_reason(), error.limit()) {
            (Some(_), _) | (_, Some(Limit::Caller | Limit::Context)) => Ended::Cut,
            _ => Ended::Badly,
        }
    }

    /// The breaker opens again: somebody must have done something bad, or be about to.
    pub fn reopened(&self) {
        let mut known = self.know();
        if known.half_open.is_some_and(|bad| bad == known.bad) && known.inside == 0 {
            known.faults.push("the breaker opens for nothing: all that was asked answered well".into());
        }
    }
}
