//! Writes the schema anew, with nothing in it that is not enforced.

use std::collections::HashMap;

use serde_json::{Map, Value};

use super::{
    keywords::{Keyword, is_annotation},
    references::{resolve, step},
    spelling::without_unspellable,
};
use crate::error::GrammarError;

/// References in a row before one counts as circular.
const MOST_HOPS: usize = 64;

/// The whole schema; what it refers to is in its `$defs`.
pub(super) fn rewrite(root: &Value) -> Result<Map<String, Value>, GrammarError> {
    let mut rewriter = Rewriter {
        root,
        names: HashMap::new(),
        pending: Vec::new(),
    };
    let mut whole = match rewriter.schema(root, "", true)? {
        Value::Object(members) => members,
        Value::Bool(true) => Map::new(),
        _ => {
            return Err(GrammarError::Empty {
                reason: "the schema is false".into(),
            });
        }
    };
    let mut definitions = Map::new();
    while let Some((name, pointer)) = rewriter.pending.pop() {
        let target = root.pointer(&pointer).unwrap_or(&Value::Null);
        definitions.insert(name, rewriter.schema(target, &pointer, true)?);
    }
    if !definitions.is_empty() {
        whole.insert("$defs".into(), Value::Object(definitions));
    }
    Ok(whole)
}

struct Rewriter<'a> {
    root: &'a Value,
    /// Definition by the pointer it was found at.
    names: HashMap<String, String>,
    /// Definitions (name, pointer) still to be written.
    pending: Vec<(String, String)>,
}

// === impl Rewriter ===

impl<'a> Rewriter<'a> {
    /// The schema at `pointer`. `is_definition` where it is written as a definition of its own.
    fn schema(
        &mut self,
        value: &'a Value,
        pointer: &str,
        is_definition: bool,
    ) -> Result<Value, GrammarError> {
        let members = match value {
            Value::Bool(_) => return Ok(value.clone()),
            Value::Object(members) => members,
            _ => {
                return Err(GrammarError::NotASchema {
                    pointer: pointer.into(),
                });
            }
        };
        // The branches of a oneOf are written in full to be told apart; a recursive one would never end.
        if !is_definition && has_references(members.get("oneOf")) {
            return Ok(self.reference(pointer.to_owned()));
        }
        check_together(members, pointer)?;
        let mut written = Map::new();
        for (name, value) in members {
            let keyword = Keyword {
                name,
                value,
                pointer: &step(pointer, name),
            };
            self.keyword(keyword, members, pointer, &mut written)?;
        }
        Ok(Value::Object(written))
    }

    fn keyword(
        &mut self,
        keyword: Keyword<'a, '_>,
        beside: &'a Map<String, Value>,
        parent: &str,
        written: &mut Map<String, Value>,
    ) -> Result<(), GrammarError> {
        let Keyword { name, value, pointer } = keyword;
        let plain = |checked: Result<(), GrammarError>| checked.map(|()| Some(value.clone()));
        let new = match name {
            _ if is_annotation(name) => None,
            "$schema" if parent.is_empty() => keyword.draft().map(|()| None)?,
            "$id" | "id" if parent.is_empty() => keyword.text().map(|_| None)?,
            "$schema" | "$id" | "id" => {
                return Err(keyword.unsupported("it is understood at the root of the schema only"));
            }
            "$ref" => {
                let target = resolve(self.root, keyword.text()?, pointer)?;
                self.reference(target).get("$ref").cloned()
            }
            "type" => plain(keyword.types())?,
            "enum" => plain(keyword.array().map(drop).and_then(|()| keyword.constant(value)))?,
            "const" => plain(keyword.constant(value))?,
            "properties" => Some(Value::Object(self.members(keyword)?)),
            "patternProperties" => {
                for name in keyword.object()?.keys() {
                    crate::regex::check(name, Some(&step(pointer, name)))?;
                }
                let members = self.members(keyword)?.into_iter();
                let spelled = members.map(|(name, schema)| (without_unspellable(&name), schema));
                Some(Value::Object(spelled.collect()))
            }
            "additionalProperties" => Some(self.schema(value, pointer, false)?),
            "items" if value.is_array() => {
                let rest = beside.get("additionalItems");
                if let Some(rest) = rest {
                    let rest = self.schema(rest, &step(parent, "additionalItems"), false)?;
                    written.insert("items".into(), rest);
                }
                let items = self.branches(keyword)?;
                written.insert("prefixItems".into(), items);
                None
            }
            "items" => Some(self.schema(value, pointer, false)?),
            "additionalItems" if beside.get("items").is_some_and(Value::is_array) => None,
            "prefixItems" | "allOf" | "anyOf" => Some(self.branches(keyword)?),
            "oneOf" => Some(self.alternatives(keyword)?),
            "minItems" | "maxItems" | "minLength" | "maxLength" | "maxProperties" | "minProperties" => {
                plain(keyword.count().map(drop))?
            }
            "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum" => plain(keyword.bound())?,
            "multipleOf" => plain(keyword.multiple())?,
            "pattern" => {
                keyword.pattern()?;
                Some(without_unspellable(keyword.text()?).into())
            }
            "format" => plain(keyword.format())?,
            "required" => plain(keyword.array().map(drop))?,
            "uniqueItems" | "nullable" if *value == Value::Bool(false) => None,
            _ => return Err(keyword.unsupported(remedy(name))),
        };
        if let Some(new) = new {
            written.insert(name.to_owned(), new);
        }
        Ok(())
    }

