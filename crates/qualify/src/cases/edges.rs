//! What the contracts say at their edges: ids and positions that do not exist, results in place,
//! broadcasts, integers, accumulation both ways, more rows than a chunk, large scores.

use pontoon_ops::{
    Accumulate, Add, AddRmsNorm, Attention, Copy, CrossEntropy, CrossEntropyBwd, DType, Embed,
    EmbedBwd, Fill, GroupedMatmul, IGNORED, Layout, Matmul, Muon, ReduceTree, RmsNormBwd, Rope,
    RopeStyle, Scale, SwiGlu, SwiGluBwd, hyper,
};

use super::{Case, Flavour, Maker};

pub(super) fn cases(maker: Maker) -> Vec<Case> {
    let mut cases = missing(maker);
    cases.extend(in_place(maker));
    cases.extend(layouts(maker));
    cases.extend(sums(maker));
    if maker.flavour == Flavour::Plain {
        cases.extend(chunks(maker));
        cases.push(sharp_attention(maker));
        cases.extend(stacks(maker));
    }
    cases
}

/// Ids, positions and targets that do not exist.
fn missing(maker: Maker) -> Vec<Case> {
    let (dtype, rows, width) = (maker.dtype, 6, 19);
    let odd = [3.0, -1.0, 9.0, 0.0, 2_000_000_000.0, 8.0];
    let mut d = maker.start(20_000);
    let (ids, table) = (d.given(DType::I32, &[rows], &odd), d.tame(dtype, &[9, width], 1.0));
    let y = d.poisoned(dtype, &[rows, width]);
    let mut cases = vec![d.done("ids outside the table", Embed { ids, table, y })];
    for accumulate in [Accumulate::Overwrite, Accumulate::Add] {
        let mut d = maker.start(20_001);
        let (ids, dy) = (d.given(DType::I32, &[rows], &odd), d.floats(&[rows, width]));
        let dtable = match accumulate {
            Accumulate::Overwrite => d.poisoned(DType::F32, &[9, width]),
            Accumulate::Add => d.tame(DType::F32, &[9, width], 1.0),
        };
        let op = EmbedBwd { ids, dy, dtable, accumulate };
        cases.push(d.done(format!("ids outside the table, {accumulate:?}"), op));
    }
    for style in [RopeStyle::HalfSplit, RopeStyle::Interleaved] {
        let mut d = maker.start(20_002);
        let (x, positions) = (d.floats(&[rows, 2, 36]), d.given(DType::I32, &[rows], &odd));
        let (cos, sin) = (d.tame(DType::F32, &[9, 18], 0.7), d.tame(DType::F32, &[9, 18], 0.7));
        let direction = pontoon_ops::Direction::Forward;
        let op = Rope { x, positions, cos, sin, style, direction, y: x };
        cases.push(d.done(format!("{style:?} in place, positions outside the table"), op));
    }
    let mut d = maker.start(20_003);
    let (x, head) = (d.floats(&[rows, width]), d.tame(dtype, &[9, width], 0.3));
    let targets = d.given(DType::I32, &[rows], &[3.0, -1.0, 9.0, IGNORED.into(), 0.0, 8.0]);
    let (loss, lse) = (d.poisoned(DType::F32, &[rows]), d.poisoned(DType::F32, &[rows]));
    cases.push(
        d.done("targets outside the vocabulary", CrossEntropy { x, head, targets, loss, lse }),
    );
    cases
}

