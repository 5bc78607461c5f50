//! `ctl worker …`.

use crate::{
    config::{Connection, WorkerVerb},
    connect::Admin,
    console::Console,
    error::CtlError,
    output::{Format, emit},
    view::Workers,
};
use penstock_proto::v1::ListWorkersRequest;

pub(crate) async fn run(
    verb: WorkerVerb,
    connection: &Connection,
    output: Format,
    console: &mut Console,
) -> Result<(), CtlError> {
    let WorkerVerb::List = verb;
    let mut admin = Admin::connect(connection).await?;
    let reply = admin.rpc.list_workers(ListWorkersRequest {}).await;
    let workers = reply.map_err(|status| admin.failed(status))?.into_inner();
    emit(console, output, &Workers::from(workers))
}
