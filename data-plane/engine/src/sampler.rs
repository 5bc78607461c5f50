//! Sampling on the CPU, from rows of logits in f32.

use crate::{SampleRequest, SampledToken, TokenHistory, runner::RunnerError};

/// Candidates sorted at first where top-p is on; four times as many each time that they do not suffice.
const NUCLEUS_START: usize = 64;

/// Samples rows; its buffers are reused between steps.
#[derive(Debug, Default)]
pub struct Sampler {
    /// (id, logit or weight) of the tokens still in the running.
    candidates: Vec<(u32, f32)>,
}

// === impl Sampler ===

impl Sampler {
    /// Empty buffers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Samples `row` of the step from its `logits` (`[vocab_size]`), which all but the draw change in place.
    ///
    /// Order: penalties, bias, grammar, `min_tokens`, log-probabilities, temperature, top-k, min-p, top-p, draw. Greedy where the temperature
    /// is 0; the lowest id wins a tie.
    ///
    /// # Errors
    /// A row that holds NaN, or no number above negative infinity; a grammar that cannot be followed.
    pub fn sample(
        &mut self,
        row: usize,
        logits: &mut [f32],
        request: &SampleRequest<'_>,
    ) -> Result<SampledToken, RunnerError> {
        if let Some(id) = request.follows {
            let best = argmax(logits).ok_or(RunnerError::NotNumbers { row })?;
            return Ok(self.report(logits, best, id, request.top_logprobs.unwrap_or(0)));
        }
        if let Some(history) = request.history {
            penalize(logits, request, history);
        }
        for &(id, bias) in &request.params.logit_bias {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit += bias;
            }
        }
        if let Some(grammar) = request.grammar {
            grammar.with_mask(|mask| mask.apply(logits))?;
        }
        let best = best(logits, request).ok_or(RunnerError::NotNumbers { row })?;
        let id = match request.params.temperature == 0.0 {
            true => best,
            false => self.draw(logits, logits[best as usize], request),
        };
        let Some(alternatives) = request.top_logprobs else {
            return Ok(SampledToken {
                id,
                logprob: None,
                top: Vec::new(),
            });
        };
        Ok(self.report(logits, best, id, alternatives))
    }

    /// A token with its log-probability, and the likeliest tokens with theirs.
    fn report(&mut self, logits: &[f32], best: u32, id: u32, alternatives: usize) -> SampledToken {
        let norm = log_sum_exp(logits, logits[best as usize]);
        let likeliest = self.likeliest(logits, alternatives).iter();
        let top = likeliest.map(|&(id, logit)| (id, logit - norm)).collect();
        SampledToken {
            id,
            logprob: logits.get(id as usize).map(|logit| logit - norm),
            top,
        }
    }

    /// Draws by weight from what top-k, min-p and top-p leave.
    fn draw(&mut self, logits: &[f32], max: f32, request: &SampleRequest<'_>) -> u32 {
        let params = request.params;
        // Below this logit a token is less than min_p times as likely as the likeliest. Without min-p the
        // cut-off is where f32 weights vanish anyway.
        let floor = match params.min_p > 0.0 {
            true => max + params.min_p.ln() * params.temperature,
            false => max - 104.0 * params.temperature,
        };
        self.candidates.clear();
        self.candidates
            .extend(ids(logits).filter(|&(_, logit)| logit >= floor));
        if (1..self.candidates.len()).contains(&params.top_k) {
            self.candidates
                .select_nth_unstable_by(params.top_k - 1, likelier_first);
            self.candidates.truncate(params.top_k);
        }
        let mut total = 0.0;
        for (_, logit) in &mut self.candidates {
            *logit = ((*logit - max) / params.temperature).exp();
            total += f64::from(*logit);
        }
        if params.top_p < 1.0 {
            total = self.keep_nucleus(f64::from(params.top_p) * total);
        } else {
            // The order of the draw must not depend on how top-k partitioned.
            self.candidates.sort_unstable_by_key(|&(id, _)| id);
        }
        pick(&self.candidates, uniform(params.seed, request.index) * total)
    }

    /// Keeps the likeliest candidates whose weights reach `mass` together, at least one, likeliest first; returns
    /// their sum.
    fn keep_nucleus(&mut self, mass: f64) -> f64 {
        let (mut sorted, mut sum, mut next) = (0, 0.0, NUCLEUS_START);
        while sorted < self.candidates.len() {
            // Most nuclei are small: only as much is sorted as is looked at.
            let rest = &mut self.candidates[sorted..];
            let count = next.min(rest.len());
            if count < rest.len() {
                rest.select_nth_unstable_by(count - 1, likelier_first);
            }
            rest[..count].sort_unstable_by(likelier_first);
            for &(_, weight) in &rest[..count] {
                sum += f64::from(weight);
                sorted += 1;
                if sum >= mass {
                    self.candidates.truncate(sorted);
                    return sum;
                }
            }
            next *= 4;
        }
        sum
    }

    /// The `count` largest logits, largest first.
    fn likeliest(&mut self, logits: &[f32], count: usize) -> &[(u32, f32)] {
        self.candidates.clear();
        if count == 0 {
            return &self.candidates;
        }
        self.candidates
            .extend(ids(logits).filter(|&(_, logit)| logit > f32::NEG_INFINITY));
        let count = count.min(self.candidates.len());
        self.candidates.select_nth_unstable_by(count - 1, likelier_first);
        self.candidates.truncate(count);
        self.candidates.sort_unstable_by(likelier_first);
        &self.candidates
    }
}

