//! Where a tensor lies: a buffer, an offset, a shape and strides.
//!
//! A view is a plain value and owns nothing; the same type names a virtual buffer of a program and
//! a physical buffer of a backend. Read next: `op.rs`.

use serde::{Deserialize, Serialize};

use crate::dtype::DType;

/// The most dimensions a view may have; attention needs three, paged caches four.
pub const RANK_MAX: usize = 4;

/// Names a buffer: virtual in a program, physical in a backend.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
pub struct BufferId(pub u32);

/// The extents of a tensor, outermost first.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    dims: [usize; RANK_MAX],
    rank: u8,
}

impl Shape {
    /// A shape of at most [`RANK_MAX`] extents.
    pub fn new(extents: &[usize]) -> Self {
        assert!(extents.len() <= RANK_MAX, "a view has at most {RANK_MAX} dimensions");
        let mut dims = [1; RANK_MAX];
        dims[..extents.len()].copy_from_slice(extents);
        Shape { dims, rank: extents.len() as u8 }
    }

    /// The extents, outermost first.
    pub fn dims(&self) -> &[usize] {
        &self.dims[..self.rank as usize]
    }

    /// The number of dimensions.
    pub fn rank(&self) -> usize {
        self.rank as usize
    }

    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.dims().iter().product()
    }
}

impl std::fmt::Debug for Shape {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{:?}", self.dims())
    }
}

impl From<&[usize]> for Shape {
    fn from(extents: &[usize]) -> Self {
        Shape::new(extents)
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(extents: [usize; N]) -> Self {
        Shape::new(&extents)
    }
}

/// A tensor's place in a buffer. Strides count elements; the last dimension's stride is 1 unless
/// the view is a broadcast or a transposition, which only `Copy`, `Add` and `ReduceTree` accept.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "PlainView", into = "PlainView")]
pub struct View {
    /// The buffer the elements lie in.
    pub buffer: BufferId,
    /// Bytes from the buffer's start to the first element.
    pub byte_offset: usize,
    /// The element type.
    pub dtype: DType,
    /// The extents.
    pub shape: Shape,
    strides: [usize; RANK_MAX],
}

/// A view as it stands in a file, where nothing holds yet.
#[derive(Serialize, Deserialize)]
struct PlainView {
    buffer: BufferId,
    byte_offset: usize,
    dtype: DType,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

impl From<View> for PlainView {
    fn from(view: View) -> PlainView {
        let View { buffer, byte_offset, dtype, .. } = view;
        let (shape, strides) = (view.dims().to_vec(), view.strides().to_vec());
        PlainView { buffer, byte_offset, dtype, shape, strides }
    }
}

impl TryFrom<PlainView> for View {
    type Error = String;

    fn try_from(plain: PlainView) -> Result<View, String> {
        let PlainView { buffer, byte_offset, dtype, shape, strides } = plain;
        let rank = shape.len();
        if rank > RANK_MAX || strides.len() != rank {
            return Err(format!("shape {shape:?} and strides {strides:?} do not make a view"));
        }
        // What comes later multiplies these; no tensor is near the limit of the address space.
        let reach = |(&extent, &step): (&usize, &usize)| (extent as u128) * (step as u128);
        let last = shape.iter().zip(&strides).map(reach).fold(byte_offset as u128, u128::max);
        let times = |all: u128, &extent: &usize| all.saturating_mul(extent as u128);
        if last.max(shape.iter().fold(1, times)) > 1 << 44 {
            return Err(format!("shape {shape:?} with strides {strides:?} is beyond any memory"));
        }
        let mut steps = [1; RANK_MAX];
        steps[..rank].copy_from_slice(&strides);
        Ok(View { buffer, byte_offset, dtype, shape: Shape::new(&shape), strides: steps })
    }
}

impl View {
    /// A contiguous (row-major) view from the start of `buffer`.
    pub fn contiguous(buffer: BufferId, dtype: DType, shape: impl Into<Shape>) -> Self {
        let shape = shape.into();
        View { buffer, byte_offset: 0, dtype, shape, strides: row_major(&shape) }
    }

    /// The extents, outermost first.
    pub fn dims(&self) -> &[usize] {
        self.shape.dims()
    }

    /// The extent of one dimension.
    pub fn dim(&self, axis: usize) -> usize {
        self.dims()[axis]
    }

    /// Elements to step for each dimension.
    pub fn strides(&self) -> &[usize] {
        &self.strides[..self.shape.rank()]
    }

