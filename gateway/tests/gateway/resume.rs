//! Replies that outlive their workers.

use std::time::Duration;

use penstock_proto::v1;
use tonic::{Code, Status};

use crate::support::{Behaviour, Client, TestGateway, TestWorker, prompt, view, with};

/// A gateway before two workers of one kind.
async fn two(behaviour: Behaviour) -> ([TestWorker; 2], TestGateway, Client) {
    let workers = [
        TestWorker::start(behaviour.clone()).await,
        TestWorker::start(behaviour).await,
    ];
    let endpoints = vec![
        workers[0].endpoint("a", &["v1"]),
        workers[1].endpoint("b", &["v1"]),
    ];
    let gateway = TestGateway::start(view(0, endpoints)).await;
    let client = gateway.client().await;
    (workers, gateway, client)
}

async fn rest(stream: &mut tonic::Streaming<v1::GenerateResponse>) -> Result<String, Status> {
    let mut text = String::new();
    while let Some(chunk) = stream.message().await? {
        text.push_str(&chunk.text);
    }
    Ok(text)
}

#[tokio::test]
async fn another_worker_goes_on_where_a_killed_one_ended() {
    let (mut workers, _gateway, mut client) = two(Behaviour::Hang).await;
    let asked = with(prompt("demo"), &[("grpc-timeout", "30S"), ("x-user-id", "u")]);
    let mut stream = client.generate(asked).await.unwrap().into_inner();
    assert_eq!(stream.message().await.unwrap().unwrap().text, "Hello");
    let first = usize::from(workers[0].requests() == 0);
    let spare = 1 - first;
    assert_eq!(workers[spare].requests(), 0);
    workers[first].kill();
    assert_eq!(rest(&mut stream).await.unwrap(), " world");

    let (metadata, request) = workers[spare].last();
    let resume = v1::Resume {
        token_ids: vec![1],
        text_offset: 5,
    };
    assert_eq!(request.resume, Some(resume));
    assert_eq!(request.sampling.unwrap().seed, Some(7), "the first worker's seed");
    assert_eq!(request.input, prompt("demo").input);
    for (name, value) in [("x-user-id", "u"), ("x-model-version", "v1")] {
        assert_eq!(metadata.get(name).unwrap(), value);
    }
    assert!(metadata.get("grpc-timeout").is_some());
    let trailers = stream.trailers().await.unwrap().unwrap();
    assert!(trailers.get_bin("penstock-stats-bin").is_some());
}

#[tokio::test]
async fn a_worker_that_says_that_it_cannot_go_on_is_replaced() {
    let (workers, _gateway, mut client) = two(Behaviour::Break(Status::unavailable("shutting down"))).await;
    let mut stream = client.generate(prompt("demo")).await.unwrap().into_inner();
    assert_eq!(rest(&mut stream).await.unwrap(), "Hello world");
    assert_eq!([workers[0].requests(), workers[1].requests()], [1, 1]);
}

#[tokio::test]
async fn a_reply_that_is_complete_needs_no_other_worker() {
    let (mut workers, _gateway, mut client) = two(Behaviour::Mute).await;
    let mut stream = client.generate(prompt("demo")).await.unwrap().into_inner();
    for text in ["Hello", " world"] {
        assert_eq!(stream.message().await.unwrap().unwrap().text, text);
    }
    let first = usize::from(workers[0].requests() == 0);
    workers[first].kill();
    assert_eq!(rest(&mut stream).await.unwrap(), "");
    assert_eq!(workers[1 - first].requests(), 0);
}

#[tokio::test]
async fn a_reply_waits_for_its_worker_to_come_back_where_there_is_no_other() {
    let mut worker = TestWorker::start(Behaviour::Hang).await;
    let gateway = TestGateway::start(view(0, vec![worker.endpoint("w", &["v1"])])).await;
    let mut client = gateway.client().await;
    let mut stream = client.generate(prompt("demo")).await.unwrap().into_inner();
    assert_eq!(stream.message().await.unwrap().unwrap().text, "Hello");
    let address = worker.address;
    worker.kill();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let _again = TestWorker::start_on(address, Behaviour::Speak).await;
    assert_eq!(rest(&mut stream).await.unwrap(), " world");
}

#[tokio::test]
async fn the_deadline_holds_while_nobody_takes_over() {
    let mut worker = TestWorker::start(Behaviour::Hang).await;
    let gateway = TestGateway::start(view(0, vec![worker.endpoint("w", &["v1"])])).await;
    let mut client = gateway.client().await;
    let asked = with(prompt("demo"), &[("grpc-timeout", "800m")]);
    let mut stream = client.generate(asked).await.unwrap().into_inner();
    assert_eq!(stream.message().await.unwrap().unwrap().text, "Hello");
    worker.kill();
    let status = rest(&mut stream).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
}
