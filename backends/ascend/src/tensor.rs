//! Tensors as CANN sees them: an address, an element type, extents and strides, up to six
//! dimensions; and the views that compositions make of them.
//!
//! Owns no memory and calls nothing. Read next: `core.rs`.

use pontoon_ops::{DType, View};

/// The most dimensions a descriptor may have.
pub const DIMS_MAX: usize = 6;

/// An element type with CANN's number for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// `ACL_FLOAT`.
    F32,
    /// `ACL_FLOAT16`.
    F16,
    /// `ACL_BF16`.
    Bf16,
    /// `ACL_INT8`.
    I8,
    /// `ACL_UINT8`: bytes whose meaning the backend keeps to itself.
    U8,
    /// `ACL_INT32`.
    I32,
    /// `ACL_INT64`.
    I64,
    /// `ACL_BOOL`.
    Bool,
}

impl Kind {
    /// The number of `aclDataType`.
    pub fn code(self) -> i32 {
        match self {
            Kind::F32 => 0,
            Kind::F16 => 1,
            Kind::I8 => 2,
            Kind::I32 => 3,
            Kind::U8 => 4,
            Kind::I64 => 9,
            Kind::Bool => 12,
            Kind::Bf16 => 27,
        }
    }

    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Kind::F32 | Kind::I32 => 4,
            Kind::F16 | Kind::Bf16 => 2,
            Kind::I8 | Kind::U8 | Kind::Bool => 1,
            Kind::I64 => 8,
        }
    }
}

impl From<DType> for Kind {
    fn from(dtype: DType) -> Kind {
        match dtype {
            DType::F32 => Kind::F32,
            DType::F16 => Kind::F16,
            DType::Bf16 => Kind::Bf16,
            // Random keys are only moved, so their sign does not matter.
            DType::I32 | DType::U32 => Kind::I32,
            DType::I8 => Kind::I8,
            DType::F8e4m3 | DType::I4 => Kind::U8,
        }
    }
}

/// A tensor in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Where the first element lies.
    pub address: usize,
    /// The element type.
    pub kind: Kind,
    rank: usize,
    dims: [usize; DIMS_MAX],
    strides: [usize; DIMS_MAX],
}

impl Tensor {
    /// A tensor without gaps.
    pub fn contiguous(address: usize, kind: Kind, dims: &[usize]) -> Tensor {
        assert!(dims.len() <= DIMS_MAX, "a descriptor has at most {DIMS_MAX} dimensions");
        let mut tensor =
            Tensor { address, kind, rank: dims.len(), dims: [1; 6], strides: [1; DIMS_MAX] };
        tensor.dims[..dims.len()].copy_from_slice(dims);
        let mut step = 1;
        for axis in (0..dims.len()).rev() {
            tensor.strides[axis] = step;
            step *= dims[axis].max(1);
        }
        tensor
    }

    /// A view whose buffer begins at `base`. Repeated dimensions shrink to one element: CANN's
    /// calls broadcast by extent.
    pub fn of(view: &View, base: usize) -> Tensor {
        let flat = view.unbroadcast();
        let mut tensor =
            Tensor::contiguous(base + view.byte_offset, view.dtype.into(), flat.dims());
        for (axis, &stride) in view.strides().iter().enumerate() {
            tensor.strides[axis] = if tensor.dims[axis] <= 1 { 1 } else { stride };
        }
        // A single number is a row of one to the vendor.
        if tensor.rank == 0 { tensor.widen(0) } else { tensor }
    }

    /// The extents.
    pub fn dims(&self) -> &[usize] {
        &self.dims[..self.rank]
    }

    /// One extent.
    pub fn dim(&self, axis: usize) -> usize {
        self.dims()[axis]
    }

    /// Elements to step in each dimension.
    pub fn strides(&self) -> &[usize] {
        &self.strides[..self.rank]
    }