/// Divides positive and multiplies negative logits (CTRL, arXiv 1909.05858), then subtracts presence and
/// frequency as OpenAI's interface defines them.
fn penalize(logits: &mut [f32], request: &SampleRequest<'_>, history: &TokenHistory) {
    let params = request.params;
    for (id, seen) in history.iter() {
        let Some(logit) = logits.get_mut(id as usize) else {
            continue;
        };
        *logit = if *logit > 0.0 {
            *logit / params.repetition_penalty
        } else {
            *logit * params.repetition_penalty
        };
        if seen.in_reply > 0 {
            // Counts of one reply are far below 2^24.
            *logit -= params.presence_penalty + params.frequency_penalty * seen.in_reply as f32;
        }
    }
}

/// Index of the largest logit after stop tokens were taken out, where it is too early for one and there is another.
fn best(logits: &mut [f32], request: &SampleRequest<'_>) -> Option<u32> {
    if request.index >= request.params.min_tokens as u64 {
        return argmax(logits);
    }
    let sound = argmax(logits)?;
    let stops = request.stop_token_ids.iter().map(|&id| id as usize);
    let stops: Vec<(usize, f32)> = stops.filter_map(|id| Some((id, *logits.get(id)?))).collect();
    for &(id, _) in &stops {
        logits[id] = f32::NEG_INFINITY;
    }
    argmax(logits).or_else(|| {
        // The grammar has ended.
        stops.iter().for_each(|&(id, logit)| logits[id] = logit);
        Some(sound)
    })
}

/// Index of the largest logit; `None` where there is a NaN or nothing finite.
fn argmax(logits: &[f32]) -> Option<u32> {
    let mut best: Option<(u32, f32)> = None;
    let mut sound = true;
    for (id, logit) in ids(logits) {
        sound &= !logit.is_nan();
        if best.is_none_or(|(_, largest)| logit > largest) {
            best = Some((id, logit));
        }
    }
    best.filter(|(_, largest)| sound && largest.is_finite())
        .map(|(id, _)| id)
}

fn log_sum_exp(logits: &[f32], max: f32) -> f32 {
    let sum: f64 = logits.iter().map(|&logit| f64::from((logit - max).exp())).sum();
    max + sum.ln() as f32
}

/// The token where the running sum of weights passes `target`.
fn pick(candidates: &[(u32, f32)], target: f64) -> u32 {
    let mut sum = 0.0;
    for &(id, weight) in candidates {
        sum += f64::from(weight);
        if sum > target {
            return id;
        }
    }
    // Rounding only: the target is below the sum of all weights.
    candidates.last().map_or(0, |&(id, _)| id)
}

fn ids(logits: &[f32]) -> impl Iterator<Item = (u32, f32)> {
    (0u32..).zip(logits.iter().copied())
}

fn likelier_first(a: &(u32, f32), b: &(u32, f32)) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// A number in [0, 1) that depends on seed and index alone, so that a replay draws the same.
fn uniform(seed: u64, index: u64) -> f64 {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8..].copy_from_slice(&index.to_le_bytes());
    // 53 bits are what a f64 holds exactly.
    (xxhash_rust::xxh3::xxh3_64(&bytes) >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests;
