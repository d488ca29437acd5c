//! Reads the weights of a Hugging Face folder: one safetensors file, or shards with an index.
//!
//! Files are memory-mapped after their length was checked against their header, so a truncated
//! download is an error and not a crash. Converts to f32 and bf16, and multiplies 8-bit floats
//! with their block scales. Does not write: see `export.rs`. Knows no model: see `layout.rs`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde_json::Value;

use crate::error::{ModelError, nearest};
use crate::map::map;
use crate::upload::Rows;

/// The file name of an index of shards.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// The file name of unsharded weights.
pub const SINGLE_FILE: &str = "model.safetensors";

/// Longest header that is read; the format's own library has the same limit.
const HEADER_BYTES_MAX: u64 = 100_000_000;

/// Rows and columns that share one scale unless the configuration says otherwise.
const SCALE_BLOCK_DEFAULT: [usize; 2] = [128, 128];

/// The tensors of one folder, mapped.
#[derive(Debug)]
pub struct Weights {
    folder: PathBuf,
    maps: Vec<Mmap>,
    places: BTreeMap<String, Place>,
    scale_block: [usize; 2],
}

/// Where one tensor lies.
#[derive(Clone, Debug)]
struct Place {
    map: usize,
    start: usize,
    end: usize,
    dtype: Dtype,
    shape: Vec<usize>,
}

/// One tensor as it stands on disk.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// The name on disk.
    pub name: &'a str,
    /// The element type on disk.
    pub dtype: Dtype,
    /// The extents.
    pub shape: &'a [usize],
    /// The elements, little-endian, row after row.
    pub bytes: &'a [u8],
}

impl Weights {
    /// Opens a folder: every shard's length is checked and its header read, no weight yet.
    pub fn open(folder: &Path) -> Result<Weights, ModelError> {
        let (index, single) = (folder.join(INDEX_FILE), folder.join(SINGLE_FILE));
        let mut weights = if index.is_file() {
            Weights::open_sharded(folder, &index)?
        } else if single.is_file() {
            Weights::open_file(&single)?
        } else {
            return Err(ModelError::NoWeights { folder: folder.to_owned() });
        };
        weights.scale_block = scale_block(&folder.join("config.json"))?;
        Ok(weights)
    }

    /// Opens one safetensors file.
    pub fn open_file(path: &Path) -> Result<Weights, ModelError> {
        let mut weights = Weights::empty(path.parent().unwrap_or(Path::new("")));
        weights.add(path)?;
        Ok(weights)
    }

    fn empty(folder: &Path) -> Weights {
        Weights {
            folder: folder.to_owned(),
            maps: Vec::new(),
            places: BTreeMap::new(),
            scale_block: SCALE_BLOCK_DEFAULT,
        }
    }

    fn open_sharded(folder: &Path, index: &Path) -> Result<Weights, ModelError> {
        let wrong = |reason: String| ModelError::Format {
            path: index.to_owned(),
            format: "an index of shards",
            reason,
        };
        let text = std::fs::read_to_string(index).map_err(ModelError::io("read", index))?;
        let value: Value = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        let names = value.get("weight_map").and_then(Value::as_object);
        let names = names.ok_or_else(|| wrong("it has no object `weight_map`".to_owned()))?;
        let mut shards: Vec<&str> = Vec::new();
        for (name, shard) in names {
            let shard = shard.as_str().filter(|shard| !shard.contains(['/', '\\']));
            shards.push(shard.ok_or_else(|| wrong(format!("`{name}` is not given a file name")))?);
        }
        shards.sort_unstable();
        shards.dedup();
        let mut weights = Weights::empty(folder);
        for shard in shards {
            let path = folder.join(shard);
            if !path.is_file() {
                let (index, shard) = (index.to_owned(), shard.to_owned());
                return Err(ModelError::MissingShard { index, shard });
            }
            weights.add(&path)?;
        }
        match names.keys().find(|name| !weights.places.contains_key(*name)) {
            Some(name) => Err(weights.missing(name)),
            None => Ok(weights),
        }
    }

