//! Wrong settings: each is told by its field, its value and what is allowed, all at once, and nothing panics later.

use std::time::{Duration, SystemTime};

use proptest::prelude::*;
use resile::{
    BreakerBuilder, CircuitBreaker, ConfigError, Fault, Gate, Jitter, LeakyBucket, OnRefusal, Policy, Quota, Rate,
    Retry, RetryBudget, Semaphore, SlidingWindow, TokenBucket, Verdict,
};
use tokio::time::advance;

const fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

const DAY: Duration = Duration::from_secs(86_400);
const NANO: Duration = Duration::from_nanos(1);
/// A nanosecond below the millisecond that most times need.
const TOO_SHORT: Duration = Duration::from_nanos(999_999);

/// That there is one fault, and that it names all that is wrong.
#[track_caller]
fn assert_fault<T>(built: Result<T, ConfigError>, place: &str, field: &str, value: &str) {
    let Err(error) = built else { panic!("{field} of {value} was accepted") };
    let [fault] = error.faults() else { panic!("one fault, not these: {error}") };
    assert_eq!((fault.place(), fault.field(), fault.value()), (place, field, value));
    assert!(!fault.allowed().is_empty());
    let allowed = fault.allowed();
    assert_eq!(fault.to_string(), format!("{place}: {field} must be {allowed}, is {value}"));
    assert_eq!(error.to_string(), fault.to_string());
}

fn of_retry(retry: Retry) -> Result<Policy, ConfigError> {
    Policy::named("p").retry(retry).build()
}

#[test]
fn a_semaphore_says_what_is_wrong() {
    // S4, S5.
    for permits in [0, 1 << 31, u32::MAX] {
        assert_fault(Semaphore::permits(permits).build(), "semaphore", "permits", &permits.to_string());
    }
    for queue in [(1 << 24) + 1, u32::MAX] {
        assert_fault(Semaphore::permits(1).max_queue(queue).build(), "semaphore", "max_queue", &queue.to_string());
    }
    let semaphore = Semaphore::permits(1).build().unwrap();
    assert_fault(semaphore.resize(0), "semaphore", "permits", "0");
}

#[test]
fn a_semaphore_takes_the_ends_of_what_is_allowed() {
    for (permits, queue) in [(1, 0), ((1 << 31) - 1, 1 << 24)] {
        assert!(Semaphore::permits(permits).max_queue(queue).max_wait(Duration::MAX).build().is_ok());
    }
}

#[test]
fn a_bucket_says_what_is_wrong() {
    let rate = |count, period| TokenBucket::at(Rate::new(count, period)).build();
    for (count, period, value) in [
        (0, Duration::from_secs(1), "0 per 1s"),
        (1, Duration::ZERO, "1 per 0ns"),
        (0, Duration::ZERO, "0 per 0ns"),
        (1_000_000_001, Duration::from_secs(1), "1000000001 per 1s"),
        (u64::MAX, Duration::from_secs(1), "18446744073709551615 per 1s"),
        (2, NANO, "2 per 1ns"),
        (1, DAY * 367, "1 per 31708800s"),
        (1, Duration::MAX, "1 per 18446744073.709551615s"),
    ] {
        assert_fault(rate(count, period), "bucket", "rate", value);
        let bucket = TokenBucket::per_second(1).build().unwrap();
        assert_fault(bucket.set_rate(Rate::new(count, period)), "bucket", "rate", value);
    }
    assert_fault(TokenBucket::per_second(1).burst(0).build(), "bucket", "burst", "0");
    for batch in [0, 4] {
        let bucket = TokenBucket::per_second(1).burst(3).batch(batch);
        assert_fault(bucket.build(), "bucket", "batch", &batch.to_string());
    }
    let yearly = TokenBucket::at(Rate::new(1, DAY * 365));
    assert_fault(yearly.burst(u32::MAX).build(), "bucket", "burst", &u32::MAX.to_string());
    let queue = (1 << 24) + 1;
    assert_fault(TokenBucket::per_second(1).max_queue(queue).build(), "bucket", "max_queue", &queue.to_string());
}

