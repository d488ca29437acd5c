//! Rotary positions, attention and the paged cache, in f64.

use pontoon_ops::{self as ops, Direction, RopeStyle, View};

use super::{Expected, Want, exact, expected, near, wide};
use crate::memory::Memory;

pub(super) fn rope(op: &ops::Rope, memory: &Memory) -> Vec<Expected> {
    let [x, cos, sin] = [&op.x, &op.cos, &op.sin].map(|view| memory.read(view));
    let positions = memory.read_integers(&op.positions);
    let (heads, width, longest) = (op.x.dim(1), op.x.dim(2), op.cos.dim(0));
    let half = width / 2;
    let sign = if op.direction == Direction::Forward { 1.0 } else { -1.0 };
    let mut wants = vec![exact(f64::NAN); x.len()];
    for (index, x) in x.chunks(width).enumerate() {
        let position = positions[index / heads];
        if !(0..longest as i64).contains(&position) {
            continue;
        }
        for pair in 0..half {
            let (low, high) = match op.style {
                RopeStyle::HalfSplit => (pair, pair + half),
                RopeStyle::Interleaved => (2 * pair, 2 * pair + 1),
            };
            let at = position as usize * half + pair;
            let (u, w, c, s) = (x[low], x[high], cos[at], sign * sin[at]);
            wants[index * width + low] = near(u * c - w * s, (u * c).abs() + (w * s).abs());
            wants[index * width + high] = near(w * c + u * s, (w * c).abs() + (u * s).abs());
        }
    }
    vec![expected(&op.y, wants)]
}

/// One query's attention to its keys, in order.
struct Query {
    /// Each key's probability.
    p: Vec<f64>,
    lse: f64,
    /// The largest sum of absolute terms of a score.
    size: f64,
}

fn attend<'a>(q: &[f64], keys: impl Iterator<Item = &'a [f64]>, scale: f64) -> Query {
    let mut size: f64 = 0.0;
    let mut scores = Vec::new();
    for key in keys {
        let (score, terms) = super::linear::sum(q.iter().zip(key).map(|(q, k)| q * k * scale));
        size = size.max(terms);
        scores.push(score);
    }
    // A NaN must not hide behind the maximum.
    let peak = scores.iter().fold(f64::NEG_INFINITY, |a, &b| if b.is_nan() { b } else { a.max(b) });
    let total: f64 = scores.iter().map(|score| (score - peak).exp()).sum();
    let lse = peak + total.ln();
    Query { p: scores.iter().map(|score| (score - lse).exp()).collect(), lse, size }
}

fn mix<'a>(
    query: &Query,
    values: impl Iterator<Item = &'a [f64]> + Clone,
    width: usize,
) -> Vec<Want> {
    let column = |c: usize| {
        let terms = query.p.iter().zip(values.clone()).map(|(p, v)| p * v[c]);
        let (value, magnitude) = super::linear::sum(terms);
        Want::Near { value, magnitude, argument: magnitude * query.size }
    };
    (0..width).map(column).collect()
}

/// Where row `row`'s document begins.
fn document_of(documents: &[i64], row: usize) -> usize {
    documents.iter().rev().find(|&&start| start as usize <= row).map_or(0, |&start| start as usize)
}

pub(super) fn attention(op: &ops::Attention, memory: &Memory) -> Vec<Expected> {
    let [q, k, v] = [&op.q, &op.k, &op.v].map(|view| memory.read(view));
    let documents = memory.read_integers(&op.documents);
    let (rows, heads, width) = (op.q.dim(0), op.q.dim(1), op.q.dim(2));
    let (kv_heads, v_width) = (op.k.dim(1), op.v.dim(2));
    let (mut outs, mut lses) = (Vec::new(), Vec::new());
    for row in 0..rows {
        let first = document_of(&documents, row);
        for head in 0..heads {
            let kv = head / (heads / kv_heads);
            let key = |r: usize| &k[(r * kv_heads + kv) * width..][..width];
            let value = |r: usize| &v[(r * kv_heads + kv) * v_width..][..v_width];
            let own = &q[(row * heads + head) * width..][..width];
            let query = attend(own, (first..=row).map(key), wide(op.scale));
            outs.extend(mix(&query, (first..=row).map(value), v_width));
            lses.push(near(query.lse, query.size + query.lse.abs()));
        }
    }
    vec![expected(&op.out, outs), expected(&op.lse, lses)]
}

/// A gradient with the sizes of its terms.
struct Sums(Vec<[f64; 3]>);

impl Sums {
    fn of(view: &View) -> Self {
        Sums(vec![[0.0; 3]; view.elements()])
    }

    fn add(&mut self, at: usize, term: f64, size: f64, argument: f64) {
        let sum = &mut self.0[at];
        *sum = [sum[0] + term, sum[1] + size, sum[2] + argument];
    }

