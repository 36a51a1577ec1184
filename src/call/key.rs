//! [`Key`]: by what a call can be told from others.

use std::sync::Arc;

/// The value of a key, such as a tenant's id: a number, or a text that is shared when cloned.
///
/// ```
/// # use resile::Key;
/// assert_eq!(Key::from(7_u32), Key::Number(7));
/// assert_eq!(Key::from("acme"), Key::Text("acme".into()));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Key {
    /// A number.
    Number(u64),
    /// A text.
    Text(Arc<str>),
}

impl From<u64> for Key {
    fn from(number: u64) -> Self {
        Self::Number(number)
    }
}

impl From<u32> for Key {
    fn from(number: u32) -> Self {
        Self::Number(number.into())
    }
}

impl From<&str> for Key {
    fn from(text: &str) -> Self {
        Self::Text(text.into())
    }
}

impl From<String> for Key {
    fn from(text: String) -> Self {
        Self::Text(text.into())
    }
}

impl From<&String> for Key {
    fn from(text: &String) -> Self {
        Self::Text(text.as_str().into())
    }
}

impl From<Arc<str>> for Key {
    fn from(text: Arc<str>) -> Self {
        Self::Text(text)
    }
}
