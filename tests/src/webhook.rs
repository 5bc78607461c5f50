//! A receiver of webhooks, which refuses what it is told to refuse.

use anyhow::Result;
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

/// One message.
#[derive(Debug, Clone)]
pub struct Message {
    /// Path of the request.
    pub path: String,
    /// Headers, lower case names.
    pub headers: Vec<(String, String)>,
    /// Body.
    pub body: String,
    /// What it was answered with.
    pub answered: u16,
}

impl Message {
    /// First value of a header, or nothing.
    pub fn header(&self, name: &str) -> &str {
        let found = self.headers.iter().find(|(n, _)| n == name);
        found.map_or("", |(_, value)| value)
    }
}

/// A receiver on a port of its own.
#[derive(Debug)]
pub struct Webhook {
    /// Base URL.
    pub url: String,
    messages: Arc<Mutex<Vec<Message>>>,
    task: JoinHandle<()>,
}

impl Webhook {
    /// Starts it; the first `refusals` messages are answered with 500.
    pub async fn start(refusals: usize) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}", listener.local_addr()?);
        let messages: Arc<Mutex<Vec<Message>>> = Arc::default();
        let task = tokio::spawn({
            let messages = messages.clone();
            async move {
                while let Ok((stream, _)) = listener.accept().await {
                    // A sender that breaks off sends again.
                    let _ =
                        tokio::time::timeout(Duration::from_secs(5), receive(stream, &messages, refusals))
                            .await;
                }
            }
        });
        Ok(Self { url, messages, task })
    }

    /// What came so far.
    pub fn messages(&self) -> Vec<Message> {
        let messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        messages.clone()
    }
}

impl Drop for Webhook {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn receive(
    mut stream: TcpStream,
    messages: &Mutex<Vec<Message>>,
    refusals: usize,
) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let mut lines = head.lines();
    let path = lines.next().and_then(|line| line.split(' ').nth(1));
    let path = path.unwrap_or_default().to_owned();
    let headers: Vec<(String, String)> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
        .collect();
    let length = headers.iter().find(|(name, _)| name == "content-length");
    let length = length.and_then(|(_, value)| value.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    let answered = {
        let mut messages = messages.lock().unwrap_or_else(PoisonError::into_inner);
        let answered = if messages.len() < refusals { 500 } else { 200 };
        messages.push(Message {
            path,
            headers,
            body: String::from_utf8_lossy(&body).into_owned(),
            answered,
        });
        answered
    };
    let reply = format!("HTTP/1.1 {answered} Answered\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    stream.write_all(reply.as_bytes()).await?;
    stream.shutdown().await
}
