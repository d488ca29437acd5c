//! What every composition works with: a device's session, its memory, and one method for each
//! vendor call, with the attributes the backend always gives.
//!
//! Which calls an operation needs stands in `ops/`; `ABI.md` lists both.

use pontoon_ops::{DType, DeviceError, DeviceErrorKind, View};

use crate::ffi::operators::{Argument, Operators, Reuse, Scalar};
use crate::ffi::session::{Communicator, Session};
use crate::ffi::table::Operator;
use crate::memory::{Buffers, Constants, Scratch, Staging};
use crate::tensor::{Kind, Tensor};

/// What a composition gives.
pub type Done = Result<(), DeviceError>;

/// A device at work.
pub struct Core {
    /// Context, stream and runtime.
    pub session: Session,
    /// Executors and the workspace.
    pub operators: Operators,
    /// The waist's buffers.
    pub buffers: Buffers,
    /// Memory within one operation.
    pub scratch: Scratch,
    /// Host tables on the device.
    pub constants: Constants,
    /// Pinned memory for copies.
    pub staging: Staging,
    /// The attention's triangular mask, once it was asked for.
    mask: Option<Tensor>,
    /// This member's handle of group 0, where the device was opened as one of several.
    pub communicator: Option<Communicator>,
}

/// Which end of the order comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// The smallest.
    Rising,
    /// The largest.
    Falling,
}

/// A float scalar.
fn float(value: f32) -> Argument {
    Argument::Scalar(Scalar::Float(value))
}

/// The factor that Add and Sub apply to their second operand.
const ONE: Argument = Argument::Scalar(Scalar::Float(1.0));

fn words(bytes: &[u8]) -> impl Iterator<Item = [u8; 4]> {
    bytes.as_chunks::<4>().0.iter().copied()
}

impl Core {
    /// A core on an open session.
    pub fn new(session: Session) -> Core {
        Core {
            session,
            operators: Operators::default(),
            buffers: Buffers::default(),
            scratch: Scratch::default(),
            constants: Constants::default(),
            staging: Staging::default(),
            mask: None,
            communicator: None,
        }
    }

    /// Begins an operation.
    pub fn begin(&mut self) -> Done {
        self.session.enter()?;
        self.constants.begin(&mut self.session)?;
        self.scratch.begin(&mut self.session)
    }

    /// Bytes held on the device beside the waist's buffers.
    pub fn own_bytes(&self) -> usize {
        let mask = self.mask.map_or(0, |mask| mask.elements());
        mask + self.scratch.bytes() + self.constants.bytes() + self.operators.workspace_bytes()
    }

    /// Gives everything back. Tasks must have ended, or the stream is dropped by force.
    pub fn close(&mut self, force: bool) {
        let _ = self.session.enter();
        if let Some(communicator) = self.communicator.take() {
            self.session.drop_communicator(communicator);
        }
        self.operators.close(&mut self.session);
        if let Some(mask) = self.mask.take() {
            // Nothing can be done about a failure here either.
            let _ = self.session.free(mask.address);
        }
        self.scratch.close(&mut self.session);
        self.constants.close(&mut self.session);
        self.staging.close(&mut self.session);
        for address in self.buffers.drain() {
            // Nothing can be done about a failure while closing.
            let _ = self.session.free(address);
        }
        self.session.close(force);
    }

    /// A view as a tensor.
    pub fn tensor(&self, view: &View) -> Result<Tensor, DeviceError> {
        self.buffers.tensor(view)
    }

    /// Room until the operation's end.
    pub fn scratch(&mut self, kind: Kind, dims: &[usize]) -> Result<Tensor, DeviceError> {
        self.scratch.take(&mut self.session, kind, dims)
    }

    /// A host table as a tensor.
    pub fn constant(
        &mut self,
        kind: Kind,
        dims: &[usize],
        content: &[u8],
    ) -> Result<Tensor, DeviceError> {
        let wanted = dims.iter().product::<usize>() * kind.bytes();
        assert_eq!(wanted, content.len(), "a table of {dims:?}");
        let address = self.constants.place(&mut self.session, &mut self.staging, content)?;
        Ok(Tensor::contiguous(address, kind, dims))
    }

