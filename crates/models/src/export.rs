//! Writes a folder that Hugging Face transformers loads unchanged.
//!
//! The folder appears whole or not at all: everything is written into a temporary folder beside
//! the target and renamed at the end. Does not convert weights: the caller gives the bytes.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use pontoon_ops::DType;
use safetensors::{Dtype, View};
use serde_json::{Map, Value, json};

use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::weights::{INDEX_FILE, SINGLE_FILE};

/// Files beside the weights that belong to a model and are copied as they are.
pub const COMPANION_FILES: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
];

/// Where an export goes and what goes with the weights.
#[derive(Debug)]
pub struct ExportTarget<'a> {
    /// The folder to be made; may exist if it is empty.
    pub folder: &'a Path,
    /// The configuration to write; its `dtype` should be the tensors'.
    pub config: &'a ModelConfig,
    /// Bytes of tensors per file at most; a single larger tensor has a file of its own.
    pub shard_bytes_max: u64,
    /// Files to copy under their own names, such as `companions` finds.
    pub companions: Vec<PathBuf>,
}

/// One tensor to write.
#[derive(Clone, Debug)]
pub struct ExportTensor {
    /// The name on disk.
    pub name: String,
    /// f32, bf16 or f16.
    pub dtype: DType,
    /// The extents.
    pub shape: Vec<usize>,
    /// The elements, little-endian, row after row.
    pub bytes: Vec<u8>,
}

/// The companion files present in a model folder.
pub fn companions(folder: &Path) -> Vec<PathBuf> {
    COMPANION_FILES.iter().map(|name| folder.join(name)).filter(|path| path.is_file()).collect()
}

/// Writes the folder; at most one shard's tensors are held in memory.
pub fn export<T>(target: &ExportTarget<'_>, tensors: T) -> Result<(), ModelError>
where
    T: IntoIterator<Item = Result<ExportTensor, ModelError>>,
{
    let folder = target.folder;
    if folder.exists() && !is_empty_folder(folder)? {
        return Err(ModelError::TargetNotEmpty { path: folder.to_owned() });
    }
    let parent = match folder.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    fs::create_dir_all(parent).map_err(ModelError::io("create", parent))?;
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let temporary = parent.join(format!(".{name}.{}.tmp", std::process::id()));
    fs::create_dir(&temporary).map_err(ModelError::io("create", &temporary))?;
    let written = write_all(&temporary, target, tensors).and_then(|()| {
        fs::rename(&temporary, folder).map_err(ModelError::io("create", folder))?;
        sync(parent)
    });
    if written.is_err() {
        // The first error is the one to report; what is left here is only our own temporary folder.
        let _ = fs::remove_dir_all(&temporary);
    }
    written
}

fn is_empty_folder(path: &Path) -> Result<bool, ModelError> {
    if !path.is_dir() {
        return Ok(false);
    }
    let mut entries = fs::read_dir(path).map_err(ModelError::io("read", path))?;
    Ok(entries.next().is_none())
}

fn write_all<T>(folder: &Path, target: &ExportTarget<'_>, tensors: T) -> Result<(), ModelError>
where
    T: IntoIterator<Item = Result<ExportTensor, ModelError>>,
{
    let mut shards = Shards { folder, names: Vec::new(), bytes_total: 0 };
    let (mut waiting, mut waiting_bytes) = (Vec::new(), 0);
    for tensor in tensors {
        let tensor = tensor?;
        let bytes = tensor.bytes.len() as u64;
        if !waiting.is_empty() && waiting_bytes + bytes > target.shard_bytes_max {
            shards.write(std::mem::take(&mut waiting))?;
            waiting_bytes = 0;
        }
        waiting_bytes += bytes;
        waiting.push(tensor);
    }
    shards.write(waiting)?;
    shards.finish()?;
    write_json(&folder.join("config.json"), &Value::Object(target.config.to_json()))?;
    for source in &target.companions {
        let copy = folder.join(source.file_name().unwrap_or_default());
        fs::copy(source, &copy).map_err(ModelError::io("copy", source))?;
        sync(&copy)?;
    }
    let generation = folder.join("generation_config.json");
    if !generation.exists() {
        let config = target.config.to_json();
        let content = json!({
            "_from_model_config": true,
            "bos_token_id": config.get("bos_token_id"),
            "eos_token_id": config.get("eos_token_id"),
        });
        write_json(&generation, &content)?;
    }
    sync(folder)
}

/// The weight files of one export; their final names need their count, so they are given last.
struct Shards<'a> {
    folder: &'a Path,
    names: Vec<Vec<String>>,
    bytes_total: u64,
}

impl Shards<'_> {
    fn temporary(&self, index: usize) -> PathBuf {
        self.folder.join(format!("shard-{index}"))
    }

    fn write(&mut self, tensors: Vec<ExportTensor>) -> Result<(), ModelError> {
        let path = self.temporary(self.names.len());
        self.names.push(tensors.iter().map(|tensor| tensor.name.clone()).collect());
        self.bytes_total += tensors.iter().map(|tensor| tensor.bytes.len() as u64).sum::<u64>();
        let mut views = Vec::with_capacity(tensors.len());
        for tensor in &tensors {
            views.push((tensor.name.as_str(), Bytes::new(tensor)?));
        }
        // transformers refuses files that do not say which framework's layout they have.
        let note = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        safetensors::serialize_to_file(views, Some(note), &path).map_err(|error| {
            let source = match error {
                safetensors::SafeTensorError::IoError(source) => source,
                other => std::io::Error::other(other.to_string()),
            };
            ModelError::Io { action: "write", path: path.clone(), source }
        })?;
        sync(&path)
    }

    fn finish(self) -> Result<(), ModelError> {
        let count = self.names.len();
        let mut weight_map = Map::new();
        for (index, names) in self.names.iter().enumerate() {
            let file = match count {
                1 => SINGLE_FILE.to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
            };
            let path = self.folder.join(&file);
            fs::rename(self.temporary(index), &path).map_err(ModelError::io("create", &path))?;
            for name in names {
                weight_map.insert(name.clone(), file.clone().into());
            }
        }
        if count == 1 {
            return Ok(());
        }
        let metadata = json!({"total_size": self.bytes_total});
        let index = json!({"metadata": metadata, "weight_map": weight_map});
        write_json(&self.folder.join(INDEX_FILE), &index)
    }
}

