//! The rules that operands are checked by, once, above the waist.
//!
//! Each operation states its own rules in `contract/` with the small vocabulary of [`Check`]; the
//! aliasing rule, equal for all, stands here.

use crate::dtype::DType;
use crate::error::OpError;
use crate::op::{Op, OpName};
use crate::view::{Shape, View};

/// Checks operands on behalf of one operation.
#[derive(Clone, Copy, Debug)]
pub struct Check {
    /// The operation the errors name.
    pub op: OpName,
}

impl Check {
    /// The operand has exactly these extents and dense rows.
    pub fn shape(
        &self,
        operand: &'static str,
        view: &View,
        want: impl Into<Shape>,
    ) -> Result<(), OpError> {
        let want = want.into();
        if view.shape != want {
            return Err(OpError::Shape { op: self.op, operand, want, got: view.shape });
        }
        self.dense_rows(operand, view)
    }

    /// The operand has these extents and no gaps at all.
    pub fn packed(
        &self,
        operand: &'static str,
        view: &View,
        want: impl Into<Shape>,
    ) -> Result<(), OpError> {
        self.shape(operand, view, want)?;
        self.contiguous(operand, view)
    }

    /// The operand has this many dimensions.
    pub fn rank(&self, operand: &'static str, view: &View, want: usize) -> Result<(), OpError> {
        if view.shape.rank() == want {
            return Ok(());
        }
        Err(OpError::Rank { op: self.op, operand, want, got: view.shape })
    }

    /// The operand's element type is one of `want`.
    pub fn dtype(&self, operand: &'static str, view: &View, want: &[DType]) -> Result<(), OpError> {
        if want.contains(&view.dtype) {
            return Ok(());
        }
        Err(OpError::Dtype { op: self.op, operand, want: want.to_vec(), got: view.dtype })
    }

    /// Extents and element type in one.
    pub fn tensor(
        &self,
        operand: &'static str,
        view: &View,
        dtype: DType,
        want: impl Into<Shape>,
    ) -> Result<(), OpError> {
        self.shape(operand, view, want)?;
        self.dtype(operand, view, &[dtype])
    }

    /// The operand's last dimension has stride 1.
    pub fn dense_rows(&self, operand: &'static str, view: &View) -> Result<(), OpError> {
        if view.has_dense_rows() {
            return Ok(());
        }
        Err(OpError::Layout { op: self.op, operand, want: "have rows without gaps" })
    }

    /// The operand has no gaps.
    pub fn contiguous(&self, operand: &'static str, view: &View) -> Result<(), OpError> {
        if view.is_contiguous() {
            return Ok(());
        }
        Err(OpError::Layout { op: self.op, operand, want: "be contiguous" })
    }

    /// An attribute or a relation between extents holds.
    pub fn that(&self, holds: bool, what: impl FnOnce() -> String) -> Result<(), OpError> {
        if holds { Ok(()) } else { Err(OpError::Attribute { op: self.op, what: what() }) }
    }
}

/// Operations whose output may be exactly one of their inputs, element for element.
fn may_run_in_place(op: OpName) -> bool {
    matches!(
        op,
        OpName::Add
            | OpName::Scale
            | OpName::Rope
            | OpName::SwiGlu
            | OpName::SwiGluBwd
            | OpName::AddRmsNorm
            | OpName::AllReduce
    )
}

/// A written operand shares memory with no other operand, unless the operation may run in place
/// and both are the same view.
pub fn overlap(op: &Op) -> Result<(), OpError> {
    let operands = op.operands();
    for (index, written) in operands.iter().enumerate() {
        if !written.access.writes() {
            continue;
        }
        if written.view.is_broadcast() {
            let want = "not be a broadcast: it is written";
            return Err(OpError::Layout { op: op.name(), operand: written.name, want });
        }
        for (other_index, other) in operands.iter().enumerate() {
            let same_place =
                may_run_in_place(op.name()) && !other.access.writes() && other.view == written.view;
            if index == other_index || same_place || !written.view.may_overlap(&other.view) {
                continue;
            }
            return Err(OpError::Overlap {
                op: op.name(),
                written: written.name,
                other: other.name,
            });
        }
    }
    Ok(())
}
