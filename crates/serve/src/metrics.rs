//! Counters and histograms in Prometheus' text format, under the names that vLLM's users know
//! where the meaning is the same.
//!
//! Devices' own counts come from the pool when they are asked for.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::pool::Pool;

/// Upper bounds of times in seconds.
const SECONDS: &[f64] =
    &[0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0];
/// Upper bounds of counts of tokens.
const TOKENS: &[f64] =
    &[1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0, 262_144.0, 1_048_576.0];

struct Histogram {
    bounds: &'static [f64],
    counts: Vec<AtomicU64>,
    count: AtomicU64,
    sum_millionths: AtomicU64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Histogram {
        let counts = bounds.iter().map(|_| AtomicU64::new(0)).collect();
        Histogram { bounds, counts, count: AtomicU64::new(0), sum_millionths: AtomicU64::new(0) }
    }

    fn add(&self, value: f64) {
        if let Some(bucket) = self.bounds.iter().position(|&bound| value <= bound) {
            self.counts[bucket].fetch_add(1, Relaxed);
        }
        self.count.fetch_add(1, Relaxed);
        self.sum_millionths.fetch_add((value * 1e6) as u64, Relaxed);
    }

    fn write(&self, page: &mut Page, name: &str, help: &str) {
        page.head(name, help, "histogram");
        let mut below = 0;
        for (bound, count) in self.bounds.iter().zip(&self.counts) {
            below += count.load(Relaxed);
            page.line(&format!("{name}_bucket"), &[("le", &bound.to_string())], below as f64);
        }
        let count = self.count.load(Relaxed) as f64;
        page.line(&format!("{name}_bucket"), &[("le", "+Inf")], count);
        page.line(&format!("{name}_sum"), &[], self.sum_millionths.load(Relaxed) as f64 * 1e-6);
        page.line(&format!("{name}_count"), &[], count);
    }
}

/// The times of one request.
#[derive(Clone, Copy, Debug, Default)]
pub struct Times {
    /// From its arrival until a device took it up.
    pub queued: Duration,
    /// From then to its first token.
    pub prefill: Duration,
    /// From its first token to its last.
    pub decode: Duration,
    /// From its arrival to its last token.
    pub whole: Duration,
}

/// What is counted about requests.
pub struct Metrics {
    first_token: Histogram,
    next_token: Histogram,
    whole: Histogram,
    queued: Histogram,
    prefill: Histogram,
    decode: Histogram,
    inference: Histogram,
    prompt_tokens: Histogram,
    generated_tokens: Histogram,
    stopped: AtomicU64,
    at_length: AtomicU64,
    aborted: AtomicU64,
    failed: AtomicU64,
}

impl Default for Metrics {
    fn default() -> Metrics {
        let times = || Histogram::new(SECONDS);
        Metrics {
            first_token: times(),
            next_token: times(),
            whole: times(),
            queued: times(),
            prefill: times(),
            decode: times(),
            inference: times(),
            prompt_tokens: Histogram::new(TOKENS),
            generated_tokens: Histogram::new(TOKENS),
            stopped: AtomicU64::new(0),
            at_length: AtomicU64::new(0),
            aborted: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        }
    }
}

impl Metrics {
    /// A request's first token came after this time.
    pub fn first_token(&self, time: Duration) {
        self.first_token.add(time.as_secs_f64());
    }

    /// A further token came this long after the one before.
    pub fn next_token(&self, time: Duration) {
        self.next_token.add(time.as_secs_f64());
    }

    /// A request was answered.
    pub fn answered(&self, times: &Times, prompt_tokens: usize, generated_tokens: usize) {
        self.whole.add(times.whole.as_secs_f64());
        self.queued.add(times.queued.as_secs_f64());
        self.prefill.add(times.prefill.as_secs_f64());
        self.decode.add(times.decode.as_secs_f64());
        self.inference.add((times.prefill + times.decode).as_secs_f64());
        self.prompt_tokens.add(prompt_tokens as f64);
        self.generated_tokens.add(generated_tokens as f64);
    }

    /// A completion ended, for the reason that OpenAI names so.
    pub fn ended(&self, reason: &str) {
        let counter = if reason == "length" { &self.at_length } else { &self.stopped };
        counter.fetch_add(1, Relaxed);
    }

