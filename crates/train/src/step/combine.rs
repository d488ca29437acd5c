//! The sum of what several workers computed: published subtrees are read stage by stage and added
//! along the fixed tree.
//!
//! Memory is what this costs, so a subtree that would be added to the one below it at once is added
//! as it is read, and one's own is not read back at all. A stage is digested where it then lies.
//! Where stages come from is the replica's business.

use pontoon_ops::digest::{BLOCK, Digest, of_digests};
use pontoon_ops::sums::of_row;
use pontoon_ops::{Add, Backend, BufferId, DType, DeviceError, Op, View};

use super::{ADD_SUMS, TrainingState};
use crate::error::TrainError;
use crate::optimizer::changed;

/// Fills memory with as many bytes of the gradient of the subtree of an index, from a byte on.
pub(crate) type ReadStage<'a> = dyn FnMut(usize, usize, &mut [u8]) -> Result<(), TrainError> + 'a;

/// Where a stage waits on the device until it is added.
const STAGED: &str = "gradients.staged";
/// Bytes that are moved and digested at a time, a digest's block: small enough for a cache, large
/// enough for an operation to be worth its launch.
pub(crate) const STAGE: usize = BLOCK;

/// The stages of so many bytes: where each begins, and its bytes.
pub(crate) fn stages(bytes: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..bytes).step_by(STAGE).map(move |at| (at, STAGE.min(bytes - at)))
}

/// The digest of a gradient on a device: that of its stages' digests.
pub(crate) fn digest_gradient(
    backend: &mut dyn Backend,
    buffer: BufferId,
    bytes: usize,
) -> Result<u64, DeviceError> {
    let digests = stages(bytes).map(|(at, size)| backend.digest(buffer, at, size));
    Ok(of_digests(&digests.collect::<Result<Vec<u64>, DeviceError>>()?))
}

/// The same of one in the host's memory.
pub(crate) fn digest_of_host(gradient: &[u8]) -> u64 {
    let digest = |stage| of_digests(&[Digest::of(stage)]);
    of_digests(&gradient.chunks(STAGE).map(digest).collect::<Vec<u64>>())
}

/// What was learnt while subtrees were summed.
#[derive(Debug)]
pub(crate) struct Summed {
    /// The digest of the sum.
    pub digest: u64,
    /// Those of the subtrees that were read, by index.
    pub read: Vec<(usize, u64)>,
}

impl TrainingState {
    /// Sums subtrees, given in order with the number of their leaves, into the first gradient
    /// buffer; `read` reads the subtree of an index. `held` is the index of the one that stands in
    /// the first buffer already: 0, or 1 where the first two have equally many leaves and are added
    /// to each other, whose order makes no difference. The digest of the sum's `bytes` is formed
    /// while its stages are near where that is possible.
    pub(crate) fn sum(
        &mut self,
        backend: &mut dyn Backend,
        counts: &[u32],
        held: Option<usize>,
        bytes: usize,
        read: &mut ReadStage<'_>,
    ) -> Result<Summed, TrainError> {
        let mut stack: Vec<u32> = held.map(|held| counts[held]).into_iter().collect();
        let mut sum = Summed { digest: 0, read: Vec::new() };
        let mut digests = Vec::new();
        let last = (0..counts.len()).rfind(|index| held != Some(*index));
        for index in (0..counts.len()).filter(|index| held != Some(*index)) {
            let (count, below) = (counts[index], stack.len());
            let mut reading = Reading {
                index,
                bytes,
                read: &mut *read,
                copy: Vec::new(),
                words: 0,
                digests: Vec::new(),
            };
            match stack.last_mut() {
                // What would be added to the one below it at once need not be stored before.
                Some(top) if *top == count => {
                    *top += count;
                    // Only the addition that ends the sum is worth digesting.
                    let ends = below == 1 && last == Some(index);
                    let digests = ends.then_some(&mut digests);
                    self.add_read(backend, below - 1, &mut reading, digests)?;
                }
                _ => {
                    self.store_read(backend, below, &mut reading)?;
                    stack.push(count);
                }
            }
            sum.read.push((index, of_digests(&reading.digests)));
            while let [.., left, right] = stack[..]
                && left == right
            {
                stack.pop();
                *stack.last_mut().expect("it had two") = left + right;
                self.add(backend, stack.len() - 1)?;
            }
        }
        sum.digest = match digests[..] {
            [] => digest_gradient(backend, self.gradient_buffer(0), bytes)?,
            _ => of_digests(&digests),
        };
        Ok(sum)
    }

