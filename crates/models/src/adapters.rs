//! Low-rank adapters in PEFT's folder format, several beside one model: each row of a step goes
//! through the adapter its request names, or through none.
//!
//! A map's result `x W^T` gets `scale * (x A^T) B^T` added. All adapters' matrices of a map lie
//! stacked, padded with zeros to the highest rank, and rows are sorted by adapter, so both products
//! are the waist's grouped one; rows without an adapter come last and are not touched. What
//! PEFT can do beside that (DoRA, trained biases, whole modules saved) is refused. Read next:
//! `block.rs`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use pontoon_ops::{Backend, DType};
use pontoon_program::{Memory, ProgramError};
use serde_json::Value;

use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::values::compute_bytes;
use crate::weights::Weights;

/// The file that says what an adapter is.
const CONFIG_FILE: &str = "adapter_config.json";
/// The file that holds its matrices.
const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// The highest rank that is read: beyond it an adapter is as large as the map itself.
const RANK_MAX: usize = 1024;

/// What programs need to know of the adapters.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterShapes {
    /// How many there are.
    pub count: usize,
    /// The highest rank, to which all are padded.
    pub rank: usize,
    /// The maps that some adapter changes, by name, with their extents `[out, in]`.
    pub maps: BTreeMap<String, [usize; 2]>,
}

/// The names of a map's stacked matrices in a device's memory.
pub(crate) fn stack_names(map: &str) -> [String; 2] {
    ["a", "b"].map(|part| format!("adapters.{part}.{map}"))
}

/// Adapters on disk, checked against the model they are for.
#[derive(Debug)]
pub struct Adapters {
    shapes: AdapterShapes,
    list: Vec<Adapter>,
}

#[derive(Debug)]
struct Adapter {
    name: String,
    scale: f32,
    weights: Weights,
    /// The tensors of a map, and its rank.
    maps: BTreeMap<String, ([String; 2], usize)>,
}

impl Adapters {
    /// Opens folders under the names that requests choose them by.
    pub fn open(
        config: &ModelConfig,
        folders: &[(String, PathBuf)],
    ) -> Result<Adapters, ModelError> {
        let extents: BTreeMap<String, [usize; 2]> = config
            .tensors()
            .into_iter()
            .filter_map(|spec| {
                let name = spec.name.strip_suffix(".weight")?;
                let shape = spec.shape.as_slice().try_into().ok()?;
                // Experts are multiplied with by groups of their own.
                let single = name.starts_with("model.layers.") && !name.contains(".experts.");
                (single && !name.ends_with(".gate")).then(|| (name.to_owned(), shape))
            })
            .collect();
        let open = |(name, folder): &(String, PathBuf)| Adapter::open(name, folder, &extents);
        let list = folders.iter().map(open).collect::<Result<Vec<Adapter>, _>>()?;
        let ranks = list.iter().flat_map(|one| one.maps.values().map(|(_, rank)| *rank));
        let touched = |map: &String| list.iter().any(|one| one.maps.contains_key(map));
        let shapes = AdapterShapes {
            count: list.len(),
            rank: ranks.max().unwrap_or(1),
            maps: extents.into_iter().filter(|(map, _)| touched(map)).collect(),
        };
        Ok(Adapters { shapes, list })
    }

    /// What programs need to know.
    pub fn shapes(&self) -> &AdapterShapes {
        &self.shapes
    }

    /// The names, in the order of their numbers.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.list.iter().map(|one| one.name.as_str())
    }

    /// Puts the stacked matrices where programs of this dtype read them.
    pub fn upload(
        &self,
        backend: &mut dyn Backend,
        memory: &mut Memory,
        dtype: DType,
    ) -> Result<(), ModelError> {
        let AdapterShapes { count, rank, maps } = &self.shapes;
        for (map, &[out, into]) in maps {
            let [a_name, b_name] = stack_names(map);
            let a = memory.ensure(backend, &a_name, dtype.bytes(count * rank * into))?;
            let b = memory.ensure(backend, &b_name, dtype.bytes(count * out * rank))?;
            for (index, adapter) in self.list.iter().enumerate() {
                let Some(([a_tensor, b_tensor], own)) = adapter.maps.get(map) else { continue };
                let values = adapter.weights.read_f32(a_tensor, &[*own, into])?;
                let at = dtype.bytes(index * rank * into);
                let bytes = compute_bytes(&values, dtype);
                backend.upload(a, at, &bytes).map_err(ProgramError::from)?;
                let values = adapter.weights.read_f32(b_tensor, &[out, *own])?;
                // A row of B grows to the common rank; what A has there is zero.
                let mut padded = vec![0.0; out * rank];
                for (to, from) in padded.chunks_mut(*rank).zip(values.chunks(*own)) {
                    let scaled = from.iter().map(|value| value * adapter.scale);
                    to.iter_mut().zip(scaled).for_each(|(to, value)| *to = value);
                }
                let bytes = compute_bytes(&padded, dtype);
                let at = dtype.bytes(index * out * rank);
                backend.upload(b, at, &bytes).map_err(ProgramError::from)?;
            }
        }
        Ok(())
    }
}

