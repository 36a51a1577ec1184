//! The ways in which the soak calls: each a future that ends by itself within half a second or so.

use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use rand::rngs::SmallRng;
use rand::{Rng as _, RngExt as _, SeedableRng as _};
use resile::context::{self, Context};
use resile::{Cancel, ChildEnd, Error, FutureExt, Guard, Job, Policy, Priority, Refusal, Scope, ScopeEnd, Verdict};

use crate::service::Service;
use crate::tally::End;
use crate::tenants::Tenants;

/// The message of the panics that belong to the soak.
pub const PLANNED: &str = "planned";

/// How a call is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Plain,
    Said,
    Owned,
    Shield,
    Cleanup,
    Scope,
    Map,
    Context,
    Blocking,
    Compute,
    Guard,
    OneShot,
    Job,
}

impl Way {
    pub const ALL: [Self; 13] = [
        Self::Plain,
        Self::Said,
        Self::Owned,
        Self::Shield,
        Self::Cleanup,
        Self::Scope,
        Self::Map,
        Self::Context,
        Self::Blocking,
        Self::Compute,
        Self::Guard,
        Self::OneShot,
        Self::Job,
    ];

    /// Half of the calls are plain ones, and those that need threads or many calls are few.
    pub fn draw(dice: &mut SmallRng) -> Self {
        match dice.random_range(0..100) {
            0..40 => Self::Plain,
            40..50 => Self::Said,
            50..58 => Self::Owned,
            58..66 => Self::Shield,
            66..74 => Self::Cleanup,
            74..76 => Self::Scope,
            76..77 => Self::Map,
            77..82 => Self::Context,
            82..85 => Self::Blocking,
            85..88 => Self::Compute,
            88..93 => Self::Guard,
            93..97 => Self::OneShot,
            _ => Self::Job,
        }
    }
}

#[derive(Debug)]
pub struct Failure;

/// A call to be made.
pub struct Plan {
    pub service: Arc<Service>,
    pub dice: SmallRng,
    pub panics: bool,
    /// Ends the call; the drain's is above it.
    pub cancel: Cancel,
}

impl Plan {
    fn policy(&mut self) -> Policy {
        let [usual, limited, inside, tenants] = &self.service.policies;
        match self.dice.random_range(0..5) {
            0 | 1 => usual.clone(),
            2 => limited.clone(),
            3 => inside.clone(),
            _ => tenants.clone(),
        }
    }

    /// Another operation of the same kind each time it is called.
    fn operation(&mut self) -> impl FnMut() -> BoxFuture<'static, Result<u32, Failure>> + Send + 'static + use<> {
        let (operating, panics) = (self.service.operating.clone(), self.panics);
        let mut dice = SmallRng::from_rng(&mut self.dice);
        move || operate(operating.clone(), dice.next_u64(), panics).boxed()
    }

    fn millis(&mut self, most: u64) -> Duration {
        Duration::from_micros(self.dice.random_range(0..=most * 1_000))
    }

    fn context(&self) -> Context {
        Context::new().cancel(&self.cancel)
    }
}

/// Counts who is at work.
struct Working(Arc<AtomicI64>);

