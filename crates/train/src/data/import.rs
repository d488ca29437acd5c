//! Texts from files: txt and md (one document a file), jsonl and parquet (one a record), each but
//! parquet also as .gz or .zst.
//!
//! A record that cannot be used is named, counted and left out, up to a limit. Tokenises nothing.
//! Read next: `prepare.rs`.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::RowAccessor;
use parquet::schema::types::Type;

use super::DataError;

/// Broken records named in an error or a summary; more would not be read.
const EXAMPLES_MAX: usize = 5;

/// Texts to read.
#[derive(Debug)]
pub struct Import {
    files: Vec<PathBuf>,
    field: String,
    broken_max: u64,
    bytes_done: Arc<AtomicU64>,
    bytes_total: u64,
}

/// What was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Imported {
    /// Records that were used.
    pub documents: u64,
    /// Records that could not be.
    pub broken: u64,
    /// The first of those, as `file:line: why`.
    pub examples: Vec<String>,
}

#[derive(Clone, Copy)]
enum Format {
    Document,
    Lines,
    Parquet,
}

#[derive(Clone, Copy)]
enum Packing {
    None,
    Gzip,
    Zstd,
}

impl Import {
    /// Finds the files of inputs: files, folders with all in them, or patterns with `*` and `?`.
    pub fn open(inputs: &[String], field: &str, broken_max: u64) -> Result<Import, DataError> {
        let mut files = Vec::new();
        for input in inputs {
            let path = Path::new(input);
            let before = files.len();
            if path.is_dir() {
                walk(path, &mut files)?;
            } else if path.exists() {
                format_of(path)?;
                files.push(path.to_owned());
            } else if let Ok(found) = glob::glob(input) {
                files.extend(found.filter_map(Result::ok).filter(|path| path.is_file()));
            }
            if files.len() == before {
                let what = format!(
                    "`{input}` is no file, and no folder or pattern with .txt, .md, .jsonl, .gz, \
                     .zst or .parquet files; check the path"
                );
                return Err(DataError::Empty { what });
            }
        }
        let mut bytes_total = 0;
        for file in &files {
            bytes_total += file.metadata().map_err(DataError::io("measure", file))?.len();
        }
        let field = field.to_owned();
        Ok(Import { files, field, broken_max, bytes_done: Arc::default(), bytes_total })
    }

    /// Bytes of all files as they lie on disk.
    pub fn bytes_total(&self) -> u64 {
        self.bytes_total
    }

    /// Bytes read so far, to show progress from anywhere.
    pub fn bytes_done(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.bytes_done)
    }

    /// Reads every record in order; `take` gets the text of each.
    pub fn read(
        &self,
        take: &mut dyn FnMut(String) -> Result<Flow, DataError>,
    ) -> Result<Imported, DataError> {
        let mut reading =
            Reading { import: self, take, imported: Imported::default(), flow: Flow::On };
        for file in &self.files {
            reading.file(file)?;
            if reading.flow == Flow::Enough {
                break;
            }
        }
        Ok(reading.imported)
    }
}

/// Whether more texts are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// They are.
    On,
    /// They are not.
    Enough,
}

struct Reading<'a> {
    import: &'a Import,
    take: &'a mut dyn FnMut(String) -> Result<Flow, DataError>,
    imported: Imported,
    flow: Flow,
}

