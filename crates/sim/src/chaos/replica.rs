//! A replica that tells its faulty device which step it is in.
//!
//! It changes nothing else. Read next: `device.rs`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pontoon_fleet::protocol::{Against, Area, DeviceFacts, Node, Publish, Source, StateDigest};
use pontoon_fleet::worker::{Combined, Computed, Fault, Replayed, Replica};

/// Where a run is, for the device below a replica.
#[derive(Debug, Default)]
pub struct Place {
    /// The step that is being computed; 0 before the first.
    pub(super) step: AtomicU64,
    /// The step of the snapshot it loaded: faults up to there have struck in an earlier life.
    pub(super) loaded: AtomicU64,
}

/// A replica on a [`ChaosDevice`](super::ChaosDevice).
pub struct ChaosReplica<R> {
    inner: R,
    place: Arc<Place>,
}

impl<R: Replica> ChaosReplica<R> {
    /// Wraps a replica; `place` is what its device reads.
    pub fn new(inner: R, place: Arc<Place>) -> ChaosReplica<R> {
        ChaosReplica { inner, place }
    }

    fn at(&mut self, step: u64) -> &mut R {
        self.place.step.store(step, Ordering::Relaxed);
        &mut self.inner
    }
}

impl<R: Replica> Replica for ChaosReplica<R> {
    fn load(&mut self, from: Source) -> Result<(u64, Option<StateDigest>), Fault> {
        let loaded = self.at(0).load(from)?;
        self.place.loaded.store(loaded.0, Ordering::Relaxed);
        Ok(loaded)
    }

    fn facts(&self) -> DeviceFacts {
        self.inner.facts()
    }

    fn import(&mut self, step: u64) -> Result<StateDigest, Fault> {
        self.inner.import(step)
    }

    fn compute(
        &mut self,
        step: u64,
        node: Node,
        digests: &[u32],
        publish: Publish,
    ) -> Result<Computed, Fault> {
        self.at(step).compute(step, node, digests, publish)
    }

    fn replay(&mut self, step: u64, leaf: u32, against: Against) -> Result<Replayed, Fault> {
        self.at(step).replay(step, leaf, against)
    }

    fn check(&mut self) -> Result<StateDigest, Fault> {
        self.inner.check()
    }

    fn combine(&mut self, step: u64, nodes: &[Node]) -> Result<Combined, Fault> {
        self.at(step).combine(step, nodes)
    }

    fn apply(&mut self, step: u64) -> Result<(f64, StateDigest), Fault> {
        self.at(step).apply(step)
    }

    fn export(&mut self, area: Area) -> Result<u64, Fault> {
        self.inner.export(area)
    }

    fn score(&mut self) -> Result<f64, Fault> {
        self.inner.score()
    }
}
