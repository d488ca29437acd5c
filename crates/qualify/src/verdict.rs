//! The verdict on a device: fit, fit with limits, or unfit, with reasons.
//!
//! A pure function of what was measured. A wrong result that is always wrong can be avoided, so it
//! limits; a result that is wrong sometimes cannot, so one lie in the soak makes a device unfit.
//! Read next: `report.rs`.

use std::collections::{BTreeMap, BTreeSet};

use pontoon_ops::DType;
use serde::Serialize;

use crate::exchange::Exchange;
use crate::forecast::Forecast;
use crate::speed::Speed;
use crate::stress::Stability;
use crate::suite::Conformance;

/// How much slower than at its beginning a soak may end before it counts as throttling. A shared
/// machine's neighbours can halve its speed; three times is no neighbour.
const SLOWDOWN_MAX: f64 = 3.0;
/// An operation below this share of its roof is mentioned.
const SLOW: f64 = 0.05;
/// Operations named in one reason; the table has them all.
const NAMED_MAX: usize = 6;

/// Whether a device can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Fitness {
    /// For everything.
    Fit,
    /// With the limits that the reasons name.
    Limits,
    /// For nothing.
    Unfit,
}

impl std::fmt::Display for Fitness {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Fitness::Fit => "FIT",
            Fitness::Limits => "FIT WITH LIMITS",
            Fitness::Unfit => "UNFIT",
        })
    }
}

/// The verdict with its reasons.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Verdict {
    /// Whether the device can be used.
    pub verdict: Fitness,
    /// Why it is not simply fit; empty if it is.
    pub reasons: Vec<String>,
    /// What else should be known.
    pub notes: Vec<String>,
}

/// What is judged.
pub struct Evidence<'a> {
    /// The conformance table.
    pub conformance: &'a Conformance,
    /// The stress test.
    pub stability: &'a Stability,
    /// The measurements, where they could be taken.
    pub speed: Option<&'a Speed>,
    /// Why they could not.
    pub speed_failure: Option<&'a str>,
    /// The forecast, where a model was named.
    pub forecast: Option<&'a Forecast>,
    /// Operations that the model's programs hold, and the dtype they compute in.
    pub needed: &'a BTreeSet<(&'static str, DType)>,
}

/// Judges.
pub fn judge(evidence: &Evidence<'_>) -> Verdict {
    let mut found = Found::default();
    stability(evidence.stability, &mut found);
    conformance(evidence, &mut found);
    if let Some(failure) = evidence.speed_failure {
        found.unfit(format!("the device failed while its speed was measured: {failure}"));
    }
    if let Some(speed) = evidence.speed {
        slow(speed, &mut found);
    }
    if let Some(forecast) = evidence.forecast {
        memory(forecast, &mut found);
    }
    let verdict = match () {
        () if !found.unfit.is_empty() => Fitness::Unfit,
        () if !found.limits.is_empty() => Fitness::Limits,
        () => Fitness::Fit,
    };
    let mut reasons = found.unfit;
    reasons.extend(found.limits);
    Verdict { verdict, reasons, notes: found.notes }
}

/// Judges devices that were asked about together by the worst of them and by how they exchange.
/// An exchange that fails leaves each of them as good as it is alone.
pub fn judge_together(each: &[(&str, &Verdict)], exchange: &Exchange) -> Verdict {
    let mut found = Found::default();
    let mut worst = Fitness::Fit;
    for (name, verdict) in each {
        worst = worst.max(verdict.verdict);
        let named = |text: &String| format!("{name}: {text}");
        let list =
            if verdict.verdict == Fitness::Unfit { &mut found.unfit } else { &mut found.limits };
        list.extend(verdict.reasons.iter().map(named));
        found.notes.extend(verdict.notes.iter().map(named));
    }
    let together = format!("as a group of {}", exchange.devices);
    if let Some(failure) = &exchange.failure {
        found.limit(format!("{together}: {failure}"));
    }
    for row in exchange.rows.iter().filter(|row| !row.ok) {
        let what = match row.check {
            "repeat" => "gave other bits when run again",
            "agreement" => "does not sum along the contract's tree on every member",
            _ => "computed wrongly",
        };
        found.limit(format!("{together}: {} {} {what}: {}", row.dtype, row.op, row.detail));
    }
    for one in &exchange.unsupported {
        found.limit(format!(
            "{together}: {} {} is not supported: {}",
            one.op, one.dtype, one.reason
        ));
    }
    let verdict = if found.limits.is_empty() { worst } else { worst.max(Fitness::Limits) };
    let mut reasons = found.unfit;
    reasons.extend(found.limits);
    Verdict { verdict, reasons, notes: found.notes }
}

