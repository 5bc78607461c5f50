use proptest::prelude::*;

use super::*;
use crate::{
    Attributes, CreateRollout, Manifest, Ppm, Published, PublishedRevision, Reason, Snapshot, Span, Sticky,
    assign, build_routes,
};

const NOW_MS: u64 = 1_000_000;

fn rollout() -> Rollout {
    let new = CreateRollout {
        uid: "r-1".into(),
        model: "demo".into(),
        stable: "v1".into(),
        canary: "v2".into(),
        share: Ppm::ZERO,
        plan: Manifest::manual("demo", "v2", &Sticky::default()),
    };
    Rollout::create(
        new,
        None,
        Change {
            actor: "ada".into(),
            ..Change::default()
        },
    )
    .unwrap()
}

fn gateway(node: &str, acknowledged_epoch: u64) -> GatewayView {
    GatewayView {
        node: node.into(),
        live: true,
        acknowledged_epoch,
        refused: None,
    }
}

fn inventory(gateways: &[GatewayView]) -> Inventory {
    Inventory {
        published_epoch: Some(7),
        gateways: gateways.to_vec(),
        listening_since_ms: 0,
        ..Inventory::default()
    }
}

fn next(phase: Phase, inventory: &Inventory) -> Result<(Phase, u64), String> {
    match decide(
        &rollout().in_phase(phase, NOW_MS),
        inventory,
        &Observations::default(),
        NOW_MS,
    ) {
        Decision::Write(next) => Ok((next.phase, next.generation)),
        Decision::Wait(why) => Err(why),
    }
}

#[test]
fn every_phase_under_way_goes_on_once_all_live_gateways_have_acknowledged() {
    let inventory = inventory(&[gateway("a", 7), gateway("b", 9)]);
    assert_eq!(next(Phase::Converging, &inventory), Ok((Phase::Paused, 1)));
    assert_eq!(next(Phase::Aborting, &inventory), Ok((Phase::RolledBack, 1)));
    // The route changes once more, so the generation does.
    assert_eq!(next(Phase::Promoting, &inventory), Ok((Phase::Draining, 2)));
    assert_eq!(next(Phase::Draining, &inventory), Ok((Phase::Succeeded, 1)));
}

#[test]
fn a_promotion_stays_the_operators_and_keeps_its_trace() {
    let change = Change {
        actor: "bob".into(),
        reason: "good".into(),
        now_ms: 5,
        traceparent: "00-a-b-01".into(),
    };
    let promoting = rollout().promote(change).unwrap();
    let Decision::Write(next) = decide(
        &promoting,
        &inventory(&[gateway("a", 7)]),
        &Observations::default(),
        NOW_MS,
    ) else {
        panic!()
    };
    assert_eq!(
        (
            next.actor.as_str(),
            next.reason.as_str(),
            next.traceparent.as_str()
        ),
        ("bob", "good", "00-a-b-01")
    );
    assert_eq!((next.parent, next.updated_ms), (Some(2), NOW_MS));
}

#[test]
fn it_waits_for_gateways_by_name_and_epoch() {
    let inventory = inventory(&[gateway("a", 7), gateway("b", 6), gateway("c", 0)]);
    for phase in [Phase::Converging, Phase::Promoting, Phase::Aborting] {
        assert_eq!(
            next(phase, &inventory),
            Err("waiting for b, c to acknowledge epoch 7".into())
        );
    }
}

#[test]
fn a_plan_may_go_on_without_gateways_that_do_not_answer_but_not_without_those_that_refuse() {
    let mut waiting = rollout().in_phase(Phase::Converging, NOW_MS);
    waiting.plan.unacknowledged.proceed_after = Some(Span::from_secs(30));
    let after = |seconds: u64, gateways: &[GatewayView]| {
        let now_ms = NOW_MS + seconds * 1000;
        match decide(&waiting, &inventory(gateways), &Observations::default(), now_ms) {
            Decision::Write(next) => Ok((next.phase, next.pause.map(|pause| pause.why))),
            Decision::Wait(why) => Err(why),
        }
    };
    let silent = [gateway("a", 7), gateway("b", 6)];
    assert_eq!(
        after(29, &silent),
        Err("waiting for b to acknowledge epoch 7".into())
    );
    // By hand: it stays at its share until somebody sets another.
    assert_eq!(after(30, &silent), Ok((Phase::Paused, Some(PauseReason::Manual))));
    let refusing = GatewayView {
        refused: Some((7, "canary_unreachable: no v2".into())),
        ..gateway("b", 6)
    };
    let refused = after(30, &[gateway("a", 7), refusing]);
    assert_eq!(refused, Ok((Phase::Paused, Some(PauseReason::Nacked))));
}

