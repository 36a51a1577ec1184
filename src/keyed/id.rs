//! What a table knows of a key: 96 bits under a secret of the process, however long the key is.
//!
//! Keys come from outside, and whoever chooses them must not be able to choose where they lie. A number goes through
//! two rounds of a 64-bit mixer with secrets before, between and after, a bijection: two numbers never share an id. A text
//! is hashed twice by the standard library's `SipHash`, each time under a key of its own: that two of a million texts
//! share an id has a chance of 2^-56, and nobody outside can look for such a pair.

use std::fmt;
use std::hash::{BuildHasher, Hash, RandomState};
use std::net::IpAddr;

use crate::call::Key;
use crate::internal::rng::{entropy, mix};

/// A borrowed [`Key`]: a number, an address or a text.
///
/// What takes a key takes it as this, so that asking about a text copies nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum KeyRef<'a> {
    /// A number.
    Number(u64),
    /// A text.
    Text(&'a str),
    /// A number of 128 bits that needs more than 64, high half first.
    Wide([u64; 2]),
    /// An address.
    Ip(IpAddr),
}

impl KeyRef<'_> {
    /// The same as a key of its own.
    #[must_use]
    pub fn to_key(self) -> Key {
        match self {
            Self::Number(number) => Key::Number(number),
            Self::Text(text) => Key::from(text),
            Self::Wide(halves) => Key::Wide(halves),
            Self::Ip(address) => Key::Ip(address),
        }
    }
}

impl fmt::Display for KeyRef<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => fmt::Display::fmt(number, f),
            Self::Text(text) => fmt::Display::fmt(text, f),
            Self::Wide([high, low]) => fmt::Display::fmt(&(u128::from(*high) << 64 | u128::from(*low)), f),
            Self::Ip(address) => fmt::Display::fmt(address, f),
        }
    }
}

impl From<u64> for KeyRef<'_> {
    fn from(number: u64) -> Self {
        Self::Number(number)
    }
}

impl From<u32> for KeyRef<'_> {
    fn from(number: u32) -> Self {
        Self::Number(number.into())
    }
}

impl From<usize> for KeyRef<'_> {
    fn from(number: usize) -> Self {
        Self::Number(number as u64)
    }
}

/// A number that fits in 64 bits is the same key as that.
impl From<u128> for KeyRef<'_> {
    fn from(number: u128) -> Self {
        match (number >> 64) as u64 {
            0 => Self::Number(number as u64),
            high => Self::Wide([high, number as u64]),
        }
    }
}

/// An address of IPv4 that is written as IPv6 is the same key.
impl From<IpAddr> for KeyRef<'_> {
    fn from(address: IpAddr) -> Self {
        Self::Ip(address.to_canonical())
    }
}

impl<'a> From<&'a str> for KeyRef<'a> {
    fn from(text: &'a str) -> Self {
        Self::Text(text)
    }
}

impl<'a> From<&'a String> for KeyRef<'a> {
    fn from(text: &'a String) -> Self {
        Self::Text(text)
    }
}

impl<'a> From<&'a Key> for KeyRef<'a> {
    #[inline]
    fn from(key: &'a Key) -> Self {
        match key {
            Key::Number(number) => Self::Number(*number),
            Key::Text(text) => Self::Text(text),
            Key::Wide(halves) => Self::Wide(*halves),
            Key::Ip(address) => Self::Ip(address.to_canonical()),
        }
    }
}

/// The id of a key. `place` says where it lies; `rest` tells it from others that lie there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Id {
    pub(crate) place: u64,
    pub(crate) rest: u32,
}

/// The rest of a number, whose place says all; what is hashed has another bit set.
const NUMBER: u32 = 0;
const TEXT: u32 = 1;

/// What makes ids unforeseeable.
pub(crate) struct Secret {
    numbers: [u64; 3],
    texts: [RandomState; 2],
}

impl Secret {
    pub(crate) fn new() -> Self {
        Self { numbers: [entropy(), entropy(), entropy()], texts: [RandomState::new(), RandomState::new()] }
    }

    #[inline]
    pub(crate) fn id(&self, key: KeyRef<'_>) -> Id {
        match key {
            KeyRef::Number(number) => {
                let [a, b, c] = self.numbers;
                Id { place: mix(mix(number ^ a) ^ b) ^ c, rest: NUMBER }
            }
            KeyRef::Text(text) => self.hash(text),
            KeyRef::Wide(halves) => self.hash(halves),
            KeyRef::Ip(address) => self.hash(address),
        }
    }

    fn hash(&self, key: impl Hash + Copy) -> Id {
        let [place, rest] = &self.texts;
        Id { place: place.hash_one(key), rest: rest.hash_one(key) as u32 | TEXT }
    }
}

#[cfg(all(test, not(resile_loom)))]
mod tests {
    use super::*;

    /// Choices of keys that break weak hashes: runs, multiples of powers of two, single bits, one text in another.
    #[test]
    fn patterns_of_keys_spread_like_chance() {
        let secret = Secret::new();
        let numbers: [fn(u64) -> u64; 5] =
            [|n| n, |n| n << 40, u64::reverse_bits, |n| n.wrapping_mul(0x1_0000_0001), mix];
        let texts: [fn(u64) -> String; 4] = [
            |n| format!("tenant-{n}"),
            |n| (n << 32).to_string(),
            |n| "a".repeat(n as usize % 500) + &n.to_string(),
            |n| format!("{n:064b}"),
        ];
        let spread = |pattern: usize, ids: Vec<Id>| {
            for shift in [0, 8, 32, 58] {
                let mut bins = [0_u32; 64];
                for id in &ids {
                    bins[(id.place >> shift) as usize % 64] += 1;
                }
                // 1000 each, and five deviations.
                assert!(bins.iter().all(|n| n.abs_diff(1000) < 160), "pattern {pattern}, bit {shift}: {bins:?}");
            }
        };
        for (pattern, number) in numbers.iter().enumerate() {
            spread(pattern, (0..64_000).map(|n| secret.id(KeyRef::Number(number(n)))).collect());
        }
        for (pattern, text) in texts.iter().enumerate() {
            spread(pattern, (0..64_000).map(|n| secret.id(KeyRef::Text(&text(n)))).collect());
        }
    }

    #[test]
    fn a_number_is_never_a_text_and_the_secret_is_ones_own() {
        let (one, other) = (Secret::new(), Secret::new());
        assert_ne!(one.id(KeyRef::Number(7)), one.id(KeyRef::Text("7")));
        assert_ne!(one.id(KeyRef::Number(7)), other.id(KeyRef::Number(7)));
        assert_ne!(one.id(KeyRef::Text("7")), other.id(KeyRef::Text("7")));
        let huge = "x".repeat(1 << 20);
        assert_eq!(one.id(KeyRef::Text(&huge)), one.id(KeyRef::Text(&huge.clone())));
        assert_ne!(one.id(KeyRef::Text("")), one.id(KeyRef::Text(&huge)));
    }
}
