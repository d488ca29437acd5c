//! Word sums: the cheapest check that a tensor in memory is still what was stored there.
//!
//! The sum of a tensor is that of its rows' 32-bit little-endian words, a row's last word filled
//! up with zeros, modulo 2^32. Any one flipped bit changes it for certain; it adds up over parts
//! and in any order, so a kernel can form it while the data passes. For comparing replicas there
//! is [`crate::digest`]. Read next: `backend.rs`, where an operation is launched with sums.

use crate::backend::Backend;
use crate::contract::Accumulate;
use crate::error::DeviceError;
use crate::op::{Access, Op, Operand};
use crate::view::View;

/// Most operands of an operation.
pub const OPERANDS_MAX: usize = 16;
/// Bytes fetched at a time by a device that cannot sum in place.
const PIECE: usize = 256 << 10;

/// The sum of one row.
#[inline(always)]
pub fn of_row(bytes: &[u8]) -> u32 {
    let words = bytes.chunks_exact(4);
    let rest = words.remainder();
    let mut sum = 0_u32;
    for word in words {
        sum = sum.wrapping_add(u32::from_le_bytes(word.try_into().expect("chunks of four")));
    }
    if rest.is_empty() {
        return sum;
    }
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    sum.wrapping_add(u32::from_le_bytes(last))
}

/// Where a view's bytes lie: `count` runs of `bytes`, of which each begins `step` after the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Runs {
    /// Bytes from the buffer's start to the first run.
    pub start: usize,
    /// Bytes of a run.
    pub bytes: usize,
    /// Runs.
    pub count: usize,
    /// Bytes from one run's start to the next one's.
    pub step: usize,
}

/// The runs of a view, or none if its rows have gaps or its outer dimensions do not fold into one.
pub fn runs(view: &View) -> Option<Runs> {
    let rank = view.shape.rank();
    let width = if rank == 0 { 1 } else { view.dim(rank - 1) };
    let bytes = view.dtype.bytes(width);
    let start = view.byte_offset;
    if !view.has_dense_rows() || view.is_broadcast() || view.dtype.bits() < 8 {
        return None;
    }
    let count = view.elements().checked_div(width).unwrap_or(0);
    if view.is_contiguous() && bytes.is_multiple_of(4) {
        return Some(Runs { start, bytes: bytes * count, count: 1, step: bytes * count });
    }
    // Outer dimensions of more than one element must step evenly.
    let outer: Vec<usize> =
        (0..rank.saturating_sub(1)).filter(|&axis| view.dim(axis) > 1).collect();
    let even = outer
        .windows(2)
        .all(|pair| view.stride(pair[0]) == view.stride(pair[1]) * view.dim(pair[1]));
    let step = outer.last().map_or(width, |&axis| view.stride(axis));
    even.then_some(Runs { start, bytes, count, step: view.dtype.bytes(step) })
}

/// Which operands of an operation are to be summed: bit i stands for operand i.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ask {
    /// As they are read.
    pub read: u32,
    /// As they are written.
    pub written: u32,
    /// As they are changed: of what is written the sum is its change, which costs little where an
    /// operation adds to a few rows of many.
    pub changed: u32,
    /// Contiguous operands whose digests are asked for, as they are read and as they are written;
    /// [`Backend::digest`] says what they are.
    pub digested: u32,
}

impl Ask {
    /// Whether nothing is asked for.
    pub fn is_empty(self) -> bool {
        self == Ask::default()
    }
}

/// The sums that were asked for, by operand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sums {
    /// What was read.
    pub read: [u32; OPERANDS_MAX],
    /// What was written, or by how much it changed.
    pub written: [u32; OPERANDS_MAX],
    /// Digests of what was read.
    pub digest_read: [u64; OPERANDS_MAX],
    /// Digests of what was written.
    pub digest_written: [u64; OPERANDS_MAX],
}

impl Sums {
    /// Takes what was there before from what was written.
    pub fn subtract(&mut self, before: &[u32; OPERANDS_MAX]) {
        let pairs = self.written.iter_mut().zip(before);
        pairs.for_each(|(sum, before)| *sum = sum.wrapping_sub(*before));
    }
}

/// The operand that an operation adds to in a few rows of many, if it is such a one.
pub fn adds_to_rows(op: &Op) -> Option<usize> {
    match op {
        Op::EmbedBwd(embed) if embed.accumulate == Accumulate::Add => Some(2),
        _ => None,
    }
}

