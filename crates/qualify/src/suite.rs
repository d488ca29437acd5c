//! The conformance suite as one table: every case of every operation, checked four ways, and the
//! worst of each (operation, dtype, check) kept.
//!
//! What the table means for the device is judged in `verdict.rs`.

use std::collections::{BTreeMap, BTreeSet};

use pontoon_ops::{Backend, DeviceError, DeviceErrorKind, OpName, Support};
use serde::Serialize;

use crate::cases::{self, Case};
use crate::conformance::{self, Finding};
use crate::{gradient, invariance};

/// The worst finding of one check of one operation in one dtype.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// The operation.
    pub op: &'static str,
    /// What it was computed in.
    pub dtype: String,
    /// `correct`, `gradient`, `repeat`, `invariance`, or `runs` where the device failed.
    pub check: &'static str,
    /// The largest error, as a share of what is allowed where it occurred.
    pub worst_error: f64,
    /// What `worst_error` may be.
    pub limit: f64,
    /// Whether every case passed.
    pub ok: bool,
    /// Cases checked.
    pub cases: usize,
    /// The worst case.
    pub case: String,
    /// What is wrong, and where; empty if nothing is.
    pub detail: String,
}

/// An operation that a backend says it cannot do.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Unsupported {
    /// The operation.
    pub op: &'static str,
    /// The dtype it was asked for in.
    pub dtype: String,
    /// The backend's reason.
    pub reason: String,
}

/// What the suite found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Conformance {
    /// One row for each operation, dtype and check.
    pub rows: Vec<Row>,
    /// What the backend says it cannot do.
    pub unsupported: Vec<Unsupported>,
    /// Operations of the waist that no single device can be checked on.
    pub not_judged: Vec<&'static str>,
    /// Why the suite stopped early, if it did.
    pub stopped: Option<String>,
}

/// Runs every case of a seed. `progress` hears how far it is, from 0 to 1.
pub fn run(backend: &mut dyn Backend, seed: u64, progress: &mut dyn FnMut(f64)) -> Conformance {
    let all = cases::all(seed);
    let mut rows = Rows::new();
    let mut unsupported = BTreeSet::new();
    let mut stopped = None;
    for (index, case) in all.iter().enumerate() {
        progress(index as f64 / all.len() as f64);
        let (op, dtype) = (case.op.name().name(), case.dtype.to_string());
        if let Support::No(reason) = backend.supports(&case.op) {
            unsupported.insert(Unsupported { op, dtype, reason: reason.to_owned() });
            continue;
        }
        match checked(backend, case) {
            Ok(findings) => findings.into_iter().for_each(|finding| merge(&mut rows, finding)),
            Err(error) => {
                merge(&mut rows, failure(case, &error));
                let gone = [DeviceErrorKind::Lost, DeviceErrorKind::Hang];
                if gone.contains(&error.kind) {
                    stopped = Some(format!("{op} {dtype} ({}): {error}", case.name));
                    break;
                }
            }
        }
    }
    let covered = |op: &&OpName| !conformance::covers(&all, **op);
    Conformance {
        rows: rows.into_values().collect(),
        unsupported: unsupported.into_iter().collect(),
        not_judged: OpName::ALL.iter().filter(covered).map(|op| op.name()).collect(),
        stopped,
    }
}

fn checked(backend: &mut dyn Backend, case: &Case) -> Result<Vec<Finding>, DeviceError> {
    let (mut findings, _) = conformance::check(backend, case)?;
    findings.extend(gradient::check(backend, case)?);
    findings.extend(invariance::check(backend, case)?);
    Ok(findings)
}

fn failure(case: &Case, error: &DeviceError) -> Finding {
    Finding {
        op: case.op.name().name(),
        dtype: case.dtype.to_string(),
        check: "runs",
        case: case.name.clone(),
        worst_error: f64::INFINITY,
        limit: 1.0,
        ok: false,
        detail: error.to_string(),
    }
}

/// The worst row of each operation, dtype and check.
pub(crate) type Rows = BTreeMap<(&'static str, String, &'static str), Row>;

/// Adds a finding to the row that it belongs to.
pub(crate) fn merge(rows: &mut Rows, finding: Finding) {
    let Finding { op, dtype, check, case, worst_error, limit, ok, detail } = finding;
    // JSON has no infinity.
    let worst_error = worst_error.clamp(0.0, f64::MAX);
    let row =
        Row { op, dtype: dtype.clone(), check, worst_error, limit, ok, cases: 1, case, detail };
    let Some(known) = rows.get_mut(&(op, dtype.clone(), check)) else {
        rows.insert((op, dtype, check), row);
        return;
    };
    let cases = known.cases + 1;
    let worse = (known.ok && !ok) || (known.ok == ok && worst_error > known.worst_error);
    if worse {
        *known = row;
    }
    known.cases = cases;
}
