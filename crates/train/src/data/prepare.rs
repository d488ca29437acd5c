//! Texts to shards: tokenised on all cores, written in the order they were read.
//!
//! Read next: `shard.rs`.

use std::path::{Path, PathBuf};

use pontoon_models::Tokenizer;
use pontoon_ops::philox::Stream;
use serde::Serialize;

use super::{DataError, Flow, Import, ShardWriter};
use crate::error::TrainError;

/// Bytes of text tokenised at a time: enough to keep all cores busy, little to hold.
const CHUNK_BYTES: usize = 8 << 20;
/// Tokens of a shard before the next begins: files of about 256 MB.
const SHARD_TOKENS: usize = 64 << 20;
/// Sets the draw of validation documents apart from others of the same seed.
const VALID_DOMAIN: u64 = 0x7661_6c69;

/// What is prepared and where it goes.
#[derive(Debug)]
pub struct Prepare<'a> {
    /// The texts.
    pub import: &'a Import,
    /// The tokenizer's file.
    pub tokenizer: &'a Path,
    /// The folder of shards, made if missing.
    pub out: &'a Path,
    /// The share of documents that goes to `out/valid`.
    pub valid_fraction: f32,
}

/// What was prepared; also written as `data.json`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Prepared {
    /// Documents to train on.
    pub documents: u64,
    /// Their tokens.
    pub tokens: u64,
    /// Documents to validate on.
    pub valid_documents: u64,
    /// Their tokens.
    pub valid_tokens: u64,
    /// Records left out.
    pub broken: u64,
    /// The first of those.
    pub broken_examples: Vec<String>,
    /// The token put after each document, if the tokenizer has one.
    pub end_token: Option<u32>,
    /// Ids the tokenizer has.
    pub vocabulary: usize,
}

impl Prepare<'_> {
    /// Reads, tokenises and writes everything.
    pub fn run(&self) -> Result<Prepared, TrainError> {
        let tokenizer = Tokenizer::from_file(self.tokenizer)?;
        let vocabulary = tokenizer.vocab_size();
        let end_token = tokenizer.end_tokens_by_name().first().copied();
        let mut train = Shards::create(self.out, vocabulary)?;
        let mut valid = Shards::create(&self.out.join("valid"), vocabulary)?;
        let (mut texts, mut bytes) = (Vec::new(), 0);
        let mut documents = 0;
        let mut flush = |texts: &mut Vec<String>| -> Result<(), TrainError> {
            for mut tokens in encode_all(&tokenizer, texts)? {
                tokens.extend(end_token);
                let draw = Stream::new(0, VALID_DOMAIN).uniform(documents);
                documents += 1;
                if draw < self.valid_fraction { &mut valid } else { &mut train }.push(&tokens)?;
            }
            texts.clear();
            Ok(())
        };
        let mut failed = None;
        let imported = self.import.read(&mut |text| {
            // Its end token alone would be nothing to learn from.
            if text.trim().is_empty() {
                return Ok(Flow::On);
            }
            bytes += text.len();
            texts.push(text);
            if bytes >= CHUNK_BYTES {
                bytes = 0;
                if let Err(error) = flush(&mut texts) {
                    failed = Some(error);
                    return Ok(Flow::Enough);
                }
            }
            Ok(Flow::On)
        })?;
        if let Some(error) = failed {
            return Err(error);
        }
        flush(&mut texts)?;
        train.finish()?;
        valid.finish()?;
        let prepared = Prepared {
            documents: train.documents,
            tokens: train.tokens,
            valid_documents: valid.documents,
            valid_tokens: valid.tokens,
            broken: imported.broken,
            broken_examples: imported.examples,
            end_token,
            vocabulary,
        };
        if prepared.tokens == 0 {
            let broken = prepared.broken_examples.join("; ");
            let what = match prepared.broken {
                0 => "the inputs hold no text; check the files and --field".to_owned(),
                count => format!("no text could be used; {count} records are broken: {broken}"),
            };
            return Err(DataError::Empty { what }.into());
        }
        let path = self.out.join("data.json");
        let text = serde_json::to_vec_pretty(&prepared).expect("plain values are JSON");
        std::fs::write(&path, text).map_err(DataError::io("write", &path))?;
        Ok(prepared)
    }
}

/// A folder of shards being written.
struct Shards {
    folder: PathBuf,
    vocabulary: usize,
    count: usize,
    open: Option<ShardWriter>,
    documents: u64,
    tokens: u64,
}

impl Shards {
    fn create(folder: &Path, vocabulary: usize) -> Result<Shards, DataError> {
        let first = folder.join(name(0));
        if first.exists() {
            let what = "is there already; remove it or give another --out".to_owned();
            return Err(DataError::Input { path: first, what });
        }
        let folder = folder.to_owned();
        Ok(Shards { folder, vocabulary, count: 0, open: None, documents: 0, tokens: 0 })
    }

    fn push(&mut self, document: &[u32]) -> Result<(), DataError> {
        if document.is_empty() {
            return Ok(());
        }
        let writer = match &mut self.open {
            Some(writer) => writer,
            None => {
                let folder = &self.folder;
                std::fs::create_dir_all(folder).map_err(DataError::io("create", folder))?;
                let path = folder.join(name(self.count));
                self.count += 1;
                self.open.insert(ShardWriter::create(&path, self.vocabulary)?)
            }
        };
        writer.push(document)?;
        self.documents += 1;
        self.tokens += document.len() as u64;
        if writer.tokens() >= SHARD_TOKENS {
            self.finish()?;
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), DataError> {
        self.open.take().map_or(Ok(()), ShardWriter::finish)
    }
}

fn name(index: usize) -> String {
    format!("shard-{index:05}.bin")
}

/// The tokens of every text, in order; threads share the work.
fn encode_all(tokenizer: &Tokenizer, texts: &[String]) -> Result<Vec<Vec<u32>>, TrainError> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let next = std::sync::atomic::AtomicUsize::new(0);
    let mut found: Vec<(usize, Vec<u32>)> = Vec::with_capacity(texts.len());
    std::thread::scope(|scope| -> Result<(), TrainError> {
        let work = || -> Result<Vec<(usize, Vec<u32>)>, TrainError> {
            let mut own = Vec::new();
            loop {
                let index = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                let Some(text) = texts.get(index) else { return Ok(own) };
                own.push((index, tokenizer.encode(text)?));
            }
        };
        let handles: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        for handle in handles {
            found.extend(handle.join().expect("encoding does not panic")?);
        }
        Ok(())
    })?;
    found.sort_unstable_by_key(|(index, _)| *index);
    Ok(found.into_iter().map(|(_, tokens)| tokens).collect())
}
