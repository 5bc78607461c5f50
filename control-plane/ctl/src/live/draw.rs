//! The live view's picture: a function of what is known.

use super::{Live, headline};
use crate::view::{Explanation, bar, percent, shares};
use penstock_proto::v1::{ChartPoint, ChartSide, RolloutStatus};
use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style, Stylize as _},
    text::{Line, Span},
    widgets::{Block, Paragraph, Sparkline, Wrap},
};

/// Cells of a bar of evidence.
const BAR: usize = 12;

pub(super) fn draw(frame: &mut Frame<'_>, live: &Live) {
    let listed = match live.rollouts.len() {
        0 | 1 => 0,
        many => u16::try_from(many).unwrap_or(u16::MAX).min(8) + 2,
    };
    let [list, detail, keys] = Layout::vertical([
        Constraint::Length(listed),
        Constraint::Min(0),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    if listed > 0 {
        draw_list(frame, list, live);
    }
    match live.selection() {
        Some(status) => draw_rollout(frame, detail, live, status),
        None => frame.render_widget(Paragraph::new("no rollout"), detail),
    }
    frame.render_widget(footer(live), keys);
}

fn draw_list(frame: &mut Frame<'_>, area: Rect, live: &Live) {
    let line = |(index, status): (usize, &RolloutStatus)| {
        let text = status.rollout.as_ref().map(headline).unwrap_or_default();
        if index == live.selected {
            Line::from(format!("▶ {text}")).add_modifier(Modifier::BOLD)
        } else {
            Line::from(format!("  {text}"))
        }
    };
    let lines: Vec<_> = live.rollouts.iter().enumerate().map(line).collect();
    // The selected line stays in sight where there are more than fit.
    let shown = usize::from(area.height.saturating_sub(2)).max(1);
    let skip = (live.selected + 1).saturating_sub(shown);
    let skip = u16::try_from(skip).unwrap_or(u16::MAX);
    let list = Paragraph::new(lines).scroll((skip, 0));
    frame.render_widget(list.block(Block::bordered().title(" rollouts ")), area);
}

fn draw_rollout(frame: &mut Frame<'_>, area: Rect, live: &Live, status: &RolloutStatus) {
    let explanation = Explanation::new(status.clone(), live.now_ms);
    let head = head(&explanation, status);
    let height = u16::try_from(head.len()).unwrap_or(u16::MAX);
    let [top, middle, charts, events] = Layout::vertical([
        Constraint::Length(height.saturating_add(2)),
        Constraint::Min(5),
        Constraint::Length(10),
        Constraint::Length(4),
    ])
    .areas(area);
    let title = status.rollout.as_ref().map(headline).unwrap_or_default();
    let block = Block::bordered().title(format!(" {title} ").bold());
    frame.render_widget(Paragraph::new(head).block(block), top);
    let [steps, metrics] =
        Layout::horizontal([Constraint::Percentage(35), Constraint::Percentage(65)]).areas(middle);
    let block = Block::bordered().title(" steps ");
    frame.render_widget(Paragraph::new(tree(&explanation)).block(block), steps);
    let block = Block::bordered().title(" evidence against the canary ");
    let text = Paragraph::new(evidence(&explanation)).wrap(Wrap { trim: false });
    frame.render_widget(text.block(block), metrics);
    draw_charts(frame, charts, &status.points);
    let told: Vec<_> = live
        .events
        .iter()
        .map(|event| Line::from(event.as_str()))
        .collect();
    frame.render_widget(
        Paragraph::new(told).block(Block::bordered().title(" happened ")),
        events,
    );
}

fn head(explanation: &Explanation, status: &RolloutStatus) -> Vec<Line<'static>> {
    let rollout = &explanation.rollout;
    let acknowledged = format!(
        "gateways: {}/{} acknowledged epoch {}; endpoints: {} stable, {} canary",
        rollout.acknowledged,
        rollout.live_gateways,
        rollout.epoch,
        status.stable_endpoints,
        status.canary_endpoints
    );
    let mut lines = vec![Line::from(acknowledged)];
    let counted = shares(rollout);
    if !counted.is_empty() {
        lines.push(Line::from(format!("counted: {counted}")));
    }
    lines.extend(explanation.waits().into_iter().map(Line::from));
    lines
}

fn tree(explanation: &Explanation) -> Vec<Line<'static>> {
    if explanation.steps.is_empty() {
        return vec![Line::from("none: the share is set by hand").dim()];
    }
    let last = explanation.steps.len() - 1;
    let line = |(index, step): (usize, &crate::view::Step)| {
        let branch = if index == last { "└─" } else { "├─" };
        let (mark, style) = match step.state.as_str() {
            "done" => ("✓", Style::new().fg(Color::Green)),
            "current" => ("▶", Style::new().fg(Color::Yellow).add_modifier(Modifier::BOLD)),
            _ => ("·", Style::new().add_modifier(Modifier::DIM)),
        };
        let text = format!("{mark} {:>6}  {}", step.share, step.stays());
        Line::from(vec![Span::raw(format!("{branch} ")), Span::styled(text, style)])
    };
    explanation.steps.iter().enumerate().map(line).collect()
}

