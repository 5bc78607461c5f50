//! Real clients: the OpenAI Python client, and a grpcio client generated from reflection.

use anyhow::Result;
use penstock_tests::{QuickStart, python, repository};
use std::time::Duration;

async fn run(script: &str, penstock: &QuickStart) -> Result<()> {
    let mut command = tokio::process::Command::new(python()?.join("bin/python"));
    command
        .arg(repository().join("tests/clients").join(script))
        .arg(format!("127.0.0.1:{}", penstock.gateway))
        .kill_on_drop(true);
    let output = tokio::time::timeout(Duration::from_secs(120), command.output()).await??;
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(
        output.status.success(),
        "{script}:\n{said}\n{}",
        penstock.process.output()
    );
    Ok(())
}

#[tokio::test]
async fn the_openai_client_chats_and_streams() -> Result<()> {
    let data = tempfile::tempdir()?;
    let penstock = QuickStart::start(data.path(), &[]).await?;
    run("openai_client.py", &penstock).await
}

#[tokio::test]
async fn a_grpcio_client_generated_from_reflection_streams() -> Result<()> {
    let data = tempfile::tempdir()?;
    let penstock = QuickStart::start(data.path(), &[]).await?;
    run("grpc_reflection_client.py", &penstock).await
}
