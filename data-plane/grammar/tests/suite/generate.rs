//! Random schemas and regular expressions, of what is supported.

use serde_json::{Map, Value, json};

use crate::support::Chance;

const NAMES: &[&str] = &["a", "b", "name", "zip code", "größe", "x\"y", "日本", "kind"];
const WORDS: &[&str] = &[
    "",
    "a",
    "red",
    "Straße",
    "line\nbreak",
    "q\"uote",
    "back\\slash",
    "😀",
    "/path",
];
const FORMATS: &[&str] = &[
    "date-time",
    "time",
    "date",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "uuid",
    "uri",
    "duration",
];
const PATTERNS: &[&str] = &[
    "^[a-z]+$",
    "[0-9]{2,4}",
    "^(yes|no)$",
    "a.c",
    "^\\d{3}-\\d{4}$",
    "\\w+@\\w+",
    "^$",
    "^ä{1,3}",
    "x$",
    "^[^\"]*$",
];

/// A schema at most `depth` deep. References go to the two definitions that [`document`] adds.
pub(crate) fn schema(chance: &mut Chance, depth: usize) -> Value {
    let kinds = if depth == 0 { 7 } else { 13 };
    match chance.below(kinds) {
        0 => string(chance),
        1 => number(chance, "integer"),
        2 => number(chance, "number"),
        3 => json!({ "type": chance.pick(&["boolean", "null"]) }),
        4 => json!({ "enum": (0..=chance.below(4)).map(|_| constant(chance, 1)).collect::<Vec<_>>() }),
        5 => json!({ "const": constant(chance, 2) }),
        6 => json!({ "type": ["string", "null"], "maxLength": 5 }),
        7 | 8 => object(chance, depth - 1),
        9 => array(chance, depth - 1),
        10 => {
            let branches: Vec<Value> = (0..=chance.below(3)).map(|_| schema(chance, depth - 1)).collect();
            json!({ *chance.pick(&["anyOf", "anyOf", "oneOf"]): branches })
        }
        11 => json!({ "allOf": [schema(chance, depth - 1), schema(chance, 0)] }),
        _ => match chance.below(3) {
            0 => json!({ "$ref": "#/$defs/tree" }),
            1 => json!({ "$ref": "#/$defs/leaf" }),
            _ => Value::Bool(true),
        },
    }
}

/// A schema with definitions.
pub(crate) fn document(chance: &mut Chance) -> Value {
    let depth = 1 + chance.below(3);
    let mut root = match schema(chance, depth) {
        Value::Object(members) => members,
        _ => Map::new(),
    };
    let leaf = schema(chance, 0);
    root.insert(
        "$defs".into(),
        json!({
            "leaf": leaf,
            "tree": {
                "type": "object",
                "properties": { "value": { "type": "integer" }, "children": { "type": "array", "items": { "$ref": "#/$defs/tree" }, "maxItems": 2 } },
                "required": ["value"],
                "additionalProperties": false
            }
        }),
    );
    Value::Object(root)
}

fn string(chance: &mut Chance) -> Value {
    let mut members = Map::from_iter([("type".to_owned(), json!("string"))]);
    match chance.below(5) {
        0 => {
            let least = chance.below(5);
            members.insert("minLength".into(), json!(least));
            members.insert("maxLength".into(), json!(least + chance.below(6)));
        }
        1 => {
            members.insert("pattern".into(), json!(chance.pick(PATTERNS)));
        }
        2 => {
            members.insert("format".into(), json!(chance.pick(FORMATS)));
        }
        3 => {
            members.insert("pattern".into(), json!(chance.pick(PATTERNS)));
            members.insert("maxLength".into(), json!(3 + chance.below(10)));
        }
        _ => {}
    }
    Value::Object(members)
}

fn number(chance: &mut Chance, kind: &str) -> Value {
    let mut members = Map::from_iter([("type".to_owned(), json!(kind))]);
    let low = chance.below(2000) as i64 - 1000;
    let scale = if kind == "integer" {
        1.0
    } else {
        *chance.pick(&[1.0, 0.5, 0.125, 0.01])
    };
    let bound = |value: i64| match kind {
        "integer" => json!(value),
        _ => json!(value as f64 * scale),
    };
    if !chance.one_in(3) {
        members.insert(
            (*chance.pick(&["minimum", "exclusiveMinimum"])).into(),
            bound(low),
        );
    }
    if !chance.one_in(3) {
        let high = low + chance.below(300) as i64;
        members.insert(
            (*chance.pick(&["maximum", "exclusiveMaximum"])).into(),
            bound(high),
        );
    }
    if chance.one_in(4) {
        let step = match kind {
            "integer" => json!(1 + chance.below(12)),
            _ => json!(*chance.pick(&[0.5, 0.25, 2.0])),
        };
        members.insert("multipleOf".into(), step);
    }
    Value::Object(members)
}