/// A tensor as the safetensors library wants to see it.
struct Bytes<'a> {
    tensor: &'a ExportTensor,
    dtype: Dtype,
}

impl<'a> Bytes<'a> {
    fn new(tensor: &'a ExportTensor) -> Result<Self, ModelError> {
        let dtype = match tensor.dtype {
            DType::F32 => Dtype::F32,
            DType::Bf16 => Dtype::BF16,
            DType::F16 => Dtype::F16,
            other => {
                let (name, got) = (tensor.name.clone(), other.to_string());
                return Err(ModelError::Dtype { name, want: "f32, bf16 or f16", got });
            }
        };
        let elements: usize = tensor.shape.iter().product();
        assert_eq!(tensor.bytes.len(), tensor.dtype.bytes(elements), "{}", tensor.name);
        Ok(Bytes { tensor, dtype })
    }
}

impl View for Bytes<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.tensor.shape
    }

    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        self.tensor.bytes.as_slice().into()
    }

    fn data_len(&self) -> usize {
        self.tensor.bytes.len()
    }
}

fn write_json(path: &Path, value: &Value) -> Result<(), ModelError> {
    let text = serde_json::to_string_pretty(value).expect("JSON values always serialise");
    fs::write(path, text + "\n").map_err(ModelError::io("write", path))?;
    sync(path)
}

fn sync(path: &Path) -> Result<(), ModelError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(ModelError::io("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;
    use crate::weights::Weights;

    fn tensors_of(case: &str) -> Vec<Result<ExportTensor, ModelError>> {
        let config = ModelConfig::from_folder(&golden::folder(case)).unwrap();
        let weights = Weights::open(&golden::folder(case)).unwrap();
        let read = |spec: crate::layout::TensorSpec| {
            let values = weights.read_f32(&spec.name, &spec.shape)?;
            let bytes = bytemuck::cast_slice(&values).to_vec();
            Ok(ExportTensor { name: spec.name, dtype: DType::F32, shape: spec.shape, bytes })
        };
        config.tensors().into_iter().map(read).collect()
    }

    fn export_case(case: &str, folder: &Path, shard_bytes_max: u64) -> Result<(), ModelError> {
        let config = ModelConfig::from_folder(&golden::folder(case))?;
        let companions = companions(&golden::folder(case));
        let target = ExportTarget { folder, config: &config, shard_bytes_max, companions };
        export(&target, tensors_of(case))
    }

    fn file_names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> =
            entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn an_exported_folder_reads_back_the_same_in_one_file_or_many() {
        let parent = tempfile::tempdir().unwrap();
        for (name, limit, files) in [("one", u64::MAX, 3), ("many", 20_000, 3 + 5)] {
            let folder = parent.path().join(name);
            export_case("llama3", &folder, limit).unwrap();
            let names = file_names(&folder);
            assert_eq!(names.len(), files, "{names:?}");
            let again = Weights::open(&folder).unwrap();
            for tensor in tensors_of("llama3") {
                let tensor = tensor.unwrap();
                assert_eq!(again.tensor(&tensor.name).unwrap().bytes, tensor.bytes);
            }
            let read = |folder: &Path| fs::read(folder.join("generation_config.json")).unwrap();
            assert_eq!(read(&folder), read(&golden::folder("llama3")));
        }
        assert_eq!(file_names(parent.path()), ["many", "one"]);
    }

    #[test]
    fn a_folder_with_something_in_it_is_left_alone() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("out");
        fs::create_dir(&folder).unwrap();
        export_case("llama2", &folder, u64::MAX).unwrap();
        let text = export_case("llama2", &folder, u64::MAX).unwrap_err().to_string();
        assert!(text.contains("exists and is not an empty folder"), "{text}");
    }

    #[test]
    fn a_failure_half_way_leaves_nothing_behind() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("out");
        let config = ModelConfig::from_folder(&golden::folder("llama2")).unwrap();
        let target = ExportTarget {
            folder: &folder,
            config: &config,
            shard_bytes_max: 1,
            companions: vec![],
        };
        let mut tensors = tensors_of("llama2");
        tensors.insert(3, Err(ModelError::NoWeights { folder: "gone".into() }));
        let text = export(&target, tensors).unwrap_err().to_string();
        assert!(text.starts_with("`gone` holds no model.safetensors"), "{text}");
        assert!(file_names(parent.path()).is_empty());
    }
}
