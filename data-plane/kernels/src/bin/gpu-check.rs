//! Runs the kernels on card 0 (or the one named) with fresh random inputs, compares them with their plain twins, and
//! prints a line of JSON for each. Exits with 1 on any mismatch, or when there is no card to open.

use std::{process::ExitCode, time::SystemTime};

use half::bf16;
use penstock_kernels::{
    AttentionSequence, CacheShape, QkvShape, SampleRow,
    cuda::{
        Buffer, CudaAttention, CudaBatch, CudaCache, CudaError, CudaLimits, DeviceSampler, Gpu, Inputs,
        RopeStore,
    },
    reference,
};

const QKV: QkvShape = QkvShape {
    heads: 8,
    kv_heads: 2,
    head_dim: 128,
};
const CACHE: CacheShape = CacheShape {
    num_pages: 40,
    page_size: 16,
    kv_heads: 2,
    head_dim: 128,
};
/// Rounding to bf16, and a last bit; attention rounds its powers as well.
const BF16: f64 = 1.0 / 128.0;

/// What the checks share.
struct Check {
    gpu: Gpu,
    seed: u64,
    failures: usize,
}

/// One group of checks.
type Run = fn(&mut Check) -> Result<(), CudaError>;

fn main() -> ExitCode {
    let ordinal = std::env::args().nth(1).and_then(|argument| argument.parse().ok());
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let seed = since.map_or(1, |since| since.as_nanos() as u64);
    let gpu = match Gpu::open(ordinal.unwrap_or(0), QKV.head_dim, None) {
        Ok(gpu) => gpu,
        Err(error) => {
            eprintln!("gpu-check: {error}");
            return ExitCode::FAILURE;
        }
    };
    eprintln!("{}, seed {seed}", gpu.name());
    let mut check = Check {
        gpu,
        seed,
        failures: 0,
    };
    let checks: [(&str, Run); 4] = [
        ("rows", Check::rows),
        ("product", Check::product),
        ("attention", Check::attention),
        ("sample", Check::sample),
    ];
    for (name, run) in checks {
        if let Err(error) = run(&mut check) {
            eprintln!("{name}: {error}: {:?}", std::error::Error::source(&error));
            check.failures += 1;
        }
    }
    match check.failures {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

// === impl Check ===

impl Check {
    fn noise(&mut self, len: usize) -> Vec<f32> {
        self.seed = self.seed.wrapping_add(1);
        reference::noise(self.seed, len)
    }

    fn poisoned(&self, len: usize) -> Result<Buffer<bf16>, CudaError> {
        self.gpu.upload(&vec![bf16::NAN; len])
    }

    /// Compares by the norm of the difference; NaN never passes.
    fn compare(&mut self, name: &str, found: &[f32], expected: &[f32], tolerance: f64) {
        let norm =
            |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
        let mut differences = found
            .iter()
            .zip(expected)
            .map(|(&a, &b)| f64::from(a) - f64::from(b));
        let error = norm(&mut differences) / norm(&mut expected.iter().map(|&value| f64::from(value)));
        let agrees = found.len() == expected.len() && error <= tolerance;
        self.tell(
            name,
            agrees,
            &format!("\"error\":{error:e},\"tolerance\":{tolerance:e}"),
        );
    }

    #[allow(clippy::print_stdout, reason = "the result is its output")]
    fn tell(&mut self, name: &str, agrees: bool, more: &str) {
        self.failures += usize::from(!agrees);
        println!("{{\"check\":\"{name}\",\"agrees\":{agrees},{more}}}");
    }

    fn rows(&mut self) -> Result<(), CudaError> {
        let (rows, width) = (37, 4096);
        let (x, delta) = (self.noise(rows * width), self.noise(rows * width));
        let (weight, gates) = (self.noise(width), self.noise(rows * 2 * width));
        let (mut y, mut stream) = (self.poisoned(rows * width)?, self.gpu.upload(&x)?);
        let (more, factor) = (self.gpu.upload(&delta)?, self.gpu.upload(&weight)?);
        self.gpu
            .add_rms_norm(&mut y, &mut stream, (&more, None), &factor, 1e-5, rows)?;
        let found = widen(&self.gpu.read(&y, 0, rows * width)?);
        let sums: Vec<f32> = x.iter().zip(&delta).map(|(x, delta)| x + delta).collect();
        self.compare(
            "add_rms_norm",
            &found,
            &reference::rms_norm(&sums, &weight, 1e-5),
            BF16,
        );
        let (mut y, gate_up) = (self.poisoned(rows * width)?, self.gpu.upload(&gates)?);
        self.gpu.swiglu(&mut y, &gate_up, None, rows, width)?;
        let found = widen(&self.gpu.read(&y, 0, rows * width)?);
        self.compare("swiglu", &found, &reference::swiglu(&gates, width), BF16);
        Ok(())
    }

    fn product(&mut self) -> Result<(), CudaError> {
        let (inputs, outputs) = (512, 384);
        let weight = narrow(&self.noise(outputs * inputs));
        let matrix = self.gpu.upload(&weight)?;
        for rows in [1, 16, 130] {
            let x = narrow(&self.noise(rows * inputs));
            let operand = self.gpu.upload(&x)?;
            let mut y = self.gpu.upload(&vec![f32::NAN; rows * outputs])?;
            self.gpu.tune(&mut y, &operand, &matrix, rows, inputs)?;
            let mut y = self.gpu.upload(&vec![f32::NAN; rows * outputs])?;
            self.gpu.product(&mut y, &operand, &matrix, rows, inputs)?;
            let found = self.gpu.read(&y, 0, rows * outputs)?;
            let expected = reference::linear(&widen(&x), &widen(&weight), inputs, None);
            self.compare("product", &found, &expected, 1e-5);
        }
        Ok(())
    }

    /// Keys and values are written by rope_store, in one step as prompts, and attended to by the same step; then a
    /// decode follows.
    fn attention(&mut self) -> Result<(), CudaError> {
        let (positions, prompt) = (400, 300);
        let limits = CudaLimits {
            vocab_size: 1,
            positions,
            num_pages: CACHE.num_pages,
            page_size: CACHE.page_size,
            group: QKV.heads / QKV.kv_heads,
        };
        let pages: Vec<u32> = (0..20).map(|page| 39 - page).collect();
        let angles = self.noise(positions * QKV.head_dim);
        let qkv = self.noise((prompt + 1) * QKV.width());
        let table = self.gpu.upload(&angles)?;
        let mut pool = self.poisoned(Gpu::pool_elements(CACHE, 1))?;
        let words = Inputs::words(prompt, 1, pages.len(), limits.group);
        let mut inputs = Inputs::new(&self.gpu, limits, words)?;
        let mut splits = self.gpu.splits(1, QKV)?;
        let (cache, scale) = (
            CudaCache {
                shape: CACHE,
                layer: 0,
            },
            0.3,
        );
        let rotated = rotated(&qkv, &angles);
        for (name, from, to) in [
            ("attend_prefill", 0, prompt),
            ("attend_decode", prompt, prompt + 1),
        ] {
            let rows = to - from;
            let slots: Vec<usize> = (from..to)
                .map(|at| pages[at / 16] as usize * 16 + at % 16)
                .collect();
            let sequences = [AttentionSequence {
                query_start: 0,
                query_len: rows,
                context_len: to,
                pages: &pages,
            }];
            let batch = CudaBatch {
                ids: &vec![0; rows],
                positions: &(from as u32..to as u32).collect::<Vec<_>>(),
                slots: &slots,
                sequences: &sequences,
                logit_rows: &[],
            };
            inputs.fill(&self.gpu, &batch, None)?;
            let step = self.gpu.upload(&qkv[from * QKV.width()..to * QKV.width()])?;
            let len = rows * QKV.heads * QKV.head_dim;
            let (mut queries, mut y) = (self.poisoned(len)?, self.poisoned(len)?);
            let rope = RopeStore {
                qkv: QKV,
                cache,
                bias: None,
                angles: &table,
                norms: None,
            };
            self.gpu
                .rope_store(&mut queries, &mut pool, &step, &inputs, &rope)?;
            let call = CudaAttention {
                qkv: QKV,
                cache,
                scale,
                window: None,
            };
            self.gpu
                .attend(&mut y, &mut splits, &queries, &mut pool, &inputs, &call)?;
            let found = widen(&self.gpu.read(&y, 0, len)?);
            self.compare(name, &found, &attended(&rotated, from..to, scale), 2.0 * BF16);
        }
        Ok(())
    }

    fn sample(&mut self) -> Result<(), CudaError> {
        let (rows, vocab_size) = (12, 151_936);
        let logits: Vec<f32> = self
            .noise(rows * vocab_size)
            .iter()
            .map(|value| 9.0 * value)
            .collect();
        let uniforms = self.noise(rows);
        let requests: Vec<SampleRow<'_>> = (0..rows)
            .map(|row| SampleRow {
                uniform: f64::from(uniforms[row] + 1.0) / 2.000_001,
                temperature: [0.0, 0.7, 1.3][row % 3],
                top_p: [1.0, 0.9][row % 2],
                min_p: 0.0,
                top_k: [0, 50][row / 6],
                penalties: [1.0, 0.0, 0.0],
                seen: &[],
                bias: &[],
                stops: &[],
                mask: None,
                logprob: true,
            })
            .collect();
        let mut sampler = DeviceSampler::new(&self.gpu, rows, vocab_size)?;
        let mut device = self.gpu.upload(&logits)?;
        sampler.start(&self.gpu, &mut device, &requests)?;
        let found: Vec<_> = sampler.finish()?.collect();
        let expected = requests
            .iter()
            .zip(logits.chunks_exact(vocab_size))
            .map(|(row, logits)| reference::sample(&mut logits.to_vec(), row));
        let same = found
            .iter()
            .zip(expected)
            .filter(|(found, expected)| found.map(|found| found.0) == expected.map(|expected| expected.0));
        let same = same.count();
        self.tell("sample", same == rows, &format!("\"same\":{same},\"of\":{rows}"));
        Ok(())
    }
}

/// Rows of q, k and v after the rotation, rounded as the card keeps them.
fn rotated(qkv: &[f32], angles: &[f32]) -> Vec<Vec<f32>> {
    let rotate = |(row, values): (usize, &[f32])| {
        let (cos, sin) = angles[row * QKV.head_dim..][..QKV.head_dim].split_at(QKV.head_dim / 2);
        let heads = values.chunks_exact(QKV.head_dim).enumerate();
        let heads = heads.flat_map(|(head, values)| match head < QKV.heads + QKV.kv_heads {
            true => reference::rotate(values, cos, sin),
            false => values.to_vec(),
        });
        reference::round_bf16(&heads.collect::<Vec<_>>())
    };
    qkv.chunks_exact(QKV.width()).enumerate().map(rotate).collect()
}

/// What the queries of `rows` get from all positions up to their own.
fn attended(rotated: &[Vec<f32>], rows: std::ops::Range<usize>, scale: f32) -> Vec<f32> {
    let head = |row: usize, head: usize| rotated[row][head * QKV.head_dim..][..QKV.head_dim].to_vec();
    let mut y = Vec::new();
    for row in rows {
        for query in 0..QKV.heads {
            let key = QKV.heads + query / (QKV.heads / QKV.kv_heads);
            let keys: Vec<_> = (0..=row).map(|at| head(at, key)).collect();
            let values: Vec<_> = (0..=row).map(|at| head(at, key + QKV.kv_heads)).collect();
            y.extend(reference::attend(&head(row, query), &keys, &values, scale));
        }
    }
    y
}

fn narrow(values: &[f32]) -> Vec<bf16> {
    values.iter().map(|&value| bf16::from_f32(value)).collect()
}

fn widen(values: &[bf16]) -> Vec<f32> {
    values.iter().map(|value| value.to_f32()).collect()
}
