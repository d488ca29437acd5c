//! Mixtures of experts: grouped products, choosing experts, moving rows to them and back.

use pontoon_cpu::gemm::Store;

use super::product::{Flaws, Operand, Product, columns, multiply, rows};
use super::{Bound, Run};
use crate::dtype::DataType;
use crate::failure::{Done, Failure};
use crate::fault::Kind;
use crate::plan::{Access, Argument, Plan, Slot};

/// What a grouped product splits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Rows of x: each group has its own weight (groupType 0).
    Rows,
    /// The summed dimension: each group has its own result (groupType 2).
    Sums,
}

/// How groups are listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listing {
    /// Their ends (groupListType 0).
    Ends,
    /// Their sizes (groupListType 1).
    Sizes,
}

/// The tensors of a grouped product.
pub struct Grouped<'a> {
    /// `[rows, k]`, or `[m, rows]` by strides for [`Split::Sums`].
    pub x: &'a Argument,
    /// `[groups, k, n]`, or `[rows, n]`.
    pub weight: &'a Argument,
    /// The groups, integers of 64 bits.
    pub groups: &'a Argument,
    /// `[rows, n]`, or `[groups, m, n]`.
    pub out: &'a Argument,
}

/// What kind of grouped product.
#[derive(Clone, Copy)]
pub struct Manner {
    /// What is split.
    pub split: Split,
    /// How groups are listed.
    pub listing: Listing,
    /// Whether the result is added to.
    pub store: Store,
}

/// Products of groups of rows.
pub fn grouped(plan: &mut Plan, tensors: &Grouped<'_>, manner: Manner) -> Done {
    let Grouped { x, weight, groups, out } = tensors;
    let list = &groups.tensor;
    plan.demand(list.dtype == DataType::I64 && list.shape.len() == 1, || {
        format!("groupList should be a list of i64 but is {:?} {:?}", list.dtype, list.shape)
    })?;
    let (a, b, c) = (&x.tensor, &weight.tensor, &out.tensor);
    plan.demand(a.dtype.is_float() && a.dtype == b.dtype, || {
        format!("x and weight should be equal floats but are {:?} and {:?}", a.dtype, b.dtype)
    })?;
    plan.demand(c.dtype == a.dtype || manner.store == Store::Accumulate, || {
        format!("y should be {:?} but is {:?}", a.dtype, c.dtype)
    })?;
    let count = list.elements();
    plan.demand(a.shape.len() == 2, || format!("x should be a matrix but is {:?}", a.shape))?;
    let (m, k) = (a.shape[0], a.shape[1]);
    let fits = match manner.split {
        Split::Rows => {
            b.shape.len() == 3 && b.shape[..2] == [count, k] && c.shape == [m, b.shape[2]]
        }
        Split::Sums => {
            let whole = [count, m, b.shape[b.shape.len() - 1]];
            b.shape.len() == 2
                && b.shape[0] == k
                && (c.shape == whole || c.shape == [count * m, whole[2]])
        }
    };
    plan.demand(fits, || {
        format!(
            "x {:?}, weight {:?} and y {:?} do not fit {count} groups",
            a.shape, b.shape, c.shape
        )
    })?;
    plan.demand(c.span() == c.elements(), || "y should be contiguous".to_owned())?;
    plan.workspace(4096);
    let (x, weight) = (plan.read("x", x), plan.read("weight", weight));
    let groups = plan.read("groupList", groups);
    let access = if manner.store == Store::Accumulate { Access::Both } else { Access::Write };
    // Rows behind the last group keep what they hold.
    let out =
        plan.operand("y", out, if manner.split == Split::Rows { Access::Both } else { access });
    plan.run(move |run| multiply_groups(run, [x, weight, groups, out], manner))
}

/// The bounds of groups within `rows`.
fn bounds(list: &[i64], listing: Listing, rows: usize) -> Done<Vec<(usize, usize)>> {
    let mut start = 0_usize;
    let mut bounds = Vec::with_capacity(list.len());
    for &number in list {
        let end = match listing {
            Listing::Ends => usize::try_from(number).ok(),
            Listing::Sizes => usize::try_from(number).ok().map(|size| start + size),
        };
        match end {
            Some(end) if end >= start && end <= rows => {
                bounds.push((start, end));
                start = end;
            }
            _ => {
                let text = format!("groupList {list:?} does not rise within {rows} rows");
                return Err(Failure::new(crate::code::AICORE_EXCEPTION, text));
            }
        }
    }
    Ok(bounds)
}

