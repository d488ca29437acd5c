//! A backend's `waivers.toml`: what it cannot do, when, and why.
//!
//! `Support::No` gives the reasons; documents list them.

use std::collections::BTreeMap;

/// What cannot be done under one condition.
#[derive(Debug)]
pub struct Waiver {
    /// Operations by name.
    pub ops: Vec<String>,
    /// Why.
    pub reason: String,
}

/// Every waiver of a published file, by its condition.
pub fn published(text: &str) -> Result<BTreeMap<String, Waiver>, String> {
    let table: toml::Table = text.parse().map_err(|error| format!("waivers.toml: {error}"))?;
    let entries = table.get("waiver").and_then(toml::Value::as_array).cloned().unwrap_or_default();
    let text = |value: Option<&toml::Value>| {
        let text = value.and_then(toml::Value::as_str).map(str::to_owned);
        text.ok_or_else(|| "waivers.toml: an entry lacks a text".to_owned())
    };
    let one = |entry: &toml::Value| {
        let ops = entry.get("ops").and_then(toml::Value::as_array).cloned().unwrap_or_default();
        let ops = ops.iter().map(|op| text(Some(op))).collect::<Result<_, _>>()?;
        Ok((text(entry.get("when"))?, Waiver { ops, reason: text(entry.get("reason"))? }))
    };
    entries.iter().map(one).collect()
}
