//! /v1/completions: prompts as text or token ids, continued; also scored, with `echo`.
//!
//! Conversations are `chat.rs`.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use pontoon_models::SpecialTokens;
use serde_json::{Value, json};

use super::errors::ApiError;
use super::fields::{Fields, wrong};
use super::flow::{Flow, Step};
use super::logprobs::{CompletionLogprobs, prompt_entries};
use super::settings::{
    Settings, StreamUsage, TOP_LOGPROBS_MAX, Told, around, prompt_logprobs, prompt_tokens_kept,
    truncate,
};
use super::sse::{Left, Out, stream};
use super::{body, formats, reply, usage_json};
use crate::app::App;
use crate::engine::request::Scored;
use crate::seats::Seat;

/// Tokens of a completion if the request does not say, as OpenAI has it.
const TOKENS_DEFAULT: usize = 16;
/// Prompts of one request at most.
const PROMPTS_MAX: usize = 1024;

/// Sequences of one request at most: each holds its prompt while it waits.
const SEQUENCES_MAX: usize = 1024;

/// A request as read.
struct Wanted {
    id: String,
    prompts: Vec<Vec<u32>>,
    settings: Settings,
    echo: bool,
    /// Likeliest tokens to tell; `None` for no log-probabilities.
    logprobs: Option<usize>,
    /// The same of the prompts' tokens, in an object of their own.
    prompt_logprobs: Option<usize>,
    /// Its place among the requests that are answered.
    _seat: Seat,
}

/// The endpoint.
pub async fn completions(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, ApiError> {
    let value = body(&app, request).await?;
    let wanted = Wanted::read(&Fields::of(&value)?, &app)?;
    if wanted.settings.stream {
        return Ok(stream(app, move |app, out| async move { streamed(&app, wanted, out).await }));
    }
    whole(&app, &wanted).await
}

impl Wanted {
    fn read(fields: &Fields<'_>, app: &App) -> Result<Wanted, ApiError> {
        let mut settings = Settings::read(fields, app)?;
        settings.constraint = app.constraint(formats::guide(fields, app)?, false)?;
        let prompts = prompts(fields, app, "prompt")?;
        let echo = fields.flag("echo")?.unwrap_or(false);
        let most = fields.whole("max_tokens", 0..=u64::from(u32::MAX))?;
        settings.sampling.tokens_max = most.map_or(TOKENS_DEFAULT, |most| most as usize);
        for prompt in &prompts {
            app.check_length(prompt.len(), "prompt", settings.sampling.tokens_max)?;
        }
        if let Some(best_of) = fields.whole("best_of", 1..=64)?
            && best_of as usize != settings.choices
        {
            return Err(fields.wrong("best_of", "equal to `n`; drawing more is not offered"));
        }
        if fields.text("suffix")?.is_some_and(|suffix| !suffix.is_empty()) {
            return Err(fields.wrong("suffix", "absent; this model does not fill in the middle"));
        }
        let logprobs = fields.whole("logprobs", 0..=TOP_LOGPROBS_MAX)?;
        let logprobs = logprobs.map(|count| count as usize);
        if prompts.len() * settings.choices > SEQUENCES_MAX {
            let want = format!("so few that all prompts have at most {SEQUENCES_MAX} choices");
            return Err(fields.wrong("n", &want));
        }
        let id = app.fresh_id("cmpl");
        let (prompt_logprobs, seat) = (prompt_logprobs(fields)?, app.seat()?);
        Ok(Wanted { id, prompts, settings, echo, logprobs, prompt_logprobs, _seat: seat })
    }

    fn start<'a>(&self, app: &'a App) -> Flow<'a> {
        let echoed = self.logprobs.filter(|_| self.echo);
        let told = |choice: usize| {
            // Choices of one prompt share its scores, which the first asks for.
            let scored = self.prompt_logprobs.filter(|_| choice == 0).map(|count| count.max(1));
            let prompt_logprobs = echoed.max(scored);
            Told { top_logprobs: self.logprobs.unwrap_or(0), prompt_logprobs }
        };
        let choices = self.settings.choices;
        let requests = |prompt: &Vec<u32>| {
            let prompt = prompt.clone();
            let settings = self.settings.clone();
            (0..choices).map(move |choice| settings.request(prompt.clone(), choice, told(choice)))
        };
        Flow::start(app, self.prompts.iter().flat_map(requests).collect(), &self.settings)
    }

    fn prompt_of(&self, index: usize) -> &[u32] {
        &self.prompts[index / self.settings.choices]
    }

    /// Adds a prompt's scores to the log-probabilities of its echo.
    fn echo_scores(&self, app: &App, index: usize, scores: &[Scored], to: &mut CompletionLogprobs) {
        let Some(count) = self.logprobs.filter(|_| self.echo) else { return };
        to.push_first(app, self.prompt_of(index)[0]);
        for scored in scores {
            let top = scored.top.iter().take(count).copied().collect();
            to.push(app, &Scored { top, ..scored.clone() });
        }
    }

    fn prompt_text(&self, app: &App, index: usize) -> String {
        if !self.echo {
            return String::new();
        }
        let text = app.tokenizer.decode(self.prompt_of(index), SpecialTokens::Hide);
        text.unwrap_or_default()
    }

    fn object(&self, app: &App, choices: Value) -> Value {
        json!({
            "id": self.id,
            "object": "text_completion",
            "created": app.now(),
            "model": app.model_of(self.settings.adapter),
            "choices": choices,
        })
    }
}

