//! How a scope and its children ended.

use std::any::Any;
use std::fmt;
use std::panic::resume_unwind;

use parking_lot::Mutex;

use crate::cancel::CancelReason;

/// How a child of a [`Scope`](crate::Scope) ended.
#[non_exhaustive]
pub enum ChildEnd<T, E> {
    /// With a value.
    Done(T),
    /// With an error.
    Failed(E),
    /// With a panic.
    Panicked(ChildPanic),
    /// It was dropped before its end, or never polled.
    Cancelled(CancelReason),
    /// It failed after the scope, or something around it, was cancelled: the error is an effect of that.
    CancelledWith(CancelReason, E),
    /// It was to be dropped, but never came to an await, and was left behind.
    Stuck,
}

impl<T, E> ChildEnd<T, E> {
    /// The value, if it has one.
    #[must_use]
    pub fn value(&self) -> Option<&T> {
        match self {
            Self::Done(value) => Some(value),
            _ => None,
        }
    }

    /// The value itself, if it has one.
    #[must_use]
    pub fn into_value(self) -> Option<T> {
        match self {
            Self::Done(value) => Some(value),
            _ => None,
        }
    }

    /// The error, if it failed, by itself or as an effect of a cancellation.
    #[must_use]
    pub fn error(&self) -> Option<&E> {
        match self {
            Self::Failed(error) | Self::CancelledWith(_, error) => Some(error),
            _ => None,
        }
    }

    /// Whether it was cut short: cancelled, also with an error as the effect, or stuck.
    #[must_use]
    pub const fn is_cut(&self) -> bool {
        matches!(self, Self::Cancelled(_) | Self::CancelledWith(..) | Self::Stuck)
    }

    /// Whether its result is missing: it was cut short or panicked. A child that failed by itself has a result.
    pub(super) const fn is_missing(&self) -> bool {
        self.is_cut() || matches!(self, Self::Panicked(_))
    }
}

/// Values are not shown, so that they need not be able to.
impl<T, E: fmt::Debug> fmt::Debug for ChildEnd<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done(_) => f.write_str("Done"),
            Self::Failed(error) => f.debug_tuple("Failed").field(error).finish(),
            Self::Panicked(panic) => f.debug_tuple("Panicked").field(&panic.message()).finish(),
            Self::Cancelled(reason) => f.debug_tuple("Cancelled").field(reason).finish(),
            Self::CancelledWith(reason, error) => f.debug_tuple("CancelledWith").field(reason).field(error).finish(),
            Self::Stuck => f.write_str("Stuck"),
        }
    }
}

/// The panic of a child, as a value.
pub struct ChildPanic(Mutex<Box<dyn Any + Send>>);

impl ChildPanic {
    pub(super) fn new(payload: Box<dyn Any + Send>) -> Self {
        Self(Mutex::new(payload))
    }

    /// What it said, if that was text.
    #[must_use]
    pub fn message(&self) -> Option<String> {
        let payload = self.0.lock();
        let text = payload.downcast_ref::<&str>().copied();
        text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).map(str::to_owned)
    }

    /// What it was thrown with.
    ///
    /// ```
    /// # use resile::{ChildEnd, Scope};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// let mut scope = Scope::<(), ()>::new();
    /// scope.spawn(async { std::panic::panic_any(42_u32) });
    /// let Some((0, ChildEnd::Panicked(panic))) = scope.next().await else { unreachable!() };
    /// assert_eq!(panic.message(), None, "that was no text");
    /// assert_eq!(*panic.into_payload().downcast::<u32>().unwrap(), 42);
    /// # }
    /// ```
    #[must_use]
    pub fn into_payload(self) -> Box<dyn Any + Send> {
        self.0.into_inner()
    }
}

impl fmt::Debug for ChildPanic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ChildPanic").field(&self.message()).finish()
    }
}

