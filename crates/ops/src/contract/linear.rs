//! Matrix products: dense in three layouts, quantised weights, and grouped by expert.

use serde::{Deserialize, Serialize};

use super::Accumulate;
use crate::dtype::DType;
use crate::op::Access::Read;
use crate::op::contract;
use crate::view::View;

/// Which operand of a product is transposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Layout {
    /// `c[m,n] = sum_k a[m,k] * b[n,k]`: forward, weights as [out, in].
    Nt,
    /// `c[m,n] = sum_k a[m,k] * b[k,n]`: input gradient.
    Nn,
    /// `c[m,n] = sum_k a[k,m] * b[k,n]`: weight gradient.
    Tn,
}

/// Matrix product in one of three layouts, with optional bias per column.
///
/// Shapes    by `layout`: a [m,k] or [k,m]; b [n,k] or [k,n]; c [m,n]; bias [n]
/// Dtypes    a, b: f32, bf16 or f16, equal; c: the same or f32; bias as a
/// Writes    c by `accumulate`
/// Numerics  each element is one chain over k in ascending order, whatever m and n are; the chain
///           starts at zero, then bias and the old contents are added, then one rounding
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Matmul {
    /// Which operand is transposed.
    pub layout: Layout,
    /// Left operand.
    pub a: View,
    /// Right operand.
    pub b: View,
    /// Added to every row.
    pub bias: Option<View>,
    /// Result.
    pub c: View,
    /// What happens to the result's old contents.
    pub accumulate: Accumulate,
}

/// The extents of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extents {
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// Summed over.
    pub k: usize,
}

impl Matmul {
    /// The extents, read from a and b.
    pub fn extents(&self) -> Extents {
        let (a, b) = (self.a.dims(), self.b.dims());
        match self.layout {
            Layout::Nt => Extents { m: a[0], n: b[0], k: a[1] },
            Layout::Nn => Extents { m: a[0], n: b[1], k: a[1] },
            Layout::Tn => Extents { m: a[1], n: b[1], k: a[0] },
        }
    }
}
contract!(Matmul |op, check| { a: Read, b: Read, bias: Read, c: op.accumulate.access() } {
    check.rank("a", &op.a, 2)?;
    check.rank("b", &op.b, 2)?;
    check.dtype("a", &op.a, &DType::FLOATS)?;
    check.dtype("b", &op.b, &[op.a.dtype])?;
    check.dense_rows("a", &op.a)?;
    check.dense_rows("b", &op.b)?;
    let Extents { m, n, k } = op.extents();
    check.shape("b", &op.b, if op.layout == Layout::Nt { [n, k] } else { [k, n] })?;
    check.shape("c", &op.c, [m, n])?;
    check.dtype("c", &op.c, &[op.a.dtype, DType::F32])?;
    if let Some(bias) = &op.bias {
        check.tensor("bias", bias, op.a.dtype, [n])?;
    }
});

/// `c = x · dequantised(weight)^T + bias`, the weight stored in few bits with scales per block.
///
/// Shapes    x [m,k]; weight [n,k]; scales [ceil(n/block_n), ceil(k/block_k)]; c [m,n]; bias [n]
/// Dtypes    x, c: f32, bf16 or f16, equal, or c f32; weight f8e4m3, i8 (never -128) or i4; scales
///           f32; bias as x
/// Writes    c
/// Numerics  x is not rounded; a block's scale may be applied to its values or to its sum, all in
///           f32; an element's bits do not depend on m or n; edge blocks may be partial; then bias
///           is added, then one rounding
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MatmulQuant {
    /// Activations.
    pub x: View,
    /// Quantised weight.
    pub weight: View,
    /// One scale per block of the weight.
    pub scales: View,
    /// Rows of the weight that share a scale (1 for group-scaled integers, 128 for f8).
    pub block_n: usize,
    /// Columns of the weight that share a scale.
    pub block_k: usize,
    /// Added to every row.
    pub bias: Option<View>,
    /// Result.
    pub c: View,
}
contract!(MatmulQuant |op, check| {
    x: Read, weight: Read, scales: Read, bias: Read, c: crate::op::Access::Write,
} {
    check.rank("x", &op.x, 2)?;
    check.rank("weight", &op.weight, 2)?;
    check.dtype("x", &op.x, &DType::FLOATS)?;
    check.dtype("weight", &op.weight, &[DType::F8e4m3, DType::I8, DType::I4])?;
    check.dense_rows("x", &op.x)?;
    check.that(op.block_n > 0 && op.block_k > 0, || "block extents should be positive".into())?;
    let (m, n, k) = (op.x.dim(0), op.weight.dim(0), op.x.dim(1));
    check.packed("weight", &op.weight, [n, k])?;
    check.that(op.weight.dtype != DType::I4 || k % 2 == 0, || {
        format!("4-bit rows should have an even width but have {k}")
    })?;
    let blocks = [n.div_ceil(op.block_n), k.div_ceil(op.block_k)];
    check.packed("scales", &op.scales, blocks)?;
    check.dtype("scales", &op.scales, &[DType::F32])?;
    check.shape("c", &op.c, [m, n])?;
    check.dtype("c", &op.c, &[op.x.dtype, DType::F32])?;
    if let Some(bias) = &op.bias {
        check.tensor("bias", bias, op.x.dtype, [n])?;
    }
});

