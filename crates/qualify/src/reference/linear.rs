//! Matrix products, in f64.

use pontoon_ops::{self as ops, Layout};

use super::{Expected, Want, accumulated, expected, near};
use crate::memory::Memory;

/// The sum of `terms` and of their sizes.
pub(super) fn sum(terms: impl Iterator<Item = f64>) -> (f64, f64) {
    terms.fold((0.0, 0.0), |(value, size), term| (value + term, size + term.abs()))
}

pub(super) fn matmul(op: &ops::Matmul, memory: &Memory) -> Vec<Expected> {
    let (a, b) = (memory.read(&op.a), memory.read(&op.b));
    let bias = op.bias.map(|bias| memory.read(&bias));
    let ops::Extents { m, n, k } = op.extents();
    let mut wants = Vec::new();
    for row in 0..m {
        for column in 0..n {
            let term = |i: usize| match op.layout {
                Layout::Nt => a[row * k + i] * b[column * k + i],
                Layout::Nn => a[row * k + i] * b[i * n + column],
                Layout::Tn => a[i * m + row] * b[i * n + column],
            };
            let bias = bias.as_ref().map(|bias| bias[column]);
            let (value, size) = sum((0..k).map(term).chain(bias));
            wants.push(near(value, size));
        }
    }
    vec![accumulated(memory, &op.c, wants, op.accumulate)]
}

pub(super) fn matmul_quant(op: &ops::MatmulQuant, memory: &Memory) -> Vec<Expected> {
    let (x, weight) = (memory.read(&op.x), memory.read(&op.weight));
    let scales = memory.read(&op.scales);
    let (m, n, k) = (op.x.dim(0), op.weight.dim(0), op.x.dim(1));
    let scale =
        |column: usize, i: usize| scales[column / op.block_n * op.scales.dim(1) + i / op.block_k];
    let mut wants = Vec::new();
    for row in 0..m {
        for column in 0..n {
            let term = |i: usize| x[row * k + i] * weight[column * k + i] * scale(column, i);
            let (value, size) = sum((0..k).map(term));
            wants.push(near(value, size));
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