/// How all children of a [`Scope`](crate::Scope) ended; as an error, that not every one is done.
///
/// ```
/// use resile::Scope;
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() {
/// let mut scope = Scope::new();
/// scope.spawn(async { Ok(1) });
/// scope.spawn(async { Err("no") });
/// let end = scope.join().await.unwrap_err();
/// assert_eq!(end.to_string(), "child 1 of 2 failed");
/// assert_eq!(end.into_values(), [1]);
/// # }
/// ```
pub struct ScopeEnd<T, E> {
    children: Vec<ChildEnd<T, E>>,
    /// Where in `children` the first is that failed or panicked.
    first: Option<usize>,
    reason: Option<CancelReason>,
    /// Whether there would have been more children.
    cut: bool,
}

impl<T, E> ScopeEnd<T, E> {
    pub(super) const fn new(
        children: Vec<ChildEnd<T, E>>,
        first: Option<usize>,
        reason: Option<CancelReason>,
        cut: bool,
    ) -> Self {
        Self { children, first, reason, cut }
    }

    /// How each ended, in the order in which they were spawned, without those that [`next`](crate::Scope::next) has
    /// reported before.
    #[must_use]
    pub fn children(&self) -> &[ChildEnd<T, E>] {
        &self.children
    }

    /// The same by value.
    #[must_use]
    pub fn into_children(self) -> Vec<ChildEnd<T, E>> {
        self.children
    }

    /// What was made, in the order in which it was asked for. If the whole [is partial](Self::is_partial), this is a part;
    /// [`into_result`](Self::into_result) has all values or none.
    #[must_use]
    pub fn into_values(self) -> Vec<T> {
        self.children.into_iter().filter_map(ChildEnd::into_value).collect()
    }

    /// Which child was the first to fail or to panic by itself, and so ended the scope unless that keeps going. An error
    /// that is only the effect of a cancellation does not count.
    ///
    /// A panic counts as well, but has no error:
    ///
    /// ```
    /// # use resile::Scope;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// let mut scope = Scope::<(), &str>::new();
    /// scope.spawn(std::future::pending());
    /// scope.spawn(async { panic!("a bug") });
    /// let end = scope.wait().await;
    /// assert_eq!((end.first(), end.first_error()), (Some(1), None));
    /// # }
    /// ```
    #[must_use]
    pub const fn first(&self) -> Option<usize> {
        self.first
    }

    /// The error of the first child that failed; `None` if none did, or if a panic was first.
    #[must_use]
    pub fn first_error(&self) -> Option<&E> {
        self.children.get(self.first?)?.error()
    }

    /// Why the scope was cancelled; `None` if it was not.
    #[must_use]
    pub const fn reason(&self) -> Option<&CancelReason> {
        self.reason.as_ref()
    }

    /// Whether something is missing: children were cancelled, failed as an effect of that, panicked, or were never started.
    /// A child that failed by itself has run to its end.
    ///
    /// ```
    /// # use resile::Scope;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// let mut scope = Scope::<u32, &str>::new().keep_going();
    /// scope.spawn(async { Err("no") });
    /// assert!(!scope.wait().await.is_partial(), "it failed, but at its own end");
    ///
    /// let mut scope = Scope::<u32, &str>::new();
    /// scope.spawn(std::future::pending());
    /// scope.cancel_with("enough");
    /// assert!(scope.wait().await.is_partial());
    /// # }
    /// ```
    #[must_use]
    pub fn is_partial(&self) -> bool {
        self.cut || self.children.iter().any(ChildEnd::is_missing)
    }

    /// All values, if all children are done.
    ///
    /// # Errors
    ///
    /// Itself, if not.
    ///
    /// # Panics
    ///
    /// If a child panicked, its panic goes on here.
    ///
    /// ```
    /// # use resile::Scope;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// let mut scope = Scope::<u32, &str>::new();
    /// scope.spawn(async { Ok(1) });
    /// let end = scope.wait().await;
    /// assert_eq!(end.to_string(), "0 of 1 children did not finish");
    /// assert_eq!(end.into_result().unwrap(), [1]);
    /// # }
    /// ```
    pub fn into_result(mut self) -> Result<Vec<T>, Self> {
        if let Some(at) = self.children.iter().position(|end| matches!(end, ChildEnd::Panicked(_))) {
            if let ChildEnd::Panicked(panic) = self.children.swap_remove(at) {
                resume_unwind(panic.into_payload());
            }
        }
        if self.cut || self.children.iter().any(|end| end.value().is_none()) {
            return Err(self);
        }
        Ok(self.into_values())
    }
}

impl<T, E: fmt::Debug> fmt::Debug for ScopeEnd<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ScopeEnd")
            .field("children", &self.children)
            .field("first", &self.first)
            .field("reason", &self.reason)
            .finish_non_exhaustive()
    }
}

impl<T, E> fmt::Display for ScopeEnd<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = self.children.len();
        if let Some(first) = self.first {
            return write!(f, "child {first} of {of} failed");
        }
        let cut = self.children.iter().filter(|end| end.is_cut()).count();
        write!(f, "{cut} of {of} children did not finish")?;
        match &self.reason {
            Some(reason) => write!(f, ": {reason}"),
            None => Ok(()),
        }
    }
}

impl<T, E: std::error::Error + 'static> std::error::Error for ScopeEnd<T, E> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.first_error().map(|error| error as _)
    }
}
