//! What generation computes equals what training computes, bit for bit: attention over the cache
//! and over whole documents, a drawn token's log-probability and the scorer's.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]

use std::sync::Arc;

use pontoon_ascend::{AscendBackend, Library};
use pontoon_ops::philox::Stream;
use pontoon_ops::{
    Attention, Backend, Cast, DType, KvWrite, Layout, Matmul, MatmulQuant, Op, PagedAttention,
    Sample, TokenLogProb, View, sampling,
};

/// Printed with every failure; the numbers follow from it.
const SEED: u64 = 20_261_127;

struct Rig {
    backend: AscendBackend,
    drawn: u64,
}

impl Rig {
    fn new() -> Rig {
        let library = Arc::new(Library::linked(pontoon_emu_ascend::symbol));
        Rig { backend: AscendBackend::open(&library, "emu", 0).unwrap(), drawn: 0 }
    }

    fn room(&mut self, dtype: DType, shape: &[usize]) -> View {
        let bytes = dtype.bytes(shape.iter().product());
        View::contiguous(self.backend.alloc(bytes).unwrap(), dtype, shape)
    }

    fn words(&mut self, dtype: DType, shape: &[usize], words: &[[u8; 4]]) -> View {
        let view = self.room(dtype, shape);
        self.backend.upload(view.buffer, 0, words.as_flattened()).unwrap();
        view
    }

    fn integers(&mut self, shape: &[usize], values: &[i32]) -> View {
        let words: Vec<[u8; 4]> = values.iter().map(|value| value.to_le_bytes()).collect();
        self.words(DType::I32, shape, &words)
    }

    fn floats(&mut self, values: &[f32], shape: &[usize]) -> View {
        let words: Vec<[u8; 4]> = values.iter().map(|value| value.to_le_bytes()).collect();
        self.words(DType::F32, shape, &words)
    }

    /// Normal numbers in a dtype.
    fn normal(&mut self, dtype: DType, shape: &[usize]) -> View {
        self.drawn += 1;
        let stream = Stream::new(SEED, self.drawn);
        let count: usize = shape.iter().product();
        let values: Vec<f32> = (0..count as u64).map(|i| stream.normal(i)).collect();
        let src = self.floats(&values, shape);
        if dtype == DType::F32 {
            return src;
        }
        let dst = self.room(dtype, shape);
        self.run(Cast { src, dst });
        dst
    }

    fn run(&mut self, op: impl Into<Op>) {
        let op = op.into();
        op.check().unwrap();
        self.backend.launch(&op).unwrap();
    }

    fn bytes(&mut self, view: &View) -> Vec<u8> {
        let mut bytes = vec![0; view.dtype.bytes(view.elements())];
        self.backend.download(view.buffer, view.byte_offset, &mut bytes).unwrap();
        bytes
    }
}

#[test]
fn cached_and_whole_attention_agree_bit_for_bit_in_every_chunking() {
    let (rows, heads, kv_heads, width, block) = (150, 4, 2, 24, 16);
    for dtype in DType::FLOATS {
        let mut rig = Rig::new();
        let q = rig.normal(dtype, &[rows, heads, width]);
        let k = rig.normal(dtype, &[rows, kv_heads, width]);
        let v = rig.normal(dtype, &[rows, kv_heads, width]);
        let documents = rig.integers(&[2], &[0, rows as i32]);
        let (out, lse) =
            (rig.room(dtype, &[rows, heads, width]), rig.room(DType::F32, &[rows, heads]));
        let scale = 0.2;
        rig.run(Attention { q, k, v, documents, scale, out, lse });
        let whole = rig.bytes(&out);
        // Blocks are taken from the end of the cache backwards.
        let count = rows.div_ceil(block);
        let list: Vec<i32> = (0..count as i32).rev().collect();
        let slots: Vec<i32> =
            (0..rows).map(|row| list[row / block] * block as i32 + (row % block) as i32).collect();
        let slots = rig.integers(&[rows], &slots);
        let k_cache = rig.room(dtype, &[count, block, kv_heads, width]);
        let v_cache = rig.room(dtype, &[count, block, kv_heads, width]);
        rig.run(KvWrite { k, v, slots, k_cache, v_cache });
        let blocks = rig.integers(&[1, count], &list);
        let row_bytes = dtype.bytes(heads * width);
        for (first, end) in [(0, 1), (63, 65), (149, 150), (0, 150), (100, 137)] {
            let lengths = rig.integers(&[1], &[end as i32]);
            let queries = rig.integers(&[2], &[0, (end - first) as i32]);
            let own = q.slice(0, first, end - first);
            let out = rig.room(dtype, &[end - first, heads, width]);
            let (q, scale) = (own, scale);
            rig.run(PagedAttention { q, k_cache, v_cache, blocks, lengths, queries, scale, out });
            let wanted = &whole[first * row_bytes..end * row_bytes];
            assert!(rig.bytes(&out) == wanted, "seed {SEED}: {dtype} rows {first}..{end}");
        }
    }
}

