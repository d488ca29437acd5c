//! A program as text, one operation a line, and the hash of that text.
//!
//! The text says everything that decides the result: operations, attributes, shapes, strides and
//! places. Two programs with one hash are the same list.

use std::fmt::{Display, Formatter, Result};

use pontoon_ops::{Op, View};

use crate::program::Program;

impl Program {
    /// The blake3 of the printed program.
    pub fn hash(&self) -> blake3::Hash {
        blake3::hash(self.to_string().as_bytes())
    }

    fn place(&self, view: &View) -> String {
        let buffer = self.buffer(view.buffer);
        let mut text = format!("%{}:{}{:?}", buffer.name, view.dtype, view.dims());
        if view.byte_offset > 0 {
            text.push_str(&format!("@{}", view.byte_offset));
        }
        if !view.is_contiguous() {
            text.push_str(&format!("/{:?}", view.strides()));
        }
        text
    }

    fn line(&self, op: &Op) -> String {
        let operands = op.operands();
        let list = |written: bool| {
            let chosen = operands.iter().filter(|operand| operand.access.writes() == written);
            let texts: Vec<String> = chosen
                .map(|operand| format!("{}={}", operand.name, self.place(&operand.view)))
                .collect();
            texts.join(" ")
        };
        format!("{} <- {}{} {}", list(true), op.name().name(), attributes(op), list(false))
    }
}

/// Everything in an operation that is not an operand.
fn attributes(op: &Op) -> String {
    match op {
        Op::Fill(op) => format!("({})", op.value),
        Op::Scale(op) => format!("({})", op.factor),
        Op::EmbedBwd(op) => format!("({:?})", op.accumulate),
        Op::RmsNorm(op) => format!("(eps {:e})", op.eps),
        Op::AddRmsNorm(op) => format!("(eps {:e})", op.eps),
        Op::RmsNormBwd(op) => format!("({:?})", op.accumulate),
        Op::AddRmsNormBwd(op) => format!("({:?})", op.accumulate),
        Op::Matmul(op) => format!("({:?} {:?})", op.layout, op.accumulate),
        Op::MatmulQuant(op) => format!("({}x{})", op.block_n, op.block_k),
        Op::GroupedMatmulQuant(op) => format!("({}x{})", op.block_n, op.block_k),
        Op::GroupedMatmul(op) => format!("({:?} {:?})", op.layout, op.accumulate),
        Op::Rope(op) => format!("({:?} {:?})", op.style, op.direction),
        Op::Attention(op) => format!("(scale {})", op.scale),
        Op::AttentionBwd(op) => format!("(scale {})", op.scale),
        Op::PagedAttention(op) => format!("(scale {})", op.scale),
        Op::RouterTopK(op) => format!("({:?})", op.rule),
        Op::RouterTopKBwd(op) => format!("({:?})", op.rule),
        Op::CrossEntropyBwd(op) => format!("({:?})", op.accumulate),
        Op::TokenLogProb(op) => format!("(temperature {})", op.temperature),
        Op::TokenLogProbBwd(op) => format!("(temperature {} {:?})", op.temperature, op.accumulate),
        Op::ReduceTree(op) => format!("({:?})", op.accumulate),
        Op::Sample(op) => format!("(vocabulary {})", op.vocabulary),
        Op::AllReduce(op) => format!("({:?})", op.group),
        Op::AllGather(op) => format!("({:?})", op.group),
        Op::ReduceScatter(op) => format!("({:?})", op.group),
        _ => String::new(),
    }
}

impl Display for Program {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> Result {
        writeln!(formatter, "program {}", self.name)?;
        for (name, view) in &self.inputs {
            writeln!(formatter, "input  {name} {}", self.place(view))?;
        }
        for (index, (op, segment)) in self.ops.iter().zip(&self.segments).enumerate() {
            let mark = if index == self.forward_count { "backward\n" } else { "" };
            writeln!(formatter, "{mark}{index:4} s{segment} {}", self.line(op))?;
        }
        for (name, view) in &self.outputs {
            writeln!(formatter, "output {name} {}", self.place(view))?;
        }
        Ok(())
    }
}
