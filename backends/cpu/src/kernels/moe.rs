//! Sorting rows by expert and joining the experts' results.

use pontoon_ops::{self as ops, DeviceError, DeviceErrorKind};

use super::{Context, Done, row_stride, rows_per_task, with_float};
use crate::ffi::{Parts, Scattered};
use crate::simd::{Element, Kernel, Simd, dispatch};

pub(super) fn permute(context: &mut Context<'_>, op: &ops::Permute) -> Done {
    with_float!(op.x.dtype, T => permute_as::<T>(context, op))
}

fn permute_as<T: Element>(context: &mut Context<'_>, op: &ops::Permute) -> Done {
    let x = context.operands.read::<T>(&op.x)?;
    let experts = context.operands.read::<i32>(&op.experts)?;
    let y = context.operands.write::<T>(&op.y)?;
    let offsets = context.operands.write::<i32>(&op.offsets)?;
    let slots = context.operands.write::<i32>(&op.slots)?;
    let (rows, width, chosen) = (op.x.dim(0), op.x.dim(1), op.slots.dim(1));
    let count = offsets.len() - 1;
    let expert_s = row_stride(&op.experts);
    let expert_of = |row: usize, choice: usize| {
        let id = experts[row * expert_s + choice];
        usize::try_from(id).ok().filter(|&id| id < count).unwrap_or(count - 1)
    };
    // Counting sort: stable, so an expert's rows keep their order.
    let mut next = vec![0_usize; count + 1];
    for row in 0..rows {
        (0..chosen).for_each(|choice| next[expert_of(row, choice) + 1] += 1);
    }
    for expert in 0..count {
        next[expert + 1] += next[expert];
    }
    offsets.iter_mut().zip(&next).for_each(|(offset, &start)| *offset = start as i32);
    let mut sources = vec![0_usize; rows * chosen];
    for row in 0..rows {
        for choice in 0..chosen {
            let slot = &mut next[expert_of(row, choice)];
            slots[row * row_stride(&op.slots) + choice] = *slot as i32;
            sources[*slot] = row;
            *slot += 1;
        }
    }
    let (x_s, y_s) = (row_stride(&op.x), row_stride(&op.y));
    let per_task = rows_per_task(rows * chosen, width);
    let parts = Parts::new(y, y_s * per_task);
    context.pool.run((rows * chosen).div_ceil(per_task), |task| {
        let y = parts.take(task);
        let first = task * per_task;
        for (row, source) in sources[first..].iter().take(per_task).enumerate() {
            y[row * y_s..][..width].copy_from_slice(&x[source * x_s..][..width]);
        }
    });
    Ok(())
}

/// The slots of all rows, checked to name rows of the sorted tensor.
fn checked(slots: &[i32], rows: usize) -> Result<(), DeviceError> {
    match slots.iter().find(|&&slot| !usize::try_from(slot).is_ok_and(|slot| slot < rows)) {
        None => Ok(()),
        Some(slot) => {
            let text = format!("slot {slot} is not one of {rows} rows");
            Err(DeviceError::new(DeviceErrorKind::BadArgument, text))
        }
    }
}

/// `y = sum over j of weight_j * x_j` for one row.
struct Join<'a, T> {
    x: &'a [T],
    x_stride: usize,
    slots: &'a [i32],
    weights: Option<&'a [f32]>,
    y: &'a mut [T],
}

impl<T: Element> Kernel for Join<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = self.y.len();
        for start in (0..width).step_by(S::LANES) {
            let end = (start + S::LANES).min(width);
            let mut sum = simd.zero();
            for (choice, &slot) in self.slots.iter().enumerate() {
                let row = slot as usize * self.x_stride;
                let x = T::load(simd, &self.x[row + start..row + end]);
                sum = match self.weights {
                    Some(weights) => simd.fma(simd.splat(weights[choice]), x, sum),
                    None => simd.add(sum, x),
                };
            }
            T::store(simd, sum, &mut self.y[start..end]);
        }
    }
}

pub(super) fn permute_bwd(context: &mut Context<'_>, op: &ops::PermuteBwd) -> Done {
    with_float!(op.dx.dtype, T => join::<T>(context, (&op.dy, &op.slots, None, &op.dx)))
}

pub(super) fn unpermute(context: &mut Context<'_>, op: &ops::Unpermute) -> Done {
    let weights = Some(&op.weights);
    with_float!(op.y.dtype, T => join::<T>(context, (&op.x, &op.slots, weights, &op.y)))
}

