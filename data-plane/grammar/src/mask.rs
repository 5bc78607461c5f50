//! The set of tokens that may come next, as bits.

/// One bit a token; bit `id % 32` of word `id / 32` is set where token `id` may come next.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TokenMask {
    words: Vec<u32>,
    len: usize,
}

// === impl TokenMask ===

impl TokenMask {
    /// A mask of `len` tokens that allows none.
    pub fn new(len: usize) -> Self {
        Self {
            words: vec![0; len.div_ceil(32)],
            len,
        }
    }

    /// Tokens that the mask knows of, allowed or not.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the mask knows of no token.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bits: `len().div_ceil(32)` words; those past the last token are clear.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// Whether `id` may come next; an id outside the vocabulary may not.
    pub fn allows(&self, id: u32) -> bool {
        let id = id as usize;
        id < self.len && self.words[id / 32] >> (id % 32) & 1 == 1
    }

    /// How many tokens may come next.
    pub fn count(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// The only token that may come next, where there is just one.
    pub fn only(&self) -> Option<u32> {
        let mut set = self.words.iter().enumerate().filter(|&(_, &word)| word != 0);
        let (index, word) = set.next()?;
        let single = word.is_power_of_two() && set.next().is_none();
        single.then(|| index as u32 * 32 + word.trailing_zeros())
    }

    /// The allowed ids, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.words.iter().enumerate().flat_map(|(index, &word)| {
            let mut left = word;
            std::iter::from_fn(move || {
                let bit = (left != 0).then(|| left.trailing_zeros())?;
                left &= left - 1;
                Some(index as u32 * 32 + bit)
            })
        })
    }

    /// Sets the logits (`[vocab_size]`) of all other tokens to negative infinity. Rows padded beyond the
    /// vocabulary lose their padding too.
    pub fn apply(&self, logits: &mut [f32]) {
        for (index, chunk) in logits.chunks_mut(32).enumerate() {
            match self.words.get(index).copied().unwrap_or(0) {
                u32::MAX => {}
                0 => chunk.fill(f32::NEG_INFINITY),
                word => {
                    for (bit, logit) in chunk.iter_mut().enumerate() {
                        if word >> bit & 1 == 0 {
                            *logit = f32::NEG_INFINITY;
                        }
                    }
                }
            }
        }
    }

    /// Clears the bit of `id`.
    pub(crate) fn forbid(&mut self, id: u32) {
        self.words[id as usize / 32] &= !(1 << (id % 32));
    }

    /// Takes the bits of `words`, which may have more of them than there are tokens.
    pub(crate) fn copy_from(&mut self, words: &[u32]) {
        let count = self.words.len();
        self.words.copy_from_slice(&words[..count]);
        if let (Some(last), tail @ 1..) = (self.words.last_mut(), self.len % 32) {
            *last &= (1 << tail) - 1;
        }
    }
}

#[cfg(test)]
mod tests;
