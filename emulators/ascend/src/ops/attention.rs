//! Attention over packed sequences, in tiles of keys with a running softmax.
//!
//! A task owns one head of one block of query rows. A row's bits depend on its query, on its keys
//! and on their order alone: tiles are counted from a sequence's first key, and every product's
//! element is a chain of its own.

use std::cell::RefCell;

use pontoon_cpu::gemm::{Data, DataMut, GemmArgs, Layout, Matrix, MatrixMut, Store, gemm};
use pontoon_cpu::pool::Pool;
use pontoon_cpu::scratch::Scratch;
use pontoon_cpu::simd::{Element, Isa, Kernel, Simd, dispatch};

use super::product::Rounded;
use super::strided::{Rounding, store_floats};
use super::{Bound, Run};
use crate::dtype::DataType;
use crate::failure::{Done, Failure};
use crate::fault::Kind;
use crate::plan::{Argument, Plan, Slot};

/// Query rows of a task.
pub const QUERY_ROWS: usize = 128;
/// Keys of a tile.
pub const KEY_TILE: usize = 256;
/// How often the maximum and the sum of a row stand in their tensors.
const REPEATS: usize = 8;

/// Which keys a row sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    /// All of its sequence's.
    None,
    /// Those up to itself, first query aligned with first key (sparse mode 2).
    FromStart,
    /// Those up to itself, last query aligned with last key (sparse mode 3).
    FromEnd,
}

/// What the call passes besides tensors.
pub struct Attributes {
    /// Ends of the sequences among queries.
    pub q_ends: Vec<i64>,
    /// Ends of the sequences among keys.
    pub k_ends: Vec<i64>,
    /// Factor on scores.
    pub scale: f64,
    /// Share of probabilities kept: dropout is not emulated.
    pub keep: f64,
    /// Heads of the query.
    pub heads: i64,
    /// Layout of the tensors.
    pub layout: String,
    /// Which keys a row sees, as a number.
    pub sparse: i64,
}

/// One packed batch.
#[derive(Clone)]
pub struct Geometry {
    /// Query heads.
    pub heads: usize,
    /// Key heads.
    pub kv_heads: usize,
    /// Elements of a query and a key.
    pub width: usize,
    /// Elements of a value.
    pub v_width: usize,
    /// Each sequence's first and last query and key.
    pub sequences: Vec<[usize; 4]>,
    /// Which keys a row sees.
    pub mask: Mask,
    /// Factor on scores.
    pub scale: f32,
}

/// The three inputs.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// Queries.
    pub q: &'a Argument,
    /// Keys.
    pub k: &'a Argument,
    /// Values.
    pub v: &'a Argument,
    /// The compressed mask.
    pub mask: Option<&'a Argument>,
}

/// Checks what was passed as the vendor's documents say.
pub fn geometry(plan: &Plan, inputs: Inputs<'_>, attributes: &Attributes) -> Done<Geometry> {
    let Inputs { q, k, v, mask } = inputs;
    plan.demand(attributes.layout == "TND", || {
        format!("layout {} is not emulated for sequences of varying length", attributes.layout)
    })?;
    plan.demand(attributes.keep == 1.0, || "dropout is not emulated".to_owned())?;
    let shapes = [q, k, v].map(|argument| argument.tensor.shape.as_slice());
    let ([q_rows, heads, width], [k_rows, kv_heads, k_width], [v_rows, v_heads, v_width]) = (
        <[usize; 3]>::try_from(shapes[0]).or_else(|_| rank_error(plan, shapes[0]))?,
        <[usize; 3]>::try_from(shapes[1]).or_else(|_| rank_error(plan, shapes[1]))?,
        <[usize; 3]>::try_from(shapes[2]).or_else(|_| rank_error(plan, shapes[2]))?,
    );
    let fits = k_width == width
        && v_rows == k_rows
        && v_heads == kv_heads
        && v_width <= width
        && width <= 768
        && kv_heads > 0
        && heads % kv_heads == 0
        && heads as i64 == attributes.heads;
    plan.demand(fits, || format!("q, k, v of {shapes:?} with {} heads", attributes.heads))?;
    let dtype = q.tensor.dtype;
    for argument in [q, k, v] {
        plan.demand(argument.tensor.dtype == dtype && dtype.is_float(), || {
            format!("q, k, v should be equal floats but one is {:?}", argument.tensor.dtype)
        })?;
        plan.demand(argument.tensor.strides[2] == 1 || argument.tensor.shape[2] == 1, || {
            "heads should be dense".to_owned()
        })?;
    }
    let mask_kind = mask_of(plan, attributes.sparse, mask)?;
    let ends = (attributes.q_ends.as_slice(), attributes.k_ends.as_slice());
    let sequences = sequences(plan, ends, (q_rows, k_rows))?;
    let scale = attributes.scale as f32;
    Ok(Geometry { heads, kv_heads, width, v_width, sequences, mask: mask_kind, scale })
}

