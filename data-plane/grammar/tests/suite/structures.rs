//! Texts that are known to be in a language, and texts that are known not to be.

use penstock_grammar::Grammar;

use crate::support::{DEMO, compiler, masks_take, takes};

/// Asks for a verdict on each text by commits and by masks, over the demo model's tokens.
fn check(grammar: &Grammar, members: &[&str], strangers: &[&str]) {
    let compiled = compiler(DEMO.vocabulary()).compile(grammar).unwrap();
    for (texts, expected) in [(members, true), (strangers, false)] {
        for text in texts {
            let tokens = DEMO.encode(text);
            assert_eq!(takes(&compiled, &tokens), expected, "{grammar:?}: {text}");
            // Text that is forced has one spelling in masks, so only refusals must agree.
            assert!(
                !masks_take(compiled.matcher(), &tokens) || expected,
                "{grammar:?}: {text}"
            );
        }
    }
}

#[test]
fn a_regex_is_matched_whole() {
    check(
        &Grammar::Regex(r"\d{3}-[a-f]+".into()),
        &["123-abc", "000-f"],
        &["123-", "12-abc", "123-abcg", "x123-abc", ""],
    );
}

#[test]
fn a_choice_is_one_of_the_texts() {
    check(
        &Grammar::Choices(vec!["yes".into(), "no".into(), "not (now)".into()]),
        &["yes", "no", "not (now)"],
        &["", "y", "not", "yesno", "not now"],
    );
}

#[test]
fn a_json_object_is_any_object_and_nothing_else() {
    check(
        &Grammar::JsonObject,
        &["{}", r#"{"a": [1, 2.5e3, null, {"b": "ü\n"}]}"#],
        &["[]", "1", r#"{"a": }"#, r#"{"a": 1"#, "{} and more"],
    );
}

#[test]
fn a_schema_binds_types_names_and_bounds() {
    let schema = r#"{"type":"object","properties":{"name":{"type":"string","pattern":"^[^\"]*$","maxLength":4},
        "age":{"type":"integer","minimum":0,"maximum":130}},"required":["name","age"],"additionalProperties":false}"#;
    check(
        &Grammar::JsonSchema(schema.into()),
        &[r#"{"name": "Zoë", "age": 130}"#, r#"{"name":"","age":0}"#],
        &[
            r#"{"name": "Zoë", "age": 131}"#,
            r#"{"name": "a\"b", "age": 1}"#,
            r#"{"name": "abcde", "age": 1}"#,
            r#"{"name": "a"}"#,
            r#"{"name": "a", "age": 1, "more": 2}"#,
        ],
    );
}

#[test]
fn a_lark_grammar_may_recurse() {
    let brackets = r#"start: pair+
        pair: "(" pair* ")""#;
    check(
        &Grammar::Lark(brackets.into()),
        &["()", "(()())", "()(())"],
        &["", "(", ")(", "(()"],
    );
}
