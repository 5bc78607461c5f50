//! Processes on a core of their own, and what the kernel says of them.

use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

/// Ticks in a second, in which the kernel tells CPU time to user space (USER_HZ).
const TICKS: f64 = 100.0;
const START_LIMIT: Duration = Duration::from_secs(60);

/// A process that ends with this value.
#[derive(Debug)]
pub(crate) struct Running(Child);

impl Running {
    /// Starts a program on one core; what it says goes into a file of the directory.
    pub(crate) fn start(core: usize, command: &Command, directory: &Path, name: &str) -> Result<Self> {
        let log = std::fs::File::create(directory.join(format!("{name}.log")))?;
        let mut pinned = Command::new("taskset");
        pinned
            .args(["-c", &core.to_string()])
            .arg(command.get_program())
            .args(command.get_args());
        for (variable, value) in command.get_envs() {
            match value {
                Some(value) => pinned.env(variable, value),
                None => pinned.env_remove(variable),
            };
        }
        let child = pinned
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {name}: {:?}", command.get_program()))?;
        Ok(Self(child))
    }

    /// Waits until it listens.
    pub(crate) fn listens(&mut self, address: SocketAddr, log: &Path) -> Result<()> {
        let began = Instant::now();
        while TcpStream::connect(address).is_err() {
            if let Some(status) = self.0.try_wait()? {
                bail!("it ended with {status}: {}", std::fs::read_to_string(log)?);
            }
            if began.elapsed() > START_LIMIT {
                bail!("{address} is not served: {}", std::fs::read_to_string(log)?);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// CPU time that its threads have used, in seconds.
    pub(crate) fn cpu(&self) -> Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id()))?;
        // The name, in parentheses, may hold anything; fields 14 and 15 of proc(5) are utime and stime.
        let fields = stat.rsplit_once(") ").context("/proc/PID/stat has no name")?.1;
        let ticks = fields.split(' ').skip(11).take(2).map(str::parse::<u64>);
        Ok(ticks.sum::<Result<u64, _>>()? as f64 / TICKS)
    }

    /// The most memory that it has had resident, in MiB.
    pub(crate) fn peak_rss(&self) -> Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line
            .and_then(|line| line.split_whitespace().next())
            .context("no VmHWM")?;
        Ok(kib.parse::<f64>()? / 1024.0)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Ports that nobody listens on.
pub(crate) fn free_ports<const N: usize>() -> Result<[SocketAddr; N]> {
    let mut listeners = Vec::new();
    for _ in 0..N {
        listeners.push(TcpListener::bind("127.0.0.1:0")?);
    }
    let addresses: Result<Vec<_>, _> = listeners.iter().map(TcpListener::local_addr).collect();
    addresses?
        .try_into()
        .map_err(|_| anyhow::anyhow!("too few ports"))
}

/// Binds this process to a core.
pub(crate) fn pin(core: usize) -> Result<()> {
    let id = std::process::id().to_string();
    let status = Command::new("taskset")
        .args(["-pc", &core.to_string(), &id])
        .stdout(Stdio::null())
        .status()
        .context("cannot run taskset (util-linux)")?;
    anyhow::ensure!(status.success(), "taskset cannot bind to core {core}");
    Ok(())
}