impl Working {
    fn begin(operating: Arc<AtomicI64>) -> Self {
        operating.fetch_add(1, Relaxed);
        Self(operating)
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// A peer that mostly takes 0 to 20 ms, and is at times at once there, slow, gone, or wrong.
async fn operate(operating: Arc<AtomicI64>, fate: u64, panics: bool) -> Result<u32, Failure> {
    let _working = Working::begin(operating);
    let mut dice = SmallRng::seed_from_u64(fate);
    match dice.random_range(0..100) {
        0..5 => {}
        5..8 => tokio::time::sleep(Duration::from_millis(60)).await,
        8 => std::future::pending().await,
        _ => tokio::time::sleep(Duration::from_micros(dice.random_range(0..20_000))).await,
    }
    assert!(!panics, "{PLANNED}");
    if dice.random_ratio(1, 10) { Err(Failure) } else { Ok(dice.random_range(0..4)) }
}

/// Makes the call.
pub fn call(way: Way, plan: Plan) -> BoxFuture<'static, End> {
    match way {
        Way::Plain => plain(plan).boxed(),
        Way::Said => said(plan).boxed(),
        Way::Owned => owned(plan).boxed(),
        Way::Shield => shield(plan).boxed(),
        Way::Cleanup => cleanup(plan).boxed(),
        Way::Scope => scope(plan).boxed(),
        Way::Map => map(plan).boxed(),
        Way::Context => in_context(plan).boxed(),
        Way::Blocking => blocking(plan).boxed(),
        Way::Compute => compute(plan).boxed(),
        Way::Guard => guards(plan).boxed(),
        Way::OneShot => one_shot(plan).boxed(),
        Way::Job => job(plan).boxed(),
    }
}

async fn plain(mut plan: Plan) -> End {
    let (policy, operation) = (plan.policy(), plan.operation());
    End::of(&policy.call().cancel_on(&plan.cancel).run(operation).await)
}

async fn said(mut plan: Plan) -> End {
    let (policy, mut operation) = (plan.policy(), plan.operation());
    let judge = |result: &Result<u32, Failure>| match result {
        Ok(3) => Verdict::Overloaded(Some(Duration::from_millis(2))),
        Ok(_) => Verdict::Success,
        Err(Failure) => Verdict::Transient(None),
    };
    let cost = plan.dice.random_range(1..=3);
    let mut call = policy.call().cost(cost).priority(Priority::High);
    call = call.deadline(plan.millis(100)).cancel_on(&plan.cancel);
    if plan.dice.random_ratio(1, 4) {
        call = call.no_wait();
    }
    let settle = |result: &Result<u32, Failure>| *result.as_ref().unwrap_or(&0);
    End::of(&call.classify(judge).settle(settle).run_with(move |_| operation()).await)
}

/// In a task that goes on if nobody waits for it.
async fn owned(mut plan: Plan) -> End {
    let (policy, operation) = (plan.policy(), plan.operation());
    let run = policy.call().owned().cancel_on(&plan.cancel).run(operation);
    match tokio::spawn(run).await {
        Ok(result) => End::of(&result),
        Err(end) => resume_unwind(end.into_panic()),
    }
}

fn shield(mut plan: Plan) -> impl Future<Output = End> + Send + 'static {
    let (policy, operation, patience) = (plan.policy(), plan.operation(), plan.millis(60));
    let run = policy.call().cancel_on(&plan.cancel).deadline(patience).shield().run(operation);
    run.map(|result| End::of(&result))
}

/// Some of the cleanups take too long, and some panic.
async fn cleanup(mut plan: Plan) -> End {
    let (policy, mut operation, operating) = (plan.policy(), plan.operation(), plan.service.operating.clone());
    let clean = move |fate: u64, _| {
        let working = Working::begin(operating.clone());
        async move {
            let _working = working;
            tokio::time::sleep(Duration::from_millis(fate % 25)).await;
            assert!(fate % 100 != 0, "{PLANNED}");
        }
    };
    let call = policy.call().cancel_on(&plan.cancel).deadline(plan.millis(60));
    let call = call.cleanup(clean).within(Duration::from_millis(20));
    End::of(&call.run(|| (plan.dice.next_u64(), operation())).await)
}

async fn scope(mut plan: Plan) -> End {
    let children = plan.dice.random_range(1..=4);
    let calls: Vec<_> = (0..children).map(|_| plan.policy().into_run(plan.operation())).collect();
    let limit = plan.millis(100);
    let keep_going = plan.dice.random();
    let run = async {
        let mut scope = Scope::new().deadline(limit);
        if keep_going {
            scope = scope.keep_going().grace(Duration::from_millis(5));
        }
        for call in calls {
            scope.spawn(call);
        }
        of_scope(&scope.wait().await)
    };
    context::scope(plan.context(), run).await
}

async fn map(mut plan: Plan) -> End {
    let (context, policy, limit) = (plan.context(), plan.policy(), plan.millis(100));
    let run = async {
        let scope = Scope::new().deadline(limit);
        match scope.map(0..8, 3, |_| policy.clone().into_run(plan.operation())) {
            Ok(mapped) => of_scope(&mapped.wait().await),
            Err(_) => unreachable!("three at once is a fine limit"),
        }
    };
    context::scope(context, run).await
}

fn of_scope(end: &ScopeEnd<u32, Error<Failure>>) -> End {
    let ends = end.children().iter().map(|child| match child {
        ChildEnd::Done(_) => End::Done,
        ChildEnd::Failed(error) => End::of_kind(error.kind()),
        ChildEnd::Panicked(_) => End::Panicked,
        _ => End::Cancelled,
    });
    // The panic is what tells most, then whatever went wrong first.
    let ends: Vec<End> = ends.collect();
    if ends.contains(&End::Panicked) {
        return End::Panicked;
    }
    ends.into_iter().find(|end| *end != End::Done).unwrap_or(End::Done)
}

