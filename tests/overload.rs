//! Goodput under overload: a healthy peer, more calls than it can serve, and nothing tuned. Whatever the shape of the
//! policy, almost all that the peer can do goes into answers that somebody still waits for, and no breaker opens.
//!
//! Everything happens on a paused clock with seeded randomness, so each cell gives the same numbers in every run.

mod support;

use std::cell::Cell;
use std::fmt;
use std::future::pending;
use std::rc::Rc;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use resile::{CircuitBreaker, Policy, PolicyBuilder, Retry, RetryBudget, Semaphore, State, TokenBucket};
use support::ms;
use tokio::runtime::Builder;
use tokio::task::LocalSet;
use tokio::time::{Instant, sleep, sleep_until};

const PERMITS: u32 = 4;
const CALL_LIMIT: Duration = ms(1000);
const ATTEMPT_LIMIT: Duration = ms(300);
/// Long enough for several hundred answers, and for queues to fill.
const RUN: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Shape {
    Plain,
    Breaker,
    Readme,
    Bucket,
    /// The call's limit alone: no limit for an attempt.
    OuterOnly,
}

/// How long the peer takes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Takes {
    Constant(u64),
    /// Anything up to 60 % less or more.
    Uniform(u64),
    /// One in twenty takes nine times as long, which is more than the limit of an attempt.
    Tail(u64),
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Arrivals {
    Even,
    Poisson,
}

#[derive(Clone, Copy, Debug)]
struct Situation {
    shape: Shape,
    takes: Takes,
    load: f64,
    queue: u32,
    arrivals: Arrivals,
}

impl Takes {
    fn draw(self, rng: &mut SmallRng) -> Duration {
        match self {
            Self::Constant(time) => ms(time),
            Self::Uniform(mean) => ms(rng.random_range(mean * 2 / 5..=mean * 8 / 5)),
            Self::Tail(time) => ms(if rng.random_range(0..20) == 0 { 9 * time } else { time }),
        }
    }

    /// Answers per second that the peer can give through this many permits, if none of its time is wasted.
    fn capacity(self, limit: Duration) -> f64 {
        let (answers, time) = self.mean(limit);
        f64::from(PERMITS) * answers / time * 1000.0
    }

    /// Operations per second, some of which are cut.
    fn operations(self, limit: Duration) -> f64 {
        let (_, time) = self.mean(limit);
        f64::from(PERMITS) / time * 1000.0
    }

    /// The share of operations that answer within a limit, and the mean of what they take, in milliseconds.
    fn mean(self, limit: Duration) -> (f64, f64) {
        match self {
            Self::Constant(time) | Self::Uniform(time) => (1.0, time as f64),
            Self::Tail(time) => {
                let (slow, limit) = (9.0 * time as f64, limit.as_millis() as f64);
                // A cut operation costs the limit and gives no answer.
                let answers = if slow > limit { 0.95 } else { 1.0 };
                (answers, 0.95 * time as f64 + 0.05 * slow.min(limit))
            }
        }
    }
}

/// What came of the calls.
#[derive(Clone, Debug, Default)]
struct Tally(Rc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    calls: Cell<u32>,
    made: Cell<u32>,
    answers: Cell<u32>,
    opened: Cell<u32>,
}

fn add(cell: &Cell<u32>) {
    cell.set(cell.get() + 1);
}

struct World {
    policy: Policy,
    breaker: Option<CircuitBreaker>,
}

fn breaker() -> CircuitBreaker {
    CircuitBreaker::builder().build().unwrap()
}

fn world(cell: &Situation, limit: Duration) -> World {
    with_rule(cell, limit, true)
}

/// With or without the rule that is tested here.
fn with_rule(cell: &Situation, limit: Duration, rule: bool) -> World {
    let guard = (cell.shape != Shape::Plain).then(breaker);
    let with = |policy: PolicyBuilder| match &guard {
        Some(breaker) => policy.gate(breaker.clone()),
        None => policy,
    };
    let mut policy = Policy::named("outbound").timeout(CALL_LIMIT);
    if !rule {
        policy = policy.min_attempt(Duration::ZERO);
    }
    if matches!(cell.shape, Shape::Readme | Shape::Bucket) {
        let budget = RetryBudget::ratio(0.2).build().unwrap();
        policy = policy.retry(Retry::exponential(ms(50)).seed(7).budget(budget));
    }
    policy = with(policy);
    if cell.shape == Shape::Bucket {
        let rate = cell.takes.operations(limit).ceil() as u64;
        policy = policy.gate(TokenBucket::per_second(rate).burst(PERMITS).max_queue(cell.queue));
    }
    policy = policy.gate(Semaphore::permits(PERMITS).max_queue(cell.queue));
    if cell.shape != Shape::OuterOnly {
        policy = policy.timeout(limit);
    }
    World { policy: policy.build().unwrap(), breaker: guard }
}