    /// Elements to step in one dimension.
    pub fn stride(&self, axis: usize) -> usize {
        self.strides()[axis]
    }

    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.shape.elements()
    }

    /// Whether the elements lie without gaps in row-major order.
    pub fn is_contiguous(&self) -> bool {
        let expected = row_major(&self.shape);
        (0..self.shape.rank())
            .all(|axis| self.dim(axis) <= 1 || self.strides[axis] == expected[axis])
    }

    /// Whether each row (last dimension) lies without gaps.
    pub fn has_dense_rows(&self) -> bool {
        let rank = self.shape.rank();
        rank == 0 || self.dim(rank - 1) <= 1 || self.strides[rank - 1] == 1
    }

    /// Whether some element is reached by more than one index (a stride of zero).
    pub fn is_broadcast(&self) -> bool {
        (0..self.shape.rank()).any(|axis| self.dim(axis) > 1 && self.strides[axis] == 0)
    }

    /// Bytes from the first element to one past the last.
    pub fn span_bytes(&self) -> usize {
        if self.elements() == 0 {
            return 0;
        }
        let last: usize =
            (0..self.shape.rank()).map(|axis| (self.dim(axis) - 1) * self.strides[axis]).sum();
        self.dtype.bytes(last + 1)
    }

    /// The part `start..start + length` of one dimension.
    pub fn slice(&self, axis: usize, start: usize, length: usize) -> Self {
        assert!(start + length <= self.dim(axis), "slice beyond {:?}", self.shape);
        let skipped = start * self.strides[axis];
        assert!((skipped * self.dtype.bits()).is_multiple_of(8), "slice splits a byte");
        let mut dims = [0; RANK_MAX];
        let rank = self.shape.rank();
        dims[..rank].copy_from_slice(self.dims());
        dims[axis] = length;
        View {
            byte_offset: self.byte_offset + skipped * self.dtype.bits() / 8,
            shape: Shape::new(&dims[..rank]),
            ..*self
        }
    }

    /// The same elements under another shape. The view must be contiguous.
    pub fn reshape(&self, shape: impl Into<Shape>) -> Self {
        let shape = shape.into();
        assert!(self.is_contiguous(), "reshape of a strided view {self:?}");
        assert_eq!(shape.elements(), self.elements(), "reshape {:?} to {shape:?}", self.shape);
        View { shape, strides: row_major(&shape), ..*self }
    }

    /// Splits the last dimension into `[parts, width]`; works on strided rows too.
    pub fn split_last(&self, parts: usize) -> Self {
        let rank = self.shape.rank();
        let last = self.dim(rank - 1);
        assert!(rank < RANK_MAX && parts > 0 && last.is_multiple_of(parts), "split {last}/{parts}");
        let mut dims = self.shape.dims;
        let mut strides = self.strides;
        dims[rank] = last / parts;
        strides[rank] = strides[rank - 1];
        dims[rank - 1] = parts;
        strides[rank - 1] *= last / parts;
        View { shape: Shape::new(&dims[..=rank]), strides, ..*self }
    }

    /// Repeats a dimension of extent 1 `count` times without moving memory (stride 0).
    pub fn broadcast(&self, axis: usize, count: usize) -> Self {
        assert_eq!(self.dim(axis), 1, "only a dimension of extent 1 can be repeated");
        let mut dims = self.shape.dims;
        let mut strides = self.strides;
        dims[axis] = count;
        strides[axis] = 0;
        View { shape: Shape::new(&dims[..self.shape.rank()]), strides, ..*self }
    }

    /// Leaves out a dimension of extent 1.
    pub fn drop_axis(&self, axis: usize) -> Self {
        assert_eq!(self.dim(axis), 1, "only a dimension of extent 1 can be left out");
        let rank = self.shape.rank();
        let mut dims = self.shape.dims;
        let mut strides = self.strides;
        dims.copy_within(axis + 1..rank, axis);
        strides.copy_within(axis + 1..rank, axis);
        View { shape: Shape::new(&dims[..rank - 1]), strides, ..*self }
    }

    /// The extent-1 form of each repeated dimension: what a broadcast was made from.
    pub fn unbroadcast(&self) -> Self {
        let rank = self.shape.rank();
        let mut dims = self.shape.dims;
        for (extent, stride) in dims.iter_mut().zip(self.strides) {
            if stride == 0 {
                *extent = (*extent).min(1);
            }
        }
        View { shape: Shape::new(&dims[..rank]), ..*self }
    }

