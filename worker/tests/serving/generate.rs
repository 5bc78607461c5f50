//! Generate: replies, refusals, deadlines, cancellation.

use std::time::Duration;

use futures_util::StreamExt as _;
use penstock_proto::v1::{self, generate_request::Input, generate_response::StoppedBy};
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::harness::{
    config, eventually, fast, generate, metric, prompt, read, slow, start, store, tokens, with,
};

#[tokio::test]
async fn a_reply_has_contiguous_chunks_usage_metadata_and_stats() {
    let mut running = slow().await;
    let metadata = [
        ("x-model-version", "v1"),
        ("x-rollout-epoch", "7"),
        ("x-assignment-reason", "bucket"),
    ];
    let reply = generate(&mut running.client, with(prompt("Hello", tokens(12)), &metadata))
        .await
        .unwrap();
    assert!(reply.status.is_none(), "{reply:?}");
    let mut offset = 0;
    for chunk in &reply.chunks {
        assert_eq!(chunk.text_offset, offset);
        offset += chunk.text.len() as u64;
    }
    assert!(
        reply.chunks.len() > 1,
        "tokens that come apart leave apart: {reply:?}"
    );
    assert_eq!(reply.ids().len(), 12);
    let last = reply.chunks.last().unwrap();
    assert_eq!(last.finish_reason(), v1::FinishReason::Length);
    assert_eq!(
        reply.usage(),
        v1::Usage {
            prompt_tokens: 5,
            completion_tokens: 12,
            cached_tokens: 0
        }
    );
    for (name, value) in metadata {
        assert_eq!(reply.headers.get(name).unwrap(), value);
    }
    let stats = reply.stats.unwrap();
    assert_eq!((stats.prompt_tokens, stats.completion_tokens), (5, 12));
    assert_eq!(stats.finish_reason(), v1::FinishReason::Length);
    assert!(stats.ttft_us > 0 && stats.tpot_us >= 9_000, "{stats:?}");
}

#[tokio::test]
async fn tokens_that_pile_up_are_sent_together_and_none_is_lost() {
    let mut running = fast().await;
    let mut stream = running
        .client
        .generate(prompt("Hello", tokens(4000)))
        .await
        .unwrap()
        .into_inner();
    let first = stream.next().await.unwrap().unwrap();
    // This thread runs the worker too: while it rests, the engine fills the reply's buffer.
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(5));
        tokio::task::yield_now().await;
    }
    let rest = read(stream).await;
    let counts = rest.chunks.iter().map(|chunk| chunk.token_ids.len());
    assert!(counts.clone().max().unwrap() > 16, "{counts:?}");
    assert_eq!(first.token_ids.len() + counts.sum::<usize>(), 4000);
    assert_eq!(rest.usage().completion_tokens, 4000);
}

#[tokio::test]
async fn a_seed_is_drawn_and_told_where_none_is_given() {
    let mut running = fast().await;
    let mut seeds = Vec::new();
    for _ in 0..2 {
        let reply = generate(&mut running.client, with(prompt("Hello", tokens(1)), &[]))
            .await
            .unwrap();
        seeds.push(
            reply
                .headers
                .get("x-seed")
                .unwrap()
                .to_str()
                .unwrap()
                .parse::<u64>()
                .unwrap(),
        );
    }
    assert_ne!(seeds[0], seeds[1]);
    let given = v1::SamplingParams {
        seed: Some(u64::MAX),
        ..tokens(1)
    };
    let reply = generate(&mut running.client, with(prompt("Hello", given), &[]))
        .await
        .unwrap();
    assert_eq!(reply.headers.get("x-seed").unwrap(), &u64::MAX.to_string());
}

#[tokio::test]
async fn a_stop_string_ends_the_reply_and_bills_no_late_token() {
    let mut running = fast().await;
    let seeded = v1::SamplingParams {
        seed: Some(1),
        ..tokens(40)
    };
    let whole = generate(&mut running.client, with(prompt("Hello", seeded.clone()), &[]))
        .await
        .unwrap();
    let text = whole.text();
    let middle: Vec<char> = text.chars().skip(text.chars().count() / 2).take(3).collect();
    let stop: String = middle.into_iter().collect();
    let stopped = v1::SamplingParams {
        stop: vec![stop.clone()],
        ..seeded
    };
    let reply = generate(&mut running.client, with(prompt("Hello", stopped), &[]))
        .await
        .unwrap();
    let before = &text[..text.find(&stop).unwrap()];
    assert_eq!(reply.text(), before);
    let last = reply.chunks.last().unwrap();
    assert_eq!(last.finish_reason(), v1::FinishReason::Stop);
    assert_eq!(last.stopped_by, Some(StoppedBy::StopString(stop)));
    assert_eq!(reply.usage().completion_tokens as usize, reply.ids().len());
    assert!(reply.usage().completion_tokens < whole.usage().completion_tokens);
    assert_eq!(
        reply.stats.unwrap().completion_tokens,
        reply.usage().completion_tokens
    );
}

