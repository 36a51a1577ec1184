//! The best that can be put together from tower 0.5 for outbound calls, outermost first:
//!
//! ```text
//! timeout (the call) ── retry ── load shed ── buffer ── rate limit ── concurrency limit ── timeout (an attempt)
//! ```
//!
//! - The retry policy has a backoff with jitter, tower's budget, and heeds `Retry-After`; tower leaves all that to its
//!   user, and asks for nothing more than this page.
//! - The buffer makes the rate limit shareable and is the bounded line. It also brings waiting in line under the
//!   timeout: a `poll_ready` is not. The load shed turns a full buffer into an error.
//! - There is no circuit breaker, because tower has none.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use reqwest::StatusCode;
use tower::retry::backoff::{Backoff as _, ExponentialBackoff, ExponentialBackoffMaker, MakeBackoff as _};
use tower::retry::budget::{Budget as _, TpsBudget};
use tower::util::BoxCloneSyncService;
use tower::util::rng::Rng;
use tower::{BoxError, ServiceBuilder, ServiceExt as _, load_shed, retry};

use crate::contenders::{
    ATTEMPT, Answer, Ask, BACKOFF, BACKOFF_MAX, BUDGET, BUDGET_FLOOR, Contender, DEADLINE, Ending, PER_SECOND, PERMITS,
    QUEUE, RETRIES, Wire,
};

/// The stack, cloned for each call.
#[derive(Debug)]
pub struct Tower(BoxCloneSyncService<Ask, Answer, BoxError>);

impl Tower {
    pub fn new(wire: Wire) -> anyhow::Result<Self> {
        let fetch = tower::service_fn(move |ask: Ask| {
            let wire = wire.clone();
            async move { wire.fetch(&ask, ATTEMPT).await }
        });
        let stack = ServiceBuilder::new()
            .timeout(DEADLINE)
            .retry(Judge::new()?)
            .load_shed()
            .buffer(QUEUE as usize)
            .rate_limit(u64::from(PER_SECOND) / 10, Duration::from_millis(100))
            .concurrency_limit(PERMITS as usize)
            .timeout(ATTEMPT)
            .service(fetch);
        Ok(Self(BoxCloneSyncService::new(stack)))
    }
}

impl Contender for Tower {
    fn name(&self) -> &'static str {
        "tower"
    }

    fn call(&self, ask: Ask) -> BoxFuture<'_, Ending> {
        let stack = self.0.clone();
        Box::pin(async move {
            match stack.oneshot(ask).await {
                Ok(answer) => Ending::from(answer),
                Err(error) if error.is::<load_shed::error::Overloaded>() => Ending::Refused,
                Err(_) => Ending::Bad,
            }
        })
    }
}

/// What is worth another try, and when. Cloned for each call; the budget is shared.
#[derive(Clone, Debug)]
struct Judge {
    budget: Arc<TpsBudget>,
    left: u32,
    backoff: ExponentialBackoff<Dice>,
}

/// Tower's own dice are cloned with the judge, and would make all calls jitter alike.
#[derive(Clone, Copy, Debug)]
struct Dice;

impl Rng for Dice {
    fn next_u64(&mut self) -> u64 {
        rand::random()
    }
}

impl Judge {
    fn new() -> anyhow::Result<Self> {
        // Tower adds its jitter to the base: with half of the backoff as the base, the sum is between half of it and it.
        let mut pace = ExponentialBackoffMaker::new(BACKOFF / 2, BACKOFF_MAX, 1.0, Dice)?;
        Ok(Self {
            budget: Arc::new(TpsBudget::new(Duration::from_secs(10), BUDGET_FLOOR, BUDGET as f32)),
            left: RETRIES,
            backoff: pace.make_backoff(),
        })
    }
}

impl retry::Policy<Ask, Answer, BoxError> for Judge {
    type Future = BoxFuture<'static, ()>;

    fn retry(&mut self, _: &mut Ask, result: &mut Result<Answer, BoxError>) -> Option<Self::Future> {
        let after = match result {
            Ok(Answer { right: true, .. }) => {
                self.budget.deposit();
                return None;
            }
            Ok(Answer {
                status: StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE, retry_after, ..
            }) => *retry_after,
            Ok(Answer { status, .. }) if status.is_server_error() => None,
            Ok(_) => return None,
            // Shed by our own buffer: trying again would only push.
            Err(error) if error.is::<load_shed::error::Overloaded>() => return None,
            Err(_) => None,
        };
        if self.left == 0 || !self.budget.withdraw() {
            return None;
        }
        self.left -= 1;
        let wait = self.backoff.next_backoff();
        Some(Box::pin(async move {
            tokio::join!(wait, tokio::time::sleep(after.unwrap_or_default()));
        }))
    }

    fn clone_request(&mut self, ask: &Ask) -> Option<Ask> {
        Some(ask.clone())
    }
}
