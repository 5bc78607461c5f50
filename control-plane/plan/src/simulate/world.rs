//! The world around a rollout: gateways, workers and requests, in virtual time.

use std::collections::BTreeMap;

use penstock_analysis::power::SplitMix;

use super::{Approve, Assumptions, odds};
use crate::{
    Change, CreateRollout, Ledger, Manifest, Metric, ObservationKey, Observations, OnInsufficient,
    PauseReason, Phase, Ppm, Queued, Rollout, Signal, Tally,
    judge::{MetricVerdict, failure, judge},
    lint::span,
    planner::{self, Decision, GatewayView, Inventory, LIVENESS_MS},
    window,
};

/// Shortest and longest time between two looks at the counts, in milliseconds.
const LOOK_MS: (u64, u64) = (1000, 3_600_000);
/// Transitions at one moment, above which the planner goes round in circles.
const MOST_AT_ONCE: usize = 100;

/// Gateways, workers, requests and one rollout.
pub(super) struct World {
    assumptions: Assumptions,
    /// Milliseconds since the start.
    now: u64,
    rollout: Option<Rollout>,
    /// Uid and generation that the newest epoch carries.
    published: Option<(String, u64)>,
    epoch: u64,
    gateways: Vec<Gateway>,
    ledger: Ledger,
    /// The canary that workers load or serve, and from when they serve it.
    ready: Option<(String, u64)>,
    listening_since: u64,
    /// When the window opens that a rollout waits for; looked for once.
    opens: Option<u64>,
    random: SplitMix,
    rollouts: u32,
    events: Vec<(u64, String)>,
}

struct Gateway {
    view: GatewayView,
    /// The epoch that is on its way to it, and when it arrives.
    coming: Option<(u64, u64)>,
    refuses: bool,
    serves: Option<Split>,
    tallies: BTreeMap<ObservationKey, Tally>,
    sequence: u64,
    /// Part of a request that is yet to come.
    rest: f64,
}

/// What a gateway does with requests.
struct Split {
    share: Ppm,
    stable: ObservationKey,
    canary: ObservationKey,
    metrics: Vec<Metric>,
}

// === impl World ===

impl World {
    pub(super) fn new(assumptions: Assumptions) -> Self {
        let gateway = |index: u32| Gateway {
            view: GatewayView {
                node: format!("g{index}"),
                live: true,
                acknowledged_epoch: 0,
                refused: None,
            },
            coming: None,
            refuses: false,
            serves: None,
            tallies: BTreeMap::new(),
            sequence: 0,
            rest: 0.0,
        };
        Self {
            now: 0,
            rollout: None,
            published: None,
            epoch: 0,
            gateways: (1..=assumptions.gateways).map(gateway).collect(),
            ledger: Ledger::default(),
            ready: None,
            listening_since: 0,
            opens: None,
            random: SplitMix(assumptions.seed),
            rollouts: 0,
            events: Vec::new(),
            assumptions,
        }
    }

    pub(super) const fn rollout(&self) -> Option<&Rollout> {
        self.rollout.as_ref()
    }

    pub(super) fn into_events(self) -> Vec<(u64, String)> {
        self.events
    }

    /// Applies a plan as the control plane does: it begins, changes what is under way, or follows it.
    pub(super) fn apply(&mut self, plan: Manifest) {
        self.rollouts += 1;
        let uid = format!("r-{}", self.rollouts);
        let before = self.rollout.clone();
        let under_way = before.as_ref().filter(|rollout| !rollout.phase.is_final());
        let change = self.change();
        let next = match under_way {
            None => {
                let serving = before.as_ref().map(Rollout::serving_stable);
                let stable = plan.stable.clone().or_else(|| serving.map(str::to_owned));
                let new = CreateRollout {
                    uid,
                    model: plan.model.clone(),
                    stable: stable.unwrap_or_else(|| "stable".into()),
                    canary: plan.canary.revision.clone(),
                    share: Ppm::ZERO,
                    plan,
                };
                Rollout::create(new, before.as_ref(), change).map(|next| (next, "created"))
            }
            Some(rollout) if rollout.canary == plan.canary.revision => {
                rollout.amend(plan, change).map(|next| (next, "updated"))
            }
            Some(rollout) => {
                let queued = Queued {
                    uid,
                    plan,
                    actor: change.actor.clone(),
                    reason: String::new(),
                };
                rollout.follow_by(queued, change)
            }
        };
        match next {
            Ok((next, outcome)) => {
                if outcome == "queued" {
                    self.tell("queued".into());
                }
                self.write(next);
            }
            Err(error) => self.tell(format!("refused: {error}")),
        }
        self.settle();
    }

