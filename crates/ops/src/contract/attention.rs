//! Rotary positions and attention: whole documents for training and prefill, paged for decoding.

use serde::{Deserialize, Serialize};

use crate::dtype::DType;
use crate::op::Access::{Read, ReadWrite, Write};
use crate::op::contract;
use crate::view::View;

/// How pairs of elements are rotated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum RopeStyle {
    /// Element i with element i + width/2 (Llama, Qwen).
    HalfSplit,
    /// Element 2i with element 2i + 1 (DeepSeek).
    Interleaved,
}

/// Which way to rotate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Direction {
    /// By the position's angles.
    Forward,
    /// Back by them: the gradient of `Forward`.
    Backward,
}

/// Rotates pairs of elements of each head by its row's position:
/// `(u, w) -> (u cos - w sin, w cos + u sin)`; backward with `-sin`.
///
/// Shapes    x, y [rows, heads, width], width even; positions [rows]; cos, sin [longest, width/2]
/// Dtypes    x, y: f32, bf16 or f16, equal; positions i32; cos, sin f32
/// Writes    y; y may be the same view as x
/// Numerics  products and their sum in f32, rounded once. A position outside the table gives NaN
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rope {
    /// Input heads.
    pub x: View,
    /// Each row's position in its document.
    pub positions: View,
    /// Cosines by position and pair, any scaling already applied.
    pub cos: View,
    /// Sines by position and pair.
    pub sin: View,
    /// Which elements form a pair.
    pub style: RopeStyle,
    /// Which way to rotate.
    pub direction: Direction,
    /// Rotated heads.
    pub y: View,
}
contract!(Rope |op, check| { x: Read, positions: Read, cos: Read, sin: Read, y: Write } {
    check.rank("x", &op.x, 3)?;
    check.dtype("x", &op.x, &DType::FLOATS)?;
    check.dense_rows("x", &op.x)?;
    let (rows, heads, width) = (op.x.dim(0), op.x.dim(1), op.x.dim(2));
    check.that(width % 2 == 0, || format!("rotated width should be even but is {width}"))?;
    check.tensor("y", &op.y, op.x.dtype, [rows, heads, width])?;
    check.tensor("positions", &op.positions, DType::I32, [rows])?;
    check.rank("cos", &op.cos, 2)?;
    let table = [op.cos.dim(0), width / 2];
    check.packed("cos", &op.cos, table)?;
    check.packed("sin", &op.sin, table)?;
    check.dtype("cos", &op.cos, &[DType::F32])?;
    check.dtype("sin", &op.sin, &[DType::F32])?;
});

/// Keys taken together in the running softmax; part of the contract, because it fixes the order
/// of summation and so makes training, prefill and decoding agree bit for bit.
pub const KEY_TILE: usize = 64;

/// Causal attention within each packed document: row i attends to rows of its own document up to
/// itself. `out = softmax(scale * q k^T) v`, `lse = log(sum(exp(scale * q k^T)))`.
/// Query head h reads key head `h / (heads / kv_heads)`.
///
/// Shapes    q [rows, heads, qk_width]; k [rows, kv_heads, qk_width]; v [rows, kv_heads,
///           v_width]; documents [capacity]; out [rows, heads, v_width]; lse [rows, heads]
/// Dtypes    q, k, v, out: f32, bf16 or f16, equal; documents i32; lse f32
/// Writes    out, lse
/// Numerics  `documents` holds ascending starts: 0, ..., rows, padded by repeating rows. Keys are
///           taken in tiles of [`KEY_TILE`] counted from the document's start, with a running
///           maximum and sum in f32; probabilities may be rounded to the dtype before they meet v
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Attention {
    /// Queries.
    pub q: View,
    /// Keys.
    pub k: View,
    /// Values.
    pub v: View,
    /// Cumulative document starts.
    pub documents: View,
    /// Factor on the scores.
    pub scale: f32,
    /// Result.
    pub out: View,
    /// Logarithm of each row's sum of exponentials.
    pub lse: View,
}
contract!(Attention |op, check| {
    q: Read, k: Read, v: Read, documents: Read, out: Write, lse: Write,
} {
    let [rows, heads, _, _, v_width] = heads_agree(&check, &op.q, &op.k, &op.v)?;
    check.rank("documents", &op.documents, 1)?;
    check.dtype("documents", &op.documents, &[DType::I32])?;
    check.that(op.documents.dim(0) >= 2, || "documents should hold at least 0 and rows".into())?;
    check.tensor("out", &op.out, op.q.dtype, [rows, heads, v_width])?;
    check.tensor("lse", &op.lse, DType::F32, [rows, heads])?;
});

