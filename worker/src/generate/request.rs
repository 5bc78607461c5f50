//! Validation at the edge: a wire request becomes a [`Generation`], or every field at fault is named.

use penstock_engine::SamplingParams;
use penstock_grammar::Grammar;
use penstock_proto::v1;
use penstock_text::Message;

/// Stop strings of one request at most; each is compared at every byte of the reply.
const MAX_STOP_STRINGS: usize = 16;
/// Bytes of a stop string at most; so much text may be held back.
const MAX_STOP_BYTES: usize = 256;
/// Stop token ids of one request at most; each token of the reply is compared with all.
const MAX_STOP_TOKEN_IDS: usize = 64;
/// Biased ids of one request at most; each costs a write per token.
const MAX_LOGIT_BIAS: usize = 1024;
/// Priorities are between this and its negative.
const MOST_PRIORITY: i32 = 100;
/// Bytes of a salt at most.
const MAX_SALT_BYTES: usize = 256;
/// Alternatives per token at most.
const MAX_TOP_LOGPROBS: u32 = 20;

/// A valid request, not yet tokenized.
#[derive(Debug)]
pub(crate) struct Generation {
    pub(crate) input: Input,
    pub(crate) sampling: SamplingParams,
    pub(crate) stop: Vec<String>,
    pub(crate) stop_token_ids: Vec<u32>,
    pub(crate) ignore_eos: bool,
    /// `None`: the rest of the context.
    pub(crate) max_tokens: Option<usize>,
    pub(crate) top_logprobs: Option<usize>,
    pub(crate) echo: bool,
    /// What another worker generated of the reply.
    pub(crate) resume: Option<v1::Resume>,
    pub(crate) grammar: Option<Grammar>,
    pub(crate) standing: Standing,
}

/// Whose turn a request is, and with whom it shares prefixes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Standing {
    pub(crate) priority: i32,
    /// Namespace of its KV; 0 without a salt.
    pub(crate) namespace: u64,
}

/// What to continue.
#[derive(Debug)]
pub(crate) enum Input {
    Prompt(String),
    Ids(Vec<u32>),
    Chat(Vec<Message>),
}

impl Input {
    /// Bytes of text to tokenize.
    pub(crate) fn text_bytes(&self) -> usize {
        match self {
            Self::Prompt(text) => text.len(),
            Self::Ids(_) => 0,
            Self::Chat(messages) => messages.iter().map(|message| message.content.len()).sum(),
        }
    }
}

impl Standing {
    /// Reads what a request says of it.
    pub(crate) fn read(priority: i32, cache_salt: &str) -> Result<Self, Violation> {
        if priority.abs() > MOST_PRIORITY {
            let description = format!("must be -{MOST_PRIORITY} to {MOST_PRIORITY}, not {priority}");
            return Err(Violation::new("priority", description));
        }
        if cache_salt.len() > MAX_SALT_BYTES {
            let length = cache_salt.len();
            let description = format!("has {length} bytes, at most {MAX_SALT_BYTES} are possible");
            return Err(Violation::new("cache_salt", description));
        }
        let salted = || {
            let digest = blake3::hash(cache_salt.as_bytes());
            let [a, b, c, d, e, f, g, h, ..] = *digest.as_bytes();
            // Not that of requests without a salt.
            u64::from_le_bytes([a, b, c, d, e, f, g, h]).max(1)
        };
        let namespace = match cache_salt {
            "" => 0,
            _ => salted(),
        };
        Ok(Self { priority, namespace })
    }
}

/// One field of a request that is not as it must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Violation {
    /// Path of the field in the request, e.g. `sampling.top_p`.
    pub(crate) field: String,
    /// What is wrong, with the value.
    pub(crate) description: String,
}

impl Violation {
    pub(crate) fn new(field: impl Into<String>, description: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            description: description.into(),
        }
    }
}

