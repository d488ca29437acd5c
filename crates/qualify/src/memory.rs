//! Host images of device buffers, read and written as numbers through views.
//!
//! The f64 reference and the cases see tensors only through [`Memory`]; nothing here touches a
//! device. Read next: `reference/mod.rs`.

use std::collections::BTreeMap;

use half::{bf16, f16};
use pontoon_ops::{BufferId, DType, View};

/// Bytes before and after each tensor that no operation may touch.
pub const GUARD_BYTES: usize = 64;

/// The bytes of every buffer of a case, by buffer number.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Memory {
    buffers: Vec<Vec<u8>>,
    /// Buffers whose numbers are kept in full f64, with the bits of an element as views count it.
    wide: BTreeMap<BufferId, (usize, Vec<f64>)>,
    /// One element that reads as another number, for central differences.
    moved: Option<(BufferId, usize, f64)>,
}

impl Memory {
    /// Adds a buffer and returns its number.
    pub fn add(&mut self, bytes: Vec<u8>) -> BufferId {
        self.buffers.push(bytes);
        BufferId(self.buffers.len() as u32 - 1)
    }

    /// Adds a buffer of zeros whose numbers are kept in full f64, whatever its dtype.
    pub fn add_wide(&mut self, dtype: DType, elements: usize) -> BufferId {
        let buffer = self.add(Vec::new());
        self.wide.insert(buffer, (dtype.bits(), vec![0.0; elements]));
        buffer
    }

    /// Every buffer's bytes, in order of number.
    pub fn buffers(&self) -> &[Vec<u8>] {
        &self.buffers
    }

    /// The same buffers, to be replaced.
    pub fn buffers_mut(&mut self) -> &mut [Vec<u8>] {
        &mut self.buffers
    }

    /// The same memory where one element of `view` reads as `value`, in full f64.
    pub fn with_moved(&self, view: &View, element: usize, value: f64) -> Memory {
        let address = view.byte_offset + bit_offset(view, element) / 8;
        let moved = Some((view.buffer, address, value));
        Memory { buffers: self.buffers.clone(), wide: self.wide.clone(), moved }
    }

    /// The elements of a view in row-major order of its indices.
    pub fn read(&self, view: &View) -> Vec<f64> {
        if let Some((bits, values)) = self.wide.get(&view.buffer) {
            let first = view.byte_offset * 8 / bits;
            if view.is_contiguous() {
                return values[first..first + view.elements()].to_vec();
            }
            return offsets(view).into_iter().map(|at| values[first + at / bits]).collect();
        }
        let bytes = &self.buffers[view.buffer.0 as usize];
        let mut values: Vec<f64> = offsets(view)
            .into_iter()
            .map(|bits| decode(view.dtype, bytes, view.byte_offset * 8 + bits))
            .collect();
        if let Some((buffer, address, value)) = self.moved.filter(|m| m.0 == view.buffer) {
            let here = |bits: &usize| view.byte_offset + bits / 8 == address;
            debug_assert_eq!(buffer, view.buffer);
            for (bits, to) in offsets(view).iter().zip(&mut values).filter(|(bits, _)| here(bits)) {
                debug_assert_eq!(bits % 8, 0);
                *to = value;
            }
        }
        values
    }

    /// The elements of an integer view.
    pub fn read_integers(&self, view: &View) -> Vec<i64> {
        self.read(view).into_iter().map(|value| value as i64).collect()
    }

    /// Overwrites a view's elements, in row-major order of its indices, rounding to its dtype.
    pub fn write(&mut self, view: &View, values: &[f64]) {
        if let Some((bits, kept)) = self.wide.get_mut(&view.buffer) {
            let first = view.byte_offset * 8 / *bits;
            for (at, value) in offsets(view).into_iter().zip(values) {
                kept[first + at / *bits] = *value;
            }
            return;
        }
        let bytes = &mut self.buffers[view.buffer.0 as usize];
        for (bits, value) in offsets(view).into_iter().zip(values) {
            encode(view.dtype, bytes, view.byte_offset * 8 + bits, *value);
        }
    }

    /// The raw bytes of each element of a view, for comparing bits.
    pub fn bits(&self, view: &View) -> Vec<u32> {
        let bytes = &self.buffers[view.buffer.0 as usize];
        let raw = |bits: usize| {
            let at = view.byte_offset + bits / 8;
            let word = bytes[at..at + view.dtype.bits().div_ceil(8)].iter().rev();
            word.fold(0, |all, &byte| all << 8 | u32::from(byte))
        };
        offsets(view).into_iter().map(raw).collect()
    }
}