#[test]
fn nothing_has_converged_before_it_is_published() {
    let inventory = Inventory {
        published_epoch: None,
        ..inventory(&[gateway("a", 9)])
    };
    assert_eq!(
        next(Phase::Converging, &inventory),
        Err("waiting for its snapshot to be published".into())
    );
    assert_eq!(
        (converge(&inventory).acknowledged, converge(&inventory).live),
        (0, 1)
    );
}

#[test]
fn a_lost_gateway_holds_nothing_up() {
    let lost = GatewayView {
        live: false,
        ..gateway("b", 3)
    };
    assert_eq!(
        next(Phase::Converging, &inventory(&[gateway("a", 7), lost])),
        Ok((Phase::Paused, 1))
    );
}

#[test]
fn a_refusal_is_reported_and_holds_the_rollout() {
    let refusing = |epoch| GatewayView {
        refused: Some((epoch, "no endpoint of v2".into())),
        ..gateway("b", 6)
    };
    let held = next(Phase::Promoting, &inventory(&[gateway("a", 7), refusing(7)]));
    assert_eq!(held, Err("b refused epoch 7: no endpoint of v2".into()));
    // An older refusal was about another plan.
    let waits = next(Phase::Promoting, &inventory(&[gateway("a", 7), refusing(5)]));
    assert_eq!(waits, Err("waiting for b to acknowledge epoch 7".into()));
}

#[test]
fn an_abort_is_not_over_before_gateways_had_time_to_come_back() {
    let started = Inventory {
        listening_since_ms: NOW_MS - LIVENESS_MS + 1,
        ..inventory(&[])
    };
    let waits = "waiting for gateways to come back after a start of the control plane";
    assert_eq!(next(Phase::Aborting, &started), Err(waits.into()));
    // Nor is a promotion, as long as no gateway is back: workers give up the old revision then.
    assert_eq!(next(Phase::Draining, &started), Err(waits.into()));
    let back = Inventory {
        gateways: vec![gateway("a", 7)],
        ..started.clone()
    };
    assert_eq!(next(Phase::Draining, &back), Ok((Phase::Succeeded, 1)));
    assert_eq!(next(Phase::Aborting, &back), Err(waits.into()));
    let later = Inventory {
        listening_since_ms: NOW_MS - LIVENESS_MS,
        ..inventory(&[])
    };
    assert_eq!(next(Phase::Aborting, &later), Ok((Phase::RolledBack, 1)));
}

#[test]
fn what_is_over_or_paused_stays_as_it_is() {
    let inventory = inventory(&[gateway("a", 7)]);
    assert_eq!(
        next(Phase::Paused, &inventory),
        Err("holds its share until an operator changes it".into())
    );
    assert_eq!(next(Phase::Succeeded, &inventory), Err("v2 is stable".into()));
    assert_eq!(next(Phase::RolledBack, &inventory), Err("v1 serves".into()));
}

/// A rollout in its first step's hold, judged by these metrics, with 1000 requests on both sides.
fn soaking(metrics: &str, bad: u64) -> (Rollout, Observations) {
    let text = format!(
        "{{kind: Rollout, model: demo, canary: {{revision: v2}}, steps: [{{canary: 10%}}, {{canary: 50%}}], \
         analysis: {{metrics: {metrics}}}}}"
    );
    let (plan, _) = crate::parse::parse(&text).unwrap();
    let rollout = Rollout {
        phase: Phase::Soaking,
        share: plan.steps[0].canary.0,
        plan,
        ..rollout()
    };
    let tally = |bad| {
        let mut tally = crate::Tally {
            requests: 1000,
            ..crate::Tally::default()
        };
        let counts = penstock_analysis::Counts { n: 1000, bad };
        tally.metrics.entry("error_rate".into()).or_default()[0] = counts;
        tally
    };
    let observations = Observations {
        stable: tally(0),
        canary: tally(bad),
        boots: vec![[tally(0), tally(bad)]],
        ..Observations::default()
    };
    (rollout, observations)
}