    /// Fills a gradient buffer with a subtree.
    fn store_read(
        &mut self,
        backend: &mut dyn Backend,
        place: usize,
        reading: &mut Reading<'_, '_>,
    ) -> Result<(), TrainError> {
        let buffer = self.gradient_buffer(place);
        for (at, size) in stages(reading.bytes) {
            reading.bring(backend, (at, size), (buffer, at))?;
        }
        if let Some(sums) = &mut self.sums {
            sums[place] = reading.words;
        }
        Ok(())
    }

    /// Adds a subtree that is read to a gradient buffer; `digests` takes those of what is there
    /// then, stage by stage.
    fn add_read(
        &mut self,
        backend: &mut dyn Backend,
        place: usize,
        reading: &mut Reading<'_, '_>,
        mut digests: Option<&mut Vec<u64>>,
    ) -> Result<(), TrainError> {
        let staged = self.memory.ensure(backend, STAGED, STAGE)?;
        let buffer = self.gradient_buffer(place);
        // Word sums of the buffer as it was, of what was added, and of the buffer as it is.
        let mut sums = [0_u32; 3];
        for (at, size) in stages(reading.bytes) {
            reading.bring(backend, (at, size), (staged, 0))?;
            let view = |buffer, first| {
                let elements = [size / size_of::<f32>()];
                View::contiguous(buffer, DType::F32, elements).rebased(buffer, first)
            };
            let sum = view(buffer, at);
            let op = Op::from(Add { a: sum, b: view(staged, 0), y: sum });
            if self.sums.is_some() {
                let found = backend.launch_summed(&op, ADD_SUMS)?;
                let found = [found.read[0], found.read[1], found.written[2]];
                sums.iter_mut().zip(found).for_each(|(sum, part)| *sum = sum.wrapping_add(part));
            } else {
                backend.launch(&op)?;
            }
            if let Some(digests) = &mut digests {
                digests.push(backend.digest(buffer, at, size)?);
            }
        }
        if let Some(of) = &mut self.sums {
            let [before, read, after] = sums;
            if (before, read) != (of[place], reading.words) {
                return Err(changed("a gradient", "it was added to another").into());
            }
            of[place] = after;
        }
        Ok(())
    }
}

/// A subtree that is read.
struct Reading<'a, 'b> {
    index: usize,
    bytes: usize,
    read: &'a mut ReadStage<'b>,
    /// For devices whose memory the host does not reach.
    copy: Vec<u8>,
    /// The word sum of what was read.
    words: u32,
    /// The digests of its stages, as they lie on the device.
    digests: Vec<u64>,
}

impl Reading<'_, '_> {
    /// Brings a stage to a place on the device.
    fn bring(
        &mut self,
        backend: &mut dyn Backend,
        (at, size): (usize, usize),
        (buffer, byte_offset): (BufferId, usize),
    ) -> Result<(), TrainError> {
        let words = match backend.mapped(buffer, byte_offset, size)? {
            Some(stage) => {
                (self.read)(self.index, at, stage)?;
                of_row(stage)
            }
            None => {
                self.copy.resize(size, 0);
                (self.read)(self.index, at, &mut self.copy)?;
                backend.upload(buffer, byte_offset, &self.copy)?;
                of_row(&self.copy)
            }
        };
        self.words = self.words.wrapping_add(words);
        self.digests.push(backend.digest(buffer, byte_offset, size)?);
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
    ) -> Result<Summed, TrainError> {
        let size = 4 * nodes[0].len();
        let mut read = |index: usize, at: usize, to: &mut [u8]| {
            assert_ne!(held, Some(index), "what is held is not read");
            let bytes: &[u8] = bytemuck::cast_slice(&nodes[index]);
            to.copy_from_slice(&bytes[at..][..to.len()]);
            Ok(())
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
                    let Summed { digest, read } = combine(all, &nodes, counts, held).unwrap();
                    digests.push(digest);
                    for (index, digest) in read {
                        let node = bytemuck::cast_slice(&nodes[index]);
                        assert_eq!(digest, digest_of_host(node), "{counts:?}, node {index}");
                    }
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
