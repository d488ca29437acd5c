//! `cargo xtask ascend-abi HEADERS`: compares the Ascend backend's table of symbols with the
//! prototypes in a tree of C headers: names, number of parameters, their types.
//!
//! Reads headers and prints differences; it changes and keeps nothing. It is no C parser: it knows
//! what prototypes in such headers look like. Read next: `backends/ascend/src/ffi/table.rs`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use pontoon_ascend::ffi::table::{FUNCTIONS, OPERATORS, Presence, Prototype};

/// What every operator's first phase has behind its own parameters.
const FIRST_PHASE_END: [&str; 2] = ["uint64_t*", "aclOpExecutor**"];
/// Every operator's second phase.
const SECOND_PHASE: [&str; 4] = ["void*", "uint64_t", "aclOpExecutor*", "aclrtStream"];
/// What the first phase's name has behind the operator's.
const FIRST_PHASE: &str = "GetWorkspaceSize";

/// Declarations by name; a tree may declare a name more than once.
type Declared = BTreeMap<String, Vec<Vec<String>>>;

/// Compares the table with the headers below a folder and prints what differs.
pub fn run(headers: &Path) -> ExitCode {
    let declared = match declarations(headers) {
        Ok(declared) => declared,
        Err(problem) => {
            eprintln!("ascend-abi: {problem}");
            return ExitCode::FAILURE;
        }
    };
    let report = compare(&wanted(), &declared);
    report.lines.iter().for_each(|line| println!("{line}"));
    println!(
        "{} symbols: {} equal, {} differ, {} missing, {} optional ones missing",
        report.equal + report.different + report.missing + report.optional,
        report.equal,
        report.different,
        report.missing,
        report.optional
    );
    if report.different + report.missing == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// One symbol as the table has it.
struct Wanted {
    name: String,
    parameters: Vec<&'static str>,
    presence: Presence,
}

/// The table with both phases of every operator.
fn wanted() -> Vec<Wanted> {
    let plain = |prototype: &Prototype| Wanted {
        name: prototype.name.to_owned(),
        parameters: prototype.parameters.to_vec(),
        presence: prototype.presence,
    };
    let mut all: Vec<Wanted> = FUNCTIONS.iter().map(plain).collect();
    for prototype in OPERATORS {
        let mut first = plain(prototype);
        first.parameters.extend(FIRST_PHASE_END);
        let name = first.name.trim_end_matches(FIRST_PHASE).to_owned();
        let second =
            Wanted { name, parameters: SECOND_PHASE.to_vec(), presence: prototype.presence };
        all.extend([first, second]);
    }
    all
}

/// What a comparison found.
#[derive(Debug, Default)]
struct Report {
    lines: Vec<String>,
    equal: usize,
    different: usize,
    missing: usize,
    optional: usize,
}

fn compare(wanted: &[Wanted], declared: &Declared) -> Report {
    let mut report = Report::default();
    for symbol in wanted {
        let Some(found) = declared.get(&symbol.name) else {
            match symbol.presence {
                Presence::Always => report.missing += 1,
                Presence::Sometimes => report.optional += 1,
            }
            let kind = if symbol.presence == Presence::Always { "missing" } else { "optional" };
            report.lines.push(format!("{kind}: {} is not declared", symbol.name));
            continue;
        };
        if found.iter().any(|parameters| *parameters == symbol.parameters) {
            report.equal += 1;
            continue;
        }
        report.different += 1;
        let difference = first_difference(&symbol.parameters, &found[0]);
        report.lines.push(format!("differs: {}: {difference}", symbol.name));
    }
    report
}

fn first_difference(table: &[&str], header: &[String]) -> String {
    if table.len() != header.len() {
        return format!("{} parameters in the table, {} declared", table.len(), header.len());
    }
    let differing = table.iter().zip(header).position(|(table, header)| table != header);
    match differing {
        Some(at) => format!("parameter {} is {} in the table, {}", at + 1, table[at], header[at]),
        None => "nothing".to_owned(),
    }
}

/// Every prototype in the headers below a folder.
fn declarations(folder: &Path) -> Result<Declared, String> {
    let mut declared = Declared::new();
    for path in headers(folder)? {
        let bytes =
            std::fs::read(&path).map_err(|error| format!("cannot read {path:?}: {error}"))?;
        prototypes(&without_comments(&String::from_utf8_lossy(&bytes)), &mut declared);
    }
    if declared.is_empty() {
        return Err(format!("{folder:?} holds no header with prototypes"));
    }
    Ok(declared)
}

fn headers(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let mut found = Vec::new();
    let mut open = vec![folder.to_path_buf()];
    while let Some(folder) = open.pop() {
        let entries = std::fs::read_dir(&folder)
            .map_err(|error| format!("cannot read {folder:?}: {error}"))?;
        for entry in entries.flatten() {
            let path = entry.path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|extension| extension == "h") {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

fn without_comments(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('/') {
        clean.push_str(&rest[..at]);
        let end = match rest.as_bytes().get(at + 1) {
            Some(b'*') => rest[at + 2..].find("*/").map_or(rest.len(), |end| at + 2 + end + 2),
            Some(b'/') => rest[at..].find('\n').map_or(rest.len(), |end| at + end),
            _ => {
                clean.push('/');
                at + 1
            }
        };
        // A comment parts words.
        clean.push(' ');
        rest = &rest[end..];
    }
    clean.push_str(rest);
    clean
}

/// Adds what looks like `result name(parameters);` to the declarations.
fn prototypes(text: &str, declared: &mut Declared) {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    for (open, _) in text.match_indices('(') {
        let before = text[..open].trim_end();
        let name = &before[before.trim_end_matches(is_word).len()..];
        let is_ours = ["acl", "Acl", "Hccl"].iter().any(|start| name.starts_with(start));
        let Some(close) = text[open..].find(')').filter(|_| is_ours) else { continue };
        let inside = &text[open + 1..open + close];
        // A call in an inline function, or a function-pointer type, is no prototype.
        if !text[open + close + 1..].trim_start().starts_with(';') || inside.contains('(') {
            continue;
        }
        let result = before[..before.len() - name.len()].trim_end();
        if !result.ends_with(|c: char| is_word(c) || c == '*') || result.ends_with("return") {
            continue;
        }
        let parameters = inside.split(',').map(type_of).filter(|kind| !kind.is_empty()).collect();
        declared.entry(name.to_owned()).or_default().push(parameters);
    }
}

/// A parameter's type without `const` and without its name.
fn type_of(parameter: &str) -> String {
    let spaced = parameter.replace('*', " * ").replace("[]", " * ");
    let mut words = spaced.split_whitespace().filter(|word| !["const", "struct"].contains(word));
    let base = words.next().unwrap_or_default();
    if base == "void" && !spaced.contains('*') {
        return String::new();
    }
    let stars = words.filter(|word| *word == "*").count();
    format!("{base}{}", "*".repeat(stars))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = r#"
/* a comment with aclFake(int a); in it */
ACL_FUNC_VISIBILITY aclError aclOne(const char *text, // trailing aclFake2(int a);
    int32_t *const count, void **out);
extern HcclResult HcclTwo(void);
aclnnStatus aclnnThreeGetWorkspaceSize(const aclTensor* self, const aclTensorList *others,
    bool keep, const int64_t dims[], uint64_t *workspaceSize, aclOpExecutor **executor);
typedef void (*aclCallback)(void *data);
inline int use() { return aclOne("x", 0, 0); }
"#;

    fn parsed() -> Declared {
        let mut declared = Declared::new();
        prototypes(&without_comments(HEADER), &mut declared);
        declared
    }

    #[test]
    fn prototypes_are_read_and_comments_calls_and_types_are_not() {
        let declared = parsed();
        let names: Vec<&String> = declared.keys().collect();
        assert_eq!(names, ["HcclTwo", "aclOne", "aclnnThreeGetWorkspaceSize"]);
        assert_eq!(declared["aclOne"], [["char*", "int32_t*", "void**"]]);
        assert_eq!(declared["HcclTwo"], [Vec::<String>::new()]);
        let three = &declared["aclnnThreeGetWorkspaceSize"][0];
        let wanted =
            ["aclTensor*", "aclTensorList*", "bool", "int64_t*", "uint64_t*", "aclOpExecutor**"];
        assert_eq!(*three, wanted);
    }

    #[test]
    fn missing_names_other_arity_and_other_types_are_told_apart() {
        let symbol = |name: &str, parameters: &[&'static str], presence| Wanted {
            name: name.to_owned(),
            parameters: parameters.to_vec(),
            presence,
        };
        let wanted = [
            symbol("aclOne", &["char*", "int32_t*", "void**"], Presence::Always),
            symbol("HcclTwo", &["int32_t"], Presence::Always),
            symbol("aclnnThreeGetWorkspaceSize", &["aclTensor*"; 6], Presence::Always),
            symbol("aclFour", &[], Presence::Always),
            symbol("aclFive", &[], Presence::Sometimes),
        ];
        let report = compare(&wanted, &parsed());
        let counts = [report.equal, report.different, report.missing, report.optional];
        assert_eq!(counts, [1, 2, 1, 1], "{:?}", report.lines);
        assert!(report.lines[0].contains("1 parameters in the table, 0 declared"));
        assert!(report.lines[1].contains("parameter 2 is aclTensor* in the table, aclTensorList*"));
    }

    #[test]
    fn the_table_names_every_symbol_once() {
        let mut names: Vec<String> = wanted().into_iter().map(|symbol| symbol.name).collect();
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
