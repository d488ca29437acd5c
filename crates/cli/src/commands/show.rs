//! Numbers and progress as people read them.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};

/// How often a bar looks at what was done.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// An error and its causes in one line. Many texts name their cause themselves: nothing is said
/// twice.
pub fn error(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |line, text| {
        match (line.is_empty(), line.contains(&text)) {
            (true, _) => text,
            (_, true) => line,
            (_, false) => format!("{line}: {text}"),
        }
    })
}

/// A bar on stderr over bytes that another thread counts, while `work` runs.
pub fn with_bytes<T>(total: u64, done: &Arc<AtomicU64>, work: impl FnOnce() -> T) -> T {
    let bar = ProgressBar::new(total);
    let style = "{bar:30} {bytes}/{total_bytes}  {bytes_per_sec}  ETA {eta}";
    bar.set_style(ProgressStyle::with_template(style).expect("the template is well-formed"));
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let ticking = bar.clone();
        scope.spawn(move || {
            // The channel closes when the work is done.
            while stopped.recv_timeout(LOOK_EVERY)
                == Err(std::sync::mpsc::RecvTimeoutError::Timeout)
            {
                ticking.set_position(done.load(Ordering::Relaxed));
            }
        });
        let result = work();
        drop(stop);
        bar.finish_and_clear();
        result
    })
}

/// A count with its unit's prefix, such as `1.2M`.
pub fn count(value: f64) -> String {
    let units = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    match units.iter().find(|(size, _)| value.abs() >= *size) {
        Some((size, unit)) => format!("{:.1}{unit}", value / size),
        None => format!("{value:.0}"),
    }
}

/// Bytes in binary units.
pub fn bytes(value: f64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    match units.iter().find(|(power, _)| value >= 2_f64.powi(*power)) {
        Some((power, unit)) => format!("{:.1} {unit}", value / 2_f64.powi(*power)),
        None => format!("{value:.0} B"),
    }
}

/// A time as `1:02:03` or `2:03`.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.max(0.0).round() as u64;
    let (hours, minutes, seconds) = (whole / 3600, whole / 60 % 60, whole % 60);
    if hours > 0 {
        format!("{hours}:{minutes:02}:{seconds:02}")
    } else {
        format!("{minutes}:{seconds:02}")
    }
}

/// Writes a JSON value to a file, for people too.
pub fn write_json(path: &Path, value: &serde_json::Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    std::fs::write(path, text + "\n").with_context(|| format!("cannot write `{}`", path.display()))
}
