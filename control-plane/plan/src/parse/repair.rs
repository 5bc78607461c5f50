//! Finding all that is wrong: the value that an error names is left out, and the rest is read again.

use super::{Finding, Lines, Node, field, finding, read};

/// Errors that are told at most.
const MOST: usize = 50;

/// Everything that is wrong with a plan's values, in the order of their lines.
pub(super) fn findings(root: Node, lines: &Lines) -> Vec<Finding> {
    let mut root = root;
    let mut findings: Vec<Finding> = Vec::new();
    let mut removed: Vec<String> = Vec::new();
    while findings.len() < MOST {
        let Err((path, message)) = read(&root.to_text()) else {
            break;
        };
        let missing = quoted(&message, "missing field `").map(|name| field(&path, name));
        if let Some(gone) = &missing
            && removed.contains(gone)
        {
            // It was there and wrong, which is told already: what holds it goes too.
            if !root.remove(&path) {
                break;
            }
            removed.push(path);
            continue;
        }
        let unknown = quoted(&message, "unknown field `");
        let path = match (&missing, unknown) {
            (Some(missing), _) => missing.clone(),
            (None, Some(name)) if !ends_with(&path, name) => field(&path, name),
            _ => path,
        };
        let message = explained(&root, &path, &message);
        let code = match (&missing, unknown) {
            (Some(_), _) => "missing-field",
            (None, Some(_)) => "unknown-field",
            _ => "bad-value",
        };
        findings.push(finding(&path, lines.line(&path), code, message));
        let repaired = match missing {
            Some(_) => root.fill(&path),
            None => root.remove(&path),
        };
        if !repaired {
            break;
        }
        removed.push(path);
    }
    findings.sort_by_key(|finding| finding.line);
    findings
}

/// The name after `before`, up to the closing quote.
fn quoted<'a>(message: &'a str, before: &str) -> Option<&'a str> {
    let (name, _) = message.strip_prefix(before)?.split_once('`')?;
    Some(name)
}

fn ends_with(path: &str, name: &str) -> bool {
    path.strip_suffix(name)
        .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// The message with the bad value, where the reader left that out, and what is allowed.
fn explained(root: &Node, path: &str, message: &str) -> String {
    let value = match root.at(path) {
        Some(Node::Scalar(text, _)) => Some(text),
        _ => None,
    };
    let message = match value {
        Some(value) if !message.contains(value.as_str()) && !message.starts_with("unknown field") => {
            format!("{value:?}: {message}")
        }
        _ => message.to_owned(),
    };
    let message = ["u8", "u32", "u64"].iter().fold(message, |message, kind| {
        message.replace(&format!("expected {kind}"), "expected a whole number")
    });
    if path.contains(".client_ip[") {
        return format!("{message}; write a network such as 10.0.0.0/8, or one address as 192.0.2.1/32");
    }
    message
}

// === impl Node ===

impl Node {
    /// As YAML on one line, in which each value means what it meant.
    pub(super) fn to_text(&self) -> String {
        let mut text = String::new();
        self.write(&mut text);
        text
    }

    fn write(&self, out: &mut String) {
        match self {
            Self::Scalar(text, plain) if *plain && stays_plain(text) => out.push_str(text),
            Self::Scalar(text, _) => out.push_str(&quote(text)),
            Self::List(items) => {
                out.push('[');
                for item in items {
                    item.write(out);
                    out.push_str(", ");
                }
                out.push(']');
            }
            Self::Map(fields) => {
                out.push('{');
                for (key, value) in fields {
                    out.push_str(&quote(key));
                    out.push_str(": ");
                    value.write(out);
                    out.push_str(", ");
                }
                out.push('}');
            }
        }
    }

    fn at(&self, path: &str) -> Option<&Self> {
        let mut node = self;
        for segment in segments(path) {
            node = match (node, segment) {
                (Self::Map(fields), Segment::Field(name)) => &fields.iter().find(|(key, _)| key == name)?.1,
                (Self::List(items), Segment::Item(index)) => items.get(index)?,
                _ => return None,
            };
        }
        Some(node)
    }

    fn at_mut(&mut self, path: &str) -> Option<&mut Self> {
        let mut node = self;
        for segment in segments(path) {
            node = match (node, segment) {
                (Self::Map(fields), Segment::Field(name)) => {
                    &mut fields.iter_mut().find(|(key, _)| key == name)?.1
                }
                (Self::List(items), Segment::Item(index)) => items.get_mut(index)?,
                _ => return None,
            };
        }
        Some(node)
    }

    /// Leaves out what a path names. An item is replaced, so that the others keep their number.
    fn remove(&mut self, path: &str) -> bool {
        let at = path.rfind(['.', '[']).unwrap_or(0);
        let (holder, last) = path.split_at(at);
        match self.at_mut(holder) {
            Some(Self::Map(fields)) => {
                let before = fields.len();
                fields.retain(|(key, _)| key != last.trim_start_matches('.'));
                fields.len() < before
            }
            Some(Self::List(items)) => match segments(last).next() {
                Some(Segment::Item(index)) if index < items.len() => {
                    items[index] = harmless_item(holder);
                    true
                }
                _ => false,
            },
            _ => false,
        }
    }

    /// Puts in a field that is missing.
    fn fill(&mut self, path: &str) -> bool {
        let (holder, name) = path.rsplit_once('.').unwrap_or(("", path));
        let Some(Self::Map(fields)) = self.at_mut(holder) else {
            return false;
        };
        let value = match name {
            "kind" => text("Rollout"),
            "canary" if holder.is_empty() => Self::Map(vec![("revision".into(), text("x"))]),
            "canary" | "share" => text("1%"),
            "name" => text("error_rate"),
            "priority" => Self::Scalar("0".into(), true),
            _ => text("x"),
        };
        fields.push((name.to_owned(), value));
        true
    }
}

/// An item that is no error in the list at a path.
fn harmless_item(list: &str) -> Node {
    let map = |fields: &[(&str, Node)]| {
        let fields = fields
            .iter()
            .map(|(key, value)| ((*key).to_owned(), value.clone()));
        Node::Map(fields.collect())
    };
    match list.rsplit('.').next().unwrap_or_default() {
        "match" => map(&[("priority", Node::Scalar("0".into(), true))]),
        "steps" => map(&[("canary", text("1%"))]),
        "metrics" => map(&[("name", text("error_rate"))]),
        "windows" => map(&[("from", text("00:00")), ("to", text("00:00"))]),
        "client_ip" => text("0.0.0.0/0"),
        "days" => text("mon"),
        "key" => text("client_ip"),
        _ => text("x"),
    }
}

fn text(text: &str) -> Node {
    Node::Scalar(text.to_owned(), false)
}

/// Steps of a path such as `match[2].priority`.
enum Segment<'a> {
    Field(&'a str),
    Item(usize),
}

fn segments(path: &str) -> impl Iterator<Item = Segment<'_>> {
    let pieces = path.split(['.', '[']).filter(|piece| !piece.is_empty());
    pieces.map(
        |piece| match piece.strip_suffix(']').and_then(|index| index.parse().ok()) {
            Some(index) => Segment::Item(index),
            None => Segment::Field(piece),
        },
    )
}

/// Whether a value without quotes means the same within a flow collection.
fn stays_plain(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"+-._".contains(&b);
    text.bytes().all(allowed) && text.bytes().any(|b| b.is_ascii_alphanumeric())
}

/// In double quotes, as both JSON and YAML read them.
fn quote(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}
