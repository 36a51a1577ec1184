//! What is said of a policy: its drawing, and what is unusual about its order.

use std::time::Duration;

use resile::{
    Call, CircuitBreaker, Drain, Entry, Fair, Gate, Jitter, Keyed, Layers, LeakyBucket, Lint, OnRefusal, Outcome, Pass,
    Policy, PolicyBuilder, Quota, Rate, Retry, RetryBudget, Semaphore, SlidingWindow, TokenBucket,
};

const fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

const fn secs(count: u64) -> Duration {
    Duration::from_secs(count)
}

/// With a budget, so that nothing is missing.
fn retry() -> Retry {
    Retry::exponential(Duration::from_millis(50)).budget(RetryBudget::ratio(0.1).build().unwrap())
}

fn found(policy: PolicyBuilder) -> Vec<(Lint, Option<usize>)> {
    policy.build().unwrap().lint().iter().map(|finding| (finding.lint(), finding.step())).collect()
}

fn canonical(retry: Retry) -> PolicyBuilder {
    Policy::named("users")
        .timeout(secs(2))
        .retry(retry)
        .gate(CircuitBreaker::builder())
        .gate(TokenBucket::per_second(500))
        .gate(Semaphore::permits(64))
        .timeout(ms(500))
}

#[test]
fn the_canonical_order_has_nothing_unusual() {
    assert_eq!(found(canonical(retry())), []);
}

#[test]
fn parts_of_the_canonical_order_have_nothing_unusual() {
    assert_eq!(found(Policy::named("p").timeout(secs(1))), []);
    assert_eq!(found(Policy::named("p").timeout(secs(2)).retry(retry()).timeout(ms(500))), []);
    assert_eq!(found(Policy::named("p").timeout(secs(1)).gate(Semaphore::permits(1))), []);
    assert_eq!(found(Policy::named("p").timeout(secs(2)).gate(CircuitBreaker::builder()).timeout(secs(1))), []);
}

#[test]
fn a_call_without_a_limit_is_found() {
    let expected = [(Lint::NoCallTimeout, None)];
    assert_eq!(found(Policy::named("p")), expected);
    assert_eq!(found(Policy::named("p").retry(retry()).timeout(secs(1))), expected);
    assert_eq!(found(Policy::named("p").gate(Semaphore::permits(1))), expected);
}

#[test]
fn a_retry_without_a_budget_is_found() {
    assert_eq!(found(canonical(Retry::immediate())), [(Lint::RetryWithoutBudget, Some(2))]);
}

#[test]
fn a_retry_without_a_limit_on_one_attempt_is_found() {
    let policy = Policy::named("p").timeout(secs(2)).retry(retry()).gate(Semaphore::permits(1));
    assert_eq!(found(policy), [(Lint::NoAttemptTimeout, Some(2))]);
}

#[test]
fn an_inner_limit_that_is_no_shorter_is_found() {
    for inner in [2, 3] {
        let policy = Policy::named("p").timeout(secs(2)).retry(retry()).timeout(secs(inner));
        assert_eq!(found(policy), [(Lint::AttemptsOutlastCall, Some(2)), (Lint::AttemptNotShorter, Some(3))]);
    }
}

#[test]
fn a_breaker_outside_of_a_retry_is_found() {
    let policy = Policy::named("p").timeout(secs(2)).gate(CircuitBreaker::builder()).retry(retry()).timeout(ms(500));
    assert_eq!(found(policy), [(Lint::BreakerOutsideRetry, Some(2))]);
}

#[test]
fn gates_whose_refusals_are_tried_again_without_end_are_found() {
    let policy = Policy::named("p")
        .retry(retry().on_refusal(OnRefusal::Retry))
        .gate(CircuitBreaker::builder())
        .gate(Semaphore::permits(64))
        .timeout(secs(1));
    let mut all = found(policy);
    all.retain(|(lint, _)| *lint != Lint::NoCallTimeout);
    all.sort_by_key(|(_, step)| *step);
    assert_eq!(all, [2, 3].map(|step| (Lint::RefusalsRetried, Some(step))));
    assert_eq!(found(canonical(retry().on_refusal(OnRefusal::Retry))), [], "a call's own limit ends it");
}