/// L3.
#[test]
fn a_bucket_takes_the_ends_of_what_is_allowed() {
    for rate in [Rate::per_second(1_000_000_000), Rate::new(1, NANO), Rate::new(1, DAY * 366), Rate::per_minute(1)] {
        let bucket = TokenBucket::at(rate).burst(1).max_queue(0).max_wait(Duration::MAX).build().unwrap();
        assert!(bucket.set_rate(rate).is_ok());
        assert!(TokenBucket::at(rate).build().is_ok(), "with the default burst");
    }
    assert!(TokenBucket::per_second(1_000_000_000).burst(u32::MAX).build().is_ok());
}

#[test]
fn the_other_limiters_say_what_is_wrong() {
    let wrong = [
        (Rate::per_second(0), "0 per 1s"),
        (Rate::per_second(1_000_000_001), "1000000001 per 1s"),
        (Rate::new(1, Duration::ZERO), "1 per 0ns"),
        (Rate::new(1, DAY * 367), "1 per 31708800s"),
    ];
    let (leaky, window) = (LeakyBucket::per_second(1).build().unwrap(), SlidingWindow::per_second(1).build().unwrap());
    for (rate, value) in wrong {
        assert_fault(LeakyBucket::at(rate).build(), "leaky bucket", "rate", value);
        assert_fault(leaky.set_rate(rate), "leaky bucket", "rate", value);
        assert_fault(SlidingWindow::at(rate).build(), "window", "rate", value);
        assert_fault(window.set_rate(rate), "window", "rate", value);
    }
    assert_fault(SlidingWindow::per_second(1).exact_up_to(65_537).build(), "window", "exact_up_to", "65537");
    assert_fault(window.set_rate(Rate::per_minute(65_537)), "window", "limit", "65537");
    assert_fault(SlidingWindow::per_minute(65_537).build(), "window", "limit", "65537");
    assert!(!SlidingWindow::per_minute(65_537).estimated().build().unwrap().is_exact());

    let most = 28 * 86_400 * 1_000_000_000;
    for (quota, limit) in [
        (Quota::per_second(0), "0"),
        (Quota::per_month(0), "0"),
        (Quota::per_second(1_000_000_001), "1000000001"),
        (Quota::per_month(most + 1), "2419200000000001"),
        (Quota::from_first_use(2, NANO), "2"),
    ] {
        assert_fault(quota.build(), "quota", "limit", limit);
    }
    assert_fault(Quota::per_day(1).build().unwrap().set_limit(0), "quota", "limit", "0");
    for (window, value) in [(Duration::ZERO, "0ns"), (DAY * 367, "31708800s")] {
        assert_fault(Quota::from_first_use(1, window).build(), "quota", "window", value);
    }
    assert_fault(
        Quota::per_day(1).carry_over(1_000_000_000_000_001).build(),
        "quota",
        "carry_over",
        "1000000000000001",
    );
    let from_first_use = || Quota::from_first_use(1, DAY);
    assert_fault(from_first_use().carry_over(1).build(), "quota", "carry_over", "1");
    assert_fault(from_first_use().east_of_utc(NANO).build(), "quota", "offset", "1ns");
    assert_fault(from_first_use().west_of_utc(NANO).build(), "quota", "offset", "1ns");
    assert_fault(from_first_use().wall_clock(SystemTime::UNIX_EPOCH).build(), "quota", "wall_clock", "given");
    let all = from_first_use().carry_over(1).east_of_utc(NANO).wall_clock(SystemTime::now()).build();
    assert_eq!(all.unwrap_err().faults().len(), 3);
    let far = Duration::from_secs(18 * 3600 + 1);
    for quota in [Quota::per_day(1).east_of_utc(far), Quota::per_day(1).west_of_utc(far)] {
        assert_fault(quota.build(), "quota", "offset", "64801s");
    }
    let queue = (1 << 24) + 1;
    assert_fault(LeakyBucket::per_second(1).max_queue(queue).build(), "leaky bucket", "max_queue", "16777217");
    assert_fault(SlidingWindow::per_second(1).max_queue(queue).build(), "window", "max_queue", "16777217");
    assert_fault(Quota::per_second(1).max_queue(queue).build(), "quota", "max_queue", "16777217");
}