    /// Lets time pass until so many milliseconds after the start, or until nothing more happens.
    pub(super) fn run_until(&mut self, end: u64) {
        self.settle();
        while let Some(next) = self.next_event().filter(|next| *next <= end) {
            let passed = next - self.now;
            self.now = next;
            self.serve(passed);
            self.settle();
        }
    }

    fn wall_ms(&self) -> u64 {
        self.assumptions.start_ms + self.now
    }

    fn change(&self) -> Change {
        Change {
            actor: "operator".into(),
            now_ms: self.wall_ms(),
            ..Change::default()
        }
    }

    /// Everything that happens at this moment.
    fn settle(&mut self) {
        self.deliver();
        for _ in 0..MOST_AT_ONCE {
            let Some(rollout) = &self.rollout else {
                return;
            };
            let observations = self.observations(rollout);
            let decision = planner::decide(rollout, &self.inventory(rollout), &observations, self.wall_ms());
            match decision {
                Decision::Write(next) => self.write(*next),
                Decision::Wait(_) => match self.approval_due().filter(|due| *due <= self.now) {
                    Some(_) => {
                        let approved = rollout.approve(&self.change());
                        self.tell("approved".into());
                        if let Ok(next) = approved {
                            self.write(next);
                        }
                    }
                    None => return,
                },
            }
            self.deliver();
        }
    }

    fn approval_due(&self) -> Option<u64> {
        let rollout = self.rollout.as_ref()?;
        let asked = rollout
            .pause
            .is_some_and(|pause| pause.why == PauseReason::Approval);
        let since = self.since_start(rollout.phase_since_ms);
        match self.assumptions.approvals {
            Approve::AtOnce if asked => Some(since),
            Approve::After(time) if asked => Some(since + time.as_ms()),
            _ => None,
        }
    }

    /// Writes a plan, publishes it if the route changes, and tells of it.
    fn write(&mut self, next: Rollout) {
        let before = self.rollout.replace(next);
        let Some(rollout) = self.rollout.clone() else {
            return;
        };
        let carried = Some((rollout.uid.clone(), rollout.generation));
        if self.published != carried {
            self.published = carried;
            self.epoch += 1;
            let arrives = self.now + self.assumptions.acknowledge_after.as_ms();
            for gateway in &mut self.gateways {
                gateway.coming = Some((self.epoch, arrives));
            }
        }
        if rollout.phase == Phase::Warming
            && self
                .ready
                .as_ref()
                .is_none_or(|(name, _)| *name != rollout.canary)
        {
            let from = self.now + self.assumptions.worker_ready_after.as_ms();
            self.ready = Some((rollout.canary.clone(), from));
        }
        let waits = rollout.phase == Phase::Pending
            || rollout
                .pause
                .is_some_and(|pause| pause.why == PauseReason::Window);
        self.opens = waits
            .then(|| window::opens(&rollout.plan.windows, self.wall_ms()))
            .flatten();
        let told = |rollout: &Rollout| (rollout.uid.clone(), rollout.phase, rollout.share, rollout.pause);
        if before.as_ref().map(told) != Some(told(&rollout)) {
            let line = self.line(&rollout);
            self.tell(line);
        }
    }

    fn tell(&mut self, line: String) {
        self.events.push((self.now, line));
    }