    /// The mask that the vendor's causal modes want: true above the diagonal. It is large and
    /// always the same, so it is kept.
    pub fn causal_mask(&mut self, extent: usize) -> Result<Tensor, DeviceError> {
        if let Some(mask) = self.mask {
            return Ok(mask);
        }
        let above = |at: usize| u8::from(at % extent > at / extent);
        let content: Vec<u8> = (0..extent * extent).map(above).collect();
        let address = self.session.malloc(content.len())?;
        let mask = Tensor::contiguous(address, Kind::Bool, &[extent, extent]);
        self.mask = Some(mask);
        self.staging.up(&mut self.session, address, &content)?;
        Ok(mask)
    }

    /// Host integers as a tensor.
    pub fn integers(&mut self, dims: &[usize], values: &[i32]) -> Result<Tensor, DeviceError> {
        let content: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.constant(Kind::I32, dims, &content)
    }

    /// Host numbers as a tensor.
    pub fn floats(&mut self, dims: &[usize], values: &[f32]) -> Result<Tensor, DeviceError> {
        let content: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.constant(Kind::F32, dims, &content)
    }

    /// The bytes of a view without gaps, if the host knows them.
    pub fn known(&self, view: &View) -> Option<Vec<u8>> {
        let bytes = view.dtype.bytes(view.elements());
        if !view.is_contiguous() {
            return None;
        }
        self.buffers.known(view.buffer, view.byte_offset, bytes).map(<[u8]>::to_vec)
    }

    /// The integers of a view, if the host knows them.
    pub fn known_integers(&self, view: &View) -> Option<Vec<i32>> {
        self.known(view).map(|bytes| words(&bytes).map(i32::from_le_bytes).collect())
    }

    /// The bytes of a view, from what the host knows or, if it does not, from the device: that
    /// waits for all work so far.
    pub fn fetch(&mut self, view: &View) -> Result<Vec<u8>, DeviceError> {
        if let Some(bytes) = self.known(view) {
            return Ok(bytes);
        }
        let tensor = self.tensor(view)?;
        let dense = self.dense(tensor)?;
        let mut bytes = vec![0; dense.elements() * dense.kind.bytes()];
        self.staging.down(&mut self.session, dense.address, &mut bytes)?;
        Ok(bytes)
    }

    /// The integers of a view.
    pub fn fetch_integers(&mut self, view: &View) -> Result<Vec<i32>, DeviceError> {
        debug_assert!(matches!(view.dtype, DType::I32 | DType::U32));
        Ok(words(&self.fetch(view)?).map(i32::from_le_bytes).collect())
    }

    /// The f32 numbers of a view.
    pub fn fetch_floats(&mut self, view: &View) -> Result<Vec<f32>, DeviceError> {
        Ok(words(&self.fetch(view)?).map(f32::from_le_bytes).collect())
    }

    /// A tensor without gaps: itself, or a copy.
    pub fn dense(&mut self, tensor: Tensor) -> Result<Tensor, DeviceError> {
        if tensor.is_contiguous() {
            return Ok(tensor);
        }
        let copy = self.scratch(tensor.kind, tensor.dims())?;
        self.copy(copy, tensor)?;
        Ok(copy)
    }

    /// Where a call that needs a result without gaps may write: the tensor itself, or room.
    pub fn target(&mut self, tensor: Tensor) -> Result<Tensor, DeviceError> {
        match tensor.is_contiguous() {
            true => Ok(tensor),
            false => self.scratch(tensor.kind, tensor.dims()),
        }
    }

    /// Copies from where [`Core::target`] let a call write to where it belongs.
    pub fn settle(&mut self, target: Tensor, tensor: Tensor) -> Done {
        if target == tensor { Ok(()) } else { self.copy(tensor, target) }
    }

    /// The same numbers in f32: itself, or a converted copy.
    pub fn wide(&mut self, tensor: Tensor) -> Result<Tensor, DeviceError> {
        self.converted(tensor, Kind::F32)
    }

    /// The same numbers in another element type: itself, or a converted copy.
    pub fn converted(&mut self, tensor: Tensor, kind: Kind) -> Result<Tensor, DeviceError> {
        if tensor.kind == kind {
            return Ok(tensor);
        }
        let copy = self.scratch(kind, tensor.dims())?;
        self.cast(tensor, copy)?;
        Ok(copy)
    }

