//! Collectives among the devices of one process; the meeting itself is in `group.rs`.

use bytemuck::Pod;
use pontoon_ops::{self as ops, DeviceError, DeviceErrorKind, Group, View};

use super::{Context, Done, unsupported, with_float};
use crate::group::Rendezvous;
use crate::simd::Element;

/// The one group a device can be in.
const GROUP: u16 = 0;

fn group<'a>(context: &Context<'a>, group: &Group) -> Result<&'a Rendezvous, DeviceError> {
    let known =
        context.group.filter(|found| group.id == GROUP && found.members() == group.rank_count);
    known.ok_or_else(|| {
        DeviceError::new(DeviceErrorKind::BadArgument, format!("{group:?} does not exist here"))
    })
}

/// Every member's bytes, by rank.
fn gather<T: Pod>(
    context: &Context<'_>,
    member: &Group,
    x: &View,
) -> Result<Vec<Vec<T>>, DeviceError> {
    let own = context.operands.read::<T>(x)?;
    let all = group(context, member)?.exchange(member.rank_index, bytemuck::cast_slice(own))?;
    let typed = |bytes: &Vec<u8>| bytemuck::allocation::pod_collect_to_vec(bytes);
    let parts: Vec<Vec<T>> = all.iter().map(typed).collect();
    if parts.iter().all(|part| part.len() == own.len()) {
        return Ok(parts);
    }
    let text = "members of the group brought tensors of different sizes";
    Err(DeviceError::new(DeviceErrorKind::BadArgument, text))
}

/// The sum over members of one element, along the fixed tree by rank.
fn sum<T: Element>(parts: &[Vec<T>], index: usize) -> f32 {
    match parts {
        [one] => one[index].to_f32(),
        _ => {
            let (left, right) = parts.split_at(parts.len().next_power_of_two() / 2);
            sum(left, index) + sum(right, index)
        }
    }
}

pub(super) fn all_reduce(context: &mut Context<'_>, op: &ops::AllReduce) -> Done {
    with_float!(op.x.dtype, T => {
        let parts = gather::<T>(context, &op.group, &op.x)?;
        let y = context.operands.write::<T>(&op.y)?;
        y.iter_mut().enumerate().for_each(|(i, to)| *to = T::from_f32(sum(&parts, i)));
        Ok(())
    })
}

pub(super) fn reduce_scatter(context: &mut Context<'_>, op: &ops::ReduceScatter) -> Done {
    with_float!(op.x.dtype, T => {
        let parts = gather::<T>(context, &op.group, &op.x)?;
        let y = context.operands.write::<T>(&op.y)?;
        let first = usize::from(op.group.rank_index) * y.len();
        y.iter_mut().enumerate().for_each(|(i, to)| *to = T::from_f32(sum(&parts, first + i)));
        Ok(())
    })
}

pub(super) fn all_gather(context: &mut Context<'_>, op: &ops::AllGather) -> Done {
    match op.x.dtype.bits() {
        32 => all_gather_as::<u32>(context, op),
        16 => all_gather_as::<u16>(context, op),
        8 => all_gather_as::<u8>(context, op),
        _ => Err(unsupported(op.x.dtype)),
    }
}

fn all_gather_as<T: Pod>(context: &mut Context<'_>, op: &ops::AllGather) -> Done {
    let parts = gather::<T>(context, &op.group, &op.x)?;
    let y = context.operands.write::<T>(&op.y)?;
    let len = op.x.elements();
    parts.iter().enumerate().for_each(|(rank, part)| y[rank * len..][..len].copy_from_slice(part));
    Ok(())
}
