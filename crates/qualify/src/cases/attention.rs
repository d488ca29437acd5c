//! Positions, attention over documents, and the paged cache.

use pontoon_ops::{
    Attention, AttentionBwd, DType, Direction, KvWrite, PagedAttention, Rope, RopeStyle,
};

use super::{Case, Flavour, Maker};
use crate::reference::{Want, reference};

/// Rows, and where their documents begin: one token; several short ones; longer than a key tile.
const DOCUMENTS: [(usize, &[usize]); 3] =
    [(1, &[0, 1, 1]), (11, &[0, 1, 4, 9, 11, 11]), (150, &[0, 10, 140, 150])];
/// Query heads, key heads, and widths of keys and values.
const HEADS: [[usize; 4]; 2] = [[4, 2, 24, 16], [3, 3, 17, 33]];

pub(super) fn cases(maker: Maker) -> Vec<Case> {
    let mut cases = Vec::new();
    for (index, style) in [RopeStyle::HalfSplit, RopeStyle::Interleaved].into_iter().enumerate() {
        for (turn, direction) in [Direction::Forward, Direction::Backward].into_iter().enumerate() {
            let mut d = maker.start(7000 + 10 * index + turn);
            let x = d.floats(&[5, 3, 14]);
            let positions = d.given(DType::I32, &[5], &[0.0, 7.0, 3.0, 3.0, 8.0]);
            let (cos, sin) = (d.tame(DType::F32, &[9, 7], 0.7), d.tame(DType::F32, &[9, 7], 0.7));
            let y = if turn == 0 { d.poisoned(maker.dtype, &[5, 3, 14]) } else { x };
            let op = Rope { x, positions, cos, sin, style, direction, y };
            cases.push(d.done(format!("{style:?} {direction:?}"), op));
        }
    }
    // A score of ten thousand makes a softmax that f32 and f64 may well see otherwise.
    if maker.flavour == Flavour::Large {
        return cases;
    }
    for (index, (rows, starts)) in DOCUMENTS.into_iter().enumerate() {
        for (turn, [heads, kv_heads, width, v_width]) in HEADS.into_iter().enumerate() {
            let mut d = maker.start(7100 + 10 * index + turn);
            let dtype = maker.dtype;
            let q = d.floats(&[rows, heads, width]);
            let (k, v) = (d.floats(&[rows, kv_heads, width]), d.floats(&[rows, kv_heads, v_width]));
            let starts: Vec<f64> = starts.iter().map(|&start| start as f64).collect();
            let documents = d.given(DType::I32, &[starts.len()], &starts);
            let out = d.poisoned(dtype, &[rows, heads, v_width]);
            let lse = d.poisoned(DType::F32, &[rows, heads]);
            let scale = 1.0 / (width as f32).sqrt();
            let op = Attention { q, k, v, documents, scale, out, lse };
            let name = format!("{rows} rows, {heads} on {kv_heads} heads");
            let forward = d.done(name.clone(), op);
            if maker.flavour == Flavour::Plain {
                cases.push(backward(&forward, name));
            }
            cases.push(forward);
        }
    }
    cases.extend(paged(maker));
    cases
}

/// The gradient of a forward case, from the reference's results.
fn backward(forward: &Case, name: String) -> Case {
    let pontoon_ops::Op::Attention(op) = &forward.op else { unreachable!("made above") };
    let mut memory = forward.memory.clone();
    for expected in reference(&forward.op, &memory) {
        let value = |want: &Want| match want {
            Want::Near { value, .. } => *value,
            _ => 0.0,
        };
        let values: Vec<f64> = expected.wants.iter().map(value).collect();
        memory.write(&expected.view, &values);
    }
    let maker = Maker { seed: 1, dtype: forward.dtype, flavour: Flavour::Plain };
    let mut d = maker.start(7200);
    d.memory = memory;
    let dtype = forward.dtype;
    let dout = d.floats(op.out.dims());
    let (dq, dk) = (d.poisoned(dtype, op.q.dims()), d.poisoned(dtype, op.k.dims()));
    let dv = d.poisoned(dtype, op.v.dims());
    let Attention { q, k, v, documents, scale, out, lse } = op.clone();
    d.done(name, AttentionBwd { q, k, v, documents, scale, out, lse, dout, dq, dk, dv })
}

/// Two sequences on scattered blocks, one of them decoding, and an unused one.
fn paged(maker: Maker) -> Vec<Case> {
    let dtype = maker.dtype;
    let (heads, kv_heads, width, v_width) = (4, 2, 24, 16);
    let (blocks, block, rows) = (40, 4, 6);
    let mut d = maker.start(7300);
    let k = d.floats(&[rows, kv_heads, width]);
    let v = d.floats(&[rows, kv_heads, v_width]);
    let slots = d.given(DType::I32, &[rows], &[5.0, -1.0, 0.0, 159.0, 77.0, 160.0]);
    let k_cache = d.tame(dtype, &[blocks, block, kv_heads, width], 1.0);
    let v_cache = d.tame(dtype, &[blocks, block, kv_heads, v_width], 1.0);
    let write = d.done("scattered, with unused rows", KvWrite { k, v, slots, k_cache, v_cache });
    let mut d = maker.start(7301);
    let q = d.floats(&[rows, heads, width]);
    let k_cache = d.tame(dtype, &[blocks, block, kv_heads, width], 1.0);
    let v_cache = d.tame(dtype, &[blocks, block, kv_heads, v_width], 1.0);
    // 70 tokens need 18 blocks, which is more than one tile of keys.
    let list: Vec<f64> = (0..3 * 18).map(|index| f64::from((index * 7 + 3) % 40)).collect();
    let table = d.given(DType::I32, &[3, 18], &list);
    let lengths = d.given(DType::I32, &[3], &[9.0, 70.0, 0.0]);
    let queries = d.given(DType::I32, &[4], &[0.0, 5.0, 6.0, 6.0]);
    let out = d.poisoned(dtype, &[rows, heads, v_width]);
    let scale = 0.2;
    let op = PagedAttention { q, k_cache, v_cache, blocks: table, lengths, queries, scale, out };
    vec![write, d.done("a chunk, a single query and an empty sequence", op)]
}
