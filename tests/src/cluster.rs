//! The system as separate processes over a real etcd.

use crate::{Etcd, OtlpReceiver, Process, binary, free_ports, repository};
use anyhow::Result;
use std::{path::PathBuf, process::Command, time::Duration};
use tempfile::TempDir;

/// One control plane, any number of gateways and workers, one etcd.
#[derive(Debug)]
pub struct Cluster {
    /// Gateways in the order they were started.
    pub gateways: Vec<GatewayProcess>,
    /// What gateways are started with beside their addresses.
    pub gateway_arguments: Vec<&'static str>,
    /// Workers in the order they were started.
    pub workers: Vec<WorkerProcess>,
    /// The control plane.
    pub control_plane: Process,
    /// The store.
    pub etcd: Etcd,
    /// Of gRPC and HTTP, and of operations.
    control_plane_ports: [u16; 2],
    control_plane_arguments: Vec<String>,
    environment: Vec<(&'static str, String)>,
    directory: TempDir,
}

/// A gateway.
#[derive(Debug)]
pub struct GatewayProcess {
    /// The process.
    pub process: Process,
    /// gRPC and HTTP port.
    pub port: u16,
    /// Operations port.
    pub ops: u16,
    state: PathBuf,
}

/// A worker.
#[derive(Debug)]
pub struct WorkerProcess {
    /// The process.
    pub process: Process,
    /// Inference port.
    pub port: u16,
    /// Operations port.
    pub ops: u16,
}

const PATIENCE: Duration = Duration::from_secs(40);

impl Cluster {
    /// Starts etcd and a control plane; every process exports to `otlp` if there is one.
    pub async fn start(otlp: Option<&OtlpReceiver>) -> Result<Self> {
        Self::start_with(otlp, &[]).await
    }

    /// As [`Cluster::start`], with more arguments for the control plane.
    pub async fn start_with(otlp: Option<&OtlpReceiver>, arguments: &[&str]) -> Result<Self> {
        let arguments: Vec<String> = arguments.iter().map(ToString::to_string).collect();
        let directory = tempfile::tempdir()?;
        let etcd = Etcd::start(directory.path()).await?;
        let environment = otlp.map(OtlpReceiver::environment).unwrap_or_default();
        let [port, ops] = free_ports()?;
        let control_plane = spawn_control_plane(
            [port, ops],
            &etcd.endpoint(),
            &arguments,
            &environment,
            directory.path(),
        )
        .await?;
        Ok(Self {
            gateways: Vec::new(),
            gateway_arguments: Vec::new(),
            workers: Vec::new(),
            control_plane,
            etcd,
            control_plane_ports: [port, ops],
            control_plane_arguments: arguments,
            environment,
            directory,
        })
    }

    /// Starts a control plane again on the ports of the one that ended, and waits until it is ready.
    pub async fn restart_control_plane(&mut self) -> Result<()> {
        self.control_plane = spawn_control_plane(
            self.control_plane_ports,
            &self.etcd.endpoint(),
            &self.control_plane_arguments,
            &self.environment,
            self.directory.path(),
        )
        .await?;
        Ok(())
    }

    /// Starts a worker and waits until it serves.
    pub async fn add_worker(&mut self, arguments: &[&str]) -> Result<()> {
        let [port, ops] = free_ports()?;
        let mut command = Command::new(binary("worker")?);
        command
            .envs(self.environment.clone())
            .args(["--listen", &local(port), "--ops-listen", &local(ops)])
            .args(["--etcd", &self.etcd.endpoint()])
            .args(arguments);
        let name = format!("worker-{}", self.workers.len());
        let mut process = Process::start(&name, command, self.directory.path())?;
        process
            .ready(&format!("http://127.0.0.1:{port}/readyz"), PATIENCE)
            .await?;
        self.workers.push(WorkerProcess { process, port, ops });
        Ok(())
    }

    /// Starts a gateway and waits until it can route.
    pub async fn add_gateway(&mut self) -> Result<()> {
        let [port, ops] = free_ports()?;
        let state = self
            .directory
            .path()
            .join(format!("gateway-{}", self.gateways.len()));
        let process = self.spawn_gateway(self.gateways.len(), port, ops, &state).await?;
        self.gateways.push(GatewayProcess {
            process,
            port,
            ops,
            state,
        });
        Ok(())
    }

    /// Kills gateway `index` and starts it again on its ports and state.
    pub async fn restart_gateway(&mut self, index: usize) -> Result<()> {
        let gateway = &mut self.gateways[index];
        gateway.process.kill()?;
        let (port, ops, state) = (gateway.port, gateway.ops, gateway.state.clone());
        self.gateways[index].process = self.spawn_gateway(index, port, ops, &state).await?;
        Ok(())
    }

    async fn spawn_gateway(
        &self,
        index: usize,
        port: u16,
        ops: u16,
        state: &std::path::Path,
    ) -> Result<Process> {
        let mut command = Command::new(binary("gateway")?);
        command
            .envs(self.environment.clone())
            .args(["--listen", &local(port), "--ops-listen", &local(ops)])
            .args(["--control-plane", &self.control_plane_address()])
            .arg("--state-dir")
            .arg(state)
            .args(&self.gateway_arguments);
        let mut process = Process::start(&format!("gateway-{index}"), command, self.directory.path())?;
        process
            .ready(&format!("http://127.0.0.1:{port}/readyz"), PATIENCE)
            .await?;
        Ok(process)
    }

    /// Runs `ctl` against this control plane and first gateway.
    pub async fn ctl(&self, arguments: &[&str]) -> Result<std::process::Output> {
        let mut command = tokio::process::Command::new(binary("ctl")?);
        command
            .envs(self.environment.clone())
            .env("PENSTOCK_CONTROL_PLANE", self.control_plane_address())
            .args(arguments)
            .kill_on_drop(true);
        if let Some(gateway) = self.gateways.first() {
            command.env("PENSTOCK_GATEWAY", format!("http://127.0.0.1:{}", gateway.port));
        }
        Ok(tokio::time::timeout(Duration::from_secs(60), command.output()).await??)
    }

    /// Address of the control plane.
    pub fn control_plane_address(&self) -> String {
        format!("http://127.0.0.1:{}", self.control_plane_ports[0])
    }
}

async fn spawn_control_plane(
    [port, ops]: [u16; 2],
    etcd: &str,
    arguments: &[String],
    environment: &[(&'static str, String)],
    directory: &std::path::Path,
) -> Result<Process> {
    let mut command = Command::new(binary("control-plane")?);
    command
        .envs(environment.iter().cloned())
        .args(["--listen", &local(port), "--ops-listen", &local(ops)])
        .args(["--etcd", etcd])
        .args(arguments);
    let mut process = Process::start("control-plane", command, directory)?;
    process
        .ready(&format!("http://127.0.0.1:{port}/readyz"), PATIENCE)
        .await?;
    Ok(process)
}

fn local(port: u16) -> String {
    format!("127.0.0.1:{port}")
}

/// `--model` arguments for revisions of the bundled demo model.
pub fn demo(revisions: &[&str]) -> Vec<String> {
    let models = repository().join("deploy/models/demo");
    revisions
        .iter()
        .flat_map(|revision| {
            [
                "--model".to_owned(),
                format!("demo@{revision}={}", models.join(revision).display()),
            ]
        })
        .collect()
}
