//! `pontoon demo`: a model learns to add from nothing on three workers, of which one crashes, one
//! hangs and one flips a bit, survives the loss of its supervisor too, and ends with the same bits
//! as a run that was left in peace.
//!
//! Training happens in processes of their own, as the kills are real. Read next: `train.rs`,
//! `eval.rs`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use pontoon_fleet::run_dir::read_lines;
use pontoon_fleet::world::RealDisk;
use pontoon_ops::DType;
use pontoon_train::RunConfig;
use pontoon_train::arithmetic::{Addition, Purpose, additions};
use pontoon_train::data::{Import, Prepare, train_tokenizer};
use serde_json::{Value, json};

use super::eval::{Answered, Exam};
use super::{faults, show};
use crate::model_source::ModelSource;

/// Additions to learn from: more than the steps take, so that none comes twice.
const ADDITIONS: usize = 40_000;
/// Problems asked at the end.
const PROBLEMS: usize = 200;
/// Tokens of the longest reply, with some to spare.
const REPLY_TOKENS: usize = 64;
/// How often the demo looks whether the run is half way.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// The run's settings.
const SETTINGS: &str = r#"
[model]
preset = "qwen3-1m"
[data]
train = ["shards/*.bin"]
tokenizer = "tokenizer.json"
sequence = 256
[train]
steps = 240
micro_batch = 2
micro_batches = 4
optimizer = "muon"
lr = 6e-3
schedule = "wsd"
decay = 0.4
warmup = 10
weight_decay = 0.0
[snapshot]
every = 40
"#;

/// What goes wrong on purpose.
const FAULTS: &str = r#"
[[fault]]
worker = 1
step = 40
kind = "crash"
[[fault]]
worker = 2
step = 80
kind = "hang"
[[fault]]
worker = 0
step = 100
kind = "bitflip"
tensor = "weights"
bit = 29
"#;
/// The workers of the disturbed run.
const WORKERS: [&str; 2] = ["--workers", "3"];
/// Columns of the loss curve.
const COLUMNS: usize = 60;

