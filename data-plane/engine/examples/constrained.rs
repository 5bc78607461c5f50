//! What a grammar costs: eight replies at once, free and constrained, on a model of Qwen2.5-0.5B's shape.
//!
//! `cargo run --release -p penstock-engine --example constrained [-- DIR]`: with the weights of the checkpoint in
//! DIR, or with random ones. Tokens are made up either way, of the model's vocabulary's size. Prints the time of
//! a step, which a grammar must not lengthen, and tokens a second, which forced tokens raise.

#![allow(clippy::print_stdout, reason = "it is a command-line tool")]

use std::{error::Error, fs, path::Path, time::Instant};

use penstock_engine::{
    CandleRunner, Engine, EngineConfig, Event, FinishReason, Matcher, SamplingParams, Sequence,
};
use penstock_grammar::{Grammar, GrammarCompiler, Vocabulary};
use penstock_model::{CacheLayout, Device, LoadOptions, Model, TensorParallel};
use safetensors::tensor::{Dtype, TensorView};

const BATCH: usize = 8;
/// Not more than a stream holds while another one is read: a reply whose consumer lags is not run.
const TOKENS: usize = 60;
const ROUNDS: usize = 10;
/// Strings of free text, more of them than fit: hardly a token is forced, and none ends the reply.
const SCHEMA: &str = r#"{"type":"array","minItems":500,"items":{"type":"object","additionalProperties":false,
    "properties":{"name":{"type":"string","minLength":20,"maxLength":200},"age":{"type":"integer","minimum":0},
    "tags":{"type":"array","items":{"type":"string"},"minItems":2}},"required":["name","age","tags"]}}"#;

fn main() -> Result<(), Box<dyn Error>> {
    let made = tempfile::tempdir()?;
    let given = std::env::args().nth(1);
    let dir = match &given {
        Some(dir) => Path::new(dir),
        None => {
            write_checkpoint(made.path())?;
            made.path()
        }
    };
    let config = EngineConfig {
        max_running: BATCH,
        ..EngineConfig::default()
    };
    let options = LoadOptions {
        dtype: None,
        cache: CacheLayout {
            page_size: config.page_size,
            num_pages: config.num_pages,
        },
        device: Device::Cpu,
        tensor_parallel: TensorParallel::default(),
        progress: &|_| {},
    };
    let engine = Engine::start(config, Box::new(CandleRunner::new(Model::load(dir, options)?)))?;
    let vocabulary = vocabulary(engine.vocab_size())?;
    let begun = Instant::now();
    let compiler = GrammarCompiler::new(vocabulary, Default::default());
    let compiled = compiler.compile(&Grammar::JsonSchema(SCHEMA.into()))?;
    println!(
        "{}: schema compiled in {:.1} ms",
        engine.runner().device,
        begun.elapsed().as_secs_f64() * 1e3
    );
    // One round of each by turns, so that a machine that slows down slows both.
    let (mut free, mut constrained) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        free.push(run(&engine, round, None)?);
        constrained.push(run(&engine, round, Some(compiled.matcher()))?);
    }
    let (free, constrained) = (best(&free), best(&constrained));
    println!(
        "free:        {:.2} ms a step, {:.1} tokens/s",
        free.step * 1e3,
        free.rate
    );
    println!(
        "constrained: {:.2} ms a step, {:.1} tokens/s",
        constrained.step * 1e3,
        constrained.rate
    );
    println!(
        "a step takes {:+.2} % longer",
        (constrained.step / free.step - 1.0) * 100.0
    );
    Ok(())
}

/// Seconds a step, and tokens a second.
#[derive(Clone, Copy)]
struct Pace {
    step: f64,
    rate: f64,
}

fn best(rounds: &[Pace]) -> Pace {
    let step = rounds.iter().map(|pace| pace.step).fold(f64::INFINITY, f64::min);
    let rate = rounds.iter().map(|pace| pace.rate).fold(0.0, f64::max);
    Pace { step, rate }
}

