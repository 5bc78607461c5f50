//! The bundled demo model, for real.

use std::{path::Path, time::Duration};

use penstock_proto::v1::{self, generate_request::Input, grammar::Kind};
use tonic::Code;
use tonic_types::StatusExt as _;
use worker::{Config, ModelSpec, RunnerKind};

use crate::harness::{Running, config, generate, prompt, start, store, tokens, with};

/// The bundled model, for real.
async fn demo() -> Running {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/models/demo/v2");
    let models = vec![ModelSpec {
        model: "demo".into(),
        revision: "v2".into(),
        path,
    }];
    let fake = config(store(), &[], Duration::ZERO);
    start(Config {
        models,
        runner: RunnerKind::Candle,
        ..fake
    })
    .await
}

fn constrained(kind: Kind, sampling: v1::SamplingParams) -> v1::GenerateRequest {
    v1::GenerateRequest {
        grammar: Some(v1::Grammar { kind: Some(kind) }),
        ..prompt("The capital of France is", sampling)
    }
}

#[tokio::test]
async fn replies_are_members_of_their_grammars() {
    let mut running = demo().await;
    let schema = r#"{"type":"object","properties":{"city":{"type":"string","maxLength":12},
        "large":{"type":"boolean"}},"required":["city","large"],"additionalProperties":false}"#;
    let choices = v1::Choices {
        texts: vec!["Paris".into(), "Rome".into()],
    };
    for (seed, kind) in [
        Kind::JsonSchema(schema.into()),
        Kind::Regex("[A-Z][a-z]{2,8}: [0-9]{3}".into()),
        Kind::Lark("start: pair+\npair: \"(\" /[ab]/ \")\"\n".into()),
        Kind::Choices(choices),
    ]
    .into_iter()
    .enumerate()
    {
        let sampling = v1::SamplingParams {
            seed: Some(seed as u64),
            max_tokens: Some(200),
            ..Default::default()
        };
        let request = v1::GenerateRequest {
            top_logprobs: Some(2),
            ..constrained(kind.clone(), sampling)
        };
        let reply = generate(&mut running.client, with(request, &[])).await.unwrap();
        let text = reply.text();
        let last = reply.chunks.last().unwrap();
        let ended = last.finish_reason() == v1::FinishReason::Stop;
        // Of these, only the Lark grammar can go on for ever.
        assert_eq!(ended, !reply.stats.unwrap().grammar_failed, "{text}");
        let matches = match kind {
            Kind::JsonSchema(_) => {
                serde_json::from_str::<serde_json::Value>(&text).unwrap()["large"].is_boolean()
            }
            Kind::Regex(_) => text.len() >= 8 && text.contains(": "),
            Kind::Lark(_) => text.starts_with('('),
            _ => ["Paris", "Rome"].contains(&text.as_str()),
        };
        assert!(matches, "{text}");
        let logprobs = reply.chunks.iter().flat_map(|chunk| &chunk.logprobs);
        assert!(
            logprobs
                .flat_map(|token| &token.top)
                .all(|top| top.logprob.is_finite())
        );
    }
}

#[tokio::test]
async fn a_grammar_that_cannot_be_enforced_is_refused_with_its_keyword() {
    let mut running = demo().await;
    let schema = r#"{"type":"array","items":{"not":{"type":"null"}}}"#;
    let request = constrained(Kind::JsonSchema(schema.into()), tokens(9));
    let status = generate(&mut running.client, with(request, &[]))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(
        status.message().contains("\"not\"") && status.message().contains("/items/not"),
        "{}",
        status.message()
    );
    let details = status.get_details_bad_request().unwrap();
    assert_eq!(details.field_violations[0].field, "grammar");
}

#[tokio::test]
async fn a_reply_that_ends_before_its_grammar_counts_as_failed() {
    let mut running = demo().await;
    let request = constrained(Kind::Regex("[0-9]{50}".into()), tokens(5));
    let reply = generate(&mut running.client, with(request, &[])).await.unwrap();
    assert_eq!(
        reply.chunks.last().unwrap().finish_reason(),
        v1::FinishReason::Length
    );
    assert!(reply.stats.unwrap().grammar_failed);
}

