//! Operators that move rows and elements by index. An index out of range is an exception on the
//! chip's vector cores, and so it is here.

use bytemuck::Pod;

use super::reduce::{Lines, axis_of};
use super::{Bound, Run};
use crate::code;
use crate::dtype::DataType;
use crate::failure::{Done, Failure};
use crate::plan::{Access, Argument, Plan, Slot};

fn check_index(plan: &Plan, index: &Argument) -> Done {
    plan.demand(index.tensor.dtype.is_index(), || {
        format!("indices should be i32 or i64 but are {:?}", index.tensor.dtype)
    })
}

/// An index in range; one that counts from the end counts.
fn in_range(index: i64, extent: usize) -> Done<usize> {
    let wrapped = if index < 0 { index + extent as i64 } else { index };
    match usize::try_from(wrapped) {
        Ok(place) if place < extent => Ok(place),
        _ => {
            let text = format!("index {index} is out of range of {extent}: mte address error");
            Err(Failure::new(code::VECTOR_EXCEPTION, text))
        }
    }
}

/// Elements that one task moves.
const TASK: usize = 1 << 13;

/// Bits are moved by size.
fn by_size(
    bits: usize,
    b8: impl FnOnce() -> Done,
    b16: impl FnOnce() -> Done,
    b32: impl FnOnce() -> Done,
    b64: impl FnOnce() -> Done,
) -> Done {
    match bits {
        16 => b16(),
        32 => b32(),
        64 => b64(),
        _ => b8(),
    }
}

/// `out[.., i, ..] = self[.., index[i], ..]`.
pub fn select(plan: &mut Plan, x: &Argument, (dim, index): (i64, &Argument), y: &Argument) -> Done {
    check_index(plan, index)?;
    let axis = axis_of(plan, x.tensor.shape.len(), dim)?;
    let mut shape = x.tensor.shape.clone();
    shape[axis] = index.tensor.elements();
    let same = y.tensor.shape.iter().product::<usize>() == shape.iter().product::<usize>();
    plan.demand(same && x.tensor.dtype == y.tensor.dtype, || {
        format!("the result should be {shape:?} {:?}", x.tensor.dtype)
    })?;
    plan.demand(y.tensor.span() == y.tensor.elements(), || {
        "the result should be contiguous".to_owned()
    })?;
    let (x, index) = (plan.read("self", x), plan.read("index", index));
    let y = plan.write("out", y);
    plan.run(move |run| {
        let bits = run.at(x).dtype().bits();
        by_size(
            bits,
            || select_as::<u8>(run, (x, axis), index, y),
            || select_as::<u16>(run, (x, axis), index, y),
            || select_as::<u32>(run, (x, axis), index, y),
            || select_as::<u64>(run, (x, axis), index, y),
        )
    })
}

fn select_as<T: Pod + Send + Sync>(
    run: &Run<'_>,
    (x, axis): (Slot, usize),
    index: Slot,
    y: Slot,
) -> Done {
    let (from, to) = (run.at(x), run.at(y));
    let tensor = &from.tensor;
    let places: Done<Vec<usize>> =
        run.integers(index).into_iter().map(|index| in_range(index, tensor.shape[axis])).collect();
    let places = places?;
    let inner: Vec<(usize, usize)> =
        (axis + 1..tensor.shape.len()).map(|a| (tensor.shape[a], tensor.strides[a])).collect();
    let width: usize = inner.iter().map(|(extent, _)| extent).product();
    let dense = inner.iter().rev().try_fold(1, |step, (extent, stride)| {
        (*extent == 1 || *stride == step).then_some(step * extent)
    });
    let outer: Vec<(usize, usize)> =
        (0..axis).map(|a| (tensor.shape[a], tensor.strides[a])).collect();
    let outer_count: usize = outer.iter().map(|(extent, _)| extent).product();
    let rows = outer_count * places.len();
    let together = (TASK / width.max(1)).max(1);
    run.engine.pool.run(rows.div_ceil(together), |task| {
        let mut buffer = vec![T::zeroed(); width];
        for row in task * together..(task * together + together).min(rows) {
            let (mut rest, mut at) = (row / places.len(), 0);
            for (extent, stride) in outer.iter().rev() {
                at += rest % extent * stride;
                rest /= extent;
            }
            at += places[row % places.len()] * tensor.strides[axis];
            if dense.is_some() {
                from.load(at, &mut buffer);
            } else {
                load_inner(from, at, &inner, &mut buffer);
            }
            to.store(row * width, &buffer);
        }
    });
    Ok(())
}

