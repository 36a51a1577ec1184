//! A drain's gate with a name.

use std::fmt;
use std::sync::Arc;

use super::Drain;
use super::names::UNNAMED;
use crate::call::Call;
use crate::error::{Name, Refusal};
use crate::gate::{Entry, FastGate, Gate, Needs, Outcome, Pass, by_reference};
use crate::guard::guarded;
use crate::internal::time::Moment;

/// A gate of a [`Drain`] whose passes have a name while they are out; from [`Drain::part`].
///
/// A cheap handle. It lets in what the drain lets in, and refuses as it does. Its pass is the number of its entry in the
/// register of names.
#[derive(Clone)]
pub struct DrainPart(Arc<Part>);

struct Part {
    drain: Drain,
    name: Name,
}

by_reference!(DrainPart);
guarded!(DrainPart, "place");

impl DrainPart {
    pub(super) fn new(drain: Drain, name: Name) -> Self {
        Self(Arc::new(Part { drain, name }))
    }

    pub(crate) fn drain(&self) -> &Drain {
        &self.0.drain
    }

    fn give_back(&self, number: u64) {
        let shared = &self.0.drain.0;
        let before = if number == UNNAMED {
            shared.leave()
        } else {
            // Under the lock of the names, so that a report finds the name of whoever it counts.
            let mut names = shared.names.lock();
            names.forget(number);
            shared.leave()
        };
        if before.was_last() {
            shared.wake_driver();
        }
    }
}

impl FastGate for DrainPart {
    const REVALIDATES: bool = true;

    /// Its name is noted under a lock.
    fn enter_now(&self, _: u32, _: Moment) -> Option<Pass> {
        None
    }
}

impl Gate for DrainPart {
    fn enter(&self, call: &Call) -> Entry {
        let Part { drain, name } = &*self.0;
        if !drain.0.enter() {
            return Entry::Refused(drain.refuse());
        }
        let (name, now) = (name.clone(), call.now());
        let number = drain.0.names.lock().note(name, now);
        Entry::Pass(Pass::new(number, 0))
    }

    fn leave(&self, pass: Pass, _: Outcome) {
        let [number, _] = pass.words();
        self.give_back(number);
    }

    fn still(&self, pass: &Pass, call: &Call) -> Result<(), Refusal> {
        self.0.drain.still(pass, call)
    }

    fn needs(&self) -> Needs {
        Needs::Nothing
    }

    fn name(&self) -> &str {
        self.0.name.as_str()
    }
}

impl fmt::Debug for DrainPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DrainPart").field("name", &self.0.name).field("drain", &self.0.drain).finish()
    }
}
