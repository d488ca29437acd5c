//! Attention at the widths that tensor cores take, which the common cases do not reach: against the
//! f64 twin, twice, with what is not finite among the inputs, and the paged cache against documents
//! bit for bit. Says so and passes where there is no device.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]

use std::sync::Arc;

use pontoon_cuda::{CudaBackend, Library};
use pontoon_ops::philox::Stream;
use pontoon_ops::{Attention, AttentionBwd, DType, Op, PagedAttention, View};
use pontoon_qualify::cases::Case;
use pontoon_qualify::conformance::check;
use pontoon_qualify::invariance;
use pontoon_qualify::memory::Memory;
use pontoon_qualify::reference::{Want, reference};

/// Printed with every failure; the numbers follow from it.
const SEED: u64 = 20_261_126;
/// Query heads, key heads, and widths of keys and values.
const HEADS: [[usize; 4]; 4] = [[4, 2, 64, 64], [2, 1, 128, 128], [3, 3, 192, 128], [2, 2, 80, 48]];
/// Rows, and where documents begin: one row; short ones; longer than two tiles, and one of exactly
/// a tile.
const DOCUMENTS: [(usize, &[usize]); 3] =
    [(1, &[0, 1, 1]), (70, &[0, 3, 70]), (300, &[0, 10, 74, 290, 300])];

fn device() -> Option<CudaBackend> {
    let opened =
        Library::open().and_then(|library| CudaBackend::open(&Arc::new(library), "cuda:0", 0));
    opened.map_err(|error| eprintln!("not run: {}", error.text)).ok()
}

/// A case in the making.
struct Draft {
    memory: Memory,
    dtype: DType,
    drawn: u64,
}

impl Draft {
    fn new(dtype: DType, salt: u64) -> Draft {
        Draft { memory: Memory::default(), dtype, drawn: salt << 32 }
    }

    /// A tensor inside a wider one, so that rows are apart and in front of nothing.
    fn place(&mut self, dtype: DType, shape: &[usize], more: usize) -> View {
        let mut wide = shape.to_vec();
        let last = wide.len() - 1;
        wide[last] += more;
        let elements: usize = wide.iter().product();
        let buffer = self.memory.add(vec![0xa5; dtype.bytes(elements) + 256]);
        View::contiguous(buffer, dtype, wide.as_slice()).rebased(buffer, 128).slice(
            last,
            0,
            shape[last],
        )
    }

    fn normals(&mut self, shape: &[usize], more: usize) -> View {
        let view = self.place(self.dtype, shape, more);
        self.drawn += 1 << 20;
        let stream = Stream::new(SEED, 1);
        let values: Vec<f64> =
            (0..view.elements() as u64).map(|i| f64::from(stream.normal(self.drawn + i))).collect();
        self.memory.write(&view, &values);
        view
    }

    fn result(&mut self, dtype: DType, shape: &[usize]) -> View {
        let view = self.place(dtype, shape, 0);
        self.memory.write(&view, &vec![f64::NAN; view.elements()]);
        view
    }

    fn integers(&mut self, values: &[usize]) -> View {
        let view = self.place(DType::I32, &[values.len()], 0);
        self.memory.write(&view, &values.iter().map(|&v| v as f64).collect::<Vec<_>>());
        view
    }

    fn spoil(&mut self, view: &View, places: &[(usize, f64)]) {
        let mut values = self.memory.read(view);
        places.iter().for_each(|&(at, value)| values[at % view.elements()] = value);
        self.memory.write(view, &values);
    }

    fn done(self, name: String, op: impl Into<Op>) -> Case {
        let op = op.into();
        op.check().unwrap();
        Case { name, op, dtype: self.dtype, memory: self.memory }
    }
}

/// Forward cases: plain, with gaps that no fast load takes, and with what is not finite in values.
fn forward(dtype: DType) -> Vec<Case> {
    let mut cases = Vec::new();
    for [heads, kv_heads, width, v_width] in HEADS {
        for (rows, starts) in DOCUMENTS {
            for turn in 0..3 {
                let mut d = Draft::new(dtype, cases.len() as u64 + 1);
                let more = [0, 3, 8][turn];
                let q = d.normals(&[rows, heads, width], more);
                let k = d.normals(&[rows, kv_heads, width], more);
                let v = d.normals(&[rows, kv_heads, v_width], more);
                if turn == 2 {
                    d.spoil(&v, &[(rows * 77, f64::NAN), (rows * 1009 + 5, f64::INFINITY)]);
                }
                let documents = d.integers(starts);
                let out = d.result(dtype, &[rows, heads, v_width]);
                let lse = d.result(DType::F32, &[rows, heads]);
                let scale = 1.0 / (width as f32).sqrt();
                let name = format!("{rows} rows, {heads} on {kv_heads}, {width}/{v_width}, {turn}");
                let op = Attention { q, k, v, documents, scale, out, lse };
                cases.push(d.done(name, op));
            }
        }
    }
    cases
}

