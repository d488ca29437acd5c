//! `pontoon generate`: continues a prompt, token by token on stdout.

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::Args;
use pontoon_models::{GeneratorOptions, SamplingSettings, SpecialTokens, Tokenizer};
use serde_json::json;

use crate::engine::{Engine, dtype, weight_format};
use crate::model_source::{ModelSource, chat_prompt};

/// The arguments of `pontoon generate`.
#[derive(Args)]
pub struct Arguments {
    /// A model, snapshot or run folder.
    model: PathBuf,
    /// The prompt; put into the chat template where the model has one.
    #[arg(short, long)]
    prompt: String,
    /// Tokens at most.
    #[arg(short = 'n', long = "tokens", default_value_t = 256)]
    tokens: usize,
    /// The device, as in `pontoon devices`.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// 0 takes the most likely token.
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Tokens kept by rank; 0 for all.
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Probability kept; 1 for all.
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// Share of the best token's probability that is kept; 0 for all.
    #[arg(long, default_value_t = 0.0)]
    min_p: f32,
    /// Decides every draw.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Say how likely each token was.
    #[arg(long)]
    logprobs: bool,
    /// A system message.
    #[arg(long)]
    system: Option<String>,
    /// Take the prompt as it is, without a chat template.
    #[arg(long)]
    raw: bool,
    /// bf16, f16 or f32.
    #[arg(long, default_value = "bf16")]
    dtype: String,
    /// How weights are stored: as --dtype says, int8 or int4 (integers with a scale per group).
    #[arg(long)]
    weights: Option<String>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Generates.
pub fn run(arguments: &Arguments) -> Result<()> {
    let source = ModelSource::open(&arguments.model)?;
    let tokenizer = source.tokenizer()?;
    let prompt = prompt_of(arguments, &source, &tokenizer)?;
    ensure!(!prompt.is_empty(), "the prompt is empty; give at least one character");
    let most = source.model.config.max_positions;
    let options = GeneratorOptions {
        vocabulary: Some(tokenizer.vocab_size()),
        ..GeneratorOptions::new(
            dtype(&arguments.dtype)?,
            (prompt.len() + arguments.tokens).clamp(2, most),
            1,
        )
    };
    let settings = settings_of(arguments);
    let model = source.stored(weight_format(arguments.weights.as_deref(), &arguments.dtype)?)?;
    let tensors = source.tensors()?;
    let mut engine = Engine::load_from(&arguments.device, &model, &tensors, options)?;
    let mut stream = tokenizer.stream(SpecialTokens::Show);
    let mut refused = None;
    let started = Instant::now();
    let completions = engine.generator.generate(
        engine.backend.as_mut(),
        std::slice::from_ref(&prompt),
        &settings,
        tokenizer.eos(),
        &mut |drawn| {
            let ends = tokenizer.eos().contains(&drawn.token);
            if arguments.json || ends {
                return;
            }
            match stream.push(drawn.token) {
                Ok(text) if arguments.logprobs => println!("{:>9.4}  {text:?}", drawn.logprob),
                Ok(text) => {
                    print!("{text}");
                    // A closed pipe shows when the text is complete.
                    let _ = std::io::stdout().flush();
                }
                Err(error) => refused = Some(error),
            }
        },
    )?;
    if let Some(error) = refused {
        return Err(error.into());
    }
    let completion = &completions[0];
    let tokens_per_s = completion.tokens.len() as f64 / started.elapsed().as_secs_f64();
    if arguments.json {
        let text = tokenizer.decode(&completion.tokens, SpecialTokens::Hide)?;
        let result = json!({
            "prompt_tokens": prompt,
            "tokens": completion.tokens,
            "text": text,
            "logprobs": completion.logprobs,
            "tokens_per_s": tokens_per_s,
        });
        println!("{result}");
    } else {
        println!("{}", stream.finish()?);
        eprintln!("{} tokens, {tokens_per_s:.1} tokens/s", completion.tokens.len());
    }
    Ok(())
}

/// The prompt's tokens, in the model's chat format where it has one.
fn prompt_of(
    arguments: &Arguments,
    source: &ModelSource,
    tokenizer: &Tokenizer,
) -> Result<Vec<u32>> {
    let template = if arguments.raw { None } else { source.chat_template()? };
    Ok(match &template {
        Some(template) => {
            let text = chat_prompt(template, arguments.system.as_deref(), &arguments.prompt)?;
            tokenizer.encode(&text)?
        }
        None => tokenizer.encode_as_document(&arguments.prompt)?,
    })
}

fn settings_of(arguments: &Arguments) -> SamplingSettings {
    SamplingSettings {
        temperature: arguments.temperature,
        top_k: arguments.top_k,
        top_p: arguments.top_p,
        min_p: arguments.min_p,
        seed: arguments.seed,
        tokens_max: arguments.tokens,
        ..SamplingSettings::default()
    }
}
