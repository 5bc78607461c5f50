//! What each keyword's value must be.

use serde_json::{Number, Value};

use crate::{error::GrammarError, regex};

/// Integers beyond this have no exact double, in which llguidance and most clients' parsers keep them.
const LARGEST_INTEGER: u64 = 1 << 53;
/// Most repetitions that a lower bound may ask for: tokens are forced one after the other up to it.
const MOST_REQUIRED: u64 = 10_000;
/// Most repetitions that an upper bound may allow; each is a state of the automaton.
const MOST_ALLOWED: u64 = 1_000_000;

/// Formats that llguidance makes automata of, as their grammars are; lengths and leap seconds are not counted.
const FORMATS: &[&str] = &[
    "date-time",
    "time",
    "date",
    "duration",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "uuid",
    "uri",
];
const TYPES: &[&str] = &[
    "null", "boolean", "object", "array", "number", "string", "integer",
];
const DRAFTS: &[&str] = &[
    "https://json-schema.org/draft/2020-12/schema",
    "https://json-schema.org/draft/2019-09/schema",
    "http://json-schema.org/draft-07/schema",
    "http://json-schema.org/draft-06/schema",
    "http://json-schema.org/draft-04/schema",
];

/// Says something to people or to other programs and constrains nothing, or is read where it is referred to.
pub(super) fn is_annotation(keyword: &str) -> bool {
    const ANNOTATIONS: &[&str] = &[
        "title",
        "description",
        "default",
        "example",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
        "contentMediaType",
        "contentEncoding",
        "discriminator",
        "$comment",
        "$anchor",
        "$defs",
        "definitions",
    ];
    ANNOTATIONS.contains(&keyword) || (keyword.starts_with("x-") && keyword != "x-guidance")
}

/// A keyword with its value and where it is.
#[derive(Clone, Copy)]
pub(super) struct Keyword<'a, 'p> {
    pub(super) name: &'a str,
    pub(super) value: &'a Value,
    pub(super) pointer: &'p str,
}

// === impl Keyword ===

impl<'a> Keyword<'a, '_> {
    pub(super) fn unsupported(self, remedy: impl Into<String>) -> GrammarError {
        GrammarError::Unsupported {
            keyword: self.name.into(),
            pointer: self.pointer.into(),
            remedy: remedy.into(),
        }
    }

    pub(super) fn wrong(self, message: impl Into<String>) -> GrammarError {
        GrammarError::InvalidKeyword {
            keyword: self.name.into(),
            pointer: self.pointer.into(),
            message: message.into(),
        }
    }

    pub(super) fn text(self) -> Result<&'a str, GrammarError> {
        self.value
            .as_str()
            .ok_or_else(|| self.wrong(format!("{} is not a string", short(self.value))))
    }

    pub(super) fn array(self) -> Result<&'a Vec<Value>, GrammarError> {
        self.value
            .as_array()
            .ok_or_else(|| self.wrong(format!("{} is not an array", short(self.value))))
    }

    pub(super) fn object(self) -> Result<&'a serde_json::Map<String, Value>, GrammarError> {
        self.value
            .as_object()
            .ok_or_else(|| self.wrong(format!("{} is not an object", short(self.value))))
    }

    /// A type's name, or some.
    pub(super) fn types(self) -> Result<(), GrammarError> {
        let known = |value: &Value| value.as_str().is_some_and(|name| TYPES.contains(&name));
        match self.value {
            Value::Array(names) if names.is_empty() => Err(GrammarError::Empty {
                reason: format!("{} lists no type", self.pointer),
            }),
            Value::Array(names) if names.iter().all(known) => Ok(()),
            value if known(value) => Ok(()),
            value => Err(self.wrong(format!("{} is not one of {}", short(value), TYPES.join(", ")))),
        }
    }

    pub(super) fn draft(self) -> Result<(), GrammarError> {
        let uri = self.text()?;
        match DRAFTS.contains(&uri.trim_end_matches('#')) {
            true => Ok(()),
            false => Err(self.unsupported(format!("{uri:?} is not one of {}", DRAFTS.join(", ")))),
        }
    }

    /// A count: of items, characters or properties.
    pub(super) fn count(self) -> Result<u64, GrammarError> {
        let count = self
            .value
            .as_u64()
            .ok_or_else(|| self.wrong(format!("{} is not a count", short(self.value))))?;
        let most = match self.name.starts_with("min") {
            true => MOST_REQUIRED,
            false => MOST_ALLOWED,
        };
        match count > most {
            true => Err(GrammarError::TooComplex {
                message: format!("{} is {count}, at most {most} can be enforced", self.pointer),
            }),
            false => Ok(count),
        }
    }

    /// A bound. Draft 4 has `exclusiveMinimum: true` beside `minimum`.
    pub(super) fn bound(self) -> Result<(), GrammarError> {
        match self.value {
            Value::Number(number) => self.number(number),
            Value::Bool(_) if self.name.starts_with("exclusive") => Ok(()),
            value => Err(self.wrong(format!("{} is not a number", short(value)))),
        }
    }

    pub(super) fn multiple(self) -> Result<(), GrammarError> {
        match self.value {
            Value::Number(number) if number.as_f64().is_some_and(|number| number > 0.0) => {
                self.number(number)
            }
            value => Err(self.wrong(format!("{} is not a number above 0", short(value)))),
        }
    }

    fn number(self, number: &Number) -> Result<(), GrammarError> {
        let is_exact = match (number.as_i64(), number.as_u64()) {
            (Some(integer), _) => integer.unsigned_abs() <= LARGEST_INTEGER,
            (None, Some(_)) => false,
            (None, None) => true,
        };
        match is_exact {
            true => Ok(()),
            false => Err(self.unsupported(format!("{number} is beyond 2^53, where doubles are not exact"))),
        }
    }

    /// A constant, or several in an array: all the numbers in them.
    pub(super) fn constant(self, value: &Value) -> Result<(), GrammarError> {
        match value {
            Value::Number(number) => self.number(number),
            Value::Array(items) => items.iter().try_for_each(|item| self.constant(item)),
            Value::Object(members) => members.values().try_for_each(|value| self.constant(value)),
            Value::Null | Value::Bool(_) | Value::String(_) => Ok(()),
        }
    }

    pub(super) fn pattern(self) -> Result<(), GrammarError> {
        regex::check(self.text()?, Some(self.pointer))
    }

    pub(super) fn format(self) -> Result<(), GrammarError> {
        let name = self.text()?;
        match FORMATS.contains(&name) {
            true => Ok(()),
            false => Err(self.unsupported(format!(
                "{name:?} is not one of {}; say what it is by a pattern or by bounds",
                FORMATS.join(", ")
            ))),
        }
    }
}

/// A value in an error message.
pub(super) fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
