use super::*;
use crate::simulate::world::script::run;

/// 2026-11-23, a Monday, at midnight UTC.
const MONDAY_MS: u64 = 1_795_392_000_000;

fn usual() -> Assumptions {
    Assumptions {
        start_ms: MONDAY_MS,
        ..Assumptions::default()
    }
}

const LADDER: &str = "
kind: Rollout
model: demo
stable: v1
canary: {revision: v2}
steps:
- {canary: 1%, hold: 72h}
- {canary: 5%, hold: 96h}
- {canary: 20%, hold: 168h}
- {canary: 100%, bake: 24h}
analysis:
  metrics:
  - {name: error_rate, max: 1%, max_ratio: 2}
";

fn short(more: &str) -> String {
    format!(
        "
kind: Rollout
model: demo
stable: v1
canary: {{revision: v2}}
steps:
- {{canary: 10%, hold: 6h}}
- {{canary: 50%, hold: 6h}}
- {{canary: 100%, bake: 1h}}
{more}
"
    )
}

#[track_caller]
fn happens(assumptions: Assumptions, plans: &[(&str, &str)], script: &str, expected: &str) {
    let happened = run(assumptions, plans, script);
    let expected: String = expected
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty())
        .map(|l| format!("{l}\n"))
        .collect();
    assert!(
        happened == expected,
        "happened:\n{happened}\nexpected:\n{expected}"
    );
}

#[test]
fn fourteen_days_pass_as_planned_across_restarts_of_the_controller() {
    happens(
        usual(),
        &[("plan", LADDER)],
        "
        at 0s apply plan
        at 30s restart controller
        at 1d restart controller
        at 5d restart controller
        at 13d restart controller
    ",
        "
            d0 00:00 v2   0% pending     applied
            d0 00:00 v2   0% warming     workers load it
            d0 00:00 restart
            d0 00:01 v2   1% converging  step 1 of 4
            d0 00:01 v2   1% soaking     holds for 3 d
            d1 00:00 restart
            d3 00:01 v2   5% converging  step 2 of 4
            d3 00:01 v2   5% soaking     holds for 4 d
            d5 00:00 restart
            d7 00:01 v2  20% converging  step 3 of 4
            d7 00:01 v2  20% soaking     holds for 7 d
            d13 00:00 restart
            d14 00:01 v2 100% converging  step 4 of 4
            d14 00:01 v2 100% baking      holds for 24 h
            d15 00:01 v2 100% draining    the last requests on v1 end
            d15 00:01 v2 100% succeeded   v2 is stable
        ",
    );
}

#[test]
fn steps_are_taken_within_windows() {
    let plan = short(
        "windows: [{days: [mon, tue, wed, thu, fri], from: '09:00', to: '17:00', zone: Europe/Berlin}]\nanalysis: {metrics: [{name: error_rate, max: 2%}]}",
    );
    happens(
        usual(),
        &[("plan", &plan)],
        "
        at 4d3h apply plan
    ",
        "
            d4 03:00 v2   0% pending     waits for its window
            d4 08:00 v2   0% warming     workers load it
            d4 08:01 v2  10% converging  step 1 of 3
            d4 08:01 v2  10% soaking     holds for 6 h
            d4 14:01 v2  50% converging  step 2 of 3
            d4 14:01 v2  50% soaking     holds for 6 h
            d4 20:01 v2  50% paused      window
            d7 08:00 v2  50% judging     is judged
            d7 08:00 v2 100% converging  step 3 of 3
            d7 08:00 v2 100% baking      holds for 60 min
            d7 09:00 v2 100% draining    the last requests on v1 end
            d7 09:00 v2 100% succeeded   v2 is stable
        ",
    );
}

