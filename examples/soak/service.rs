//! What is soaked: one of each gate and more, four policies over them, and the drain around all.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng as _, RngExt as _};
use resile::{
    Blocking, CircuitBreaker, Compute, ConfigError, Drain, LeakyBucket, OnRefusal, Policy, Quota, Rate, Retry,
    RetryBudget, Semaphore, SlidingWindow, TokenBucket,
};

use crate::tally::{Early, Tally};
use crate::tenants::Tenants;
use crate::turnstile::Turnstile;

/// How many tasks call at a time.
pub const TASKS: u64 = 2_000;
/// How many permits a semaphore has, drawn anew each second.
const PERMITS: RangeInclusive<u32> = 16..=96;
/// The same for the one that the tenants share, who have to stand in line for it.
const FEW_PERMITS: RangeInclusive<u32> = 3..=16;
/// How many calls a second a limiter lets through, drawn anew each second.
const RATES: RangeInclusive<u64> = 1_000..=5_000;
pub const QUEUE: u32 = 256;
const THREADS: u32 = 2;
/// How many retries the tight budget allows whatever the traffic, and so how many when there is none.
const FLOOR: u32 = 3;

const fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// A semaphore and the highest limit that it has ever had.
pub struct Permits {
    pub semaphore: Semaphore,
    highest: AtomicU32,
    range: RangeInclusive<u32>,
}

impl Permits {
    fn new(name: &'static str, range: RangeInclusive<u32>) -> Result<Self, ConfigError> {
        let semaphore = Semaphore::permits(*range.start()).max_queue(QUEUE).named(name).build()?;
        Ok(Self { semaphore, highest: AtomicU32::new(*range.start()), range })
    }

    fn resize(&self, dice: &mut SmallRng) -> Result<(), ConfigError> {
        let permits = dice.random_range(self.range.clone());
        self.highest.fetch_max(permits, Relaxed);
        self.semaphore.resize(permits)
    }
}

pub struct Service {
    pub drain: Drain,
    pub permits: [Permits; 4],
    pub breakers: [CircuitBreaker; 2],
    pub buckets: [TokenBucket; 3],
    pub leaky: LeakyBucket,
    pub window: SlidingWindow,
    pub quota: Quota,
    /// Each stands directly inside of the semaphore of the same place, the last with the tenants' line before that.
    pub turnstiles: [Arc<Turnstile>; 4],
    pub tenants: Tenants,
    /// Counts retries in flight, so that one that is lost is seen.
    tight: RetryBudget,
    /// Counts calls in flight: two retries for each, so that no retry hides its call.
    loose: RetryBudget,
    pub blocking: Blocking,
    pub compute: Compute,
    pub policies: [Policy; 4],
    /// How many operations are at work, wherever that is.
    pub operating: Arc<AtomicI64>,
    pub stopped: AtomicBool,
    pub tally: Tally,
    pub early: Arc<Early>,
}

