//! [`Key`]: by what a call can be told from others.

use std::net::IpAddr;
use std::sync::Arc;

use crate::keyed::KeyRef;

/// The value of a key, such as a tenant's id: a number, an address, or a text that is shared when cloned.
///
/// ```
/// # use resile::Key;
/// assert_eq!(Key::from(7_u32), Key::Number(7));
/// assert_eq!(Key::from("acme"), Key::Text("acme".into()));
/// assert_eq!(Key::from(7_u128), Key::Number(7), "a number is the same key, whatever its type");
/// let [four, six] = ["192.0.2.7", "::ffff:192.0.2.7"].map(|text| text.parse::<std::net::IpAddr>().unwrap());
/// assert_eq!(Key::from(four), Key::from(six));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Key {
    /// A number.
    Number(u64),
    /// A text.
    Text(Arc<str>),
    /// A number of 128 bits that needs more than 64, high half first.
    Wide([u64; 2]),
    /// An address. One of IPv4 that is written as IPv6 is the same.
    Ip(IpAddr),
}

impl From<usize> for Key {
    fn from(number: usize) -> Self {
        Self::Number(number as u64)
    }
}

/// A number that fits in 64 bits is the same key as that.
impl From<u128> for Key {
    fn from(number: u128) -> Self {
        KeyRef::from(number).to_key()
    }
}

impl From<IpAddr> for Key {
    fn from(address: IpAddr) -> Self {
        Self::Ip(address.to_canonical())
    }
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
