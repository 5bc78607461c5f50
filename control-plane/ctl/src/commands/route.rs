//! `ctl route …`: the gateway's own assignment, run here.

use super::pick::only;
use crate::{
    config::{Connection, RouteTest, RouteVerb},
    connect::Admin,
    console::Console,
    error::CtlError,
    output::{Format, View, emit, pairs},
};
use penstock_plan::{Attributes, Ppm, Reason, Route, Snapshot, assign};
use penstock_proto::{metadata, v1::GetSnapshotRequest};
use serde::Serialize;

pub(crate) async fn run(
    verb: RouteVerb,
    connection: &Connection,
    output: Format,
    console: &mut Console,
) -> Result<(), CtlError> {
    let RouteVerb::Test(args) = verb;
    let mut admin = Admin::connect(connection).await?;
    let reply = admin.rpc.get_snapshot(GetSnapshotRequest {}).await;
    let snapshot = reply.map_err(|status| admin.failed(status))?.into_inner();
    let snapshot = Snapshot::try_from(snapshot).map_err(|error| admin.nonsense(error.to_string()))?;
    // A request without a key is drawn for by itself; here as there.
    let (draw, _) = uuid::Uuid::new_v4().as_u64_pair();
    emit(console, output, &test(&snapshot, &args, draw)?)
}

fn test(snapshot: &Snapshot, args: &RouteTest, draw: u64) -> Result<Answer, CtlError> {
    let route = route(snapshot, args.model.as_deref())?;
    let lookup = |name: &str| {
        args.request
            .metadata()
            .find_map(|(n, value)| (n == name).then_some(value))
    };
    let attributes = Attributes {
        pin: lookup(metadata::MODEL_VERSION),
        ..Attributes::new(&lookup)
    };
    let assignment =
        assign(route, &attributes, draw).map_err(|error| CtlError::NotFound(error.to_string()))?;
    let share = route.canary.as_ref().map(|canary| canary.share);
    let keys: Vec<_> = route.sticky.keys.iter().map(ToString::to_string).collect();
    let drawn = assignment.reason == Reason::Request;
    Ok(Answer {
        model: route.model.clone(),
        revision: assignment.revision.name.clone(),
        reason: assignment.reason.as_str(),
        bucket: assignment.bucket,
        share: share.map(|share| share.to_string()),
        canary_ppm: share.map(Ppm::get),
        canary: route.canary.as_ref().map(|canary| canary.revision.name.clone()),
        stable: route.stable.name.clone(),
        epoch: snapshot.epoch,
        note: drawn.then(|| {
            format!(
                "without {} each request is drawn for by itself",
                keys.join(" or ")
            )
        }),
    })
}

fn route<'s>(snapshot: &'s Snapshot, model: Option<&str>) -> Result<&'s Route, CtlError> {
    let names = || snapshot.routes.keys().cloned().collect::<Vec<_>>();
    let model = match model {
        Some(model) => model.to_owned(),
        None => only("model with a route", "start a worker that serves one", names())?,
    };
    snapshot.routes.get(&model).ok_or_else(|| {
        let known = names();
        let known = if known.is_empty() {
            "none yet".to_owned()
        } else {
            known.join(", ")
        };
        CtlError::NotFound(format!(
            "there is no route for model `{model}`; models with a route: {known}"
        ))
    })
}

/// Where a request would go, and why.
#[derive(Debug, Serialize)]
struct Answer {
    model: String,
    revision: String,
    reason: &'static str,
    /// 0 to 999,999, where a bucket decided.
    bucket: Option<u32>,
    share: Option<String>,
    canary_ppm: Option<u32>,
    canary: Option<String>,
    stable: String,
    epoch: u64,
    note: Option<String>,
}

impl View for Answer {
    fn table(&self) -> String {
        let bucket = match (self.bucket, self.canary_ppm) {
            (Some(bucket), Some(ppm)) => format!("{bucket} of 1000000; the canary has those below {ppm}"),
            _ => String::new(),
        };
        let share = match (&self.share, &self.canary) {
            (Some(share), Some(canary)) => format!("{share} to {canary}, the rest to {}", self.stable),
            _ => String::new(),
        };
        pairs(&[
            ("model", self.model.clone()),
            ("revision", self.revision.clone()),
            ("reason", self.reason.to_owned()),
            ("bucket", bucket),
            ("share", share),
            ("epoch", self.epoch.to_string()),
            ("note", self.note.clone().unwrap_or_default()),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RequestAttributes;
    use penstock_plan::{Canary, Revision, bucket};

    fn snapshot(share: u32) -> Snapshot {
        let route = Route {
            model: "demo".into(),
            stable: Revision::new("v1", "aa"),
            canary: Some(Canary {
                revision: Revision::new("v2", "bb"),
                share: Ppm::new(share).unwrap(),
                min_ready: 0,
            }),
            rollout_uid: "r-1".into(),
            generation: 3,
            revoked: vec!["v3".into()],
            ..Route::default()
        };
        Snapshot {
            epoch: 9,
            routes: [("demo".to_owned(), route)].into(),
        }
    }

    fn ask(share: u32, request: RequestAttributes) -> Result<Answer, CtlError> {
        test(&snapshot(share), &RouteTest { model: None, request }, 0)
    }

    fn user(id: &str) -> RequestAttributes {
        RequestAttributes {
            user: Some(id.to_owned()),
            ..RequestAttributes::default()
        }
    }

    #[test]
    fn a_user_gets_what_the_gateways_own_function_says() {
        let own = bucket("r-1", b"alice");
        let just_in = ask(own + 1, user("alice")).unwrap();
        assert_eq!(
            (just_in.revision.as_str(), just_in.reason, just_in.bucket),
            ("v2", "bucket", Some(own))
        );
        assert_eq!(ask(own, user("alice")).unwrap().revision, "v1");
    }

    #[test]
    fn a_header_is_as_good_as_the_flag() {
        let headers = vec![("x-user-id".to_owned(), "alice".to_owned())];
        let by_header = ask(
            500_000,
            RequestAttributes {
                headers,
                ..RequestAttributes::default()
            },
        )
        .unwrap();
        assert_eq!(by_header.bucket, ask(500_000, user("alice")).unwrap().bucket);
    }

    #[test]
    fn pins_are_followed_ignored_when_revoked_and_refused_when_unknown() {
        let pin = |name: &str| RequestAttributes {
            model_version: Some(name.into()),
            ..user("alice")
        };
        assert_eq!(ask(0, pin("v2")).unwrap().reason, "pin");
        assert_eq!(ask(0, pin("v3")).unwrap().reason, "pin_revoked");
        assert_eq!(ask(0, pin("v9")).unwrap_err().code(), 3);
    }

    #[test]
    fn without_a_key_the_answer_says_that_it_was_drawn() {
        let answer = ask(500_000, RequestAttributes::default()).unwrap();
        assert_eq!(answer.reason, "request");
        assert!(
            answer
                .table()
                .contains("without metadata:x-user-id each request is drawn"),
            "{}",
            answer.table()
        );
    }

    #[test]
    fn an_unknown_model_is_named_with_those_that_are_known() {
        let args = RouteTest {
            model: Some("nope".into()),
            request: RequestAttributes::default(),
        };
        let error = test(&snapshot(0), &args, 0).unwrap_err();
        assert_eq!(error.code(), 3);
        assert!(
            error.to_string().contains("`nope`") && error.to_string().contains("demo"),
            "{error}"
        );
    }
}
