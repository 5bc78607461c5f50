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