/// The prompts: one or several texts or lists of token ids.
pub fn prompts(fields: &Fields<'_>, app: &App, key: &str) -> Result<Vec<Vec<u32>>, ApiError> {
    let value = fields.required(key, fields.get(key))?;
    let around = around(fields)?;
    let token_list = |list: &[Value], name: &str| {
        let token = |(at, value): (usize, &Value)| app.token(value, &format!("{name}[{at}]"));
        list.iter().enumerate().map(token).collect::<Result<Vec<u32>, _>>()
    };
    let kept = prompt_tokens_kept(fields, app)?;
    let mut prompts = match value {
        Value::String(text) => vec![app.encode(text, key, around)?],
        Value::Array(list) if list.iter().all(Value::is_number) => {
            vec![token_list(list, key)?]
        }
        Value::Array(list) if list.len() <= PROMPTS_MAX => {
            let prompt = |(at, value): (usize, &Value)| {
                let name = format!("{key}[{at}]");
                match value {
                    Value::String(text) => app.encode(text, &name, around),
                    Value::Array(list) => token_list(list, &name),
                    other => Err(wrong(&name, "a text or a list of token ids", other)),
                }
            };
            list.iter().enumerate().map(prompt).collect::<Result<Vec<_>, _>>()?
        }
        _ => {
            let want = format!("a text, token ids, or a list of up to {PROMPTS_MAX} of them");
            return Err(fields.wrong(key, &want));
        }
    };
    prompts.iter_mut().for_each(|prompt| truncate(prompt, kept));
    if prompts.is_empty() || prompts.iter().any(Vec::is_empty) {
        return Err(ApiError::field(key, format!("`{key}` should have at least one token")));
    }
    Ok(prompts)
}

/// What has come of one choice.
struct Answer {
    text: String,
    logprobs: CompletionLogprobs,
    prompt_scores: Vec<Scored>,
    finish: Value,
    stop: Value,
}

