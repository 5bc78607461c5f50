use std::sync::Arc;

use penstock_plan::{Revision, Route, Snapshot};
use tonic::Code;

use super::*;

const HOUR: u64 = 3_600_000;

fn view() -> View {
    let route = Route {
        model: "demo".into(),
        stable: Revision::new("v1", "aa"),
        pinnable: vec![Revision::new("v2", "bb")],
        revoked: vec!["v0".into()],
        ..Route::default()
    };
    let snapshot = Snapshot {
        epoch: 1,
        routes: [("demo".into(), route)].into(),
    };
    View {
        snapshot: Some(Arc::new(snapshot)),
        ..View::default()
    }
}

fn wish(revision: &str, ttl_s: Option<u32>) -> Wish {
    Wish {
        model: "demo".into(),
        revision: revision.into(),
        ttl_s,
        actor: "ada".into(),
        reason: "incident".into(),
    }
}

#[test]
fn it_lasts_for_an_hour_unless_told_and_ends_by_itself() {
    let (overrides, now) = (Overrides::default(), now_ms());
    assert_eq!(overrides.revision("demo"), None);
    let record = overrides.set(&view(), wish("v2", None), now).unwrap();
    assert_eq!(record.until_ms - record.since_ms, HOUR);
    assert_eq!(overrides.revision("demo").as_deref(), Some("v2"));
    assert_eq!(overrides.revision("other"), None);
    assert_eq!(overrides.list(now + HOUR - 1)[0].ended_ms, 0);
    assert_eq!(overrides.list(now + HOUR)[0].ended_ms, now + HOUR);
    assert_eq!(overrides.revision("demo"), None);
    assert_eq!(overrides.list(now + 2 * HOUR - 1).len(), 1);
    assert!(
        overrides.list(now + 2 * HOUR).is_empty(),
        "it is told of for an hour"
    );
}

#[test]
fn another_takes_its_place_and_an_operator_ends_it() {
    let (overrides, now) = (Overrides::default(), now_ms());
    overrides.set(&view(), wish("v2", None), now).unwrap();
    overrides.set(&view(), wish("v1", Some(60)), now + 1).unwrap();
    let ended: Vec<(String, u64)> = overrides
        .list(now + 2)
        .into_iter()
        .map(|record| (record.revision, record.ended_ms))
        .collect();
    assert_eq!(ended, [("v2".to_owned(), now + 1), ("v1".to_owned(), 0)]);
    assert_eq!(overrides.end("demo", now + 3).unwrap().revision, "v1");
    assert_eq!(overrides.revision("demo"), None);
    let error = overrides.end("demo", now + 4).unwrap_err();
    assert_eq!(error.code(), Code::NotFound);
}

#[test]
fn what_makes_no_sense_is_named() {
    let (overrides, now) = (Overrides::default(), now_ms());
    let other = Wish {
        model: "other".into(),
        ..wish("v1", None)
    };
    let nobody = Wish {
        actor: String::new(),
        ..wish("v1", None)
    };
    for (wish, code, words) in [
        (
            wish("v9", None),
            Code::NotFound,
            "has no revision \"v9\"; it has v1, v2",
        ),
        (wish("v0", None), Code::NotFound, "was aborted"),
        (other, Code::NotFound, "there are demo"),
        (nobody, Code::InvalidArgument, "actor"),
        (wish("v1", Some(0)), Code::InvalidArgument, "ttl_s"),
        (wish("v1", Some(86_401)), Code::InvalidArgument, "86400"),
    ] {
        let error = overrides.set(&view(), wish, now).unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        assert!(error.message().contains(words), "{error}");
    }
    assert!(overrides.set(&view(), wish("v1", Some(86_400)), now).is_ok());
}

#[test]
fn a_restart_keeps_it_until_its_end() {
    let directory = tempfile::tempdir().unwrap();
    let open = || Overrides::open(Some(StateDir::open(directory.path()).unwrap())).unwrap();
    let before = open();
    let record = before.set(&view(), wish("v2", None), now_ms()).unwrap();
    assert!(before.save());
    let after = open();
    assert_eq!(after.revision("demo").as_deref(), Some("v2"));
    assert_eq!(after.list(now_ms()), [record]);
    assert!(
        !Overrides::default().save(),
        "nothing is kept without a directory"
    );
}