fn object(chance: &mut Chance, depth: usize) -> Value {
    let mut properties = Map::new();
    for _ in 0..chance.below(4) {
        properties.insert((*chance.pick(NAMES)).to_owned(), schema(chance, depth));
    }
    let names: Vec<&String> = properties.keys().collect();
    let mut required: Vec<String> = names.into_iter().filter(|_| chance.one_in(2)).cloned().collect();
    let mut members = Map::from_iter([("type".to_owned(), json!("object"))]);
    if chance.one_in(8) {
        required.push("extra".into());
    }
    match chance.below(5) {
        0 | 1 => {
            members.insert("additionalProperties".into(), json!(false));
        }
        2 => {
            members.insert("additionalProperties".into(), schema(chance, 0));
        }
        3 => {
            members.insert(
                "patternProperties".into(),
                json!({ "^s_": schema(chance, 0), "_n$": schema(chance, 0) }),
            );
            members.insert("patternProperties".into(), json!({ "^s_": schema(chance, 0) }));
            members.insert("additionalProperties".into(), json!(false));
        }
        _ => {}
    }
    members.insert("properties".into(), Value::Object(properties));
    members.insert("required".into(), json!(required));
    if chance.one_in(8) {
        members.insert("minProperties".into(), json!(1));
    }
    Value::Object(members)
}

fn array(chance: &mut Chance, depth: usize) -> Value {
    let mut members = Map::from_iter([("type".to_owned(), json!("array"))]);
    let least = chance.below(3);
    if chance.one_in(2) {
        members.insert("minItems".into(), json!(least));
    }
    if !chance.one_in(3) {
        members.insert("maxItems".into(), json!(least + chance.below(3)));
    }
    if chance.one_in(3) {
        let items: Vec<Value> = (0..=chance.below(2)).map(|_| schema(chance, depth)).collect();
        members.insert("prefixItems".into(), json!(items));
    }
    match chance.below(4) {
        0 => {
            members.insert("items".into(), json!(false));
        }
        1 => {}
        _ => {
            members.insert("items".into(), schema(chance, depth));
        }
    }
    Value::Object(members)
}

fn constant(chance: &mut Chance, depth: usize) -> Value {
    match chance.below(if depth == 0 { 5 } else { 7 }) {
        0 => Value::Null,
        1 => json!(chance.one_in(2)),
        2 => json!(chance.below(5000) as i64 - 2500),
        3 => json!((chance.below(5000) as f64 - 2500.0) / 8.0),
        4 => json!(chance.pick(WORDS)),
        5 => (0..chance.below(3))
            .map(|_| constant(chance, depth - 1))
            .collect(),
        _ => {
            let members =
                (0..chance.below(3)).map(|_| ((*chance.pick(NAMES)).to_owned(), constant(chance, depth - 1)));
            Value::Object(members.collect::<Vec<_>>().into_iter().collect())
        }
    }
}

/// A regular expression at most `depth` deep.
pub(crate) fn regex(chance: &mut Chance, depth: usize) -> String {
    const ATOMS: &[&str] = &[
        "a",
        "b",
        "xyz",
        ".",
        "[a-f]",
        "[^a-y]",
        "\\d",
        "\\w",
        "\\s",
        "é",
        "[α-ω]",
        "\\.",
        "\\/",
        "/",
        "\\\\",
        "\"",
        "\\n",
        "(?i:Ab)",
        "[[:alpha:]]",
        "\\p{Greek}",
        "😀",
        "-",
        "#",
        "'",
        "\\x41",
        "\\u{e9}",
        "[0-9a-f&&[^5]]",
    ];
    if depth == 0 {
        return (*chance.pick(ATOMS)).to_owned();
    }
    match chance.below(6) {
        0 => (*chance.pick(ATOMS)).to_owned(),
        1 | 2 => (0..=chance.below(3)).map(|_| regex(chance, depth - 1)).collect(),
        3 => format!("(?:{}|{})", regex(chance, depth - 1), regex(chance, depth - 1)),
        4 => {
            let suffix = *chance.pick(&["*", "+", "?", "{2}", "{1,3}", "{0,2}", "{2,}", "*?", "{0}"]);
            format!("(?:{}){suffix}", regex(chance, depth - 1))
        }
        _ => format!("({})", regex(chance, depth - 1)),
    }
}
