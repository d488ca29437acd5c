//! Cross entropy on logits.

use pontoon_cpu::simd::dispatch;

use super::Run;
use super::norm::Dot;
use super::reduce::lines_together;
use super::strided::{load_floats, store_floats};
use crate::dtype::DataType;
use crate::failure::{Done, Failure};
use crate::plan::{Argument, Plan, Slot};

/// How the losses of rows become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// They stay.
    None,
    /// Their mean over rows that count.
    Mean,
    /// Their sum.
    Sum,
}

impl Reduction {
    /// From its name; mean if none is given.
    pub fn of(plan: &Plan, name: &str) -> Done<Reduction> {
        match name {
            "none" => Ok(Reduction::None),
            "mean" | "" => Ok(Reduction::Mean),
            "sum" => Ok(Reduction::Sum),
            _ => plan.forbid(format!("reduction `{name}` is none, mean or sum")),
        }
    }
}

struct Shape {
    rows: usize,
    classes: usize,
    ignored: i64,
    reduction: Reduction,
}

fn shape(
    plan: &Plan,
    input: &Argument,
    target: &Argument,
    (reduction, ignored): (Reduction, i64),
) -> Done<Shape> {
    let [rows, classes] = input.tensor.shape[..] else {
        return plan.forbid("the logits should be a matrix");
    };
    plan.demand(target.tensor.elements() == rows && target.tensor.dtype.is_index(), || {
        format!("target should be {rows} integers")
    })?;
    plan.demand(input.tensor.span() == input.tensor.elements(), || {
        "the logits should be contiguous".to_owned()
    })?;
    Ok(Shape { rows, classes, ignored, reduction })
}

/// The loss and the logarithms of the probabilities.
pub fn cross_entropy(
    plan: &mut Plan,
    (input, target): (&Argument, &Argument),
    (reduction, ignored): (Reduction, i64),
    (loss, log_prob): (&Argument, &Argument),
) -> Done {
    let shape = shape(plan, input, target, (reduction, ignored))?;
    let elements = if reduction == Reduction::None { shape.rows } else { 1 };
    plan.demand(loss.tensor.elements() == elements, || {
        format!("loss should have {elements} elements")
    })?;
    plan.demand(log_prob.tensor.shape == input.tensor.shape, || {
        "logProb should be as the logits".to_owned()
    })?;
    plan.workspace(4096);
    let (input, target) = (plan.read("input", input), plan.read("target", target));
    let (loss, log_prob) = (plan.write("lossOut", loss), plan.write("logProbOut", log_prob));
    plan.run(move |run| {
        let losses = rows(run, (input, target), log_prob, &shape)?;
        let counted = run.integers(target).iter().filter(|&&t| t != shape.ignored).count();
        let sum = || losses.iter().sum::<f32>();
        match shape.reduction {
            Reduction::None => run.put_floats(loss, &losses),
            Reduction::Sum => run.put_floats(loss, &[sum()]),
            Reduction::Mean => run.put_floats(loss, &[sum() / counted as f32]),
        }
        Ok(())
    })
}

/// Writes the logarithms of the probabilities; gives each row's loss.
fn rows(
    run: &Run<'_>,
    (input, target): (Slot, Slot),
    log_prob: Slot,
    shape: &Shape,
) -> Done<Vec<f32>> {
    let isa = run.engine.isa;
    let targets = run.integers(target);
    for &target in targets.iter().filter(|&&target| target != shape.ignored) {
        if target < 0 || target as usize >= shape.classes {
            let text = format!("target {target} is no class of {}", shape.classes);
            return Err(Failure::new(crate::code::VECTOR_EXCEPTION, text));
        }
    }
    let (from, to, rounding) = (run.at(input), run.at(log_prob), run.rounding());
    let mut losses = vec![0.0; shape.rows];
    let together = lines_together(shape.classes).max(shape.rows.div_ceil(4096));
    let parts = pontoon_cpu::ffi::Parts::new(&mut losses, together);
    run.engine.pool.run(parts.count(), |task| {
        let mut line = vec![0.0; shape.classes];
        for (index, loss) in parts.take(task).iter_mut().enumerate() {
            let row = task * together + index;
            load_floats(isa, from, row * shape.classes, 1, &mut line);
            let peak = line.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut exponentials = vec![0.0; shape.classes];
            for (e, x) in exponentials.iter_mut().zip(&line) {
                *e = (x - peak).exp();
            }
            let ones = vec![1.0; shape.classes];
            let log = peak + dispatch(isa, Dot(&exponentials, &ones)).ln();
            line.iter_mut().for_each(|x| *x -= log);
            store_floats(isa, to, row * shape.classes, 1, &line, rounding);
            if targets[row] != shape.ignored {
                *loss = -line[targets[row] as usize];
            }
        }
    });
    Ok(losses)
}

/// `grad * (e^logProb - onehot)`, divided by the rows that count where the mean was taken.
pub fn cross_entropy_grad(
    plan: &mut Plan,
    (grad, log_prob, target): (&Argument, &Argument, &Argument),
    (reduction, ignored): (Reduction, i64),
    out: &Argument,
) -> Done {
    let shape = shape(plan, log_prob, target, (reduction, ignored))?;
    let elements = if reduction == Reduction::None { shape.rows } else { 1 };
    plan.demand(grad.tensor.elements() == elements, || {
        format!("gradLoss should have {elements} elements")
    })?;
    plan.demand(out.tensor.shape == log_prob.tensor.shape, || {
        "the result should be as logProb".to_owned()
    })?;
    plan.demand(out.tensor.dtype != DataType::I64, || "the result should be a float".to_owned())?;
    let grad = plan.read("gradLoss", grad);
    let (log_prob, target) = (plan.read("logProb", log_prob), plan.read("target", target));
    let out = plan.write("out", out);
    plan.run(move |run| {
        let grads = run.floats(grad);
        let targets = run.integers(target);
        let counted = targets.iter().filter(|&&t| t != shape.ignored).count();
        let (isa, rounding) = (run.engine.isa, run.rounding());
        let (from, to, classes) = (run.at(log_prob), run.at(out), shape.classes);
        run.engine.pool.run(shape.rows, |row| {
            let mut line = vec![0.0; classes];
            let factor = match shape.reduction {
                Reduction::None => grads[row],
                Reduction::Sum => grads[0],
                Reduction::Mean => grads[0] / counted as f32,
            };
            if targets[row] != shape.ignored {
                load_floats(isa, from, row * classes, 1, &mut line);
                line.iter_mut().for_each(|x| *x = factor * x.exp());
                if let Some(x) = line.get_mut(targets[row].max(0) as usize) {
                    *x -= factor;
                }
            }
            store_floats(isa, to, row * classes, 1, &line, rounding);
        });
        Ok(())
    })
}
