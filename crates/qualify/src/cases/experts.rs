//! Routing, sorting by expert, products per expert, and products with weights of few bits.

use pontoon_ops::{
    Accumulate, DType, GroupedMatmul, GroupedMatmulQuant, Layout, MatmulQuant, Permute, PermuteBwd,
    Renormalise, RouterRule, RouterTopK, RouterTopKBwd, Scoring, Unpermute, UnpermuteBwd,
};

use super::{Case, Flavour, Maker};

/// Experts, experts chosen by a row, and rows.
const EXPERTS: usize = 6;
const CHOSEN: usize = 2;
const ROWS: usize = 9;
/// First rows of the experts' groups: two are empty, and the last row belongs to none.
const OFFSETS: [f64; EXPERTS + 1] = [0.0, 5.0, 5.0, 6.0, 12.0, 17.0, 17.0];

pub(super) fn cases(maker: Maker) -> Vec<Case> {
    let mut cases = products(maker);
    cases.extend(sorting(maker));
    // Routers compute in f32 whatever the model does.
    if maker.dtype == DType::F32 && maker.flavour == Flavour::Plain {
        cases.extend(routers(maker));
    }
    cases
}

fn products(maker: Maker) -> Vec<Case> {
    let mut cases = Vec::new();
    let (dtype, rows, n, k) = (maker.dtype, 18, 19, 33);
    for (turn, layout) in [Layout::Nt, Layout::Nn, Layout::Tn].into_iter().enumerate() {
        let mut d = maker.start(9000 + turn);
        let a = d.floats(&[rows, k]);
        let b = match layout {
            Layout::Nt => d.tame(dtype, &[EXPERTS, n, k], 1.0),
            Layout::Nn => d.tame(dtype, &[EXPERTS, k, n], 1.0),
            Layout::Tn => d.floats(&[rows, n]),
        };
        let offsets = d.given(DType::I32, &[EXPERTS + 1], &OFFSETS);
        let c = match layout {
            Layout::Tn => d.tame(DType::F32, &[EXPERTS, k, n], 1.0),
            _ => d.poisoned(dtype, &[rows, n]),
        };
        let accumulate = if layout == Layout::Tn { Accumulate::Add } else { Accumulate::Overwrite };
        let op = GroupedMatmul { layout, a, b, offsets, c, accumulate };
        cases.push(d.done(format!("{layout:?} with empty experts"), op));
    }
    for (turn, weight) in [DType::F8e4m3, DType::I8, DType::I4].into_iter().enumerate() {
        for (row, m) in [1, 7].into_iter().enumerate() {
            let mut d = maker.start(9100 + 10 * turn + row);
            let x = d.floats(&[m, 36]);
            let weight = d.tame(weight, &[13, 36], 3.0);
            let scales = d.tame(DType::F32, &[3, 5], 0.1);
            let c = d.poisoned(dtype, &[m, 13]);
            let bias = None;
            let op = MatmulQuant { x, weight, scales, block_n: 5, block_k: 8, bias, c };
            cases.push(d.done(format!("{m} rows, {}", weight.dtype), op));
        }
    }
    cases.extend(group_scaled(maker));
    cases.extend(grouped_quantised(maker));
    cases
}

/// Integers with one scale per row and group, as weights are served: whole groups and cut off ones,
/// few rows and many.
fn group_scaled(maker: Maker) -> Vec<Case> {
    let dtype = maker.dtype;
    let mut cases = Vec::new();
    let shapes = [(1, 33, 256), (2, 16, 128), (3, 19, 36), (6, 40, 200), (21, 37, 328)];
    for (turn, weight) in [DType::I8, DType::I4].into_iter().enumerate() {
        for (place, (m, n, k)) in shapes.into_iter().enumerate() {
            let block_k = if place % 2 == 0 { 64 } else { 32 };
            let mut d = maker.start(9150 + 10 * turn + place);
            let x = d.floats(&[m, k]);
            let reach = if weight == DType::I8 { 120.0 } else { 7.0 };
            let weight = d.tame(weight, &[n, k], reach);
            let scales = d.tame(DType::F32, &[n, usize::div_ceil(k, block_k)], 0.01);
            let bias = (place > 2).then(|| d.floats(&[n]));
            let c = d.poisoned(dtype, &[m, n]);
            let op = MatmulQuant { x, weight, scales, block_n: 1, block_k, bias, c };
            cases.push(d.done(format!("{m}x{n}x{k} by groups of {block_k}, {}", weight.dtype), op));
        }
    }
    cases
}

/// Experts in few bits: two without rows, a row that belongs to none, scales by group and by block.
fn grouped_quantised(maker: Maker) -> Vec<Case> {
    let (dtype, rows) = (maker.dtype, 18);
    let mut cases = Vec::new();
    for (turn, weight) in [DType::F8e4m3, DType::I8, DType::I4].into_iter().enumerate() {
        for (place, (n, k, block_n, block_k)) in
            [(19, 136, 1, 64), (16, 36, 1, 32), (13, 20, 5, 8)].into_iter().enumerate()
        {
            let mut d = maker.start(9500 + 10 * turn + place);
            let x = d.floats(&[rows, k]);
            let reach = if weight == DType::I4 { 7.0 } else { 100.0 };
            let weight = d.tame(weight, &[EXPERTS, n, k], reach);
            let blocks = [EXPERTS, usize::div_ceil(n, block_n), usize::div_ceil(k, block_k)];
            let scales = d.tame(DType::F32, &blocks, 0.01);
            let offsets = d.given(DType::I32, &[EXPERTS + 1], &OFFSETS);
            let c = d.poisoned(dtype, &[rows, n]);
            let op = GroupedMatmulQuant { x, weight, scales, block_n, block_k, offsets, c };
            cases.push(d.done(format!("{n}x{k} by {block_n}x{block_k}, {}", weight.dtype), op));
        }
    }
    cases
}