fn load_inner<T: Pod>(from: &Bound, at: usize, inner: &[(usize, usize)], to: &mut [T]) {
    for (index, to) in to.iter_mut().enumerate() {
        let (mut rest, mut place) = (index, at);
        for (extent, stride) in inner.iter().rev() {
            place += rest % extent * stride;
            rest /= extent;
        }
        from.load(place, std::slice::from_mut(to));
    }
}

/// Lines of the operands of a gather or scatter: along a dimension, the others in step.
struct Paired {
    x: Lines,
    index: Lines,
    other: Lines,
}

fn pair(
    plan: &Plan,
    x: &Argument,
    dim: i64,
    (index, other): (&Argument, &Argument),
) -> Done<Paired> {
    check_index(plan, index)?;
    let rank = x.tensor.shape.len();
    let axis = axis_of(plan, rank, dim)?;
    let fits = index.tensor.shape.len() == rank
        && other.tensor.shape == index.tensor.shape
        && (0..rank).all(|a| a == axis || index.tensor.shape[a] == x.tensor.shape[a]);
    plan.demand(fits, || {
        format!(
            "shapes {:?}, {:?} and {:?} do not fit along {dim}",
            x.tensor.shape, index.tensor.shape, other.tensor.shape
        )
    })?;
    plan.demand(x.tensor.dtype == other.tensor.dtype, || "types differ".to_owned())?;
    Ok(Paired {
        x: Lines::of(x, axis),
        index: Lines::of(index, axis),
        other: Lines::of(other, axis),
    })
}

/// `out[i][j] = self[i][index[i][j]]` along a dimension.
pub fn gather(plan: &mut Plan, x: &Argument, (dim, index): (i64, &Argument), y: &Argument) -> Done {
    let lines = pair(plan, x, dim, (index, y))?;
    let (x, index) = (plan.read("self", x), plan.read("index", index));
    let y = plan.write("out", y);
    plan.run(move |run| carry(run, [x, index, y], &lines, Way::OutOfX))
}

/// Which way elements go between `x` and the other operand of a gather or scatter.
#[derive(Clone, Copy)]
enum Way {
    OutOfX,
    IntoX,
}

/// Copies every element whose place in `x` the index names.
fn carry(run: &Run<'_>, slots: [Slot; 3], lines: &Paired, way: Way) -> Done {
    by_size(
        run.at(slots[0]).dtype().bits(),
        || carry_as::<u8>(run, slots, lines, way),
        || carry_as::<u16>(run, slots, lines, way),
        || carry_as::<u32>(run, slots, lines, way),
        || carry_as::<u64>(run, slots, lines, way),
    )
}

fn carry_as<T: Pod>(run: &Run<'_>, [x, index, other]: [Slot; 3], lines: &Paired, way: Way) -> Done {
    let (x, other) = (run.at(x), run.at(other));
    each_pair(run, index, lines, |in_x, in_other| {
        let (from, to) = match way {
            Way::OutOfX => ((x, in_x), (other, in_other)),
            Way::IntoX => ((other, in_other), (x, in_x)),
        };
        let mut value = [T::zeroed()];
        from.0.load(from.1, &mut value);
        to.0.store(to.1, &value);
    })
}

/// Calls `f(place in x, place in other)` for every index.
fn each_pair(run: &Run<'_>, index: Slot, lines: &Paired, mut f: impl FnMut(usize, usize)) -> Done {
    let bound = run.at(index);
    let mut indices = vec![0; lines.index.len];
    for line in 0..lines.index.count() {
        let start = lines.index.start(line);
        super::strided::load_integers(bound, start, lines.index.step, &mut indices);
        for (nth, &index) in indices.iter().enumerate() {
            let place = in_range(index, lines.x.len)?;
            let from = lines.x.start(line) + place * lines.x.step;
            f(from, lines.other.start(line) + nth * lines.other.step);
        }
    }
    Ok(())
}

