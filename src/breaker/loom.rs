//! Models of the breaker: whatever its callers do at once, each change of state is made once and by the right one.

use std::sync::Mutex as PlainMutex;

use ::loom::thread;

use super::*;
use crate::error::Reason;
use crate::internal::time::nanos;
use crate::loom::{block_on, explore};
use crate::verdict::Verdict;

const OPEN_FOR: Duration = Duration::from_millis(1);
const LONG: Duration = Duration::from_secs(24 * 3600);
const SUCCESS: Verdict = Verdict::Success;
const FAILURE: Verdict = Verdict::Transient(None);

use State::{Closed, ForcedOpen, HalfOpen, Open};

/// A breaker and what its listener has heard. The listener's own lock is no step: it is never contended.
struct Watched(CircuitBreaker, Arc<PlainMutex<Vec<(State, State)>>>);

/// One probe, and nothing that the clock does by itself while it stands still.
fn watched(builder: BreakerBuilder) -> Watched {
    let heard = Arc::new(PlainMutex::new(Vec::new()));
    let breaker = {
        let heard = heard.clone();
        let builder = builder.probes(1).open_for(OPEN_FOR).open_jitter(0.0).half_open_for(LONG).probe_lease(LONG);
        builder.on_change(move |from, to| heard.lock().unwrap().push((from, to))).build().unwrap()
    };
    Watched(breaker, heard)
}

/// Opens at the first failure.
fn touchy() -> Watched {
    watched(CircuitBreaker::builder().consecutive_failures(1))
}

/// Opened just so long ago that whoever comes next is a probe.
fn due() -> Watched {
    let watched = touchy();
    fail_long_ago(&watched.0);
    watched
}

fn fail_long_ago(breaker: &CircuitBreaker) {
    let pass = enter(breaker).unwrap();
    let ended = Moment::from_nanos(Moment::now().nanos() - nanos(OPEN_FOR));
    breaker.leave(pass, Outcome::Judged(FAILURE, Times { started: ended, ended }));
}

impl Watched {
    /// The state that the machine is in and the word tells, without the help of [`CircuitBreaker::state`], which tells it
    /// anew.
    fn state(&self) -> State {
        let locked = self.0.0.locked.lock();
        let machine = &locked.machine;
        assert_eq!(self.0.0.word.load(Acquire), word(machine.state(), machine.generation()));
        machine.state()
    }

    /// In the order in which the changes were made, whichever thread told them.
    fn assert_heard(&self, changes: &[(State, State)]) {
        assert_eq!(*self.1.lock().unwrap(), changes);
    }
}

fn enter(breaker: &CircuitBreaker) -> Result<Pass, Reason> {
    match breaker.enter(&Call::alone(1, true)) {
        Entry::Pass(pass) => Ok(pass),
        Entry::Refused(refusal) => Err(refusal.reason()),
        Entry::Wait(..) => unreachable!("nobody waits at a breaker"),
    }
}

fn leave(breaker: &CircuitBreaker, pass: Pass, verdict: Verdict) {
    let now = Moment::now();
    breaker.leave(pass, Outcome::Judged(verdict, Times { started: now, ended: now }));
}

/// Another thread's part in a model.
fn spawn<T: 'static>(
    breaker: &CircuitBreaker,
    part: impl FnOnce(&CircuitBreaker) -> T + 'static,
) -> thread::JoinHandle<T> {
    let breaker = breaker.clone();
    thread::spawn(move || part(&breaker))
}

/// C1
#[test]
fn of_two_who_come_when_the_open_period_is_over_one_is_the_probe() {
    explore(|| {
        let watched = due();
        let other = spawn(&watched.0, enter);
        let own = enter(&watched.0);
        let pass = match (own, other.join().unwrap()) {
            (Ok(pass), Err(Reason::Probing)) | (Err(Reason::Probing), Ok(pass)) => pass,
            both => panic!("{both:?}"),
        };
        leave(&watched.0, pass, SUCCESS);
        assert_eq!(watched.state(), Closed);
        watched.assert_heard(&[(Closed, Open), (Open, HalfOpen), (HalfOpen, Closed)]);
    });
}

/// C2
#[test]
fn a_probe_that_is_dropped_makes_room_for_exactly_one_other() {
    explore(|| {
        let watched = due();
        let probe = enter(&watched.0).unwrap();
        let others = [(); 2].map(|()| spawn(&watched.0, enter));
        watched.0.leave(probe, Outcome::NotStarted);
        let mut passes: Vec<Pass> = others.into_iter().filter_map(|other| other.join().unwrap().ok()).collect();
        assert_eq!(watched.state(), HalfOpen);
        passes.extend(enter(&watched.0));
        assert_eq!(passes.len(), 1);
        leave(&watched.0, passes.remove(0), SUCCESS);
        assert_eq!(watched.state(), Closed);
        watched.assert_heard(&[(Closed, Open), (Open, HalfOpen), (HalfOpen, Closed)]);
    });
}

