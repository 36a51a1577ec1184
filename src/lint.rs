//! What is unusual about a policy, and what it will do.

use std::fmt;
use std::time::Duration;

use crate::call::Call;
use crate::internal::queue::DEFAULT_MAX_QUEUE;
use crate::step::{Kind, Step};

/// Something unusual about a policy; from [`Policy::lint`](crate::Policy::lint).
///
/// ```
/// # use std::time::Duration;
/// # use resile::{Lint, Policy, Retry, RetryBudget};
/// let budget = RetryBudget::ratio(0.1).build()?;
/// let policy = Policy::named("users")
///     .timeout(Duration::from_secs(1))
///     .retry(Retry::immediate().budget(budget))
///     .build()?;
/// let findings = policy.lint();
/// assert_eq!((findings[0].lint(), findings[0].step()), (Lint::NoAttemptTimeout, Some(2)));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    lint: Lint,
    step: Option<usize>,
    message: String,
}

/// The kinds of finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Lint {
    /// No step limits the whole call.
    NoCallTimeout,
    /// A retry has no budget.
    RetryWithoutBudget,
    /// A retry has no limit on one attempt.
    NoAttemptTimeout,
    /// A timeout inside of another is not shorter.
    AttemptNotShorter,
    /// A breaker stands outside of a retry.
    BreakerOutsideRetry,
    /// A gate stands inside of a retry that tries again when it refuses, and nothing limits the whole call.
    RefusalsRetried,
    /// A breaker inside of a retry that tries again when it refuses stays open for longer than a call may last.
    OpenOutlastsCall,
    /// A retry stands inside of another.
    NestedRetries,
    /// A breaker stands inside of a gate that is taken first.
    BreakerInsideGate,
    /// A gate that is taken once for all attempts stands outside of a retry.
    GateOutsideRetry,
    /// The limit of one attempt stands outside of a gate at which attempts can wait.
    AttemptLimitOutsideQueue,
    /// The attempts of a retry, if each takes as long as it may, take longer than the call.
    AttemptsOutlastCall,
    /// Who is last in a queue of this length waits longer than the call may last. The default length, which is a bound of
    /// memory, is not found fault with.
    QueueOutlastsCall,
    /// Nobody may wait at a limit.
    NoQueue,
    /// A drain stands in a policy for calls that go out: when it closes, the work that is still to be finished can make
    /// none.
    DrainOutbound,
    /// No step limits one attempt, so a breaker learns of a hanging peer only from callers who give up.
    BreakerWithoutTimeout,
}

impl Finding {
    /// Which kind it is.
    #[must_use]
    pub fn lint(&self) -> Lint {
        self.lint
    }

    /// The step it is about, counted from 1; `None` if it is about the whole.
    #[must_use]
    pub fn step(&self) -> Option<usize> {
        self.step
    }

    /// What will happen.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.step {
            Some(step) => write!(f, "step {step}: {}", self.message),
            None => f.write_str(&self.message),
        }
    }
}

/// The steps by kind, with their places.
struct Layout<'a>(&'a [Step]);

impl Layout<'_> {
    fn timeouts(&self) -> impl Iterator<Item = (usize, Duration)> {
        self.0.iter().enumerate().filter_map(|(place, step)| match &step.0 {
            // An endless limit is none.
            Kind::Timeout(limit) if *limit < u64::MAX => Some((place, Duration::from_nanos(*limit))),
            _ => None,
        })
    }

    fn retries(&self) -> impl Iterator<Item = usize> {
        self.0.iter().enumerate().filter(|(_, step)| matches!(step.0, Kind::Retry(_))).map(|(place, _)| place)
    }

    /// Drains are none of them: nobody waits or pays there, and no retry tries their refusals again.
    fn gates(&self, breakers: bool) -> impl Iterator<Item = usize> {
        let is = move |step: &Step| match step.0 {
            Kind::Breaker(_) => breakers,
            Kind::Drain(_) | Kind::NamedDrain(_) => false,
            _ => !breakers && step.as_gate().is_some(),
        };
        self.0.iter().enumerate().filter(move |(_, step)| is(step)).map(|(place, _)| place)
    }
}

