//! Simulations by script: one line for each thing that happens, `at TIME WHAT`.

use super::*;
use crate::{RolloutError, Span, parse::parse};

/// Runs a script to its last line and then until nothing more happens, but for a day at most after an `end` line.
/// Gives what happened, a line for each transition.
pub(in crate::simulate) fn run(assumptions: Assumptions, plans: &[(&str, &str)], script: &str) -> String {
    let mut world = World::new(assumptions);
    let mut ended = false;
    for line in script.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let (time, what) = line.strip_prefix("at ").unwrap().split_once(' ').unwrap();
        world.wait_until(time.parse::<Span>().unwrap().as_ms());
        ended = what == "end";
        if !ended {
            world.happens(what, plans);
        }
    }
    if !ended {
        let horizon = world.assumptions.horizon.as_ms();
        world.run_until(horizon);
    }
    let lines = world.events.iter();
    let lines = lines.map(|(at, event)| format!("{} {}\n", crate::simulate::moment(*at), event.trim_end()));
    lines.collect()
}

impl World {
    fn happens(&mut self, what: &str, plans: &[(&str, &str)]) {
        let words: Vec<&str> = what.split(' ').collect();
        match words[..] {
            ["apply", name] => {
                let (_, text) = plans.iter().find(|(one, _)| *one == name).unwrap();
                self.apply(parse(text).unwrap().0);
            }
            ["approve"] => self.operate(|rollout, change| rollout.approve(&change)),
            ["pause"] => self.operate(|rollout, change| rollout.pause(&change)),
            ["resume"] => self.operate(Rollout::resume),
            ["retry"] => self.operate(Rollout::retry),
            ["promote"] => self.operate(Rollout::promote),
            ["abort"] => self.operate(|rollout, change| rollout.abort("", change)),
            ["step"] => self.operate(|rollout, change| rollout.step_to(None, change)),
            ["set", share] => self.operate(|rollout, change| rollout.set(share.parse().unwrap(), change)),
            ["restart", "controller"] => self.restart(),
            ["gateway", name, doing] => self.gateway(name, doing),
            ["error-rate", "canary", rate] => self.assumptions.canary_error_rate = percent(rate),
            ["error-rate", "stable", rate] => self.assumptions.stable_error_rate = percent(rate),
            ["traffic", rate] => self.assumptions.requests_per_second = rate.parse().unwrap(),
            _ => panic!("{what:?} is nothing that happens"),
        }
        self.settle();
    }

    /// Does to the rollout what an operator may do.
    fn operate(&mut self, operation: impl FnOnce(&Rollout, Change) -> Result<Rollout, RolloutError>) {
        let change = self.change();
        match self.rollout.as_ref().map(|rollout| operation(rollout, change)) {
            Some(Ok(next)) => self.write(next),
            Some(Err(error)) => self.tell(format!("refused: {error}")),
            None => self.tell("refused: there is no rollout".into()),
        }
    }

    /// Another control plane takes over: what it knows it read from the store, and gateways tell it the rest.
    fn restart(&mut self) {
        let stored = serde_json::to_string(&(&self.rollout, &self.ledger)).unwrap();
        (self.rollout, self.ledger) = serde_json::from_str(&stored).unwrap();
        self.listening_since = self.now;
        for gateway in &mut self.gateways {
            gateway.view.acknowledged_epoch = 0;
            gateway.view.refused = None;
            gateway.coming = Some((self.epoch, self.now + self.assumptions.acknowledge_after.as_ms()));
        }
        self.tell("restart".into());
    }

    fn gateway(&mut self, name: &str, doing: &str) {
        let arrives = self.now + self.assumptions.acknowledge_after.as_ms();
        let gateway = self
            .gateways
            .iter_mut()
            .find(|gateway| gateway.view.node == name)
            .unwrap();
        match doing {
            "refuses" => gateway.refuses = true,
            "accepts" => {
                gateway.refuses = false;
                gateway.coming = Some((self.epoch, arrives));
            }
            "lost" => gateway.view.live = false,
            "back" => {
                gateway.view.live = true;
                gateway.coming = Some((self.epoch, arrives));
            }
            _ => panic!("{doing:?} is nothing that a gateway does"),
        }
        self.tell(format!("gateway {name} {doing}"));
    }

    /// Lets time pass, whether something happens or not.
    fn wait_until(&mut self, end: u64) {
        self.run_until(end);
        let passed = end.saturating_sub(self.now);
        self.now = self.now.max(end);
        self.serve(passed);
        self.settle();
    }
}

fn percent(text: &str) -> f64 {
    text.strip_suffix('%').unwrap().parse::<f64>().unwrap() / 100.0
}
