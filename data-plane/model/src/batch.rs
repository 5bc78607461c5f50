//! One step's work, flat and ragged.

/// Tokens of several sequences, laid end to end. Reused between steps: [`Batch::clear`] keeps the memory.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// Token ids, `[num_tokens]`.
    pub tokens: Vec<u32>,
    /// Position of each token in its sequence, `[num_tokens]`.
    pub positions: Vec<u32>,
    /// Page tables of all sequences, laid end to end.
    pub page_tables: Vec<u32>,
    /// Which tokens and pages belong to which sequence.
    pub sequences: Vec<BatchSequence>,
}

/// One sequence's part of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchSequence {
    /// Index of its first token in [`Batch::tokens`].
    pub query_start: usize,
    /// Number of its tokens in this batch: 1 for decode, more for a chunk of prefill.
    pub query_len: usize,
    /// Tokens whose KV it attends to once this step is done, its own included.
    pub context_len: usize,
    /// Index of its first page in [`Batch::page_tables`].
    pub page_start: usize,
    /// Number of its pages: at least `context_len / page_size`, rounded up.
    pub page_count: usize,
    /// Whether the logits of its last token are wanted.
    pub logits: bool,
    /// Whether those of its other tokens are, too.
    pub all_logits: bool,
}

// === impl Batch ===

impl Batch {
    /// Empties the batch.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.page_tables.clear();
        self.sequences.clear();
    }

    /// Adds the tokens of one sequence that follow its first `computed` ones.
    pub fn push(&mut self, tokens: &[u32], computed: usize, pages: &[u32], logits: bool) {
        let position = |at: usize| u32::try_from(computed + at).unwrap_or(u32::MAX);
        self.sequences.push(BatchSequence {
            query_start: self.tokens.len(),
            query_len: tokens.len(),
            context_len: computed + tokens.len(),
            page_start: self.page_tables.len(),
            page_count: pages.len(),
            logits,
            all_logits: false,
        });
        self.positions.extend((0..tokens.len()).map(position));
        self.tokens.extend_from_slice(tokens);
        self.page_tables.extend_from_slice(pages);
    }

    /// Asks for the logits of every token of the sequence added last.
    pub fn want_all_logits(&mut self) {
        if let Some(last) = self.sequences.last_mut() {
            last.logits = true;
            last.all_logits = true;
        }
    }

    /// Rows of logits that the step yields.
    pub fn logit_rows(&self) -> usize {
        self.sequences
            .iter()
            .map(|sequence| sequence.logit_rows().len())
            .sum()
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// A sequence's pages.
    pub fn pages(&self, sequence: &BatchSequence) -> &[u32] {
        &self.page_tables[sequence.page_start..sequence.page_start + sequence.page_count]
    }
}

// === impl BatchSequence ===

impl BatchSequence {
    /// Indices in [`Batch::tokens`] of the tokens whose logits are wanted.
    pub fn logit_rows(&self) -> std::ops::Range<usize> {
        let end = self.query_start + self.query_len;
        match (self.all_logits, self.logits) {
            (true, _) => self.query_start..end,
            (false, true) => end - 1..end,
            (false, false) => end..end,
        }
    }
}
