//! What the end-to-end tests share: the real binaries as child processes, a real etcd, a real OTLP receiver,
//! a real Prometheus, a real browser.
//!
//! Every process is a child that ends with its handle, listens on loopback only, and logs to a file whose end
//! is printed when a test fails. Nothing here knows how a test judges what it sees.

mod browser;
mod cluster;
mod etcd;
mod events;
mod http;
mod load;
mod otlp;
mod process;
mod prometheus;
mod quick_start;
mod trend;
mod webhook;

pub use browser::Browser;
pub use cluster::{Cluster, GatewayProcess, WorkerProcess, demo};
pub use etcd::Etcd;
pub use events::{Events, HttpClient};
pub use http::{Reply, get, post_json, post_json_with};
pub use load::{Client, Generated, chat, connect, gap, generate, revisions_by_user};
pub use otlp::{OtlpReceiver, ReceivedSpan};
pub use process::{Process, binary, eventually, free_port_pairs, free_ports, python, repository};
pub use prometheus::Prometheus;
pub use quick_start::QuickStart;
pub use trend::{Trend, resident_bytes};
pub use webhook::{Message, Webhook};
