//! `cargo xtask test`: formatting, clippy, tidy and every test, ending with the totals; and
//! `cargo xtask support`, which runs the conformance suites for their page.
//!
//! Every part runs even if an earlier one failed, so that one run shows all there is to mend.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

/// The parts before the tests: the name that a failure is reported under, and the command.
const PARTS: [(&str, &[&str]); 2] = [
    ("formatting", &["fmt", "--all", "--check"]),
    ("clippy", &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]),
];

/// How many tests passed and failed.
#[derive(Debug, Default, PartialEq, Eq)]
struct Totals {
    passed: u64,
    failed: u64,
}

/// Runs everything and reports.
pub fn run(root: &Path) -> ExitCode {
    let mut failures: Vec<&str> = Vec::new();
    for (name, arguments) in PARTS {
        let status = cargo(root).args(arguments).status();
        if !status.is_ok_and(|status| status.success()) {
            failures.push(name);
        }
    }
    if crate::tidy::run(root) != ExitCode::SUCCESS {
        failures.push("tidy");
    }
    for name in &failures {
        eprintln!("xtask: {name} failed, see above; the tests run all the same");
    }
    let (totals, tests_ok) = tests(root);
    println!("{} passed, {} failed", totals.passed, totals.failed);
    if tests_ok && totals.failed == 0 && failures.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Writes docs/support.md with the program's own suites.
pub fn support(root: &Path) -> ExitCode {
    let program = ["run", "--release", "--package", "pontoon", "--"];
    let command = ["qualify", "--support", "docs/support.md"];
    match cargo(root).args(program).args(command).status() {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

fn cargo(root: &Path) -> Command {
    let mut command = Command::new(std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned()));
    command.current_dir(root);
    command
}

/// Runs the tests, shows their output as it comes, and adds up their result lines.
fn tests(root: &Path) -> (Totals, bool) {
    let arguments = ["test", "--workspace", "--no-fail-fast"];
    let child = cargo(root).args(arguments).stdout(Stdio::piped()).spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(error) => {
            eprintln!("xtask: cannot run cargo: {error}");
            return (Totals::default(), false);
        }
    };
    let mut totals = Totals::default();
    let output = child.stdout.take().expect("the output was asked for as a pipe");
    for line in BufReader::new(output).lines() {
        // A test may print bytes that are no text; they hold no result either.
        let Ok(line) = line else { continue };
        println!("{line}");
        totals.add(&line);
    }
    (totals, child.wait().is_ok_and(|status| status.success()))
}

impl Totals {
    /// Adds a line such as `test result: ok. 3 passed; 0 failed; 0 ignored; ...`.
    fn add(&mut self, line: &str) {
        let Some(result) = line.strip_prefix("test result: ") else { return };
        let words: Vec<&str> = result.split([' ', ';']).filter(|word| !word.is_empty()).collect();
        let before = |name: &str| {
            let at = words.iter().position(|word| *word == name)?;
            words.get(at.checked_sub(1)?)?.parse::<u64>().ok()
        };
        self.passed += before("passed").unwrap_or(0);
        self.failed += before("failed").unwrap_or(0);
    }
}

#[cfg(test)]
mod tests {
    use super::Totals;

    #[test]
    fn result_lines_are_added_and_other_lines_are_not() {
        let mut totals = Totals::default();
        totals.add("test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out");
        totals.add("test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured");
        totals.add("test a::b ... ok");
        totals.add("9 passed; 9 failed");
        assert_eq!(totals, Totals { passed: 15, failed: 2 });
    }
}