async fn whole(app: &App, wanted: &Wanted) -> Result<Response, ApiError> {
    let mut flow = wanted.start(app);
    let answer = |index: usize| Answer {
        text: wanted.prompt_text(app, index),
        logprobs: CompletionLogprobs::default(),
        prompt_scores: Vec::new(),
        finish: Value::Null,
        stop: Value::Null,
    };
    let count = wanted.prompts.len() * wanted.settings.choices;
    let mut answers: Vec<Answer> = (0..count).map(answer).collect();
    while let Some((index, step)) = flow.next().await? {
        let answer = &mut answers[index];
        match step {
            Step::Prompt(scores) => {
                wanted.echo_scores(app, index, &scores, &mut answer.logprobs);
                answer.prompt_scores = scores;
            }
            Step::Token(scored, text) => {
                answer.text += &text;
                answer.logprobs.push(app, &scored);
            }
            Step::Ended(ended, text) => {
                answer.text += &text;
                answer.finish = ended.name().into();
                answer.stop = ended.stop_text().into();
            }
            Step::Embedding(_) => {}
        }
    }
    let choices = wanted.settings.choices;
    let of_prompt = |scores: &Answer, count| prompt_entries(app, &scores.prompt_scores, count);
    let prompt_scores: Vec<Value> = match wanted.prompt_logprobs {
        Some(count) => answers.iter().step_by(choices).map(|one| of_prompt(one, count)).collect(),
        None => Vec::new(),
    };
    let told = |(index, answer): (usize, Answer)| {
        let mut value = json!({
            "index": index,
            "text": answer.text,
            "logprobs": wanted.logprobs.map(|_| answer.logprobs.json()),
            "finish_reason": answer.finish,
            "stop_reason": answer.stop,
        });
        if let Some(scores) = prompt_scores.get(index / choices) {
            value["prompt_logprobs"] = scores.clone();
        }
        value
    };
    let choices: Value = answers.into_iter().enumerate().map(told).collect();
    let mut value = wanted.object(app, choices);
    value["usage"] = usage_json(flow.usage(), None);
    value["system_fingerprint"] = flow.classes().into();
    value["device"] = flow.devices().into();
    Ok(reply(&value))
}

async fn streamed(app: &App, wanted: Wanted, out: Out) -> Result<(), Left> {
    let mut flow = wanted.start(app);
    let count = wanted.prompts.len() * wanted.settings.choices;
    let mut offsets = vec![0; count];
    let mut echoed = vec![!wanted.echo; count];
    loop {
        let (index, step) = match out.next(&mut flow).await? {
            Ok(Some(step)) => step,
            Ok(None) => break,
            Err(error) => {
                out.data(&error.json()).await?;
                return out.done().await;
            }
        };
        let mut text = String::new();
        let mut logprobs = CompletionLogprobs::at(offsets[index]);
        let (mut finish, mut stop) = (Value::Null, Value::Null);
        match step {
            Step::Prompt(scores) => {
                wanted.echo_scores(app, index, &scores, &mut logprobs);
            }
            Step::Token(scored, piece) => {
                text = piece;
                logprobs.push(app, &scored);
            }
            Step::Ended(ended, piece) => {
                text = piece;
                finish = ended.name().into();
                stop = ended.stop_text().into();
            }
            Step::Embedding(_) => {}
        }
        if !echoed[index] {
            echoed[index] = true;
            text = wanted.prompt_text(app, index) + &text;
        }
        offsets[index] = logprobs.offset();
        let choice = json!({
            "index": index,
            "text": text,
            "logprobs": wanted.logprobs.map(|_| logprobs.json()),
            "finish_reason": finish,
            "stop_reason": stop,
        });
        let mut value = wanted.object(app, json!([choice]));
        value["system_fingerprint"] = flow.classes().into();
        value["device"] = flow.devices().into();
        if wanted.settings.stream_usage == StreamUsage::Always {
            value["usage"] = usage_json(flow.usage(), None);
        }
        out.data(&value).await?;
    }
    if wanted.settings.stream_usage != StreamUsage::Never {
        let mut value = wanted.object(app, json!([]));
        value["usage"] = usage_json(flow.usage(), None);
        value["device"] = flow.devices().into();
        out.data(&value).await?;
    }
    out.done().await
}
