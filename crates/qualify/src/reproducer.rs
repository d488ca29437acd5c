//! A reproducer: one operation with everything it reads, as a file to replay on any device and to
//! send to whoever makes it.
//!
//! The file is a safetensors file. Its metadata hold the operation as JSON (`op`) and where it was
//! found; `buffer.N` are the bytes of every buffer before the operation, guards included;
//! `input.NAME`, `expected.NAME` (f64) and `first.NAME`, `second.NAME` (what two devices gave) are
//! the same numbers as plain tensors, for reading with other tools. Read next: `bisect.rs`.

use std::collections::HashMap;
use std::path::Path;

use pontoon_ops::{DType, Op, View};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};

use crate::cases::Case;
use crate::error::QualifyError;
use crate::memory::Memory;
use crate::reference::{Want, reference};

/// The format's number; a reader refuses others.
const VERSION: &str = "1";
/// Larger files are not reproducers.
const FILE_BYTES_MAX: u64 = 8 << 30;

/// Where a reproducer comes from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    /// The program in which the operation stands.
    pub program: String,
    /// Its place in the program's list.
    pub op_index: usize,
    /// The parameters it reads or whose gradient it writes.
    pub parameters: Vec<String>,
    /// The two devices that were compared.
    pub devices: Vec<String>,
    /// What was found.
    pub finding: String,
}

/// What two devices left.
pub struct Outcomes<'a> {
    /// The first device's memory.
    pub first: Option<&'a Memory>,
    /// The second's.
    pub second: Option<&'a Memory>,
}

/// One tensor of the file.
struct Part {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// Writes a reproducer.
pub fn write(
    path: &Path,
    case: &Case,
    origin: &Origin,
    outcomes: &Outcomes<'_>,
) -> Result<(), QualifyError> {
    let mut parts = Vec::new();
    for (index, bytes) in case.memory.buffers().iter().enumerate() {
        let (name, bytes) = (format!("buffer.{index}"), bytes.clone());
        parts.push(Part { name, dtype: Dtype::U8, shape: vec![bytes.len()], bytes });
    }
    for operand in case.op.operands() {
        let name = operand.name;
        if operand.access.reads() {
            parts.extend(plain(format!("input.{name}"), &operand.view, &case.memory));
        }
        if operand.access.writes() {
            for (device, memory) in [("first", outcomes.first), ("second", outcomes.second)] {
                let part = memory.and_then(|m| plain(format!("{device}.{name}"), &operand.view, m));
                parts.extend(part);
            }
        }
    }
    parts.extend(expectations(case));
    let metadata = HashMap::from([
        ("format".to_owned(), "pontoon-reproducer".to_owned()),
        ("version".to_owned(), VERSION.to_owned()),
        ("name".to_owned(), case.name.clone()),
        ("dtype".to_owned(), case.dtype.to_string()),
        ("op".to_owned(), json(&case.op)),
        ("origin".to_owned(), json(origin)),
    ]);
    let view = |part| {
        let Part { name, dtype, shape, bytes }: &Part = part;
        let view = TensorView::new(*dtype, shape.clone(), bytes);
        view.map(|view| (name.as_str(), view)).map_err(|error| wrong(path, error))
    };
    let views: Vec<_> = parts.iter().map(view).collect::<Result<_, _>>()?;
    safetensors::serialize_to_file(views, Some(metadata), path).map_err(|error| wrong(path, error))
}

/// What the reference says of every written operand.
fn expectations(case: &Case) -> Vec<Part> {
    let mut parts = Vec::new();
    for expected in reference(&case.op, &case.memory) {
        let before = case.memory.read(&expected.view);
        let value = |(want, before): (&Want, f64)| match want {
            Want::Near { value, .. } => *value,
            Want::Kept => before,
            Want::Unjudged => f64::NAN,
        };
        let bytes = expected.wants.iter().zip(before).map(value).flat_map(f64::to_le_bytes);
        let operands = case.op.operands();
        let own = operands.iter().find(|o| o.access.writes() && o.view == expected.view);
        parts.extend(own.map(|operand| Part {
            name: format!("expected.{}", operand.name),
            dtype: Dtype::F64,
            shape: expected.view.dims().to_vec(),
            bytes: bytes.collect(),
        }));
    }
    parts
}

/// A view as a tensor of its own; nothing for dtypes that other tools do not read.
fn plain(name: String, view: &View, memory: &Memory) -> Option<Part> {
    let dtype = match view.dtype {
        DType::F32 => Dtype::F32,
        DType::Bf16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        DType::I32 => Dtype::I32,
        DType::U32 => Dtype::U32,
        DType::F8e4m3 => Dtype::F8_E4M3,
        DType::I8 => Dtype::I8,
        DType::I4 => return None,
    };
    let size = view.dtype.bits() / 8;
    let bits = memory.bits(view).into_iter();
    let bytes = bits.flat_map(|bits| bits.to_le_bytes().into_iter().take(size)).collect();
    Some(Part { name, dtype, shape: view.dims().to_vec(), bytes })
}

/// Reads a reproducer and checks that its operation fits its buffers.
pub fn read(path: &Path) -> Result<(Case, Origin), QualifyError> {
    let size = std::fs::metadata(path).map_err(|error| wrong(path, error))?.len();
    if size > FILE_BYTES_MAX {
        return Err(wrong(path, format!("it has {size} bytes, at most {FILE_BYTES_MAX}")));
    }
    let bytes = std::fs::read(path).map_err(|error| wrong(path, error))?;
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|error| wrong(path, error))?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(|error| wrong(path, error))?;
    let facts = header.metadata().clone().unwrap_or_default();
    let fact = |name: &str| {
        facts.get(name).ok_or_else(|| wrong(path, format!("its metadata have no `{name}`")))
    };
    if fact("format")? != "pontoon-reproducer" || fact("version")? != VERSION {
        return Err(wrong(path, format!("it is no reproducer of version {VERSION}")));
    }
    let op: Op = serde_json::from_str(fact("op")?).map_err(|error| wrong(path, error))?;
    let quoted = serde_json::Value::String(fact("dtype")?.clone());
    let dtype: DType = serde_json::from_value(quoted).map_err(|error| wrong(path, error))?;
    let origin = serde_json::from_str(fact("origin")?).map_err(|error| wrong(path, error))?;
    let mut memory = Memory::default();
    while let Ok(tensor) = tensors.tensor(&format!("buffer.{}", memory.buffers().len())) {
        memory.add(tensor.data().to_vec());
    }
    op.check().map_err(|error| wrong(path, error))?;
    for operand in op.operands() {
        let view = operand.view;
        let room = memory.buffers().get(view.buffer.0 as usize).map_or(0, Vec::len);
        if view.byte_offset + view.span_bytes() > room {
            return Err(wrong(path, format!("`{}` lies outside its buffer", operand.name)));
        }
    }
    Ok((Case { name: fact("name")?.clone(), op, dtype, memory }, origin))
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("plain values always become JSON")
}

