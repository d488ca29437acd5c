//! JSON text as Python's `json.dumps` writes it, for the `tojson` filter of chat templates.
//!
//! Models were trained on text rendered by Python, so spaces, key order and numbers must match to
//! the byte; serde_json's formatting differs in all three.

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind};

/// The keyword arguments of `json.dumps` that templates use.
#[derive(Clone, Debug)]
pub(crate) struct JsonStyle {
    /// Spaces (or other text) a level; `None` writes one line.
    pub indent: Option<String>,
    /// Between items.
    pub item_separator: String,
    /// Between key and value.
    pub key_separator: String,
    /// What happens to characters beyond ASCII.
    pub beyond_ascii: BeyondAscii,
    /// The order of keys.
    pub key_order: KeyOrder,
}

/// Whether characters beyond ASCII are written as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BeyondAscii {
    Keep,
    Escape,
}

/// Whether keys are sorted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KeyOrder {
    AsGiven,
    Sorted,
}

/// Writes a template's value as JSON.
pub(crate) fn to_json(value: &Value, style: &JsonStyle) -> Result<String, Error> {
    let mut writer = Writer { style, text: String::new(), depth: 0 };
    writer.value(value)?;
    Ok(writer.text)
}

struct Writer<'a> {
    style: &'a JsonStyle,
    text: String,
    depth: usize,
}

impl Writer<'_> {
    fn value(&mut self, value: &Value) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => self.text.push_str("null"),
            ValueKind::Bool => self.text.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => self.text.push_str(&value.to_string()),
            ValueKind::Number => self.text.push_str(&python_float(f64::try_from(value.clone())?)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Map => self.map(value)?,
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.container('[', ']', items, |writer, item| writer.value(&item))?;
            }
            kind => {
                let reason = format!("{kind} cannot be written as JSON");
                return Err(Error::new(ErrorKind::BadSerialization, reason));
            }
        }
        Ok(())
    }

    fn map(&mut self, value: &Value) -> Result<(), Error> {
        let mut keys: Vec<Value> = value.try_iter()?.collect();
        if self.style.key_order == KeyOrder::Sorted {
            keys.sort_by_key(|key| key.to_string());
        }
        self.container('{', '}', keys, |writer, key| {
            writer.string(&key.to_string());
            writer.text.push_str(&writer.style.key_separator);
            writer.value(&value.get_item(&key)?)
        })
    }

    fn container(
        &mut self,
        open: char,
        close: char,
        items: Vec<Value>,
        write: impl Fn(&mut Self, Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.text.push(open);
        let empty = items.is_empty();
        self.depth += 1;
        for (index, item) in items.into_iter().enumerate() {
            if index > 0 {
                self.text.push_str(&self.style.item_separator);
            }
            self.line_break();
            write(self, item)?;
        }
        self.depth -= 1;
        if !empty {
            self.line_break();
        }
        self.text.push(close);
        Ok(())
    }

    fn line_break(&mut self) {
        if let Some(indent) = &self.style.indent {
            self.text.push('\n');
            self.text.push_str(&indent.repeat(self.depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.text.push('"');
        for character in text.chars() {
            match character {
                '"' => self.text.push_str("\\\""),
                '\\' => self.text.push_str("\\\\"),
                '\n' => self.text.push_str("\\n"),
                '\r' => self.text.push_str("\\r"),
                '\t' => self.text.push_str("\\t"),
                '\u{8}' => self.text.push_str("\\b"),
                '\u{c}' => self.text.push_str("\\f"),
                '\0'..' ' => self.escape(character),
                _ if character.is_ascii() && character != '\u{7f}' => self.text.push(character),
                _ if self.style.beyond_ascii == BeyondAscii::Keep || character == '\u{7f}' => {
                    self.text.push(character);
                }
                _ => self.escape(character),
            }
        }
        self.text.push('"');
    }

    /// `\uXXXX`, as a pair of surrogates beyond the basic plane.
    fn escape(&mut self, character: char) {
        let mut units = [0; 2];
        for unit in character.encode_utf16(&mut units) {
            self.text.push_str(&format!("\\u{unit:04x}"));
        }
    }
}

/// A float as Python's `repr` writes it: the shortest digits, an exponent from 1e16 and below 1e-4.
fn python_float(value: f64) -> String {
    if value.is_nan() {
        return "NaN".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').expect("{:e} always writes an exponent");
    let exponent: i32 = exponent.parse().expect("{:e} writes a whole exponent");
    if value == 0.0 || (-4..16).contains(&exponent) {
        let plain = value.to_string();
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_written_as_python_writes_them() {
        for (value, want) in [
            (0.1, "0.1"),
            (3.0, "3.0"),
            (-0.0, "-0.0"),
            (1e16, "1e+16"),
            (123_456_789_012_345.6, "123456789012345.6"),
            (0.0001, "0.0001"),
            (1.5e-5, "1.5e-05"),
            (1e-300, "1e-300"),
            (f64::NEG_INFINITY, "-Infinity"),
        ] {
            assert_eq!(python_float(value), want);
        }
    }
}
