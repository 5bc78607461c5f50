//! What a step's kernels read of the batch: checked here, laid out in one buffer, sent in one copy.

use super::{Buffer, CudaError, Gpu, Staging};
use crate::AttentionSequence;

/// A slot that nothing is kept in: padding's.
const NO_SLOT: u32 = u32::MAX;
/// Rows of a tile of a prefill.
const TILE: usize = 64;

/// A ragged batch.
#[derive(Debug, Clone, Copy)]
pub struct CudaBatch<'a> {
    /// Token of each row.
    pub ids: &'a [u32],
    /// Position of each row in its sequence.
    pub positions: &'a [u32],
    /// Slot in the cache of each row, `page · page_size + offset`.
    pub slots: &'a [usize],
    /// The sequences, one after the other, which together have every row.
    pub sequences: &'a [AttentionSequence<'a>],
    /// Rows whose logits are wanted.
    pub logit_rows: &'a [usize],
}

/// What the contents of a batch must stay below.
#[derive(Debug, Clone, Copy)]
pub struct CudaLimits {
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// Positions that there are angles for.
    pub positions: usize,
    /// Pages of the cache.
    pub num_pages: usize,
    /// Tokens a page.
    pub page_size: usize,
    /// Query heads that share a key head.
    pub group: usize,
}

/// A step's inputs on the device. They are valid for the limits that they were made with.
pub struct Inputs {
    pub(super) limits: CudaLimits,
    staging: Staging<u32>,
    pub(super) device: Buffer<u32>,
    pub(super) layout: Layout,
    tables: Vec<u32>,
}

/// Where the parts lie in the buffer, in words. Page tables come last, so that nothing depends on their length.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) rows: usize,
    pub(super) logit_rows: usize,
    pub(super) decodes: usize,
    pub(super) tiles: usize,
    pub(super) ids: usize,
    pub(super) positions: usize,
    pub(super) slots: usize,
    pub(super) selected: usize,
    pub(super) decode_sequences: usize,
    pub(super) prefill_sequences: usize,
    pub(super) tile_list: usize,
    pub(super) tables: usize,
}

// === impl Inputs ===

impl Inputs {
    /// Room for `words` words; see [`Inputs::words`].
    ///
    /// # Errors
    /// Memory cannot be had.
    pub fn new(gpu: &Gpu, limits: CudaLimits, words: usize) -> Result<Self, CudaError> {
        Ok(Self {
            limits,
            staging: gpu.staging(words)?,
            device: gpu.zeros(words)?,
            layout: Layout::default(),
            tables: Vec::new(),
        })
    }

    /// Words that any batch of so many rows and sequences, with so many pages in all their tables, fits into.
    pub fn words(rows: usize, sequences: usize, pages: usize, group: usize) -> usize {
        let tiles = (rows * group).div_ceil(TILE) + sequences;
        4 * rows + 8 * sequences + 2 * tiles + pages + 64
    }

    /// Rows of logits.
    pub fn logit_rows(&self) -> usize {
        self.layout.logit_rows
    }

    /// Rows, padding included.
    pub fn rows(&self) -> usize {
        self.layout.rows
    }

    /// Checks `batch` and starts to send it. With `bucket`, every sequence must have one row and ask for its logits;
    /// padding fills up to so many, and the layout depends on the bucket alone.
    ///
    /// # Errors
    /// The batch contradicts itself, the limits or the room.
    pub fn fill(&mut self, gpu: &Gpu, batch: &CudaBatch<'_>, bucket: Option<usize>) -> Result<(), CudaError> {
        self.check(batch, bucket).map_err(CudaError::Step)?;
        let decodes = batch
            .sequences
            .iter()
            .filter(|sequence| sequence.query_len == 1)
            .count();
        let prefills = batch.sequences.len() - decodes;
        let tiles = batch.sequences.iter().filter(|sequence| sequence.query_len > 1);
        let tiles = tiles
            .map(|sequence| (sequence.query_len * self.limits.group).div_ceil(TILE))
            .sum();
        let counts = match bucket {
            Some(bucket) => [bucket, bucket, bucket, 0, 0],
            None => [batch.ids.len(), batch.logit_rows.len(), decodes, prefills, tiles],
        };
        let layout = Layout::new(counts);
        let pages: usize = batch.sequences.iter().map(|sequence| sequence.pages.len()).sum();
        let words = layout.tables + pages;
        if words > self.device.len() {
            return Err(CudaError::Step(format!(
                "it takes {words} words, and there is room for {}",
                self.device.len()
            )));
        }
        self.layout = layout;
        self.lay_out(batch)?;
        gpu.write_staged(&mut self.device, 0, &mut self.staging, words)
    }

