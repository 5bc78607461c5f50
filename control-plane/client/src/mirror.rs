//! What a node serves, and how it answers each push. No I/O: a push goes in, answers come out.

use std::{collections::HashSet, sync::Arc};

use penstock_plan::{Canary, Endpoint, EndpointSet, Route, Snapshot};
use penstock_proto::v1::{self, node_message::Message, push::Resource};
use tokio::sync::watch;

use crate::{ApplyFn, Candidate, Veto, View, vanished::Vanished};

/// The node's copy of what was pushed.
pub(crate) struct Mirror {
    view: watch::Sender<Arc<View>>,
    apply: ApplyFn,
    /// Digest of the snapshot in the view; empty without one.
    digest: String,
    vetoed: Option<Pushed>,
    /// Workers of canaries that answered when they were asked last.
    reached: HashSet<String>,
    /// Present where workers can be asked whether they answer.
    vanished: Option<Vanished>,
}

/// Workers to ask before a snapshot is offered, and how many of them have to answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) endpoints: Vec<Endpoint>,
    pub(crate) least: usize,
}

/// A snapshot that is in order, and the push that brought it.
struct Pushed {
    nonce: u64,
    snapshot: Arc<Snapshot>,
    digest: String,
    traceparent: String,
}

// === impl Mirror ===

impl Mirror {
    /// Starts from what the node serves already.
    pub(crate) fn new(initial: View, apply: ApplyFn) -> Self {
        let digest = initial
            .snapshot
            .as_ref()
            .map(|snapshot| snapshot.digest())
            .unwrap_or_default();
        let view = watch::Sender::new(Arc::new(View {
            connected: false,
            ..initial
        }));
        Self {
            view,
            apply,
            digest,
            vetoed: None,
            reached: HashSet::new(),
            vanished: None,
        }
    }