    /// A transition in one line: the canary and its share, the phase, and why.
    fn line(&self, rollout: &Rollout) -> String {
        let why = match rollout.phase {
            Phase::Pending if window::is_open(&rollout.plan.windows, self.wall_ms()) => "applied".to_owned(),
            Phase::Pending => "waits for its window".to_owned(),
            Phase::Warming => "workers load it".to_owned(),
            Phase::Converging if rollout.by_hand || rollout.plan.steps.is_empty() => "set by hand".to_owned(),
            Phase::Converging => format!("step {} of {}", rollout.step + 1, rollout.plan.steps.len()),
            Phase::Soaking | Phase::Baking => self.left(rollout),
            Phase::Judging => "is judged".to_owned(),
            Phase::Paused => self.pause(rollout),
            Phase::Promoting => "an operator promotes it".to_owned(),
            Phase::Draining => format!("the last requests on {} end", rollout.stable),
            Phase::Succeeded => format!("{} is stable", rollout.canary),
            Phase::Aborting => rollout.cause.clone(),
            Phase::RolledBack => format!("{} serves", rollout.stable),
        };
        format!(
            "{} {:>4} {:<11} {why}",
            rollout.canary, rollout.share, rollout.phase
        )
    }

    fn left(&self, rollout: &Rollout) -> String {
        let end = planner::hold_ends_ms(rollout).unwrap_or_default();
        let left = end.saturating_sub(self.wall_ms()) as f64 / 1000.0;
        format!("holds for {}", span(left))
    }

    fn pause(&self, rollout: &Rollout) -> String {
        let Some(pause) = rollout.pause else {
            return String::new();
        };
        let observations = self.observations(rollout);
        let verdicts = judge(rollout, &observations);
        match pause.why {
            PauseReason::Verdict => format!(
                "verdict: {}",
                failure(&verdicts).map_or_else(String::new, MetricVerdict::cause)
            ),
            PauseReason::Nacked => format!("nacked: {}", rollout.cause),
            why => why.as_str().to_owned(),
        }
    }

    // === gateways and workers ===

    /// What is due arrives at the gateways.
    fn deliver(&mut self) {
        let split = self
            .rollout
            .as_ref()
            .filter(|rollout| rollout.routes_canary())
            .map(|rollout| {
                let key = |revision: &String| ObservationKey {
                    rollout_uid: rollout.uid.clone(),
                    attempt: rollout.attempt,
                    trial: rollout.trial,
                    revision: revision.clone(),
                };
                let metrics = rollout.plan.analysis.metrics.iter();
                (
                    rollout.share,
                    [key(&rollout.stable), key(&rollout.canary)],
                    metrics
                        .filter(|metric| metric.name.is_counted())
                        .cloned()
                        .collect::<Vec<_>>(),
                )
            });
        for gateway in &mut self.gateways {
            let Some((epoch, _)) = gateway
                .coming
                .filter(|(_, due)| *due <= self.now && gateway.view.live)
            else {
                continue;
            };
            gateway.coming = None;
            if gateway.refuses {
                gateway.view.refused = Some((epoch, "no endpoint of the canary".into()));
                continue;
            }
            gateway.view.acknowledged_epoch = epoch;
            gateway.view.refused = None;
            gateway.serves = split.clone().map(|(share, [stable, canary], metrics)| Split {
                share,
                stable,
                canary,
                metrics,
            });
        }
    }

    fn inventory(&self, rollout: &Rollout) -> Inventory {
        let carried = (rollout.uid.clone(), rollout.generation);
        let ready = self
            .ready
            .as_ref()
            .is_some_and(|(name, from)| *name == rollout.canary && *from <= self.now);
        Inventory {
            published_epoch: (self.published == Some(carried)).then_some(self.epoch),
            gateways: self.gateways.iter().map(|gateway| gateway.view.clone()).collect(),
            listening_since_ms: self.assumptions.start_ms + self.listening_since,
            canary_ready: if ready { u32::MAX } else { 0 },
            not_ready: String::new(),
            old_in_flight: 0,
        }
    }

    // === requests ===

    /// Requests come for so many milliseconds.
    fn serve(&mut self, passed: u64) {
        let gateways = self.gateways.len().max(1) as f64;
        let each = self.assumptions.requests_per_second * passed as f64 / 1000.0 / gateways;
        for gateway in &mut self.gateways {
            let Some(split) = gateway.serves.as_ref().filter(|_| each > 0.0) else {
                continue;
            };
            let whole = (each + gateway.rest).floor();
            gateway.rest = each + gateway.rest - whole;
            let of_canary = self.random.binomial(whole as u64, split.share.fraction());
            let sides = [
                (&split.stable, whole as u64 - of_canary, false),
                (&split.canary, of_canary, true),
            ];
            for (key, requests, canary) in sides {
                let tally = gateway.tallies.entry(key.clone()).or_default();
                tally.requests += requests;
                for metric in &split.metrics {
                    let rate = rate(metric, canary, &self.assumptions);
                    let bad = self.random.binomial(requests, rate);
                    let counts = &mut tally.metrics.entry(metric.name.to_string()).or_default()[0];
                    counts.n += requests;
                    counts.bad += bad;
                }
            }
            let present = &split.canary;
            let present = |key: &ObservationKey| {
                (&key.rollout_uid, key.attempt, key.trial)
                    == (&present.rollout_uid, present.attempt, present.trial)
            };
            gateway.tallies.retain(|key, _| present(key));
            gateway.sequence += 1;
            self.ledger
                .hear(&gateway.view.node, gateway.sequence, gateway.tallies.clone());
        }
    }