fn evidence(explanation: &Explanation) -> Vec<Line<'static>> {
    if explanation.metrics.is_empty() {
        return vec![Line::from("nothing is judged").dim()];
    }
    let mut lines = Vec::new();
    for metric in &explanation.metrics {
        let color = match metric.verdict {
            "pass" => Color::Green,
            "fail" => Color::Red,
            _ => Color::Yellow,
        };
        let rate = |rate: Option<f64>| rate.map_or_else(|| "–".to_owned(), percent);
        lines.push(Line::from(vec![
            Span::styled(format!("{:<12}", metric.verdict), Style::new().fg(color)),
            Span::raw(format!(" {:<16} ", metric.metric)),
            Span::styled(bar(metric.evidence, BAR), Style::new().fg(color)),
            Span::raw(format!(
                " {:>6}  {} to {}",
                percent(metric.evidence),
                rate(metric.canary_rate),
                rate(metric.stable_rate)
            )),
        ]));
        let mut why = metric.rule.clone();
        if metric.verdict != "pass" && !metric.would_change.is_empty() {
            why = format!("{why}; {}", metric.would_change);
        }
        lines.push(Line::from(format!("             {why}")).dim());
    }
    lines
}

fn draw_charts(frame: &mut Frame<'_>, area: Rect, points: &[ChartPoint]) {
    let [upper, lower]: [Rect; 2] =
        Layout::vertical([Constraint::Percentage(50), Constraint::Percentage(50)]).areas(area);
    let ttft = |side: &ChartSide| side.ttft_p99.map(|seconds| whole(seconds * 1000.0));
    let errors = |side: &ChartSide| share_of(side.errors, side.requests);
    draw_chart(frame, upper, ("TTFT p99", "ms"), points, ttft);
    draw_chart(frame, lower, ("errors", "‰"), points, errors);
}

/// One value of both sides, stable's at the left.
fn draw_chart(
    frame: &mut Frame<'_>,
    area: Rect,
    (what, unit): (&str, &str),
    points: &[ChartPoint],
    value: fn(&ChartSide) -> Option<u64>,
) {
    let halves: [Rect; 2] =
        Layout::horizontal([Constraint::Percentage(50), Constraint::Percentage(50)]).areas(area);
    let stable: Vec<_> = points.iter().map(|p| p.stable.as_ref().and_then(value)).collect();
    let canary: Vec<_> = points.iter().map(|p| p.canary.as_ref().and_then(value)).collect();
    // One scale for both sides, or their heights could not be compared.
    let max = stable
        .iter()
        .chain(&canary)
        .flatten()
        .copied()
        .max()
        .unwrap_or_default();
    let sides = [
        ("stable", stable, Color::Cyan),
        ("canary", canary, Color::Magenta),
    ];
    for (area, (side, values, color)) in halves.into_iter().zip(sides) {
        let now = values.iter().rev().find_map(|value| *value);
        let now = now.map_or_else(|| "–".to_owned(), |now| now.to_string());
        let title = format!(" {what} {side}: {now} {unit} (scale {max}) ");
        let fits = usize::from(area.width.saturating_sub(2));
        let newest = values.len().saturating_sub(fits);
        let line = Sparkline::default()
            .data(values.into_iter().skip(newest))
            .max(max.max(1))
            .style(Style::new().fg(color))
            .block(Block::bordered().title(title));
        frame.render_widget(line, area);
    }
}

fn footer(live: &Live) -> Line<'static> {
    if let Some(action) = live.asks {
        let model = live.selection().and_then(|status| status.rollout.as_ref());
        let model = model.map(|rollout| rollout.model.clone()).unwrap_or_default();
        let question = format!(
            "{} the rollout of {model}? y: yes, any other key: no",
            action.verb()
        );
        return Line::from(question).bold().yellow();
    }
    let keys = "q quit  p pause  r resume  a abort  ↑↓ select";
    match live.note.as_str() {
        "" => Line::from(keys).dim(),
        note => Line::from(vec![
            Span::styled(note.to_owned(), Style::new().fg(Color::Yellow)),
            Span::raw(format!("   {keys}")).dim(),
        ]),
    }
}

/// Events in a thousand requests; none without requests.
fn share_of(events: u64, requests: u64) -> Option<u64> {
    events.saturating_mul(1000).checked_div(requests)
}

/// A number of a chart, cut to what a cell can show.
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a negative or endless value counts as the nearest that a chart can show"
)]
fn whole(value: f64) -> u64 {
    value.round() as u64
}
