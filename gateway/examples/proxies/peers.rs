//! The proxies: each on one core, with the settings that make it fast and the comparison fair.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;
use penstock_plan::{Canary, Endpoint, EndpointSet, Revision, Route, ServedRevision, Snapshot};

use crate::{
    load::Protocol,
    process::{Running, free_ports},
    upstream::Ports,
};

/// A proxy that can be measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Peer {
    /// No proxy.
    Direct,
    /// Ours, of this program, with 1 % of the requests traced or all of them.
    Gateway {
        program: PathBuf,
        traced: bool,
    },
    Nginx,
    Haproxy,
    Envoy {
        program: PathBuf,
        traced: bool,
    },
    /// SGLang's, of this Python.
    Sglang {
        python: PathBuf,
    },
}

/// A proxy that runs.
#[derive(Debug)]
pub(crate) struct Proxy {
    pub(crate) name: String,
    process: Option<Running>,
    grpc: SocketAddr,
    http: SocketAddr,
}

impl Peer {
    pub(crate) fn speaks(&self, protocol: Protocol) -> bool {
        !matches!((self, protocol), (Self::Sglang { .. }, Protocol::Grpc))
    }

    pub(crate) fn is_traced(&self) -> bool {
        matches!(
            self,
            Self::Gateway { traced: true, .. } | Self::Envoy { traced: true, .. }
        )
    }

    /// Starts it on `core`; its files go into the directory.
    pub(crate) fn start(&self, name: &str, core: usize, ports: &Ports, directory: &Path) -> Result<Proxy> {
        if *self == Self::Direct {
            return Ok(Proxy {
                name: name.into(),
                process: None,
                grpc: ports.grpc,
                http: ports.http,
            });
        }
        let directory = directory.join(name);
        std::fs::create_dir_all(&directory)?;
        let [grpc, mut http, ops] = free_ports()?;
        let file = |name: &str, text: String| {
            let path = directory.join(name);
            std::fs::write(&path, text).map(|()| path)
        };
        let mut command;
        match self {
            Self::Direct => unreachable!("it has no process"),
            Self::Gateway { program, traced } => {
                http = grpc;
                file("view.json", view(ports)?)?;
                command = Command::new(program);
                command.args(["--listen", &grpc.to_string(), "--ops-listen", &ops.to_string()]);
                // Nobody is there: the gateway serves what it knows.
                command
                    .args(["--control-plane", "http://127.0.0.1:1"])
                    .arg("--state-dir")
                    .arg(&directory);
                command.args(["--log", "error"]);
                command.env("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://{}", ports.otlp));
                command.env("OTEL_TRACES_SAMPLER", "parentbased_traceidratio");
                command.env("OTEL_TRACES_SAMPLER_ARG", if *traced { "1" } else { "0.01" });
            }
            Self::Nginx => {
                let path = file("nginx.conf", nginx(grpc, http, ports, &directory))?;
                command = Command::new("nginx");
                command.arg("-p").arg(&directory).arg("-c").arg(path);
            }
            Self::Haproxy => {
                let path = file("haproxy.cfg", haproxy(grpc, http, ports))?;
                command = Command::new("haproxy");
                command.args(["-db", "-f"]).arg(path);
            }
            Self::Envoy { program, traced } => {
                let path = file("envoy.json", envoy(grpc, http, ports, *traced)?)?;
                command = Command::new(program);
                command
                    .args(["--concurrency", "1", "--use-dynamic-base-id", "-l", "error", "-c"])
                    .arg(path);
            }
            Self::Sglang { python } => {
                command = Command::new(python);
                command.args(["-m", "sglang_router.launch_router", "--host", "127.0.0.1"]);
                command.args(["--port", &http.port().to_string(), "--policy", "random"]);
                command.args([
                    "--prometheus-port",
                    &ops.port().to_string(),
                    "--log-level",
                    "warn",
                ]);
                command.args(["--worker-urls", &format!("http://{}", ports.http)]);
                command.arg(format!("http://{}", ports.http_canary));
            }
        }
        let mut process = Running::start(core, &command, &directory, name)?;
        process.listens(http, &directory.join(format!("{name}.log")))?;
        Ok(Proxy {
            name: name.into(),
            process: Some(process),
            grpc,
            http,
        })
    }
}

