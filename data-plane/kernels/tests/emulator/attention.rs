use super::*;

/// Rounding of the powers and of the result to bf16; outputs are means of values between -1 and 1.
const TOLERANCE: f32 = 0.012;

/// One case of a batch: (new tokens, context) of each sequence.
struct Case {
    heads: usize,
    kv_heads: usize,
    page_size: usize,
    window: usize,
    splits: usize,
    sequences: &'static [(usize, usize)],
}

/// A cache whose pages are dealt out of order; what no sequence owns is NaN.
struct Cache {
    keys: Vec<bf16>,
    values: Vec<bf16>,
    tables: Vec<u32>,
    /// First row, rows, positions, first page.
    sequences: Vec<[i32; 4]>,
}

fn cache(case: &Case, head_dim: usize, seed: u64) -> Cache {
    let owned = |context: usize| context.div_ceil(case.page_size) + 1;
    let pages: usize = case.sequences.iter().map(|&(_, context)| owned(context)).sum();
    let cell = case.kv_heads * case.page_size * head_dim;
    let mut cache = Cache {
        keys: poison(pages * cell),
        values: poison(pages * cell),
        tables: Vec::new(),
        sequences: Vec::new(),
    };
    let mut row = 0;
    for &(query_len, context) in case.sequences {
        cache
            .sequences
            .push([row, query_len as i32, context as i32, cache.tables.len() as i32]);
        row += query_len as i32;
        for position in 0..context {
            if position % case.page_size == 0 {
                let page = (pages - 1 - cache.tables.len()) as u32;
                cache.tables.push(page);
            }
            // What no row's window reaches may hold anything.
            let first = (context - query_len + 1).saturating_sub(case.window);
            if case.window > 0 && position < first {
                continue;
            }
            let page = cache.tables[cache.tables.len() - 1] as usize;
            for head in 0..case.kv_heads {
                let at =
                    ((page * case.kv_heads + head) * case.page_size + position % case.page_size) * head_dim;
                let values = reference::noise(
                    seed ^ ((row as u64) << 40 | (position * 64 + head) as u64),
                    2 * head_dim,
                );
                let values = to_bf16(&values);
                cache.keys[at..at + head_dim].copy_from_slice(&values[..head_dim]);
                cache.values[at..at + head_dim].copy_from_slice(&values[head_dim..]);
            }
        }
        cache.tables.push((pages - 1 - cache.tables.len()) as u32);
    }
    cache
}

fn expected(case: &Case, head_dim: usize, queries: &[bf16], cache: &Cache, scale: f32) -> Vec<f32> {
    let mut y = Vec::new();
    for &[row, query_len, context, page_start] in &cache.sequences {
        for query in 0..query_len as usize {
            let position = context as usize - query_len as usize + query;
            let first = match case.window {
                0 => 0,
                window => (position + 1).saturating_sub(window),
            };
            for head in 0..case.heads {
                let kv_head = head / (case.heads / case.kv_heads);
                let read = |from: &[bf16], at: usize| {
                    let page = cache.tables[page_start as usize + at / case.page_size] as usize;
                    let slot = (page * case.kv_heads + kv_head) * case.page_size + at % case.page_size;
                    to_f32(&from[slot * head_dim..][..head_dim])
                };
                let keys: Vec<_> = (first..=position).map(|at| read(&cache.keys, at)).collect();
                let values: Vec<_> = (first..=position).map(|at| read(&cache.values, at)).collect();
                let at = ((row as usize + query) * case.heads + head) * head_dim;
                let query = to_f32(&queries[at..at + head_dim]);
                y.extend(reference::attend(&query, &keys, &values, scale));
            }
        }
    }
    y
}