#[tokio::test]
async fn a_bias_and_a_least_length_change_the_reply() {
    let mut running = demo().await;
    let greedy = v1::SamplingParams {
        temperature: Some(0.0),
        max_tokens: Some(8),
        ..Default::default()
    };
    let plain = prompt("The capital of France is", greedy.clone());
    let plain = generate(&mut running.client, with(plain, &[])).await.unwrap();
    let banned = plain.ids()[0];
    let biased = v1::SamplingParams {
        logit_bias: [(banned, -100.0)].into(),
        ..greedy.clone()
    };
    let biased = prompt("The capital of France is", biased);
    let biased = generate(&mut running.client, with(biased, &[])).await.unwrap();
    assert!(!biased.ids().contains(&banned));

    // The token that came first would end the reply at once.
    let stopped = v1::SamplingParams {
        stop_token_ids: vec![banned],
        min_tokens: Some(4),
        ..greedy
    };
    let stopped = prompt("The capital of France is", stopped);
    let stopped = generate(&mut running.client, with(stopped, &[])).await.unwrap();
    assert!(stopped.ids().len() >= 4);
    assert!(!stopped.ids()[..4].contains(&banned));
}

#[tokio::test]
async fn an_echoed_prompt_has_log_probabilities_cached_or_not() {
    let mut running = demo().await;
    let text = "The capital of France is Paris. ".repeat(20);
    let mut told = None;
    // Drawn without a seed a reply may end at once.
    let whole = v1::SamplingParams {
        ignore_eos: Some(true),
        ..tokens(3)
    };
    for _ in 0..2 {
        let request = v1::GenerateRequest {
            echo: true,
            top_logprobs: Some(1),
            ..prompt(&text, whole.clone())
        };
        let reply = generate(&mut running.client, with(request.clone(), &[]))
            .await
            .unwrap();
        let logprobs: Vec<_> = reply.chunks.iter().flat_map(|chunk| &chunk.logprobs).collect();
        let prompt_tokens = reply.usage().prompt_tokens as usize;
        assert!(reply.text().starts_with(&text));
        assert_eq!(logprobs.len(), prompt_tokens + 3);
        assert_eq!(
            logprobs.iter().map(|token| token.token_id).collect::<Vec<_>>(),
            reply.ids()
        );
        assert!(logprobs[0].logprob.is_nan());
        assert!(
            logprobs[1..]
                .iter()
                .all(|token| token.logprob <= 0.0 && token.top.len() == 1)
        );
        let prompt: Vec<f32> = logprobs[1..prompt_tokens]
            .iter()
            .map(|token| token.logprob)
            .collect();
        if let Some(cold) = &told {
            assert_eq!(cold, &prompt);
        }
        // Another worker that goes on in the middle of the prompt tells the rest of it, and no text twice.
        let resume = v1::Resume {
            token_ids: reply.ids()[..30].to_vec(),
            text_offset: text.len() as u64,
        };
        let request = v1::GenerateRequest {
            resume: Some(resume),
            ..request
        };
        let rest = generate(&mut running.client, with(request, &[])).await.unwrap();
        assert_eq!(rest.ids()[..prompt_tokens - 30], reply.ids()[30..prompt_tokens]);
        let again = rest.chunks.iter().flat_map(|chunk| &chunk.logprobs);
        let again: Vec<f32> = again
            .take(prompt_tokens - 30)
            .map(|token| token.logprob)
            .collect();
        assert_eq!(again, prompt[29..]);
        assert!(!rest.text().contains(&text));
        told = Some(prompt);
        assert_eq!(reply.usage().cached_tokens, 0);
    }
}

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
        // Tokens that come together are told together: a busy machine may make one chunk of all of them.
        let mut whole = generate(&mut first.client, with(request.clone(), &[]))
            .await
            .unwrap();
        for _ in 0..50 {
            if whole.chunks.len() >= 3 {
                break;
            }
            whole = generate(&mut first.client, with(request.clone(), &[]))
                .await
                .unwrap();
        }
        assert!(
            whole.chunks.len() >= 3,
            "a reply in {} chunks has no middle",
            whole.chunks.len()
        );
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

