//! Renders a conversation to text by the model's own chat template, as transformers does.
//!
//! Templates are Jinja with Python's string methods, loop controls, `raise_exception`,
//! `strftime_now` and `tojson` with `json.dumps`' arguments. The current time is an argument:
//! nothing here reads a clock. Read next: `chat_json.rs` and `chat_syntax.rs`.

use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, Error, ErrorKind, State};
use serde_json::{Map, Value as Json};

use crate::chat_json::{BeyondAscii, JsonStyle, KeyOrder, to_json};
use crate::chat_syntax::without_generation_tags;
use crate::error::ModelError;

const NAME: &str = "chat";
const DEFAULT_NAME: &str = "default";
/// What templates see as variables under their own names.
const SPECIAL_TOKENS: [&str; 6] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token"];

/// A parsed chat template and the special tokens it may use.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Map<String, Json>,
}

/// What is to be rendered.
#[derive(Clone, Debug, Default)]
pub struct ChatRequest {
    /// The messages, each an object with `role` and mostly `content`.
    pub messages: Vec<Json>,
    /// The tools offered, where there are any.
    pub tools: Option<Vec<Json>>,
    /// Whether the text ends where the assistant's answer begins.
    pub add_generation_prompt: bool,
    /// Further variables, such as `enable_thinking`.
    pub variables: Map<String, Json>,
    /// Seconds since 1970 in UTC, for templates that write the date.
    pub now_unix_seconds: u64,
}

impl ChatTemplate {
    /// The folder's template: `chat_template.jinja`, else that of `tokenizer_config.json`.
    ///
    /// `name` picks one of several; without it, the one named "default" or the only one.
    pub fn from_folder(folder: &Path, name: Option<&str>) -> Result<ChatTemplate, ModelError> {
        let path = folder.join("tokenizer_config.json");
        let settings = tokenizer_settings(&path)?;
        let file = folder.join("chat_template.jinja");
        let source = if file.is_file() && name.is_none_or(|name| name == DEFAULT_NAME) {
            std::fs::read_to_string(&file).map_err(ModelError::io("read", &file))?
        } else {
            named_template(&path, settings.get("chat_template"), name)?
        };
        ChatTemplate::from_source(&source, special_tokens(&settings))
    }

    /// Parses a template; `special_tokens` maps names such as `bos_token` to texts.
    pub fn from_source(
        source: &str,
        special_tokens: Map<String, Json>,
    ) -> Result<ChatTemplate, ModelError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(template_error)?);
        environment.set_unknown_method_callback(python_method);
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", raise_exception);
        let source = without_generation_tags(source);
        environment.add_template_owned(NAME, source).map_err(template_error)?;
        Ok(ChatTemplate { environment, special_tokens })
    }

    /// The conversation as the text a model continues.
    pub fn render(&self, request: &ChatRequest) -> Result<String, ModelError> {
        let mut context = self.special_tokens.clone();
        let prompt = request.add_generation_prompt;
        context.extend(request.variables.clone());
        context.insert("messages".to_owned(), request.messages.clone().into());
        context.insert("tools".to_owned(), request.tools.clone().map_or(Json::Null, Json::from));
        context.insert("documents".to_owned(), Json::Null);
        context.insert("add_generation_prompt".to_owned(), prompt.into());
        let now = request.now_unix_seconds;
        let strftime = Value::from_function(move |format: &str| strftime(format, now));
        let rest = template_value(Json::Object(context));
        let context = minijinja::context! { strftime_now => strftime, ..rest };
        let template = self.environment.get_template(NAME).map_err(template_error)?;
        template.render(context).map_err(template_error)
    }
}

/// A JSON value as templates see it; keys keep their order.
fn template_value(value: Json) -> Value {
    match value {
        Json::Null => Value::from(()),
        Json::Bool(flag) => flag.into(),
        Json::String(text) => text.into(),
        Json::Array(items) => items.into_iter().map(template_value).collect::<Vec<_>>().into(),
        Json::Object(map) => {
            Value::from_pairs(map.into_iter().map(|(key, value)| (key, template_value(value))))
        }
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(whole), _) => whole.into(),
            (None, Some(whole)) => whole.into(),
            (None, None) => number.as_f64().unwrap_or(f64::NAN).into(),
        },
    }
}

