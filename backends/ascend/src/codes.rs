//! What CANN's codes and texts mean in the waist's words: one table, used for every call.
//!
//! It calls nothing and knows nothing of what led to a code. The order in which a failed device is
//! asked and repaired is in `fault.rs`.

use pontoon_ops::DeviceErrorKind::{
    self, BadArgument, Hang, LinkDown, Lost, MemoryFault, OutOfMemory, Unsupported,
};

/// One code, what it is called for the report, and what it means for the supervisor.
pub struct Code {
    /// The vendor's number.
    pub number: i32,
    /// What kind of trouble it is.
    pub kind: DeviceErrorKind,
    /// The same in words.
    pub meaning: &'static str,
}

const fn code(number: i32, kind: DeviceErrorKind, meaning: &'static str) -> Code {
    Code { number, kind, meaning }
}

/// Codes of the runtime (1xxxxx parameters, 2xxxxx resources, 5xxxxx internal) and of the operator
/// library (x61xxx). What is not listed is judged by its class and its text.
pub const CODES: &[Code] = &[
    code(100_000, BadArgument, "invalid parameter"),
    code(100_001, Lost, "the runtime is not initialised"),
    code(100_024, Unsupported, "operator not found"),
    code(100_025, Unsupported, "operator cannot be loaded"),
    code(100_026, Unsupported, "unsupported data type"),
    code(100_029, Unsupported, "kernel not found"),
    code(107_000, BadArgument, "invalid parameter"),
    code(107_001, BadArgument, "no such device"),
    code(107_002, BadArgument, "no context on this thread"),
    code(107_003, BadArgument, "the stream belongs to another context"),
    code(107_008, BadArgument, "unaligned address"),
    code(107_017, BadArgument, "invalid handle"),
    code(107_019, Hang, "wait timed out"),
    code(107_020, Hang, "task timed out and was aborted"),
    code(107_022, Hang, "the device's tasks were aborted"),
    code(107_023, Hang, "the stream was aborted"),
    code(161_001, BadArgument, "null where a tensor is needed"),
    code(161_002, BadArgument, "parameter not allowed"),
    code(200_000, OutOfMemory, "host allocation failed"),
    code(200_001, Unsupported, "call not supported"),
    code(200_002, Lost, "invalid device"),
    code(200_003, BadArgument, "unaligned address"),
    code(200_006, Unsupported, "feature not supported"),
    code(207_000, Unsupported, "feature not supported"),
    code(207_001, OutOfMemory, "memory allocation failed"),
    code(207_004, Lost, "no device"),
    // A restarted worker has its streams and events again; less memory would not help.
    code(207_005, Lost, "no resource left in the process"),
    code(207_007, Lost, "no event left in the process"),
    code(207_008, Lost, "no stream left in the process"),
    code(207_018, OutOfMemory, "device out of memory"),
    code(300_000, OutOfMemory, "storage over limit"),
    code(361_001, Lost, "the runtime failed under an operator"),
    code(500_000, Lost, "internal error"),
    code(500_003, Lost, "runtime failure"),
    code(500_004, Lost, "driver failure"),
    code(507_000, Lost, "runtime internal error"),
    code(507_001, Lost, "task scheduler error"),
    code(507_010, Lost, "task scheduler lost its heartbeat"),
    code(507_012, Hang, "report timed out"),
    code(507_014, Hang, "AI core timed out"),
    // If it repeats on another device the call is at fault; one device alone cannot tell.
    code(507_015, MemoryFault, "AI core exception"),
    code(507_016, MemoryFault, "AI core trap"),
    code(507_017, Hang, "AI CPU timed out"),
    code(507_018, MemoryFault, "AI CPU exception"),
    code(507_034, Hang, "vector core timed out"),
    code(507_035, MemoryFault, "vector core exception"),
    code(507_036, MemoryFault, "vector core trap"),
    code(507_046, Hang, "stream synchronisation timed out"),
    code(507_047, Hang, "event synchronisation timed out"),
    code(507_048, Hang, "FFTS+ task timed out"),
    code(507_049, MemoryFault, "FFTS+ exception"),
    code(507_053, MemoryFault, "device memory error"),
    code(507_054, MemoryFault, "HBM multi-bit ECC error"),
    code(507_055, MemoryFault, "suspected device memory error"),
    code(507_056, LinkDown, "link error"),
    code(507_057, LinkDown, "suspected error of a remote device"),
    code(507_899, Lost, "driver internal error"),
    code(507_901, Lost, "the host's link to the device closed"),
    code(507_904, LinkDown, "a collective failed again after its retry"),
    code(561_000, Unsupported, "the operator failed inside"),
    code(561_002, Unsupported, "no tiling for these shapes"),
    code(561_003, Unsupported, "the operator has no kernel binary"),
    code(561_107, Unsupported, "ASCEND_OPP_PATH is not set"),
    code(561_112, Unsupported, "the kernel package is not installed"),
];