    /// With `guarded`, workers that vanish with many others are kept until they do not answer.
    pub(crate) fn guarded(self, guarded: bool) -> Self {
        Self {
            vanished: guarded.then(Vanished::default),
            ..self
        }
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Arc<View>> {
        self.view.subscribe()
    }

    /// What a new stream is told of the node's state: epoch, digest and version of the endpoints.
    pub(crate) fn applied(&self) -> (u64, String, u64) {
        let view = self.view.borrow();
        let epoch = view.snapshot.as_ref().map_or(0, |snapshot| snapshot.epoch);
        (epoch, self.digest.clone(), view.endpoints.version)
    }

    /// Says whether a control plane is there. Returns what was said before.
    pub(crate) fn set_connected(&mut self, connected: bool) -> bool {
        let before = self.view.borrow().connected;
        if before != connected {
            self.change(|view| view.connected = connected);
        }
        if !connected {
            // Its nonce belongs to the stream that is gone; the next one brings it again.
            self.vetoed = None;
        }
        before
    }

    /// Whom to ask before this push is handled.
    pub(crate) fn wanted(&self, push: &v1::Push) -> Vec<Wanted> {
        let known = || self.view.borrow().endpoints.clone();
        match &push.resource {
            // A snapshot that cannot be read is refused whoever answers; one that wants nobody need not be read twice.
            Some(Resource::Snapshot(wire)) if wants_any(wire) => Snapshot::try_from(wire.clone())
                .map(|snapshot| wanted(&snapshot, &known().endpoints))
                .unwrap_or_default(),
            Some(Resource::Endpoints(wire)) if self.vetoed.is_some() => {
                self.still_wanted(&EndpointSet::from(wire.clone()))
            }
            _ => Vec::new(),
        }
    }

    /// Whom to ask before the snapshot that was refused is offered again, with the workers known now.
    pub(crate) fn wanted_again(&self) -> Vec<Wanted> {
        let known = self.view.borrow().endpoints.clone();
        self.still_wanted(&known)
    }

    fn still_wanted(&self, known: &EndpointSet) -> Vec<Wanted> {
        let vetoed = self.vetoed.iter();
        vetoed
            .flat_map(|vetoed| wanted(&vetoed.snapshot, &known.endpoints))
            .collect()
    }

    /// These answered. Returns whether that is news.
    pub(crate) fn set_reached(&mut self, reached: HashSet<String>) -> bool {
        std::mem::replace(&mut self.reached, reached) != self.reached
    }

    /// Offers the snapshot that was refused once more: a late Ack, if it is applied now.
    pub(crate) fn again(&mut self) -> Option<v1::NodeMessage> {
        let vetoed = self.vetoed.take()?;
        match self.offer(&vetoed) {
            Ok(()) => Some(self.ack(vetoed.nonce)),
            // Refused again; the control plane knows already.
            Err(_) => {
                self.vetoed = Some(vetoed);
                None
            }
        }
    }

    /// Workers that were kept although they vanished, to be asked whether they answer.
    pub(crate) fn kept(&self) -> Vec<Endpoint> {
        let view = self.view.borrow();
        let kept = |endpoint: &&Endpoint| self.vanished.as_ref().is_some_and(|v| v.keeps(&endpoint.id));
        view.endpoints.endpoints.iter().filter(kept).cloned().collect()
    }

    /// A worker that vanished was asked; one that does not answer is dropped.
    pub(crate) fn answered(&mut self, id: &str, answers: bool) {
        let gone = |vanished: &mut Vanished| vanished.answered(id, answers);
        if self.vanished.as_mut().is_some_and(gone) {
            tracing::info!(
                worker = id,
                "a worker that vanished does not answer and is dropped"
            );
            self.change(|view| {
                let mut endpoints = EndpointSet::clone(&view.endpoints);
                endpoints.endpoints.retain(|endpoint| endpoint.id != id);
                view.endpoints = Arc::new(endpoints);
            });
        }
    }

    /// Takes a push over or refuses it. The first answer is to the push; a second one is the late Ack of a
    /// snapshot that was refused before and that the new endpoints have made possible.
    pub(crate) fn handle(&mut self, push: v1::Push) -> Vec<v1::NodeMessage> {
        let v1::Push {
            nonce,
            resource,
            traceparent,
        } = push;
        match resource {
            Some(Resource::Snapshot(wire)) => vec![self.snapshot(nonce, wire, traceparent)],
            Some(Resource::Endpoints(wire)) => self.endpoints(nonce, wire.into()),
            // Nothing to take over; the answer says what is served, whatever the heartbeat hoped for.
            Some(Resource::Heartbeat(_)) => vec![self.ack(nonce)],
            // A placement is for workers.
            Some(Resource::Placement(_)) | None => {
                let why = "this node does not know the resource; it is older than the control plane";
                vec![nack(
                    nonce,
                    0,
                    refusal("unknown_resource", "resource", why.into()),
                )]
            }
        }
    }

    fn snapshot(&mut self, nonce: u64, wire: v1::Snapshot, traceparent: String) -> v1::NodeMessage {
        let epoch = wire.epoch;
        // Whatever was refused before is out of date now.
        self.vetoed = None;
        if !self.digest.is_empty() && wire.digest == self.digest {
            return self.ack(nonce);
        }
        let pushed = match self.check(wire) {
            Ok((snapshot, digest)) => Pushed {
                nonce,
                snapshot,
                digest,
                traceparent,
            },
            Err(reason) => {
                // A veto is the node's own, which knows best what to say of it; nobody else hears of these.
                tracing::warn!(
                    epoch,
                    code = reason.code,
                    field = reason.field,
                    "refused a snapshot: {}",
                    reason.message
                );
                return nack(nonce, epoch, reason);
            }
        };
        match self.offer(&pushed) {
            Ok(()) => self.ack(nonce),
            Err(veto) => {
                self.vetoed = Some(pushed);
                nack(nonce, epoch, veto)
            }
        }
    }

    /// Reads a snapshot and checks everything that needs no knowledge of the world.
    fn check(&self, wire: v1::Snapshot) -> Result<(Arc<Snapshot>, String), Veto> {
        let claimed = wire.digest.clone();
        let snapshot = Snapshot::try_from(wire)
            .map_err(|error| refusal("invalid_route", &error.field, error.message))?;
        let digest = snapshot.digest();
        if digest != claimed {
            let why = format!("the snapshot's digest is {digest}, the push says {claimed:?}");
            return Err(refusal("digest_mismatch", "digest", why));
        }
        let (applied, ..) = self.applied();
        if !self.digest.is_empty() && snapshot.epoch <= applied {
            let why = format!(
                "epoch {} is not above epoch {applied}, which is in force",
                snapshot.epoch
            );
            return Err(refusal("stale_epoch", "epoch", why));
        }
        snapshot
            .validate()
            .map_err(|error| refusal(error.code, &error.field, error.message))?;
        Ok((Arc::new(snapshot), digest))
    }

    /// Has the node apply a snapshot, and shows it if it did.
    fn offer(&mut self, pushed: &Pushed) -> Result<(), Veto> {
        let endpoints = self.view.borrow().endpoints.clone();
        let traceparent = Some(pushed.traceparent.as_str()).filter(|text| !text.is_empty());
        (self.apply)(Candidate {
            snapshot: &pushed.snapshot,
            endpoints: &endpoints,
            reached: &self.reached,
            traceparent,
        })?;
        self.digest.clone_from(&pushed.digest);
        let snapshot = pushed.snapshot.clone();
        self.change(|view| view.snapshot = Some(snapshot));
        Ok(())
    }

    fn endpoints(&mut self, nonce: u64, endpoints: EndpointSet) -> Vec<v1::NodeMessage> {
        let version = endpoints.version;
        let before = self.view.borrow().endpoints.clone();
        let endpoints = match &mut self.vanished {
            Some(vanished) => vanished.admit(&before, endpoints),
            None => endpoints,
        };
        if *self.view.borrow().endpoints != endpoints {
            self.change(|view| view.endpoints = Arc::new(endpoints));
        }
        let applied = v1::ack::Applied::Endpoints(v1::AppliedEndpoints { version });
        let mut answers = vec![message(Message::Ack(v1::Ack {
            nonce,
            applied: Some(applied),
        }))];
        answers.extend(self.again());
        answers
    }

    fn change(&self, change: impl FnOnce(&mut View)) {
        self.view.send_modify(|view| {
            let mut next = View::clone(view);
            change(&mut next);
            *view = Arc::new(next);
        });
    }

    /// Says which snapshot is in force.
    fn ack(&self, nonce: u64) -> v1::NodeMessage {
        let (epoch, digest, _) = self.applied();
        let applied =
            (!digest.is_empty()).then_some(v1::ack::Applied::Snapshot(v1::AppliedSnapshot { epoch, digest }));
        message(Message::Ack(v1::Ack { nonce, applied }))
    }
}

/// Whether any canary wants a number of workers.
fn wants_any(wire: &v1::Snapshot) -> bool {
    let mut canaries = wire.routes.iter().filter_map(|route| route.canary.as_ref());
    canaries.any(|canary| canary.min_ready > 0)
}

/// The workers of each canary whose route wants a number of them.
fn wanted(snapshot: &Snapshot, known: &[Endpoint]) -> Vec<Wanted> {
    let wants = |route: &Route, canary: &Canary| {
        let revision = &canary.revision;
        let serves = |endpoint: &&Endpoint| endpoint.serves(&route.model, &revision.name, &revision.digest);
        Wanted {
            endpoints: known.iter().filter(serves).cloned().collect(),
            least: canary.min_ready as usize,
        }
    };
    let routes = snapshot.routes.values();
    let canaries = routes.filter_map(|route| Some((route, route.canary.as_ref()?)));
    canaries
        .filter(|(_, canary)| canary.min_ready > 0)
        .map(|(route, canary)| wants(route, canary))
        .collect()
}

fn nack(nonce: u64, epoch: u64, veto: Veto) -> v1::NodeMessage {
    let Veto {
        code,
        field,
        message: text,
    } = veto;
    message(Message::Nack(v1::Nack {
        nonce,
        epoch,
        code,
        field,
        message: text,
    }))
}

fn refusal(code: &str, field: &str, message: String) -> Veto {
    Veto {
        code: code.to_owned(),
        field: field.to_owned(),
        message,
    }
}

/// Wraps what a node says.
pub(crate) fn message(message: Message) -> v1::NodeMessage {
    v1::NodeMessage {
        message: Some(message),
    }
}

#[cfg(test)]
mod tests;