/// The arguments of `pontoon demo`.
#[derive(Args)]
pub struct Arguments {
    /// Keep everything in this new folder; by default it goes when the demo ends.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Tells the story.
pub fn run(arguments: &Arguments) -> Result<()> {
    let begun = Instant::now();
    let kept = arguments.dir.as_ref();
    if let Some(dir) = kept {
        ensure!(!dir.exists(), "`{}` is there already; give another --dir", dir.display());
        std::fs::create_dir_all(dir)
            .with_context(|| format!("cannot create `{}`", dir.display()))?;
    }
    let temporary = tempfile::tempdir().context("cannot make a temporary folder")?;
    let dir = kept.map_or(temporary.path(), PathBuf::as_path);
    say("1  Data: additions with every step written out, and a tokenizer for them");
    prepare(dir)?;
    say("2  Training a Qwen3 of a million parameters from nothing, on three workers: one will");
    say("   crash, one will hang, one will flip a bit of its weights; then their supervisor goes");
    let config = RunConfig::parse(SETTINGS, &[], "the demo's settings")?;
    let chaos = dir.join("chaos.toml").display().to_string();
    let disturbed = [&WORKERS[..], &["--chaos", &chaos]].concat();
    let half = config.train.steps / 2 + 7;
    let killed_at = train_and_kill(dir, half, &disturbed)?;
    say(&format!("   supervisor killed with SIGKILL at step {killed_at}; it is started again"));
    let resumed = train(dir, "disturbed", &[&disturbed[..], &["--resume"]].concat())?;
    let survived = faults::of_run(&dir.join("disturbed"))?;
    say("   the loss, and where the faults struck:");
    loss_curve(dir, &survived, config.train.steps)?.iter().for_each(|line| say(line));
    faults::table(&survived).iter().for_each(|line| say(line));
    say("3  The same run once more, in one process and in peace, to compare");
    let peaceful = train(dir, "peaceful", &[])?;
    let hash = |summary: &Value| summary["weights_blake3"].as_str().unwrap_or("?").to_owned();
    let (interrupted, undisturbed) = (hash(&resumed), hash(&peaceful));
    say(&format!("   disturbed    {interrupted}\n   undisturbed  {undisturbed}"));
    ensure!(
        interrupted == undisturbed,
        "the two runs differ: this machine computes wrongly, or Pontoon does; please report it"
    );
    say("   the same weights, bit for bit");
    let (untrained, trained) = ask(&dir.join("disturbed"), config.train.seed)?;
    say(&format!("done in {}", show::duration(begun.elapsed().as_secs_f64())));
    if let Some(dir) = kept {
        let dir = dir.display();
        say(&format!("try: pontoon generate {dir}/disturbed -p '57+968=?'"));
    }
    if arguments.json {
        let result = json!({
            "killed_at_step": killed_at,
            "faults": survived,
            "goodput": resumed["goodput"],
            "weights_blake3": interrupted,
            "undisturbed_weights_blake3": undisturbed,
            "exact_match_untrained": untrained,
            "exact_match": trained,
            "tokens_per_s": peaceful["tokens_per_s"],
            "loss": peaceful["loss"],
        });
        println!("{result}");
    }
    Ok(())
}

/// Puts fresh problems to the untrained and to the trained model; the share each answers rightly.
fn ask(run: &Path, seed: u64) -> Result<(f64, f64)> {
    say("4  Fresh problems, none of them in the training data");
    let source = ModelSource::open(run)?;
    let problems: Vec<_> =
        additions(2, Purpose::Ask, PROBLEMS).into_iter().map(Addition::problem).collect();
    let exam = Exam {
        source: &source,
        problems: &problems,
        tokens: REPLY_TOKENS,
        device: "cpu",
        dtype: DType::Bf16,
    };
    let untrained = share(&exam.sit(&source.model.initialise(seed))?);
    let answered = exam.sit(&source.weights()?)?;
    let trained = share(&answered);
    for (problem, one) in problems.iter().zip(&answered).take(4) {
        let mark = if one.right { "right" } else { "wrong" };
        say(&format!("   {}  {}  {mark}", problem.prompt, one.reply));
    }
    say(&format!(
        "   exact match: {:.1}% before training, {:.1}% after ({PROBLEMS} problems)",
        100.0 * untrained,
        100.0 * trained
    ));
    Ok((untrained, trained))
}

fn say(text: &str) {
    eprintln!("{text}");
}

/// The losses of the disturbed run as a line of bars, and a line with the faults below it.
fn loss_curve(dir: &Path, faults: &[Value], steps: u64) -> Result<Vec<String>> {
    let lines = read_lines(&RealDisk, &dir.join("disturbed/metrics.jsonl"))?;
    let mut losses = vec![f64::NAN; COLUMNS];
    let column = |step: u64| ((step.saturating_sub(1)) as usize * COLUMNS / steps as usize).min(59);
    for line in &lines {
        if let (Some(step), Some(loss)) = (line["step"].as_u64(), line["loss"].as_f64()) {
            losses[column(step)] = loss;
        }
    }
    let most = losses.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
    let least = losses.iter().copied().fold(most, f64::min);
    let bars: Vec<char> = "▁▂▃▄▅▆▇█".chars().collect();
    // On a logarithmic scale, as most of the fall is at the start.
    let height = |loss: &f64| (loss / least).ln() / (most / least).ln().max(f64::MIN_POSITIVE);
    let bar = |loss: &f64| bars[((height(loss) * 8.0) as usize).min(7)];
    let mut marks = vec![' '; COLUMNS];
    for fault in faults {
        let letter = fault["kind"].as_str().and_then(|kind| kind.chars().next());
        marks[column(fault["step"].as_u64().unwrap_or(1))] = letter.unwrap_or('?');
    }
    let curve: String = losses.iter().map(bar).collect();
    let marks: String = marks.into_iter().collect();
    let last = losses.last().copied().unwrap_or(f64::NAN);
    Ok(vec![format!("   {curve}  {most:.2} to {last:.2}"), format!("   {marks}")])
}

fn share(answered: &[Answered]) -> f64 {
    answered.iter().filter(|one| one.right).count() as f64 / answered.len() as f64
}

/// Writes texts, tokenizer, shards and settings.
fn prepare(dir: &Path) -> Result<()> {
    let texts = dir.join("additions.jsonl");
    let write = || -> std::io::Result<()> {
        let mut file = std::io::BufWriter::new(std::fs::File::create(&texts)?);
        for sum in additions(1, Purpose::Train, ADDITIONS) {
            let (question, reply) = (sum.problem().prompt, sum.reply());
            let text = format!(
                "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{reply}<|im_end|>\n"
            );
            writeln!(file, "{}", json!({ "text": text }))?;
        }
        file.flush()?;
        std::fs::write(dir.join("run.toml"), SETTINGS)?;
        std::fs::write(dir.join("chaos.toml"), FAULTS)
    };
    write().with_context(|| format!("cannot write to `{}`", dir.display()))?;
    let import = Import::open(&[texts.display().to_string()], "text", 0)?;
    let tokenizer = dir.join("tokenizer.json");
    let trained = train_tokenizer(&import, 384, &tokenizer)?;
    let import = Import::open(&[texts.display().to_string()], "text", 0)?;
    let prepare = Prepare {
        import: &import,
        tokenizer: &tokenizer,
        out: &dir.join("shards"),
        valid_fraction: 0.0,
    };
    let done = import.bytes_done();
    let prepared = show::with_bytes(import.bytes_total(), &done, || prepare.run())?;
    let tokens = show::count(prepared.tokens as f64);
    let count = prepared.documents;
    say(&format!("   {count} additions, {tokens} tokens of {} kinds", trained.vocabulary));
    Ok(())
}

/// Starts a training process on the demo's settings.
fn start(dir: &Path, name: &str, more: &[&str]) -> Result<Child> {
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    Command::new(program)
        .arg("train")
        .arg(dir.join("run.toml"))
        .arg("--dir")
        .arg(dir.join(name))
        .arg("--json")
        .args(more)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start a training process")
}

fn train(dir: &Path, name: &str, more: &[&str]) -> Result<Value> {
    let output = start(dir, name, more)?.wait_with_output()?;
    ensure!(output.status.success(), "the training process failed: {}", output.status);
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Starts the run and kills it once it has done `step` steps; returns the last step it wrote.
fn train_and_kill(dir: &Path, step: u64, more: &[&str]) -> Result<u64> {
    let mut child = start(dir, "disturbed", more)?;
    let metrics = dir.join("disturbed/metrics.jsonl");
    loop {
        let last = read_lines(&RealDisk, &metrics)?.last().and_then(|line| line["step"].as_u64());
        if let Some(last) = last.filter(|&last| last >= step) {
            child.kill().context("cannot kill the training process")?;
            child.wait()?;
            return Ok(last);
        }
        if let Some(status) = child.try_wait()? {
            bail!("the training process ended before it could be killed: {status}");
        }
        std::thread::sleep(LOOK_EVERY);
    }
}
