//! Matrices that stay as they are while products read them again and again, as weights do in
//! serving, are kept in panels: the order of `gemm/pack.rs`, in which the inner loops read.
//!
//! A panel holds `2 * LANES` rows: for each 32-bit word along them, the rows' words side by side.
//! It takes the place of the rows it holds, so the matrix keeps its size and its place, and a
//! product streams it from front to back without transposing anything. What cannot be split into
//! whole panels and words stays as it is, and whoever reads a matrix otherwise gets it put back
//! first. Which operations read panels is said by [`reads_panels`].

use pontoon_ops::{BufferId, DType, DeviceError, Layout, Op};

use crate::ffi::{PARTS_MAX, Parts};
use crate::gemm::pack::{PackRowsAsColumns, Source};
use crate::gemm::panels::WORD;
use crate::gemm::{Integers, UnitKind, is_dot};
use crate::memory::{Buffers, Prepacked};
use crate::pool::Pool;
use crate::simd::{Isa, dispatch};

/// Which matrices of an operation can be read in panels, by the names of the operands.
pub(crate) fn reads_panels(op: &Op) -> &'static [&'static str] {
    match op {
        Op::Matmul(op) if op.layout == Layout::Nt => &["b"],
        Op::MatmulQuant(_) => &["weight", "scales"],
        Op::TokenLogProb(_) => &["head", "scales"],
        Op::Embed(_) => &["table"],
        _ => &[],
    }
}

/// Puts an operation's matrix into panels, with its scales if it is quantised, where that is of
/// use.
pub(crate) fn prepack(
    (pool, isa): (&Pool, Isa),
    buffers: &mut Buffers,
    op: &Op,
) -> Result<(), DeviceError> {
    let (matrix, scales) = match op {
        Op::Matmul(op) if op.layout == Layout::Nt => (&op.b, None),
        Op::MatmulQuant(op) if op.block_n == 1 => (&op.weight, Some((&op.scales, op.block_k))),
        Op::TokenLogProb(op) => (&op.head, op.scales.as_ref().map(|view| (view, op.block_k))),
        _ => return Ok(()),
    };
    let usable = match (scales, matrix.dtype) {
        (None, DType::F32) => true,
        (None, DType::Bf16) => is_dot(UnitKind::Bf16, isa),
        (Some((_, block)), DType::I8) => Integers::Bytes.streams(block),
        (Some((_, block)), DType::I4) => Integers::HalfBytes.streams(block),
        _ => false,
    };
    let width = isa.geometry().micro_columns;
    let all = [Some(matrix), scales.map(|(scales, _)| scales)];
    let all: Vec<Option<Prepacked>> = all.into_iter().flatten().map(Prepacked::of).collect();
    let fits = |one: &Option<Prepacked>| one.is_some_and(|one| in_words(&one, width));
    if !usable || !all.iter().all(fits) {
        return Ok(());
    }
    let all: Vec<Prepacked> = all.into_iter().flatten().collect();
    if all.iter().any(|one| buffers.prepacked_in(one.buffer, &one.range()).is_some()) {
        return Ok(());
    }
    for matrix in all {
        let panel_words = width * matrix.row_bytes / WORD;
        buffers.rewrite(matrix, true, |bytes| {
            each_panel(pool, bytes, panel_words, |rows, panel| {
                let words = panel_words / width;
                let from = Source {
                    data: bytemuck::cast_slice(rows),
                    stride: words,
                    first: 0,
                    count: width,
                    k: words,
                    units: words,
                    dot: false,
                };
                dispatch(isa, PackRowsAsColumns::<f32> { from, to: panel });
            });
        })?;
    }
    Ok(())
}

fn in_words(matrix: &Prepacked, width: usize) -> bool {
    let aligned = matrix.start.is_multiple_of(WORD) && matrix.row_bytes.is_multiple_of(WORD);
    aligned && matrix.rows.is_multiple_of(width)
}

/// Puts back the matrices of which a part lies in a range.
pub(crate) fn put_back(
    (pool, isa): (&Pool, Isa),
    buffers: &mut Buffers,
    buffer: BufferId,
    range: &std::ops::Range<usize>,
) -> Result<(), DeviceError> {
    while let Some(matrix) = buffers.prepacked_in(buffer, range) {
        let width = isa.geometry().micro_columns;
        let panel_words = width * matrix.row_bytes / WORD;
        buffers.rewrite(matrix, false, |bytes| {
            each_panel(pool, bytes, panel_words, |panel, rows| {
                for (row, to) in rows.chunks_exact_mut(panel_words / width).enumerate() {
                    read_row(panel, width, row, to);
                }
            });
        })?;
    }
    Ok(())
}

/// Reads a row of a matrix that is kept in panels of `panel_rows` rows.
pub(crate) fn read_row<T: Copy>(matrix: &[T], panel_rows: usize, row: usize, to: &mut [T]) {
    let per_word = WORD / size_of::<T>();
    let first = row / panel_rows * panel_rows * to.len() + row % panel_rows * per_word;
    for (word, to) in to.chunks_exact_mut(per_word).enumerate() {
        to.copy_from_slice(&matrix[first + word * panel_rows * per_word..][..per_word]);
    }
}

/// Gives each panel's old words and its place to `rewrite`.
fn each_panel(
    pool: &Pool,
    bytes: &mut [u8],
    panel_words: usize,
    rewrite: impl Fn(&[u32], &mut [u32]) + Sync,
) {
    let words: &mut [u32] = bytemuck::cast_slice_mut(bytes);
    let together = (words.len() / panel_words).div_ceil(PARTS_MAX);
    let parts = Parts::new(words, together * panel_words);
    pool.run(parts.count(), |part| {
        let part = parts.take(part);
        let mut old = vec![0; panel_words];
        for panel in part.chunks_exact_mut(panel_words) {
            old.copy_from_slice(panel);
            rewrite(&old, panel);
        }
    });
}
