//! Matrix products on views: dense, grouped by expert, and with quantised weights.

use half::{bf16, f16};
use pontoon_ops::{self as ops, Accumulate, DType, DeviceError, DeviceErrorKind, OpName, View};

use super::{Context, Done, row_stride, unsupported};
use crate::gemm::{
    Data, DataMut, GemmArgs, GroupedGemmArgs, Integers, Layout, Matrix, MatrixMut, QuantArgs,
    Store, gemm, quant_gemm,
};
use crate::memory::Operands;

pub(super) fn layout(layout: ops::Layout) -> Layout {
    match layout {
        ops::Layout::Nt => Layout::Nt,
        ops::Layout::Nn => Layout::Nn,
        ops::Layout::Tn => Layout::Tn,
    }
}

pub(super) fn store(accumulate: Accumulate) -> Store {
    match accumulate {
        Accumulate::Overwrite => Store::Overwrite,
        Accumulate::Add => Store::Accumulate,
    }
}

/// A view's elements, by dtype.
pub(super) fn data<'a>(operands: &Operands<'a>, view: &View) -> Result<Data<'a>, DeviceError> {
    Ok(match view.dtype {
        DType::F32 => Data::F32(operands.read::<f32>(view)?),
        DType::Bf16 => Data::Bf16(operands.read::<bf16>(view)?),
        DType::F16 => Data::F16(operands.read::<f16>(view)?),
        other => return Err(unsupported(other)),
    })
}

pub(super) fn data_mut<'a>(
    operands: &Operands<'a>,
    view: &View,
) -> Result<DataMut<'a>, DeviceError> {
    Ok(match view.dtype {
        DType::F32 => DataMut::F32(operands.write::<f32>(view)?),
        DType::Bf16 => DataMut::Bf16(operands.write::<bf16>(view)?),
        DType::F16 => DataMut::F16(operands.write::<f16>(view)?),
        other => return Err(unsupported(other)),
    })
}

pub(super) fn matrix<'a>(operands: &Operands<'a>, view: &View) -> Result<Matrix<'a>, DeviceError> {
    Ok(Matrix { data: data(operands, view)?, row_stride: row_stride(view) })
}

pub(super) fn matmul(context: &mut Context<'_>, op: &ops::Matmul) -> Done {
    let ops::Extents { m, n, k } = op.extents();
    let in_panels = op.layout == ops::Layout::Nt && context.operands.in_panels(&op.b);
    let args = GemmArgs {
        layout: if in_panels { Layout::Panels } else { layout(op.layout) },
        m,
        n,
        k,
        a: matrix(&context.operands, &op.a)?,
        b: matrix(&context.operands, &op.b)?,
        bias: op.bias.map(|bias| data(&context.operands, &bias)).transpose()?,
        c: MatrixMut { data: data_mut(&context.operands, &op.c)?, row_stride: row_stride(&op.c) },
        store: store(op.accumulate),
    };
    let asked = [0, 1].map(|place| context.checks.ask.read >> place & 1 == 1);
    let sums = context.product((OpName::Matmul, "c"), args, asked)?;
    let c = 2 + usize::from(op.bias.is_some());
    for (place, sum) in [(0, sums.a), (1, sums.b), (c, sums.before)] {
        context.checks.read(place, sum);
    }
    context.checks.written(c, sums.stored);
    Ok(())
}

/// Group bounds as the host may have got them wrong: ascending and within the rows.
pub(super) fn bounds(offsets: &[i32], rows: usize) -> Result<Vec<usize>, DeviceError> {
    let bounds: Vec<usize> =
        offsets.iter().map(|&o| usize::try_from(o).unwrap_or(usize::MAX)).collect();
    let ascending = bounds.windows(2).all(|pair| pair[0] <= pair[1]);
    if ascending && bounds.last().is_none_or(|&end| end <= rows) {
        return Ok(bounds);
    }
    let text = format!("offsets {offsets:?} should rise from 0 to at most {rows}");
    Err(DeviceError::new(DeviceErrorKind::BadArgument, text))
}

pub(super) fn grouped_matmul(context: &mut Context<'_>, op: &ops::GroupedMatmul) -> Done {
    let offsets = bounds(context.operands.read::<i32>(&op.offsets)?, op.a.dim(0))?;
    let width = op.a.dim(1);
    let n = op.c.dim(op.c.shape.rank() - 1);
    let (m, k, group_stride) = match op.layout {
        ops::Layout::Tn => (width, 0, width * n),
        ops::Layout::Nt | ops::Layout::Nn => (0, width, width * n),
    };
    // In the stacked operand a matrix's own rows follow one another.
    let rows_of = |view: &View| if view.shape.rank() == 3 { view.dim(2) } else { row_stride(view) };
    let b = Matrix { data: data(&context.operands, &op.b)?, row_stride: rows_of(&op.b) };
    let args = GroupedGemmArgs {
        layout: layout(op.layout),
        offsets: &offsets,
        m,
        n,
        k,
        a: matrix(&context.operands, &op.a)?,
        b,
        group_stride,
        c: MatrixMut { data: data_mut(&context.operands, &op.c)?, row_stride: rows_of(&op.c) },
        store: store(op.accumulate),
    };
    context.grouped_product((OpName::GroupedMatmul, "c"), args)
}

/// Rows of a quantised weight that are widened together: a panel that stays in cache.
const QUANT_ROWS: usize = 64;

