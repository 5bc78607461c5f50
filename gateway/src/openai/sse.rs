//! Server-sent events.

use std::{convert::Infallible, fmt::Display};

use axum::{body::Body, response::Response};
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderValue, header};
use penstock_proto::v1;
use tonic::Status;

use super::error;
use crate::choices::Choices;

/// Writes the events of a response.
pub(crate) trait Events: Send + 'static {
    /// Before the first chunk.
    fn open(&mut self, out: &mut String);
    /// For each chunk of the reply of this index.
    fn chunk(&mut self, index: usize, chunk: v1::GenerateResponse, out: &mut String);
    /// After the last chunk, where all replies are complete.
    fn close(&mut self, out: &mut String);
}

/// Appends one event.
pub(crate) fn event(out: &mut String, data: impl Display) {
    use std::fmt::Write as _;
    // Writing to a String cannot fail.
    let _ = write!(out, "data: {data}\n\n");
}

enum State<E> {
    Opening(Choices, E),
    Running(Choices, E),
    Ended,
}

/// Streams replies. A response that breaks off ends with an error event and without `[DONE]`.
pub(crate) fn respond<E: Events>(chunks: Choices, events: E) -> Response {
    let body = stream::unfold(State::Opening(chunks, events), |state| async move {
        let (out, next) = step(state).await?;
        Some((Ok::<_, Infallible>(Bytes::from(out)), next))
    });
    let mut response = Response::new(Body::from_stream(body));
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/event-stream"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies that buffer would hold tokens back.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

async fn step<E: Events>(state: State<E>) -> Option<(String, State<E>)> {
    let mut out = String::new();
    let (mut chunks, mut events) = match state {
        State::Opening(chunks, mut events) => {
            events.open(&mut out);
            (chunks, events)
        }
        State::Running(chunks, events) => (chunks, events),
        State::Ended => return None,
    };
    match chunks.next().await {
        Ok(Some((index, ready))) => {
            ready
                .into_iter()
                .for_each(|chunk| events.chunk(index, chunk, &mut out));
            Some((out, State::Running(chunks, events)))
        }
        Ok(None) => {
            events.close(&mut out);
            event(&mut out, "[DONE]");
            Some((out, State::Ended))
        }
        Err(status) => {
            broken(&mut out, &status);
            Some((out, State::Ended))
        }
    }
}

fn broken(out: &mut String, status: &Status) {
    event(out, error::body(status));
}
