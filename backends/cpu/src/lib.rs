//! The CPU backend: every operation of the waist on SIMD kernels, deterministic at any thread
//! count and independent of the batch.
//!
//! This file is the device: memory, and the `match` over operations. Kernels are in `kernels/`,
//! generic over `simd::Simd`; matrix products are in `gemm`. Another backend's author reads this
//! crate first. It checks no shapes (the waist has) and knows no model.

mod dealing;
pub mod ffi;
pub mod gemm;
pub mod group;
mod kernels;
mod memory;
pub mod peak;
pub mod pool;
mod prepack;
pub mod scratch;
pub mod simd;
mod soon;
mod words;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pontoon_ops::digest::{self, Digest};
use pontoon_ops::sums::{Ask, OPERANDS_MAX, Sums, fill, fill_digests};
use pontoon_ops::{
    Access, Backend, BufferId, DType, DeviceError, DeviceErrorKind, DeviceInfo, Layout, Op, OpName,
    Operand, Support, View,
};

use crate::gemm::Flip;
use crate::gemm::panels::Shares;
use crate::gemm::stretch::rows_of_task;
use crate::group::Rendezvous;
use crate::kernels::Context;
use crate::kernels::watched::Checks;
use crate::memory::{Buffers, Operands};
use crate::pool::Pool;
use crate::prepack::reads_panels;
use crate::scratch::Scratch;
use crate::simd::{ISA_VARIABLE, Isa, dispatch};
use crate::soon::Ranges;
use crate::words::Digesting;

/// How to open the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuOptions {
    /// Threads that work on one operation; all cores if absent.
    pub threads: Option<usize>,
    /// The instruction set; the fastest if absent.
    pub isa: Option<Isa>,
}

/// The host's CPU as a device.
pub struct CpuBackend {
    info: DeviceInfo,
    isa: Isa,
    pool: Pool,
    buffers: Buffers,
    gemm_scratch: Scratch,
    work: Scratch,
    /// Holds inputs that share memory with an output.
    aside: Option<(BufferId, usize)>,
    group: Option<Arc<Rendezvous>>,
    /// Spoils the next checked product.
    flip: Option<Flip>,
}

impl CpuBackend {
    /// Opens the device.
    pub fn new(options: CpuOptions) -> Result<Self, DeviceError> {
        let isa = match options.isa {
            Some(isa) => isa,
            None => Isa::detect()
                .map_err(|e| format!("{ISA_VARIABLE}: {e}"))
                .map_err(|text| DeviceError::new(DeviceErrorKind::BadArgument, text))?,
        };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = options.threads.unwrap_or(cores);
        if threads == 0 {
            let text = "threads should be at least 1";
            return Err(DeviceError::new(DeviceErrorKind::BadArgument, text));
        }
        let info = DeviceInfo {
            device: "cpu".to_owned(),
            numeric_class: format!("cpu/{}", isa.name()),
            chip: chip_name(),
            emulated: false,
            memory_bytes: host_memory_bytes(),
            compute_units: threads,
            matrix_dtypes: vec![DType::F32, DType::Bf16],
        };
        Ok(CpuBackend {
            info,
            isa,
            pool: Pool::new(threads),
            buffers: Buffers::default(),
            gemm_scratch: Scratch::new(),
            work: Scratch::new(),
            aside: None,
            group: None,
            flip: None,
        })
    }

    /// `count` devices in this process that can exchange with one another as group 0.
    pub fn group(count: u16, options: CpuOptions) -> Result<Vec<Self>, DeviceError> {
        let rendezvous = Arc::new(Rendezvous::new(count));
        let join = |_| {
            let mut device = CpuBackend::new(options)?;
            device.group = Some(Arc::clone(&rendezvous));
            Ok(device)
        };
        (0..count).map(join).collect()
    }

    /// The pool that runs operations, for measuring what it can reach.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Copies inputs whose range overlaps an output's (in-place operations, interleaved slices)
    /// aside, so that no kernel sees the same memory twice.
    fn set_apart(&mut self, op: &Op) -> Result<Option<Op>, DeviceError> {
        let operands = op.operands();
        let spans_meet = |a: &View, b: &View| {
            a.buffer == b.buffer
                && a.byte_offset < b.byte_offset + b.span_bytes()
                && b.byte_offset < a.byte_offset + a.span_bytes()
        };
        let shared =
            |view: &View| operands.iter().any(|o| o.access.writes() && spans_meet(&o.view, view));
        let reads = || operands.iter().filter(|o| !o.access.writes());
        if !reads().any(|o| shared(&o.view)) || kernels::handles_in_place(op) {
            return Ok(None);
        }
        let mut offset = 0;
        let mut moved = Vec::new();
        for operand in reads().filter(|o| shared(&o.view)) {
            moved.push((operand.view, offset));
            offset += operand.view.dtype.bytes(operand.view.elements()).next_multiple_of(64);
        }
        let buffer = self.aside_buffer(offset)?;
        let mut apart = op.clone();
        for (view, offset) in moved {
            let dst = View::contiguous(buffer, view.dtype, view.shape).rebased(buffer, offset);
            self.run(&Op::Copy(pontoon_ops::Copy { src: view, dst }))?;
            let written = |name: &str| operands.iter().any(|o| o.name == name && o.access.writes());
            let names: Vec<&str> = operands.iter().map(|o| o.name).collect();
            for (target, name) in apart.views_mut().into_iter().zip(names) {
                if *target == view && !written(name) {
                    *target = dst;
                }
            }
        }
        Ok(Some(apart))
    }