#[test]
fn the_other_limiters_take_the_ends_of_what_is_allowed() {
    for rate in [Rate::per_second(1_000_000_000), Rate::new(1, NANO), Rate::new(1, DAY * 366)] {
        assert!(LeakyBucket::at(rate).max_queue(0).max_wait(Duration::MAX).build().is_ok());
        assert!(SlidingWindow::at(rate).exact_up_to(65_536).max_queue(1 << 24).build().is_ok());
    }
    let ends = [Quota::per_second(1_000_000_000), Quota::per_month(28 * 86_400 * 1_000_000_000), Quota::per_day(1)];
    for quota in ends {
        assert!(quota.carry_over(1_000_000_000_000_000).east_of_utc(DAY * 3 / 4).build().is_ok());
    }
    assert!(Quota::from_first_use(1, NANO).build().is_ok());
    assert!(Quota::from_first_use(1, DAY * 366).build().is_ok());
    for shows in [SystemTime::UNIX_EPOCH - DAY * 365 * 100, SystemTime::UNIX_EPOCH + DAY * 365 * 100] {
        let quota = Quota::per_month(2).wall_clock(shows).build().unwrap();
        quota.try_take(2).unwrap();
        assert!(quota.try_take(1).unwrap_err().retry_after().unwrap() <= DAY * 31);
    }
}

#[test]
fn a_retry_says_what_is_wrong() {
    let retry = || Retry::constant(ms(1));
    let fault = |retry, field, value: &str| assert_fault(of_retry(retry), "policy p: step 1 (retry)", field, value);
    // R7.
    for attempts in [0, 1001, u32::MAX] {
        fault(retry().max_attempts(attempts), "max_attempts", &attempts.to_string());
    }
    // R2, G1.
    for factor in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -2.0, 0.0, 0.999, 100.001, f64::MAX] {
        fault(Retry::exponential(ms(1)).factor(factor), "factor", &format!("{factor:?}"));
    }
    for long in [DAY + NANO, Duration::MAX] {
        fault(retry().max_delay(long), "max_delay", &format!("{long:?}"));
        fault(retry().max_hint(long), "max_hint", &format!("{long:?}"));
        fault(retry().min_attempt(long), "min_attempt", &format!("{long:?}"));
        fault(retry().max_elapsed(long), "max_elapsed", &format!("{long:?}"));
    }
}

#[test]
fn a_retry_takes_the_ends_of_what_is_allowed() {
    for (attempts, factor, time) in [(1, 1.0, Duration::ZERO), (1000, 100.0, DAY)] {
        let retry = Retry::exponential(Duration::MAX).max_attempts(attempts).factor(factor);
        assert!(of_retry(retry.max_delay(time).max_hint(time).min_attempt(time).max_elapsed(time)).is_ok());
    }
    assert!(of_retry(Retry::constant(ms(1)).factor(f64::NAN)).is_ok(), "only exponential backoff has a factor");
    assert!(of_retry(Retry::constant(DAY)).is_ok() && of_retry(Retry::constant(ms(9)).max_delay(ms(9))).is_ok());
}

#[test]
fn a_constant_delay_that_could_not_be_waited_is_a_fault() {
    let error = of_retry(Retry::constant(ms(60)).max_delay(ms(30))).unwrap_err();
    let fault = &error.faults()[0];
    assert_eq!((fault.field(), fault.value(), fault.allowed()), ("max_delay", "30ms", "the delay, 60ms, to 24h"));
    let error = of_retry(Retry::constant(DAY + ms(1))).unwrap_err();
    assert_eq!((error.faults()[0].field(), error.faults()[0].allowed()), ("delay", "0 to 24h"));
}