#[tokio::test]
async fn scores_are_the_log_probabilities_that_an_echo_tells() {
    use v1::{continuation, score_request};
    let mut running = demo().await;
    let text = "The capital of France is";
    let continuations = [" Paris.", " Rome.", " purple"];
    let kind = |text: &str| v1::Continuation {
        kind: Some(continuation::Kind::Text(text.into())),
    };
    let request = v1::ScoreRequest {
        input: Some(score_request::Input::Prompt(text.into())),
        continuations: continuations.map(kind).into(),
        token_logprobs: true,
        ..Default::default()
    };
    let scored = running.client.score(request.clone()).await.unwrap().into_inner();
    assert_eq!(scored.scores.len(), 3);
    for (continuation, score) in continuations.iter().zip(&scored.scores) {
        let echo = v1::GenerateRequest {
            echo: true,
            top_logprobs: Some(1),
            ..prompt(&format!("{text}{continuation}"), tokens(1))
        };
        let reply = generate(&mut running.client, with(echo, &[])).await.unwrap();
        let prompt_tokens = reply.usage().prompt_tokens as usize;
        let told: Vec<_> = reply.chunks.iter().flat_map(|chunk| &chunk.logprobs).collect();
        let told = &told[prompt_tokens - score.token_ids.len()..prompt_tokens];
        assert_eq!(
            told.iter().map(|token| token.token_id).collect::<Vec<_>>(),
            score.token_ids
        );
        for (token, &logprob) in told.iter().zip(&score.token_logprobs) {
            assert!((token.logprob - logprob).abs() < 1e-3, "{token:?} {logprob}");
        }
        let sum: f64 = score
            .token_logprobs
            .iter()
            .map(|&logprob| f64::from(logprob))
            .sum();
        assert!((score.logprob - sum).abs() < 1e-6);
        let greedy = told.iter().all(|token| token.top[0].token_id == token.token_id);
        assert_eq!(score.is_greedy, greedy);
    }
    let [paris, rome, purple] = [0, 1, 2].map(|index: usize| scored.scores[index].logprob);
    assert!(paris > rome && rome > purple, "{paris} {rome} {purple}");

    // The ids of the prompt and of a continuation give the same; a second time most of it is cached.
    let ids = running
        .client
        .tokenize(v1::TokenizeRequest {
            input: Some(v1::tokenize_request::Input::Prompt(text.into())),
            ..Default::default()
        })
        .await
        .unwrap()
        .into_inner()
        .ids;
    let by_ids = v1::ScoreRequest {
        input: Some(score_request::Input::InputIds(v1::TokenIds { ids })),
        continuations: vec![v1::Continuation {
            kind: Some(continuation::Kind::Ids(v1::TokenIds {
                ids: scored.scores[0].token_ids.clone(),
            })),
        }],
        ..request.clone()
    };
    let again = running.client.score(by_ids).await.unwrap().into_inner();
    assert!((again.scores[0].logprob - paris).abs() < 1e-3);

    // Behind a chat, too.
    let message = |content: &str| v1::ChatMessage {
        role: "user".into(),
        content: content.into(),
    };
    let chat = v1::ScoreRequest {
        input: Some(score_request::Input::Chat(v1::Chat {
            messages: vec![message("What is the capital of France?")],
        })),
        ..request
    };
    let chat = running.client.score(chat).await.unwrap().into_inner();
    assert!(
        chat.scores[0].logprob > chat.scores[2].logprob,
        "{:?}",
        chat.scores
    );
}

