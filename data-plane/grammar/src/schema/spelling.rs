//! Patterns as a JSON string's spelling needs them.

use regex_syntax::ast::{Ast, LiteralKind, Visitor, parse::Parser, visit};

/// `pattern` without U+0001, which no string of ours can hold: it has no escape but `\u`, which is not allowed.
///
/// derivre spells a class that holds all control characters with every escape there is, `\"` and `\\` among them,
/// whether the class holds these or not. One that lacks a control character it spells as it should.
pub(super) fn without_unspellable(pattern: &str) -> String {
    let Ok(ast) = Parser::new().parse(pattern) else {
        return pattern.to_owned();
    };
    let Ok(edits) = visit(&ast, Classes::default());
    let (mut written, mut end) = (String::with_capacity(pattern.len()), 0);
    for (from, to, new) in edits {
        written.push_str(&pattern[end..from]);
        match new {
            Edit::Cut => {
                written.push('[');
                written.push_str(&pattern[from..to]);
                written.push_str(r"&&[^\x01]]");
            }
            Edit::Nothing => written.push_str(r"[\x01&&[^\x01]]"),
        }
        end = to;
    }
    written.push_str(&pattern[end..]);
    written
}

enum Edit {
    /// A class loses the character.
    Cut,
    /// The character itself becomes a class of none.
    Nothing,
}

/// Collects edits with their range of bytes, in the pattern's order.
#[derive(Default)]
struct Classes(Vec<(usize, usize, Edit)>);

impl Visitor for Classes {
    type Output = Vec<(usize, usize, Edit)>;
    type Err = std::convert::Infallible;

    fn finish(self) -> Result<Self::Output, Self::Err> {
        Ok(self.0)
    }

    fn visit_pre(&mut self, ast: &Ast) -> Result<(), Self::Err> {
        let edit = match ast {
            Ast::ClassBracketed(_) | Ast::ClassUnicode(_) => Edit::Cut,
            Ast::Literal(literal) if literal.c == '\u{1}' => match literal.kind {
                // Bytes are no characters: they are refused elsewhere.
                LiteralKind::HexFixed(_) | LiteralKind::HexBrace(_) | LiteralKind::Verbatim => Edit::Nothing,
                _ => return Ok(()),
            },
            _ => return Ok(()),
        };
        let span = ast.span();
        self.0.push((span.start.offset, span.end.offset, edit));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_lose_the_character_and_nothing_else_changes() {
        for (pattern, written) in [
            (r#"^[^"]*$"#, r#"^[[^"]&&[^\x01]]*$"#),
            (
                r"[a[b-c]]\[x\p{Po}.\d",
                r"[[a[b-c]]&&[^\x01]]\[x[\p{Po}&&[^\x01]].\d",
            ),
            (r"a\x01b", r"a[\x01&&[^\x01]]b"),
            ("größe", "größe"),
        ] {
            assert_eq!(without_unspellable(pattern), written);
            regex_syntax::parse(written).unwrap();
        }
    }
}
