//! What `pontoon qualify` prints for people.

use pontoon_qualify::forecast::Forecast;
use pontoon_qualify::report::{Qualification, Several};
use pontoon_qualify::suite::Row;
use pontoon_qualify::verdict::Verdict;

use crate::commands::show;

/// The qualification of several devices.
pub fn several(several: &Several) {
    let names: Vec<&str> = several.devices.iter().map(|one| one.device.name.as_str()).collect();
    verdict(&names.join(", "), &several.verdict);
    let exchange = &several.exchange;
    rows("exchange", &exchange.rows);
    for row in &exchange.speed {
        let (op, dtype, ms) = (row.op, &row.dtype, row.ms);
        let (size, link) = (show::bytes(row.bytes as f64), show::count(row.link_bytes_per_s));
        println!("  {op:16} {dtype:5} {ms:>10.3} ms  {size}, {link}B/s on each link");
    }
    several.devices.iter().for_each(one);
}

fn verdict(name: &str, verdict: &Verdict) {
    println!("{name}: {}", verdict.verdict);
    for reason in &verdict.reasons {
        println!("  {reason}");
    }
    for note in &verdict.notes {
        println!("  note: {note}");
    }
}

fn rows(name: &str, rows: &[Row]) {
    let failed = || rows.iter().filter(|row| !row.ok);
    let cases: usize = rows.iter().map(|row| row.cases).sum();
    println!("{name}: {cases} checks in {} rows, {} failed", rows.len(), failed().count());
    for row in failed() {
        let (op, dtype, check, detail) = (row.op, &row.dtype, row.check, &row.detail);
        println!("  {op:16} {dtype:5} {check:10} {detail}");
    }
}

/// One device's qualification.
pub fn one(qualification: &Qualification) {
    verdict(&qualification.device.name, &qualification.verdict);
    rows("conformance", &qualification.conformance.rows);
    let seen = &qualification.stability;
    println!(
        "stability: {} rounds of {} operations in {:.0} s, {} lies; {} of memory, {} errors",
        seen.rounds,
        seen.ops_per_round,
        seen.seconds,
        seen.lies,
        show::bytes(seen.memory_bytes as f64),
        seen.memory_errors
    );
    let roofs = &qualification.speed.roofs;
    let peaks = roofs.matrix.iter();
    let peaks: Vec<String> =
        peaks.map(|(dtype, peak)| format!("{dtype} {}FLOP/s", show::count(*peak))).collect();
    println!("speed: {}, {}B/s", peaks.join(", "), show::count(roofs.memory));
    for row in &qualification.speed.rows {
        let (op, dtype, ms, share) = (row.op, &row.dtype, row.ms, 100.0 * row.roof_fraction);
        println!("  {op:16} {dtype:5} {ms:>10.3} ms {share:>5.0}% of its roof  {}", row.shape);
    }
    if let Some(forecast) = &qualification.forecast {
        print_forecast(forecast);
    }
}

fn print_forecast(forecast: &Forecast) {
    let source = if forecast.tokens_per_s_measured.is_some() { "measured" } else { "predicted" };
    println!(
        "{} in {}: {} to train, {} to serve, of {}",
        forecast.model,
        forecast.dtype,
        show::bytes(forecast.memory_bytes as f64),
        show::bytes(forecast.serving_bytes as f64),
        show::bytes(forecast.device_bytes as f64)
    );
    println!(
        "  {} tokens/s {source} ({} predicted); {} tokens take {:.2} days, {:.1} device-hours",
        show::count(forecast.tokens_per_s),
        show::count(forecast.tokens_per_s_predicted),
        show::count(forecast.tokens),
        forecast.days,
        forecast.device_hours
    );
    println!(
        "  {:.2} faults a day: {:.1} until the end, goodput {:.1}%",
        forecast.faults_per_day,
        forecast.faults_expected,
        100.0 * forecast.goodput
    );
}