#[test]
fn an_approval_is_waited_for_or_given_in_advance() {
    let plan = short("analysis: {metrics: [{name: error_rate, max: 2%}]}")
        .replace("50%, hold: 6h", "50%, hold: 6h, approval: true");
    let never = Assumptions {
        approvals: Approve::Never,
        ..usual()
    };
    happens(
        never.clone(),
        &[("plan", &plan)],
        "
        at 0s apply plan
        at 1d resume
        at 2d approve
    ",
        "
            d0 00:00 v2   0% pending     applied
            d0 00:00 v2   0% warming     workers load it
            d0 00:01 v2  10% converging  step 1 of 3
            d0 00:01 v2  10% soaking     holds for 6 h
            d0 06:01 v2  50% converging  step 2 of 3
            d0 06:01 v2  50% soaking     holds for 6 h
            d0 12:01 v2  50% paused      approval
            d1 00:00 refused: the rollout of demo is paused: resuming is not possible; it waits for an approval: approve it
            d2 00:00 v2  50% judging     is judged
            d2 00:00 v2 100% converging  step 3 of 3
            d2 00:00 v2 100% baking      holds for 60 min
            d2 01:00 v2 100% draining    the last requests on v1 end
            d2 01:00 v2 100% succeeded   v2 is stable
        ",
    );
    happens(
        never,
        &[("plan", &plan)],
        "
        at 0s apply plan
        at 7h approve
    ",
        "
            d0 00:00 v2   0% pending     applied
            d0 00:00 v2   0% warming     workers load it
            d0 00:01 v2  10% converging  step 1 of 3
            d0 00:01 v2  10% soaking     holds for 6 h
            d0 06:01 v2  50% converging  step 2 of 3
            d0 06:01 v2  50% soaking     holds for 6 h
            d0 12:01 v2 100% converging  step 3 of 3
            d0 12:01 v2 100% baking      holds for 60 min
            d0 13:01 v2 100% draining    the last requests on v1 end
            d0 13:01 v2 100% succeeded   v2 is stable
        ",
    );
}

#[test]
fn a_pause_that_lasts_too_long_rolls_back() {
    happens(
        usual(),
        &[(
            "plan",
            &short("pause_limit: 24h\nanalysis: {metrics: [{name: error_rate, max: 2%}]}"),
        )],
        "
        at 0s apply plan
        at 1h pause
    ",
        "
            d0 00:00 v2   0% pending     applied
            d0 00:00 v2   0% warming     workers load it
            d0 00:01 v2  10% converging  step 1 of 3
            d0 00:01 v2  10% soaking     holds for 6 h
            d0 01:00 v2  10% paused      manual
            d1 01:00 v2   0% aborting    it was paused (manual) for longer than 24h
            d1 01:00 v2   0% rolled_back v1 serves
        ",
    );
}

#[test]
fn a_share_set_by_hand_stays_until_it_is_resumed() {
    happens(
        usual(),
        &[(
            "plan",
            &short("analysis: {metrics: [{name: error_rate, max: 2%}]}"),
        )],
        "
        at 0s apply plan
        at 1h set 10%
        at 1d resume
    ",
        "
            d0 00:00 v2   0% pending     applied
            d0 00:00 v2   0% warming     workers load it
            d0 00:01 v2  10% converging  step 1 of 3
            d0 00:01 v2  10% soaking     holds for 6 h
            d0 01:00 v2  10% converging  set by hand
            d0 01:00 v2  10% paused      manual
            d1 00:00 v2  50% converging  step 2 of 3
            d1 00:00 v2  50% soaking     holds for 6 h
            d1 06:00 v2 100% converging  step 3 of 3
            d1 06:00 v2 100% baking      holds for 60 min
            d1 07:00 v2 100% draining    the last requests on v1 end
            d1 07:00 v2 100% succeeded   v2 is stable
        ",
    );
    happens(
        usual(),
        &[(
            "plan",
            &short("analysis: {metrics: [{name: error_rate, max: 2%}]}"),
        )],
        "
        at 0s apply plan
        at 1h set 30%
        at 2h pause
        at 1d resume
        at 2d resume
    ",
        "
            d0 00:00 v2   0% pending     applied
            d0 00:00 v2   0% warming     workers load it
            d0 00:01 v2  10% converging  step 1 of 3
            d0 00:01 v2  10% soaking     holds for 6 h
            d0 01:00 v2  30% converging  set by hand
            d0 01:00 v2  30% paused      manual
            d1 00:00 v2  50% converging  step 2 of 3
            d1 00:00 v2  50% soaking     holds for 6 h
            d1 06:00 v2 100% converging  step 3 of 3
            d1 06:00 v2 100% baking      holds for 60 min
            d1 07:00 v2 100% draining    the last requests on v1 end
            d1 07:00 v2 100% succeeded   v2 is stable
            d2 00:00 refused: the rollout of demo is succeeded: resuming is not possible; it is over; create a new rollout
        ",
    );
}

