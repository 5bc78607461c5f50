//! HTTP: the shapes that OpenAI's and SGLang's clients rely on, and errors.

use std::sync::atomic::Ordering;

use penstock_proto::v1::{self, generate_request::Input};
use serde_json::{Value, json};
use tonic::Status;
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::support::{Behaviour, HttpReply, TestGateway, TestWorker, eventually, http, view};

const CHAT: &str = "/v1/chat/completions";

async fn one(behaviour: Behaviour) -> (TestWorker, TestGateway) {
    let worker = TestWorker::start(behaviour).await;
    let gateway = TestGateway::start(view(0, vec![worker.endpoint("w", &["v1", "v2", "v3"])])).await;
    (worker, gateway)
}

async fn post(gateway: &TestGateway, path: &str, body: Value) -> HttpReply {
    http("POST", gateway.address, path, &[], body.to_string()).await
}

/// A chat with further fields.
fn chat(more: Value) -> Value {
    let mut body = json!({ "model": "demo", "messages": [{ "role": "user", "content": "Hello" }] });
    let fields = more.as_object().unwrap().clone();
    body.as_object_mut().unwrap().extend(fields);
    body
}

#[tokio::test]
async fn a_chat_is_asked_and_answered_in_openais_form() {
    let (worker, gateway) = one(Behaviour::Speak).await;
    let body = chat(json!({
        "messages": [
            { "role": "developer", "content": "Be brief." },
            { "role": "user", "content": [{ "type": "text", "text": "Hel" }, { "type": "text", "text": "lo" }] },
        ],
        "temperature": 0.5, "top_p": 0.9, "seed": -1, "max_completion_tokens": 7, "max_tokens": 9, "stop": "\n",
        "n": 1, "tools": [], "response_format": { "type": "text" }, "stream_options": null, "store": true, "unheard_of": {},
    }));
    let reply = post(&gateway, CHAT, body).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    let asked = worker.last().1;
    let Some(Input::Chat(chat)) = &asked.input else {
        panic!("{asked:?}")
    };
    let messages: Vec<_> = chat
        .messages
        .iter()
        .map(|m| (m.role.as_str(), m.content.as_str()))
        .collect();
    assert_eq!(messages, [("system", "Be brief."), ("user", "Hello")]);
    let expected = v1::SamplingParams {
        temperature: Some(0.5),
        top_p: Some(0.9),
        seed: Some(u64::MAX),
        max_tokens: Some(7),
        stop: vec!["\n".into()],
        ..Default::default()
    };
    assert_eq!(asked.sampling, Some(expected));

    let mut answer = reply.json();
    assert!(
        answer["id"].as_str().unwrap().starts_with("chatcmpl-")
            && answer["created"].as_u64().unwrap() > 1_700_000_000
    );
    for name in ["id", "created"] {
        answer.as_object_mut().unwrap().shift_remove(name);
    }
    assert_eq!(
        answer,
        json!({
            "object": "chat.completion",
            "model": "demo",
            "system_fingerprint": "fp_v1_digest-v",
            "choices": [{
                "index": 0,
                "message": { "role": "assistant", "content": "Hello world", "refusal": null },
                "logprobs": null,
                "finish_reason": "stop",
            }],
            "usage": {
                "prompt_tokens": 11, "completion_tokens": 2, "total_tokens": 13,
                "prompt_tokens_details": { "cached_tokens": 4 },
            },
        })
    );
    for (name, value) in [
        ("x-model-version", "v1"),
        ("x-rollout-epoch", "42"),
        ("x-assignment-reason", "request"),
        ("x-seed", "7"),
    ] {
        assert_eq!(reply.headers[name], value, "{name}");
    }
}

#[tokio::test]
async fn a_request_whose_time_is_up_is_told_so_with_its_assignment() {
    let (_worker, gateway) = one(Behaviour::Silent).await;
    let body = chat(json!({})).to_string();
    let reply = http("POST", gateway.address, CHAT, &[("grpc-timeout", "100m")], body).await;
    assert_eq!(reply.status, 504, "{}", reply.body);
    assert_eq!(reply.json()["error"]["type"], "timeout_error");
    assert_eq!(reply.headers["x-model-version"], "v1");
}

