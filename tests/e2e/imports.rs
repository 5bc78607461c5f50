//! The import graph is part of the design: who may import whom. Any other edge fails here.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::BTreeMap, process::Command};

/// Workspace crate → workspace crates it may depend on (README, "Architecture").
const ALLOWED: &[(&str, &[&str])] = &[
    ("penstock-kv", &[]),
    ("penstock-text", &[]),
    ("penstock-grammar", &[]),
    ("penstock-kernels", &[]),
    ("penstock-telemetry", &[]),
    ("penstock-analysis", &[]),
    ("penstock-plan", &["penstock-analysis"]),
    ("penstock-demo-model", &[]),
    ("penstock-proto", &["penstock-plan"]),
    ("penstock-model", &["penstock-kernels"]),
    (
        "penstock-engine",
        &[
            "penstock-model",
            "penstock-kernels",
            "penstock-kv",
            "penstock-grammar",
        ],
    ),
    ("penstock-store", &["penstock-plan"]),
    ("penstock-client", &["penstock-proto", "penstock-plan"]),
    (
        "control-plane",
        &[
            "penstock-proto",
            "penstock-analysis",
            "penstock-plan",
            "penstock-store",
            "penstock-telemetry",
        ],
    ),
    (
        "ctl",
        &[
            "penstock-client",
            "penstock-analysis",
            "penstock-plan",
            "penstock-proto",
            "penstock-telemetry",
        ],
    ),
    (
        "gateway",
        &[
            "penstock-proto",
            "penstock-analysis",
            "penstock-plan",
            "penstock-client",
            "penstock-telemetry",
        ],
    ),
    (
        "worker",
        &[
            "penstock-proto",
            "penstock-plan",
            "penstock-store",
            "penstock-client",
            "penstock-engine",
            "penstock-grammar",
            "penstock-text",
            "penstock-model",
            "penstock-telemetry",
        ],
    ),
    (
        "penstock",
        &[
            "control-plane",
            "gateway",
            "worker",
            "ctl",
            "penstock-store",
            "penstock-client",
            "penstock-plan",
            "penstock-telemetry",
        ],
    ),
];

#[test]
fn no_crate_imports_what_the_design_forbids() {
    let allowed: BTreeMap<&str, &[&str]> = ALLOWED.iter().copied().collect();
    for (name, dependencies) in workspace() {
        if name == "penstock-tests" {
            continue;
        }
        let Some(allowed) = allowed.get(name.as_str()) else {
            panic!("{name} is not in the import graph: add it here and to README's architecture section");
        };
        for dependency in dependencies {
            assert!(
                allowed.contains(&dependency.as_str()),
                "{name} must not import {dependency}"
            );
        }
    }
}

#[test]
fn only_the_kernels_may_be_unsafe() {
    for (name, manifest) in manifests() {
        let text = std::fs::read_to_string(&manifest).unwrap();
        let inherits = text.contains("[lints]\nworkspace = true");
        assert_eq!(
            inherits,
            name != "penstock-kernels",
            "{name}: lints come from the workspace, save for the kernels"
        );
    }
}

/// Every workspace crate with the workspace crates it depends on (dev-dependencies left out).
fn workspace() -> Vec<(String, Vec<String>)> {
    let metadata = metadata();
    let packages = metadata["packages"].as_array().unwrap();
    let names: Vec<&str> = packages.iter().map(|p| p["name"].as_str().unwrap()).collect();
    packages
        .iter()
        .map(|package| {
            let dependencies = package["dependencies"].as_array().unwrap();
            let own = dependencies
                .iter()
                .filter(|d| d["kind"].as_str() != Some("dev"))
                .map(|d| d["name"].as_str().unwrap().to_owned())
                .filter(|name| names.contains(&name.as_str()))
                .collect();
            (package["name"].as_str().unwrap().to_owned(), own)
        })
        .collect()
}

fn manifests() -> Vec<(String, String)> {
    let metadata = metadata();
    let packages = metadata["packages"].as_array().unwrap();
    packages
        .iter()
        .map(|p| {
            (
                p["name"].as_str().unwrap().to_owned(),
                p["manifest_path"].as_str().unwrap().to_owned(),
            )
        })
        .collect()
}

fn metadata() -> serde_json::Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(penstock_tests::repository())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}
