//! What a completion may say: JSON by a schema, a regular expression, a grammar, a tool call; and
//! how long it may think first.
//!
//! Grammars are `llguidance`'s. While the model thinks, nothing but the thinking budget holds.

use std::sync::{Arc, OnceLock};

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use pontoon_models::{SpecialTokens, Tokenizer};
use serde_json::{Value, json};

use super::splitter::THINK_END;
use super::token_bytes::TokenBytes;
use super::tool_call::ToolFormat;
use crate::engine::request::{Constraint, ConstraintSource};

/// The parsers of one tokenizer, prepared when the first grammar comes.
#[derive(Default)]
pub struct Grammars {
    factory: OnceLock<Result<Arc<ParserFactory>, String>>,
}

/// What a request asks of its completions.
#[derive(Clone, Default)]
pub struct Guide {
    /// What the answer must match.
    pub grammar: Option<TopLevelGrammar>,
    /// Tokens of reasoning at most.
    pub thinking_tokens: Option<usize>,
}

impl Grammars {
    /// Makes the constraint of a guide; an error says what is wrong with its grammar.
    pub fn constraint(
        &self,
        guide: Guide,
        thinks: bool,
        vocabulary: &Vocabulary<'_>,
    ) -> Result<Option<Arc<ConstraintSource>>, String> {
        let budget = guide.thinking_tokens.filter(|_| thinks);
        if guide.grammar.is_none() && budget.is_none() {
            return Ok(None);
        }
        // One token of thinking models, and several of others.
        let end = vocabulary.tokenizer.encode(THINK_END).map_err(|error| error.to_string())?;
        let end: Arc<[u32]> = Arc::from(end);
        let bytes = Arc::clone(vocabulary.bytes);
        let factory = match guide.grammar {
            Some(_) => Some(self.factory.get_or_init(|| vocabulary.factory()).clone()?),
            None => None,
        };
        let grammar = guide.grammar.clone();
        let make = move || -> Result<Guided, String> {
            let mut matcher = None;
            if let (Some(factory), Some(grammar)) = (&factory, &grammar) {
                let parser = factory.create_parser(grammar.clone());
                let made = Matcher::new(parser);
                if let Some(error) = made.get_error() {
                    return Err(error);
                }
                matcher = Some(made);
            }
            let thinking = thinks.then(|| Thinking::new(&end, budget));
            Ok(Guided { matcher, thinking, bytes: Arc::clone(&bytes) })
        };
        // A grammar that cannot be used is refused before anything runs.
        let mut first = make()?;
        let begins = |matcher: &mut Matcher| matcher.compute_mask_or_eos().is_ok();
        if first.matcher.as_mut().is_some_and(|matcher| !begins(matcher)) {
            return Err("no text matches it: no token can come first".to_owned());
        }
        let boxed = move || make().map(|made| Box::new(made) as Box<dyn Constraint>);
        Ok(Some(Arc::new(boxed)))
    }
}

/// The tokens as grammars need them.
pub struct Vocabulary<'a> {
    /// The tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The bytes of its tokens.
    pub bytes: &'a Arc<TokenBytes>,
    /// The token that ends a completion.
    pub end_token: Option<u32>,
}

impl Vocabulary<'_> {
    fn factory(&self) -> Result<Arc<ParserFactory>, String> {
        let count = self.tokenizer.vocab_size() as u32;
        let Some(end) = self.end_token else {
            return Err("this model has no end token, which structured output needs".to_owned());
        };
        let word = |id: u32| {
            let hidden = self.tokenizer.decode(&[id], SpecialTokens::Hide).unwrap_or_default();
            let bytes = self.bytes.of(id);
            if id == end || (hidden.is_empty() && !bytes.is_empty()) {
                // Special tokens are no text; the marker keeps a grammar's text from them.
                return [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat();
            }
            bytes.to_vec()
        };
        let words: Vec<Vec<u8>> = (0..count).map(word).collect();
        let trie = TokTrie::from(&TokRxInfo::new(count, end), &words);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&environment).map_err(|e| e.to_string())?;
        factory.quiet();
        Ok(Arc::new(factory))
    }
}

