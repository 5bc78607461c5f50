use proptest::prelude::*;

use super::*;

fn told(text: &str) -> Vec<(String, u32, &'static str, String)> {
    let findings = parse(text).unwrap_err();
    let told = findings.into_iter().map(|f| (f.path, f.line, f.code, f.message));
    told.collect()
}

const PLAN: &str = "\
kind: Rollout
model: demo
canary: {revision: v2}
match:
- {priority: 10, header: {x-model-version: v2}, to: canary}
- priority: 20
  client_ip:
  - 10.0.0.0/8
  to: canary
steps:
- {canary: 1%, hold: 24h}
- canary: 100%
  bake: 24h
analysis:
  metrics:
  - {name: error_rate, max: 1%}
";

#[test]
fn every_value_knows_its_line() {
    let (manifest, lines) = parse(PLAN).unwrap();
    assert_eq!(manifest.steps.len(), 2);
    for (path, line) in [
        ("kind", 1),
        ("canary.revision", 3),
        ("match[0].priority", 5),
        ("match[0].header.x-model-version", 5),
        ("match[1]", 6),
        ("match[1].client_ip[0]", 8),
        ("match[1].to", 9),
        ("steps[1].bake", 13),
        ("analysis.metrics[0].max", 16),
        // What is not written stands where its holder does.
        ("analysis.alpha", 14),
        ("match[1].canary", 6),
        ("windows[3].from", 1),
    ] {
        assert_eq!(lines.line(path), line, "{path}");
    }
    assert_eq!(Lines::default().line("kind"), 0);
}

#[test]
fn json_is_read_too_with_tabs_and_all() {
    let text =
        "{\n\t\"kind\": \"Rollout\",\n\t\"model\": \"demo\",\n\t\"canary\": {\"revision\": \"v2\"}\n}\n";
    let (manifest, lines) = parse(text).unwrap();
    assert_eq!((manifest.model.as_str(), lines.line("model")), ("demo", 3));
}

#[test]
fn all_that_is_wrong_is_told_at_once_with_line_value_and_remedy() {
    let text = "\
kind: Rollout
model: demo
canary: {revision: v2, min_redy: 2}
match:
- {priority: ten, to: canary}
- {priority: 20, client_ip: [10.0.0.0/99], to: both}
steps:
- {canary: 5, hold: 24h}
- {canary: 20%, hold: soon}
analysis:
  metrics:
  - {name: eror_rate, max: 1%}
  - {name: latency_p99, max: [2s]}
  - {max: 1%}
";
    let told = told(text);
    let at: Vec<(&str, u32, &str)> = told
        .iter()
        .map(|(path, line, code, _)| (path.as_str(), *line, *code))
        .collect();
    assert_eq!(
        at,
        [
            ("canary.min_redy", 3, "unknown-field"),
            ("match[0].priority", 5, "bad-value"),
            ("match[1].client_ip[0]", 6, "bad-value"),
            ("match[1].to", 6, "bad-value"),
            ("steps[0].canary", 8, "bad-value"),
            ("steps[1].hold", 9, "bad-value"),
            ("analysis.metrics[0].name", 12, "bad-value"),
            ("analysis.metrics[1].max", 13, "bad-value"),
            ("analysis.metrics[2].name", 14, "missing-field"),
        ],
        "{told:#?}"
    );
    let messages: Vec<&str> = told.iter().map(|(_, _, _, message)| message.as_str()).collect();
    assert_eq!(
        messages,
        [
            "unknown field `min_redy`, expected one of `revision`, `min_ready`, `warm_prefixes`",
            "invalid type: string \"ten\", expected a whole number",
            "\"10.0.0.0/99\": invalid IP address syntax; write a network such as 10.0.0.0/8, or one address as \
             192.0.2.1/32",
            "unknown variant `both`, expected `stable` or `canary`",
            "\"5\" is not a share: write it as a percentage, for example 5%",
            "\"soon\" is not a time span such as 90s, 24h or 1h30m: expected number at 0",
            "\"eror_rate\" is not a metric; there are error_rate, timeout_rate, latency_pNN, ttft_pNN, tpot_pNN, \
             output_length_pNN, repetition, watch_words, grammar_failures, empty_replies, negative_feedback, \
             out_of_memory, restarts and prometheus:NAME",
            "this is not a limit: write a share such as 1%, a time span such as 2s, or a number",
            "missing field `name`",
        ]
    );
}

#[test]
fn what_is_no_yaml_is_refused_with_its_line() {
    for (text, line, says) in [
        ("kind: Rollout\nmodel: [demo\n", 3, "neither YAML nor JSON"),
        ("", 1, "this is no plan"),
        ("just words", 1, "this is no plan"),
        ("- a\n- b", 1, "this is no plan"),
        ("kind: Rollout\n? [a]\n: b\n", 2, "no name of a field"),
        ("kind: Rollout\n---\nkind: Rollout\n", 2, "second document"),
        (
            "kind: Rollout\nmodel: &a x\nstable: *a\n",
            3,
            "write the value out",
        ),
        ("kind: Rollout\nmodel: !secret x\n", 2, "!secret"),
        (
            "kind: Rollout\nmodel: a\nmodel: b\n",
            3,
            "\"model\" is written twice",
        ),
    ] {
        let told = told(text);
        assert!(
            told.iter()
                .any(|(_, at, _, message)| *at == line && message.contains(says)),
            "{text:?}: {told:?}"
        );
    }
}

#[test]
fn bombs_are_refused() {
    let laughs = "kind: Rollout\na: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n";
    assert_eq!(told(laughs)[0].2, "alias");
    let deep = format!("a: {}{}", "[".repeat(33), "]".repeat(33));
    assert_eq!(told(&deep)[0].2, "too-deep");
    assert!(parse(&"[".repeat(LONGEST)).is_err());
    assert!(parse(&"a: {".repeat(LONGEST / 4)).is_err());
    assert_eq!(told(&" ".repeat(LONGEST + 1))[0].2, "too-large");
}

#[test]
fn a_plan_reads_back_as_it_was_written() {
    let (manifest, _) = parse(PLAN).unwrap();
    let again = serde_norway::to_string(&manifest).unwrap();
    assert_eq!(parse(&again).unwrap().0, manifest);
    let json = serde_json::to_string_pretty(&manifest).unwrap();
    assert_eq!(parse(&json).unwrap().0, manifest);
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in "\\PC*") {
        if let Err(findings) = parse(&text) {
            prop_assert!(!findings.is_empty());
        }
    }

    #[test]
    fn a_damaged_plan_is_read_or_refused_with_a_line(
        at in 0..PLAN.len(),
        len in 0..20_usize,
        put in "[-a-z0-9:{}\\[\\]&*!|>%@`'\"#, \n\t]{0,8}",
    ) {
        let end = (at + len).min(PLAN.len());
        let text = format!("{}{put}{}", &PLAN[..at], &PLAN[end..]);
        if let Err(findings) = parse(&text) {
            prop_assert!(!findings.is_empty());
            let lines = u32::try_from(text.lines().count()).unwrap_or(u32::MAX) + 1;
            for finding in findings {
                prop_assert!((1..=lines).contains(&finding.line), "{:?}", finding);
            }
        }
    }
}