/// Draws from logits and scores what was drawn; the two log-probabilities' bytes.
fn drawn_and_scored(
    rig: &mut Rig,
    logits: View,
    score: impl FnOnce(View, [View; 2]) -> TokenLogProb,
) -> [Vec<u8>; 2] {
    let (rows, vocabulary) = (logits.dim(0), logits.dim(1));
    let mut settings = vec![0.0; rows * sampling::COUNT];
    for own in settings.chunks_mut(sampling::COUNT) {
        own[sampling::TEMPERATURE] = 1.0;
        own[sampling::TOP_P] = 1.0;
        own[sampling::REPETITION] = 1.0;
    }
    let settings = rig.floats(&settings, &[rows, sampling::COUNT]);
    let words: Vec<[u8; 4]> = (0..4 * rows as u32).map(|word| word.to_le_bytes()).collect();
    let keys = rig.words(DType::U32, &[rows, 4], &words);
    let (token, logprob) = (rig.room(DType::I32, &[rows]), rig.room(DType::F32, &[rows]));
    let (bias, history) = (None, None);
    rig.run(Sample { logits, bias, history, settings, keys, vocabulary, token, logprob });
    // The drawn tokens were written on the device: the host does not know them.
    let results = [rig.room(DType::F32, &[rows]), rig.room(DType::F32, &[rows])];
    rig.run(score(token, results));
    [rig.bytes(&logprob), rig.bytes(&results[0])]
}

#[test]
fn a_drawn_tokens_log_probability_is_the_scorers_bit_for_bit() {
    let (rows, vocabulary, width, block_k) = (7, 130, 64, 32);
    let accumulate = pontoon_ops::Accumulate::Overwrite;
    for dtype in DType::FLOATS {
        let mut rig = Rig::new();
        let x = rig.normal(dtype, &[rows, width]);
        let logits = rig.room(DType::F32, &[rows, vocabulary]);
        let head = rig.normal(dtype, &[vocabulary, width]);
        let layout = Layout::Nt;
        rig.run(Matmul { layout, a: x, b: head, bias: None, c: logits, accumulate });
        let score = |scales, block_k, head| {
            move |targets, [logprob, entropy]: [View; 2]| {
                let temperature = 1.0;
                TokenLogProb { x, head, scales, block_k, targets, temperature, logprob, entropy }
            }
        };
        let [drawn, scored] = drawn_and_scored(&mut rig, logits, score(None, 0, head));
        assert_eq!(drawn, scored, "seed {SEED}: {dtype}");
        // Any bytes but -128, which weights of this type never are.
        let byte = |at: usize, place: u32| match (at as u32 * 37 + place * 101) as u8 {
            0x80 => 0,
            byte => byte,
        };
        let bytes: Vec<[u8; 4]> =
            (0..vocabulary * width / 4).map(|at| [0, 1, 2, 3].map(|i| byte(at, i))).collect();
        let weight = rig.words(DType::I8, &[vocabulary, width], &bytes);
        let scales = rig.normal(DType::F32, &[vocabulary, width / block_k]);
        let (bias, block_n) = (None, 1);
        rig.run(MatmulQuant { x, weight, scales, block_n, block_k, bias, c: logits });
        let score = score(Some(scales), block_k, weight);
        let [drawn, scored] = drawn_and_scored(&mut rig, logits, score);
        assert_eq!(drawn, scored, "seed {SEED}: {dtype}, quantised head");
    }
}
