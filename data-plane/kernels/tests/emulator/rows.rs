use super::*;

#[test]
fn norms_agree_with_the_reference() {
    let (emulated, seed) = (Emulated::compile("rows", &[]), seed());
    for (rows, width) in [(1, 8), (3, 200), (2, 2056)] {
        let x = reference::noise(seed, rows * width);
        let delta = reference::noise(seed ^ 1, rows * width);
        let weight = reference::noise(seed ^ 2, width);
        let bias = reference::noise(seed ^ 3, width);
        let mut y = poison(rows * width);
        let to = y.as_mut_ptr();
        kernel!(emulated, b"rms_norm", [rows, 1, 1], 256, to => *mut bf16, x.as_ptr() => *const f32,
            weight.as_ptr() => *const f32, 1e-5 => f32, width as i32 => i32);
        reference::assert_close(&to_f32(&y), &reference::rms_norm(&x, &weight, 1e-5), BF16);
        for bias in [None, Some(&bias)] {
            let shift = |at: usize| bias.map_or(0.0, |bias| bias[at % width]);
            let sums: Vec<f32> = (0..x.len()).map(|at| x[at] + delta[at] + shift(at)).collect();
            let (mut stream, mut y) = (x.clone(), poison(rows * width));
            let (to, through) = (y.as_mut_ptr(), stream.as_mut_ptr());
            kernel!(emulated, b"add_rms_norm", [rows, 1, 1], 256, to => *mut bf16, through => *mut f32,
                delta.as_ptr() => *const f32, bias.map_or(std::ptr::null(), |bias| bias.as_ptr()) => *const f32,
                weight.as_ptr() => *const f32, 1e-5 => f32, width as i32 => i32);
            assert_eq!(stream, sums);
            reference::assert_close(&to_f32(&y), &reference::rms_norm(&sums, &weight, 1e-5), BF16);
        }
    }
}

#[test]
fn the_gate_agrees_with_the_reference() {
    let (emulated, seed) = (Emulated::compile("rows", &[]), seed());
    let (rows, width) = (3, 1032);
    let gate_up: Vec<f32> = reference::noise(seed, rows * 2 * width)
        .iter()
        .map(|value| 6.0 * value)
        .collect();
    let bias = reference::noise(seed ^ 1, 2 * width);
    for bias in [None, Some(&bias)] {
        let mut y = poison(rows * width);
        let to = y.as_mut_ptr();
        kernel!(emulated, b"swiglu", [2, rows, 1], 256, to => *mut bf16, gate_up.as_ptr() => *const f32,
            bias.map_or(std::ptr::null(), |bias| bias.as_ptr()) => *const f32, width as i32 => i32);
        let shift = |at: usize| bias.map_or(0.0, |bias| bias[at % (2 * width)]);
        let shifted: Vec<f32> = (0..gate_up.len()).map(|at| gate_up[at] + shift(at)).collect();
        reference::assert_close(&to_f32(&y), &reference::swiglu(&shifted, width), BF16);
    }
}

#[test]
fn rows_are_gathered_and_pages_copied() {
    let (emulated, seed) = (Emulated::compile("rows", &[]), seed());
    let width = 264;
    let table = to_bf16(&reference::noise(seed, 5 * width));
    let ids = [4_u32, 0, 4];
    let (mut stream, mut selected) = (vec![f32::NAN; 3 * width], poison(3 * width));
    let (to, target) = (stream.as_mut_ptr(), selected.as_mut_ptr());
    kernel!(emulated, b"embed", [3, 1, 1], 256, to => *mut f32, table.as_ptr() => *const bf16,
        ids.as_ptr() => *const u32, width as i32 => i32);
    kernel!(emulated, b"gather_rows", [3, 1, 1], 256, target => *mut bf16, table.as_ptr() => *const bf16,
        ids.as_ptr() => *const u32, width as i32 => i32);
    let expected: Vec<bf16> = ids
        .iter()
        .flat_map(|&id| table[id as usize * width..][..width].to_vec())
        .collect();
    assert_eq!(stream, to_f32(&expected));
    assert_eq!(selected, expected);

    let (parts, pages, page) = (4, 6, 4104);
    let pool = to_bf16(&reference::noise(seed ^ 1, parts * pages * page));
    let (mut copied, mut expected) = (pool.clone(), pool.clone());
    let pairs = [[0_u32, 5], [2, 1]];
    let to = copied.as_mut_ptr();
    kernel!(emulated, b"copy_pages", [2, 2, parts], 256, to => *mut bf16, pairs.as_ptr() => *const [u32; 2],
        (pages * page) as u64 => u64, page as u64 => u64);
    for part in 0..parts {
        for [from, to] in pairs {
            let from = (part * pages + from as usize) * page;
            expected.copy_within(from..from + page, (part * pages + to as usize) * page);
        }
    }
    assert_eq!(copied, expected);
}
