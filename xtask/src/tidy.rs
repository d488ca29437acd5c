//! `cargo xtask tidy`: reads the repository's files and prints every broken rule.
//!
//! Changes nothing. The rules stand in `rules/`; this file only finds what to show them.

use std::path::Path;
use std::process::{Command, ExitCode};

use serde_json::Value;

use crate::report::Finding;
use crate::rules::dependencies::{Member, directions};
use crate::rules::{check_rust, words};
use crate::source::Source;

/// Checks the repository and prints what it finds.
pub fn run(root: &Path) -> ExitCode {
    match check(root) {
        Ok(findings) if findings.is_empty() => ExitCode::SUCCESS,
        Ok(findings) => {
            for finding in &findings {
                println!("{finding}");
            }
            eprintln!("tidy: {} findings", findings.len());
            ExitCode::FAILURE
        }
        Err(problem) => {
            eprintln!("tidy: {problem}");
            ExitCode::FAILURE
        }
    }
}

/// Every broken rule in the repository, in the order of files and lines.
fn check(root: &Path) -> Result<Vec<Finding>, String> {
    let mut findings = directions(&members(root)?);
    for path in files(root)? {
        let bytes = match std::fs::read(root.join(&path)) {
            Ok(bytes) => bytes,
            // A file that is deleted and not yet committed is still listed.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(format!("cannot read `{path}`: {error}")),
        };
        // What is not UTF-8 is no text: weights, images.
        let Ok(content) = String::from_utf8(bytes) else { continue };
        findings.extend(words::machine_text(&path, &content));
        if path.ends_with(".rs") {
            findings.extend(check_rust(&Source::new(&path, &content)));
        }
    }
    findings.sort();
    Ok(findings)
}

/// The repository's files: committed ones, and new ones that git does not ignore.
fn files(root: &Path) -> Result<Vec<String>, String> {
    let arguments = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"];
    let listing = output(Command::new("git").args(arguments).current_dir(root), "git ls-files")?;
    Ok(listing.split('\0').filter(|path| !path.is_empty()).map(str::to_owned).collect())
}

/// The workspace's crates and their dependencies on each other.
fn members(root: &Path) -> Result<Vec<Member>, String> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let arguments = ["metadata", "--no-deps", "--offline", "--format-version", "1"];
    let text = output(Command::new(cargo).args(arguments).current_dir(root), "cargo metadata")?;
    let metadata: Value =
        serde_json::from_str(&text).map_err(|error| format!("cargo metadata: {error}"))?;
    let packages = metadata["packages"].as_array().ok_or("cargo metadata lists no packages")?;
    Ok(packages.iter().map(|package| member(root, package)).collect())
}

fn member(root: &Path, package: &Value) -> Member {
    let relative = |path: &str| {
        let path = Path::new(path);
        path.strip_prefix(root).unwrap_or(path).to_string_lossy().replace('\\', "/")
    };
    let manifest = relative(package["manifest_path"].as_str().unwrap_or_default());
    let folder = manifest.trim_end_matches("/Cargo.toml").to_owned();
    let dependencies = package["dependencies"].as_array().map(Vec::as_slice).unwrap_or_default();
    let needs = dependencies
        .iter()
        .filter(|dependency| dependency["kind"] != "dev")
        .filter_map(|dependency| dependency["path"].as_str().map(relative))
        .collect();
    Member { folder, needs }
}

/// What a command prints, or why it failed.
fn output(command: &mut Command, name: &str) -> Result<String, String> {
    let done = command.output().map_err(|error| format!("cannot run `{name}`: {error}"))?;
    if !done.status.success() {
        return Err(format!("`{name}` failed: {}", String::from_utf8_lossy(&done.stderr).trim()));
    }
    String::from_utf8(done.stdout).map_err(|error| format!("`{name}`: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dev_dependencies_and_outside_crates_are_not_counted() {
        let package = serde_json::json!({
            "manifest_path": "/r/crates/train/Cargo.toml",
            "dependencies": [
                { "kind": null, "path": "/r/crates/ops" },
                { "kind": "dev", "path": "/r/backends/cpu" },
                { "kind": null, "path": null },
            ],
        });
        let member = member(Path::new("/r"), &package);
        assert_eq!(member.folder, "crates/train");
        assert_eq!(member.needs, ["crates/ops"]);
    }
}
