//! Where the frames of a call lie.

use crate::cancel::Wait;
use crate::gate::Framed;
use crate::internal::seldom::Seldom;
use crate::retry::Delays;
use crate::said::Waits;
use crate::step::Frame;

/// How many steps find room in the future itself; a policy with more allocates once per call.
const INLINE_STEPS: usize = 8;

/// What few calls need.
#[derive(Debug, Default)]
pub(super) struct Rare {
    /// The frames of a policy with more steps than find room.
    frames: Vec<Frame>,
    /// The delays of retries with a backoff of the user's own.
    pub(super) delays: Delays,
    /// The waits for what may cancel the call, once something was pending.
    pub(super) waits: Waits,
    /// The waits for the closing of drains that were passed, by their places, of a call that stands in a queue or sleeps.
    pub(super) closings: Vec<(usize, Wait)>,
}

/// The frames of a call, wherever they lie: nowhere until it begins.
#[derive(Debug)]
pub(super) struct Frames {
    inline: Option<[Frame; INLINE_STEPS]>,
    pub(super) rare: Seldom<Box<Rare>>,
}

impl Frames {
    #[inline]
    pub(super) const fn none() -> Self {
        Self { inline: None, rare: Seldom::NONE }
    }

    #[inline]
    pub(super) fn begin(&mut self, steps: usize) {
        if steps <= INLINE_STEPS {
            self.inline = Some([Frame::EMPTY; INLINE_STEPS]);
        } else {
            self.spill(steps);
        }
    }

    #[cold]
    fn spill(&mut self, steps: usize) {
        self.rare.get_or_insert_default().frames = vec![Frame::EMPTY; steps];
    }

    #[inline]
    pub(super) fn get(&mut self) -> &mut [Frame] {
        match (&mut self.inline, &mut *self.rare) {
            (Some(frames), _) => frames,
            (None, Some(rare)) => &mut rare.frames,
            (None, None) => &mut [],
        }
    }

    /// What the step at this place keeps.
    #[inline]
    pub(super) fn read<T: Framed>(&mut self, place: usize) -> T {
        self.get()[place].read()
    }

    #[inline]
    pub(super) fn write(&mut self, place: usize, content: impl Framed) {
        self.get()[place] = Frame::of(content);
    }
}
