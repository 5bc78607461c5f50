//! What constrains a reply, in the names that HTTP clients use.

use std::collections::HashMap;

use penstock_proto::v1::{self, grammar::Kind};
use serde_json::Value;
use tonic::Status;

use crate::{error::bad_request, fields::Fields};

/// SGLang's word for any JSON object in the place of a schema.
const ANY_OBJECT: &str = "$$ANY$$";
const MAX_CHOICES: usize = 4096;

/// OpenAI's `response_format`, SGLang's `regex` and `ebnf`, and vLLM's `guided_…`: one of them.
pub(crate) fn of_completion(fields: Fields<'_>) -> Result<Option<v1::Grammar>, Status> {
    single([
        ("response_format", response_format(fields)?),
        ("regex", regex(fields, "regex")?),
        ("ebnf", lark(fields, "ebnf")?),
        ("guided_regex", regex(fields, "guided_regex")?),
        ("guided_json", schema(fields, "guided_json")?),
        ("guided_grammar", lark(fields, "guided_grammar")?),
        ("guided_choice", choices(fields, "guided_choice")?),
    ])
}

/// SGLang's `json_schema`, `regex` and `ebnf`: one of them.
pub(crate) fn of_generate(fields: Fields<'_>) -> Result<Option<v1::Grammar>, Status> {
    single([
        ("json_schema", schema(fields, "json_schema")?),
        ("regex", regex(fields, "regex")?),
        ("ebnf", lark(fields, "ebnf")?),
    ])
}

/// `logit_bias`: a bias by token id.
pub(crate) fn logit_bias(fields: Fields<'_>) -> Result<HashMap<u32, f32>, Status> {
    let Some(Value::Object(biases)) = fields.get("logit_bias") else {
        return match fields.get("logit_bias") {
            None => Ok(HashMap::new()),
            Some(_) => Err(bad_request(
                "logit_bias",
                "must be an object of numbers by token id",
            )),
        };
    };
    let bias = |(id, bias): (&String, &Value)| {
        let why = || {
            bad_request(
                "logit_bias",
                format!("must have numbers by token id, not {id:?}: {bias}"),
            )
        };
        let id = id.parse().map_err(|_| why())?;
        Ok((id, bias.as_f64().ok_or_else(why)? as f32))
    };
    biases.iter().map(bias).collect()
}

fn single<const N: usize>(given: [(&str, Option<Kind>); N]) -> Result<Option<v1::Grammar>, Status> {
    let mut given = given.into_iter().filter_map(|(name, kind)| Some((name, kind?)));
    let Some((first, kind)) = given.next() else {
        return Ok(None);
    };
    match given.next() {
        Some((second, _)) => Err(bad_request(
            second,
            format!("and {first} are both given: one reply follows one grammar"),
        )),
        None => Ok(Some(v1::Grammar { kind: Some(kind) })),
    }
}

fn response_format(fields: Fields<'_>) -> Result<Option<Kind>, Status> {
    let Some(format) = fields.object("response_format")? else {
        return Ok(None);
    };
    match format.text("type")? {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(Kind::JsonObject(v1::AnyJsonObject {}))),
        Some("json_schema") => {
            let missing = |path: &str| bad_request(path, "is missing");
            let described = format
                .object("json_schema")?
                .ok_or_else(|| missing("response_format.json_schema"))?;
            // Strict or not, the schema is enforced.
            match schema(described, "schema")? {
                Some(kind) => Ok(Some(kind)),
                None => Err(missing("response_format.json_schema.schema")),
            }
        }
        other => Err(bad_request(
            "response_format.type",
            format!("must be text, json_object or json_schema, not {other:?}"),
        )),
    }
}

/// A schema, as JSON or as a text of JSON.
fn schema(fields: Fields<'_>, name: &str) -> Result<Option<Kind>, Status> {
    match fields.get(name) {
        None => Ok(None),
        Some(Value::String(text)) if text == ANY_OBJECT => Ok(Some(Kind::JsonObject(v1::AnyJsonObject {}))),
        Some(Value::String(text)) => Ok(Some(Kind::JsonSchema(text.clone()))),
        Some(schema @ (Value::Object(_) | Value::Bool(_))) => Ok(Some(Kind::JsonSchema(schema.to_string()))),
        Some(_) => Err(bad_request(name, "must be a JSON schema")),
    }
}

