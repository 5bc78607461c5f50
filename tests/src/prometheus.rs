//! A real Prometheus that scrapes one gauge, which the test sets.

use crate::{Process, free_ports};
use anyhow::{Context as _, Result};
use std::{
    path::Path,
    process::Command,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

/// Prometheus and what it scrapes.
#[derive(Debug)]
pub struct Prometheus {
    _process: Process,
    port: u16,
    gauge: Gauge,
    exporter: JoinHandle<()>,
}

/// The exporter's one number; there is no series without one.
type Gauge = Arc<Mutex<Option<f64>>>;

impl Prometheus {
    /// Starts it; once a second it scrapes the gauge `name`, which has no value yet.
    pub async fn start(directory: &Path, name: &'static str) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let target = listener.local_addr()?;
        let gauge = Gauge::default();
        let exporter = tokio::spawn(export(listener, name, gauge.clone()));
        let [port] = free_ports()?;
        let config = directory.join("prometheus.yml");
        let scrape = format!("[{{job_name: test, static_configs: [{{targets: ['{target}']}}]}}]");
        std::fs::write(
            &config,
            format!("global: {{scrape_interval: 1s, scrape_timeout: 1s}}\nscrape_configs: {scrape}\n"),
        )?;
        let mut command = Command::new("prometheus");
        command
            .arg(format!("--config.file={}", config.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                directory.join("tsdb").display()
            ))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"));
        let mut process = Process::start("prometheus", command, directory)
            .context("Prometheus is needed (Debian: apt-get install prometheus)")?;
        let url = format!("http://127.0.0.1:{port}/-/ready");
        process.ready(&url, Duration::from_secs(20)).await?;
        Ok(Self {
            _process: process,
            port,
            gauge,
            exporter,
        })
    }

    /// Base URL.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// What the gauge says from now on.
    pub fn set(&self, value: f64) {
        *self.gauge.lock().unwrap_or_else(PoisonError::into_inner) = Some(value);
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        self.exporter.abort();
    }
}

async fn export(listener: TcpListener, name: &'static str, gauge: Gauge) {
    while let Ok((stream, _)) = listener.accept().await {
        let value = *gauge.lock().unwrap_or_else(PoisonError::into_inner);
        let body = value.map_or_else(String::new, |value| {
            format!("# TYPE {name} gauge\n{name} {value}\n")
        });
        // A scrape that breaks off is Prometheus's to repeat.
        let _ = answer(stream, &body).await;
    }
}

/// Answers one request and closes.
async fn answer(mut stream: TcpStream, body: &str) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    let reply = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/plain; version=0.0.4\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(reply.as_bytes()).await?;
    stream.shutdown().await
}
