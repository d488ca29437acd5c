//! Which crate may depend on which: the directions of ARCHITECTURE.md.
//!
//! Dev-dependencies are free: a test may use any crate. Because the table itself has no cycle, a
//! workspace that passes has none either. Read next: `../tidy.rs`.

use crate::report::Finding;

/// A crate of the workspace, as `cargo metadata` tells it.
pub struct Member {
    /// Its folder relative to the repository's root, as in `crates/ops`.
    pub folder: String,
    /// The folders of the workspace's crates it depends on, tests not counted.
    pub needs: Vec<String>,
}

/// What each folder may depend on; `*` stands for one folder name or, alone, for everything.
const DIRECTIONS: [(&str, &[&str]); 11] = [
    ("crates/ops", &[]),
    ("crates/fleet", &[]),
    ("crates/program", &["crates/ops"]),
    ("crates/models", &["crates/program", "crates/ops"]),
    ("crates/qualify", &["crates/program", "crates/ops"]),
    ("crates/train", &["crates/models", "crates/program", "crates/fleet", "crates/ops"]),
    ("crates/serve", &["crates/models", "crates/program", "crates/fleet", "crates/ops"]),
    ("crates/sim", &["crates/fleet", "crates/ops"]),
    ("backends/*", &["crates/ops"]),
    ("emulators/*", &["backends/cpu"]),
    // For the table of symbols that `ascend-abi` compares with headers.
    ("xtask", &["backends/ascend"]),
];

/// The one crate that may depend on all others, and on which none may.
const TOP: &str = "crates/cli";

fn allowed_for(folder: &str) -> Option<&'static [&'static str]> {
    let matches = |pattern: &str| match pattern.strip_suffix('*') {
        Some(prefix) => folder.starts_with(prefix),
        None => folder == pattern,
    };
    DIRECTIONS.iter().find(|(pattern, _)| matches(pattern)).map(|(_, needs)| *needs)
}

/// Checks the directions between the workspace's crates.
pub fn directions(members: &[Member]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for member in members {
        let mut add = |message: String| {
            let file = format!("{}/Cargo.toml", member.folder);
            findings.push(Finding { file, line: 1, rule: "direction", message });
        };
        if member.folder == TOP {
            continue;
        }
        let Some(allowed) = allowed_for(&member.folder) else {
            add(format!("`{}` has no row in xtask/src/rules/dependencies.rs", member.folder));
            continue;
        };
        for need in &member.needs {
            if !allowed.contains(&need.as_str()) {
                add(format!("`{}` must not depend on `{need}`", member.folder));
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(folder: &str, needs: &[&str]) -> Vec<Finding> {
        let needs = needs.iter().map(|need| (*need).to_owned()).collect();
        directions(&[Member { folder: folder.to_owned(), needs }])
    }

    #[test]
    fn the_allowed_directions_pass() {
        assert!(check("crates/models", &["crates/program", "crates/ops"]).is_empty());
        assert!(check("backends/vulkan", &["crates/ops"]).is_empty());
        assert!(check("crates/cli", &["crates/train", "backends/cpu"]).is_empty());
    }

    #[test]
    fn the_other_directions_are_found() {
        for (folder, need) in [
            ("crates/ops", "crates/program"),
            ("crates/fleet", "crates/ops"),
            ("crates/train", "crates/serve"),
            ("crates/train", "backends/cpu"),
            ("backends/cpu", "crates/program"),
            ("crates/qualify", "crates/cli"),
        ] {
            assert_eq!(check(folder, &[need]).len(), 1, "{folder} on {need}");
        }
    }

    #[test]
    fn a_crate_without_a_row_is_found() {
        assert!(check("crates/new", &[])[0].message.contains("no row"));
    }

    #[test]
    fn the_table_has_no_cycle() {
        // Removes what depends on nothing left, until nothing is left or a cycle is.
        let mut rows: Vec<(&str, &[&str])> = DIRECTIONS.to_vec();
        while !rows.is_empty() {
            let names: Vec<&str> = rows.iter().map(|(name, _)| *name).collect();
            let count = rows.len();
            rows.retain(|(_, needs)| needs.iter().any(|need| names.contains(need)));
            assert!(rows.len() < count, "cycle among {names:?}");
        }
    }
}