/// Reads a request. `draw_seed` is called where it names no seed.
pub(crate) fn parse(
    request: v1::GenerateRequest,
    draw_seed: impl FnOnce() -> u64,
) -> Result<Generation, Vec<Violation>> {
    let mut violations = Vec::new();
    let input = match request.input {
        None => Err(Violation::new(
            "input",
            "is missing: give prompt, input_ids or chat",
        )),
        Some(v1::generate_request::Input::Prompt(prompt)) => Ok(Input::Prompt(prompt)),
        Some(v1::generate_request::Input::InputIds(ids)) => Ok(Input::Ids(ids.ids)),
        Some(v1::generate_request::Input::Chat(chat)) => messages(chat).map(Input::Chat),
    };
    let input = input.map_err(|violation| violations.push(violation)).ok();
    let wire = request.sampling.unwrap_or_default();
    let sampling = sampling(&wire, draw_seed);
    if let Err(error) = sampling.validate() {
        let description = format!("must be {}, not {}", error.range, error.value);
        violations.push(Violation::new(format!("sampling.{}", error.field), description));
    }
    if wire.max_tokens == Some(0) {
        violations.push(Violation::new("sampling.max_tokens", "must be at least 1, not 0"));
    }
    if let (Some(least), Some(most)) = (wire.min_tokens, wire.max_tokens)
        && least > most
    {
        let description = format!("is {least}, more than max_tokens, which is {most}");
        violations.push(Violation::new("sampling.min_tokens", description));
    }
    if wire.logit_bias.len() > MAX_LOGIT_BIAS {
        let ids = wire.logit_bias.len();
        let description = format!("has {ids} ids, at most {MAX_LOGIT_BIAS} are possible");
        violations.push(Violation::new("sampling.logit_bias", description));
    }
    let grammar = grammar(request.grammar).map_err(|violation| violations.push(violation));
    let standing = Standing::read(request.priority, &request.cache_salt);
    let standing = standing.map_err(|violation| violations.push(violation));
    stop_strings(&wire.stop, &mut violations);
    if wire.stop_token_ids.len() > MAX_STOP_TOKEN_IDS {
        let description = format!(
            "has {} ids, at most {MAX_STOP_TOKEN_IDS} are possible",
            wire.stop_token_ids.len()
        );
        violations.push(Violation::new("sampling.stop_token_ids", description));
    }
    if let Some(count) = request.top_logprobs.filter(|&count| count > MAX_TOP_LOGPROBS) {
        let description = format!("must be 0 to {MAX_TOP_LOGPROBS}, not {count}");
        violations.push(Violation::new("top_logprobs", description));
    }
    match (input, grammar, standing) {
        (Some(input), Ok(grammar), Ok(standing)) if violations.is_empty() => Ok(Generation {
            input,
            sampling,
            stop: wire.stop,
            stop_token_ids: wire.stop_token_ids,
            ignore_eos: wire.ignore_eos.unwrap_or(false),
            max_tokens: wire.max_tokens.map(|tokens| tokens as usize),
            top_logprobs: request.top_logprobs.map(|count| count as usize),
            echo: request.echo,
            resume: request.resume,
            grammar,
            standing,
        }),
        _ => Err(violations),
    }
}

/// Reads the messages of a chat.
pub(crate) fn messages(chat: v1::Chat) -> Result<Vec<Message>, Violation> {
    if chat.messages.is_empty() {
        return Err(Violation::new(
            "chat.messages",
            "is empty: a chat needs at least one message",
        ));
    }
    let message = |(index, message): (usize, v1::ChatMessage)| match message.role.is_empty() {
        true => Err(Violation::new(format!("chat.messages[{index}].role"), "is empty")),
        false => Ok(Message {
            role: message.role,
            content: message.content,
        }),
    };
    chat.messages.into_iter().enumerate().map(message).collect()
}

fn grammar(wire: Option<v1::Grammar>) -> Result<Option<Grammar>, Violation> {
    use v1::grammar::Kind;
    let Some(wire) = wire else { return Ok(None) };
    match wire.kind {
        None => Err(Violation::new(
            "grammar",
            "is empty: give regex, json_schema, json_object, lark or choices",
        )),
        Some(Kind::Regex(regex)) => Ok(Some(Grammar::Regex(regex))),
        Some(Kind::JsonSchema(schema)) => Ok(Some(Grammar::JsonSchema(schema))),
        Some(Kind::JsonObject(_)) => Ok(Some(Grammar::JsonObject)),
        Some(Kind::Lark(lark)) => Ok(Some(Grammar::Lark(lark))),
        Some(Kind::Choices(choices)) => Ok(Some(Grammar::Choices(choices.texts))),
    }
}

fn sampling(wire: &v1::SamplingParams, draw_seed: impl FnOnce() -> u64) -> SamplingParams {
    let default = SamplingParams::default();
    let mut logit_bias: Vec<(u32, f32)> = wire.logit_bias.iter().map(|(&id, &bias)| (id, bias)).collect();
    logit_bias.sort_unstable_by_key(|&(id, _)| id);
    SamplingParams {
        temperature: wire.temperature.unwrap_or(default.temperature),
        top_p: wire.top_p.unwrap_or(default.top_p),
        top_k: wire.top_k.map_or(default.top_k, |k| k as usize),
        min_p: wire.min_p.unwrap_or(default.min_p),
        repetition_penalty: wire.repetition_penalty.unwrap_or(default.repetition_penalty),
        presence_penalty: wire.presence_penalty.unwrap_or(default.presence_penalty),
        frequency_penalty: wire.frequency_penalty.unwrap_or(default.frequency_penalty),
        logit_bias,
        min_tokens: wire.min_tokens.map_or(0, |tokens| tokens as usize),
        seed: wire.seed.unwrap_or_else(draw_seed),
    }
}