    /// A call of an operator.
    pub fn call(&mut self, operator: Operator, arguments: &[Argument]) -> Done {
        self.operators.call(&mut self.session, operator, arguments, Reuse::Keep)
    }

    /// A call whose numbers will not come again.
    pub fn call_once(&mut self, operator: Operator, arguments: &[Argument]) -> Done {
        self.operators.call(&mut self.session, operator, arguments, Reuse::Once)
    }

    /// The first of several versions of an operator that the library has.
    pub fn newest(&self, versions: &[Operator]) -> Result<Operator, DeviceError> {
        let has = |operator: &&Operator| Operators::has(&self.session, **operator);
        versions.iter().find(has).copied().ok_or_else(|| {
            let names: Vec<&str> = versions.iter().map(|operator| operator.symbol()).collect();
            let text = format!("the installed library has none of {}", names.join(", "));
            DeviceError::new(DeviceErrorKind::Unsupported, text)
        })
    }
}

/// Elementwise calls; operands are broadcast by extent, and one may be the result's place.
impl Core {
    pub fn add(&mut self, a: Tensor, b: Tensor, out: Tensor) -> Done {
        self.call(Operator::Add, &[a.into(), b.into(), ONE, out.into()])
    }

    pub fn sub(&mut self, a: Tensor, b: Tensor, out: Tensor) -> Done {
        self.call(Operator::Sub, &[a.into(), b.into(), ONE, out.into()])
    }

    pub fn mul(&mut self, a: Tensor, b: Tensor, out: Tensor) -> Done {
        self.call(Operator::Mul, &[a.into(), b.into(), out.into()])
    }

    pub fn div(&mut self, a: Tensor, b: Tensor, out: Tensor) -> Done {
        self.call(Operator::Div, &[a.into(), b.into(), out.into()])
    }

    /// `out = a * factor`, by a factor of the program.
    pub fn scale(&mut self, a: Tensor, factor: f32, out: Tensor) -> Done {
        self.call(Operator::Muls, &[a.into(), float(factor), out.into()])
    }

    /// `out = a * factor`, by a factor that changes with every step.
    pub fn scale_once(&mut self, a: Tensor, factor: f32, out: Tensor) -> Done {
        self.call_once(Operator::Muls, &[a.into(), float(factor), out.into()])
    }

    /// `out = a + value`.
    pub fn shift(&mut self, a: Tensor, value: f32, out: Tensor) -> Done {
        self.call(Operator::Adds, &[a.into(), float(value), ONE, out.into()])
    }

    pub fn exp(&mut self, a: Tensor, out: Tensor) -> Done {
        self.call(Operator::Exp, &[a.into(), out.into()])
    }

    pub fn log(&mut self, a: Tensor, out: Tensor) -> Done {
        self.call(Operator::Log, &[a.into(), out.into()])
    }

    pub fn sigmoid(&mut self, a: Tensor, out: Tensor) -> Done {
        self.call(Operator::Sigmoid, &[a.into(), out.into()])
    }

    pub fn cast(&mut self, a: Tensor, out: Tensor) -> Done {
        self.call(Operator::Cast, &[a.into(), Argument::Dtype(out.kind), out.into()])
    }

    /// `to = from`, converted and broadcast where they differ.
    pub fn copy(&mut self, to: Tensor, from: Tensor) -> Done {
        self.call(Operator::InplaceCopy, &[to.into(), from.into()])
    }

    pub fn fill(&mut self, to: Tensor, value: f32) -> Done {
        self.call(Operator::InplaceFillScalar, &[to.into(), float(value)])
    }

    pub fn fill_integer(&mut self, to: Tensor, value: i64) -> Done {
        let value = Argument::Scalar(Scalar::Integer(value));
        self.call(Operator::InplaceFillScalar, &[to.into(), value])
    }

    pub fn zero(&mut self, to: Tensor) -> Done {
        self.call(Operator::InplaceZero, &[to.into()])
    }
}

/// Comparing and choosing.
impl Core {
    fn compare(
        &mut self,
        operator: Operator,
        a: Tensor,
        b: Argument,
    ) -> Result<Tensor, DeviceError> {
        let out = self.scratch(Kind::Bool, a.dims())?;
        self.call(operator, &[a.into(), b, out.into()])?;
        Ok(out)
    }