/// Runs a future that spawns on its thread, on a clock of its own.
fn on_a_paused_clock<R>(future: impl Future<Output = R>) -> R {
    let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    LocalSet::new().block_on(&runtime, future)
}

/// Sends calls for a while, and waits for the last of them.
async fn drive(cell: &Situation, world: &World, attempt_limit: Duration, seed: u64) -> Tally {
    let tally = Tally::default();
    let mut rng = SmallRng::seed_from_u64(seed);
    let gap = 1.0 / (cell.load * cell.takes.capacity(attempt_limit));
    let start = Instant::now();
    let mut at = 0.0;
    let mut calls = Vec::new();
    while at < RUN.as_secs_f64() {
        sleep_until(start + Duration::from_secs_f64(at)).await;
        let (policy, counts) = (world.policy.clone(), tally.clone());
        let times: [Duration; 3] = std::array::from_fn(|_| cell.takes.draw(&mut rng));
        calls.push(tokio::task::spawn_local(async move {
            let Tally(counts) = counts;
            add(&counts.calls);
            let end = policy
                .run_with(|attempt| {
                    add(&counts.made);
                    let time = times[attempt.attempt() as usize - 1];
                    async move {
                        sleep(time).await;
                        Ok::<_, ()>(())
                    }
                })
                .await;
            if end.is_ok() {
                add(&counts.answers);
            }
        }));
        if world.breaker.as_ref().is_some_and(|breaker| breaker.state() != State::Closed) {
            add(&tally.0.opened);
        }
        at += match cell.arrivals {
            Arrivals::Even => gap,
            Arrivals::Poisson => -gap * (1.0 - rng.random::<f64>()).ln(),
        };
    }
    for call in calls {
        call.await.unwrap();
    }
    tally
}

struct Measured {
    cell: Situation,
    /// Answers as a share of what the peer could give, or of the calls where those were fewer.
    goodput: f64,
    made_per_answer: f64,
    opened: u32,
    /// The share of the calls that are answered without the rule and not with it.
    lost: f64,
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cell: Situation { shape, takes, load, queue, arrivals }, .. } = self;
        write!(f, "{shape:?} {takes:?} load {load} queue {queue} {arrivals:?}: ")?;
        let (goodput, lost) = (100.0 * self.goodput, 100.0 * self.lost);
        write!(f, "{goodput:.1} %, {:.2} made per answer, opened {}, ", self.made_per_answer, self.opened)?;
        write!(f, "{lost:.2} % lost")
    }
}

fn measure(cell: Situation) -> Measured {
    let limit = ATTEMPT_LIMIT;
    let cut_at = if cell.shape == Shape::OuterOnly { CALL_LIMIT } else { limit };
    let run = |rule| on_a_paused_clock(async { drive(&cell, &with_rule(&cell, cut_at, rule), cut_at, 11).await }).0;
    let counts = run(true);
    let without = if cell.load < 1.0 { run(false).answers.get() } else { 0 };
    let could = (cell.takes.capacity(cut_at) * RUN.as_secs_f64()).min(f64::from(counts.calls.get()));
    Measured {
        cell,
        goodput: f64::from(counts.answers.get()) / could,
        made_per_answer: f64::from(counts.made.get()) / f64::from(counts.answers.get()),
        opened: counts.opened.get(),
        lost: f64::from(without.saturating_sub(counts.answers.get())) / f64::from(counts.calls.get()),
    }
}

/// All cells of a shape. What the rule costs below capacity is counted over all of them: it is there for the tail, where
/// two attempts of a call were cut and little is left for the third.
fn assert_goodput(shape: Shape) {
    let (mut faults, mut lost, mut calm) = (Vec::new(), 0.0, 0.0);
    for takes in [Takes::Constant(100), Takes::Uniform(100), Takes::Tail(60)] {
        for load in [0.8, 1.5, 2.0, 5.0] {
            for queue in [16, 128, 1000] {
                for (arrivals, least) in [(Arrivals::Even, 0.95), (Arrivals::Poisson, 0.93)] {
                    let measured = measure(Situation { shape, takes, load, queue, arrivals });
                    println!("{measured}");
                    // Below capacity everything is answered, but for the tail that the limit of an attempt cuts.
                    let is_cut = load < 1.0 && matches!(takes, Takes::Tail(_)) && shape != Shape::OuterOnly;
                    let least = if is_cut { least - 0.05 } else { least };
                    if measured.goodput < least || measured.made_per_answer > 1.1 || measured.opened > 0 {
                        faults.push(measured.to_string());
                    }
                    if load < 1.0 {
                        lost += measured.lost;
                        calm += 1.0;
                    }
                }
            }
        }
    }
    println!("{shape:?}: {:.3} % lost", 100.0 * lost / calm);
    assert!(faults.is_empty(), "below the bar:\n{}", faults.join("\n"));
    // A call limit alone makes the estimate as long as the tail, which costs more.
    assert!(lost / calm <= if shape == Shape::OuterOnly { 0.005 } else { 0.001 }, "{shape:?}: {lost} of {calm}");
}

