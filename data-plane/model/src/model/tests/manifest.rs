use crate::manifest_digest;

#[test]
fn the_digest_depends_on_the_files_that_count_and_on_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, content: &str| std::fs::write(dir.path().join(name), content).unwrap();
    write("config.json", "{}");
    write("model.safetensors", "weights");
    let first = manifest_digest(dir.path()).unwrap();
    assert_eq!(first.len(), 64);
    write("README.md", "about it");
    assert_eq!(manifest_digest(dir.path()).unwrap(), first);
    write("model.safetensors", "Weights");
    let second = manifest_digest(dir.path()).unwrap();
    assert_ne!(second, first);
    write("tokenizer.json", "{}");
    assert_ne!(manifest_digest(dir.path()).unwrap(), second);
    write("model.safetensors", "weights");
    std::fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    assert_eq!(manifest_digest(dir.path()).unwrap(), first);
    write("model-q4.gguf", "weights");
    assert_ne!(manifest_digest(dir.path()).unwrap(), first);
}

#[test]
fn a_directory_that_is_not_there_is_named() {
    let error = manifest_digest(std::path::Path::new("/nowhere/at/all")).unwrap_err();
    assert!(error.to_string().contains("/nowhere/at/all"));
}
