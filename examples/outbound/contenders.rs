//! The ways to make the same call, all with the same client, the same deadline, and the same numbers where they have
//! the same parts.
//!
//! | name | what it is |
//! | --- | --- |
//! | `bare` | one attempt, with the deadline as the client's timeout |
//! | `naive` | a timeout for each attempt, and three retries at once, without thought |
//! | `tower` | [`tower_stack`](crate::tower_stack): what tower has for this, put together with care |
//! | `resile` | [`resile_policy`](crate::resile_policy): a policy in the canonical order, which uses its whole deadline |
//! | `fail fast` | the same, but what a gate refuses is refused for good |

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use anyhow::Context as _;
use futures::future::BoxFuture;
use reqwest::StatusCode;
use reqwest::header::RETRY_AFTER;
use resile::OnRefusal;

use crate::resile_policy::Resile;
use crate::server;
use crate::tower_stack::Tower;

/// What the callers give each call, from the moment it was due.
pub const DEADLINE: Duration = Duration::from_millis(1_500);
/// What an attempt is given by those who know attempts.
pub const ATTEMPT: Duration = Duration::from_millis(400);
pub const RETRIES: u32 = 3;
/// The first backoff is between half of this and this; each further one is twice as long.
pub const BACKOFF: Duration = Duration::from_millis(70);
pub const BACKOFF_MAX: Duration = Duration::from_millis(800);
/// Retries per call, in the long run, for those who budget them; and the retries a second that are always there.
pub const BUDGET: f64 = 0.2;
pub const BUDGET_FLOOR: u32 = 10;
/// Attempts on the way at once, and calls waiting for their turn, for those who limit them.
pub const PERMITS: u32 = 64;
pub const QUEUE: u32 = 128;
/// Attempts a second, for those who limit them: the steady rate and half of it again for retries.
pub const PER_SECOND: u32 = 450;

/// How a call ended, as its caller sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// A complete answer with the right content.
    Good,
    /// Anything else that came of trying.
    Bad,
    /// The client's own rules said no, without asking the server (again).
    Refused,
}

/// What a contender still holds when all its calls have ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    pub permits: u32,
    pub waiting: u32,
}

/// One way to call a server.
pub trait Contender: Send + Sync {
    fn name(&self) -> &'static str;

    fn call(&self, ask: Ask) -> BoxFuture<'_, Ending>;

    /// What is in use now, from those who can tell.
    fn held(&self) -> Option<Held> {
        None
    }
}

/// The names, in the order of [`contender`].
pub const NAMES: [&str; 5] = ["bare", "naive", "tower", "resile", "fail fast"];

/// A contender with a client and a state of its own.
pub fn contender(name: &'static str, target: &Target) -> anyhow::Result<Arc<dyn Contender>> {
    Ok(match name {
        "bare" => Arc::new(Bare(Wire::new(target, Some(DEADLINE))?)),
        "naive" => Arc::new(Naive(Wire::new(target, Some(ATTEMPT))?)),
        "tower" => Arc::new(Tower::new(Wire::new(target, None)?)?),
        "resile" => Arc::new(Resile::new(name, Wire::new(target, None)?, OnRefusal::Retry)?),
        "fail fast" => Arc::new(Resile::new(name, Wire::new(target, None)?, OnRefusal::Stop)?),
        other => anyhow::bail!("there is no contender called {other:?}"),
    })
}

/// Where the calls go.
#[derive(Clone, Debug)]
pub enum Target {
    /// Our own server: the item's number goes into the path, and the body must be that of the item.
    Own(String),
    /// Somebody's URL, called as it is: any complete answer with a 2xx will do.
    Remote(String),
}

/// One call, as often as it may be tried.
#[derive(Clone, Debug)]
pub struct Ask {
    pub item: u64,
    attempts: Arc<AtomicU32>,
}

impl Ask {
    pub fn new(item: u64) -> Self {
        Self { item, attempts: Arc::new(AtomicU32::new(0)) }
    }

    /// How often the call has been put on the wire.
    pub fn attempts(&self) -> u32 {
        self.attempts.load(Relaxed)
    }
}

/// A complete answer.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub retry_after: Option<Duration>,
    pub right: bool,
}

/// The HTTP client of one contender, and what it calls.
#[derive(Clone, Debug)]
pub struct Wire {
    client: reqwest::Client,
    target: Target,
}

impl Wire {
    fn new(target: &Target, timeout: Option<Duration>) -> anyhow::Result<Self> {
        let mut client = reqwest::Client::builder().no_proxy();
        if let Some(timeout) = timeout {
            client = client.timeout(timeout);
        }
        Ok(Self { client: client.build().context("cannot build the HTTP client")?, target: target.clone() })
    }

    /// One attempt: the request, the head and the whole body. The server is told how long it will be waited for.
    pub async fn fetch(&self, ask: &Ask, left: Duration) -> reqwest::Result<Answer> {
        ask.attempts.fetch_add(1, Relaxed);
        let request = match &self.target {
            Target::Own(base) => self.client.get(format!("{base}/item/{}", ask.item)),
            Target::Remote(url) => self.client.get(url),
        };
        let response = request.header("x-time-left-ms", left.as_millis().to_string()).send().await?;
        let status = response.status();
        let retry_after = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        let body = response.bytes().await?;
        let right = status.is_success() && (matches!(self.target, Target::Remote(_)) || body == server::body(ask.item));
        Ok(Answer { status, retry_after: retry_after.map(Duration::from_secs), right })
    }
}

impl From<Answer> for Ending {
    fn from(answer: Answer) -> Self {
        if answer.right { Self::Good } else { Self::Bad }
    }
}

#[derive(Debug)]
struct Bare(Wire);

impl Contender for Bare {
    fn name(&self) -> &'static str {
        "bare"
    }

    fn call(&self, ask: Ask) -> BoxFuture<'_, Ending> {
        Box::pin(async move { self.0.fetch(&ask, DEADLINE).await.map_or(Ending::Bad, Ending::from) })
    }
}

#[derive(Debug)]
struct Naive(Wire);

impl Contender for Naive {
    fn name(&self) -> &'static str {
        "naive"
    }

    fn call(&self, ask: Ask) -> BoxFuture<'_, Ending> {
        Box::pin(async move {
            for _ in 0..=RETRIES {
                if self.0.fetch(&ask, ATTEMPT).await.is_ok_and(|answer| answer.right) {
                    return Ending::Good;
                }
            }
            Ending::Bad
        })
    }
}
