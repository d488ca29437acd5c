//! The sum of what several workers computed: published subtrees are read piece by piece and added
//! along the fixed tree.
//!
//! Memory is what this costs, so a subtree that would be added to the one below it at once is added
//! as it is read, and one's own is not read back at all. Where pieces come from is the replica's
//! business.

use pontoon_ops::digest::of_digests;
use pontoon_ops::sums::of_row;
use pontoon_ops::{Add, Backend, BufferId, DType, DeviceError, Op, View};

use super::{ADD_SUMS, TrainingState};
use crate::error::TrainError;
use crate::optimizer::changed;

/// Takes a piece of a gradient, with the byte it begins at.
pub(crate) type TakePiece<'a> = dyn FnMut(usize, &[u8]) -> Result<(), TrainError> + 'a;

/// Shows a subtree's gradient piece by piece, in order.
pub(crate) type ReadPieces<'a> =
    dyn FnMut(usize, &mut TakePiece<'_>) -> Result<(), TrainError> + 'a;

/// Where pieces wait on the device until they are added.
const STAGED: &str = "gradients.staged";
/// Its bytes: small enough for a cache, large enough for an operation to be worth its launch.
const STAGED_BYTES: usize = 256 << 10;

impl TrainingState {
    /// Sums subtrees, given in order with the number of their leaves, into the first gradient
    /// buffer; `read` shows the pieces of the subtree of an index. `held` is the index of the one
    /// that stands in the first buffer already: 0, or 1 where the first two have equally many
    /// leaves and are added to each other, whose order makes no difference. Gives the digest of the
    /// sum's `bytes`, which is formed while its pieces are near where that is possible.
    pub(crate) fn sum(
        &mut self,
        backend: &mut dyn Backend,
        counts: &[u32],
        held: Option<usize>,
        bytes: usize,
        read: &mut ReadPieces<'_>,
    ) -> Result<u64, TrainError> {
        let mut stack: Vec<u32> = held.map(|held| counts[held]).into_iter().collect();
        let mut digests = Vec::new();
        let last = (0..counts.len()).rfind(|index| held != Some(*index));
        for index in (0..counts.len()).filter(|index| held != Some(*index)) {
            let (count, below) = (counts[index], stack.len());
            match stack.last_mut() {
                // What would be added to the one below it at once need not be stored before.
                Some(top) if *top == count => {
                    *top += count;
                    // Only the addition that ends the sum is worth digesting.
                    let ends = below == 1 && last == Some(index);
                    let digests = ends.then_some(&mut digests);
                    self.add_read(backend, below - 1, index, (read, digests))?;
                }
                _ => {
                    self.store_read(backend, below, index, read)?;
                    stack.push(count);
                }
            }
            while let [.., left, right] = stack[..]
                && left == right
            {
                stack.pop();
                *stack.last_mut().expect("it had two") = left + right;
                self.add(backend, stack.len() - 1)?;
            }
        }
        if digests.is_empty() {
            let buffer = self.gradient_buffer(0);
            for first in (0..bytes).step_by(STAGED_BYTES) {
                digests.push(backend.digest(buffer, first, STAGED_BYTES.min(bytes - first))?);
            }
        }
        Ok(of_digests(&digests))
    }

    /// Fills a gradient buffer with a subtree that was read.
    fn store_read(
        &mut self,
        backend: &mut dyn Backend,
        place: usize,
        index: usize,
        read: &mut ReadPieces<'_>,
    ) -> Result<(), TrainError> {
        let buffer = self.gradient_buffer(place);
        let words = summed(index, read, |at, piece| backend.upload(buffer, at, piece))?;
        if let Some(sums) = &mut self.sums {
            sums[place] = words;
        }
        Ok(())
    }

    /// Adds a subtree that is read to a gradient buffer; `digests` takes those of what is there
    /// then, stage by stage.
    fn add_read(
        &mut self,
        backend: &mut dyn Backend,
        place: usize,
        index: usize,
        (read, digests): (&mut ReadPieces<'_>, Option<&mut Vec<u64>>),
    ) -> Result<(), TrainError> {
        let staged = self.memory.ensure(backend, STAGED, STAGED_BYTES)?;
        let mut adding = Adding {
            buffer: self.gradient_buffer(place),
            staged,
            checked: self.sums.is_some(),
            first: 0,
            bytes: 0,
            sums: [0; 3],
            digests,
        };
        let words = summed(index, read, |at, piece| adding.stage(backend, at, piece))?;
        adding.add(backend)?;
        if let Some(sums) = &mut self.sums {
            let [before, read, after] = adding.sums;
            if (before, read) != (sums[place], words) {
                return Err(changed("a gradient", "it was added to another").into());
            }
            sums[place] = after;
        }
        Ok(())
    }
}

/// Hands on the pieces of a subtree; gives their word sum.
fn summed(
    index: usize,
    read: &mut ReadPieces<'_>,
    mut take: impl FnMut(usize, &[u8]) -> Result<(), DeviceError>,
) -> Result<u32, TrainError> {
    let mut words = 0_u32;
    read(index, &mut |at, piece| {
        words = words.wrapping_add(of_row(piece));
        Ok(take(at, piece)?)
    })?;
    Ok(words)
}

/// A gradient that is added to a buffer while it is read.
struct Adding<'a> {
    buffer: BufferId,
    staged: BufferId,
    checked: bool,
    /// The byte of the buffer where what is staged belongs, and how much that is.
    first: usize,
    bytes: usize,
    /// Word sums of the buffer as it was, of what was added, and of the buffer as it is.
    sums: [u32; 3],
    /// Takes that of each stage of the buffer as it is.
    digests: Option<&'a mut Vec<u64>>,
}

impl Adding<'_> {
    /// Stages the piece from byte `at` on, which follows the last one.
    fn stage(
        &mut self,
        backend: &mut dyn Backend,
        mut at: usize,
        mut piece: &[u8],
    ) -> Result<(), DeviceError> {
        while !piece.is_empty() {
            if self.bytes == 0 {
                self.first = at;
            }
            let fitting = piece.len().min(STAGED_BYTES - self.bytes);
            let (now, later) = piece.split_at(fitting);
            backend.upload(self.staged, self.bytes, now)?;
            self.bytes += fitting;
            (at, piece) = (at + fitting, later);
            if self.bytes == STAGED_BYTES {
                self.add(backend)?;
            }
        }
        Ok(())
    }

    /// Adds what is staged.
    fn add(&mut self, backend: &mut dyn Backend) -> Result<(), DeviceError> {
        let bytes = std::mem::take(&mut self.bytes);
        let elements = bytes / size_of::<f32>();
        if elements == 0 {
            return Ok(());
        }
        let view =
            |buffer, first| View::contiguous(buffer, DType::F32, [elements]).rebased(buffer, first);
        let (sum, staged) = (view(self.buffer, self.first), view(self.staged, 0));
        let op = Op::from(Add { a: sum, b: staged, y: sum });
        if self.checked {
            let found = backend.launch_summed(&op, ADD_SUMS)?;
            let found = [found.read[0], found.read[1], found.written[2]];
            self.sums.iter_mut().zip(found).for_each(|(sum, part)| *sum = sum.wrapping_add(part));
        } else {
            backend.launch(&op)?;
        }
        if let Some(digests) = &mut self.digests {
            digests.push(backend.digest(self.buffer, self.first, bytes)?);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::config::RunConfig;
    use crate::step::Checking;
    use pontoon_cpu::{CpuBackend, CpuOptions};
    use pontoon_models::{Model, preset};

    /// More than one stage, and no whole number of pieces.
    const PIECE: usize = 192 << 10;

    fn loaded(checking: Checking) -> (CpuBackend, TrainingState, usize) {
        let mut backend = CpuBackend::new(CpuOptions { threads: Some(2), isa: None }).unwrap();
        let settings = "[data]\nsequence = 32\n[train]\nmicro_batch = 1\nmicro_batches = 4\n";
        let config = RunConfig::parse(settings, &[], "the test's settings").unwrap();
        let model = Model::new(preset("qwen3-1m").unwrap()).unwrap();
        let weights = model.initialise(1);
        let mut state = TrainingState::load(&mut backend, &model, &config, &weights).unwrap();
        state.check(&backend, checking);
        (backend, state, model.table.gradient_elements())
    }

    fn gradient(elements: usize, node: usize) -> Vec<f32> {
        let value = |index: u32| (index.wrapping_mul(2_654_435_761) ^ node as u32) as f32 / 4e9;
        (0..elements as u32).map(|index| value(index) - 0.5).collect()
    }

    /// Puts a node's gradient where its worker has it.
    fn hold(backend: &mut CpuBackend, state: &mut TrainingState, gradient: &[f32]) {
        let bytes = bytemuck::cast_slice(gradient);
        backend.upload(state.gradient_buffer(0), 0, bytes).unwrap();
        if let Some(sums) = &mut state.sums {
            sums[0] = of_row(bytes);
        }
    }

    fn combine(
        (backend, state): (&mut CpuBackend, &mut TrainingState),
        nodes: &[Vec<f32>],
        counts: &[u32],
        held: Option<usize>,
    ) -> Result<u64, TrainError> {
        let size = 4 * nodes[0].len();
        let mut read = |index: usize, take: &mut TakePiece<'_>| {
            assert_ne!(held, Some(index), "what is held is not read");
            let bytes: &[u8] = bytemuck::cast_slice(&nodes[index]);
            let mut pieces = bytes.chunks(PIECE).enumerate();
            pieces.try_for_each(|(piece, bytes)| take(piece * PIECE, bytes))
        };
        state.sum(backend, counts, held, size, &mut read)
    }

    fn tree(nodes: &[Vec<f32>], counts: &[u32]) -> Vec<f32> {
        let mut stack: Vec<(u32, Vec<f32>)> = Vec::new();
        for (node, &count) in nodes.iter().zip(counts) {
            let (mut count, mut sum) = (count, node.clone());
            while stack.last().is_some_and(|(below, _)| *below == count) {
                let (_, left) = stack.pop().unwrap();
                sum = left.iter().zip(&sum).map(|(left, right)| left + right).collect();
                count *= 2;
            }
            stack.push((count, sum));
        }
        stack.pop().unwrap().1
    }

    #[test]
    fn the_sum_has_the_tree_s_bits_whatever_a_worker_holds_of_it() {
        for checking in [Checking::Off, Checking::On] {
            let (mut backend, mut state, elements) = loaded(checking);
            let nodes: Vec<Vec<f32>> = (0..4).map(|node| gradient(elements, node)).collect();
            let mut seen = HashSet::new();
            for (counts, held) in [
                (&[2, 2][..], &[None, Some(0), Some(1)][..]),
                (&[1, 1, 2], &[None, Some(0), Some(1)]),
                (&[2, 1, 1], &[None, Some(0)]),
                (&[1, 1, 1, 1], &[None, Some(0), Some(1)]),
            ] {
                let want = tree(&nodes[..counts.len()], counts);
                let mut digests = Vec::new();
                for &held in held {
                    if let Some(held) = held {
                        hold(&mut backend, &mut state, &nodes[held]);
                    }
                    let all = (&mut backend, &mut state);
                    digests.push(combine(all, &nodes, counts, held).unwrap());
                    let mut found = vec![0.0_f32; elements];
                    let to = bytemuck::cast_slice_mut(&mut found);
                    backend.download(state.gradient_buffer(0), 0, to).unwrap();
                    assert!(found == want, "{checking:?} {counts:?}, {held:?} held");
                    let sum = of_row(bytemuck::cast_slice(&want));
                    assert!(state.gradient_sum().is_none_or(|found| found == sum));
                }
                // However it came about, and another for another sum.
                assert!(digests.windows(2).all(|pair| pair[0] == pair[1]), "{digests:x?}");
                assert!(seen.insert(digests[0]), "{counts:?}");
            }
        }
    }

    #[test]
    fn a_bit_that_flips_in_what_is_held_is_found() {
        let (mut backend, mut state, elements) = loaded(Checking::On);
        let nodes = [gradient(elements, 0), gradient(elements, 1)];
        hold(&mut backend, &mut state, &nodes[0]);
        let flipped = [nodes[0][77].to_bits() ^ 1 << 30];
        let bytes = bytemuck::cast_slice(&flipped);
        backend.upload(state.gradient_buffer(0), 4 * 77, bytes).unwrap();
        let error = combine((&mut backend, &mut state), &nodes, &[2, 2], Some(0)).unwrap_err();
        assert!(error.is_corrupt(), "{error}");
    }
}
