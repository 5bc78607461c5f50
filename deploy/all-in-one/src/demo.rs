//! The bundled demo model: embedded in the binary, so that the quick start needs no other file.

use anyhow::{Context as _, Result};
use penstock_client::{AdminClient, AdminError, v1};
use penstock_plan::Ppm;
use std::{
    fs,
    path::{Path, PathBuf},
};

/// Name of the bundled model.
pub(crate) const MODEL: &str = "demo";

/// Revisions served at the start; `v3` is unpacked beside them for the operator to publish.
pub(crate) const SERVED: [&str; 2] = ["v1", "v2"];

type File = (&'static str, &'static [u8]);

macro_rules! revision {
    ($name:literal) => {
        revision!($name: "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    };
    ($name:literal: $($file:literal),*) => {
        ($name, &[$(($file, include_bytes!(concat!("../../models/demo/", $name, "/", $file)) as &[u8])),*])
    };
}

const REVISIONS: &[(&str, &[File])] = &[revision!("v1"), revision!("v2"), revision!("v3")];

/// Writes the bundled checkpoints below `data_dir`, unless they are there already.
///
/// Returns the directory that holds one directory per revision.
pub(crate) fn unpack(data_dir: &Path) -> Result<PathBuf> {
    let root = data_dir.join("models").join(MODEL);
    for (revision, files) in REVISIONS {
        let directory = root.join(revision);
        fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
        for (name, content) in *files {
            write(&directory.join(name), content)?;
        }
    }
    Ok(root)
}

/// The demo's rollout in words; created with v1 stable and v2 at 0 % if there is none yet.
pub(crate) async fn rollout(admin: &AdminClient) -> Result<String, AdminError> {
    let status = match admin.get_rollout(MODEL).await {
        Ok(status) => status,
        Err(AdminError::NotFound(_)) => {
            admin
                .create_rollout(v1::CreateRolloutRequest {
                    model: MODEL.into(),
                    stable: SERVED[0].into(),
                    canary: SERVED[1].into(),
                    canary_ppm: Some(0),
                    actor: "quick start".into(),
                    ..v1::CreateRolloutRequest::default()
                })
                .await?;
            admin.get_rollout(MODEL).await?
        }
        Err(error) => return Err(error),
    };
    let rollout = status.rollout.unwrap_or_default();
    let share = Ppm::new(rollout.canary_ppm).unwrap_or_default();
    Ok(format!(
        "{MODEL}: stable {}, canary {} at {share}",
        rollout.stable, rollout.canary
    ))
}

fn write(path: &Path, content: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|present| present == content) {
        return Ok(());
    }
    // Rename is atomic: a start that is cut off leaves no half file behind.
    let part = path.with_extension("part");
    fs::write(&part, content)
        .and_then(|()| fs::rename(&part, path))
        .with_context(|| format!("cannot write {}", path.display()))
}
