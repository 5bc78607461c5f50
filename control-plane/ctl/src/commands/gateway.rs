//! `ctl gateway …`.

use crate::{
    config::{Connection, GatewayVerb},
    connect::Admin,
    console::Console,
    error::CtlError,
    output::{Format, emit},
    view::Gateways,
};
use penstock_proto::v1::ListGatewaysRequest;

pub(crate) async fn run(
    verb: GatewayVerb,
    connection: &Connection,
    output: Format,
    console: &mut Console,
) -> Result<(), CtlError> {
    let GatewayVerb::List = verb;
    let mut admin = Admin::connect(connection).await?;
    let reply = admin.rpc.list_gateways(ListGatewaysRequest {}).await;
    let gateways = reply.map_err(|status| admin.failed(status))?.into_inner();
    emit(console, output, &Gateways::from(gateways))
}
