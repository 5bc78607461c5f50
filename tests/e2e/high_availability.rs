//! Three etcd members and three control planes: leaders and members are killed, and nothing is lost or done twice.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result};
use penstock_tests::{Process, binary, demo, eventually, free_ports};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(60);

/// The whole system, by its processes.
struct Fleet {
    members: Vec<Member>,
    control_planes: Vec<Option<ControlPlane>>,
    _worker: Process,
    _gateway: Process,
    directory: tempfile::TempDir,
}

struct Member {
    process: Option<Process>,
    name: String,
    client: u16,
    peer: u16,
}

struct ControlPlane {
    process: Process,
    port: u16,
}

fn local(port: u16) -> String {
    format!("127.0.0.1:{port}")
}

impl Fleet {
    async fn start() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let ports: [u16; 6] = free_ports()?;
        let mut members: Vec<Member> = (0..3)
            .map(|at| Member {
                process: None,
                name: format!("m{at}"),
                client: ports[at],
                peer: ports[at + 3],
            })
            .collect();
        let cluster: Vec<String> = members
            .iter()
            .map(|member| format!("{}=http://{}", member.name, local(member.peer)))
            .collect();
        for member in &mut members {
            member.start(directory.path(), &cluster.join(","))?;
        }
        for member in &mut members {
            member.ready().await?;
        }
        let etcd: Vec<String> = members
            .iter()
            .map(|member| format!("http://{}", local(member.client)))
            .collect();
        let etcd = etcd.join(",");
        let mut control_planes = Vec::new();
        for at in 0..3 {
            control_planes.push(Some(ControlPlane::start(at, &etcd, directory.path()).await?));
        }
        let [worker, worker_ops, gateway, gateway_ops] = free_ports()?;
        let mut command = Command::new(binary("worker")?);
        command
            .args([
                "--listen",
                &local(worker),
                "--ops-listen",
                &local(worker_ops),
                "--etcd",
                &etcd,
            ])
            .args(["--runner", "fake"])
            .args(demo(&["v1", "v2"]));
        let mut worker_process = Process::start("worker", command, directory.path())?;
        worker_process
            .ready(&format!("http://{}/readyz", local(worker)), PATIENCE)
            .await?;
        let mut command = Command::new(binary("gateway")?);
        command.args(["--listen", &local(gateway), "--ops-listen", &local(gateway_ops)]);
        for control_plane in control_planes.iter().flatten() {
            command.args([
                "--control-plane",
                &format!("http://{}", local(control_plane.port)),
            ]);
        }
        command.arg("--state-dir").arg(directory.path().join("gateway"));
        let mut gateway_process = Process::start("gateway", command, directory.path())?;
        gateway_process
            .ready(&format!("http://{}/readyz", local(gateway)), PATIENCE)
            .await?;
        Ok(Self {
            members,
            control_planes,
            _worker: worker_process,
            _gateway: gateway_process,
            directory,
        })
    }

    /// Runs `ctl` against the first control plane that answers as the leader.
    async fn ctl(&self, arguments: &[&str]) -> Result<(i32, String)> {
        let mut last = (5, "no control plane is left".to_owned());
        for control_plane in self.control_planes.iter().flatten() {
            last = control_plane.ctl(arguments).await?;
            if last.0 != 5 {
                break;
            }
        }
        Ok(last)
    }

    async fn json(&self, arguments: &[&str]) -> Result<Value> {
        let (code, said) = self.ctl(arguments).await?;
        anyhow::ensure!(code == 0, "{arguments:?}: {code}: {said}");
        Ok(serde_json::from_str(&said)?)
    }

    /// Kills the control plane that leads: the one that takes changes.
    async fn kill_the_leader(&mut self) -> Result<()> {
        let leader = self.leader().await?;
        let mut killed = self.control_planes[leader].take().context("a leader")?;
        killed.process.kill()
    }

    async fn leader(&self) -> Result<usize> {
        let leads = || async {
            for (at, control_plane) in self.control_planes.iter().enumerate() {
                let Some(control_plane) = control_plane else {
                    continue;
                };
                // Only a leader takes a change, even one that changes nothing.
                let (code, _) = control_plane
                    .ctl(&["rollout", "pause", "demo", "--dry-run"])
                    .await?;
                if code == 0 {
                    return Ok(Some(at));
                }
            }
            Ok(None)
        };
        eventually("a leader", PATIENCE, leads).await
    }

    async fn phase(&self) -> Result<String> {
        let rollout = self.json(&["rollout", "get", "demo", "-o", "json"]).await?;
        Ok(rollout["phase"].as_str().unwrap_or_default().to_owned())
    }

    async fn until(&self, phase: &str) -> Result<()> {
        let reached = || async { Ok(self.phase().await.ok().filter(|now| now == phase)) };
        eventually(&format!("phase {phase}"), PATIENCE, reached)
            .await
            .map(drop)
    }
}

impl Member {
    fn start(&mut self, directory: &Path, cluster: &str) -> Result<()> {
        let (client, peer) = (
            format!("http://{}", local(self.client)),
            format!("http://{}", local(self.peer)),
        );
        let mut command = Command::new("etcd");
        command
            .arg("--data-dir")
            .arg(directory.join(&self.name))
            .args([
                "--name",
                &self.name,
                "--log-level",
                "error",
                "--initial-cluster",
                cluster,
            ])
            .args([
                "--listen-client-urls",
                &client,
                "--advertise-client-urls",
                &client,
            ])
            .args([
                "--listen-peer-urls",
                &peer,
                "--initial-advertise-peer-urls",
                &peer,
            ]);
        self.process = Some(Process::start(&self.name, command, directory)?);
        Ok(())
    }