/// Texts that say more than a general code does; whole words, so that the name of a call is none.
const TEXTS: &[(&str, DeviceErrorKind)] = &[
    ("link error", LinkDown),
    ("multi bit ecc", MemoryFault),
    ("hbm", MemoryFault),
    ("lost heartbeat", Lost),
    ("timeout", Hang),
    ("out of memory", OutOfMemory),
    ("no binary", Unsupported),
];

/// Codes that many causes share, for which the text decides.
const GENERAL: [i32; 9] =
    [361_001, 500_000, 500_003, 500_004, 507_000, 507_015, 507_035, 507_899, 561_000];

/// The kind of a code with the text that came with it, and its meaning in words.
pub fn judge(number: i32, text: &str) -> (DeviceErrorKind, &'static str) {
    let words: Vec<String> =
        text.split(|c: char| !c.is_alphanumeric()).map(str::to_lowercase).collect();
    let words = format!(" {} ", words.join(" "));
    let says = |part: &str| words.contains(&format!(" {part} "));
    let told = || TEXTS.iter().find(|(part, _)| says(part)).map(|(_, kind)| *kind);
    let known = CODES.iter().find(|code| code.number == number);
    match known {
        Some(code) if GENERAL.contains(&number) => (told().unwrap_or(code.kind), code.meaning),
        Some(code) => (code.kind, code.meaning),
        None => (told().unwrap_or(class(number)), "unlisted code"),
    }
}

fn class(number: i32) -> DeviceErrorKind {
    match number / 100_000 {
        1 => BadArgument,
        2 | 3 => OutOfMemory,
        _ => Lost,
    }
}

/// The kind of a result of the collective library, and its meaning in words.
pub fn judge_collective(number: i32) -> (DeviceErrorKind, &'static str) {
    match number {
        1 | 2 => (BadArgument, "collective: invalid parameter"),
        3 => (OutOfMemory, "collective: no memory"),
        5 => (Unsupported, "collective: not supported"),
        9 => (Hang, "collective: timed out"),
        11..=14 | 19 => (LinkDown, "collective: link failed"),
        20 => (LinkDown, "collective: to be tried again"),
        21 => (LinkDown, "collective: a remote device failed"),
        22 => (LinkDown, "collective: the communicator is suspended"),
        _ => (Lost, "collective: internal error"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pontoon_ops::{DeviceError, Remedy};

    fn kind(number: i32) -> DeviceErrorKind {
        judge(number, "").0
    }

    #[test]
    fn the_codes_that_decide_what_to_do_have_their_kinds() {
        for (numbers, wanted) in [
            (&[507_010, 507_901][..], Lost),
            (&[507_014, 507_034, 507_048, 507_046, 507_047][..], Hang),
            (&[107_020, 107_022, 107_023][..], Hang),
            (&[507_015, 507_035, 507_053, 507_054, 507_055][..], MemoryFault),
            (&[507_056, 507_057, 507_904][..], LinkDown),
            (&[207_001, 207_018][..], OutOfMemory),
            (&[161_001, 161_002][..], BadArgument),
            (&[561_000, 561_002, 561_003, 561_107, 561_112][..], Unsupported),
            (&[361_001, 207_008][..], Lost),
        ] {
            numbers.iter().for_each(|&number| assert_eq!(kind(number), wanted, "{number}"));
        }
    }

    #[test]
    fn used_up_streams_ask_for_a_new_worker_and_not_for_a_smaller_batch() {
        let error = DeviceError::new(kind(207_008), "no stream left");
        assert_eq!(error.remedy(), Remedy::RestartWorker);
    }

    #[test]
    fn text_decides_where_a_code_is_general_and_only_there() {
        assert_eq!(judge(507_015, "errcode 1, reason=[link error], core 3").0, LinkDown);
        assert_eq!(judge(361_001, "aclrtMalloc: out of memory").0, OutOfMemory);
        assert_eq!(judge(507_054, "link error").0, MemoryFault);
        assert_eq!(judge(599_999, "kernel timeout").0, Hang);
        assert_eq!(judge(199_999, "").0, BadArgument);
        let call = "aclrtSynchronizeStreamWithTimeout: reason=[aicore exception]";
        assert_eq!(judge(507_015, call).0, MemoryFault);
    }

    #[test]
    fn no_code_stands_twice() {
        let mut numbers: Vec<i32> = CODES.iter().map(|code| code.number).collect();
        let count = numbers.len();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), count);
    }

    #[test]
    fn a_collective_that_lost_its_link_is_reconnected() {
        for number in [11, 12, 13, 14, 19, 21, 22] {
            assert_eq!(judge_collective(number).0, LinkDown, "{number}");
        }
        assert_eq!(judge_collective(9).0, Hang);
    }
}