fn tokenizer_settings(path: &Path) -> Result<Map<String, Json>, ModelError> {
    if !path.is_file() {
        return Ok(Map::new());
    }
    let text = std::fs::read_to_string(path).map_err(ModelError::io("read", path))?;
    serde_json::from_str(&text).map_err(|error| ModelError::Format {
        path: path.to_owned(),
        format: "a JSON object",
        reason: error.to_string(),
    })
}

/// One template of `chat_template`: a text, or a list of objects with `name` and `template`.
fn named_template(
    path: &Path,
    found: Option<&Json>,
    name: Option<&str>,
) -> Result<String, ModelError> {
    let wanted = name.unwrap_or(DEFAULT_NAME);
    let pair = |entry: &'_ Json| -> Option<(String, String)> {
        Some((entry["name"].as_str()?.to_owned(), entry["template"].as_str()?.to_owned()))
    };
    let templates: Option<Vec<(String, String)>> = match found {
        None | Some(Json::Null) => Some(vec![]),
        Some(Json::String(text)) => Some(vec![(DEFAULT_NAME.to_owned(), text.clone())]),
        Some(Json::Array(list)) => list.iter().map(pair).collect(),
        Some(_) => None,
    };
    let templates = templates.ok_or_else(|| ModelError::Format {
        path: path.to_owned(),
        format: "a tokenizer's settings",
        reason: "`chat_template` should be a text, or a list of names with templates".to_owned(),
    })?;
    let only = name.is_none() && templates.len() == 1;
    let known = templates.iter().map(|(name, _)| name.clone()).collect();
    let chosen = templates.into_iter().find(|(name, _)| only || name == wanted);
    match chosen {
        Some((_, source)) => Ok(source),
        None => Err(ModelError::NoTemplate { name: wanted.to_owned(), known }),
    }
}

/// Special tokens, which stand as texts or as objects with their text under `content`.
fn special_tokens(settings: &Map<String, Json>) -> Map<String, Json> {
    let text = |name: &&str| {
        let value = settings.get(*name)?;
        let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
        Some(((*name).to_owned(), text.into()))
    };
    SPECIAL_TOKENS.iter().filter_map(text).collect()
}

/// Python's methods: those of minijinja's compatibility layer, and a few that it lacks.
fn python_method(
    state: &mut State<'_, '_>,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let (text, affix) = (value.as_str(), args.first().and_then(Value::as_str));
    match (method, text, affix) {
        ("removeprefix", Some(text), Some(affix)) => {
            Ok(text.strip_prefix(affix).unwrap_or(text).into())
        }
        ("removesuffix", Some(text), Some(affix)) => {
            Ok(text.strip_suffix(affix).unwrap_or(text).into())
        }
        // The compatibility layer starts words at spaces only.
        ("title", Some(text), None) => Ok(title(text).into()),
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args),
    }
}

/// Python's `str.title`: a letter after anything but a letter is upper case, others lower.
fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut in_word = false;
    for character in text.chars() {
        if in_word {
            out.extend(character.to_lowercase());
        } else {
            out.extend(character.to_uppercase());
        }
        in_word = character.is_alphabetic();
    }
    out
}

