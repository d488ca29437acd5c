//! The tables in `docs/ascend.md` are those of the code. `UPDATE=1 cargo test -p pontoon-ascend
//! --test docs` writes them anew.

use pontoon_ascend::codes::CODES;
use pontoon_ascend::needs;
use pontoon_ops::{DeviceError, OpName};

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/ascend.md");

fn operations() -> String {
    let mut rows = String::new();
    for &op in OpName::ALL {
        let names: Vec<&str> = needs::operators(op)
            .iter()
            .map(|operator| operator.symbol().trim_start_matches("aclnn"))
            .collect();
        let names = if names.is_empty() { "(HcclAllGather)".to_owned() } else { names.join(", ") };
        rows += &format!("| {} | {names} |\n", op.name());
    }
    rows
}

fn codes() -> String {
    let row = |code: &pontoon_ascend::codes::Code| {
        let remedy = DeviceError::new(code.kind, "").remedy();
        format!("| {} | {} | {:?} | {remedy:?} |\n", code.number, code.meaning, code.kind)
    };
    CODES.iter().map(row).collect()
}

/// Replaces the rows of the table with this heading.
fn with_rows(page: &str, heading: &str, rows: &str) -> String {
    let start = page.find(heading).expect("the page has the table") + heading.len();
    let rule_end = start + page[start..].find('\n').expect("a rule follows") + 1;
    let old = page[rule_end..].split_inclusive('\n').take_while(|line| line.starts_with('|'));
    let old_len: usize = old.map(str::len).sum();
    format!("{}{rows}{}", &page[..rule_end], &page[rule_end + old_len..])
}

#[test]
fn the_tables_in_the_docs_are_those_of_the_code() {
    let page = std::fs::read_to_string(PAGE).unwrap();
    let wanted = with_rows(&page, "| operation | operators |\n", &operations());
    let heading = "| code | meaning | kind | what the supervisor does |\n";
    let wanted = with_rows(&wanted, heading, &codes());
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(PAGE, &wanted).unwrap();
        return;
    }
    assert!(page == wanted, "docs/ascend.md is out of date: run this test with UPDATE=1");
}
