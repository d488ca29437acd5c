//! Moving, adding, embedding, normalising, multiplying, gating.

use pontoon_ops::{
    Accumulate, Add, AddRmsNorm, AddRmsNormBwd, Cast, Copy, DType, Embed, EmbedBwd, Fill, Layout,
    Matmul, RmsNorm, RmsNormBwd, Scale, SwiGlu, SwiGluBwd, View,
};

use super::{Case, Draft, Maker};

/// Rows and widths: one element, odd ones, and more than a task or a tile of rows.
const SIZES: [[usize; 2]; 4] = [[1, 1], [3, 33], [70, 17], [5, 260]];
/// Rows, columns and depths of products: edges of tiles, and whole tiles only, as models have them.
const PRODUCTS: [[usize; 3]; 5] =
    [[1, 5, 7], [3, 33, 65], [37, 50, 129], [66, 17, 3], [32, 64, 48]];

pub(super) fn cases(maker: Maker) -> Vec<Case> {
    let mut cases = Vec::new();
    for (index, size) in SIZES.into_iter().enumerate() {
        let draft = |salt: usize| maker.start(100 * salt + index);
        cases.extend(moving(&draft, size));
        cases.extend(norms(&draft, size));
        cases.extend(gates(&draft, size));
    }
    for (index, [m, n, k]) in PRODUCTS.into_iter().enumerate() {
        for (turn, layout) in [Layout::Nt, Layout::Nn, Layout::Tn].into_iter().enumerate() {
            for out in [maker.dtype, DType::F32] {
                let mut draft = maker.start(5000 + 10 * index + turn);
                let a = draft.floats(&if layout == Layout::Tn { [k, m] } else { [m, k] });
                let b = draft.floats(&if layout == Layout::Nt { [n, k] } else { [k, n] });
                let adds = turn == 2;
                let bias = (turn == 0).then(|| draft.tame(maker.dtype, &[n], 1.0));
                let c =
                    if adds { draft.tame(out, &[m, n], 1.0) } else { draft.poisoned(out, &[m, n]) };
                let accumulate = if adds { Accumulate::Add } else { Accumulate::Overwrite };
                let op = Matmul { layout, a, b, bias, c, accumulate };
                cases.push(draft.done(format!("{layout:?} {m}x{n}x{k} to {out}"), op));
            }
        }
    }
    cases
}

fn moving(draft: &dyn Fn(usize) -> Draft, [rows, width]: [usize; 2]) -> Vec<Case> {
    let size = format!("{rows}x{width}");
    let mut cases = Vec::new();
    let mut d = draft(1);
    let dtype = d.maker.dtype;
    let (src, dst) = (d.floats(&[rows, width]), d.poisoned(dtype, &[rows, width]));
    cases.push(d.done(size.clone(), Copy { src, dst }));
    let mut d = draft(2);
    let (src, dst) = (d.floats(&[rows, width]), d.poisoned(dtype, &[width, rows]));
    cases.push(d.done(format!("{size} transposed"), Copy { src: src.transpose(0, 1), dst }));
    for to in DType::FLOATS {
        let mut d = draft(3);
        let (src, dst) = (d.tame(dtype, &[rows, width], 3.0), d.poisoned(to, &[rows, width]));
        cases.push(d.done(format!("{size} to {to}"), Cast { src, dst }));
    }
    let mut d = draft(4);
    let dst = d.poisoned(dtype, &[rows, width]);
    cases.push(d.done(size.clone(), Fill { dst, value: 1.5 }));
    let mut d = draft(5);
    let (a, b) = (d.floats(&[rows, width]), d.floats(&[rows, width]));
    let y = d.poisoned(dtype, &[rows, width]);
    cases.push(d.done(size.clone(), Add { a, b, y }));
    let mut d = draft(6);
    let (a, b) = (d.floats(&[rows, width]), d.floats(&[rows, width]));
    cases.push(d.done(format!("{size} in place"), Add { a, b, y: a }));
    let mut d = draft(7);
    let (x, y) = (d.tame(dtype, &[rows, width], 2.0), d.poisoned(dtype, &[rows, width]));
    cases.push(d.done(size.clone(), Scale { x, factor: 0.3, y }));
    let mut d = draft(8);
    let table = d.tame(dtype, &[9, width], 1.0);
    let ids: Vec<f64> = (0..rows).map(|_| d.below(9) as f64).collect();
    let ids = d.given(DType::I32, &[rows], &ids);
    let y = d.poisoned(dtype, &[rows, width]);
    cases.push(d.done(size.clone(), Embed { ids, table, y }));
    let mut d = draft(9);
    let ids: Vec<f64> = (0..rows).map(|_| d.below(4) as f64).collect();
    let ids = d.given(DType::I32, &[rows], &ids);
    let dy = d.floats(&[rows, width]);
    let dtable = d.tame(DType::F32, &[5, width], 1.0);
    let op = EmbedBwd { ids, dy, dtable, accumulate: Accumulate::Add };
    cases.push(d.done(size, op));
    cases
}

