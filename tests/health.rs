//! What `Health` answers, and when it changes its mind.
//!
//! On a paused clock, timers fire in order and nothing lags. A stall is made by moving the clock over many of them.

mod support;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::FutureExt;
use resile::health::{Check, HealthReason, Signal, Symptom};
use resile::{Blocking, CircuitBreaker, Compute, Drain, Health, HealthBuilder, Phase, Semaphore, State};
use support::hand::Clock;
use support::ms;
use tokio::runtime::{Builder, Handle};
use tokio::time::{advance, sleep};

/// A signal that says what it is told.
#[derive(Clone, Debug)]
struct Told(Arc<Mutex<Signal>>);

impl Told {
    fn good() -> Self {
        Self(Arc::new(Mutex::new(Signal::Good)))
    }

    fn say(&self, signal: Signal) {
        *self.0.lock().unwrap() = signal;
    }

    fn check(&self, name: &'static str) -> Check {
        let told = self.0.clone();
        Check::new(name, move || told.lock().unwrap().clone())
    }
}

fn bad() -> Signal {
    Signal::bad("down")
}

/// Waits for so many readings.
async fn beats(count: u32) {
    sleep(ms(100) * count).await;
}

fn every_100_ms() -> HealthBuilder {
    Health::builder().every(ms(100))
}

async fn build(builder: HealthBuilder) -> Health {
    let health = builder.build().unwrap();
    // From here on halfway between two readings.
    sleep(ms(50)).await;
    health
}

fn reasons(reasons: &[HealthReason]) -> Vec<(&str, String)> {
    reasons.iter().map(|reason| (reason.signal.as_ref(), reason.symptom.to_string())).collect()
}