#[test]
fn a_budget_says_what_is_wrong() {
    for fraction in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -0.001, 10.001, f64::MAX] {
        let value = format!("{fraction:?}");
        assert_fault(RetryBudget::ratio(fraction).build(), "retry budget", "ratio", &value);
        assert_fault(RetryBudget::share(fraction).build(), "retry budget", "share", &value);
    }
    for many in [1_000_001, u32::MAX] {
        let value = many.to_string();
        assert_fault(
            RetryBudget::ratio(0.1).reserve_per_second(many).build(),
            "retry budget",
            "reserve_per_second",
            &value,
        );
        assert_fault(RetryBudget::share(0.1).floor(many).build(), "retry budget", "floor", &value);
    }
    for expiry in [Duration::ZERO, TOO_SHORT, Duration::from_secs(3600) + NANO, Duration::MAX] {
        let value = format!("{expiry:?}");
        assert_fault(RetryBudget::ratio(0.1).expiry(expiry).build(), "retry budget", "expiry", &value);
    }
}

#[test]
fn a_budget_takes_the_ends_of_what_is_allowed() {
    for (fraction, many, expiry) in [(0.0, 0, ms(1)), (10.0, 1_000_000, Duration::from_secs(3600))] {
        assert!(RetryBudget::ratio(fraction).reserve_per_second(many).expiry(expiry).build().is_ok());
        assert!(RetryBudget::share(fraction).floor(many).build().is_ok());
    }
}

#[test]
fn a_breaker_says_what_is_wrong() {
    let new = CircuitBreaker::builder;
    let fault = |builder: BreakerBuilder, field, value: &str| assert_fault(builder.build(), "breaker", field, value);
    for rate in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -0.5, 0.0, -0.0, 1.000_001, f64::MAX] {
        let value = format!("{rate:?}");
        fault(new().failure_rate(rate), "failure_rate", &value);
        fault(new().slow_calls(ms(1), rate), "slow_calls rate", &value);
        fault(new().probe_failure_rate(rate), "probe_failure_rate", &value);
    }
    for growth in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, 0.999, 100.001] {
        fault(new().open_growth(growth), "open_growth", &format!("{growth:?}"));
    }
    for jitter in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -0.001, 1.001] {
        fault(new().open_jitter(jitter), "open_jitter", &format!("{jitter:?}"));
    }
    for time in [Duration::ZERO, TOO_SHORT, DAY + NANO, Duration::MAX] {
        let value = format!("{time:?}");
        fault(new().open_for(time), "open_for", &value);
        fault(new().max_open_for(time), "max_open_for", &value);
        fault(new().half_open_for(time), "half_open_for", &value);
        fault(new().probe_lease(time), "probe_lease", &value);
        fault(new().abandoned_after(time), "abandoned_after", &value);
        fault(new().slow_calls(time, 0.5), "slow_calls threshold", &value);
    }
    for time in [Duration::ZERO, TOO_SHORT, Duration::from_secs(3600) + NANO, Duration::MAX] {
        fault(new().over(time), "over", &format!("{time:?}"));
    }
    for probes in [0, 1001, u32::MAX] {
        fault(new().probes(probes), "probes", &probes.to_string());
    }
    fault(new().consecutive_failures(0), "consecutive_failures", "0");
    fault(new().min_calls(0), "min_calls", "0");
    fault(new().over_calls(10).min_calls(0), "min_calls", "0");
    fault(new().over_calls(10).min_calls(11), "min_calls", "11");
    fault(new().over_calls(1_000_001), "over_calls", "1000001");
}

/// A setting that was not made has no fault of its own.
#[test]
fn a_window_of_no_calls_is_one_fault() {
    assert_fault(CircuitBreaker::builder().over_calls(0).build(), "breaker", "over_calls", "0");
}

#[test]
fn a_breaker_takes_the_ends_of_what_is_allowed() {
    let smallest = CircuitBreaker::builder()
        .failure_rate(f64::MIN_POSITIVE)
        .over(ms(1))
        .min_calls(1)
        .slow_calls(ms(1), f64::MIN_POSITIVE)
        .consecutive_failures(1)
        .probes(1)
        .probe_failure_rate(f64::MIN_POSITIVE)
        .open_for(ms(1))
        .open_growth(1.0)
        .max_open_for(ms(1))
        .open_jitter(0.0)
        .half_open_for(ms(1))
        .probe_lease(ms(1))
        .abandoned_after(ms(1));
    let largest = CircuitBreaker::builder()
        .failure_rate(1.0)
        .over(Duration::from_secs(3600))
        .min_calls(u32::MAX)
        .slow_calls(DAY, 1.0)
        .consecutive_failures(u32::MAX)
        .probes(1000)
        .probe_failure_rate(1.0)
        .open_for(DAY)
        .open_growth(100.0)
        .max_open_for(DAY)
        .open_jitter(1.0)
        .half_open_for(DAY)
        .probe_lease(DAY)
        .abandoned_after(DAY);
    assert!(smallest.build().is_ok());
    assert!(largest.build().is_ok());
    assert!(CircuitBreaker::builder().over_calls(1).build().is_ok());
    assert!(CircuitBreaker::builder().over_calls(1_000_000).min_calls(1_000_000).build().is_ok());
}

