//! Operations as large as a model's, to measure and to soak: one of each, not looked at element by
//! element.

use pontoon_ops::{
    Accumulate, AdamW, Add, AddRmsNorm, AddRmsNormBwd, Attention, AttentionBwd, Cast, Copy,
    CrossEntropy, CrossEntropyBwd, DType, Direction, Embed, EmbedBwd, Fill, GroupedMatmul,
    GroupedMatmulQuant, KvWrite, Layout, Matmul, MatmulQuant, Muon, PagedAttention, Permute,
    PermuteBwd, ReduceTree, Renormalise, RmsNorm, RmsNormBwd, Rope, RopeStyle, RouterRule,
    RouterTopK, RouterTopKBwd, Sample, Scale, Scoring, SumSquares, SwiGlu, SwiGluBwd, TokenLogProb,
    TokenLogProbBwd, Unpermute, UnpermuteBwd, View, hyper, sampling,
};

use super::{Case, Draft, Flavour, Maker};

/// How large the operations are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// Seconds for the whole list on a slow device; tensors fit in caches.
    Small,
    /// Tensors beyond the caches.
    Full,
}

/// The extents of a list.
#[derive(Clone, Copy)]
struct Extents {
    /// Rows of element-wise operations.
    many: usize,
    /// Rows of products.
    rows: usize,
    /// Width of the residual stream.
    width: usize,
    /// Tokens of the vocabulary.
    vocabulary: usize,
}

/// Width of a head.
const HEAD: usize = 64;
/// Experts and how many a row goes to.
const EXPERTS: [usize; 2] = [16, 4];
/// Positions of a block of the cache.
const BLOCK: usize = 16;
/// Any seed: values do not matter for speed.
const SEED: u64 = 1;

/// One of each operation that computes in a dtype; optimisers and sampling come with f32.
pub fn sized(dtype: DType, size: Size) -> Vec<Case> {
    let extents = match size {
        Size::Small => Extents { many: 1024, rows: 256, width: 512, vocabulary: 4096 },
        Size::Full => Extents { many: 8192, rows: 512, width: 1024, vocabulary: 16_384 },
    };
    let sized = Sized { maker: Maker { seed: SEED, dtype, flavour: Flavour::Plain }, extents };
    let mut cases = sized.moving();
    cases.extend(sized.norms());
    cases.extend(sized.products());
    cases.extend(sized.positions());
    cases.extend(sized.experts());
    cases.extend(sized.heads());
    if dtype == DType::F32 {
        cases.extend(sized.updates());
    }
    cases
}

/// What a soak repeats: products and attention of moderate size.
pub fn soaked(dtype: DType) -> Vec<Case> {
    let extents = Extents { many: 256, rows: 256, width: 256, vocabulary: 512 };
    let sized = Sized { maker: Maker { seed: SEED, dtype, flavour: Flavour::Plain }, extents };
    let mut cases = sized.products();
    cases.truncate(3);
    cases.extend(sized.positions().into_iter().filter(|case| {
        matches!(case.op, pontoon_ops::Op::Attention(_) | pontoon_ops::Op::AttentionBwd(_))
    }));
    cases
}

#[derive(Clone, Copy)]
struct Sized {
    maker: Maker,
    extents: Extents,
}

impl Sized {
    fn draft(&self, salt: usize) -> Draft {
        self.maker.start(90_000 + salt)
    }

    fn done(&self, draft: Draft, op: impl Into<pontoon_ops::Op>) -> Case {
        let op = op.into();
        let largest = op.operands().into_iter().map(|o| o.view).max_by_key(View::elements);
        let dims = largest.map(|view| format!("{:?}", view.dims())).unwrap_or_default();
        Case { name: dims, ..draft.done("sized", op) }
    }

