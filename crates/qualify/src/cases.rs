//! Seeded inputs for the operations: odd sizes, one row, gaps between rows, large magnitudes, NaN
//! and infinity, results poisoned beforehand, guards around every tensor.
//!
//! Runs nothing. Read next: `cases/`, one file for each group of operations.

mod attention;
mod dense;
mod edges;
mod experts;
mod heads;
mod optim;
mod sized;

use pontoon_ops::philox::Stream;
use pontoon_ops::{DType, Op, View};

use crate::memory::{GUARD_BYTES, Memory};

/// Numbers that are drawn for a large tensor: odd, so that rows differ.
const PATTERN: usize = 4099;

/// One operation with everything it reads.
#[derive(Clone, Debug)]
pub struct Case {
    /// What is special about it.
    pub name: String,
    /// The operation, on the buffers of `memory`.
    pub op: Op,
    /// What it computes in.
    pub dtype: DType,
    /// All buffers before the operation.
    pub memory: Memory,
}

/// What kind of numbers a case holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    /// Normal numbers of size one.
    Plain,
    /// Normal numbers a hundred times as large.
    Large,
    /// One NaN and one infinity among them.
    Special,
}

/// Every case, from one seed.
pub fn all(seed: u64) -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in DType::FLOATS {
        for flavour in [Flavour::Plain, Flavour::Large, Flavour::Special] {
            let maker = Maker { seed: seed + cases.len() as u64, dtype, flavour };
            cases.extend(dense::cases(maker));
            cases.extend(attention::cases(maker));
            cases.extend(heads::cases(maker));
            cases.extend(experts::cases(maker));
            cases.extend(edges::cases(maker));
        }
    }
    cases.extend(optim::cases(seed));
    cases
}

pub use sized::{Size, sized, soaked};

/// What the cases of a group are made from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Maker {
    pub seed: u64,
    pub dtype: DType,
    pub flavour: Flavour,
}

impl Maker {
    pub(crate) fn start(&self, salt: usize) -> Draft {
        let stream = Stream::new(self.seed, salt as u64);
        Draft { memory: Memory::default(), stream, drawn: 0, maker: *self }
    }
}

/// A case in the making.
pub(crate) struct Draft {
    memory: Memory,
    stream: Stream,
    drawn: u64,
    pub maker: Maker,
}

impl Draft {
    /// A tensor of random numbers in the case's dtype, rows apart by a gap.
    pub(crate) fn floats(&mut self, shape: &[usize]) -> View {
        let size = if self.maker.flavour == Flavour::Large { 100.0 } else { 1.0 };
        let view = self.place(self.maker.dtype, shape, Gap::Yes);
        let mut values = self.normals(view.elements(), size);
        if self.maker.flavour == Flavour::Special && values.len() > 3 {
            let at = self.below(values.len());
            values[at] = f64::NAN;
            let at = self.below(values.len());
            values[at] = f64::INFINITY;
        }
        self.memory.write(&view, &values);
        view
    }

    /// Ordinary numbers of a size, in a dtype, without gaps.
    pub(crate) fn tame(&mut self, dtype: DType, shape: &[usize], size: f64) -> View {
        let view = self.place(dtype, shape, Gap::No);
        let values = self.normals(view.elements(), size);
        self.memory.write(&view, &values);
        view
    }

    /// Ordinary numbers of a size in a large tensor: a few thousand of them, over and over.
    pub(crate) fn bulk(&mut self, dtype: DType, shape: &[usize], size: f64) -> View {
        let view = self.place(dtype, shape, Gap::No);
        let elements = view.elements();
        let first = View::contiguous(view.buffer, dtype, [elements.min(PATTERN)]);
        let first = first.rebased(view.buffer, view.byte_offset);
        let values = self.normals(first.elements(), size);
        self.memory.write(&first, &values);
        let bytes = &mut self.memory.buffers_mut()[view.buffer.0 as usize];
        let (start, end) = (view.byte_offset, view.byte_offset + dtype.bytes(elements));
        let mut done = dtype.bytes(first.elements());
        while start + done < end {
            let more = done.min(end - start - done);
            bytes.copy_within(start..start + more, start + done);
            done += more;
        }
        view
    }

    /// Room for a large result, zeroed.
    pub(crate) fn room(&mut self, dtype: DType, shape: &[usize]) -> View {
        let view = self.place(dtype, shape, Gap::No);
        let bytes = &mut self.memory.buffers_mut()[view.buffer.0 as usize];
        bytes[view.byte_offset..view.byte_offset + dtype.bytes(view.elements())].fill(0);
        view
    }

    /// Given numbers.
    pub(crate) fn given(&mut self, dtype: DType, shape: &[usize], values: &[f64]) -> View {
        let view = self.place(dtype, shape, Gap::No);
        self.memory.write(&view, values);
        view
    }

    /// Room for a result, full of NaN.
    pub(crate) fn poisoned(&mut self, dtype: DType, shape: &[usize]) -> View {
        let view = self.place(dtype, shape, Gap::No);
        let poison = if dtype == DType::I32 { -777.0 } else { f64::NAN };
        self.memory.write(&view, &vec![poison; view.elements()]);
        view
    }

    /// A whole number below `bound`.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.drawn += 1;
        self.stream.below(self.drawn << 20, bound as u64) as usize
    }

    /// What the memory holds at a view.
    pub(crate) fn read(&self, view: &View) -> Vec<f64> {
        self.memory.read(view)
    }

    pub(crate) fn done(self, name: impl Into<String>, op: impl Into<Op>) -> Case {
        let Maker { dtype, flavour, seed } = self.maker;
        let name = format!("{} {flavour:?} seed {seed}", name.into());
        let op = op.into();
        if let Err(error) = op.check() {
            panic!("case {name}: {error}");
        }
        Case { name, op, dtype, memory: self.memory }
    }

    fn normals(&mut self, count: usize, size: f64) -> Vec<f64> {
        self.drawn += 1;
        let first = self.drawn << 20;
        (0..count as u64).map(|i| size * f64::from(self.stream.normal(first + i))).collect()
    }

    /// A buffer with guards around a tensor; with a gap, rows are two elements apart.
    fn place(&mut self, dtype: DType, shape: &[usize], gap: Gap) -> View {
        let mut wide = shape.to_vec();
        let last = wide.len() - 1;
        if gap == Gap::Yes && wide.len() == 2 {
            wide[last] += 2;
        }
        let elements: usize = wide.iter().product();
        let bytes = dtype.bytes(elements).next_multiple_of(8);
        let buffer = self.memory.add(vec![0xa5; bytes + 2 * GUARD_BYTES]);
        View::contiguous(buffer, dtype, wide.as_slice()).rebased(buffer, GUARD_BYTES).slice(
            last,
            0,
            shape[last],
        )
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Gap {
    No,
    Yes,
}
