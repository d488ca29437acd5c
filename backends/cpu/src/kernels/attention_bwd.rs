//! The gradient of attention: probabilities are computed again tile by tile from the saved
//! log-sums.
//!
//! A task owns one key head of one document, so that its key and value gradients are summed by one
//! thread in a fixed order: query heads of the group ascending, query rows ascending. All
//! arithmetic is f32. Masked pairs are never multiplied, so nothing leaks through them.

use std::cell::RefCell;

use pontoon_ops as ops;

use super::attention::{documents, widen};
use super::product::{Left, multiply_add, padded_width};
use super::{Context, Done, row_stride, with_float};
use crate::ffi::Scattered;
use crate::simd::{Element, Kernel, Simd, dispatch};

/// Rows and keys of a tile; the same, so that exactly the tiles on the diagonal are partly masked.
const TILE: usize = 64;

/// Working memory of one thread, grown once.
#[derive(Default)]
struct Memory {
    q: Vec<f32>,
    dout: Vec<f32>,
    k: Vec<f32>,
    k_turned: Vec<f32>,
    v_turned: Vec<f32>,
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
    p: Vec<f32>,
    ds: Vec<f32>,
    delta: Vec<f32>,
    lse: Vec<f32>,
}

thread_local! {
    static MEMORY: RefCell<Memory> = RefCell::default();
}

fn zeroed(memory: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if memory.len() < len {
        memory.resize(len, 0.0);
    }
    memory[..len].fill(0.0);
    &mut memory[..len]
}

/// A head's rows in a tensor.
#[derive(Clone, Copy)]
struct Head<'a, T> {
    data: &'a [T],
    row: usize,
}

impl<'a, T: Element> Head<'a, T> {
    /// The rows of one head from row `start` on.
    fn of(data: &'a [T], view: &ops::View, start: usize, head: usize) -> Self {
        Head { data: &data[place(view, start, head)..], row: row_stride(view) }
    }

    /// Widens consecutive rows into rows of `padded` elements.
    fn load(&self, rows: usize, width: usize, padded: usize, to: &mut [f32]) {
        for (row, to) in to.chunks_mut(padded).take(rows).enumerate() {
            widen(&self.data[row * self.row..][..width], &mut to[..width]);
        }
    }
}

/// Where a head's part of a row begins.
fn place(view: &ops::View, row: usize, head: usize) -> usize {
    row * row_stride(view) + head * view.stride(1)
}

pub(super) fn attention_bwd(context: &mut Context<'_>, op: &ops::AttentionBwd) -> Done {
    with_float!(op.q.dtype, T => attention_bwd_as::<T>(context, op))
}

fn attention_bwd_as<T: Element>(context: &mut Context<'_>, op: &ops::AttentionBwd) -> Done {
    let read = |view| context.operands.read::<T>(view);
    let (q, k, v) = (read(&op.q)?, read(&op.k)?, read(&op.v)?);
    let (out, dout) = (read(&op.out)?, read(&op.dout)?);
    let starts = context.operands.read::<i32>(&op.documents)?;
    let lse = context.operands.read::<f32>(&op.lse)?;
    let dq = Scattered::new(context.operands.write::<T>(&op.dq)?);
    let dk = Scattered::new(context.operands.write::<T>(&op.dk)?);
    let dv = Scattered::new(context.operands.write::<T>(&op.dv)?);
    let (heads, kv_heads) = (op.q.dim(1), op.k.dim(1));
    let documents = documents(starts, op.q.dim(0))?;
    let isa = context.isa;
    context.pool.run(documents.len() * kv_heads, |task| {
        let ((start, rows), kv_head) = (documents[task / kv_heads], task % kv_heads);
        MEMORY.with_borrow_mut(|memory| {
            let mut document = Document {
                isa,
                rows,
                qk_width: op.q.dim(2),
                v_width: op.v.dim(2),
                scale: op.scale,
                memory,
            };
            document.begin(Head::of(k, &op.k, start, kv_head), Head::of(v, &op.v, start, kv_head));
            let group = heads / kv_heads;
            for head in kv_head * group..(kv_head + 1) * group {
                document.load_query(
                    Head::of(q, &op.q, start, head),
                    Head::of(dout, &op.dout, start, head),
                    Head::of(out, &op.out, start, head),
                );
                for row in 0..rows {
                    document.memory.lse[row] = lse[place(&op.lse, start + row, head)];
                }
                document.run();
                let width = padded_width(document.qk_width);
                for row in 0..rows {
                    let values = &document.memory.dq[row * width..][..document.qk_width];
                    dq.store(place(&op.dq, start + row, head), values);
                }
            }
            document.finish(|row, dk_row, dv_row| {
                dk.store(place(&op.dk, start + row, kv_head), dk_row);
                dv.store(place(&op.dv, start + row, kv_head), dv_row);
            });
        });
    });
    Ok(())
}