    /// Schemas by name.
    fn members(&mut self, keyword: Keyword<'a, '_>) -> Result<Map<String, Value>, GrammarError> {
        let mut written = Map::new();
        for (name, value) in keyword.object()? {
            let schema = self.schema(value, &step(keyword.pointer, name), false)?;
            written.insert(name.clone(), schema);
        }
        Ok(written)
    }

    /// Schemas in an array.
    fn branches(&mut self, keyword: Keyword<'a, '_>) -> Result<Value, GrammarError> {
        let branches = keyword.array()?.iter().enumerate();
        branches
            .map(|(index, value)| self.schema(value, &step(keyword.pointer, &index.to_string()), false))
            .collect()
    }

    /// The branches of a `oneOf`, each in full: llguidance tells disjoint branches apart only where it sees them.
    fn alternatives(&mut self, keyword: Keyword<'a, '_>) -> Result<Value, GrammarError> {
        let mut written = Vec::new();
        for (index, value) in keyword.array()?.iter().enumerate() {
            let pointer = step(keyword.pointer, &index.to_string());
            let (value, pointer) = self.target(value, pointer)?;
            written.push(self.schema(value, &pointer, false)?);
        }
        Ok(Value::Array(written))
    }

    /// What a schema that is a reference and nothing else refers to in the end.
    fn target(&self, mut value: &'a Value, mut pointer: String) -> Result<(&'a Value, String), GrammarError> {
        for _ in 0..MOST_HOPS {
            let Some(reference) = only_reference(value) else {
                return Ok((value, pointer));
            };
            pointer = resolve(self.root, reference, &step(&pointer, "$ref"))?;
            value = self.root.pointer(&pointer).unwrap_or(&Value::Null);
        }
        Err(GrammarError::Endless { symbol: pointer })
    }

    /// A reference to the definition at `pointer`, which is to be written if it is not.
    fn reference(&mut self, pointer: String) -> Value {
        let count = self.names.len();
        let name = self.names.entry(pointer).or_insert_with_key(|pointer| {
            let name = if pointer.is_empty() {
                String::new()
            } else {
                count.to_string()
            };
            if !name.is_empty() {
                self.pending.push((name.clone(), pointer.clone()));
            }
            name
        });
        match name.is_empty() {
            true => serde_json::json!({ "$ref": "#" }),
            false => serde_json::json!({ "$ref": format!("#/$defs/{name}") }),
        }
    }
}

/// The reference of a schema that has nothing else to say.
fn only_reference(value: &Value) -> Option<&str> {
    let members = value.as_object()?;
    let reference = members.get("$ref")?.as_str()?;
    let alone = members.keys().all(|name| name == "$ref" || is_annotation(name));
    alone.then_some(reference)
}

fn has_references(branches: Option<&Value>) -> bool {
    let branches = branches.and_then(Value::as_array);
    branches.is_some_and(|branches| branches.iter().any(|branch| only_reference(branch).is_some()))
}

/// Keywords that are each supported, but not beside one another.
fn check_together(members: &Map<String, Value>, pointer: &str) -> Result<(), GrammarError> {
    let refuse = |name: &str, remedy: &str| {
        Err(GrammarError::Unsupported {
            keyword: name.into(),
            pointer: step(pointer, name),
            remedy: remedy.into(),
        })
    };
    if members.contains_key("prefixItems") && members.get("items").is_some_and(Value::is_array) {
        return refuse("items", "beside prefixItems it must be one schema");
    }
    if members.contains_key("additionalItems") && !members.get("items").is_some_and(Value::is_array) {
        return refuse("additionalItems", "it has no effect here; say it by items");
    }
    let required = members
        .get("required")
        .and_then(Value::as_array)
        .map_or(0, Vec::len) as u64;
    let least = members.get("minProperties").and_then(Value::as_u64).unwrap_or(0);
    if least > required + 1 {
        // Two properties of free names may bear the same one.
        return refuse(
            "minProperties",
            "it can ask for one more than `required` lists; list more there",
        );
    }
    let is_no_string = match members.get("type") {
        Some(Value::String(name)) => name != "string",
        Some(Value::Array(names)) => !names.iter().any(|name| name == "string"),
        _ => false,
    };
    if is_no_string && members.contains_key("format") {
        return refuse("format", "only strings have formats; say it by bounds");
    }
    Ok(())
}

/// What to do about a keyword that is not supported.
fn remedy(name: &str) -> &'static str {
    match name {
        "not" | "if" | "then" | "else" => "say what is allowed, by anyOf or enum",
        "dependentRequired" | "dependentSchemas" | "dependencies" => "list the combinations in anyOf",
        "uniqueItems" | "contains" | "minContains" | "maxContains" => {
            "remove it and check the reply yourself"
        }
        "propertyNames" => "use patternProperties with additionalProperties false",
        "unevaluatedProperties" => "use additionalProperties",
        "unevaluatedItems" => "use items",
        "nullable" => "add \"null\" to type",
        "$dynamicRef" | "$recursiveRef" | "$dynamicAnchor" | "$recursiveAnchor" => "use $ref",
        _ => "it is no keyword of JSON Schema draft 2020-12; begin its name with x- if it is yours",
    }
}