/// The views that a mask asks for, with their places.
pub fn asked(operands: &[Operand], mask: u32) -> impl Iterator<Item = (usize, View)> + '_ {
    let wanted = move |(place, _): &(usize, &Operand)| mask >> place & 1 == 1;
    operands.iter().enumerate().filter(wanted).map(|(place, operand)| (place, operand.view))
}

/// Sums the operands that a mask asks for in one pass, and puts the sums in their places.
pub fn fill(
    operands: &[Operand],
    mask: u32,
    to: &mut [u32; OPERANDS_MAX],
    pass: impl FnOnce(&[View]) -> Result<Vec<u32>, DeviceError>,
) -> Result<(), DeviceError> {
    if mask == 0 {
        return Ok(());
    }
    let (places, views): (Vec<usize>, Vec<View>) = asked(operands, mask).unzip();
    places.iter().zip(pass(&views)?).for_each(|(place, sum)| to[*place] = sum);
    Ok(())
}

/// Launches an operation with a pass over its operands before it and one after it: for devices that
/// cannot sum while they compute.
pub fn launch_in_passes<B: Backend + ?Sized>(
    backend: &mut B,
    op: &Op,
    ask: Ask,
) -> Result<Sums, DeviceError> {
    let operands = op.operands();
    let (mut sums, mut before) = (Sums::default(), [0; OPERANDS_MAX]);
    fill(&operands, ask.read, &mut sums.read, |views| backend.sums(views))?;
    fill(&operands, ask.changed, &mut before, |views| backend.sums(views))?;
    fill_digests(backend, &operands, ask.digested, Access::reads, &mut sums.digest_read)?;
    backend.launch(op)?;
    let written = ask.written | ask.changed;
    fill(&operands, written, &mut sums.written, |views| backend.sums(views))?;
    fill_digests(backend, &operands, ask.digested, Access::writes, &mut sums.digest_written)?;
    sums.subtract(&before);
    Ok(sums)
}

/// Digests the operands that a mask asks for and whose access is what `does` says, and puts the
/// digests in their places.
pub fn fill_digests<B: Backend + ?Sized>(
    backend: &mut B,
    operands: &[Operand],
    mask: u32,
    does: impl Fn(Access) -> bool,
    to: &mut [u64; OPERANDS_MAX],
) -> Result<(), DeviceError> {
    for (place, view) in asked(operands, mask).filter(|(place, _)| does(operands[*place].access)) {
        let bytes = view.dtype.bytes(view.elements());
        to[place] = backend.digest(view.buffer, view.byte_offset, bytes)?;
    }
    Ok(())
}

/// The sum of a view by way of the host. Views without runs have the sum 0.
pub fn of_view<B: Backend + ?Sized>(backend: &mut B, view: &View) -> Result<u32, DeviceError> {
    let Some(Runs { start, bytes, count, step }) = runs(view) else { return Ok(0) };
    let mut piece = vec![0; PIECE.min(bytes)];
    let mut sum = 0_u32;
    for run in 0..count {
        for at in (0..bytes).step_by(PIECE) {
            let piece = &mut piece[..PIECE.min(bytes - at)];
            backend.download(view.buffer, start + run * step + at, piece)?;
            sum = sum.wrapping_add(of_row(piece));
        }
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;
    use crate::view::BufferId;

    #[test]
    fn every_flipped_bit_changes_the_sum_and_parts_add_up() {
        let bytes: Vec<u8> = (0..103_u32).map(|i| (i * 37) as u8).collect();
        let whole = of_row(&bytes);
        for bit in 0..8 * bytes.len() {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(of_row(&flipped), whole, "bit {bit}");
        }
        assert_eq!(of_row(&bytes[..64]).wrapping_add(of_row(&bytes[64..])), whole);
    }

    #[test]
    fn a_view_folds_into_even_runs_or_into_none() {
        let parent = View::contiguous(BufferId(0), DType::Bf16, [6, 4, 10]);
        let whole = Runs { start: 0, bytes: 480, count: 1, step: 480 };
        assert_eq!(runs(&parent), Some(whole));
        let odd = View::contiguous(BufferId(0), DType::Bf16, [6, 3]);
        assert_eq!(runs(&odd), Some(Runs { start: 0, bytes: 6, count: 6, step: 6 }));
        let columns = Runs { start: 8, bytes: 4, count: 24, step: 20 };
        assert_eq!(runs(&parent.slice(2, 4, 2)), Some(columns));
        let heads = Runs { start: 20, bytes: 20, count: 6, step: 80 };
        assert_eq!(runs(&parent.slice(1, 1, 1)), Some(heads));
        assert_eq!(runs(&parent.slice(1, 1, 2)), None);
        assert_eq!(runs(&parent.transpose(1, 2)), None);
    }
}