/// One key head of one document.
struct Document<'a> {
    isa: crate::simd::Isa,
    rows: usize,
    qk_width: usize,
    v_width: usize,
    scale: f32,
    memory: &'a mut Memory,
}

impl Document<'_> {
    /// Widens keys and values, as rows and turned per tile, and clears their gradients.
    fn begin<T: Element>(&mut self, k: Head<'_, T>, v: Head<'_, T>) {
        let (rows, qk, vw) = (self.rows, self.qk_width, self.v_width);
        let (qk_padded, v_padded) = (padded_width(qk), padded_width(vw));
        let tiles = rows.div_ceil(TILE);
        let memory = &mut *self.memory;
        let key_rows = zeroed(&mut memory.k, tiles * TILE * qk_padded);
        k.load(rows, qk, qk_padded, key_rows);
        turn(key_rows, qk, qk_padded, zeroed(&mut memory.k_turned, tiles * TILE * qk));
        let value_rows = zeroed(&mut memory.dv, tiles * TILE * v_padded);
        v.load(rows, vw, v_padded, value_rows);
        turn(value_rows, vw, v_padded, zeroed(&mut memory.v_turned, tiles * TILE * vw));
        zeroed(&mut memory.dv, tiles * TILE * v_padded);
        zeroed(&mut memory.dk, tiles * TILE * qk_padded);
    }

    /// Widens one query head, and sums `dout * out` per row.
    fn load_query<T: Element>(&mut self, q: Head<'_, T>, dout: Head<'_, T>, out: Head<'_, T>) {
        let (rows, qk, vw) = (self.rows, self.qk_width, self.v_width);
        let (qk_padded, v_padded) = (padded_width(qk), padded_width(vw));
        let memory = &mut *self.memory;
        q.load(rows, qk, qk_padded, zeroed(&mut memory.q, rows * qk_padded));
        let dout_rows = zeroed(&mut memory.dout, rows * v_padded);
        dout.load(rows, vw, v_padded, dout_rows);
        zeroed(&mut memory.dq, rows * qk_padded);
        zeroed(&mut memory.lse, rows);
        let delta = zeroed(&mut memory.delta, rows);
        for (row, delta) in delta.iter_mut().enumerate() {
            let out = &out.data[row * out.row..][..vw];
            let dout = &dout_rows[row * v_padded..][..vw];
            *delta = dout.iter().zip(out).map(|(d, o)| d * o.to_f32()).sum();
        }
    }

    /// All tiles of one query head.
    fn run(&mut self) {
        for row_start in (0..self.rows).step_by(TILE) {
            for key_start in (0..=row_start).step_by(TILE) {
                let (rows, keys) =
                    (TILE.min(self.rows - row_start), TILE.min(self.rows - key_start));
                let (qk, vw) = (self.qk_width, self.v_width);
                let (qk_padded, v_padded) = (padded_width(qk), padded_width(vw));
                let memory = &mut *self.memory;
                let tile = Tile {
                    q: &memory.q[row_start * qk_padded..][..rows * qk_padded],
                    dout: &memory.dout[row_start * v_padded..][..rows * v_padded],
                    k: &memory.k[key_start * qk_padded..][..TILE * qk_padded],
                    k_turned: &memory.k_turned[key_start * qk..][..TILE * qk],
                    v_turned: &memory.v_turned[key_start * vw..][..TILE * vw],
                    lse: &memory.lse[row_start..][..rows],
                    delta: &memory.delta[row_start..][..rows],
                    dq: &mut memory.dq[row_start * qk_padded..][..rows * qk_padded],
                    dk: &mut memory.dk[key_start * qk_padded..][..TILE * qk_padded],
                    dv: &mut memory.dv[key_start * v_padded..][..TILE * v_padded],
                    p: zeroed(&mut memory.p, rows * TILE),
                    ds: zeroed(&mut memory.ds, rows * TILE),
                    widths: (qk, vw),
                    keys,
                    diagonal: row_start == key_start,
                    scale: self.scale,
                };
                dispatch(self.isa, tile);
            }
        }
    }

    fn finish(&self, mut store: impl FnMut(usize, &[f32], &[f32])) {
        let (qk, vw) = (self.qk_width, self.v_width);
        for row in 0..self.rows {
            let dk = &self.memory.dk[row * padded_width(qk)..][..qk];
            let dv = &self.memory.dv[row * padded_width(vw)..][..vw];
            store(row, dk, dv);
        }
    }
}

