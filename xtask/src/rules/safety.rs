//! `unwrap`, `unsafe`, `#[allow]` and placeholders: code that needs a stated reason.
//!
//! Whether the stated reason holds is the reviewer's to judge. Read next: `words.rs`.

use super::finding;
use crate::report::Finding;
use crate::source::Source;

/// Where `unsafe` may stand: vendor calls, SIMD kernels, memory maps and the emulators' C ABI.
fn may_be_unsafe(path: &str) -> bool {
    let parts: Vec<&str> = path.split('/').collect();
    match parts.as_slice() {
        ["backends", _, "src", "ffi.rs"] => true,
        ["backends", _, "src", "ffi", file] => file.ends_with(".rs"),
        ["backends", "cpu", "src", "simd", file] => file.ends_with(".rs"),
        ["crates", "models" | "fleet", "src", "map.rs"] => true,
        ["crates", "train", "src", "data", "map.rs"] => true,
        ["emulators", _, "src", "ffi.rs"] | ["emulators", _, "src", "abi", _] => true,
        ["emulators", _, "tests", ..] => true,
        _ => false,
    }
}

/// No `unwrap` outside tests.
pub fn unwrap(source: &Source) -> Vec<Finding> {
    let lines = source.pieces(".unwrap()").into_iter().map(|at| source.line_at(at));
    lines
        .filter(|line| !source.in_test[*line])
        .map(|line| {
            let message = "use `expect(\"why this cannot fail\")` or return an error";
            finding(source, line, "unwrap", message.to_owned())
        })
        .collect()
}

/// `unsafe` only where it is allowed, and each block under a `// SAFETY:` comment.
pub fn unsafe_code(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    for start in source.words("unsafe") {
        let line = source.line_at(start);
        let after = start + "unsafe".len();
        if !may_be_unsafe(&source.path) {
            let message = "`unsafe` is allowed only in `backends/*/src/ffi.rs` and the few files \
                           named in xtask/src/rules/safety.rs";
            findings.push(finding(source, line, "unsafe", message.to_owned()));
        } else if is_block(source, after) && !is_explained(source, line) {
            let message = "put `// SAFETY:` above it, naming who upholds what";
            findings.push(finding(source, line, "safety", message.to_owned()));
        }
    }
    findings
}

/// Whether the `unsafe` that ends at a position opens a block or an implementation. Functions and
/// foreign items state their contract under `# Safety`, which clippy checks.
fn is_block(source: &Source, after: usize) -> bool {
    source.solid_after(after) == Some('{') || source.word_after(after) == "impl"
}

/// Whether the statement that holds a line carries a `SAFETY:` comment, on it or above it.
fn is_explained(source: &Source, line: usize) -> bool {
    if source.comments[line].contains("SAFETY:") {
        return true;
    }
    for above in (0..line).rev() {
        if source.comments[above].contains("SAFETY:") {
            return true;
        }
        let code = source.code[above].trim();
        let is_comment = code.is_empty() && !source.comments[above].is_empty();
        let ends_statement = code.is_empty() || code.ends_with([';', '{', '}', ',']);
        if !is_comment && ends_statement {
            return false;
        }
    }
    false
}

/// Every `#[allow(...)]` has a reason: inside it, or in a comment on its line or the one above.
pub fn allow_reason(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (piece, bracket) in [("#[allow(", 1), ("#![allow(", 2)] {
        for start in source.pieces(piece) {
            let line = source.line_at(start);
            let commented = |line: usize| {
                let comment = &source.comments[line];
                // Documentation tells what the item is, not why the lint is wrong about it.
                !comment.is_empty() && !comment.starts_with("///") && !comment.starts_with("//!")
            };
            let inside = source.inside(start + bracket);
            let explained =
                inside.contains("reason") || commented(line) || line > 0 && commented(line - 1);
            if !explained {
                let message = "give `reason = \"...\"`, or remove it";
                findings.push(finding(source, line, "allow", message.to_owned()));
            }
        }
    }
    findings
}

/// No `todo!()` and no `unimplemented!()`: what is not built yet is not there.
pub fn placeholders(source: &Source) -> Vec<Finding> {
    let names = ["todo!", "unimplemented!"];
    let places = names.iter().flat_map(|name| source.pieces(name));
    places
        .map(|at| {
            let message = "build it, or return an error that says what is missing";
            finding(source, source.line_at(at), "placeholder", message.to_owned())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALLOWED: &str = "backends/cpu/src/simd/wide.rs";

    fn source(text: &str) -> Source {
        Source::new("crates/a/src/a.rs", text)
    }

    #[test]
    fn unwrap_is_found_in_code_and_not_in_tests_or_strings() {
        assert_eq!(unwrap(&source("fn a() {\n    b\n        .unwrap();\n}\n"))[0].line, 3);
        let fine = "fn a() { \".unwrap()\"; b.unwrap_or(1); }\n#[cfg(test)]\nmod tests {\n\
                    fn t() { b.unwrap() }\n}\n";
        assert!(unwrap(&source(fine)).is_empty());
        assert!(unwrap(&Source::new("crates/a/tests/t.rs", "fn a() { b.unwrap() }")).is_empty());
    }

    #[test]
    fn unsafe_outside_the_list_is_found_even_with_a_comment() {
        let text = "// SAFETY: a reason.\nlet a = unsafe { b() };\n";
        assert_eq!(unsafe_code(&source(text))[0].rule, "unsafe");
        for path in [
            "backends/cuda/src/ffi.rs",
            "backends/cuda/src/ffi/calls.rs",
            ALLOWED,
            "crates/models/src/map.rs",
            "crates/train/src/data/map.rs",
            "emulators/ascend/src/abi/pointers.rs",
        ] {
            assert!(unsafe_code(&Source::new(path, text)).is_empty(), "{path}");
        }
        assert!(unsafe_code(&source("#![deny(unsafe_op_in_unsafe_fn)]\n// unsafe\n")).is_empty());
    }

    #[test]
    fn an_unsafe_block_needs_a_safety_comment_above_its_statement() {
        let check = |text: &str| unsafe_code(&Source::new(ALLOWED, text)).len();
        assert_eq!(check("fn a() {\n    unsafe { b() }\n}\n"), 1);
        assert_eq!(check("// SAFETY: x.\nlet c = 1;\nlet a = unsafe { b() };\n"), 1);
        assert_eq!(check("// SAFETY: x, on\n// two lines.\nlet a =\n    unsafe { b() };\n"), 0);
        assert_eq!(check("unsafe impl Send for A {}\n"), 1);
        assert_eq!(check("/// # Safety\npub unsafe fn a() {}\n"), 0);
    }

    #[test]
    fn an_allow_needs_a_reason() {
        assert_eq!(allow_reason(&source("#[allow(dead_code)]\nfn a() {}\n")).len(), 1);
        assert_eq!(allow_reason(&source("/// Docs.\n#[allow(dead_code)]\nfn a() {}\n")).len(), 1);
        let fine = "#![allow(a, reason = \"why\")]\n// Why.\n#[allow(b)]\n\n#[allow(c)] // Why.\n\n\
                    #[allow(\n    d,\n    reason = \"why\"\n)]\n";
        assert!(allow_reason(&source(fine)).is_empty());
    }

    #[test]
    fn a_placeholder_is_found() {
        assert_eq!(placeholders(&source("fn a() { todo!() }\n")).len(), 1);
        assert_eq!(placeholders(&source("fn a() { unimplemented!(\"x\") }\n")).len(), 1);
        assert!(placeholders(&source("// no todo! here\n")).is_empty());
    }
}