    /// Swaps two dimensions without moving memory.
    pub fn transpose(&self, first: usize, second: usize) -> Self {
        let mut dims = self.shape.dims;
        let mut strides = self.strides;
        dims.swap(first, second);
        strides.swap(first, second);
        View { shape: Shape::new(&dims[..self.shape.rank()]), strides, ..*self }
    }

    /// The same place in another buffer, `bytes` further on.
    pub fn rebased(&self, buffer: BufferId, bytes: usize) -> Self {
        View { buffer, byte_offset: self.byte_offset + bytes, ..*self }
    }

    /// Whether two views can share a byte. Two slices of one parent that differ in an inner
    /// dimension interleave without touching; that is recognised when their strides are equal.
    pub fn may_overlap(&self, other: &View) -> bool {
        if self.buffer != other.buffer || self.elements() == 0 || other.elements() == 0 {
            return false;
        }
        let (low, high) =
            if self.byte_offset <= other.byte_offset { (self, other) } else { (other, self) };
        let apart = high.byte_offset - low.byte_offset;
        if apart >= low.span_bytes() {
            return false;
        }
        !interleaves(low, high, apart * 8 / low.dtype.bits().max(1))
    }
}

/// Whether `high`, which starts `apart` elements into `low`'s span, lies in its gaps only.
fn interleaves(low: &View, high: &View, apart: usize) -> bool {
    let rank = low.shape.rank();
    if low.dtype != high.dtype || rank != high.shape.rank() || rank < 2 {
        return false;
    }
    // The innermost dimension whose stride is the parents' row: everything inside must be disjoint.
    (0..rank - 1).any(|axis| {
        let period = low.strides[axis];
        let inner = |view: &View| -> usize {
            (axis + 1..rank).map(|a| (view.dim(a).max(1) - 1) * view.strides[a]).sum::<usize>() + 1
        };
        let outer_equal = (0..=axis).all(|a| low.strides[a] == high.strides[a]);
        outer_equal && period > 0 && inner(low) <= apart && apart + inner(high) <= period
    })
}

impl std::fmt::Debug for View {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            formatter,
            "b{}+{} {}{:?}",
            self.buffer.0, self.byte_offset, self.dtype, self.shape
        )?;
        if !self.is_contiguous() {
            write!(formatter, "/{:?}", self.strides())?;
        }
        Ok(())
    }
}

fn row_major(shape: &Shape) -> [usize; RANK_MAX] {
    let mut strides = [1; RANK_MAX];
    for axis in (0..shape.rank().saturating_sub(1)).rev() {
        strides[axis] = strides[axis + 1] * shape.dims[axis + 1];
    }
    strides
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parent() -> View {
        View::contiguous(BufferId(3), DType::Bf16, [5, 4, 6])
    }

    #[test]
    fn slices_of_the_last_dimension_do_not_overlap_but_the_parent_does() {
        let (left, right) = (parent().slice(2, 0, 2), parent().slice(2, 2, 4));
        assert!(!left.may_overlap(&right) && !right.may_overlap(&left));
        assert!(left.may_overlap(&parent()) && right.may_overlap(&parent()));
        assert!(left.may_overlap(&parent().slice(2, 1, 2)));
    }

    #[test]
    fn slices_of_a_middle_dimension_do_not_overlap() {
        let (first, last) = (parent().slice(1, 0, 1), parent().slice(1, 1, 3));
        assert!(!first.may_overlap(&last));
        assert!(last.may_overlap(&parent().slice(1, 3, 1)));
    }

    #[test]
    fn splitting_a_strided_slice_keeps_its_elements() {
        let slice = View::contiguous(BufferId(0), DType::F32, [3, 10]).slice(1, 2, 6);
        let split = slice.split_last(2);
        assert_eq!(split.dims(), [3, 2, 3]);
        assert_eq!(split.strides(), [10, 3, 1]);
        assert_eq!(split.byte_offset, 8);
    }

    #[test]
    fn a_broadcast_dimension_has_no_span_of_its_own() {
        let row = View::contiguous(BufferId(0), DType::F32, [4, 1, 8]).broadcast(1, 3);
        assert!(row.is_broadcast());
        assert_eq!(row.span_bytes(), 4 * 8 * 4);
        assert_eq!(row.elements(), 96);
    }
}
