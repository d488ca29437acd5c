//! The gradient of each operation, one rule per operation.
//!
//! A rule reads the gradient that reached the results, and contributes to the operands' gradients.
//! An operation none of whose results has a gradient contributes nothing.

use pontoon_ops as ops;
use pontoon_ops::{DType, Layout, Op, View};

use super::Backward;
use crate::error::ProgramError;
use crate::program::{FROZEN, WEIGHTS};

type Done = Result<(), ProgramError>;

impl Backward {
    /// Appends the backward operations of one forward operation.
    pub(super) fn differentiate(&mut self, index: usize, op: &Op) -> Done {
        match op {
            Op::Copy(op) => self.copy(op),
            Op::Cast(op) => self.cast(op),
            Op::Add(op) => self.add(op),
            Op::Scale(op) => self.scale(op),
            Op::Embed(op) => self.embed(op),
            Op::RmsNorm(op) => self.rms_norm(op),
            Op::AddRmsNorm(op) => self.add_rms_norm(op),
            Op::Matmul(op) => self.matmul(index, op),
            Op::GroupedMatmul(op) => self.grouped_matmul(index, op),
            Op::Rope(op) => self.rope(op),
            Op::Attention(op) => self.attention(op),
            Op::SwiGlu(op) => self.swiglu(op),
            Op::RouterTopK(op) => self.router(op),
            Op::Permute(op) => self.permute(op),
            Op::Unpermute(op) => self.unpermute(op),
            Op::CrossEntropy(op) => self.cross_entropy(op),
            Op::TokenLogProb(op) => self.token_log_prob(op),
            Op::Fill(_) => Ok(()),
            other => {
                let operands = other.operands();
                let passes = operands
                    .iter()
                    .any(|o| o.access.writes() && self.gradient_of(&o.view).is_some());
                if !passes {
                    return Ok(());
                }
                Err(ProgramError::NoGradient { index, op: other.name() })
            }
        }
    }

    fn copy(&mut self, op: &ops::Copy) -> Done {
        let Some(dy) = self.gradient_of(&op.dst).filter(|_| self.needs(&op.src)) else {
            return Ok(());
        };
        if !op.src.is_broadcast() {
            return match self.place(&op.src)? {
                super::Place::Fresh(dst) => self.push(ops::Copy { src: dy, dst }),
                super::Place::Added(view) => self.push(ops::Add { a: view, b: dy, y: view }),
            };
        }
        // Heads that shared one vector: their gradients are summed.
        let source = op.src.unbroadcast();
        assert!(source.dim(1) == 1 && op.src.dim(1) > 1, "only dimension 1 is ever repeated");
        let parts = dy.transpose(0, 1);
        self.accumulate(&source, |view, accumulate| ops::ReduceTree {
            x: parts,
            y: view.drop_axis(1),
            accumulate,
        })
    }

    fn cast(&mut self, op: &ops::Cast) -> Done {
        let Some(dy) = self.gradient_of(&op.dst).filter(|_| self.needs(&op.src)) else {
            return Ok(());
        };
        self.contribute(&op.src, |dst| ops::Cast { src: dy, dst })
    }

    fn add(&mut self, op: &ops::Add) -> Done {
        let Some(dy) = self.gradient_of(&op.y) else { return Ok(()) };
        for operand in [&op.a, &op.b] {
            if self.needs(operand) {
                self.share_or_copy(operand, dy)?;
            }
        }
        Ok(())
    }

    fn scale(&mut self, op: &ops::Scale) -> Done {
        let Some(dy) = self.gradient_of(&op.y).filter(|_| self.needs(&op.x)) else {
            return Ok(());
        };
        let factor = op.factor;
        self.contribute(&op.x, |y| ops::Scale { x: dy, factor, y })
    }

    fn embed(&mut self, op: &ops::Embed) -> Done {
        let Some(dy) = self.gradient_of(&op.y) else { return Ok(()) };
        let (dtable, accumulate) = self.parameter_gradient(&op.table);
        self.push(ops::EmbedBwd { ids: op.ids, dy, dtable, accumulate })
    }

