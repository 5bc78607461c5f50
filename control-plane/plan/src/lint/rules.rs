//! Match rules: each has a side and a place, and some request can reach it.

use std::collections::{BTreeMap, BTreeSet};

use super::Report;
use crate::{Manifest, RuleSpec};

pub(super) fn check(plan: &Manifest, report: &mut Report<'_>) {
    let mut first = BTreeMap::new();
    for (index, rule) in plan.rules.iter().enumerate() {
        let path = format!("match[{index}]");
        one(rule, &path, report);
        if let Some(earlier) = first.insert(rule.priority, index) {
            first.insert(rule.priority, earlier);
            report.error(
                format!("{path}.priority"),
                "duplicate-priority",
                format!(
                    "match[{earlier}] has priority {} too: give each rule its own",
                    rule.priority
                ),
            );
        }
    }
    let mut ordered: Vec<(usize, &RuleSpec)> = plan.rules.iter().enumerate().collect();
    ordered.sort_by_key(|(_, rule)| rule.priority);
    for (place, (index, rule)) in ordered.iter().enumerate() {
        let taker = ordered[..place]
            .iter()
            .find(|(_, earlier)| takes_all(earlier, rule));
        if let Some((earlier, taker)) = taker {
            report.error(
                format!("match[{index}]"),
                "unreachable-rule",
                format!(
                    "match[{earlier}] with priority {} takes every request of this rule: give this one a lower \
                     priority, or leave it out",
                    taker.priority
                ),
            );
        }
    }
}

fn one(rule: &RuleSpec, path: &str, report: &mut Report<'_>) {
    match (rule.to, rule.canary) {
        (None, None) => report.error(
            path,
            "rule-without-side",
            "the rule says what matches, not where it goes: add `to: canary`, `to: stable` or `canary: 20%`",
        ),
        (Some(_), Some(share)) => report.error(
            path,
            "rule-with-both",
            format!("`to` and `canary: {share}` contradict each other: keep one"),
        ),
        _ => {}
    }
    if is_bare(rule) {
        report.warning(
            path,
            "rule-without-condition",
            "the rule matches every request, so the steps move nobody: add a condition",
        );
    }
    if rule.trusted_hops > 0 && rule.client_ip.is_empty() {
        report.warning(
            format!("{path}.trusted_hops"),
            "unused-hops",
            format!(
                "trusted_hops {} does nothing without client_ip: leave it out",
                rule.trusted_hops
            ),
        );
    }
    let mut names = BTreeSet::new();
    for name in rule.header.keys() {
        if !names.insert(name.to_ascii_lowercase()) {
            report.error(
                format!("{path}.header.{name}"),
                "duplicate-header",
                format!("header {name:?} is there twice, since case does not matter: keep one"),
            );
        }
    }
}

fn is_bare(rule: &RuleSpec) -> bool {
    rule.header.is_empty()
        && rule.user.is_empty()
        && rule.region.is_empty()
        && rule.device.is_empty()
        && rule.client_ip.is_empty()
}

/// Whether every request that matches `later` matches `earlier`: each of its conditions follows from one of the
/// later rule's.
fn takes_all(earlier: &RuleSpec, later: &RuleSpec) -> bool {
    let within = |earlier: &[String], later: &[String]| {
        earlier.is_empty() || (!later.is_empty() && later.iter().all(|one| earlier.contains(one)))
    };
    let lower = |rule: &RuleSpec| -> BTreeSet<(String, String)> {
        let headers = rule.header.iter();
        headers
            .map(|(name, value)| (name.to_ascii_lowercase(), value.clone()))
            .collect()
    };
    lower(earlier).is_subset(&lower(later))
        && within(&earlier.user, &later.user)
        && within(&earlier.region, &later.region)
        && within(&earlier.device, &later.device)
        && holds_networks(earlier, later)
}

fn holds_networks(earlier: &RuleSpec, later: &RuleSpec) -> bool {
    let held = |network| earlier.client_ip.iter().any(|wide| wide.contains(network));
    earlier.client_ip.is_empty()
        || (!later.client_ip.is_empty()
            && earlier.trusted_hops == later.trusted_hops
            && later.client_ip.iter().all(held))
}
