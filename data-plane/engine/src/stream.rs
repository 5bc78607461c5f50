//! The channel on which a sequence's events leave the engine.

use std::collections::VecDeque;

use tokio::sync::mpsc;

use crate::Event;

/// Events that may wait for the consumer before its sequence is set aside.
const BUFFER: usize = 64;

/// The events of one sequence. Dropping it aborts the sequence: within one step its pages are free.
#[derive(Debug)]
pub struct TokenStream {
    events: mpsc::Receiver<Event>,
}

/// The engine's end. It never blocks: what does not fit is kept back, and the sequence rests until it does.
#[derive(Debug)]
pub(crate) struct EventSink {
    events: mpsc::Sender<Event>,
    held: VecDeque<Event>,
}

pub(crate) fn channel() -> (EventSink, TokenStream) {
    let (sender, events) = mpsc::channel(BUFFER);
    (
        EventSink {
            events: sender,
            held: VecDeque::new(),
        },
        TokenStream { events },
    )
}

// === impl TokenStream ===

impl TokenStream {
    /// The next event; `None` after the last.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// Whatever is ready, without waiting.
    pub fn try_next(&mut self) -> Option<Event> {
        self.events.try_recv().ok()
    }

    /// The next event, for threads outside an asynchronous runtime.
    pub fn blocking_next(&mut self) -> Option<Event> {
        self.events.blocking_recv()
    }
}

// === impl EventSink ===

impl EventSink {
    /// Sends or holds back. At most a few events are held, since a sequence with held events is not run.
    pub(crate) fn send(&mut self, event: Event) {
        self.held.push_back(event);
        self.flush();
    }

    /// Sends what was held back; true if nothing is left.
    pub(crate) fn flush(&mut self) -> bool {
        while let Some(event) = self.held.pop_front() {
            if let Err(mpsc::error::TrySendError::Full(event)) = self.events.try_send(event) {
                self.held.push_front(event);
                return false;
            }
        }
        true
    }

    /// Whether the consumer is gone.
    pub(crate) fn is_closed(&self) -> bool {
        self.events.is_closed()
    }
}
