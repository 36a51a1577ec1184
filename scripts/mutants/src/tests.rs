//! Which tests there are, which of them reaches which change, and whether one notices.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use std::{fmt, fs, thread};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// The test program that is left out: it starts a database for each test.
const LEFT_OUT: &str = "postgres";

/// One test program.
struct Binary {
    path: PathBuf,
    name: String,
}

/// All tests of the crate.
pub struct Suite {
    tree: PathBuf,
    binaries: Vec<Binary>,
    /// The program by its place in `binaries`, and the name of the test.
    tests: Vec<(usize, String)>,
}

/// For each change, the tests that reach it, the quickest first, and how long each takes.
pub type Reached = BTreeMap<u32, Vec<(Duration, usize)>>;

/// What became of a change.
pub enum Verdict {
    /// A test failed or hung.
    Noticed(&'static str),
    /// Tests reach it, and none fails.
    Survived(usize),
    /// No test reaches it.
    NotReached,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Noticed(how) => f.write_str(how),
            Self::Survived(tests) => write!(f, "survives {tests} tests"),
            Self::NotReached => f.write_str("not reached"),
        }
    }
}

impl Suite {
    pub fn build(tree: &Path, work: &Path) -> Result<Self> {
        let output = super::instrument::command(tree, work)
            .args(["test", "--no-run", "--lib", "--tests", "--message-format=json"])
            .stderr(Stdio::inherit())
            .output()?;
        ensure!(output.status.success(), "the tests of the changed crate don't build");
        let mut binaries = Vec::new();
        let mut tests = Vec::new();
        for line in String::from_utf8(output.stdout)?.lines() {
            let line: Value = serde_json::from_str(line)?;
            let name = line["target"]["name"].as_str().unwrap_or_default();
            let Some(path) = line["executable"].as_str() else { continue };
            if name == LEFT_OUT {
                continue;
            }
            let listed = Command::new(path).args(["--list", "--format", "terse"]).current_dir(tree).output()?;
            for test in String::from_utf8(listed.stdout)?.lines().filter_map(|line| line.strip_suffix(": test")) {
                tests.push((binaries.len(), test.to_owned()));
            }
            binaries.push(Binary { path: path.into(), name: name.to_owned() });
        }
        Ok(Self { tree: tree.to_owned(), binaries, tests })
    }

    pub fn len(&self) -> usize {
        self.tests.len()
    }

    /// A test program, stopped when it has used so much of a processor: another measure of a loop without end than
    /// the clock, which runs also while the machine does something else.
    fn command(&self, binary: usize, limit: Duration) -> Command {
        let mut command = Command::new("sh");
        command.arg("-c").arg(format!("ulimit -t {}; exec \"$0\" \"$@\"", limit.as_secs()));
        command.arg(&self.binaries[binary].path).current_dir(&self.tree).env("CARGO_MANIFEST_DIR", &self.tree);
        // Fewer random cases than usual: each change is met by many tests.
        command.env("RESILE_SEEDS", "1000").env("RUST_BACKTRACE", "0").env("PROPTEST_CASES", "128");
        command.arg("--test-threads=1").stdin(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// Runs each test alone, unchanged, and notes which switches it asks.
    pub fn reach(&self, work: &Path, jobs: usize) -> Result<Reached> {
        let covers = work.join("reach");
        let _ = fs::remove_dir_all(&covers);
        fs::create_dir_all(&covers)?;
        let queue = Mutex::new(self.tests.iter().enumerate());
        let reached = Mutex::new(Reached::new());
        let failed = Mutex::new(Vec::new());
        thread::scope(|scope| {
            for _ in 0..jobs {
                scope.spawn(|| {
                    loop {
                        let Some((number, (binary, test))) = queue.lock().expect("no thread panics").next() else {
                            return;
                        };
                        let cover = covers.join(number.to_string());
                        let began = Instant::now();
                        let status = self
                            .command(*binary, Duration::from_secs(300))
                            .args(["--exact", test])
                            .env("RESILE_COVER", &cover)
                            .stdout(Stdio::null())
                            .status();
                        let took = began.elapsed();
                        if !status.is_ok_and(|status| status.success()) {
                            failed.lock().expect("no thread panics").push(test.clone());
                            continue;
                        }
                        let seen = fs::read_to_string(&cover).unwrap_or_default();
                        let mut reached = reached.lock().expect("no thread panics");
                        for id in seen.lines().filter_map(|line| line.parse().ok()) {
                            reached.entry(id).or_default().push((took, number));
                        }
                    }
                });
            }
        });
        let failed = failed.into_inner()?;
        if !failed.is_empty() {
            println!("left out, since they fail without a change: {}", failed.join(", "));
        }
        let mut reached = reached.into_inner()?;
        reached.values_mut().for_each(|tests| tests.sort());
        Ok(reached)
    }

    /// Runs the tests that reach a change, with the change.
    pub fn judge(&self, id: u32, reached: &Reached) -> Verdict {
        let Some(tests) = reached.get(&id) else { return Verdict::NotReached };
        // One process for each program, those with the least to do first.
        let mut programs: BTreeMap<usize, (Duration, Vec<&str>)> = BTreeMap::new();
        for &(took, test) in tests {
            let (binary, name) = &self.tests[test];
            let (whole, names) = programs.entry(*binary).or_default();
            *whole += took;
            names.push(name);
        }
        let mut programs: Vec<_> = programs.into_iter().collect();
        programs.sort_by_key(|(_, (whole, _))| *whole);
        for (binary, (whole, names)) in programs {
            match self.run(binary, &names, id, whole * 3 + Duration::from_secs(3)) {
                Ok(Some(how)) => return Verdict::Noticed(how),
                Ok(None) => {}
                Err(error) => println!("{}: {error:#}", self.binaries[binary].name),
            }
        }
        Verdict::Survived(tests.len())
    }

    /// Whether one of the tests fails, or takes more of a processor than the limit.
    fn run(&self, binary: usize, names: &[&str], id: u32, limit: Duration) -> Result<Option<&'static str>> {
        let mut child = self
            .command(binary, limit)
            .arg("--exact")
            .args(names)
            .env("RESILE_MUTANT", id.to_string())
            .stdout(Stdio::piped())
            .spawn()?;
        let lines = BufReader::new(child.stdout.take().context("its output is piped")?).lines();
        let (failed, ended) = (AtomicBool::new(false), AtomicBool::new(false));
        let hung = thread::scope(|scope| {
            scope.spawn(|| {
                for line in lines.map_while(Result::ok) {
                    if line.starts_with("test ") && line.ends_with("FAILED") {
                        failed.store(true, Ordering::Release);
                        break;
                    }
                }
                ended.store(true, Ordering::Release);
            });
            // Who waits without end uses nothing.
            let (began, limit) = (Instant::now(), limit * 3);
            while !ended.load(Ordering::Acquire) && began.elapsed() < limit {
                thread::sleep(Duration::from_millis(5));
            }
            let hung = !ended.load(Ordering::Acquire);
            if hung || failed.load(Ordering::Acquire) {
                let _ = child.kill();
            }
            hung
        });
        let status = child.wait()?;
        Ok(match (hung, failed.load(Ordering::Acquire) || !status.success()) {
            (true, _) => Some("hung"),
            (false, true) => Some("failed"),
            (false, false) => None,
        })
    }
}