fn wrong(path: &Path, what: impl ToString) -> QualifyError {
    QualifyError::Reproducer { path: path.to_owned(), what: what.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases::all;

    #[test]
    fn every_operation_survives_the_file_bit_for_bit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("one.safetensors");
        let mut seen = std::collections::BTreeSet::new();
        for case in all(11) {
            if !seen.insert((case.op.name(), case.dtype)) {
                continue;
            }
            let origin = Origin { program: "p".to_owned(), op_index: 3, ..Origin::default() };
            let outcomes = Outcomes { first: Some(&case.memory), second: None };
            write(&path, &case, &origin, &outcomes).unwrap();
            let (again, from) = read(&path).unwrap();
            assert_eq!((again.op, again.memory, from), (case.op, case.memory, origin));
        }
        assert!(seen.len() > 60, "only {} kinds", seen.len());
    }

    #[test]
    fn a_damaged_file_is_refused_with_a_reason() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bad.safetensors");
        std::fs::write(&path, b"not a tensor file").unwrap();
        let text = read(&path).unwrap_err().to_string();
        assert!(text.contains("bad.safetensors"), "{text}");
        let mut case = all(11).remove(0);
        for view in case.op.views_mut() {
            view.byte_offset += 1 << 20;
        }
        case.memory.buffers_mut()[0].truncate(70);
        // The expectation is computed from the buffers, so the file is made by hand.
        let op = json(&case.op);
        let metadata = HashMap::from([
            ("format".to_owned(), "pontoon-reproducer".to_owned()),
            ("version".to_owned(), VERSION.to_owned()),
            ("name".to_owned(), "n".to_owned()),
            ("dtype".to_owned(), "f32".to_owned()),
            ("op".to_owned(), op),
            ("origin".to_owned(), json(&Origin::default())),
        ]);
        let bytes = [0_u8; 8];
        let view = TensorView::new(Dtype::U8, vec![8], &bytes).unwrap();
        safetensors::serialize_to_file([("buffer.0", view)], Some(metadata), &path).unwrap();
        let text = read(&path).unwrap_err().to_string();
        assert!(text.contains("outside its buffer"), "{text}");
    }
}
