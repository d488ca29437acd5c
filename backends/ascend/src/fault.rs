//! What a failed device is asked, in the order the vendor prescribes: its own account of the
//! failure, then damaged memory, then the abort of its tasks, then repair.
//!
//! It does not decide whether the device is used again: the supervisor does, by the error's kind.

use pontoon_ops::{DeviceError, DeviceErrorKind};

use crate::core::Core;

/// Collects what the device tells about a failure into the error's text, takes its tasks back and
/// has it repair what it can. Never fails: what cannot be had is left out.
pub fn take_stock(core: &mut Core, error: DeviceError) -> DeviceError {
    let mut told = Vec::new();
    let last = i64::from(core.session.last_error());
    if last != 0 && last != error.vendor_code {
        told.push(format!("last error {last}"));
    }
    // The record must be asked for before the abort, which clears it.
    let record = core.session.error_record();
    let mut damaged = match error.kind {
        DeviceErrorKind::MemoryFault => core.session.damaged_memory(),
        _ => Vec::new(),
    };
    for entry in &damaged {
        let place = match core.buffers.owner(entry.address) {
            Some(buffer) => format!("in buffer {}", buffer.0),
            None => "outside the buffers".to_owned(),
        };
        told.push(format!("{} bytes at {:#x} {place}", entry.bytes, entry.address));
    }
    let aborted = core.session.abort();
    if aborted.is_ok() && (record.is_some() || !damaged.is_empty()) {
        told.push(match core.session.repair(record, &mut damaged) {
            Ok(()) => "repaired".to_owned(),
            Err(failure) => format!("not repaired ({})", failure.vendor_code),
        });
    }
    if let Err(failure) = aborted {
        told.push(format!("tasks could not be aborted ({})", failure.vendor_code));
    }
    if !core.session.is_healthy() {
        told.push("the driver calls the device abnormal".to_owned());
    }
    let text = match told.is_empty() {
        true => error.text,
        false => format!("{} [{}]", error.text, told.join("; ")),
    };
    DeviceError { text, ..error }
}
