//! Random grammars, random replies, independent judges.

use penstock_grammar::{Grammar, GrammarCompiler, GrammarError};
use serde_json::Value;

use crate::{
    generate,
    support::{Chance, DEMO, bytes, compiler, walk},
};

/// How many grammars a test tries: `PENSTOCK_TEST_GRAMMARS`, or enough for every change. 10,000 take minutes.
fn grammars() -> u64 {
    let asked = std::env::var("PENSTOCK_TEST_GRAMMARS");
    asked.map_or(400, |count| count.parse().unwrap())
}

fn byte_tokens() -> Vec<Vec<u8>> {
    (0..=255)
        .map(|byte| vec![byte])
        .chain([b"<|end|>".to_vec()])
        .collect()
}

#[derive(Default, Debug)]
struct Tally {
    compiled: usize,
    refused: usize,
    judged: usize,
    unended: usize,
    out_of_range: usize,
}

impl Tally {
    /// A run that judges next to nothing would prove next to nothing.
    fn check(&self) {
        eprintln!("{self:?}");
        assert!(self.compiled > 2 * self.refused, "{self:?}");
        assert!(self.judged > 10 * (self.unended + self.out_of_range), "{self:?}");
    }
}

fn schemas(compiler: &GrammarCompiler, tokens: &[Vec<u8>]) {
    let mut tally = Tally::default();
    for seed in 0..grammars() {
        let mut chance = Chance(seed);
        let schema = generate::document(&mut chance);
        let compiled = match compiler.compile(&Grammar::JsonSchema(schema.to_string())) {
            Ok(compiled) => compiled,
            Err(error) => {
                assert!(may_be_refused(&error), "seed {seed}: {schema}\n{error}");
                tally.refused += 1;
                continue;
            }
        };
        tally.compiled += 1;
        let judge = jsonschema::options()
            .should_validate_formats(true)
            .build(&schema)
            .unwrap();
        for _ in 0..2 {
            let walked = walk(&compiled, tokens, &mut chance, 150);
            if !walked.has_ended {
                tally.unended += 1;
                continue;
            }
            let text = String::from_utf8(walked.text).unwrap();
            let value: Value = match serde_json::from_str(&text) {
                Ok(_) if is_beyond_doubles(&text) || is_beyond_grammars(&text) => {
                    tally.out_of_range += 1;
                    continue;
                }
                Ok(value) => value,
                Err(error) if error.to_string().contains("number out of range") => {
                    tally.out_of_range += 1;
                    continue;
                }
                Err(error) => panic!("seed {seed}: {schema}\nis no JSON: {text}\n{error}"),
            };
            tally.judged += 1;
            if let Err(error) = judge.validate(&value) {
                panic!("seed {seed}: {schema}\nlet through: {text}\n{error}");
            }
        }
    }
    tally.check();
}

/// What a random schema may well be: contradictory, a `oneOf` whose branches overlap, or a `minProperties` over
/// names that are free.
fn may_be_refused(error: &GrammarError) -> bool {
    match error {
        GrammarError::Empty { .. } | GrammarError::Endless { .. } => true,
        GrammarError::Unsupported { keyword, .. } => ["oneOf", "minProperties"].contains(&keyword.as_str()),
        _ => false,
    }
}

/// Whether a number has more digits than the judge's doubles.
fn is_beyond_doubles(text: &str) -> bool {
    text.split(|character: char| !character.is_ascii_digit())
        .any(|digits| digits.len() > 15)
}

/// What the judge knows of formats beyond the grammars in their standards: the second 60 only at midnight (RFC 3339
/// section 5.7), names before an `@` of 64 bytes at most (RFC 5321 section 4.5.3.1.1) and hosts of 253.
fn is_beyond_grammars(text: &str) -> bool {
    let is_long = |word: &str| word.len() > 64 && (word.contains('@') || word.contains('.'));
    text.contains(":60") || text.split(['"', ' ']).any(is_long)
}

fn regexes(compiler: &GrammarCompiler, tokens: &[Vec<u8>]) {
    let mut tally = Tally::default();
    for seed in 0..grammars() {
        let mut chance = Chance(seed);
        let depth = 1 + chance.below(4);
        let pattern = generate::regex(&mut chance, depth);
        let compiled = match compiler.compile(&Grammar::Regex(pattern.clone())) {
            Ok(compiled) => compiled,
            Err(error) => panic!("seed {seed}: {pattern}\n{error}"),
        };
        tally.compiled += 1;
        let judge = regex::Regex::new(&format!(r"\A(?:{pattern})\z")).unwrap();
        for _ in 0..2 {
            let walked = walk(&compiled, tokens, &mut chance, 60);
            if !walked.has_ended {
                tally.unended += 1;
                continue;
            }
            let text = String::from_utf8(walked.text).unwrap();
            tally.judged += 1;
            assert!(
                judge.is_match(&text),
                "seed {seed}: {pattern}\nlet through: {text:?}"
            );
        }
    }
    tally.check();
}

#[test]
fn whatever_is_let_through_by_bytes_satisfies_its_schema() {
    schemas(&compiler(bytes()), &byte_tokens());
}

#[test]
fn whatever_is_let_through_by_demo_tokens_satisfies_its_schema() {
    schemas(&compiler(DEMO.vocabulary()), &DEMO.tokens);
}

#[test]
fn whatever_is_let_through_by_bytes_matches_its_regex() {
    regexes(&compiler(bytes()), &byte_tokens());
}

#[test]
fn whatever_is_let_through_by_demo_tokens_matches_its_regex() {
    regexes(&compiler(DEMO.plain_vocabulary()), &DEMO.tokens);
}
