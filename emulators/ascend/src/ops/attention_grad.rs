//! The gradient of attention over packed sequences.
//!
//! A task owns one key head of one sequence and adds up its query heads and blocks of rows in
//! order, so sums never depend on chance. Probabilities are computed again from the scores.

use pontoon_cpu::gemm::{Layout, Store};
use pontoon_cpu::simd::{Isa, Kernel, Simd, dispatch};

use super::attention::{
    Attributes, Geometry, Hands, Inputs, KEY_TILE, QUERY_ROWS, Rows, Small, check_mask, first_seen,
    geometry, read_inputs, with_hands,
};
use super::product::Rounded;
use super::strided::{load_floats, store_floats};
use super::{Bound, Run};
use crate::dtype::DataType;
use crate::failure::Done;
use crate::fault::Kind;
use crate::plan::{Argument, Plan, Slot};

/// What the forward pass left, and the gradient of its result.
pub struct Kept<'a> {
    /// Gradient of the result.
    pub dy: &'a Argument,
    /// Each row's maximum.
    pub peak: &'a Argument,
    /// Each row's sum.
    pub sum: &'a Argument,
    /// The result.
    pub out: &'a Argument,
}

/// The gradients of the inputs.
pub struct Gradients<'a> {
    /// Of the queries.
    pub dq: &'a Argument,
    /// Of the keys.
    pub dk: &'a Argument,
    /// Of the values.
    pub dv: &'a Argument,
}

/// Plans the gradient.
pub fn attention_grad(
    plan: &mut Plan,
    inputs: Inputs<'_>,
    (kept, attributes): (&Kept<'_>, &Attributes),
    gradients: &Gradients<'_>,
) -> Done {
    let geometry = geometry(plan, inputs, attributes)?;
    let rows = inputs.q.tensor.shape[0];
    let Geometry { heads, v_width, .. } = geometry;
    for argument in [kept.dy, kept.out] {
        plan.demand(argument.tensor.shape == [rows, heads, v_width], || {
            format!("dy and attentionIn should be [{rows}, {heads}, {v_width}]")
        })?;
    }
    for argument in [kept.peak, kept.sum] {
        let tensor = &argument.tensor;
        plan.demand(tensor.dtype == DataType::F32 && tensor.shape == [rows, heads, 8], || {
            format!("softmaxMax and softmaxSum should be f32 [{rows}, {heads}, 8]")
        })?;
    }
    let pairs = [(inputs.q, gradients.dq), (inputs.k, gradients.dk), (inputs.v, gradients.dv)];
    for (input, gradient) in pairs {
        let (from, to) = (&input.tensor, &gradient.tensor);
        let fits = from.shape == to.shape && from.dtype == to.dtype;
        plan.demand(fits && to.span() == to.elements(), || {
            "gradients should be as their inputs and contiguous".to_owned()
        })?;
    }
    plan.workspace(rows.max(1) * 64);
    let [q, k, v] = read_inputs(plan, inputs);
    let inputs_read = [q, k, v, plan.read("dy", kept.dy), plan.read("attentionIn", kept.out)];
    // The order of the interface counts for addresses, not the order of reading.
    let mask = plan.read_if("attenMask", inputs.mask);
    let softmax = [plan.read("softmaxMax", kept.peak), plan.read("softmaxSum", kept.sum)];
    let outputs = [
        plan.write("dq", gradients.dq),
        plan.write("dk", gradients.dk),
        plan.write("dv", gradients.dv),
    ];
    plan.order([0, 1, 2, 3].into_iter().chain(mask.map(|mask| mask.0)).chain([
        softmax[0].0,
        softmax[1].0,
        4,
        outputs[0].0,
        outputs[1].0,
        outputs[2].0,
    ]));
    plan.run(move |run| {
        check_mask(run, mask)?;
        backward(run, inputs_read, (softmax, outputs), &geometry)
    })
}

/// Everything one task reads and writes.
struct Task<'a> {
    geometry: &'a Geometry,
    bounds: [usize; 4],
    kv_head: usize,
    dtype: DataType,
    isa: Isa,
    extra: usize,
}