    fn expected(self, view: &View) -> Expected {
        let want =
            |[value, magnitude, argument]: [f64; 3]| Want::Near { value, magnitude, argument };
        expected(view, self.0.into_iter().map(want).collect())
    }
}

pub(super) fn attention_bwd(op: &ops::AttentionBwd, memory: &Memory) -> Vec<Expected> {
    let [q, k, v, out, dout] = [&op.q, &op.k, &op.v, &op.out, &op.dout].map(|v| memory.read(v));
    let lse = memory.read(&op.lse);
    let documents = memory.read_integers(&op.documents);
    let (heads, width) = (op.q.dim(1), op.q.dim(2));
    let (kv_heads, v_width) = (op.k.dim(1), op.v.dim(2));
    let scale = wide(op.scale);
    let (mut dq, mut dk, mut dv) = (Sums::of(&op.dq), Sums::of(&op.dk), Sums::of(&op.dv));
    for index in 0..lse.len() {
        let (row, kv) = (index / heads, index % heads / (heads / kv_heads));
        let own = &q[index * width..][..width];
        let (dout, out) = (&dout[index * v_width..][..v_width], &out[index * v_width..][..v_width]);
        let (delta, delta_size) = super::linear::sum(dout.iter().zip(out).map(|(d, o)| d * o));
        for other in document_of(&documents, row)..=row {
            let (key_at, value_at) =
                ((other * kv_heads + kv) * width, (other * kv_heads + kv) * v_width);
            let key = &k[key_at..][..width];
            let terms = own.iter().zip(key).map(|(q, k)| q * k * scale);
            let (score, size) = super::linear::sum(terms);
            let p = (score - lse[index]).exp();
            let size = size + lse[index].abs();
            let terms = dout.iter().zip(&v[value_at..]).map(|(d, v)| d * v);
            let (dp, dp_size) = super::linear::sum(terms);
            let (ds, ds_size) = (p * (dp - delta), p * (dp_size + delta_size));
            for (column, dout) in dout.iter().enumerate() {
                let term = p * dout;
                dv.add(value_at + column, term, term.abs(), term.abs() * size);
            }
            for column in 0..width {
                let (to_q, to_k) = (scale * key[column], scale * own[column]);
                let (q_size, k_size) = (to_q.abs() * ds_size, to_k.abs() * ds_size);
                dq.add(index * width + column, ds * to_q, q_size, q_size * size);
                dk.add(key_at + column, ds * to_k, k_size, k_size * size);
            }
        }
    }
    vec![dq.expected(&op.dq), dk.expected(&op.dk), dv.expected(&op.dv)]
}

pub(super) fn paged_attention(op: &ops::PagedAttention, memory: &Memory) -> Vec<Expected> {
    let [q, k, v] = [&op.q, &op.k_cache, &op.v_cache].map(|view| memory.read(view));
    let [blocks, lengths, queries] =
        [&op.blocks, &op.lengths, &op.queries].map(|view| memory.read_integers(view));
    let (heads, width) = (op.q.dim(1), op.q.dim(2));
    let (block, kv_heads) = (op.k_cache.dim(1), op.k_cache.dim(2));
    let (v_width, blocks_max) = (op.v_cache.dim(3), op.blocks.dim(1));
    let mut wants = vec![Want::Kept; op.out.elements()];
    for (sequence, &length) in lengths.iter().enumerate() {
        let (start, end) = (queries[sequence] as usize, queries[sequence + 1] as usize);
        for row in start..end {
            let last = length as usize - (end - row);
            for head in 0..heads {
                let kv = head / (heads / kv_heads);
                let slot = |position: usize| {
                    let number = blocks[sequence * blocks_max + position / block] as usize;
                    (number * block + position % block) * kv_heads + kv
                };
                let own = &q[(row * heads + head) * width..][..width];
                let keys = (0..=last).map(|p| &k[slot(p) * width..][..width]);
                let query = attend(own, keys, wide(op.scale));
                let values = (0..=last).map(|p| &v[slot(p) * v_width..][..v_width]);
                let at = (row * heads + head) * v_width;
                wants[at..at + v_width].copy_from_slice(&mix(&query, values, v_width));
            }
        }
    }
    vec![expected(&op.out, wants)]
}

pub(super) fn kv_write(op: &ops::KvWrite, memory: &Memory) -> Vec<Expected> {
    let slots = memory.read_integers(&op.slots);
    let place = |from: &View, cache: &View| {
        let rows = memory.read(from);
        let mut wants = vec![Want::Kept; cache.elements()];
        let width = from.dim(1) * from.dim(2);
        let count = cache.dim(0) * cache.dim(1);
        for (row, &slot) in slots.iter().enumerate() {
            if !(0..count as i64).contains(&slot) {
                continue;
            }
            for column in 0..width {
                wants[slot as usize * width + column] = exact(rows[row * width + column]);
            }
        }
        expected(cache, wants)
    };
    vec![place(&op.k, &op.k_cache), place(&op.v, &op.v_cache)]
}