/// One product per group of consecutive rows, each with its own weight (experts).
///
/// Group g holds rows `offsets[g]..offsets[g+1]`; groups may be empty; rows from
/// `offsets[groups]` on are not touched.
///
/// Shapes    Nt: a [rows,k], b [groups,n,k], c [rows,n]; Nn: a [rows,k], b [groups,k,n],
///           c [rows,n]; Tn: a [rows,m], b [rows,n], c [groups,m,n] (an empty group gives zero);
///           offsets [groups+1]
/// Dtypes    as [`Matmul`]; offsets i32, ascending from 0
/// Writes    c by `accumulate`
/// Numerics  as [`Matmul`] within each group
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupedMatmul {
    /// Which operand is transposed.
    pub layout: Layout,
    /// Left operand.
    pub a: View,
    /// Right operand.
    pub b: View,
    /// Where each group's rows begin, and where the last one's end.
    pub offsets: View,
    /// Result.
    pub c: View,
    /// What happens to the result's old contents.
    pub accumulate: Accumulate,
}
contract!(GroupedMatmul |op, check| {
    a: Read, b: Read, offsets: Read, c: op.accumulate.access(),
} {
    let stacked = if op.layout == Layout::Tn { 2 } else { 3 };
    check.rank("a", &op.a, 2)?;
    check.rank("b", &op.b, stacked)?;
    check.rank("c", &op.c, 5 - stacked)?;
    check.rank("offsets", &op.offsets, 1)?;
    check.dtype("a", &op.a, &DType::FLOATS)?;
    check.dtype("b", &op.b, &[op.a.dtype])?;
    check.dtype("c", &op.c, &[op.a.dtype, DType::F32])?;
    check.dtype("offsets", &op.offsets, &[DType::I32])?;
    check.dense_rows("a", &op.a)?;
    let (rows, width) = (op.a.dim(0), op.a.dim(1));
    let groups = if op.layout == Layout::Tn { op.c.dim(0) } else { op.b.dim(0) };
    check.shape("offsets", &op.offsets, [groups + 1])?;
    match op.layout {
        Layout::Nt => {
            let n = op.b.dim(1);
            check.packed("b", &op.b, [groups, n, width])?;
            check.shape("c", &op.c, [rows, n])?;
        }
        Layout::Nn => {
            let n = op.b.dim(2);
            check.packed("b", &op.b, [groups, width, n])?;
            check.shape("c", &op.c, [rows, n])?;
        }
        Layout::Tn => {
            let n = op.b.dim(1);
            check.shape("b", &op.b, [rows, n])?;
            check.packed("c", &op.c, [groups, width, n])?;
        }
    }
});

/// [`MatmulQuant`] per group of consecutive rows, each with its own weight (routed experts).
///
/// Group g holds rows `offsets[g]..offsets[g+1]`; groups may be empty; rows from
/// `offsets[groups]` on are not touched.
///
/// Shapes    x [rows,k]; weight [groups,n,k]; scales [groups, ceil(n/block_n), ceil(k/block_k)];
///           offsets [groups+1]; c [rows,n]
/// Dtypes    as [`MatmulQuant`]; offsets i32, ascending from 0
/// Writes    c
/// Numerics  as [`MatmulQuant`] within each group, and with the same bits
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupedMatmulQuant {
    /// Activations, sorted by group.
    pub x: View,
    /// The groups' quantised weights.
    pub weight: View,
    /// One scale per block of each weight.
    pub scales: View,
    /// Rows of a weight that share a scale.
    pub block_n: usize,
    /// Columns of a weight that share a scale.
    pub block_k: usize,
    /// Where each group's rows begin, and where the last one's end.
    pub offsets: View,
    /// Result.
    pub c: View,
}
contract!(GroupedMatmulQuant |op, check| {
    x: Read, weight: Read, scales: Read, offsets: Read, c: crate::op::Access::Write,
} {
    check.rank("x", &op.x, 2)?;
    check.rank("weight", &op.weight, 3)?;
    check.dtype("x", &op.x, &DType::FLOATS)?;
    check.dtype("weight", &op.weight, &[DType::F8e4m3, DType::I8, DType::I4])?;
    check.dense_rows("x", &op.x)?;
    check.that(op.block_n > 0 && op.block_k > 0, || "block extents should be positive".into())?;
    let (rows, k) = (op.x.dim(0), op.x.dim(1));
    let (groups, n) = (op.weight.dim(0), op.weight.dim(1));
    check.packed("weight", &op.weight, [groups, n, k])?;
    check.that(op.weight.dtype != DType::I4 || k % 2 == 0, || {
        format!("4-bit rows should have an even width but have {k}")
    })?;
    let blocks = [groups, n.div_ceil(op.block_n), k.div_ceil(op.block_k)];
    check.packed("scales", &op.scales, blocks)?;
    check.dtype("scales", &op.scales, &[DType::F32])?;
    check.tensor("offsets", &op.offsets, DType::I32, [groups + 1])?;
    check.shape("c", &op.c, [rows, n])?;
    check.dtype("c", &op.c, &[op.x.dtype, DType::F32])?;
});