fn stop_strings(stop: &[String], violations: &mut Vec<Violation>) {
    if stop.len() > MAX_STOP_STRINGS {
        let description = format!(
            "has {} strings, at most {MAX_STOP_STRINGS} are possible",
            stop.len()
        );
        violations.push(Violation::new("sampling.stop", description));
    }
    for (index, text) in stop.iter().enumerate() {
        let description = match text.len() {
            0 => "is empty".to_string(),
            length if length > MAX_STOP_BYTES => {
                format!("has {length} bytes, at most {MAX_STOP_BYTES} are possible")
            }
            _ => continue,
        };
        violations.push(Violation::new(format!("sampling.stop[{index}]"), description));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt(sampling: v1::SamplingParams) -> v1::GenerateRequest {
        v1::GenerateRequest {
            input: Some(v1::generate_request::Input::Prompt("hi".into())),
            sampling: Some(sampling),
            ..Default::default()
        }
    }

    fn fields(request: v1::GenerateRequest) -> Vec<String> {
        let violations = parse(request, || 0).map(|_| ()).unwrap_err();
        violations.into_iter().map(|violation| violation.field).collect()
    }

    #[test]
    fn an_absent_field_is_the_default_and_a_zero_is_a_zero() {
        let absent = parse(prompt(v1::SamplingParams::default()), || 42).unwrap();
        assert_eq!(
            absent.sampling,
            SamplingParams {
                seed: 42,
                ..SamplingParams::default()
            }
        );
        assert_eq!(absent.max_tokens, None);
        let zero = v1::SamplingParams {
            temperature: Some(0.0),
            seed: Some(0),
            ..Default::default()
        };
        let zero = parse(prompt(zero), || 42).unwrap().sampling;
        assert_eq!((zero.temperature, zero.seed), (0.0, 0));
    }

    #[test]
    fn every_field_at_fault_is_named() {
        let request = v1::GenerateRequest {
            sampling: Some(v1::SamplingParams {
                top_p: Some(1.5),
                max_tokens: Some(0),
                stop: vec!["ok".into(), String::new()],
                ..Default::default()
            }),
            top_logprobs: Some(21),
            ..Default::default()
        };
        assert_eq!(
            fields(request),
            [
                "input",
                "sampling.top_p",
                "sampling.max_tokens",
                "sampling.stop[1]",
                "top_logprobs"
            ]
        );
    }

    #[test]
    fn numbers_that_are_not_numbers_are_refused() {
        for (field, params) in [
            (
                "sampling.temperature",
                v1::SamplingParams {
                    temperature: Some(f32::NAN),
                    ..Default::default()
                },
            ),
            (
                "sampling.temperature",
                v1::SamplingParams {
                    temperature: Some(-0.1),
                    ..Default::default()
                },
            ),
            (
                "sampling.top_p",
                v1::SamplingParams {
                    top_p: Some(0.0),
                    ..Default::default()
                },
            ),
            (
                "sampling.min_p",
                v1::SamplingParams {
                    min_p: Some(1.1),
                    ..Default::default()
                },
            ),
            (
                "sampling.repetition_penalty",
                v1::SamplingParams {
                    repetition_penalty: Some(f32::INFINITY),
                    ..Default::default()
                },
            ),
            (
                "sampling.presence_penalty",
                v1::SamplingParams {
                    presence_penalty: Some(2.5),
                    ..Default::default()
                },
            ),
            (
                "sampling.frequency_penalty",
                v1::SamplingParams {
                    frequency_penalty: Some(-3.0),
                    ..Default::default()
                },
            ),
        ] {
            assert_eq!(fields(prompt(params)), [field]);
        }
    }

    #[test]
    fn too_many_or_too_long_stops_are_refused() {
        let ids = v1::SamplingParams {
            stop_token_ids: vec![1; 65],
            ..Default::default()
        };
        assert_eq!(fields(prompt(ids)), ["sampling.stop_token_ids"]);
        let many = v1::SamplingParams {
            stop: vec!["x".into(); 17],
            ..Default::default()
        };
        assert_eq!(fields(prompt(many)), ["sampling.stop"]);
        let long = v1::SamplingParams {
            stop: vec!["x".repeat(257)],
            ..Default::default()
        };
        assert_eq!(fields(prompt(long)), ["sampling.stop[0]"]);
    }

    #[test]
    fn a_grammar_must_say_which_and_bounds_must_agree() {
        let request = v1::GenerateRequest {
            grammar: Some(v1::Grammar { kind: None }),
            ..prompt(v1::SamplingParams {
                min_tokens: Some(3),
                max_tokens: Some(2),
                logit_bias: [(1, 200.0)].into(),
                ..Default::default()
            })
        };
        assert_eq!(
            fields(request),
            ["sampling.logit_bias", "sampling.min_tokens", "grammar"]
        );
        let many = v1::SamplingParams {
            logit_bias: (0..1025).map(|id| (id, 1.0)).collect(),
            ..Default::default()
        };
        assert_eq!(fields(prompt(many)), ["sampling.logit_bias"]);
    }

    #[test]
    fn a_chat_needs_messages_with_roles() {
        let chat = |messages| v1::GenerateRequest {
            input: Some(v1::generate_request::Input::Chat(v1::Chat { messages })),
            ..Default::default()
        };
        assert_eq!(fields(chat(vec![])), ["chat.messages"]);
        let message = |role: &str| v1::ChatMessage {
            role: role.into(),
            content: String::new(),
        };
        assert_eq!(
            fields(chat(vec![message("user"), message("")])),
            ["chat.messages[1].role"]
        );
    }
}
