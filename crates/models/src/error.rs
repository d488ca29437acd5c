//! The one error type of this crate: what is wrong with a model folder, where, and what was wanted.
//!
//! Does not describe failures of a device or of a program: those are the waist's own errors.

use std::path::{Path, PathBuf};

use pontoon_program::ProgramError;

/// What can be wrong with a model folder, its configuration, tokenizer or chat template.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The operating system refused a file operation.
    #[error("cannot {action} `{}`: {source}", path.display())]
    Io {
        /// What was tried, as a verb: "read", "create".
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file holds something other than its format allows.
    #[error("`{}` is not {format}: {reason}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// The format wanted, with its article: "a JSON object".
        format: &'static str,
        /// What the reader of that format says.
        reason: String,
    },
    /// The configuration names an architecture that is not implemented.
    #[error("model_type `{got}` is not implemented; the known ones are {known}")]
    UnknownModelType {
        /// The name found.
        got: String,
        /// The names that are implemented, comma-separated.
        known: String,
    },
    /// A key of the configuration is missing or has a value that cannot be used.
    #[error("config key `{key}` should be {want} but is {got}")]
    ConfigKey {
        /// The key, with dots where it is nested.
        key: String,
        /// What would be accepted.
        want: String,
        /// The value found, as JSON, or "missing".
        got: String,
    },
    /// No preset has this name.
    #[error("preset `{got}` does not exist; the nearest is `{nearest}`, and all are {known}")]
    UnknownPreset {
        /// The name asked for.
        got: String,
        /// The known name that is most like it.
        nearest: String,
        /// Every preset, comma-separated.
        known: String,
    },
    /// The folder has neither single nor sharded weights.
    #[error(
        "`{}` holds no model.safetensors and no model.safetensors.index.json; \
         other weight formats are not read",
        folder.display()
    )]
    NoWeights {
        /// The folder searched.
        folder: PathBuf,
    },
    /// The index names a file that is not in the folder.
    #[error(
        "`{}` names shard `{shard}`, which is not in its folder; fetch it again",
        index.display()
    )]
    MissingShard {
        /// The index file.
        index: PathBuf,
        /// The shard's file name as the index gives it.
        shard: String,
    },
    /// A weight file is shorter or longer than its header says.
    #[error(
        "`{}` should have {want} bytes by its header but has {got}; fetch it again",
        path.display()
    )]
    Truncated {
        /// The weight file.
        path: PathBuf,
        /// Bytes the header calls for.
        want: u64,
        /// Bytes on disk.
        got: u64,
    },
    /// The folder does not hold a tensor that the model needs.
    #[error("`{}` has no tensor `{name}`; the nearest name is `{nearest}`", folder.display())]
    MissingTensor {
        /// The folder searched.
        folder: PathBuf,
        /// The tensor asked for.
        name: String,
        /// The name present that is most like it, or "none".
        nearest: String,
    },
    /// A tensor's extents are not what the configuration calls for.
    #[error("tensor `{name}` should have shape {want:?} but has {got:?}")]
    Shape {
        /// The tensor.
        name: String,
        /// Extents wanted.
        want: Vec<usize>,
        /// Extents on disk.
        got: Vec<usize>,
    },
    /// A tensor's element type cannot be used where it stands.
    #[error("tensor `{name}` should be {want} but is {got}")]
    Dtype {
        /// The tensor.
        name: String,
        /// The types accepted.
        want: &'static str,
        /// The type on disk.
        got: String,
    },
    /// The target of an export already holds something.
    #[error("`{}` exists and is not an empty folder; choose another or remove it", path.display())]
    TargetNotEmpty {
        /// The folder that was to be written.
        path: PathBuf,
    },
    /// Tokenizer and model do not belong together.
    #[error(
        "the tokenizer has ids up to {token_id_max} but the model's vocab_size is {vocab_size}; \
         use the tokenizer that belongs to the model"
    )]
    VocabularyMismatch {
        /// The largest id that the tokenizer can give.
        token_id_max: u32,
        /// Rows of the model's embedding.
        vocab_size: usize,
    },
    /// A token id that the tokenizer does not know.
    #[error("token id {id} is not in the tokenizer's vocabulary of {vocab_size}")]
    UnknownToken {
        /// The id.
        id: u32,
        /// The number of ids known.
        vocab_size: usize,
    },
    /// The tokenizers library refused.
    #[error("tokenizer: {reason}")]
    Tokenizer {
        /// What it said.
        reason: String,
    },
    /// The template cannot be parsed, or rendering it failed.
    #[error("chat template{}: {reason}", line.map(|l| format!(" line {l}")).unwrap_or_default())]
    Template {
        /// Line of the template, where known.
        line: Option<usize>,
        /// What is wrong.
        reason: String,
    },
    /// The template itself refused the conversation (`raise_exception`).
    #[error("the chat template refuses this conversation: {reason}")]
    TemplateRefused {
        /// The template's words.
        reason: String,
    },
    /// The folder has no chat template, or none of the name asked for.
    #[error("no chat template `{name}`; there are: {}", listed(known))]
    NoTemplate {
        /// The name asked for.
        name: String,
        /// The names present.
        known: Vec<String>,
    },
    /// More tokens than the model or the cache was made for.
    #[error(
        "prompt {prompt} has {got} tokens, but at most {most} fit with room for one more \
         (the model's max_position_embeddings or the cache's size); shorten it"
    )]
    PromptTooLong {
        /// Which prompt.
        prompt: usize,
        /// Its length.
        got: usize,
        /// The longest that fits.
        most: usize,
    },
    /// A request that cannot be run as it stands.
    #[error("generation: {what}")]
    Request {
        /// What is wrong and what would do.
        what: String,
    },
    /// A program could not be built or run.
    #[error(transparent)]
    Program(#[from] ProgramError),
}

impl ModelError {
    /// Wraps an operating system error with what was tried on which path.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> ModelError {
        move |source| ModelError::Io { action, path: path.to_owned(), source }
    }

    /// A configuration key whose value cannot be used.
    pub fn config_key(
        key: impl Into<String>,
        want: impl Into<String>,
        got: Option<&serde_json::Value>,
    ) -> ModelError {
        let got = got.map_or_else(|| "missing".to_owned(), shortened);
        ModelError::ConfigKey { key: key.into(), want: want.into(), got }
    }
}

/// A JSON value short enough for a one-line message.
fn shortened(value: &serde_json::Value) -> String {
    const CHARACTERS_MAX: usize = 80;
    let text = value.to_string();
    if text.chars().count() <= CHARACTERS_MAX {
        return text;
    }
    text.chars().take(CHARACTERS_MAX).chain("...".chars()).collect()
}

/// Names with commas between them, or "none".
fn listed(names: &[String]) -> String {
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

/// The candidate most like `name` by edit distance, for "the nearest is" in messages.
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates.into_iter().min_by_key(|candidate| edit_distance(name, candidate))
}

/// Insertions, deletions and replacements that turn one text into the other.
fn edit_distance(left: &str, right: &str) -> usize {
    let right: Vec<char> = right.chars().collect();
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (above, left_char) in left.chars().enumerate() {
        let mut diagonal = above;
        row[0] = above + 1;
        for (column, right_char) in right.iter().enumerate() {
            let replaced = diagonal + usize::from(left_char != *right_char);
            diagonal = row[column + 1];
            row[column + 1] = replaced.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_name_is_the_one_with_fewest_edits() {
        let names = ["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"];
        assert_eq!(nearest("model.nrom.weight", names), Some("model.norm.weight"));
        assert_eq!(nearest("x", []), None);
    }
}
