//! Child processes.

use anyhow::{Context as _, Result, bail, ensure};
use std::{
    fs::File,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// A child process that is killed when its handle is dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command`; its output goes to `{name}.log` in `directory`.
    pub fn start(name: &str, mut command: Command, directory: &Path) -> Result<Self> {
        let log = directory.join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot start {:?}", command.get_program()))?;
        Ok(Self {
            name: name.into(),
            child,
            log,
        })
    }

    /// Everything the process has printed so far.
    pub fn output(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until `url` answers 200, for `patience` at most.
    pub async fn ready(&mut self, url: &str, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.child.try_wait()? {
                bail!(
                    "{} ended with {status} before {url} was ready:\n{}",
                    self.name,
                    self.output()
                );
            }
            if let Ok(reply) = crate::get(url).await
                && reply.status == 200
            {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "{} not ready at {url} after {patience:?}:\n{}",
                self.name,
                self.output()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Asks the process to end (SIGTERM).
    pub fn terminate(&self) -> Result<()> {
        self.signal(rustix::process::Signal::TERM)
    }

    /// Asks the process to end the way Ctrl-C does (SIGINT).
    pub fn interrupt(&self) -> Result<()> {
        self.signal(rustix::process::Signal::INT)
    }

    /// Ends the process at once (SIGKILL).
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Waits for the process to end by itself, for `patience` at most.
    pub async fn ended(&mut self, patience: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            ensure!(
                Instant::now() < deadline,
                "{} still runs after {patience:?}:\n{}",
                self.name,
                self.output()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn signal(&self, signal: rustix::process::Signal) -> Result<()> {
        let id = i32::try_from(self.child.id())?;
        let id = rustix::process::Pid::from_raw(id).context("process id 0")?;
        Ok(rustix::process::kill_process(id, signal)?)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The process may be gone already; either way nothing is left behind.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let output = self.output();
            let from = output.len().saturating_sub(6000);
            let tail = output.get(from..).unwrap_or(&output);
            eprintln!("---- {} ----\n{tail}", self.name);
        }
    }
}

/// Repeats `check` until it returns `Some`, for `patience` at most; `what` names it in the error.
pub async fn eventually<T, F>(what: &str, patience: Duration, mut check: impl FnMut() -> F) -> Result<T>
where
    F: Future<Output = Result<Option<T>>>,
{
    let deadline = Instant::now() + patience;
    loop {
        let last = check().await;
        if let Ok(Some(value)) = last {
            return Ok(value);
        }
        if Instant::now() > deadline {
            last.with_context(|| format!("{what} did not happen within {patience:?}"))?;
            bail!("{what} did not happen within {patience:?}");
        }
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
}

/// Path of one of the project's binaries, beside this test's own.
pub fn binary(name: &str) -> Result<PathBuf> {
    let test = std::env::current_exe()?;
    let profile = test
        .ancestors()
        .nth(2)
        .context("test binaries lie in target/PROFILE/deps")?;
    let path = profile.join(name);
    ensure!(
        path.exists(),
        "{} is not built; run `cargo build --workspace --bins`",
        path.display()
    );
    Ok(path)
}

/// Root of the checkout.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The Python that has the clients of `tests/clients/requirements.txt`.
pub fn python() -> Result<PathBuf> {
    #[allow(clippy::disallowed_methods)]
    let home = std::env::var("PENSTOCK_TEST_PYTHON")
        .context("PENSTOCK_TEST_PYTHON is not set; run the tests with `bash tests/run.sh`")?;
    Ok(PathBuf::from(home))
}

/// `N` ports that were free a moment ago.
pub fn free_ports<const N: usize>() -> Result<[u16; N]> {
    free(1)
}

/// `N` ports that were free a moment ago, each with the next one.
pub fn free_port_pairs<const N: usize>() -> Result<[u16; N]> {
    free(2)
}

/// `N` first ports of `width` free ones in a row. They lie below those that the system gives to connections and to
/// whoever asks for any port: tests that run beside this one take such at any time.
fn free<const N: usize>(width: u16) -> Result<[u16; N]> {
    const FIRST: u32 = 10_240;
    const COUNT: u32 = 20_000;
    // Where this search begins: another place in each process and at each call.
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.subsec_nanos();
    let begin = now.rotate_right(7) ^ std::process::id().wrapping_mul(7919);
    let mut ports = [0; N];
    let mut found = 0;
    // All are held until all are known, so that they differ.
    let mut held = Vec::new();
    for step in 0..COUNT {
        let Some(port) = ports.get_mut(found) else {
            break;
        };
        let first = u16::try_from(FIRST + begin.wrapping_add(step) % COUNT)?;
        let row: Result<Vec<_>, _> = (first..first + width)
            .map(|number| TcpListener::bind(("127.0.0.1", number)))
            .collect();
        if let Ok(row) = row {
            held.push(row);
            *port = first;
            found += 1;
        }
    }
    ensure!(found == N, "no {N} free ports from {FIRST} on");
    Ok(ports)
}