/// A request with a deadline that makes two calls after one another, and one beside them.
async fn in_context(mut plan: Plan) -> End {
    let outer =
        plan.context().deadline(plan.millis(100)).priority(Priority::Low).key("tenant", Tenants::draw(&mut plan.dice));
    let inner = Context::new().deadline(plan.millis(100));
    let [one, two, three] = [(); 3].map(|()| plan.policy().into_run(plan.operation()));
    let serve = async move {
        let beside = context::spawn(three);
        let first = End::of(&one.await);
        let second = End::of(&context::scope(inner, two).await);
        match beside.await {
            Ok(_) if first == End::Done => second,
            Ok(_) => first,
            Err(end) => resume_unwind(end.into_panic()),
        }
    };
    context::scope(outer, serve).await
}

/// Half of the jobs look at their flag.
fn block(job: &Job, fate: u64, panics: bool) -> Result<u32, Failure> {
    for _ in 0..fate % 20 {
        if fate % 2 == 0 && job.is_cancelled() {
            return Err(Failure);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(!panics, "{PLANNED}");
    Ok(1)
}

async fn blocking(mut plan: Plan) -> End {
    let (service, fate, panics) = (plan.service.clone(), plan.dice.next_u64(), plan.panics);
    let run = service.blocking.try_run(move |job| block(&job, fate, panics));
    let run = run.within(Duration::from_millis(100)).through(&service.drain).cancelled_by(&plan.cancel);
    End::of(&run.await.map_err(Error::flatten))
}

async fn compute(mut plan: Plan) -> End {
    let (service, fate, panics) = (plan.service.clone(), plan.dice.next_u64(), plan.panics);
    let run = service.compute.try_run(move |job| {
        let mut dice = SmallRng::seed_from_u64(fate);
        let sum = (0..fate % 20_000).fold(0, |sum: u32, _| sum.wrapping_add(dice.next_u32()));
        assert!(!panics, "{PLANNED}");
        if job.is_cancelled() { Err(Failure) } else { Ok(sum) }
    });
    let run = run.deadline(plan.millis(50)).through(&service.drain).cancelled_by(&plan.cancel);
    End::of(&run.await.map_err(Error::flatten))
}

/// Every gate by hand, in the canonical order, ended in each of the ways in which a guard can end.
async fn guards(mut plan: Plan) -> End {
    let (service, mut operation) = (plan.service.clone(), plan.operation());
    let place = plan.dice.random_range(0..2);
    let tenant = Tenants::draw(&mut plan.dice);
    let (cost, verdict) = (plan.dice.random_range(1..=3), plan.dice.random_range(0..4));
    let held = async {
        let _place = service.drain.try_acquire()?;
        let _named = service.drain.track("guards")?;
        let peer = service.breakers[place].try_acquire()?;
        let _tokens = service.buckets[place].acquire_many(cost).await?;
        let _permits = service.permits[place].semaphore.acquire_many(cost).await?;
        let _token = service.tenants.buckets.of(&tenant).acquire().await?;
        let _permit = service.tenants.permits.of(&tenant).acquire().await?;
        let _number = Guard::acquire(service.turnstiles[place].clone()).await?;
        let result = operation().await;
        match verdict {
            0 => peer.ignore(),
            1 => drop(peer),
            _ if result.is_ok() => peer.success(),
            _ => peer.failure(),
        }
        Ok::<_, Refusal>(if result.is_ok() { End::Done } else { End::Failed })
    };
    match held.within(Duration::from_millis(100)).cancelled_by(&plan.cancel).await {
        Ok(end) => end,
        Err(error) if error.last().is_some() => End::Refused,
        Err(error) => End::of_kind(error.kind()),
    }
}

async fn one_shot(mut plan: Plan) -> End {
    let (service, mut operation) = (plan.service.clone(), plan.operation());
    let place = plan.dice.random_range(0..3);
    let limited = operation().within(Duration::from_millis(40)).through(&service.turnstiles[place]);
    let limited = limited.through(&service.permits[place].semaphore);
    let limited = match place {
        0 => limited.through(&service.leaky),
        1 => limited.through(&service.window),
        _ => limited.through(&service.quota),
    };
    let limited = limited.within(Duration::from_millis(100)).through(&service.drain).cancelled_by(&plan.cancel);
    End::of(&limited.await)
}

async fn job(mut plan: Plan) -> End {
    let operation = plan.operation()().within(Duration::from_millis(40));
    let Ok(task) = plan.service.drain.spawn("job", operation) else { return End::Refused };
    match task.await {
        Ok(Ok(result)) => End::of(&result),
        Ok(Err(_)) => End::Cancelled,
        Err(end) => resume_unwind(end.into_panic()),
    }
}