/// What only the numbers show.
fn numbers(layout: &Layout<'_>, find: &mut impl FnMut(Lint, Option<usize>, String)) {
    let limit_outside = |place: usize| layout.timeouts().filter(|(at, _)| *at < place).map(|(_, limit)| limit).min();
    let limit_inside = |place: usize| layout.timeouts().find(|(at, _)| *at > place).map(|(_, limit)| limit);
    for place in layout.retries() {
        let Kind::Retry(plan) = &layout.0[place].0 else { continue };
        let attempts = plan.retry.attempts();
        if let (Some(call), Some(attempt)) = (limit_outside(place), limit_inside(place)) {
            let all = attempt.saturating_mul(attempts);
            if all > call {
                let message = format!(
                    "{attempts} attempts of {attempt:?} take {all:?}, and the call has {call:?}: the last ones are never \
                     made"
                );
                find(Lint::AttemptsOutlastCall, Some(place), message);
            }
        }
    }
    for place in layout.gates(false) {
        let Some(gate) = layout.0[place].as_gate() else { continue };
        let Some(queue) = gate.places() else { continue };
        if queue == 0 {
            let message = "nobody may wait here: a burst is refused, however short";
            find(Lint::NoQueue, Some(place), message.into());
        }
        let Some(call) = limit_outside(place).filter(|_| queue != DEFAULT_MAX_QUEUE) else { continue };
        let probe = Call::alone(1, true);
        let last = match (&layout.0[place].0, limit_inside(place)) {
            (Kind::Semaphore(semaphore), Some(attempt)) => {
                // Rounds of all permits, each as long as an attempt may be.
                Some(attempt.saturating_mul(queue.div_ceil(semaphore.limit().max(1))))
            }
            _ => gate.due(queue.into(), &probe).map(|due| due.since(probe.now())),
        };
        if let Some(last) = last.filter(|last| *last > call) {
            let message = format!("the last of {queue} in this queue may wait {last:?}, and the call has {call:?}");
            find(Lint::QueueOutlastsCall, Some(place), message);
        }
    }
    let goes_out = layout.retries().chain(layout.gates(true)).next().is_some();
    for (place, step) in layout.0.iter().enumerate().filter(|_| goes_out) {
        if step.as_drain().is_some() {
            let message = "when this drain closes, work that is still being finished can make no more calls: let the \
                           drain count the requests that come in";
            find(Lint::DrainOutbound, Some(place), message.into());
        }
    }
}

pub(crate) fn lint(steps: &[Step]) -> Vec<Finding> {
    let layout = Layout(steps);
    let mut findings = Vec::new();
    let mut find = |lint, place: Option<usize>, message: String| {
        findings.push(Finding { lint, step: place.map(|place| place + 1), message });
    };
    let first_retry = layout.retries().next();

    if !layout.timeouts().any(|(place, _)| first_retry.is_none_or(|retry| place < retry)) {
        let message = "nothing limits the whole call: a caller without a deadline waits for every attempt and delay";
        find(Lint::NoCallTimeout, None, message.into());
    }
    for place in layout.retries() {
        if let Kind::Retry(plan) = &steps[place].0 {
            if !plan.has_budget() {
                let message = "without a budget an outage is multiplied by the number of attempts";
                find(Lint::RetryWithoutBudget, Some(place), message.into());
            }
            if plan.retry.retries_refusals() {
                let limit = layout.timeouts().filter(|(outer, _)| *outer < place).map(|(_, limit)| limit).min();
                for gate in layout.gates(false).chain(layout.gates(true)).filter(|gate| *gate > place) {
                    match (limit, &steps[gate].0) {
                        (None, _) => {
                            let message = "a call that is refused here comes back a thousand times: nothing limits it";
                            find(Lint::RefusalsRetried, Some(gate), message.into());
                        }
                        (Some(limit), Kind::Breaker(breaker)) if breaker.open_for() >= limit => {
                            let open = breaker.open_for();
                            let message = format!(
                                "once open it stays so for {open:?}, and a call has {limit:?}: to try its refusals again \
                                 is no use"
                            );
                            find(Lint::OpenOutlastsCall, Some(gate), message);
                        }
                        _ => {}
                    }
                }
            }
        }
        if !layout.timeouts().any(|(inner, _)| inner > place) {
            let message = "nothing limits one attempt: the first one that hangs leaves no time for another";
            find(Lint::NoAttemptTimeout, Some(place), message.into());
        }
        if layout.retries().any(|outer| outer < place) {
            let message = "attempts multiply: this retry runs anew for each attempt of the one outside";
            find(Lint::NestedRetries, Some(place), message.into());
        }
    }
    numbers(&layout, &mut find);
    for (place, limit) in layout.timeouts() {
        if let Some((_, outer)) = layout.timeouts().find(|(outer, other)| *outer < place && *other <= limit) {
            let message = format!("{limit:?} is not shorter than the {outer:?} outside: it never fires first");
            find(Lint::AttemptNotShorter, Some(place), message);
        }
    }
    for place in layout.gates(false) {
        if matches!(steps[place].0, Kind::Semaphore(_)) && layout.retries().any(|retry| retry > place) {
            let message = "a permit is held through all attempts and the delays between them";
            find(Lint::GateOutsideRetry, Some(place), message.into());
        }
        let inner = first_retry
            .and_then(|retry| layout.timeouts().map(|(limit, _)| limit).filter(|limit| *limit > retry).last());
        if inner.is_some_and(|limit| limit < place) {
            let message = "the limit of an attempt runs while it waits here: a long queue looks like a slow peer";
            find(Lint::AttemptLimitOutsideQueue, Some(place), message.into());
        }
    }
    for place in layout.gates(true) {
        if layout.retries().any(|retry| retry > place) {
            let message =
                "this breaker stands outside of a retry: it sees whole calls and opens late, after all attempts";
            find(Lint::BreakerOutsideRetry, Some(place), message.into());
        }
        if layout.gates(false).any(|gate| gate < place) {
            let message = "calls wait and pay at the gate outside before this breaker refuses them";
            find(Lint::BreakerInsideGate, Some(place), message.into());
        }
        if !layout.timeouts().any(|(inner, _)| inner > place) {
            let message =
                "nothing inside of this breaker limits an attempt: a peer that hangs never counts as a failure";
            find(Lint::BreakerWithoutTimeout, Some(place), message.into());
        }
    }
    findings
}
