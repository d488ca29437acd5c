//! A conversation of a request as the model's chat template takes it.
//!
//! Content given in parts becomes one text; reasoning is taken under either of its names; a call's
//! arguments become an object where the template expects one. Read next: `chat.rs`.

use pontoon_models::ChatRequest;
use serde_json::{Map, Value, json};

use super::errors::ApiError;
use super::fields::{Fields, wrong};
use crate::app::App;
use crate::text::splitter::Calls;
use crate::text::tool_call::ToolFormat;

/// Messages of one conversation at most.
const MESSAGES_MAX: usize = 4096;
/// The roles that templates know.
const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "function"];

/// What the template is given.
#[derive(Clone, Debug, Default)]
pub struct Conversation {
    /// The messages.
    pub messages: Vec<Value>,
    /// The tools offered.
    pub tools: Vec<Value>,
    /// How many of them an answer may call.
    pub calls: Calls,
    /// Further variables.
    pub variables: Map<String, Value>,
    /// Where the model takes over.
    pub end: PromptEnd,
}

/// Where the model takes over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PromptEnd {
    /// At the beginning of a message of its own.
    #[default]
    New,
    /// After the last message.
    After,
    /// Within the last message, which it goes on with.
    Within,
}

impl Conversation {
    /// Reads `messages`, `tools` and what turns thinking on or off.
    pub fn read(fields: &Fields<'_>, app: &App) -> Result<Conversation, ApiError> {
        let list = fields.required("messages", fields.list("messages")?)?;
        if list.is_empty() || list.len() > MESSAGES_MAX {
            return Err(fields.wrong("messages", &format!("a list of 1 to {MESSAGES_MAX}")));
        }
        let read = |(at, value): (usize, &Value)| message(value, &format!("messages[{at}]"), app);
        let messages = list.iter().enumerate().map(read).collect::<Result<Vec<_>, _>>()?;
        let none = fields.get("tool_choice").and_then(Value::as_str) == Some("none");
        let mut tools = Vec::new();
        for (at, tool) in fields.list("tools")?.unwrap_or_default().iter().enumerate() {
            check_tool(tool, &format!("tools[{at}]"))?;
            if !none {
                tools.push(tool.clone());
            }
        }
        let calls = match fields.flag("parallel_tool_calls")? {
            Some(false) => Calls::One,
            Some(true) | None => Calls::Any,
        };
        Ok(Conversation {
            messages,
            tools,
            calls,
            variables: variables(fields)?,
            end: end(fields)?,
        })
    }

    /// The text that the model continues.
    pub fn text(&self, app: &App) -> Result<String, ApiError> {
        let Some(template) = &app.template else {
            let message = "this model has no chat template; use /v1/completions";
            return Err(ApiError::field("messages", message));
        };
        let request = ChatRequest {
            messages: self.messages.clone(),
            tools: (!self.tools.is_empty()).then(|| self.tools.clone()),
            add_generation_prompt: self.end == PromptEnd::New,
            variables: self.variables.clone(),
            now_unix_seconds: app.now(),
        };
        let mut text = template.render(&request).map_err(|error| {
            let message = format!("the model's chat template refuses the conversation: {error}");
            ApiError::field("messages", message)
        })?;
        if self.end == PromptEnd::Within {
            let last = self.messages.last().and_then(|message| message["content"].as_str());
            let last = last.unwrap_or_default().trim();
            let Some(at) = text.rfind(last).filter(|_| !last.is_empty()) else {
                let message = "the last message has no text that the model could continue";
                return Err(ApiError::field("continue_final_message", message));
            };
            text.truncate(at + last.len());
        }
        Ok(text)
    }

    /// The tokens of that text.
    pub fn tokens(&self, app: &App) -> Result<Vec<u32>, ApiError> {
        app.encode_chat(&self.text(app)?)
    }
}

/// Reads vLLM's `add_generation_prompt` and `continue_final_message`.
fn end(fields: &Fields<'_>) -> Result<PromptEnd, ApiError> {
    let opens = fields.flag("add_generation_prompt")?;
    if fields.flag("continue_final_message")? == Some(true) {
        if opens == Some(true) {
            let want = "false where `continue_final_message` is true";
            return Err(fields.wrong("add_generation_prompt", want));
        }
        return Ok(PromptEnd::Within);
    }
    Ok(if opens == Some(false) { PromptEnd::After } else { PromptEnd::New })
}