fn rank_error(plan: &Plan, shape: &[usize]) -> Done<[usize; 3]> {
    plan.forbid(format!("layout TND has three dimensions, not {shape:?}"))
}

fn mask_of(plan: &Plan, sparse: i64, mask: Option<&Argument>) -> Done<Mask> {
    let kind = match sparse {
        0 if mask.is_none() => Mask::None,
        2 => Mask::FromStart,
        3 => Mask::FromEnd,
        _ => return plan.forbid(format!("sparse mode {sparse} is not emulated")),
    };
    if kind != Mask::None {
        let compressed = mask.is_some_and(|mask| {
            mask.tensor.shape == [2048, 2048]
                && matches!(mask.tensor.dtype, DataType::Bool | DataType::U8)
        });
        plan.demand(compressed, || {
            format!("sparse mode {sparse} wants the compressed mask of 2048 x 2048 bools")
        })?;
    }
    Ok(kind)
}

fn sequences(
    plan: &Plan,
    (q_ends, k_ends): (&[i64], &[i64]),
    (q_rows, k_rows): (usize, usize),
) -> Done<Vec<[usize; 4]>> {
    let rises = |ends: &[i64], rows: usize| {
        ends.windows(2).all(|pair| pair[0] <= pair[1])
            && ends.first().is_none_or(|&first| first >= 0)
            && ends.last().is_some_and(|&last| last as usize == rows)
    };
    let fits = q_ends.len() == k_ends.len() && rises(q_ends, q_rows) && rises(k_ends, k_rows);
    plan.demand(fits, || {
        format!("ends {q_ends:?} and {k_ends:?} should rise to {q_rows} and {k_rows}")
    })?;
    let start = |ends: &[i64], index: usize| index.checked_sub(1).map_or(0, |i| ends[i] as usize);
    let sequence = |index: usize| {
        let (q, k) = (q_ends[index] as usize, k_ends[index] as usize);
        [start(q_ends, index), q, start(k_ends, index), k]
    };
    Ok((0..q_ends.len()).map(sequence).collect())
}

/// Rows of one head.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// Elements from the first one on.
    pub data: Data<'a>,
    /// Elements from one row to the next.
    pub stride: usize,
}

impl<'a> Rows<'a> {
    /// The rows of a head from `row` on.
    pub fn of(data: Data<'a>, bound: &Bound, row: usize, head: usize) -> Rows<'a> {
        let strides = &bound.tensor.strides;
        let at = (row * strides[0] + head * strides[1]).min(data.len());
        Rows { data: data.from(at), stride: strides[0].max(bound.shape()[2]) }
    }

    /// The rows from `row` on.
    pub fn skip(self, row: usize) -> Rows<'a> {
        let at = (row * self.stride).min(self.data.len());
        Rows { data: self.data.from(at), ..self }
    }

    fn matrix(self) -> Matrix<'a> {
        Matrix { data: self.data, row_stride: self.stride }
    }

    /// Whether some of its elements are infinite or NaN.
    fn has_strays(self, isa: Isa, rows: usize, width: usize) -> bool {
        (0..rows).any(|row| {
            let part = row * self.stride..row * self.stride + width;
            match self.data {
                Data::F32(data) => dispatch(isa, Strays(&data[part])),
                Data::Bf16(data) => dispatch(isa, Strays(&data[part])),
                Data::F16(data) => dispatch(isa, Strays(&data[part])),
            }
        })
    }
}

/// Whether some of a row's elements are infinite or NaN.
struct Strays<'a, T>(&'a [T]);

