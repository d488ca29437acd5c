//! A live run in a terminal: its loss, speed, workers and faults.
//!
//! Only looks: ending the view does not end the run. The terminal is as it was afterwards,
//! however the view ends. Read next: `run_status.rs`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style};
use ratatui::symbols::Marker;
use ratatui::text::Line;
use ratatui::widgets::{Axis, Block, Chart, Dataset, Gauge, GraphType, Paragraph};
use ratatui::{DefaultTerminal, Frame};
use serde_json::Value;

use super::run_status::{RunStatus, Standing};
use super::{faults, show};

/// Lines of the workers' part at most.
const WORKERS: u16 = 12;
/// Points of the loss curve at most: more than a terminal has columns.
const POINTS: usize = 400;

/// Set by a signal that asks to end.
static OVER: AtomicBool = AtomicBool::new(false);

/// Shows a run until it ends or the viewer leaves; returns what was last known.
pub fn run(status: RunStatus, every: Duration) -> Result<RunStatus> {
    // A terminal that is left in raw mode is of no use: a signal only sets a mark.
    ctrlc::set_handler(|| OVER.store(true, Ordering::Relaxed)).context("cannot catch signals")?;
    let mut terminal = ratatui::try_init().context("cannot draw in this terminal")?;
    let shown = show(&mut terminal, status, every);
    ratatui::try_restore().context("cannot restore the terminal")?;
    shown
}

fn show(
    terminal: &mut DefaultTerminal,
    mut status: RunStatus,
    every: Duration,
) -> Result<RunStatus> {
    while status.standing == Standing::Running && !OVER.load(Ordering::Relaxed) {
        terminal.draw(|frame| draw(frame, &status))?;
        let next = Instant::now() + every;
        while let Some(rest) = next.checked_duration_since(Instant::now()) {
            if !event::poll(rest.min(Duration::from_millis(100)))? {
                if OVER.load(Ordering::Relaxed) {
                    return Ok(status);
                }
                continue;
            }
            match event::read()? {
                Event::Key(key) => {
                    let control = key.modifiers.contains(KeyModifiers::CONTROL);
                    match key.code {
                        KeyCode::Char('q') | KeyCode::Esc => return Ok(status),
                        KeyCode::Char('c') if control => return Ok(status),
                        _ => {}
                    }
                }
                Event::Resize(..) => break,
                _ => {}
            }
        }
        status = RunStatus::read(&status.dir)?;
    }
    Ok(status)
}

/// Draws all of it.
fn draw(frame: &mut Frame<'_>, status: &RunStatus) {
    let workers = (status.fleet.len() as u16).min(WORKERS);
    let faults = (status.faults().len() as u16).min(8);
    let [head, bar, curve, fleet, table] = Layout::vertical([
        Constraint::Length(2),
        Constraint::Length(1),
        Constraint::Min(6),
        Constraint::Length(if workers == 0 { 0 } else { workers + 2 }),
        Constraint::Length(if faults == 0 { 0 } else { faults + 3 }),
    ])
    .areas(frame.area());
    head_lines(frame, head, status);
    let step = status.last()["step"].as_u64().unwrap_or(0) as f64;
    let ratio = status.steps.map_or(0.0, |steps| step / steps.max(1) as f64).clamp(0.0, 1.0);
    let eta = status.rest_s().map_or("-".to_owned(), show::duration);
    let label = format!("{:.0}%  ETA {eta}", 100.0 * ratio);
    frame.render_widget(Gauge::default().ratio(ratio).label(label), bar);
    loss_curve(frame, curve, status);
    let lines: Vec<Line<'_>> =
        status.fleet.iter().take(workers.into()).map(|of| worker_line(of).into()).collect();
    frame.render_widget(Paragraph::new(lines).block(Block::bordered().title("workers")), fleet);
    let mut lines = faults::table(&status.faults());
    // The latest ones, under the headings.
    lines.drain(1..lines.len().saturating_sub(faults.into()).max(1));
    let lines: Vec<Line<'_>> = lines.into_iter().map(Line::from).collect();
    frame.render_widget(Paragraph::new(lines).block(Block::bordered().title("faults")), table);
}

