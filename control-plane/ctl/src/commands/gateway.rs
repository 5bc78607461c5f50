//! `ctl gateway …`.

use crate::{
    config::{Connection, GatewayVerb, Override},
    connect::Admin,
    console::Console,
    error::CtlError,
    ops::{Ops, is_address},
    output::{Format, View, columns, emit},
    view::{Explanation, Gateways, ago},
};
use http::Method;
use penstock_proto::v1::ListGatewaysRequest;
use serde::{Deserialize, Serialize};
use serde_json::json;

pub(crate) async fn run(
    verb: GatewayVerb,
    connection: &Connection,
    output: Format,
    console: &mut Console,
) -> Result<(), CtlError> {
    match verb {
        GatewayVerb::List => {
            let mut admin = Admin::connect(connection).await?;
            let reply = admin.rpc.list_gateways(ListGatewaysRequest {}).await;
            let gateways = reply.map_err(|status| admin.failed(status))?.into_inner();
            emit(console, output, &Gateways::from(gateways))
        }
        GatewayVerb::Override(args) => set(args, connection, output, console).await,
        GatewayVerb::Overrides { name } => list(name, connection, output, console).await,
    }
}

/// Starts or ends an override.
async fn set(
    args: Override,
    connection: &Connection,
    output: Format,
    console: &mut Console,
) -> Result<(), CtlError> {
    let ops = ops(&args.gateway, connection).await?;
    let model = &args.model;
    let done = match &args.to {
        Some(revision) => {
            let body = json!({
                "model": model,
                "revision": revision,
                "ttl_s": args.ttl.as_secs().max(1),
                "actor": args.actor,
                "reason": args.reason,
            });
            let answer = ops.call(Method::POST, "/override", Some(&body)).await?;
            for doubt in doubts(&answer, revision) {
                console.progress(&format!("warning: {}: {doubt}", args.gateway));
            }
            let ends = humantime::format_duration(args.ttl);
            format!(
                "{}: all of {model} goes to {revision}; ends in {ends}",
                args.gateway
            )
        }
        None => {
            ops.call(Method::DELETE, &format!("/override/{}", escaped(model)), None)
                .await?;
            format!("{}: {model} follows the plan again", args.gateway)
        }
    };
    let done = Done {
        gateway: args.gateway,
        model: args.model,
        revision: args.to,
        done,
    };
    emit(console, output, &done)
}

async fn list(
    gateway: Option<String>,
    connection: &Connection,
    output: Format,
    console: &mut Console,
) -> Result<(), CtlError> {
    let gateways = match gateway {
        Some(gateway) => vec![ops(&gateway, connection).await?],
        None => live(connection).await?,
    };
    let mut overrides = Vec::new();
    for ops in gateways {
        let text = ops.call(Method::GET, "/overrides", None).await?;
        let found: Answer =
            serde_json::from_str(&text).map_err(|error| ops.nonsense(format!("its overrides: {error}")))?;
        // A gateway remembers for a while those that have ended.
        let in_force = found.overrides.into_iter().filter(|found| found.ended_ms == 0);
        overrides.extend(in_force.map(|in_force| Overriding {
            gateway: ops.name.clone(),
            in_force,
        }));
    }
    emit(console, output, &Overrides { overrides })
}

/// What an operator should know of an override that was taken.
fn doubts(answer: &str, revision: &str) -> Vec<String> {
    let answer: serde_json::Value = serde_json::from_str(answer).unwrap_or_default();
    let mut doubts = Vec::new();
    if answer["workers"] == 0 {
        doubts.push(format!("no worker that it knows serves {revision} now"));
    }
    if answer["kept"] == false {
        doubts.push("a restart of the gateway forgets it: it has no state directory".to_owned());
    }
    doubts
}

async fn ops(gateway: &str, connection: &Connection) -> Result<Ops, CtlError> {
    if is_address(gateway) {
        return Ok(Ops::at("gateway", gateway, gateway, connection.timeout()));
    }
    Ops::of_gateway(&mut Admin::connect(connection).await?, gateway).await
}

/// Every live gateway that tells where its operations port is.
async fn live(connection: &Connection) -> Result<Vec<Ops>, CtlError> {
    let mut admin = Admin::connect(connection).await?;
    let reply = admin.rpc.list_gateways(ListGatewaysRequest {}).await;
    let gateways = reply
        .map_err(|status| admin.failed(status))?
        .into_inner()
        .gateways;
    let live = gateways
        .into_iter()
        .filter(|g| g.live && !g.ops_address.is_empty());
    Ok(live
        .map(|g| Ops::at("gateway", &g.node, &g.ops_address, admin.timeout))
        .collect())
}

/// A name as a segment of a path (RFC 3986, section 2.3).
fn escaped(name: &str) -> String {
    let escape = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => char::from(byte).to_string(),
        byte => format!("%{byte:02X}"),
    };
    name.bytes().map(escape).collect()
}

/// What came of an override or of its end.
#[derive(Debug, Serialize)]
struct Done {
    gateway: String,
    model: String,
    /// None where an override ended.
    revision: Option<String>,
    #[serde(skip)]
    done: String,
}

impl View for Done {
    fn table(&self) -> String {
        format!("{}\n", self.done)
    }
}

/// `gateway overrides`.
#[derive(Debug, Serialize)]
struct Overrides {
    overrides: Vec<Overriding>,
}

#[derive(Debug, Serialize)]
struct Overriding {
    gateway: String,
    #[serde(flatten)]
    in_force: InForce,
}

#[derive(Debug, Deserialize)]
struct Answer {
    overrides: Vec<InForce>,
}

/// An override as a gateway tells it.
#[derive(Debug, Serialize, Deserialize)]
struct InForce {
    #[serde(default)]
    id: String,
    model: String,
    revision: String,
    #[serde(default)]
    actor: String,
    #[serde(default)]
    reason: String,
    #[serde(default)]
    since_ms: u64,
    until_ms: u64,
    #[serde(default, skip_serializing)]
    ended_ms: u64,
}

impl View for Overrides {
    fn table(&self) -> String {
        let now = Explanation::clock();
        let row = |o: &Overriding| {
            let InForce {
                model,
                revision,
                actor,
                reason,
                until_ms,
                ..
            } = &o.in_force;
            [
                o.gateway.clone(),
                model.clone(),
                revision.clone(),
                ago(now, *until_ms),
                actor.clone(),
                reason.clone(),
            ]
        };
        let rows: Vec<_> = self.overrides.iter().map(row).collect();
        columns(
            ["GATEWAY", "MODEL", "REVISION", "ENDS IN", "ACTOR", "REASON"],
            &rows,
        )
    }
}