#[test]
fn a_builder_tells_all_its_faults_at_once() {
    let error = CircuitBreaker::builder()
        .failure_rate(2.0)
        .over(Duration::ZERO)
        .min_calls(0)
        .slow_calls(Duration::ZERO, 0.0)
        .consecutive_failures(0)
        .probes(0)
        .probe_failure_rate(f64::NAN)
        .open_for(Duration::ZERO)
        .open_growth(0.5)
        .max_open_for(Duration::MAX)
        .open_jitter(-1.0)
        .half_open_for(Duration::ZERO)
        .probe_lease(Duration::ZERO)
        .abandoned_after(Duration::MAX)
        .build()
        .unwrap_err();
    let mut fields: Vec<_> = error.faults().iter().map(Fault::field).collect();
    fields.sort_unstable();
    assert_eq!(
        fields,
        [
            "abandoned_after",
            "consecutive_failures",
            "failure_rate",
            "half_open_for",
            "max_open_for",
            "min_calls",
            "open_for",
            "open_growth",
            "open_jitter",
            "over",
            "probe_failure_rate",
            "probe_lease",
            "probes",
            "slow_calls rate",
            "slow_calls threshold",
        ]
    );
    assert_eq!(error.to_string().matches("; ").count(), 14);
    let error = Semaphore::permits(0).max_queue(u32::MAX).build().unwrap_err();
    assert_eq!(error.faults().len(), 2);
    let error = TokenBucket::per_second(0).burst(0).max_queue(u32::MAX).build().unwrap_err();
    assert_eq!(error.faults().len(), 3);
}

#[test]
fn a_policy_tells_the_faults_of_all_its_steps_with_their_places() {
    let error = Policy::named("users")
        .timeout(ms(1))
        .retry(Retry::immediate().max_attempts(0).max_delay(Duration::MAX))
        .gate(CircuitBreaker::builder().failure_rate(f64::NAN))
        .gate(TokenBucket::per_second(0))
        .gate(Semaphore::permits(1))
        .gate(Semaphore::permits(0))
        .build()
        .unwrap_err();
    let told: Vec<_> = error.faults().iter().map(|fault| (fault.place(), fault.field())).collect();
    assert_eq!(
        told,
        [
            ("policy users: step 2 (retry)", "max_attempts"),
            ("policy users: step 2 (retry)", "max_delay"),
            ("policy users: step 3 (breaker)", "failure_rate"),
            ("policy users: step 4 (bucket)", "rate"),
            ("policy users: step 6 (semaphore)", "permits"),
        ]
    );
}

#[test]
fn a_policy_has_up_to_sixty_four_steps() {
    let steps = |count| (0..count).fold(Policy::named("long"), |policy, _| policy.timeout(ms(1))).build();
    assert!(steps(0).is_ok());
    assert!(steps(64).is_ok());
    assert_fault(steps(65), "policy long", "steps", "65");
    assert_fault(steps(1000), "policy long", "steps", "1000");
}

#[test]
fn too_many_steps_hide_no_other_fault() {
    let policy = (0..70).fold(Policy::named("long"), |policy, _| policy.gate(Semaphore::permits(0)));
    assert_eq!(policy.build().unwrap_err().faults().len(), 71);
}

