//! Tokens a second of a checkpoint, without an engine: `cargo run --release -p penstock-model --example bench -- DIR
//! [f32|bf16]`. Prints the best of a few runs of each, because a machine is rarely quiet.

#![allow(clippy::print_stdout, reason = "it is a command-line tool")]

use std::{error::Error, path::Path, time::Instant};

use penstock_model::{Batch, CacheLayout, Device, Dtype, LoadOptions, Model};

const PAGE: usize = 16;
const PAGES: usize = 512;
const RUNS: usize = 3;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let dir = arguments.next().ok_or("usage: bench DIR [f32|bf16]")?;
    let dtype = match arguments.next().as_deref() {
        None => None,
        Some("f32") => Some(Dtype::F32),
        Some("bf16") => Some(Dtype::Bf16),
        Some(other) => return Err(format!("{other} is neither f32 nor bf16").into()),
    };
    let cache = CacheLayout {
        page_size: PAGE,
        num_pages: PAGES,
    };
    let start = Instant::now();
    let options = LoadOptions {
        dtype,
        cache,
        device: Device::Cpu,
        progress: &|_| {},
    };
    let mut model = Model::load(Path::new(&dir), options)?;
    println!(
        "{}: loaded in {:.1} s",
        model.device(),
        start.elapsed().as_secs_f64()
    );
    let context = model.config().max_position_embeddings;
    for len in [128, 512, 2048].into_iter().filter(|&len| len <= context) {
        let seconds = best(|| prefill(&mut model, len))?;
        println!("prefill {len:>5}: {:>8.1} tokens/s", len as f64 / seconds);
    }
    for sequences in [1, 4, 8, 16] {
        let seconds = best(|| decode(&mut model, sequences))?;
        println!(
            "decode {sequences:>6}: {:>8.1} tokens/s",
            sequences as f64 / seconds
        );
    }
    Ok(())
}

fn best(mut run: impl FnMut() -> Result<f64, Box<dyn Error>>) -> Result<f64, Box<dyn Error>> {
    let mut best = f64::INFINITY;
    for _ in 0..RUNS {
        best = best.min(run()?);
    }
    Ok(best)
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
    const STEPS: usize = 8;
    let (mut batch, mut logits) = (Batch::default(), Vec::new());
    let start = Instant::now();
    for step in 0..STEPS {
        batch.clear();
        for sequence in 0..sequences as u32 {
            let pages: Vec<u32> = (sequence * 16..(sequence + 1) * 16).collect();
            batch.push(&[17 + sequence], 128 + step, &pages, true);
        }
        model.forward(&batch, &mut logits)?;
    }
    Ok(start.elapsed().as_secs_f64() / STEPS as f64)
}