    fn lay_out(&mut self, batch: &CudaBatch<'_>) -> Result<(), CudaError> {
        let (layout, group) = (self.layout, self.limits.group);
        let words = self.staging.values()?;
        // Indices fit: `check` bounds them by what 32 bits hold.
        let narrow = |value: usize| value as u32;
        copy_padded(
            &mut words[layout.ids..layout.positions],
            batch.ids.iter().copied(),
            0,
        );
        copy_padded(
            &mut words[layout.positions..layout.slots],
            batch.positions.iter().copied(),
            0,
        );
        let slots = batch.slots.iter().map(|&slot| narrow(slot));
        copy_padded(&mut words[layout.slots..layout.selected], slots, NO_SLOT);
        let selected = batch.logit_rows.iter().map(|&row| narrow(row));
        copy_padded(&mut words[layout.selected..layout.decode_sequences], selected, 0);
        words[layout.decode_sequences..layout.tables].fill(0);
        self.tables.clear();
        let (mut decodes, mut prefills, mut tiles) = (0, 0, 0);
        for sequence in batch.sequences {
            let at = if sequence.query_len == 1 {
                decodes += 1;
                layout.decode_sequences + 4 * (decodes - 1)
            } else {
                for first in (0..sequence.query_len * group).step_by(TILE) {
                    let at = layout.tile_list + 2 * tiles;
                    words[at] = narrow(prefills);
                    words[at + 1] = narrow(first);
                    tiles += 1;
                }
                prefills += 1;
                layout.prefill_sequences + 4 * (prefills - 1)
            };
            words[at] = narrow(sequence.query_start);
            words[at + 1] = narrow(sequence.query_len);
            words[at + 2] = narrow(sequence.context_len);
            words[at + 3] = narrow(self.tables.len());
            self.tables.extend_from_slice(sequence.pages);
        }
        words[layout.tables..][..self.tables.len()].copy_from_slice(&self.tables);
        Ok(())
    }

    /// The kernels trust every index; this is why they may.
    fn check(&self, batch: &CudaBatch<'_>, bucket: Option<usize>) -> Result<(), String> {
        let (rows, limits) = (batch.ids.len(), &self.limits);
        if rows == 0 || batch.positions.len() != rows || batch.slots.len() != rows {
            return Err(format!(
                "{rows} tokens, {} positions, {} slots",
                batch.positions.len(),
                batch.slots.len()
            ));
        }
        let below = |what: &str, value: usize, limit: usize| match value < limit.min(i32::MAX as usize) {
            true => Ok(()),
            false => Err(format!("{what} {value} of {limit}")),
        };
        below("row", rows * limits.group, i32::MAX as usize)?;
        for row in 0..rows {
            below("token", batch.ids[row] as usize, limits.vocab_size)?;
            below("position", batch.positions[row] as usize, limits.positions)?;
            below("slot", batch.slots[row], limits.num_pages * limits.page_size)?;
        }
        for &row in batch.logit_rows {
            below("row of logits", row, rows)?;
        }
        let mut next = 0;
        for sequence in batch.sequences {
            if sequence.query_start != next
                || sequence.query_len == 0
                || sequence.query_len > sequence.context_len
            {
                return Err(format!(
                    "a sequence of {} rows from {} on, context {}",
                    sequence.query_len, sequence.query_start, sequence.context_len
                ));
            }
            next += sequence.query_len;
            below("context", sequence.context_len - 1, limits.positions)?;
            if sequence.pages.len() < sequence.context_len.div_ceil(limits.page_size) {
                return Err(format!(
                    "{} pages for {} tokens",
                    sequence.pages.len(),
                    sequence.context_len
                ));
            }
            for &page in sequence.pages {
                below("page", page as usize, limits.num_pages)?;
            }
        }
        if next != rows {
            return Err(format!("the sequences have {next} of {rows} rows"));
        }
        match bucket {
            Some(bucket)
                if bucket < rows || batch.sequences.len() != rows || batch.logit_rows.len() != rows =>
            {
                Err(format!("{rows} rows are no decode of at most {bucket}"))
            }
            _ => Ok(()),
        }
    }
}

// === impl Layout ===

impl Layout {
    /// Parts start at multiples of four words, so that vectors are aligned.
    fn new([rows, logit_rows, decodes, prefills, tiles]: [usize; 5]) -> Self {
        let mut next = 0;
        let mut part = |words: usize| {
            let at = next;
            next += words.next_multiple_of(4);
            at
        };
        Self {
            rows,
            logit_rows,
            decodes,
            tiles,
            ids: part(rows),
            positions: part(rows),
            slots: part(rows),
            selected: part(logit_rows),
            decode_sequences: part(4 * decodes),
            prefill_sequences: part(4 * prefills),
            tile_list: part(2 * tiles),
            tables: part(0),
        }
    }
}

fn copy_padded(to: &mut [u32], values: impl ExactSizeIterator<Item = u32>, padding: u32) {
    let len = values.len();
    for (to, value) in to.iter_mut().zip(values) {
        *to = value;
    }
    to[len..].fill(padding);
}
