//! The bundled demo model, for real.

use std::{path::Path, time::Duration};

use penstock_proto::v1::{self, generate_request::Input};
use worker::{Config, ModelSpec, RunnerKind};

use crate::harness::{config, generate, prompt, start, store, with};

#[tokio::test]
async fn the_demo_model_answers_and_its_prompt_is_found_again_in_the_cache() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/models/demo/v1");
    let models = vec![ModelSpec {
        model: "demo".into(),
        revision: "v1".into(),
        path,
    }];
    let fake = config(store(), &[], Duration::ZERO);
    // A page of one token, so that short prompts are cached too.
    let mut running = start(Config {
        models,
        runner: RunnerKind::Candle,
        page_size: 1,
        ..fake
    })
    .await;
    let messages = vec![v1::ChatMessage {
        role: "user".into(),
        content: "地球的周长是多少?".into(),
    }];
    let greedy = v1::SamplingParams {
        temperature: Some(0.0),
        ..Default::default()
    };
    let question = v1::GenerateRequest {
        input: Some(Input::Chat(v1::Chat { messages })),
        ..prompt("", greedy)
    };
    let cold = generate(&mut running.client, with(question.clone(), &[]))
        .await
        .unwrap();
    assert!(
        cold.text().contains("40,075") || cold.text().contains("40075"),
        "{:?}",
        cold.text()
    );
    assert_eq!(
        cold.chunks.last().unwrap().finish_reason(),
        v1::FinishReason::Stop
    );
    assert!(matches!(
        cold.chunks.last().unwrap().stopped_by,
        Some(v1::generate_response::StoppedBy::StopTokenId(_))
    ));
    let warm = generate(&mut running.client, with(question, &[])).await.unwrap();
    assert_eq!(warm.ids(), cold.ids());
    let usage = warm.usage();
    assert_eq!(
        (cold.usage().cached_tokens, usage.cached_tokens),
        (0, usage.prompt_tokens - 1)
    );
}

#[tokio::test]
async fn a_reply_that_another_worker_began_ends_as_it_would_have_there() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/models/demo/v1");
    let models = vec![ModelSpec {
        model: "demo".into(),
        revision: "v1".into(),
        path,
    }];
    let candle = || Config {
        models: models.clone(),
        runner: RunnerKind::Candle,
        ..config(store(), &[], Duration::ZERO)
    };
    let (mut first, mut second) = (start(candle()).await, start(candle()).await);
    let greedy = v1::SamplingParams {
        temperature: Some(0.0),
        max_tokens: Some(24),
        ignore_eos: Some(true),
        ..Default::default()
    };
    let seeded = v1::SamplingParams {
        temperature: Some(1.5),
        seed: Some(11),
        repetition_penalty: Some(1.2),
        frequency_penalty: Some(0.5),
        ..greedy.clone()
    };
    for (sampling, echo) in [(greedy, false), (seeded, true)] {
        let request = v1::GenerateRequest {
            echo,
            ..prompt("Hello, how are you", sampling)
        };
        let whole = generate(&mut first.client, with(request.clone(), &[]))
            .await
            .unwrap();
        assert_eq!(whole.usage().completion_tokens, 24);
        for had in [1, whole.chunks.len() / 2, whole.chunks.len() - 1] {
            let (had, rest) = whole.chunks.split_at(had);
            let resumed = v1::GenerateRequest {
                resume: Some(v1::Resume {
                    token_ids: had.iter().flat_map(|chunk| chunk.token_ids.clone()).collect(),
                    text_offset: had.iter().map(|chunk| chunk.text.len() as u64).sum(),
                }),
                ..request.clone()
            };
            let reply = generate(&mut second.client, with(resumed, &[])).await.unwrap();
            let ids: Vec<u32> = rest.iter().flat_map(|chunk| chunk.token_ids.clone()).collect();
            let text: String = rest.iter().map(|chunk| chunk.text.as_str()).collect();
            assert_eq!((reply.ids(), reply.text()), (ids, text));
            assert_eq!(reply.chunks[0].text_offset, rest[0].text_offset);
            let usage = reply.usage();
            assert_eq!(usage.prompt_tokens, whole.usage().prompt_tokens);
            assert_eq!(usage.completion_tokens, 24);
            assert!(usage.cached_tokens <= usage.prompt_tokens);
        }
    }
    let foreign = v1::GenerateRequest {
        resume: Some(v1::Resume {
            token_ids: vec![5],
            text_offset: 1000,
        }),
        ..prompt("Hello", v1::SamplingParams::default())
    };
    let status = generate(&mut first.client, with(foreign, &[])).await.unwrap_err();
    assert!(status.message().contains("resume.text_offset"), "{status}");
}