/// A limit of zero lets nothing by that is worth a limit: it is a slip. An absurdly long one is none.
#[test]
fn timeouts_of_any_length_but_zero_are_allowed() {
    for limit in [NANO, Duration::MAX] {
        assert!(Policy::named("p").timeout(limit).build().is_ok());
    }
    let error = Policy::named("p").timeout(Duration::ZERO).build().unwrap_err();
    assert_eq!(error.to_string(), "policy p: step 1 (timeout): limit must be above 0, is 0ns");
}

#[test]
fn a_config_error_is_an_error_like_any_other() {
    fn build() -> Result<Semaphore, Box<dyn std::error::Error + Send + Sync>> {
        Ok(Semaphore::permits(0).build()?)
    }
    let error = build().unwrap_err();
    assert_eq!(error.to_string(), "semaphore: permits must be 1 to 2147483647, is 0");
    assert!(error.source().is_none());
    let error = error.downcast::<ConfigError>().unwrap();
    assert_eq!(error.faults().len(), 1);
}

// Boxed, since the trees of nested strategies outgrow a test's stack.

fn number() -> BoxedStrategy<f64> {
    prop_oneof![
        4 => 0.0..1.0_f64,
        2 => 0.0..200.0_f64,
        1 => proptest::num::f64::ANY,
        1 => prop_oneof![Just(f64::NAN), Just(f64::INFINITY), Just(0.0), Just(-0.0), Just(1.0), Just(f64::MIN_POSITIVE)],
    ]
    .boxed()
}

fn count() -> BoxedStrategy<u32> {
    prop_oneof![4 => 0..50_u32, 1 => any::<u32>(), 1 => prop_oneof![Just(0), Just(1), Just(u32::MAX)]].boxed()
}

fn time() -> BoxedStrategy<Duration> {
    prop_oneof![
        4 => (0..100_000_u64).prop_map(ms),
        2 => any::<u64>().prop_map(Duration::from_nanos),
        1 => (any::<u64>(), 0..1_000_000_000_u32).prop_map(|(secs, nanos)| Duration::new(secs, nanos)),
        1 => prop_oneof![Just(Duration::ZERO), Just(NANO), Just(Duration::MAX)],
    ]
    .boxed()
}

fn breaker() -> impl Strategy<Value = BreakerBuilder> {
    let over = prop_oneof![time().prop_map(Ok), count().prop_map(Err)];
    let rules = (number(), over, count(), proptest::option::of((time(), number())), proptest::option::of(count()));
    let states = (count(), number(), time(), number(), time(), number(), time(), time());
    (rules, states, proptest::option::of(time()), any::<(bool, u64)>()).prop_map(
        |(rules, states, abandoned, (observe, seed))| {
            let (rate, over, min, slow, row) = rules;
            let (probes, probe_rate, open, growth, most, jitter, half, lease) = states;
            let mut builder = CircuitBreaker::builder().failure_rate(rate).min_calls(min).probes(probes).seed(seed);
            builder = match over {
                Ok(time) => builder.over(time),
                Err(calls) => builder.over_calls(calls),
            };
            if let Some((threshold, rate)) = slow {
                builder = builder.slow_calls(threshold, rate);
            }
            if let Some(failures) = row {
                builder = builder.consecutive_failures(failures);
            }
            if let Some(time) = abandoned {
                builder = builder.abandoned_after(time);
            }
            builder = builder.probe_failure_rate(probe_rate).open_for(open).open_growth(growth).max_open_for(most);
            builder = builder.open_jitter(jitter).half_open_for(half).probe_lease(lease);
            if observe { builder.observe_only() } else { builder }
        },
    )
}

/// Mostly right, so that the whole is sometimes.
fn mild() -> impl Strategy<Value = BreakerBuilder> {
    (0.01..=1.0_f64, 1_u32..10, 1_u64..10_000, 0.0..=1.0_f64, 1.0..=100.0_f64).prop_map(
        |(rate, few, time, jitter, growth)| {
            CircuitBreaker::builder()
                .failure_rate(rate)
                .over(ms(time))
                .min_calls(few)
                .consecutive_failures(few)
                .slow_calls(ms(time), rate)
                .probes(few)
                .open_for(ms(time))
                .open_jitter(jitter)
                .open_growth(growth)
                .half_open_for(ms(time))
                .probe_lease(ms(time))
        },
    )
}