    fn moving(&self) -> Vec<Case> {
        let (dtype, Extents { many, width, vocabulary, .. }) = (self.maker.dtype, self.extents);
        let shape = [many, width];
        let mut cases = Vec::new();
        let mut d = self.draft(1);
        let (src, dst) = (d.bulk(dtype, &shape, 1.0), d.room(dtype, &shape));
        cases.push(self.done(d, Copy { src, dst }));
        let mut d = self.draft(2);
        let other = if dtype == DType::F32 { DType::Bf16 } else { DType::F32 };
        let (src, dst) = (d.bulk(dtype, &shape, 1.0), d.room(other, &shape));
        cases.push(self.done(d, Cast { src, dst }));
        let mut d = self.draft(3);
        let dst = d.room(dtype, &shape);
        cases.push(self.done(d, Fill { dst, value: 1.5 }));
        let mut d = self.draft(4);
        let (a, b) = (d.bulk(dtype, &shape, 1.0), d.bulk(dtype, &shape, 1.0));
        let y = d.room(dtype, &shape);
        cases.push(self.done(d, Add { a, b, y }));
        let mut d = self.draft(5);
        let (x, y) = (d.bulk(dtype, &shape, 1.0), d.room(dtype, &shape));
        cases.push(self.done(d, Scale { x, factor: 0.5, y }));
        let mut d = self.draft(6);
        let (ids, table) =
            (random_ids(&mut d, many, vocabulary), d.bulk(dtype, &[vocabulary, width], 1.0));
        let y = d.room(dtype, &shape);
        cases.push(self.done(d, Embed { ids, table, y }));
        let mut d = self.draft(7);
        let (ids, dy) = (random_ids(&mut d, many, vocabulary), d.bulk(dtype, &shape, 1.0));
        let dtable = d.room(DType::F32, &[vocabulary, width]);
        cases.push(self.done(d, EmbedBwd { ids, dy, dtable, accumulate: Accumulate::Add }));
        let mut d = self.draft(8);
        let (gate, up) = (d.bulk(dtype, &shape, 1.0), d.bulk(dtype, &shape, 1.0));
        let y = d.room(dtype, &shape);
        cases.push(self.done(d, SwiGlu { gate, up, y }));
        let mut d = self.draft(9);
        let (gate, up) = (d.bulk(dtype, &shape, 1.0), d.bulk(dtype, &shape, 1.0));
        let dy = d.bulk(dtype, &shape, 1.0);
        let (dgate, dup) = (d.room(dtype, &shape), d.room(dtype, &shape));
        cases.push(self.done(d, SwiGluBwd { dy, gate, up, dgate, dup }));
        cases
    }

    fn norms(&self) -> Vec<Case> {
        let (dtype, Extents { many, width, .. }) = (self.maker.dtype, self.extents);
        let shape = [many, width];
        let mut cases = Vec::new();
        let mut d = self.draft(20);
        let (x, weight) = (d.bulk(dtype, &shape, 1.0), d.bulk(dtype, &[width], 1.0));
        let (y, rstd) = (d.room(dtype, &shape), d.room(DType::F32, &[many]));
        cases.push(self.done(d, RmsNorm { x, weight, eps: 1e-6, y, rstd }));
        let mut d = self.draft(21);
        let (x, residual) = (d.bulk(dtype, &shape, 1.0), d.bulk(dtype, &shape, 1.0));
        let weight = d.bulk(dtype, &[width], 1.0);
        let (sum, y) = (d.room(dtype, &shape), d.room(dtype, &shape));
        let rstd = d.room(DType::F32, &[many]);
        cases.push(self.done(d, AddRmsNorm { x, residual, weight, eps: 1e-6, sum, y, rstd }));
        let accumulate = Accumulate::Overwrite;
        let mut d = self.draft(22);
        let (dy, x) = (d.bulk(dtype, &shape, 1.0), d.bulk(dtype, &shape, 1.0));
        let (weight, rstd) = (d.bulk(dtype, &[width], 1.0), d.bulk(DType::F32, &[many], 1.0));
        let (dx, dweight) = (d.room(dtype, &shape), d.room(DType::F32, &[width]));
        cases.push(self.done(d, RmsNormBwd { dy, x, weight, rstd, dx, dweight, accumulate }));
        let mut d = self.draft(23);
        let (dy, sum) = (d.bulk(dtype, &shape, 1.0), d.bulk(dtype, &shape, 1.0));
        let dsum = Some(d.bulk(dtype, &shape, 1.0));
        let (weight, rstd) = (d.bulk(dtype, &[width], 1.0), d.bulk(DType::F32, &[many], 1.0));
        let (dx, dweight) = (d.room(dtype, &shape), d.room(DType::F32, &[width]));
        let op = AddRmsNormBwd { dy, dsum, sum, weight, rstd, dx, dweight, accumulate };
        cases.push(self.done(d, op));
        cases
    }