#[test]
fn a_limit_and_a_semaphore_keep_their_goodput_at_five_times_the_load() {
    assert_goodput(Shape::Plain);
}

#[test]
fn a_breaker_takes_no_local_queue_for_a_sick_peer() {
    assert_goodput(Shape::Breaker);
}

#[test]
fn the_policy_of_the_readme_keeps_its_goodput_at_five_times_the_load() {
    assert_goodput(Shape::Readme);
}

#[test]
fn a_bucket_in_front_loses_no_tokens_to_calls_that_come_too_late() {
    assert_goodput(Shape::Bucket);
}

#[test]
fn a_call_limit_alone_keeps_its_goodput() {
    assert_goodput(Shape::OuterOnly);
}

fn even(shape: Shape, takes: Takes, load: f64) -> Situation {
    Situation { shape, takes, load, queue: 128, arrivals: Arrivals::Even }
}

/// Operations that need most of the call's limit: the estimate must neither refuse all of them nor be too low. With 900
/// of 1000 ms only a call that finds a permit within 100 ms can succeed, so that at twice the load some permits lie idle
/// until one comes.
#[test]
fn operations_that_take_most_of_the_limit_are_neither_refused_nor_cut() {
    for (takes, load, least) in [(700, 0.8, 0.95), (700, 2.0, 0.95), (900, 2.0, 0.90), (900, 5.0, 0.95)] {
        let measured = measure(even(Shape::OuterOnly, Takes::Constant(takes), load));
        println!("{measured}");
        assert!(measured.goodput >= least && measured.opened == 0, "{measured}");
    }
}

/// How long it takes from the first call until the breaker opens at a peer that does what is said.
fn opens_after(shape: Shape, per_second: f64, takes: Duration) -> Duration {
    let cell = even(shape, Takes::Constant(100), per_second / 40.0);
    on_a_paused_clock(async {
        let World { policy, breaker } = world(&cell, ATTEMPT_LIMIT);
        let breaker = breaker.unwrap();
        let start = Instant::now();
        let mut count = 0_u32;
        while breaker.state() == State::Closed {
            assert!(start.elapsed() < RUN, "it never opened");
            let policy = policy.clone();
            tokio::task::spawn_local(async move {
                let _ = policy
                    .run(|| async {
                        if takes == Duration::MAX {
                            pending::<()>().await;
                        }
                        sleep(takes).await;
                        Ok::<_, ()>(())
                    })
                    .await;
            });
            count += 1;
            sleep_until(start + Duration::from_secs_f64(f64::from(count) / per_second)).await;
        }
        start.elapsed()
    })
}

#[test]
fn a_peer_that_hangs_or_is_ten_times_slower_still_opens_the_breaker() {
    for takes in [Duration::MAX, ms(1000)] {
        assert!(opens_after(Shape::Breaker, 60.0, takes) <= Duration::from_secs(2), "{takes:?}");
        assert!(opens_after(Shape::OuterOnly, 60.0, takes) <= Duration::from_secs(6), "{takes:?}");
    }
}

/// The estimate must not lock itself out, nor outlive what it was learned from.
#[test]
fn after_half_a_minute_of_slowness_the_goodput_is_back_within_three_seconds() {
    const SLOW: Duration = Duration::from_secs(30);
    for (shape, slow) in [(Shape::Plain, 280), (Shape::Plain, 900), (Shape::OuterOnly, 900), (Shape::OuterOnly, 1200)] {
        let cell = even(shape, Takes::Constant(50), 1.0);
        let (answers, calls) = on_a_paused_clock(async {
            // Without a breaker, whose own recovery is another matter.
            let World { policy, .. } = world(
                &Situation { shape: Shape::Plain, ..cell },
                if shape == Shape::Plain { ATTEMPT_LIMIT } else { CALL_LIMIT },
            );
            let start = Instant::now();
            let late = Rc::new((Cell::new(0), Cell::new(0)));
            let mut count = 0_u32;
            while start.elapsed() < SLOW + Duration::from_secs(6) {
                let (policy, late) = (policy.clone(), late.clone());
                tokio::task::spawn_local(async move {
                    let begun = start.elapsed();
                    let end = policy
                        .run(|| async {
                            sleep(if start.elapsed() < SLOW { ms(slow) } else { ms(50) }).await;
                            Ok::<_, ()>(())
                        })
                        .await;
                    if begun >= SLOW + Duration::from_secs(3) && begun < SLOW + Duration::from_secs(5) {
                        add(&late.1);
                        if end.is_ok() {
                            add(&late.0);
                        }
                    }
                });
                count += 1;
                sleep_until(start + Duration::from_secs_f64(f64::from(count) / 70.0)).await;
            }
            sleep(CALL_LIMIT * 2).await;
            (late.0.get(), late.1.get())
        });
        assert!(f64::from(answers) >= 0.9 * f64::from(calls), "{shape:?} {slow}: {answers} of {calls}");
    }
}