#[tokio::test(start_paused = true)]
async fn with_nothing_the_matter_it_is_alive_and_ready() {
    let health = build(Health::builder()).await;
    for _ in 0..50 {
        assert!(health.live().ok && health.ready().ok);
        sleep(ms(300)).await;
    }
    assert_eq!(health.ready().to_string(), "ok");
    assert!(health.ready().reasons.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_signal_flips_after_as_many_bad_readings_in_a_row() {
    let told = Told::good();
    let health = build(every_100_ms().check(told.check("peer"))).await;
    told.say(bad());
    beats(2).await;
    assert!(health.ready().ok);
    beats(1).await;
    let report = health.ready();
    assert_eq!(reasons(&report.reasons), [("peer", "down".to_owned())]);
    assert_eq!(report.reasons[0].lasting, ms(250), "from the first bad reading on");
    assert!(!report.ok && health.live().ok);
    assert_eq!(report.to_string(), "not ok: peer: down (for 250ms)");
}

#[tokio::test(start_paused = true)]
async fn a_signal_flips_back_after_as_many_good_readings_in_a_row() {
    let told = Told::good();
    let health = build(every_100_ms().check(told.check("peer").bad_after(1))).await;
    told.say(bad());
    beats(1).await;
    assert!(!health.ready().ok);
    told.say(Signal::Good);
    beats(5).await;
    assert!(!health.ready().ok);
    beats(1).await;
    assert!(health.ready().ok);
}

#[tokio::test(start_paused = true)]
async fn a_signal_that_flaps_flips_nothing() {
    let told = Told::good();
    let health = build(every_100_ms().check(told.check("peer"))).await;
    for _ in 0..20 {
        told.say(bad());
        beats(2).await;
        told.say(Signal::Good);
        beats(1).await;
        assert!(health.ready().ok);
    }
}

#[tokio::test(start_paused = true)]
async fn the_first_reading_sets_the_state_at_once() {
    let health = every_100_ms().signal("peer", bad).build().unwrap();
    assert!(!health.ready().ok);
}

#[tokio::test(start_paused = true)]
async fn several_reasons_are_told_in_the_order_of_the_checks() {
    let health = every_100_ms().signal("one", bad).signal("fine", || Signal::Good).signal("two", bad).build().unwrap();
    let told = health.ready();
    assert_eq!(told.reasons.iter().map(|reason| &*reason.signal).collect::<Vec<_>>(), ["one", "two"]);
    assert_eq!(told.to_string(), "not ok: one: down (for 0ns); two: down (for 0ns)");
}

#[tokio::test(start_paused = true)]
async fn a_signal_for_liveness_counts_for_both() {
    let told = Told::good();
    let check = told.check("consumer").for_liveness().bad_after(1);
    let health = build(every_100_ms().check(check)).await;
    told.say(bad());
    beats(1).await;
    assert!(!health.live().ok && !health.ready().ok);
}

#[tokio::test(start_paused = true)]
async fn a_signal_that_panics_is_bad_and_the_probe_goes_on() {
    let wrong = Arc::new(AtomicBool::new(true));
    let now = wrong.clone();
    let signal = move || if now.load(Ordering::Relaxed) { panic!("as told") } else { Signal::Good };
    let health = build(every_100_ms().check(Check::new("own", signal).good_after(1))).await;
    assert_eq!(reasons(&health.ready().reasons), [("own", "its signal panicked".to_owned())]);
    wrong.store(false, Ordering::Relaxed);
    beats(1).await;
    assert!(health.ready().ok);
}

// ---------------------------------------------------------------------------------------------------------------
// The event loop

#[tokio::test(start_paused = true)]
async fn a_loop_that_lags_in_each_beat_is_not_ready_but_alive() {
    let health = build(Health::builder().every(ms(150))).await;
    for turn in 0..3 {
        assert!(health.ready().ok, "{turn}");
        // The next beat is 100 ms away and comes 120 ms late.
        advance(ms(220)).await;
        sleep(ms(50)).await;
    }
    let report = health.ready();
    let Symptom::Lagging { lag, limit } = report.reasons[0].symptom else { panic!("{report}") };
    assert_eq!((lag, limit), (ms(120), ms(100)));
    assert_eq!(report.reasons[0].signal, "event loop");
    assert!(health.live().ok);
    sleep(ms(750)).await;
    assert!(!health.ready().ok, "after five good beats");
    sleep(ms(150)).await;
    assert!(health.ready().ok, "after six");
}

#[tokio::test(start_paused = true)]
async fn one_long_stall_counts_as_all_the_beats_it_has_swallowed() {
    let health = build(every_100_ms()).await;
    advance(ms(249)).await;
    sleep(ms(1)).await;
    assert!(health.ready().ok, "199 ms late: two beats");
    beats(10).await;
    advance(ms(400)).await;
    sleep(ms(1)).await;
    assert!(!health.ready().ok, "three and more");
}

#[test]
fn a_stall_is_seen_while_it_lasts() {
    let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let health = runtime.block_on(async { Health::builder().every(ms(100)).build().unwrap() });
    // Nobody drives the runtime, so the probe cannot run.
    let _inside = runtime.enter();
    pass(ms(250));
    assert!(health.ready().ok);
    pass(ms(200));
    let report = health.ready();
    assert!(!report.ok, "350 ms late");
    assert_eq!(report.reasons[0].lasting, ms(350));
    assert!(health.live().ok);
    pass(Duration::from_secs(10));
    let report = health.live();
    assert!(!report.ok);
    assert_eq!(health.ready().reasons, report.reasons, "stuck is told once");
}

/// Moves the clock without letting anything run.
fn pass(time: Duration) {
    assert!(advance(time).now_or_never().is_none(), "it has moved, and would yield");
}

#[tokio::test(start_paused = true)]
async fn after_one_pause_of_the_process_the_first_beat_says_that_it_is_alive() {
    let health = build(every_100_ms().stuck(Duration::from_secs(5))).await;
    let clock_moves = advance(Duration::from_secs(6)).now_or_never();
    assert!(clock_moves.is_none() && !health.live().ok, "no beat since");
    sleep(ms(1)).await;
    assert!(health.live().ok);
    assert!(!health.ready().ok, "its readiness has a patience of its own");
    beats(6).await;
    assert!(health.ready().ok);
}

#[tokio::test(start_paused = true)]
async fn a_signal_that_is_slow_to_be_read_is_no_lag_of_the_event_loop() {
    let (seen, asked) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(None::<Health>)));
    let (log, own) = (seen.clone(), asked.clone());
    let slow = Check::new("disk", move || {
        // Built, it is read by the probe.
        let health = own.lock().unwrap().clone();
        if let Some(health) = health {
            assert!(advance(ms(500)).now_or_never().is_none());
            log.lock().unwrap().extend(reasons(&health.ready().reasons).into_iter().map(|(name, _)| name.to_owned()));
            assert!(health.live().ok);
        }
        Signal::Good
    });
    let health = build(every_100_ms().bad_after(1).check(slow)).await;
    *asked.lock().unwrap() = Some(health.clone());
    sleep(ms(60)).await;
    *asked.lock().unwrap() = None;
    assert_eq!(*seen.lock().unwrap(), ["disk"]);
    let report = health.ready();
    assert_eq!(reasons(&report.reasons), [("disk", "reading it takes 500ms, the limit is 100ms".to_owned())]);
    beats(7).await;
    assert!(health.ready().ok);
}

#[tokio::test(start_paused = true)]
async fn lag_can_be_left_out() {
    let health = build(every_100_ms().lag(Duration::MAX).stuck(Duration::MAX)).await;
    advance(Duration::from_secs(600)).await;
    assert!(health.ready().ok && health.live().ok);
}