/// The checks that forward and backward share; gives rows, heads, kv_heads, qk_width, v_width.
fn heads_agree(
    check: &crate::check::Check,
    q: &View,
    k: &View,
    v: &View,
) -> Result<[usize; 5], crate::error::OpError> {
    for (name, view) in [("q", q), ("k", k), ("v", v)] {
        check.rank(name, view, 3)?;
        check.dense_rows(name, view)?;
        check.dtype(name, view, &DType::FLOATS)?;
        check.dtype(name, view, &[q.dtype])?;
    }
    let (rows, heads, qk_width) = (q.dim(0), q.dim(1), q.dim(2));
    let (kv_heads, v_width) = (k.dim(1), v.dim(2));
    check.that(kv_heads > 0 && heads % kv_heads == 0, || {
        format!("{heads} query heads should be a multiple of {kv_heads} key heads")
    })?;
    check.shape("k", k, [rows, kv_heads, qk_width])?;
    check.shape("v", v, [rows, kv_heads, v_width])?;
    Ok([rows, heads, kv_heads, qk_width, v_width])
}

/// Gradient of [`Attention`]. With `p = exp(scale * q k^T - lse)`, `delta = sum(dout * out)`:
/// `dv = p^T dout`, `ds = p * (dout v^T - delta)`, `dq = scale * ds k`, `dk = scale * ds^T q`.
///
/// Shapes    as [`Attention`]; dout as out; dq, dk, dv as q, k, v
/// Dtypes    all tensors equal floats; lse f32; documents i32
/// Writes    dq, dk, dv overwritten
/// Numerics  sums over query heads of one key head, then over rows, in a fixed order in f32;
///           p and ds may be rounded to the dtype before they meet a product
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttentionBwd {
    /// Queries.
    pub q: View,
    /// Keys.
    pub k: View,
    /// Values.
    pub v: View,
    /// Cumulative document starts.
    pub documents: View,
    /// Factor on the scores.
    pub scale: f32,
    /// The forward's result.
    pub out: View,
    /// The forward's log-sums.
    pub lse: View,
    /// Gradient of the result.
    pub dout: View,
    /// Gradient of the queries.
    pub dq: View,
    /// Gradient of the keys.
    pub dk: View,
    /// Gradient of the values.
    pub dv: View,
}
contract!(AttentionBwd |op, check| {
    q: Read, k: Read, v: Read, documents: Read, out: Read, lse: Read, dout: Read,
    dq: Write, dk: Write, dv: Write,
} {
    let [rows, heads, kv_heads, qk_width, v_width] = heads_agree(&check, &op.q, &op.k, &op.v)?;
    check.rank("documents", &op.documents, 1)?;
    check.dtype("documents", &op.documents, &[DType::I32])?;
    check.tensor("out", &op.out, op.q.dtype, [rows, heads, v_width])?;
    check.tensor("dout", &op.dout, op.q.dtype, [rows, heads, v_width])?;
    check.tensor("lse", &op.lse, DType::F32, [rows, heads])?;
    check.tensor("dq", &op.dq, op.q.dtype, [rows, heads, qk_width])?;
    check.tensor("dk", &op.dk, op.q.dtype, [rows, kv_heads, qk_width])?;
    check.tensor("dv", &op.dv, op.q.dtype, [rows, kv_heads, v_width])?;
});

