//! Digests of a replica's state, by which replicas are compared before and after every step.
//!
//! They are formed over the ranges that the update's operations work on, so that those form them
//! while they have the state in hand; what no operation digests is read once more. Read next:
//! `optimizer.rs`, where the update is launched; `replica.rs`, who is told.

use std::collections::HashMap;
use std::ops::Range;

use pontoon_fleet::protocol::StateDigest;
use pontoon_ops::digest::of_digests;
use pontoon_ops::{Backend, BufferId, DeviceError};
use pontoon_program::{Class, ParameterTable};

use crate::optimizer::changed;

/// A part of a buffer: where it begins and how many bytes it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub buffer: BufferId,
    pub byte_offset: usize,
    pub bytes: usize,
}

impl Part {
    fn place(&self) -> (BufferId, usize) {
        (self.buffer, self.byte_offset)
    }
}

/// Buffers of the state with a value for each trainable parameter: masters and two moments. They
/// come first.
pub(crate) const TRAINABLE_BUFFERS: usize = 3;

/// Parts by where they begin, each with its digest.
pub(crate) type ByPart = HashMap<(BufferId, usize), u64>;

/// What the operations of an update told of the parts they read and wrote.
#[derive(Debug, Default)]
pub(crate) struct Told {
    pub read: ByPart,
    pub written: ByPart,
}

/// The parts of a replica's state, and what was told of them last.
#[derive(Debug)]
pub(crate) struct StateParts {
    /// What outlives a step, in the order in which it is copied.
    state: Vec<Part>,
    /// What is computed with.
    weights: Vec<Part>,
    /// Which parts of the state the update's operations digest.
    digested: Vec<bool>,
    last: Vec<u64>,
}

/// The ranges of elements over which the digests of a buffer of trainable parameters are formed.
pub(crate) fn ranges(table: &ParameterTable) -> Vec<Range<usize>> {
    let classes = [Class::Matrix, Class::Embedding, Class::Vector];
    let mut ranges: Vec<_> = classes.map(|class| table.class_range(class)).into();
    ranges.retain(|range| !range.is_empty());
    ranges.sort_by_key(|range| range.start);
    ranges
}

impl StateParts {
    /// Cuts the buffers of trainable parameters into ranges; frozen ones are a part of their own.
    /// Both lists are of buffers with their bytes. `digested` are the places where an operation of
    /// the update begins that digests what it writes.
    pub fn new(
        table: &ParameterTable,
        state: &[(BufferId, usize)],
        weights: &[(BufferId, usize)],
        digested: &[(BufferId, usize)],
    ) -> StateParts {
        let trainable = |&(buffer, bytes): &(BufferId, usize)| {
            let size = bytes / table.trainable_elements().max(1);
            let part = move |Range { start, end }| Part {
                buffer,
                byte_offset: size * start,
                bytes: size * (end - start),
            };
            ranges(table).into_iter().map(part)
        };
        let (updated, frozen) = state.split_at(TRAINABLE_BUFFERS);
        let whole = |&(buffer, bytes): &(BufferId, usize)| Part { buffer, byte_offset: 0, bytes };
        let state: Vec<Part> =
            updated.iter().flat_map(trainable).chain(frozen.iter().map(whole)).collect();
        let is_digested = |part: &Part| digested.contains(&part.place());
        StateParts {
            digested: state.iter().map(is_digested).collect(),
            state,
            weights: weights.iter().flat_map(trainable).collect(),
            last: Vec::new(),
        }
    }

    /// The parts of what outlives a step, in the order in which it is copied.
    pub fn state(&self) -> &[Part] {
        &self.state
    }

    /// Digests everything.
    pub fn digest(&mut self, backend: &mut dyn Backend) -> Result<StateDigest, DeviceError> {
        self.last = read(backend, &self.state)?;
        Ok([of_digests(&self.last), of_digests(&read(backend, &self.weights)?)])
    }

    /// Digests what a step is computed with, before it is applied. Of what only the update reads
    /// the last digest stands: [`StateParts::after`] compares it with what the update read.
    pub fn before(&mut self, backend: &mut dyn Backend) -> Result<StateDigest, DeviceError> {
        let mut state = self.last.clone();
        for ((digest, part), told) in state.iter_mut().zip(&self.state).zip(&self.digested) {
            if !told {
                *digest = digest_of(backend, part)?;
            }
        }
        Ok([of_digests(&state), of_digests(&read(backend, &self.weights)?)])
    }

    /// The digests after an update; what it read of the state must be what stood there last.
    pub fn after(
        &mut self,
        backend: &mut dyn Backend,
        told: &Told,
    ) -> Result<StateDigest, DeviceError> {
        for (part, last) in self.state.iter().zip(&self.last) {
            let read = told.read.get(&part.place());
            if read.is_some_and(|read| read != last) {
                return Err(changed("the state", "a step was applied"));
            }
        }
        let mut digests = |parts: &[Part]| {
            let of = |part: &Part| match told.written.get(&part.place()) {
                Some(written) => Ok(*written),
                None => digest_of(backend, part),
            };
            parts.iter().map(of).collect::<Result<Vec<u64>, DeviceError>>()
        };
        self.last = digests(&self.state)?;
        let weights = digests(&self.weights)?;
        Ok([of_digests(&self.last), of_digests(&weights)])
    }
}

fn read(backend: &mut dyn Backend, parts: &[Part]) -> Result<Vec<u64>, DeviceError> {
    parts.iter().map(|part| digest_of(backend, part)).collect()
}

fn digest_of(backend: &mut dyn Backend, part: &Part) -> Result<u64, DeviceError> {
    backend.digest(part.buffer, part.byte_offset, part.bytes)
}
