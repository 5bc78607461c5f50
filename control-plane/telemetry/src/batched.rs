//! A connection whose writes wait for one another.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes that wait for one another at most.
const ROOM: usize = 32 << 10;
/// A buffer larger than this is not kept while it is empty.
const KEPT: usize = 8 << 10;

/// A connection of many streams that writes once for all tasks that are ready: a flush first lets the others have
/// their turn, and what they write leaves in the same system call. A connection that has nothing to wait for is
/// polled once more for each flush, and that is all.
///
/// A flush that is ready says that the bytes will leave without further ado, not that they have left; so whoever
/// flushes must go on to poll the connection when it is woken, and shut it down in the end. HTTP's connections do.
#[derive(Debug)]
pub struct Batched<S> {
    stream: S,
    buffer: Vec<u8>,
    /// Bytes of the buffer that have left.
    gone: usize,
    turn: Turn,
    /// Bytes came since the last flush.
    fresh: bool,
}

/// Whose turn it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// Nobody waits.
    Idle,
    /// That of the others; this task has woken itself.
    Others,
    /// Ours again.
    Ours,
}

impl<S> Batched<S> {
    /// Batches what is written to `stream`.
    pub fn new(stream: S) -> Self {
        Self {
            stream,
            buffer: Vec::new(),
            gone: 0,
            turn: Turn::Idle,
            fresh: false,
        }
    }
}

impl<S: AsyncWrite + Unpin> Batched<S> {
    /// Writes all that waits.
    fn poll_drain(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.gone < self.buffer.len() {
            let left = &self.buffer[self.gone..];
            match ready!(Pin::new(&mut self.stream).poll_write(context, left))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => self.gone += written,
            }
        }
        self.turn = Turn::Idle;
        self.gone = 0;
        self.buffer.clear();
        self.buffer.shrink_to(KEPT);
        Poll::Ready(Ok(()))
    }

    fn poll_room(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.buffer.len() < ROOM {
            true => Poll::Ready(Ok(())),
            false => self.poll_drain(context),
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Batched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // A connection reads at the beginning of each poll.
        if self.turn == Turn::Others {
            self.turn = Turn::Ours;
        }
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Batched<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_room(context))?;
        self.buffer.extend_from_slice(bytes);
        self.fresh = true;
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_room(context))?;
        parts.iter().for_each(|part| self.buffer.extend_from_slice(part));
        self.fresh = true;
        Poll::Ready(Ok(parts.iter().map(|part| part.len()).sum()))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.buffer.is_empty() {
            return Pin::new(&mut self.stream).poll_flush(context);
        }
        // One poll may flush more than once. A flush that brings nothing new is always meant.
        let fresh = std::mem::replace(&mut self.fresh, false);
        if self.turn == Turn::Idle || (self.turn == Turn::Others && fresh) {
            self.turn = Turn::Others;
            // A task that wakes itself comes after those that are ready.
            context.waker().wake_by_ref();
            return Poll::Ready(Ok(()));
        }
        ready!(self.poll_drain(context))?;
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(context))?;
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::poll_fn,
        sync::{Arc, Mutex},
    };

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    type Log = Arc<Mutex<Vec<String>>>;

    /// Tells what is written to it, piece by piece, and takes three bytes at once.
    struct Written(Log);

    impl AsyncWrite for Written {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            let taken = bytes.len().min(3);
            let text = String::from_utf8_lossy(&bytes[..taken]).into_owned();
            self.0.lock().unwrap().push(text);
            Poll::Ready(Ok(taken))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            self.0.lock().unwrap().push("end".into());
            Poll::Ready(Ok(()))
        }
    }

    /// Polls as a connection does: it reads, writes what there is, and flushes, for ever.
    async fn drive(mut stream: Batched<tokio::io::DuplexStream>, text: Arc<Mutex<String>>) {
        poll_fn(|context| -> Poll<()> {
            let mut space = [0; 8];
            let _ = Pin::new(&mut stream).poll_read(context, &mut ReadBuf::new(&mut space));
            let text = std::mem::take(&mut *text.lock().unwrap());
            if !text.is_empty() {
                let _ = Pin::new(&mut stream).poll_write(context, text.as_bytes());
            }
            let _ = Pin::new(&mut stream).poll_flush(context);
            Poll::Pending
        })
        .await;
    }

    #[tokio::test]
    async fn what_tasks_write_that_are_ready_leaves_together() {
        let (ours, mut theirs) = tokio::io::duplex(64);
        let text = Arc::new(Mutex::new("a".to_owned()));
        tokio::spawn(drive(Batched::new(ours), text.clone()));
        for letter in ['b', 'c'] {
            let text = text.clone();
            tokio::spawn(async move { text.lock().unwrap().push(letter) });
        }
        let mut read = [0; 8];
        // The first has waited for the others.
        assert_eq!(theirs.read(&mut read).await.unwrap(), 3);
        assert_eq!(&read[..3], b"abc");
    }

    #[tokio::test]
    async fn more_than_there_is_room_for_leaves_before_a_flush_and_all_before_the_end() {
        let log = Log::default();
        let mut stream = Batched::new(Written(log.clone()));
        stream.write_all(b"abcd").await.unwrap();
        assert!(log.lock().unwrap().is_empty());
        stream.shutdown().await.unwrap();
        assert_eq!(*log.lock().unwrap(), ["abc", "d", "end"]);

        let mut stream = Batched::new(Written(Log::default()));
        for _ in 0..3 {
            stream.write_all(&[b'x'; ROOM]).await.unwrap();
            assert!(stream.buffer.len() <= ROOM);
        }
    }

    #[tokio::test]
    async fn two_flushes_without_news_write_whether_or_not_anybody_reads() {
        let log = Log::default();
        let mut stream = Batched::new(Written(log.clone()));
        stream.write_all(b"ab").await.unwrap();
        stream.flush().await.unwrap();
        assert!(log.lock().unwrap().is_empty());
        stream.flush().await.unwrap();
        assert_eq!(*log.lock().unwrap(), ["ab"]);
    }
}
