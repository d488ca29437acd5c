//! The rules of `tidy`: each looks at one file and adds its findings.
//!
//! A new rule is a function here and its good and bad snippet in the tests of its file; nothing is
//! configurable, so that the style guide stays the only text to read.

pub mod comments;
pub mod dependencies;
pub mod layout;
pub mod safety;
pub mod words;

use crate::report::Finding;
use crate::source::Source;

/// Applies every rule for Rust files.
pub fn check_rust(source: &Source) -> Vec<Finding> {
    let rules = [
        layout::opening,
        layout::line_length,
        layout::file_length,
        layout::function_length,
        safety::unwrap,
        safety::unsafe_code,
        safety::allow_reason,
        safety::placeholders,
        words::vendors,
        comments::issue_numbers,
        comments::dead_code,
    ];
    rules.iter().flat_map(|rule| rule(source)).collect()
}

/// A finding on a line given by its index.
fn finding(source: &Source, line: usize, rule: &'static str, message: String) -> Finding {
    Finding { file: source.path.clone(), line: line + 1, rule, message }
}