#[tokio::test]
async fn a_chat_is_rendered_and_echo_comes_first() {
    let mut running = fast().await;
    let messages = vec![v1::ChatMessage {
        role: "user".into(),
        content: "地球".into(),
    }];
    let chat = v1::Chat { messages };
    let tokenize = v1::TokenizeRequest {
        model: "demo".into(),
        input: Some(v1::tokenize_request::Input::Chat(chat.clone())),
    };
    let encoded = running.client.tokenize(tokenize).await.unwrap().into_inner();
    assert!(encoded.text.contains("地球"), "{encoded:?}");
    let request = v1::GenerateRequest {
        input: Some(Input::Chat(chat)),
        echo: true,
        ..prompt("", tokens(3))
    };
    let reply = generate(&mut running.client, with(request, &[])).await.unwrap();
    assert_eq!(reply.chunks[0].text, encoded.text);
    assert_eq!(reply.chunks[0].token_ids, encoded.ids);
    assert_eq!(reply.ids().len(), encoded.ids.len() + 3);
    assert_eq!(reply.usage().completion_tokens, 3);
}

#[tokio::test]
async fn logprobs_come_one_per_token() {
    let mut running = fast().await;
    let request = v1::GenerateRequest {
        top_logprobs: Some(2),
        ..prompt("Hello", tokens(4))
    };
    let reply = generate(&mut running.client, with(request, &[])).await.unwrap();
    for chunk in &reply.chunks {
        let ids: Vec<u32> = chunk.logprobs.iter().map(|logprob| logprob.token_id).collect();
        assert_eq!(ids, chunk.token_ids);
        assert!(
            chunk.logprobs.iter().all(|logprob| logprob.logprob <= 0.0),
            "{chunk:?}"
        );
    }
}

#[tokio::test]
async fn bad_input_is_refused_with_the_field_at_fault() {
    let mut running = fast().await;
    let long = "x".repeat(1 << 20);
    let ids = |ids: &[u32]| v1::GenerateRequest {
        input: Some(Input::InputIds(v1::TokenIds { ids: ids.to_vec() })),
        ..prompt("", tokens(1))
    };
    let cases = [
        (
            "input",
            v1::GenerateRequest {
                input: None,
                ..prompt("", tokens(1))
            },
        ),
        ("input", prompt("", tokens(1))),
        ("input", ids(&[])),
        ("input", prompt(&long, tokens(1))),
        ("input_ids.ids[1]", ids(&[1, u32::MAX])),
        (
            "chat.messages",
            v1::GenerateRequest {
                input: Some(Input::Chat(v1::Chat::default())),
                ..prompt("", tokens(1))
            },
        ),
        (
            "sampling.temperature",
            prompt(
                "x",
                v1::SamplingParams {
                    temperature: Some(-1.0),
                    ..tokens(1)
                },
            ),
        ),
        (
            "sampling.top_p",
            prompt(
                "x",
                v1::SamplingParams {
                    top_p: Some(f32::NAN),
                    ..tokens(1)
                },
            ),
        ),
        ("sampling.max_tokens", prompt("x", tokens(0))),
        (
            "sampling.stop",
            prompt(
                "x",
                v1::SamplingParams {
                    stop: vec!["a".into(); 17],
                    ..tokens(1)
                },
            ),
        ),
        (
            "sampling.stop[0]",
            prompt(
                "x",
                v1::SamplingParams {
                    stop: vec![String::new()],
                    ..tokens(1)
                },
            ),
        ),
        (
            "sampling.stop_token_ids",
            prompt(
                "x",
                v1::SamplingParams {
                    stop_token_ids: vec![u32::MAX],
                    ..tokens(1)
                },
            ),
        ),
        (
            "top_logprobs",
            v1::GenerateRequest {
                top_logprobs: Some(21),
                ..prompt("x", tokens(1))
            },
        ),
    ];
    for (field, request) in cases {
        let status = generate(&mut running.client, with(request, &[]))
            .await
            .unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{field}: {status:?}");
        let details = status
            .get_details_bad_request()
            .unwrap_or_else(|| panic!("{field}: {status:?}"));
        assert_eq!(details.field_violations[0].field, field, "{status:?}");
    }
    let status = generate(
        &mut running.client,
        with(prompt("x", tokens(1)), &[("grpc-timeout", "soon")]),
    )
    .await
    .unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    // After all that it serves.
    assert_eq!(
        generate(&mut running.client, with(prompt("x", tokens(1)), &[]))
            .await
            .unwrap()
            .ids()
            .len(),
        1
    );
}

