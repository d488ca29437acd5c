//! Which forward operation each backward operation is the gradient of.

use pontoon_ops::{
    self as ops, AddRmsNorm, Attention, CrossEntropy, DType, Direction, Embed, Op, Permute,
    RmsNorm, Rope, RouterTopK, SwiGlu, TokenLogProb, Unpermute, View,
};

use super::Pair;
use crate::cases::Case;
use crate::reference::{Want, reference};

/// What the cases' saved statistics were computed with.
const EPS: f32 = 1e-6;
/// Experts that rows are sorted by.
const EXPERTS: usize = 5;

/// The pair of a backward case, or nothing for other operations.
pub(super) fn pair(case: &Case) -> Option<Pair> {
    let case = case.clone();
    Some(match case.op.clone() {
        Op::EmbedBwd(op) => embed(case, &op),
        Op::RmsNormBwd(op) => rms_norm(case, &op),
        Op::AddRmsNormBwd(op) => add_rms_norm(case, &op),
        Op::Rope(op) if op.direction == Direction::Backward => rope(case, &op),
        Op::AttentionBwd(op) => attention(case, &op),
        Op::SwiGluBwd(op) => swiglu(case, &op),
        Op::RouterTopKBwd(op) => router(case, &op),
        Op::PermuteBwd(op) => permute(case, &op),
        Op::UnpermuteBwd(op) => unpermute(case, &op),
        Op::CrossEntropyBwd(op) => cross_entropy(case, &op),
        Op::TokenLogProbBwd(op) => token_log_prob(case, &op),
        _ => return None,
    })
}

/// Room for a tensor that only the forward operation has.
fn room(case: &mut Case, dtype: DType, dims: &[usize]) -> View {
    let elements: usize = dims.iter().product();
    let buffer = case.memory.add(vec![0; dtype.bytes(elements).max(8)]);
    View::contiguous(buffer, dtype, dims)
}

fn embed(mut case: Case, op: &ops::EmbedBwd) -> Pair {
    let table = room(&mut case, DType::F32, op.dtable.dims());
    let y = room(&mut case, DType::F32, op.dy.dims());
    let forward = Embed { ids: op.ids, table, y }.into();
    Pair { case, forward, inputs: vec![(table, op.dtable)], upstream: vec![(y, op.dy)] }
}

fn rms_norm(mut case: Case, op: &ops::RmsNormBwd) -> Pair {
    let y = room(&mut case, DType::F32, op.x.dims());
    let rstd = room(&mut case, DType::F32, op.rstd.dims());
    let forward = RmsNorm { x: op.x, weight: op.weight, eps: EPS, y, rstd }.into();
    let inputs = vec![(op.x, op.dx), (op.weight, op.dweight)];
    Pair { case, forward, inputs, upstream: vec![(y, op.dy)] }
}

fn add_rms_norm(mut case: Case, op: &ops::AddRmsNormBwd) -> Pair {
    let dims = op.sum.dims();
    let (residual, sum) = (room(&mut case, DType::F32, dims), room(&mut case, DType::F32, dims));
    let y = room(&mut case, DType::F32, dims);
    let rstd = room(&mut case, DType::F32, op.rstd.dims());
    let (x, weight) = (op.sum, op.weight);
    let forward = AddRmsNorm { x, residual, weight, eps: EPS, sum, y, rstd }.into();
    // One gradient serves both summands.
    let inputs = vec![(x, op.dx), (residual, op.dx), (weight, op.dweight)];
    let upstream = [(y, op.dy)].into_iter().chain(op.dsum.map(|dsum| (sum, dsum))).collect();
    Pair { case, forward, inputs, upstream }
}

fn rope(mut case: Case, op: &Rope) -> Pair {
    let x = room(&mut case, DType::F32, op.x.dims());
    let y = room(&mut case, DType::F32, op.x.dims());
    let forward = Rope { x, y, direction: Direction::Forward, ..op.clone() }.into();
    Pair { case, forward, inputs: vec![(x, op.y)], upstream: vec![(y, op.x)] }
}