    /// Where integers equal a number.
    pub fn equals(&mut self, a: Tensor, value: i64) -> Result<Tensor, DeviceError> {
        self.compare(Operator::EqScalar, a, Argument::Scalar(Scalar::Integer(value)))
    }

    /// Where numbers equal zero.
    pub fn is_zero(&mut self, a: Tensor) -> Result<Tensor, DeviceError> {
        self.compare(Operator::EqScalar, a, float(0.0))
    }

    /// Where numbers are above zero.
    pub fn is_positive(&mut self, a: Tensor) -> Result<Tensor, DeviceError> {
        self.compare(Operator::GtScalar, a, float(0.0))
    }

    /// Where numbers are not numbers.
    pub fn is_nan(&mut self, a: Tensor) -> Result<Tensor, DeviceError> {
        self.compare(Operator::NeTensor, a, a.into())
    }

    /// Where numbers are finite.
    pub fn is_finite(&mut self, a: Tensor) -> Result<Tensor, DeviceError> {
        let out = self.scratch(Kind::Bool, a.dims())?;
        self.call(Operator::IsFinite, &[a.into(), out.into()])?;
        Ok(out)
    }

    /// Where integers are not in `0..count`.
    pub fn outside(&mut self, a: Tensor, count: usize) -> Result<Tensor, DeviceError> {
        let number = |value: usize| Argument::Scalar(Scalar::Integer(value as i64));
        let below = self.compare(Operator::LtScalar, a, number(0))?;
        let above = self.compare(Operator::GeScalar, a, number(count))?;
        self.call(Operator::LogicalOr, &[below.into(), above.into(), below.into()])?;
        Ok(below)
    }

    /// Where `a < b`, into a tensor of truth values of the given extents.
    pub fn less(&mut self, a: Tensor, b: Tensor, out: Tensor) -> Done {
        self.call(Operator::LtTensor, &[a.into(), b.into(), out.into()])
    }

    /// Where `a <= b`.
    pub fn at_most(&mut self, a: Tensor, b: Tensor, out: Tensor) -> Done {
        self.call(Operator::LeTensor, &[a.into(), b.into(), out.into()])
    }

    /// `out = condition ? a : b`.
    pub fn choose(&mut self, condition: Tensor, a: Tensor, b: Tensor, out: Tensor) -> Done {
        self.call(Operator::SWhere, &[condition.into(), a.into(), b.into(), out.into()])
    }

    /// Fills where a mask, broadcast over the tensor, is true.
    pub fn fill_where(&mut self, to: Tensor, mask: Tensor, value: f32) -> Done {
        self.call(Operator::InplaceMaskedFillScalar, &[to.into(), mask.into(), float(value)])
    }
}

/// Reductions and sorting.
impl Core {
    /// Sums f32 over one dimension, which stays with extent one.
    pub fn sum(&mut self, a: Tensor, axis: usize) -> Result<Tensor, DeviceError> {
        let mut dims = a.dims().to_vec();
        dims[axis] = 1;
        let out = self.scratch(Kind::F32, &dims)?;
        self.sum_into(a, axis, out)?;
        Ok(out)
    }

    /// Sums f32 over one dimension into a tensor in which it has extent one.
    pub fn sum_into(&mut self, a: Tensor, axis: usize, out: Tensor) -> Done {
        let axes = Argument::Integers(vec![axis as i64]);
        let (keep, to) = (Argument::Flag(true), Argument::Dtype(Kind::F32));
        self.call(Operator::ReduceSum, &[a.into(), axes, keep, to, out.into()])
    }

    /// The largest over one dimension, which stays with extent one.
    pub fn largest(&mut self, a: Tensor, axis: usize) -> Result<Tensor, DeviceError> {
        let mut dims = a.dims().to_vec();
        dims[axis] = 1;
        let out = self.scratch(a.kind, &dims)?;
        let axes = Argument::Integers(vec![axis as i64]);
        self.call(Operator::Amax, &[a.into(), axes, Argument::Flag(true), out.into()])?;
        Ok(out)
    }

