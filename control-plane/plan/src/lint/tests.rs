use super::*;
use crate::parse::parse;

const HEAD: &str = "kind: Rollout\nmodel: demo\ncanary: {revision: v2}\n";
const METRICS: &str = "analysis:\n  metrics:\n  - {name: error_rate, max: 1%}\n";
const STEPS: &str = "steps:\n- {canary: 1%, hold: 24h}\n- {canary: 5%, hold: 24h}\n- {canary: 20%, hold: 24h}\n- {canary: 100%, bake: 24h}\n";

fn found(text: &str, requests_per_second: Option<f64>) -> Vec<Finding> {
    let (manifest, lines) = parse(text).unwrap_or_else(|findings| panic!("{text}\n{findings:#?}"));
    lint(&manifest, &lines, &LintContext { requests_per_second })
}

/// Each text has one finding, on the line that ends with `# HERE`, or it is not the finding that it is a case of.
#[track_caller]
fn each(cases: &[(&str, Severity, String)]) {
    for (code, severity, text) in cases {
        let here = text.lines().position(|line| line.ends_with("# HERE"));
        let here = u32::try_from(here.expect("a case has a marked line") + 1).unwrap();
        let found: Vec<_> = found(text, None)
            .into_iter()
            .map(|finding| (finding.code, finding.severity, finding.line, finding.message))
            .collect();
        let one = found.iter().filter(|(one, ..)| one == code).collect::<Vec<_>>();
        assert_eq!(
            one.iter()
                .map(|(_, severity, line, _)| (*severity, *line))
                .collect::<Vec<_>>(),
            [(*severity, here)],
            "{code} in\n{text}\n{found:#?}"
        );
        assert!(!one[0].3.is_empty());
        let others = found
            .iter()
            .filter(|(one, severity, ..)| one != code && *severity == Severity::Error);
        assert_eq!(others.count(), 0, "{code} in\n{text}\n{found:#?}");
    }
}

fn plan(more: &str) -> String {
    format!("{HEAD}{STEPS}{METRICS}{more}\n")
}

fn metric(line: &str) -> String {
    format!("{HEAD}{STEPS}analysis:\n  metrics:\n  - {line} # HERE\n")
}

use Severity::{Error, Warning};

#[test]
fn a_sound_plan_has_no_findings() {
    assert_eq!(found(&plan(""), None), []);
    assert_eq!(found(&plan(""), Some(1000.0)), []);
    assert_eq!(found(HEAD, None), []);
}

#[test]
fn the_head_is_checked() {
    let bare = |text: &str| format!("{text}{STEPS}{METRICS}");
    each(&[
        (
            "empty-model",
            Error,
            bare("kind: Rollout\nmodel: \"\" # HERE\ncanary: {revision: v2}\n"),
        ),
        (
            "empty-revision",
            Error,
            bare("kind: Rollout\nmodel: demo\ncanary:\n  revision: '' # HERE\n"),
        ),
        (
            "same-revision",
            Error,
            bare("kind: Rollout\nmodel: demo\nstable: v2\ncanary:\n  revision: v2 # HERE\n"),
        ),
        ("no-sticky-key", Error, plan("sticky:\n  key: [] # HERE")),
        ("hold-out-of-all", Error, plan("hold_out: 100% # HERE")),
        ("empty-mirror", Warning, plan("mirror: {share: 0%} # HERE")),
        ("bad-jump", Error, format!("{HEAD}max_jump: 1 # HERE\n")),
        (
            "window-unreadable",
            Error,
            plan("windows:\n- {from: '09:00', to: '17:00'}\n- {from: nine, to: '17:00'} # HERE"),
        ),
        (
            "window-unreadable",
            Error,
            plan("windows:\n- {from: '09:00', to: '17:00', zone: Mars/Base} # HERE"),
        ),
        (
            "pause-limit-within-window",
            Error,
            plan("windows:\n- {days: [mon], from: '09:00', to: '17:00'}\npause_limit: 24h # HERE"),
        ),
    ]);
}

#[test]
fn rules_are_checked() {
    let rules = |text: &str| plan(&format!("match:\n{text}"));
    each(&[
        (
            "duplicate-priority",
            Error,
            rules("- {priority: 1, user: [a], to: canary}\n- priority: 1 # HERE\n  user: [b]\n  to: canary"),
        ),
        (
            "rule-without-side",
            Error,
            rules("- {priority: 1, user: [a]} # HERE"),
        ),
        (
            "rule-with-both",
            Error,
            rules("- {priority: 1, user: [a], to: canary, canary: 2%} # HERE"),
        ),
        (
            "rule-without-condition",
            Warning,
            rules("- {priority: 1, canary: 2%} # HERE"),
        ),
        (
            "unused-hops",
            Warning,
            rules("- {priority: 1, user: [a], to: stable, trusted_hops: 1} # HERE"),
        ),
        (
            "duplicate-header",
            Error,
            rules("- {priority: 1, to: stable, header: {X-A: b, x-a: b}} # HERE"),
        ),
    ]);
}