impl<T: Element> Kernel for Strays<'_, T> {
    type Output = bool;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> bool {
        let mut nothing = simd.zero();
        for chunk in self.0.chunks(S::LANES) {
            let value = T::load(simd, chunk);
            // A number minus itself is zero unless it is infinite or NaN.
            nothing = simd.add(nothing, simd.sub(value, value));
        }
        simd.reduce_sum(nothing) != 0.0
    }
}

/// A product within a task.
pub struct Small<'a> {
    /// Which operand is transposed.
    pub layout: Layout,
    /// Rows, columns, terms.
    pub extents: (usize, usize, usize),
    /// Left operand.
    pub a: Rows<'a>,
    /// Right operand.
    pub b: Rows<'a>,
    /// Result and elements from one of its rows to the next.
    pub c: (&'a mut [f32], usize),
    /// What happens to the old contents.
    pub store: Store,
}

/// What a task's products run on.
pub struct Hands<'a> {
    /// Threads: within a task a product runs on its own thread.
    pub pool: &'a Pool,
    /// Instruction set.
    pub isa: Isa,
    /// Working memory.
    pub scratch: &'a mut Scratch,
}

impl Hands<'_> {
    /// Computes a product.
    pub fn multiply(&mut self, small: Small<'_>) {
        let (m, n, k) = small.extents;
        let c = MatrixMut { data: DataMut::F32(small.c.0), row_stride: small.c.1 };
        let args = GemmArgs {
            layout: small.layout,
            m,
            n,
            k,
            a: small.a.matrix(),
            b: small.b.matrix(),
            bias: None,
            c,
            store: small.store,
        };
        gemm(self.pool, self.isa, self.scratch, args);
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Lends a task its thread's working memory.
pub fn with_hands<R>(pool: &Pool, isa: Isa, work: impl FnOnce(&mut Hands<'_>) -> R) -> R {
    SCRATCH.with_borrow_mut(|scratch| work(&mut Hands { pool, isa, scratch }))
}

/// One row's step of the running softmax: scores become probabilities under the new maximum.
struct Soften<'a> {
    scores: &'a mut [f32],
    visible: usize,
    scale: f32,
    peak: f32,
}

impl Kernel for Soften<'_> {
    /// The new maximum and the sum.
    type Output = (f32, f32);
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> (f32, f32) {
        let (seen, hidden) = self.scores.split_at_mut(self.visible);
        hidden.fill(0.0);
        let scale = simd.splat(self.scale);
        let mut best = simd.splat(self.peak);
        let mut most = self.peak;
        for chunk in seen.chunks_mut(S::LANES) {
            let value = simd.mul(simd.load(chunk), scale);
            simd.store(value, chunk);
            if chunk.len() == S::LANES {
                best = simd.max(value, best);
            } else {
                most = chunk.iter().fold(most, |most, &value| most.max(value));
            }
        }
        most = most.max(simd.reduce_max(best));
        let shift = simd.splat(if most == f32::NEG_INFINITY { 0.0 } else { most });
        let mut sum = simd.zero();
        for chunk in seen.chunks_mut(S::LANES) {
            let value = simd.exp(simd.sub(simd.load(chunk), shift));
            simd.store(value, chunk);
            sum = simd.add(sum, simd.load(chunk));
        }
        (most, simd.reduce_sum(sum))
    }
}

/// The results of attention.
pub struct Results<'a> {
    /// Each row's maximum, eight times.
    pub peak: &'a Argument,
    /// Each row's sum, eight times.
    pub sum: &'a Argument,
    /// The result.
    pub out: &'a Argument,
}

/// Attention over packed sequences.
pub fn attention(
    plan: &mut Plan,
    inputs: Inputs<'_>,
    attributes: &Attributes,
    results: &Results<'_>,
) -> Done {
    let geometry = geometry(plan, inputs, attributes)?;
    let rows = inputs.q.tensor.shape[0];
    let Geometry { heads, v_width, .. } = geometry;
    for softmax in [results.peak, results.sum] {
        let tensor = &softmax.tensor;
        let fits = tensor.shape == [rows, heads, REPEATS] && tensor.dtype == DataType::F32;
        plan.demand(fits && tensor.span() == tensor.elements(), || {
            format!("softmaxMax and softmaxSum should be f32 [{rows}, {heads}, 8]")
        })?;
    }
    let out = &results.out.tensor;
    let fits = out.shape == [rows, heads, v_width] && out.dtype == inputs.q.tensor.dtype;
    plan.demand(fits && out.span() == out.elements(), || {
        format!("attentionOut should be contiguous [{rows}, {heads}, {v_width}]")
    })?;
    plan.workspace(rows.max(1) * 64);
    let slots = read_inputs(plan, inputs);
    let mask = plan.read_if("attenMask", inputs.mask);
    let (peak, sum) =
        (plan.write("softmaxMax", results.peak), plan.write("softmaxSum", results.sum));
    let out = plan.write("attentionOut", results.out);
    plan.run(move |run| {
        check_mask(run, mask)?;
        forward(run, slots, [peak, sum, out], &geometry)
    })
}

