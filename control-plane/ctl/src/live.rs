//! `--watch` on a terminal: rollouts as they go, with keys to pause, resume and abort.

mod draw;

use crate::{
    connect::Admin,
    error::CtlError,
    view::{Explanation, pause, phase},
};
use crossterm::event::{Event, EventStream, KeyCode, KeyEventKind, KeyModifiers};
use futures_util::StreamExt as _;
use penstock_proto::v1::{
    AbortRolloutRequest, ChangeRolloutRequest, ListRolloutsRequest, Rollout, RolloutStatus,
};
use std::{collections::BTreeMap, io, time::Duration};
use tokio::time::{Interval, MissedTickBehavior, interval};
use tonic::Status;

/// Between two looks.
const EVERY: Duration = Duration::from_millis(500);
/// Told changes that are kept.
const EVENTS: usize = 50;

/// What is on the screen.
#[derive(Debug, Default)]
struct Live {
    /// In the order of their models.
    rollouts: Vec<RolloutStatus>,
    selected: usize,
    /// What waits for a yes.
    asks: Option<Action>,
    /// What came of the last action, or that the control plane is away.
    note: String,
    /// What happened while the view was open, newest first.
    events: Vec<String>,
    /// Phase and share of each model when last seen.
    seen: BTreeMap<String, String>,
    now_ms: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Pause,
    Resume,
    Abort,
}

/// What a key means.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Stay,
    Quit,
    Do(Action),
}

/// Shows the rollout of `model`, or all of them, until `q`.
pub(crate) async fn run(admin: &mut Admin, model: Option<&str>, actor: &str) -> Result<(), CtlError> {
    let mut terminal = ratatui::try_init().map_err(CtlError::Output)?;
    let result = follow(&mut terminal, admin, model, actor).await;
    ratatui::restore();
    result
}

async fn follow(
    terminal: &mut ratatui::DefaultTerminal,
    admin: &mut Admin,
    model: Option<&str>,
    actor: &str,
) -> Result<(), CtlError> {
    let mut live = Live::default();
    let mut keys = EventStream::new();
    let mut looks = looks();
    loop {
        terminal
            .draw(|frame| draw::draw(frame, &live))
            .map_err(CtlError::Output)?;
        tokio::select! {
            _ = looks.tick() => live.look(admin, model).await?,
            event = keys.next() => match live.heard(event).map_err(CtlError::Output)? {
                Step::Stay => {}
                Step::Quit => return Ok(()),
                Step::Do(action) => live.act(admin, action, actor).await,
            },
        }
    }
}

fn looks() -> Interval {
    let mut looks = interval(EVERY);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    looks
}

impl Action {
    fn verb(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Abort => "abort",
        }
    }
}

impl Live {
    /// Asks the control plane how rollouts stand. One that is away for a while is told of, not given up.
    async fn look(&mut self, admin: &mut Admin, model: Option<&str>) -> Result<(), CtlError> {
        match admin.rpc.list_rollouts(ListRolloutsRequest {}).await {
            Ok(reply) => {
                let mut rollouts = reply.into_inner().rollouts;
                rollouts.retain(|status| model.is_none_or(|model| model == name(status)));
                rollouts.sort_by(|a, b| name(a).cmp(name(b)));
                self.show(rollouts, Explanation::clock());
                Ok(())
            }
            Err(status) if crate::converge::is_passing(&status) => {
                self.note =
                    "the control plane does not answer; what is shown is what was last heard".to_owned();
                Ok(())
            }
            Err(status) => Err(admin.failed(status)),
        }
    }

    fn show(&mut self, rollouts: Vec<RolloutStatus>, now_ms: u64) {
        if self.note.starts_with("the control plane does not answer") {
            self.note.clear();
        }
        for rollout in rollouts.iter().filter_map(|status| status.rollout.as_ref()) {
            let line = headline(rollout);
            let last = self.seen.insert(rollout.model.clone(), line.clone());
            if last.is_some_and(|last| last != line) {
                self.events
                    .insert(0, format!("{} {line}", crate::view::moment(now_ms)));
                self.events.truncate(EVENTS);
            }
        }
        self.selected = self.selected.min(rollouts.len().saturating_sub(1));
        self.rollouts = rollouts;
        self.now_ms = now_ms;
    }

