//! The shape of a text: what is written, and on which line.

use std::collections::{BTreeMap, BTreeSet};

use saphyr_parser::{Event, Parser, ScalarStyle};

use super::{Finding, Lines, field, finding, item};

/// Values within values, at most; a plan needs six.
const DEEPEST: usize = 32;
/// Values whose line is kept; those after them get the line of what holds them.
const MOST_LINES: usize = 20_000;
/// Longest path whose line is kept, in bytes.
const LONGEST_PATH: usize = 200;

/// A text that has the shape of a plan.
pub(super) struct Document {
    pub(super) root: Node,
    pub(super) lines: Lines,
}

/// A value as it is written.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Node {
    /// The text, and whether it stands without quotes.
    Scalar(String, bool),
    List(Vec<Node>),
    Map(Vec<(String, Node)>),
}

/// A list or a map that is still open.
struct Open {
    path: String,
    node: Node,
    /// Of a map: the key whose value comes next.
    key: Option<String>,
    seen: BTreeSet<String>,
}

struct Reader {
    open: Vec<Open>,
    root: Option<Node>,
    lines: BTreeMap<String, u32>,
    findings: Vec<Finding>,
}

// === impl Document ===

impl Document {
    /// Reads the shape.
    ///
    /// # Errors
    /// It is no YAML, or has what plans do not: aliases, tags, several documents, a key twice.
    pub(super) fn read(text: &str) -> Result<Self, Vec<Finding>> {
        let mut reader = Reader {
            open: Vec::new(),
            root: None,
            lines: BTreeMap::new(),
            findings: Vec::new(),
        };
        for event in Parser::new_from_str(text) {
            let (event, span) = event.map_err(|error| {
                let message = format!("this is neither YAML nor JSON: {}", error.info());
                let mut findings = std::mem::take(&mut reader.findings);
                findings.push(finding("", line(error.marker().line()), "unreadable", message));
                findings
            })?;
            if let Err(fatal) = reader.take(event, line(span.start.line())) {
                reader.findings.push(fatal);
                return Err(reader.findings);
            }
        }
        match reader.root {
            _ if !reader.findings.is_empty() => Err(reader.findings),
            Some(root @ Node::Map(_)) => Ok(Self {
                root,
                lines: Lines(reader.lines),
            }),
            Some(_) | None => Err(vec![finding(
                "",
                1,
                "unreadable",
                "this is no plan: a plan begins with `kind: Rollout` and names `model` and `canary`".into(),
            )]),
        }
    }
}

fn line(line: usize) -> u32 {
    u32::try_from(line).unwrap_or(u32::MAX)
}

// === impl Reader ===

impl Reader {
    /// Takes in what comes next; an error is one after which nothing can be read.
    fn take(&mut self, event: Event<'_>, line: u32) -> Result<(), Finding> {
        match event {
            Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => {}
            Event::DocumentStart(_) if self.root.is_some() => {
                let message = "a second document begins here: write one plan to a file".into();
                return Err(finding("", line, "several-documents", message));
            }
            Event::DocumentStart(_) => {}
            Event::Alias(_) => {
                let message = "aliases are not read: write the value out".into();
                return Err(finding(&self.path(), line, "alias", message));
            }
            Event::Scalar(_, _, _, Some(tag))
            | Event::SequenceStart(_, Some(tag))
            | Event::MappingStart(_, Some(tag)) => {
                let message = format!("the tag {}{} is not read: leave it out", tag.handle, tag.suffix);
                return Err(finding(&self.path(), line, "tag", message));
            }
            Event::Scalar(text, style, _, None) => self.scalar(text.into_owned(), style, line),
            Event::SequenceStart(..) => self.begin(Node::List(Vec::new()), line)?,
            Event::MappingStart(..) => self.begin(Node::Map(Vec::new()), line)?,
            Event::SequenceEnd | Event::MappingEnd => self.end(),
        }
        Ok(())
    }

    fn scalar(&mut self, text: String, style: ScalarStyle, line: u32) {
        let expects_key = self
            .open
            .last()
            .is_some_and(|open| matches!(open.node, Node::Map(_)) && open.key.is_none());
        if !expects_key {
            self.mark(line);
            return self.put(Node::Scalar(text, style == ScalarStyle::Plain));
        }
        let Some(open) = self.open.last_mut() else {
            return;
        };
        let path = field(&open.path, &text);
        if !open.seen.insert(text.clone()) {
            let message = format!("{text:?} is written twice: keep one of them");
            self.findings.push(finding(&path, line, "duplicate-key", message));
        }
        open.key = Some(text);
        self.record(path, line);
    }

    fn begin(&mut self, node: Node, line: u32) -> Result<(), Finding> {
        let path = self.path();
        if self.open.len() >= DEEPEST {
            let message = format!("more than {DEEPEST} values within values: no plan needs that");
            return Err(finding(&path, line, "too-deep", message));
        }
        let expects_key = self
            .open
            .last()
            .is_some_and(|open| matches!(open.node, Node::Map(_)) && open.key.is_none());
        if expects_key {
            let message = "a list or a map is no name of a field".into();
            return Err(finding(&path, line, "unreadable", message));
        }
        self.mark(line);
        self.open.push(Open {
            path,
            node,
            key: None,
            seen: BTreeSet::new(),
        });
        Ok(())
    }

    fn end(&mut self) {
        if let Some(open) = self.open.pop() {
            self.put(open.node);
        }
    }

    fn put(&mut self, node: Node) {
        let Some(open) = self.open.last_mut() else {
            self.root = Some(node);
            return;
        };
        match (&mut open.node, open.key.take()) {
            (Node::List(items), _) => items.push(node),
            (Node::Map(fields), Some(key)) => fields.push((key, node)),
            (Node::Map(_), None) | (Node::Scalar(..), _) => {}
        }
    }

    /// The path of the value that comes next.
    fn path(&self) -> String {
        match self.open.last() {
            None => String::new(),
            Some(open) => match (&open.node, &open.key) {
                (Node::List(items), _) => item(&open.path, items.len()),
                (_, Some(key)) => field(&open.path, key),
                (_, None) => open.path.clone(),
            },
        }
    }

    /// Notes the line of a value that has no key to note it for.
    fn mark(&mut self, line: u32) {
        let keyed = self
            .open
            .last()
            .is_some_and(|open| matches!(open.node, Node::Map(_)));
        if !keyed {
            self.record(self.path(), line);
        }
    }

    fn record(&mut self, path: String, line: u32) {
        if self.lines.len() < MOST_LINES && path.len() <= LONGEST_PATH {
            self.lines.entry(path).or_insert(line);
        }
    }
}