/// The operands of all tasks.
struct Operands<'a> {
    q: (pontoon_cpu::gemm::Data<'a>, &'a Bound),
    k: (pontoon_cpu::gemm::Data<'a>, &'a Bound),
    v: (pontoon_cpu::gemm::Data<'a>, &'a Bound),
    dy: (pontoon_cpu::gemm::Data<'a>, &'a Bound),
    out: &'a Bound,
    peak: &'a Bound,
    sum: &'a Bound,
}

fn backward(
    run: &mut Run<'_>,
    [q, k, v, dy, out]: [Slot; 5],
    ([peak, sum], outputs): ([Slot; 2], [Slot; 3]),
    geometry: &Geometry,
) -> Done {
    let (isa, pool, rounding) = (run.engine.isa, run.engine.pool, run.rounding());
    let extra = usize::from(run.has(Kind::CausalEdge));
    let wobble = run.wobbles();
    let pair = |slot: Slot| -> Done<_> { Ok((run.data(slot)?, run.at(slot))) };
    let operands = Operands {
        q: pair(q)?,
        k: pair(k)?,
        v: pair(v)?,
        dy: pair(dy)?,
        out: run.at(out),
        peak: run.at(peak),
        sum: run.at(sum),
    };
    let [dq, dk, dv] = outputs.map(|slot| run.at(slot));
    let count = geometry.sequences.len() * geometry.kv_heads;
    pool.run(count, |index| {
        let task = Task {
            geometry,
            bounds: geometry.sequences[index / geometry.kv_heads],
            kv_head: index % geometry.kv_heads,
            dtype: operands.q.1.dtype(),
            isa,
            extra,
        };
        let [_, _, k_start, k_end] = task.bounds;
        let keys = k_end - k_start;
        let (width, v_width) = (geometry.width, geometry.v_width);
        let (mut key_sums, mut value_sums) = (vec![0.0; keys * width], vec![0.0; keys * v_width]);
        with_hands(pool, isa, |hands| {
            task.run(hands, &operands, (&mut key_sums, &mut value_sums), |at, row| {
                store_floats(isa, dq, at * width, 1, row, rounding);
            });
        });
        if wobble {
            key_sums.iter_mut().for_each(|x| *x *= 1.0 + f32::EPSILON);
        }
        for key in 0..keys {
            let at = (k_start + key) * geometry.kv_heads + task.kv_head;
            let line = &mut key_sums[key * width..][..width];
            line.iter_mut().for_each(|x| *x *= geometry.scale);
            store_floats(isa, dk, at * width, 1, line, rounding);
            let line = &value_sums[key * v_width..][..v_width];
            store_floats(isa, dv, at * v_width, 1, line, rounding);
        }
    });
    Ok(())
}

/// A block of query rows of one head, against the keys from `start` on.
struct Block<'a> {
    q: Rows<'a>,
    k: Rows<'a>,
    v: Rows<'a>,
    dy: Rows<'a>,
    rows: usize,
    keys: usize,
    /// Keys of the tile that the first row sees.
    visible: usize,
    causal: bool,
    /// Per row: maximum, sum, and the product of result and gradient.
    softmax: &'a [[f32; 3]],
}

/// Turns a row of scores and of gradients of probabilities into probabilities and gradients of
/// scores; tells whether a hidden one was infinite or NaN, as one is wherever an operand was.
struct Row<'a> {
    scores: &'a mut [f32],
    grads: &'a mut [f32],
    visible: usize,
    scale: f32,
    softmax: [f32; 3],
}

impl Kernel for Row<'_> {
    type Output = bool;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> bool {
        let [peak, sum, delta] = self.softmax;
        let (peak, delta) = (simd.splat(peak), simd.splat(delta));
        let (scale, part) = (simd.splat(self.scale), simd.splat(1.0 / sum));
        let (seen, hidden) = self.scores.split_at_mut(self.visible);
        let (seen_grads, hidden_grads) = self.grads.split_at_mut(self.visible);
        let mut nothing = simd.zero();
        for (scores, grads) in hidden.chunks(S::LANES).zip(hidden_grads.chunks(S::LANES)) {
            // A number minus itself is zero unless it is infinite or NaN.
            let (score, grad) = (simd.load(scores), simd.load(grads));
            nothing = simd.add(nothing, simd.add(simd.sub(score, score), simd.sub(grad, grad)));
        }
        hidden.fill(0.0);
        hidden_grads.fill(0.0);
        for (scores, grads) in seen.chunks_mut(S::LANES).zip(seen_grads.chunks_mut(S::LANES)) {
            let shifted = simd.sub(simd.mul(simd.load(scores), scale), peak);
            let p = simd.mul(simd.exp(shifted), part);
            let ds = simd.mul(p, simd.sub(simd.load(grads), delta));
            simd.store(p, scores);
            simd.store(ds, grads);
        }
        simd.reduce_sum(nothing) != 0.0
    }
}