fn sorting(maker: Maker) -> Vec<Case> {
    let (dtype, width) = (maker.dtype, 21);
    let copies = ROWS * CHOSEN;
    let mut d = maker.start(9200);
    let x = d.floats(&[ROWS, width]);
    // Expert 3 gets nothing, and one id is out of range.
    let ids: Vec<f64> = (0..copies).map(|i| [0.0, 5.0, 1.0, 2.0, 5.0, 77.0][i % 6]).collect();
    let experts = d.given(DType::I32, &[ROWS, CHOSEN], &ids);
    let y = d.poisoned(dtype, &[copies, width]);
    let offsets = d.poisoned(DType::I32, &[EXPERTS + 1]);
    let slots = d.poisoned(DType::I32, &[ROWS, CHOSEN]);
    let mut cases = vec![d.done("with an empty expert", Permute { x, experts, y, offsets, slots })];
    let places: Vec<f64> = (0..copies).map(|i| (i * 7 % copies) as f64).collect();
    let mut d = maker.start(9201);
    let dy = d.floats(&[copies, width]);
    let slots = d.given(DType::I32, &[ROWS, CHOSEN], &places);
    let dx = d.poisoned(dtype, &[ROWS, width]);
    cases.push(d.done("scattered", PermuteBwd { dy, slots, dx }));
    let mut d = maker.start(9202);
    let x = d.floats(&[copies, width]);
    let weights = d.tame(DType::F32, &[ROWS, CHOSEN], 1.0);
    let slots = d.given(DType::I32, &[ROWS, CHOSEN], &places);
    let y = d.poisoned(dtype, &[ROWS, width]);
    cases.push(d.done("scattered", Unpermute { x, weights, slots, y }));
    let mut d = maker.start(9203);
    let (dy, x) = (d.floats(&[ROWS, width]), d.floats(&[copies, width]));
    let weights = d.tame(DType::F32, &[ROWS, CHOSEN], 1.0);
    let slots = d.given(DType::I32, &[ROWS, CHOSEN], &places);
    let dx = d.poisoned(dtype, &[copies, width]);
    let dweights = d.poisoned(DType::F32, &[ROWS, CHOSEN]);
    cases.push(d.done("scattered", UnpermuteBwd { dy, x, weights, slots, dx, dweights }));
    cases
}

fn routers(maker: Maker) -> Vec<Case> {
    let plain = RouterRule {
        chosen: 2,
        scoring: Scoring::Softmax,
        groups: 1,
        groups_kept: 1,
        renormalise: Renormalise::Yes,
        scale: 1.0,
    };
    let grouped = RouterRule {
        chosen: 3,
        scoring: Scoring::Sigmoid,
        groups: 4,
        groups_kept: 2,
        renormalise: Renormalise::Yes,
        scale: 2.5,
    };
    let rules = [
        ("softmax", plain),
        ("softmax, not renormalised", RouterRule { renormalise: Renormalise::No, ..plain }),
        ("sigmoid in groups", grouped),
    ];
    let mut cases = Vec::new();
    for (turn, (name, rule)) in rules.into_iter().enumerate() {
        let (rows, experts) = (17, 12);
        let shape = [rows, rule.chosen];
        let mut d = maker.start(9300 + turn);
        let logits = d.tame(DType::F32, &[rows, experts], 1.0);
        // A row of ties and, in another, a NaN.
        let mut values = d.read(&logits);
        values[..experts].fill(0.5);
        values[3 * experts + 5] = f64::NAN;
        let logits = d.given(DType::F32, &[rows, experts], &values);
        let bias = (rule.groups > 1).then(|| d.tame(DType::F32, &[experts], 0.3));
        let (weights, chosen) = (d.poisoned(DType::F32, &shape), d.poisoned(DType::I32, &shape));
        let op = RouterTopK { logits, bias, rule, weights, experts: chosen };
        cases.push(d.done(name, op));
        let mut d = maker.start(9400 + turn);
        let dweights = d.tame(DType::F32, &shape, 1.0);
        let logits = d.tame(DType::F32, &[rows, experts], 1.0);
        let pick = |row: usize, j: usize| ((row * 5 + j * 4) % experts) as f64;
        let ids: Vec<f64> =
            (0..rows).flat_map(|row| (0..rule.chosen).map(move |j| pick(row, j))).collect();
        let experts_view = d.given(DType::I32, &shape, &ids);
        let dlogits = d.poisoned(DType::F32, &[rows, experts]);
        let op = RouterTopKBwd { dweights, logits, experts: experts_view, rule, dlogits };
        cases.push(d.done(name, op));
    }
    cases
}
