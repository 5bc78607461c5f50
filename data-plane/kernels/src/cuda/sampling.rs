//! Sampling on the device.

use cudarc::driver::{LaunchConfig, PushKernelArg};

use super::{Buffer, CudaError, Gpu, Staging, error::Doing};
use crate::SampleRow;

/// Stop tokens of a row, at most, while they may not come.
pub const MAX_STOPS: usize = 64;
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
        let words = rows * (SampleRow::WORDS + 64);
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
        let entries = SampleRow::lay_out(rows, &mut self.words);
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
}
