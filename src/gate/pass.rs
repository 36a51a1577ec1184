//! What a call holds of a gate: a [`Pass`] once it is in, a [`Ticket`] while it waits.

/// Proof of having been let in: two words in which the gate notes what it needs to take it back.
///
/// Not `Clone`: a pass is given once and taken back once.
///
/// ```
/// # use std::sync::atomic::{AtomicU64, Ordering};
/// # use resile::{Call, Entry, Gate, Guard, Outcome, Pass};
/// /// Numbers its visitors.
/// struct Door(AtomicU64);
/// impl Gate for Door {
///     fn enter(&self, _: &Call) -> Entry {
///         Entry::Pass(Pass::new(self.0.fetch_add(1, Ordering::Relaxed), 0))
///     }
///     fn leave(&self, pass: Pass, _: Outcome) {
///         let [number, _] = pass.words();
///         assert_eq!(number, 7);
///     }
/// }
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// Guard::acquire(Door(AtomicU64::new(7))).await?.success();
/// # Ok(()) }
/// ```
#[derive(Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Pass([u64; 2]);

impl Pass {
    /// A pass with the gate's own notes.
    pub const fn new(a: u64, b: u64) -> Self {
        Self([a, b])
    }

    /// The notes.
    #[must_use]
    pub const fn words(&self) -> [u64; 2] {
        self.0
    }
}

/// A pass or a ticket on its way to its call: it goes back if user code panics before it gets there.
pub(crate) struct Underway<T, F: FnOnce(T)>(Option<(T, F)>);

impl<T, F: FnOnce(T)> Underway<T, F> {
    pub(crate) const fn new(it: T, back: F) -> Self {
        Self(Some((it, back)))
    }

    pub(crate) fn arrive(mut self) -> T {
        let (it, _) = self.0.take().expect("it is there until it arrives");
        it
    }
}

impl<T, F: FnOnce(T)> Drop for Underway<T, F> {
    fn drop(&mut self) {
        if let Some((it, back)) = self.0.take() {
            back(it);
        }
    }
}

/// A place in a gate's queue: two words of the gate's own.
///
/// ```
/// # use std::sync::Arc;
/// # use std::sync::atomic::{AtomicU32, Ordering};
/// # use std::task::Context;
/// # use std::time::Duration;
/// # use resile::{Call, Entry, Gate, Guard, Outcome, Pass, Ticket};
/// /// Opens when its time has come, and counts who waits for that.
/// struct Door(AtomicU32, resile::Moment);
/// impl Gate for Door {
///     fn enter(&self, _: &Call) -> Entry {
///         let number = self.0.fetch_add(1, Ordering::Relaxed);
///         Entry::Wait(Ticket::new(number.into(), 0), Some(self.1))
///     }
///     fn poll_wait(&self, ticket: Ticket, call: &Call, _: &mut Context<'_>) -> Entry {
///         if call.now() < self.1 {
///             return Entry::Wait(ticket, Some(self.1));
///         }
///         self.0.fetch_sub(1, Ordering::Relaxed);
///         Entry::Pass(Pass::default())
///     }
///     fn abandon(&self, _: Ticket) {
///         self.0.fetch_sub(1, Ordering::Relaxed);
///     }
///     fn leave(&self, _: Pass, _: Outcome) {}
/// }
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let door = Arc::new(Door(AtomicU32::new(0), resile::Moment::now() + Duration::from_secs(5)));
/// let waits = tokio::spawn(Guard::acquire(door.clone()));
/// let leaves = Guard::acquire(door.clone());
/// assert!(tokio::time::timeout(Duration::from_secs(1), leaves).await.is_err());
/// assert_eq!(door.0.load(Ordering::Relaxed), 1, "the other one has left");
/// waits.await??.success();
/// assert_eq!(door.0.load(Ordering::Relaxed), 0);
/// # Ok(()) }
/// ```
#[derive(Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Ticket([u64; 2]);

impl Ticket {
    /// A ticket with the gate's own notes.
    pub const fn new(a: u64, b: u64) -> Self {
        Self([a, b])
    }

    /// The notes.
    #[must_use]
    pub const fn words(&self) -> [u64; 2] {
        self.0
    }
}

/// What a step keeps in the lane while the call is further in, as the two words of its frame.
pub(crate) trait Framed {
    fn to_words(self) -> [u64; 2];
    fn from_words(words: [u64; 2]) -> Self;
}

macro_rules! framed {
    ($($name:ident),+) => {$(
        impl Framed for $name {
            #[inline]
            fn to_words(self) -> [u64; 2] {
                self.0
            }

            #[inline]
            fn from_words(words: [u64; 2]) -> Self {
                Self(words)
            }
        }
    )+};
}

framed!(Pass, Ticket);
