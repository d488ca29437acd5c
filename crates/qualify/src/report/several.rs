//! A qualification of several devices as one object and one page: each of them, and how they
//! exchange as a group.

use serde_json::{Value, json};

use super::{Qualification, footer, list, push, rows_table, verdict_part, whole_page};
use crate::exchange::Exchange;
use crate::verdict::Verdict;

/// Everything that was found about several devices.
pub struct Several {
    /// Each of them, in the order they were named.
    pub devices: Vec<Qualification>,
    /// How they exchange.
    pub exchange: Exchange,
    /// The verdict on all of them.
    pub verdict: Verdict,
}

impl Several {
    /// The JSON object that `qualify` prints: that of one device, where rows also name theirs.
    pub fn json(&self) -> Value {
        let each: Vec<Value> = self.devices.iter().map(Qualification::json).collect();
        let rows = |part: &str| -> Vec<Value> {
            let own = |one: &Value| {
                let rows = one[part].as_array().cloned().unwrap_or_default();
                let device = one["device"]["name"].clone();
                rows.into_iter().map(move |mut row| {
                    row["device"] = device.clone();
                    row
                })
            };
            each.iter().flat_map(own).collect()
        };
        json!({
            "verdict": self.verdict.verdict,
            "reasons": self.verdict.reasons,
            "notes": self.verdict.notes,
            "ops": rows("ops"),
            "unsupported": rows("unsupported"),
            "speed": rows("speed"),
            "exchange": self.exchange,
            "forecast": self.slowest().unwrap_or_else(|| json!({})),
            "seconds": self.seconds(),
            "version": self.version(),
            "devices": each,
        })
    }

    /// The page.
    pub fn html(&self) -> String {
        let names: Vec<&str> = self.devices.iter().map(|one| one.device.name.as_str()).collect();
        let mut page = format!("<h1>{} devices</h1>", names.len());
        verdict_part(&mut page, &self.verdict);
        self.exchange_part(&mut page);
        self.devices.iter().for_each(|one| page += &one.body());
        footer(&mut page, self.version(), self.seconds());
        whole_page(&format!("{} are {}", names.join(", "), self.verdict.verdict), &page)
    }

    fn exchange_part(&self, page: &mut String) {
        let Exchange { devices, rows, unsupported, speed, failure } = &self.exchange;
        push(page, format_args!("<h2>Exchange in a group of {devices}</h2>"));
        list(page, &failure.iter().cloned().collect::<Vec<_>>());
        if !speed.is_empty() {
            page.push_str(
                "<table><tr><th>Operation</th><th>dtype</th><th>MiB</th><th>ms</th><th>GB/s on \
                 each link</th></tr>",
            );
            for row in speed {
                push(
                    page,
                    format_args!(
                        "<tr><td>{}</td><td>{}</td><td>{:.2}</td><td>{:.3}</td><td>{:.2}</td></tr>",
                        row.op,
                        row.dtype,
                        row.bytes as f64 / 2_f64.powi(20),
                        row.ms,
                        row.link_bytes_per_s / 1e9,
                    ),
                );
            }
            page.push_str("</table>");
        }
        rows_table(page, rows, unsupported);
    }

    /// A group trains as fast as its slowest member.
    fn slowest(&self) -> Option<Value> {
        let forecasts = self.devices.iter().filter_map(|one| one.forecast.as_ref());
        let slowest = forecasts.min_by(|a, b| a.tokens_per_s.total_cmp(&b.tokens_per_s));
        slowest.map(|forecast| json!(forecast))
    }

    fn seconds(&self) -> f64 {
        self.devices.iter().map(|one| one.seconds).sum()
    }

    fn version(&self) -> &str {
        self.devices.first().map_or("", |one| &one.version)
    }
}
