//! `ctl model …`.

mod publish;

use crate::{
    config::{Connection, ModelVerb, Retire},
    connect::Admin,
    console::Console,
    error::CtlError,
    output::{Format, View, emit},
    view::Models,
};
use penstock_proto::v1::{ListPublishedRequest, PublishedModel, RetireModelRequest};
use serde::Serialize;

pub(crate) async fn run(
    verb: ModelVerb,
    connection: &Connection,
    output: Format,
    console: &mut Console,
) -> Result<(), CtlError> {
    let mut admin = Admin::connect(&connection.patient()).await?;
    match verb {
        ModelVerb::List => {
            let reply = admin.rpc.list_models(ListPublishedRequest {}).await;
            let models = reply.map_err(|status| admin.failed(status))?.into_inner();
            emit(console, output, &Models::from(models))
        }
        ModelVerb::Publish(args) => publish::run(args, &mut admin, connection.limit, output, console).await,
        ModelVerb::Retire(args) => retire(args, &mut admin, output, console).await,
    }
}

async fn retire(
    args: Retire,
    admin: &mut Admin,
    output: Format,
    console: &mut Console,
) -> Result<(), CtlError> {
    let Retire { model, revision, why } = args;
    let request = RetireModelRequest {
        model: model.clone(),
        revision: revision.clone(),
        reason: why.reason,
        actor: why.actor,
    };
    let reply = admin.rpc.retire_model(request).await;
    reply.map_err(|status| admin.failed(status))?;
    emit(console, output, &Retired { model, revision })
}

#[derive(Debug, Serialize)]
struct Retired {
    model: String,
    revision: String,
}

impl View for Retired {
    fn table(&self) -> String {
        format!(
            "{}@{} is retired; requests that run on it end there\n",
            self.model, self.revision
        )
    }
}

/// Every published model.
async fn all(admin: &mut Admin) -> Result<Vec<PublishedModel>, CtlError> {
    let reply = admin.rpc.list_models(ListPublishedRequest {}).await;
    Ok(reply.map_err(|status| admin.failed(status))?.into_inner().models)
}
