//! Products with quantised weights grouped by expert: group by group through the product for one
//! weight, whose bits they therefore have.
//!
//! A group's weight is read once for all its rows, and that of a group without rows not at all.

use pontoon_ops::GroupedMatmulQuant;

use super::linear::{QuantProduct, bounds, data_mut, matrix, quant_bytes, quant_product};
use super::{Context, Done, row_stride};
use crate::gemm::{Matrix, MatrixMut};

pub(super) fn grouped_matmul_quant(context: &mut Context<'_>, op: &GroupedMatmulQuant) -> Done {
    let offsets = bounds(context.operands.read::<i32>(&op.offsets)?, op.x.dim(0))?;
    let (n, k, dtype) = (op.weight.dim(1), op.weight.dim(2), op.weight.dtype);
    let x = matrix(&context.operands, &op.x)?;
    let stacked = op.weight.reshape([op.weight.dim(0) * n, k]);
    let weights = quant_bytes(&context.operands, &stacked)?;
    let scales = context.operands.read::<f32>(&op.scales)?;
    let mut c = data_mut(&context.operands, &op.c)?;
    let c_stride = row_stride(&op.c);
    let (weight_bytes, scale_count) = (dtype.bytes(n * k), op.scales.dim(1) * op.scales.dim(2));
    for (group, rows) in offsets.windows(2).map(|pair| pair[0]..pair[1]).enumerate() {
        if rows.is_empty() {
            continue;
        }
        let product = QuantProduct {
            m: rows.len(),
            n,
            k,
            x: Matrix { data: x.data.from(rows.start * x.row_stride), row_stride: x.row_stride },
            weight: (dtype, &weights[group * weight_bytes..][..weight_bytes]),
            scales: &scales[group * scale_count..][..scale_count],
            block: [op.block_n, op.block_k],
            panels: false,
            bias: None,
            c: MatrixMut { data: c.from(rows.start * c_stride), row_stride: c_stride },
        };
        quant_product(context, product);
    }
    Ok(())
}