fn tojson(value: &Value, kwargs: Kwargs) -> Result<Value, Error> {
    let indent: Option<Value> = kwargs.get("indent")?;
    let indent = indent.filter(|value| !value.is_none()).map(|value| match value.as_usize() {
        Some(spaces) => " ".repeat(spaces),
        None => value.to_string(),
    });
    let separators: Option<Value> = kwargs.get("separators")?;
    let (item_separator, key_separator) = match separators.filter(|value| !value.is_none()) {
        Some(pair) => {
            (pair.get_item_by_index(0)?.to_string(), pair.get_item_by_index(1)?.to_string())
        }
        // json.dumps leaves no space at the end of a line.
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
    };
    let escape = kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sorted = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    kwargs.assert_all_used()?;
    let style = JsonStyle {
        indent,
        item_separator,
        key_separator,
        beyond_ascii: if escape { BeyondAscii::Escape } else { BeyondAscii::Keep },
        key_order: if sorted { KeyOrder::Sorted } else { KeyOrder::AsGiven },
    };
    to_json(value, &style).map(Value::from)
}

/// Marks an error as the template's own refusal.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refusal(String);

fn raise_exception(reason: String) -> Result<Value, Error> {
    let error = Error::new(ErrorKind::InvalidOperation, reason.clone());
    Err(error.with_source(Refusal(reason)))
}

fn template_error(error: Error) -> ModelError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(inner) = cause {
        if let Some(Refusal(reason)) = inner.downcast_ref() {
            return ModelError::TemplateRefused { reason: reason.clone() };
        }
        cause = inner.source();
    }
    let reason = match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    ModelError::Template { line: error.line(), reason }
}

/// The parts of Python's `strftime` that templates use, in UTC and English.
fn strftime(format: &str, unix_seconds: u64) -> Result<String, Error> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    // 1970 began on a Thursday.
    const DAYS: [&str; 7] =
        ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (days, seconds) = (unix_seconds / 86_400, unix_seconds % 86_400);
    let (year, month, day) = civil_date(days);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[(days % 7) as usize]);
    let mut text = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            text.push(character);
            continue;
        }
        let mut code = characters.next();
        let unpadded = code == Some('-');
        if unpadded {
            code = characters.next();
        }
        let number = |value: u64| if unpadded { value.to_string() } else { format!("{value:02}") };
        text += &match code {
            Some('Y') => year.to_string(),
            Some('y') => number(year % 100),
            Some('m') => number(month),
            Some('d') => number(day),
            Some('H') => number(hour),
            Some('I') => number((hour + 11) % 12 + 1),
            Some('M') => number(minute),
            Some('S') => number(second),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('B') => month_name.to_owned(),
            Some('b') => month_name[..3].to_owned(),
            Some('A') => day_name.to_owned(),
            Some('a') => day_name[..3].to_owned(),
            Some('%') => "%".to_owned(),
            other => {
                let reason =
                    format!("strftime_now: `%{}` is not implemented", other.unwrap_or(' '));
                return Err(Error::new(ErrorKind::InvalidOperation, reason));
            }
        };
    }
    Ok(text)
}

