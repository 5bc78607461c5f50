use std::{convert::Infallible, net::SocketAddr};

use tokio_stream::wrappers::TcpListenerStream;
use tonic::{body::Body, server::NamedService, transport::Server};

use super::*;

fn error(code: Code) -> AdminError {
    let address = "127.0.0.1:8090".parse().unwrap();
    AdminError::new(&address, &Status::new(code, "why"))
}

#[test]
fn every_status_has_its_error() {
    assert!(matches!(error(Code::NotFound), AdminError::NotFound(why) if why == "why"));
    assert!(matches!(error(Code::AlreadyExists), AdminError::AlreadyExists(_)));
    assert!(matches!(error(Code::Aborted), AdminError::Conflict(_)));
    assert!(matches!(error(Code::InvalidArgument), AdminError::Invalid(_)));
    assert!(matches!(
        error(Code::FailedPrecondition),
        AdminError::Forbidden(_)
    ));
    assert!(matches!(error(Code::PermissionDenied), AdminError::Denied(_)));
    assert!(matches!(error(Code::Unauthenticated), AdminError::Denied(_)));
    assert!(matches!(error(Code::Unavailable), AdminError::Unavailable { .. }));
    assert!(matches!(
        error(Code::DeadlineExceeded),
        AdminError::TimedOut { .. }
    ));
    assert!(matches!(
        error(Code::Internal),
        AdminError::Failed {
            code: Code::Internal,
            ..
        }
    ));
    assert!(matches!(error(Code::Cancelled), AdminError::Failed { .. }));
}

#[test]
fn only_what_may_go_well_later_is_retryable() {
    assert!(error(Code::Unavailable).is_retryable() && error(Code::DeadlineExceeded).is_retryable());
    assert!(!error(Code::Aborted).is_retryable() && !error(Code::NotFound).is_retryable());
}

#[tokio::test]
async fn an_address_where_nobody_listens_is_named_with_the_remedy() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let error = AdminClient::connect(&address.to_string()).await.unwrap_err();
    assert!(error.is_retryable());
    let text = error.to_string();
    assert!(
        text.starts_with(&format!("no control plane at http://{address}: ")),
        "{text}"
    );
    assert!(
        text.contains("refused") && text.contains("name the address"),
        "{text}"
    );
}

#[tokio::test]
async fn an_address_that_cannot_be_used_is_refused() {
    assert!(matches!(
        AdminClient::connect("nonsense").await,
        Err(AdminError::Address(_))
    ));
}

/// Answers each call with NOT_FOUND, the call's path and its `x-test` metadata.
#[derive(Clone)]
struct Echo;

impl NamedService for Echo {
    const NAME: &'static str = "penstock.v1.Admin";
}

impl tower::Service<tonic::codegen::http::Request<Body>> for Echo {
    type Response = tonic::codegen::http::Response<Body>;
    type Error = Infallible;
    type Future = std::future::Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Infallible>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: tonic::codegen::http::Request<Body>) -> Self::Future {
        let said = request
            .headers()
            .get("x-test")
            .and_then(|value| value.to_str().ok())
            .unwrap_or("nothing");
        let status = Status::not_found(format!("{} {said}", request.uri().path()));
        std::future::ready(Ok(status.into_http()))
    }
}

async fn echo() -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(
        Server::builder()
            .add_service(Echo)
            .serve_with_incoming(TcpListenerStream::new(listener)),
    );
    address
}

#[tokio::test]
async fn a_call_carries_the_callers_metadata_and_its_status_comes_back_typed() {
    let address = echo().await.to_string();
    let add = |metadata: &mut MetadataMap| drop(metadata.insert("x-test", "hello".parse().unwrap()));
    let client = AdminClient::connect_with(&address, add).await.unwrap();
    let error = client.get_rollout("demo").await.unwrap_err();
    assert!(
        matches!(&error, AdminError::NotFound(why) if why == "/penstock.v1.Admin/GetRollout hello"),
        "{error}"
    );

    let client = AdminClient::connect(&address).await.unwrap();
    let error = client.list_models().await.unwrap_err();
    assert!(
        matches!(&error, AdminError::NotFound(why) if why == "/penstock.v1.Admin/ListModels nothing"),
        "{error}"
    );
}

#[tokio::test]
async fn each_change_is_the_call_of_its_name() {
    let address = echo().await.to_string();
    let client = AdminClient::connect(&address).await.unwrap();
    let change = v1::ChangeRolloutRequest::default;
    let called = [
        client
            .apply_rollout(v1::ApplyRolloutRequest::default())
            .await
            .err(),
        client.pause_rollout(change()).await.err(),
        client.resume_rollout(change()).await.err(),
        client.approve_rollout(change()).await.err(),
        client.step_rollout(v1::StepRolloutRequest::default()).await.err(),
        client.retry_rollout(change()).await.err(),
        client.undo_rollout(change()).await.err(),
        client.list_audit("demo", 5).await.err(),
        client
            .publish_model(v1::PublishModelRequest::default())
            .await
            .err(),
        client.retire_model(v1::RetireModelRequest::default()).await.err(),
    ];
    let called = called.map(|error| error.unwrap().to_string());
    let path = |call: &str| format!("/penstock.v1.Admin/{call} nothing");
    assert_eq!(
        called,
        [
            path("ApplyRollout"),
            path("PauseRollout"),
            path("ResumeRollout"),
            path("ApproveRollout"),
            path("StepRollout"),
            path("RetryRollout"),
            path("UndoRollout"),
            path("ListAudit"),
            path("PublishModel"),
            path("RetireModel"),
        ]
    );
}
