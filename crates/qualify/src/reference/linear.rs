//! Matrix products, in f64.

use pontoon_ops::{self as ops, Layout};

use super::{Expected, Want, accumulated, expected, near};
use crate::memory::Memory;

/// The sum of `terms` and of their sizes.
pub(super) fn sum(terms: impl Iterator<Item = f64>) -> (f64, f64) {
    terms.fold((0.0, 0.0), |(value, size), term| (value + term, size + term.abs()))
}

/// The scalar product of two rows and the sum of its terms' sizes; four sums side by side, as a
/// whole model is computed with this.
pub(super) fn dot(a: &[f64], b: &[f64]) -> (f64, f64) {
    let (mut values, mut sizes) = ([0.0; 4], [0.0; 4]);
    let whole = a.len() / 4 * 4;
    for (a, b) in a[..whole].chunks_exact(4).zip(b[..whole].chunks_exact(4)) {
        for lane in 0..4 {
            let term = a[lane] * b[lane];
            values[lane] += term;
            sizes[lane] += term.abs();
        }
    }
    let rest = sum(a[whole..].iter().zip(&b[whole..]).map(|(a, b)| a * b));
    (values.iter().sum::<f64>() + rest.0, sizes.iter().sum::<f64>() + rest.1)
}

/// A matrix of so many rows as a list of its columns.
fn columns(matrix: &[f64], rows: usize) -> Vec<f64> {
    let width = matrix.len() / rows.max(1);
    (0..width).flat_map(|column| (0..rows).map(move |row| matrix[row * width + column])).collect()
}

pub(super) fn matmul(op: &ops::Matmul, memory: &Memory) -> Vec<Expected> {
    let (a, b) = (memory.read(&op.a), memory.read(&op.b));
    let bias = op.bias.map(|bias| memory.read(&bias));
    let ops::Extents { m, n, k } = op.extents();
    let a = if op.layout == Layout::Tn { columns(&a, k) } else { a };
    let b = if op.layout == Layout::Nt { b } else { columns(&b, k) };
    let mut wants = Vec::with_capacity(m * n);
    for row in 0..m {
        for column in 0..n {
            let (value, size) = dot(&a[row * k..][..k], &b[column * k..][..k]);
            let bias = bias.as_ref().map_or(0.0, |bias| bias[column]);
            wants.push(near(value + bias, size + bias.abs()));
        }
    }
    vec![accumulated(memory, &op.c, wants, op.accumulate)]
}

pub(super) fn matmul_quant(op: &ops::MatmulQuant, memory: &Memory) -> Vec<Expected> {
    let (x, weight) = (memory.read(&op.x), memory.read(&op.weight));
    let scales = memory.read(&op.scales);
    let bias = op.bias.map(|bias| memory.read(&bias));
    let (m, n, k) = (op.x.dim(0), op.weight.dim(0), op.x.dim(1));
    let scale =
        |column: usize, i: usize| scales[column / op.block_n * op.scales.dim(1) + i / op.block_k];
    let mut wants = Vec::new();
    for row in 0..m {
        for column in 0..n {
            let term = |i: usize| x[row * k + i] * weight[column * k + i] * scale(column, i);
            let (value, size) = sum((0..k).map(term));
            let bias = bias.as_ref().map_or(0.0, |bias| bias[column]);
            wants.push(near(value + bias, size + bias.abs()));
        }
    }
    vec![expected(&op.c, wants)]
}

pub(super) fn grouped_matmul(op: &ops::GroupedMatmul, memory: &Memory) -> Vec<Expected> {
    let (a, b) = (memory.read(&op.a), memory.read(&op.b));
    let offsets: Vec<usize> =
        memory.read_integers(&op.offsets).into_iter().map(|o| o as usize).collect();
    let (width, n) = (op.a.dim(1), op.c.dim(op.c.shape.rank() - 1));
    let mut wants = vec![Want::Kept; op.c.elements()];
    for (group, rows) in offsets.windows(2).map(|pair| pair[0]..pair[1]).enumerate() {
        let stacked = group * width * n;
        for column in 0..n {
            if op.layout == Layout::Tn {
                for row in 0..width {
                    let term = |i: usize| a[i * width + row] * b[i * n + column];
                    let (value, size) = sum(rows.clone().map(term));
                    wants[stacked + row * n + column] = near(value, size);
                }
                continue;
            }
            for row in rows.clone() {
                let term = |i: usize| {
                    let inner =
                        if op.layout == Layout::Nt { column * width + i } else { i * n + column };
                    a[row * width + i] * b[stacked + inner]
                };
                let (value, size) = sum((0..width).map(term));
                wants[row * n + column] = near(value, size);
            }
        }
    }
    vec![accumulated(memory, &op.c, wants, op.accumulate)]
}

pub(super) fn grouped_matmul_quant(op: &ops::GroupedMatmulQuant, memory: &Memory) -> Vec<Expected> {
    let (x, weight) = (memory.read(&op.x), memory.read(&op.weight));
    let scales = memory.read(&op.scales);
    let offsets = memory.read_integers(&op.offsets);
    let (n, k) = (op.weight.dim(1), op.weight.dim(2));
    let (scale_rows, scale_columns) = (op.scales.dim(1), op.scales.dim(2));
    let mut wants = vec![Want::Kept; op.c.elements()];
    for (group, pair) in offsets.windows(2).enumerate() {
        for row in pair[0] as usize..pair[1] as usize {
            for column in 0..n {
                let scale_row = (group * scale_rows + column / op.block_n) * scale_columns;
                let term = |i: usize| {
                    let integer = weight[(group * n + column) * k + i];
                    x[row * k + i] * integer * scales[scale_row + i / op.block_k]
                };
                let (value, size) = sum((0..k).map(term));
                wants[row * n + column] = near(value, size);
            }
        }
    }
    vec![expected(&op.c, wants)]
}