    fn heard(&mut self, event: Option<io::Result<Event>>) -> io::Result<Step> {
        match event {
            // Without keys there is no way out of the view.
            None => Ok(Step::Quit),
            Some(Err(error)) => Err(error),
            Some(Ok(Event::Key(key))) if key.kind == KeyEventKind::Press => {
                let interrupts = key.modifiers.contains(KeyModifiers::CONTROL);
                Ok(match key.code {
                    KeyCode::Char('c') if interrupts => Step::Quit,
                    code => self.pressed(code),
                })
            }
            Some(Ok(_)) => Ok(Step::Stay),
        }
    }

    fn pressed(&mut self, key: KeyCode) -> Step {
        if let Some(action) = self.asks.take() {
            return match key {
                KeyCode::Char('y' | 'Y') => Step::Do(action),
                _ => {
                    self.note = format!("not done: {}", action.verb());
                    Step::Stay
                }
            };
        }
        match key {
            KeyCode::Char('q') | KeyCode::Esc => return Step::Quit,
            KeyCode::Char('p') => self.asks = Some(Action::Pause),
            KeyCode::Char('r') => self.asks = Some(Action::Resume),
            KeyCode::Char('a') => self.asks = Some(Action::Abort),
            KeyCode::Up | KeyCode::Char('k') => self.selected = self.selected.saturating_sub(1),
            KeyCode::Down | KeyCode::Char('j') => {
                self.selected = (self.selected + 1).min(self.rollouts.len().saturating_sub(1));
            }
            _ => {}
        }
        if self.selection().is_none() {
            self.asks = None;
        }
        Step::Stay
    }

    fn selection(&self) -> Option<&RolloutStatus> {
        self.rollouts.get(self.selected)
    }

    async fn act(&mut self, admin: &mut Admin, action: Action, actor: &str) {
        let Some(rollout) = self.selection().and_then(|status| status.rollout.clone()) else {
            return;
        };
        let model = rollout.model.clone();
        self.note = match send(admin, action, rollout, actor).await {
            Ok(written) => format!("{}: {}", action.verb(), headline(&written)),
            Err(status) => format!(
                "{} of {model}: {}",
                action.verb(),
                crate::error::chain(&admin.failed(status))
            ),
        };
    }
}

/// The uid goes along, so that no other rollout than the one on the screen is touched.
async fn send(admin: &mut Admin, action: Action, rollout: Rollout, actor: &str) -> Result<Rollout, Status> {
    let (model, uid) = (rollout.model, rollout.uid);
    let actor = actor.to_owned();
    let reason = "from the live view".to_owned();
    let reply = match action {
        Action::Abort => {
            let request = AbortRolloutRequest {
                model,
                uid,
                reason,
                actor,
                dry_run: false,
            };
            admin.rpc.abort_rollout(request).await
        }
        Action::Pause | Action::Resume => {
            let request = ChangeRolloutRequest {
                model,
                uid,
                reason,
                actor,
                ..ChangeRolloutRequest::default()
            };
            match action {
                Action::Pause => admin.rpc.pause_rollout(request).await,
                _ => admin.rpc.resume_rollout(request).await,
            }
        }
    };
    reply.map(tonic::Response::into_inner)
}

fn name(status: &RolloutStatus) -> &str {
    status
        .rollout
        .as_ref()
        .map_or("", |rollout| rollout.model.as_str())
}

fn headline(rollout: &Rollout) -> String {
    let why = match pause(rollout.pause()) {
        "" => String::new(),
        why => format!(" ({why})"),
    };
    format!(
        "{} {} → {} {} {}{why}{}",
        rollout.model,
        rollout.stable,
        rollout.canary,
        crate::view::share(rollout.canary_ppm),
        phase(rollout.phase()),
        crate::view::step(rollout.step, rollout.steps)
    )
}

#[cfg(test)]
mod tests;
