//! What every operation works with: a device's session, its kernels and its memory.
//!
//! Which kernels an operation runs stands in `ops/`.

use std::ffi::CStr;

use pontoon_ops::{DType, DeviceError, DeviceErrorKind, View};

use crate::ffi::session::{Args, Grid, Session};
use crate::memory::{Buffers, Scratch};
use crate::modules::{Modules, Unit};

/// What an operation gives.
pub type Done = Result<(), DeviceError>;

/// Threads of a block of elementwise kernels.
pub const THREADS: usize = 256;
/// Dimensions that strided kernels know.
const DIMENSIONS: usize = 4;
/// Operands that share an index space there.
const OPERANDS: usize = 3;

/// A device at work.
pub struct Core {
    /// Context and stream.
    pub session: Session,
    /// Compiled kernels.
    pub modules: Modules,
    /// The waist's buffers.
    pub buffers: Buffers,
    /// Memory within one operation.
    pub scratch: Scratch,
}

impl Core {
    /// Begins an operation: what the last one kept in scratch is forgotten.
    pub fn begin(&mut self) -> Done {
        self.scratch.begin(&self.session)
    }

    /// Runs a kernel.
    pub fn run(&mut self, unit: &Unit, kernel: &'static CStr, grid: Grid, args: Args) -> Done {
        let function = self.modules.function(&self.session, unit, kernel, grid.shared_bytes)?;
        self.session.launch(function, grid, args)
    }

    /// The address of a view's first element.
    pub fn at(&self, view: &View) -> Result<usize, DeviceError> {
        self.buffers.at(view)
    }

    /// The same of a view that may be absent; 0 stands for none.
    pub fn at_if(&self, view: &Option<View>) -> Result<usize, DeviceError> {
        view.as_ref().map_or(Ok(0), |view| self.at(view))
    }

    /// Scratch for elements.
    pub fn room(&mut self, dtype: DType, elements: usize) -> Result<usize, DeviceError> {
        self.scratch.take(&self.session, dtype.bytes(elements))
    }
}

/// A kernel over `count` elements, one thread to each.
pub fn flat(count: usize) -> Grid {
    blocks(count.div_ceil(THREADS), THREADS)
}

/// So many blocks of so many threads.
pub fn blocks(count: usize, threads: usize) -> Grid {
    Grid { blocks: [count, 1, 1], threads: [threads, 1], shared_bytes: 0 }
}

/// Elements from row to row.
pub fn row_stride(view: &View) -> usize {
    if view.shape.rank() < 2 { 1 } else { view.stride(0) }
}

/// The common extents of up to three views and how each steps through them, as `common.cuh`'s
/// `Dims`.
pub fn dims(views: &[&View]) -> Result<Vec<u64>, DeviceError> {
    let shape = views[0].dims();
    indexable(views[0].elements())?;
    let first = DIMENSIONS - shape.len();
    let mut words = vec![1; DIMENSIONS];
    for (word, &extent) in words[first..].iter_mut().zip(shape) {
        *word = extent as u64;
    }
    for operand in 0..OPERANDS {
        let mut steps = vec![0; DIMENSIONS];
        if let Some(view) = views.get(operand) {
            for (step, &stride) in steps[first..].iter_mut().zip(view.strides()) {
                *step = stride as u64;
            }
        }
        words.extend(steps);
    }
    Ok(words)
}

/// Kernels that divide an index into places count to 2^32.
pub fn indexable(elements: usize) -> Done {
    if elements < 1 << 32 {
        return Ok(());
    }
    let text = format!("{elements} elements are more than this kernel counts");
    Err(DeviceError::new(DeviceErrorKind::Unsupported, text))
}
