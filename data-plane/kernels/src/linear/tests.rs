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
    fn int8_agrees_with_the_reference_on_rounded_inputs_and_with_itself_bit_by_bit(
        m in 1..70_usize, n in 1..100_usize, k in 1..300_usize, with_bias: bool, seed: u64,
    ) {
        let (x, weights) = (reference::noise(seed, m * k), reference::noise(seed ^ 1, n * k));
        let bias = with_bias.then(|| reference::noise(seed ^ 2, n));
        let (rounded, rounded_weights) = (reference::round_int8(&x, k), reference::round_int8(&weights, k));
        let expected = reference::linear(&rounded, &rounded_weights, k, bias.as_deref());
        let mut plainest: Option<Vec<f32>> = None;
        for cpu in machines() {
            let mut y = vec![f32::NAN; m * n];
            packed(cpu, Element::Int8, &weights, n, k).forward(cpu, &mut y, &x, bias.as_deref());
            reference::assert_close(&y, &expected, 1e-5);
            let plainest = plainest.get_or_insert_with(|| y.clone());
            prop_assert_eq!(&y, plainest);
        }
    }

    #[test]
    fn gated_layers_agree_with_the_reference(
        m in 1..40_usize, n in 1..70_usize, k in 1..130_usize, with_bias: bool, seed: u64,
    ) {
        let (x, weights) = (reference::noise(seed, m * k), reference::noise(seed ^ 1, 2 * n * k));
        let bias = with_bias.then(|| reference::noise(seed ^ 2, 2 * n));
        for element in [Element::F32, Element::Bf16, Element::Int8] {
            let round = |values: &[f32]| match element {
                Element::F32 => values.to_vec(),
                Element::Bf16 => reference::round_bf16(values),
                Element::Int8 => reference::round_int8(values, k),
            };
            let both = reference::linear(&round(&x), &round(&weights), k, bias.as_deref());
            let expected = reference::swiglu(&both, n);
            for cpu in machines() {
                let linear = Linear::pack_gated(cpu, element, n, k, &|row, to| {
                    to.copy_from_slice(&weights[row * k..][..k])
                });
                let mut y = vec![f32::NAN; m * n];
                linear.forward(cpu, &mut y, &x, bias.as_deref());
                reference::assert_close(&y, &expected, 2e-4);
            }
        }
    }

    #[test]
    fn two_layers_in_one_call_yield_what_two_calls_do(
        m in 1..70_usize, hidden in 1..70_usize, n in 1..70_usize, k in 1..70_usize, with_bias: bool, seed: u64,
    ) {
        let x = reference::noise(seed, m * k);
        let weights = [reference::noise(seed ^ 1, 2 * hidden * k), reference::noise(seed ^ 2, n * hidden)];
        let biases = [reference::noise(seed ^ 3, 2 * hidden), reference::noise(seed ^ 4, n)];
        let [first, second] = biases.each_ref().map(|bias| with_bias.then_some(&bias[..]));
        for cpu in machines() {
            for element in [Element::F32, Element::Bf16, Element::Int8] {
                let gate_up = Linear::pack_gated(cpu, element, hidden, k, &|row, to| {
                    to.copy_from_slice(&weights[0][row * k..][..k]);
                });
                let down = packed(cpu, element, &weights[1], n, hidden);
                let (mut between, mut expected) = (vec![0.0; m * hidden], vec![f32::NAN; m * n]);
                gate_up.forward(cpu, &mut between, &x, first);
                down.forward(cpu, &mut expected, &between, second);
                between.fill(f32::NAN);
                let mut y = vec![f32::NAN; m * n];
                let gate_up = Layer { linear: &gate_up, bias: first };
                let down = Layer { linear: &down, bias: second };
                mlp(cpu, &mut y, &mut between, &x, gate_up, down);
                prop_assert_eq!(&y, &expected);
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_the_rows_beside_it(m in 2..70_usize, n in 1..70_usize, k in 1..600_usize, seed: u64) {
        let (x, weights) = (reference::noise(seed, m * k), reference::noise(seed ^ 1, n * k));
        for cpu in machines() {
            for element in [Element::F32, Element::Bf16, Element::Int8] {
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
        let rounded = reference::round_int8(&weights, k);
        for (element, weights) in [(Element::F32, &weights), (Element::Bf16, &weights), (Element::Int8, &rounded)] {
            let linear = packed(Cpu::detect(), element, weights, n, k);
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
    for element in [Element::F32, Element::Bf16, Element::Int8] {
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

#[test]
fn int8_is_off_by_less_than_a_hundredth_of_the_outputs_size() {
    let (m, n, k) = (16, 128, 2048);
    // Sums of 12 numbers are as good as normally distributed, which weights and activations are, roughly.
    let normal = |seed, len: usize| -> Vec<f32> {
        let noise = reference::noise(seed, len * 12);
        noise
            .chunks_exact(12)
            .map(|twelve| twelve.iter().sum::<f32>() / 2.0)
            .collect()
    };
    let (x, weights) = (normal(1, m * k), normal(2, n * k));
    let exact = reference::linear(&x, &weights, k, None);
    for cpu in machines() {
        let mut y = vec![f32::NAN; m * n];
        packed(cpu, Element::Int8, &weights, n, k).forward(cpu, &mut y, &x, None);
        let square = |values: &mut dyn Iterator<Item = f32>| values.map(|value| value * value).sum::<f32>();
        let off = square(&mut y.iter().zip(&exact).map(|(y, exact)| y - exact));
        let size = square(&mut exact.iter().copied());
        let error = (off / size).sqrt();
        assert!(error < 0.012, "{}: {error}", cpu.isa);
        assert!(error > 0.001, "{}: {error} is too good to be int8", cpu.isa);
    }
}

#[test]
fn what_is_no_number_does_not_get_lost_in_int8() {
    for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for cpu in machines() {
            let linear = packed(cpu, Element::Int8, &[1.0; 100], 1, 100);
            let mut x = [1.0; 200];
            x[30] = poison;
            let mut y = [0.0; 2];
            linear.forward(cpu, &mut y, &x, None);
            assert!(y[0].is_nan(), "{}", cpu.isa);
            assert!((y[1] - 100.0).abs() < 1e-3, "{}: {}", cpu.isa, y[1]);
        }
    }
}
