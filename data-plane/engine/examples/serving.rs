//! What an engine does with many requests: `cargo run --release -p penstock-engine --example serving -- DIR
//! [f32|bf16|int8]`.
//!
//! 16 requests at once share a prompt of 512 tokens, have 32 of their own and want 32: tokens a second, time to the
//! first token. Then, without a model, what the scheduler alone takes of a step while 1 to 10,000 requests wait.

#![allow(clippy::print_stdout, reason = "it is a command-line tool")]

use std::{
    error::Error,
    path::Path,
    time::{Duration, Instant},
};

use penstock_engine::{
    CandleRunner, Engine, EngineConfig, Event, FakeConfig, FakeRunner, SamplingParams, Sequence,
};
use penstock_model::{CacheLayout, Device, Dtype, LoadOptions, Model, TensorParallel};

const REQUESTS: u32 = 16;
const SHARED: u32 = 512;
const OWN: u32 = 32;
const REPLY: usize = 32;
const ROUNDS: u32 = 5;
/// Replies that run while others wait, and how long each is.
const RUNNING: usize = 16;
const LONG: usize = 2000;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let dir = arguments.next().ok_or("usage: serving DIR [f32|bf16|int8]")?;
    let dtype = match arguments.next().as_deref() {
        None => None,
        Some("f32") => Some(Dtype::F32),
        Some("bf16") => Some(Dtype::Bf16),
        Some("int8") => Some(Dtype::Int8),
        Some(other) => return Err(format!("{other} is none of f32, bf16 and int8").into()),
    };
    shared_prefix(Path::new(&dir), dtype)?;
    for waiting in [1, 100, 1_000, 10_000] {
        let step = queued(waiting)?;
        println!(
            "{waiting:>6} waiting: the scheduler takes {:.1} µs a step of {RUNNING}",
            step * 1e6
        );
    }
    Ok(())
}

fn shared_prefix(dir: &Path, dtype: Option<Dtype>) -> Result<(), Box<dyn Error>> {
    let config = EngineConfig::default();
    let begun = Instant::now();
    let options = LoadOptions {
        dtype,
        cache: CacheLayout {
            page_size: config.page_size,
            num_pages: config.num_pages,
        },
        device: Device::Cpu,
        tensor_parallel: TensorParallel::default(),
        progress: &|_| {},
    };
    let model = Model::load(dir, options)?;
    println!(
        "{}: loaded in {:.2} s",
        model.device(),
        begun.elapsed().as_secs_f64()
    );
    let engine = Engine::start(config, Box::new(CandleRunner::new(model)))?;
    let (mut rates, mut firsts) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let begun = Instant::now();
        let mut streams = Vec::new();
        for request in 0..REQUESTS {
            // A prefix that no round before has left in the cache.
            let shared = (0..SHARED).map(|at| 1000 + round * 7 + at * 13 % 5000);
            let own = (0..OWN).map(|at| 20_000 + request * 97 + at);
            streams.push(engine.submit(Sequence {
                prompt: shared.chain(own).collect(),
                max_tokens: REPLY,
                sampling: SamplingParams {
                    temperature: 0.0,
                    ..SamplingParams::default()
                },
                ..Sequence::default()
            })?);
        }
        let mut tokens = 0;
        for stream in &mut streams {
            let mut first = None;
            while let Some(event) = stream.blocking_next() {
                match event {
                    Event::Token(token) => {
                        first.get_or_insert(token.at);
                        tokens += 1;
                    }
                    Event::Failed(error) => return Err(error.into()),
                    _ => {}
                }
            }
            firsts.extend(first.map(|at| (at - begun).as_secs_f64()));
        }
        rates.push(f64::from(tokens) / begun.elapsed().as_secs_f64());
    }
    rates.sort_by(f64::total_cmp);
    firsts.sort_by(f64::total_cmp);
    println!(
        "{REQUESTS} at once, {SHARED} shared + {OWN} own + {REPLY} new tokens: {:.1} tokens/s; first token p50 {:.2} s, \
         p99 {:.2} s",
        rates[rates.len() / 2],
        firsts[firsts.len() / 2],
        firsts[firsts.len() * 99 / 100],
    );
    Ok(())
}

/// Seconds that a step of a runner takes which computes nothing.
fn queued(waiting: usize) -> Result<f64, Box<dyn Error>> {
    let config = EngineConfig {
        max_running: RUNNING,
        max_waiting: waiting + RUNNING,
        ..EngineConfig::default()
    };
    let runner = FakeRunner::new(FakeConfig {
        pace: Duration::ZERO,
        ..FakeConfig::default()
    });
    let engine = Engine::start(config, Box::new(runner))?;
    let ask = |index: usize, tokens| {
        engine.submit(Sequence {
            prompt: vec![1 + index as u32 % 200, 7, 8, 9],
            max_tokens: tokens,
            tenant: index as u64 % 50,
            ..Sequence::default()
        })
    };
    let mut running = Vec::new();
    for index in 0..RUNNING {
        running.push(ask(index, LONG)?);
    }
    for stream in &mut running {
        while !matches!(stream.blocking_next(), Some(Event::Token(_)) | None) {}
    }
    let held: Result<Vec<_>, _> = (0..waiting).map(|index| ask(index, 1)).collect();
    let held = held?;
    let (begun, before) = (Instant::now(), engine.stats().steps);
    // The streams are read in turn, so that none of them rests for its reader.
    let mut events = 0;
    while events < RUNNING * LONG / 2 {
        for stream in &mut running {
            while matches!(stream.try_next(), Some(Event::Token(_))) {
                events += 1;
            }
        }
        std::thread::yield_now();
    }
    let steps = engine.stats().steps - before;
    let step = begun.elapsed().as_secs_f64() / steps as f64;
    drop(held);
    engine.shutdown();
    Ok(step)
}
