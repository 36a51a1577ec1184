//! [`Seldom`], an option that is nearly always `None`.

use std::mem::{self, ManuallyDrop};
use std::ops::{Deref, DerefMut};

/// An option whose drop costs one comparison when it is `None`.
///
/// The compiler's own drop of an option knows how to drop what is in it, and pays for that knowledge (a call, registers
/// saved) each time. A call under a policy has three such fields, and almost none has anything in them.
#[derive(Debug)]
pub(crate) struct Seldom<T>(ManuallyDrop<Option<T>>);

impl<T> Seldom<T> {
    pub(crate) const NONE: Self = Self(ManuallyDrop::new(None));
}

impl<T: Clone> Clone for Seldom<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Deref for Seldom<T> {
    type Target = Option<T>;

    #[inline]
    fn deref(&self) -> &Option<T> {
        &self.0
    }
}

impl<T> DerefMut for Seldom<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut Option<T> {
        &mut self.0
    }
}

impl<T> Drop for Seldom<T> {
    #[inline]
    fn drop(&mut self) {
        #[cold]
        #[inline(never)]
        fn forget<T>(value: &mut ManuallyDrop<Option<T>>) {
            drop(ManuallyDrop::into_inner(mem::replace(value, ManuallyDrop::new(None))));
        }
        if self.0.is_some() {
            forget(&mut self.0);
        }
    }
}

#[cfg(all(test, not(resile_loom)))]
mod tests {
    use std::rc::Rc;

    use super::*;

    #[test]
    fn what_is_in_it_is_dropped_once() {
        let value = Rc::new(());
        let mut seldom = Seldom::NONE;
        *seldom = Some(value.clone());
        assert_eq!(Rc::strong_count(&value), 2);
        drop(seldom);
        assert_eq!(Rc::strong_count(&value), 1);
    }
}
