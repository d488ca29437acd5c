//! Repository chores: `cargo xtask tidy` (the style rules), `cargo xtask test` (everything CI
//! checks), `cargo xtask ascend-abi` (the Ascend backend's table against CANN's headers) and
//! `cargo xtask support` (the page of what devices support).
//!
//! Links no part of the product but that table. Read next: `tidy.rs`, then one file of `rules/`.

mod ascend_abi;
mod report;
mod rules;
mod source;
mod suite;
mod tidy;

use std::process::ExitCode;

const USAGE: &str = "usage: cargo xtask COMMAND

  tidy                 check the rules marked [t] in the style guide, directions between crates
  test                 formatting, clippy, tidy, then every test; ends with `N passed, N failed`
  ascend-abi HEADERS   compare the Ascend backend's table of symbols with a tree of CANN's headers
  support              run the conformance suites here and write docs/support.md";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let root = repository_root();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["tidy"] => tidy::run(&root),
        ["test"] => suite::run(&root),
        ["ascend-abi", headers] => ascend_abi::run(std::path::Path::new(headers)),
        ["support"] => suite::support(&root),
        ["--help" | "-h" | "help"] => {
            println!("{USAGE}");
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}

/// The folder of the workspace: the parent of this crate's.
fn repository_root() -> std::path::PathBuf {
    let here = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().expect("xtask lies one folder below the root").to_path_buf()
}
