use super::*;

#[test]
fn heads_are_normed_rotated_and_stored() {
    let (emulated, seed) = (Emulated::compile("rope", &[]), seed());
    for (heads, kv_heads, head_dim) in [(4, 2, 16), (3, 1, 80), (9, 3, 128)] {
        for with_norms_and_bias in [false, true] {
            check(&emulated, seed, [heads, kv_heads, head_dim], with_norms_and_bias);
        }
    }
}

fn check(emulated: &Emulated, seed: u64, [heads, kv_heads, head_dim]: [usize; 3], extras: bool) {
    let (rows, pages, page_size) = (4, 3, 5);
    let width = (heads + 2 * kv_heads) * head_dim;
    let qkv = reference::noise(seed, rows * width);
    let bias = reference::noise(seed ^ 1, width);
    let norms = reference::noise(seed ^ 2, 2 * head_dim);
    let angles = reference::noise(seed ^ 3, 7 * head_dim);
    // The third row is padding.
    let (positions, slots) = ([6_u32, 0, 0, 3], [14_u32, 0, u32::MAX, 7]);
    let mut queries = poison(rows * heads * head_dim);
    let mut cache = [
        poison(pages * page_size * kv_heads * head_dim),
        poison(pages * page_size * kv_heads * head_dim),
    ];
    let (to, keys) = (queries.as_mut_ptr(), cache[0].as_mut_ptr());
    let values = cache[1].as_mut_ptr();
    let optional = |values: &Vec<f32>| match extras {
        true => values.as_ptr(),
        false => std::ptr::null(),
    };
    kernel!(emulated, b"rope_store", [rows, 1, 1], 256, to => *mut bf16, keys => *mut bf16, values => *mut bf16,
        qkv.as_ptr() => *const f32, optional(&bias) => *const f32, angles.as_ptr() => *const f32,
        positions.as_ptr() => *const u32, slots.as_ptr() => *const u32, optional(&norms) => *const f32, 1e-6 => f32,
        heads as i32 => i32, kv_heads as i32 => i32, head_dim as i32 => i32, page_size as i32 => i32);
    let mut written = 0;
    for row in [0, 1, 3] {
        for head in 0..heads + 2 * kv_heads {
            let mut expected = qkv[row * width + head * head_dim..][..head_dim].to_vec();
            if extras {
                for (value, bias) in expected.iter_mut().zip(&bias[head * head_dim..]) {
                    *value += bias;
                }
            }
            if head < heads + kv_heads {
                if extras {
                    let of = usize::from(head >= heads);
                    expected = reference::rms_norm(&expected, &norms[of * head_dim..][..head_dim], 1e-6);
                }
                let (cos, sin) =
                    angles[positions[row] as usize * head_dim..][..head_dim].split_at(head_dim / 2);
                expected = reference::rotate(&expected, cos, sin);
            }
            let (page, offset) = (slots[row] as usize / page_size, slots[row] as usize % page_size);
            let cell = |kv_head: usize| ((page * kv_heads + kv_head) * page_size + offset) * head_dim;
            let found = if head < heads {
                &queries[(row * heads + head) * head_dim..][..head_dim]
            } else if head < heads + kv_heads {
                &cache[0][cell(head - heads)..][..head_dim]
            } else {
                &cache[1][cell(head - heads - kv_heads)..][..head_dim]
            };
            reference::assert_close(&to_f32(found), &expected, BF16);
            written += head_dim;
        }
    }
    let all = queries.iter().chain(&cache[0]).chain(&cache[1]);
    assert_eq!(
        all.filter(|value| !value.is_nan()).count(),
        written,
        "nothing else is written"
    );
}
