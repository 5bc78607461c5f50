//! GFLOP/s and GB/s of the linear layers: `cargo run --release -p penstock-kernels --example linear -- [N K]`. The
//! elements take turns in each round, and medians are printed, because a machine is rarely quiet.

#![allow(clippy::print_stdout, reason = "it is a command-line tool")]

use std::time::Instant;

use penstock_kernels::{Cpu, Element, Linear, reference};

const ROUNDS: usize = 15;

fn main() {
    let sizes: Vec<usize> = std::env::args()
        .skip(1)
        .filter_map(|size| size.parse().ok())
        .collect();
    let (n, k) = match sizes[..] {
        [n, k] => (n, k),
        _ => (4864, 896),
    };
    let cpu = Cpu::detect();
    println!("{}: y[m, {n}] = x[m, {k}] W^T, medians of {ROUNDS}", cpu.isa);
    let weights = reference::noise(1, n * k);
    let elements = [Element::F32, Element::Bf16, Element::Int8];
    let linears = elements.map(|element| {
        Linear::pack(cpu, element, n, k, &|row, to| {
            to.copy_from_slice(&weights[row * k..][..k])
        })
    });
    for m in [1, 8, 16, 32, 128, 512] {
        let x = reference::noise(2, m * k);
        let mut y = vec![0.0; m * n];
        let mut seconds = [const { Vec::new() }; 3];
        for _ in 0..ROUNDS {
            for (linear, seconds) in linears.iter().zip(&mut seconds) {
                let start = Instant::now();
                linear.forward(cpu, &mut y, &x, None);
                seconds.push(start.elapsed().as_secs_f64());
            }
        }
        for ((element, linear), seconds) in elements.iter().zip(&linears).zip(&mut seconds) {
            seconds.sort_by(f64::total_cmp);
            let median = seconds[ROUNDS / 2];
            println!(
                "m {m:>4} {element:?}: {:>9.1} us, {:>7.1} GFLOP/s, {:>5.1} GB/s of weights",
                median * 1e6,
                2.0 * (m * n * k) as f64 / median / 1e9,
                linear.bytes() as f64 / median / 1e9
            );
        }
    }
}
