use crate::source::Source;

#[test]
fn sources_are_shown_as_the_uris_that_give_them_again() {
    for (value, shown) in [
        ("/models/demo", "/models/demo"),
        ("relative/dir", "relative/dir"),
        ("file:///models/my%20demo", "/models/my demo"),
        ("hf://owner/name", "hf://owner/name"),
        ("hf://owner/name@refs/pr/1", "hf://owner/name@refs/pr/1"),
        ("hf://owner/name/q4.gguf@v1.0", "hf://owner/name/q4.gguf@v1.0"),
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("s3://bucket/q4.gguf", "s3://bucket/q4.gguf"),
        ("https://host", "https://host/"),
        ("https://Host:8443/a/../b", "https://host:8443/b/"),
        ("https://host/a/q4.gguf", "https://host/a/q4.gguf"),
        ("http://127.0.0.1:80/a/", "http://127.0.0.1/a/"),
        ("http://[::1]:9/", "http://[::1]:9/"),
    ] {
        let source: Source = value.parse().unwrap();
        assert_eq!(source.to_string(), shown);
        assert_eq!(shown.parse(), Ok(source));
    }
}

#[test]
fn other_sources_are_refused_with_the_value_the_reason_and_the_forms() {
    for (value, reason) in [
        ("", "empty"),
        ("ftp://host/a", "scheme is unknown"),
        ("gs://bucket/a", "scheme is unknown"),
        ("file://elsewhere/a", "host other than"),
        ("hf://name", "an owner and a name"),
        ("hf://owner/../name", "owner or name is none"),
        ("hf://owner/..", "owner or name is none"),
        ("hf://owner/name/file.bin", "only a .gguf"),
        ("hf://owner/name@", "revision is none"),
        ("hf://owner/name@a/../../b", "revision is none"),
        ("s3://", "needs a bucket"),
        ("s3://bucket/a/../b", "relative parts"),
        ("s3://bucket/a//b", "relative parts"),
        ("https://", "no URL"),
        ("https://user:secret@host/a/", "password"),
        ("https://host/a/?token=1", "behind a ?"),
        ("https://host/a/model.safetensors", "names a file"),
        ("http://example.org/a/", "use https://"),
        ("http://127.example.org/a/", "use https://"),
    ] {
        let error = value.parse::<Source>().unwrap_err().to_string();
        assert!(
            error.contains(reason) && error.contains(value) && error.contains("s3://bucket/prefix"),
            "{value}: {error}"
        );
    }
}
