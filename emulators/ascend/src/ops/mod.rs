//! What operators compute, as safe code on checked memory.
//!
//! `strided.rs` walks over views, `product.rs` multiplies; the other files hold one group of
//! operators each: a function per operator that checks what was passed, as the vendor's documents
//! say, and plans the computation.

pub mod attention;
pub mod attention_grad;
pub mod choose;
pub mod elementwise;
pub mod experts;
pub mod index;
pub mod loss;
pub mod norm;
pub mod optim;
pub mod product;
pub mod reduce;
pub mod rows;
pub mod sort;
pub mod strided;

use std::cell::RefCell;
use std::sync::Arc;

use bytemuck::Pod;
use pontoon_cpu::gemm::{Data, DataMut};

use crate::device::Engine;
use crate::device::memory::Place;
use crate::dtype::DataType;
use crate::failure::{Done, Failure};
use crate::fault::{Fault, Kind};
use crate::plan::{Access, Slot};
use crate::strict::{self, Breach};
use crate::tensor::Tensor;

/// An operand with its memory.
pub struct Bound {
    /// What the operator calls it.
    pub name: &'static str,
    /// How it is touched.
    pub access: Access,
    /// The device address of its first element.
    pub address: u64,
    /// Its memory, from its first element on.
    pub place: Place,
    /// Bytes from its first element to its last.
    pub bytes: usize,
    /// Its descriptor.
    pub tensor: Arc<Tensor>,
}

impl Bound {
    /// The address behind its last element.
    pub fn end(&self) -> u64 {
        self.address + self.bytes as u64
    }

    /// Its element type.
    pub fn dtype(&self) -> DataType {
        self.tensor.dtype
    }

    /// Its extents.
    pub fn shape(&self) -> &[usize] {
        &self.tensor.shape
    }

    /// Elements.
    pub fn elements(&self) -> usize {
        self.tensor.elements()
    }

    /// Copies elements out, from one counted from the first.
    pub fn load<T: Pod>(&self, start: usize, to: &mut [T]) {
        let at = self.place.offset + start * size_of::<T>();
        assert!(start * size_of::<T>() + size_of_val(to) <= self.bytes, "beyond the operand");
        self.place.allocation.block.load(at, to);
    }

    /// Copies elements in.
    pub fn store<T: Pod>(&self, start: usize, from: &[T]) {
        assert!(self.access != Access::Read, "a read operand is not written");
        let at = self.place.offset + start * size_of::<T>();
        assert!(start * size_of::<T>() + size_of_val(from) <= self.bytes, "beyond the operand");
        self.place.allocation.block.store(at, from);
    }

    /// Flips a bit of the first element.
    pub fn flip(&self, bit: u32) {
        if self.bytes == 0 {
            return;
        }
        let at = (bit as usize / 8).min(self.bytes - 1);
        let mut byte = [0_u8];
        self.load(at, &mut byte);
        byte[0] ^= 1 << (bit % 8);
        self.store(at, &byte);
    }

    /// Makes the first element NaN.
    pub fn poison(&self) {
        let bytes = self.dtype().bytes(1).min(self.bytes);
        self.store(0, &[0xff_u8; 8][..bytes]);
    }
}

/// One run of an operator.
pub struct Run<'a> {
    /// What computes.
    pub engine: &'a mut Engine,
    op: &'static str,
    bound: &'a [Bound],
    workspace: Option<(Place, usize)>,
    defects: &'a [Fault],
    /// Ranges handed out as slices, and whether they are written.
    claims: RefCell<Vec<(u64, u64, bool)>>,
}

