//! Parts a chat answer into reasoning, content and tool calls, as text comes.
//!
//! A call's name is told as soon as it is known, then its arguments as they come. What looks like
//! a call but cannot be read stays content. Read next: `tool_call.rs`.

use super::stops::overlap;
use super::tool_call::{Head, ObjectEnd, ToolFormat};

const THINK: &str = "<think>";
/// What ends a model's reasoning.
pub const THINK_END: &str = "</think>";

/// A piece of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// The model thinks.
    Reasoning(String),
    /// The model answers.
    Content(String),
    /// The model begins to call a tool.
    CallBegin {
        /// Its place among the answer's calls.
        index: usize,
        /// The tool.
        name: String,
    },
    /// More of a call's arguments, which are JSON in the end.
    CallArguments {
        /// Its place among the answer's calls.
        index: usize,
        /// The next piece.
        text: String,
    },
}

/// How many tools an answer may call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Calls {
    /// As many as the model likes.
    #[default]
    Any,
    /// One; the answer ends with it.
    One,
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
    /// The only call is complete; what else comes is not part of the answer.
    Complete,
}

/// Parts one answer.
#[derive(Debug)]
pub struct Splitter {
    tools: Option<ToolFormat>,
    mode: Mode,
    held: String,
    allowed: Calls,
    calls: usize,
    /// The arguments that are coming; `None` until a call's name is known.
    arguments: Option<ObjectEnd>,
}

impl Splitter {
    /// Parts what a model says after `prompt`, which may have begun its reasoning already.
    pub fn new(prompt: &str, tools: Option<ToolFormat>) -> Splitter {
        let thinking = prompt.trim_end().ends_with(THINK);
        let mode = if thinking { Mode::Reasoning } else { Mode::Beginning };
        let (held, allowed) = (String::new(), Calls::Any);
        Splitter { tools, mode, held, allowed, calls: 0, arguments: None }
    }

    /// The same for an answer that may call so many tools.
    #[must_use]
    pub fn allowing(self, calls: Calls) -> Splitter {
        Splitter { allowed: calls, ..self }
    }