#[tokio::test]
async fn an_unknown_model_is_not_found_and_a_wrong_revision_fails_its_precondition() {
    let mut running = start(config(
        store(),
        &["demo@v1", "demo@v2", "other@a"],
        Duration::ZERO,
    ))
    .await;
    let unknown = v1::GenerateRequest {
        model: "nope".into(),
        ..prompt("x", tokens(1))
    };
    let status = generate(&mut running.client, with(unknown, &[]))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    assert!(
        status.message().contains("demo@v1, demo@v2, other@a"),
        "{status:?}"
    );
    let status = generate(
        &mut running.client,
        with(prompt("x", tokens(1)), &[("x-model-version", "v9")]),
    )
    .await
    .unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    let unnamed = v1::GenerateRequest {
        model: String::new(),
        ..prompt("x", tokens(1))
    };
    let status = generate(&mut running.client, with(unnamed, &[]))
        .await
        .unwrap_err();
    assert_eq!(
        status.code(),
        Code::InvalidArgument,
        "two models are served: {status:?}"
    );
    for (pin, serves) in [(None, "v1"), (Some("v2"), "v2")] {
        let metadata: Vec<_> = pin.into_iter().map(|pin| ("x-model-version", pin)).collect();
        let reply = generate(&mut running.client, with(prompt("x", tokens(1)), &metadata))
            .await
            .unwrap();
        assert_eq!(reply.headers.get("x-model-version").unwrap(), serves);
    }
}

#[tokio::test]
async fn a_deadline_ends_the_stream_with_what_was_ready_before() {
    let mut running = slow().await;
    let request = with(prompt("Hello", tokens(1000)), &[("grpc-timeout", "200m")]);
    let reply = generate(&mut running.client, request).await.unwrap();
    let status = reply.status.as_ref().unwrap();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    assert!(
        !reply.ids().is_empty() && reply.ids().len() < 100,
        "{} tokens",
        reply.ids().len()
    );
    assert_eq!(reply.stats.unwrap().completion_tokens as usize, reply.ids().len());
}

#[tokio::test]
async fn a_dropped_stream_frees_its_place_and_its_pages() {
    let mut running = slow().await;
    let free = metric(&running, "penstock_kv_pages_free").await;
    let total = metric(&running, "penstock_kv_pages_total").await;
    assert_eq!(free, total);
    let mut stream = running
        .client
        .generate(prompt("Hello", tokens(4000)))
        .await
        .unwrap()
        .into_inner();
    stream.next().await.unwrap().unwrap();
    eventually("the sequence runs", || async {
        metric(&running, "penstock_engine_running").await == 1.0
    })
    .await;
    drop(stream);
    eventually("the sequence ends", || async {
        metric(&running, "penstock_engine_running").await == 0.0
    })
    .await;
    let cached = metric(&running, "penstock_kv_pages_cached").await;
    assert_eq!(metric(&running, "penstock_kv_pages_free").await + cached, total);
}

#[tokio::test]
async fn a_full_queue_says_when_to_come_back() {
    let slow = config(store(), &["demo@v1"], Duration::from_millis(10));
    let mut running = start(worker::Config {
        max_running: 1,
        max_waiting: 1,
        ..slow
    })
    .await;
    let mut first = running
        .client
        .generate(prompt("Hello", tokens(4000)))
        .await
        .unwrap()
        .into_inner();
    first.next().await.unwrap().unwrap();
    let second = running
        .client
        .generate(prompt("Hello", tokens(1)))
        .await
        .unwrap()
        .into_inner();
    let status = generate(&mut running.client, with(prompt("Hello", tokens(1)), &[]))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    let retry = status.get_details_retry_info().unwrap().retry_delay.unwrap();
    assert!(retry > Duration::ZERO, "{status:?}");
    // The one that waited is served once there is room.
    drop(first);
    assert_eq!(read(second).await.ids().len(), 1);
}

#[tokio::test]
async fn models_are_listed_with_their_revisions() {
    let mut running = start(config(store(), &["demo@v1", "demo@v2"], Duration::ZERO)).await;
    let list = running
        .client
        .list_models(v1::ListModelsRequest {})
        .await
        .unwrap()
        .into_inner();
    let [model] = list.models.as_slice() else {
        panic!("{list:?}")
    };
    assert_eq!((model.name.as_str(), model.stable.as_str()), ("demo", "v1"));
    assert_eq!(model.revisions.len(), 2);
    assert!(
        model
            .revisions
            .iter()
            .all(|revision| revision.digest.len() == 64 && revision.context_length > 0)
    );
    assert_ne!(model.revisions[0].digest, model.revisions[1].digest);
}
