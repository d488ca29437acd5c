//! Copy, Cast, Fill, Add, Scale and embedding, in f64.

use pontoon_ops as ops;

use super::{Expected, Want, accumulated, exact, expected, near, wide};
use crate::memory::Memory;

pub(super) fn copy(op: &ops::Copy, memory: &Memory) -> Vec<Expected> {
    vec![expected(&op.dst, memory.read(&op.src).into_iter().map(exact).collect())]
}

pub(super) fn cast(op: &ops::Cast, memory: &Memory) -> Vec<Expected> {
    vec![expected(&op.dst, memory.read(&op.src).into_iter().map(exact).collect())]
}

pub(super) fn fill(op: &ops::Fill) -> Vec<Expected> {
    let mut image = Memory::default();
    let one = image.add(vec![0; 8]);
    let one = ops::View::contiguous(one, op.dst.dtype, [1]);
    let value = if op.dst.dtype.is_float() { op.value } else { op.value.round_ties_even() };
    // The tolerance is zero: the value as the dtype holds it.
    image.write(&one, &[wide(value)]);
    let value = image.read(&one)[0];
    vec![expected(&op.dst, vec![exact(value); op.dst.elements()])]
}

pub(super) fn add(op: &ops::Add, memory: &Memory) -> Vec<Expected> {
    let (a, b) = (memory.read(&op.a), memory.read(&op.b));
    let sum = |(a, b): (f64, f64)| near(a + b, a.abs() + b.abs());
    vec![expected(&op.y, a.into_iter().zip(b).map(sum).collect())]
}

pub(super) fn scale(op: &ops::Scale, memory: &Memory) -> Vec<Expected> {
    let scaled = |x: f64| near(wide(op.factor) * x, (wide(op.factor) * x).abs());
    vec![expected(&op.y, memory.read(&op.x).into_iter().map(scaled).collect())]
}

pub(super) fn embed(op: &ops::Embed, memory: &Memory) -> Vec<Expected> {
    let table = memory.read(&op.table);
    let (vocabulary, width) = (op.table.dim(0), op.table.dim(1));
    let row = |id: i64| match usize::try_from(id) {
        Ok(id) if id < vocabulary => table[id * width..][..width].to_vec(),
        _ => vec![f64::NAN; width],
    };
    let rows = memory.read_integers(&op.ids).into_iter().flat_map(row);
    vec![expected(&op.y, rows.map(exact).collect())]
}

pub(super) fn embed_bwd(op: &ops::EmbedBwd, memory: &Memory) -> Vec<Expected> {
    let dy = memory.read(&op.dy);
    let (vocabulary, width) = (op.dtable.dim(0), op.dtable.dim(1));
    let mut sums = vec![(0.0, 0.0); vocabulary * width];
    for (row, id) in memory.read_integers(&op.ids).into_iter().enumerate() {
        let Some(id) = usize::try_from(id).ok().filter(|&id| id < vocabulary) else { continue };
        for column in 0..width {
            let term = dy[row * width + column];
            let sum = &mut sums[id * width + column];
            *sum = (sum.0 + term, sum.1 + term.abs());
        }
    }
    let wants: Vec<Want> = sums.into_iter().map(|(value, size)| near(value, size)).collect();
    vec![accumulated(memory, &op.dtable, wants, op.accumulate)]
}
