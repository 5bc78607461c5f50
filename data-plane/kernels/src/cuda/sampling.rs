//! Sampling on the device.

use cudarc::driver::{LaunchConfig, PushKernelArg};

use super::{Buffer, CudaError, Gpu, Staging, error::Doing};

/// Stop tokens of a row, at most, while they may not come.
pub const MAX_STOPS: usize = 64;
/// Words of a row's description.
const ROW_WORDS: usize = 18;

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

/// A row's token and its log-probability; `None`: the logits are not numbers.
pub type CudaToken = Option<(u32, f32)>;

/// Buffers of the sampler, for so many rows.
pub struct DeviceSampler {
    rows: usize,
    vocab_size: usize,
    staging: Staging<u32>,
    inputs: Buffer<u32>,
    /// Tokens, then log-probabilities.
    outputs: Buffer<u32>,
    answers: Staging<u32>,
    words: Vec<u32>,
    filled: usize,
}

// === impl DeviceSampler ===

impl DeviceSampler {
    /// Buffers for `rows` rows at most. Entries (tokens seen, biases, stops) grow them when there are many.
    ///
    /// # Errors
    /// Memory cannot be had.
    pub fn new(gpu: &Gpu, rows: usize, vocab_size: usize) -> Result<Self, CudaError> {
        let words = rows * (ROW_WORDS + 64);
        Ok(Self {
            rows,
            vocab_size,
            staging: gpu.staging(words)?,
            inputs: gpu.zeros(words)?,
            outputs: gpu.zeros(2 * rows)?,
            answers: gpu.staging(2 * rows)?,
            words: Vec::with_capacity(words),
            filled: 0,
        })
    }

    /// Samples `rows` from `logits` (`[rows][vocab_size]`), which change, and starts to bring the tokens back.
    ///
    /// # Errors
    /// Too many rows or stops, a mask that is too short, or a launch that fails.
    ///
    /// # Panics
    /// There are fewer logits.
    pub fn start(
        &mut self,
        gpu: &Gpu,
        logits: &mut Buffer<f32>,
        rows: &[SampleRow<'_>],
    ) -> Result<(), CudaError> {
        self.check(rows)?;
        assert!(
            logits.len() >= rows.len() * self.vocab_size,
            "there are logits for every row"
        );
        self.filled = rows.len();
        if rows.is_empty() {
            return Ok(());
        }
        let entries = self.lay_out(rows);
        if self.words.len() > self.inputs.len() {
            let len = self.words.len().next_power_of_two();
            (self.staging, self.inputs) = (gpu.staging(len)?, gpu.zeros(len)?);
        }
        self.staging.values()?[..self.words.len()].copy_from_slice(&self.words);
        gpu.write_staged(&mut self.inputs, 0, &mut self.staging, self.words.len())?;
        let mut launch = gpu.stream.launch_builder(gpu.function_sample());
        let tokens = self.outputs.address(gpu, 0);
        let logprobs = self.outputs.address(gpu, self.rows);
        let logits = logits.address(gpu, 0);
        let (inputs, entries) = (self.inputs.address(gpu, 0), self.inputs.address(gpu, entries));
        let vocab_size = self.vocab_size as u32;
        launch
            .arg(&tokens)
            .arg(&logprobs)
            .arg(&logits)
            .arg(&inputs)
            .arg(&entries)
            .arg(&inputs)
            .arg(&vocab_size);
        let config = LaunchConfig {
            grid_dim: (rows.len() as u32, 1, 1),
            block_dim: (1024, 1, 1),
            shared_mem_bytes: 0,
        };
        // SAFETY: the arguments are those of the kernel's signature; there are logits, rows and outputs for every
        // block, and the ranges of entries and masks lie in the inputs, as laid out above. Ids are compared with the
        // vocabulary on the device.
        unsafe { launch.launch(config) }.to("sample")?;
        gpu.read_staged(&mut self.answers, &self.outputs, 0, 2 * self.rows)
    }

    /// Waits for the tokens of [`DeviceSampler::start`].
    ///
    /// # Errors
    /// Work before failed.
    pub fn finish(&mut self) -> Result<impl Iterator<Item = CudaToken>, CudaError> {
        let (rows, filled) = (self.rows, self.filled);
        let answers: &[u32] = self.answers.values()?;
        let (tokens, logprobs) = (&answers[..filled], &answers[rows..][..filled]);
        let token =
            |(&token, &bits): (&u32, &u32)| (token != u32::MAX).then(|| (token, f32::from_bits(bits)));
        Ok(tokens.iter().zip(logprobs).map(token))
    }

    fn check(&self, rows: &[SampleRow<'_>]) -> Result<(), CudaError> {
        if rows.len() > self.rows {
            let problem = format!("{} rows to sample, room for {}", rows.len(), self.rows);
            return Err(CudaError::Step(problem));
        }
        let stops = rows.iter().map(|row| row.stops.len()).max().unwrap_or(0);
        if stops > MAX_STOPS {
            let problem = format!("{stops} stop tokens may not come yet; {MAX_STOPS} at most");
            return Err(CudaError::Step(problem));
        }
        let words = self.vocab_size.div_ceil(32);
        match rows
            .iter()
            .find(|row| row.mask.is_some_and(|mask| mask.len() < words))
        {
            Some(_) => Err(CudaError::Step(format!("a mask has fewer than {words} words"))),
            None => Ok(()),
        }
    }

    /// Rows, then entries (pairs of words), then masks. Returns where the entries start.
    fn lay_out(&mut self, rows: &[SampleRow<'_>]) -> usize {
        let start = rows.len() * ROW_WORDS;
        let pairs: usize = rows
            .iter()
            .map(|row| row.seen.len() + row.bias.len() + row.stops.len())
            .sum();
        let (mut entry, mut mask) = (0_u32, (start + 2 * pairs) as u32);
        self.words.clear();
        for row in rows {
            let range = |len: usize, entry: &mut u32| {
                *entry += len as u32;
                [*entry - len as u32, len as u32]
            };
            let floor = if row.min_p > 0.0 { row.min_p.ln() } else { -104.0 };
            let uniform = row.uniform.to_bits();
            self.words.extend([uniform as u32, (uniform >> 32) as u32]);
            let numbers = [row.temperature, row.top_p, floor];
            self.words
                .extend(numbers.into_iter().chain(row.penalties).map(f32::to_bits));
            self.words.push(u32::try_from(row.top_k).unwrap_or(u32::MAX));
            for len in [row.seen.len(), row.bias.len(), row.stops.len()] {
                self.words.extend(range(len, &mut entry));
            }
            self.words.push(row.mask.map_or(u32::MAX, |_| mask));
            mask += row.mask.map_or(0, |mask| mask.len() as u32);
            self.words.extend([u32::from(row.logprob), 0]);
        }
        for row in rows {
            self.words
                .extend(row.seen.iter().flat_map(|&(id, count)| [id, count]));
            self.words
                .extend(row.bias.iter().flat_map(|&(id, bias)| [id, bias.to_bits()]));
            self.words.extend(row.stops.iter().flat_map(|&id| [id, 0]));
        }
        for row in rows {
            self.words.extend_from_slice(row.mask.unwrap_or_default());
        }
        start
    }
}