    fn aside_buffer(&mut self, bytes: usize) -> Result<BufferId, DeviceError> {
        if let Some((buffer, had)) = self.aside {
            if had >= bytes {
                return Ok(buffer);
            }
            self.buffers.free(buffer)?;
        }
        let buffer = self.buffers.alloc(bytes)?;
        self.aside = Some((buffer, bytes));
        Ok(buffer)
    }

    /// Tells the pool which weights the next product of few rows will stream.
    fn foresee(&self, ops: &[Op]) {
        let (mut bytes, mut ranges): (&[u8], _) = (&[], Ranges::default());
        if let Some((weight, vectors)) = ops.iter().take(FORESEEN).find_map(streamed) {
            let span = weight.span_bytes();
            bytes = self.buffers.part(weight.buffer, weight.byte_offset, span).unwrap_or(&[]);
            let rows = weight.dim(0).max(1);
            ranges = if self.buffers.in_panels(weight) {
                let panel = self.isa.geometry().micro_columns;
                Shares::new(&self.pool, rows / panel).ranges(span / rows * panel)
            } else {
                let each = rows_of_task(&self.pool, self.isa, rows, vectors);
                let count = rows.div_ceil(each);
                Ranges { pieces: count, piece_bytes: span / rows * each, count }
            };
        }
        self.pool.soon().set(bytes, ranges);
    }

    /// Puts back the matrices that an operation reads otherwise than in panels.
    fn put_back_for(&mut self, op: &Op, checked: bool) -> Result<(), DeviceError> {
        if !self.buffers.any_in_panels() {
            return Ok(());
        }
        let (operands, names) = (op.operands(), if checked { &[] } else { reads_panels(op) });
        let readable = |one: &&Operand| names.contains(&one.name);
        // Words and scales are read in panels both, or neither.
        let stay = operands.iter().filter(readable).all(|one| self.buffers.in_panels(&one.view));
        for Operand { view, .. } in operands.iter().filter(|one| !(stay && readable(one))) {
            self.reach(view.buffer, view.byte_offset, view.span_bytes())?;
        }
        Ok(())
    }

    /// Puts back the matrices of which a part lies in bytes that are about to be used.
    fn reach(&mut self, buffer: BufferId, start: usize, bytes: usize) -> Result<(), DeviceError> {
        let range = start..start.saturating_add(bytes);
        prepack::put_back((&self.pool, self.isa), &mut self.buffers, buffer, &range)
    }

    /// Flips a bit in the f32 sums of the next product that is launched with checks, before they
    /// are stored: to try whether the check finds it.
    pub fn spoil_next_product(&mut self, flip: Flip) {
        self.flip = Some(flip);
    }

    fn run(&mut self, op: &Op) -> Result<(), DeviceError> {
        self.run_checked(op, Checks::default()).map(drop)
    }

    fn run_checked(&mut self, op: &Op, checks: Checks) -> Result<Checks, DeviceError> {
        self.put_back_for(op, checks.on)?;
        let mut context = Context {
            pool: &self.pool,
            isa: self.isa,
            gemm_scratch: &mut self.gemm_scratch,
            work: &mut self.work,
            operands: Operands::new(&mut self.buffers),
            group: self.group.as_deref(),
            checks,
        };
        kernels::run(&mut context, op)?;
        Ok(context.checks)
    }

    fn pass(&self, views: &[View]) -> Result<Vec<u32>, DeviceError> {
        kernels::sums::sums(&self.pool, self.isa, &self.buffers, views)
    }
}

impl Backend for CpuBackend {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn alloc(&mut self, bytes: usize) -> Result<BufferId, DeviceError> {
        self.buffers.alloc(bytes)
    }

    fn free(&mut self, buffer: BufferId) -> Result<(), DeviceError> {
        self.buffers.free(buffer)
    }

    fn upload(
        &mut self,
        buffer: BufferId,
        byte_offset: usize,
        bytes: &[u8],
    ) -> Result<(), DeviceError> {
        self.reach(buffer, byte_offset, bytes.len())?;
        self.buffers.write(buffer, byte_offset, bytes)
    }

    fn download(
        &mut self,
        buffer: BufferId,
        byte_offset: usize,
        bytes: &mut [u8],
    ) -> Result<(), DeviceError> {
        self.reach(buffer, byte_offset, bytes.len())?;
        self.buffers.read(buffer, byte_offset, bytes)
    }