fn retry() -> impl Strategy<Value = Retry> {
    let curve = (0..6_u8, time(), number());
    let limits = (count(), time(), time(), time(), proptest::option::of(time()));
    let jitter = prop_oneof![Just(Jitter::None), Just(Jitter::Full), Just(Jitter::Equal), Just(Jitter::Decorrelated)];
    (curve, limits, jitter, any::<bool>()).prop_map(|((kind, first, factor), limits, jitter, refusals)| {
        let retry = match kind {
            0 => Retry::immediate(),
            1 => Retry::constant(first),
            2 => Retry::linear(first),
            3 => Retry::fibonacci(first),
            4 => Retry::with(vec![first; 3]),
            _ => Retry::exponential(first).factor(1.0 + factor),
        };
        let (attempts, delay, hint, least, elapsed) = limits;
        let mut retry = retry.jitter(jitter).max_attempts(attempts).max_delay(delay).max_hint(hint).min_attempt(least);
        if let Some(elapsed) = elapsed {
            retry = retry.max_elapsed(elapsed);
        }
        if refusals { retry.on_refusal(OnRefusal::Retry) } else { retry }
    })
}

/// A short life of a policy: good and bad calls, long and short, with a deadline and dropped half-way.
async fn exercise(policy: &Policy, time: Duration, cost: u32) {
    let verdicts = |result: &Result<u32, u32>| match result {
        Ok(_) => Verdict::Success,
        Err(call) if call % 3 == 0 => Verdict::Overloaded(Some(time)),
        Err(_) => Verdict::Transient(None),
    };
    for call in 0..6_u32 {
        let run = policy.classify(verdicts).call().cost(cost).deadline(time).run(|| async {
            if call % 2 == 1 {
                tokio::time::sleep(time.min(Duration::from_secs(10))).await;
            }
            if call < 4 { Err(call) } else { Ok(call) }
        });
        // A wait may be without end, where no limit was set and what is waited for lies past the end of the clock.
        let _ = tokio::time::timeout(DAY * 365 * 3, run).await;
        let _ = futures::future::poll_immediate(policy.run(std::future::pending::<Result<(), ()>>)).await;
        advance(ms(700)).await;
    }
}

fn paused() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap()
}