    fn products(&self) -> Vec<Case> {
        let (dtype, Extents { rows, width, .. }) = (self.maker.dtype, self.extents);
        let accumulate = Accumulate::Overwrite;
        let mut cases = Vec::new();
        for (turn, layout) in [Layout::Nt, Layout::Nn, Layout::Tn].into_iter().enumerate() {
            let mut d = self.draft(30 + turn);
            let (m, n, k) = (rows, 2 * width, width);
            let a = d.bulk(dtype, &if layout == Layout::Tn { [k, m] } else { [m, k] }, 1.0);
            let b = d.bulk(dtype, &if layout == Layout::Nt { [n, k] } else { [k, n] }, 1.0);
            let c = d.room(dtype, &[m, n]);
            let mut case = self.done(d, Matmul { layout, a, b, bias: None, c, accumulate });
            case.name = format!("{layout:?} {m}x{n}x{k}");
            cases.push(case);
        }
        let mut d = self.draft(33);
        let x = d.bulk(dtype, &[rows, width], 1.0);
        let weight = d.bulk(DType::I8, &[width, width], 30.0);
        let scales = d.bulk(DType::F32, &[width, width / 64], 0.01);
        let c = d.room(dtype, &[rows, width]);
        cases.push(
            self.done(d, MatmulQuant { x, weight, scales, block_n: 1, block_k: 64, bias: None, c }),
        );
        let mut d = self.draft(34);
        let a = d.bulk(dtype, &[rows, width], 1.0);
        let b = d.bulk(dtype, &[EXPERTS[0], width, width], 1.0);
        let share = |expert: usize| (expert * rows / EXPERTS[0]) as f64;
        let bounds: Vec<f64> = (0..=EXPERTS[0]).map(share).collect();
        let offsets = d.given(DType::I32, &[bounds.len()], &bounds);
        let c = d.room(dtype, &[rows, width]);
        let layout = Layout::Nt;
        cases.push(self.done(d, GroupedMatmul { layout, a, b, offsets, c, accumulate }));
        let mut d = self.draft(35);
        let x = d.bulk(dtype, &[rows, width], 1.0);
        let weight = d.bulk(DType::I8, &[EXPERTS[0], width, width], 30.0);
        let scales = d.bulk(DType::F32, &[EXPERTS[0], width, width / 64], 0.01);
        let offsets = d.given(DType::I32, &[bounds.len()], &bounds);
        let c = d.room(dtype, &[rows, width]);
        let (block_n, block_k) = (1, 64);
        let op = GroupedMatmulQuant { x, weight, scales, block_n, block_k, offsets, c };
        cases.push(self.done(d, op));
        cases
    }