/// Working memory of a task.
struct Memory {
    scores: Vec<f32>,
    grads: Vec<f32>,
    p: Rounded,
    ds: Rounded,
}

impl Task<'_> {
    /// Runs all query heads of the key head; `finish(row, gradient)` takes the queries' gradients.
    fn run(
        &self,
        hands: &mut Hands<'_>,
        operands: &Operands<'_>,
        (key_sums, value_sums): (&mut [f32], &mut [f32]),
        mut finish: impl FnMut(usize, &[f32]),
    ) {
        let Geometry { heads, kv_heads, width, .. } = *self.geometry;
        let [q_start, q_end, _, _] = self.bounds;
        let mut memory = Memory {
            scores: vec![0.0; QUERY_ROWS * KEY_TILE],
            grads: vec![0.0; QUERY_ROWS * KEY_TILE],
            p: Rounded::new(self.dtype, QUERY_ROWS * KEY_TILE),
            ds: Rounded::new(self.dtype, QUERY_ROWS * KEY_TILE),
        };
        let group = heads / kv_heads;
        for head in self.kv_head * group..(self.kv_head + 1) * group {
            for first in (0..q_end - q_start).step_by(QUERY_ROWS) {
                let rows = QUERY_ROWS.min(q_end - q_start - first);
                let mut dq = vec![0.0; rows * width];
                let place = (head, first, rows);
                self.block(hands, operands, place, (&mut dq, key_sums, value_sums), &mut memory);
                for (index, row) in dq.chunks_mut(width).enumerate() {
                    row.iter_mut().for_each(|x| *x *= self.geometry.scale);
                    finish((q_start + first + index) * heads + head, row);
                }
            }
        }
    }

    /// One block of query rows against all of its keys.
    fn block(
        &self,
        hands: &mut Hands<'_>,
        operands: &Operands<'_>,
        (head, first, rows): (usize, usize, usize),
        (dq, key_sums, value_sums): (&mut [f32], &mut [f32], &mut [f32]),
        memory: &mut Memory,
    ) {
        let Geometry { width, v_width, .. } = *self.geometry;
        let [q_start, _, k_start, k_end] = self.bounds;
        let (seen, causal) = first_seen(self.geometry, self.bounds);
        let (row, seen, all) = (q_start + first, seen + first + self.extra, k_end - k_start);
        let softmax = self.softmax(operands, (head, row, rows));
        let end = if causal { (seen + rows - 1).min(all) } else { all };
        let (k, v) = (operands.k, operands.v);
        for start in (0..end).step_by(KEY_TILE) {
            let keys = KEY_TILE.min(end - start);
            let block = Block {
                q: Rows::of(operands.q.0, operands.q.1, row, head),
                k: Rows::of(k.0, k.1, k_start + start, self.kv_head),
                v: Rows::of(v.0, v.1, k_start + start, self.kv_head),
                dy: Rows::of(operands.dy.0, operands.dy.1, row, head),
                rows,
                keys,
                visible: seen.saturating_sub(start).min(keys),
                causal,
                softmax: &softmax,
            };
            let sums = (
                &mut *dq,
                &mut key_sums[start * width..][..keys * width],
                &mut value_sums[start * v_width..][..keys * v_width],
            );
            if self.probabilities(hands, &block, memory) {
                self.rows_apart(hands, &block, (seen, start), sums, memory);
            } else {
                self.add_up(hands, &block, sums, memory);
            }
        }
    }

    /// Row by row with the keys each row sees: a product with zero would not hide NaN.
    fn rows_apart(
        &self,
        hands: &mut Hands<'_>,
        block: &Block<'_>,
        (seen, start): (usize, usize),
        (dq, key_sums, value_sums): (&mut [f32], &mut [f32], &mut [f32]),
        memory: &mut Memory,
    ) {
        let Geometry { width, v_width, .. } = *self.geometry;
        for row in 0..block.rows {
            let keys = (seen + row).saturating_sub(start).min(block.keys);
            if keys == 0 {
                continue;
            }
            let one = Block {
                q: block.q.skip(row),
                k: block.k,
                v: block.v,
                dy: block.dy.skip(row),
                rows: 1,
                keys,
                visible: keys,
                causal: block.causal,
                softmax: &block.softmax[row..=row],
            };
            let sums = (
                &mut dq[row * width..][..width],
                &mut key_sums[..keys * width],
                &mut value_sums[..keys * v_width],
            );
            // All of its keys are seen, so nothing is hidden.
            self.probabilities(hands, &one, memory);
            self.add_up(hands, &one, sums, memory);
        }
    }

    /// Maximum, sum, and the product of result and gradient of each row.
    fn softmax(
        &self,
        operands: &Operands<'_>,
        (head, row, rows): (usize, usize, usize),
    ) -> Vec<[f32; 3]> {
        let v_width = self.geometry.v_width;
        let at = |bound: &Bound, row: usize| {
            let strides = &bound.tensor.strides;
            row * strides[0] + head * strides[1]
        };
        let (mut out, mut dy) = (vec![0.0; v_width], vec![0.0; v_width]);
        let mut number = [0.0];
        let mut one = |row: usize| {
            load_floats(self.isa, operands.out, at(operands.out, row), 1, &mut out);
            load_floats(self.isa, operands.dy.1, at(operands.dy.1, row), 1, &mut dy);
            let delta = dispatch(self.isa, super::norm::Dot(&out, &dy));
            let mut first = |bound: &Bound| {
                load_floats(self.isa, bound, at(bound, row), 1, &mut number);
                number[0]
            };
            [first(operands.peak), first(operands.sum), delta]
        };
        (row..row + rows).map(&mut one).collect()
    }

    /// Computes probabilities and the gradients of scores; tells whether something hidden is
    /// infinite or NaN, which then must not meet a product.
    fn probabilities(&self, hands: &mut Hands<'_>, block: &Block<'_>, memory: &mut Memory) -> bool {
        let Geometry { width, v_width, .. } = *self.geometry;
        let Block { rows, keys, .. } = *block;
        let Memory { scores, grads, p, ds } = memory;
        let mut product = |extents, a, b, c: &mut [f32]| {
            let (layout, store) = (Layout::Nt, Store::Overwrite);
            hands.multiply(Small { layout, extents, a, b, c: (c, KEY_TILE), store });
        };
        product((rows, keys, width), block.q, block.k, scores);
        product((rows, keys, v_width), block.dy, block.v, grads);
        let mut strays = false;
        for row in 0..rows {
            let step = Row {
                scores: &mut scores[row * KEY_TILE..][..keys],
                grads: &mut grads[row * KEY_TILE..][..keys],
                visible: if block.causal { (block.visible + row).min(keys) } else { keys },
                scale: self.geometry.scale,
                softmax: block.softmax[row],
            };
            strays |= dispatch(self.isa, step);
        }
        p.round(self.isa, &scores[..rows * KEY_TILE]);
        ds.round(self.isa, &grads[..rows * KEY_TILE]);
        strays
    }

    /// Adds a block's share to the gradients.
    fn add_up(
        &self,
        hands: &mut Hands<'_>,
        block: &Block<'_>,
        (dq, key_sums, value_sums): (&mut [f32], &mut [f32], &mut [f32]),
        memory: &Memory,
    ) {
        let Geometry { width, v_width, .. } = *self.geometry;
        let Block { rows, keys, .. } = *block;
        let Memory { p, ds, .. } = memory;
        let mut product = |layout, extents, a, b, c: (&mut [f32], usize), store| {
            hands.multiply(Small { layout, extents, a, b, c, store });
        };
        let (p, ds) =
            (Rows { data: p.data(), stride: KEY_TILE }, Rows { data: ds.data(), stride: KEY_TILE });
        let add = Store::Accumulate;
        product(Layout::Tn, (keys, v_width, rows), p, block.dy, (value_sums, v_width), add);
        product(Layout::Tn, (keys, width, rows), ds, block.q, (key_sums, width), add);
        product(Layout::Nn, (rows, width, keys), ds, block.k, (dq, width), add);
    }
}