    fn observations(&self, rollout: &Rollout) -> Observations {
        let [stable, canary] = [&rollout.stable, &rollout.canary].map(|revision| ObservationKey {
            rollout_uid: rollout.uid.clone(),
            attempt: rollout.attempt,
            trial: rollout.trial,
            revision: revision.clone(),
        });
        Observations {
            stable: self.ledger.total(&stable),
            canary: self.ledger.total(&canary),
            boots: self.ledger.sides(&stable, &canary),
            ..Observations::default()
        }
    }

    // === time ===

    fn since_start(&self, wall_ms: u64) -> u64 {
        wall_ms.saturating_sub(self.assumptions.start_ms)
    }

    /// When something happens next that may change a decision; `None` where nothing does by itself.
    fn next_event(&self) -> Option<u64> {
        let rollout = self.rollout.as_ref()?;
        let arrivals = self
            .gateways
            .iter()
            .filter(|gateway| gateway.view.live)
            .filter_map(|gateway| gateway.coming.map(|(_, due)| due));
        let ready = self.ready.as_ref().map(|(_, from)| *from);
        let came_back = matches!(rollout.phase, Phase::Aborting | Phase::Draining)
            .then(|| self.listening_since + LIVENESS_MS);
        let opens = self.opens.map(|at| self.since_start(at));
        let times = arrivals
            .chain(ready)
            .chain(came_back)
            .chain(opens)
            .chain(self.approval_due())
            .chain(self.limits(rollout))
            .chain(self.look(rollout));
        times.filter(|at| *at > self.now).min()
    }

    /// When the present phase has lasted as long as the plan lets it.
    fn limits(&self, rollout: &Rollout) -> Vec<u64> {
        let since = self.since_start(rollout.phase_since_ms);
        let plan = &rollout.plan;
        let mut times: Vec<u64> = planner::hold_ends_ms(rollout)
            .map(|end| self.since_start(end))
            .into_iter()
            .collect();
        match rollout.phase {
            Phase::Paused => times.extend(plan.pause_limit().map(|limit| since + limit.as_ms())),
            Phase::Judging if plan.analysis.on_insufficient == OnInsufficient::Extend => {
                let hold = rollout.current_step().map_or(0, |step| step.stays().as_ms());
                let longest = (hold as f64 * plan.analysis.extend_limit) as u64;
                times.push(since + longest.max(1000));
            }
            _ => times.extend(plan.unacknowledged.proceed_after.map(|time| since + time.as_ms())),
        }
        times
    }

    /// When the counts are looked at next: often when a phase is young, by the hour when it is old.
    fn look(&self, rollout: &Rollout) -> Option<u64> {
        let observed = !rollout.plan.analysis.metrics.is_empty()
            && self.assumptions.requests_per_second > 0.0
            && self.gateways.iter().any(|gateway| gateway.serves.is_some());
        let age = self.now - self.since_start(rollout.phase_since_ms).min(self.now);
        let (shortest, longest) = LOOK_MS;
        (observed && rollout.routes_canary()).then(|| self.now + (age / 20).clamp(shortest, longest))
    }
}

/// Rate of bad events of a side. What is assumed is told of errors; by other metrics both sides are alike.
fn rate(metric: &Metric, canary: bool, assumptions: &Assumptions) -> f64 {
    match metric.name {
        Signal::ErrorRate if canary => assumptions.canary_error_rate,
        _ => odds::stable_rate(metric, assumptions),
    }
}

#[cfg(test)]
pub(super) mod script;
