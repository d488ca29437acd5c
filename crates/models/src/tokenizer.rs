//! A tokenizer.json, with what generation needs around it: end tokens and streamed decoding.
//!
//! Does not render conversations: see `chat_template.rs`. Does not train tokenizers.

use std::path::Path;

use serde_json::Value;

use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::keys::Keys;

/// Tokens of one character at most: UTF-8 has four bytes a character, a token at least one byte.
const TOKENS_PER_CHARACTER_MAX: usize = 4;

/// What stands for bytes that are not (yet) a character.
const REPLACEMENT: char = '\u{fffd}';

/// A tokenizer and the ids that end a text.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    eos: Vec<u32>,
    token_id_max: u32,
}

/// How published tokenizers spell the ends of documents, then of turns.
const END_TOKENS: [&str; 7] = [
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<｜end▁of▁sentence｜>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
];

/// Whether special tokens appear in decoded text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpecialTokens {
    /// They are left out.
    Hide,
    /// They are spelled out.
    Show,
}

impl Tokenizer {
    /// Reads `tokenizer.json` and the end tokens of `generation_config.json` or `config.json`.
    pub fn from_folder(folder: &Path) -> Result<Tokenizer, ModelError> {
        let mut tokenizer = Tokenizer::from_file(&folder.join("tokenizer.json"))?;
        for name in ["generation_config.json", "config.json"] {
            let path = folder.join(name);
            if path.is_file() && tokenizer.eos.is_empty() {
                tokenizer.eos = eos_ids(&path)?;
            }
        }
        Ok(tokenizer)
    }

    /// Reads one file in tokenizer.json's format; no token ends a text.
    pub fn from_file(path: &Path) -> Result<Tokenizer, ModelError> {
        let bytes = std::fs::read(path).map_err(ModelError::io("read", path))?;
        let inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(|error| {
            let (path, format) = (path.to_owned(), "a tokenizer");
            ModelError::Format { path, format, reason: error.to_string() }
        })?;
        let token_id_max = inner.get_vocab(true).into_values().max().unwrap_or(0);
        Ok(Tokenizer { inner, eos: Vec::new(), token_id_max })
    }

    /// The token ids of a text, exactly as written: nothing is put before or after it.
    ///
    /// Special tokens spelled out in the text become their ids, as chat templates need.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        self.encoded(text, false)
    }

    /// As `encode`, with what the tokenizer itself puts around a text, such as its start token.
    pub fn encode_as_document(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        self.encoded(text, true)
    }

    fn encoded(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, ModelError> {
        let encoding = self.inner.encode_fast(text, add_special_tokens).map_err(refused)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of token ids; an id the tokenizer does not know is an error.
    pub fn decode(&self, ids: &[u32], special: SpecialTokens) -> Result<String, ModelError> {
        if let Some(&id) = ids.iter().find(|&&id| self.inner.id_to_token(id).is_none()) {
            return Err(ModelError::UnknownToken { id, vocab_size: self.vocab_size() });
        }
        self.inner.decode(ids, special == SpecialTokens::Hide).map_err(refused)
    }

    /// Decodes ids one after another, giving text as soon as it is whole characters.
    pub fn stream(&self, special: SpecialTokens) -> StreamDecoder<'_> {
        StreamDecoder { tokenizer: self, special, ids: Vec::new(), given: 0 }
    }

    /// The id of a token by its spelling.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The spelling of a token, which for most tokenizers is not its text; see `decode`.
    pub fn token_name(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The ids that end a text; empty if the folder names none.
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// The ids of the tokens that end a document or a turn by common names, for a tokenizer
    /// whose folder does not say; the end of a document first.
    pub fn end_tokens_by_name(&self) -> Vec<u32> {
        END_TOKENS.iter().filter_map(|name| self.token_id(name)).collect()
    }

    /// Sets the ids that end a text.
    pub fn with_eos(mut self, eos: Vec<u32>) -> Tokenizer {
        self.eos = eos;
        self
    }

    /// One more than the largest id: what a model's embedding must at least have.
    pub fn vocab_size(&self) -> usize {
        self.token_id_max as usize + 1
    }

    /// Whether the model has a row for every id; rows beyond the tokenizer's ids are padding.
    ///
    /// Returns the number of padding rows, which sampling must mask.
    pub fn padding_of(&self, config: &ModelConfig) -> Result<usize, ModelError> {
        config.vocab_size.checked_sub(self.vocab_size()).ok_or(ModelError::VocabularyMismatch {
            token_id_max: self.token_id_max,
            vocab_size: config.vocab_size,
        })
    }
}

/// Turns ids into text piece by piece; see [`Tokenizer::stream`].
#[derive(Clone, Debug)]
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    special: SpecialTokens,
    /// Ids whose text has been given out, kept as context, then those that wait.
    ids: Vec<u32>,
    given: usize,
}