/// The gradient of a forward case, from the reference's results.
fn backward(case: &Case) -> Case {
    let Op::Attention(op) = &case.op else { unreachable!("made above") };
    let mut d = Draft::new(case.dtype, 1 << 8);
    d.memory = case.memory.clone();
    for expected in reference(&case.op, &case.memory) {
        let value = |want: &Want| if let Want::Near { value, .. } = want { *value } else { 0.0 };
        let values: Vec<f64> = expected.wants.iter().map(value).collect();
        d.memory.write(&expected.view, &values);
    }
    let dout = d.normals(op.out.dims(), 0);
    let dtype = case.dtype;
    let (dq, dk) = (d.result(dtype, op.q.dims()), d.result(dtype, op.k.dims()));
    let dv = d.result(dtype, op.v.dims());
    let Attention { q, k, v, documents, scale, out, lse } = op.clone();
    let op = AttentionBwd { q, k, v, documents, scale, out, lse, dout, dq, dk, dv };
    d.done(case.name.clone(), op)
}

#[test]
fn attention_of_wide_heads_is_what_its_contract_says() {
    let Some(mut backend) = device() else { return };
    let mut bad = Vec::new();
    let mut checks = 0;
    for dtype in [DType::Bf16, DType::F16] {
        for case in forward(dtype) {
            let plain = !case.name.ends_with(", 2");
            let gradient = plain.then(|| backward(&case));
            for case in [Some(case), gradient].into_iter().flatten() {
                let mut found = check(&mut backend, &case).unwrap().0;
                found.extend(invariance::check(&mut backend, &case).unwrap());
                checks += found.len();
                bad.extend(found.into_iter().filter(|finding| !finding.ok).map(|f| {
                    format!(
                        "{} {dtype} {} ({}): {:.3} {}",
                        f.op, f.check, f.case, f.worst_error, f.detail
                    )
                }));
            }
        }
    }
    println!("attention: {checks} checks, {} findings, seed {SEED}", bad.len());
    bad.iter().for_each(|line| println!("BAD attention {line}"));
    assert!(bad.is_empty(), "seed {SEED}: {} findings", bad.len());
}

#[test]
fn the_paged_cache_gives_the_bits_of_whole_documents() {
    let Some(mut backend) = device() else { return };
    let (length, block) = (150, 16);
    for dtype in [DType::F32, DType::Bf16, DType::F16] {
        for [heads, kv_heads, width, v_width] in HEADS {
            let mut d = Draft::new(dtype, 99);
            let q = d.normals(&[length, heads, width], 0);
            let k = d.normals(&[160, kv_heads, width], 0);
            let v = d.normals(&[160, kv_heads, v_width], 0);
            let documents = d.integers(&[0, length]);
            let out = d.result(dtype, &[length, heads, v_width]);
            let lse = d.result(DType::F32, &[length, heads]);
            let paged = d.result(dtype, &[length, heads, v_width]);
            let blocks = d.integers(&(0..10).collect::<Vec<_>>()).reshape([1, 10]);
            let (lengths, tail) = (d.integers(&[length]), d.integers(&[0, 7]));
            let scale = 0.1;
            let cache = |view: &View, width: usize| view.reshape([10, block, kv_heads, width]);
            let (k_cache, v_cache) = (cache(&k, width), cache(&v, v_width));
            let (k, v) = (k.slice(0, 0, length), v.slice(0, 0, length));
            let queries = tail;
            let last = |view: &View| view.slice(0, length - 7, 7);
            let op = PagedAttention {
                q: last(&q),
                k_cache,
                v_cache,
                blocks,
                lengths,
                queries,
                scale,
                out: last(&paged),
            };
            let memory = d.memory.clone();
            let name = "documents".to_owned();
            let whole = d.done(name, Attention { q, k, v, documents, scale, out, lse });
            let paged_case = Case { name: "paged".to_owned(), op: op.into(), dtype, memory };
            let (found, whole) = check(&mut backend, &whole).unwrap();
            assert!(found.iter().all(|finding| finding.ok), "{found:?}");
            let (found, got) = check(&mut backend, &paged_case).unwrap();
            assert!(found.iter().all(|finding| finding.ok), "{found:?}");
            assert!(
                got.bits(&last(&paged)) == whole.bits(&last(&out)),
                "{dtype} {width}/{v_width}"
            );
        }
    }
}