#[test]
fn a_breaker_that_stays_open_for_longer_than_its_refusals_are_tried_again_is_found() {
    let policy = |open: u64, on_refusal| {
        Policy::named("p")
            .timeout(secs(30))
            .timeout(secs(2))
            .retry(retry().on_refusal(on_refusal))
            .gate(CircuitBreaker::builder().open_for(secs(open)))
            .timeout(ms(500))
    };
    assert_eq!(found(policy(2, OnRefusal::Retry)), [(Lint::OpenOutlastsCall, Some(4))]);
    assert_eq!(found(policy(1, OnRefusal::Retry)), []);
    assert_eq!(found(policy(2, OnRefusal::Stop)), []);
    let findings = policy(5, OnRefusal::Retry).build().unwrap().lint();
    assert_eq!(
        findings[0].to_string(),
        "step 4: once open it stays so for 5s, and a call has 2s: to try its refusals again is no use"
    );
}

#[test]
fn a_retry_inside_of_another_is_found() {
    let policy = Policy::named("p").timeout(secs(2)).retry(retry()).retry(retry()).timeout(ms(500));
    assert_eq!(found(policy), [(Lint::NestedRetries, Some(3))]);
}

#[test]
fn a_breaker_inside_of_a_queue_is_found() {
    for policy in [
        Policy::named("p").timeout(secs(2)).gate(Semaphore::permits(1)),
        Policy::named("p").timeout(secs(2)).gate(TokenBucket::per_second(1)),
    ] {
        let policy = policy.gate(CircuitBreaker::builder()).timeout(secs(1));
        assert_eq!(found(policy), [(Lint::BreakerInsideGate, Some(3))]);
    }
}

#[test]
fn a_breaker_that_only_hears_of_hanging_peers_from_callers_is_found() {
    let policy = Policy::named("p").timeout(secs(2)).gate(CircuitBreaker::builder());
    assert_eq!(found(policy), [(Lint::BreakerWithoutTimeout, Some(2))]);
}

/// The crate page names this order among those that `lint` tells of.
#[test]
fn a_semaphore_outside_of_the_retry_is_found() {
    let policy = Policy::named("p").timeout(secs(2)).gate(Semaphore::permits(1)).retry(retry()).timeout(secs(1));
    let found = found(policy);
    assert!(found.iter().any(|(_, step)| *step == Some(2)), "a permit is held through backoff: {found:?}");
}

/// The crate page names this order among those that `lint` tells of.
#[test]
fn a_limit_of_one_attempt_outside_of_the_queue_is_found() {
    let policy = Policy::named("p").timeout(secs(2)).retry(retry()).timeout(secs(1)).gate(Semaphore::permits(1));
    let found = found(policy);
    assert!(!found.is_empty(), "waiting in the queue counts as the peer being slow");
}

/// The longest duration is no limit, so it is none for this either.
#[test]
fn an_endless_limit_counts_as_none() {
    assert_eq!(found(Policy::named("p").timeout(Duration::MAX)), [(Lint::NoCallTimeout, None)]);
    let policy = Policy::named("p").timeout(secs(2)).gate(CircuitBreaker::builder()).timeout(Duration::MAX);
    assert_eq!(found(policy), [(Lint::BreakerWithoutTimeout, Some(2))]);
}

#[test]
fn a_finding_says_where_and_what_will_happen() {
    let policies = [
        Policy::named("bare"),
        canonical(Retry::immediate().on_refusal(OnRefusal::Retry)),
        Policy::named("odd").gate(CircuitBreaker::builder()).retry(retry()).retry(retry()).timeout(secs(1)),
        Policy::named("late")
            .timeout(secs(1))
            .gate(Semaphore::permits(1))
            .gate(CircuitBreaker::builder())
            .timeout(secs(1)),
    ];
    for policy in policies {
        let findings = policy.build().unwrap().lint();
        assert!(!findings.is_empty());
        for finding in findings {
            let message = finding.message();
            assert!(message.starts_with(|first: char| first.is_lowercase() || first.is_numeric()), "{message}");
            assert!(!message.ends_with('.') && message.len() > 20, "{message}");
            match finding.step() {
                Some(step) => assert_eq!(finding.to_string(), format!("step {step}: {message}")),
                None => assert_eq!(finding.to_string(), message),
            }
        }
    }
}

