//! Word sums of operands, formed in place by all threads.
//!
//! For what no kernel sums itself: see `watched.rs`.

use std::sync::atomic::{AtomicU32, Ordering};

use pontoon_ops::sums::{Runs, runs};
use pontoon_ops::{DeviceError, View};

use crate::memory::Buffers;
use crate::pool::Pool;
use crate::simd::{Isa, dispatch};
use crate::words::RowWords;

/// Bytes that one task sums: enough to be worth waking a thread for.
const TASK_BYTES: usize = 128 << 10;

/// A part of a view: runs `first..end`, or a stretch of the only one.
struct Task<'a> {
    view: usize,
    bytes: &'a [u8],
    runs: Runs,
}

fn tasks<'a>(view: usize, bytes: &'a [u8], runs: Runs, into: &mut Vec<Task<'a>>) {
    let Runs { bytes: width, count, step, .. } = runs;
    if count == 1 {
        let part = |bytes: &'a [u8]| {
            let runs = Runs { start: 0, bytes: bytes.len(), count: 1, step: bytes.len() };
            Task { view, bytes, runs }
        };
        into.extend(bytes[..width].chunks(TASK_BYTES).map(part));
        return;
    }
    let per_task = TASK_BYTES.div_ceil(width.max(1));
    for first in (0..count).step_by(per_task) {
        let count = per_task.min(count - first);
        let bytes = &bytes[first * step..][..(count - 1) * step + width];
        into.push(Task { view, bytes, runs: Runs { start: 0, count, ..runs } });
    }
}

/// The sums of views; those without runs have the sum 0.
pub(crate) fn sums(
    pool: &Pool,
    isa: Isa,
    buffers: &Buffers,
    views: &[View],
) -> Result<Vec<u32>, DeviceError> {
    let mut parts = Vec::new();
    for (index, view) in views.iter().enumerate() {
        let Some(runs) = runs(view).filter(|runs| runs.count > 0 && runs.bytes > 0) else {
            continue;
        };
        let span = (runs.count - 1) * runs.step + runs.bytes;
        tasks(index, buffers.part(view.buffer, runs.start, span)?, runs, &mut parts);
    }
    let totals: Vec<AtomicU32> = views.iter().map(|_| AtomicU32::new(0)).collect();
    pool.run(parts.len(), |index| {
        let Task { view, bytes, runs } = &parts[index];
        let rows = RowWords { data: bytes, stride: runs.step, rows: runs.count, width: runs.bytes };
        let sum = dispatch(isa, rows);
        totals[*view].fetch_add(sum, Ordering::Relaxed);
    });
    Ok(totals.into_iter().map(AtomicU32::into_inner).collect())
}