impl Reading<'_> {
    fn file(&mut self, path: &Path) -> Result<(), DataError> {
        let (format, packing) = format_of(path)?;
        if let Format::Parquet = format {
            return self.parquet(path);
        }
        let file = File::open(path).map_err(DataError::io("open", path))?;
        let counted = Counted { inner: file, done: Arc::clone(&self.import.bytes_done) };
        let reader: Box<dyn Read> = match packing {
            Packing::None => Box::new(counted),
            Packing::Gzip => Box::new(flate2::read::MultiGzDecoder::new(counted)),
            Packing::Zstd => {
                let decoder = zstd::Decoder::new(counted);
                Box::new(decoder.map_err(DataError::io("unpack", path))?)
            }
        };
        match format {
            Format::Document => self.document(path, reader),
            _ => self.lines(path, BufReader::with_capacity(1 << 20, reader)),
        }
    }

    fn document(&mut self, path: &Path, mut reader: Box<dyn Read>) -> Result<(), DataError> {
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).map_err(DataError::io("read", path))?;
        match String::from_utf8(bytes) {
            Ok(text) => self.text(text),
            Err(error) => {
                let valid = error.utf8_error().valid_up_to();
                let line = error.as_bytes()[..valid].iter().filter(|&&b| b == b'\n').count() + 1;
                self.broken(path, line, "is not UTF-8")
            }
        }
    }

    fn lines(&mut self, path: &Path, mut reader: impl BufRead) -> Result<(), DataError> {
        let (mut line, mut number) = (Vec::new(), 0);
        while self.flow == Flow::On {
            line.clear();
            number += 1;
            let count = reader.read_until(b'\n', &mut line).map_err(DataError::io("read", path))?;
            if count == 0 {
                break;
            }
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            let field = &self.import.field;
            match serde_json::from_slice::<serde_json::Value>(&line) {
                Err(error) => {
                    let why = format!("is no JSON (column {})", error.column());
                    self.broken(path, number, &why)?;
                }
                Ok(value) => match value.get(field).and_then(|text| text.as_str()) {
                    Some(text) => self.text(text.to_owned())?,
                    None => {
                        let why = format!("has no text in field `{field}`");
                        self.broken(path, number, &why)?;
                    }
                },
            }
        }
        Ok(())
    }

    fn parquet(&mut self, path: &Path) -> Result<(), DataError> {
        let wrong = |what: String| DataError::Input { path: path.to_owned(), what };
        let file = File::open(path).map_err(DataError::io("open", path))?;
        let length = file.metadata().map_err(DataError::io("measure", path))?.len();
        let refused = |error: parquet::errors::ParquetError| {
            let text = error.to_string();
            let line = text.lines().next().unwrap_or_default();
            wrong(format!("cannot be read as parquet: {line}; write it again"))
        };
        let reader = SerializedFileReader::new(file).map_err(refused)?;
        let schema = reader.metadata().file_metadata().schema();
        let field = &self.import.field;
        let Some(column) = schema.get_fields().iter().find(|column| column.name() == field) else {
            let names: Vec<&str> = schema.get_fields().iter().map(|column| column.name()).collect();
            let names = names.join(", ");
            return Err(wrong(format!("has no column `{field}`; --field is one of: {names}")));
        };
        let only = Type::group_type_builder(schema.name()).with_fields(vec![Arc::clone(column)]);
        let rows = reader.get_row_iter(Some(only.build().map_err(refused)?)).map_err(refused)?;
        for (index, row) in rows.enumerate() {
            let row = row.map_err(refused)?;
            match row.get_string(0) {
                Ok(text) => self.text(text.clone())?,
                Err(_) => self.broken(path, index + 1, "holds no text")?,
            }
            if self.flow == Flow::Enough {
                break;
            }
        }
        self.import.bytes_done.fetch_add(length, Ordering::Relaxed);
        Ok(())
    }

    fn text(&mut self, text: String) -> Result<(), DataError> {
        self.imported.documents += 1;
        self.flow = (self.take)(text)?;
        Ok(())
    }

    fn broken(&mut self, path: &Path, line: usize, why: &str) -> Result<(), DataError> {
        let imported = &mut self.imported;
        imported.broken += 1;
        if imported.examples.len() < EXAMPLES_MAX {
            imported.examples.push(format!("{}:{line}: {why}", path.display()));
        }
        if imported.broken <= self.import.broken_max {
            return Ok(());
        }
        Err(DataError::Broken {
            broken: imported.broken,
            records: imported.documents + imported.broken,
            examples: imported.examples.join("; "),
        })
    }
}

struct Counted {
    inner: File,
    done: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.done.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

/// How a file is read, by the endings of its name.
fn format_of(path: &Path) -> Result<(Format, Packing), DataError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let (name, packing) = match name.rsplit_once('.') {
        Some((stem, "gz")) => (stem, Packing::Gzip),
        Some((stem, "zst")) => (stem, Packing::Zstd),
        _ => (name.as_str(), Packing::None),
    };
    match (name.rsplit_once('.').map_or("", |(_, ending)| ending), packing) {
        ("txt" | "md", packing) => Ok((Format::Document, packing)),
        ("jsonl", packing) => Ok((Format::Lines, packing)),
        ("parquet", Packing::None) => Ok((Format::Parquet, Packing::None)),
        _ => Err(DataError::Input {
            path: path.to_owned(),
            what:
                "is not .txt, .md or .jsonl (also .gz and .zst) or .parquet; convert or rename it"
                    .to_owned(),
        }),
    }
}

/// All readable files of a folder and those in it, in name order.
fn walk(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), DataError> {
    let entries = std::fs::read_dir(folder).map_err(DataError::io("list", folder))?;
    let mut paths: Vec<PathBuf> = Vec::new();
    for entry in entries {
        paths.push(entry.map_err(DataError::io("list", folder))?.path());
    }
    paths.sort();
    for path in paths {
        if path.is_dir() {
            walk(&path, files)?;
        } else if format_of(&path).is_ok() {
            files.push(path);
        }
    }
    Ok(())
}