/// C7: two failures, as many as the rule allows or one more, open it once.
fn assert_two_failures_open_once(builder: fn() -> BreakerBuilder) {
    explore(move || {
        let watched = watched(builder());
        let (one, two) = (enter(&watched.0).unwrap(), enter(&watched.0).unwrap());
        let other = spawn(&watched.0, |breaker| leave(breaker, one, FAILURE));
        leave(&watched.0, two, FAILURE);
        other.join().unwrap();
        assert_eq!(watched.state(), Open);
        watched.assert_heard(&[(Closed, Open)]);
        assert_eq!(watched.0.0.locked.lock().machine.generation(), 1);
    });
}

#[test]
fn two_failures_where_one_is_enough_open_it_once() {
    assert_two_failures_open_once(|| CircuitBreaker::builder().consecutive_failures(1));
}

#[test]
fn two_failures_in_a_row_open_it_once() {
    assert_two_failures_open_once(|| CircuitBreaker::builder().consecutive_failures(2));
}

#[test]
fn two_failures_of_the_last_two_calls_open_it_once() {
    assert_two_failures_open_once(|| CircuitBreaker::builder().failure_rate(1.0).over_calls(2).min_calls(2));
}

#[test]
fn two_failures_within_a_time_open_it_once() {
    assert_two_failures_open_once(|| CircuitBreaker::builder().failure_rate(1.0).over(LONG / 24).min_calls(2));
}

/// C6: a call from before the trip comes back while the probe is judged.
#[test]
fn a_late_success_from_before_the_trip_moves_nothing() {
    explore(|| {
        let watched = touchy();
        let late = enter(&watched.0).unwrap();
        fail_long_ago(&watched.0);
        let probe = enter(&watched.0).unwrap();
        let other = spawn(&watched.0, |breaker| leave(breaker, late, SUCCESS));
        leave(&watched.0, probe, FAILURE);
        other.join().unwrap();
        assert_eq!(watched.state(), Open);
        watched.assert_heard(&[(Closed, Open), (Open, HalfOpen), (HalfOpen, Open)]);
    });
}

/// C6: a probe of an earlier half-open comes back while that of the present one is out.
#[test]
fn a_late_probe_of_an_earlier_half_open_takes_no_place_and_has_no_vote() {
    explore(|| {
        let watched = due();
        let late = enter(&watched.0).unwrap();
        watched.0.reset();
        fail_long_ago(&watched.0);
        let probe = enter(&watched.0).unwrap();
        let other = spawn(&watched.0, |breaker| leave(breaker, late, FAILURE));
        assert_eq!(enter(&watched.0), Err(Reason::Probing));
        other.join().unwrap();
        assert_eq!(enter(&watched.0), Err(Reason::Probing));
        leave(&watched.0, probe, SUCCESS);
        assert_eq!(watched.state(), Closed);
    });
}

/// C6: what was in flight at a reset does not count after it.
#[test]
fn a_failure_that_races_a_reset_is_not_half_of_the_next_trip() {
    explore(|| {
        let watched = watched(CircuitBreaker::builder().consecutive_failures(2));
        let late = enter(&watched.0).unwrap();
        let other = spawn(&watched.0, |breaker| leave(breaker, late, FAILURE));
        watched.0.force_open();
        watched.0.reset();
        let pass = enter(&watched.0).unwrap();
        leave(&watched.0, pass, FAILURE);
        assert_eq!(watched.state(), Closed);
        other.join().unwrap();
        assert_eq!(watched.state(), Closed);
    });
}

/// C12
#[test]
fn forcing_it_open_wins_over_a_trip_in_either_order() {
    explore(|| {
        let watched = touchy();
        let pass = enter(&watched.0).unwrap();
        let other = spawn(&watched.0, |breaker| leave(breaker, pass, FAILURE));
        watched.0.force_open();
        other.join().unwrap();
        assert_eq!(watched.state(), ForcedOpen);
        assert_eq!(enter(&watched.0), Err(Reason::ForcedOpen));
        let tripped = watched.1.lock().unwrap().len() == 2;
        watched.assert_heard(if tripped { &[(Closed, Open), (Open, ForcedOpen)] } else { &[(Closed, ForcedOpen)] });
    });
}

/// C12
#[test]
fn forcing_it_open_wins_over_a_probe_that_goes_well() {
    explore(|| {
        let watched = due();
        let probe = enter(&watched.0).unwrap();
        let other = spawn(&watched.0, |breaker| leave(breaker, probe, SUCCESS));
        watched.0.force_open();
        other.join().unwrap();
        assert_eq!(watched.state(), ForcedOpen);
    });
}

#[test]
fn a_pass_from_before_a_trip_does_not_hold_after_it() {
    explore(|| {
        let watched = touchy();
        let (pass, failed) = (enter(&watched.0).unwrap(), enter(&watched.0).unwrap());
        let other = spawn(&watched.0, move |breaker| {
            let early = breaker.still(&pass, &Call::alone(1, true)).is_ok();
            (pass, early)
        });
        leave(&watched.0, failed, FAILURE);
        let (pass, _) = other.join().unwrap();
        let late = watched.0.still(&pass, &Call::alone(1, true)).map_err(|refusal| refusal.reason());
        assert_eq!(late, Err(Reason::CircuitOpen));
    });
}

#[test]
fn who_waits_for_a_state_misses_no_change() {
    explore(|| {
        let watched = touchy();
        let other = spawn(&watched.0, CircuitBreaker::force_open);
        block_on(watched.0.wait_for(ForcedOpen));
        other.join().unwrap();
    });
}