impl StreamDecoder<'_> {
    /// Adds one id; gives the text that is now certain, which may be empty.
    pub fn push(&mut self, id: u32) -> Result<String, ModelError> {
        self.ids.push(id);
        let text = self.waiting_text()?;
        // A character's missing bytes come within a few tokens, or never.
        let waits = self.ids.len() - self.given;
        if text.ends_with(REPLACEMENT) && waits < TOKENS_PER_CHARACTER_MAX {
            return Ok(String::new());
        }
        self.give();
        Ok(text)
    }

    /// The text of what still waits, with a replacement for a character cut short.
    pub fn finish(mut self) -> Result<String, ModelError> {
        let text = self.waiting_text()?;
        self.give();
        Ok(text)
    }

    /// Text that the waiting ids add to that of the ids before them.
    ///
    /// Decoded together with their context, as some decoders drop a space at the start of a text.
    fn waiting_text(&self) -> Result<String, ModelError> {
        let before = self.tokenizer.decode(&self.ids[..self.given], self.special)?;
        let all = self.tokenizer.decode(&self.ids, self.special)?;
        Ok(match all.strip_prefix(&before) {
            Some(added) => added.to_owned(),
            None => self.tokenizer.decode(&self.ids[self.given..], self.special)?,
        })
    }

    fn give(&mut self) {
        self.ids.drain(..self.given);
        self.given = self.ids.len();
    }
}

/// `eos_token_id` of one JSON file: none, one or several.
fn eos_ids(path: &Path) -> Result<Vec<u32>, ModelError> {
    let text = std::fs::read_to_string(path).map_err(ModelError::io("read", path))?;
    match serde_json::from_str(&text) {
        Ok(Value::Object(map)) => Keys::new(&map).ids("eos_token_id"),
        Ok(_) => Ok(Vec::new()),
        Err(error) => {
            let (path, format) = (path.to_owned(), "a JSON object");
            Err(ModelError::Format { path, format, reason: error.to_string() })
        }
    }
}