fn head_lines(frame: &mut Frame<'_>, area: Rect, status: &RunStatus) {
    let first = format!("{}   q leaves, the run goes on", status.dir.display());
    let lines = vec![Line::from(first), Line::from(super::status::line(status))];
    frame.render_widget(Paragraph::new(lines), area);
}

fn loss_curve(frame: &mut Frame<'_>, area: Rect, status: &RunStatus) {
    let of = |line: &Value| Some((line["step"].as_f64()?, line["loss"].as_f64()?));
    let all: Vec<(f64, f64)> = status.metrics.iter().filter_map(of).collect();
    let stride = all.len().div_ceil(POINTS).max(1);
    let mut points: Vec<(f64, f64)> = all.iter().copied().step_by(stride).collect();
    points.extend(all.last());
    let steps = [all.first().map_or(0.0, |p| p.0), all.last().map_or(1.0, |p| p.0)];
    let low = points.iter().map(|p| p.1).fold(f64::INFINITY, f64::min);
    let high = points.iter().map(|p| p.1).fold(f64::NEG_INFINITY, f64::max);
    let losses = if low < high { [low, high] } else { [low.min(0.0), high.max(1.0)] };
    let labels = |of: [f64; 2], digits: usize| of.map(|value| format!("{value:.digits$}"));
    let curve = Dataset::default()
        .marker(Marker::Braille)
        .graph_type(GraphType::Line)
        .style(Style::default().fg(Color::Cyan))
        .data(&points);
    let chart = Chart::new(vec![curve])
        .block(Block::bordered().title("loss"))
        .x_axis(Axis::default().bounds(steps).labels(labels(steps, 0)))
        .y_axis(Axis::default().bounds(losses).labels(labels(losses, 3)));
    frame.render_widget(chart, area);
}

/// A worker in one line.
pub fn worker_line(of: &Value) -> String {
    let rate = match of["seconds"].as_f64() {
        Some(seconds) if seconds > 0.0 => format!("{:.2} micro-batches/s", 1.0 / seconds),
        _ => "-".to_owned(),
    };
    format!(
        "worker {:<3} {:<16} {:<8} {rate:<22} process {}",
        of["worker"].as_u64().unwrap_or(0),
        of["device"].as_str().unwrap_or_default(),
        of["state"].as_str().unwrap_or_default(),
        of["processes"].as_u64().unwrap_or(0),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use serde_json::json;

    fn screen(status: &RunStatus, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, status)).unwrap();
        terminal.backend().to_string()
    }

    fn status(steps: u64) -> RunStatus {
        let metrics = (1..=steps)
            .map(|step| {
                json!({ "step": step, "loss": 5.0 / step as f64, "tokens_per_s": 1200.0,
                        "goodput": 0.97, "step_ms": 100.0, "workers": 2 })
            })
            .collect();
        let fault = json!({ "step": 3, "kind": "crash", "worker": 1, "cause": "gone" });
        let worker = json!({ "worker": 1, "device": "cpu", "state": "member", "seconds": 0.25,
                             "processes": 2 });
        RunStatus {
            dir: "my-run".into(),
            standing: Standing::Running,
            steps: Some(100),
            metrics,
            events: vec![fault],
            snapshots: vec![2],
            fleet: vec![worker],
        }
    }

    #[test]
    fn a_screen_shows_loss_speed_workers_and_faults() {
        let shown = screen(&status(40), 100, 30);
        for what in ["my-run", "step 40/100", "40%", "ETA 0:06", "4.00 micro-batches/s", "crash"] {
            assert!(shown.contains(what), "no {what} in\n{shown}");
        }
    }

    #[test]
    fn a_run_of_no_step_and_a_tiny_terminal_are_drawn_too() {
        screen(&status(0), 100, 30);
        screen(&status(40), 5, 2);
        screen(&status(1), 40, 10);
    }
}
