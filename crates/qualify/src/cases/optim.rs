//! Optimisers, reductions and sampling: f32, whatever the model computes in.

use pontoon_ops::{
    Accumulate, AdamW, DType, Muon, ReduceTree, Sample, SumSquares, hyper, sampling,
};

use super::{Case, Flavour, Maker};

pub(super) fn cases(seed: u64) -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in DType::FLOATS {
        let maker = Maker { seed, dtype, flavour: Flavour::Plain };
        cases.extend(updates(maker));
        for (turn, count) in [1, 4097, 20_001].into_iter().enumerate() {
            let mut d = maker.start(9500 + turn);
            let x = d.tame(dtype, &[count], 1.0);
            let y = d.poisoned(DType::F32, &[1]);
            cases.push(d.done(format!("{count} elements"), SumSquares { x, y }));
        }
        for (turn, parts) in [1, 2, 5, 8].into_iter().enumerate() {
            let mut d = maker.start(9600 + turn);
            let x = d.tame(dtype, &[parts, 3, 11], 1.0);
            let y = d.tame(DType::F32, &[3, 11], 1.0);
            let op = ReduceTree { x, y, accumulate: Accumulate::Add };
            cases.push(d.done(format!("{parts} parts"), op));
        }
    }
    cases.extend(samples(Maker { seed, dtype: DType::F32, flavour: Flavour::Plain }));
    cases
}

fn updates(maker: Maker) -> Vec<Case> {
    let mut numbers = [0.0; hyper::COUNT];
    numbers[hyper::LR] = 0.01;
    numbers[hyper::BETA1] = 0.9;
    numbers[hyper::BETA2] = 0.95;
    numbers[hyper::EPS] = 1e-8;
    numbers[hyper::WEIGHT_DECAY] = 0.1;
    numbers[hyper::BIAS1] = 0.271;
    numbers[hyper::BIAS2] = 0.142_625;
    numbers[hyper::GRAD_SCALE] = 0.5;
    let compute = maker.dtype;
    let mut cases = Vec::new();
    for (turn, count) in [1, 1000, 70_001].into_iter().enumerate() {
        let mut d = maker.start(9700 + turn);
        let weight = d.tame(DType::F32, &[count], 1.0);
        let (grad, m) = (d.tame(DType::F32, &[count], 0.1), d.tame(DType::F32, &[count], 0.1));
        let squares: Vec<f64> = d.read(&grad).iter().map(|g| g * g + 1e-4).collect();
        let v = d.given(DType::F32, &[count], &squares);
        let compute = (compute != DType::F32).then(|| d.poisoned(compute, &[count]));
        let hyper = d.given(DType::F32, &[hyper::COUNT], &numbers);
        cases.push(
            d.done(format!("{count} elements"), AdamW { weight, grad, m, v, compute, hyper }),
        );
    }
    for (turn, shape) in [[7, 12], [33, 20]].into_iter().enumerate() {
        let mut d = maker.start(9800 + turn);
        let weight = d.tame(DType::F32, &shape, 1.0);
        let (grad, momentum) = (d.tame(DType::F32, &shape, 0.1), d.tame(DType::F32, &shape, 0.1));
        let compute = (compute != DType::F32).then(|| d.poisoned(compute, &shape));
        let hyper = d.given(DType::F32, &[hyper::COUNT], &numbers);
        let op = Muon { weight, grad, momentum, compute, hyper };
        cases.push(d.done(format!("{shape:?}"), op));
    }
    cases
}

/// Rows with every rule, in one operation.
fn samples(maker: Maker) -> Vec<Case> {
    let (rows, vocabulary, padded) = (24, 50, 53);
    let mut cases = Vec::new();
    for turn in 0..3 {
        let mut d = maker.start(9900 + turn);
        let logits = d.tame(DType::F32, &[rows, padded], 2.0);
        let bias = (turn == 1).then(|| d.tame(DType::F32, &[rows, padded], 1.0));
        let history = (turn == 2).then(|| {
            let ids: Vec<f64> =
                (0..rows * 9).map(|i| ((i * 11 + i / 7) % 50) as f64 - 1.0).collect();
            d.given(DType::I32, &[rows, 9], &ids)
        });
        let mut settings = vec![0.0; rows * sampling::COUNT];
        for (row, own) in settings.chunks_mut(sampling::COUNT).enumerate() {
            own[sampling::TEMPERATURE] = [0.0, 1.0, 0.6, 1.3][row % 4];
            own[sampling::TOP_K] = [0.0, 5.0, 1.0][row % 3];
            own[sampling::TOP_P] = [1.0, 0.8][row / 4 % 2];
            own[sampling::MIN_P] = [0.0, 0.05][row / 8 % 2];
            own[sampling::REPETITION] = if turn == 2 { 1.2 } else { 1.0 };
            own[sampling::PRESENCE] = if turn == 2 { 0.3 } else { 0.0 };
            own[sampling::FREQUENCY] = if turn == 2 { 0.1 } else { 0.0 };
            own[sampling::PROMPT_TOKENS] = 4.0;
        }
        let settings = d.given(DType::F32, &[rows, sampling::COUNT], &settings);
        let words: Vec<f64> = (0..rows * 4).map(|i| (i * 2_654_435 + turn) as f64).collect();
        let keys = d.given(DType::U32, &[rows, 4], &words);
        let token = d.poisoned(DType::I32, &[rows]);
        let logprob = d.poisoned(DType::F32, &[rows]);
        let op = Sample { logits, bias, history, settings, keys, vocabulary, token, logprob };
        cases.push(d.done(["plain", "with bias", "with penalties"][turn], op));
    }
    cases
}