    /// The number of dimensions.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.dims().iter().product()
    }

    /// Elements from the first to one past the last.
    pub fn span(&self) -> usize {
        if self.elements() == 0 {
            return 0;
        }
        1 + self.dims().iter().zip(self.strides()).map(|(d, s)| (d - 1) * s).sum::<usize>()
    }

    /// Whether the elements lie in order without gaps.
    pub fn is_contiguous(&self) -> bool {
        let plain = Tensor::contiguous(self.address, self.kind, self.dims());
        let same = |axis: usize| self.dims[axis] <= 1 || self.strides[axis] == plain.strides[axis];
        (0..self.rank).all(same)
    }

    /// A part of one dimension.
    pub fn slice(&self, axis: usize, start: usize, length: usize) -> Tensor {
        assert!(start + length <= self.dim(axis), "slice beyond {:?}", self.dims());
        let mut part = *self;
        part.dims[axis] = length;
        part.address += start * self.strides[axis] * self.kind.bytes();
        part
    }

    /// Every `step`-th element of one dimension, from `start` on.
    pub fn stepped(&self, axis: usize, start: usize, step: usize) -> Tensor {
        let mut part = self.slice(axis, start, self.dim(axis) - start);
        part.dims[axis] = part.dims[axis].div_ceil(step);
        part.strides[axis] *= step;
        part
    }

    /// The same elements, which lie without gaps, under other extents.
    pub fn reshape(&self, dims: &[usize]) -> Tensor {
        assert!(self.is_contiguous(), "reshape of a tensor with gaps {self:?}");
        assert_eq!(dims.iter().product::<usize>(), self.elements(), "reshape to {dims:?}");
        Tensor::contiguous(self.address, self.kind, dims)
    }

    /// Two dimensions exchanged.
    pub fn transpose(&self, first: usize, second: usize) -> Tensor {
        let mut turned = *self;
        turned.dims.swap(first, second);
        turned.strides.swap(first, second);
        turned
    }

    /// A dimension of one element put in before `axis`.
    pub fn widen(&self, axis: usize) -> Tensor {
        assert!(self.rank < DIMS_MAX && axis <= self.rank, "no room for another dimension");
        let mut wide = *self;
        wide.dims.copy_within(axis..self.rank, axis + 1);
        wide.strides.copy_within(axis..self.rank, axis + 1);
        wide.dims[axis] = 1;
        wide.strides[axis] = 1;
        wide.rank += 1;
        wide
    }

    /// One dimension split into two.
    pub fn split(&self, axis: usize, outer: usize) -> Tensor {
        let inner = self.dim(axis) / outer;
        assert_eq!(inner * outer, self.dim(axis), "split of {:?} by {outer}", self.dims());
        let mut wide = self.widen(axis);
        wide.dims[axis] = outer;
        wide.dims[axis + 1] = inner;
        wide.strides[axis] = self.strides[axis] * inner;
        wide
    }

    /// Two neighbouring dimensions joined, where their strides allow it.
    pub fn join(&self, axis: usize) -> Option<Tensor> {
        let (outer, inner) = (self.dim(axis), self.dim(axis + 1));
        let fits = outer <= 1 || inner <= 1 || self.strides[axis] == inner * self.strides[axis + 1];
        if !fits {
            return None;
        }
        let mut joined = *self;
        if inner <= 1 {
            joined.strides[axis + 1] = self.strides[axis];
        }
        joined.dims[axis + 1] = outer * inner;
        joined.dims.copy_within(axis + 1..self.rank, axis);
        joined.strides.copy_within(axis + 1..self.rank, axis);
        joined.rank -= 1;
        joined.dims[joined.rank] = 1;
        joined.strides[joined.rank] = 1;
        Some(joined)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pontoon_ops::BufferId;

    #[test]
    fn views_keep_their_place_through_slices_splits_and_joins() {
        let tensor = Tensor::contiguous(1024, Kind::Bf16, &[4, 6]);
        assert_eq!(tensor.slice(1, 2, 3).address, 1028);
        assert!(!tensor.slice(1, 2, 3).is_contiguous());
        let split = tensor.split(1, 3);
        assert_eq!((split.dims(), split.strides()), (&[4, 3, 2][..], &[6, 2, 1][..]));
        assert_eq!(split.join(1), Some(tensor));
        assert_eq!(tensor.slice(1, 0, 4).join(0), None);
        let odd = tensor.stepped(1, 1, 2);
        assert_eq!((odd.dims(), odd.strides(), odd.span()), (&[4, 3][..], &[6, 2][..], 23));
    }

    #[test]
    fn a_repeated_dimension_is_one_element() {
        let view = View::contiguous(BufferId(0), DType::F32, [4, 1, 9]).broadcast(1, 3);
        let tensor = Tensor::of(&view, 64);
        assert_eq!(tensor.dims(), [4, 1, 9]);
        assert!(tensor.is_contiguous());
    }
}
