//! The command line: `[--quick] [--seed N] [URL]`.

use std::num::ParseIntError;

pub const USAGE: &str = "usage: outbound [--quick] [--seed N] [URL]

  --quick   a short run, under 20 seconds
  --seed N  the dice of the server, a whole number; 1 if not given
  URL       call this http:// URL instead of starting a server";

const SEED: u64 = 1;

/// What was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arguments {
    pub quick: bool,
    pub seed: u64,
    pub url: Option<String>,
}

impl Arguments {
    /// Reads the arguments that follow the program's name; `None` if help was asked for.
    pub fn parse(given: impl IntoIterator<Item = String>) -> Result<Option<Self>, ArgumentError> {
        let mut arguments = Self { quick: false, seed: SEED, url: None };
        let mut given = given.into_iter();
        while let Some(argument) = given.next() {
            match argument.as_str() {
                "--help" | "-h" => return Ok(None),
                "--quick" => arguments.quick = true,
                "--seed" => {
                    let value = given.next().ok_or(ArgumentError::NoSeed)?;
                    arguments.seed = value.parse().map_err(|cause| ArgumentError::BadSeed { value, cause })?;
                }
                flag if flag.starts_with('-') => return Err(ArgumentError::Unknown(argument)),
                url => {
                    let plain = url.strip_prefix("http://").is_some_and(|rest| !rest.is_empty());
                    if !plain || reqwest::Url::parse(url).is_err() {
                        return Err(ArgumentError::BadUrl(argument));
                    }
                    if arguments.url.replace(argument.clone()).is_some() {
                        return Err(ArgumentError::SecondUrl(argument));
                    }
                }
            }
        }
        Ok(Some(arguments))
    }
}

/// An argument that makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArgumentError {
    #[error("--seed needs a number after it")]
    NoSeed,
    #[error("--seed takes a whole number, not {value:?}: {cause}")]
    BadSeed { value: String, cause: ParseIntError },
    #[error("unknown argument {0:?}")]
    Unknown(String),
    #[error("{0:?} is not an http:// URL")]
    BadUrl(String),
    #[error("one URL is enough, {0:?} is the second")]
    SecondUrl(String),
}
