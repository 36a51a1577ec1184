//! What does sharing cost? Two threads on one stack, and a thousand tasks in a queue.
//!
//! The worst case for threads is that they do nothing but enter and leave. The figures are wall-clock times, so they are
//! only reported. With more cores, shared cache lines are dearer than two threads show.

mod support;

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use resile::{CircuitBreaker, Drain, Policy, Semaphore, TokenBucket};
use support::rounds::{Effort, Line, print_head};
use support::{laps, together};
use tokio::runtime::Runtime;
use tokio::task::{JoinSet, yield_now};

const TASKS: u64 = 1000;
const CALLS: u64 = 20;
const PERMITS: u32 = 8;

fn main() {
    let effort = Effort::from_args();
    print_head("two threads / one thread, each per operation");
    share(effort, "stack, ready", &support::stack(), Some((3.0, 1.8)));
    share(effort, "bucket", &support::only_gate(support::bucket()), None);
    share(effort, "semaphore", &support::only_gate(support::semaphore()), None);
    share(effort, "breaker", &support::only_gate(support::breaker()), None);
    share(effort, "drain", &support::only_gate(Drain::new()), None);
    refuse(effort);
    queue(effort);
    wait_for_tokens(effort);
}

/// A breaker that is open: what it is asked most in an outage.
fn refuse(effort: Effort) {
    let breaker = CircuitBreaker::builder().open_for(Duration::from_secs(3600)).max_open_for(Duration::from_secs(3600));
    let breaker = breaker.consecutive_failures(1).build().expect("a valid breaker");
    breaker.try_acquire().expect("it is closed").failure();
    let start = || {
        let breaker = breaker.clone();
        laps::repeat(move || assert!(black_box(breaker.try_acquire()).is_err()))
    };
    let Some([alone, shared]) = together::medians(effort, [(1, &start), (2, &start)]) else { return };
    println!("  breaker, open: a refusal");
    Line::new("    alone", alone, "ns").must(45.0, 30.0).print();
    Line::new("    two threads", shared, "ns").must(60.0, 40.0).print();
}

/// Two threads that share a policy, against one that has it alone.
fn share(effort: Effort, what: &str, policy: &Policy, limits: Option<(f64, f64)>) {
    let start = || laps::ready(policy.clone());
    let Some([alone, shared]) = together::medians(effort, [(1, &start), (2, &start)]) else {
        println!("  {what}: the machine is too busy to run two threads side by side");
        return;
    };
    let ratio = Line::new(what, shared / alone, "×");
    if let Some((must, aim)) = limits { ratio.must(must, aim) } else { ratio }.print();
    Line::new("    alone", alone, "ns").print();
    Line::new("    two threads", shared, "ns").print();
}

/// Nanoseconds per call of a thousand tasks, each of which has a handle and makes twenty calls one after the other.
///
/// A macro, since an async closure that borrows its handle can't be told to be `Send`.
macro_rules! per_call {
    ($runtime:expr, $handle:ident => $call:expr) => {
        $runtime.block_on(async {
            let start = Instant::now();
            let mut tasks = JoinSet::new();
            for _ in 0..TASKS {
                let $handle = $handle.clone();
                tasks.spawn(async move {
                    for _ in 0..CALLS {
                        $call;
                    }
                });
            }
            tasks.join_all().await;
            start.elapsed().as_nanos() as f64 / (TASKS * CALLS) as f64
        })
    };
}

/// A thousand tasks over eight permits, each held while its task yields once.
fn queue(effort: Effort) {
    print_head("1000 tasks over 8 permits, per call");
    let runtime = workers();
    let none = ();
    let tokio = Arc::new(tokio::sync::Semaphore::new(PERMITS as usize));
    let guard = Semaphore::permits(PERMITS).build().expect("a valid semaphore");
    let policy = support::only_gate(guard.clone());
    let [none, tokio, guard, policy] = effort.medians_of(|row| match row {
        0 => per_call!(runtime, none => {
            let () = none;
            yield_now().await;
        }),
        1 => per_call!(runtime, tokio => {
            let _permit = tokio.acquire().await.expect("a permit");
            yield_now().await;
        }),
        2 => per_call!(runtime, guard => {
            let _permit = guard.acquire().await.expect("a permit");
            yield_now().await;
        }),
        _ => per_call!(runtime, policy => policy.run(held).await.expect("a permit")),
    });
    Line::new("no limit", none, "ns").print();
    Line::new("tokio's semaphore", tokio, "ns").print();
    Line::new("semaphore, by guard", guard, "ns").print();
    Line::new("semaphore, in a policy", policy, "ns").print();
    Line::new("by guard / tokio's", guard / tokio, "×").must(1.1, 0.8).print();
    Line::new("in a policy / tokio's", policy / tokio, "×").must(1.1, 0.8).print();
}

async fn held() -> support::Answer {
    yield_now().await;
    Ok(black_box(7))
}

fn workers() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().expect("a runtime")
}

/// The same tasks at a bucket that makes nearly all of them wait: is its rate used to the full?
fn wait_for_tokens(effort: Effort) {
    const RATE: u64 = 400_000;
    const BURST: u32 = 2_000;
    print_head("1000 tasks at a bucket of 400,000/s, per call");
    let runtime = workers();
    let [took] = effort.medians_of(|_| {
        let bucket = TokenBucket::per_second(RATE).burst(BURST).build().expect("a valid bucket");
        let policy = support::only_gate(bucket);
        per_call!(runtime, policy => policy.run(support::ready).await.expect("a token"))
    });
    let allowed = (TASKS * CALLS - u64::from(BURST)) as f64 / RATE as f64 * 1e9 / (TASKS * CALLS) as f64;
    Line::new("the rate allows", allowed, "ns").print();
    Line::new("took", took, "ns").print();
    Line::new("took / the rate allows", took / allowed, "×").print();
}