    fn add(&mut self, path: &Path) -> Result<(), ModelError> {
        let mut file = File::open(path).map_err(ModelError::io("open", path))?;
        let header = read_header(&mut file, path)?;
        let map = map(&file, path)?;
        assert_eq!(map.len() as u64, header.file_bytes, "the length was checked before mapping");
        for (name, info) in header.metadata.tensors() {
            let (start, end) = info.data_offsets;
            let place = Place {
                map: self.maps.len(),
                start: header.data_start + start,
                end: header.data_start + end,
                dtype: info.dtype,
                shape: info.shape.clone(),
            };
            self.places.insert(name, place);
        }
        self.maps.push(map);
        Ok(())
    }

    /// Every tensor's name, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// Whether a tensor of this name is present.
    pub fn has(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    /// One tensor as it stands on disk.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, ModelError> {
        let (name, place) = self.places.get_key_value(name).ok_or_else(|| self.missing(name))?;
        let bytes = &self.maps[place.map][place.start..place.end];
        Ok(TensorView { name, dtype: place.dtype, shape: &place.shape, bytes })
    }

    /// The values of one tensor, with block scales applied, after a check of its shape.
    pub fn read_f32(&self, name: &str, want: &[usize]) -> Result<Vec<f32>, ModelError> {
        let view = self.shaped(name, want)?;
        let mut values = view.to_f32()?;
        let scale_name = format!("{name}_scale_inv");
        if view.dtype == Dtype::F8_E4M3 && self.has(&scale_name) {
            let scales = self.tensor(&scale_name)?;
            apply_scales(&mut values, view.shape, scales, self.scale_block)?;
        }
        Ok(values)
    }

    /// The values of some rows of a tensor, with block scales applied.
    pub fn read_rows_f32(&self, rows: &Rows<'_>) -> Result<Vec<f32>, ModelError> {
        let view = self.shaped(rows.name, rows.shape)?;
        if view.dtype == Dtype::F8_E4M3 {
            // Blocks of scales span rows; such tensors are small beside those in more bits.
            let all = self.read_f32(rows.name, rows.shape)?;
            let width = all.len() / rows.shape[0].max(1);
            return Ok(all[rows.first * width..][..rows.count * width].to_vec());
        }
        let row_bytes = view.bytes.len() / rows.shape.first().copied().unwrap_or(1).max(1);
        let bytes = &view.bytes[rows.first * row_bytes..][..rows.count * row_bytes];
        TensorView { bytes, ..view }.to_f32()
    }

    /// As `read_f32`, rounded to bf16; bf16 on disk comes back bit for bit.
    pub fn read_bf16(&self, name: &str, want: &[usize]) -> Result<Vec<bf16>, ModelError> {
        let view = self.shaped(name, want)?;
        if view.dtype == Dtype::BF16 {
            return Ok(pairs(view.bytes).map(bf16::from_bits).collect());
        }
        Ok(self.read_f32(name, want)?.into_iter().map(bf16::from_f32).collect())
    }

    pub(crate) fn shaped(&self, name: &str, want: &[usize]) -> Result<TensorView<'_>, ModelError> {
        let view = self.tensor(name)?;
        if view.shape != want {
            let (want, got) = (want.to_vec(), view.shape.to_vec());
            return Err(ModelError::Shape { name: name.to_owned(), want, got });
        }
        Ok(view)
    }

    fn missing(&self, name: &str) -> ModelError {
        ModelError::MissingTensor {
            folder: self.folder.clone(),
            name: name.to_owned(),
            nearest: nearest(name, self.names()).unwrap_or("none").to_owned(),
        }
    }
}

