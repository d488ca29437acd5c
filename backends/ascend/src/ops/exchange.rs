//! Collectives: every member's part is gathered, then summed here along the contract's tree, so
//! that the bits do not depend on how the vendor's rings are laid.

use pontoon_ops::{self as ops, Accumulate, DeviceError, DeviceErrorKind, View};

use crate::core::{Core, Done};
use crate::tensor::Tensor;

/// All members' parts by rank, each as one row: `[members, elements]`.
fn gather(
    core: &mut Core,
    x: &View,
    group: &ops::Group,
    to: Option<Tensor>,
) -> Result<Tensor, DeviceError> {
    let x = core.tensor(x)?;
    let members = usize::from(group.rank_count);
    let all = match to {
        Some(to) => to,
        None => core.scratch(x.kind, &[members, x.elements()])?,
    };
    let bytes = x.elements() * x.kind.bytes();
    let Some(communicator) = core.communicator.take() else {
        let text = "the device was opened alone, not as a member of a group";
        return Err(DeviceError::new(DeviceErrorKind::Unsupported, text));
    };
    let gathered = core.session.all_gather(&communicator, x.address, all.address, bytes);
    core.communicator = Some(communicator);
    gathered.map(|()| all)
}

pub(super) fn all_gather(core: &mut Core, op: &ops::AllGather) -> Done {
    let y = core.tensor(&op.y)?;
    gather(core, &op.x, &op.group, Some(y)).map(drop)
}

pub(super) fn all_reduce(core: &mut Core, op: &ops::AllReduce) -> Done {
    let y = core.tensor(&op.y)?;
    let all = gather(core, &op.x, &op.group, None)?;
    super::optim::tree(core, all, y.reshape(&[1, y.elements()]), Accumulate::Overwrite)
}

pub(super) fn reduce_scatter(core: &mut Core, op: &ops::ReduceScatter) -> Done {
    let y = core.tensor(&op.y)?;
    let all = gather(core, &op.x, &op.group, None)?;
    let own = all.slice(1, usize::from(op.group.rank_index) * y.elements(), y.elements());
    super::optim::tree(core, own, y.reshape(&[1, y.elements()]), Accumulate::Overwrite)
}