    fn rms_norm(&mut self, op: &ops::RmsNorm) -> Done {
        let Some(dy) = self.gradient_of(&op.y) else { return Ok(()) };
        let (dweight, accumulate) = self.parameter_gradient(&op.weight);
        let (x, weight, rstd) = (op.x, op.weight, op.rstd);
        self.contribute(&op.x, |dx| ops::RmsNormBwd {
            dy,
            x,
            weight,
            rstd,
            dx,
            dweight,
            accumulate,
        })
    }

    fn add_rms_norm(&mut self, op: &ops::AddRmsNorm) -> Done {
        let dsum = self.gradient_of(&op.sum);
        let dx = match (self.gradient_of(&op.y), dsum) {
            (None, None) => return Ok(()),
            (None, Some(dsum)) => dsum,
            (Some(dy), dsum) => {
                let (dweight, accumulate) = self.parameter_gradient(&op.weight);
                let dx = self.temporary(op.x.dtype, op.x.dims());
                let (sum, weight, rstd) = (op.sum, op.weight, op.rstd);
                self.push(ops::AddRmsNormBwd {
                    dy,
                    dsum,
                    sum,
                    weight,
                    rstd,
                    dx,
                    dweight,
                    accumulate,
                })?;
                dx
            }
        };
        for operand in [&op.x, &op.residual] {
            if self.needs(operand) {
                self.share_or_copy(operand, dx)?;
            }
        }
        Ok(())
    }

    fn matmul(&mut self, index: usize, op: &ops::Matmul) -> Done {
        let Some(dy) = self.gradient_of(&op.c) else { return Ok(()) };
        if op.layout != Layout::Nt || op.b.buffer != WEIGHTS {
            return Err(ProgramError::NoGradient { index, op: ops::OpName::Matmul });
        }
        let dy = self.in_dtype_of(dy, &op.a)?;
        if self.needs(&op.a) {
            let b = op.b;
            self.accumulate(&op.a, |c, accumulate| ops::Matmul {
                layout: Layout::Nn,
                a: dy,
                b,
                bias: None,
                c,
                accumulate,
            })?;
        }
        if let Some(bias) = &op.bias {
            let (y, accumulate) = self.parameter_gradient(bias);
            self.push(ops::ReduceTree { x: dy, y, accumulate })?;
        }
        let (c, accumulate) = self.parameter_gradient(&op.b);
        self.push(ops::Matmul { layout: Layout::Tn, a: dy, b: op.a, bias: None, c, accumulate })
    }

    fn grouped_matmul(&mut self, index: usize, op: &ops::GroupedMatmul) -> Done {
        let Some(dy) = self.gradient_of(&op.c) else { return Ok(()) };
        if op.layout != Layout::Nt || op.b.buffer != WEIGHTS {
            return Err(ProgramError::NoGradient { index, op: ops::OpName::GroupedMatmul });
        }
        let dy = self.in_dtype_of(dy, &op.a)?;
        let (b, offsets) = (op.b, op.offsets);
        if self.needs(&op.a) {
            self.accumulate(&op.a, |c, accumulate| ops::GroupedMatmul {
                layout: Layout::Nn,
                a: dy,
                b,
                offsets,
                c,
                accumulate,
            })?;
        }
        let (c, accumulate) = self.parameter_gradient(&op.b);
        let layout = Layout::Tn;
        self.push(ops::GroupedMatmul { layout, a: dy, b: op.a, offsets, c, accumulate })
    }

    /// A result in f32 of 16-bit operands has an f32 gradient; the products need it in 16 bits.
    fn in_dtype_of(&mut self, dy: View, operand: &View) -> Result<View, ProgramError> {
        if dy.dtype == operand.dtype {
            return Ok(dy);
        }
        let dst = self.temporary(operand.dtype, dy.dims());
        self.push(ops::Cast { src: dy, dst })?;
        Ok(dst)
    }

    fn rope(&mut self, op: &ops::Rope) -> Done {
        let Some(dy) = self.gradient_of(&op.y).filter(|_| self.needs(&op.x)) else {
            return Ok(());
        };
        let direction = ops::Direction::Backward;
        self.contribute(&op.x, |y| ops::Rope { x: dy, direction, y, ..op.clone() })
    }