impl TensorView<'_> {
    /// The elements as f32, without any scales.
    pub fn to_f32(&self) -> Result<Vec<f32>, ModelError> {
        Ok(match self.dtype {
            Dtype::F32 => self
                .bytes
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes(b.try_into().expect("chunks of four")))
                .collect(),
            Dtype::BF16 => pairs(self.bytes).map(|bits| bf16::from_bits(bits).to_f32()).collect(),
            Dtype::F16 => pairs(self.bytes).map(|bits| f16::from_bits(bits).to_f32()).collect(),
            Dtype::F8_E4M3 => self.bytes.iter().map(|&bits| e4m3_to_f32(bits)).collect(),
            _ => return Err(self.dtype_error("F32, BF16, F16 or F8_E4M3")),
        })
    }

    /// Scales: f32, or a byte that is the biased exponent of a power of two (`ue8m0`).
    fn to_scales(self) -> Result<Vec<f32>, ModelError> {
        match self.dtype {
            Dtype::F8_E8M0 | Dtype::U8 => {
                Ok(self.bytes.iter().map(|&bits| e8m0_to_f32(bits)).collect())
            }
            Dtype::F32 | Dtype::BF16 => self.to_f32(),
            _ => Err(self.dtype_error("F32, BF16, F8_E8M0 or U8")),
        }
    }

    /// Whole numbers, as of token ids.
    pub fn to_i64(&self) -> Result<Vec<i64>, ModelError> {
        if self.dtype != Dtype::I64 {
            return Err(self.dtype_error("I64"));
        }
        let whole = |b: &[u8]| i64::from_le_bytes(b.try_into().expect("chunks of eight"));
        Ok(self.bytes.chunks_exact(8).map(whole).collect())
    }

    fn dtype_error(&self, want: &'static str) -> ModelError {
        let got = format!("{:?}", self.dtype);
        ModelError::Dtype { name: self.name.to_owned(), want, got }
    }
}

struct Header {
    metadata: Metadata,
    data_start: usize,
    file_bytes: u64,
}

/// Reads the header by ordinary reads and compares the file's length with what it calls for.
fn read_header(file: &mut File, path: &Path) -> Result<Header, ModelError> {
    let file_bytes = file.metadata().map_err(ModelError::io("read", path))?.len();
    let truncated = |want| ModelError::Truncated { path: path.to_owned(), want, got: file_bytes };
    let wrong = |reason: String| ModelError::Format {
        path: path.to_owned(),
        format: "a safetensors file",
        reason,
    };
    if file_bytes < 8 {
        return Err(truncated(8));
    }
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(ModelError::io("read", path))?;
    let length = u64::from_le_bytes(length);
    if length > HEADER_BYTES_MAX {
        return Err(wrong(format!("its header would have {length} bytes")));
    }
    if file_bytes < 8 + length {
        return Err(truncated(8 + length));
    }
    let mut text = vec![0; length as usize];
    file.read_exact(&mut text).map_err(ModelError::io("read", path))?;
    let metadata: Metadata =
        serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
    let want = 8 + length + metadata.data_len() as u64;
    if file_bytes != want {
        return Err(truncated(want));
    }
    Ok(Header { metadata, data_start: 8 + length as usize, file_bytes })
}

/// `quantization_config.weight_block_size` of a config.json, or 128 × 128.
fn scale_block(config: &Path) -> Result<[usize; 2], ModelError> {
    if !config.is_file() {
        return Ok(SCALE_BLOCK_DEFAULT);
    }
    let text = std::fs::read_to_string(config).map_err(ModelError::io("read", config))?;
    let wrong = |reason: String| ModelError::Format {
        path: config.to_owned(),
        format: "a JSON object",
        reason,
    };
    let value: Value = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
    let Some(block) = value.pointer("/quantization_config/weight_block_size") else {
        return Ok(SCALE_BLOCK_DEFAULT);
    };
    let extent = |at| block.get(at).and_then(Value::as_u64).filter(|&extent| extent > 0);
    match (extent(0), extent(1)) {
        (Some(rows), Some(columns)) => Ok([rows as usize, columns as usize]),
        _ => {
            let want = "two whole numbers above 0";
            Err(ModelError::config_key("quantization_config.weight_block_size", want, Some(block)))
        }
    }
}

/// Multiplies each element of a matrix with its block's scale; edge blocks may be partial.
fn apply_scales(
    values: &mut [f32],
    shape: &[usize],
    scales: TensorView<'_>,
    block: [usize; 2],
) -> Result<(), ModelError> {
    let &[rows, columns] = shape else {
        let (want, got) = (vec![0, 0], shape.to_vec());
        return Err(ModelError::Shape { name: scales.name.to_owned(), want, got });
    };
    let grid = [rows.div_ceil(block[0]), columns.div_ceil(block[1])];
    if scales.shape != grid {
        let (want, got) = (grid.to_vec(), scales.shape.to_vec());
        return Err(ModelError::Shape { name: scales.name.to_owned(), want, got });
    }
    let factors = scales.to_scales()?;
    for (row, line) in values.chunks_exact_mut(columns).enumerate() {
        let factors = &factors[row / block[0] * grid[1]..][..grid[1]];
        for (part, factor) in line.chunks_mut(block[1]).zip(factors) {
            part.iter_mut().for_each(|value| *value *= factor);
        }
    }
    Ok(())
}

