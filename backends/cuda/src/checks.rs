//! Word sums and digests, formed where the memory lies.
//!
//! What they are is said in `pontoon_ops::{sums, digest}`.

use pontoon_ops::sums::{Runs, runs};
use pontoon_ops::{DType, DeviceError, View, digest};

use crate::core::{Core, Done, blocks};
use crate::ffi::session::{Args, Grid};
use crate::memory::WAIT_MAX;
use crate::modules::{Source, Unit};

/// Views that one kernel sums.
const VIEWS_MAX: usize = 16;
/// Blocks that share one view's words.
const SUM_BLOCKS_MAX: usize = 512;
/// Bytes that one block should have to itself at least.
const SUM_BLOCK_BYTES: usize = 16 << 10;
/// Threads that digest a block of memory: a lane of the digest each.
const DIGEST_THREADS: usize = 32;

/// Room for so many sums, zeroed.
pub fn room_for_sums(core: &mut Core, count: usize) -> Result<usize, DeviceError> {
    let sums = core.room(DType::U32, count)?;
    core.session.fill(sums, 4 * count, 0)?;
    Ok(sums)
}

/// Starts the sums of views; they will stand at the address, four bytes each. Views without runs
/// have the sum 0.
pub fn start_sums(core: &mut Core, views: &[View], sums: usize) -> Done {
    for (part, views) in views.chunks(VIEWS_MAX).enumerate() {
        let mut words = Vec::with_capacity(4 * VIEWS_MAX);
        let mut most = 0;
        for view in views {
            let found = runs(view).unwrap_or(Runs { start: 0, bytes: 0, count: 0, step: 0 });
            core.at(view)?;
            let start = core.buffers.range(view.buffer, 0, 0)? + found.start;
            words.extend([start, found.bytes, found.count, found.step].map(|word| word as u64));
            most = most.max(found.bytes * found.count);
        }
        words.resize(4 * VIEWS_MAX, 0);
        let across = most.div_ceil(SUM_BLOCK_BYTES).clamp(1, SUM_BLOCKS_MAX);
        let grid = Grid { blocks: [across, views.len(), 1], threads: [256, 1], shared_bytes: 0 };
        let unit = Unit::new(Source::Sums, DType::F32);
        let args = Args::new().structure(&words).at(sums + 4 * VIEWS_MAX * part);
        core.run(&unit, c"word_sums", grid, args)?;
    }
    Ok(())
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
    core.run(&unit, c"digests", blocks(count, DIGEST_THREADS), args)?;
    let mut found = vec![0; 8 * count];
    core.session.down(to, &mut found, WAIT_MAX)?;
    let words = found.as_chunks::<8>().0.iter();
    Ok(digest::of_digests(&words.map(|word| u64::from_le_bytes(*word)).collect::<Vec<_>>()))
}
