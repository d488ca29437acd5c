//! Structured output of a request: `response_format`, and the extensions of other servers.
//!
//! Read next: `../text/grammar.rs`.

use llguidance::api::TopLevelGrammar;
use serde_json::{Value, json};

use super::errors::ApiError;
use super::fields::Fields;
use crate::app::App;
use crate::text::grammar::{Guide, tool_call};

/// White space between the symbols of JSON: as much as indenting takes, but not for ever, as a
/// model that finds no next symbol would write it.
const WHITE_SPACE: &str = r"[ \t\n\r]{0,16}";

/// Reads what the answer must match and how long it may think.
pub fn guide(fields: &Fields<'_>, app: &App) -> Result<Guide, ApiError> {
    let most = u64::from(u32::MAX);
    let mut budget = fields.whole("thinking_budget", 0..=most)?;
    for key in ["thinking_token_budget", "reasoning_budget"] {
        budget = budget.or(fields.whole(key, 0..=most)?);
    }
    if let Some(Value::Object(_)) = fields.get("thinking")
        && let Some(thinking) = fields.object("thinking")?
    {
        budget = budget.or(thinking.whole("budget_tokens", 0..=most)?);
    }
    let mut grammar = forced_call(fields, app)?;
    if grammar.is_none() {
        grammar = response_format(fields)?;
    }
    if grammar.is_none() {
        grammar = extensions(fields)?;
    }
    Ok(Guide { grammar, thinking_tokens: budget.map(|tokens| tokens as usize) })
}

fn response_format(fields: &Fields<'_>) -> Result<Option<TopLevelGrammar>, ApiError> {
    let Some(format) = fields.object("response_format")? else { return Ok(None) };
    match format.text("type")? {
        None | Some("text") => Ok(None),
        Some("json_object") => Ok(Some(schema(json!({ "type": "object" })))),
        Some("json_schema") => {
            // The newer API has the schema one level higher.
            let inner = format.object("json_schema")?.unwrap_or_else(|| format.clone());
            let given = inner.required("schema", inner.object("schema")?)?;
            let entries = given.entries().map(|(key, value)| (key.clone(), value.clone()));
            Ok(Some(schema(Value::Object(entries.collect()))))
        }
        Some("regex") => {
            let pattern = format.required("pattern", format.text("pattern")?)?;
            Ok(Some(TopLevelGrammar::from_regex(pattern)))
        }
        Some("grammar") => {
            let text = format.required("grammar", format.text("grammar")?)?;
            Ok(Some(TopLevelGrammar::from_lark(text.to_owned())))
        }
        Some(_) => {
            let want = "\"text\", \"json_object\", \"json_schema\", \"regex\" or \"grammar\"";
            Err(format.wrong("type", want))
        }
    }
}

/// `structured_outputs` and its older spelling, `guided_...`.
fn extensions(fields: &Fields<'_>) -> Result<Option<TopLevelGrammar>, ApiError> {
    let newer = fields.object("structured_outputs")?;
    let places = [(newer.as_ref(), ""), (Some(fields), "guided_")];
    for (place, prefix) in places {
        let Some(place) = place else { continue };
        let key = |name: &str| format!("{prefix}{name}");
        match place.get(&key("json")) {
            Some(Value::String(text)) => {
                let value = serde_json::from_str(text)
                    .map_err(|_| place.wrong(&key("json"), "a JSON schema"))?;
                return Ok(Some(schema(value)));
            }
            Some(value) => return Ok(Some(schema(value.clone()))),
            None => {}
        }
        if let Some(pattern) = place.text(&key("regex"))? {
            return Ok(Some(TopLevelGrammar::from_regex(pattern)));
        }
        if let Some(text) = place.text(&key("grammar"))? {
            return Ok(Some(TopLevelGrammar::from_lark(text.to_owned())));
        }
        if let Some(list) = place.list(&key("choice"))? {
            if list.is_empty() || !list.iter().all(Value::is_string) {
                return Err(place.wrong(&key("choice"), "a list of texts"));
            }
            let choices: Vec<String> = list.iter().map(Value::to_string).collect();
            let lark = format!("start: {}", choices.join(" | "));
            return Ok(Some(TopLevelGrammar::from_lark(lark)));
        }
    }
    Ok(None)
}

fn schema(mut value: Value) -> TopLevelGrammar {
    if let Value::Object(map) = &mut value {
        let options = json!({ "whitespace_pattern": WHITE_SPACE });
        map.entry("x-guidance").or_insert(options);
    }
    TopLevelGrammar::from_json_schema(value)
}

/// The grammar of a call, if `tool_choice` demands one.
fn forced_call(fields: &Fields<'_>, app: &App) -> Result<Option<TopLevelGrammar>, ApiError> {
    let name = match fields.get("tool_choice") {
        None => return Ok(None),
        Some(Value::String(word)) => match word.as_str() {
            "none" | "auto" => return Ok(None),
            "required" => None,
            _ => {
                let want = "\"none\", \"auto\", \"required\" or a function";
                return Err(fields.wrong("tool_choice", want));
            }
        },
        Some(_) => {
            let choice = fields.required("tool_choice", fields.object("tool_choice")?)?;
            let function = choice.required("function", choice.object("function")?)?;
            Some(function.required("name", function.text("name")?)?)
        }
    };
    let mut tools = Vec::new();
    for tool in fields.list("tools")?.unwrap_or_default() {
        let function = &tool["function"];
        let Some(own) = function["name"].as_str() else { continue };
        if name.is_none_or(|name| name == own) {
            let any = json!({ "type": "object" });
            let given = function.get("parameters").filter(|value| value.is_object());
            tools.push((own.to_owned(), given.cloned().unwrap_or(any)));
        }
    }
    if tools.is_empty() {
        return Err(fields.wrong("tool_choice", "one of the functions in `tools`"));
    }
    Ok(Some(tool_call(app.tool_format, &tools)))
}