fn regex(fields: Fields<'_>, name: &str) -> Result<Option<Kind>, Status> {
    Ok(fields.text(name)?.map(|text| Kind::Regex(text.to_owned())))
}

fn lark(fields: Fields<'_>, name: &str) -> Result<Option<Kind>, Status> {
    match fields.text(name)? {
        Some(text) if text.contains("::=") => Err(bad_request(
            name,
            "is read as Lark: write each rule as `name: …`; the reply is the rule `start`",
        )),
        text => Ok(text.map(|text| Kind::Lark(text.to_owned()))),
    }
}

fn choices(fields: Fields<'_>, name: &str) -> Result<Option<Kind>, Status> {
    if fields.get(name).is_none() {
        return Ok(None);
    }
    let texts = fields.texts(name, MAX_CHOICES)?;
    Ok(Some(Kind::Choices(v1::Choices { texts })))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn completion(request: &Value) -> Result<Option<Kind>, String> {
        let grammar =
            of_completion(Fields::of(request).unwrap()).map_err(|status| status.message().to_owned())?;
        Ok(grammar.and_then(|grammar| grammar.kind))
    }

    #[test]
    fn each_way_to_constrain_a_completion_is_read() {
        let schema = json!({ "type": "object" });
        let text = Kind::JsonSchema(schema.to_string());
        for (request, expected) in [
            (json!({}), None),
            (json!({ "response_format": { "type": "text" } }), None),
            (
                json!({ "response_format": { "type": "json_object" } }),
                Some(Kind::JsonObject(v1::AnyJsonObject {})),
            ),
            (
                json!({ "response_format": { "type": "json_schema", "json_schema": { "name": "x", "strict": true, "schema": schema } } }),
                Some(text.clone()),
            ),
            (json!({ "guided_json": schema }), Some(text.clone())),
            (json!({ "guided_json": schema.to_string() }), Some(text)),
            (json!({ "regex": "a+" }), Some(Kind::Regex("a+".into()))),
            (
                json!({ "ebnf": "start: \"a\"" }),
                Some(Kind::Lark("start: \"a\"".into())),
            ),
            (
                json!({ "guided_choice": ["yes", "no"] }),
                Some(Kind::Choices(v1::Choices {
                    texts: vec!["yes".into(), "no".into()],
                })),
            ),
        ] {
            assert_eq!(completion(&request), Ok(expected), "{request}");
        }
    }

    #[test]
    fn what_cannot_be_meant_is_refused_by_name() {
        for (request, words) in [
            (
                json!({ "response_format": { "type": "xml" } }),
                "response_format.type",
            ),
            (
                json!({ "response_format": { "type": "json_schema" } }),
                "response_format.json_schema is missing",
            ),
            (
                json!({ "regex": "a", "guided_regex": "b" }),
                "guided_regex and regex",
            ),
            (json!({ "ebnf": "root ::= \"a\"" }), "Lark"),
            (json!({ "guided_choice": [1] }), "guided_choice must be"),
        ] {
            let message = completion(&request).unwrap_err();
            assert!(message.contains(words), "{message}");
        }
    }

    #[test]
    fn biases_are_numbers_by_token_id() {
        let read = |value: Value| logit_bias(Fields::of(&json!({ "logit_bias": value })).unwrap());
        assert_eq!(
            read(json!({ "7": -100, "8": 0.5 })).unwrap(),
            [(7, -100.0), (8, 0.5)].into()
        );
        assert!(read(Value::Null).unwrap().is_empty());
        for wrong in [json!([1]), json!({ "x": 1 }), json!({ "1": "x" })] {
            assert!(read(wrong).unwrap_err().message().contains("logit_bias"));
        }
    }
}
