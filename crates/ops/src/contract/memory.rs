//! Moving, converting and combining elements: Copy, Cast, Fill, Add, Scale; and token embedding.

use serde::{Deserialize, Serialize};

use super::Accumulate;
use crate::dtype::DType;
use crate::op::Access::{Read, Write};
use crate::op::contract;
use crate::view::View;

/// `dst = src`, element by element; any strides, so it also slices, joins, transposes, repeats.
///
/// Shapes    src, dst: equal, any rank
/// Dtypes    any, equal
/// Writes    dst
/// Numerics  exact: the bits are moved
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Copy {
    /// Source; may be broadcast (stride 0) or transposed.
    pub src: View,
    /// Destination; may be strided.
    pub dst: View,
}
contract!(Copy |op, check| { src: Read, dst: Write } {
    check.dtype("dst", &op.dst, &[op.src.dtype])?;
    let same = op.src.shape == op.dst.shape;
    check.that(same, || format!("src {:?} and dst {:?} differ", op.src.shape, op.dst.shape))?;
    check.that(op.src.dtype != DType::I4, || "4-bit elements cannot be moved singly".into())?;
});

/// `dst = src` converted to `dst`'s dtype, to nearest, ties to even; NaN stays NaN.
///
/// Shapes    src, dst: equal; both contiguous
/// Dtypes    f32, bf16, f16 in any pairing
/// Writes    dst
/// Numerics  one rounding; values beyond f16's range become infinite
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cast {
    /// Source.
    pub src: View,
    /// Destination.
    pub dst: View,
}
contract!(Cast |op, check| { src: Read, dst: Write } {
    check.dtype("src", &op.src, &DType::FLOATS)?;
    check.dtype("dst", &op.dst, &DType::FLOATS)?;
    check.contiguous("src", &op.src)?;
    check.packed("dst", &op.dst, op.src.shape)?;
});

/// `dst = value`.
///
/// Shapes    dst: any, strided too
/// Dtypes    f32, bf16, f16, i32 (value rounded)
/// Writes    dst
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fill {
    /// Destination.
    pub dst: View,
    /// The value every element gets.
    pub value: f32,
}
contract!(Fill |op, check| { dst: Write } {
    check.dtype("dst", &op.dst, &[DType::F32, DType::Bf16, DType::F16, DType::I32])?;
});

/// `y = a + b`, element by element, in f32, rounded once.
///
/// Shapes    a, b, y: equal, any rank, any strides
/// Dtypes    f32, bf16, f16, all equal
/// Writes    y; y may be the same view as a or b
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Add {
    /// First summand.
    pub a: View,
    /// Second summand.
    pub b: View,
    /// Sum.
    pub y: View,
}
contract!(Add |op, check| { a: Read, b: Read, y: Write } {
    check.dtype("a", &op.a, &DType::FLOATS)?;
    check.dtype("b", &op.b, &[op.a.dtype])?;
    check.dtype("y", &op.y, &[op.a.dtype])?;
    let same = op.a.shape == op.b.shape && op.a.shape == op.y.shape;
    check.that(same, || format!(
        "a {:?}, b {:?} and y {:?} should be equal", op.a.shape, op.b.shape, op.y.shape))?;
});

/// `y = factor * x`.
///
/// Shapes    x, y: equal, contiguous
/// Dtypes    f32, bf16, f16, equal
/// Writes    y; y may be the same view as x
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scale {
    /// Input.
    pub x: View,
    /// The factor.
    pub factor: f32,
    /// Output.
    pub y: View,
}
contract!(Scale |op, check| { x: Read, y: Write } {
    check.dtype("x", &op.x, &DType::FLOATS)?;
    check.dtype("y", &op.y, &[op.x.dtype])?;
    check.contiguous("x", &op.x)?;
    check.packed("y", &op.y, op.x.shape)?;
});

/// `y[r] = table[ids[r]]`. An id outside the table gives a row of NaN: the loss then shows it.
///
/// Shapes    ids [rows]; table [vocabulary, width]; y [rows, width]
/// Dtypes    ids i32; table, y: f32, bf16 or f16, equal
/// Writes    y
/// Numerics  exact
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Embed {
    /// Token ids.
    pub ids: View,
    /// One row per token of the vocabulary.
    pub table: View,
    /// The looked-up rows.
    pub y: View,
}
contract!(Embed |op, check| { ids: Read, table: Read, y: Write } {
    check.rank("table", &op.table, 2)?;
    check.rank("ids", &op.ids, 1)?;
    check.dtype("ids", &op.ids, &[DType::I32])?;
    check.dtype("table", &op.table, &DType::FLOATS)?;
    check.contiguous("table", &op.table)?;
    check.tensor("y", &op.y, op.table.dtype, [op.ids.dim(0), op.table.dim(1)])?;
});

/// `dtable[ids[r]] += dy[r]`, rows in ascending order. Ids outside the table are skipped.
///
/// Shapes    ids [rows]; dy [rows, width]; dtable [vocabulary, width]
/// Dtypes    ids i32; dy f32, bf16 or f16; dtable f32
/// Writes    dtable, by `accumulate` (`Overwrite` zeroes it first)
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EmbedBwd {
    /// Token ids.
    pub ids: View,
    /// Gradient of the looked-up rows.
    pub dy: View,
    /// Gradient of the table.
    pub dtable: View,
    /// What happens to the table gradient's old contents.
    pub accumulate: Accumulate,
}
contract!(EmbedBwd |op, check| { ids: Read, dy: Read, dtable: op.accumulate.access() } {
    check.rank("dtable", &op.dtable, 2)?;
    check.rank("ids", &op.ids, 1)?;
    check.dtype("ids", &op.ids, &[DType::I32])?;
    check.dtype("dtable", &op.dtable, &[DType::F32])?;
    check.contiguous("dtable", &op.dtable)?;
    check.dtype("dy", &op.dy, &DType::FLOATS)?;
    check.shape("dy", &op.dy, [op.ids.dim(0), op.dtable.dim(1)])?;
});