#[test]
fn a_policy_is_drawn_on_one_line() {
    assert_eq!(
        canonical(retry()).build().unwrap().to_string(),
        "users: timeout 2s → retry ×3 exponential 50ms → breaker 50 % of 20 in 10s → bucket 500/s burst 50 → semaphore 64 → timeout 500ms"
    );
    assert_eq!(Policy::named("bare").build().unwrap().to_string(), "bare: no steps");
}

#[test]
fn each_backoff_is_drawn_by_its_name() {
    let ten = Duration::from_millis(10);
    for (retry, drawn) in [
        (Retry::immediate(), "retry ×3 immediate"),
        (Retry::constant(ten).max_attempts(7), "retry ×7 constant 10ms"),
        (Retry::linear(ten), "retry ×3 linear 10ms"),
        (Retry::fibonacci(ten), "retry ×3 fibonacci 10ms"),
        (Retry::exponential(ten).jitter(Jitter::None), "retry ×3 exponential 10ms"),
        (Retry::with([ten]), "retry ×3 own backoff"),
    ] {
        assert_eq!(Policy::named("p").retry(retry).build().unwrap().to_string(), format!("p: {drawn}"));
    }
}

#[test]
fn gates_are_drawn_by_their_names_and_settings() {
    struct Mine;
    impl Gate for Mine {
        fn enter(&self, _: &Call) -> Entry {
            Entry::Pass(Pass::default())
        }
        fn leave(&self, _: Pass, _: Outcome) {}
        fn name(&self) -> &'static str {
            "mine"
        }
    }
    struct Unnamed;
    impl Gate for Unnamed {
        fn enter(&self, _: &Call) -> Entry {
            Entry::Pass(Pass::default())
        }
        fn leave(&self, _: Pass, _: Outcome) {}
    }
    let policy = Policy::named("p")
        .gate(CircuitBreaker::builder().named("peer"))
        .gate(TokenBucket::at(Rate::new(1, secs(2))).named("half"))
        .gate(TokenBucket::per_second(1_000_000_000))
        .gate(Semaphore::permits(3).named("db"))
        .gate(Mine)
        .gate(std::sync::Arc::new(Mine))
        .gate(Unnamed)
        .build()
        .unwrap();
    assert_eq!(
        policy.to_string(),
        "p: peer 50 % of 20 in 10s → half 0.5/s burst 1 → bucket 1000000000/s burst 100000000 → db 3 → mine → mine → gate"
    );
}

#[test]
fn limiters_are_drawn_with_what_they_allow() {
    let policy = Policy::named("p")
        .gate(LeakyBucket::per_second(20))
        .gate(std::sync::Arc::new(SlidingWindow::per_minute(100).named("last minute").build().unwrap()))
        .gate(Quota::per_month(10_000).named("plan"))
        .gate(Quota::from_first_use(5, secs(90)))
        .build()
        .unwrap();
    let drawn = "p: leaky 20/s → last minute 100 per 60s → plan 10000 per month → quota 5 per 90s";
    assert_eq!(policy.to_string(), drawn);
}

#[test]
fn gates_around_others_are_drawn_with_them() {
    let tenants = Keyed::by("tenant", TokenBucket::per_second(2)).build().unwrap();
    let layers = Layers::new().layer("tenant", tenants.clone()).layer("all", SlidingWindow::per_second(9));
    let policy = Policy::named("p")
        .gate(layers.named("limits"))
        .gate(Keyed::by("user", Semaphore::permits(4)).named("per user"))
        .gate(Fair::by("tenant", Semaphore::permits(8).named("workers")))
        .build()
        .unwrap();
    let rest = "per user (semaphore 4 each) → fair by tenant (workers 8)";
    let limits = |rate| format!("p: limits (tenant: tenant (bucket {rate}/s burst 1 each), all: window 9/s) → {rest}");
    assert_eq!(policy.to_string(), limits(2));
    tenants.plan().set(TokenBucket::per_second(3)).unwrap();
    assert_eq!(policy.to_string(), limits(3));
}

