//! Limits per tenant: in tables that are too small for all who call, and in one line for a limit that all share.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use anyhow::ensure;
use rand::rngs::SmallRng;
use rand::{Rng as _, RngExt as _};
use resile::{ConfigError, Drain, Fair, Key, Keyed, Layers, PerKey, Policy, Semaphore, TokenBucket};
use tokio::time::{Instant, sleep};

use crate::service::{QUEUE, at_most};
use crate::turnstile::Turnstile;

/// How many tenants there are that come again and again. All others call once.
const REGULAR: u64 = 16;
/// How many a table has room for: fewer than call within the time in which a bucket fills again.
const ROOM: u32 = 24;
/// What one tenant has a second and at once, drawn anew each second. All of it is there again after half a second.
const RATES: RangeInclusive<u64> = 20..=100;
const BURSTS: RangeInclusive<u32> = 3..=10;
const PERMITS: RangeInclusive<u32> = 3..=8;

pub struct Tenants {
    pub buckets: Keyed<TokenBucket>,
    pub permits: Keyed<Semaphore>,
    /// For those who find no room in the table of permits.
    shared: Semaphore,
    pub line: Fair<Semaphore>,
}

impl Tenants {
    /// The line is one for this semaphore.
    pub fn new(all: &Semaphore) -> Result<Self, ConfigError> {
        let bucket = TokenBucket::per_second(*RATES.start()).burst(*BURSTS.end()).max_queue(QUEUE);
        let permits = Semaphore::permits(*PERMITS.start()).max_queue(QUEUE);
        let shared = Semaphore::permits(*PERMITS.end()).max_queue(QUEUE).named("shared").build()?;
        Ok(Self {
            buckets: Keyed::by("tenant", bucket).capacity(ROOM).named("tenants' buckets").build()?,
            permits: Keyed::by("tenant", permits)
                .capacity(ROOM)
                .overflow(shared.clone())
                .named("tenants' permits")
                .build()?,
            shared,
            line: Fair::by("tenant", all.clone()).max_queue(QUEUE).build()?,
        })
    }

    /// All of it in one policy, with a bucket for all in one layer, and a turnstile that knows who is inside.
    pub fn policy(&self, drain: &Drain, all: &TokenBucket, inside: &Arc<Turnstile>) -> Result<Policy, ConfigError> {
        let layers = Layers::new().layer("all", all.clone()).layer("tenant", self.buckets.clone());
        Policy::named("tenants")
            .gate(drain.part("tenants"))
            .timeout(Duration::from_millis(300))
            .gate(layers)
            .gate(self.permits.clone())
            .gate(self.line.clone())
            .gate(inside.clone())
            .timeout(Duration::from_millis(40))
            .build()
    }

    /// One of those that come again, or one that nobody has heard of.
    pub fn draw(dice: &mut SmallRng) -> Key {
        match dice.random_range(0..4) {
            0 => Key::from(format!("made up {}", dice.next_u64())),
            1 => Key::from(dice.next_u64()),
            _ => Key::from(dice.random_range(0..REGULAR)),
        }
    }

    /// Gives every tenant other limits.
    pub fn change_limits(&self, dice: &mut SmallRng) -> Result<(), ConfigError> {
        let bucket = TokenBucket::per_second(dice.random_range(RATES)).burst(dice.random_range(BURSTS));
        self.buckets.plan().set(bucket.max_queue(QUEUE))?;
        self.permits.plan().set(Semaphore::permits(dice.random_range(PERMITS)).max_queue(QUEUE))?;
        self.buckets.reassign();
        Ok(())
    }

    /// What must hold at any moment.
    pub fn inspect(&self) -> Result<(), String> {
        inspect(&self.buckets)?;
        inspect(&self.permits)?;
        at_most("line, queued", self.line.queued(), QUEUE)?;
        at_most("shared permits, in use", self.shared.in_use(), self.shared.limit())?;
        at_most("shared permits, queued", self.shared.queued(), QUEUE)
    }

    /// What is held.
    pub fn held(&self) -> [(&'static str, u32); 5] {
        [
            ("tenants' buckets, pinned", self.buckets.stats().pinned),
            ("tenants' permits, pinned", self.permits.stats().pinned),
            ("shared permits, in use", self.shared.in_use()),
            ("shared permits, queued", self.shared.queued()),
            ("line, queued", self.line.queued()),
        ]
    }

    /// Finds that every entry is as good as new once nobody has called for a while.
    pub async fn rest(&self) -> anyhow::Result<()> {
        let end = Instant::now() + Duration::from_secs(2);
        loop {
            self.buckets.sweep(ROOM);
            self.permits.sweep(ROOM);
            let left = self.buckets.stats().live + self.permits.stats().live;
            if left == 0 {
                return Ok(());
            }
            ensure!(Instant::now() < end, "{left} entries of tenants are not as good as new");
            sleep(Duration::from_millis(20)).await;
        }
    }
}

fn inspect<G: PerKey>(keyed: &Keyed<G>) -> Result<(), String> {
    let (stats, name) = (keyed.stats(), resile::Gate::name(keyed));
    at_most(&format!("{name}, live"), stats.live, ROOM)?;
    at_most(&format!("{name}, pinned"), stats.pinned, stats.live)
}