fn assert_told(error: &ConfigError) -> Result<(), TestCaseError> {
    prop_assert!(!error.faults().is_empty());
    for fault in error.faults() {
        prop_assert!(!fault.place().is_empty() && !fault.field().is_empty());
        prop_assert!(!fault.value().is_empty() && !fault.allowed().is_empty());
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    /// Law: whatever the numbers, they are refused with reasons, or what is built of them lives.
    #[test]
    fn a_breaker_of_any_numbers_is_refused_or_works(builder in prop_oneof![breaker().boxed(), mild().boxed()], time in time()) {
        match builder.build() {
            Err(error) => assert_told(&error)?,
            Ok(breaker) => paused().block_on(async {
                let policy = Policy::named("law").gate(breaker.clone()).build().unwrap();
                exercise(&policy, time, 1).await;
                breaker.force_open();
                breaker.reset();
                exercise(&policy, time, 0).await;
                let _ = (breaker.state(), breaker.counts());
            }),
        }
    }

    #[test]
    fn a_bucket_of_any_numbers_is_refused_or_works(
        (tokens, period, burst) in (prop_oneof![1_u64..1000, any::<u64>()], time(), proptest::option::of(count())),
        (queue, wait) in (count(), proptest::option::of(time())),
        (time, cost) in (time(), count()),
    ) {
        let mut builder = TokenBucket::at(Rate::new(tokens, period)).max_queue(queue);
        if let Some(burst) = burst {
            builder = builder.burst(burst);
        }
        if let Some(wait) = wait {
            builder = builder.max_wait(wait);
        }
        match builder.build() {
            Err(error) => assert_told(&error)?,
            Ok(bucket) => paused().block_on(async {
                let policy = Policy::named("law").gate(bucket.clone()).build().unwrap();
                exercise(&policy, time, cost).await;
                let _ = (bucket.try_take(cost), bucket.peek(), bucket.set_rate(Rate::new(u64::from(cost), time)));
                bucket.refund(cost);
                exercise(&policy, time, 1).await;
            }),
        }
    }

    #[test]
    fn a_semaphore_of_any_numbers_is_refused_or_works(
        (permits, queue, wait) in (count(), count(), proptest::option::of(time())),
        (time, cost) in (time(), count()),
    ) {
        let mut builder = Semaphore::permits(permits).max_queue(queue);
        if let Some(wait) = wait {
            builder = builder.max_wait(wait);
        }
        match builder.build() {
            Err(error) => assert_told(&error)?,
            Ok(semaphore) => paused().block_on(async {
                let policy = Policy::named("law").gate(semaphore.clone()).build().unwrap();
                exercise(&policy, time, cost).await;
                let _ = semaphore.resize(cost);
                let _ = (semaphore.try_acquire_many(cost), semaphore.available(), semaphore.queued());
                exercise(&policy, time, 1).await;
            }),
        }
    }

    #[test]
    fn a_retry_of_any_numbers_is_refused_or_works(
        retry in retry(),
        (ratio, reserve, expiry) in (number(), count(), time()),
        (share, floor) in (number(), count()),
        (limit, time) in (time(), time()),
    ) {
        let mut policy = Policy::named("law").timeout(limit);
        match RetryBudget::ratio(ratio).reserve_per_second(reserve).expiry(expiry).build() {
            Err(error) => assert_told(&error)?,
            Ok(budget) => policy = policy.retry(retry.clone().budget(budget)),
        }
        match RetryBudget::share(share).floor(floor).build() {
            Err(error) => assert_told(&error)?,
            Ok(budget) => policy = policy.retry(retry.max_attempts(3).budget(budget)),
        }
        match policy.gate(CircuitBreaker::builder().min_calls(1)).timeout(time).build() {
            Err(error) => assert_told(&error)?,
            Ok(policy) => paused().block_on(exercise(&policy, time, 1)),
        }
    }
}

#[test]
fn a_constant_delay_of_a_day_needs_a_cap_of_a_day() {
    let policy = |retry: Retry| Policy::named("daily").retry(retry).build();
    assert!(policy(Retry::constant(DAY)).is_ok());
    assert!(policy(Retry::constant(DAY).max_delay(DAY)).is_ok());
    assert!(policy(Retry::constant(DAY).max_delay(Duration::from_secs(3600))).is_err());
}

/// A gate goes into a policy as it is: by value, by reference, behind a pointer, or as the builder of one.
#[tokio::test(start_paused = true)]
async fn a_gate_may_be_given_by_reference_or_behind_a_pointer() {
    let semaphore = Semaphore::permits(1).build().unwrap();
    let boxed: Box<dyn Gate> = Box::new(semaphore.clone());
    let policy = Policy::builder().gate(&semaphore).gate(boxed).build().unwrap();
    assert_eq!(policy.to_string(), "semaphore 1 → semaphore 1");
    let error = policy.call().no_wait().run(|| async { Ok::<_, ()>(()) }).await.unwrap_err();
    assert!(error.is_refused(), "both are the one semaphore");
    assert_eq!(semaphore.in_use(), 0);
}

/// A clone of a builder is a base for another policy: what is added to one is not in the other.
#[tokio::test(start_paused = true)]
async fn a_cloned_builder_is_a_base_for_several_policies() {
    let base = Policy::named("base").timeout(Duration::from_secs(1)).gate(Semaphore::permits(0));
    let error = base.clone().timeout(Duration::ZERO).build().unwrap_err();
    assert_eq!(error.faults().len(), 2);
    assert_eq!(base.build().unwrap_err().faults().len(), 1);

    let shared = Semaphore::permits(1).build().unwrap();
    let base = Policy::named("base").gate(shared.clone());
    let (one, other) = (base.clone().build().unwrap(), base.retry(Retry::immediate()).build().unwrap());
    assert_eq!((one.to_string(), other.lint().len() > one.lint().len()), ("base: semaphore 1".into(), true));
    let held = one.run(|| async { Ok::<_, ()>(shared.in_use()) }).await.unwrap();
    assert_eq!(held, 1);
}