    fn positions(&self) -> Vec<Case> {
        let (dtype, Extents { many, rows, width, .. }) = (self.maker.dtype, self.extents);
        let (heads, scale) = (width / HEAD, 0.125);
        let kv_heads = (heads / 2).max(1);
        let mut cases = Vec::new();
        let mut d = self.draft(40);
        let x = d.bulk(dtype, &[many, heads, HEAD], 1.0);
        let places: Vec<f64> = (0..many).map(|row| (row % rows) as f64).collect();
        let positions = d.given(DType::I32, &[many], &places);
        let (cos, sin) = (
            d.bulk(DType::F32, &[rows, HEAD / 2], 0.7),
            d.bulk(DType::F32, &[rows, HEAD / 2], 0.7),
        );
        let y = d.room(dtype, &[many, heads, HEAD]);
        let (style, direction) = (RopeStyle::HalfSplit, Direction::Forward);
        cases.push(self.done(d, Rope { x, positions, cos, sin, style, direction, y }));
        let mut d = self.draft(41);
        let [q, k, v] = qkv(&mut d, [rows, heads, kv_heads]);
        let documents = d.given(DType::I32, &[2], &[0.0, rows as f64]);
        let out = d.room(dtype, &[rows, heads, HEAD]);
        let lse = d.room(DType::F32, &[rows, heads]);
        cases.push(self.done(d, Attention { q, k, v, documents, scale, out, lse }));
        let mut d = self.draft(42);
        let [q, k, v] = qkv(&mut d, [rows, heads, kv_heads]);
        let documents = d.given(DType::I32, &[2], &[0.0, rows as f64]);
        let out = d.bulk(dtype, &[rows, heads, HEAD], 0.1);
        // Above every score's sum, so that probabilities stay below one.
        let lse = d.given(DType::F32, &[rows, heads], &vec![12.0; rows * heads]);
        let dout = d.bulk(dtype, &[rows, heads, HEAD], 1.0);
        let (dq, dk) = (d.room(dtype, q.dims()), d.room(dtype, k.dims()));
        let dv = d.room(dtype, v.dims());
        let op = AttentionBwd { q, k, v, documents, scale, out, lse, dout, dq, dk, dv };
        cases.push(self.done(d, op));
        cases.extend(self.cached(heads, kv_heads));
        cases
    }

    fn cached(&self, heads: usize, kv_heads: usize) -> Vec<Case> {
        let (dtype, Extents { rows, .. }) = (self.maker.dtype, self.extents);
        let (sequences, own) = (8, rows / BLOCK);
        let cache = [sequences * own, BLOCK, kv_heads, HEAD];
        let mut d = self.draft(43);
        let q = d.bulk(dtype, &[sequences, heads, HEAD], 1.0);
        let (k_cache, v_cache) = (d.bulk(dtype, &cache, 1.0), d.bulk(dtype, &cache, 1.0));
        let list: Vec<f64> = (0..sequences * own).map(|block| block as f64).collect();
        let blocks = d.given(DType::I32, &[sequences, own], &list);
        let lengths = d.given(DType::I32, &[sequences], &vec![rows as f64; sequences]);
        let starts: Vec<f64> = (0..=sequences).map(|sequence| sequence as f64).collect();
        let queries = d.given(DType::I32, &[sequences + 1], &starts);
        let out = d.room(dtype, &[sequences, heads, HEAD]);
        let op =
            PagedAttention { q, k_cache, v_cache, blocks, lengths, queries, scale: 0.125, out };
        let read = self.done(d, op);
        let mut d = self.draft(44);
        let [_, k, v] = qkv(&mut d, [rows, heads, kv_heads]);
        let places: Vec<f64> = (0..rows).map(|row| row as f64).collect();
        let slots = d.given(DType::I32, &[rows], &places);
        let (k_cache, v_cache) = (d.room(dtype, &cache), d.room(dtype, &cache));
        vec![read, self.done(d, KvWrite { k, v, slots, k_cache, v_cache })]
    }

