//! A real etcd.

use crate::{Process, free_ports};
use anyhow::{Context as _, Result};
use std::{path::Path, process::Command, time::Duration};

/// One etcd member with a data directory of its own.
#[derive(Debug)]
pub struct Etcd {
    process: Process,
    client: u16,
    peer: u16,
    directory: std::path::PathBuf,
}

impl Etcd {
    /// Starts etcd and waits until it answers.
    pub async fn start(directory: &Path) -> Result<Self> {
        let [client, peer] = free_ports()?;
        let process = spawn(directory, client, peer).await?;
        Ok(Self {
            process,
            client,
            peer,
            directory: directory.to_owned(),
        })
    }

    /// Client address.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.client)
    }

    /// Ends etcd at once (SIGKILL).
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }

    /// Starts it again on the same data and ports.
    pub async fn restart(&mut self) -> Result<()> {
        self.process = spawn(&self.directory, self.client, self.peer).await?;
        Ok(())
    }
}

async fn spawn(directory: &Path, client: u16, peer: u16) -> Result<Process> {
    let client_url = format!("http://127.0.0.1:{client}");
    let peer_url = format!("http://127.0.0.1:{peer}");
    let mut command = Command::new("etcd");
    command
        .arg("--data-dir")
        .arg(directory.join("etcd"))
        .args(["--name", "test", "--log-level", "warn"])
        .args([
            "--listen-client-urls",
            &client_url,
            "--advertise-client-urls",
            &client_url,
        ])
        .args([
            "--listen-peer-urls",
            &peer_url,
            "--initial-advertise-peer-urls",
            &peer_url,
        ])
        .args(["--initial-cluster", &format!("test={peer_url}")]);
    let mut process = Process::start("etcd", command, directory)
        .context("etcd is needed (Debian: apt-get install etcd-server)")?;
    process
        .ready(&format!("{client_url}/health"), Duration::from_secs(20))
        .await?;
    Ok(process)
}