/// Rows of `padded` elements to tiles of `[width, TILE]`.
fn turn(rows: &[f32], width: usize, padded: usize, to: &mut [f32]) {
    for (tile, to) in to.chunks_mut(TILE * width.max(1)).enumerate() {
        for key in 0..TILE {
            let row = &rows[(tile * TILE + key) * padded..][..width];
            for (element, value) in row.iter().enumerate() {
                to[element * TILE + key] = *value;
            }
        }
    }
}

/// One tile of query rows against one tile of keys.
struct Tile<'a> {
    q: &'a [f32],
    dout: &'a [f32],
    k: &'a [f32],
    k_turned: &'a [f32],
    v_turned: &'a [f32],
    lse: &'a [f32],
    delta: &'a [f32],
    dq: &'a mut [f32],
    dk: &'a mut [f32],
    dv: &'a mut [f32],
    p: &'a mut [f32],
    ds: &'a mut [f32],
    widths: (usize, usize),
    keys: usize,
    /// Whether row i of the tile sees only keys up to i.
    diagonal: bool,
    scale: f32,
}

impl Kernel for Tile<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let rows = self.lse.len();
        let (qk, vw) = self.widths;
        let (qk_padded, v_padded) = (padded_width(qk), padded_width(vw));
        let q = Left { a: self.q, row_step: qk_padded, k_step: 1 };
        multiply_add(simd, q, self.k_turned, self.p, (rows, 0..qk, TILE));
        let dout = Left { a: self.dout, row_step: v_padded, k_step: 1 };
        multiply_add(simd, dout, self.v_turned, self.ds, (rows, 0..vw, TILE));
        for row in 0..rows {
            self.score_gradient(simd, row);
        }
        if self.diagonal {
            for row in 0..rows {
                let seen = row + 1;
                let ds = Left { a: &self.ds[row * TILE..], row_step: TILE, k_step: 1 };
                let dq = &mut self.dq[row * qk_padded..];
                multiply_add(simd, ds, self.k, dq, (1, 0..seen, qk_padded));
            }
            for key in 0..self.keys {
                let p = Left { a: &self.p[key..], row_step: 1, k_step: TILE };
                let dv = &mut self.dv[key * v_padded..];
                multiply_add(simd, p, self.dout, dv, (1, key..rows, v_padded));
                let ds = Left { a: &self.ds[key..], row_step: 1, k_step: TILE };
                let dk = &mut self.dk[key * qk_padded..];
                multiply_add(simd, ds, self.q, dk, (1, key..rows, qk_padded));
            }
            return;
        }
        let ds = Left { a: self.ds, row_step: TILE, k_step: 1 };
        multiply_add(simd, ds, self.k, self.dq, (rows, 0..TILE, qk_padded));
        let p = Left { a: self.p, row_step: 1, k_step: TILE };
        multiply_add(simd, p, self.dout, self.dv, (TILE, 0..rows, v_padded));
        let ds = Left { a: self.ds, row_step: 1, k_step: TILE };
        multiply_add(simd, ds, self.q, self.dk, (TILE, 0..rows, qk_padded));
    }
}

impl Tile<'_> {
    /// Turns a row of scores into probabilities, and of `dout v^T` into `scale * ds`.
    #[inline(always)]
    fn score_gradient<S: Simd>(&mut self, simd: S, row: usize) {
        let (scale, lse) = (simd.splat(self.scale), simd.splat(self.lse[row]));
        let delta = simd.splat(self.delta[row]);
        let p = &mut self.p[row * TILE..][..TILE];
        let ds = &mut self.ds[row * TILE..][..TILE];
        for (p, ds) in p.chunks_mut(S::LANES).zip(ds.chunks_mut(S::LANES)) {
            let probability = simd.exp(simd.sub(simd.mul(simd.load(p), scale), lse));
            let slope = simd.mul(probability, simd.sub(simd.load(ds), delta));
            simd.store(probability, p);
            simd.store(simd.mul(slope, scale), ds);
        }
    }
}