    fn experts(&self) -> Vec<Case> {
        let (dtype, Extents { rows, width, .. }) = (self.maker.dtype, self.extents);
        let [count, chosen] = EXPERTS;
        let (scoring, renormalise) = (Scoring::Softmax, Renormalise::Yes);
        let rule =
            RouterRule { chosen, scoring, groups: 1, groups_kept: 1, renormalise, scale: 1.0 };
        let choice: Vec<f64> =
            (0..rows * chosen).map(|i| ((i / chosen + 5 * (i % chosen)) % count) as f64).collect();
        let places: Vec<f64> = (0..rows * chosen).map(|i| i as f64).collect();
        let (narrow, wide) = ([rows, width], [rows * chosen, width]);
        let small = [rows, chosen];
        let mut cases = Vec::new();
        let mut d = self.draft(50);
        let logits = d.bulk(DType::F32, &[rows, count], 1.0);
        let (weights, experts) = (d.room(DType::F32, &small), d.room(DType::I32, &small));
        cases.push(self.done(d, RouterTopK { logits, bias: None, rule, weights, experts }));
        let mut d = self.draft(51);
        let dweights = d.bulk(DType::F32, &small, 1.0);
        let logits = d.bulk(DType::F32, &[rows, count], 1.0);
        let experts = d.given(DType::I32, &small, &choice);
        let dlogits = d.room(DType::F32, &[rows, count]);
        cases.push(self.done(d, RouterTopKBwd { dweights, logits, experts, rule, dlogits }));
        let mut d = self.draft(52);
        let (x, experts) = (d.bulk(dtype, &narrow, 1.0), d.given(DType::I32, &small, &choice));
        let (y, offsets) = (d.room(dtype, &wide), d.room(DType::I32, &[count + 1]));
        let slots = d.room(DType::I32, &small);
        cases.push(self.done(d, Permute { x, experts, y, offsets, slots }));
        let mut d = self.draft(53);
        let (dy, slots) = (d.bulk(dtype, &wide, 1.0), d.given(DType::I32, &small, &places));
        let dx = d.room(dtype, &narrow);
        cases.push(self.done(d, PermuteBwd { dy, slots, dx }));
        let mut d = self.draft(54);
        let (x, weights) = (d.bulk(dtype, &wide, 1.0), d.bulk(DType::F32, &small, 1.0));
        let slots = d.given(DType::I32, &small, &places);
        let y = d.room(dtype, &narrow);
        cases.push(self.done(d, Unpermute { x, weights, slots, y }));
        let mut d = self.draft(55);
        let (dy, x) = (d.bulk(dtype, &narrow, 1.0), d.bulk(dtype, &wide, 1.0));
        let weights = d.bulk(DType::F32, &small, 1.0);
        let slots = d.given(DType::I32, &small, &places);
        let (dx, dweights) = (d.room(dtype, &wide), d.room(DType::F32, &small));
        cases.push(self.done(d, UnpermuteBwd { dy, x, weights, slots, dx, dweights }));
        cases
    }

    fn heads(&self) -> Vec<Case> {
        let (dtype, Extents { rows, width, vocabulary, .. }) = (self.maker.dtype, self.extents);
        let mut cases = Vec::new();
        let read = |d: &mut Draft| -> [View; 3] {
            let (x, head) = (d.bulk(dtype, &[rows, width], 1.0), [vocabulary, width]);
            [x, d.bulk(dtype, &head, 0.02), random_ids(d, rows, vocabulary)]
        };
        let each = |d: &mut Draft| d.room(DType::F32, &[rows]);
        let (temperature, accumulate) = (1.0, Accumulate::Overwrite);
        let mut d = self.draft(60);
        let [x, head, targets] = read(&mut d);
        let (loss, lse) = (each(&mut d), each(&mut d));
        cases.push(self.done(d, CrossEntropy { x, head, targets, loss, lse }));
        let mut d = self.draft(61);
        let [x, head, targets] = read(&mut d);
        let (loss, lse) = (each(&mut d), each(&mut d));
        let dloss = d.bulk(DType::F32, &[rows], 1.0);
        let dx = d.room(dtype, &[rows, width]);
        let dhead = d.room(DType::F32, &[vocabulary, width]);
        let op = CrossEntropyBwd { x, head, targets, dloss, loss, lse, dx, dhead, accumulate };
        cases.push(self.done(d, op));
        let mut d = self.draft(62);
        let [x, head, targets] = read(&mut d);
        let (logprob, entropy) = (each(&mut d), each(&mut d));
        cases.push(self.done(
            d,
            TokenLogProb {
                x,
                head,
                scales: None,
                block_k: 0,
                targets,
                temperature,
                logprob,
                entropy,
            },
        ));
        let mut d = self.draft(63);
        let [x, head, targets] = read(&mut d);
        let dlogprob = d.bulk(DType::F32, &[rows], 1.0);
        let dx = d.room(dtype, &[rows, width]);
        let dhead = d.room(DType::F32, &[vocabulary, width]);
        let op = TokenLogProbBwd { x, head, targets, temperature, dlogprob, dx, dhead, accumulate };
        cases.push(self.done(d, op));
        cases
    }