/// A norm's saved statistic, as its contract says.
pub(super) fn rstd(draft: &mut Draft, x: &View) -> View {
    let (rows, width) = (x.dim(0), x.dim(1));
    let values = draft.read(x);
    let of =
        |row: &[f64]| 1.0 / (row.iter().map(|v| v * v).sum::<f64>() / width as f64 + 1e-6).sqrt();
    let values: Vec<f64> = values.chunks(width).map(of).collect();
    draft.given(DType::F32, &[rows], &values)
}

fn norms(draft: &dyn Fn(usize) -> Draft, [rows, width]: [usize; 2]) -> Vec<Case> {
    let size = format!("{rows}x{width}");
    let mut cases = Vec::new();
    let mut d = draft(20);
    let dtype = d.maker.dtype;
    let (x, weight) = (d.floats(&[rows, width]), d.tame(dtype, &[width], 1.0));
    let (y, out) = (d.poisoned(dtype, &[rows, width]), d.poisoned(DType::F32, &[rows]));
    cases.push(d.done(size.clone(), RmsNorm { x, weight, eps: 1e-6, y, rstd: out }));
    let mut d = draft(21);
    let (dy, x) = (d.floats(&[rows, width]), d.tame(dtype, &[rows, width], 1.0));
    let weight = d.tame(dtype, &[width], 1.0);
    let rstd_view = rstd(&mut d, &x);
    let dx = d.poisoned(dtype, &[rows, width]);
    let dweight = d.tame(DType::F32, &[width], 1.0);
    let accumulate = Accumulate::Add;
    let op = RmsNormBwd { dy, x, weight, rstd: rstd_view, dx, dweight, accumulate };
    cases.push(d.done(size.clone(), op));
    let mut d = draft(22);
    let (x, residual) = (d.floats(&[rows, width]), d.floats(&[rows, width]));
    let weight = d.tame(dtype, &[width], 1.0);
    let (sum, y) = (d.poisoned(dtype, &[rows, width]), d.poisoned(dtype, &[rows, width]));
    let out = d.poisoned(DType::F32, &[rows]);
    let op = AddRmsNorm { x, residual, weight, eps: 1e-6, sum, y, rstd: out };
    cases.push(d.done(size.clone(), op));
    let mut d = draft(23);
    let (dy, sum) = (d.floats(&[rows, width]), d.tame(dtype, &[rows, width], 1.0));
    let (dsum, weight) = (d.floats(&[rows, width]), d.tame(dtype, &[width], 1.0));
    let rstd_view = rstd(&mut d, &sum);
    let (dx, dweight) = (d.poisoned(dtype, &[rows, width]), d.poisoned(DType::F32, &[width]));
    let op = AddRmsNormBwd {
        dy,
        dsum: Some(dsum),
        sum,
        weight,
        rstd: rstd_view,
        dx,
        dweight,
        accumulate: Accumulate::Overwrite,
    };
    cases.push(d.done(size, op));
    cases
}

fn gates(draft: &dyn Fn(usize) -> Draft, [rows, width]: [usize; 2]) -> Vec<Case> {
    let size = format!("{rows}x{width}");
    let mut d = draft(30);
    let dtype = d.maker.dtype;
    let (gate, up) = (d.floats(&[rows, width]), d.floats(&[rows, width]));
    let y = d.poisoned(dtype, &[rows, width]);
    let forward = d.done(size.clone(), SwiGlu { gate, up, y });
    let mut d = draft(31);
    let (dy, gate) = (d.floats(&[rows, width]), d.floats(&[rows, width]));
    let up = d.floats(&[rows, width]);
    let (dgate, dup) = (d.poisoned(dtype, &[rows, width]), d.poisoned(dtype, &[rows, width]));
    let backward = d.done(size, SwiGluBwd { dy, gate, up, dgate, dup });
    vec![forward, backward]
}
