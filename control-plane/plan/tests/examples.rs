//! The example plans do what their comments say.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::BTreeMap, fs, path::PathBuf};

use penstock_plan::{
    Attributes, Change, CreateRollout, Manifest, Phase, Ppm, Published, PublishedRevision, Queued, Reason,
    Rollout, Route, assign, build_routes,
    lint::{LintContext, lint},
    parse::parse,
    simulate::{Assumptions, simulate},
};

const USERS: u32 = 50_000;

/// Name, text and plan of each example.
fn examples() -> Vec<(String, String, Manifest)> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../deploy/examples");
    let mut examples: Vec<_> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "yaml"))
        .map(|path| {
            let text = fs::read_to_string(&path).unwrap();
            let (plan, _) = parse(&text).unwrap_or_else(|findings| panic!("{path:?}: {findings:#?}"));
            (path.file_name().unwrap().to_str().unwrap().to_owned(), text, plan)
        })
        .collect();
    examples.sort_by(|a, b| a.0.cmp(&b.0));
    assert!(examples.len() >= 10, "{}", examples.len());
    examples
}

fn published() -> Published {
    let revision = |name: &str| PublishedRevision {
        model: "demo".into(),
        revision: name.into(),
        digest: format!("digest-{name}"),
        ..PublishedRevision::default()
    };
    Published::from([("demo".into(), ["v1", "v2", "v3"].map(revision).to_vec())])
}

/// The route of a plan under way, at a step or where its share is set by hand.
fn route(plan: &Manifest, moment: &Moment) -> Route {
    let new = CreateRollout {
        uid: "r-1".into(),
        model: plan.model.clone(),
        stable: plan.stable.clone().unwrap(),
        canary: plan.canary.revision.clone(),
        share: Ppm::ZERO,
        plan: plan.clone(),
    };
    let created = Rollout::create(new, None, Change::default()).unwrap();
    let stepped = !plan.steps.is_empty();
    let under_way = match stepped {
        true => created.step_to(Some(moment.step), Change::default()).unwrap(),
        false => created,
    };
    let rollout = match moment.then {
        "aborted" => under_way.abort("", Change::default()).unwrap(),
        "superseded" => {
            let queued = Queued {
                uid: "r-2".into(),
                plan: Manifest::manual("demo", "v3", &under_way.sticky),
                actor: String::new(),
                reason: String::new(),
            };
            under_way.follow_by(queued, Change::default()).unwrap().0
        }
        _ => under_way,
    };
    build_routes(&[rollout], &published()).remove("demo").unwrap()
}

/// When a request comes.
#[derive(Default)]
struct Moment {
    step: usize,
    then: &'static str,
}

/// A request as a comment tells it.
#[derive(Default)]
struct Told {
    metadata: BTreeMap<String, String>,
    from: Option<std::net::IpAddr>,
    anybody: bool,
    moment: Moment,
}

fn told(request: &str) -> Told {
    let mut told = Told::default();
    for part in request.split("; ") {
        match part {
            "nothing" => {}
            "aborted" => told.moment.then = "aborted",
            "superseded" => told.moment.then = "superseded",
            "any user" => told.anybody = true,
            part => match (part.strip_prefix("from "), part.strip_prefix("any user, step ")) {
                (Some(address), _) => told.from = Some(address.parse().unwrap()),
                (None, Some(step)) => {
                    told.anybody = true;
                    told.moment.step = step.parse().unwrap();
                }
                (None, None) => {
                    let (name, value) = part.split_once(": ").unwrap();
                    told.metadata.insert(name.into(), value.trim_matches('"').into());
                }
            },
        }
    }
    told
}

/// Where a request goes, as the comments say it, and whether the canary gets it.
fn goes(route: &Route, told: &Told, user: Option<&str>) -> (String, bool, Reason) {
    let metadata = |name: &str| match user {
        Some(user) if name == "x-user-id" => Some(user),
        _ => told.metadata.get(name).map(String::as_str),
    };
    let attributes = Attributes {
        pin: metadata("x-model-version"),
        peer: told.from,
        ..Attributes::new(&metadata)
    };
    let assignment = assign(route, &attributes, 0).unwrap();
    let side = if assignment.revision.name == "v2" {
        "canary"
    } else {
        "stable"
    };
    let rule = assignment.rule.map_or(String::new(), |rule| format!(" {rule}"));
    (
        format!("{side}, {}{rule}", assignment.reason),
        side == "canary",
        assignment.reason,
    )
}

#[test]
fn every_example_is_sound_at_any_usual_rate() {
    for (name, text, plan) in examples() {
        let (_, lines) = parse(&text).unwrap();
        for requests_per_second in [None, Some(50.0), Some(2000.0)] {
            let findings = lint(&plan, &lines, &LintContext { requests_per_second });
            assert_eq!(findings, [], "{name} at {requests_per_second:?}");
        }
    }
}

#[test]
fn every_example_routes_as_its_comment_says() {
    for (name, text, plan) in examples() {
        let mut checked = 0;
        for line in text.lines().filter_map(|line| line.strip_prefix("#   ")) {
            let Some((request, expected)) = line.split_once(" => ") else {
                continue;
            };
            checked += 1;
            if request == "mirrored" {
                let route = route(&plan, &Moment::default());
                assert_eq!(
                    route.mirror.unwrap().share,
                    expected.parse().unwrap(),
                    "{name}: {line}"
                );
                continue;
            }
            let told = told(request);
            let route = route(&plan, &told.moment);
            if !told.anybody {
                assert_eq!(goes(&route, &told, None).0, expected, "{name}: {line}");
                continue;
            }
            let (counted, share) = expected.split_once(' ').unwrap();
            let share: Ppm = share.parse().unwrap();
            let users = (0..USERS).map(|user| format!("user-{user}"));
            let hits = users.filter(|user| {
                let (_, canary, reason) = goes(&route, &told, Some(user));
                match counted {
                    "canary" => canary,
                    _ => reason.as_str() == counted,
                }
            });
            let (found, wanted) = (hits.count() as f64, share.fraction() * f64::from(USERS));
            // Four standard deviations.
            let spread = 4.0 * (wanted * (1.0 - share.fraction())).sqrt();
            assert!(
                (found - wanted).abs() <= spread,
                "{name}: {line}: {found} of {USERS} users"
            );
        }
        assert!(checked > 0, "{name} says nothing of its routing");
    }
}

#[test]
fn every_ladder_ends_with_the_canary_as_stable_or_goes_back() {
    for (name, _, plan) in examples()
        .into_iter()
        .filter(|(_, _, plan)| !plan.steps.is_empty())
    {
        let good = Assumptions {
            requests_per_second: 200.0,
            ..Assumptions::default()
        };
        let simulation = simulate(&plan, &good);
        assert_eq!(simulation.outcome, Phase::Succeeded, "{name}:\n{simulation}");
        assert!(
            simulation.false_abort <= 2.0 * simulation.alpha,
            "{name}:\n{simulation}"
        );
        let bad = Assumptions {
            canary_error_rate: 0.05,
            ..good
        };
        let simulation = simulate(&plan, &bad);
        assert_eq!(simulation.outcome, Phase::RolledBack, "{name}:\n{simulation}");
    }
}
