//! The table of a run's faults, from its `events.jsonl`, as people read it.
//!
//! Counts nothing else. Read next: `status.rs`.

use std::path::Path;

use anyhow::Result;
use pontoon_fleet::run_dir::read_lines;
use pontoon_fleet::world::RealDisk;
use serde_json::Value;

/// Kinds of events that are no faults.
const HARMLESS: [&str; 8] =
    ["started", "snapshot", "joined", "moved", "move_refused", "took_over", "resumed", "finished"];
/// Longer causes are cut.
const CAUSE: usize = 58;

/// The events of a run that are faults.
pub fn of_run(dir: &Path) -> Result<Vec<Value>> {
    let events = read_lines(&RealDisk, &dir.join("events.jsonl"))?;
    Ok(events.into_iter().filter(is_fault).collect())
}

/// Whether an event is a fault.
pub fn is_fault(event: &Value) -> bool {
    !HARMLESS.contains(&event["kind"].as_str().unwrap_or_default())
}

/// One line for each fault, under a line of headings.
pub fn table(faults: &[Value]) -> Vec<String> {
    let heading = format!(
        "{:>6}  {:>6}  {:<15} {:>9} {:>10} {:>5}  cause",
        "step", "worker", "fault", "detected", "recovered", "lost"
    );
    let time = |value: &Value| match value.as_u64() {
        Some(ms) if ms >= 10_000 => format!("{:.1} s", ms as f64 / 1e3),
        Some(ms) => format!("{ms} ms"),
        None => "-".to_owned(),
    };
    let number = |value: &Value| value.as_u64().map_or("-".to_owned(), |n| n.to_string());
    let line = |fault: &Value| {
        let cause = fault["cause"].as_str().unwrap_or_default();
        let cut: String = cause.chars().take(CAUSE).collect();
        let dots = if cut.len() < cause.len() { "..." } else { "" };
        format!(
            "{:>6}  {:>6}  {:<15} {:>9} {:>10} {:>5}  {cut}{dots}",
            number(&fault["step"]),
            number(&fault["worker"]),
            fault["kind"].as_str().unwrap_or_default(),
            time(&fault["detected_ms"]),
            time(&fault["recovery_ms"]),
            number(&fault["lost_micro_batches"]),
        )
    };
    std::iter::once(heading).chain(faults.iter().map(line)).collect()
}

/// Where the time went, in one line: `goodput 93.1% of 0:41; lost 1.9 s to hang, 0.3 s to crash`.
pub fn account(goodput: f64, lost: impl IntoIterator<Item = (String, f64)>) -> String {
    let mut lost: Vec<(String, f64)> = lost.into_iter().filter(|(_, s)| *s >= 0.05).collect();
    lost.sort_by(|a, b| b.1.total_cmp(&a.1));
    let parts: Vec<String> =
        lost.iter().map(|(cause, seconds)| format!("{seconds:.1} s to {cause}")).collect();
    let lost =
        if parts.is_empty() { String::new() } else { format!("; lost {}", parts.join(", ")) };
    format!("goodput {:.1}%{lost}", 100.0 * goodput)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_fault_is_one_line_with_its_times_and_a_cause_that_fits() {
        let fault = json!({
            "step": 17, "kind": "hang", "worker": 1, "cause": "no progress ".repeat(20),
            "detected_ms": 1512, "recovery_ms": 12_345, "lost_micro_batches": 2,
        });
        let lines = table(&[fault]);
        assert_eq!(lines.len(), 2);
        let at = |heading: &str| lines[0].find(heading).unwrap() + heading.len();
        assert_eq!(&lines[1][at("detected") - 7..at("detected")], "1512 ms");
        assert_eq!(&lines[1][at("recovered") - 6..at("recovered")], "12.3 s");
        assert!(lines[1].ends_with("...") && lines[1].len() < 130, "{}", lines[1]);
    }

    #[test]
    fn lost_time_is_told_by_cause_the_largest_first() {
        let lost = [("crash".to_owned(), 0.3), ("hang".to_owned(), 1.9), ("audit".to_owned(), 0.0)];
        assert_eq!(account(0.931, lost), "goodput 93.1%; lost 1.9 s to hang, 0.3 s to crash");
        assert_eq!(account(1.0, []), "goodput 100.0%");
    }
}
