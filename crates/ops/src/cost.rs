//! What an operation must cost at least: floating-point operations and bytes moved.
//!
//! Used for floors, forecasts and the fraction of peak a step reaches; it measures nothing.

use crate::contract::Extents;
use crate::op::{Op, OpName};
use crate::view::View;

/// The least work an operation can be done with.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Multiplications and additions in matrix products; 0 for elementwise operations.
    pub matrix_flops: f64,
    /// Each operand's bytes read once and written once.
    pub bytes: f64,
}

/// The cost of one operation. Causal attention counts the half of the square it computes, as if
/// all rows were one document.
pub fn cost(op: &Op) -> Cost {
    let bytes = op
        .operands()
        .iter()
        .map(|operand| {
            let touched = bytes_of(&operand.view);
            let times = u8::from(operand.access.reads()) + u8::from(operand.access.writes());
            // A lookup reads the rows it names, not the whole table.
            let table = op.name() == OpName::Embed && operand.name == "table";
            // A cache is written where new rows go, and only there.
            match op {
                Op::KvWrite(op) if operand.name == "k_cache" => bytes_of(&op.k),
                Op::KvWrite(op) if operand.name == "v_cache" => bytes_of(&op.v),
                _ if table => 0.0,
                _ => touched * f64::from(times),
            }
        })
        .sum();
    Cost { matrix_flops: matrix_flops(op), bytes }
}

fn bytes_of(view: &View) -> f64 {
    view.dtype.bytes(view.elements()) as f64
}

fn matrix_flops(op: &Op) -> f64 {
    let product = |m: usize, n: usize, k: usize| 2.0 * m as f64 * n as f64 * k as f64;
    match op {
        Op::Matmul(op) => {
            let Extents { m, n, k } = op.extents();
            product(m, n, k)
        }
        Op::MatmulQuant(op) => product(op.x.dim(0), op.weight.dim(0), op.x.dim(1)),
        Op::GroupedMatmulQuant(op) => product(op.x.dim(0), op.weight.dim(1), op.x.dim(1)),
        Op::GroupedMatmul(op) => {
            let columns = op.c.dim(op.c.shape.rank() - 1);
            product(op.a.dim(0), columns, op.a.dim(1))
        }
        Op::Attention(op) => {
            let (rows, heads) = (op.q.dim(0), op.q.dim(1));
            heads as f64 * product(rows, rows, op.q.dim(2) + op.v.dim(2)) / 2.0
        }
        Op::AttentionBwd(op) => {
            let (rows, heads) = (op.q.dim(0), op.q.dim(1));
            heads as f64 * product(rows, rows, 3 * op.q.dim(2) + 2 * op.v.dim(2)) / 2.0
        }
        Op::CrossEntropy(op) => product(op.x.dim(0), op.head.dim(0), op.x.dim(1)),
        Op::TokenLogProb(op) => product(op.x.dim(0), op.head.dim(0), op.x.dim(1)),
        Op::CrossEntropyBwd(op) => 3.0 * product(op.x.dim(0), op.head.dim(0), op.x.dim(1)),
        Op::TokenLogProbBwd(op) => 3.0 * product(op.x.dim(0), op.head.dim(0), op.x.dim(1)),
        _ => 0.0,
    }
}