#[test]
fn a_drawing_follows_what_was_changed_while_in_use() {
    let (semaphore, bucket) = (Semaphore::permits(3).build().unwrap(), TokenBucket::per_second(1).build().unwrap());
    let policy = Policy::named("p").gate(semaphore.clone()).gate(bucket.clone()).build().unwrap();
    assert_eq!(policy.to_string(), "p: semaphore 3 → bucket 1/s burst 1");
    semaphore.resize(5).unwrap();
    bucket.set_rate(Rate::per_second(7)).unwrap();
    assert_eq!(policy.to_string(), "p: semaphore 5 → bucket 7/s burst 1");
}

#[test]
fn a_policy_can_be_printed_for_programmers() {
    let text = format!("{:?}", canonical(retry()).build().unwrap());
    for part in ["users", "CircuitBreaker", "TokenBucket", "Semaphore"] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[test]
fn a_policy_has_a_name_and_is_a_cheap_handle() {
    let policy = canonical(retry()).build().unwrap();
    assert_eq!(policy.clone().name(), "users");
    assert_eq!(Policy::named(String::from("at run time")).build().unwrap().name(), "at run time");
    assert_eq!(size_of::<Policy>(), size_of::<usize>());
}

#[test]
fn attempts_that_take_longer_than_the_call_are_found() {
    let policy = |attempt| Policy::named("p").timeout(secs(1)).retry(retry().max_attempts(3)).timeout(attempt);
    assert_eq!(found(policy(ms(300))), []);
    assert_eq!(found(policy(ms(400))), [(Lint::AttemptsOutlastCall, Some(2))]);
    let findings = policy(ms(400)).build().unwrap().lint();
    let text = "step 2: 3 attempts of 400ms take 1.2s, and the call has 1s: the last ones are never made";
    assert_eq!(findings[0].to_string(), text);
}

#[test]
fn a_queue_that_outlasts_the_call_is_found() {
    let semaphore =
        |queue| Policy::named("p").timeout(secs(1)).gate(Semaphore::permits(4).max_queue(queue)).timeout(ms(100));
    assert_eq!(found(semaphore(40)), []);
    assert_eq!(found(semaphore(41)), [(Lint::QueueOutlastsCall, Some(2))]);
    let bucket =
        |queue| Policy::named("p").timeout(secs(1)).gate(TokenBucket::per_second(100).burst(10).max_queue(queue));
    assert_eq!(found(bucket(100)), []);
    assert_eq!(found(bucket(111)), [(Lint::QueueOutlastsCall, Some(2))]);
    let default = Policy::named("p").timeout(secs(1)).gate(TokenBucket::per_second(1));
    assert_eq!(found(default), [], "a bound of memory is no plan");
}

#[test]
fn a_limit_at_which_nobody_may_wait_is_found() {
    let policy = Policy::named("p")
        .timeout(secs(1))
        .gate(TokenBucket::per_second(100).max_queue(0))
        .gate(Semaphore::permits(4).max_queue(0));
    assert_eq!(found(policy), [(Lint::NoQueue, Some(2)), (Lint::NoQueue, Some(3))]);
}

#[test]
fn a_drain_around_calls_that_go_out_is_found() {
    let drain = Drain::new();
    let inbound = Policy::named("p").gate(drain.clone()).timeout(secs(1)).gate(Semaphore::permits(4));
    assert_eq!(found(inbound), []);
    for outbound in [canonical(retry()).gate(drain.clone()), canonical(retry()).gate(drain.part("p"))] {
        assert_eq!(found(outbound), [(Lint::DrainOutbound, Some(7))]);
    }
}
