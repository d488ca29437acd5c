//! Shards: token ids of many documents in one file, mapped into memory when read.
//!
//! ```text
//! 0   magic "PTNSHARD"
//! 8   u32 version  12 u32 bytes of one token (2 or 4)
//! 16  u64 vocabulary  24 u64 tokens  32 u64 documents
//! 40  24 bytes: the first of blake3 over all that follows the header
//! 64  tokens, then padding to 8 bytes, then the end of each document as u64 token count
//! ```
//! All numbers are little-endian. Read next: `pack.rs`.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::DataError;
use super::map::map;

const MAGIC: &[u8; 8] = b"PTNSHARD";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 64;
const HASH: std::ops::Range<usize> = 40..64;

/// A shard, mapped. The file must not be changed while it is open.
#[derive(Debug)]
pub struct Shard {
    path: PathBuf,
    bytes: Mmap,
    wide: bool,
    vocabulary: usize,
    tokens: usize,
    documents: usize,
}

impl Shard {
    /// Maps a file and checks its header against its size.
    pub fn open(path: &Path) -> Result<Shard, DataError> {
        let damaged = |what: String| DataError::Shard { path: path.to_owned(), what };
        let file = File::open(path).map_err(DataError::io("open", path))?;
        let length = file.metadata().map_err(DataError::io("measure", path))?.len();
        if length < HEADER_BYTES as u64 {
            return Err(damaged(format!("is truncated: {length} bytes are less than a header")));
        }
        let bytes = map(&file).map_err(DataError::io("map", path))?;
        if &bytes[..8] != MAGIC {
            return Err(damaged("is no token shard".to_owned()));
        }
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four"));
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight"));
        if u32_at(8) != VERSION {
            return Err(damaged(format!("has version {}, this program reads 1", u32_at(8))));
        }
        let width = match u32_at(12) {
            width @ (2 | 4) => width as usize,
            width => return Err(damaged(format!("has tokens of {width} bytes"))),
        };
        let [vocabulary, tokens, documents] = [16, 24, 32].map(u64_at);
        let want = u128::from(tokens) * width as u128;
        let want = want.next_multiple_of(8) + u128::from(documents) * 8 + HEADER_BYTES as u128;
        if want != u128::from(length) {
            return Err(damaged(format!("should have {want} bytes but has {length}")));
        }
        if documents == 0 || tokens == 0 {
            return Err(damaged("holds no tokens".to_owned()));
        }
        let shard = Shard {
            path: path.to_owned(),
            wide: width == 4,
            vocabulary: vocabulary as usize,
            tokens: tokens as usize,
            documents: documents as usize,
            bytes,
        };
        match shard.document_end(shard.documents - 1) == shard.tokens {
            true => Ok(shard),
            false => Err(damaged("has documents that do not end with its tokens".to_owned())),
        }
    }

    /// Reads all of it and compares with its hash.
    pub fn verify(&self) -> Result<(), DataError> {
        let hash = blake3::hash(&self.bytes[HEADER_BYTES..]);
        if hash.as_bytes()[..HASH.len()] == self.bytes[HASH] {
            return Ok(());
        }
        let what = "does not match its hash".to_owned();
        Err(DataError::Shard { path: self.path.clone(), what })
    }

    /// Ids are below this.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// Tokens of all documents.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Documents.
    pub fn documents(&self) -> usize {
        self.documents
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// One token's id.
    pub fn token(&self, index: usize) -> u32 {
        assert!(index < self.tokens, "token {index} of {}", self.tokens);
        if self.wide {
            let at = HEADER_BYTES + 4 * index;
            u32::from_le_bytes(self.bytes[at..at + 4].try_into().expect("four bytes"))
        } else {
            let at = HEADER_BYTES + 2 * index;
            u32::from(u16::from_le_bytes(self.bytes[at..at + 2].try_into().expect("two bytes")))
        }
    }

    /// Where a document ends, in tokens from the shard's start.
    pub fn document_end(&self, document: usize) -> usize {
        let width = if self.wide { 4 } else { 2 };
        let at = HEADER_BYTES + (self.tokens * width).next_multiple_of(8) + 8 * document;
        u64::from_le_bytes(self.bytes[at..at + 8].try_into().expect("eight bytes")) as usize
    }

    /// The document that a token belongs to.
    pub fn document_of(&self, token: usize) -> usize {
        let (mut low, mut high) = (0, self.documents);
        while low < high {
            let middle = low.midpoint(high);
            if self.document_end(middle) <= token { low = middle + 1 } else { high = middle }
        }
        low
    }
}

/// Writes a shard that appears under its name only when it is whole.
pub struct ShardWriter {
    path: PathBuf,
    temporary: PathBuf,
    file: BufWriter<File>,
    hasher: blake3::Hasher,
    wide: bool,
    vocabulary: usize,
    tokens: usize,
    ends: Vec<u64>,
}

impl ShardWriter {
    /// Begins a shard for ids below `vocabulary`.
    pub fn create(path: &Path, vocabulary: usize) -> Result<ShardWriter, DataError> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let temporary = path.with_file_name(format!(".{name}.tmp"));
        let file = File::create(&temporary).map_err(DataError::io("create", &temporary))?;
        let mut file = BufWriter::new(file);
        file.write_all(&[0; HEADER_BYTES]).map_err(DataError::io("write", &temporary))?;
        Ok(ShardWriter {
            path: path.to_owned(),
            temporary,
            file,
            hasher: blake3::Hasher::new(),
            wide: vocabulary > 1 << 16,
            vocabulary,
            tokens: 0,
            ends: Vec::new(),
        })
    }

