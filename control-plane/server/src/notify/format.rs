//! The forms of an event.

use serde_json::{Value, json};

use super::Event;

/// In the manner of CloudEvents 1.0.
pub(super) fn json(event: &Event) -> Value {
    json!({
        "specversion": "1.0",
        "id": event.id,
        "source": "penstock",
        "type": event.kind,
        "subject": event.rollout.model,
        "title": event.title,
        "data": &*event.rollout,
    })
}

/// A message of Slack's incoming webhooks.
pub(super) fn slack(event: &Event) -> Value {
    let told = &event.rollout;
    let mut lines = vec![format!("*{}*", escape(&event.title))];
    if !told.cause.is_empty() {
        lines.push(escape(&told.cause));
    }
    if !told.reason.is_empty() && told.reason != told.cause {
        lines.push(format!("_{}: {}_", escape(&told.actor), escape(&told.reason)));
    }
    json!({
        "text": event.title,
        "blocks": [{ "type": "section", "text": { "type": "mrkdwn", "text": lines.join("\n") } }],
    })
}

/// The three characters that mean something to Slack.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}
