//! The word of a drain: its phase and how many are in flight, read and changed together.
//!
//! ```text
//! 63..62  61..0
//! phase   in flight
//! ```
//!
//! 1. The count goes up only while the phase is open, by one compare-and-swap on both: whoever was let in is counted by
//!    whoever closes, and a refusal writes nothing.
//! 2. The phase moves under the lock of the course only, by an addition that leaves the count alone. What it returns is
//!    how many were in flight at that very step.
//! 3. After closing, the count only goes down. It passes from one to zero once, and whoever takes it there wakes the
//!    driver.

use super::Phase;

const PHASE: u32 = 62;
const COUNT: u64 = (1 << PHASE) - 1;

/// A reading of the word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Word(pub(crate) u64);

impl Word {
    pub(crate) const fn phase(self) -> Phase {
        match self.0 >> PHASE {
            0 => Phase::Open,
            1 => Phase::Closing,
            2 => Phase::Cancelling,
            _ => Phase::Done,
        }
    }

    pub(crate) const fn in_flight(self) -> u64 {
        self.0 & COUNT
    }

    /// The word with one more in flight, if it is open. The count can't overflow: nobody can hold 2^62 passes.
    pub(crate) const fn enter(self) -> Option<Self> {
        if self.0 > COUNT { None } else { Some(Self(self.0 + 1)) }
    }

    /// Whether this, read as the word from before a leaving, says that a closing waited for just that.
    pub(crate) const fn was_last(self) -> bool {
        self.in_flight() == 1 && matches!(self.phase(), Phase::Closing | Phase::Cancelling)
    }

    /// What to add to the word so that it moves between two phases. Back to open it wraps around, as atomics do.
    pub(crate) const fn step(from: Phase, to: Phase) -> u64 {
        (to as u64).wrapping_sub(from as u64) << PHASE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PHASES: [Phase; 4] = [Phase::Open, Phase::Closing, Phase::Cancelling, Phase::Done];

    fn word(phase: Phase, in_flight: u64) -> Word {
        Word(Word::step(Phase::Open, phase) + in_flight)
    }

    #[test]
    fn a_step_changes_the_phase_and_leaves_the_count() {
        for from in PHASES {
            for to in PHASES {
                for count in [0, 1, COUNT] {
                    let moved = Word(word(from, count).0.wrapping_add(Word::step(from, to)));
                    assert_eq!((moved.phase(), moved.in_flight()), (to, count));
                }
            }
        }
    }

    #[test]
    fn only_an_open_word_lets_in() {
        for phase in PHASES {
            let entered = word(phase, 5).enter();
            assert_eq!(entered.map(Word::in_flight), (phase == Phase::Open).then_some(6));
        }
    }

    #[test]
    fn the_last_one_out_is_told_only_while_somebody_waits_for_it() {
        let told = PHASES.map(|phase| [word(phase, 1).was_last(), word(phase, 2).was_last()]);
        assert_eq!(told, [[false, false], [true, false], [true, false], [false, false]]);
    }
}
