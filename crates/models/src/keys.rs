//! Typed look-ups in a JSON object whose errors name the key, the value and what was wanted.
//!
//! Knows no key by name: `config.rs` and `rope.rs` do. A JSON `null` counts as absent, as
//! transformers writes `null` for "not set".

use serde_json::{Map, Value};

use crate::error::ModelError;

/// One JSON object of a configuration, with the key under which it stands.
pub(crate) struct Keys<'a> {
    prefix: &'static str,
    map: &'a Map<String, Value>,
}

impl<'a> Keys<'a> {
    pub(crate) fn new(map: &'a Map<String, Value>) -> Self {
        Keys { prefix: "", map }
    }

    pub(crate) fn nested(prefix: &'static str, map: &'a Map<String, Value>) -> Self {
        Keys { prefix, map }
    }

    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub(crate) fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    /// The error that this key's value is not what is wanted.
    pub(crate) fn wrong(&self, key: &str, want: impl Into<String>) -> ModelError {
        let full =
            if self.prefix.is_empty() { key.to_owned() } else { format!("{}.{key}", self.prefix) };
        ModelError::config_key(full, want, self.map.get(key))
    }

    fn read<T>(
        &self,
        key: &str,
        want: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ModelError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => convert(value).map(Some).ok_or_else(|| self.wrong(key, want)),
        }
    }

    /// A whole number; 0 is allowed.
    pub(crate) fn count(&self, key: &str) -> Result<Option<usize>, ModelError> {
        self.read(key, "a whole number of at least 0", whole)
    }

    /// A whole number above 0.
    pub(crate) fn size(&self, key: &str) -> Result<Option<usize>, ModelError> {
        self.read(key, "a whole number above 0", |value| whole(value).filter(|&number| number > 0))
    }

    pub(crate) fn size_or(&self, key: &str, default: usize) -> Result<usize, ModelError> {
        Ok(self.size(key)?.unwrap_or(default))
    }

    pub(crate) fn size_needed(&self, key: &str) -> Result<usize, ModelError> {
        self.size(key)?.ok_or_else(|| self.wrong(key, "a whole number above 0"))
    }

    pub(crate) fn float(&self, key: &str) -> Result<Option<f64>, ModelError> {
        self.read(key, "a number", |value| value.as_f64().filter(|number| number.is_finite()))
    }

    pub(crate) fn float_or(&self, key: &str, default: f64) -> Result<f64, ModelError> {
        Ok(self.float(key)?.unwrap_or(default))
    }

    /// A number that must be present and not below `least`.
    pub(crate) fn float_at_least(&self, key: &str, least: f64) -> Result<f64, ModelError> {
        let want = || self.wrong(key, format!("a number of at least {least}"));
        self.float(key)?.filter(|&number| number >= least).ok_or_else(want)
    }

    pub(crate) fn flag_or(&self, key: &str, default: bool) -> Result<bool, ModelError> {
        Ok(self.read(key, "true or false", Value::as_bool)?.unwrap_or(default))
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        self.read(key, "a text", Value::as_str)
    }

    pub(crate) fn object(&self, key: &str) -> Result<Option<&'a Map<String, Value>>, ModelError> {
        self.read(key, "an object", Value::as_object)
    }

    /// One whole number or a list of them; absent is an empty list.
    pub(crate) fn ids(&self, key: &str) -> Result<Vec<u32>, ModelError> {
        let id = |value: &Value| u32::try_from(value.as_u64()?).ok();
        let convert = |value: &Value| match value {
            Value::Array(list) => list.iter().map(id).collect(),
            one => id(one).map(|one| vec![one]),
        };
        Ok(self.read(key, "a token id or a list of them", convert)?.unwrap_or_default())
    }
}

/// A whole number, also where a file writes it as `64.0`.
fn whole(value: &Value) -> Option<usize> {
    let from_float = || {
        let number = value.as_f64()?;
        (number >= 0.0 && number.fract() == 0.0 && number < 2f64.powi(53)).then_some(number as u64)
    };
    usize::try_from(value.as_u64().or_else(from_float)?).ok()
}
