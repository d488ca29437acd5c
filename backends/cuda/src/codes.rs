//! The driver's result codes in the waist's words.
//!
//! Numbers and meanings as the driver's public reference lists them. What is not here is `Lost`:
//! nothing is known of the device then.

use pontoon_ops::DeviceErrorKind::{
    self, BadArgument, Hang, LinkDown, Lost, MemoryFault, OutOfMemory, Unsupported,
};

/// Work is still running.
pub const NOT_READY: i32 = 600;

/// What a code means.
#[derive(Clone, Copy, Debug)]
pub struct Code {
    /// The driver's number.
    pub number: i32,
    /// What it says.
    pub meaning: &'static str,
    /// What kind of trouble that is.
    pub kind: DeviceErrorKind,
}

const fn code(number: i32, meaning: &'static str, kind: DeviceErrorKind) -> Code {
    Code { number, meaning, kind }
}

/// Every code that is told apart.
pub const CODES: [Code; 25] = [
    code(1, "an argument is invalid", BadArgument),
    code(2, "device memory is used up", OutOfMemory),
    code(3, "the driver is not initialised", Lost),
    code(4, "the driver is shutting down with the process", Lost),
    code(46, "the device is busy or unavailable", Lost),
    code(100, "no device is there", Unsupported),
    code(101, "there is no device of this number", BadArgument),
    code(201, "the context is invalid", Lost),
    code(209, "the code is for another architecture", Unsupported),
    code(214, "an uncorrectable memory error", MemoryFault),
    code(220, "an uncorrectable error of a link between devices", LinkDown),
    code(222, "the driver is older than the compiler", Unsupported),
    code(500, "a symbol was not found", Unsupported),
    code(700, "a kernel reached an illegal address", Lost),
    code(701, "a kernel asks for more than the device has", Unsupported),
    code(702, "a kernel ran too long for the driver", Hang),
    code(709, "the context was destroyed", Lost),
    code(714, "a hardware stack error", MemoryFault),
    code(715, "an illegal instruction", Lost),
    code(716, "a misaligned address", Lost),
    code(718, "an invalid program counter", Lost),
    code(719, "a kernel failed", Lost),
    code(801, "not supported by this device", Unsupported),
    code(802, "the system is not ready", Lost),
    code(803, "driver and libraries do not fit each other", Unsupported),
];

/// The kind and the meaning of a code.
pub fn judge(number: i32) -> (DeviceErrorKind, &'static str) {
    let found = CODES.iter().find(|code| code.number == number);
    found.map_or((Lost, "an error the driver does not explain"), |code| (code.kind, code.meaning))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_told_apart_and_what_is_unknown_counts_as_lost() {
        for (number, kind) in
            [(2, OutOfMemory), (214, MemoryFault), (702, Hang), (700, Lost), (220, LinkDown)]
        {
            assert_eq!(judge(number).0, kind, "{number}");
        }
        assert_eq!(judge(-7).0, Lost);
        assert!(CODES.windows(2).all(|pair| pair[0].number < pair[1].number));
    }
}
