//! What can go wrong on the waist: a wrong call ([`OpError`]) or a failing device
//! ([`DeviceError`]).
//!
//! Vendors' codes are mapped onto these kinds in each backend's `ffi.rs`, nowhere else.

use crate::dtype::DType;
use crate::op::OpName;
use crate::view::Shape;

/// An operation whose operands do not fit its contract. Raised once, before any backend sees it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum OpError {
    /// An operand has the wrong extents.
    #[error("{op:?}: `{operand}` should be {want:?} but is {got:?}")]
    Shape {
        /// The operation.
        op: OpName,
        /// The operand's field name.
        operand: &'static str,
        /// The extents the contract asks for.
        want: Shape,
        /// The extents that came.
        got: Shape,
    },
    /// An operand has the wrong number of dimensions.
    #[error("{op:?}: `{operand}` should have {want} dimensions but is {got:?}")]
    Rank {
        /// The operation.
        op: OpName,
        /// The operand's field name.
        operand: &'static str,
        /// The number of dimensions the contract asks for.
        want: usize,
        /// The extents that came.
        got: Shape,
    },
    /// An operand has the wrong element type.
    #[error("{op:?}: `{operand}` should be {want:?} but is {got}")]
    Dtype {
        /// The operation.
        op: OpName,
        /// The operand's field name.
        operand: &'static str,
        /// The element types the contract allows.
        want: Vec<DType>,
        /// The element type that came.
        got: DType,
    },
    /// An operand's elements do not lie as the contract asks.
    #[error("{op:?}: `{operand}` should {want}")]
    Layout {
        /// The operation.
        op: OpName,
        /// The operand's field name.
        operand: &'static str,
        /// What the contract asks for.
        want: &'static str,
    },
    /// A written operand shares memory with another one and is not the same view.
    #[error("{op:?}: `{written}` overlaps `{other}`")]
    Overlap {
        /// The operation.
        op: OpName,
        /// The operand that is written.
        written: &'static str,
        /// The operand it shares memory with.
        other: &'static str,
    },
    /// A number in the operation is outside its range.
    #[error("{op:?}: {what}")]
    Attribute {
        /// The operation.
        op: OpName,
        /// The attribute, what it should be and what it is.
        what: String,
    },
}

/// What kind of trouble a device is in; decides what the supervisor does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceErrorKind {
    /// The device or its driver is gone.
    Lost,
    /// Work did not finish within its deadline.
    Hang,
    /// Memory returned an uncorrectable error.
    MemoryFault,
    /// A result or a tensor in memory is provably not what it should be.
    Corrupt,
    /// An allocation did not fit.
    OutOfMemory,
    /// The device cannot do this operation.
    Unsupported,
    /// A link to another device failed.
    LinkDown,
    /// The call itself was wrong.
    BadArgument,
}

/// What a supervisor should do about a failed device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remedy {
    /// Restart the worker; give its micro-batches to others meanwhile.
    RestartWorker,
    /// Stop using the device until it is qualified again.
    Quarantine,
    /// Use a smaller micro-batch or recompute activations.
    ReduceMemory,
    /// Run on another device; this one cannot.
    UseOtherDevice,
    /// Reconnect, then go on.
    Reconnect,
    /// A mistake in Pontoon or its input: stop and report.
    Report,
}

/// A failure of a device, in our words, with the vendor's code and text kept for the report.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind:?} ({vendor_code}): {text}")]
pub struct DeviceError {
    /// What kind of trouble this is.
    pub kind: DeviceErrorKind,
    /// The vendor's own number, 0 where there is none.
    pub vendor_code: i64,
    /// What happened, naming the operation or the buffer.
    pub text: String,
}

impl DeviceError {
    /// An error without a vendor's code.
    pub fn new(kind: DeviceErrorKind, text: impl Into<String>) -> Self {
        DeviceError { kind, vendor_code: 0, text: text.into() }
    }

    /// What to do about it.
    pub fn remedy(&self) -> Remedy {
        match self.kind {
            DeviceErrorKind::Lost | DeviceErrorKind::Hang => Remedy::RestartWorker,
            DeviceErrorKind::MemoryFault | DeviceErrorKind::Corrupt => Remedy::Quarantine,
            DeviceErrorKind::OutOfMemory => Remedy::ReduceMemory,
            DeviceErrorKind::Unsupported => Remedy::UseOtherDevice,
            DeviceErrorKind::LinkDown => Remedy::Reconnect,
            DeviceErrorKind::BadArgument => Remedy::Report,
        }
    }
}