/// Decodes a batch of replies, all begun before the clock starts.
fn run(engine: &Engine, round: usize, grammar: Option<Matcher>) -> Result<Pace, Box<dyn Error>> {
    let mut streams = Vec::new();
    for row in 0..BATCH {
        streams.push(engine.submit(Sequence {
            prompt: vec![17 + row as u32; 16],
            sampling: SamplingParams {
                seed: (round * BATCH + row) as u64,
                ..SamplingParams::default()
            },
            max_tokens: TOKENS,
            grammar: grammar.clone(),
            ..Sequence::default()
        })?);
    }
    for stream in &mut streams {
        while !matches!(stream.blocking_next(), Some(Event::Token(_))) {}
    }
    let (begun, before) = (Instant::now(), engine.stats());
    for stream in &mut streams {
        loop {
            match stream.blocking_next() {
                Some(Event::Finished(finished)) if finished.reason == FinishReason::Length => break,
                Some(Event::Token(_)) => {}
                other => return Err(format!("a reply ended too early: {other:?}").into()),
            }
        }
    }
    let (seconds, after) = (begun.elapsed().as_secs_f64(), engine.stats());
    Ok(Pace {
        step: seconds / (after.steps - before.steps).max(1) as f64,
        rate: (after.tokens_generated - before.tokens_generated) as f64 / seconds,
    })
}

/// The 256 bytes, made-up words with and without a space before them, and an end.
fn vocabulary(size: usize) -> Result<std::sync::Arc<Vocabulary>, Box<dyn Error>> {
    const LETTERS: &[u8] = b"etaoinshrdlucmfwypvbgk,.\"{}[]:0123456789";
    let mut state = 1u64;
    let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
    while tokens.len() < size - 1 {
        let length = 2 + draw(&mut state) % 8;
        let space = draw(&mut state).is_multiple_of(2);
        let letters = (0..length).map(|_| LETTERS[draw(&mut state) % LETTERS.len()]);
        tokens.push(space.then_some(b' ').into_iter().chain(letters).collect());
    }
    tokens.push(b"<|end|>".to_vec());
    let end = size as u32 - 1;
    Ok(Vocabulary::new(tokens, &[end], &[end])?)
}

fn draw(state: &mut u64) -> usize {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    (*state >> 20) as usize
}

/// Random weights in the shape of Qwen2.5-0.5B.
fn write_checkpoint(dir: &Path) -> Result<(), Box<dyn Error>> {
    const CONFIG: &str = r#"{"architectures":["Qwen2ForCausalLM"],"model_type":"qwen2","hidden_size":896,
        "intermediate_size":4864,"num_hidden_layers":24,"num_attention_heads":14,"num_key_value_heads":2,
        "vocab_size":151936,"max_position_embeddings":32768,"rms_norm_eps":1e-6,"rope_theta":1000000.0,
        "hidden_act":"silu","tie_word_embeddings":true,"torch_dtype":"bfloat16","eos_token_id":151645}"#;
    fs::write(dir.join("config.json"), CONFIG)?;
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![151_936, 896]),
        ("model.norm.weight".to_owned(), vec![896]),
    ];
    for layer in 0..24 {
        for (name, shape) in [
            ("self_attn.q_proj.weight", vec![896, 896]),
            ("self_attn.q_proj.bias", vec![896]),
            ("self_attn.k_proj.weight", vec![128, 896]),
            ("self_attn.k_proj.bias", vec![128]),
            ("self_attn.v_proj.weight", vec![128, 896]),
            ("self_attn.v_proj.bias", vec![128]),
            ("self_attn.o_proj.weight", vec![896, 896]),
            ("mlp.gate_proj.weight", vec![4864, 896]),
            ("mlp.up_proj.weight", vec![4864, 896]),
            ("mlp.down_proj.weight", vec![896, 4864]),
            ("input_layernorm.weight", vec![896]),
            ("post_attention_layernorm.weight", vec![896]),
        ] {
            shapes.push((format!("model.layers.{layer}.{name}"), shape));
        }
    }
    let mut state = 2u64;
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = shapes
        .into_iter()
        .map(|(name, shape)| {
            let count: usize = shape.iter().product();
            // bf16 of both signs around 2^-6; what they are does not matter, only that nothing overflows.
            let value = |_| (0x3c00_u16 | (draw(&mut state) as u16 & 0x807f)).to_le_bytes();
            let bytes = (0..count).flat_map(value).collect();
            (name, shape, bytes)
        })
        .collect();
    let views: Result<Vec<(String, TensorView<'_>)>, _> = tensors
        .iter()
        .map(|(name, shape, bytes)| Ok((name.clone(), TensorView::new(Dtype::BF16, shape.clone(), bytes)?)))
        .collect::<Result<_, safetensors::SafeTensorError>>();
    safetensors::serialize_to_file(views?, None, &dir.join("model.safetensors"))?;
    Ok(())
}