/// Reads what attention and its gradient read first.
pub fn read_inputs(plan: &mut Plan, inputs: Inputs<'_>) -> [Slot; 3] {
    [plan.read("query", inputs.q), plan.read("key", inputs.k), plan.read("value", inputs.v)]
}

/// The compressed mask must be the upper triangle: its corners are looked at.
pub fn check_mask(run: &Run<'_>, mask: Option<Slot>) -> Done {
    let Some(mask) = mask else { return Ok(()) };
    let bound = run.at(mask);
    let side = bound.shape()[1];
    let at = |row: usize, column: usize| {
        let mut byte = [0_u8];
        bound.load(row * bound.tensor.strides[0] + column * bound.tensor.strides[1], &mut byte);
        byte[0] != 0
    };
    let samples = [0, 1, side / 2, side - 2];
    let right = samples.iter().all(|&row| !at(row, row) && at(row, row + 1) && !at(row + 1, row));
    if right {
        return Ok(());
    }
    let text = "attenMask should be 1 above the diagonal and 0 elsewhere";
    Err(Failure::operator(text))
}

/// A block of query rows of one head.
struct Block<'a> {
    q: Rows<'a>,
    k: Rows<'a>,
    v: Rows<'a>,
    /// Rows in the block.
    rows: usize,
    /// Keys of the sequence.
    keys: usize,
    /// Keys that the first row sees; each later row sees one more.
    seen: usize,
    /// Whether later rows see more.
    causal: bool,
    geometry: &'a Geometry,
    dtype: DataType,
}

impl Block<'_> {
    /// Keys that a row sees.
    fn visible(&self, row: usize) -> usize {
        if self.causal { (self.seen + row).min(self.keys) } else { self.keys }
    }

    /// Calls `finish` with the sums, maxima and sums of exponentials of all rows.
    fn run(&self, hands: &mut Hands<'_>) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let (rows, width, v_width) = (self.rows, self.geometry.width, self.geometry.v_width);
        let mut out = vec![0.0; rows * v_width];
        let mut peaks = vec![f32::NEG_INFINITY; rows];
        let mut sums = vec![0.0; rows];
        let mut scores = vec![0.0; rows * KEY_TILE];
        let mut rounded = Rounded::new(self.dtype, rows * KEY_TILE);
        let end = self.visible(rows - 1);
        for start in (0..end).step_by(KEY_TILE) {
            let keys = KEY_TILE.min(end - start);
            hands.multiply(Small {
                layout: Layout::Nt,
                extents: (rows, keys, width),
                a: self.q,
                b: self.k.skip(start),
                c: (&mut scores, KEY_TILE),
                store: Store::Overwrite,
            });
            for row in 0..rows {
                let visible = self.visible(row).saturating_sub(start).min(keys);
                let line = &mut scores[row * KEY_TILE..][..keys];
                let (scale, peak) = (self.geometry.scale, peaks[row]);
                let step = Soften { scores: line, visible, scale, peak };
                let (most, total) = dispatch(hands.isa, step);
                if most != peak && start > 0 {
                    let again = (peak - most).exp();
                    sums[row] *= again;
                    out[row * v_width..][..v_width].iter_mut().for_each(|x| *x *= again);
                }
                peaks[row] = most;
                sums[row] += total;
            }
            rounded.round(hands.isa, &scores);
            self.mix(hands, (&rounded, start, keys), &mut out);
        }
        (out, peaks, sums)
    }

    /// Adds probabilities times values.
    fn mix(
        &self,
        hands: &mut Hands<'_>,
        (rounded, start, keys): (&Rounded, usize, usize),
        out: &mut [f32],
    ) {
        let v_width = self.geometry.v_width;
        let values = self.v.skip(start);
        let first = self.visible(0).saturating_sub(start).min(keys);
        // A probability of zero hides a finite value only.
        let strays =
            first < keys && values.skip(first).has_strays(hands.isa, keys - first, v_width);
        let step = if strays { 1 } else { self.rows };
        for row in (0..self.rows).step_by(step) {
            let terms =
                if strays { self.visible(row).saturating_sub(start).min(keys) } else { keys };
            if terms == 0 {
                continue;
            }
            hands.multiply(Small {
                layout: Layout::Nn,
                extents: (step, v_width, terms),
                a: Rows { data: rounded.data().from(row * KEY_TILE), stride: KEY_TILE },
                b: values,
                c: (&mut out[row * v_width..], v_width),
                store: Store::Accumulate,
            });
        }
    }
}

