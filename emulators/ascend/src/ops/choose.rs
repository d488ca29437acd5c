//! Operators that compare and choose. Truth is a byte: 0 or 1.

use super::elementwise::check_broadcast;
use super::strided::{map_floats, map_integers};
use crate::dtype::DataType;
use crate::failure::Done;
use crate::plan::{Access, Argument, Plan};
use crate::tensor::Scalar;

/// How two numbers are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compare {
    /// `a == b`.
    Eq,
    /// `a != b`.
    Ne,
    /// `a < b`.
    Lt,
    /// `a <= b`.
    Le,
    /// `a > b`.
    Gt,
    /// `a >= b`.
    Ge,
}

impl Compare {
    fn holds<T: PartialOrd>(self, a: &T, b: &T) -> bool {
        match self {
            Compare::Eq => a == b,
            Compare::Ne => a != b,
            Compare::Lt => a < b,
            Compare::Le => a <= b,
            Compare::Gt => a > b,
            Compare::Ge => a >= b,
        }
    }
}

fn check_truth(plan: &Plan, argument: &Argument, name: &str) -> Done {
    let dtype = argument.tensor.dtype;
    plan.demand(dtype == DataType::Bool, || format!("`{name}` should be bool but is {dtype:?}"))
}

fn is_float(argument: &Argument) -> bool {
    argument.tensor.dtype.is_float()
}

/// Compares two tensors.
pub fn compare(
    plan: &mut Plan,
    (a, b): (&Argument, &Argument),
    y: &Argument,
    how: Compare,
) -> Done {
    check_broadcast(plan, &[a, b], y)?;
    check_truth(plan, y, "out")?;
    let float = is_float(a) || is_float(b);
    let [a, b, y] = [plan.read("self", a), plan.read("other", b), plan.write("out", y)];
    plan.run(move |run| {
        if !float {
            return map_integers::<2, 3>(run, [a, b], y, |[a, b], out| {
                for ((y, a), b) in out.iter_mut().zip(a).zip(b) {
                    *y = i64::from(how.holds(a, b));
                }
            });
        }
        map_floats::<2, 3>(run, [a, b], y, |_, [a, b], out| {
            for ((y, a), b) in out.iter_mut().zip(a).zip(b) {
                *y = f32::from(u8::from(how.holds(a, b)));
            }
        })
    })
}

/// Compares a tensor with a number.
pub fn compare_with(
    plan: &mut Plan,
    x: &Argument,
    number: Scalar,
    y: &Argument,
    how: Compare,
) -> Done {
    check_broadcast(plan, &[x], y)?;
    check_truth(plan, y, "out")?;
    let float = is_float(x) || !(number.dtype.is_index() || number.dtype == DataType::Bool);
    let (x, y) = (plan.read("self", x), plan.write("out", y));
    plan.run(move |run| {
        if !float {
            return map_integers::<1, 2>(run, [x], y, |[x], out| {
                for (y, x) in out.iter_mut().zip(x) {
                    *y = i64::from(how.holds(x, &number.whole()));
                }
            });
        }
        let number = number.float();
        map_floats::<1, 2>(run, [x], y, |_, [x], out| {
            for (y, x) in out.iter_mut().zip(x) {
                *y = f32::from(u8::from(how.holds(x, &number)));
            }
        })
    })
}

/// How two truths are joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logic {
    /// Either.
    Or,
    /// Both.
    And,
}

/// Joins truths.
pub fn logical(plan: &mut Plan, (a, b): (&Argument, &Argument), y: &Argument, how: Logic) -> Done {
    check_broadcast(plan, &[a, b], y)?;
    check_truth(plan, y, "out")?;
    let [a, b, y] = [plan.read("self", a), plan.read("other", b), plan.write("out", y)];
    plan.run(move |run| {
        map_floats::<2, 3>(run, [a, b], y, |_, [a, b], out| {
            for ((y, &a), &b) in out.iter_mut().zip(a).zip(b) {
                let truth = match how {
                    Logic::Or => a != 0.0 || b != 0.0,
                    Logic::And => a != 0.0 && b != 0.0,
                };
                *y = f32::from(u8::from(truth));
            }
        })
    })
}

/// Inverts truths.
pub fn not(plan: &mut Plan, x: &Argument, y: &Argument) -> Done {
    check_broadcast(plan, &[x], y)?;
    check_truth(plan, y, "out")?;
    let (x, y) = (plan.read("self", x), plan.write("out", y));
    plan.run(move |run| {
        map_floats::<1, 2>(run, [x], y, |_, [x], out| {
            out.iter_mut().zip(x).for_each(|(y, &x)| *y = f32::from(u8::from(x == 0.0)));
        })
    })
}

/// Whether numbers are neither infinite nor NaN.
pub fn is_finite(plan: &mut Plan, x: &Argument, y: &Argument) -> Done {
    check_broadcast(plan, &[x], y)?;
    check_truth(plan, y, "out")?;
    let (x, y) = (plan.read("self", x), plan.write("out", y));
    plan.run(move |run| {
        map_floats::<1, 2>(run, [x], y, |_, [x], out| {
            out.iter_mut().zip(x).for_each(|(y, x)| *y = f32::from(u8::from(x.is_finite())));
        })
    })
}

/// `condition ? a : b`.
pub fn select(
    plan: &mut Plan,
    condition: &Argument,
    (a, b): (&Argument, &Argument),
    y: &Argument,
) -> Done {
    check_broadcast(plan, &[condition, a, b], y)?;
    let kind = condition.tensor.dtype;
    plan.demand(matches!(kind, DataType::Bool | DataType::U8), || {
        format!("`condition` should be bool but is {kind:?}")
    })?;
    let float = is_float(a) || is_float(b) || is_float(y);
    let condition = plan.read("condition", condition);
    let [a, b, y] = [plan.read("self", a), plan.read("other", b), plan.write("out", y)];
    plan.run(move |run| {
        if !float {
            return map_integers::<3, 4>(run, [condition, a, b], y, |[c, a, b], out| {
                for (index, y) in out.iter_mut().enumerate() {
                    *y = if c[index] != 0 { a[index] } else { b[index] };
                }
            });
        }
        map_floats::<3, 4>(run, [condition, a, b], y, |_, [c, a, b], out| {
            for (index, y) in out.iter_mut().enumerate() {
                *y = if c[index] != 0.0 { a[index] } else { b[index] };
            }
        })
    })
}

/// Puts a number where a mask holds.
pub fn masked_fill(plan: &mut Plan, x: &Argument, mask: &Argument, value: Scalar) -> Done {
    check_broadcast(plan, &[mask], x)?;
    check_truth(plan, mask, "mask")?;
    let float = is_float(x);
    let (x, mask) = (plan.operand("selfRef", x, Access::Both), plan.read("mask", mask));
    plan.run(move |run| {
        if !float {
            return map_integers::<2, 3>(run, [x, mask], x, |[x, mask], out| {
                for ((y, &x), &mask) in out.iter_mut().zip(x).zip(mask) {
                    *y = if mask != 0 { value.whole() } else { x };
                }
            });
        }
        map_floats::<2, 3>(run, [x, mask], x, |_, [x, mask], out| {
            for ((y, &x), &mask) in out.iter_mut().zip(x).zip(mask) {
                *y = if mask != 0.0 { value.float() } else { x };
            }
        })
    })
}
