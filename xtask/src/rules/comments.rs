//! What a comment may not be: an open end without an issue, or code that was switched off.
//!
//! Documentation is not searched for code: its examples are compiled. Read next:
//! `dependencies.rs`.

use super::finding;
use crate::report::Finding;
use crate::source::Source;

/// Every note of work left open carries an issue number, as in `TODO(#12)`.
pub fn issue_numbers(source: &Source) -> Vec<Finding> {
    let is_open_end = |comment: &str| {
        let mut words = comment.split(|c: char| !c.is_alphanumeric());
        words.any(|word| word == "TODO" || word == "FIXME")
    };
    let lines = source.comments.iter().enumerate();
    lines
        .filter(|(_, comment)| is_open_end(comment) && !has_issue_number(comment))
        .map(|(line, _)| {
            let message = "name the issue, as in `TODO(#12)`";
            finding(source, line, "todo", message.to_owned())
        })
        .collect()
}

fn has_issue_number(comment: &str) -> bool {
    comment.split('#').skip(1).any(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
}

/// No commented-out code.
pub fn dead_code(source: &Source) -> Vec<Finding> {
    let lines = source.comments.iter().enumerate();
    lines
        .filter(|(_, comment)| is_dead_code(comment))
        .map(|(line, _)| {
            let message = "remove commented-out code: the history keeps it";
            finding(source, line, "dead-code", message.to_owned())
        })
        .collect()
}

/// Whether a comment reads like code: it ends like a statement and has a statement's signs, which
/// a sentence that goes on after a semicolon has not.
fn is_dead_code(comment: &str) -> bool {
    if comment.starts_with("///") || comment.starts_with("//!") {
        return false;
    }
    let text = comment.trim_start_matches('/').trim();
    if text.ends_with('{') {
        return true;
    }
    let Some(statement) = text.strip_suffix(';') else { return false };
    let keywords = ["let ", "use ", "pub ", "mod ", "return", "break", "continue", "const "];
    let first = keywords.iter().any(|keyword| statement.starts_with(keyword));
    // In prose a bracket follows a blank; a call's bracket follows the name.
    let call = statement.ends_with(')')
        && statement.match_indices('(').any(|(at, _)| {
            statement[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '!')
        });
    let assignment = [" = ", " += ", " -= ", " *= "].iter().any(|sign| statement.contains(sign));
    let words = statement.split_whitespace().count();
    first && words <= 12 || call || assignment
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dead(text: &str) -> usize {
        dead_code(&Source::new("a.rs", text)).len()
    }

    #[test]
    fn an_open_end_needs_an_issue_number() {
        let count = |text: &str| issue_numbers(&Source::new("a.rs", text)).len();
        assert_eq!(count("// TODO: later\n// FIXME # soon\n"), 2);
        assert_eq!(
            count("// TODO(#12): later\nlet a = \"TODO\"; // FIXME #7\n// a todo list\n"),
            0
        );
    }

    #[test]
    fn commented_out_code_is_found() {
        for text in
            ["// let a = b;", "// if a {", "    // call(a, b);", "// a.b += 1;", "// }else{"]
        {
            assert_eq!(dead(text), 1, "{text}");
        }
    }

    #[test]
    fn prose_and_documentation_are_not_taken_for_code() {
        for text in [
            "// The first half is kept;",
            "// This holds for one (and only one) of them;",
            "/// let a = b;",
            "//! call(a);",
            "let a = \"// let b = c;\";",
        ] {
            assert_eq!(dead(text), 0, "{text}");
        }
    }
}
