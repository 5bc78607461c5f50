//! The all-in-one as a new user starts it, on ports and data of its own.

use crate::{Process, binary, eventually, free_port_pairs};
use anyhow::{Context as _, Result, ensure};
use std::{io::Write as _, path::Path, process::Command, time::Duration};

/// `penstock` with everything in one process.
#[derive(Debug)]
pub struct QuickStart {
    /// The process.
    pub process: Process,
    /// Gateway port.
    pub gateway: u16,
    /// Control plane port.
    pub control_plane: u16,
}

impl QuickStart {
    /// Starts `penstock` on `data_dir` and waits for its banner.
    pub async fn start(data_dir: &Path, arguments: &[&str]) -> Result<Self> {
        let mut started = Self::spawn(data_dir, arguments)?;
        let url = format!("http://127.0.0.1:{}/readyz", started.gateway);
        started.process.ready(&url, Duration::from_secs(60)).await?;
        let process = &started.process;
        let shown = || async { Ok(process.output().contains("Penstock is up.").then_some(())) };
        eventually("the banner", Duration::from_secs(30), shown).await?;
        Ok(started)
    }

    /// Starts `penstock` without waiting.
    pub fn spawn(data_dir: &Path, arguments: &[&str]) -> Result<Self> {
        let ports: [u16; 3] = free_port_pairs()?;
        Self::spawn_on(ports, data_dir, arguments)
    }

    /// Starts `penstock` on given gateway, control plane and worker ports, without waiting.
    pub fn spawn_on(ports: [u16; 3], data_dir: &Path, arguments: &[&str]) -> Result<Self> {
        let [gateway, control_plane, worker] = ports;
        let mut command = Command::new(binary("penstock")?);
        command
            .arg("--data-dir")
            .arg(data_dir)
            .args(["--listen", &format!("127.0.0.1:{gateway}")])
            .args(["--control-plane-listen", &format!("127.0.0.1:{control_plane}")])
            .args(["--worker-listen", &format!("127.0.0.1:{worker}")])
            .args(arguments);
        let process = Process::start("penstock", command, data_dir)?;
        Ok(Self {
            process,
            gateway,
            control_plane,
        })
    }

    /// Runs `penstock ctl`.
    pub async fn ctl(&self, arguments: &[&str]) -> Result<std::process::Output> {
        let mut command = tokio::process::Command::new(binary("penstock")?);
        command
            .arg("ctl")
            .args(arguments)
            .env(
                "PENSTOCK_CONTROL_PLANE",
                format!("http://127.0.0.1:{}", self.control_plane),
            )
            .env("PENSTOCK_GATEWAY", format!("http://127.0.0.1:{}", self.gateway))
            .kill_on_drop(true);
        Ok(tokio::time::timeout(Duration::from_secs(60), command.output()).await??)
    }

    /// Ends the rollout that a new start begins with, so that a test can begin its own.
    pub async fn make_room(&self) -> Result<()> {
        self.succeed(&["rollout", "abort", "demo", "--reason", "makes room"])
            .await
    }

    /// Applies a plan.
    pub async fn apply(&self, plan: &str) -> Result<()> {
        let mut file = tempfile::NamedTempFile::with_suffix(".yaml")?;
        file.write_all(plan.as_bytes())?;
        let path = file.path().to_str().context("a temporary path is text")?;
        self.succeed(&["rollout", "apply", "-f", path]).await
    }

    async fn succeed(&self, arguments: &[&str]) -> Result<()> {
        let output = self.ctl(arguments).await?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "ctl {arguments:?}: {said}");
        Ok(())
    }
}