type JoinViews<'a> = (&'a ops::View, &'a ops::View, Option<&'a ops::View>, &'a ops::View);

fn join<T: Element>(context: &mut Context<'_>, (x, slots, weights, y): JoinViews<'_>) -> Done {
    let x_data = context.operands.read::<T>(x)?;
    let slot_data = context.operands.read::<i32>(slots)?;
    let weight_data = weights.map(|view| context.operands.read::<f32>(view)).transpose()?;
    let y_data = context.operands.write::<T>(y)?;
    let (rows, width, chosen) = (y.dim(0), y.dim(1), slots.dim(1));
    let (slot_s, weight_s, y_s) = (row_stride(slots), weights.map_or(0, row_stride), row_stride(y));
    let in_row = |row: usize| &slot_data[row * slot_s..][..chosen];
    (0..rows).try_for_each(|row| checked(in_row(row), x.dim(0)))?;
    let per_task = rows_per_task(rows, width * chosen.max(1));
    let parts = Parts::new(y_data, y_s * per_task);
    let isa = context.isa;
    context.pool.run(rows.div_ceil(per_task), |task| {
        let y = parts.take(task);
        for row in 0..per_task.min(rows - task * per_task) {
            let at = task * per_task + row;
            let one_row = Join {
                x: x_data,
                x_stride: row_stride(x),
                slots: in_row(at),
                weights: weight_data.map(|weights| &weights[at * weight_s..][..chosen]),
                y: &mut y[row * y_s..][..width],
            };
            dispatch(isa, one_row);
        }
    });
    Ok(())
}

/// `dx_j = weight_j * dy` into a buffer, and `dot(dy, x_j)`.
struct JoinBwd<'a, T> {
    dy: &'a [T],
    x: &'a [T],
    weight: f32,
    dx: &'a mut [T],
}

impl<T: Element> Kernel for JoinBwd<'_, T> {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let weight = simd.splat(self.weight);
        let mut dot = simd.zero();
        let inputs = self.dy.chunks(S::LANES).zip(self.x.chunks(S::LANES));
        for ((dy, x), dx) in inputs.zip(self.dx.chunks_mut(S::LANES)) {
            let dy = T::load(simd, dy);
            dot = simd.fma(dy, T::load(simd, x), dot);
            T::store(simd, simd.mul(weight, dy), dx);
        }
        simd.reduce_sum(dot)
    }
}

pub(super) fn unpermute_bwd(context: &mut Context<'_>, op: &ops::UnpermuteBwd) -> Done {
    with_float!(op.dy.dtype, T => unpermute_bwd_as::<T>(context, op))
}

fn unpermute_bwd_as<T: Element>(context: &mut Context<'_>, op: &ops::UnpermuteBwd) -> Done {
    let dy = context.operands.read::<T>(&op.dy)?;
    let x = context.operands.read::<T>(&op.x)?;
    let weights = context.operands.read::<f32>(&op.weights)?;
    let slots = context.operands.read::<i32>(&op.slots)?;
    let dx = context.operands.write::<T>(&op.dx)?;
    let dweights = context.operands.write::<f32>(&op.dweights)?;
    let (rows, width, chosen) = (op.dy.dim(0), op.dy.dim(1), op.slots.dim(1));
    let [dy_s, x_s, weight_s, slot_s, dx_s, dweight_s] =
        [&op.dy, &op.x, &op.weights, &op.slots, &op.dx, &op.dweights].map(row_stride);
    for row in 0..rows {
        checked(&slots[row * slot_s..][..chosen], op.x.dim(0))?;
    }
    let per_task = rows_per_task(rows, width * chosen.max(1));
    let dweights = Parts::new(dweights, dweight_s * per_task);
    let dxs = Scattered::new(dx);
    let isa = context.isa;
    context.pool.run(rows.div_ceil(per_task), |task| {
        let dweights = dweights.take(task);
        let mut line = vec![T::from_f32(0.0); width];
        for row in 0..per_task.min(rows - task * per_task) {
            let at = task * per_task + row;
            let dy = &dy[at * dy_s..][..width];
            for choice in 0..chosen {
                let slot = slots[at * slot_s + choice] as usize;
                let weight = weights[at * weight_s + choice];
                let x = &x[slot * x_s..][..width];
                let dot = dispatch(isa, JoinBwd { dy, x, weight, dx: &mut line });
                dweights[row * dweight_s + choice] = dot;
                dxs.store(slot * dx_s, &line);
            }
        }
    });
    Ok(())
}