fn attention(mut case: Case, op: &ops::AttentionBwd) -> Pair {
    let out = room(&mut case, DType::F32, op.out.dims());
    let lse = room(&mut case, DType::F32, op.lse.dims());
    let ops::AttentionBwd { q, k, v, documents, scale, .. } = op.clone();
    let forward = Attention { q, k, v, documents, scale, out, lse }.into();
    let inputs = vec![(q, op.dq), (k, op.dk), (v, op.dv)];
    Pair { case, forward, inputs, upstream: vec![(out, op.dout)] }
}

fn swiglu(mut case: Case, op: &ops::SwiGluBwd) -> Pair {
    let y = room(&mut case, DType::F32, op.gate.dims());
    let forward = SwiGlu { gate: op.gate, up: op.up, y }.into();
    let inputs = vec![(op.gate, op.dgate), (op.up, op.dup)];
    Pair { case, forward, inputs, upstream: vec![(y, op.dy)] }
}

/// Gives the backward operation what the forward one would have saved for it.
fn save(case: &mut Case, forward: &Op, from: &View, to: &View) {
    let results = reference(forward, &case.memory);
    let found = results.iter().find(|expected| expected.view == *from);
    let value = |want: &Want| if let Want::Near { value, .. } = want { *value } else { 0.0 };
    let values: Vec<f64> =
        found.map_or(Vec::new(), |expected| expected.wants.iter().map(value).collect());
    case.memory.write(to, &values);
}

fn router(mut case: Case, op: &ops::RouterTopKBwd) -> Pair {
    let weights = room(&mut case, DType::F32, op.dweights.dims());
    let experts = room(&mut case, DType::I32, op.experts.dims());
    let (logits, rule) = (op.logits, op.rule);
    let forward = RouterTopK { logits, bias: None, rule, weights, experts }.into();
    save(&mut case, &forward, &experts, &op.experts);
    let upstream = vec![(weights, op.dweights)];
    Pair { case, forward, inputs: vec![(logits, op.dlogits)], upstream }
}

fn permute(mut case: Case, op: &ops::PermuteBwd) -> Pair {
    let x = room(&mut case, DType::F32, op.dx.dims());
    let y = room(&mut case, DType::F32, op.dy.dims());
    let experts = room(&mut case, DType::I32, op.slots.dims());
    let slots = room(&mut case, DType::I32, op.slots.dims());
    let offsets = room(&mut case, DType::I32, &[EXPERTS + 1]);
    let ids: Vec<f64> = (0..experts.elements()).map(|i| (i * 7 % EXPERTS) as f64).collect();
    case.memory.write(&experts, &ids);
    let forward = Permute { x, experts, y, offsets, slots }.into();
    save(&mut case, &forward, &slots, &op.slots);
    Pair { case, forward, inputs: vec![(x, op.dx)], upstream: vec![(y, op.dy)] }
}

fn unpermute(mut case: Case, op: &ops::UnpermuteBwd) -> Pair {
    let y = room(&mut case, DType::F32, op.dy.dims());
    let forward = Unpermute { x: op.x, weights: op.weights, slots: op.slots, y }.into();
    let inputs = vec![(op.x, op.dx), (op.weights, op.dweights)];
    Pair { case, forward, inputs, upstream: vec![(y, op.dy)] }
}

fn cross_entropy(mut case: Case, op: &ops::CrossEntropyBwd) -> Pair {
    let loss = room(&mut case, DType::F32, op.loss.dims());
    let lse = room(&mut case, DType::F32, op.loss.dims());
    let (x, head, targets) = (op.x, op.head, op.targets);
    let forward = CrossEntropy { x, head, targets, loss, lse }.into();
    let inputs = vec![(x, op.dx), (head, op.dhead)];
    Pair { case, forward, inputs, upstream: vec![(loss, op.dloss)] }
}

fn token_log_prob(mut case: Case, op: &ops::TokenLogProbBwd) -> Pair {
    let logprob = room(&mut case, DType::F32, op.targets.dims());
    let entropy = room(&mut case, DType::F32, op.targets.dims());
    let ops::TokenLogProbBwd { x, head, targets, temperature, .. } = *op;
    let (scales, block_k) = (None, 0);
    let forward =
        TokenLogProb { x, head, scales, block_k, targets, temperature, logprob, entropy }.into();
    let inputs = vec![(x, op.dx), (head, op.dhead)];
    Pair { case, forward, inputs, upstream: vec![(logprob, op.dlogprob)] }
}