#[track_caller]
fn follow(on_new: &str, expected: &str) {
    let judged = "analysis: {metrics: [{name: error_rate, max: 2%}]}";
    let first = short(&format!("on_new: {on_new}\n{judged}"));
    let second = short(judged).replace("v2", "v3").replace("stable: v1\n", "");
    happens(
        usual(),
        &[("first", &first), ("second", &second)],
        "
        at 0s apply first
        at 7h apply second
    ",
        expected,
    );
}

#[test]
fn a_plan_that_is_applied_meanwhile_is_refused() {
    follow(
        "reject",
        "
        d0 00:00 v2   0% pending     applied
        d0 00:00 v2   0% warming     workers load it
        d0 00:01 v2  10% converging  step 1 of 3
        d0 00:01 v2  10% soaking     holds for 6 h
        d0 06:01 v2  50% converging  step 2 of 3
        d0 06:01 v2  50% soaking     holds for 6 h
        d0 07:00 refused: model demo has a rollout already (soaking); promote or abort it first
        d0 12:01 v2 100% converging  step 3 of 3
        d0 12:01 v2 100% baking      holds for 60 min
        d0 13:01 v2 100% draining    the last requests on v1 end
        d0 13:01 v2 100% succeeded   v2 is stable
    ",
    );
}

#[test]
fn a_plan_that_is_applied_meanwhile_waits() {
    follow(
        "queue",
        "
        d0 00:00 v2   0% pending     applied
        d0 00:00 v2   0% warming     workers load it
        d0 00:01 v2  10% converging  step 1 of 3
        d0 00:01 v2  10% soaking     holds for 6 h
        d0 06:01 v2  50% converging  step 2 of 3
        d0 06:01 v2  50% soaking     holds for 6 h
        d0 07:00 queued
        d0 12:01 v2 100% converging  step 3 of 3
        d0 12:01 v2 100% baking      holds for 60 min
        d0 13:01 v2 100% draining    the last requests on v1 end
        d0 13:01 v2 100% succeeded   v2 is stable
        d0 13:01 v3   0% pending     applied
        d0 13:01 v3   0% warming     workers load it
        d0 13:02 v3  10% converging  step 1 of 3
        d0 13:02 v3  10% soaking     holds for 6 h
        d0 19:02 v3  50% converging  step 2 of 3
        d0 19:02 v3  50% soaking     holds for 6 h
        d1 01:02 v3 100% converging  step 3 of 3
        d1 01:02 v3 100% baking      holds for 60 min
        d1 02:02 v3 100% draining    the last requests on v2 end
        d1 02:02 v3 100% succeeded   v3 is stable
    ",
    );
}