#[tokio::test]
async fn a_score_that_cannot_be_given_names_its_field() {
    use v1::{continuation::Kind as Of, score_request::Input as Before};
    let mut running = demo().await;
    let text = |text: &str| v1::Continuation {
        kind: Some(Of::Text(text.into())),
    };
    let ids = |ids: Vec<u32>| v1::Continuation {
        kind: Some(Of::Ids(v1::TokenIds { ids })),
    };
    let good = v1::ScoreRequest {
        input: Some(Before::Prompt("One".into())),
        continuations: vec![text(" two")],
        ..Default::default()
    };
    for (field, request) in [
        (
            "input",
            v1::ScoreRequest {
                input: None,
                ..good.clone()
            },
        ),
        (
            "input",
            v1::ScoreRequest {
                input: Some(Before::InputIds(v1::TokenIds::default())),
                ..good.clone()
            },
        ),
        (
            "continuations",
            v1::ScoreRequest {
                continuations: vec![],
                ..good.clone()
            },
        ),
        (
            "continuations",
            v1::ScoreRequest {
                continuations: vec![text("a"); 257],
                ..good.clone()
            },
        ),
        (
            "continuations[1]",
            v1::ScoreRequest {
                continuations: vec![text("a"), text("")],
                ..good.clone()
            },
        ),
        (
            "continuations[0]",
            v1::ScoreRequest {
                continuations: vec![ids(vec![u32::MAX])],
                ..good.clone()
            },
        ),
        (
            "continuations[0]",
            v1::ScoreRequest {
                continuations: vec![ids(vec![1; 100_000])],
                ..good.clone()
            },
        ),
        (
            "priority",
            v1::ScoreRequest {
                priority: 101,
                ..good.clone()
            },
        ),
        (
            "cache_salt",
            v1::ScoreRequest {
                cache_salt: "x".repeat(257),
                ..good.clone()
            },
        ),
    ] {
        let status = running.client.score(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        let details = status.get_error_details();
        let named = &details.bad_request().unwrap().field_violations[0].field;
        assert_eq!(named, field, "{status}");
    }
    assert!(running.client.score(good).await.is_ok());
}

#[tokio::test]
async fn prefixes_are_shared_within_one_salt_only() {
    let mut running = demo().await;
    let text = "A long beginning that many requests have in common. ".repeat(8);
    for (salt, cached) in [("", false), ("a", false), ("a", true), ("b", false), ("", true)] {
        let request = v1::GenerateRequest {
            cache_salt: salt.into(),
            ..prompt(&text, tokens(1))
        };
        let reply = generate(&mut running.client, with(request, &[])).await.unwrap();
        assert_eq!(reply.usage().cached_tokens > 0, cached, "{salt:?}");
    }
}

#[tokio::test]
async fn two_ranks_reply_like_one() {
    let mut replies = Vec::new();
    for tensor_parallel_size in [1, 2] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/models/demo/v2");
        let models = vec![ModelSpec {
            model: "demo".into(),
            revision: "v2".into(),
            path,
        }];
        let mut running = start(Config {
            models,
            runner: RunnerKind::Candle,
            dtype: Some(worker::Dtype::F32),
            tensor_parallel_size,
            ..config(store(), &[], Duration::ZERO)
        })
        .await;
        let greedy = v1::SamplingParams {
            temperature: Some(0.0),
            ..tokens(40)
        };
        let reply = generate(
            &mut running.client,
            with(prompt("The capital of France is", greedy), &[]),
        )
        .await
        .unwrap();
        replies.push(reply.ids());
    }
    assert_eq!(replies[0], replies[1]);
}

/// The demo checkpoint as one GGUF file, tokenizer and template included.
fn gguf(to: &Path) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/models/demo/v2");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/gguf.py");
    let made = std::process::Command::new("python3")
        .args([script.as_path(), &dir, to])
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

#[tokio::test]
async fn a_gguf_file_answers_a_chat_with_its_own_tokenizer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("demo.gguf");
    gguf(&path);
    let mut texts = Vec::new();
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/models/demo/v2");
    for path in [own, path] {
        let mut running = start(Config {
            models: vec![ModelSpec {
                model: "demo".into(),
                revision: "v2".into(),
                path,
            }],
            runner: RunnerKind::Candle,
            dtype: Some(worker::Dtype::F32),
            ..config(store(), &[], Duration::ZERO)
        })
        .await;
        let request = v1::GenerateRequest {
            input: Some(Input::Chat(v1::Chat {
                messages: vec![v1::ChatMessage {
                    role: "user".into(),
                    content: "What is the capital of France?".into(),
                }],
            })),
            ..prompt(
                "",
                v1::SamplingParams {
                    temperature: Some(0.0),
                    ..tokens(30)
                },
            )
        };
        texts.push(
            generate(&mut running.client, with(request, &[]))
                .await
                .unwrap()
                .text(),
        );
    }
    assert!(texts[0].contains("Paris"), "{texts:?}");
    assert_eq!(texts[0], texts[1]);
}
