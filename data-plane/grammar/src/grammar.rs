//! What a caller may ask of a reply's text.

/// A language; a reply must be one of its members, whole.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Grammar {
    /// Texts that a regular expression matches from beginning to end, in the syntax of the `regex` crate
    /// (Unicode classes, `(?i)`; no look-around, no backreferences). `^` and `$` at its ends change nothing.
    Regex(String),
    /// JSON that satisfies a schema, given as JSON text. Keywords mean what draft 2020-12 says, whatever the
    /// draft that `$schema` names; one that cannot be enforced is refused.
    JsonSchema(String),
    /// A JSON object, of any content.
    JsonObject,
    /// A context-free grammar in llguidance's dialect of Lark; its rule `start` is the reply.
    Lark(String),
    /// One of these texts, exactly.
    Choices(Vec<String>),
}

// === impl Grammar ===

impl Grammar {
    /// Bytes of text that the caller sent.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Regex(text) | Self::JsonSchema(text) | Self::Lark(text) => text.len(),
            Self::JsonObject => 0,
            Self::Choices(choices) => choices.iter().map(|choice| choice.len() + 1).sum(),
        }
    }
}