fn multiply_groups(run: &mut Run<'_>, slots: [Slot; 4], manner: Manner) -> Done {
    let [x, weight, groups, out] = slots;
    let (a, b) = (run.at(x), run.at(weight));
    let (a_shape, b_shape) = (a.shape().to_vec(), b.shape().to_vec());
    let split_rows = if manner.split == Split::Rows { a_shape[0] } else { a_shape[1] };
    let bounds = bounds(&run.integers(groups), manner.listing, split_rows)?;
    let (a_data, b_data) = (run.data(x)?, run.data(weight)?);
    let mut c_data = run.data_mut(out)?;
    let n = b_shape[b_shape.len() - 1];
    for (group, &(start, end)) in bounds.iter().enumerate() {
        let product = match manner.split {
            Split::Rows => {
                let (k, strides) = (a_shape[1], &b.tensor.strides);
                let first = group * strides[0];
                let b = matrix(b_data, first, (k, n), &strides[1..])?;
                let a = matrix_at(a, a_data, (start, 0), (end - start, k))?;
                let c = c_data.from(start * n);
                Product { m: end - start, n, k, a, b, c, c_stride: n, store: manner.store }
            }
            Split::Sums => {
                let (m, k) = (a_shape[0], end - start);
                let a = matrix_at(a, a_data, (0, start), (m, k))?;
                let b = matrix_at(b, b_data, (start, 0), (k, n))?;
                let c = c_data.from(group * m * n);
                Product { m, n, k, a, b, c, c_stride: n, store: manner.store }
            }
        };
        if product.m == 0 {
            continue;
        }
        let flaws = Flaws::of(run, product.k);
        multiply(run.engine, product, flaws);
    }
    Ok(())
}

/// A part of a matrix that begins at a row and a column.
fn matrix_at<'a>(
    bound: &Bound,
    data: pontoon_cpu::gemm::Data<'a>,
    (row, column): (usize, usize),
    extents: (usize, usize),
) -> Done<Operand<'a>> {
    let strides = &bound.tensor.strides;
    matrix(data, row * strides[0] + column * strides[1], extents, strides)
}

fn matrix<'a>(
    data: pontoon_cpu::gemm::Data<'a>,
    first: usize,
    (height, width): (usize, usize),
    strides: &[usize],
) -> Done<Operand<'a>> {
    if strides[1] == 1 || width <= 1 {
        return Ok(rows(data, first, strides[0].max(width)));
    }
    if strides[0] == 1 || height <= 1 {
        return Ok(columns(data, first, strides[1].max(height)));
    }
    Err(Failure::operator(format!("a matrix of strides {strides:?} is not multiplied by groups")))
}

/// Softmax over experts, then the best `k`.
pub fn gate_softmax(
    plan: &mut Plan,
    x: &Argument,
    k: i64,
    [y, experts, row_index]: [&Argument; 3],
) -> Done {
    let [count, width] = x.tensor.shape[..] else {
        return plan.forbid("x should be a matrix");
    };
    let chosen = k as usize;
    plan.demand(k > 0 && chosen <= width, || format!("{k} of {width} experts"))?;
    for result in [y, experts, row_index] {
        plan.demand(result.tensor.shape == [count, chosen], || {
            format!("results should be [{count}, {chosen}]")
        })?;
    }
    plan.workspace(4096);
    let x = plan.read("x", x);
    let [y, experts] = [plan.write("yOut", y), plan.write("expertIdxOut", experts)];
    let row_index = plan.write("rowIdxOut", row_index);
    plan.run(move |run| {
        let mut scores = run.floats(x);
        scores.chunks_mut(width).for_each(softmax);
        let (best, weights) = choose(run, &scores, (width, chosen), &[]);
        run.put_floats(y, &weights);
        run.put_integers(experts, &best);
        let places = (0..count * chosen).map(|at| (at % chosen * count + at / chosen) as i64);
        run.put_integers(row_index, &places.collect::<Vec<_>>());
        Ok(())
    })
}

fn softmax(row: &mut [f32]) {
    let peak = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    row.iter_mut().for_each(|x| *x = (*x - peak).exp());
    let sum: f32 = row.iter().sum();
    row.iter_mut().for_each(|x| *x /= sum);
}

/// The best of each row, by score plus bias; the lower expert among equals.
fn choose(
    run: &Run<'_>,
    scores: &[f32],
    (width, chosen): (usize, usize),
    biased: &[f32],
) -> (Vec<i64>, Vec<f32>) {
    let flipped = run.has(Kind::WrongTie);
    let ranks = if biased.is_empty() { scores } else { biased };
    let (mut best, mut weights) = (Vec::new(), Vec::new());
    for (row, ranks) in ranks.chunks(width).enumerate() {
        let mut order: Vec<usize> = (0..width).collect();
        if flipped {
            order.reverse();
        }
        order.sort_by(|&a, &b| ranks[b].total_cmp(&ranks[a]));
        for &expert in &order[..chosen] {
            best.push(expert as i64);
            weights.push(scores[row * width + expert]);
        }
    }
    (best, weights)
}

