//! Backward operations against central differences of the forward operation's f64 reference.
//!
//! The reference of a backward operation is written from the same formula as the backend; that
//! both are the gradient of the forward operation is only shown here. Read next: `reference/`.

mod pairs;

use pontoon_ops::tolerance::tolerance;
use pontoon_ops::{Access, Backend, DType, DeviceError, Op, View};

use crate::cases::Case;
use crate::conformance::{Finding, launch};
use crate::memory::Memory;
use crate::reference::{Want, reference};

/// Elements of each input that are moved, spread evenly.
const MOVED_MAX: usize = 12;
/// How far an element is moved: near the cube root of eps(f64), where truncation and rounding of
/// the difference are about equal.
const STEP: f64 = 1e-5;
/// What a difference may be wrong by itself, as a share of its terms.
const DIFFERENCE_EPS: f64 = 1e-7;
/// Larger inputs bend the forward function too much for one step size.
const INPUT_MAX: f64 = 20.0;

/// A backward case, and the forward operation it is the gradient of.
struct Pair {
    /// The backward operation; its saved results are the forward's.
    case: Case,
    /// The forward operation on the same memory.
    forward: Op,
    /// The forward's inputs, each with its gradient in the backward operation.
    inputs: Vec<(View, View)>,
    /// The forward's results, each with the gradient it receives.
    upstream: Vec<(View, View)>,
}

/// Runs a backward case in f32 and compares its gradients with central differences. Nothing for
/// other operations and dtypes, and where inputs are not finite or are large.
pub fn check(backend: &mut dyn Backend, case: &Case) -> Result<Option<Finding>, DeviceError> {
    let operands = case.op.operands();
    let floats = operands.iter().filter(|o| o.view.dtype.is_float() && !o.access.writes());
    let moderate = |view: &View| case.memory.read(view).iter().all(|v| v.abs() < INPUT_MAX);
    if case.dtype != DType::F32 || !floats.map(|o| o.view).all(|view| moderate(&view)) {
        return Ok(None);
    }
    let Some(pair) = pairs::pair(case) else { return Ok(None) };
    let got = launch(backend, &pair.case)?;
    let (worst, detail) = judge(&pair, &got);
    Ok(Some(Finding {
        op: case.op.name().name(),
        dtype: case.dtype.to_string(),
        check: "gradient",
        case: case.name.clone(),
        worst_error: worst,
        limit: 1.0,
        ok: worst <= 1.0,
        detail,
    }))
}

fn judge(pair: &Pair, got: &Memory) -> (f64, String) {
    let row = tolerance(pair.case.op.name());
    let wanted = reference(&pair.case.op, &pair.case.memory);
    let mut worst = (0.0, String::new());
    for (input, gradient) in &pair.inputs {
        let Some(sizes) = wanted.iter().find(|wanted| wanted.view == *gradient) else {
            return (f64::INFINITY, format!("{gradient:?} is no result of the operation"));
        };
        let (before, after) = (pair.case.memory.read(gradient), got.read(gradient));
        let operands = pair.case.op.operands();
        let own = operands.iter().find(|operand| operand.view == *gradient);
        let adds = own.is_some_and(|operand| operand.access == Access::ReadWrite);
        let step = input.elements().div_ceil(MOVED_MAX).max(1);
        for element in (0..input.elements()).step_by(step) {
            let Want::Near { magnitude, argument, .. } = sizes.wants[element] else { continue };
            let slope = difference(pair, input, element);
            let want = if adds { before[element] + slope } else { slope };
            let limit = row.limit(gradient.dtype, DType::F32, want, magnitude)
                + row.accumulate * DType::F32.epsilon() * argument
                + DIFFERENCE_EPS * (1.0 + magnitude);
            let share = (after[element] - want).abs() / limit;
            if share > worst.0 || share.is_nan() {
                let text = format!("element {element} of {:?}", gradient.dims());
                let text = format!("{text} is {}, differences give {want}", after[element]);
                worst = (if share.is_nan() { f64::INFINITY } else { share }, text);
            }
        }
    }
    worst
}

/// How the weighted sum of the forward's results changes with one element of its input.
fn difference(pair: &Pair, input: &View, element: usize) -> f64 {
    let at = pair.case.memory.read(input)[element];
    let step = STEP * at.abs().max(1.0);
    let moved = |by: f64| weighted(pair, &pair.case.memory.with_moved(input, element, at + by));
    (moved(step) - moved(-step)) / (2.0 * step)
}

/// The sum of the forward's results, each times the gradient it receives.
fn weighted(pair: &Pair, memory: &Memory) -> f64 {
    let results = reference(&pair.forward, memory);
    let mut total = 0.0;
    for (result, upstream) in &pair.upstream {
        let wants = results.iter().find(|expected| expected.view == *result);
        let wants = &wants.expect("pairs name results of the forward operation").wants;
        for (want, upstream) in wants.iter().zip(pair.case.memory.read(upstream)) {
            // What is NaN by contract, such as the row of an id that does not exist, has no slope.
            if let Want::Near { value, .. } = want
                && !value.is_nan()
            {
                total += value * upstream;
            }
        }
    }
    total
}