/// What happens where a scatter meets an element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meeting {
    /// It is replaced; the last one stays.
    Replace,
    /// It is added to, in order.
    Add,
}

/// `self[i][index[i][j]] = src[i][j]` along a dimension.
pub fn scatter(
    plan: &mut Plan,
    x: &Argument,
    (dim, index, source): (i64, &Argument, &Argument),
    meeting: Meeting,
) -> Done {
    let lines = pair(plan, x, dim, (index, source))?;
    let x = plan.operand("selfRef", x, Access::Both);
    let (index, source) = (plan.read("index", index), plan.read("src", source));
    plan.run(move |run| {
        if meeting == Meeting::Add {
            return scatter_add(run, [x, index, source], &lines);
        }
        carry(run, [x, index, source], &lines, Way::IntoX)
    })
}

fn scatter_add(run: &Run<'_>, [x, index, source]: [Slot; 3], lines: &Paired) -> Done {
    let (isa, to, from) = (run.engine.isa, run.at(x), run.at(source));
    let rounding = run.rounding();
    each_pair(run, index, lines, |place, other| {
        let (mut old, mut new) = ([0.0], [0.0]);
        super::strided::load_floats(isa, to, place, 1, &mut old);
        super::strided::load_floats(isa, from, other, 1, &mut new);
        super::strided::store_floats(isa, to, place, 1, &[old[0] + new[0]], rounding);
    })
}

/// `var[indices[i]] = updates[i]`: rows by their first dimensions' indices.
pub fn scatter_rows(
    plan: &mut Plan,
    x: &Argument,
    (indices, updates): (&Argument, &Argument),
) -> Done {
    check_index(plan, indices)?;
    let shape = &indices.tensor.shape;
    let depth = shape.last().copied().unwrap_or(0);
    let rank = x.tensor.shape.len();
    plan.demand(depth >= 1 && depth <= rank, || {
        format!("indices of {depth} numbers into {rank} dimensions")
    })?;
    let rows: usize = shape[..shape.len() - 1].iter().product();
    let width: usize = x.tensor.shape[depth..].iter().product();
    plan.demand(updates.tensor.elements() == rows * width, || {
        format!("updates should be {rows} rows of {width}")
    })?;
    plan.demand(updates.tensor.dtype == x.tensor.dtype, || "types differ".to_owned())?;
    for argument in [x, updates] {
        plan.demand(argument.tensor.span() == argument.tensor.elements(), || {
            "operands should be contiguous".to_owned()
        })?;
    }
    let extents = x.tensor.shape[..depth].to_vec();
    let size = x.tensor.dtype.bytes(width);
    let x = plan.operand("varRef", x, Access::Both);
    let (indices, updates) = (plan.read("indices", indices), plan.read("updates", updates));
    plan.run(move |run| {
        let (to, from) = (run.at(x), run.at(updates));
        let mut buffer = vec![0_u8; size];
        for (row, index) in run.integers(indices).chunks(extents.len()).enumerate() {
            let mut at = 0;
            for (&index, &extent) in index.iter().zip(&extents) {
                at = at * extent + in_range(index, extent)?;
            }
            from.load(row * size, &mut buffer);
            to.store(at * size, &buffer);
        }
        Ok(())
    })
}

/// `self[indices] = values`, or adds them in f32 in the order of rows: rows by one index each.
pub fn put(
    plan: &mut Plan,
    x: &Argument,
    (indices, values): (&[Argument], &Argument),
    meeting: Meeting,
) -> Done {
    let [index] = indices else {
        return plan.forbid(format!("{} lists of indices are not emulated", indices.len()));
    };
    check_index(plan, index)?;
    let width: usize = x.tensor.shape[1..].iter().product();
    let rows = index.tensor.elements();
    plan.demand(values.tensor.elements() == rows * width, || {
        format!("values should be {rows} rows of {width}")
    })?;
    plan.demand(x.tensor.span() == x.tensor.elements(), || "self should be dense".to_owned())?;
    plan.demand(values.tensor.dtype == x.tensor.dtype, || "types differ".to_owned())?;
    plan.workspace(4096);
    let extent = x.tensor.shape[0];
    let x = plan.operand("selfRef", x, Access::Both);
    let (index, values) = (plan.read("indices", index), plan.read("values", values));
    plan.run(move |run| {
        let places: Done<Vec<usize>> =
            run.integers(index).into_iter().map(|index| in_range(index, extent)).collect();
        let rows = Rows { places: places?, extent, width };
        put_rows(run, x, (values, &rows), meeting);
        Ok(())
    })
}

