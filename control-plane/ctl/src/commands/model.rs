//! `ctl model …`.

use crate::{
    config::{Connection, ModelVerb},
    connect::Admin,
    console::Console,
    error::CtlError,
    output::{Format, emit},
    view::Models,
};
use penstock_proto::v1::ListPublishedRequest;

pub(crate) async fn run(
    verb: ModelVerb,
    connection: &Connection,
    output: Format,
    console: &mut Console,
) -> Result<(), CtlError> {
    let ModelVerb::List = verb;
    let mut admin = Admin::connect(connection).await?;
    let reply = admin.rpc.list_models(ListPublishedRequest {}).await;
    let models = reply.map_err(|status| admin.failed(status))?.into_inner();
    emit(console, output, &Models::from(models))
}