impl Service {
    pub fn new(seed: u64) -> Result<Self, ConfigError> {
        let drain = Drain::builder().cancel_wait(Duration::from_secs(2)).build()?;
        let permits = [
            Permits::new("permits 0", PERMITS)?,
            Permits::new("permits 1", PERMITS)?,
            Permits::new("permits 2", PERMITS)?,
            Permits::new("permits 3", FEW_PERMITS)?,
        ];
        let breaker =
            || CircuitBreaker::builder().failure_rate(0.4).over(millis(1_000)).open_for(millis(100)).seed(seed);
        let breakers = [breaker().named("breaker 0").build()?, breaker().slow_calls(millis(19), 0.5).build()?];
        let bucket = || TokenBucket::per_second(*RATES.end()).burst(50).max_queue(QUEUE);
        let buckets = [
            bucket().named("bucket 0").build()?,
            bucket().named("bucket 1").build()?,
            bucket().named("bucket 2").build()?,
        ];
        let leaky = LeakyBucket::per_second(*RATES.end()).max_queue(QUEUE).build()?;
        let window = SlidingWindow::per_second(*RATES.end()).max_queue(QUEUE).build()?;
        let quota = Quota::per_second(*RATES.end()).max_queue(QUEUE).build()?;
        let turnstiles = ["turnstile 0", "turnstile 1", "turnstile 2", "turnstile 3"];
        let turnstiles = turnstiles.map(|name| Arc::new(Turnstile::new(name)));
        let tenants = Tenants::new(&permits[3].semaphore)?;
        let tight = RetryBudget::share(0.2).floor(FLOOR).build()?;
        let loose = RetryBudget::share(2.0).floor(0).build()?;
        let early = Arc::new(Early::default());
        let tell = || {
            let early = early.clone();
            move |end: &resile::EarlyEnd<'_>| early.count(end.why())
        };
        // The canonical order.
        let usual = Policy::named("usual")
            .gate(drain.part("usual"))
            .timeout(millis(500))
            .retry(Retry::exponential(millis(2)).max_attempts(3).budget(tight.clone()))
            .gate(breakers[0].clone())
            .gate(buckets[0].clone())
            .gate(permits[0].semaphore.clone())
            .gate(turnstiles[0].clone())
            .timeout(millis(40))
            .on_early_end(tell())
            .build()?;
        // Everything that counts per time, and a retry that comes back after a refusal.
        let limited = Policy::named("limited")
            .gate(drain.clone())
            .timeout(millis(300))
            .retry(Retry::immediate().on_refusal(OnRefusal::Retry).budget(RetryBudget::ratio(0.1).build()?))
            .gate(leaky.clone())
            .gate(window.clone())
            .gate(quota.clone())
            .gate(permits[1].semaphore.clone())
            .gate(turnstiles[1].clone())
            .timeout(millis(40))
            .on_early_end(tell())
            .build()?;
        // A retry inside of what is held.
        let inside = Policy::named("inside")
            .gate(drain.part("inside"))
            .gate(permits[2].semaphore.clone())
            .gate(turnstiles[2].clone())
            .timeout(millis(200))
            .retry(Retry::constant(millis(3)).max_attempts(3).budget(loose.clone()))
            .gate(breakers[1].clone())
            .gate(buckets[1].clone())
            .timeout(millis(25))
            .on_early_end(tell())
            .build()?;
        let per_tenant = tenants.policy(&drain, &buckets[2], &turnstiles[3])?;
        Ok(Self {
            drain,
            permits,
            breakers,
            buckets,
            leaky,
            window,
            quota,
            turnstiles,
            tenants,
            tight,
            loose,
            blocking: Blocking::builder().threads(THREADS).max_queue(QUEUE).build()?,
            compute: Compute::builder().threads(THREADS).max_queue(QUEUE).build()?,
            policies: [usual, limited, inside, per_tenant],
            operating: Arc::default(),
            stopped: AtomicBool::new(false),
            tally: Tally::default(),
            early,
        })
    }

    /// Gives every limit a new value, and pushes the breakers about.
    pub fn change_limits(&self, dice: &mut SmallRng) -> Result<(), ConfigError> {
        for permits in &self.permits {
            permits.resize(dice)?;
        }
        for bucket in &self.buckets {
            bucket.set_rate(Rate::per_second(dice.random_range(RATES)))?;
        }
        self.leaky.set_rate(Rate::per_second(dice.random_range(RATES)))?;
        self.window.set_rate(Rate::per_second(dice.random_range(RATES)))?;
        self.quota.set_limit(dice.random_range(RATES))?;
        self.tenants.change_limits(dice)?;
        for breaker in &self.breakers {
            match dice.next_u32() % 6 {
                0 => breaker.force_open(),
                1 => breaker.force_closed(),
                _ => breaker.reset(),
            }
        }
        Ok(())
    }

    /// Undoes what would keep calls out.
    pub fn open_up(&self) {
        self.breakers.iter().for_each(CircuitBreaker::reset);
    }