/// The rule of a grouped gate.
#[derive(Clone, Copy)]
pub struct Gate {
    /// Experts chosen.
    pub k: i64,
    /// Groups kept.
    pub groups_kept: i64,
    /// Groups.
    pub groups: i64,
    /// Whether a group's rank is the sum of its two best instead of its best.
    pub two_best: bool,
    /// Whether scores are sigmoids instead of a softmax.
    pub sigmoid: bool,
    /// Factor on the weights.
    pub factor: f64,
    /// Added to the sum that divides.
    pub eps: f64,
}

/// DeepSeek's gate: groups, bias for the choice only, weights divided by their sum.
pub fn gate(
    plan: &mut Plan,
    (x, bias): (&Argument, Option<&Argument>),
    rule: Gate,
    [y, experts]: [&Argument; 2],
) -> Done {
    let [count, width] = x.tensor.shape[..] else {
        return plan.forbid("x should be a matrix");
    };
    let (chosen, groups) = (rule.k as usize, rule.groups.max(1) as usize);
    plan.demand(rule.k > 0 && chosen <= width && width % groups == 0, || {
        format!("{} of {width} experts in {groups} groups", rule.k)
    })?;
    for result in [y, experts] {
        plan.demand(result.tensor.shape == [count, chosen], || {
            format!("results should be [{count}, {chosen}]")
        })?;
    }
    plan.workspace(4096);
    let (x, bias) = (plan.read("x", x), plan.read_if("bias", bias));
    let [y, experts] = [plan.write("yOut", y), plan.write("expertIdxOut", experts)];
    plan.run(move |run| {
        let mut scores = run.floats(x);
        if rule.sigmoid {
            scores.iter_mut().for_each(|x| *x = 1.0 / (1.0 + (-*x).exp()));
        } else {
            scores.chunks_mut(width).for_each(softmax);
        }
        let bias = bias.map(|bias| run.floats(bias)).unwrap_or_default();
        let mut biased = scores.clone();
        for row in biased.chunks_mut(width) {
            row.iter_mut().zip(&bias).for_each(|(x, bias)| *x += bias);
            keep_groups(row, groups, rule);
        }
        let (best, mut weights) = choose(run, &scores, (width, chosen), &biased);
        for row in weights.chunks_mut(chosen) {
            let sum = row.iter().sum::<f32>() + rule.eps as f32;
            let divisor = if rule.sigmoid { sum } else { 1.0 };
            row.iter_mut().for_each(|x| *x = *x / divisor * rule.factor as f32);
        }
        run.put_floats(y, &weights);
        run.put_integers(experts, &best);
        Ok(())
    })
}

/// Sets the scores of all but the best groups to minus infinity.
fn keep_groups(row: &mut [f32], groups: usize, rule: Gate) {
    if groups == 1 {
        return;
    }
    let size = row.len() / groups;
    let rank = |group: &[f32]| {
        let mut sorted = group.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        if rule.two_best { sorted.iter().take(2).sum::<f32>() } else { sorted[0] }
    };
    let ranks: Vec<f32> = row.chunks(size).map(rank).collect();
    let mut order: Vec<usize> = (0..groups).collect();
    order.sort_by(|&a, &b| ranks[b].total_cmp(&ranks[a]));
    for &group in &order[(rule.groups_kept.max(1) as usize).min(groups)..] {
        row[group * size..][..size].fill(f32::NEG_INFINITY);
    }
}

/// Rows sorted by expert: `permuted[sorted[i]] = tokens[i / k]`.
pub fn permute(
    plan: &mut Plan,
    (tokens, experts): (&Argument, &Argument),
    [out, sorted]: [&Argument; 2],
) -> Done {
    let width = tokens.tensor.shape.last().copied().unwrap_or(0);
    let rows = tokens.tensor.elements() / width.max(1);
    let places = experts.tensor.elements();
    plan.demand(experts.tensor.dtype.is_index() && rows > 0 && places % rows == 0, || {
        format!("indices of {places} places for {rows} rows")
    })?;
    plan.demand(sorted.tensor.elements() == places && out.tensor.shape == [places, width], || {
        format!("results should be [{places}, {width}] and [{places}]")
    })?;
    plan.workspace(places * 8);
    let (tokens, experts) = (plan.read("tokens", tokens), plan.read("indices", experts));
    let [out, sorted] =
        [plan.write("permuteTokensOut", out), plan.write("sortedIndicesOut", sorted)];
    plan.run(move |run| {
        let keys = run.integers(experts);
        let mut order: Vec<usize> = (0..places).collect();
        order.sort_by_key(|&place| keys[place]);
        let from = run.floats(tokens);
        let (mut to, mut at) = (vec![0.0; places * width], vec![0; places]);
        for (row, &place) in order.iter().enumerate() {
            at[place] = row as i64;
            let token = place / (places / rows);
            to[row * width..][..width].copy_from_slice(&from[token * width..][..width]);
        }
        run.put_floats(out, &to);
        run.put_integers(sorted, &at);
        Ok(())
    })
}

