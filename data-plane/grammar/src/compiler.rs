//! Makes automata of grammars, off the caller's thread, within limits.

use std::{sync::Arc, time::Duration};

use llguidance::{
    Logger,
    api::{GrammarInit, ParserLimits, TopLevelGrammar},
    toktrie::InferenceCapabilities,
};
use serde_json::Value;

use crate::{
    CompiledGrammar, Grammar, Vocabulary, error::GrammarError, lark, matcher::is_too_complex, regex, schema,
    workers::Workers,
};

/// Limits of a [`GrammarCompiler`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Most text of one grammar, in bytes.
    pub max_grammar_bytes: usize,
    /// Longest that a caller waits for one grammar.
    pub max_compile_time: Duration,
    /// Threads that compile; each has 64 MiB of stack, reserved and not used.
    pub threads: usize,
    /// Grammars that may wait for a thread; further ones are refused.
    pub max_waiting: usize,
    /// Grammars kept, the ones refused among them.
    pub max_cached: usize,
    /// Memory of the automata kept, in bytes; more is held where more is in use.
    pub max_cached_bytes: usize,
    /// States of one grammar's lexer, 1 to 2 kB each; a sequence that needs more fails.
    pub max_lexer_states: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            max_grammar_bytes: 128 * 1024,
            max_compile_time: Duration::from_secs(2),
            threads: 2,
            max_waiting: 64,
            max_cached: 256,
            max_cached_bytes: 256 * 1024 * 1024,
            max_lexer_states: 50_000,
        }
    }
}

/// Compiles grammars for one vocabulary and keeps them, most recently used first.
pub struct GrammarCompiler {
    workers: Workers,
    config: Config,
}

// === impl GrammarCompiler ===

impl GrammarCompiler {
    /// Starts the compiling threads; they end with the compiler.
    pub fn new(vocabulary: Arc<Vocabulary>, config: Config) -> Self {
        let limits = limits(&config);
        let compile = move |grammar: &Grammar| compile(&vocabulary, &limits, grammar);
        Self {
            workers: Workers::start(&config, compile),
            config,
        }
    }

    /// Compiles `grammar`, or finds it compiled. Blocks the caller while one of the compiling threads works,
    /// for [`Config::max_compile_time`] at the longest: not for an engine's thread nor an async runtime's.
    ///
    /// # Errors
    /// Everything that [`GrammarError`] lists. An error that is the grammar's own is remembered with it.
    pub fn compile(&self, grammar: &Grammar) -> Result<Arc<CompiledGrammar>, GrammarError> {
        self.compile_with_deadline(grammar, self.config.max_compile_time)
    }

    /// As [`GrammarCompiler::compile`], waiting `limit` at the longest. A grammar that takes longer still keeps
    /// its thread until it is done, and is found compiled afterwards; callers that want the same grammar
    /// meanwhile wait for the same thread.
    ///
    /// # Errors
    /// As [`GrammarCompiler::compile`].
    pub fn compile_with_deadline(
        &self,
        grammar: &Grammar,
        limit: Duration,
    ) -> Result<Arc<CompiledGrammar>, GrammarError> {
        let (bytes, most) = (grammar.bytes(), self.config.max_grammar_bytes);
        if bytes > most {
            return Err(GrammarError::TooLarge { bytes, limit: most });
        }
        self.workers
            .compile(grammar, limit.min(self.config.max_compile_time))
    }

    /// `grammar` if it is compiled already; never blocks for long, starts nothing.
    pub fn cached(&self, grammar: &Grammar) -> Option<Arc<CompiledGrammar>> {
        self.workers.cached(grammar)
    }
}

impl std::fmt::Debug for GrammarCompiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GrammarCompiler")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

fn limits(config: &Config) -> ParserLimits {
    ParserLimits {
        max_lexer_states: config.max_lexer_states,
        verbose_errors: false,
        ..ParserLimits::default()
    }
}

/// Checks `grammar` and makes its automaton.
fn compile(
    vocabulary: &Arc<Vocabulary>,
    limits: &ParserLimits,
    grammar: &Grammar,
) -> Result<CompiledGrammar, GrammarError> {
    let source = source(grammar)?;
    let parser = vocabulary
        .factory()
        .create_parser_from_init_ext(
            GrammarInit::Serialized(source),
            Logger::new(0, 0),
            InferenceCapabilities::default(),
            limits.clone(),
        )
        .map_err(|error| classify(grammar, &error.to_string()))?;
    CompiledGrammar::new(vocabulary.clone(), parser)
}

/// What llguidance is given.
fn source(grammar: &Grammar) -> Result<TopLevelGrammar, GrammarError> {
    match grammar {
        Grammar::Regex(pattern) => {
            regex::check(pattern, None)?;
            // `//` would begin a comment.
            let pattern = if pattern.is_empty() { "(?:)" } else { pattern };
            Ok(TopLevelGrammar::from_regex(pattern))
        }
        Grammar::JsonSchema(text) => Ok(TopLevelGrammar::from_json_schema(schema::prepare(text)?)),
        Grammar::JsonObject => Ok(TopLevelGrammar::from_json_schema(schema::object())),
        Grammar::Lark(text) => Ok(TopLevelGrammar::from_lark(lark::prepare(text)?)),
        Grammar::Choices(choices) if choices.is_empty() => Err(GrammarError::Empty {
            reason: "there are no choices".into(),
        }),
        Grammar::Choices(choices) => {
            let escaped: Vec<String> = choices
                .iter()
                .map(|choice| regex_syntax::escape(choice))
                .collect();
            Ok(TopLevelGrammar::from_regex(&format!("(?:{})", escaped.join("|"))))
        }
    }
}

/// llguidance's errors are texts; this tells whose fault one is.
fn classify(grammar: &Grammar, message: &str) -> GrammarError {
    let first = in_one_line(message);
    if first.starts_with("panic: ") {
        return GrammarError::Internal { message: first };
    }
    if first.contains("nsatisfiable") || first.contains("Regex is empty") {
        return GrammarError::Empty { reason: first };
    }
    if is_too_complex(&first) {
        return GrammarError::TooComplex { message: first };
    }
    match grammar {
        Grammar::JsonSchema(text) => schema::explain(text, first),
        Grammar::JsonObject => GrammarError::Internal { message: first },
        Grammar::Regex(_) | Grammar::Choices(_) => GrammarError::Regex {
            pointer: None,
            message: first,
        },
        Grammar::Lark(_) => GrammarError::Lark {
            message: message.trim().to_owned(),
        },
    }
}

/// Without the picture, the backtrace and the length that some have.
fn in_one_line(message: &str) -> String {
    let message = message.split("<backtrace>").next().unwrap_or(message);
    let words: Vec<&str> = message.split_whitespace().collect();
    words.join(" ").chars().take(400).collect()
}

/// A schema's text with llguidance's own options for JSON.
pub(crate) fn with_style(mut schema: serde_json::Map<String, Value>) -> Value {
    schema.insert(
        "x-guidance".into(),
        serde_json::json!({
            // White space without end is where small models lose themselves: a space, or a line's indent, is enough.
            "whitespace_pattern": r"(?:\x20|\x0D?\x0A[\x20\x09]{0,32})",
            // Without \u each string has one spelling, so that no property escapes its schema under another.
            "json_allowed_escapes": "nrbtf\\\"",
        }),
    );
    Value::Object(schema)
}

#[cfg(test)]
mod tests;
