//! How to sample a row of logits, as a device reads it.

/// How to sample one row of logits. The order of the steps is the CPU sampler's.
#[derive(Debug, Clone, Copy)]
pub struct SampleRow<'a> {
    /// The random number, in [0, 1).
    pub uniform: f64,
    /// 0 is greedy.
    pub temperature: f32,
    /// Nucleus mass in (0, 1].
    pub top_p: f32,
    /// Tokens less likely than this share of the likeliest are out.
    pub min_p: f32,
    /// Keep the k likeliest; 0 keeps all.
    pub top_k: usize,
    /// Repetition, presence and frequency penalties.
    pub penalties: [f32; 3],
    /// Tokens seen, each once, with how often in the reply.
    pub seen: &'a [(u32, u32)],
    /// Added to logits.
    pub bias: &'a [(u32, f32)],
    /// Tokens that may not come yet, if there is another.
    pub stops: &'a [u32],
    /// The grammar's mask, a bit a token, the lowest bit first.
    pub mask: Option<&'a [u32]>,
    /// Whether the log-probability is wanted.
    pub logprob: bool,
}

// === impl SampleRow ===

impl SampleRow<'_> {
    /// Words of a row's description.
    pub const WORDS: usize = 18;

    /// Lays out what the kernel reads: rows, then entries (pairs of words), then masks. Returns where the entries
    /// start; masks are counted from the front.
    pub fn lay_out(rows: &[SampleRow<'_>], words: &mut Vec<u32>) -> usize {
        let start = rows.len() * Self::WORDS;
        let pairs: usize = rows
            .iter()
            .map(|row| row.seen.len() + row.bias.len() + row.stops.len())
            .sum();
        let (mut entry, mut mask) = (0_u32, (start + 2 * pairs) as u32);
        words.clear();
        for row in rows {
            let range = |len: usize, entry: &mut u32| {
                *entry += len as u32;
                [*entry - len as u32, len as u32]
            };
            let floor = if row.min_p > 0.0 { row.min_p.ln() } else { -104.0 };
            let uniform = row.uniform.to_bits();
            words.extend([uniform as u32, (uniform >> 32) as u32]);
            let numbers = [row.temperature, row.top_p, floor];
            words.extend(numbers.into_iter().chain(row.penalties).map(f32::to_bits));
            words.push(u32::try_from(row.top_k).unwrap_or(u32::MAX));
            for len in [row.seen.len(), row.bias.len(), row.stops.len()] {
                words.extend(range(len, &mut entry));
            }
            words.push(row.mask.map_or(u32::MAX, |_| mask));
            mask += row.mask.map_or(0, |mask| mask.len() as u32);
            words.extend([u32::from(row.logprob), 0]);
        }
        for row in rows {
            words.extend(row.seen.iter().flat_map(|&(id, count)| [id, count]));
            words.extend(row.bias.iter().flat_map(|&(id, bias)| [id, bias.to_bits()]));
            words.extend(row.stops.iter().flat_map(|&id| [id, 0]));
        }
        for row in rows {
            words.extend_from_slice(row.mask.unwrap_or_default());
        }
        start
    }
}
