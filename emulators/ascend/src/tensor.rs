//! Descriptors: what `aclCreateTensor` and `aclCreateScalar` hold, and how operators see them.

use std::sync::atomic::{AtomicU64, Ordering};

use half::{bf16, f16};

use crate::dtype::DataType;
use crate::failure::{Done, Failure};
use crate::strict::{self, Breach};

/// A tensor's descriptor.
#[derive(Debug)]
pub struct Tensor {
    /// Element type.
    pub dtype: DataType,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// Elements to step, by dimension.
    pub strides: Vec<usize>,
    /// Elements from the address to the first one.
    pub offset: usize,
    /// Elements of the memory that the view lies in.
    pub storage: Vec<usize>,
    /// `aclFormat`.
    pub format: i32,
    /// Device address of the storage.
    pub address: AtomicU64,
}

impl Tensor {
    /// Elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Elements from the first to the last, gaps included.
    pub fn span(&self) -> usize {
        if self.elements() == 0 {
            return 0;
        }
        let reach = self.shape.iter().zip(&self.strides).map(|(extent, step)| (extent - 1) * step);
        reach.sum::<usize>() + 1
    }

    /// The address of the storage.
    pub fn base(&self) -> u64 {
        self.address.load(Ordering::Relaxed)
    }

    /// Fails if the view reaches beyond its storage.
    pub fn check(&self, what: &str) -> Done {
        let storage: usize = self.storage.iter().product();
        let end = self.offset + self.span();
        if self.span() > 0 && end > storage {
            let text = format!(
                "{what}: view {:?} with strides {:?} at {} ends at element {end} of {storage}",
                self.shape, self.strides, self.offset
            );
            return Err(strict::breach(-1, Breach::OutOfBounds, Failure::operator(text)));
        }
        Ok(())
    }
}

/// A number that the host passes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scalar {
    /// Its type as passed.
    pub dtype: DataType,
    /// Its value; exact for all integers below 2^53.
    pub value: f64,
    /// Its value if it is an integer.
    pub integer: i64,
}

impl Scalar {
    /// Reads a number of a type from its first bytes.
    pub fn read(dtype: DataType, bytes: [u8; 8]) -> Done<Scalar> {
        let word = u64::from_le_bytes(bytes);
        let integer = match dtype {
            DataType::I8 => i64::from(word as i8),
            DataType::U8 => i64::from(word as u8),
            DataType::I16 => i64::from(word as i16),
            DataType::I32 => i64::from(word as i32),
            DataType::U32 => i64::from(word as u32),
            DataType::I64 | DataType::U64 => word as i64,
            DataType::Bool => i64::from(word as u8 != 0),
            _ => 0,
        };
        let value = match dtype {
            DataType::F32 => f64::from(f32::from_bits(word as u32)),
            DataType::F64 => f64::from_bits(word),
            DataType::F16 => f16::from_bits(word as u16).to_f64(),
            DataType::Bf16 => bf16::from_bits(word as u16).to_f64(),
            DataType::I4 | DataType::F8e4m3 => {
                return Err(Failure::operator(format!("a scalar cannot be {dtype:?}")));
            }
            _ => integer as f64,
        };
        Ok(Scalar { dtype, value, integer })
    }

    /// As an f32.
    pub fn float(self) -> f32 {
        self.value as f32
    }

    /// As an integer, whatever it was passed as.
    pub fn whole(self) -> i64 {
        if self.dtype.is_float() || self.dtype == DataType::F64 {
            self.value as i64
        } else {
            self.integer
        }
    }
}