#[test]
fn an_excused_metric_carries_no_other_one_along() {
    let inventory = inventory(&[gateway("a", 7)]);
    let next = |metrics: &str| {
        let (rollout, observations) = soaking(metrics, 100);
        let excused = Rollout {
            excused: Some(rollout.trial),
            ..rollout
        };
        match decide(&excused, &inventory, &observations, NOW_MS) {
            Decision::Write(next) => (next.phase, next.share.to_string()),
            Decision::Wait(why) => panic!("{why}"),
        }
    };
    let failed = "{name: error_rate, max: 1%, action: pause}";
    assert_eq!(next(&format!("[{failed}]")), (Phase::Converging, "50%".into()));
    let unseen = "{name: watch_words, max: 1%}";
    assert_eq!(
        next(&format!("[{failed}, {unseen}]")),
        (Phase::Judging, "10%".into())
    );
}

#[test]
fn a_retry_forgets_what_an_operator_excused() {
    let aborted = Rollout {
        excused: Some(0),
        ..rollout().in_phase(Phase::RolledBack, NOW_MS)
    };
    let again = aborted.retry(Change::default()).unwrap();
    assert_eq!((again.trial, again.excused), (0, None));
}

#[test]
fn a_canary_that_is_stable_already_is_not_superseded() {
    let mut draining = rollout().in_phase(Phase::Draining, NOW_MS);
    draining.plan.on_new = crate::OnNew::Supersede;
    let queued = crate::Queued {
        uid: "r-2".into(),
        plan: Manifest::manual("demo", "v3", &Sticky::default()),
        actor: String::new(),
        reason: String::new(),
    };
    let (next, outcome) = draining.follow_by(queued, Change::default()).unwrap();
    assert_eq!((next.phase, outcome), (Phase::Draining, "queued"));
    let done = next.in_phase(Phase::Succeeded, NOW_MS);
    let Decision::Write(follower) = decide(&done, &inventory(&[]), &Observations::default(), NOW_MS) else {
        panic!()
    };
    assert_eq!((follower.stable.as_str(), follower.canary.as_str()), ("v2", "v3"));
}

/// A control plane and its gateways, reduced to what the planner depends on.
struct World {
    rollout: Option<Rollout>,
    snapshot: Snapshot,
    published_epoch: Option<u64>,
    gateways: Vec<GatewayView>,
    rollouts: u32,
}

#[derive(Debug, Clone)]
enum Operation {
    Create(u8),
    Set(u32),
    Promote,
    Abort,
    /// This gateway acknowledges what is published.
    Acknowledge(usize),
    /// This gateway comes or goes.
    Toggle(usize),
    Decide,
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        (0..4u8).prop_map(Operation::Create),
        (0..=1_000_000u32).prop_map(Operation::Set),
        Just(Operation::Promote),
        Just(Operation::Abort),
        (0..3usize).prop_map(Operation::Acknowledge),
        (0..3usize).prop_map(Operation::Acknowledge),
        (0..3usize).prop_map(Operation::Toggle),
        Just(Operation::Decide),
        Just(Operation::Decide),
    ]
}

impl World {
    fn new() -> Self {
        let gateways = ["a", "b", "c"].map(|node| gateway(node, 0)).to_vec();
        let mut world = Self {
            rollout: None,
            snapshot: Snapshot::default(),
            published_epoch: None,
            gateways,
            rollouts: 0,
        };
        world.publish();
        world
    }

    fn published() -> Published {
        let revision = |name: &str| PublishedRevision {
            model: "demo".into(),
            revision: name.into(),
            digest: format!("digest-{name}"),
            published_ms: 0,
            ..PublishedRevision::default()
        };
        Published::from([("demo".into(), ["v0", "v1", "v2", "v3"].map(revision).to_vec())])
    }

    fn publish(&mut self) {
        let routes = build_routes(self.rollout.as_slice(), &Self::published());
        if routes != self.snapshot.routes {
            self.snapshot = Snapshot {
                epoch: self.snapshot.epoch + 1,
                routes,
            };
        }
    }

    /// Writes a plan, as whoever wins the compare-and-swap does.
    fn write(&mut self, next: Rollout) {
        let before = self
            .rollout
            .as_ref()
            .map(|before| (before.uid.clone(), before.generation));
        let replanned = before != Some((next.uid.clone(), next.generation));
        self.rollout = Some(next);
        self.publish();
        if replanned {
            self.published_epoch = Some(self.snapshot.epoch);
        }
    }

