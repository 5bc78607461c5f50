use proptest::prelude::*;

use super::*;
use crate::{Isa, Pool, reference};

fn packed(cpu: Cpu, element: Element, weights: &[f32], n: usize, k: usize) -> Linear {
    Linear::pack(cpu, element, n, k, &|row, to| {
        to.copy_from_slice(&weights[row * k..][..k])
    })
}

fn machines() -> impl Iterator<Item = Cpu> {
    Isa::available().into_iter().map(|isa| Cpu {
        isa,
        pool: Pool::process(),
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn f32_agrees_with_the_reference(m in 1..20_usize, n in 1..100_usize, k in 1..130_usize, with_bias: bool, seed: u64) {
        let (x, weights) = (reference::noise(seed, m * k), reference::noise(seed ^ 1, n * k));
        let bias = with_bias.then(|| reference::noise(seed ^ 2, n));
        let expected = reference::linear(&x, &weights, k, bias.as_deref());
        for cpu in machines() {
            let mut y = vec![f32::NAN; m * n];
            packed(cpu, Element::F32, &weights, n, k).forward(cpu, &mut y, &x, bias.as_deref());
            reference::assert_close(&y, &expected, 1e-5);
        }
    }

    #[test]
    fn bf16_agrees_with_the_reference_on_rounded_inputs(
        m in 1..70_usize, n in 1..100_usize, k in 1..130_usize, with_bias: bool, seed: u64,
    ) {
        let x = reference::noise(seed, m * k);
        let weights = reference::round_bf16(&reference::noise(seed ^ 1, n * k));
        let bias = with_bias.then(|| reference::noise(seed ^ 2, n));
        let expected = reference::linear(&reference::round_bf16(&x), &weights, k, bias.as_deref());
        for cpu in machines() {
            let mut y = vec![f32::NAN; m * n];
            packed(cpu, Element::Bf16, &weights, n, k).forward(cpu, &mut y, &x, bias.as_deref());
            reference::assert_close(&y, &expected, 1e-5);
        }
    }

    #[test]
    fn a_row_does_not_depend_on_the_rows_beside_it(m in 2..70_usize, n in 1..70_usize, k in 1..600_usize, seed: u64) {
        let (x, weights) = (reference::noise(seed, m * k), reference::noise(seed ^ 1, n * k));
        for cpu in machines() {
            for element in [Element::F32, Element::Bf16] {
                let linear = packed(cpu, element, &weights, n, k);
                let mut together = vec![0.0; m * n];
                linear.forward(cpu, &mut together, &x, None);
                let mut alone = vec![0.0; n];
                for (x, together) in x.chunks_exact(k).zip(together.chunks_exact(n)) {
                    linear.forward(cpu, &mut alone, x, None);
                    prop_assert_eq!(&alone[..], together);
                }
            }
        }
    }

    #[test]
    fn rows_read_back_as_they_were_packed(n in 1..70_usize, k in 1..70_usize, seed: u64) {
        let weights = reference::round_bf16(&reference::noise(seed, n * k));
        for element in [Element::F32, Element::Bf16] {
            let linear = packed(Cpu::detect(), element, &weights, n, k);
            let mut row = vec![0.0; k];
            for (index, expected) in weights.chunks_exact(k).enumerate() {
                linear.row(index, &mut row);
                prop_assert_eq!(&row[..], expected);
            }
        }
    }
}

#[test]
fn many_rows_and_panels_in_parallel_agree_with_the_reference() {
    let (m, n, k) = (300, 200, 320);
    let x = reference::round_bf16(&reference::noise(1, m * k));
    let weights = reference::round_bf16(&reference::noise(2, n * k));
    let expected = reference::linear(&x, &weights, k, None);
    for cpu in machines() {
        for element in [Element::F32, Element::Bf16] {
            let mut y = vec![f32::NAN; m * n];
            packed(cpu, element, &weights, n, k).forward(cpu, &mut y, &x, None);
            reference::assert_close(&y, &expected, 2e-5);
        }
    }
}

#[test]
fn callers_on_several_threads_get_what_each_gets_alone() {
    let (m, n, k) = (40, 320, 256);
    let weights = reference::noise(1, n * k);
    for element in [Element::F32, Element::Bf16] {
        let cpu = Cpu::detect();
        let linear = packed(cpu, element, &weights, n, k);
        let call = |seed: u64| {
            let mut y = vec![f32::NAN; m * n];
            linear.forward(cpu, &mut y, &reference::noise(seed, m * k), None);
            y
        };
        let alone: Vec<_> = (0..4).map(call).collect();
        std::thread::scope(|scope| {
            for (seed, alone) in (0..).zip(&alone) {
                let call = &call;
                scope.spawn(move || {
                    for _ in 0..20 {
                        assert_eq!(&call(seed), alone);
                    }
                });
            }
        });
    }
}
