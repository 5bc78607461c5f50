//! The channel on which a sequence's events leave the engine.

use tokio::sync::mpsc;

use crate::{Event, SequenceError};

/// Events that may wait for the consumer before its sequence is set aside.
pub(crate) const BUFFER: usize = 64;
/// Places kept for the end of the stream: one token held back, and the closing event. So a stream always ends
/// with its closing event, however slow its consumer is, and the engine need not remember it.
const RESERVED: usize = 2;

/// The events of one sequence. Dropping it aborts the sequence: within one step its pages are free.
#[derive(Debug)]
pub struct TokenStream {
    events: mpsc::Receiver<Event>,
    closed: bool,
}

/// The engine's end. It never blocks: what does not fit is held back, and the sequence rests until it does.
#[derive(Debug)]
pub(crate) struct EventSink {
    events: mpsc::Sender<Event>,
    held: Option<Event>,
    reserved: Vec<mpsc::OwnedPermit<Event>>,
}

pub(crate) fn channel() -> (EventSink, TokenStream) {
    let (sender, receiver) = mpsc::channel(BUFFER + RESERVED);
    let permit = |_| sender.clone().try_reserve_owned().ok();
    let sink = EventSink {
        reserved: (0..RESERVED).filter_map(permit).collect(),
        events: sender,
        held: None,
    };
    let stream = TokenStream {
        events: receiver,
        closed: false,
    };
    (sink, stream)
}

// === impl TokenStream ===

impl TokenStream {
    /// The next event; `None` after the last.
    pub async fn next(&mut self) -> Option<Event> {
        let event = self.events.recv().await;
        self.note(event)
    }

    /// Whatever is ready, without waiting.
    pub fn try_next(&mut self) -> Option<Event> {
        match self.events.try_recv() {
            Ok(event) => self.note(Some(event)),
            Err(mpsc::error::TryRecvError::Empty) => None,
            Err(mpsc::error::TryRecvError::Disconnected) => self.note(None),
        }
    }

    /// The next event, for threads outside an asynchronous runtime.
    pub fn blocking_next(&mut self) -> Option<Event> {
        let event = self.events.blocking_recv();
        self.note(event)
    }

    /// Makes sure that a stream ends with a closing event even if the engine's thread ended without one.
    fn note(&mut self, event: Option<Event>) -> Option<Event> {
        match event {
            Some(event) => {
                self.closed |= matches!(event, Event::Finished(_) | Event::Failed(_));
                Some(event)
            }
            None if self.closed => None,
            None => {
                self.closed = true;
                Some(Event::Failed(SequenceError::ShuttingDown))
            }
        }
    }
}

// === impl EventSink ===

impl EventSink {
    /// Sends an event that is not the last, or holds it back. A sequence with an event held back is not run, so
    /// there is never a second one.
    pub(crate) fn send(&mut self, event: Event) {
        debug_assert!(self.held.is_none(), "a sequence ran while its consumer lagged");
        if let Err(mpsc::error::TrySendError::Full(event)) = self.events.try_send(event) {
            self.held = Some(event);
        }
    }

    /// Sends what was held back; true if nothing is left.
    pub(crate) fn flush(&mut self) -> bool {
        if let Some(event) = self.held.take() {
            self.send(event);
        }
        !self.is_blocked()
    }

    /// Events that can be sent with none held back.
    pub(crate) fn room(&self) -> usize {
        match self.is_blocked() {
            true => 0,
            false => self.events.capacity(),
        }
    }

    /// Whether an event waits for the consumer.
    pub(crate) fn is_blocked(&self) -> bool {
        self.held.is_some()
    }

    /// Ends the stream with `closing`; it always fits.
    pub(crate) fn close(&mut self, closing: Event) {
        for event in self.held.take().into_iter().chain([closing]) {
            if let Some(permit) = self.reserved.pop() {
                permit.send(event);
            }
        }
    }

    /// Whether the consumer is gone.
    pub(crate) fn is_closed(&self) -> bool {
        self.events.is_closed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{FinishReason, Finished, Token};

    fn token(id: u32) -> Event {
        Event::Token(Token {
            id,
            at: std::time::Instant::now(),
            logprob: None,
            top: Vec::new(),
        })
    }

    #[test]
    fn a_full_channel_still_takes_the_held_token_and_the_closing_event_in_order() {
        let (mut sink, mut stream) = channel();
        for id in 0..=BUFFER as u32 {
            assert!(!sink.is_blocked());
            sink.send(token(id));
        }
        assert!(sink.is_blocked() && !sink.flush());
        let closing = Finished {
            reason: FinishReason::Length,
            completion_tokens: BUFFER + 1,
            grammar_satisfied: None,
        };
        sink.close(Event::Finished(closing));
        drop(sink);
        for expected in 0..=BUFFER as u32 {
            assert!(matches!(stream.blocking_next(), Some(Event::Token(Token { id, .. })) if id == expected));
        }
        assert!(matches!(stream.blocking_next(), Some(Event::Finished(_))));
        assert!(stream.blocking_next().is_none());
    }

    #[test]
    fn a_stream_whose_engine_vanished_says_so_once() {
        let (sink, mut stream) = channel();
        drop(sink);
        assert!(matches!(
            stream.try_next(),
            Some(Event::Failed(SequenceError::ShuttingDown))
        ));
        assert!(stream.try_next().is_none());
    }
}
