//! `pontoon demo`: a model learns to add from nothing on two emulated chips that misbehave, is
//! moved live to the CPU, survives the loss of its supervisor too, ends with the same bits as a run
//! that was left in peace, and with the certificate of the move.
//!
//! Training happens in processes of their own, as the kills are real. Read next: `train.rs`,
//! `moving.rs`, `eval.rs`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use pontoon_fleet::control::{ControlSocket, Request};
use pontoon_fleet::run_dir::read_lines;
use pontoon_fleet::world::{Control, RealDisk};
use pontoon_ops::DType;
use pontoon_train::RunConfig;
use pontoon_train::arithmetic::{Addition, Purpose, additions};
use pontoon_train::data::{Import, Prepare, train_tokenizer};
use serde_json::{Value, json};

use super::eval::{Answered, Exam};
use super::{faults, moving, show};
use crate::devices;
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

/// What goes wrong on purpose, before the run is moved.
const FAULTS: &str = r#"
[[fault]]
worker = 1
step = 20
kind = "crash"
[[fault]]
worker = 0
step = 40
kind = "hang"
[[fault]]
worker = 1
step = 60
kind = "bitflip"
tensor = "weights"
bit = 29
"#;
/// When the run is moved, and when its supervisor is killed.
const MOVED_AT: u64 = 80;
const KILLED_AT: u64 = 150;
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
    let config = RunConfig::parse(SETTINGS, &[], "the demo's settings")?;
    let (disturbed, certificate, killed_at) = disturb(dir, &config)?;
    let survived = faults::of_run(&dir.join("disturbed"))?;
    say("   the loss, and where the faults struck:");
    let moved_at = certificate["step"].as_u64().unwrap_or(MOVED_AT);
    loss_curve(dir, &survived, moved_at, config.train.steps)?.iter().for_each(|line| say(line));
    faults::table(&survived).iter().for_each(|line| say(line));
    let peaceful = in_peace(dir, &config, moved_at)?;
    let hash = |summary: &Value| summary["weights_blake3"].as_str().unwrap_or("?").to_owned();
    let (interrupted, undisturbed) = (hash(&disturbed), hash(&peaceful));
    say(&format!("   disturbed    {interrupted}\n   undisturbed  {undisturbed}"));
    ensure!(
        interrupted == undisturbed,
        "the two runs differ: this machine computes wrongly, or Pontoon does; please report it"
    );
    say("   the same weights, bit for bit");
    let (untrained, trained) = ask(&dir.join("disturbed"), config.train.seed)?;
    say("5  The certificate of the move, on which the trust in the second half rests");
    moving::lines(&certificate).iter().for_each(|line| say(&format!("   {line}")));
    say(&format!("done in {}", show::duration(begun.elapsed().as_secs_f64())));
    if let Some(dir) = kept {
        let dir = dir.display();
        say(&format!("try: pontoon generate {dir}/disturbed -p '57+968=?'"));
    }
    if arguments.json {
        let result = json!({
            "killed_at_step": killed_at,
            "moved_at_step": moved_at,
            "certificate": certificate,
            "faults": survived,
            "goodput": disturbed["goodput"],
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

/// Trains through faults, a move and the loss of the supervisor; returns what the run says at its
/// end, the move's certificate, and the step at which the supervisor was killed.
fn disturb(dir: &Path, config: &RunConfig) -> Result<(Value, Value, u64)> {
    let chip = devices::emulated();
    say(&format!("2  Training a Qwen3 of a million parameters from nothing, on two of {chip}:"));
    say("   one will crash and flip a bit of its weights, one will hang; then the run is moved");
    say("   live to the CPU, and there its supervisor is killed");
    let run = dir.join("disturbed");
    let chaos = dir.join("chaos.toml").display().to_string();
    let chips = ["--device", chip, "--device", chip, "--chaos", &chaos];
    let mut child = start(dir, "disturbed", &chips)?;
    await_step(&run, MOVED_AT, &mut child)?;
    let to = devices::destination();
    say(&format!("   pontoon move {} --to {}", run.display(), to.join(",")));
    let answer = ControlSocket
        .ask(&run, &Request::Move { to })
        .context("cannot ask the run")?
        .context("the run answers nobody")?;
    ensure!(answer.ok, "the run could not be moved: {}", answer.text);
    say(&format!("   {}", answer.text));
    let certificate = answer.facts.get("certificate").cloned().unwrap_or_default();
    let killed_at = await_step(&run, KILLED_AT, &mut child)?;
    child.kill().context("cannot kill the training process")?;
    child.wait()?;
    ensure!(killed_at < config.train.steps, "the run was done before it could be killed");
    say(&format!("   supervisor killed with SIGKILL at step {killed_at}; it is started again"));
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let mut command = Command::new(program);
    command.arg("train").arg(&run).args(["--resume", "--json"]);
    Ok((finish(spawn(&mut command)?)?, certificate, killed_at))
}

/// The same run with no fault, no kill and no fleet: on one chip up to where it was moved, and from
/// there on the CPU.
fn in_peace(dir: &Path, config: &RunConfig, moved_at: u64) -> Result<Value> {
    say("3  The same run once more, in one process and in peace, to compare");
    let decays_from = config.train.steps as f64 * (1.0 - config.train.decay);
    ensure!((moved_at as f64) < decays_from, "this machine is too slow for the demo's settings");
    let (chip, steps) = (devices::emulated(), moved_at.to_string());
    // Up to there the learning rate does not fall, so it does not matter where the run would end.
    let alone = "--in-process";
    let first = [alone, "--device", chip, "--steps", &steps, "--set", "train.schedule=constant"];
    finish(start(dir, "peaceful", &first)?)?;
    finish(start(dir, "peaceful", &[alone, "--resume", "--device", "cpu"])?)
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

/// The losses of the disturbed run as a line of bars, with a line of faults and the move below.
fn loss_curve(dir: &Path, faults: &[Value], moved_at: u64, steps: u64) -> Result<Vec<String>> {
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
    marks[column(moved_at)] = '→';
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
    let mut command = Command::new(program);
    command.arg("train").arg(dir.join("run.toml")).arg("--dir").arg(dir.join(name));
    spawn(command.arg("--json").args(more))
}

fn spawn(command: &mut Command) -> Result<Child> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start a training process")
}

fn finish(child: Child) -> Result<Value> {
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "the training process failed: {}", output.status);
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Waits until a run has done `step` steps; returns the last step it wrote.
fn await_step(run: &Path, step: u64, child: &mut Child) -> Result<u64> {
    let metrics = run.join("metrics.jsonl");
    loop {
        let last = read_lines(&RealDisk, &metrics)?.last().and_then(|line| line["step"].as_u64());
        if let Some(last) = last.filter(|&last| last >= step) {
            return Ok(last);
        }
        if let Some(status) = child.try_wait()? {
            bail!("the training process ended before it was to: {status}");
        }
        std::thread::sleep(LOOK_EVERY);
    }
}
