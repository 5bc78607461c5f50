//! Chat templates: messages to the text that the checkpoint was trained on.

use std::path::Path;

use minijinja::{
    Environment, Error, ErrorKind, Value, context,
    syntax::SyntaxConfig,
    value::{Kwargs, Rest},
};
use serde::Deserialize;

use crate::{
    error::{TextError, read},
    json,
};

/// One message of a chat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user`, `assistant`, `tool` or whatever else the template knows.
    pub role: String,
    /// Its text.
    pub content: String,
}

/// A checkpoint's chat template, rendered as Hugging Face's `apply_chat_template` renders it.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Vec<(&'static str, String)>,
}

/// What tokenizer_config.json says about chats.
#[derive(Debug, Default, Deserialize)]
struct TokenizerConfig {
    chat_template: Option<TemplateField>,
    bos_token: Option<TokenField>,
    eos_token: Option<TokenField>,
    unk_token: Option<TokenField>,
    pad_token: Option<TokenField>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum TemplateField {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Debug, Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum TokenField {
    Text(String),
    Added { content: String },
}

const TEMPLATE: &str = "chat_template";

impl ChatTemplate {
    /// Loads the template of a checkpoint's directory: `chat_template.jinja`, else the field of
    /// `tokenizer_config.json` (of several named ones, `default`). `None` where there is none.
    pub fn load(dir: &Path) -> Result<Option<Self>, TextError> {
        let config_path = dir.join("tokenizer_config.json");
        let mut config = match config_path.try_exists() {
            Ok(false) => TokenizerConfig::default(),
            _ => serde_json::from_str(&read(&config_path)?)
                .map_err(|error| TextError::invalid(&config_path, "file", error))?,
        };
        let jinja_path = dir.join("chat_template.jinja");
        let (path, source) = if jinja_path.exists() {
            let source = read(&jinja_path)?;
            (jinja_path, source)
        } else {
            match config.chat_template.take() {
                None => return Ok(None),
                Some(TemplateField::One(source)) => (config_path, source),
                Some(TemplateField::Named(named)) => {
                    let source = default_of(named)
                        .map_err(|message| TextError::invalid(&config_path, TEMPLATE, message))?;
                    (config_path, source)
                }
            }
        };
        let special_tokens = config.special_tokens();
        Self::new(&source, special_tokens)
            .map(Some)
            .map_err(|error| TextError::invalid(&path, TEMPLATE, error))
    }

    /// A template without a checkpoint: no special tokens are known to it.
    pub fn from_source(source: &str) -> Result<Self, TextError> {
        Self::new(source, Vec::new())
            .map_err(|error| TextError::invalid(Path::new("<source>"), TEMPLATE, error))
    }

    /// A template whose checkpoint names its special tokens, e.g. `("bos_token", "<s>")`. Errors name `path`.
    ///
    /// # Errors
    /// It is no template.
    pub fn from_parts(
        source: &str,
        special_tokens: Vec<(&'static str, String)>,
        path: &Path,
    ) -> Result<Self, TextError> {
        Self::new(source, special_tokens).map_err(|error| TextError::invalid(path, TEMPLATE, error))
    }

    fn new(source: &str, special_tokens: Vec<(&'static str, String)>) -> Result<Self, Error> {
        let mut environment = Environment::new();
        environment.set_syntax(
            SyntaxConfig::builder()
                .trim_blocks(true)
                .lstrip_blocks(true)
                .build()?,
        );
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", tojson);
        environment.add_test("iterable", is_iterable);
        environment.add_template_owned(TEMPLATE, without_generation_tags(source))?;
        Ok(Self {
            environment,
            special_tokens,
        })
    }

    /// The text of a chat. `add_generation_prompt` opens the assistant's next message.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, TextError> {
        let message = |message: &Message| {
            Value::from_pairs([
                ("role", message.role.as_str()),
                ("content", message.content.as_str()),
            ])
        };
        let special_tokens = Value::from_pairs(
            self.special_tokens
                .iter()
                .map(|(name, token)| (*name, token.as_str())),
        );
        // Templates test `tools is not none`, which an absent variable would pass.
        let variables = context! {
            messages => messages.iter().map(message).collect::<Value>(),
            add_generation_prompt,
            tools => (),
            documents => (),
            ..special_tokens
        };
        let template = self.environment.get_template(TEMPLATE).map_err(refusal)?;
        template.render(variables).map_err(refusal)
    }
}

impl TokenizerConfig {
    fn special_tokens(self) -> Vec<(&'static str, String)> {
        let fields = [
            ("bos_token", self.bos_token),
            ("eos_token", self.eos_token),
            ("unk_token", self.unk_token),
            ("pad_token", self.pad_token),
        ];
        let text = |field| match field {
            TokenField::Text(text) => text,
            TokenField::Added { content } => content,
        };
        fields
            .into_iter()
            .filter_map(|(name, field)| Some((name, text(field?))))
            .collect()
    }
}

fn default_of(named: Vec<NamedTemplate>) -> Result<String, String> {
    let names: Vec<String> = named.iter().map(|template| template.name.clone()).collect();
    let default = named.into_iter().find(|template| template.name == "default");
    default.map(|template| template.template).ok_or_else(|| {
        format!(
            "none of the named templates ({}) is called default",
            names.join(", ")
        )
    })
}

/// Error text for whoever sent the messages: the template's own words where it raised them.
fn refusal(error: Error) -> TextError {
    TextError::Render(match (error.detail(), error.line()) {
        (Some(detail), _) if error.kind() == ErrorKind::InvalidOperation => detail.to_string(),
        _ => error.to_string(),
    })
}

// === What Hugging Face adds to Jinja ===

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// The current time (UTC) in the format of Python's `strftime`.
fn strftime_now(format: &str) -> Result<String, Error> {
    let now = jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC);
    jiff::fmt::strtime::format(format, &now).map_err(|error| {
        Error::new(
            ErrorKind::InvalidOperation,
            format!("strftime_now({format:?}): {error}"),
        )
    })
}

/// `json.dumps` without escaping for HTML. Of Python's options it takes `indent`; `ensure_ascii` and
/// `separators` have the values that Hugging Face passes and `sort_keys` is refused.
fn tojson(value: &Value, positional: Rest<Value>, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = match positional.first() {
        Some(indent) if !indent.is_none() => Some(indent.clone().try_into()?),
        Some(_) => None,
        None => options.get("indent")?,
    };
    let _: Option<Value> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    json::dumps(value, indent).map_err(|error| {
        Error::new(ErrorKind::InvalidOperation, "cannot be written as JSON").with_source(error)
    })
}

/// Python's answer: a string is iterable and none is not, e.g. in `tools is iterable and tools | length > 0`.
fn is_iterable(value: &Value) -> bool {
    !value.is_none() && (value.as_str().is_some() || value.try_iter().is_ok())
}

/// Replaces `{% generation %}` … `{% endgeneration %}`, which mark the assistant's tokens for training, by a
/// block that changes nothing.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let Some(length) = rest[open..].find("%}") else {
            break;
        };
        let tag = &rest[open..open + length + 2];
        out.push_str(&rest[..open]);
        match tag
            .trim_start_matches(['{', '%', '-', '+'])
            .trim_end_matches(['}', '%', '-', '+'])
            .trim()
        {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => out.push_str(tag),
        }
        rest = &rest[open + length + 2..];
    }
    out + rest
}

#[cfg(test)]
mod tests;