struct Rows {
    places: Vec<usize>,
    extent: usize,
    width: usize,
}

/// Each target row takes its values in order, so targets can be shared out.
fn put_rows(run: &Run<'_>, x: Slot, (values, rows): (Slot, &Rows), meeting: Meeting) {
    let (isa, rounding) = (run.engine.isa, run.rounding());
    let backwards = run.wobbles();
    let (to, from) = (run.at(x), run.at(values));
    let width = rows.width;
    let mut by_place: Vec<Vec<usize>> = vec![Vec::new(); rows.extent];
    for (row, &place) in rows.places.iter().enumerate() {
        by_place[place].push(row);
    }
    if backwards {
        by_place.iter_mut().for_each(|list| list.reverse());
    }
    let used: Vec<usize> = (0..rows.extent).filter(|&place| !by_place[place].is_empty()).collect();
    let starts = |row: usize| row_at(from, row, width);
    run.engine.pool.run(used.len(), |task| {
        let place = used[task];
        let (mut sum, mut value) = (vec![0.0; width], vec![0.0; width]);
        if meeting == Meeting::Add {
            super::strided::load_floats(isa, to, place * width, 1, &mut sum);
        }
        for &row in &by_place[place] {
            super::strided::load_floats(isa, from, starts(row), 1, &mut value);
            match meeting {
                Meeting::Add => sum.iter_mut().zip(&value).for_each(|(sum, v)| *sum += v),
                Meeting::Replace => sum.copy_from_slice(&value),
            }
        }
        super::strided::store_floats(isa, to, place * width, 1, &sum, rounding);
    });
}

/// Where a row of a view begins whose rows are dense.
fn row_at(bound: &Bound, row: usize, width: usize) -> usize {
    let tensor = &bound.tensor;
    match tensor.shape.len() {
        2 => row * tensor.strides[0],
        _ => row * width,
    }
}

/// `out[i] = weight[indices[i]]`.
pub fn embedding(plan: &mut Plan, weight: &Argument, index: &Argument, y: &Argument) -> Done {
    plan.demand(weight.tensor.shape.len() == 2, || "weight should be a matrix".to_owned())?;
    select(plan, weight, (0, index), y)
}

/// Adds rows of a gradient to a fresh table; rows of the padding index count for nothing.
pub fn embedding_backward(
    plan: &mut Plan,
    (grad, index): (&Argument, &Argument),
    (count, padding): (u64, u64),
    y: &Argument,
) -> Done {
    check_index(plan, index)?;
    let width = grad.tensor.shape.last().copied().unwrap_or(0);
    let (rows, count) = (index.tensor.elements(), count as usize);
    plan.demand(grad.tensor.elements() == rows * width, || {
        format!("grad should be {rows} rows of {width}")
    })?;
    plan.demand(y.tensor.shape == [count, width], || {
        format!("the result should be [{count}, {width}]")
    })?;
    let dtype = y.tensor.dtype;
    plan.demand(dtype == DataType::F32 || dtype == grad.tensor.dtype, || {
        format!("the result cannot be {dtype:?}")
    })?;
    plan.workspace(4096);
    let (grad, index) = (plan.read("grad", grad), plan.read("indices", index));
    let y = plan.write("out", y);
    plan.run(move |run| {
        let mut table = vec![0.0_f32; count * width];
        let grads = run.floats(grad);
        let mut order: Vec<usize> = (0..rows).collect();
        // The vendor calls this operator non-deterministic: atomics add as they come.
        if run.wobbles() {
            order.reverse();
        }
        let indices = run.integers(index);
        for row in order {
            if indices[row] as u64 == padding {
                continue;
            }
            let place = in_range(indices[row], count)?;
            let to = &mut table[place * width..][..width];
            to.iter_mut().zip(&grads[row * width..]).for_each(|(to, from)| *to += from);
        }
        run.put_floats(y, &table);
        Ok(())
    })
}