    /// So many completions were given up because their client left.
    pub fn aborted(&self, count: usize) {
        self.aborted.fetch_add(count as u64, Relaxed);
    }

    /// A request failed.
    pub fn failed(&self) {
        self.failed.fetch_add(1, Relaxed);
    }

    /// The whole page.
    pub fn page(&self, pool: &Pool, model: &str) -> String {
        let mut page = Page { text: String::new(), model: escaped(model) };
        devices(&mut page, pool);
        let name = "vllm:request_success_total";
        page.head(name, "Completions that ended, by reason.", "counter");
        let reasons =
            [("stop", &self.stopped), ("length", &self.at_length), ("abort", &self.aborted)];
        for (reason, count) in reasons {
            page.line(name, &[("finished_reason", reason)], count.load(Relaxed) as f64);
        }
        let name = "pontoon:request_failed_total";
        page.head(name, "Requests that could not be answered.", "counter");
        page.line(name, &[], self.failed.load(Relaxed) as f64);
        let name = "pontoon:request_moved_total";
        page.head(name, "Requests moved from a failed device to another.", "counter");
        page.line(name, &[], pool.moved() as f64);
        let name = "pontoon:audits_total";
        page.head(name, "Requests scored again on another device, by result.", "counter");
        let audits = pool.audits();
        let results = [
            ("agreed", &audits.agreed),
            ("disagreed", &audits.disagreed),
            ("dropped", &audits.dropped),
        ];
        for (result, count) in results {
            page.line(name, &[("result", result)], count.load(Relaxed) as f64);
        }
        let histograms = [
            (
                &self.first_token,
                "time_to_first_token_seconds",
                "From a request to its first token.",
            ),
            (&self.next_token, "inter_token_latency_seconds", "From one token to the next."),
            (&self.next_token, "time_per_output_token_seconds", "The same under its older name."),
            (&self.whole, "e2e_request_latency_seconds", "From a request to its last token."),
            (&self.queued, "request_queue_time_seconds", "Until a device took a request up."),
            (&self.prefill, "request_prefill_time_seconds", "From then to the first token."),
            (&self.decode, "request_decode_time_seconds", "From the first token to the last."),
            (&self.inference, "request_inference_time_seconds", "Both together."),
            (&self.prompt_tokens, "request_prompt_tokens", "Tokens of a request's prompts."),
            (&self.generated_tokens, "request_generation_tokens", "Tokens drawn for a request."),
        ];
        for (histogram, name, help) in histograms {
            histogram.write(&mut page, &format!("vllm:{name}"), help);
        }
        page.text
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
                page.device_line(name, index, &state.name, read(stats));
            }
        }
    }
    page.head("pontoon:device_up", "Whether a device serves.", "gauge");
    for (index, state) in states.iter().enumerate() {
        let up = f64::from(u8::from(state.phase == "serving"));
        page.device_line("pontoon:device_up", index, &state.name, up);
    }
    page.head("pontoon:device_failures_total", "How often a device has failed.", "counter");
    for (index, state) in states.iter().enumerate() {
        let failures = f64::from(state.failures);
        page.device_line("pontoon:device_failures_total", index, &state.name, failures);
    }
    let help = "How often a device was caught computing something wrong.";
    page.head("pontoon:device_drifts_total", help, "counter");
    for (index, state) in states.iter().enumerate() {
        let drifts = f64::from(state.drifts);
        page.device_line("pontoon:device_drifts_total", index, &state.name, drifts);
    }
}

/// A label's value as the format wants it.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

struct Page {
    text: String,
    model: String,
}

impl Page {
    fn head(&mut self, name: &str, help: &str, kind: &str) {
        writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}")
            .expect("writing to a text cannot fail");
    }

    fn line(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        let more: String =
            labels.iter().map(|(key, text)| format!(",{key}=\"{}\"", escaped(text))).collect();
        let model = &self.model;
        writeln!(self.text, "{name}{{model_name=\"{model}\"{more}}} {value}")
            .expect("writing to a text cannot fail");
    }

    fn device_line(&mut self, name: &str, engine: usize, device: &str, value: f64) {
        self.line(name, &[("engine", &engine.to_string()), ("device", device)], value);
    }
}
