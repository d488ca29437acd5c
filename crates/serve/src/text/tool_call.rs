//! How models write tool calls, read piece by piece: a call's name as soon as it is known, then
//! its arguments as they come.
//!
//! What stands around calls is `splitter.rs`.

use serde_json::Value;

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
    pub const FENCE: &str = "```json";
}

/// What the beginning of a call tells.
#[derive(Debug, PartialEq, Eq)]
pub enum Head {
    /// More text must come first.
    More,
    /// It is not written in the usual order, so it can be read only when it is complete.
    Whole,
    /// The name is known, and the arguments begin at this byte.
    Ready {
        /// The tool.
        name: String,
        /// Where the arguments' `{` stands.
        at: usize,
    },
}

impl ToolFormat {
    /// The token that a tokenizer with this format has.
    pub const DEEPSEEK_TOKEN: &str = deepseek::CALLS;

    /// The marker before a call.
    pub fn begin(self) -> &'static str {
        match self {
            ToolFormat::Qwen => "<tool_call>",
            ToolFormat::DeepSeek => deepseek::CALL,
        }
    }

    /// The marker after a call.
    pub fn end(self) -> &'static str {
        match self {
            ToolFormat::Qwen => "</tool_call>",
            ToolFormat::DeepSeek => deepseek::CALL_END,
        }
    }

    /// Markers that stand around calls and mean nothing by themselves.
    pub fn dropped(self) -> &'static [&'static str] {
        match self {
            ToolFormat::Qwen => &[],
            ToolFormat::DeepSeek => &[deepseek::CALLS, deepseek::CALLS_END],
        }
    }

    /// Reads the beginning of the text between the markers, of which more may come.
    pub fn head(self, text: &str) -> Head {
        match self {
            ToolFormat::Qwen => qwen_head(text),
            ToolFormat::DeepSeek => deepseek_head(text),
        }
    }

    /// Name and arguments of the whole text between the markers.
    pub fn read(self, text: &str) -> Option<(String, String)> {
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
                let (name, arguments) = match after.split_once(deepseek::FENCE) {
                    Some((name, fenced)) => (name, fenced.rsplit_once("```")?.0),
                    None => (before, after),
                };
                let value: Value = serde_json::from_str(arguments.trim()).ok()?;
                Some((name.trim().to_owned(), value.to_string()))
            }
        }
    }
}

/// `{"name": "...", "arguments": {`, with white space anywhere.
fn qwen_head(text: &str) -> Head {
    let mut rest = Rest { text, at: 0 };
    let read = |rest: &mut Rest<'_>| -> Result<String, Head> {
        rest.expect('{')?;
        if rest.string()? != "name" {
            return Err(Head::Whole);
        }
        rest.expect(':')?;
        let name = rest.string()?;
        rest.expect(',')?;
        if !["arguments", "parameters"].contains(&rest.string()?.as_str()) {
            return Err(Head::Whole);
        }
        rest.expect(':')?;
        match rest.peek()? {
            '{' => Ok(name),
            // Some models write the arguments as a text, which must be unescaped as a whole.
            _ => Err(Head::Whole),
        }
    };
    match read(&mut rest) {
        Ok(name) => Head::Ready { name, at: rest.at },
        Err(head) => head,
    }
}

/// V3 and R1 write `function`, a separator, the name and fenced JSON; V3.1 writes the name, a
/// separator and bare JSON.
fn deepseek_head(text: &str) -> Head {
    let Some((before, after)) = text.split_once(deepseek::SEPARATOR) else { return Head::More };
    let (name, start) = match after.trim_start().chars().next() {
        None => return Head::More,
        Some('{') => (before, text.len() - after.len()),
        Some(_) => match after.find(deepseek::FENCE) {
            None => return Head::More,
            Some(fence) => {
                (&after[..fence], text.len() - after.len() + fence + deepseek::FENCE.len())
            }
        },
    };
    let mut rest = Rest { text, at: start };
    match rest.peek() {
        Ok('{') => Head::Ready { name: name.trim().to_owned(), at: rest.at },
        Ok(_) => Head::Whole,
        Err(head) => head,
    }
}

/// A text that is read from the front, of which more may come.
struct Rest<'a> {
    text: &'a str,
    at: usize,
}

impl Rest<'_> {
    /// The next character that is no white space, which stays.
    fn peek(&mut self) -> Result<char, Head> {
        let rest = &self.text[self.at..];
        self.at += rest.len() - rest.trim_start().len();
        self.text[self.at..].chars().next().ok_or(Head::More)
    }

    fn expect(&mut self, wanted: char) -> Result<(), Head> {
        if self.peek()? != wanted {
            return Err(Head::Whole);
        }
        self.at += wanted.len_utf8();
        Ok(())
    }

    /// A JSON string.
    fn string(&mut self) -> Result<String, Head> {
        if self.peek()? != '"' {
            return Err(Head::Whole);
        }
        let mut escaped = false;
        let closes = |(_, c): &(usize, char)| {
            let closes = *c == '"' && !escaped;
            escaped = *c == '\\' && !escaped;
            closes
        };
        let inner = &self.text[self.at + 1..];
        let (length, _) = inner.char_indices().find(closes).ok_or(Head::More)?;
        let literal = &self.text[self.at..self.at + length + 2];
        self.at += literal.len();
        serde_json::from_str(literal).map_err(|_| Head::Whole)
    }
}

/// Follows a JSON object to its end.
#[derive(Clone, Debug, Default)]
pub struct ObjectEnd {
    depth: usize,
    in_string: bool,
    escaped: bool,
    done: bool,
}

impl ObjectEnd {
    /// How many bytes of the next text belong to the object.
    pub fn take(&mut self, text: &str) -> usize {
        if self.done {
            return 0;
        }
        for (at, byte) in text.bytes().enumerate() {
            if self.in_string {
                self.in_string = byte != b'"' || self.escaped;
                self.escaped = byte == b'\\' && !self.escaped;
                continue;
            }
            match byte {
                b'"' => self.in_string = true,
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' => self.depth = self.depth.saturating_sub(1),
                _ => {}
            }
            if self.depth == 0 {
                self.done = true;
                return at + 1;
            }
        }
        text.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_is_known_before_the_arguments_end() {
        let text = "\n{\"name\": \"a\\\"b\", \"arguments\": {\"x\": ";
        let head = ToolFormat::Qwen.head(text);
        assert_eq!(head, Head::Ready { name: "a\"b".to_owned(), at: text.len() - 6 });
        for end in 0..text.len() - 6 {
            assert_eq!(ToolFormat::Qwen.head(&text[..end]), Head::More, "{}", &text[..end]);
        }
        assert_eq!(ToolFormat::Qwen.head("{\"arguments\": {}"), Head::Whole);
        assert_eq!(ToolFormat::Qwen.head("{\"name\": \"a\", \"arguments\": \"{"), Head::Whole);
        assert_eq!(ToolFormat::Qwen.head("{]"), Head::Whole);
    }

    #[test]
    fn an_object_ends_with_its_own_brace_only() {
        let text = "{\"a\": [\"}\\\"\", {}]} }";
        let mut whole = ObjectEnd::default();
        assert_eq!(whole.take(text), text.len() - 2);
        assert_eq!(whole.take("{}"), 0);
        let mut pieces = ObjectEnd::default();
        let taken: usize = text.chars().map(|c| pieces.take(&c.to_string())).sum();
        assert_eq!(taken, text.len() - 2);
    }
}