    fn inventory(&self) -> Inventory {
        Inventory {
            published_epoch: self.published_epoch,
            gateways: self.gateways.clone(),
            listening_since_ms: 0,
            ..Inventory::default()
        }
    }

    fn run(&mut self, operation: &Operation) {
        let change = Change::default();
        let next = match (operation, &self.rollout) {
            (Operation::Create(canary), previous) => {
                self.rollouts += 1;
                let new = CreateRollout {
                    uid: format!("r-{}", self.rollouts),
                    model: "demo".into(),
                    stable: previous.as_ref().map_or("v0", Rollout::serving_stable).into(),
                    canary: format!("v{canary}"),
                    share: Ppm::ZERO,
                    plan: Manifest::manual("demo", "v2", &Sticky::default()),
                };
                Rollout::create(new, previous.as_ref(), change).ok()
            }
            (Operation::Set(ppm), Some(rollout)) => rollout.set(Ppm::new(*ppm).unwrap(), change).ok(),
            (Operation::Promote, Some(rollout)) => rollout.promote(change).ok(),
            (Operation::Abort, Some(rollout)) => rollout.abort("", change).ok(),
            (Operation::Decide, Some(rollout)) => {
                match decide(rollout, &self.inventory(), &Observations::default(), NOW_MS) {
                    Decision::Write(next) => Some(*next),
                    Decision::Wait(_) => None,
                }
            }
            (Operation::Acknowledge(at), _) => {
                self.gateways[*at].acknowledged_epoch = self.snapshot.epoch;
                None
            }
            (Operation::Toggle(at), _) => {
                self.gateways[*at].live ^= true;
                None
            }
            _ => None,
        };
        if let Some(next) = next {
            self.write(next);
        }
    }

    fn serving(&self) -> String {
        self.snapshot.routes["demo"].stable.name.clone()
    }
}

/// What has to hold after every operation.
fn check(world: &World, before: &World, operation: &Operation) {
    let route = &world.snapshot.routes["demo"];
    world.snapshot.validate().unwrap();
    assert!(world.snapshot.epoch >= before.snapshot.epoch);
    assert_eq!(
        world.snapshot == before.snapshot,
        world.snapshot.epoch == before.snapshot.epoch
    );

    // Which revision is stable changes by promotion alone, and by an abort before its end.
    let promoted = matches!((&before.rollout, &world.rollout), (Some(from), Some(to))
        if (from.phase, to.phase) == (Phase::Promoting, Phase::Draining)
            || (from.phase, to.phase) == (Phase::Draining, Phase::Aborting));
    assert!(
        promoted || world.serving() == before.serving(),
        "{operation:?} changed stable"
    );

    let (Some(from), Some(to)) = (&before.rollout, &world.rollout) else {
        return;
    };
    if from.uid == to.uid {
        let step = to.generation - from.generation;
        assert!(step <= 1, "{operation:?} skipped a generation");
        assert!(step == 0 || to.parent == Some(from.generation));
        // Whoever counts generations misses no change of the route.
        assert!(step == 1 || route == &before.snapshot.routes["demo"]);
    }
    if from.phase != to.phase && matches!(to.phase, Phase::Paused | Phase::Succeeded | Phase::RolledBack) {
        let live = before.gateways.iter().filter(|gateway| gateway.live);
        let published = before.published_epoch.unwrap();
        assert!(
            live.clone()
                .all(|gateway| gateway.acknowledged_epoch >= published),
            "{operation:?} went ahead"
        );
    }
    if matches!(to.phase, Phase::Aborting | Phase::RolledBack) {
        let lookup = |_: &str| Some("ada");
        let pinned = assign(
            route,
            &Attributes {
                pin: Some(&to.canary),
                ..Attributes::new(&lookup)
            },
            0,
        )
        .unwrap();
        assert_eq!(
            (pinned.reason, &pinned.revision.name),
            (Reason::PinRevoked, &to.stable)
        );
        assert!(route.revisions().all(|revision| revision.name != to.canary));
    }
}

proptest! {
    #[test]
    fn no_script_of_operations_breaks_a_promise(script in proptest::collection::vec(operation(), 1..60)) {
        let mut world = World::new();
        for operation in &script {
            let before = World {
                rollout: world.rollout.clone(),
                snapshot: world.snapshot.clone(),
                gateways: world.gateways.clone(),
                ..world
            };
            world.run(operation);
            check(&world, &before, operation);
        }
    }
}
