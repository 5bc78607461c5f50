//! Tokens a second of a checkpoint, without an engine: `cargo run --release -p penstock-model --example bench -- DIR
//! [f32|bf16|int8] [prefill|decode]`. Prints the median and the best of a few runs of each, because a machine is rarely quiet, and for
//! decoding the share of the memory's bandwidth: bytes of weights and KV that a step must read, over the rate at which
//! two threads stream a large buffer, measured right before.

#![allow(clippy::print_stdout, reason = "it is a command-line tool")]

use std::{error::Error, path::Path, time::Instant};

use penstock_model::{Batch, CacheLayout, Device, Dtype, LoadOptions, Model, TensorParallel};

const PAGE: usize = 16;
const PAGES: usize = 512;
const RUNS: usize = 5;
/// Tokens of a sequence before the first decoding step, and steps.
const CONTEXT: usize = 128;
const STEPS: usize = 8;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let dir = arguments.next().ok_or("usage: bench DIR [f32|bf16]")?;
    let dtype = match arguments.next().as_deref() {
        None => None,
        Some("f32") => Some(Dtype::F32),
        Some("bf16") => Some(Dtype::Bf16),
        Some("int8") => Some(Dtype::Int8),
        Some(other) => return Err(format!("{other} is none of f32, bf16 and int8").into()),
    };
    let only = arguments.next();
    let wants = |what: &str| only.as_deref().is_none_or(|only| only == what);
    let cache = CacheLayout {
        page_size: PAGE,
        num_pages: PAGES,
    };
    let start = Instant::now();
    let options = LoadOptions {
        dtype,
        cache,
        device: Device::Cpu,
        tensor_parallel: TensorParallel::default(),
        progress: &|_| {},
    };
    let mut model = Model::load(Path::new(&dir), options)?;
    println!(
        "{}: loaded in {:.1} s",
        model.device(),
        start.elapsed().as_secs_f64()
    );
    let context = model.config().max_position_embeddings;
    for len in [128, 512, 2048]
        .into_iter()
        .filter(|&len| len <= context && wants("prefill"))
    {
        let seconds = measure(|| prefill(&mut model, len))?;
        println!(
            "prefill {len:>5}: median {:>8.1}  best {:>8.1} tokens/s",
            len as f64 / seconds.median,
            len as f64 / seconds.best
        );
    }
    let per_token = Model::kv_bytes_per_token(model.config(), dtype, 1) as f64;
    for sequences in [1, 4, 8, 16].into_iter().filter(|_| wants("decode")) {
        let stream = stream_rate();
        let seconds = measure(|| decode(&mut model, sequences))?;
        let kv = (sequences * (CONTEXT + STEPS / 2)) as f64 * per_token;
        let limit = (model.matrix_bytes() as f64 + kv) / stream;
        println!(
            "decode {sequences:>6}: median {:>8.1}  best {:>8.1} tokens/s; {:>5.1} % of {:.1} GB/s",
            sequences as f64 / seconds.median,
            sequences as f64 / seconds.best,
            100.0 * limit / seconds.median,
            stream / 1e9
        );
    }
    Ok(())
}

struct Seconds {
    median: f64,
    best: f64,
}

fn measure(mut run: impl FnMut() -> Result<f64, Box<dyn Error>>) -> Result<Seconds, Box<dyn Error>> {
    let mut seconds = (0..RUNS).map(|_| run()).collect::<Result<Vec<_>, _>>()?;
    seconds.sort_by(f64::total_cmp);
    Ok(Seconds {
        median: seconds[RUNS / 2],
        best: seconds[0],
    })
}

/// Bytes a second that two threads read from memory: the median of a few passes over more than any cache holds.
fn stream_rate() -> f64 {
    const BYTES: usize = 1 << 29;
    let data = vec![1_u64; BYTES / 8];
    let pass = || {
        let start = Instant::now();
        let sum: u64 = std::thread::scope(|scope| {
            let threads: Vec<_> = data
                .chunks(data.len() / 2)
                .map(|part| {
                    scope.spawn(|| {
                        part.chunks_exact(64)
                            .map(|line| line.iter().sum::<u64>())
                            .sum::<u64>()
                    })
                })
                .collect();
            threads.into_iter().filter_map(|thread| thread.join().ok()).sum()
        });
        assert_eq!(sum, (BYTES / 8) as u64, "every word was read");
        BYTES as f64 / start.elapsed().as_secs_f64()
    };
    let mut rates: Vec<f64> = (0..RUNS).map(|_| pass()).collect();
    rates.sort_by(f64::total_cmp);
    rates[RUNS / 2]
}

/// Seconds of a prompt of `len` tokens, in chunks of 512.
fn prefill(model: &mut Model, len: usize) -> Result<f64, Box<dyn Error>> {
    let vocab = model.config().vocab_size;
    let ids: Vec<u32> = (0..len).map(|at| (at * 7919 % vocab) as u32).collect();
    let pages: Vec<u32> = (0..len.div_ceil(PAGE) as u32).collect();
    let (mut batch, mut logits) = (Batch::default(), Vec::new());
    let start = Instant::now();
    for (chunk, ids) in ids.chunks(512).enumerate() {
        batch.clear();
        batch.push(ids, chunk * 512, &pages, (chunk + 1) * 512 >= len);
        model.forward(&batch, &mut logits)?;
    }
    Ok(start.elapsed().as_secs_f64())
}

/// Seconds of one decoding step of `sequences` sequences, some 128 tokens into each.
fn decode(model: &mut Model, sequences: usize) -> Result<f64, Box<dyn Error>> {
    let (mut batch, mut logits) = (Batch::default(), Vec::new());
    let start = Instant::now();
    for step in 0..STEPS {
        batch.clear();
        for sequence in 0..sequences as u32 {
            let pages: Vec<u32> = (sequence * 16..(sequence + 1) * 16).collect();
            batch.push(&[17 + sequence], CONTEXT + step, &pages, true);
        }
        model.forward(&batch, &mut logits)?;
    }
    Ok(start.elapsed().as_secs_f64() / STEPS as f64)
}