impl Proxy {
    pub(crate) fn address(&self, protocol: Protocol) -> SocketAddr {
        match protocol {
            Protocol::Grpc => self.grpc,
            Protocol::Http => self.http,
        }
    }

    /// CPU seconds that it has used.
    pub(crate) fn cpu(&self) -> Result<f64> {
        self.process.as_ref().map_or(Ok(f64::NAN), Running::cpu)
    }

    /// Its peak of resident memory in MiB.
    pub(crate) fn peak_rss(&self) -> Result<f64> {
        self.process.as_ref().map_or(Ok(f64::NAN), Running::peak_rss)
    }
}

/// What a control plane would have told: nine users of ten on v1, the others on v2.
fn view(ports: &Ports) -> Result<String> {
    let revision = |name: &str| Revision::new(name, format!("{name:0>8}"));
    let route = Route {
        model: "demo".into(),
        stable: revision("v1"),
        canary: Some(Canary {
            revision: revision("v2"),
            share: "10%".parse()?,
            min_ready: 0,
        }),
        rollout_uid: "bench".into(),
        generation: 1,
        ..Route::default()
    };
    let endpoint = |id: &str, address: SocketAddr| Endpoint {
        id: id.into(),
        address: address.to_string(),
        region: String::new(),
        revisions: vec![ServedRevision {
            model: "demo".into(),
            revision: id.into(),
            digest: revision(id).digest,
            context_length: 8192,
        }],
    };
    let snapshot = Snapshot {
        epoch: 1,
        routes: BTreeMap::from([("demo".into(), route)]),
    };
    let endpoints = EndpointSet {
        version: 1,
        endpoints: vec![endpoint("v1", ports.grpc), endpoint("v2", ports.grpc_canary)],
    };
    Ok(serde_json::json!({ "snapshot": snapshot, "endpoints": endpoints }).to_string())
}

fn nginx(grpc: SocketAddr, http: SocketAddr, ports: &Ports, directory: &Path) -> String {
    let Ports {
        grpc: stable,
        grpc_canary: canary,
        http: http_stable,
        http_canary,
        ..
    } = ports;
    let upstream = |name: &str, address: &SocketAddr| {
        format!(
            "upstream {name} {{ server {address}; keepalive 512; keepalive_requests 1000000000; keepalive_time 24h; }}"
        )
    };
    let upstreams = [
        upstream("grpc_stable", stable),
        upstream("grpc_canary", canary),
        upstream("http_stable", http_stable),
        upstream("http_canary", http_canary),
    ]
    .join("\n");
    let at = directory.display();
    format!(
        "daemon off; master_process off; worker_processes 1; pid {at}/nginx.pid;\n\
         error_log {at}/error.log warn;\n\
         events {{ worker_connections 8192; }}\n\
         http {{\n\
         access_log off; client_body_temp_path {at}/body; proxy_temp_path {at}/proxy; fastcgi_temp_path {at}/f;\n\
         uwsgi_temp_path {at}/u; scgi_temp_path {at}/s;\n\
         keepalive_requests 1000000000; keepalive_time 24h; http2_max_concurrent_streams 1024;\n\
         split_clients $http_x_user_id $revision {{ 10% canary; * stable; }}\n\
         {upstreams}\n\
         server {{ listen {grpc} http2;\n\
         location / {{ grpc_pass grpc://grpc_$revision; grpc_set_header x-model-version $revision;\n\
         grpc_read_timeout 600s; }} }}\n\
         server {{ listen {http};\n\
         location / {{ proxy_pass http://http_$revision; proxy_http_version 1.1; proxy_set_header Connection \"\";\n\
         proxy_set_header x-model-version $revision; proxy_buffering off; }} }}\n\
         }}\n"
    )
}