#[test]
fn a_plan_that_is_applied_meanwhile_goes_first() {
    follow(
        "supersede",
        "
        d0 00:00 v2   0% pending     applied
        d0 00:00 v2   0% warming     workers load it
        d0 00:01 v2  10% converging  step 1 of 3
        d0 00:01 v2  10% soaking     holds for 6 h
        d0 06:01 v2  50% converging  step 2 of 3
        d0 06:01 v2  50% soaking     holds for 6 h
        d0 07:00 v2   0% aborting    superseded by another rollout
        d0 07:00 v2   0% rolled_back v1 serves
        d0 07:00 v3   0% pending     applied
        d0 07:00 v3   0% warming     workers load it
        d0 07:01 v3  10% converging  step 1 of 3
        d0 07:01 v3  10% soaking     holds for 6 h
        d0 13:01 v3  50% converging  step 2 of 3
        d0 13:01 v3  50% soaking     holds for 6 h
        d0 19:01 v3 100% converging  step 3 of 3
        d0 19:01 v3 100% baking      holds for 60 min
        d0 20:01 v3 100% draining    the last requests on v1 end
        d0 20:01 v3 100% succeeded   v3 is stable
    ",
    );
}

#[test]
fn a_plan_that_is_changed_goes_on_from_its_share() {
    let first = short("analysis: {metrics: [{name: error_rate, max: 2%}]}");
    let second = first.replace("{canary: 50%", "{canary: 20%, hold: 2h}\n- {canary: 60%");
    happens(
        usual(),
        &[("first", &first), ("second", &second)],
        "
        at 0s apply first
        at 3h apply second
    ",
        "
            d0 00:00 v2   0% pending     applied
            d0 00:00 v2   0% warming     workers load it
            d0 00:01 v2  10% converging  step 1 of 3
            d0 00:01 v2  10% soaking     holds for 6 h
            d0 03:00 v2  10% converging  step 1 of 4
            d0 03:00 v2  10% soaking     holds for 6 h
            d0 09:00 v2  20% converging  step 2 of 4
            d0 09:00 v2  20% soaking     holds for 2 h
            d0 11:00 v2  60% converging  step 3 of 4
            d0 11:00 v2  60% soaking     holds for 6 h
            d0 17:00 v2 100% converging  step 4 of 4
            d0 17:00 v2 100% baking      holds for 60 min
            d0 18:00 v2 100% draining    the last requests on v1 end
            d0 18:00 v2 100% succeeded   v2 is stable
        ",
    );
}

#[test]
fn a_bad_canary_is_rolled_back_with_its_cause_and_tried_again() {
    happens(
        usual(),
        &[("plan", LADDER)],
        "
        at 0s apply plan
        at 4d error-rate canary 5%
        at 5d retry
        at 5d1h error-rate canary 0.5%
        at 6d retry
    ",
        "
            d0 00:00 v2   0% pending     applied
            d0 00:00 v2   0% warming     workers load it
            d0 00:01 v2   1% converging  step 1 of 4
            d0 00:01 v2   1% soaking     holds for 3 d
            d3 00:01 v2   5% converging  step 2 of 4
            d3 00:01 v2   5% soaking     holds for 4 d
            d4 05:00 v2   0% aborting    error_rate: 1343 of the canary's 104673 requests are bad (1.28 %, stable 0.50 %), at most 1%, at most 2 times stable's is allowed
            d4 05:00 v2   0% rolled_back v1 serves
            d5 00:00 v2   0% pending     applied
            d5 00:00 v2   0% warming     workers load it
            d5 00:00 v2   1% converging  step 1 of 4
            d5 00:00 v2   1% soaking     holds for 3 d
            d5 00:17 v2   0% aborting    error_rate: 10 of the canary's 193 requests are bad (5.18 %, stable 0.43 %), at most 1%, at most 2 times stable's is allowed
            d5 00:17 v2   0% rolled_back v1 serves
            d6 00:00 v2   0% pending     applied
            d6 00:00 v2   0% warming     workers load it
            d6 00:00 v2   1% converging  step 1 of 4
            d6 00:00 v2   1% soaking     holds for 3 d
            d9 00:00 v2   5% converging  step 2 of 4
            d9 00:00 v2   5% soaking     holds for 4 d
            d13 00:00 v2  20% converging  step 3 of 4
            d13 00:00 v2  20% soaking     holds for 7 d
            d20 00:00 v2 100% converging  step 4 of 4
            d20 00:00 v2 100% baking      holds for 24 h
            d21 00:00 v2 100% draining    the last requests on v1 end
            d21 00:00 v2 100% succeeded   v2 is stable
        ",
    );
}

