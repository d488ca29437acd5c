//! Parts a chat answer into reasoning, content and tool calls, as text comes.
//!
//! Two formats of tool calls are known: Qwen's, a JSON object between `<tool_call>` tags, and
//! DeepSeek's, with its own markers. What looks like a call but cannot be read stays content.

use serde_json::Value;

use super::stops::overlap;

const THINK: &str = "<think>";
const THINK_END: &str = "</think>";

/// How a model writes tool calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolFormat {
    /// `<tool_call>{"name": ..., "arguments": ...}</tool_call>`.
    Qwen,
    /// Markers around a name and arguments.
    DeepSeek,
}

/// Markers of DeepSeek's tool calls.
mod deepseek {
    pub const CALLS: &str = "<｜tool▁calls▁begin｜>";
    pub const CALLS_END: &str = "<｜tool▁calls▁end｜>";
    pub const CALL: &str = "<｜tool▁call▁begin｜>";
    pub const CALL_END: &str = "<｜tool▁call▁end｜>";
    pub const SEPARATOR: &str = "<｜tool▁sep｜>";
}

impl ToolFormat {
    /// The token that a tokenizer with this format has.
    pub const DEEPSEEK_TOKEN: &str = deepseek::CALLS;

    fn begin(self) -> &'static str {
        match self {
            ToolFormat::Qwen => "<tool_call>",
            ToolFormat::DeepSeek => deepseek::CALL,
        }
    }

    fn end(self) -> &'static str {
        match self {
            ToolFormat::Qwen => "</tool_call>",
            ToolFormat::DeepSeek => deepseek::CALL_END,
        }
    }

    /// Markers that stand around calls and mean nothing by themselves.
    fn dropped(self) -> &'static [&'static str] {
        match self {
            ToolFormat::Qwen => &[],
            ToolFormat::DeepSeek => &[deepseek::CALLS, deepseek::CALLS_END],
        }
    }

    /// Name and arguments of the text between the markers.
    fn read(self, text: &str) -> Option<(String, String)> {
        match self {
            ToolFormat::Qwen => {
                let call: Value = serde_json::from_str(text.trim()).ok()?;
                let name = call.get("name")?.as_str()?.to_owned();
                let arguments = match call.get("arguments").or_else(|| call.get("parameters")) {
                    Some(Value::String(text)) => text.clone(),
                    Some(value) => value.to_string(),
                    None => "{}".to_owned(),
                };
                Some((name, arguments))
            }
            ToolFormat::DeepSeek => {
                let (before, after) = text.split_once(deepseek::SEPARATOR)?;
                // V3 and R1 write `function`, a separator, the name and fenced JSON; V3.1 writes
                // the name, a separator and bare JSON.
                let (name, arguments) = match after.split_once("```json") {
                    Some((name, fenced)) => (name, fenced.rsplit_once("```")?.0),
                    None => (before, after),
                };
                let value: Value = serde_json::from_str(arguments.trim()).ok()?;
                Some((name.trim().to_owned(), value.to_string()))
            }
        }
    }
}

/// A piece of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// The model thinks.
    Reasoning(String),
    /// The model answers.
    Content(String),
    /// The model calls a tool.
    ToolCall {
        /// Its place among the answer's calls.
        index: usize,
        /// The tool.
        name: String,
        /// Its arguments as JSON text.
        arguments: String,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Nothing but white space has come; reasoning may begin.
    Beginning,
    Reasoning,
    /// Reasoning has just ended; white space before the content is dropped.
    AfterReasoning,
    Content,
    Tool,
}

/// Parts one answer.
#[derive(Debug)]
pub struct Splitter {
    tools: Option<ToolFormat>,
    mode: Mode,
    held: String,
    calls: usize,
}

impl Splitter {
    /// Parts what a model says after `prompt`, which may have begun its reasoning already.
    pub fn new(prompt: &str, tools: Option<ToolFormat>) -> Splitter {
        let thinking = prompt.trim_end().ends_with(THINK);
        let mode = if thinking { Mode::Reasoning } else { Mode::Beginning };
        Splitter { tools, mode, held: String::new(), calls: 0 }
    }

    /// Whether the model thinks at this moment.
    pub fn thinks(&self) -> bool {
        self.mode == Mode::Reasoning
    }

    /// Tool calls so far.
    pub fn calls(&self) -> usize {
        self.calls
    }

    /// Adds text; gives the parts that are certain.
    pub fn push(&mut self, text: &str) -> Vec<Part> {
        self.held.push_str(text);
        let mut parts = Vec::new();
        while self.advance(&mut parts) {}
        parts
    }

    /// The parts of what was held back, when no more text comes.
    pub fn finish(&mut self) -> Vec<Part> {
        let rest = std::mem::take(&mut self.held);
        let part = match (self.mode, self.tools) {
            (Mode::Reasoning, _) => Part::Reasoning(rest),
            // Stopped within the markers, a whole call may stand there all the same.
            (Mode::Tool, Some(format)) => return vec![self.call(format, &rest)],
            _ => Part::Content(rest),
        };
        non_empty(part).into_iter().collect()
    }

    /// Goes on by one marker; false if more text must come first.
    fn advance(&mut self, parts: &mut Vec<Part>) -> bool {
        match self.mode {
            Mode::Beginning => self.begin(),
            Mode::Reasoning => {
                let found = self.until(&[THINK_END]);
                parts.extend(non_empty(Part::Reasoning(found.text)));
                if found.marker.is_some() {
                    self.mode = Mode::AfterReasoning;
                }
                found.marker.is_some()
            }
            Mode::AfterReasoning => {
                let spaces = self.held.len() - self.held.trim_start().len();
                self.held.drain(..spaces);
                let ready = !self.held.is_empty();
                if ready {
                    self.mode = Mode::Content;
                }
                ready
            }
            Mode::Content => self.content(parts),
            Mode::Tool => {
                let Some(format) = self.tools else { return false };
                let Some(end) = self.held.find(format.end()) else { return false };
                let text: String = self.held.drain(..end + format.end().len()).collect();
                let part = self.call(format, &text[..end]);
                parts.push(part);
                self.mode = Mode::AfterReasoning;
                true
            }
        }
    }

