//! Counters and histograms in Prometheus' text format, under the names that vLLM's users know
//! where the meaning is the same.
//!
//! Devices' own counts come from the pool when they are asked for.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::pool::Pool;

/// Upper bounds of the histograms in seconds.
const BOUNDS: [f64; 14] =
    [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0];

#[derive(Default)]
struct Histogram {
    counts: [AtomicU64; BOUNDS.len()],
    count: AtomicU64,
    sum_microseconds: AtomicU64,
}

impl Histogram {
    fn add(&self, time: Duration) {
        let seconds = time.as_secs_f64();
        if let Some(bucket) = BOUNDS.iter().position(|&bound| seconds <= bound) {
            self.counts[bucket].fetch_add(1, Relaxed);
        }
        self.count.fetch_add(1, Relaxed);
        self.sum_microseconds.fetch_add(time.as_micros() as u64, Relaxed);
    }

    fn write(&self, into: &mut Page, name: &str, help: &str) {
        into.head(name, help, "histogram");
        let mut below = 0;
        for (bound, count) in BOUNDS.iter().zip(&self.counts) {
            below += count.load(Relaxed);
            into.line(&format!("{name}_bucket{{le=\"{bound}\"}}"), below as f64);
        }
        let count = self.count.load(Relaxed) as f64;
        into.line(&format!("{name}_bucket{{le=\"+Inf\"}}"), count);
        into.line(&format!("{name}_sum"), self.sum_microseconds.load(Relaxed) as f64 * 1e-6);
        into.line(&format!("{name}_count"), count);
    }
}

/// What is counted about requests.
#[derive(Default)]
pub struct Metrics {
    first_token: Histogram,
    next_token: Histogram,
    answered: Histogram,
    stopped: AtomicU64,
    at_length: AtomicU64,
    failed: AtomicU64,
}

impl Metrics {
    /// A request's first token came after this time.
    pub fn first_token(&self, time: Duration) {
        self.first_token.add(time);
    }

    /// A further token came this long after the one before.
    pub fn next_token(&self, time: Duration) {
        self.next_token.add(time);
    }

    /// A request was answered after this time.
    pub fn answered(&self, time: Duration) {
        self.answered.add(time);
    }

    /// A completion ended, for the reason that OpenAI names so.
    pub fn ended(&self, reason: &str) {
        let counter = if reason == "length" { &self.at_length } else { &self.stopped };
        counter.fetch_add(1, Relaxed);
    }

    /// A request failed.
    pub fn failed(&self) {
        self.failed.fetch_add(1, Relaxed);
    }

    /// The whole page.
    pub fn page(&self, pool: &Pool) -> String {
        let mut page = Page(String::new());
        devices(&mut page, pool);
        let name = "vllm:request_success_total";
        page.head(name, "Completions that ended, by reason.", "counter");
        let reasons = [("stop", &self.stopped), ("length", &self.at_length)];
        for (reason, count) in reasons {
            let line = format!("{name}{{finished_reason=\"{reason}\"}}");
            page.line(&line, count.load(Relaxed) as f64);
        }
        let name = "pontoon:request_failed_total";
        page.head(name, "Requests that could not be answered.", "counter");
        page.line(name, self.failed.load(Relaxed) as f64);
        let name = "pontoon:request_moved_total";
        page.head(name, "Requests moved from a failed device to another.", "counter");
        page.line(name, pool.moved() as f64);
        let name = "vllm:time_to_first_token_seconds";
        self.first_token.write(&mut page, name, "From a request to its first token.");
        let name = "vllm:time_per_output_token_seconds";
        self.next_token.write(&mut page, name, "From one token to the next.");
        let name = "vllm:e2e_request_latency_seconds";
        self.answered.write(&mut page, name, "From a request to its last token.");
        page.0
    }
}

/// Reads one number of a device.
type Read = fn(&crate::engine::worker::Stats) -> f64;

fn devices(page: &mut Page, pool: &Pool) {
    let rows: [(&str, &str, &str, Read); 11] = [
        ("vllm:num_requests_running", "gauge", "Sequences that run.", |stats| {
            stats.running.load(Relaxed) as f64
        }),
        ("vllm:num_requests_waiting", "gauge", "Sequences that wait for a place.", |stats| {
            stats.waiting.load(Relaxed) as f64
        }),
        ("vllm:kv_cache_usage_perc", "gauge", "Share of cache blocks in use, 0 to 1.", |stats| {
            let blocks = stats.blocks.load(Relaxed).max(1);
            stats.blocks_used.load(Relaxed) as f64 / blocks as f64
        }),
        ("vllm:prompt_tokens_total", "counter", "Prompt tokens computed.", |stats| {
            stats.prompt_tokens.load(Relaxed) as f64
        }),
        ("vllm:generation_tokens_total", "counter", "Tokens drawn.", |stats| {
            stats.generated_tokens.load(Relaxed) as f64
        }),
        ("vllm:num_preemptions_total", "counter", "Sequences that gave way.", |stats| {
            stats.preemptions.load(Relaxed) as f64
        }),
        ("vllm:prefix_cache_queries_total", "counter", "Tokens looked up.", |stats| {
            stats.prefix_tokens_asked.load(Relaxed) as f64
        }),
        ("vllm:prefix_cache_hits_total", "counter", "Tokens found in the cache.", |stats| {
            stats.prefix_tokens_found.load(Relaxed) as f64
        }),
        ("vllm:spec_decode_num_draft_tokens_total", "counter", "Tokens guessed.", |stats| {
            stats.drafted_tokens.load(Relaxed) as f64
        }),
        ("vllm:spec_decode_num_accepted_tokens_total", "counter", "Guesses kept.", |stats| {
            stats.accepted_tokens.load(Relaxed) as f64
        }),
        ("pontoon:steps_total", "counter", "Steps run.", |stats| stats.steps.load(Relaxed) as f64),
    ];
    let states = pool.devices();
    for (name, kind, help, read) in rows {
        page.head(name, help, kind);
        for (index, state) in states.iter().enumerate() {
            if let Some(stats) = &state.stats {
                page.line(&labelled(name, index, &state.name), read(stats));
            }
        }
    }
    page.head("pontoon:device_up", "Whether a device serves.", "gauge");
    for (index, state) in states.iter().enumerate() {
        let up = f64::from(u8::from(state.phase == "serving"));
        page.line(&labelled("pontoon:device_up", index, &state.name), up);
    }
    page.head("pontoon:device_failures_total", "How often a device has failed.", "counter");
    for (index, state) in states.iter().enumerate() {
        let name = labelled("pontoon:device_failures_total", index, &state.name);
        page.line(&name, f64::from(state.failures));
    }
}

fn labelled(name: &str, engine: usize, device: &str) -> String {
    let device = device.replace('\\', "\\\\").replace('"', "\\\"");
    format!("{name}{{engine=\"{engine}\",device=\"{device}\"}}")
}

struct Page(String);

impl Page {
    fn head(&mut self, name: &str, help: &str, kind: &str) {
        writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}")
            .expect("writing to a text cannot fail");
    }

    fn line(&mut self, name: &str, value: f64) {
        writeln!(self.0, "{name} {value}").expect("writing to a text cannot fail");
    }
}