    async fn ready(&mut self) -> Result<()> {
        let url = format!("http://{}/health", local(self.client));
        let process = self.process.as_mut().context("a member that runs")?;
        process.ready(&url, PATIENCE).await
    }
}

impl ControlPlane {
    async fn start(at: usize, etcd: &str, directory: &Path) -> Result<Self> {
        let [port, ops] = free_ports()?;
        let mut command = Command::new(binary("control-plane")?);
        command.args([
            "--listen",
            &local(port),
            "--ops-listen",
            &local(ops),
            "--etcd",
            etcd,
        ]);
        let mut process = Process::start(&format!("control-plane-{at}"), command, directory)?;
        process
            .ready(&format!("http://{}/readyz", local(port)), PATIENCE)
            .await?;
        Ok(Self { process, port })
    }

    async fn ctl(&self, arguments: &[&str]) -> Result<(i32, String)> {
        let mut command = tokio::process::Command::new(binary("ctl")?);
        command
            .env("PENSTOCK_CONTROL_PLANE", format!("http://{}", local(self.port)))
            .args(arguments)
            .kill_on_drop(true);
        let output = tokio::time::timeout(PATIENCE, command.output()).await??;
        let said = match output.status.success() {
            true => output.stdout,
            false => output.stderr,
        };
        Ok((
            output.status.code().unwrap_or(-1),
            String::from_utf8_lossy(&said).into_owned(),
        ))
    }
}

/// The shares that the audit log says were set, oldest first.
async fn shares(fleet: &Fleet) -> Result<Vec<String>> {
    let audit = fleet.json(&["audit", "--limit", "500", "-o", "json"]).await?;
    let records = audit["records"].as_array().context("records")?.iter().rev();
    let changes = records.filter_map(|record| record["change"].as_str());
    let share = |change: &str| {
        let at = change.find("share ")?;
        Some(change[at..].split(", ").next()?.to_owned())
    };
    Ok(changes.filter_map(share).collect())
}

#[tokio::test]
async fn leaders_and_members_die_and_each_step_is_taken_once() -> Result<()> {
    let mut fleet = Fleet::start().await?;
    let plan = fleet.directory.path().join("plan.yaml");
    fs::write(
        &plan,
        "kind: Rollout\nmodel: demo\nstable: v1\ncanary: {revision: v2}\nsteps:\n\
         - {canary: 1%, hold: 4s}\n- {canary: 5%, hold: 8s}\n- {canary: 25%, hold: 1s}\n- {canary: 100%, bake: 1s}\n",
    )?;
    fleet.leader_for_a_first_rollout().await?;
    let (code, said) = fleet
        .ctl(&["rollout", "apply", "-f", &plan.display().to_string(), "--no-wait"])
        .await?;
    assert_eq!(code, 0, "{said}");

    // The leader dies while the first step is held, the next one while the second is.
    fleet.until("soaking").await?;
    fleet.kill_the_leader().await?;
    let second = || async {
        let rollout = fleet.json(&["rollout", "get", "demo", "-o", "json"]).await.ok();
        Ok(rollout.filter(|rollout| rollout["share"] == "5%" && rollout["phase"] == "soaking"))
    };
    eventually("the second step", PATIENCE, second).await?;
    fleet.kill_the_leader().await?;
    // One member of three is no loss.
    fleet.members[0].process.as_mut().unwrap().kill()?;
    fleet.until("succeeded").await?;
    let expected = [
        "share 0% → 1%",
        "share 1% → 5%",
        "share 5% → 25%",
        "share 25% → 100%",
    ];
    assert_eq!(shares(&fleet).await?, expected, "each step exactly once");

    // Without a majority nothing is changed, and it is said; traffic is another test's. With one it goes on.
    fleet.members[1].process.as_mut().unwrap().kill()?;
    let (code, said) = fleet
        .ctl(&["rollout", "undo", "demo", "-y", "--no-wait", "--timeout", "5s"])
        .await?;
    assert!(matches!(code, 5 | 8), "{code}: {said}");
    let cluster: Vec<String> = fleet
        .members
        .iter()
        .map(|member| format!("{}=http://{}", member.name, local(member.peer)))
        .collect();
    fleet.members[1].start(fleet.directory.path(), &cluster.join(","))?;
    fleet.members[1].ready().await?;
    let undone = || async {
        let (code, said) = fleet.ctl(&["rollout", "undo", "demo", "-y", "--no-wait"]).await?;
        Ok((code == 0).then_some(said))
    };
    eventually("a change after the majority is back", PATIENCE, undone).await?;
    fleet.until("succeeded").await
}

impl Fleet {
    /// A leader that knows both revisions.
    async fn leader_for_a_first_rollout(&self) -> Result<()> {
        let known = || async {
            let models = self.json(&["model", "list", "-o", "json"]).await.ok();
            Ok(models.filter(|models| models.to_string().contains("\"v2\"")))
        };
        eventually("both revisions", PATIENCE, known).await.map(drop)
    }
}