#[tokio::test]
async fn a_reply_without_its_last_chunk_is_an_error() {
    let (_worker, gateway) = one(Behaviour::Stop).await;
    let whole = post(&gateway, CHAT, chat(json!({}))).await;
    assert_eq!(whole.status, 500, "{}", whole.body);
    let events = post(&gateway, CHAT, chat(json!({ "stream": true })))
        .await
        .events();
    let message = &events.last().unwrap()["error"]["message"];
    assert!(message.as_str().unwrap().contains("last chunk"), "{events:?}");
}

#[tokio::test]
async fn a_wrong_method_is_told_which_is_right() {
    let gateway = TestGateway::start(view(0, vec![])).await;
    let reply = http("GET", gateway.address, CHAT, &[], "").await;
    assert_eq!(
        (reply.status, &reply.headers["allow"]),
        (405, &"POST".parse().unwrap())
    );
    assert_eq!(reply.json()["error"]["code"], "method_not_allowed");
}

#[tokio::test]
async fn a_streamed_chat_has_one_id_a_role_first_and_the_usage_last() {
    let (_worker, gateway) = one(Behaviour::Speak).await;
    let body = chat(json!({ "stream": true, "stream_options": { "include_usage": true } }));
    let reply = post(&gateway, CHAT, body).await;
    assert_eq!(
        (reply.status, &reply.headers["content-type"]),
        (200, &"text/event-stream".parse().unwrap())
    );
    assert_eq!(reply.headers["x-model-version"], "v1");
    let mut events = reply.events();
    assert_eq!(events.pop().unwrap(), "[DONE]");
    for event in &events {
        assert_eq!(
            (&event["id"], &event["created"]),
            (&events[0]["id"], &events[0]["created"])
        );
        assert_eq!(
            (&event["object"], &event["model"]),
            (&json!("chat.completion.chunk"), &json!("demo"))
        );
    }
    let last = events.pop().unwrap();
    assert_eq!(
        (&last["choices"], &last["usage"]["total_tokens"]),
        (&json!([]), &json!(13))
    );
    assert!(
        events
            .iter()
            .all(|event| event.as_object().unwrap().get("usage") == Some(&Value::Null))
    );
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    let text: String = events
        .iter()
        .filter_map(|event| event["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(text, "Hello world");
    let reasons: Vec<_> = events
        .iter()
        .map(|event| &event["choices"][0]["finish_reason"])
        .collect();
    assert_eq!(reasons.last().unwrap(), &"stop");
    assert!(reasons[..reasons.len() - 1].iter().all(|reason| reason.is_null()));
}

#[tokio::test]
async fn without_include_usage_no_chunk_has_any() {
    let (_worker, gateway) = one(Behaviour::Speak).await;
    let events = post(&gateway, CHAT, chat(json!({ "stream": true })))
        .await
        .events();
    assert!(
        events.iter().all(|event| event.get("usage").is_none()),
        "{events:?}"
    );
    assert_eq!(events.len(), 5, "role, two texts, reason, end: {events:?}");
}

#[tokio::test]
async fn logprobs_come_token_by_token() {
    let (worker, gateway) = one(Behaviour::Speak).await;
    let reply = post(
        &gateway,
        CHAT,
        chat(json!({ "logprobs": true, "top_logprobs": 1 })),
    )
    .await
    .json();
    assert_eq!(worker.last().1.top_logprobs, Some(1));
    let hello = json!({
        "token": "Hello", "logprob": -0.5, "bytes": b"Hello",
        "top_logprobs": [{ "token": "Hello", "logprob": -0.5, "bytes": b"Hello" }],
    });
    assert_eq!(reply["choices"][0]["logprobs"]["content"][0], hello);
    assert_eq!(
        reply["choices"][0]["logprobs"]["content"]
            .as_array()
            .unwrap()
            .len(),
        2
    );

    let body = json!({ "model": "demo", "prompt": "x", "logprobs": 1 });
    let logprobs = post(&gateway, "/v1/completions", body).await.json()["choices"][0]["logprobs"].clone();
    let expected = json!({
        "tokens": ["Hello", " world"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{ "Hello": -0.5 }, { " world": -0.5 }],
        "text_offset": [0, 5],
    });
    assert_eq!(logprobs, expected);
}

#[tokio::test]
async fn a_text_completion_takes_text_or_token_ids() {
    let (worker, gateway) = one(Behaviour::Speak).await;
    let ids = || Input::InputIds(v1::TokenIds { ids: vec![1, 2] });
    for (prompt, input) in [
        (json!("Hello"), Input::Prompt("Hello".into())),
        (json!(["Hello"]), Input::Prompt("Hello".into())),
        (json!([1, 2]), ids()),
        (json!([[1, 2]]), ids()),
    ] {
        let reply = post(
            &gateway,
            "/v1/completions",
            json!({ "model": "demo", "prompt": prompt, "max_tokens": 4 }),
        )
        .await;
        let answer = reply.json();
        assert_eq!(worker.last().1.input, Some(input));
        assert_eq!(
            (&answer["object"], &answer["choices"][0]["text"]),
            (&json!("text_completion"), &json!("Hello world"))
        );
        assert_eq!(
            (
                &answer["choices"][0]["finish_reason"],
                &answer["usage"]["total_tokens"]
            ),
            (&json!("stop"), &json!(13))
        );
    }
    let streamed = json!({ "model": "demo", "prompt": "x", "stream": true, "stream_options": { "include_usage": true } });
    let events = post(&gateway, "/v1/completions", streamed).await.events();
    let texts: Vec<_> = events
        .iter()
        .filter_map(|event| event["choices"][0]["text"].as_str())
        .collect();
    assert_eq!(texts, ["Hello", " world"]);
    assert_eq!(
        (&events[2]["choices"], &events[2]["usage"]["completion_tokens"]),
        (&json!([]), &json!(2))
    );
    assert_eq!(events.last().unwrap(), "[DONE]");
}

#[tokio::test]
async fn what_is_wrong_is_named() {
    let (worker, gateway) = one(Behaviour::Speak).await;
    for (wrong, param) in [
        (json!({ "n": 17 }), "n"),
        (json!({ "tools": [{}] }), "tools"),
        (
            json!({ "response_format": { "type": "xml" } }),
            "response_format.type",
        ),
        (json!({ "logit_bias": { "one": 5 } }), "logit_bias"),
        (json!({ "best_of": 2 }), "best_of"),
        (json!({ "max_tokens": 0 }), "max_tokens"),
        (json!({ "max_completion_tokens": -1 }), "max_completion_tokens"),
        (json!({ "stop": ["a", "b", "c", "d", "e"] }), "stop"),
        (json!({ "temperature": "hot" }), "temperature"),
        (json!({ "top_logprobs": 2 }), "top_logprobs"),
        (json!({ "logprobs": true, "top_logprobs": 21 }), "top_logprobs"),
        (json!({ "stream": "yes" }), "stream"),
        (json!({ "stream_options": {} }), "stream_options"),
        (json!({ "messages": [] }), "messages"),
        (json!({ "messages": "Hello" }), "messages"),
        (json!({ "messages": [{ "role": "user" }] }), "messages[0].content"),
        (
            json!({ "messages": [{ "role": "wizard", "content": "x" }] }),
            "messages[0].role",
        ),
        (
            json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url" }] }] }),
            "messages[0].content[0]",
        ),
        (json!({ "model": 3 }), "model"),
    ] {
        let reply = post(&gateway, CHAT, chat(wrong.clone())).await;
        let error = reply.json()["error"].clone();
        assert_eq!(
            (reply.status, &error["param"]),
            (400, &json!(param)),
            "{wrong}: {error}"
        );
        assert_eq!(error["type"], "invalid_request_error");
        assert!(error["message"].as_str().unwrap().contains(param), "{error}");
        assert!(error.as_object().unwrap().contains_key("code"));
    }
    let missing = post(
        &gateway,
        "/v1/completions",
        json!({ "model": "demo", "prompt": ["a", "b"] }),
    )
    .await;
    assert_eq!(
        (missing.status, &missing.json()["error"]["param"]),
        (400, &json!("prompt"))
    );
    assert_eq!(worker.requests(), 0, "no worker is bothered");
}

#[tokio::test]
async fn bodies_that_are_no_json_or_too_large_are_refused() {
    let (_worker, gateway) = one(Behaviour::Speak).await;
    for body in ["", "{", "[]", "\"x\"", "\u{0}"] {
        let reply = http("POST", gateway.address, CHAT, &[], body).await;
        assert_eq!(reply.status, 400, "{body:?}: {}", reply.body);
        assert!(reply.json()["error"]["message"].is_string());
    }
    let huge = http("POST", gateway.address, CHAT, &[], vec![b' '; 17 << 20]).await;
    assert_eq!(huge.status, 413, "{}", huge.body);
    let nowhere = http("GET", gateway.address, "/v2/nothing", &[], "").await;
    assert_eq!(
        (nowhere.status, nowhere.json()["error"]["code"].clone()),
        (404, json!("not_found"))
    );
}

#[tokio::test]
async fn statuses_of_workers_become_http_statuses() {
    let retry = ErrorDetails::with_retry_info(Some(std::time::Duration::from_millis(2500)));
    let full = Status::with_error_details(tonic::Code::ResourceExhausted, "the queue is full", retry);
    let field = ErrorDetails::with_bad_request_violation("sampling.top_p", "must be in (0, 1], not 2");
    let invalid = Status::with_error_details(
        tonic::Code::InvalidArgument,
        "sampling.top_p must be in (0, 1], not 2",
        field,
    );
    for (status, expected, param) in [
        (invalid, 400, json!("top_p")),
        (Status::failed_precondition("not here"), 412, Value::Null),
        (full, 429, Value::Null),
        (Status::unavailable("draining"), 503, Value::Null),
        (Status::internal("broken"), 500, Value::Null),
    ] {
        let (_worker, gateway) = one(Behaviour::Refuse(status)).await;
        for stream in [false, true] {
            let reply = post(&gateway, CHAT, chat(json!({ "stream": stream }))).await;
            assert_eq!(
                (reply.status, &reply.json()["error"]["param"]),
                (expected, &param),
                "{}",
                reply.body
            );
            assert_eq!(reply.headers["x-model-version"], "v1");
            match expected {
                429 => assert_eq!(reply.headers["retry-after"], "3"),
                503 => assert_eq!(reply.headers["retry-after"], "1"),
                _ => assert!(!reply.headers.contains_key("retry-after")),
            }
        }
    }
    let (_worker, gateway) = one(Behaviour::Speak).await;
    let unknown = post(&gateway, CHAT, chat(json!({ "model": "nothing" }))).await;
    assert_eq!(
        (unknown.status, &unknown.json()["error"]["code"]),
        (404, &json!("model_not_found"))
    );
}

#[tokio::test]
async fn a_reply_that_breaks_off_says_so() {
    let (_worker, gateway) = one(Behaviour::Break(Status::internal("the engine broke"))).await;
    let reply = post(&gateway, CHAT, chat(json!({ "stream": true }))).await;
    let events = reply.events();
    assert_eq!(
        events.last().unwrap()["error"]["message"],
        "the engine broke",
        "{events:?}"
    );
    assert!(!events.contains(&json!("[DONE]")));
    let whole = post(&gateway, CHAT, chat(json!({}))).await;
    assert_eq!(
        (whole.status, &whole.headers["x-model-version"]),
        (500, &"v1".parse().unwrap())
    );
}

#[tokio::test]
async fn a_client_that_leaves_ends_the_sequence_streamed_or_not() {
    for stream in [false, true] {
        let (worker, gateway) = one(Behaviour::Hang).await;
        let address = gateway.address;
        let body = chat(json!({ "stream": stream })).to_string();
        let call = tokio::spawn(async move { http("POST", address, CHAT, &[], body).await.status });
        eventually("the worker has the request", async || worker.requests() == 1).await;
        call.abort();
        eventually("the worker's stream is dropped", async || {
            worker.seen.dropped.load(Ordering::SeqCst) == 1
        })
        .await;
    }
}

#[tokio::test]
async fn user_stands_in_for_the_header_and_the_header_wins() {
    let worker = TestWorker::start(Behaviour::Speak).await;
    let gateway = TestGateway::start(view(50, vec![worker.endpoint("w", &["v1", "v2"])])).await;
    for user in ["ada", "grace", "地球"] {
        let body = chat(json!({ "user": user })).to_string();
        let by_field = http("POST", gateway.address, CHAT, &[], body).await;
        assert_eq!(by_field.headers["x-assignment-reason"], "bucket");
        let body = chat(json!({ "user": "somebody else" })).to_string();
        let by_header = http("POST", gateway.address, CHAT, &[("x-user-id", user)], body).await;
        assert_eq!(
            by_field.headers["x-model-version"], by_header.headers["x-model-version"],
            "{user}"
        );
        let bucket = penstock_plan::bucket("r-1", user.as_bytes());
        assert_eq!(
            by_field.headers["x-model-version"],
            if bucket < 500_000 { "v2" } else { "v1" }
        );
    }
}

#[tokio::test]
async fn models_are_listed() {
    let (_worker, gateway) = one(Behaviour::Speak).await;
    let demo = json!({ "id": "demo", "object": "model", "created": 0, "owned_by": "penstock" });
    let list = http("GET", gateway.address, "/v1/models", &[], "").await;
    assert_eq!(list.json(), json!({ "object": "list", "data": [demo] }));
    assert_eq!(
        http("GET", gateway.address, "/v1/models/demo", &[], "")
            .await
            .json(),
        demo
    );
    assert_eq!(
        http("GET", gateway.address, "/v1/models/nothing", &[], "")
            .await
            .status,
        404
    );
}

#[tokio::test]
async fn sglangs_generate_answers_in_its_form() {
    let (worker, gateway) = one(Behaviour::Speak).await;
    let body = json!({
        "text": "Hello", "rid": "mine", "return_logprob": true, "unheard_of": 1,
        "sampling_params": { "temperature": 0, "top_k": -1, "max_new_tokens": 9, "stop": ["x"] },
    });
    let reply = post(&gateway, "/generate", body).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert_eq!(reply.headers["x-model-version"], "v1");
    let asked = worker.last().1;
    assert_eq!(
        (asked.input, asked.top_logprobs),
        (Some(Input::Prompt("Hello".into())), Some(0))
    );
    let sampling = asked.sampling.unwrap();
    assert_eq!(
        (sampling.top_k, sampling.max_tokens, sampling.stop),
        (Some(0), Some(9), vec!["x".to_owned()])
    );
    let answer = reply.json();
    assert_eq!(
        (&answer["text"], &answer["output_ids"]),
        (&json!("Hello world"), &json!([1, 2]))
    );
    let meta = &answer["meta_info"];
    for (name, value) in [
        ("id", json!("mine")),
        ("prompt_tokens", json!(11)),
        ("completion_tokens", json!(2)),
        ("cached_tokens", json!(4)),
        ("finish_reason", json!({ "type": "stop" })),
        ("weight_version", json!("v1")),
        ("output_token_logprobs", json!([[-0.5, 1, null], [-0.5, 2, null]])),
    ] {
        assert_eq!(meta[name], value, "{name}");
    }

    let events = post(
        &gateway,
        "/generate",
        json!({ "input_ids": [1, 2], "stream": true }),
    )
    .await
    .events();
    let texts: Vec<_> = events.iter().filter_map(|event| event["text"].as_str()).collect();
    assert_eq!(
        texts,
        ["Hello", "Hello world"],
        "each event holds the reply so far"
    );
    assert_eq!(events.last().unwrap(), "[DONE]");
    assert_eq!(
        worker.last().1.sampling.unwrap().max_tokens,
        Some(128),
        "SGLang's own default"
    );

    for (wrong, param) in [
        (json!({}), "text"),
        (json!({ "text": ["a", "b"] }), "text"),
        (json!({ "text": "a", "input_ids": [1] }), "input_ids"),
        (json!({ "text": "a", "sampling_params": { "n": 2 } }), "n"),
        (
            json!({ "text": "a", "sampling_params": { "regex": "a+", "ebnf": "start: \"a\"" } }),
            "ebnf",
        ),
    ] {
        let reply = post(&gateway, "/generate", wrong).await;
        assert_eq!(
            (reply.status, &reply.json()["error"]["param"]),
            (400, &json!(param)),
            "{}",
            reply.body
        );
    }
}

#[tokio::test]
async fn what_constrains_a_reply_reaches_the_worker() {
    let (worker, gateway) = one(Behaviour::Speak).await;
    let schema = json!({ "type": "object" });
    let body = chat(json!({
        "response_format": { "type": "json_schema", "json_schema": { "name": "x", "schema": schema } },
        "logit_bias": { "5": -3 }, "min_tokens": 2,
    }));
    assert_eq!(post(&gateway, CHAT, body).await.status, 200);
    let asked = worker.last().1;
    let kind = asked.grammar.and_then(|grammar| grammar.kind);
    assert_eq!(kind, Some(v1::grammar::Kind::JsonSchema(schema.to_string())));
    let sampling = asked.sampling.unwrap();
    assert_eq!(
        (sampling.logit_bias, sampling.min_tokens),
        ([(5, -3.0)].into(), Some(2))
    );

    let body = json!({ "text": "Hello", "sampling_params": { "regex": "a+", "min_new_tokens": 3 } });
    assert_eq!(post(&gateway, "/generate", body).await.status, 200);
    let asked = worker.last().1;
    let kind = asked.grammar.and_then(|grammar| grammar.kind);
    assert_eq!(kind, Some(v1::grammar::Kind::Regex("a+".into())));
    assert_eq!(asked.sampling.unwrap().min_tokens, Some(3));
}

#[tokio::test]
async fn several_choices_are_several_replies_in_one_response() {
    let (worker, gateway) = one(Behaviour::Speak).await;
    let reply = post(&gateway, CHAT, chat(json!({ "n": 3, "seed": 7 }))).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    let answer = reply.json();
    let choices = answer["choices"].as_array().unwrap();
    let indexes: Vec<_> = choices
        .iter()
        .map(|choice| choice["index"].as_u64().unwrap())
        .collect();
    assert_eq!(indexes, [0, 1, 2]);
    assert!(
        choices
            .iter()
            .all(|choice| choice["message"]["content"] == "Hello world")
    );
    let usage = &answer["usage"];
    assert_eq!(
        (&usage["prompt_tokens"], &usage["completion_tokens"]),
        (&json!(11), &json!(6))
    );
    assert_eq!(worker.requests(), 3);

    let body = chat(json!({ "n": 2, "stream": true, "stream_options": { "include_usage": true } }));
    let events = post(&gateway, CHAT, body).await.events();
    // The worker says that it took seed 7, drawn or given.
    assert_eq!(worker.last().1.sampling.unwrap().seed, Some(8));
    let of = |index: u64| -> String {
        let deltas = events
            .iter()
            .filter(|event| event["choices"][0]["index"] == index);
        deltas
            .filter_map(|event| event["choices"][0]["delta"]["content"].as_str())
            .collect()
    };
    assert_eq!([of(0), of(1)], ["Hello world", "Hello world"]);
    let ends = events
        .iter()
        .filter(|event| event["choices"][0]["finish_reason"] == "stop");
    assert_eq!(ends.count(), 2);
    let usage = &events[events.len() - 2]["usage"];
    assert_eq!(
        (&usage["prompt_tokens"], &usage["completion_tokens"]),
        (&json!(11), &json!(4))
    );
}

#[tokio::test]
async fn the_best_of_several_completions_is_given_and_all_are_counted() {
    let (worker, gateway) = one(Behaviour::Speak).await;
    let body = json!({ "model": "demo", "prompt": "Hi", "n": 1, "best_of": 3 });
    let reply = post(&gateway, "/v1/completions", body.clone()).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    let answer = reply.json();
    assert_eq!(answer["choices"].as_array().unwrap().len(), 1);
    assert_eq!(answer["choices"][0]["logprobs"], Value::Null);
    assert_eq!(answer["usage"]["completion_tokens"], 6);
    // Their log-probabilities were asked for, to tell which is best.
    assert_eq!((worker.requests(), worker.last().1.top_logprobs), (3, Some(0)));
    for (name, value) in [("best_of", json!(0)), ("stream", json!(true))] {
        let mut wrong = body.clone();
        wrong[name] = value;
        let reply = post(&gateway, "/v1/completions", wrong).await;
        assert_eq!(
            (reply.status, &reply.json()["error"]["param"]),
            (400, &json!("best_of"))
        );
    }
}

#[tokio::test]
async fn an_echoed_prompt_may_have_log_probabilities() {
    let (worker, gateway) = one(Behaviour::Speak).await;
    let body = json!({ "model": "demo", "prompt": "Hi", "echo": true, "logprobs": 1, "max_tokens": 1 });
    assert_eq!(post(&gateway, "/v1/completions", body.clone()).await.status, 200);
    let asked = worker.last().1;
    assert_eq!((asked.echo, asked.top_logprobs), (true, Some(1)));
    let mut ranked = body;
    ranked["best_of"] = json!(2);
    let reply = post(&gateway, "/v1/completions", ranked).await;
    assert_eq!(
        (reply.status, &reply.json()["error"]["param"]),
        (400, &json!("best_of"))
    );
}
