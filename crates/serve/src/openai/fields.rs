//! Reads a request's fields, each error naming the one that is wrong.
//!
//! `null` counts as absent, as clients send it for what they do not set. Unknown fields are not
//! looked at: every client sends some.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::errors::ApiError;

/// An object of a request and its place in it.
#[derive(Clone)]
pub struct Fields<'a> {
    map: &'a Map<String, Value>,
    path: String,
}

impl<'a> Fields<'a> {
    /// The request's own object.
    pub fn of(value: &'a Value) -> Result<Fields<'a>, ApiError> {
        Fields::nested(value, "")
    }

    /// An object within the request.
    pub fn nested(value: &'a Value, path: &str) -> Result<Fields<'a>, ApiError> {
        match value {
            Value::Object(map) => Ok(Fields { map, path: path.to_owned() }),
            other => Err(wrong(path, "an object", other)),
        }
    }

    /// A field's full name.
    pub fn name(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// A field, if it is there and not null.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// An error about a field.
    pub fn wrong(&self, key: &str, want: &str) -> ApiError {
        wrong(&self.name(key), want, self.map.get(key).unwrap_or(&Value::Null))
    }

    /// A number within a range.
    pub fn number(&self, key: &str, range: RangeInclusive<f64>) -> Result<Option<f64>, ApiError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64().filter(|number| range.contains(number)) {
            Some(number) => Ok(Some(number)),
            None => {
                let want = format!("a number from {} to {}", range.start(), range.end());
                Err(self.wrong(key, &want))
            }
        }
    }

    /// A whole number within a range.
    pub fn whole(&self, key: &str, range: RangeInclusive<u64>) -> Result<Option<u64>, ApiError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match whole(value).filter(|number| range.contains(number)) {
            Some(number) => Ok(Some(number)),
            None => {
                let want = if *range.end() == u64::MAX {
                    format!("a whole number from {} on", range.start())
                } else {
                    format!("a whole number from {} to {}", range.start(), range.end())
                };
                Err(self.wrong(key, &want))
            }
        }
    }

    /// A text.
    pub fn text(&self, key: &str) -> Result<Option<&'a str>, ApiError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong(key, "a text")),
        }
    }

    /// A truth value.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, ApiError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(_) => Err(self.wrong(key, "true or false")),
        }
    }

    /// A list.
    pub fn list(&self, key: &str) -> Result<Option<&'a [Value]>, ApiError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(_) => Err(self.wrong(key, "a list")),
        }
    }

    /// An object within this one.
    pub fn object(&self, key: &str) -> Result<Option<Fields<'a>>, ApiError> {
        self.get(key).map(|value| Fields::nested(value, &self.name(key))).transpose()
    }

    /// A field that must be there.
    pub fn required<T>(&self, key: &str, found: Option<T>) -> Result<T, ApiError> {
        let missing = || {
            let name = self.name(key);
            ApiError::field(name.clone(), format!("`{name}` is missing"))
        };
        found.ok_or_else(missing)
    }

    /// All entries.
    pub fn entries(&self) -> impl Iterator<Item = (&'a String, &'a Value)> {
        self.map.iter()
    }
}

/// A whole number, which JSON may write as `2.0` too.
pub fn whole(value: &Value) -> Option<u64> {
    let rounded = value.as_f64().filter(|number| {
        // Beyond this not every whole number has a float of its own.
        number.fract() == 0.0 && (0.0..=9.0e15).contains(number)
    });
    value.as_u64().or(rounded.map(|number| number as u64))
}

/// An error about a value that is not what was wanted.
pub fn wrong(name: &str, want: &str, got: &Value) -> ApiError {
    let got = match got {
        Value::Null => "null".to_owned(),
        Value::Array(list) => format!("a list of {}", list.len()),
        Value::Object(_) => "an object".to_owned(),
        // What a client sent is repeated only as far as it helps.
        other => other.to_string().chars().take(80).collect(),
    };
    let subject = if name.is_empty() { "the request".to_owned() } else { format!("`{name}`") };
    let param = (!name.is_empty()).then(|| name.to_owned());
    ApiError { param, ..ApiError::field("", format!("{subject} is {got} but should be {want}")) }
}