#[derive(Default)]
struct Found {
    unfit: Vec<String>,
    limits: Vec<String>,
    notes: Vec<String>,
}

impl Found {
    fn unfit(&mut self, reason: String) {
        self.unfit.push(reason);
    }

    fn limit(&mut self, reason: String) {
        self.limits.push(reason);
    }
}

fn stability(seen: &Stability, found: &mut Found) {
    if let Some(hang) = &seen.hang {
        found.unfit(format!("it hung in the soak: {hang}"));
    }
    if let Some(failure) = &seen.failure {
        found.unfit(format!("it failed in the soak: {failure}"));
    }
    if seen.lies > 0 {
        let first = seen.lies_detail.first().map_or("", String::as_str);
        found.unfit(format!(
            "it lied {} times in {} rounds of the soak: {first}",
            seen.lies, seen.rounds
        ));
    }
    if seen.memory_errors > 0 {
        let first = seen.memory_detail.first().map_or("", String::as_str);
        found.unfit(format!("its memory lost {} bytes: {first}", seen.memory_errors));
    }
    if seen.slowdown > SLOWDOWN_MAX {
        found.limit(format!("it became {:.1} times slower during the soak", seen.slowdown));
    }
}

fn conformance(evidence: &Evidence<'_>, found: &mut Found) {
    let suite = evidence.conformance;
    if let Some(stopped) = &suite.stopped {
        found.unfit(format!("the suite could not go on: {stopped}"));
    }
    let mut broken: BTreeMap<(&str, &str), Vec<&'static str>> = BTreeMap::new();
    for row in suite.rows.iter().filter(|row| !row.ok) {
        broken.entry((row.check, &row.dtype)).or_default().push(row.op);
    }
    for ((check, dtype), ops) in &broken {
        let named = listed(ops);
        let reason = match *check {
            "repeat" => format!("{dtype}: {named} gave other bits when run again"),
            "invariance" => format!("{dtype}: rows of {named} depend on the rest of their batch"),
            "gradient" => format!("{dtype}: {named} is not the gradient of its forward operation"),
            "runs" => format!("{dtype}: the device failed on {named}"),
            _ => format!("{dtype}: {named} computed wrongly"),
        };
        match *check {
            // What differs from run to run cannot be avoided by a setting.
            "repeat" => found.unfit(reason),
            _ => found.limit(reason),
        }
    }
    let bad = |op: &str, dtype: &str| {
        suite.rows.iter().any(|row| !row.ok && row.op == op && row.dtype == dtype)
            || suite.unsupported.iter().any(|one| one.op == op && one.dtype == dtype)
    };
    let usable = |dtype: &&DType| {
        !suite
            .rows
            .iter()
            .any(|row| !row.ok && row.dtype == dtype.name() && row.check != "gradient")
    };
    if !suite.rows.is_empty() && !DType::FLOATS.iter().any(|dtype| usable(&dtype)) {
        found.unfit("it computes correctly in no dtype".to_owned());
    }
    for one in &suite.unsupported {
        let text = format!("{} {} is not supported: {}", one.op, one.dtype, one.reason);
        found.limit(text);
    }
    let missing: Vec<&str> = evidence
        .needed
        .iter()
        .filter(|(op, dtype)| bad(op, dtype.name()))
        .map(|(op, _)| *op)
        .collect();
    if !missing.is_empty() {
        found.unfit(format!("the model needs {}, which it cannot do", listed(&missing)));
    }
    if !suite.not_judged.is_empty() {
        let named = listed(&suite.not_judged);
        found.notes.push(format!("{named} need several devices and were not judged"));
    }
}

fn slow(speed: &Speed, found: &mut Found) {
    let low = speed.rows.iter().filter(|row| row.roof_fraction < SLOW);
    let mut names: Vec<String> = low.map(|row| format!("{} {}", row.op, row.dtype)).collect();
    names.dedup();
    if !names.is_empty() {
        let (named, most) = (listed(&names), 100.0 * SLOW);
        found.notes.push(format!("below {most:.0}% of the roof: {named}"));
    }
}

