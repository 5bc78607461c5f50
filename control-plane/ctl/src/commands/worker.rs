//! `ctl worker …`.

use crate::{
    config::{Connection, Drain, WorkerVerb},
    connect::Admin,
    console::Console,
    error::CtlError,
    ops::{Ops, is_address},
    output::{Format, View, emit},
    view::Workers,
};
use http::Method;
use penstock_proto::v1::ListWorkersRequest;
use serde::Serialize;

pub(crate) async fn run(
    verb: WorkerVerb,
    connection: &Connection,
    output: Format,
    console: &mut Console,
) -> Result<(), CtlError> {
    match verb {
        WorkerVerb::List => list(connection, output, console).await,
        WorkerVerb::Drain(args) => drain(args, connection, output, console).await,
    }
}

async fn list(connection: &Connection, output: Format, console: &mut Console) -> Result<(), CtlError> {
    let mut admin = Admin::connect(connection).await?;
    let reply = admin.rpc.list_workers(ListWorkersRequest {}).await;
    let workers = reply.map_err(|status| admin.failed(status))?.into_inner();
    emit(console, output, &Workers::from(workers))
}

async fn drain(
    args: Drain,
    connection: &Connection,
    output: Format,
    console: &mut Console,
) -> Result<(), CtlError> {
    let Drain { worker } = args;
    let ops = if is_address(&worker) {
        Ops::at("worker", &worker, &worker, connection.timeout())
    } else {
        Ops::of_worker(&mut Admin::connect(connection).await?, &worker).await?
    };
    let answer = ops.call(Method::POST, "/drain", None).await?;
    let answer = answer.trim().to_owned();
    emit(console, output, &Drained { worker, answer })
}

/// The worker's answer.
#[derive(Debug, Serialize)]
struct Drained {
    worker: String,
    answer: String,
}

impl View for Drained {
    fn table(&self) -> String {
        format!("{}: {}\n", self.worker, self.answer)
    }
}