impl<'a> Run<'a> {
    /// A run on bound operands.
    pub fn new(
        engine: &'a mut Engine,
        op: &'static str,
        bound: &'a [Bound],
        workspace: Option<(Place, usize)>,
        defects: &'a [Fault],
    ) -> Run<'a> {
        let run = Run { engine, op, bound, workspace, defects, claims: RefCell::default() };
        run.scribble();
        run
    }

    /// An operand.
    pub fn at(&self, slot: Slot) -> &'a Bound {
        &self.bound[slot.0]
    }

    /// Whether a planted defect is active.
    pub fn has(&self, kind: Kind) -> bool {
        self.defects.iter().any(|fault| fault.kind == kind)
    }

    /// Whether an operator that the vendor calls non-deterministic differs this time: always in
    /// turn unless deterministic mode is on, and whenever that defect is planted.
    pub fn wobbles(&self) -> bool {
        let loose = !self.engine.deterministic || self.has(Kind::Nondeterministic);
        loose && self.engine.tasks % 2 == 1
    }

    /// A planted defect's settings.
    pub fn defect(&self, kind: Kind) -> Option<&'a Fault> {
        self.defects.iter().find(|fault| fault.kind == kind)
    }

    /// The first number in the workspace, whatever was left there.
    pub fn stale(&self) -> f32 {
        let mut value = [0_f32];
        if let Some((place, _)) = &self.workspace {
            place.allocation.block.load(place.offset, &mut value);
        }
        if value[0].is_finite() { 1.0 + value[0].abs().min(1e3) } else { 1.0 }
    }

    /// An operator leaves other bytes in its workspace than it found there.
    fn scribble(&self) {
        if self.has(Kind::StaleWorkspace) {
            return;
        }
        if let Some((place, bytes)) = &self.workspace {
            let value = self.engine.tasks as u8;
            place.allocation.block.fill(place.offset, (*bytes).min(4096), value);
        }
    }

    fn claim(&self, slot: Slot, writes: bool) -> Done<&'a Bound> {
        let bound = self.at(slot);
        let (start, end) = (bound.address, bound.end());
        let mut claims = self.claims.borrow_mut();
        let clash = claims.iter().any(|(other_start, other_end, written)| {
            (writes || *written) && start < *other_end && *other_start < end
        });
        if clash {
            let text = format!("{}: `{}` overlaps another operand", self.op, bound.name);
            let failure = Failure::operator(text);
            return Err(strict::breach(-1, Breach::Overlap, failure));
        }
        claims.push((start, end, writes));
        Ok(bound)
    }

    /// The elements of an operand from its first to its last, gaps included.
    pub fn slice<T: Pod>(&self, slot: Slot) -> Done<&'a [T]> {
        let bound = self.claim(slot, false)?;
        let count = bound.bytes / size_of::<T>();
        Ok(bound.place.allocation.block.shared(bound.place.offset, count))
    }

    /// The same, to be written.
    pub fn slice_mut<T: Pod>(&self, slot: Slot) -> Done<&'a mut [T]> {
        let bound = self.claim(slot, true)?;
        let count = bound.bytes / size_of::<T>();
        Ok(bound.place.allocation.block.exclusive(bound.place.offset, count))
    }

    /// A float operand's elements for a product.
    pub fn data(&self, slot: Slot) -> Done<Data<'a>> {
        Ok(match self.at(slot).dtype() {
            DataType::F32 => Data::F32(self.slice(slot)?),
            DataType::Bf16 => Data::Bf16(self.slice(slot)?),
            DataType::F16 => Data::F16(self.slice(slot)?),
            other => return Err(Failure::operator(format!("{}: {other:?} operand", self.op))),
        })
    }

    /// The same, to be written.
    pub fn data_mut(&self, slot: Slot) -> Done<DataMut<'a>> {
        Ok(match self.at(slot).dtype() {
            DataType::F32 => DataMut::F32(self.slice_mut(slot)?),
            DataType::Bf16 => DataMut::Bf16(self.slice_mut(slot)?),
            DataType::F16 => DataMut::F16(self.slice_mut(slot)?),
            other => return Err(Failure::operator(format!("{}: {other:?} result", self.op))),
        })
    }

    /// All elements of an operand in row-major order, as f32.
    pub fn floats(&self, slot: Slot) -> Vec<f32> {
        let bound = self.at(slot);
        let mut to = vec![0.0; bound.elements()];
        strided::gather_floats(self.engine.isa, bound, &mut to);
        to
    }

    /// All elements of an operand in row-major order, as integers.
    pub fn integers(&self, slot: Slot) -> Vec<i64> {
        let bound = self.at(slot);
        let mut to = vec![0; bound.elements()];
        strided::gather_integers(bound, &mut to);
        to
    }

    /// Rounds numbers in row-major order into an operand.
    pub fn put_floats(&self, slot: Slot, from: &[f32]) {
        strided::scatter_floats(self.engine.isa, self.at(slot), from, self.rounding());
    }

    /// Puts integers in row-major order into an operand.
    pub fn put_integers(&self, slot: Slot, from: &[i64]) {
        strided::scatter_integers(self.at(slot), from);
    }

    /// How results are rounded to 16 bits.
    pub fn rounding(&self) -> strided::Rounding {
        if self.has(Kind::WrongRounding) {
            strided::Rounding::Cut
        } else {
            strided::Rounding::Nearest
        }
    }
}