#[test]
fn a_rule_that_no_request_reaches_is_found() {
    for (earlier, later, unreachable) in [
        ("header: {x-a: b}", "header: {X-A: b, x-c: d}", true),
        ("header: {x-a: b}", "header: {x-a: c}", false),
        ("header: {x-a: b, x-c: d}", "header: {x-a: b}", false),
        ("user: [a, b]", "user: [b]", true),
        ("user: [a, b]", "user: [b, c]", false),
        ("user: [a]", "region: [eu]", false),
        ("region: [eu, us]", "{region: [eu], device: [phone]}", true),
        (
            "client_ip: [10.0.0.0/8]",
            "client_ip: [10.1.0.0/16, 10.2.3.4/32]",
            true,
        ),
        (
            "client_ip: [10.0.0.0/8]",
            "client_ip: [10.1.0.0/16, 192.0.2.0/24]",
            false,
        ),
        (
            "client_ip: [10.0.0.0/8]",
            "{client_ip: [10.1.0.0/16], trusted_hops: 1}",
            false,
        ),
        ("client_ip: [10.1.0.0/16]", "client_ip: [10.0.0.0/8]", false),
        (
            "device: [phone]",
            "{device: [phone], client_ip: [10.0.0.0/8]}",
            true,
        ),
        ("{}", "user: [a]", true),
    ] {
        let inner = |rule: &str| match rule.trim_matches(['{', '}']) {
            "" => String::new(),
            _ if rule.starts_with('{') => format!(", {}", rule[1..rule.len() - 1].trim()),
            _ => format!(", {rule}"),
        };
        // The earlier one goes first by its priority, not by its place.
        let text = plan(&format!(
            "match:\n- {{priority: 20, to: canary{}}}\n- {{priority: 10, to: stable{}}}",
            inner(later),
            inner(earlier)
        ));
        let lines: Vec<u32> = found(&text, None)
            .iter()
            .filter(|finding| finding.code == "unreachable-rule")
            .map(|finding| finding.line)
            .collect();
        let expected: &[u32] = if unreachable { &[13] } else { &[] };
        assert_eq!(lines, expected, "{earlier} before {later}\n{text}");
    }
}

#[test]
fn the_ladder_is_checked() {
    let steps = |text: &str| format!("{HEAD}{METRICS}steps:\n{text}\n");
    each(&[
        (
            "jump-too-large",
            Error,
            steps("- {canary: 11%, hold: 1h} # HERE\n- {canary: 50%, hold: 1h}\n- {canary: 100%, bake: 1h}"),
        ),
        (
            "jump-too-large",
            Error,
            steps("- {canary: 10%, hold: 1h}\n- {canary: 51%, hold: 1h} # HERE\n- {canary: 100%, bake: 1h}"),
        ),
        (
            "steps-not-increasing",
            Error,
            steps(
                "- {canary: 5%, hold: 1h}\n- {canary: 5%, hold: 1h} # HERE\n- {canary: 20%, hold: 1h}\n- {canary: 100%, bake: 1h}",
            ),
        ),
        (
            "steps-not-increasing",
            Error,
            steps(
                "- {canary: 0%, hold: 1h} # HERE\n- {canary: 5%, hold: 1h}\n- {canary: 20%, hold: 1h}\n- {canary: 100%, bake: 1h}",
            ),
        ),
        (
            "last-step-below-100",
            Warning,
            steps("- {canary: 5%, hold: 1h}\n- {canary: 20%, hold: 1h} # HERE"),
        ),
        (
            "bake-not-last",
            Error,
            steps("- {canary: 5%, bake: 1h} # HERE\n- {canary: 20%, hold: 1h}\n- {canary: 100%, bake: 1h}"),
        ),
        (
            "hold-and-bake",
            Error,
            steps(
                "- {canary: 5%, hold: 1h}\n- {canary: 20%, hold: 1h}\n- {canary: 100%, bake: 1h, hold: 1h} # HERE",
            ),
        ),
        (
            "hold-too-short",
            Error,
            steps("- {canary: 5%} # HERE\n- {canary: 20%, hold: 1h}\n- {canary: 100%, bake: 1h}"),
        ),
    ]);
}