#[test]
fn a_refusal_pauses_until_it_heals() {
    happens(
        usual(),
        &[(
            "plan",
            &short("analysis: {metrics: [{name: error_rate, max: 2%}]}"),
        )],
        "
        at 0s apply plan
        at 5h gateway g2 refuses
        at 8h gateway g2 accepts
        at 13h gateway g1 lost
        at 14h abort
    ",
        "
            d0 00:00 v2   0% pending     applied
            d0 00:00 v2   0% warming     workers load it
            d0 00:01 v2  10% converging  step 1 of 3
            d0 00:01 v2  10% soaking     holds for 6 h
            d0 05:00 gateway g2 refuses
            d0 06:01 v2  50% converging  step 2 of 3
            d0 06:01 v2  50% paused      nacked: g2 refused epoch 3: no endpoint of the canary
            d0 08:00 gateway g2 accepts
            d0 08:00 v2  50% converging  step 2 of 3
            d0 08:00 v2  50% soaking     holds for 6 h
            d0 13:00 gateway g1 lost
            d0 14:00 v2   0% aborting    an operator aborted it
            d0 14:00 v2   0% rolled_back v1 serves
        ",
    );
}

/// Traffic stops after ten minutes and is back after eight hours.
#[track_caller]
fn missing(policy: &str, expected: &str) {
    let plan = short(&format!(
        "analysis: {{on_insufficient: {policy}, metrics: [{{name: error_rate, max: 2%, min_samples: 5000}}]}}"
    ));
    happens(
        usual(),
        &[("plan", &plan)],
        "
        at 0s apply plan
        at 10m traffic 0
        at 8h traffic 20
    ",
        expected,
    );
}

#[test]
fn missing_samples_are_waited_for() {
    missing(
        "extend",
        "
        d0 00:00 v2   0% pending     applied
        d0 00:00 v2   0% warming     workers load it
        d0 00:01 v2  10% converging  step 1 of 3
        d0 00:01 v2  10% soaking     holds for 6 h
        d0 06:01 v2  10% judging     is judged
        d0 08:32 v2  50% converging  step 2 of 3
        d0 08:32 v2  50% soaking     holds for 6 h
        d0 14:32 v2 100% converging  step 3 of 3
        d0 14:32 v2 100% baking      holds for 60 min
        d0 15:32 v2 100% draining    the last requests on v1 end
        d0 15:32 v2 100% succeeded   v2 is stable
    ",
    );
}

#[test]
fn missing_samples_are_waited_for_so_long_and_no_longer() {
    let plan = short("analysis: {metrics: [{name: error_rate, max: 2%, min_samples: 50000}]}");
    let quiet = Assumptions {
        requests_per_second: 2.0,
        ..usual()
    };
    happens(
        quiet,
        &[("plan", &plan)],
        "
        at 0s apply plan
        at 2d end
    ",
        "
            d0 00:00 v2   0% pending     applied
            d0 00:00 v2   0% warming     workers load it
            d0 00:01 v2  10% converging  step 1 of 3
            d0 00:01 v2  10% soaking     holds for 6 h
            d0 06:01 v2  10% judging     is judged
            d1 00:01 v2  10% paused      insufficient
        ",
    );
}