/// Year, month and day of a day counted from 1970-01-01, in the Gregorian calendar.
pub fn civil_date(mut days: u64) -> (u64, u64, u64) {
    let leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    let mut year = 1970;
    // 400 years have 146,097 days; skipping them keeps the loop short for any input.
    year += days / 146_097 * 400;
    days %= 146_097;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while days >= lengths[month] {
        days -= lengths[month];
        month += 1;
    }
    (year, month as u64 + 1, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;
    use serde_json::json;

    fn template(source: &str) -> Result<ChatTemplate, ModelError> {
        ChatTemplate::from_source(source, Map::new())
    }

    /// Renders a golden's cases and returns how many there were.
    fn compare(folder: &Path, name: &str) -> usize {
        let read =
            |end: &str| std::fs::read_to_string(folder.join(format!("{name}.{end}"))).unwrap();
        let cases: Vec<Json> = serde_json::from_str(&read("json")).unwrap();
        for (index, case) in cases.iter().enumerate() {
            let mut variables = case.as_object().unwrap().clone();
            let mut take = |key: &str| variables.remove(key);
            let list = |value: Option<Json>| value.map(|v| v.as_array().unwrap().clone());
            let mut request = ChatRequest {
                messages: list(take("messages")).unwrap(),
                tools: list(take("tools")),
                add_generation_prompt: take("add_generation_prompt") == Some(true.into()),
                ..ChatRequest::default()
            };
            let (rendered, error) = (take("rendered"), take("error"));
            request.variables = variables;
            match (template(&read("jinja")).unwrap().render(&request), rendered, error) {
                (Ok(got), Some(want), None) => assert_eq!(got, want, "{name} {index}"),
                (Err(ModelError::TemplateRefused { reason }), None, Some(want)) => {
                    assert_eq!(reason, want, "{name} {index}");
                }
                // Words differ where the template trips over its input, as on an absent key.
                (Err(ModelError::Template { .. }), None, Some(_)) => {}
                (got, want, error) => panic!("{name} {index}: {got:?}, want {want:?} {error:?}"),
            }
        }
        cases.len()
    }

    #[test]
    fn templates_render_byte_for_byte_as_in_transformers() {
        for name in ["turns", "tools", "values"] {
            assert_eq!(compare(&golden::root().join("chat"), name), 5);
        }
    }

    #[test]
    #[ignore = "needs PONTOON_TOKENIZERS: a folder of vendors' templates with rendered cases"]
    fn vendors_templates_render_as_in_transformers() {
        let folder =
            std::env::var_os("PONTOON_TOKENIZERS").expect("PONTOON_TOKENIZERS is a folder");
        for name in ["qwen3", "deepseek_v3", "llama3"] {
            assert!(compare(Path::new(&folder), name) > 0);
        }
    }

    #[test]
    fn dates_are_written_as_python_does() {
        // 2024-02-29 13:05:09 UTC, a Thursday.
        let at = 1_709_211_909;
        for (format, want) in [
            ("%d %b %Y", "29 Feb 2024"),
            ("%A, %B %-d, %y", "Thursday, February 29, 24"),
            ("%a %I:%M:%S %p %H%%", "Thu 01:05:09 PM 13%"),
        ] {
            assert_eq!(strftime(format, at).unwrap(), want);
        }
        assert_eq!(strftime("%Y-%m-%d", 0).unwrap(), "1970-01-01");
        assert!(strftime("%Q", 0).unwrap_err().to_string().contains("`%Q` is not implemented"));
        let chat = template("{{ strftime_now('%Y') }}").unwrap();
        let request = ChatRequest { now_unix_seconds: at, ..ChatRequest::default() };
        assert_eq!(chat.render(&request).unwrap(), "2024");
    }

    #[test]
    fn a_template_that_does_not_parse_is_refused_with_its_line() {
        let text = template("a\nb\n{% if %}").unwrap_err().to_string();
        assert!(text.starts_with("chat template line 3: syntax error"), "{text}");
        let broken = template("\n{{ messages.nothing.more }}").unwrap();
        let text = broken.render(&ChatRequest::default()).unwrap_err().to_string();
        assert!(text.starts_with("chat template line 2: undefined value"), "{text}");
    }

    #[test]
    fn templates_are_found_in_either_file_and_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let render =
            |name| ChatTemplate::from_folder(folder.path(), name)?.render(&ChatRequest::default());
        let text = render(None).unwrap_err().to_string();
        assert_eq!(text, "no chat template `default`; there are: none");
        let write =
            |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        let mut settings = json!({"bos_token": {"content": "<s>"}, "eos_token": null});
        settings["chat_template"] = json!([
            {"name": "default", "template": "{{ bos_token }}{{ eos_token }}plain"},
            {"name": "tool_use", "template": "tools"}
        ]);
        write("tokenizer_config.json", &settings.to_string());
        assert_eq!(render(None).unwrap(), "<s>plain");
        assert_eq!(render(Some("tool_use")).unwrap(), "tools");
        let text = render(Some("rag")).unwrap_err().to_string();
        assert_eq!(text, "no chat template `rag`; there are: default, tool_use");
        write("chat_template.jinja", "from the file {{ bos_token }}");
        assert_eq!(render(None).unwrap(), "from the file <s>");
    }
}