/// How many keys the first query of a sequence sees, and whether later ones see more.
pub fn first_seen(geometry: &Geometry, [q, q_end, k, k_end]: [usize; 4]) -> (usize, bool) {
    let (queries, keys) = (q_end - q, k_end - k);
    match geometry.mask {
        Mask::None => (keys, false),
        Mask::FromStart => (1, true),
        Mask::FromEnd => ((keys + 1).saturating_sub(queries), true),
    }
}

/// One row from everything the sequences hold.
struct Task {
    sequence: usize,
    head: usize,
    first: usize,
    rows: usize,
}

fn forward(
    run: &mut Run<'_>,
    [q, k, v]: [Slot; 3],
    [peak, sum, out]: [Slot; 3],
    geometry: &Geometry,
) -> Done {
    let (isa, pool, rounding) = (run.engine.isa, run.engine.pool, run.rounding());
    let extra = usize::from(run.has(Kind::CausalEdge));
    let data = [run.data(q)?, run.data(k)?, run.data(v)?];
    let [q, k, v] = [q, k, v].map(|slot| run.at(slot));
    let [peak, sum, out] = [peak, sum, out].map(|slot| run.at(slot));
    let tasks = tasks(geometry);
    pool.run(tasks.len(), |index| {
        let Task { sequence, head, first, rows } = tasks[index];
        let bounds = geometry.sequences[sequence];
        let [q_start, _, k_start, k_end] = bounds;
        let (seen, causal) = first_seen(geometry, bounds);
        let kv_head = head / (geometry.heads / geometry.kv_heads);
        let row = q_start + first;
        let block = Block {
            q: Rows::of(data[0], q, row, head),
            k: Rows::of(data[1], k, k_start, kv_head),
            v: Rows::of(data[2], v, k_start, kv_head),
            rows,
            keys: k_end - k_start,
            seen: seen + first + extra,
            causal,
            geometry,
            dtype: q.dtype(),
        };
        let (mut sums, peaks, totals) = with_hands(pool, isa, |hands| block.run(hands));
        let v_width = geometry.v_width;
        for (index, sums) in sums.chunks_mut(v_width.max(1)).enumerate() {
            let at = (row + index) * geometry.heads + head;
            // Scores that are all minus infinity have no softmax: 0 / 0 shows it.
            let total = if totals[index] == 0.0 { f32::NAN } else { totals[index] };
            sums.iter_mut().for_each(|x| *x /= total);
            store_floats(isa, out, at * v_width, 1, sums, rounding);
            store_floats(isa, peak, at * REPEATS, 1, &[peaks[index]; REPEATS], Rounding::Nearest);
            store_floats(isa, sum, at * REPEATS, 1, &[total; REPEATS], Rounding::Nearest);
        }
    });
    Ok(())
}

fn tasks(geometry: &Geometry) -> Vec<Task> {
    let mut tasks = Vec::new();
    for (sequence, [q, q_end, _, _]) in geometry.sequences.iter().enumerate() {
        for first in (0..q_end - q).step_by(QUERY_ROWS) {
            let rows = QUERY_ROWS.min(q_end - q - first);
            let of = |head| Task { sequence, head, first, rows };
            tasks.extend((0..geometry.heads).map(of));
        }
    }
    // The longest first, so that threads end together.
    tasks.sort_by_key(|task| std::cmp::Reverse(task.first));
    tasks
}