#[test]
fn missing_samples_pause() {
    missing(
        "pause",
        "
        d0 00:00 v2   0% pending     applied
        d0 00:00 v2   0% warming     workers load it
        d0 00:01 v2  10% converging  step 1 of 3
        d0 00:01 v2  10% soaking     holds for 6 h
        d0 06:01 v2  10% paused      insufficient
        d0 08:32 v2  10% judging     is judged
        d0 08:32 v2  50% converging  step 2 of 3
        d0 08:32 v2  50% soaking     holds for 6 h
        d0 14:32 v2 100% converging  step 3 of 3
        d0 14:32 v2 100% baking      holds for 60 min
        d0 15:32 v2 100% draining    the last requests on v1 end
        d0 15:32 v2 100% succeeded   v2 is stable
    ",
    );
}

#[test]
fn missing_samples_roll_back() {
    missing("fail", "
        d0 00:00 v2   0% pending     applied
        d0 00:00 v2   0% warming     workers load it
        d0 00:01 v2  10% converging  step 1 of 3
        d0 00:01 v2  10% soaking     holds for 6 h
        d0 06:01 v2   0% aborting    the samples do not suffice: error_rate needs 3929 more requests of the canary
        d0 06:01 v2   0% rolled_back v1 serves
    ");
}

#[test]
fn a_metric_that_asks_for_a_pause_is_resumed_in_its_trial_only() {
    let plan = short("analysis: {metrics: [{name: error_rate, max: 1%, action: pause}]}");
    happens(
        usual(),
        &[("plan", &plan)],
        "
        at 0s apply plan
        at 1h error-rate canary 5%
        at 3h resume
        at 2d end
    ",
        "
            d0 00:00 v2   0% pending     applied
            d0 00:00 v2   0% warming     workers load it
            d0 00:01 v2  10% converging  step 1 of 3
            d0 00:01 v2  10% soaking     holds for 6 h
            d0 01:16 v2  10% paused      verdict: error_rate: 137 of the canary's 9142 requests are bad (1.50 %, stable 0.46 %), at most 1% is allowed
            d0 03:00 v2  10% soaking     holds for 5 h
            d0 07:44 v2  50% converging  step 2 of 3
            d0 07:44 v2  50% soaking     holds for 6 h
            d0 07:45 v2  50% paused      verdict: error_rate: 12 of the canary's 300 requests are bad (4.00 %, stable 0.69 %), at most 1% is allowed
        ",
    );
}

#[test]
fn a_simulation_tells_what_a_plan_is_worth() {
    let (plan, _) = crate::parse::parse(LADDER).unwrap();
    let simulation = simulate(&plan, &usual());
    assert_eq!(simulation.outcome, Phase::Succeeded);
    let told = simulation.to_string();
    let (events, odds) = told.split_once("\n\n").unwrap();
    assert_eq!(events.lines().count(), 12);
    assert_eq!(
        events.lines().last(),
        Some("d15 00:01  v2 100% succeeded   v2 is stable")
    );
    assert_eq!(
        odds,
        "time until a worse canary is noticed, in the median:
      1% for 72h   twice as bad: within what the plan allows; five times: 74 min
      5% for 96h   twice as bad: within what the plan allows; five times: 17 min
     20% for 168h  twice as bad: within what the plan allows; five times: 5 min
    100% for 24h   twice as bad: within what the plan allows; five times: 50 s

a canary as good as stable is rolled back with a probability of 0.0 %; the plan allows 1 %"
    );
}

#[test]
fn a_bad_canary_ends_a_simulation_early() {
    let (plan, _) = crate::parse::parse(LADDER).unwrap();
    let assumptions = Assumptions {
        canary_error_rate: 0.025,
        ..usual()
    };
    let simulation = simulate(&plan, &assumptions);
    assert_eq!(simulation.outcome, Phase::RolledBack);
    // About what the odds say for the first step: 74 minutes in the median.
    let hours = simulation.took_ms / 3_600_000;
    assert!((0..6).contains(&hours), "{simulation}");
    assert_eq!(simulate(&plan, &assumptions), simulation);
}
