//! The policy, in the order that the crate recommends, outermost first:
//!
//! ```text
//! timeout (the call) ── retry with a budget ── breaker ── bucket ── semaphore ── timeout (an attempt)
//! ```
//!
//! The judge reads the status as well as the error: `503` and `429` say that the server is full, with `Retry-After` as
//! the hint; other `5xx` and a broken connection may pass; other `4xx` won't.
//!
//! What the breaker refuses is refused for good: in an outage a caller knows within a millisecond that it had better use
//! what it has instead. In return the breaker must notice quickly that the server is back, so it stays open for a small
//! part of a caller's deadline only. The price is paid by the calls that were due in the last second of an outage: one
//! that hangs on until the server is back succeeds, one that was refused does not.

use std::time::Duration;

use futures::future::BoxFuture;
use reqwest::StatusCode;
use resile::{CircuitBreaker, Jitter, Policy, Retry, RetryBudget, Semaphore, TokenBucket, Verdict};

use crate::contenders::{
    ATTEMPT, Answer, Ask, BACKOFF, BACKOFF_MAX, BUDGET, BUDGET_FLOOR, Contender, DEADLINE, Ending, Held, PER_SECOND,
    PERMITS, QUEUE, RETRIES, Wire,
};

/// The policy, and its semaphore once more, to ask what is held.
#[derive(Debug)]
pub struct Resile {
    wire: Wire,
    policy: Policy,
    permits: Semaphore,
}

impl Resile {
    pub fn new(wire: Wire) -> anyhow::Result<Self> {
        let budget = RetryBudget::ratio(BUDGET).reserve_per_second(BUDGET_FLOOR).build()?;
        let breaker = CircuitBreaker::builder()
            .failure_rate(0.5)
            .over(Duration::from_secs(2))
            .min_calls(50)
            .open_for(Duration::from_millis(100))
            .max_open_for(Duration::from_millis(200))
            .probe_lease(ATTEMPT);
        // Equal jitter, because that is what tower's comes to: the two shall differ in the rest.
        let retry = Retry::exponential(BACKOFF)
            .jitter(Jitter::Equal)
            .max_delay(BACKOFF_MAX)
            .max_attempts(1 + RETRIES)
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
        Ok(Self { wire, policy, permits })
    }
}

impl Contender for Resile {
    fn name(&self) -> &'static str {
        "resile"
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
