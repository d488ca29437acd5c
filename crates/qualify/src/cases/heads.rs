//! Losses on the output head, and sampling.

use pontoon_ops::{
    Accumulate, CrossEntropy, CrossEntropyBwd, DType, IGNORED, TokenLogProb, TokenLogProbBwd,
};

use super::{Case, Maker};

/// Rows, vocabulary and width.
const SIZES: [[usize; 3]; 3] = [[1, 7, 5], [9, 130, 33], [70, 40, 16]];

pub(super) fn cases(maker: Maker) -> Vec<Case> {
    let mut cases = Vec::new();
    let dtype = maker.dtype;
    for (index, [rows, vocabulary, width]) in SIZES.into_iter().enumerate() {
        for turn in 0..4 {
            let mut d = maker.start(8000 + 10 * index + turn);
            let x = d.floats(&[rows, width]);
            let head = d.tame(dtype, &[vocabulary, width], 0.3);
            let target = |row: usize| match row % 4 {
                3 => f64::from(IGNORED),
                _ => ((row * 13 + 1) % vocabulary) as f64,
            };
            let targets: Vec<f64> = (0..rows).map(target).collect();
            let targets = d.given(DType::I32, &[rows], &targets);
            let (first, second) =
                (d.poisoned(DType::F32, &[rows]), d.poisoned(DType::F32, &[rows]));
            let name = format!("{rows} rows, {vocabulary} tokens");
            let upstream = d.tame(DType::F32, &[rows], 1.0);
            let dx = d.poisoned(dtype, &[rows, width]);
            let dhead = d.tame(DType::F32, &[vocabulary, width], 1.0);
            let (temperature, accumulate) = (0.7, Accumulate::Add);
            cases.push(match turn {
                0 => d.done(name, CrossEntropy { x, head, targets, loss: first, lse: second }),
                1 => {
                    let op = TokenLogProb {
                        scales: None,
                        block_k: 0,
                        x,
                        head,
                        targets,
                        temperature,
                        logprob: first,
                        entropy: second,
                    };
                    d.done(name, op)
                }
                2 => {
                    let (dloss, loss, lse) = (upstream, first, second);
                    let op = CrossEntropyBwd {
                        x,
                        head,
                        targets,
                        dloss,
                        loss,
                        lse,
                        dx,
                        dhead,
                        accumulate,
                    };
                    d.done(name, op)
                }
                _ => {
                    let op = TokenLogProbBwd {
                        x,
                        head,
                        targets,
                        temperature,
                        dlogprob: upstream,
                        dx,
                        dhead,
                        accumulate,
                    };
                    d.done(name, op)
                }
            });
        }
    }
    cases
}