    /// Tokens so far.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Appends a document; an empty one is left out.
    pub fn push(&mut self, document: &[u32]) -> Result<(), DataError> {
        if document.is_empty() {
            return Ok(());
        }
        let mut bytes = Vec::with_capacity(document.len() * 4);
        for &id in document {
            assert!((id as usize) < self.vocabulary, "the tokenizer gives only ids it has");
            match self.wide {
                true => bytes.extend(id.to_le_bytes()),
                false => bytes.extend((id as u16).to_le_bytes()),
            }
        }
        self.tokens += document.len();
        self.ends.push(self.tokens as u64);
        self.write(&bytes)
    }

    /// Completes the file, makes it durable and gives it its name.
    pub fn finish(mut self) -> Result<(), DataError> {
        let width = if self.wide { 4 } else { 2 };
        let used = self.tokens * width;
        self.write(&vec![0; used.next_multiple_of(8) - used])?;
        let ends: Vec<u8> = self.ends.iter().flat_map(|end| end.to_le_bytes()).collect();
        self.write(&ends)?;
        let mut header = Vec::with_capacity(HEADER_BYTES);
        header.extend(MAGIC);
        header.extend(VERSION.to_le_bytes());
        header.extend((width as u32).to_le_bytes());
        for number in [self.vocabulary, self.tokens, self.ends.len()] {
            header.extend((number as u64).to_le_bytes());
        }
        header.extend(&self.hasher.finalize().as_bytes()[..HASH.len()]);
        let ShardWriter { path, temporary, file, .. } = self;
        let write = || -> std::io::Result<()> {
            use std::io::{Seek, SeekFrom};
            let mut file = file.into_inner().map_err(|error| error.into_error())?;
            file.seek(SeekFrom::Start(0))?;
            file.write_all(&header)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
            File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
        };
        write().map_err(DataError::io("write", &path))
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), DataError> {
        self.hasher.update(bytes);
        self.file.write_all(bytes).map_err(DataError::io("write", &self.temporary))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(folder: &Path, vocabulary: usize, documents: &[&[u32]]) -> PathBuf {
        let path = folder.join("shard.bin");
        let mut writer = ShardWriter::create(&path, vocabulary).unwrap();
        documents.iter().for_each(|document| writer.push(document).unwrap());
        writer.finish().unwrap();
        path
    }

    #[test]
    fn a_shard_gives_back_tokens_and_documents_in_both_widths() {
        for (vocabulary, large) in [(65_536, 65_535), (65_537, 65_536)] {
            let folder = tempfile::tempdir().unwrap();
            let path = written(folder.path(), vocabulary, &[&[1, large, 3], &[], &[4, 5]]);
            let shard = Shard::open(&path).unwrap();
            shard.verify().unwrap();
            let tokens: Vec<u32> = (0..shard.tokens()).map(|index| shard.token(index)).collect();
            assert_eq!(tokens, [1, large, 3, 4, 5]);
            let of: Vec<usize> = (0..5).map(|token| shard.document_of(token)).collect();
            assert_eq!(of, [0, 0, 0, 1, 1]);
            assert_eq!((shard.documents(), shard.vocabulary()), (2, vocabulary));
            let names = fs::read_dir(folder.path()).unwrap().count();
            assert_eq!(names, 1, "no temporary file is left");
        }
    }

    #[test]
    fn every_truncation_and_any_changed_byte_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = written(folder.path(), 100, &[&[1, 2, 3], &[4, 5]]);
        let good = fs::read(&path).unwrap();
        for length in 0..good.len() {
            fs::write(&path, &good[..length]).unwrap();
            let error = Shard::open(&path).unwrap_err().to_string();
            assert!(error.contains("shard.bin") && !error.contains('\n'), "{error}");
        }
        // Byte 16 to 23 is the vocabulary, which is checked against the tokenizer's.
        for at in (0..16).chain(24..good.len()) {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&path, &bad).unwrap();
            let noticed = Shard::open(&path).and_then(|shard| shard.verify()).is_err();
            assert!(noticed, "byte {at}");
        }
    }
}