impl Adapter {
    fn open(
        name: &str,
        folder: &Path,
        extents: &BTreeMap<String, [usize; 2]>,
    ) -> Result<Adapter, ModelError> {
        let config = Config::read(&folder.join(CONFIG_FILE))?;
        let path = folder.join(WEIGHTS_FILE);
        let weights = Weights::open_file(&path)?;
        let wrong = |reason: String| ModelError::Format {
            path: path.clone(),
            format: "an adapter for this model",
            reason,
        };
        let mut maps: BTreeMap<String, ([String; 2], usize)> = BTreeMap::new();
        for tensor in weights.names().map(str::to_owned).collect::<Vec<_>>() {
            let Some((map, part)) = map_of(&tensor) else {
                return Err(wrong(format!("`{tensor}` is no lora_A or lora_B of a map")));
            };
            let Some(&[out, into]) = extents.get(map) else {
                let nearest = crate::error::nearest(map, extents.keys().map(String::as_str));
                let nearest = nearest.unwrap_or("none");
                let reason =
                    format!("no map `{map}` can be adapted here; the nearest is `{nearest}`");
                return Err(wrong(reason));
            };
            let shape = weights.tensor(&tensor)?.shape.to_vec();
            let (rank, wanted) = match (part, shape.as_slice()) {
                (0, &[rank, _]) => (rank, vec![rank, into]),
                (_, &[_, rank]) => (rank, vec![out, rank]),
                _ => (0, vec![out, into]),
            };
            if shape != wanted {
                return Err(ModelError::Shape { name: tensor, want: wanted, got: shape });
            }
            if rank != config.rank {
                let want = config.rank;
                return Err(wrong(format!("`{tensor}` has rank {rank}, but r is {want}")));
            }
            let place = maps.entry(map.to_owned()).or_default();
            place.0[part] = tensor;
            place.1 = rank;
        }
        match maps.iter().find(|(_, (pair, _))| pair.iter().any(String::is_empty)) {
            Some((map, _)) => Err(wrong(format!("`{map}` has only one of lora_A and lora_B"))),
            None if maps.is_empty() => Err(wrong("it holds no tensor".to_owned())),
            None => Ok(Adapter { name: name.to_owned(), scale: config.scale, weights, maps }),
        }
    }
}

/// The map a tensor of PEFT's belongs to, and whether it is A (0) or B (1).
fn map_of(tensor: &str) -> Option<(&str, usize)> {
    let name = tensor.strip_prefix("base_model.model.")?;
    let ends = [
        [".lora_A.weight", ".lora_B.weight"],
        [".lora_A.default.weight", ".lora_B.default.weight"],
    ];
    ends.iter().find_map(|pair| {
        let part = pair.iter().position(|end| name.ends_with(end))?;
        Some((name.strip_suffix(pair[part])?, part))
    })
}

/// What an adapter's configuration says.
struct Config {
    rank: usize,
    scale: f32,
}

impl Config {
    fn read(path: &Path) -> Result<Config, ModelError> {
        let text = std::fs::read_to_string(path).map_err(ModelError::io("read", path))?;
        let wrong = |reason: String| ModelError::Format {
            path: path.to_owned(),
            format: "the configuration of a LoRA adapter",
            reason,
        };
        let value: Value = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        let is = |key: &str, allowed: &[Value]| match value.get(key) {
            None | Some(Value::Null) => Ok(()),
            Some(got) if allowed.contains(got) => Ok(()),
            Some(got) => Err(wrong(format!("`{key}` is {got}, which is not supported"))),
        };
        is("peft_type", &["LORA".into()])?;
        is("bias", &["none".into()])?;
        let no = [Value::Bool(false)];
        for key in ["use_dora", "fan_in_fan_out", "lora_bias"] {
            is(key, &no)?;
        }
        let empty = [serde_json::json!({}), serde_json::json!([])];
        for key in ["rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices"] {
            is(key, &empty)?;
        }
        let rank = value.get("r").and_then(Value::as_u64);
        let rank = rank.filter(|rank| (1..=RANK_MAX as u64).contains(rank));
        let rank = rank.ok_or_else(|| wrong(format!("`r` should be from 1 to {RANK_MAX}")))?;
        let alpha = value.get("lora_alpha").and_then(Value::as_f64);
        let alpha = alpha.ok_or_else(|| wrong("it has no number `lora_alpha`".to_owned()))?;
        let root = value.get("use_rslora") == Some(&Value::Bool(true));
        let over = if root { (rank as f64).sqrt() } else { rank as f64 };
        Ok(Config { rank: rank as usize, scale: (alpha / over) as f32 })
    }
}
