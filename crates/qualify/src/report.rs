//! A qualification as one object, and as one HTML page that needs nothing else: tables, and plots
//! drawn as SVG.
//!
//! Decides nothing. Read next: `verdict.rs`, `several.rs` for devices that were asked about
//! together.

mod several;

use std::fmt::Write;

use serde::Serialize;

use crate::forecast::Forecast;
use crate::speed::{Bound, Speed, SpeedRow};
use crate::stress::Stability;
use crate::suite::{Conformance, Row, Unsupported};
use crate::verdict::{Fitness, Verdict};

pub use several::Several;

/// The device, for the report.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Device {
    /// As the user names it.
    pub name: String,
    /// The chip's own name.
    pub chip: String,
    /// Within which equal inputs give equal bits.
    pub numeric_class: String,
    /// Whether it is emulated.
    pub emulated: bool,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Threads, multiprocessors or cores.
    pub compute_units: usize,
}

/// Everything that was found.
pub struct Qualification {
    /// The device.
    pub device: Device,
    /// The verdict.
    pub verdict: Verdict,
    /// The conformance table.
    pub conformance: Conformance,
    /// The stress test.
    pub stability: Stability,
    /// The measurements.
    pub speed: Speed,
    /// The forecast, where a model was named.
    pub forecast: Option<Forecast>,
    /// Seconds it took.
    pub seconds: f64,
    /// The version that did it.
    pub version: String,
}

impl Qualification {
    /// The JSON object that `qualify` prints.
    pub fn json(&self) -> serde_json::Value {
        let none = serde_json::json!({});
        let forecast = self.forecast.as_ref().map(|forecast| serde_json::json!(forecast));
        serde_json::json!({
            "verdict": self.verdict.verdict,
            "reasons": self.verdict.reasons,
            "notes": self.verdict.notes,
            "device": self.device,
            "ops": self.conformance.rows,
            "unsupported": self.conformance.unsupported,
            "stability": self.stability,
            "roofs": self.speed.roofs,
            "speed": self.speed.rows,
            "forecast": forecast.unwrap_or(none),
            "seconds": self.seconds,
            "version": self.version,
        })
    }

    /// The page.
    pub fn html(&self) -> String {
        let title = format!("{} is {}", self.device.name, self.verdict.verdict);
        let mut page = self.body();
        footer(&mut page, &self.version, self.seconds);
        whole_page(&title, &page)
    }

    fn body(&self) -> String {
        let mut page = String::new();
        let device = &self.device;
        let emulated = if device.emulated { " (emulated)" } else { "" };
        push(&mut page, format_args!("<h1>{}{emulated}</h1>", escaped(&device.name)));
        push(
            &mut page,
            format_args!(
                "<p>{} · {} · {} compute units · {:.1} GiB</p>",
                escaped(&device.chip),
                escaped(&device.numeric_class),
                device.compute_units,
                device.memory_bytes as f64 / 2_f64.powi(30),
            ),
        );
        verdict_part(&mut page, &self.verdict);
        if let Some(forecast) = &self.forecast {
            forecast_table(&mut page, forecast);
        }
        self.stability_part(&mut page);
        self.speed_part(&mut page);
        conformance_part(&mut page, &self.conformance);
        page
    }

    fn stability_part(&self, page: &mut String) {
        let seen = &self.stability;
        let [median, tail, worst] = seen.round_ms;
        push(
            page,
            format_args!(
                "<h2>Stability</h2><p>{} rounds of {} operations in {:.1} s: {} lies, {} memory \
                 errors in {:.0} MiB. A round takes {median:.2} ms, one in a hundred {tail:.2} ms, \
                 the slowest {worst:.2} ms.</p>",
                seen.rounds,
                seen.ops_per_round,
                seen.seconds,
                seen.lies,
                seen.memory_errors,
                seen.memory_bytes as f64 / 2_f64.powi(20),
            ),
        );
        let failures = seen.hang.iter().chain(&seen.failure);
        let all = failures.chain(&seen.lies_detail).chain(&seen.memory_detail);
        list(page, &all.cloned().collect::<Vec<_>>());
        page.push_str(&line_plot(&seen.times_ms));
    }