fn refused(error: tokenizers::Error) -> ModelError {
    ModelError::Tokenizer { reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;

    struct Sample {
        text: String,
        ids: Vec<u32>,
        all: String,
        plain: String,
    }

    fn tokenizer() -> Tokenizer {
        Tokenizer::from_folder(&golden::folder("tokenizer")).unwrap()
    }

    fn samples() -> Vec<Sample> {
        samples_in(&golden::folder("tokenizer"))
    }

    fn samples_in(folder: &Path) -> Vec<Sample> {
        let text = std::fs::read_to_string(folder.join("samples.json"));
        let list: Vec<Value> = serde_json::from_str(&text.unwrap()).unwrap();
        let text_of = |sample: &Value, key| sample[key].as_str().unwrap().to_owned();
        let ids_of = |sample: &Value| serde_json::from_value(sample["ids"].clone()).unwrap();
        list.iter()
            .map(|sample| Sample {
                text: text_of(sample, "text"),
                ids: ids_of(sample),
                all: text_of(sample, "all"),
                plain: text_of(sample, "plain"),
            })
            .collect()
    }

    fn compare(tokenizer: &Tokenizer, samples: &[Sample]) {
        for sample in samples {
            assert_eq!(tokenizer.encode(&sample.text).unwrap(), sample.ids, "{}", sample.text);
            assert_eq!(tokenizer.decode(&sample.ids, SpecialTokens::Show).unwrap(), sample.all);
            assert_eq!(tokenizer.decode(&sample.ids, SpecialTokens::Hide).unwrap(), sample.plain);
            let mut stream = tokenizer.stream(SpecialTokens::Show);
            let pieces: String = sample.ids.iter().map(|&id| stream.push(id).unwrap()).collect();
            assert_eq!(pieces + &stream.finish().unwrap(), sample.all);
        }
    }

    #[test]
    fn encodes_and_decodes_as_the_python_library_does() {
        compare(&tokenizer(), &samples());
    }

    #[test]
    #[ignore = "needs PONTOON_TOKENIZERS: folders of vendors' tokenizers with samples.json"]
    fn vendors_tokenizers_agree_with_the_python_library() {
        let root = std::env::var_os("PONTOON_TOKENIZERS").expect("PONTOON_TOKENIZERS is a folder");
        for name in ["qwen3", "deepseek_v3", "llama3"] {
            let folder = Path::new(&root).join(name);
            let samples = samples_in(&folder);
            compare(&Tokenizer::from_folder(&folder).unwrap(), &samples);
            eprintln!("{name}: {} texts agree", samples.len());
        }
    }

    #[test]
    fn streamed_pieces_are_whole_characters() {
        let tokenizer = tokenizer();
        for sample in samples() {
            let mut stream = tokenizer.stream(SpecialTokens::Show);
            let mut text = String::new();
            for &id in &sample.ids {
                let piece = stream.push(id).unwrap();
                assert!(!piece.contains(REPLACEMENT), "{}: {piece:?}", sample.text);
                text += &piece;
            }
            assert_eq!(text + &stream.finish().unwrap(), sample.text);
        }
    }

    #[test]
    fn a_character_cut_short_is_given_at_the_end_and_never_held_for_ever() {
        let tokenizer = tokenizer();
        let bridge = tokenizer.encode("橋").unwrap();
        assert_eq!(bridge.len(), 3);
        let mut stream = tokenizer.stream(SpecialTokens::Show);
        assert_eq!(stream.push(bridge[0]).unwrap() + &stream.push(bridge[1]).unwrap(), "");
        assert_eq!(stream.finish().unwrap(), "\u{fffd}");
        let mut stream = tokenizer.stream(SpecialTokens::Show);
        let text: String = (0..9).map(|_| stream.push(bridge[1]).unwrap()).collect();
        assert!(text.chars().count() >= 8, "{text}");
    }

    #[test]
    fn a_model_with_too_few_rows_is_refused_and_padding_is_counted() {
        let tokenizer = tokenizer();
        let config = |size| crate::presets::preset("qwen3-1m").unwrap().with_vocab_size(size);
        assert_eq!(tokenizer.padding_of(&config(320)).unwrap(), 20);
        let text = tokenizer.padding_of(&config(299)).unwrap_err().to_string();
        assert!(text.starts_with("the tokenizer has ids up to 299 but the model's"), "{text}");
    }

    #[test]
    fn end_tokens_come_from_either_file_as_one_or_a_list() {
        let folder = tempfile::tempdir().unwrap();
        let write =
            |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        let source = golden::folder("tokenizer").join("tokenizer.json");
        std::fs::copy(source, folder.path().join("tokenizer.json")).unwrap();
        write("config.json", r#"{"eos_token_id": 0}"#);
        assert_eq!(Tokenizer::from_folder(folder.path()).unwrap().eos(), [0]);
        write("generation_config.json", r#"{"eos_token_id": [0, 2]}"#);
        assert_eq!(Tokenizer::from_folder(folder.path()).unwrap().eos(), [0, 2]);
        write("generation_config.json", "{");
        let text = Tokenizer::from_folder(folder.path()).unwrap_err().to_string();
        assert!(text.contains("generation_config.json` is not a JSON object"), "{text}");
    }

    #[test]
    fn bad_files_and_ids_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let text = Tokenizer::from_folder(folder.path()).unwrap_err().to_string();
        assert!(text.starts_with("cannot read"), "{text}");
        std::fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
        let text = Tokenizer::from_folder(folder.path()).unwrap_err().to_string();
        assert!(text.contains("tokenizer.json` is not a tokenizer"), "{text}");
        let text = tokenizer().decode(&[5, 300], SpecialTokens::Show).unwrap_err().to_string();
        assert_eq!(text, "token id 300 is not in the tokenizer's vocabulary of 300");
    }
}
