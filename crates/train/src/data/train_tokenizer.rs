//! Trains a byte-level BPE tokenizer in Hugging Face's format, with a chat template beside it.
//!
//! The training itself is the `tokenizers` library's. Read next: `import.rs`.

use std::fs;
use std::path::Path;

use serde_json::json;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer, models::TrainerWrapper};

use super::{DataError, Flow, Import, Imported};

/// The special tokens, first in the vocabulary: end of document, borders of turns, reasoning.
pub const SPECIAL_TOKENS: [&str; 5] =
    ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"];
/// Fewer tokens cannot hold all bytes and the special ones.
pub const VOCABULARY_MIN: usize = 256 + SPECIAL_TOKENS.len();
/// Text beyond this changes a vocabulary little and would have to be held in memory.
const TEXT_BYTES_MAX: usize = 512 << 20;
/// Words, numbers digit by digit, marks, line ends and spaces: what Qwen's tokenizers split by.
const PATTERN: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
/// Turns between their borders, as in the ChatML format.
const CHAT_TEMPLATE: &str = "{%- for message in messages -%}\
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}\
{%- endfor -%}\
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}";

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrainedTokenizer {
    /// Tokens, which are fewer than asked for where the text is small.
    pub vocabulary: usize,
    /// Bytes of text it was trained on.
    pub text_bytes: usize,
    /// What was read.
    pub imported: Imported,
}

/// Trains on all texts of an import and writes `out` and a `tokenizer_config.json` beside it.
pub fn train_tokenizer(
    import: &Import,
    vocabulary: usize,
    out: &Path,
) -> Result<TrainedTokenizer, DataError> {
    if vocabulary < VOCABULARY_MIN {
        let what = format!(
            "a vocabulary of {vocabulary} cannot hold all bytes and special tokens; give --vocab \
             {VOCABULARY_MIN} or more"
        );
        return Err(DataError::Input { path: out.to_owned(), what });
    }
    let (mut texts, mut text_bytes) = (Vec::new(), 0);
    let imported = import.read(&mut |text| {
        text_bytes += text.len();
        texts.push(text);
        Ok(if text_bytes < TEXT_BYTES_MAX { Flow::On } else { Flow::Enough })
    })?;
    if text_bytes == 0 {
        let what = "the inputs hold no text; check the files and --field".to_owned();
        return Err(DataError::Empty { what });
    }
    let tokenizer = train(&texts, vocabulary).map_err(|error| {
        let what = format!("the tokenizer cannot be trained: {error}");
        DataError::Input { path: out.to_owned(), what }
    })?;
    let text = tokenizer.to_string(true).expect("a tokenizer is JSON");
    put(out, text.as_bytes())?;
    let settings = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": false,
        "chat_template": CHAT_TEMPLATE,
    });
    let text = serde_json::to_vec_pretty(&settings).expect("plain values are JSON");
    put(&out.with_file_name("tokenizer_config.json"), &text)?;
    let vocabulary = tokenizer.get_vocab_size(true);
    Ok(TrainedTokenizer { vocabulary, text_bytes, imported })
}

fn train(texts: &[String], vocabulary: usize) -> tokenizers::Result<Tokenizer> {
    let mut tokenizer = Tokenizer::new(BPE::default());
    let pattern = SplitPattern::Regex(PATTERN.to_owned());
    let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?;
    let bytes = ByteLevel::new(false, false, false);
    tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![split.into(), bytes.into()])));
    tokenizer.with_decoder(Some(bytes));
    let special = SPECIAL_TOKENS.map(|token| AddedToken::from(token, true)).to_vec();
    let trainer = BpeTrainer::builder()
        .vocab_size(vocabulary)
        .min_frequency(2)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(special)
        .build();
    tokenizer.train(&mut TrainerWrapper::from(trainer), texts.iter().map(String::as_str))?;
    Ok(tokenizer)
}

/// Writes a file that is whole or not there.
fn put(path: &Path, bytes: &[u8]) -> Result<(), DataError> {
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        fs::create_dir_all(folder).map_err(DataError::io("create", folder))?;
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.tmp"));
    fs::write(&temporary, bytes).map_err(DataError::io("write", &temporary))?;
    fs::rename(&temporary, path).map_err(DataError::io("write", path))
}
