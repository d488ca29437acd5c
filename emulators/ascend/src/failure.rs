//! Why a call failed: a code and a text; and the text each thread can ask for afterwards.

use std::cell::{Cell, RefCell};
use std::ffi::CString;

use crate::code;

/// A failed call or task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What the call returns.
    pub code: i32,
    /// What `aclGetRecentErrMsg` then says.
    pub text: String,
}

/// What calls give.
pub type Done<T = ()> = Result<T, Failure>;

impl Failure {
    /// A failure of this code.
    pub fn new(code: i32, text: impl Into<String>) -> Failure {
        Failure { code, text: text.into() }
    }

    /// A wrong argument of an operator.
    pub fn operator(text: impl Into<String>) -> Failure {
        Failure::new(code::OP_PARAMETER, text)
    }

    /// A wrong argument of a runtime call.
    pub fn parameter(text: impl Into<String>) -> Failure {
        Failure::new(code::PARAMETER, text)
    }
}

thread_local! {
    static MESSAGE: RefCell<CString> = RefCell::default();
    static LAST: Cell<i32> = const { Cell::new(0) };
}

/// Remembers a call's failure for its thread, and gives the code to return.
pub fn note(name: &str, done: Done) -> i32 {
    match done {
        Ok(()) => code::SUCCESS,
        Err(failure) => {
            let text = format!("EZ9999: {name}: {} [error code {}]", failure.text, failure.code);
            // A text from a user's string may hold a zero, at which a C text ends.
            let text = CString::new(text.replace('\0', " ")).unwrap_or_default();
            MESSAGE.with_borrow_mut(|message| *message = text);
            LAST.set(failure.code);
            failure.code
        }
    }
}

/// The thread's last text; it stays readable until the thread's next failure.
pub fn recent_text<R>(read: impl FnOnce(&CString) -> R) -> R {
    MESSAGE.with_borrow(read)
}

/// The thread's last failing code; `forget` sets it back.
pub fn last_code(forget: Forget) -> i32 {
    match forget {
        Forget::No => LAST.get(),
        Forget::Yes => LAST.replace(code::SUCCESS),
    }
}

/// Whether asking for the last code sets it back.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Forget {
    /// It stays.
    No,
    /// It is set back.
    Yes,
}
