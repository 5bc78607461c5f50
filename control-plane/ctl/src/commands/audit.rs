//! `ctl audit`.

use crate::{
    config::{AuditArgs, Connection},
    connect::Admin,
    console::Console,
    error::CtlError,
    output::{Format, emit},
    view::Audit,
};
use penstock_proto::v1::ListAuditRequest;

pub(crate) async fn run(
    args: AuditArgs,
    connection: &Connection,
    output: Format,
    console: &mut Console,
) -> Result<(), CtlError> {
    let AuditArgs { model, limit } = args;
    let mut admin = Admin::connect(connection).await?;
    let reply = admin.rpc.list_audit(ListAuditRequest { model, limit }).await;
    let records = reply.map_err(|status| admin.failed(status))?.into_inner();
    emit(console, output, &Audit::from(records))
}