/// Sums of a token's permuted rows, weighted where weights are given.
pub fn unpermute(
    plan: &mut Plan,
    (rows, sorted, weights): (&Argument, &Argument, Option<&Argument>),
    out: &Argument,
) -> Done {
    let [places, width] = rows.tensor.shape[..] else {
        return plan.forbid("permutedTokens should be a matrix");
    };
    let tokens = out.tensor.elements() / width.max(1);
    plan.demand(tokens > 0 && places % tokens == 0 && sorted.tensor.elements() == places, || {
        format!("{places} places do not go back to {tokens} rows")
    })?;
    plan.demand(weights.is_none_or(|weights| weights.tensor.elements() == places), || {
        format!("probs should be {places} numbers")
    })?;
    plan.workspace(4096);
    let (rows, sorted) = (plan.read("permutedTokens", rows), plan.read("sortedIndices", sorted));
    let weights = plan.read_if("probs", weights);
    let out = plan.write("out", out);
    plan.run(move |run| {
        let (from, at) = (run.floats(rows), run.integers(sorted));
        let weights = weights.map(|weights| run.floats(weights));
        let mut to = vec![0.0; tokens * width];
        for (place, &row) in at.iter().enumerate() {
            let token = place / (places / tokens);
            let weight = weights.as_ref().map_or(1.0, |weights| weights[place]);
            let from = &from[in_rows(row, places)? * width..][..width];
            let to = &mut to[token * width..][..width];
            to.iter_mut().zip(from).for_each(|(to, from)| *to += weight * from);
        }
        run.put_floats(out, &to);
        Ok(())
    })
}

fn in_rows(row: i64, rows: usize) -> Done<usize> {
    usize::try_from(row).ok().filter(|&row| row < rows).ok_or_else(|| {
        let text = format!("row {row} is out of range of {rows}: mte address error");
        Failure::new(crate::code::VECTOR_EXCEPTION, text)
    })
}

/// The gradient of an unpermutation: of the rows, and of the weights where there are some.
pub fn unpermute_grad(
    plan: &mut Plan,
    [rows, dy, sorted]: [&Argument; 3],
    weights: Option<&Argument>,
    (drows, dweights): (&Argument, Option<&Argument>),
) -> Done {
    let [places, width] = rows.tensor.shape[..] else {
        return plan.forbid("permutedTokens should be a matrix");
    };
    let tokens = dy.tensor.elements() / width.max(1);
    plan.demand(tokens > 0 && places % tokens == 0 && sorted.tensor.elements() == places, || {
        format!("{places} places do not go back to {tokens} rows")
    })?;
    plan.workspace(4096);
    let (rows, dy) = (plan.read("permutedTokens", rows), plan.read("unpermutedTokensGrad", dy));
    let (sorted, weights) = (plan.read("sortedIndices", sorted), plan.read_if("probs", weights));
    let drows = plan.write("permutedTokensGradOut", drows);
    let dweights = dweights.map(|dweights| plan.write("probsGradOut", dweights));
    plan.run(move |run| {
        let (values, grads, at) = (run.floats(rows), run.floats(dy), run.integers(sorted));
        let weights = weights.map(|weights| run.floats(weights));
        let (mut to, mut dots) = (vec![0.0; places * width], vec![0.0; places]);
        for (place, &row) in at.iter().enumerate() {
            let token = place / (places / tokens);
            let weight = weights.as_ref().map_or(1.0, |weights| weights[place]);
            let row = in_rows(row, places)?;
            let grad = &grads[token * width..][..width];
            for (column, grad) in grad.iter().enumerate() {
                to[row * width + column] = weight * grad;
                dots[place] += values[row * width + column] * grad;
            }
        }
        run.put_floats(drows, &to);
        if let Some(dweights) = dweights {
            run.put_floats(dweights, &dots);
        }
        Ok(())
    })
}

/// A matrix with its dimensions exchanged: the same memory under another descriptor.
pub fn turned(plan: &Plan, x: &Argument) -> Done<Argument> {
    let tensor = &x.tensor;
    let ([rows, columns], [down, across]) = (&tensor.shape[..], &tensor.strides[..]) else {
        return plan.forbid(format!("x should be a matrix but is {:?}", tensor.shape));
    };
    let turned = crate::tensor::Tensor {
        dtype: tensor.dtype,
        shape: vec![*columns, *rows],
        strides: vec![*across, *down],
        offset: tensor.offset,
        storage: tensor.storage.clone(),
        format: tensor.format,
        address: std::sync::atomic::AtomicU64::new(tensor.base()),
    };
    Ok(Argument { tensor: std::sync::Arc::new(turned), ..x.clone() })
}
