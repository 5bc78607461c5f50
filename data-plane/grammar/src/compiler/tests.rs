#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::*;

pub(crate) fn bytes() -> Arc<Vocabulary> {
    let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
    tokens.push(b"<eos>".to_vec());
    Vocabulary::new(tokens, &[256], &[256]).unwrap()
}

fn compiler() -> GrammarCompiler {
    GrammarCompiler::new(bytes(), Config::default())
}

fn refusal(grammar: Grammar) -> GrammarError {
    match compiler().compile(&grammar) {
        Ok(_) => panic!("{grammar:?} was compiled"),
        Err(error) => error,
    }
}

#[test]
fn look_around_and_backreferences_are_refused_with_their_place() {
    let message = refusal(Grammar::Regex("ab(?=c)".into())).to_string();
    assert!(
        message.contains("look-ahead") && message.contains("byte 2"),
        "{message}"
    );
    let message = refusal(Grammar::Regex(r"(a)\1".into())).to_string();
    assert!(
        message.contains("backreferences") && message.contains("byte 3"),
        "{message}"
    );
    assert!(matches!(
        refusal(Grammar::Regex(r"a\bb".into())),
        GrammarError::Regex { .. }
    ));
}

#[test]
fn grammars_that_allow_nothing_are_refused() {
    for grammar in [
        Grammar::Regex("[a&&b]".into()),
        Grammar::JsonSchema("false".into()),
        Grammar::JsonSchema(r#"{"type":"integer","minimum":5,"maximum":3}"#.into()),
        Grammar::JsonSchema(r#"{"enum":[]}"#.into()),
        Grammar::Lark("start: /[a&&b]/".into()),
        Grammar::Choices(vec![]),
    ] {
        let error = refusal(grammar.clone());
        assert!(
            matches!(error, GrammarError::Empty { .. }),
            "{grammar:?}: {error}"
        );
    }
}

#[test]
fn grammars_that_cannot_end_are_refused() {
    for grammar in [
        Grammar::Lark("start: \"a\" start".into()),
        Grammar::JsonSchema(r##"{"$ref":"#"}"##.into()),
        Grammar::JsonSchema(r##"{"type":"object","required":["a"],"properties":{"a":{"$ref":"#"}}}"##.into()),
    ] {
        let error = refusal(grammar.clone());
        assert!(
            matches!(error, GrammarError::Endless { .. }),
            "{grammar:?}: {error}"
        );
    }
}

#[test]
fn a_grammar_is_compiled_once_and_kept() {
    let compiler = compiler();
    let grammar = Grammar::Regex("[0-9]+".into());
    assert!(compiler.cached(&grammar).is_none());
    let first = compiler.compile(&grammar).unwrap();
    let second = compiler.compile(&grammar).unwrap();
    assert!(Arc::ptr_eq(&first, &second));
    assert!(Arc::ptr_eq(&first, &compiler.cached(&grammar).unwrap()));
}