fn message(value: &Value, path: &str, app: &App) -> Result<Value, ApiError> {
    let fields = Fields::nested(value, path)?;
    let role = fields.required("role", fields.text("role")?)?;
    if !ROLES.contains(&role) {
        return Err(fields.wrong("role", &format!("one of {}", ROLES.join(", "))));
    }
    // Templates know the newer name's older one.
    let role = if role == "developer" { "system" } else { role };
    let mut made = Map::new();
    made.insert("role".to_owned(), role.into());
    let content = match fields.get("content") {
        None if role == "assistant" => String::new(),
        None => return Err(fields.wrong("content", "a text")),
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => joined(parts, &fields.name("content"))?,
        Some(_) => return Err(fields.wrong("content", "a text or a list of parts")),
    };
    made.insert("content".to_owned(), content.into());
    for key in ["name", "tool_call_id"] {
        if let Some(text) = fields.text(key)? {
            made.insert(key.to_owned(), text.into());
        }
    }
    if let Some(text) = fields.text("reasoning_content")?.or(fields.text("reasoning")?) {
        made.insert("reasoning_content".to_owned(), text.into());
        made.insert("reasoning".to_owned(), text.into());
    }
    if let Some(calls) = fields.list("tool_calls")? {
        let name = fields.name("tool_calls");
        let read = |(at, call): (usize, &Value)| tool_call(call, &format!("{name}[{at}]"), app);
        let calls = calls.iter().enumerate().map(read).collect::<Result<Vec<_>, _>>()?;
        if !calls.is_empty() {
            made.insert("tool_calls".to_owned(), calls.into());
        }
    }
    Ok(Value::Object(made))
}

/// The text of a list of parts.
fn joined(parts: &[Value], path: &str) -> Result<String, ApiError> {
    let mut text = String::new();
    for (at, part) in parts.iter().enumerate() {
        let fields = Fields::nested(part, &format!("{path}[{at}]"))?;
        match fields.text("type")? {
            Some("text" | "input_text" | "output_text") | None => {
                text += fields.required("text", fields.text("text")?)?;
            }
            Some("refusal") => text += fields.text("refusal")?.unwrap_or_default(),
            Some(_) => return Err(fields.wrong("type", "\"text\"; this model reads text only")),
        }
    }
    Ok(text)
}

fn tool_call(call: &Value, path: &str, app: &App) -> Result<Value, ApiError> {
    let fields = Fields::nested(call, path)?;
    let function = fields.required("function", fields.object("function")?)?;
    let name = function.required("name", function.text("name")?)?;
    let arguments = match function.get("arguments") {
        None => json!({}),
        Some(Value::String(text)) => match serde_json::from_str::<Value>(text) {
            // DeepSeek's templates join the text; others write an object as they see fit.
            Ok(value) if app.tool_format == ToolFormat::Qwen => value,
            Ok(_) => text.as_str().into(),
            Err(error) => {
                let name = function.name("arguments");
                return Err(ApiError::field(name.clone(), format!("`{name}` is no JSON: {error}")));
            }
        },
        Some(value) => value.clone(),
    };
    Ok(json!({
        "id": fields.text("id")?,
        "type": "function",
        "function": { "name": name, "arguments": arguments },
    }))
}

fn check_tool(tool: &Value, path: &str) -> Result<(), ApiError> {
    let fields = Fields::nested(tool, path)?;
    if fields.text("type")?.is_some_and(|kind| kind != "function") {
        return Err(fields.wrong("type", "\"function\""));
    }
    let function = fields.required("function", fields.object("function")?)?;
    function.required("name", function.text("name")?)?;
    match function.get("parameters") {
        None | Some(Value::Object(_)) => Ok(()),
        Some(other) => Err(wrong(&function.name("parameters"), "a JSON schema", other)),
    }
}

/// What templates are told beside the messages, such as whether to think.
fn variables(fields: &Fields<'_>) -> Result<Map<String, Value>, ApiError> {
    let mut variables = Map::new();
    if let Some(effort) = fields.text("reasoning_effort")? {
        variables.insert("reasoning_effort".to_owned(), effort.into());
        if effort == "none" {
            set_thinking(&mut variables, false);
        }
    }
    match fields.get("thinking") {
        Some(Value::Bool(on)) => set_thinking(&mut variables, *on),
        Some(Value::Object(_)) => {
            let thinking = fields.object("thinking")?;
            let kind = thinking.and_then(|thinking| thinking.text("type").ok().flatten());
            set_thinking(&mut variables, kind != Some("disabled"));
        }
        Some(_) => return Err(fields.wrong("thinking", "true, false or an object with `type`")),
        None => {}
    }
    if let Some(on) = fields.flag("enable_thinking")? {
        set_thinking(&mut variables, on);
    }
    if let Some(own) = fields.object("chat_template_kwargs")? {
        variables.extend(own.entries().map(|(key, value)| (key.clone(), value.clone())));
    }
    Ok(variables)
}

/// Templates spell it in two ways.
fn set_thinking(variables: &mut Map<String, Value>, on: bool) {
    variables.insert("enable_thinking".to_owned(), on.into());
    variables.insert("thinking".to_owned(), on.into());
}
