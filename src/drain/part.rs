//! A drain's gate with a name.

use std::fmt;

use super::Drain;
use super::names::UNNAMED;
use crate::call::Call;
use crate::error::{Name, Refusal};
use crate::gate::{Entry, Gate, Needs, Outcome, Pass};
use crate::guard::guarded;

/// A gate of a [`Drain`] whose passes have a name while they are out; from [`Drain::part`].
///
/// It lets in what the drain lets in, and refuses as it does. Its pass is the number of its entry in the register.
#[derive(Clone)]
pub struct DrainPart {
    drain: Drain,
    name: Name,
}

guarded!(DrainPart, "place, which is there as long as its drain is open");

impl DrainPart {
    pub(super) fn new(drain: Drain, name: Name) -> Self {
        Self { drain, name }
    }
}

impl Gate for DrainPart {
    fn enter(&self, call: &Call) -> Entry {
        let shared = &self.drain.0;
        if !shared.enter() {
            return Entry::Refused(self.drain.refuse());
        }
        let (name, now) = (self.name.clone(), call.now());
        let number = shared.names.lock().note(name, now);
        Entry::Pass(Pass::new(number, 0))
    }

    fn leave(&self, pass: Pass, _: Outcome) {
        let shared = &self.drain.0;
        let [number, _] = pass.words();
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

    fn still(&self, pass: &Pass, call: &Call) -> Result<(), Refusal> {
        self.drain.still(pass, call)
    }

    fn needs(&self) -> Needs {
        Needs::Nothing
    }

    fn name(&self) -> &str {
        self.name.as_str()
    }
}

impl fmt::Debug for DrainPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DrainPart").field("name", &self.name).field("drain", &self.drain).finish()
    }
}