fn haproxy(grpc: SocketAddr, http: SocketAddr, ports: &Ports) -> String {
    let Ports {
        grpc: stable,
        grpc_canary: canary,
        http: http_stable,
        http_canary,
        ..
    } = ports;
    format!(
        "global\n nbthread 1\n maxconn 8192\n tune.h2.max-concurrent-streams 1024\n\
         defaults\n mode http\n timeout connect 5s\n timeout client 600s\n timeout server 600s\n http-reuse always\n\
         frontend grpc\n bind {grpc} proto h2\n default_backend grpc\n\
         backend grpc\n server stable {stable} proto h2 weight 90\n server canary {canary} proto h2 weight 10\n\
         frontend http\n bind {http}\n default_backend http\n\
         backend http\n server stable {http_stable} weight 90\n server canary {http_canary} weight 10\n"
    )
}

fn envoy(grpc: SocketAddr, http: SocketAddr, ports: &Ports, traced: bool) -> Result<String> {
    let at = |address: SocketAddr| serde_json::json!({ "socket_address": { "address": address.ip().to_string(), "port_value": address.port() } });
    let http2 = serde_json::json!({ "http2_protocol_options": { "max_concurrent_streams": 1024 } });
    let cluster = |name: &str, address: SocketAddr, http2: bool| {
        let most = 100_000;
        let limit = serde_json::json!({ "max_connections": most, "max_pending_requests": most, "max_requests": most });
        let mut cluster = serde_json::json!({
            "name": name, "type": "STATIC", "connect_timeout": "5s",
            "circuit_breakers": { "thresholds": [limit] },
            "load_assignment": { "cluster_name": name, "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": at(address) } }] }] },
        });
        if http2 {
            let options = serde_json::json!({
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": { "http2_protocol_options": { "max_concurrent_streams": 1024 } },
            });
            cluster["typed_extension_protocol_options"] =
                serde_json::json!({ "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options });
        }
        cluster
    };
    let listener = |name: &str, address: SocketAddr| {
        let mut manager = serde_json::json!({
            "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": name, "codec_type": "AUTO", "http2_protocol_options": http2["http2_protocol_options"],
            "stream_idle_timeout": "600s",
            "route_config": { "virtual_hosts": [{ "name": "all", "domains": ["*"], "routes": [{
                "match": { "prefix": "/" },
                "route": { "timeout": "600s", "weighted_clusters": { "clusters": [
                    { "name": format!("{name}_stable"), "weight": 90 }, { "name": format!("{name}_canary"), "weight": 10 },
                ] } },
            }] }] },
            "http_filters": [{ "name": "envoy.filters.http.router", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router" } }],
        });
        if traced {
            manager["tracing"] = serde_json::json!({
                "random_sampling": { "value": 100 },
                "provider": { "name": "envoy.tracers.opentelemetry", "typed_config": {
                    "@type": "type.googleapis.com/envoy.config.trace.v3.OpenTelemetryConfig",
                    "service_name": "envoy", "grpc_service": { "envoy_grpc": { "cluster_name": "otlp" }, "timeout": "5s" } } },
            });
        }
        serde_json::json!({ "name": name, "address": at(address), "filter_chains": [{ "filters": [
            { "name": "envoy.filters.network.http_connection_manager", "typed_config": manager } ] }] })
    };
    let config = serde_json::json!({ "static_resources": {
        "listeners": [listener("grpc", grpc), listener("http", http)],
        "clusters": [
            cluster("grpc_stable", ports.grpc, true), cluster("grpc_canary", ports.grpc_canary, true),
            cluster("http_stable", ports.http, false), cluster("http_canary", ports.http_canary, false),
            cluster("otlp", ports.otlp, true),
        ],
    } });
    Ok(config.to_string())
}