#[test]
fn metrics_are_checked() {
    each(&[
        (
            "bad-alpha",
            Error,
            format!("{HEAD}{STEPS}{METRICS}  alpha: 0.6 # HERE\n"),
        ),
        (
            "bad-alpha",
            Error,
            format!("{HEAD}{STEPS}{METRICS}  alpha: 0 # HERE\n"),
        ),
        (
            "bad-alpha",
            Error,
            format!("{HEAD}{STEPS}{METRICS}  alpha: .nan # HERE\n"),
        ),
        (
            "bad-extend-limit",
            Error,
            format!("{HEAD}{STEPS}{METRICS}  extend_limit: -1 # HERE\n"),
        ),
        (
            "no-metrics",
            Warning,
            format!("{HEAD}{STEPS}analysis: {{alpha: 0.01}} # HERE\n"),
        ),
        ("metric-without-bound", Error, metric("{name: error_rate}")),
        ("metric-without-bound", Error, metric("{name: latency_p99}")),
        (
            "bad-ratio",
            Error,
            metric("{name: error_rate, max: 1%, max_ratio: 0}"),
        ),
        (
            "bad-ratio",
            Error,
            metric("{name: error_rate, max: 1%, max_ratio: -2}"),
        ),
        (
            "bad-ratio",
            Error,
            metric("{name: error_rate, max: 1%, max_ratio: .inf}"),
        ),
        (
            "ratio-without-stable",
            Error,
            metric("{name: restarts, max_ratio: 2}"),
        ),
        (
            "quantile-ratio-needs-max",
            Error,
            metric("{name: latency_p99, max_ratio: 2}"),
        ),
        ("wrong-unit", Error, metric("{name: error_rate, max: 2s}")),
        ("wrong-unit", Error, metric("{name: latency_p99, max: 1%}")),
        ("wrong-unit", Error, metric("{name: output_length_p99, max: 2s}")),
        ("wrong-unit", Error, metric("{name: out_of_memory, max: 1%}")),
        (
            "wrong-unit",
            Error,
            metric("{name: repetition, max: 1%, threshold: 2s}"),
        ),
        ("max-of-all", Error, metric("{name: error_rate, max: 100%}")),
        (
            "unused-threshold",
            Error,
            metric("{name: error_rate, max: 1%, threshold: 1%}"),
        ),
        (
            "unused-stratify",
            Warning,
            metric("{name: ttft_p99, max: 2s, stratify: cached_ratio}"),
        ),
        (
            "watch-words-missing",
            Error,
            metric("{name: watch_words, max: 1%}"),
        ),
        (
            "watch-words-unused",
            Warning,
            format!("{HEAD}{STEPS}{METRICS}  watch_words: [a] # HERE\n"),
        ),
        (
            "duplicate-metric",
            Error,
            format!("{HEAD}{STEPS}{METRICS}  - {{name: error_rate, max_ratio: 2}} # HERE\n"),
        ),
        (
            "nothing-to-compare",
            Warning,
            format!(
                "{HEAD}{} # HERE\nanalysis: {{metrics: [{{name: error_rate, max_ratio: 2}}]}}\n",
                STEPS.trim_end()
            ),
        ),
    ]);
}

#[test]
fn prometheus_metrics_are_checked() {
    let prometheus = |query: &str| {
        metric(&format!(
            "{{name: 'prometheus:gpu', max: 80, prometheus: {query}}}"
        ))
    };
    each(&[
        (
            "prometheus-missing",
            Error,
            metric("{name: 'prometheus:gpu', max: 80}"),
        ),
        (
            "prometheus-missing",
            Error,
            metric("{name: error_rate, max: 1%, prometheus: {url: 'http://a', query: up}}"),
        ),
        ("bad-url", Error, prometheus("{url: localhost, query: up}")),
        ("empty-query", Error, prometheus("{url: 'http://a', query: ''}")),
        (
            "bad-every",
            Error,
            prometheus("{url: 'http://a', query: up, every: 0s}"),
        ),
    ]);
}

#[test]
fn a_hold_in_which_nothing_could_be_seen_is_refused_with_the_one_that_would_do() {
    let text = |hold: &str| {
        format!(
            "{HEAD}max_jump: 100\nsteps:\n- {{canary: 1%, hold: {hold}}}\n- {{canary: 100%, bake: 24h}}\n\
             analysis: {{alpha: 0.03, metrics: [{{name: error_rate, max_ratio: 1}}]}}\n"
        )
    };
    let short = found(&text("10m"), Some(20.0));
    assert_eq!(short.len(), 2, "{short:#?}");
    let finding = short
        .iter()
        .find(|finding| finding.code == "hold-too-short")
        .unwrap();
    assert_eq!(
        (finding.severity, finding.line, finding.path.as_str()),
        (Error, 6, "steps[0].hold")
    );
    assert_eq!(
        finding.message,
        "20 requests/s at 1%: a fivefold jump of error_rate takes about 21 min, and the step stays 10m; hold it for \
         21 min or longer"
    );
    assert!(
        found(&text("40m"), Some(20.0))
            .iter()
            .all(|finding| finding.code != "hold-too-short")
    );
    // Ten times the requests need a tenth of the time.
    assert!(
        found(&text("10m"), Some(200.0))
            .iter()
            .all(|finding| finding.code != "hold-too-short")
    );
    // With samples of the operator's own choice it is told, and nothing more.
    let chosen = found(&text("10m, min_samples: 50"), Some(20.0));
    assert!(
        chosen.iter().all(|finding| finding.severity == Warning),
        "{chosen:#?}"
    );
}
