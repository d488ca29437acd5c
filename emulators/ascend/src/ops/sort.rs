//! Sorting and choosing the largest: stable, NaN as the largest of all.

use std::cmp::Ordering;

use super::Run;
use super::reduce::{Lines, axis_of, lines_together, same_shape};
use super::strided::{load_floats, load_integers, store_floats, store_integers};
use crate::failure::Done;
use crate::fault::Kind;
use crate::plan::{Argument, Plan, Slot};

/// Which way to sort.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// The smallest first.
    Ascending,
    /// The largest first.
    Descending,
}

impl Order {
    /// From a flag of the interface.
    pub fn of(descending: bool) -> Order {
        if descending { Order::Descending } else { Order::Ascending }
    }
}

/// Compares numbers with NaN as the largest.
fn by_value(a: f32, b: f32) -> Ordering {
    a.partial_cmp(&b).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()))
}

/// The order of a line's places.
fn places(line: &[f32], order: Order, flipped: bool) -> Vec<usize> {
    let mut places: Vec<usize> = (0..line.len()).collect();
    if flipped {
        places.reverse();
    }
    places.sort_by(|&a, &b| {
        let ascending = by_value(line[a], line[b]);
        if order == Order::Ascending { ascending } else { ascending.reverse() }
    });
    places
}

struct Shape {
    from: Lines,
    values: Option<Lines>,
    indices: Lines,
    order: Order,
}

/// Sorts along a dimension.
pub fn sort(
    plan: &mut Plan,
    x: &Argument,
    (dim, order): (i64, Order),
    (values, indices): (Option<&Argument>, &Argument),
) -> Done {
    for result in values.iter().copied().chain([indices]) {
        same_shape(plan, x, result)?;
    }
    check_results(plan, x, values, indices)?;
    let axis = axis_of(plan, x.tensor.shape.len(), dim)?;
    plan_lines(plan, x, (axis, order), (values, indices))
}

/// The `k` largest or smallest along a dimension, sorted.
pub fn top(
    plan: &mut Plan,
    x: &Argument,
    (k, dim, order): (i64, i64, Order),
    (values, indices): (&Argument, &Argument),
) -> Done {
    let axis = axis_of(plan, x.tensor.shape.len(), dim)?;
    let mut shape = x.tensor.shape.clone();
    plan.demand(k >= 0 && k as usize <= shape[axis], || {
        format!("{k} of {} cannot be chosen", shape[axis])
    })?;
    shape[axis] = k as usize;
    plan.demand(values.tensor.shape == shape && indices.tensor.shape == shape, || {
        format!("the results should be {shape:?}")
    })?;
    check_results(plan, x, Some(values), indices)?;
    plan_lines(plan, x, (axis, order), (Some(values), indices))
}

fn check_results(plan: &Plan, x: &Argument, values: Option<&Argument>, at: &Argument) -> Done {
    plan.demand(at.tensor.dtype.is_index(), || {
        format!("indices should be integers but are {:?}", at.tensor.dtype)
    })?;
    plan.demand(values.is_none_or(|values| values.tensor.dtype == x.tensor.dtype), || {
        "values should have the type of what is sorted".to_owned()
    })
}

fn plan_lines(
    plan: &mut Plan,
    x: &Argument,
    (axis, order): (usize, Order),
    (values, indices): (Option<&Argument>, &Argument),
) -> Done {
    let shape = Shape {
        from: Lines::of(x, axis),
        values: values.map(|values| Lines::of(values, axis)),
        indices: Lines::of(indices, axis),
        order,
    };
    plan.workspace(x.tensor.elements().min(1 << 16) * 8);
    let x = plan.read("self", x);
    let values = values.map(|values| plan.write("valuesOut", values));
    let indices = plan.write("indicesOut", indices);
    plan.run(move |run| {
        sort_lines(run, x, (values, indices), &shape);
        Ok(())
    })
}

fn sort_lines(run: &mut Run<'_>, x: Slot, (values, indices): (Option<Slot>, Slot), shape: &Shape) {
    let (isa, pool) = (run.engine.isa, run.engine.pool);
    let flipped = run.has(Kind::WrongTie);
    let (from, to) = (run.at(x), run.at(indices));
    let values = values.map(|slot| run.at(slot)).zip(shape.values.as_ref());
    let whole = !from.dtype().is_float();
    let (lines, together) = (shape.from.count(), lines_together(shape.from.len));
    pool.run(lines.div_ceil(together), |task| {
        let mut line = vec![0.0; shape.from.len];
        let mut integers = vec![0; if whole { shape.from.len } else { 0 }];
        for index in task * together..(task * together + together).min(lines) {
            let (start, step) = (shape.from.start(index), shape.from.step);
            let mut order = if whole {
                load_integers(from, start, step, &mut integers);
                let mut places: Vec<usize> = (0..integers.len()).collect();
                places.sort_by_key(|&place| integers[place]);
                if shape.order == Order::Descending {
                    places.sort_by_key(|&place| std::cmp::Reverse(integers[place]));
                }
                places
            } else {
                load_floats(isa, from, start, step, &mut line);
                places(&line, shape.order, flipped)
            };
            order.truncate(shape.indices.len);
            let places: Vec<i64> = order.iter().map(|&place| place as i64).collect();
            let at = &shape.indices;
            store_integers(to, at.start(index), at.step, &places);
            let Some((bound, at)) = &values else { continue };
            if whole {
                let sorted: Vec<i64> = order.iter().map(|&place| integers[place]).collect();
                store_integers(bound, at.start(index), at.step, &sorted);
            } else {
                let sorted: Vec<f32> = order.iter().map(|&place| line[place]).collect();
                let rounding = super::strided::Rounding::Nearest;
                store_floats(isa, bound, at.start(index), at.step, &sorted, rounding);
            }
        }
    });
}