/// Results that are one of the inputs, where contracts allow it.
fn in_place(maker: Maker) -> Vec<Case> {
    let shape = [5, 37];
    let mut d = maker.start(20_100);
    let x = d.tame(maker.dtype, &shape, 2.0);
    let mut cases = vec![d.done("in place", Scale { x, factor: -1.7, y: x })];
    for turn in 0..2 {
        let mut d = maker.start(20_101);
        let (gate, up) = (d.floats(&shape), d.floats(&shape));
        let y = if turn == 0 { gate } else { up };
        cases.push(d.done(format!("in place of input {turn}"), SwiGlu { gate, up, y }));
        let mut d = maker.start(20_102);
        let (dy, gate, up) = (d.floats(&shape), d.floats(&shape), d.floats(&shape));
        let (dgate, dup) = if turn == 0 { (gate, up) } else { (up, dy) };
        let op = SwiGluBwd { dy, gate, up, dgate, dup };
        cases.push(d.done(format!("in place, way {turn}"), op));
        let mut d = maker.start(20_103);
        let (x, residual) = (d.floats(&shape), d.floats(&shape));
        let weight = d.tame(maker.dtype, &[shape[1]], 1.0);
        let y = d.poisoned(maker.dtype, &shape);
        let rstd = d.poisoned(DType::F32, &[shape[0]]);
        let sum = if turn == 0 { x } else { residual };
        let op = AddRmsNorm { x, residual, weight, eps: 1e-5, sum, y, rstd };
        cases.push(d.done(format!("sum in place of input {turn}"), op));
        let mut d = maker.start(20_104);
        let (a, b) = (d.floats(&shape), d.floats(&shape));
        let y = if turn == 0 { b } else { a };
        cases.push(d.done(format!("in place, way {turn}"), Add { a, b, y }));
        let mut d = maker.start(20_105);
        let a = d.floats(&shape);
        cases.push(d.done("doubled in place", Add { a, b: a, y: a }));
    }
    cases
}

/// Broadcast, transposed, narrow and integer tensors.
fn layouts(maker: Maker) -> Vec<Case> {
    let dtype = maker.dtype;
    let mut d = maker.start(20_200);
    let src = d.tame(dtype, &[4, 1, 9], 1.0).broadcast(1, 3);
    let dst = d.poisoned(dtype, &[4, 5, 9]).slice(1, 1, 3);
    let mut cases = vec![d.done("a broadcast into a slice", Copy { src, dst })];
    let mut d = maker.start(20_201);
    let (a, b) = (d.floats(&[7, 12]), d.floats(&[12, 7]).transpose(0, 1));
    let y = d.poisoned(dtype, &[12, 7]).transpose(0, 1);
    cases.push(d.done("transposed", Add { a, b, y }));
    for (turn, kind) in [DType::I32, DType::U32, DType::I8].into_iter().enumerate() {
        let mut d = maker.start(20_202 + turn);
        let values: Vec<f64> = (0..60).map(f64::from).collect();
        let src = d.given(kind, &[3, 4, 5], &values).transpose(0, 2);
        let dst = d.poisoned(kind, &[5, 4, 3]);
        cases.push(d.done(format!("{kind} turned"), Copy { src, dst }));
    }
    let mut d = maker.start(20_210);
    let dst = d.poisoned(DType::I32, &[4, 9]).slice(1, 2, 5);
    cases.push(d.done("integers, strided", Fill { dst, value: -7.0 }));
    let mut d = maker.start(20_211);
    let dst = d.poisoned(dtype, &[6, 4, 9]).slice(2, 1, 7).slice(1, 1, 2);
    cases.push(d.done("twice strided", Fill { dst, value: 0.1 }));
    cases
}

/// Sums that replace or are added, and groups that hold nothing.
fn sums(maker: Maker) -> Vec<Case> {
    let dtype = maker.dtype;
    let mut cases = Vec::new();
    for (turn, layout) in [Layout::Nt, Layout::Nn, Layout::Tn].into_iter().enumerate() {
        let mut d = maker.start(20_300 + turn);
        let (m, n, k) = (13, 21, 34);
        let a = d.floats(&if layout == Layout::Tn { [k, m] } else { [m, k] });
        let b = d.floats(&if layout == Layout::Nt { [n, k] } else { [k, n] });
        let (c, bias) =
            (d.tame(dtype, &[m, n + 3], 1.0).slice(1, 3, n), Some(d.tame(dtype, &[n], 1.0)));
        let op = Matmul { layout, a, b, bias, c, accumulate: Accumulate::Add };
        cases.push(d.done(format!("{layout:?} added, with bias, strided"), op));
        let mut d = maker.start(20_310 + turn);
        let a = d.floats(&[9, m]);
        let (b, c) = match layout {
            Layout::Nt => (d.tame(dtype, &[4, n, m], 1.0), d.tame(dtype, &[9, n], 1.0)),
            Layout::Nn => (d.tame(dtype, &[4, m, n], 1.0), d.tame(dtype, &[9, n], 1.0)),
            Layout::Tn => (d.floats(&[9, n]), d.poisoned(DType::F32, &[4, m, n])),
        };
        let offsets = d.given(DType::I32, &[5], &[0.0, 0.0, 1.0, 8.0, 8.0]);
        let accumulate = if layout == Layout::Tn { Accumulate::Overwrite } else { Accumulate::Add };
        let op = GroupedMatmul { layout, a, b, offsets, c, accumulate };
        cases.push(d.done(format!("{layout:?} {accumulate:?}, empty groups"), op));
    }
    let mut d = maker.start(20_320);
    let (x, y) = (d.floats(&[5, 40]), d.poisoned(dtype, &[40]));
    let accumulate = Accumulate::Overwrite;
    cases.push(d.done("strided parts", ReduceTree { x, y, accumulate }));
    cases
}