    /// Whether the answer is complete although the model may go on.
    pub fn complete(&self) -> bool {
        self.mode == Mode::Complete
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
            (Mode::Complete, _) => return Vec::new(),
            (Mode::Reasoning, _) => Part::Reasoning(rest),
            (Mode::Tool, Some(format)) => match &mut self.arguments {
                Some(arguments) => {
                    let text = rest[..arguments.take(&rest)].to_owned();
                    Part::CallArguments { index: self.calls - 1, text }
                }
                // Stopped within the markers, a whole call may stand there all the same.
                None => return self.whole_call(format, &rest),
            },
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
            Mode::Complete => {
                self.held.clear();
                false
            }
            Mode::Tool => match self.tools {
                Some(format) => self.tool(format, parts),
                None => false,
            },
        }
    }

    /// Goes on within a call.
    fn tool(&mut self, format: ToolFormat, parts: &mut Vec<Part>) -> bool {
        let end = self.held.find(format.end());
        // What may be the beginning of the end marker waits.
        let certain = end.unwrap_or(self.held.len() - overlap(&self.held, format.end()));
        let Some(arguments) = &mut self.arguments else {
            if let Head::Ready { name, at } = format.head(&self.held[..certain]) {
                parts.push(Part::CallBegin { index: self.calls, name });
                self.calls += 1;
                self.arguments = Some(ObjectEnd::default());
                self.held.drain(..at);
                return true;
            }
            let Some(end) = end else { return false };
            let text: String = self.held.drain(..end + format.end().len()).collect();
            parts.extend(self.whole_call(format, &text[..end]));
            self.mode = self.after_call();
            return true;
        };
        let taken = arguments.take(&self.held[..certain]);
        let text = self.held[..taken].to_owned();
        parts.extend(non_empty(Part::CallArguments { index: self.calls - 1, text }));
        // What stands between the arguments and the end marker closes the call and says nothing.
        match end {
            Some(end) => {
                self.held.drain(..end + format.end().len());
                self.arguments = None;
                self.mode = self.after_call();
                true
            }
            None => {
                self.held.drain(..certain);
                false
            }
        }
    }

    /// What follows a call, or what looked like one.
    fn after_call(&self) -> Mode {
        if self.allowed == Calls::One && self.calls > 0 {
            return Mode::Complete;
        }
        Mode::AfterReasoning
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

    /// The parts of a call that is read as a whole.
    fn whole_call(&mut self, format: ToolFormat, text: &str) -> Vec<Part> {
        match format.read(text) {
            Some((name, arguments)) => {
                let index = self.calls;
                self.calls += 1;
                vec![
                    Part::CallBegin { index, name },
                    Part::CallArguments { index, text: arguments },
                ]
            }
            None => vec![Part::Content(format!("{}{text}{}", format.begin(), format.end()))],
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
        Part::Reasoning(text) | Part::Content(text) | Part::CallArguments { text, .. } => {
            text.is_empty()
        }
        Part::CallBegin { .. } => false,
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
                (
                    Some(Part::CallArguments { index: of, text }),
                    Part::CallArguments { index, text: more },
                ) if *of == index => text.push_str(&more),
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

    fn call(index: usize, name: &str, arguments: &str) -> [Part; 2] {
        let (name, text) = (name.to_owned(), arguments.to_owned());
        [Part::CallBegin { index, name }, Part::CallArguments { index, text }]
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
            let mut want = vec![content("Let me see.\n")];
            want.extend(call(0, "add", "{\"a\": 1}"));
            want.extend(call(1, "add", "{}"));
            assert_eq!(split("", Some(ToolFormat::Qwen), text, size), want);
            let broken = "<tool_call>{]</tool_call>";
            assert_eq!(split("", Some(ToolFormat::Qwen), broken, size), [content(broken)]);
        }
    }

    #[test]
    fn an_answer_that_may_call_once_ends_with_its_first_call() {
        let text = "<tool_call>{]</tool_call><tool_call>{\"name\": \"a\", \"arguments\": {}}\
                    </tool_call>\n<tool_call>{\"name\": \"b\", \"arguments\": {}}</tool_call> end";
        for size in [1, 7, 200] {
            let mut splitter = Splitter::new("", Some(ToolFormat::Qwen)).allowing(Calls::One);
            let letters: Vec<char> = text.chars().collect();
            let mut parts = Vec::new();
            for piece in letters.chunks(size) {
                parts.extend(splitter.push(&piece.iter().collect::<String>()));
            }
            parts.extend(splitter.finish());
            assert!(splitter.complete() && splitter.calls() == 1, "{parts:?}");
            let begun = |part: &&Part| matches!(part, Part::CallBegin { .. });
            assert_eq!(parts.iter().filter(begun).count(), 1, "{parts:?}");
            let arguments = |part: &Part| match part {
                Part::CallArguments { text, .. } => text.clone(),
                _ => String::new(),
            };
            assert_eq!(parts.iter().map(arguments).collect::<String>(), "{}", "size {size}");
            assert!(!matches!(parts.last(), Some(Part::Content(_))), "size {size}: {parts:?}");
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
                assert_eq!(told, call(0, "add", "{\"a\": 1}"), "{text}");
            }
        }
    }

    #[test]
    fn arguments_come_as_they_are_written() {
        let mut splitter = Splitter::new("", Some(ToolFormat::Qwen));
        let mut told = splitter.push("<tool_call>{\"name\": \"go\", \"arguments\": {\"a\": [1");
        told.extend(splitter.push(", 2]}"));
        let piece = |text: &str| Part::CallArguments { index: 0, text: text.to_owned() };
        let begin = Part::CallBegin { index: 0, name: "go".to_owned() };
        assert_eq!(told, [begin, piece("{\"a\": [1"), piece(", 2]}")]);
        assert_eq!(splitter.push("}\n</tool_call>"), []);
        assert_eq!(splitter.finish(), []);
        assert_eq!(splitter.calls(), 1);
        let mut cut = Splitter::new("", Some(ToolFormat::Qwen));
        cut.push("<tool_call>{\"name\": \"go\", \"arguments\": {\"a\": \"b</tool");
        assert_eq!(cut.finish(), [piece("</tool")]);
    }
}