/// Causal attention of new rows to a paged cache that already holds their own keys and values.
///
/// Sequence s has query rows `queries[s]..queries[s+1]`, which are the last of its `lengths[s]`
/// cached positions; position p lies in block `blocks[s, p / block]`, slot `p % block`.
/// Rows outside every sequence are not touched.
///
/// Shapes    q [rows, heads, qk_width]; k_cache [blocks_count, block, kv_heads, qk_width];
///           v_cache [blocks_count, block, kv_heads, v_width]; blocks [sequences, blocks_max];
///           lengths [sequences]; queries [sequences + 1]; out [rows, heads, v_width]
/// Dtypes    q, caches, out: equal floats; blocks, lengths, queries i32
/// Writes    out
/// Numerics  bit for bit what [`Attention`] gives for the same row of the same sequence
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PagedAttention {
    /// Queries.
    pub q: View,
    /// Cached keys.
    pub k_cache: View,
    /// Cached values.
    pub v_cache: View,
    /// Each sequence's blocks in order of position.
    pub blocks: View,
    /// Cached positions of each sequence, the new ones included.
    pub lengths: View,
    /// Where each sequence's query rows begin, and where the last one's end.
    pub queries: View,
    /// Factor on the scores.
    pub scale: f32,
    /// Result.
    pub out: View,
}
contract!(PagedAttention |op, check| {
    q: Read, k_cache: Read, v_cache: Read, blocks: Read, lengths: Read, queries: Read, out: Write,
} {
    check.rank("q", &op.q, 3)?;
    check.rank("k_cache", &op.k_cache, 4)?;
    check.rank("v_cache", &op.v_cache, 4)?;
    check.rank("blocks", &op.blocks, 2)?;
    check.dtype("q", &op.q, &DType::FLOATS)?;
    check.dtype("k_cache", &op.k_cache, &[op.q.dtype])?;
    check.dtype("v_cache", &op.v_cache, &[op.q.dtype])?;
    check.dense_rows("q", &op.q)?;
    let (rows, heads, qk_width) = (op.q.dim(0), op.q.dim(1), op.q.dim(2));
    let (count, block, kv_heads) = (op.k_cache.dim(0), op.k_cache.dim(1), op.k_cache.dim(2));
    let v_width = op.v_cache.dim(3);
    check.that(kv_heads > 0 && heads % kv_heads == 0, || {
        format!("{heads} query heads should be a multiple of {kv_heads} key heads")
    })?;
    check.packed("k_cache", &op.k_cache, [count, block, kv_heads, qk_width])?;
    check.packed("v_cache", &op.v_cache, [count, block, kv_heads, v_width])?;
    let sequences = op.blocks.dim(0);
    check.packed("blocks", &op.blocks, [sequences, op.blocks.dim(1)])?;
    check.dtype("blocks", &op.blocks, &[DType::I32])?;
    check.tensor("lengths", &op.lengths, DType::I32, [sequences])?;
    check.tensor("queries", &op.queries, DType::I32, [sequences + 1])?;
    check.tensor("out", &op.out, op.q.dtype, [rows, heads, v_width])?;
});

/// Puts new keys and values into a paged cache: row r goes to slot `slots[r]`, counted over all
/// blocks; a negative or too large slot is skipped.
///
/// Shapes    k [rows, kv_heads, qk_width]; v [rows, kv_heads, v_width]; slots [rows]; caches as
///           in [`PagedAttention`]
/// Dtypes    k, v, caches: equal floats; slots i32
/// Writes    the named slots of k_cache and v_cache; the rest stays
/// Numerics  exact
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KvWrite {
    /// New keys.
    pub k: View,
    /// New values.
    pub v: View,
    /// Where each row goes.
    pub slots: View,
    /// Cached keys.
    pub k_cache: View,
    /// Cached values.
    pub v_cache: View,
}
contract!(KvWrite |op, check| {
    k: Read, v: Read, slots: Read, k_cache: ReadWrite, v_cache: ReadWrite,
} {
    check.rank("k", &op.k, 3)?;
    check.rank("k_cache", &op.k_cache, 4)?;
    check.rank("v_cache", &op.v_cache, 4)?;
    check.dtype("k", &op.k, &DType::FLOATS)?;
    check.dense_rows("k", &op.k)?;
    let (rows, kv_heads, qk_width) = (op.k.dim(0), op.k.dim(1), op.k.dim(2));
    let (count, block, v_width) = (op.k_cache.dim(0), op.k_cache.dim(1), op.v_cache.dim(3));
    check.tensor("v", &op.v, op.k.dtype, [rows, kv_heads, v_width])?;
    check.tensor("slots", &op.slots, DType::I32, [rows])?;
    check.dtype("k_cache", &op.k_cache, &[op.k.dtype])?;
    check.dtype("v_cache", &op.v_cache, &[op.k.dtype])?;
    check.packed("k_cache", &op.k_cache, [count, block, kv_heads, qk_width])?;
    check.packed("v_cache", &op.v_cache, [count, block, kv_heads, v_width])?;
});