    fn updates(&self) -> Vec<Case> {
        let Extents { many, rows, width, vocabulary } = self.extents;
        let f32 = DType::F32;
        let elements = many * width / 2;
        let numbers = |d: &mut Draft| d.given(f32, &[hyper::COUNT], &[1e-3; hyper::COUNT]);
        let mut cases = Vec::new();
        let mut d = self.draft(70);
        let (weight, grad) = (d.bulk(f32, &[elements], 1.0), d.bulk(f32, &[elements], 1.0));
        let (m, v) = (d.room(f32, &[elements]), d.room(f32, &[elements]));
        let compute = Some(d.room(DType::Bf16, &[elements]));
        let hyper = numbers(&mut d);
        cases.push(self.done(d, AdamW { weight, grad, m, v, compute, hyper }));
        let mut d = self.draft(71);
        let (weight, grad) = (d.bulk(f32, &[rows, width], 1.0), d.bulk(f32, &[rows, width], 1.0));
        let momentum = d.bulk(f32, &[rows, width], 1.0);
        let hyper = numbers(&mut d);
        cases.push(self.done(d, Muon { weight, grad, momentum, compute: None, hyper }));
        let mut d = self.draft(72);
        let (x, y) = (d.bulk(f32, &[elements], 1.0), d.room(f32, &[1]));
        cases.push(self.done(d, SumSquares { x, y }));
        let mut d = self.draft(73);
        let (x, y) = (d.bulk(f32, &[8, many, width / 8], 1.0), d.room(f32, &[many, width / 8]));
        cases.push(self.done(d, ReduceTree { x, y, accumulate: Accumulate::Overwrite }));
        let mut d = self.draft(74);
        let rows = 16;
        let logits = d.bulk(f32, &[rows, vocabulary], 2.0);
        let settings = d.room(f32, &[rows, sampling::COUNT]);
        let keys = d.room(DType::U32, &[rows, 4]);
        let (token, logprob) = (d.room(DType::I32, &[rows]), d.room(f32, &[rows]));
        let (bias, history) = (None, None);
        let op = Sample { logits, bias, history, settings, keys, vocabulary, token, logprob };
        cases.push(self.done(d, op));
        cases
    }
}

fn random_ids(d: &mut Draft, rows: usize, bound: usize) -> View {
    let list: Vec<f64> = (0..rows).map(|_| d.below(bound) as f64).collect();
    d.given(DType::I32, &[rows], &list)
}

/// Queries, keys and values: [rows, heads, key heads].
fn qkv(d: &mut Draft, [rows, heads, kv_heads]: [usize; 3]) -> [View; 3] {
    let dtype = d.maker.dtype;
    [heads, kv_heads, kv_heads].map(|heads| d.bulk(dtype, &[rows, heads, HEAD], 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pontoon_ops::OpName;

    #[test]
    fn there_is_one_of_every_operation_but_exchanges() {
        let cases = sized(DType::F32, Size::Small);
        let exchanges = [OpName::AllReduce, OpName::AllGather, OpName::ReduceScatter];
        for name in OpName::ALL.iter().filter(|name| !exchanges.contains(name)) {
            assert!(cases.iter().any(|case| case.op.name() == *name), "{name:?}");
        }
    }
}