#[test]
fn a_runtime_that_is_gone_is_not_alive() {
    let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let health = runtime.block_on(async { Health::builder().build().unwrap() });
    drop(runtime);
    let clock = Clock::paused();
    let _inside = clock.enter();
    assert!(health.live().ok);
    clock.advance(Duration::from_secs(11));
    assert!(!health.live().ok);
}

// ---------------------------------------------------------------------------------------------------------------
// The parts

#[tokio::test(start_paused = true)]
async fn an_open_circuit_is_bad_and_a_half_open_one_is_good() {
    let breaker = CircuitBreaker::builder()
        .named("users")
        .consecutive_failures(1)
        .open_for(Duration::from_secs(5))
        .open_jitter(0.0)
        .build()
        .unwrap();
    let health = build(every_100_ms().critical(&breaker)).await;
    breaker.try_acquire().unwrap().failure();
    assert_eq!(breaker.state(), State::Open);
    beats(1).await;
    let report = health.ready();
    assert_eq!(report.reasons[0].symptom, Symptom::Circuit(State::Open));
    assert_eq!(reasons(&report.reasons), [("users", "the circuit is open".to_owned())]);
    assert!(health.live().ok);
    beats(50).await;
    assert_eq!(breaker.state(), State::HalfOpen, "without traffic it would stay so");
    assert!(health.ready().ok);
}

#[tokio::test(start_paused = true)]
async fn a_circuit_held_open_is_bad_and_one_held_closed_is_good() {
    let breaker = CircuitBreaker::builder().build().unwrap();
    let health = build(every_100_ms().critical(&breaker)).await;
    breaker.force_open();
    beats(1).await;
    assert_eq!(reasons(&health.ready().reasons), [("breaker", "the circuit is held open".to_owned())]);
    breaker.force_closed();
    beats(1).await;
    assert!(health.ready().ok);
}

#[tokio::test(start_paused = true)]
async fn a_drain_is_bad_from_its_closing_until_it_is_opened_again() {
    let drain = Drain::builder().named("service").build().unwrap();
    let health = build(every_100_ms().check(Check::drain(&drain))).await;
    let held = drain.try_acquire().unwrap();
    let closing = tokio::spawn(drain.close(Duration::from_secs(60)));
    beats(1).await;
    assert_eq!(health.ready().reasons[0].symptom, Symptom::Draining(Phase::Closing));
    assert!(health.live().ok, "a restart would cut off what finishes");
    held.success();
    closing.await.unwrap();
    beats(1).await;
    assert_eq!(reasons(&health.ready().reasons), [("service", "it has stopped".to_owned())]);
    assert!(drain.reopen());
    beats(1).await;
    assert!(health.ready().ok);
}

#[tokio::test(start_paused = true)]
async fn a_queue_is_bad_above_and_good_below_its_band() {
    let semaphore = Semaphore::permits(1).max_queue(10).named("db").build().unwrap();
    let check = Check::queue(&semaphore, 0.3..0.8).bad_after(2).good_after(2);
    let health = build(every_100_ms().check(check)).await;
    let _held = semaphore.try_acquire().unwrap();
    let mut waiting = Vec::new();
    let queue = |waiting: &mut Vec<tokio::task::JoinHandle<()>>, count: usize| {
        while waiting.len() < count {
            let semaphore = semaphore.clone();
            waiting.push(tokio::spawn(async move { drop(semaphore.acquire().await) }));
        }
        for task in waiting.drain(count..) {
            task.abort();
        }
    };
    for (count, ok) in [(7, true), (8, false), (5, false), (3, false), (2, true), (5, true), (7, true), (10, false)] {
        queue(&mut waiting, count);
        beats(2).await;
        assert_eq!(semaphore.queued() as usize, count);
        assert_eq!(health.ready().ok, ok, "{count} in the queue");
    }
    assert_eq!(health.ready().reasons[0].symptom, Symptom::Queue { queued: 10, max_queue: 10 });
    assert_eq!(reasons(&health.ready().reasons), [("db", "10 wait in a queue for 10".to_owned())]);
}

#[tokio::test(start_paused = true)]
async fn offloaded_work_has_queues_too() {
    let blocking = Blocking::builder().threads(1).max_queue(1).build().unwrap();
    let compute = Compute::builder().threads(1).max_queue(1).build().unwrap();
    let builder = every_100_ms().check(Check::queue(&blocking, 0.5..1.0)).check(Check::queue(&compute, 0.5..1.0));
    let health = build(builder.lag(Duration::MAX)).await;
    let mut ends = Vec::new();
    let mut hold = || {
        let (end, told) = std::sync::mpsc::channel::<()>();
        ends.push(end);
        move |_| told.recv().is_err()
    };
    let mut jobs = Vec::new();
    for _ in 0..2 {
        jobs.push(Box::pin(blocking.run(hold())));
        jobs.push(Box::pin(compute.run(hold())));
    }
    for job in &mut jobs {
        assert!(job.as_mut().now_or_never().is_none());
    }
    while compute.queued() > 1 {
        std::thread::yield_now();
    }
    assert_eq!((blocking.queued(), compute.queued()), (1, 1));
    for _ in 0..3 {
        advance(ms(100)).await;
        tokio::task::yield_now().await;
    }
    let told = health.ready();
    assert_eq!(told.reasons.iter().map(|reason| &*reason.signal).collect::<Vec<_>>(), ["blocking", "compute"]);
    drop(ends);
    for job in jobs {
        assert!(job.await.unwrap());
    }
}