    fn begin(&mut self) -> bool {
        let text = self.held.trim_start();
        if let Some(rest) = text.strip_prefix(THINK) {
            self.held = rest.to_owned();
            self.mode = Mode::Reasoning;
            return true;
        }
        if THINK.starts_with(text) {
            return false;
        }
        self.mode = Mode::Content;
        true
    }

    fn content(&mut self, parts: &mut Vec<Part>) -> bool {
        let markers: Vec<&str> = match self.tools {
            Some(format) => [&[format.begin()], format.dropped()].concat(),
            None => Vec::new(),
        };
        let found = self.until(&markers);
        parts.extend(non_empty(Part::Content(found.text)));
        if let (Some(marker), Some(format)) = (found.marker, self.tools)
            && marker == format.begin()
        {
            self.mode = Mode::Tool;
        }
        found.marker.is_some()
    }

    fn call(&mut self, format: ToolFormat, text: &str) -> Part {
        match format.read(text) {
            Some((name, arguments)) => {
                self.calls += 1;
                Part::ToolCall { index: self.calls - 1, name, arguments }
            }
            None => Part::Content(format!("{}{text}{}", format.begin(), format.end())),
        }
    }

    /// Takes the held text up to the first of the markers, or as far as none can have begun.
    fn until<'m>(&mut self, markers: &[&'m str]) -> Until<'m> {
        let at = |marker: &&'m str| self.held.find(*marker).map(|at| (at, *marker));
        if let Some((at, marker)) = markers.iter().filter_map(at).min_by_key(|(at, _)| *at) {
            let mut text: String = self.held.drain(..at + marker.len()).collect();
            text.truncate(at);
            return Until { text, marker: Some(marker) };
        }
        let kept = markers.iter().map(|marker| overlap(&self.held, marker)).max().unwrap_or(0);
        let text = self.held.drain(..self.held.len() - kept).collect();
        Until { text, marker: None }
    }
}

struct Until<'m> {
    text: String,
    marker: Option<&'m str>,
}

fn non_empty(part: Part) -> Option<Part> {
    let empty = match &part {
        Part::Reasoning(text) | Part::Content(text) => text.is_empty(),
        Part::ToolCall { .. } => false,
    };
    (!empty).then_some(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Splits a text given in pieces of some characters, and joins equal neighbours.
    fn split(prompt: &str, tools: Option<ToolFormat>, text: &str, size: usize) -> Vec<Part> {
        let mut splitter = Splitter::new(prompt, tools);
        let letters: Vec<char> = text.chars().collect();
        let mut parts: Vec<Part> = Vec::new();
        let pieces = letters.chunks(size).map(|piece| piece.iter().collect::<String>());
        let mut all: Vec<Part> = pieces.flat_map(|piece| splitter.push(&piece)).collect();
        all.extend(splitter.finish());
        for part in all {
            match (parts.last_mut(), part) {
                (Some(Part::Reasoning(text)), Part::Reasoning(more)) => text.push_str(&more),
                (Some(Part::Content(text)), Part::Content(more)) => text.push_str(&more),
                (_, part) => parts.push(part),
            }
        }
        parts
    }

    fn reasoning(text: &str) -> Part {
        Part::Reasoning(text.to_owned())
    }

    fn content(text: &str) -> Part {
        Part::Content(text.to_owned())
    }

    fn call(index: usize, name: &str, arguments: &str) -> Part {
        Part::ToolCall { index, name: name.to_owned(), arguments: arguments.to_owned() }
    }

    #[test]
    fn reasoning_is_told_from_content_however_the_text_is_cut() {
        for size in 1..12 {
            let told = [reasoning("a <b> c"), content("d </think")];
            assert_eq!(split("", None, "\n<think>a <b> c</think>\n\nd </think", size), told);
            assert_eq!(split("x<think>\n", None, "a <b> c</think>\n\nd </think", size), told);
            assert_eq!(split("", None, "<thin air", size), [content("<thin air")]);
        }
    }

    #[test]
    fn qwen_calls_are_read_and_broken_ones_stay_text() {
        let text = "Let me see.\n<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1}}\n\
                    </tool_call>\n<tool_call>\n{\"name\": \"add\"}\n</tool_call>";
        for size in 1..12 {
            let want =
                [content("Let me see.\n"), call(0, "add", "{\"a\":1}"), call(1, "add", "{}")];
            assert_eq!(split("", Some(ToolFormat::Qwen), text, size), want);
            let broken = "<tool_call>{]</tool_call>";
            assert_eq!(split("", Some(ToolFormat::Qwen), broken, size), [content(broken)]);
        }
    }

    #[test]
    fn deepseek_calls_are_read_in_both_spellings() {
        let older = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n\
                     ```json\n{\"a\": 1}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
        let newer = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{\"a\": 1}\
                     <｜tool▁call▁end｜><｜tool▁calls▁end｜>";
        for size in 1..12 {
            for text in [older, newer] {
                let told = split("", Some(ToolFormat::DeepSeek), text, size);
                assert_eq!(told, [call(0, "add", "{\"a\":1}")], "{text}");
            }
        }
    }
}
