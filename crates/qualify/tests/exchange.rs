//! Exchanges of groups: a good group of any size passes, a member that sums otherwise is named, and
//! one that fails ends the check with its own failure.

use std::time::Instant;

use pontoon_cpu::{CpuBackend, CpuOptions};
use pontoon_ops::{Backend, BufferId, DType, DeviceError, DeviceErrorKind, Op, Support};
use pontoon_qualify::exchange::{check, measure};

/// Printed with every failure; the cases follow from it.
const SEED: u64 = 20_261_125;

/// What a member does wrong.
#[derive(Clone, Copy, PartialEq)]
enum Wrong {
    Nothing,
    /// Sums come out one rounding too large.
    Sum,
    Refuses,
    Fails,
}

struct Member {
    inner: CpuBackend,
    wrong: Wrong,
    summed: Option<BufferId>,
    sums: usize,
}

impl Backend for Member {
    pontoon_ops::delegate!(inner: info alloc upload wait memory_used);

    fn free(&mut self, buffer: BufferId) -> Result<(), DeviceError> {
        // The number may be given to another buffer.
        self.summed = self.summed.filter(|summed| *summed != buffer);
        self.inner.free(buffer)
    }

    fn download(
        &mut self,
        buffer: BufferId,
        at: usize,
        bytes: &mut [u8],
    ) -> Result<(), DeviceError> {
        self.inner.download(buffer, at, bytes)?;
        if self.wrong == Wrong::Sum && self.summed == Some(buffer) {
            // The lowest bit of the first element behind the guard.
            bytes[pontoon_qualify::memory::GUARD_BYTES] ^= 1;
        }
        Ok(())
    }

    fn supports(&self, op: &Op) -> Support {
        match self.wrong {
            Wrong::Refuses => Support::No("it has no links"),
            _ => self.inner.supports(op),
        }
    }

    fn launch(&mut self, op: &Op) -> Result<(), DeviceError> {
        let Op::AllReduce(own) = op else { return self.inner.launch(op) };
        (self.summed, self.sums) = (Some(own.y.buffer), self.sums + 1);
        if self.wrong == Wrong::Fails && self.sums == 2 {
            // It comes to the last exchange of a case, so that nobody waits for it in this test.
            self.inner.launch(op)?;
            return Err(DeviceError::new(DeviceErrorKind::LinkDown, "the cable is out"));
        }
        self.inner.launch(op)
    }
}

#[expect(clippy::unwrap_used, reason = "a test's helper may fail loudly too")]
fn group(count: u16, wrong: Wrong) -> Vec<Box<dyn Backend>> {
    let members = CpuBackend::group(count, CpuOptions { threads: Some(1), isa: None }).unwrap();
    let last = members.len() - 1;
    let boxed = |(rank, inner)| {
        let wrong = if rank == last { wrong } else { Wrong::Nothing };
        Box::new(Member { inner, wrong, summed: None, sums: 0 }) as Box<dyn Backend>
    };
    members.into_iter().enumerate().map(boxed).collect()
}

#[test]
fn a_good_group_passes_whatever_its_size_and_is_timed() {
    for count in [1, 2, 3, 5] {
        let mut members = group(count, Wrong::Nothing);
        let found = check(&mut members, SEED);
        let bad: Vec<_> = found.rows.iter().filter(|row| !row.ok).collect();
        assert!(bad.is_empty() && found.failure.is_none(), "seed {SEED}, {count}: {found:?}");
        // Three checks of the sums in three dtypes, two of gathering in four.
        assert_eq!((found.rows.len(), found.unsupported.len()), (2 * 9 + 8, 0));
        let begun = Instant::now();
        let clock = move || begun.elapsed();
        let speed = measure(&mut members, &[DType::F32], 1 << 12, &clock).unwrap();
        assert_eq!(speed.len(), 3);
        assert!(speed.iter().all(|row| row.bytes >= 4 << 12 && row.ms > 0.0), "{speed:?}");
    }
}

#[test]
fn a_member_with_another_sum_is_named_in_every_dtype() {
    let found = check(&mut group(3, Wrong::Sum), SEED);
    for dtype in ["f32", "bf16", "f16"] {
        let own = |row: &&pontoon_qualify::suite::Row| {
            row.op == "AllReduce" && row.dtype == dtype && row.check == "agreement"
        };
        let row = found.rows.iter().find(own).unwrap();
        assert!(!row.ok && row.detail.contains("member 2"), "seed {SEED}: {row:?}");
    }
    let others = found.rows.iter().filter(|row| row.op != "AllReduce");
    assert!(others.clone().count() > 0 && others.clone().all(|row| row.ok));
}

#[test]
fn what_a_member_refuses_or_fails_at_is_said_in_its_own_words() {
    let refused = check(&mut group(2, Wrong::Refuses), SEED);
    assert!(refused.rows.is_empty() && refused.failure.is_none());
    assert!(refused.unsupported.iter().all(|one| one.reason == "it has no links"));
    assert_eq!(refused.unsupported.len(), 10, "{:?}", refused.unsupported);
    let failure = check(&mut group(2, Wrong::Fails), SEED).failure.unwrap();
    assert!(failure.starts_with("member 1: AllReduce f32"), "{failure}");
    assert!(failure.contains("the cable is out"), "{failure}");
}