/// More rows than are taken together.
fn chunks(maker: Maker) -> Vec<Case> {
    let (dtype, rows, vocabulary, width) = (maker.dtype, 1100, 11, 9);
    let mut d = maker.start(20_400);
    let (x, head) = (d.floats(&[rows, width]), d.tame(dtype, &[vocabulary, width], 0.3));
    let ids: Vec<f64> = (0..rows).map(|row| (row % vocabulary) as f64).collect();
    let targets = d.given(DType::I32, &[rows], &ids);
    let dloss = d.tame(DType::F32, &[rows], 1.0);
    let (loss, lse) = (d.poisoned(DType::F32, &[rows]), d.poisoned(DType::F32, &[rows]));
    let dx = d.poisoned(dtype, &[rows, width]);
    let dhead = d.poisoned(DType::F32, &[vocabulary, width]);
    let accumulate = Accumulate::Overwrite;
    let op = CrossEntropyBwd { x, head, targets, dloss, loss, lse, dx, dhead, accumulate };
    let mut cases = vec![d.done("more rows than a chunk", op)];
    let mut d = maker.start(20_401);
    let (rows, width) = (200, 13);
    let (dy, x) = (d.floats(&[rows, width]), d.floats(&[rows, width]));
    let weight = d.tame(dtype, &[width], 1.0);
    let rstd = super::dense::rstd(&mut d, &x);
    let dx = d.poisoned(dtype, &[rows, width]);
    let dweight = d.poisoned(DType::F32, &[width]);
    let op = RmsNormBwd { dy, x, weight, rstd, dx, dweight, accumulate };
    cases.push(d.done("several blocks of rows", op));
    cases
}

/// Scores up to about a hundred: one key takes nearly all of the softmax.
fn sharp_attention(maker: Maker) -> Case {
    let mut d = maker.start(20_500);
    let (rows, heads, width) = (90, 2, 20);
    let (q, k) = (d.floats(&[rows, heads, width]), d.floats(&[rows, 1, width]));
    let v = d.floats(&[rows, 1, width]);
    let documents = d.given(DType::I32, &[3], &[0.0, 20.0, 90.0]);
    let out = d.poisoned(maker.dtype, &[rows, heads, width]);
    let lse = d.poisoned(DType::F32, &[rows, heads]);
    d.done("sharp", Attention { q, k, v, documents, scale: 8.0, out, lse })
}

/// A stack of matrices that are orthogonalised each for itself.
fn stacks(maker: Maker) -> Vec<Case> {
    let mut d = maker.start(20_600);
    let shape = [3, 10, 6];
    let weight = d.tame(DType::F32, &shape, 1.0);
    let (grad, momentum) = (d.tame(DType::F32, &shape, 0.1), d.tame(DType::F32, &shape, 0.1));
    let compute = (maker.dtype != DType::F32).then(|| d.poisoned(maker.dtype, &shape));
    let mut numbers = [0.0; hyper::COUNT];
    (numbers[hyper::LR], numbers[hyper::BETA1], numbers[hyper::GRAD_SCALE]) = (0.02, 0.95, 1.0);
    let hyper = d.given(DType::F32, &[hyper::COUNT], &numbers);
    vec![d.done("a stack", Muon { weight, grad, momentum, compute, hyper })]
}