    fn speed_part(&self, page: &mut String) {
        let roofs = &self.speed.roofs;
        page.push_str("<h2>Speed</h2><p>");
        for (dtype, peak) in &roofs.matrix {
            push(page, format_args!("Matrix roof {dtype} {:.1} GFLOP/s. ", peak / 1e9));
        }
        push(
            page,
            format_args!(
                "Memory roof {:.1} GB/s. Launch {:.1} µs. Bars show each operation's share of the \
                 roof that bounds it; above 100%, its operands were in a cache.</p>",
                roofs.memory / 1e9,
                1e6 * roofs.latency
            ),
        );
        let mut dtypes: Vec<&str> = self.speed.rows.iter().map(|row| row.dtype.as_str()).collect();
        dtypes.sort_unstable();
        dtypes.dedup();
        for dtype in dtypes {
            let rows: Vec<&SpeedRow> =
                self.speed.rows.iter().filter(|row| row.dtype == dtype).collect();
            push(page, format_args!("<h3>{dtype}</h3>{}", bar_plot(&rows)));
        }
    }
}

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;\
padding:0 1rem;color:#1c2733;background:#fff}h1{margin-bottom:0}table{border-collapse:collapse;\
width:100%;font-size:13px}td,th{text-align:left;padding:.15rem .5rem;\
border-bottom:1px solid #e3e8ee}\
.verdict{font-size:1.6rem;font-weight:700}.fit{color:#1b7f4b}.limits{color:#b26a00}\
.unfit{color:#b3261e}.bad td{background:#fde8e6}svg{width:100%;height:auto}svg text{font:11px \
system-ui,sans-serif;fill:#1c2733}footer{margin-top:2rem;color:#66727f}";

fn class(fitness: Fitness) -> &'static str {
    match fitness {
        Fitness::Fit => "fit",
        Fitness::Limits => "limits",
        Fitness::Unfit => "unfit",
    }
}

fn verdict_part(page: &mut String, verdict: &Verdict) {
    let (mark, word) = (class(verdict.verdict), verdict.verdict);
    push(page, format_args!("<p class=\"verdict {mark}\">{word}</p>"));
    list(page, &verdict.reasons);
    list(page, &verdict.notes);
}

fn footer(page: &mut String, version: &str, seconds: f64) {
    let text = format!("Pontoon {version}, in {seconds:.0} s");
    push(page, format_args!("<footer>{}</footer>", escaped(&text)));
}

fn whole_page(title: &str, body: &str) -> String {
    format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
         <title>{}</title><style>{STYLE}</style></head><body>{body}</body></html>\n",
        escaped(title)
    )
}

fn push(page: &mut String, text: std::fmt::Arguments<'_>) {
    page.write_fmt(text).expect("a string takes any text");
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn list(page: &mut String, items: &[String]) {
    if items.is_empty() {
        return;
    }
    page.push_str("<ul>");
    for item in items {
        push(page, format_args!("<li>{}</li>", escaped(item)));
    }
    page.push_str("</ul>");
}

fn forecast_table(page: &mut String, forecast: &Forecast) {
    let gib = |bytes: usize| format!("{:.2} GiB", bytes as f64 / 2_f64.powi(30));
    let source = if forecast.tokens_per_s_measured.is_some() { "measured" } else { "predicted" };
    let rows = [
        ("Parameters", format!("{:.1} million", forecast.parameters as f64 / 1e6)),
        ("Memory to train", gib(forecast.memory_bytes)),
        ("… weights", gib(forecast.weights_bytes)),
        ("… gradients and moments", gib(forecast.state_bytes)),
        ("… activations", gib(forecast.activation_bytes)),
        ("Memory to serve", gib(forecast.serving_bytes)),
        ("Training", format!("{:.0} tokens/s, {source}", forecast.tokens_per_s)),
        ("… predicted", format!("{:.0} tokens/s", forecast.tokens_per_s_predicted)),
        ("Decoding", format!("{:.1} tokens/s, predicted", forecast.decode_tokens_per_s)),
        ("Tokens", format!("{:.3e}", forecast.tokens)),
        ("Devices", forecast.devices.to_string()),
        ("Time", format!("{:.2} days, {:.1} device-hours", forecast.days, forecast.device_hours)),
        ("Faults", format!("{:.1} expected", forecast.faults_expected)),
        (
            "… a day",
            format!(
                "{:.2}; the soak alone says below {:.0} (95%)",
                forecast.faults_per_day, forecast.faults_per_day_upper
            ),
        ),
        ("Goodput", format!("{:.1}%", 100.0 * forecast.goodput)),
    ];
    let title = format!("Forecast for {} in {}", forecast.model, forecast.dtype);
    push(page, format_args!("<h2>{}</h2><table>", escaped(&title)));
    for (name, value) in rows {
        push(page, format_args!("<tr><td>{name}</td><td>{value}</td></tr>"));
    }
    page.push_str("</table>");
}

fn conformance_part(page: &mut String, suite: &Conformance) {
    page.push_str("<h2>Conformance</h2>");
    rows_table(page, &suite.rows, &suite.unsupported);
}

fn rows_table(page: &mut String, rows: &[Row], unsupported: &[Unsupported]) {
    page.push_str(
        "<p>Errors are shares of what is allowed.</p><table><tr><th>Operation\
         </th><th>dtype</th><th>check</th><th>cases</th><th>worst</th><th></th></tr>",
    );
    let mut rows: Vec<&Row> = rows.iter().collect();
    rows.sort_by_key(|row| row.ok);
    for row in rows {
        let (mark, word) = if row.ok { ("", "ok") } else { (" class=\"bad\"", "FAILED") };
        let worst = match row.worst_error {
            error if error >= f64::MAX => "∞".to_owned(),
            error => format!("{error:.3}"),
        };
        push(
            page,
            format_args!(
                "<tr{mark}><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{worst}</td><td>{word} \
                 {}</td></tr>",
                row.op,
                row.dtype,
                row.check,
                row.cases,
                escaped(&row.detail),
            ),
        );
    }
    page.push_str("</table>");
    let reason = |one: &Unsupported| format!("{} {}: {}", one.op, one.dtype, one.reason);
    list(page, &unsupported.iter().map(reason).collect::<Vec<_>>());
}

/// One horizontal bar per operation.
fn bar_plot(rows: &[&SpeedRow]) -> String {
    const LINE: usize = 16;
    let height = rows.len() * LINE + 20;
    let mut svg = format!("<svg viewBox=\"0 0 900 {height}\" role=\"img\">");
    for percent in [0_u32, 25, 50, 75, 100] {
        let x = 190.0 + 4.0 * f64::from(percent);
        push(
            &mut svg,
            format_args!(
                "<line x1=\"{x}\" x2=\"{x}\" y1=\"0\" y2=\"{}\" stroke=\"#dfe5ec\"/><text \
                 x=\"{x}\" y=\"{}\" text-anchor=\"middle\">{percent}%</text>",
                height - 16,
                height - 3
            ),
        );
    }
    for (index, row) in rows.iter().enumerate() {
        let y = index * LINE;
        let width = 400.0 * row.roof_fraction.clamp(0.0, 1.25);
        let colour = if row.bound == Bound::Matrix { "#3566b8" } else { "#2f9a86" };
        let share = 100.0 * row.roof_fraction;
        push(
            &mut svg,
            format_args!(
                "<text x=\"184\" y=\"{}\" text-anchor=\"end\">{}</text><rect x=\"190\" y=\"{}\" \
                 width=\"{width:.1}\" height=\"11\" fill=\"{colour}\"/><text x=\"{:.1}\" \
                 y=\"{}\">{share:.0}% · {:.3} ms · {}</text>",
                y + 11,
                row.op,
                y + 2,
                196.0 + width,
                y + 11,
                row.ms,
                escaped(&row.shape),
            ),
        );
    }
    svg.push_str("</svg>");
    svg
}

/// Times over the soak.
fn line_plot(times_ms: &[f64]) -> String {
    let most = times_ms.iter().copied().fold(0.0, f64::max);
    if times_ms.len() < 2 || most <= 0.0 {
        return String::new();
    }
    let last = (times_ms.len() - 1) as f64;
    let point = |(index, ms): (usize, &f64)| {
        let (x, y) = (50.0 + 830.0 * index as f64 / last, 140.0 - 125.0 * ms / most);
        format!("{x:.1},{y:.1}")
    };
    let points: Vec<String> = times_ms.iter().enumerate().map(point).collect();
    format!(
        "<svg viewBox=\"0 0 900 160\" role=\"img\"><line x1=\"50\" x2=\"880\" y1=\"140\" \
         y2=\"140\" stroke=\"#9aa7b4\"/><text x=\"44\" y=\"20\" text-anchor=\"end\">{most:.1} ms\
         </text><text x=\"44\" y=\"144\" text-anchor=\"end\">0</text><text x=\"880\" y=\"156\" \
         text-anchor=\"end\">time of a round over the soak</text><polyline points=\"{}\" \
         fill=\"none\" stroke=\"#3566b8\" stroke-width=\"1.5\"/></svg>",
        points.join(" ")
    )
}
