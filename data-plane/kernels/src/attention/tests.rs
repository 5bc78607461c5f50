use half::bf16;
use proptest::prelude::*;

use super::*;
use crate::{Isa, Pool, reference};

/// A made-up batch with its cache, and the plain answer.
struct Case {
    qkv: QkvShape,
    cache_shape: CacheShape,
    rows: Vec<f32>,
    cache: Vec<f32>,
    /// (rows, context) of each sequence.
    lengths: Vec<(usize, usize)>,
    pages: Vec<Vec<u32>>,
    window: Option<usize>,
}

impl Case {
    fn new(
        qkv: QkvShape,
        page_size: usize,
        lengths: &[(usize, usize)],
        window: Option<usize>,
        seed: u64,
    ) -> Self {
        let mut next_page = 0;
        let pages: Vec<Vec<u32>> = lengths
            .iter()
            .map(|&(_, context)| {
                let count = context.div_ceil(page_size) as u32;
                next_page += count;
                // Backwards, so that nothing works by accident.
                (next_page - count..next_page).rev().collect()
            })
            .collect();
        let cache_shape = CacheShape {
            num_pages: next_page as usize + 1,
            page_size,
            kv_heads: qkv.kv_heads,
            head_dim: qkv.head_dim,
        };
        let rows = lengths.iter().map(|&(rows, _)| rows).sum::<usize>();
        let rows = reference::noise(seed, rows * qkv.width());
        // What lies beyond the contexts and before all windows is not a number: it must not matter.
        let mut case = Self {
            qkv,
            cache_shape,
            rows,
            cache: Vec::new(),
            lengths: lengths.to_vec(),
            pages,
            window,
        };
        case.cache = vec![f32::NAN; cache_shape.elements()];
        let filled = reference::round_bf16(&reference::noise(seed ^ 1, cache_shape.elements()));
        for (sequence, &(rows, context)) in lengths.iter().enumerate() {
            for position in first_seen(context - rows, window)..context {
                for (head, dim) in
                    (0..qkv.kv_heads).flat_map(|head| (0..qkv.head_dim).map(move |dim| (head, dim)))
                {
                    for at in case.places(sequence, position, head, dim) {
                        case.cache[at] = filled[at];
                    }
                }
            }
        }
        case
    }

    /// Where an element of a key and of a value lies.
    fn places(&self, sequence: usize, position: usize, head: usize, dim: usize) -> [usize; 2] {
        let shape = &self.cache_shape;
        let page = self.pages[sequence][position / shape.page_size] as usize;
        let offset = position % shape.page_size;
        let start = (page * shape.kv_heads + head) * shape.page_size * shape.head_dim;
        [
            start + dim * shape.page_size + offset,
            self.cache_shape.elements() / 2 + start + offset * shape.head_dim + dim,
        ]
    }

    fn in_tiles(&self, cpu: Cpu) -> bool {
        let whole = self.qkv.head_dim.is_multiple_of(32) && self.cache_shape.page_size.is_multiple_of(16);
        cpu.isa.level() == crate::isa::Level::Amx && whole
    }

    fn run(&self, cpu: Cpu, bf16_cache: bool) -> Vec<f32> {
        let mut query_start = 0;
        let sequences: Vec<_> = self
            .lengths
            .iter()
            .zip(&self.pages)
            .map(|(&(query_len, context_len), pages)| {
                let sequence = AttentionSequence {
                    query_start,
                    query_len,
                    context_len,
                    pages,
                };
                query_start += query_len;
                sequence
            })
            .collect();
        let call = Attention {
            qkv: self.qkv,
            cache: self.cache_shape,
            scale: 0.7,
            window: self.window,
            sequences: &sequences,
        };
        let mut y = vec![f32::NAN; query_start * self.qkv.heads * self.qkv.head_dim];
        if bf16_cache {
            let cache: Vec<bf16> = self.cache.iter().map(|&value| bf16::from_f32(value)).collect();
            attention(cpu, &mut y, &self.rows, &cache, &call);
        } else {
            attention(cpu, &mut y, &self.rows, &self.cache, &call);
        }
        y
    }

    fn expected(&self) -> Vec<f32> {
        let QkvShape {
            heads,
            kv_heads,
            head_dim,
        } = self.qkv;
        let (mut y, mut row) = (Vec::new(), 0);
        for (sequence, &(query_len, context_len)) in self.lengths.iter().enumerate() {
            for query in 0..query_len {
                for head in 0..heads {
                    let kv_head = head / (heads / kv_heads);
                    let own = context_len - query_len + query;
                    let gather = |half: usize| -> Vec<Vec<f32>> {
                        (first_seen(own, self.window)..=own)
                            .map(|position| {
                                (0..head_dim)
                                    .map(|dim| {
                                        self.cache[self.places(sequence, position, kv_head, dim)[half]]
                                    })
                                    .collect()
                            })
                            .collect()
                    };
                    let query = &self.rows[row * self.qkv.width() + head * head_dim..][..head_dim];
                    y.extend(reference::attend(query, &gather(0), &gather(1), 0.7));
                }
                row += 1;
            }
        }
        y
    }
}