    /// What must hold at any moment.
    pub fn inspect(&self) -> Result<(), String> {
        for (Permits { semaphore, highest, .. }, turnstile) in self.permits.iter().zip(&self.turnstiles) {
            // The limit of before it was lowered still holds for those inside, and what is inside is read first: the
            // limit may be raised between the two.
            let (in_use, queued) = (semaphore.in_use(), semaphore.queued());
            let highest = highest.load(Relaxed);
            at_most(&format!("{semaphore}, in use"), in_use, highest)?;
            at_most(&format!("{semaphore}, queued"), queued, semaphore.max_queue())?;
            turnstile.inspect(highest as usize)?;
        }
        for bucket in &self.buckets {
            at_most(&format!("{bucket}, queued"), bucket.queued(), QUEUE)?;
            at_most(&format!("{bucket}, tokens"), bucket.peek(), bucket.burst())?;
        }
        self.tenants.inspect()?;
        at_most("leaky bucket, queued", self.leaky.queued(), QUEUE)?;
        at_most("window, queued", self.window.queued(), QUEUE)?;
        at_most("quota, queued", self.quota.queued(), QUEUE)?;
        at_most("blocking, running", self.blocking.running(), THREADS)?;
        at_most("blocking, queued", self.blocking.queued(), QUEUE)?;
        at_most("blocking, abandoned", self.blocking.abandoned(), THREADS)?;
        at_most("compute, running", self.compute.running(), THREADS)?;
        at_most("compute, queued", self.compute.queued(), QUEUE)?;
        // A number that has gone below zero is a huge one. Eight children of a scope are the most that a task calls by.
        let many = TASKS * 16;
        at_most("drain, in flight", self.drain.in_flight(), many)?;
        at_most("tight budget", self.tight.available(), many)?;
        at_most("loose budget", self.loose.available(), many)?;
        for policy in &self.policies {
            at_most(&format!("tasks of {}", policy.name()), policy.tasks().running() as u64, many)?;
        }
        let operating = self.operating.load(Relaxed);
        if operating < 0 { Err(format!("{operating} operations are at work")) } else { Ok(()) }
    }

    /// Whatever is held, by name: nothing if nobody calls.
    pub fn held(&self) -> Vec<String> {
        let mut held = Vec::new();
        let mut count = |what: String, number: u64| {
            if number != 0 {
                held.push(format!("{what}: {number}"));
            }
        };
        count("drain, in flight".into(), self.drain.in_flight());
        count("drain, names".into(), self.drain.held().len() as u64);
        for Permits { semaphore, .. } in &self.permits {
            count(format!("{semaphore}, in use"), semaphore.in_use().into());
            count(format!("{semaphore}, queued"), semaphore.queued().into());
        }
        for (place, turnstile) in self.turnstiles.iter().enumerate() {
            let (inside, waiting) = turnstile.held();
            count(format!("turnstile {place}, inside"), inside as u64);
            count(format!("turnstile {place}, waiting"), waiting as u64);
        }
        for bucket in &self.buckets {
            count(format!("{bucket}, queued"), bucket.queued().into());
        }
        for (what, number) in self.tenants.held() {
            count(what.into(), number.into());
        }
        count("leaky bucket, queued".into(), self.leaky.queued().into());
        count("window, queued".into(), self.window.queued().into());
        count("quota, queued".into(), self.quota.queued().into());
        count("tight budget, retries in flight".into(), u64::from(FLOOR).abs_diff(self.tight.available()));
        count("loose budget, calls in flight".into(), self.loose.available());
        count("blocking, running".into(), self.blocking.running().into());
        count("blocking, queued".into(), self.blocking.queued().into());
        count("blocking, abandoned".into(), self.blocking.abandoned().into());
        count("compute, running".into(), self.compute.running().into());
        count("compute, queued".into(), self.compute.queued().into());
        count("compute, abandoned".into(), self.compute.abandoned().into());
        for policy in &self.policies {
            count(format!("tasks of {}", policy.name()), policy.tasks().running() as u64);
        }
        count("operations".into(), self.operating.load(Relaxed).unsigned_abs());
        held
    }
}

pub fn at_most<N: PartialOrd + std::fmt::Display + Copy>(what: &str, number: N, most: N) -> Result<(), String> {
    if number > most { Err(format!("{what}: {number}, the most is {most}")) } else { Ok(()) }
}