fn check(emulated: &Emulated, head_dim: usize, case: &Case, seed: u64) {
    let rows: usize = case.sequences.iter().map(|&(query_len, _)| query_len).sum();
    let (group, scale) = (case.heads / case.kv_heads, 3.0 / (head_dim as f32).sqrt());
    let queries = to_bf16(&reference::noise(seed, rows * case.heads * head_dim));
    let cache = cache(case, head_dim, seed);
    let mut y = poison(queries.len());
    let to = y.as_mut_ptr();
    let is_decode = |sequence: &&[i32; 4]| sequence[1] == 1;
    let mut decodes: Vec<[i32; 4]> = cache.sequences.iter().filter(is_decode).copied().collect();
    // A sequence of padding, as a graph has it.
    decodes.push([0, 0, 0, 0]);
    let prefills: Vec<[i32; 4]> = cache
        .sequences
        .iter()
        .filter(|sequence| !is_decode(sequence))
        .copied()
        .collect();
    let mut tiles = Vec::new();
    for (index, sequence) in prefills.iter().enumerate() {
        let first_rows = (0..sequence[1] as usize * group).step_by(64);
        tiles.extend(first_rows.map(|first| [index as i32, first as i32]));
    }
    let sizes = [case.heads, case.kv_heads, case.page_size, case.window].map(|size| size as i32);
    if !tiles.is_empty() {
        kernel!(emulated, b"attend_prefill", [tiles.len(), case.kv_heads, 1], 128, to => *mut bf16,
            queries.as_ptr() => *const bf16, cache.keys.as_ptr() => *const bf16,
            cache.values.as_ptr() => *const bf16, prefills.as_ptr() => *const [i32; 4],
            cache.tables.as_ptr() => *const u32, tiles.as_ptr() => *const [i32; 2], sizes[0] => i32,
            sizes[1] => i32, sizes[2] => i32, sizes[3] => i32, scale => f32);
    }
    let cells = decodes.len() * case.splits * case.heads;
    let (mut parts, mut stats) = (vec![f32::NAN; cells * head_dim], vec![f32::NAN; 2 * cells]);
    let (split, stat) = (parts.as_mut_ptr(), stats.as_mut_ptr());
    let grid = [case.splits, case.kv_heads * group.div_ceil(16), decodes.len()];
    kernel!(emulated, b"attend_decode", grid, 128, to => *mut bf16, split => *mut f32, stat => *mut f32,
        queries.as_ptr() => *const bf16, cache.keys.as_ptr() => *const bf16, cache.values.as_ptr() => *const bf16,
        decodes.as_ptr() => *const [i32; 4], cache.tables.as_ptr() => *const u32, sizes[0] => i32,
        sizes[1] => i32, sizes[2] => i32, sizes[3] => i32, scale => f32);
    if case.splits > 1 {
        kernel!(emulated, b"combine", [case.heads, decodes.len(), 1], 128, to => *mut bf16, split => *const f32,
            stat => *const f32, decodes.as_ptr() => *const [i32; 4], case.splits as i32 => i32);
    }
    let expected = expected(case, head_dim, &queries, &cache, scale);
    reference::assert_close(&to_f32(&y), &expected, TOLERANCE);
}

/// Prefills from nothing and from a computed prefix, decodes, and windows; groups of 1, 4, 3 and 20 heads.
const CASES: [Case; 5] = [
    Case {
        heads: 2,
        kv_heads: 2,
        page_size: 16,
        window: 0,
        splits: 1,
        sequences: &[(5, 5), (1, 1), (1, 130)],
    },
    Case {
        heads: 8,
        kv_heads: 2,
        page_size: 16,
        window: 0,
        splits: 3,
        sequences: &[(70, 90), (1, 64), (1, 200), (2, 3)],
    },
    Case {
        heads: 3,
        kv_heads: 1,
        page_size: 5,
        window: 20,
        splits: 2,
        sequences: &[(30, 100), (1, 150), (1, 7)],
    },
    Case {
        heads: 20,
        kv_heads: 1,
        page_size: 1,
        window: 0,
        splits: 5,
        sequences: &[(1, 100), (4, 9)],
    },
    Case {
        heads: 4,
        kv_heads: 4,
        page_size: 64,
        window: 64,
        splits: 1,
        sequences: &[(1, 65), (65, 65), (1, 128)],
    },
];

#[test]
fn heads_of_64_with_two_stages_agree_with_the_reference() {
    let (emulated, seed) = (
        Emulated::compile("attention", &[("HEAD_DIM", 64), ("STAGES", 2)]),
        seed(),
    );
    CASES.iter().for_each(|case| check(&emulated, 64, case, seed));
}

#[test]
fn padded_heads_of_40_with_one_stage_agree_with_the_reference() {
    let (emulated, seed) = (
        Emulated::compile("attention", &[("HEAD_DIM", 40), ("STAGES", 1)]),
        seed(),
    );
    CASES.iter().for_each(|case| check(&emulated, 40, case, seed));
}