/// Reasoning that has not ended.
#[derive(Clone)]
struct Thinking {
    /// The tokens that end it when its budget is spent.
    end: Arc<[u32]>,
    /// How many of them have been forced.
    forced: usize,
    /// Tokens that may still come; `None` for any number.
    left: Option<usize>,
    /// The last bytes, in which the end may have begun.
    last: Vec<u8>,
}

impl Thinking {
    fn new(end: &Arc<[u32]>, left: Option<usize>) -> Thinking {
        Thinking { end: Arc::clone(end), forced: 0, left, last: Vec::new() }
    }

    /// The token that must come next, if its budget is spent.
    fn forced(&self) -> Option<u32> {
        self.end.get(self.forced).copied().filter(|_| self.left == Some(0))
    }

    /// Goes on by a token's bytes; true if it was the last one.
    fn ends_with(&mut self, bytes: &[u8]) -> bool {
        match &mut self.left {
            Some(0) => self.forced += 1,
            Some(left) => *left -= 1,
            None => {}
        }
        self.last.extend_from_slice(bytes);
        let marker = THINK_END.as_bytes();
        let ends = self.last.windows(marker.len()).any(|part| part == marker)
            || self.forced == self.end.len();
        self.last.drain(..self.last.len().saturating_sub(marker.len() - 1));
        ends
    }
}

struct Guided {
    matcher: Option<Matcher>,
    thinking: Option<Thinking>,
    bytes: Arc<TokenBytes>,
}

impl Constraint for Guided {
    fn forbid(&mut self, bias: &mut [f32]) -> Result<(), String> {
        if let Some(thinking) = &self.thinking {
            if let Some(token) = thinking.forced() {
                let others = bias.iter_mut().enumerate().filter(|(id, _)| *id != token as usize);
                others.for_each(|(_, bias)| *bias = f32::NEG_INFINITY);
            }
            return Ok(());
        }
        let Some(matcher) = &mut self.matcher else { return Ok(()) };
        let mask = matcher.compute_mask_or_eos().map_err(|error| error.to_string())?;
        for (id, bias) in bias.iter_mut().enumerate() {
            if id >= mask.len() || !mask.is_allowed(id as u32) {
                *bias = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<(), String> {
        if let Some(thinking) = &mut self.thinking {
            if thinking.ends_with(self.bytes.of(token)) {
                self.thinking = None;
            }
            return Ok(());
        }
        match &mut self.matcher {
            Some(matcher) if !matcher.is_stopped() => {
                matcher.consume_token(token).map_err(|error| error.to_string())
            }
            _ => Ok(()),
        }
    }

    fn fork(&self) -> Box<dyn Constraint> {
        let matcher = self.matcher.as_ref().map(Matcher::deep_clone);
        let (thinking, bytes) = (self.thinking.clone(), Arc::clone(&self.bytes));
        Box::new(Guided { matcher, thinking, bytes })
    }
}

/// The grammar of one call of one of these tools: name and schema of the arguments.
pub fn tool_call(format: ToolFormat, tools: &[(String, Value)]) -> TopLevelGrammar {
    let quoted = |text: &str| Value::from(text).to_string();
    let mut lark = String::from("start: ");
    let calls: Vec<String> = (0..tools.len()).map(|at| format!("call_{at}")).collect();
    lark += &calls.join(" | ");
    for (at, (name, schema)) in tools.iter().enumerate() {
        // Without this a model may put white space between symbols for ever.
        let strict = json!({ "whitespace_flexible": false });
        let (before, mut body, after) = match format {
            ToolFormat::Qwen => {
                let call = json!({
                    "type": "object",
                    "properties": { "name": { "const": name }, "arguments": schema },
                    "required": ["name", "arguments"],
                    "additionalProperties": false,
                });
                ("<tool_call>\n".to_owned(), call, "\n</tool_call>")
            }
            ToolFormat::DeepSeek => (
                format!(
                    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n"
                ),
                schema.clone(),
                "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            ),
        };
        body["x-guidance"] = strict;
        let (before, after) = (quoted(&before), quoted(after));
        lark += &format!("\ncall_{at}: {before} body_{at} {after}\nbody_{at}: %json {body}\n");
    }
    TopLevelGrammar::from_lark(lark)
}
