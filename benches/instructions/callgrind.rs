//! Runs this program under callgrind and reads what it counted.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Runs this program's inner part under valgrind. Whenever the function with this name returns, the counts since the
/// last time are dumped into the folder.
pub fn count(folder: &Path, function: &str, args: &[&str]) -> Result<(), String> {
    let failed = |error: io::Error| error.to_string();
    let _not_there_yet = fs::remove_dir_all(folder);
    fs::create_dir_all(folder).map_err(failed)?;
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--compress-strings=no", "--compress-pos=no"])
        .arg(format!("--dump-after=*{function}*"))
        .arg(format!("--callgrind-out-file={}", folder.join("dump").display()))
        .arg(std::env::current_exe().map_err(failed)?)
        .args(args)
        .output()
        .map_err(|error| format!("valgrind can't be run: {error}"))?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

/// Whether there is a valgrind to run.
pub fn installed() -> bool {
    Command::new("valgrind").arg("--version").output().is_ok_and(|output| output.status.success())
}

/// Where the counts are that were dumped at the function's `nth` return, counted from 0.
pub fn dump(folder: &Path, nth: usize) -> PathBuf {
    folder.join(format!("dump.{}", nth + 1))
}

/// What was counted between two dumps.
#[derive(Default)]
pub struct Profile {
    pub instructions: u64,
    /// By name: the instructions of the function itself, what was inlined into it included.
    pub functions: HashMap<String, u64>,
    /// By name: how often it was called.
    pub calls: HashMap<String, u64>,
    /// By file and line, wherever it was inlined.
    pub lines: HashMap<(String, u64), u64>,
}

impl Profile {
    pub fn read(path: &Path) -> io::Result<Self> {
        Ok(Self::parse(&fs::read_to_string(path)?))
    }

    /// Callgrind's format, of which this much is needed: `fn=` begins a function, `fl=`, `fi=` and `fe=` say in which
    /// file the following lines are, and a line is its number and its count. After `cfn=` and `calls=` comes a line
    /// with what was counted in the callee, which is counted there.
    fn parse(text: &str) -> Self {
        let mut profile = Self::default();
        let (mut function, mut file, mut callee, mut in_callee) = ("", "", "", false);
        for line in text.lines() {
            match line.split_once('=') {
                Some(("fn", name)) => function = name,
                Some(("fl" | "fi" | "fe", name)) => file = name,
                Some(("cfn", name)) => callee = name,
                Some(("calls", calls)) => {
                    *profile.calls.entry(plain(callee).to_owned()).or_default() += numbers(calls).0;
                    in_callee = true;
                }
                None if line.starts_with(|first: char| first.is_ascii_digit()) => {
                    let (place, count) = numbers(line);
                    if !std::mem::take(&mut in_callee) {
                        profile.instructions += count;
                        *profile.functions.entry(function.to_owned()).or_default() += count;
                        *profile.lines.entry((file.to_owned(), place)).or_default() += count;
                    }
                }
                _ => {}
            }
        }
        profile
    }

    /// How often any of these functions was called.
    pub fn calls_of(&self, names: &[&str]) -> u64 {
        names.iter().filter_map(|name| self.calls.get(*name)).sum()
    }
}

/// `clock_gettime@@GLIBC_2.17` is `clock_gettime`, and `malloc'2` a recursion of `malloc`.
fn plain(name: &str) -> &str {
    name.split(['@', '\'']).next().unwrap_or(name)
}

/// The first two numbers of a line.
fn numbers(line: &str) -> (u64, u64) {
    let mut numbers = line.split(' ').map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}
