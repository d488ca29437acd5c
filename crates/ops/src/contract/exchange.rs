//! Collectives over a group of devices of one backend.
//!
//! The group itself is made by the backend, outside the waist; an operation names it by number.

use serde::{Deserialize, Serialize};

use crate::dtype::DType;
use crate::op::Access::{Read, Write};
use crate::op::contract;
use crate::view::View;

/// A group of devices as one member sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Group {
    /// The group's number on this backend.
    pub id: u16,
    /// This member's index.
    pub rank_index: u16,
    /// Members in all.
    pub rank_count: u16,
}

/// `y = sum over members of x`, along [`super::ReduceTree`]'s tree by rank.
///
/// Shapes    x, y: equal, contiguous
/// Dtypes    f32, bf16 or f16, equal
/// Writes    y, the same bits on every member; y may be the same view as x
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AllReduce {
    /// This member's part.
    pub x: View,
    /// The sum.
    pub y: View,
    /// The group.
    pub group: Group,
}
contract!(AllReduce |op, check| { x: Read, y: Write } {
    check.dtype("x", &op.x, &DType::FLOATS)?;
    check.dtype("y", &op.y, &[op.x.dtype])?;
    check.contiguous("x", &op.x)?;
    check.packed("y", &op.y, op.x.shape)?;
    group_fits(&check, &op.group)?;
});

fn group_fits(check: &crate::check::Check, group: &Group) -> Result<(), crate::error::OpError> {
    check.that(group.rank_index < group.rank_count, || {
        format!("rank {} should be below {}", group.rank_index, group.rank_count)
    })
}

/// `y = every member's x, by rank`.
///
/// Shapes    x [n, ...] contiguous; y [rank_count * n, ...] contiguous
/// Dtypes    any, equal
/// Writes    y
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AllGather {
    /// This member's part.
    pub x: View,
    /// All parts.
    pub y: View,
    /// The group.
    pub group: Group,
}
contract!(AllGather |op, check| { x: Read, y: Write } {
    check.dtype("y", &op.y, &[op.x.dtype])?;
    check.contiguous("x", &op.x)?;
    check.contiguous("y", &op.y)?;
    group_fits(&check, &op.group)?;
    let want = op.x.elements() * usize::from(op.group.rank_count);
    check.that(op.y.elements() == want, || {
        format!("y should have {want} elements but has {}", op.y.elements())
    })?;
});

/// `y = this member's part of the sum over members of x`, along [`super::ReduceTree`]'s tree.
///
/// Shapes    x [rank_count * n, ...] contiguous; y [n, ...] contiguous
/// Dtypes    f32, bf16 or f16, equal
/// Writes    y
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReduceScatter {
    /// This member's summand.
    pub x: View,
    /// Its part of the sum.
    pub y: View,
    /// The group.
    pub group: Group,
}
contract!(ReduceScatter |op, check| { x: Read, y: Write } {
    check.dtype("x", &op.x, &DType::FLOATS)?;
    check.dtype("y", &op.y, &[op.x.dtype])?;
    check.contiguous("x", &op.x)?;
    check.contiguous("y", &op.y)?;
    group_fits(&check, &op.group)?;
    let want = op.y.elements() * usize::from(op.group.rank_count);
    check.that(op.x.elements() == want, || {
        format!("x should have {want} elements but has {}", op.x.elements())
    })?;
});