/// Bits from a view's first element to the one at row-major index `element`.
fn bit_offset(view: &View, element: usize) -> usize {
    offsets(view)[element]
}

/// Bits from a view's first element to each of its elements.
pub fn offsets(view: &View) -> Vec<usize> {
    let mut list = vec![0];
    for axis in 0..view.shape.rank() {
        let step = view.stride(axis) * view.dtype.bits();
        list = list.iter().flat_map(|&o| (0..view.dim(axis)).map(move |i| o + i * step)).collect();
    }
    list
}

fn decode(dtype: DType, bytes: &[u8], bits: usize) -> f64 {
    let at = bits / 8;
    let four = || [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
    let two = || [bytes[at], bytes[at + 1]];
    match dtype {
        DType::F32 => f64::from(f32::from_le_bytes(four())),
        DType::Bf16 => f64::from(bf16::from_le_bytes(two())),
        DType::F16 => f64::from(f16::from_le_bytes(two())),
        DType::I32 => f64::from(i32::from_le_bytes(four())),
        DType::U32 => f64::from(u32::from_le_bytes(four())),
        DType::I8 => f64::from(bytes[at] as i8),
        DType::I4 => f64::from(((bytes[at] >> (bits % 8) << 4) as i8) >> 4),
        DType::F8e4m3 => e4m3(bytes[at]),
    }
}

fn encode(dtype: DType, bytes: &mut [u8], bits: usize, value: f64) {
    let at = bits / 8;
    let mut put = |raw: &[u8]| bytes[at..at + raw.len()].copy_from_slice(raw);
    match dtype {
        DType::F32 => put(&(value as f32).to_le_bytes()),
        DType::Bf16 => put(&bf16::from_f64(value).to_le_bytes()),
        DType::F16 => put(&f16::from_f64(value).to_le_bytes()),
        DType::I32 => put(&(value as i32).to_le_bytes()),
        DType::U32 => put(&(value as u32).to_le_bytes()),
        // Weights of this type are never -128.
        DType::I8 => put(&[value.clamp(-127.0, 127.0) as i8 as u8]),
        DType::F8e4m3 => put(&[nearest_e4m3(value)]),
        DType::I4 => {
            let shift = bits % 8;
            bytes[at] = bytes[at] & !(0xf << shift) | ((value as i8 as u8) & 0xf) << shift;
        }
    }
}

/// The value of an e4m3 byte, written from the format's own definition.
fn e4m3(byte: u8) -> f64 {
    let sign = if byte & 0x80 == 0 { 1.0 } else { -1.0 };
    let exponent = i32::from(byte >> 3 & 0xf);
    let fraction = f64::from(byte & 7);
    match (exponent, byte & 7) {
        (15, 7) => f64::NAN,
        (0, _) => sign * fraction * 2f64.powi(-9),
        _ => sign * (8.0 + fraction) * 2f64.powi(exponent - 10),
    }
}

fn nearest_e4m3(value: f64) -> u8 {
    let finite = (0..=255_u8).filter(|byte| byte & 0x7f != 0x7f);
    let distance = |byte: &u8| (e4m3(*byte) - value).abs();
    finite.min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap_or(0x7f)
}

/// A value as it stands after one rounding to `dtype`; f32 is left as it is, because its
/// rounding lies within every tolerance.
pub fn rounded(dtype: DType, value: f64) -> f64 {
    match dtype {
        DType::Bf16 => f64::from(bf16::from_f32(value as f32)),
        DType::F16 => f64::from(f16::from_f32(value as f32)),
        _ => value,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_dtype_reads_back_what_was_written_through_a_strided_view() {
        for dtype in DType::ALL {
            let mut memory = Memory::default();
            let buffer = memory.add(vec![0; 64]);
            let view = View::contiguous(buffer, dtype, [3, 4]).slice(1, 2, 2);
            let values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
            memory.write(&view, &values);
            assert_eq!(memory.read(&view), values, "{dtype}");
        }
    }

    #[test]
    fn e4m3_has_the_published_extremes() {
        assert_eq!(e4m3(0x7e), 448.0);
        assert_eq!(e4m3(0x01), 2f64.powi(-9));
        assert_eq!(e4m3(0x08), 2f64.powi(-6));
        assert!(e4m3(0xff).is_nan());
    }

    #[test]
    fn a_moved_element_reads_in_full_precision() {
        let mut memory = Memory::default();
        let buffer = memory.add(vec![0; 16]);
        let view = View::contiguous(buffer, DType::F32, [4]);
        assert_eq!(memory.with_moved(&view, 2, 1e-300).read(&view), [0.0, 0.0, 1e-300, 0.0]);
    }
}
