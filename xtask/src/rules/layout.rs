//! How long lines, functions and files may be, and how a file opens.
//!
//! Layout inside a line is rustfmt's work. Read next: `safety.rs`.

use super::finding;
use crate::report::Finding;
use crate::source::Source;

/// Columns of a line: rustfmt's `max_width`, which leaves strings and comments alone.
const COLUMNS_MAX: usize = 100;
/// Lines of a function, signature and closing brace included: what fits on one screen.
const FUNCTION_LINES_MAX: usize = 70;
/// Lines of a file without its tests: more than that holds two subjects.
const FILE_LINES_MAX: usize = 700;

/// Every file opens with `//!`.
pub fn opening(source: &Source) -> Vec<Finding> {
    if source.lines.first().is_some_and(|line| line.starts_with("//!")) {
        return Vec::new();
    }
    let message = "open the file with `//!`: what it is for, what it does not do, where to read \
                   next";
    vec![finding(source, 0, "opening", message.to_owned())]
}

/// No line is wider than the limit.
pub fn line_length(source: &Source) -> Vec<Finding> {
    let columns = source.lines.iter().map(|line| line.chars().count()).enumerate();
    columns
        .filter(|(_, count)| *count > COLUMNS_MAX)
        .map(|(line, count)| {
            let message = format!("{count} columns, at most {COLUMNS_MAX}");
            finding(source, line, "line-length", message)
        })
        .collect()
}

/// No file has more lines than the limit, its tests not counted.
pub fn file_length(source: &Source) -> Vec<Finding> {
    let is_test_file = source.in_test.iter().all(|test| *test);
    let counted = source.in_test.iter().filter(|test| !**test || is_test_file).count();
    if counted <= FILE_LINES_MAX {
        return Vec::new();
    }
    let message = format!("{counted} lines without tests, at most {FILE_LINES_MAX}: split it");
    vec![finding(source, FILE_LINES_MAX, "file-length", message)]
}

/// No function has more lines than the limit.
pub fn function_length(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    for start in source.words("fn") {
        let is_pointer_type = source.solid_after(start + 2) == Some('(');
        let Some(body) = source.body_after(start).filter(|_| !is_pointer_type) else { continue };
        let first = source.line_at(start);
        let count = source.line_at(body.end) - first + 1;
        if count > FUNCTION_LINES_MAX {
            let name = source.word_after(start + 2);
            let message = format!("`{name}` has {count} lines, at most {FUNCTION_LINES_MAX}");
            findings.push(finding(source, first, "function-length", message));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(text: &str) -> Source {
        Source::new("crates/a/src/a.rs", text)
    }

    #[test]
    fn a_file_must_open_with_its_purpose() {
        assert!(opening(&source("//! For this.\nfn a() {}\n")).is_empty());
        assert_eq!(opening(&source("fn a() {}\n"))[0].line, 1);
        assert_eq!(opening(&source("")).len(), 1);
    }

    #[test]
    fn a_line_of_one_hundred_columns_passes_and_one_more_does_not() {
        let wide = |count: usize| format!("//! a\n// {}\n", "é".repeat(count - 3));
        assert!(line_length(&source(&wide(100))).is_empty());
        assert_eq!(line_length(&source(&wide(101)))[0].line, 2);
    }

    #[test]
    fn tests_do_not_count_towards_the_length_of_a_file() {
        let tests = format!("#[cfg(test)]\nmod tests {{\n{}}}\n", "// x\n".repeat(700));
        let short = format!("{}{tests}", "// x\n".repeat(700));
        assert!(file_length(&source(&short)).is_empty());
        let long = format!("{}{tests}", "// x\n".repeat(701));
        assert_eq!(file_length(&source(&long)).len(), 1);
    }

    #[test]
    fn a_function_of_seventy_lines_passes_and_one_more_does_not() {
        let function =
            |count: usize| format!("fn long(a: fn(u8)) {{\n{}}}\n", "a();\n".repeat(count - 2));
        assert!(function_length(&source(&function(70))).is_empty());
        let found = function_length(&source(&function(71)));
        assert!(found[0].message.contains("`long` has 71 lines"), "{found:?}");
    }

    #[test]
    fn braces_in_strings_and_comments_do_not_lengthen_a_function() {
        let text = format!("fn a() {{ print(\"{{\"); /* {{ */ }} // {{\n{}", "x!();\n".repeat(90));
        assert!(function_length(&source(&text)).is_empty());
    }
}
