//! Word sums and digests, formed where the memory lies.
//!
//! What they are is said in `pontoon_ops::{sums, digest}`.

use pontoon_ops::sums::{Runs, runs};
use pontoon_ops::{DType, DeviceError, View, digest};

use crate::core::{Core, blocks};
use crate::ffi::session::{Args, Grid};
use crate::memory::WAIT_MAX;
use crate::modules::{Source, Unit};

/// Blocks that share one view's words.
const SUM_BLOCKS_MAX: usize = 512;
/// Bytes that one block should have to itself at least.
const SUM_BLOCK_BYTES: usize = 16 << 10;
/// Blocks of memory that a block of threads digests.
const DIGESTS_PER_BLOCK: usize = 4;

/// Starts the sums of views; they will stand at the address, four bytes each. Views without runs
/// have the sum 0.
pub fn start_sums(core: &mut Core, views: &[View]) -> Result<usize, DeviceError> {
    let mut table = Vec::new();
    let mut most = 0;
    for view in views {
        let found = runs(view).unwrap_or(Runs { start: 0, bytes: 0, count: 0, step: 0 });
        core.at(view)?;
        let start = core.buffers.range(view.buffer, 0, 0)? + found.start;
        for word in [start, found.bytes, found.count, found.step] {
            table.extend((word as u64).to_le_bytes());
        }
        most = most.max(found.bytes * found.count);
    }
    let sums = core.room(DType::U32, views.len())?;
    core.session.fill(sums, 4 * views.len(), 0)?;
    if views.is_empty() {
        return Ok(sums);
    }
    let place = core.scratch.take(&core.session, table.len())?;
    core.session.up(place, &table)?;
    let across = most.div_ceil(SUM_BLOCK_BYTES).clamp(1, SUM_BLOCKS_MAX);
    let grid = Grid { blocks: [across, views.len(), 1], threads: [256, 1], shared_bytes: 0 };
    let unit = Unit::new(Source::Sums, DType::F32);
    core.run(&unit, c"word_sums", grid, Args::new().at(place).at(sums))?;
    Ok(sums)
}

/// Reads sums that were started.
pub fn read_sums(core: &Core, at: usize, count: usize) -> Result<Vec<u32>, DeviceError> {
    let mut bytes = vec![0; 4 * count];
    core.session.down(at, &mut bytes, WAIT_MAX)?;
    Ok(bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect())
}

/// The digest of a range of device memory.
pub fn digest_of(core: &mut Core, at: usize, bytes: usize) -> Result<u64, DeviceError> {
    let count = bytes.div_ceil(digest::BLOCK);
    let to = core.scratch.take(&core.session, 8 * count)?;
    let args = Args::new().at(at).int(bytes).int(digest::BLOCK).at(to);
    let unit = Unit::new(Source::Sums, DType::F32);
    core.run(&unit, c"digests", blocks(count.div_ceil(DIGESTS_PER_BLOCK), 32), args)?;
    let mut found = vec![0; 8 * count];
    core.session.down(to, &mut found, WAIT_MAX)?;
    let words = found.as_chunks::<8>().0.iter();
    Ok(digest::of_digests(&words.map(|word| u64::from_le_bytes(*word)).collect::<Vec<_>>()))
}