fn pairs(bytes: &[u8]) -> impl Iterator<Item = u16> + '_ {
    bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]))
}

/// OCP e4m3: bias 7, no infinities, all ones is not a number.
fn e4m3_to_f32(bits: u8) -> f32 {
    let (exponent, fraction) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let magnitude = match (exponent, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => fraction * 2f32.powi(-9),
        _ => (1.0 + fraction / 8.0) * 2f32.powi(exponent - 7),
    };
    if bits & 0x80 == 0 { magnitude } else { -magnitude }
}

/// OCP e8m0: an exponent with bias 127 and nothing else; 255 is not a number.
fn e8m0_to_f32(bits: u8) -> f32 {
    match bits {
        255 => f32::NAN,
        0 => 2f32.powi(-127),
        _ => f32::from_bits(u32::from(bits) << 23),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ModelConfig;
    use crate::golden;

    fn copy(case: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(golden::folder(case)).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
        }
        folder
    }

    fn open_error(folder: &Path) -> String {
        Weights::open(folder).unwrap_err().to_string()
    }

    #[test]
    fn sharded_and_single_folders_hold_every_tensor_of_their_model() {
        for case in golden::CASES {
            let weights = Weights::open(&golden::folder(case)).unwrap();
            for spec in ModelConfig::from_folder(&golden::folder(case)).unwrap().tensors() {
                let values = weights.read_f32(&spec.name, &spec.shape).unwrap();
                assert!(values.iter().all(|value| value.is_finite()), "{case} {}", spec.name);
            }
        }
    }

    #[test]
    fn eight_bit_weights_times_block_scales_equal_the_reference() {
        let folder = golden::folder("deepseek_v3_fp8");
        let weights = Weights::open(&folder).unwrap();
        let golden = Weights::open_file(&folder.join("golden.safetensors")).unwrap();
        let (mut compared, mut edges) = (0, 0);
        for reference in golden.names().filter(|name| name.starts_with("dequantised.")) {
            let want = golden.tensor(reference).unwrap();
            let name = reference.trim_start_matches("dequantised.");
            let got = weights.read_f32(name, want.shape).unwrap();
            assert_eq!(got, want.to_f32().unwrap(), "{name}");
            compared += 1;
            edges += usize::from(want.shape.iter().any(|&extent| extent > 128));
        }
        assert!(compared > 40 && edges >= 3, "{compared} tensors, {edges} with several blocks");
    }

    #[test]
    fn every_e4m3_pattern_has_the_value_of_the_standard() {
        assert_eq!(e4m3_to_f32(0x7e), 448.0);
        assert_eq!(e4m3_to_f32(0x01), 2f32.powi(-9));
        assert_eq!(e4m3_to_f32(0x08), 2f32.powi(-6));
        assert_eq!(e4m3_to_f32(0xb8), -1.0);
        assert!(e4m3_to_f32(0x80).is_sign_negative() && e4m3_to_f32(0x80) == 0.0);
        assert!(e4m3_to_f32(0x7f).is_nan() && e4m3_to_f32(0xff).is_nan());
        let positive: Vec<f32> = (0..0x7f).map(e4m3_to_f32).collect();
        assert!(positive.windows(2).all(|pair| pair[0] < pair[1]));
    }

    #[test]
    fn scales_stored_as_exponents_are_powers_of_two() {
        let view = |dtype| TensorView { name: "s", dtype, shape: &[1, 3], bytes: &[127, 128, 120] };
        for dtype in [Dtype::U8, Dtype::F8_E8M0] {
            assert_eq!(view(dtype).to_scales().unwrap(), [1.0, 2.0, 2f32.powi(-7)]);
            let mut values = [1.0; 10];
            apply_scales(&mut values, &[2, 5], view(dtype), [2, 2]).unwrap();
            let row = [1.0, 1.0, 2.0, 2.0, 2f32.powi(-7)];
            assert_eq!(values[..5], row);
            assert_eq!(values[5..], row);
        }
        assert_eq!(e8m0_to_f32(0), 2f32.powi(-127));
    }

    #[test]
    fn a_grid_of_scales_that_does_not_fit_is_refused() {
        let scales = TensorView { name: "s", dtype: Dtype::U8, shape: &[1, 1], bytes: &[127] };
        let error = apply_scales(&mut [0.0; 6], &[2, 3], scales, [2, 2]).unwrap_err();
        assert_eq!(error.to_string(), "tensor `s` should have shape [1, 2] but has [1, 1]");
    }

    #[test]
    fn a_truncated_file_is_an_error_at_every_length() {
        let folder = copy("llama2");
        let path = folder.path().join(SINGLE_FILE);
        let whole = std::fs::read(&path).unwrap();
        for length in [0, 7, 8, 100, 2000, whole.len() / 2, whole.len() - 1] {
            std::fs::write(&path, &whole[..length]).unwrap();
            let text = open_error(folder.path());
            let end = format!("by its header but has {length}; fetch it again");
            assert!(
                text.contains("model.safetensors` should have") && text.ends_with(&end),
                "{text}"
            );
        }
        std::fs::write(&path, [&whole[..], &[0; 3]].concat()).unwrap();
        assert!(open_error(folder.path()).contains("by its header but has"));
    }

    #[test]
    fn a_header_that_is_not_one_is_refused() {
        let folder = copy("llama2");
        let path = folder.path().join(SINGLE_FILE);
        std::fs::write(&path, [0xff; 64]).unwrap();
        assert!(open_error(folder.path()).contains("is not a safetensors file"));
        std::fs::write(&path, [&8u64.to_le_bytes()[..], b"not json"].concat()).unwrap();
        assert!(open_error(folder.path()).contains("is not a safetensors file"));
    }

    #[test]
    fn a_folder_without_weights_says_what_it_looked_for() {
        let folder = tempfile::tempdir().unwrap();
        assert!(open_error(folder.path()).contains("no model.safetensors"));
    }

    #[test]
    fn a_missing_shard_is_named() {
        let folder = copy("llama3");
        std::fs::remove_file(folder.path().join("model-00002-of-00006.safetensors")).unwrap();
        let text = open_error(folder.path());
        assert!(text.contains("names shard `model-00002-of-00006.safetensors`"), "{text}");
    }

    #[test]
    fn an_index_that_promises_a_tensor_its_shards_lack_is_refused() {
        let folder = copy("llama3");
        let path = folder.path().join(INDEX_FILE);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace("model.norm.weight", "model.gnome.weight")).unwrap();
        let text = open_error(folder.path());
        assert!(text.contains("no tensor `model.gnome.weight`; the nearest name is"), "{text}");
        std::fs::write(&path, "{\"weight_map\": {\"a\": \"../secret\"}}").unwrap();
        assert!(open_error(folder.path()).contains("`a` is not given a file name"));
    }

    #[test]
    fn a_missing_tensor_is_answered_with_the_nearest_name() {
        let weights = Weights::open(&golden::folder("llama2")).unwrap();
        let text = weights.tensor("model.layers.0.self_attn.q_proj").unwrap_err().to_string();
        assert!(
            text.ends_with("nearest name is `model.layers.0.self_attn.q_proj.weight`"),
            "{text}"
        );
    }

    #[test]
    fn a_wrong_shape_or_dtype_says_what_was_wanted() {
        let weights = Weights::open(&golden::folder("llama2")).unwrap();
        let text = weights.read_f32("model.norm.weight", &[37]).unwrap_err().to_string();
        assert_eq!(text, "tensor `model.norm.weight` should have shape [37] but has [36]");
        let golden = golden::folder("llama2").join("golden.safetensors");
        let golden = Weights::open_file(&golden).unwrap();
        let text = golden.read_f32("input_ids", &[2, 13]).unwrap_err().to_string();
        assert!(text.contains("should be F32, BF16, F16 or F8_E4M3 but is I64"), "{text}");
    }
}
