//! A Postgres server of a test's own, and a connection that sees what the server does for the others.

use std::env;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tokio_postgres::{Client, Config, NoTls};

use super::ms;

/// The supervisor: it starts the server, waits for the end of its input, and removes everything.
const SUPERVISOR: &str = include_str!("postgres.sh");

const HOW_TO_GET_IT: &str = "`apt-get install postgresql` brings it, and so does `scripts/check tools`";

/// A server that only this test can reach. It is stopped and its files are removed on drop, in a panic too, and when
/// the test is killed.
#[derive(Debug)]
pub struct Postgres {
    supervisor: Child,
    /// Where its files are.
    pub directory: PathBuf,
}

impl Postgres {
    /// Starts a server and waits until it accepts connections.
    ///
    /// # Panics
    ///
    /// If there is none on this machine or it can't be started, saying why.
    pub fn start() -> Self {
        let programs = programs().unwrap_or_else(|| panic!("there is no PostgreSQL server: {HOW_TO_GET_IT}"));
        let mut command = Command::new("sh");
        command.args(["-c", SUPERVISOR, "postgres.sh"]).arg(programs);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        // A signal that is meant for the test and its group must not take the supervisor along: it is still to tidy up.
        command.process_group(0);
        if id(&["-u"]) == Some(0) {
            // The server refuses to be run by root.
            let ids = id(&["-u", "postgres"]).zip(id(&["-g", "postgres"]));
            let (user, group) = ids.unwrap_or_else(|| panic!("there is no user `postgres`: {HOW_TO_GET_IT}"));
            command.uid(user).gid(group);
        }
        let mut supervisor = command.spawn().expect("a shell can be started");
        let mut said = BufReader::new(supervisor.stdout.take().expect("its output is piped"));
        let mut line = String::new();
        said.read_line(&mut line).expect("it writes text");
        let Some(directory) = line.strip_prefix("ready ") else {
            said.read_to_string(&mut line).expect("it writes text");
            supervisor.wait().expect("it can be waited for");
            panic!("PostgreSQL can't be started:\n{line}");
        };
        Self { directory: directory.trim_end().into(), supervisor }
    }

    /// A connection, and the id of the server's process for it.
    pub async fn connect(&self) -> (Client, i32) {
        let mut config = Config::new();
        config.host_path(&self.directory).port(5432).user("postgres").dbname("postgres");
        let (client, connection) = config.connect(NoTls).await.expect("it accepts connections");
        tokio::spawn(connection);
        let pid = client.query_one("select pg_backend_pid()", &[]).await.expect("it answers").get(0);
        (client, pid)
    }

    /// A connection that looks at the others.
    pub async fn observe(&self) -> Observer {
        Observer(self.connect().await.0)
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = fs::read_to_string(self.directory.join("log"));
            eprintln!("the server's log:\n{}", log.unwrap_or_else(|error| error.to_string()));
        }
        drop(self.supervisor.stdin.take());
        let _ = self.supervisor.wait();
    }
}

/// Sees what the server does for its other connections.
pub struct Observer(pub Client);

impl Observer {
    /// What the server's process with this id does: its state, and the statement it has last begun. `None` once the
    /// process is gone.
    pub async fn sees(&self, pid: i32) -> Option<(String, String)> {
        let query = "select state, query from pg_stat_activity where pid = $1";
        let row = self.0.query_opt(query, &[&pid]).await.expect("the server answers")?;
        Some((row.get(0), row.get(1)))
    }

    /// Waits until the process is in a state, with a statement that has these words in it.
    ///
    /// # Panics
    ///
    /// If it isn't after some hundreds of looks.
    pub async fn until(&self, pid: i32, state: &str, words: &str) {
        self.look(pid, |seen| seen.is_some_and(|(is, statement)| is == state && statement.contains(words))).await;
    }

    /// Waits until the process is gone: the connection is closed and its transaction, if any, rolled back.
    ///
    /// # Panics
    ///
    /// If it isn't after some hundreds of looks.
    pub async fn until_gone(&self, pid: i32) {
        self.look(pid, |seen| seen.is_none()).await;
    }

    /// The server is not of this process: what it does can only be looked at again and again.
    async fn look(&self, pid: i32, wanted: impl Fn(Option<&(String, String)>) -> bool) {
        let mut seen = None;
        for _ in 0..500 {
            seen = self.sees(pid).await;
            if wanted(seen.as_ref()) {
                return;
            }
            tokio::time::sleep(ms(5)).await;
        }
        panic!("the server doesn't come to it; last seen: {seen:?}");
    }

    /// Lets a fifth of a second pass at the server, in which it could have been told of something.
    pub async fn pause(&self) {
        self.0.batch_execute("select pg_sleep(0.2)").await.expect("the server answers");
    }

    /// Has the server stop the statement of a process, which keeps its connection.
    pub async fn cancel(&self, pid: i32) {
        let row = self.0.query_one("select pg_cancel_backend($1)", &[&pid]).await.expect("the server answers");
        assert!(row.get::<_, bool>(0), "the server has no process {pid}");
    }
}

/// Where the server's programs are: in the search path, or where Debian keeps them out of it, the newest first.
fn programs() -> Option<PathBuf> {
    let complete =
        |directory: &PathBuf| ["initdb", "postgres", "pg_isready"].iter().all(|name| directory.join(name).is_file());
    let path = env::var_os("PATH").unwrap_or_default();
    let in_path = env::split_paths(&path).filter_map(|directory| {
        let program = fs::canonicalize(directory.join("postgres")).ok()?;
        program.parent().map(Path::to_owned)
    });
    let mut by_version: Vec<(u32, PathBuf)> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let entry = entry.ok()?;
            Some((entry.file_name().to_str()?.parse().ok()?, entry.path().join("bin")))
        })
        .collect();
    by_version.sort_unstable_by(|a, b| b.cmp(a));
    in_path.chain(by_version.into_iter().map(|(_, directory)| directory)).find(complete)
}

/// What `id` says, as a number.
fn id(arguments: &[&str]) -> Option<u32> {
    let output = Command::new("id").args(arguments).output().ok()?;
    String::from_utf8(output.stdout).ok()?.trim().parse().ok()
}
