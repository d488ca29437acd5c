//! The conformance suite must catch a chip that lies: defects are planted between the suite and a
//! good backend, one at a time, and each has to be found at its operation.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]

use pontoon_cpu::{CpuBackend, CpuOptions};
use pontoon_ops::{Backend, DType, DeviceError, Op, OpName, RopeStyle, View};
use pontoon_qualify::cases;
use pontoon_qualify::conformance::check;

/// What a bad chip does.
#[derive(Clone, Copy, Debug)]
enum Defect {
    /// The last element of a product is never written.
    DroppedTail,
    /// Halves are rotated as if they were neighbours.
    SwappedRopeHalves,
    /// Sums are rounded to bf16 on their way.
    Bf16Accumulation,
    /// The second of two runs differs in the last bit.
    NonDeterministic,
    /// A result is cut to bf16 instead of rounded.
    WrongRounding,
    /// Of equal experts the higher one wins.
    WrongExpertOnTies,
    /// Each row sees one key too many.
    MissingCausalEdge,
    /// A byte beyond the result is written.
    StrayWrite,
}

struct Liar {
    inner: CpuBackend,
    defect: Defect,
    launches: usize,
}

impl Liar {
    /// Changes a downloaded view's bytes and puts them back.
    fn edit(&mut self, view: &View, change: impl FnOnce(&mut [u8])) -> Result<(), DeviceError> {
        let mut bytes = vec![0; view.span_bytes()];
        self.inner.download(view.buffer, view.byte_offset, &mut bytes)?;
        change(&mut bytes);
        self.inner.upload(view.buffer, view.byte_offset, &bytes)
    }

    fn lie(&mut self, op: &Op) -> Result<(), DeviceError> {
        match (self.defect, op) {
            (Defect::DroppedTail, Op::Matmul(matmul)) => {
                let size = matmul.c.dtype.bytes(1);
                self.edit(&matmul.c, |bytes| {
                    let tail = bytes.len() - size;
                    bytes[tail..].fill(0);
                })
            }
            (Defect::Bf16Accumulation, Op::Matmul(matmul)) if matmul.c.dtype == DType::F32 => {
                self.edit(&matmul.c, |bytes| {
                    // An f32 without its lower half is a bf16.
                    bytes.chunks_mut(4).for_each(|number| number[..2].fill(0));
                })
            }
            (Defect::WrongRounding, Op::Cast(cast)) if cast.dst.dtype == DType::Bf16 => {
                let mut source = vec![0; cast.src.span_bytes()];
                self.inner.download(cast.src.buffer, cast.src.byte_offset, &mut source)?;
                self.edit(&cast.dst, |bytes| {
                    if source.len() == 2 * bytes.len() {
                        for (to, from) in bytes.chunks_mut(2).zip(source.chunks(4)) {
                            to.copy_from_slice(&from[2..]);
                        }
                    }
                })
            }
            (Defect::WrongExpertOnTies, Op::RouterTopK(router)) => {
                self.edit(&router.experts, |bytes| bytes[..4].copy_from_slice(&[5, 0, 0, 0]))
            }
            (Defect::NonDeterministic, Op::SumSquares(sum)) => {
                let odd = self.launches.is_multiple_of(2);
                self.edit(&sum.y, |bytes| bytes[0] ^= u8::from(odd))
            }
            (Defect::StrayWrite, Op::Add(add)) => {
                let after = add.y.byte_offset + add.y.span_bytes();
                self.inner.upload(add.y.buffer, after, &[1])
            }
            _ => Ok(()),
        }
    }
}

impl Backend for Liar {
    pontoon_ops::delegate!(inner: info alloc free upload download supports wait memory_used);

    fn launch(&mut self, op: &Op) -> Result<(), DeviceError> {
        self.launches += 1;
        match (self.defect, op) {
            (Defect::SwappedRopeHalves, Op::Rope(rope)) => {
                let style = match rope.style {
                    RopeStyle::HalfSplit => RopeStyle::Interleaved,
                    RopeStyle::Interleaved => RopeStyle::HalfSplit,
                };
                self.inner.launch(&pontoon_ops::Rope { style, ..rope.clone() }.into())
            }
            (Defect::MissingCausalEdge, Op::Attention(attention)) if attention.q.dim(0) > 1 => {
                // Queries move up by a row, so that each sees the key after its own.
                let rows = attention.q.dim(0);
                self.inner.launch(op)?;
                let mut shifted = attention.clone();
                shifted.q = attention.q.slice(0, 0, rows - 1);
                shifted.k = attention.k.slice(0, 1, rows - 1);
                shifted.v = attention.v.slice(0, 1, rows - 1);
                shifted.out = attention.out.slice(0, 0, rows - 1);
                shifted.lse = attention.lse.slice(0, 0, rows - 1);
                let most = (rows - 1) as i32;
                let documents = attention.documents;
                let mut before = vec![0; documents.span_bytes()];
                self.inner.download(documents.buffer, documents.byte_offset, &mut before)?;
                self.edit(&documents, |bytes| {
                    for start in bytes.chunks_mut(4) {
                        let value = i32::from_le_bytes((&*start).try_into().unwrap());
                        start.copy_from_slice(&value.min(most).to_le_bytes());
                    }
                })?;
                self.inner.launch(&shifted.into())?;
                self.inner.upload(documents.buffer, documents.byte_offset, &before)
            }
            _ => self.inner.launch(op),
        }?;
        self.lie(op)
    }
}

#[test]
fn every_planted_defect_is_found_at_its_operation() {
    let cases = cases::all(5);
    for (defect, op, check_name) in [
        (Defect::DroppedTail, OpName::Matmul, "correct"),
        (Defect::SwappedRopeHalves, OpName::Rope, "correct"),
        (Defect::Bf16Accumulation, OpName::Matmul, "correct"),
        (Defect::NonDeterministic, OpName::SumSquares, "repeat"),
        (Defect::WrongRounding, OpName::Cast, "correct"),
        (Defect::WrongExpertOnTies, OpName::RouterTopK, "correct"),
        (Defect::MissingCausalEdge, OpName::Attention, "correct"),
        (Defect::StrayWrite, OpName::Add, "correct"),
    ] {
        let inner = CpuBackend::new(CpuOptions::default()).unwrap();
        let mut liar = Liar { inner, defect, launches: 0 };
        let mut found = Vec::new();
        for case in cases.iter().filter(|case| case.op.name() == op) {
            let (findings, _) = check(&mut liar, case).unwrap();
            found.extend(findings.into_iter().filter(|finding| !finding.ok));
        }
        let caught = found.iter().any(|finding| finding.check == check_name);
        assert!(caught, "{defect:?} was not caught at {op:?}: {found:?}");
    }
}