    /// The index of the largest in each row, as i64 `[rows, 1]`.
    pub fn largest_index(&mut self, a: Tensor) -> Result<Tensor, DeviceError> {
        let out = self.scratch(Kind::I64, &[a.dim(0), 1])?;
        let axis = Argument::I64(1);
        self.call(Operator::ArgMax, &[a.into(), axis, Argument::Flag(true), out.into()])?;
        Ok(out)
    }

    /// The root of the sum of squares of each row of `[rows, width]`, in f32, as `[rows]`.
    pub fn norm(&mut self, a: Tensor) -> Result<Tensor, DeviceError> {
        let out = self.scratch(Kind::F32, &[a.dim(0)])?;
        let axes = Argument::Integers(vec![1]);
        let (keep, to) = (Argument::Flag(false), Argument::Dtype(Kind::F32));
        let arguments = [a.into(), float(2.0), axes, keep, to, out.into()];
        self.call(Operator::LinalgVectorNorm, &arguments)?;
        Ok(out)
    }

    /// Running sums along the last dimension.
    pub fn running_sum(&mut self, a: Tensor) -> Result<Tensor, DeviceError> {
        let out = self.scratch(Kind::F32, a.dims())?;
        let axis = Argument::I64(a.rank() as i64 - 1);
        self.call(Operator::Cumsum, &[a.into(), axis, Argument::Dtype(Kind::F32), out.into()])?;
        Ok(out)
    }

    /// Values along the last dimension in order, equal ones as they stood, and where they came
    /// from (i64).
    pub fn sorted(&mut self, a: Tensor, order: Order) -> Result<(Tensor, Tensor), DeviceError> {
        let values = self.scratch(a.kind, a.dims())?;
        let indices = self.scratch(Kind::I64, a.dims())?;
        let falling = Argument::Flag(order == Order::Falling);
        let axis = Argument::I64(a.rank() as i64 - 1);
        let (stable, outs) = (Argument::Flag(true), [values, indices]);
        let arguments = [a.into(), stable, axis, falling, outs[0].into(), outs[1].into()];
        self.call(Operator::Sort, &arguments)?;
        Ok((values, indices))
    }

    /// The softmax of each row.
    pub fn softmax(&mut self, a: Tensor) -> Result<Tensor, DeviceError> {
        let out = self.scratch(a.kind, a.dims())?;
        let axis = Argument::I64(a.rank() as i64 - 1);
        self.call(Operator::Softmax, &[a.into(), axis, out.into()])?;
        Ok(out)
    }
}

/// By index, and products.
impl Core {
    /// `out = a` at the places of `index` along one dimension.
    pub fn select(&mut self, a: Tensor, axis: usize, index: Tensor, out: Tensor) -> Done {
        let axis = Argument::I64(axis as i64);
        self.call(Operator::IndexSelect, &[a.into(), axis, index.into(), out.into()])
    }

    /// `out[r, j] = a[r, index[r, j]]`; index i64.
    pub fn gather(&mut self, a: Tensor, index: Tensor) -> Result<Tensor, DeviceError> {
        let out = self.scratch(a.kind, index.dims())?;
        let axis = Argument::I64(1);
        self.call(Operator::Gather, &[a.into(), axis, index.into(), out.into()])?;
        Ok(out)
    }

    /// `to[r, index[r, j]] = from[r, j]`; index i64, no place twice.
    pub fn scatter(&mut self, to: Tensor, index: Tensor, from: Tensor) -> Done {
        let (axis, reduce) = (Argument::I64(1), Argument::I64(0));
        let arguments = [to.into(), axis, index.into(), from.into(), reduce];
        self.call(Operator::InplaceScatter, &arguments)
    }

    /// `to[index[i]] = rows[i]`; index `[n, 1]`, no place twice; everything without gaps.
    pub fn place_rows(&mut self, to: Tensor, index: Tensor, rows: Tensor) -> Done {
        self.call(Operator::ScatterNdUpdate, &[to.into(), index.into(), rows.into()])
    }

    /// `out = a b`, in the operands' arithmetic with f32 sums.
    pub fn product(&mut self, a: Tensor, b: Tensor, out: Tensor) -> Done {
        let keep_dtype = Argument::I8(0);
        self.call(Operator::Matmul, &[a.into(), b.into(), out.into(), keep_dtype])
    }
}