/// The first position that the token at `own` sees.
fn first_seen(own: usize, window: Option<usize>) -> usize {
    window.map_or(0, |window| (own + 1).saturating_sub(window))
}

/// No window, one shorter than a block, and one that spans several.
fn windows() -> impl Strategy<Value = Option<usize>> {
    prop_oneof![
        Just(None),
        (1..40_usize).prop_map(Some),
        (40..180_usize).prop_map(Some)
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn tiles_agree_with_the_reference_on_rounded_queries(
        kv_heads in 1..3_usize, group in 1..8_usize, half_dim in prop::sample::select(vec![16_usize, 32, 48, 64]),
        page_size in prop::sample::select(vec![16_usize, 32, 64]),
        lengths in prop::collection::vec((1..60_usize, 0..200_usize), 1..4), window in windows(), seed: u64,
    ) {
        let qkv = QkvShape { heads: kv_heads * group, kv_heads, head_dim: half_dim * 2 };
        let lengths: Vec<_> = lengths.into_iter().map(|(rows, cached)| (rows, rows + cached)).collect();
        let mut case = Case::new(qkv, page_size, &lengths, window, seed);
        case.rows = reference::round_bf16(&case.rows);
        let expected = case.expected();
        for isa in Isa::available() {
            // Powers of e are off by 2⁻⁹ of their size at most, and so is their mean over values of up to 1.
            reference::assert_close(&case.run(Cpu { isa, pool: Pool::process() }, true), &expected, 4e-3);
        }
    }

    #[test]
    fn attention_agrees_with_the_reference(
        kv_heads in 1..3_usize, group in 1..8_usize, half_dim in 1..40_usize,
        page_size in prop::sample::select(vec![1_usize, 3, 16, 64]),
        lengths in prop::collection::vec((1..40_usize, 0..150_usize), 1..4), window in windows(), seed: u64,
    ) {
        let qkv = QkvShape { heads: kv_heads * group, kv_heads, head_dim: half_dim * 2 };
        let lengths: Vec<_> = lengths.into_iter().map(|(rows, cached)| (rows, rows + cached)).collect();
        let case = Case::new(qkv, page_size, &lengths, window, seed);
        let expected = case.expected();
        for isa in Isa::available() {
            let cpu = Cpu { isa, pool: Pool::process() };
            reference::assert_close(&case.run(cpu, false), &expected, 2e-5);
            // The keys and values are bf16 numbers already, so only tiles, which round queries and powers to bf16 as
            // well, are less exact.
            reference::assert_close(&case.run(cpu, true), &expected, if case.in_tiles(cpu) { 2e-2 } else { 2e-5 });
        }
    }

    #[test]
    fn a_token_does_not_depend_on_its_chunk_nor_on_its_batch(
        group in 1..5_usize, rows in 2..80_usize, cached in 0..150_usize, bf16_cache: bool, window in windows(), seed: u64,
    ) {
        let qkv = QkvShape { heads: 2 * group, kv_heads: 2, head_dim: 32 };
        let case = Case::new(qkv, 16, &[(rows, rows + cached), (1, 70)], window, seed);
        for isa in Isa::available() {
            let cpu = Cpu { isa, pool: Pool::process() };
            let whole = case.run(cpu, bf16_cache);
            let width = qkv.heads * qkv.head_dim;
            for row in 0..rows {
                let pages = vec![case.pages[0].clone()];
                let alone = Case {
                    lengths: vec![(1, cached + row + 1)], pages,
                    rows: case.rows[row * qkv.width()..][..qkv.width()].to_vec(), cache: case.cache.clone(), ..case
                };
                prop_assert_eq!(&alone.run(cpu, bf16_cache)[..], &whole[row * width..][..width]);
            }
        }
    }
}

#[test]
fn a_sequence_that_is_not_a_number_does_not_spread_through_what_windows_skip() {
    let qkv = QkvShape {
        heads: 2,
        kv_heads: 1,
        head_dim: 32,
    };
    // The first sequence leaves its positions 64 to 79 in working memory where the second one skips 64 to 79.
    let mut case = Case::new(qkv, 16, &[(1, 80), (1, 100)], Some(20), 7);
    let width = qkv.heads * qkv.head_dim;
    let expected = case.expected().split_off(width);
    for (position, dim) in (0..80).flat_map(|position| (0..qkv.head_dim).map(move |dim| (position, dim))) {
        for at in case.places(0, position, 0, dim) {
            case.cache[at] = f32::NAN;
        }
    }
    for isa in Isa::available() {
        let cpu = Cpu {
            isa,
            pool: Pool::process(),
        };
        reference::assert_close(&case.run(cpu, false)[width..], &expected, 2e-5);
        reference::assert_close(&case.run(cpu, true)[width..], &expected, 2e-2);
    }
}
