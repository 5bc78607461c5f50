//! Whether everything that a compiled grammar lets begin can also end.

use llguidance::{TokenParser, earley::CSymIdx};

use crate::error::GrammarError;

/// # Errors
/// [`GrammarError::Endless`] where a symbol that the start symbol can reach derives no finite text: a reply
/// that went there could go on for ever, allowed at every step.
pub(crate) fn check_ends(parser: &TokenParser) -> Result<(), GrammarError> {
    let grammar = parser.parser.grammar();
    let reachable = reachable(parser);
    let mut ends = vec![
        false;
        reachable
            .iter()
            .map(|symbol| symbol.as_index() + 1)
            .max()
            .unwrap_or(0)
    ];
    // A least fixpoint: a symbol ends where one of its rules has only symbols that end.
    loop {
        let mut changed = false;
        for &symbol in &reachable {
            if ends[symbol.as_index()] {
                continue;
            }
            let data = grammar.sym_data(symbol);
            let ending = data.is_terminal
                || data.is_nullable
                || !data.cond_nullable.is_empty()
                || data.gen_grammar.is_some()
                || data.rules.iter().any(|&rule| {
                    let (right, ..) = grammar.rule_rhs(rule);
                    right.iter().all(|symbol| ends[symbol.as_index()])
                });
            ends[symbol.as_index()] = ending;
            changed |= ending;
        }
        if !changed {
            break;
        }
    }
    match reachable.iter().find(|symbol| !ends[symbol.as_index()]) {
        Some(&symbol) => Err(GrammarError::Endless {
            symbol: grammar.sym_data(symbol).name.clone(),
        }),
        None => Ok(()),
    }
}

/// Symbols that a derivation from the start symbol can meet.
fn reachable(parser: &TokenParser) -> Vec<CSymIdx> {
    let grammar = parser.parser.grammar();
    let mut found = vec![grammar.start()];
    let mut seen = std::collections::HashSet::from([grammar.start()]);
    let mut next = 0;
    while let Some(&symbol) = found.get(next) {
        next += 1;
        for &rule in grammar.rules_of(symbol) {
            let (right, ..) = grammar.rule_rhs(rule);
            for &symbol in right {
                if seen.insert(symbol) {
                    found.push(symbol);
                }
            }
        }
    }
    found
}