/// The value of an e4m3 byte: 4 exponent bits (bias 7), 3 fraction bits, no infinity.
fn e4m3(byte: u8) -> f32 {
    let (exponent, fraction) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let magnitude = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => fraction / 8.0 * 2f32.powi(-6),
        _ => (1.0 + fraction / 8.0) * 2f32.powi(exponent - 7),
    };
    if byte & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The bytes of a quantised weight.
pub(super) fn quant_bytes<'a>(
    operands: &Operands<'a>,
    weight: &View,
) -> Result<&'a [u8], DeviceError> {
    if weight.dtype != DType::I4 {
        return operands.read::<u8>(weight);
    }
    // Four-bit views count half bytes; their bytes are read as a packed view.
    let packed = View::contiguous(weight.buffer, DType::I8, [weight.elements() / 2]);
    operands.read::<u8>(&packed.rebased(weight.buffer, weight.byte_offset))
}

/// A product with a quantised weight, its operands in reach.
pub(super) struct QuantProduct<'a> {
    /// Rows of x and c.
    pub m: usize,
    /// Rows of the weight, columns of c.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
    /// Activations.
    pub x: Matrix<'a>,
    /// The weight's element type and bytes.
    pub weight: (DType, &'a [u8]),
    /// One scale per block.
    pub scales: &'a [f32],
    /// Rows and columns of the weight that share a scale.
    pub block: [usize; 2],
    /// Whether the weight lies in panels.
    pub panels: bool,
    /// Added to every row.
    pub bias: Option<Data<'a>>,
    /// Result.
    pub c: MatrixMut<'a>,
}

pub(super) fn matmul_quant(context: &mut Context<'_>, op: &ops::MatmulQuant) -> Done {
    let product = QuantProduct {
        m: op.x.dim(0),
        n: op.weight.dim(0),
        k: op.x.dim(1),
        x: matrix(&context.operands, &op.x)?,
        weight: (op.weight.dtype, quant_bytes(&context.operands, &op.weight)?),
        scales: context.operands.read::<f32>(&op.scales)?,
        block: [op.block_n, op.block_k],
        panels: context.operands.in_panels(&op.weight),
        bias: op.bias.map(|bias| data(&context.operands, &bias)).transpose()?,
        c: MatrixMut { data: data_mut(&context.operands, &op.c)?, row_stride: row_stride(&op.c) },
    };
    quant_product(context, product);
    Ok(())
}

/// Integers with one scale per row and block are streamed; anything else is widened.
pub(super) fn quant_product(context: &mut Context<'_>, product: QuantProduct<'_>) {
    let integers = match product.weight.0 {
        DType::I8 => Some(Integers::Bytes),
        DType::I4 => Some(Integers::HalfBytes),
        _ => None,
    };
    let [block_n, block] = product.block;
    let Some(integers) = integers.filter(|stored| block_n == 1 && stored.streams(block)) else {
        return widened_product(context, product);
    };
    let QuantProduct { m, n, k, x, scales, panels, bias, c, .. } = product;
    let weight = product.weight.1;
    let args = QuantArgs { m, n, k, x, integers, weight, scales, block, panels, bias, c };
    quant_gemm(context.pool, context.isa, context.gemm_scratch, args);
}

/// The weight is widened to f32, some of its rows at a time. Not made for speed.
fn widened_product(context: &mut Context<'_>, product: QuantProduct<'_>) {
    let QuantProduct { m, n, k, x, scales, bias, mut c, .. } = product;
    let ((dtype, bytes), [block_n, block_k]) = (product.weight, product.block);
    let bias = bias.map(|data| widen(Matrix { data, row_stride: n }, 1, n));
    let blocks = k.div_ceil(block_k);
    let widened_x = widen(x, m, k);
    let mut panel = vec![0.0_f32; QUANT_ROWS.min(n) * k];
    for start in (0..n).step_by(QUANT_ROWS) {
        let rows = QUANT_ROWS.min(n - start);
        for row in 0..rows {
            let scale_row = &scales[(start + row) / block_n * blocks..][..blocks];
            for (column, value) in panel[row * k..][..k].iter_mut().enumerate() {
                let quantised = quantised(bytes, dtype, (start + row) * k + column);
                *value = quantised * scale_row[column / block_k];
            }
        }
        let args = GemmArgs {
            layout: Layout::Nt,
            m,
            n: rows,
            k,
            a: Matrix { data: Data::F32(&widened_x), row_stride: k.max(1) },
            b: Matrix { data: Data::F32(&panel[..rows * k]), row_stride: k.max(1) },
            bias: bias.as_ref().map(|bias| Data::F32(&bias[start..][..rows])),
            c: MatrixMut { data: c.data.from(start), row_stride: c.row_stride },
            store: Store::Overwrite,
        };
        gemm(context.pool, context.isa, context.gemm_scratch, args);
    }
}

/// One element without its scale.
fn quantised(bytes: &[u8], dtype: DType, index: usize) -> f32 {
    match dtype {
        DType::F8e4m3 => e4m3(bytes[index]),
        DType::I8 => f32::from(bytes[index] as i8),
        _ => {
            let pair = bytes[index / 2];
            let nibble = if index.is_multiple_of(2) { pair << 4 } else { pair & 0xf0 };
            f32::from((nibble as i8) >> 4)
        }
    }
}

fn widen(x: Matrix<'_>, rows: usize, width: usize) -> Vec<f32> {
    let at = |index: usize| match x.data {
        Data::F32(data) => data[index],
        Data::Bf16(data) => data[index].to_f32(),
        Data::F16(data) => data[index].to_f32(),
    };
    let row = |row: usize| (0..width).map(move |column| at(row * x.row_stride + column));
    (0..rows).flat_map(row).collect()
}
