//! The border: every exported function of CANN's C interface, and the table that finds them by
//! name.
//!
//! Each function only turns what C passes into what the safe code takes. `pointers.rs` is the one
//! place that follows a caller's pointer. A panic never crosses the border.

pub mod arguments;
mod attention;
mod collective;
mod control;
mod elementwise;
mod experts;
mod general;
mod memory;
mod meta;
pub mod pointers;
mod products;
mod runtime;

use std::collections::HashMap;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::LazyLock;

use crate::code;
use crate::driver::DRIVER;
use crate::failure::{Done, Failure, note};
use crate::fault;

/// Runs a call: its failure becomes the code to return and the thread's recent text.
fn border(name: &'static str, call: impl FnOnce() -> Done) -> i32 {
    let done = catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|_| {
        Err(Failure::new(code::INTERNAL, "the emulator failed and says where on stderr"))
    });
    note(name, done)
}

/// Defines exported functions that return a code, and their table.
macro_rules! calls {
    ($(fn $name:ident($($argument:ident: $type:ty),* $(,)?) $body:block)*) => {
        $(
            #[doc = concat!("CANN's `", stringify!($name), "`.")]
            #[unsafe(no_mangle)]
            pub extern "C" fn $name($($argument: $type),*) -> i32 {
                $crate::abi::border(stringify!($name), || $body)
            }
        )*
        /// The functions by name.
        pub(super) fn table() -> Vec<(&'static str, *const std::ffi::c_void)> {
            vec![$((stringify!($name), $name as *const std::ffi::c_void)),*]
        }
    };
}
use calls;

/// Defines operators: for each its two phases. The body plans it.
macro_rules! operators {
    ($(
        $name:ident, $plan_name:ident |$plan:ident| ($($argument:ident: $type:ty),* $(,)?)
        $body:block
    )*) => {
        $(
            #[doc = concat!("The first phase of CANN's `", stringify!($name), "`.")]
            #[unsafe(no_mangle)]
            #[allow(clippy::too_many_arguments, reason = "the interface is CANN's")]
            pub extern "C" fn $plan_name(
                $($argument: $type,)*
                workspace_bytes: $crate::abi::pointers::Out<u64>,
                executor: $crate::abi::pointers::Out<u64>,
            ) -> i32 {
                $crate::abi::border(stringify!($plan_name), || {
                    let mut resolver = $crate::abi::arguments::Resolver::default();
                    let mut planned = $crate::plan::Plan::new(stringify!($name));
                    let $plan = &mut planned;
                    $(let $argument = $crate::abi::arguments::Resolve::resolve(
                        $argument, stringify!($argument), &mut resolver)?;)*
                    let done: $crate::failure::Done = $body;
                    done?;
                    $crate::abi::arguments::finish(planned, workspace_bytes, executor)
                })
            }

            #[doc = concat!("The second phase of CANN's `", stringify!($name), "`.")]
            #[unsafe(no_mangle)]
            pub extern "C" fn $name(
                workspace: u64,
                workspace_bytes: u64,
                executor: u64,
                stream: u64,
            ) -> i32 {
                $crate::abi::border(stringify!($name), || {
                    $crate::plan::launch(&$crate::plan::Launch {
                        op: stringify!($name),
                        workspace,
                        workspace_bytes,
                        executor,
                        stream,
                    })
                })
            }
        )*
        /// The functions by name.
        pub(super) fn table() -> Vec<(&'static str, *const std::ffi::c_void)> {
            vec![$(
                (stringify!($plan_name), $plan_name as *const std::ffi::c_void),
                (stringify!($name), $name as *const std::ffi::c_void),
            )*]
        }
    };
}
use operators;

/// An address that threads may share: code does not move.
struct Code(*const c_void);

// SAFETY: it points to a function, which any thread may call.
unsafe impl Send for Code {}
// SAFETY: as above.
unsafe impl Sync for Code {}

static TABLE: LazyLock<HashMap<&'static str, Code>> = LazyLock::new(|| {
    let tables = [
        runtime::table(),
        runtime::others(),
        memory::table(),
        meta::table(),
        meta::makers(),
        elementwise::table(),
        general::table(),
        products::table(),
        attention::table(),
        experts::table(),
        collective::table(),
        collective::others(),
        control::table(),
        control::others(),
    ];
    tables.into_iter().flatten().map(|(name, code)| (name, Code(code))).collect()
});

/// The function of a name; none if there is none, or a fault says that it is missing.
pub fn symbol(name: &str) -> Option<*const c_void> {
    let code = TABLE.get(name)?.0;
    let missing = |device: &std::sync::Arc<crate::device::Device>| {
        let op = name.strip_suffix("GetWorkspaceSize").unwrap_or(name);
        let struck = device.faults.strike(fault::Place::Symbol, op);
        struck.iter().any(|fault| fault.op.as_deref() == Some(op))
    };
    // All devices are asked, so that each counts its call.
    let missing = DRIVER.devices().iter().filter(|device| missing(device)).count();
    (missing == 0).then_some(code)
}

/// Every name, sorted.
pub fn names() -> Vec<&'static str> {
    let mut names: Vec<_> = TABLE.keys().copied().collect();
    names.sort_unstable();
    names
}
