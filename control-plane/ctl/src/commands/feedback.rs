//! `ctl feedback`.

use crate::{
    config::{Connection, Feedback},
    connect::Gateway,
    console::Console,
    error::CtlError,
    output::{Format, View, emit},
};
use penstock_proto::v1::{FeedbackRequest, feedback_request::Value};
use serde::Serialize;

pub(crate) async fn run(
    args: Feedback,
    connection: &Connection,
    output: Format,
    console: &mut Console,
) -> Result<(), CtlError> {
    let mut gateway = Gateway::connect(connection).await?;
    let value = match args.score {
        Some(score) => Value::Score(score),
        // One of the three is there; the command line wants it.
        None => Value::ThumbUp(args.up),
    };
    let request = FeedbackRequest {
        reply_id: args.reply_id.clone(),
        value: Some(value),
        comment: args.comment,
    };
    let reply = gateway.rpc.feedback(request).await;
    let reply = reply.map_err(|status| gateway.failed(status))?.into_inner();
    let counted = Counted {
        reply_id: args.reply_id,
        model: reply.model,
        revision: reply.revision,
    };
    emit(console, output, &counted)
}

/// Whom the feedback counts for.
#[derive(Debug, Serialize)]
struct Counted {
    reply_id: String,
    model: String,
    revision: String,
}

impl View for Counted {
    fn table(&self) -> String {
        format!("counted for {}@{}\n", self.model, self.revision)
    }
}
