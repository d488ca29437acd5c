//! Element types by CANN's numbers, and their sizes.

use crate::failure::{Done, Failure};

/// An element type that the emulated chip computes with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DataType {
    /// 32-bit float.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
    /// Signed bytes.
    I8,
    /// Unsigned bytes.
    U8,
    /// 32-bit integers.
    I32,
    /// 32-bit unsigned integers.
    U32,
    /// 64-bit integers.
    I64,
    /// 64-bit unsigned integers.
    U64,
    /// 64-bit float: host scalars only.
    F64,
    /// Truth in a byte.
    Bool,
    /// Two signed numbers a byte: weights only.
    I4,
    /// Eight-bit floats of four exponent bits: weights only.
    F8e4m3,
    /// 16-bit integers.
    I16,
}

impl DataType {
    /// The type of a number of `aclDataType`.
    pub fn from_number(number: i32) -> Done<DataType> {
        Ok(match number {
            0 => DataType::F32,
            1 => DataType::F16,
            2 => DataType::I8,
            3 => DataType::I32,
            4 => DataType::U8,
            6 => DataType::I16,
            8 => DataType::U32,
            9 => DataType::I64,
            10 => DataType::U64,
            11 => DataType::F64,
            12 => DataType::Bool,
            27 => DataType::Bf16,
            29 => DataType::I4,
            36 => DataType::F8e4m3,
            _ => {
                let text = format!("data type {number} is not one the emulated chip has");
                return Err(Failure::operator(text));
            }
        })
    }

    /// Its number in `aclDataType`.
    pub fn number(self) -> i32 {
        match self {
            DataType::F32 => 0,
            DataType::F16 => 1,
            DataType::I8 => 2,
            DataType::I32 => 3,
            DataType::U8 => 4,
            DataType::I16 => 6,
            DataType::U32 => 8,
            DataType::I64 => 9,
            DataType::U64 => 10,
            DataType::F64 => 11,
            DataType::Bool => 12,
            DataType::Bf16 => 27,
            DataType::I4 => 29,
            DataType::F8e4m3 => 36,
        }
    }

    /// Bits of an element.
    pub fn bits(self) -> usize {
        match self {
            DataType::F32 | DataType::I32 | DataType::U32 => 32,
            DataType::F16 | DataType::Bf16 | DataType::I16 => 16,
            DataType::I8 | DataType::U8 | DataType::Bool | DataType::F8e4m3 => 8,
            DataType::I64 | DataType::U64 | DataType::F64 => 64,
            DataType::I4 => 4,
        }
    }

    /// Bytes of a number of elements.
    pub fn bytes(self, elements: usize) -> usize {
        (elements * self.bits()).div_ceil(8)
    }

    /// The alignment its elements need.
    pub fn alignment(self) -> u64 {
        self.bits().div_ceil(8) as u64
    }

    /// Whether it is a float of 16 or 32 bits.
    pub fn is_float(self) -> bool {
        matches!(self, DataType::F32 | DataType::F16 | DataType::Bf16)
    }

    /// Whether it can stand for an index.
    pub fn is_index(self) -> bool {
        matches!(self, DataType::I32 | DataType::I64)
    }
}
