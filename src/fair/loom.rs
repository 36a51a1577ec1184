//! Models of the line: a place at the limit that is handed on while others come and go.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use loom::thread;

use super::Fair;
use crate::call::{Call, Key};
use crate::gate::{Entry, Gate, Outcome};
use crate::loom::{explore, wait};
use crate::semaphore::Semaphore;

fn call(tenant: u64) -> Call {
    let mut call = Call::alone(1, true);
    call.set_key("tenant", Key::Number(tenant));
    call
}

/// Enters, waiting as a task does, and leaves.
fn pass_by(fair: &Fair<Semaphore>, tenant: u64, inside: &AtomicU32) {
    let call = call(tenant);
    let pass = match fair.enter(&call) {
        Entry::Pass(pass) => pass,
        Entry::Wait(ticket, _) => wait(fair, &call, ticket).unwrap(),
        Entry::Refused(refusal) => panic!("{refusal}"),
    };
    assert_eq!(inside.fetch_add(1, Relaxed), 0);
    inside.fetch_sub(1, Relaxed);
    fair.leave(pass, Outcome::NotStarted);
}

/// A wake-up that is lost would end as a deadlock.
#[test]
fn three_who_take_turns_are_all_served() {
    explore(|| {
        let fair = Fair::by("tenant", Semaphore::permits(1)).build().unwrap();
        let inside = Arc::new(AtomicU32::new(0));
        let others: Vec<_> = [1, 2]
            .map(|tenant| {
                let (fair, inside) = (fair.clone(), inside.clone());
                thread::spawn(move || pass_by(&fair, tenant, &inside))
            })
            .into();
        pass_by(&fair, 1, &inside);
        others.into_iter().for_each(|other| other.join().unwrap());
        assert_eq!((fair.limit().in_use(), fair.limit().queued(), fair.queued()), (0, 0, 0));
    });
}

/// One leaves the place at the limit while the permit comes and another stands in line.
#[test]
fn a_place_that_is_given_up_is_handed_on() {
    explore(|| {
        let fair = Fair::by("tenant", Semaphore::permits(1)).build().unwrap();
        let Entry::Pass(held) = fair.enter(&call(1)) else { panic!("it is free") };
        let Entry::Wait(first, _) = fair.enter(&call(1)) else { panic!("it is taken") };
        let other = fair.clone();
        let thread = thread::spawn(move || pass_by(&other, 2, &AtomicU32::new(0)));
        fair.leave(held, Outcome::NotStarted);
        fair.abandon(first);
        thread.join().unwrap();
        assert_eq!((fair.limit().in_use(), fair.limit().queued(), fair.queued()), (0, 0, 0));
    });
}