fn memory(forecast: &Forecast, found: &mut Found) {
    let gib = |bytes: f64| bytes / 2_f64.powi(30);
    let has = gib(forecast.device_bytes as f64);
    let model = &forecast.model;
    if !forecast.fits_serving {
        let needs = gib(forecast.serving_bytes as f64);
        found.unfit(format!("{model} needs {needs:.1} GiB to be served, it has {has:.1} GiB"));
    } else if !forecast.fits {
        let needs = gib(forecast.memory_bytes as f64);
        found.limit(format!(
            "{model} can be served but not trained on one device: training needs {needs:.1} GiB, \
             it has {has:.1} GiB"
        ));
    }
}

fn listed<T: AsRef<str>>(names: &[T]) -> String {
    let shown: Vec<&str> = names.iter().take(NAMED_MAX).map(AsRef::as_ref).collect();
    match names.len().saturating_sub(NAMED_MAX) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::suite::{Row, Unsupported};

    fn row(op: &'static str, dtype: &str, check: &'static str, ok: bool) -> Row {
        let (worst_error, limit, cases) = (if ok { 0.5 } else { 9.0 }, 1.0, 1);
        let (dtype, case, detail) = (dtype.to_owned(), String::new(), String::new());
        Row { op, dtype, check, worst_error, limit, ok, cases, case, detail }
    }

    fn judged(conformance: &Conformance, stability: &Stability) -> Verdict {
        let needed = BTreeSet::from([("Matmul", DType::F32)]);
        judge(&Evidence {
            conformance,
            stability,
            speed: None,
            speed_failure: None,
            forecast: None,
            needed: &needed,
        })
    }

    #[test]
    fn one_lie_in_the_soak_makes_a_device_unfit_whatever_else_is_well() {
        let good =
            Conformance { rows: vec![row("Matmul", "f32", "correct", true)], ..Default::default() };
        assert_eq!(judged(&good, &Stability::default()).verdict, Fitness::Fit);
        let lied = Stability { lies: 1, rounds: 90_000, ..Stability::default() };
        let verdict = judged(&good, &lied);
        assert_eq!(verdict.verdict, Fitness::Unfit);
        assert!(verdict.reasons[0].contains("lied 1 times"), "{:?}", verdict.reasons);
    }

    #[test]
    fn a_wrong_dtype_limits_and_a_wrong_operation_that_the_model_needs_rules_out() {
        let rows =
            vec![row("Matmul", "bf16", "correct", false), row("Add", "f32", "correct", true)];
        let suite = Conformance { rows, ..Conformance::default() };
        let verdict = judged(&suite, &Stability::default());
        assert_eq!(verdict.verdict, Fitness::Limits);
        assert_eq!(verdict.reasons, ["bf16: Matmul computed wrongly"]);
        let reason = "no kernel".to_owned();
        let one = Unsupported { op: "Matmul", dtype: "f32".to_owned(), reason };
        let suite = Conformance { unsupported: vec![one], ..Conformance::default() };
        assert_eq!(judged(&suite, &Stability::default()).verdict, Fitness::Unfit);
    }

    #[test]
    fn devices_together_are_as_good_as_the_worst_of_them_and_their_exchange() {
        let good = judged(&Conformance::default(), &Stability::default());
        let lied = Stability { lies: 1, ..Stability::default() };
        let bad = judged(&Conformance::default(), &lied);
        let mut exchange = Exchange { devices: 2, ..Exchange::default() };
        let each = [("a", &good), ("b", &good)];
        assert_eq!(judge_together(&each, &exchange).verdict, Fitness::Fit);
        exchange.rows = vec![row("AllReduce", "bf16", "agreement", false)];
        let verdict = judge_together(&each, &exchange);
        assert_eq!(verdict.verdict, Fitness::Limits);
        assert!(verdict.reasons[0].starts_with("as a group of 2: bf16 AllReduce"));
        let verdict = judge_together(&[("a", &good), ("b", &bad)], &exchange);
        assert_eq!(verdict.verdict, Fitness::Unfit);
        assert!(verdict.reasons[0].starts_with("b: it lied"), "{:?}", verdict.reasons);
    }

    #[test]
    fn results_that_differ_from_run_to_run_rule_a_device_out() {
        let rows = vec![row("SumSquares", "f32", "repeat", false)];
        let suite = Conformance { rows, ..Conformance::default() };
        assert_eq!(judged(&suite, &Stability::default()).verdict, Fitness::Unfit);
    }
}
