//! What the emulator has and the chip has not: faults on demand and the strict log.

use super::calls;
use super::pointers::{Out, Text};
use crate::driver::DRIVER;
use crate::fault;
use crate::strict;

calls! {
    fn pontoonEmuInject(json: Text) {
        fault::parse(&json.read())?.iter().for_each(|fault| DRIVER.arm(fault));
        Ok(())
    }
    fn pontoonEmuClear(device: i32) {
        let meant = |id: i32| device < 0 || device == id;
        DRIVER.devices().iter().filter(|d| meant(d.id)).for_each(|d| d.faults.clear());
        Ok(())
    }
}

/// Takes the strict log of a device, of all if negative, as JSON; gives its length in bytes. With
/// too little room nothing is written and the log stays.
#[unsafe(no_mangle)]
pub extern "C" fn pontoonEmuBreaches(device: i32, to: Out<u8>, capacity: u64) -> u64 {
    let meant = (device >= 0).then_some(device);
    let entries = strict::take(meant);
    let text = serde_json::to_string(&entries).unwrap_or_default();
    if to.is_null() || text.len() as u64 > capacity {
        entries.iter().for_each(|e| strict::report(e.device, e.breach, e.text.clone()));
    } else {
        to.set_many(text.bytes());
    }
    text.len() as u64
}

/// The functions here that return no code, by name.
pub(super) fn others() -> Vec<(&'static str, *const std::ffi::c_void)> {
    vec![("pontoonEmuBreaches", pontoonEmuBreaches as *const _)]
}