    fn attention(&mut self, op: &ops::Attention) -> Done {
        let Some(dout) = self.gradient_of(&op.out) else { return Ok(()) };
        let (dq, add_q) = self.room(&op.q)?;
        let (dk, add_k) = self.room(&op.k)?;
        let (dv, add_v) = self.room(&op.v)?;
        let ops::Attention { q, k, v, documents, scale, out, lse } = *op;
        self.push(ops::AttentionBwd { q, k, v, documents, scale, out, lse, dout, dq, dk, dv })?;
        self.settle(dq, add_q)?;
        self.settle(dk, add_k)?;
        self.settle(dv, add_v)
    }

    fn swiglu(&mut self, op: &ops::SwiGlu) -> Done {
        let Some(dy) = self.gradient_of(&op.y) else { return Ok(()) };
        let (dgate, add_gate) = self.room(&op.gate)?;
        let (dup, add_up) = self.room(&op.up)?;
        self.push(ops::SwiGluBwd { dy, gate: op.gate, up: op.up, dgate, dup })?;
        self.settle(dgate, add_gate)?;
        self.settle(dup, add_up)
    }

    fn router(&mut self, op: &ops::RouterTopK) -> Done {
        self.count_choices(op)?;
        let Some(dweights) = self.gradient_of(&op.weights) else { return Ok(()) };
        let (logits, experts, rule) = (op.logits, op.experts, op.rule);
        self.contribute(&op.logits, |dlogits| ops::RouterTopKBwd {
            dweights,
            logits,
            experts,
            rule,
            dlogits,
        })
    }

    /// Counts how often each expert was chosen, where a bias that no gradient reaches has a part in
    /// the choice. Ones are summed as a table's gradient: whole numbers, so exact in any order.
    fn count_choices(&mut self, op: &ops::RouterTopK) -> Done {
        let Some(bias) = op.bias.filter(|bias| bias.buffer == FROZEN) else { return Ok(()) };
        let (counts, accumulate) = self.frozen_counts(&bias);
        let (choices, experts) = (op.experts.elements(), bias.elements());
        let dy = self.temporary(DType::F32, &[choices, 1]);
        self.push(ops::Fill { dst: dy, value: 1.0 })?;
        let (ids, dtable) = (op.experts.reshape([choices]), counts.reshape([experts, 1]));
        self.push(ops::EmbedBwd { ids, dy, dtable, accumulate })
    }

    fn permute(&mut self, op: &ops::Permute) -> Done {
        let Some(dy) = self.gradient_of(&op.y).filter(|_| self.needs(&op.x)) else {
            return Ok(());
        };
        let slots = op.slots;
        self.contribute(&op.x, |dx| ops::PermuteBwd { dy, slots, dx })
    }

    fn unpermute(&mut self, op: &ops::Unpermute) -> Done {
        let Some(dy) = self.gradient_of(&op.y) else { return Ok(()) };
        let (dx, add_x) = self.room(&op.x)?;
        let (dweights, add_weights) = self.room(&op.weights)?;
        let (x, weights, slots) = (op.x, op.weights, op.slots);
        self.push(ops::UnpermuteBwd { dy, x, weights, slots, dx, dweights })?;
        self.settle(dx, add_x)?;
        self.settle(dweights, add_weights)
    }

    fn cross_entropy(&mut self, op: &ops::CrossEntropy) -> Done {
        let Some(dloss) = self.gradient_of(&op.loss) else { return Ok(()) };
        let (dhead, accumulate) = self.parameter_gradient(&op.head);
        let (dx, add_x) = self.room(&op.x)?;
        let ops::CrossEntropy { x, head, targets, loss, lse } = *op;
        self.push(ops::CrossEntropyBwd {
            x,
            head,
            targets,
            dloss,
            loss,
            lse,
            dx,
            dhead,
            accumulate,
        })?;
        self.settle(dx, add_x)
    }

    fn token_log_prob(&mut self, op: &ops::TokenLogProb) -> Done {
        let dlogprob = self.gradient_or_zero(&op.logprob)?;
        let (dhead, accumulate) = self.parameter_gradient(&op.head);
        let (dx, add_x) = self.room(&op.x)?;
        let ops::TokenLogProb { x, head, targets, temperature, .. } = *op;
        let bwd =
            ops::TokenLogProbBwd { x, head, targets, temperature, dlogprob, dx, dhead, accumulate };
        self.push(bwd)?;
        self.settle(dx, add_x)
    }
}