    fn mapped(
        &mut self,
        buffer: BufferId,
        byte_offset: usize,
        bytes: usize,
    ) -> Result<Option<&mut [u8]>, DeviceError> {
        self.reach(buffer, byte_offset, bytes)?;
        self.buffers.part_mut(buffer, byte_offset, bytes).map(Some)
    }

    fn digest(
        &mut self,
        buffer: BufferId,
        byte_offset: usize,
        bytes: usize,
    ) -> Result<u64, DeviceError> {
        self.reach(buffer, byte_offset, bytes)?;
        let blocks: Vec<&[u8]> =
            self.buffers.part(buffer, byte_offset, bytes)?.chunks(digest::BLOCK).collect();
        let digests: Vec<AtomicU64> = blocks.iter().map(|_| AtomicU64::new(0)).collect();
        self.pool.run(blocks.len(), |index| {
            let mut digest = Digest::default();
            dispatch(self.isa, Digesting { digest: &mut digest, bytes: blocks[index] });
            digests[index].store(digest.finish(), Ordering::Relaxed);
        });
        let digests: Vec<u64> = digests.into_iter().map(AtomicU64::into_inner).collect();
        Ok(digest::of_digests(&digests))
    }

    fn supports(&self, op: &Op) -> Support {
        match op.name() {
            OpName::AllReduce | OpName::AllGather | OpName::ReduceScatter
                if self.group.is_none() =>
            {
                Support::No("the device was opened alone, not as a member of a group")
            }
            _ => Support::Yes,
        }
    }

    fn launch(&mut self, op: &Op) -> Result<(), DeviceError> {
        match self.set_apart(op)? {
            Some(apart) => self.run(&apart),
            None => self.run(op),
        }
    }

    fn launch_all(&mut self, ops: &[Op]) -> Result<(), DeviceError> {
        for (index, op) in ops.iter().enumerate() {
            self.foresee(&ops[index + 1..]);
            self.launch(op)?;
        }
        Ok(())
    }

    fn sums_in_place(&self) -> bool {
        true
    }

    fn sums(&mut self, views: &[View]) -> Result<Vec<u32>, DeviceError> {
        for view in views {
            self.reach(view.buffer, view.byte_offset, view.span_bytes())?;
        }
        self.pass(views)
    }

    fn launch_summed(&mut self, op: &Op, ask: Ask) -> Result<Sums, DeviceError> {
        self.put_back_for(op, true)?;
        let apart = self.set_apart(op)?;
        // Operands that were moved aside are summed where they came from.
        let left = if apart.is_some() { ask } else { Checks::left(op, ask) };
        let operands = op.operands();
        let (mut passed, mut before) = (Sums::default(), [0; OPERANDS_MAX]);
        fill(&operands, left.read, &mut passed.read, |views| self.pass(views))?;
        fill(&operands, left.changed, &mut before, |views| self.pass(views))?;
        fill_digests(self, &operands, left.digested, Access::reads, &mut passed.digest_read)?;
        let flip = self.flip.take_if(|_| op.name() == OpName::Matmul);
        let ask = if apart.is_some() { Ask::default() } else { ask };
        let checks = Checks { on: true, ask, flip, ..Checks::default() };
        let Checks { mut sums, .. } = self.run_checked(apart.as_ref().unwrap_or(op), checks)?;
        let written = left.written | left.changed;
        fill(&operands, written, &mut sums.written, |views| self.pass(views))?;
        sums.subtract(&before);
        fill_digests(self, &operands, left.digested, Access::writes, &mut sums.digest_written)?;
        for operand in 0..OPERANDS_MAX {
            if left.read >> operand & 1 == 1 {
                sums.read[operand] = passed.read[operand];
            }
            if left.digested >> operand & 1 == 1 {
                sums.digest_read[operand] = passed.digest_read[operand];
            }
        }
        Ok(sums)
    }

    fn prepack(&mut self, op: &Op) -> Result<(), DeviceError> {
        prepack::prepack((&self.pool, self.isa), &mut self.buffers, op)
    }

    fn wait(&mut self, _deadline: Duration) -> Result<(), DeviceError> {
        // Operations have finished when `launch` returns.
        Ok(())
    }

    fn memory_used(&self) -> usize {
        self.buffers.bytes() + self.gemm_scratch.bytes() + self.work.bytes()
    }
}

/// Operations between two products of a layer at most, those of mixtures of experts aside.
const FORESEEN: usize = 8;

/// The weights of a product that streams them, and how many vectors of their rows go together.
fn streamed(op: &Op) -> Option<(&View, usize)> {
    match op {
        Op::Matmul(op) if op.layout == Layout::Nt && op.a.dim(0) <= gemm::GEMV_ROWS_MAX => {
            Some((&op.b, gemm::VECTORS_MAX))
        }
        Op::MatmulQuant(op) if op.x.dim(0) <= gemm::GEMV_ROWS_MAX => Some((&op.weight, 1)),
        _ => None,
    }
}

fn chip_name() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|line| line.strip_prefix("model name"));
    let name = model.and_then(|line| line.split_once(':')).map(|(_, name)| name.trim().to_owned());
    name.unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

fn host_memory_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
