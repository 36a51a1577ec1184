//! The policy, in the order that the crate recommends, outermost first:
//!
//! ```text
//! timeout (the call) ── retry with a budget ── breaker ── bucket ── semaphore ── timeout (an attempt)
//! ```
//!
//! The judge reads the status as well as the error: `503` and `429` say that the server is full, with `Retry-After` as
//! the hint; other `5xx` and a broken connection may pass; other `4xx` won't.
//!
//! It is here twice, and the two differ in one setting. `resile` comes back after a refusal as long as its deadline leaves
//! room ([`OnRefusal::Retry`]): right for callers that have nothing better to do. `fail fast` leaves it at the default:
//! in an outage a caller knows within a millisecond that it had better use what it has instead. What the one gains the
//! other saves: of an outage's calls those are answered that are waiting when it ends.
//!
//! The breaker is told how short the callers' deadline is, and is otherwise as it comes.

use futures::future::BoxFuture;
use reqwest::StatusCode;
use resile::{CircuitBreaker, Jitter, OnRefusal, Policy, Retry, RetryBudget, Semaphore, TokenBucket, Verdict};

use crate::contenders::{
    ATTEMPT, Answer, Ask, BACKOFF, BACKOFF_MAX, BUDGET, BUDGET_FLOOR, Contender, DEADLINE, Ending, Held, PER_SECOND,
    PERMITS, QUEUE, RETRIES, Wire,
};

/// The policy, and its semaphore once more, to ask what is held.
#[derive(Debug)]
pub struct Resile {
    name: &'static str,
    wire: Wire,
    policy: Policy,
    permits: Semaphore,
}

impl Resile {
    pub fn new(name: &'static str, wire: Wire, on_refusal: OnRefusal) -> anyhow::Result<Self> {
        let budget = RetryBudget::ratio(BUDGET).reserve_per_second(BUDGET_FLOOR).build()?;
        // It shall notice an outage before the first callers have given up, and its end while they still wait.
        let breaker = CircuitBreaker::builder().over(DEADLINE).open_for(DEADLINE / 10).max_open_for(DEADLINE / 10);
        // Equal jitter, because that is what tower's comes to: the two shall differ in the rest.
        let retry = Retry::exponential(BACKOFF)
            .jitter(Jitter::Equal)
            .max_delay(BACKOFF_MAX)
            .max_attempts(1 + RETRIES)
            .min_attempt(ATTEMPT)
            .on_refusal(on_refusal)
            .budget(budget);
        let permits = Semaphore::permits(PERMITS).max_queue(QUEUE).build()?;
        let policy = Policy::named("outbound")
            .timeout(DEADLINE)
            .retry(retry)
            .gate(breaker)
            .gate(TokenBucket::per_second(PER_SECOND.into()).burst(PER_SECOND / 10))
            .gate(permits.clone())
            .timeout(ATTEMPT)
            .build()?;
        Ok(Self { name, wire, policy, permits })
    }
}

impl Contender for Resile {
    fn name(&self) -> &'static str {
        self.name
    }

    fn call(&self, ask: Ask) -> BoxFuture<'_, Ending> {
        Box::pin(async move {
            let ended = self.policy.classify(judge).run_with(|call| self.wire.fetch(&ask, call.remaining())).await;
            match ended {
                Ok(answer) => Ending::from(answer),
                Err(error) if error.is_refused() => Ending::Refused,
                Err(_) => Ending::Bad,
            }
        })
    }

    fn held(&self) -> Option<Held> {
        Some(Held { permits: self.permits.in_use(), waiting: self.permits.queued() })
    }
}

fn judge(result: &reqwest::Result<Answer>) -> Verdict {
    match result {
        Ok(Answer { status: StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE, retry_after, .. }) => {
            Verdict::Overloaded(*retry_after)
        }
        Ok(answer) if answer.right => Verdict::Success,
        Ok(answer) if answer.status.is_client_error() => Verdict::Permanent,
        Ok(_) | Err(_) => Verdict::Transient(None),
    }
}
