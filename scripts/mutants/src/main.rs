//! Mutation testing of the machines: one small change at a time, and the tests have to notice it.
//!
//! ```text
//! cargo run --release --manifest-path scripts/mutants/Cargo.toml -- [--jobs N] [--again FILE] [PATH...]
//! ```
//!
//! A tool that builds the crate once for each change would need days here. This one compiles all changes into one
//! copy of the crate, each behind a switch that an environment variable turns on ([`instrument`]); finds out which
//! test reaches which switch ([`tests`]); and then runs, for each change, the tests that reach it, the quickest first,
//! until one fails. What no test notices is printed, unless `survivors.md` explains it; a survivor that is not
//! explained there makes the run fail. `--again` runs only the changes that such an output names.
//!
//! Left out: code under `cfg(test)` and the concurrency models, `const fn` (a constant can't ask a switch), the
//! inside of macros, and the order of atomic operations, which the models look at.

mod instrument;
mod tests;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Instant;
use std::{env, fs};

use anyhow::{Context, Result, bail, ensure};

use instrument::{Mutant, Source};
use tests::{Suite, Verdict};

/// What is changed if no path is given: the machines.
const PATHS: [&str; 8] =
    ["src/lane", "src/retry", "src/breaker", "src/semaphore", "src/scope", "src/drain", "src/cancel", "src/rate"];

struct Options {
    jobs: usize,
    /// An output of before.
    again: Option<String>,
    paths: Vec<String>,
}

fn options() -> Result<Options> {
    let mut options = Options { jobs: 2, again: None, paths: Vec::new() };
    let mut arguments = env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().with_context(|| format!("{argument} needs a value"));
        match argument.as_str() {
            "--jobs" => options.jobs = value()?.parse()?,
            "--again" => options.again = Some(fs::read_to_string(value()?)?),
            path if !path.starts_with('-') => options.paths.push(path.to_owned()),
            other => bail!("unknown option {other}"),
        }
    }
    if options.paths.is_empty() {
        options.paths = PATHS.map(str::to_owned).to_vec();
    }
    Ok(options)
}

fn main() -> Result<()> {
    let options = options()?;
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize()?;
    let work = root.join("target/mutants");
    let tree = work.join("tree");
    copy(&root, &tree)?;

    let mut sources = read(&root, &options.paths)?;
    let mutants = instrument::mutants(&mut sources);
    println!("{} changes in {} files", mutants.len(), sources.len());
    let excluded = instrument::compile(&tree, &work, &sources, &mutants)?;
    println!("{} of them don't compile", excluded.len());

    let suite = Suite::build(&tree, &work)?;
    println!("{} tests; looking which of them reaches which change", suite.len());
    let reached = suite.reach(&work, options.jobs)?;

    let chosen: Vec<&Mutant> = mutants
        .iter()
        .filter(|mutant| !excluded.contains(&mutant.id))
        .filter(|mutant| options.again.as_ref().is_none_or(|before| before.contains(&mutant.key())))
        .collect();
    let explained = explained(&root)?;
    let began = Instant::now();
    let queue = Mutex::new(chosen.iter().copied());
    let survivors = Mutex::new(Vec::new());
    let done = Mutex::new(0_usize);
    std::thread::scope(|scope| {
        for _ in 0..options.jobs {
            scope.spawn(|| {
                loop {
                    let Some(mutant) = queue.lock().expect("no thread panics").next() else { return };
                    let verdict = suite.judge(mutant.id, &reached);
                    if !matches!(verdict, Verdict::Noticed(_)) {
                        let known = explained.contains(&mutant.key());
                        println!("{}{verdict}: {mutant}", if known { "explained, " } else { "" });
                        survivors.lock().expect("no thread panics").push((known, mutant, verdict));
                    }
                    let mut done = done.lock().expect("no thread panics");
                    *done += 1;
                    if done.is_multiple_of(50) {
                        println!("   {done} of {} done, {} s", chosen.len(), began.elapsed().as_secs());
                    }
                }
            });
        }
    });

    let mut survivors = survivors.into_inner().expect("no thread panics");
    survivors.sort_by_key(|(_, mutant, _)| mutant.id);
    let unexplained = survivors.iter().filter(|(known, ..)| !known).count();
    println!("\n{} changes, {} not noticed, {unexplained} of these unexplained", chosen.len(), survivors.len());
    for (_, mutant, verdict) in survivors.iter().filter(|(known, ..)| !known) {
        println!("{verdict}: {mutant}");
    }
    ensure!(unexplained == 0, "tests are missing, or rows in scripts/mutants/survivors.md");
    Ok(())
}

/// Copies what git knows or would add, so that nothing is changed where people work.
fn copy(root: &Path, tree: &Path) -> Result<()> {
    let listed = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard", "-z"])
        .current_dir(root)
        .output()?;
    ensure!(listed.status.success(), "git ls-files failed");
    for name in String::from_utf8(listed.stdout)?.split('\0').filter(|name| !name.is_empty()) {
        let (from, to) = (root.join(name), tree.join(name));
        if let Ok(content) = fs::read(&from)
            && fs::read(&to).ok().as_ref() != Some(&content)
        {
            fs::create_dir_all(to.parent().context("a file lies in a folder")?)?;
            fs::write(&to, content)?;
        }
    }
    Ok(())
}

/// All Rust files at the paths.
fn read(root: &Path, paths: &[String]) -> Result<Vec<Source>> {
    let mut files: Vec<PathBuf> = Vec::new();
    let mut open: Vec<PathBuf> = paths.iter().map(|path| root.join(path)).collect();
    while let Some(path) = open.pop() {
        if path.is_dir() {
            for entry in fs::read_dir(&path)? {
                open.push(entry?.path());
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
        .into_iter()
        .filter(|file| file.file_name().is_none_or(|name| name != "loom.rs"))
        .map(|file| {
            let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
            Ok(Source { path: file.strip_prefix(root)?.to_owned(), text, edits: Vec::new() })
        })
        .collect()
}

/// The rows of the table of survivors, as the keys of their mutants: file, function and change.
fn explained(root: &Path) -> Result<BTreeSet<String>> {
    let table = root.join("scripts/mutants/survivors.md");
    let text = fs::read_to_string(&table).unwrap_or_default();
    Ok(text
        .lines()
        .filter_map(|line| {
            let mut cells = line.strip_prefix("| ")?.split(" | ");
            Some(format!("{} | {}", cells.next()?, cells.next()?))
        })
        .collect())
}