// ---------------------------------------------------------------------------------------------------------------
// The probe

#[tokio::test(start_paused = true)]
async fn the_probe_reads_each_signal_once_per_beat_and_readers_read_none() {
    let count = Arc::new(AtomicU32::new(0));
    let counted = count.clone();
    let health = build(every_100_ms().signal("own", move || {
        counted.fetch_add(1, Ordering::Relaxed);
        Signal::Good
    }))
    .await;
    beats(10).await;
    for _ in 0..100 {
        assert!(health.ready().ok);
    }
    assert_eq!(count.load(Ordering::Relaxed), 11, "and once when it was built");
}

#[tokio::test(start_paused = true)]
async fn the_probe_ends_with_the_last_handle() {
    let tasks = || Handle::current().metrics().num_alive_tasks();
    let captured = Arc::new(());
    let held = captured.clone();
    let health = build(every_100_ms().signal("own", move || {
        let _ = &held;
        Signal::Good
    }))
    .await;
    let other = health.clone();
    assert_eq!(tasks(), 1);
    drop(health);
    beats(3).await;
    assert_eq!(tasks(), 1);
    assert!(other.ready().ok);
    drop(other);
    tokio::task::yield_now().await;
    assert_eq!(tasks(), 0);
    assert_eq!(Arc::strong_count(&captured), 1, "its signals are gone");
}

#[tokio::test(start_paused = true)]
async fn a_signal_may_ask_the_health_itself() {
    let slot: Arc<Mutex<Option<Health>>> = Arc::default();
    let asked = slot.clone();
    let health = build(every_100_ms().signal("own", move || {
        let health = asked.lock().unwrap().clone();
        assert!(health.is_none_or(|health| health.live().ok));
        Signal::Good
    }))
    .await;
    *slot.lock().unwrap() = Some(health.clone());
    beats(3).await;
    assert!(health.ready().ok);
    // It would hold itself otherwise.
    slot.lock().unwrap().take();
}

// ---------------------------------------------------------------------------------------------------------------
// Settings

#[tokio::test(start_paused = true)]
async fn wrong_settings_are_told_all_at_once() {
    let nowhere = Semaphore::permits(1).max_queue(0).named("db").build().unwrap();
    let error = Health::builder()
        .every(Duration::ZERO)
        .bad_after(0)
        .good_after(1001)
        .lag(ms(4))
        .stuck(Duration::ZERO)
        .check(Check::queue(&nowhere, 0.9..0.5).bad_after(1).good_after(1))
        .check(Check::new("own", || Signal::Good).bad_after(0).good_after(1))
        .check(Check::new("own", || Signal::Good).bad_after(1).good_after(1))
        .check(Check::new("event loop", || Signal::Good).bad_after(1).good_after(1))
        .build()
        .unwrap_err();
    let told: Vec<_> = error.faults().iter().map(|fault| (fault.place(), fault.field(), fault.value())).collect();
    assert_eq!(
        told,
        [
            ("health", "every", "0ns"),
            ("health", "bad_after", "0"),
            ("health", "good_after", "1001"),
            ("health", "lag", "4ms"),
            ("health", "stuck", "0ns"),
            ("health: db", "band", "0.9..0.5"),
            ("health: db", "max_queue", "0"),
            ("health: own", "bad_after", "0"),
            ("health", "name", "\"own\""),
            ("health", "name", "\"event loop\""),
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn a_band_is_made_of_two_shares() {
    let semaphore = Semaphore::permits(1).max_queue(10).build().unwrap();
    let build = |band| Health::builder().check(Check::queue(&semaphore, band)).build();
    for band in [0.0..0.0, 0.5..1.1, -0.1..0.5, f64::NAN..0.5, 0.5..f64::NAN] {
        assert!(build(band.clone()).is_err(), "{band:?}");
    }
    for band in [0.0..1.0, 0.5..0.5, 0.0..0.1] {
        assert!(build(band.clone()).is_ok(), "{band:?}");
    }
}

#[test]
fn without_a_runtime_there_is_no_health() {
    let error = Health::builder().build().unwrap_err();
    assert_eq!(error.to_string(), "health: runtime must be a tokio runtime, in which to build it, is none");
}
