//! The page that says what each device supports, made from runs of the conformance suite.
//!
//! Runs nothing. Read next: `suite.rs`, `exchange.rs`.

use std::collections::BTreeSet;
use std::fmt::Write;

use pontoon_ops::{DType, OpName};

use crate::exchange::Exchange;
use crate::suite::{Conformance, Row, Unsupported};

/// What was found of one device.
pub struct Column {
    /// As the user names it.
    pub device: String,
    /// Within which equal inputs give equal bits.
    pub numeric_class: String,
    /// Whether it is emulated.
    pub emulated: bool,
    /// The suite on it alone.
    pub conformance: Conformance,
    /// Its exchanges with another one of its kind.
    pub exchange: Exchange,
}

/// What devices of a kind refuse under some condition.
pub struct Waiver {
    /// The first device of the kind.
    pub device: String,
    /// The condition's name.
    pub when: String,
    /// Operations.
    pub ops: String,
    /// Why.
    pub reason: String,
}

/// Everything that the page tells.
pub struct Sheet {
    /// The day of the runs.
    pub date: String,
    /// The machine's class.
    pub machine: String,
    /// What was typed.
    pub command: String,
    /// Decides the inputs.
    pub seed: u64,
    /// The devices.
    pub columns: Vec<Column>,
    /// What they would refuse elsewhere.
    pub waivers: Vec<Waiver>,
}

impl Column {
    fn rows(&self) -> impl Iterator<Item = &Row> {
        self.conformance.rows.iter().chain(&self.exchange.rows)
    }

    fn unsupported(&self) -> impl Iterator<Item = &Unsupported> {
        self.conformance.unsupported.iter().chain(&self.exchange.unsupported)
    }

    /// What the suite or the exchange ended with before its end.
    fn stops(&self) -> impl Iterator<Item = &String> {
        self.conformance.stopped.iter().chain(&self.exchange.failure)
    }

    fn cell(&self, op: OpName, dtype: DType) -> String {
        let own = || self.rows().filter(|row| row.op == op.name() && row.dtype == dtype.name());
        let refused = self.unsupported().any(|o| o.op == op.name() && o.dtype == dtype.name());
        let cases = own().filter(|row| row.check == "correct").map(|row| row.cases).sum::<usize>();
        match () {
            () if own().any(|row| !row.ok) => "**fails**".to_owned(),
            () if refused && cases == 0 => "no".to_owned(),
            () if refused => format!("{cases}, else no"),
            () if cases == 0 => "–".to_owned(),
            () => cases.to_string(),
        }
    }
}

/// The page, as Markdown.
pub fn page(sheet: &Sheet) -> String {
    let mut page = String::new();
    let Sheet { date, machine, command, seed, .. } = sheet;
    push(
        &mut page,
        format_args!(
            "# What each device supports\n\nMade by `{command}` on {date}; do not edit. Machine: \
             {machine}. Seed of the inputs: {seed}.\n\n\
             A number is how many cases of the operation in that dtype were computed and passed \
             every check: *correct* (each element against the f64 twin, within its tolerance, and \
             no stray byte), *repeat* (the same bits again), and where they apply *gradient* \
             (against central differences, in f32), *invariance* (a row's bits do not depend on \
             its batch) and *agreement* (two devices hold the sum along the contract's tree). `–`: \
             there is no case in that dtype: the contract names none. `no`: refused, for a reason \
             below. The dtype is the one computed in; operands of other dtypes (quantised \
             weights, f32 masters and logits) are part of the cases. The three exchanges ran \
             between two devices of the same name or of neighbouring numbers.\n\n"
        ),
    );
    devices(&mut page, sheet);
    table(&mut page, sheet);
    exceptions(&mut page, sheet);
    page
}

fn devices(page: &mut String, sheet: &Sheet) {
    page.push_str("| device | class | on silicon | checks | failed |\n|---|---|---|---|---|\n");
    for column in &sheet.columns {
        let silicon = if column.emulated { "no, emulated on the host" } else { "yes" };
        let checks: usize = column.rows().map(|row| row.cases).sum();
        let failed = column.rows().filter(|row| !row.ok).count();
        let (device, class) = (&column.device, &column.numeric_class);
        push(page, format_args!("| `{device}` | {class} | {silicon} | {checks} | {failed} |\n"));
    }
    page.push('\n');
}

fn table(page: &mut String, sheet: &Sheet) {
    let mut rule = "|---|---|".to_owned();
    page.push_str("| operation | checks |");
    for column in &sheet.columns {
        let short = column.device.rsplit('=').next().unwrap_or(&column.device);
        for dtype in DType::FLOATS {
            push(page, format_args!(" {short} {dtype} |"));
            rule += "--:|";
        }
    }
    push(page, format_args!("\n{rule}\n"));
    for &op in OpName::ALL {
        let rows = sheet.columns.iter().flat_map(Column::rows).filter(|row| row.op == op.name());
        let done: BTreeSet<&str> = rows.map(|row| row.check).collect();
        let checks = ["correct", "repeat", "gradient", "invariance", "agreement"];
        let checks: Vec<&str> = checks.into_iter().filter(|check| done.contains(check)).collect();
        push(page, format_args!("| {} | {} |", op.name(), checks.join(", ")));
        for column in &sheet.columns {
            for dtype in DType::FLOATS {
                push(page, format_args!(" {} |", column.cell(op, dtype)));
            }
        }
        page.push('\n');
    }
}

/// What failed, what was refused, and what would be refused elsewhere.
fn exceptions(page: &mut String, sheet: &Sheet) {
    let mut items = Vec::new();
    for column in &sheet.columns {
        let device = &column.device;
        items.extend(column.stops().map(|stop| format!("`{device}`: ended early: {stop}")));
        items.extend(column.rows().filter(|row| !row.ok).map(|row| {
            let Row { op, dtype, check, case, detail, .. } = row;
            format!("`{device}`: {op} {dtype} fails *{check}* ({case}): {detail}")
        }));
        items.extend(column.unsupported().map(|one| {
            let Unsupported { op, dtype, reason } = one;
            format!("`{device}`: {op} {dtype} is not supported: {reason}")
        }));
    }
    page.push_str("\n## Refused or failed in these runs\n\n");
    if items.is_empty() {
        page.push_str("Nothing.\n");
    }
    items.iter().for_each(|item| push(page, format_args!("- {item}\n")));
    page.push_str(
        "\n## Waivers\n\nWhat devices would refuse under conditions that did not hold in these \
         runs, from their `waivers.toml`:\n\n",
    );
    if sheet.waivers.is_empty() {
        page.push_str("None.\n");
    }
    for Waiver { device, when, ops, reason } in &sheet.waivers {
        push(page, format_args!("- kind of `{device}`, {when}: {ops}: {reason}\n"));
    }
}

fn push(page: &mut String, text: std::fmt::Arguments<'_>) {
    page.write_fmt(text).expect("a string takes any text");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(op: &'static str, dtype: &str, ok: bool) -> Row {
        let (dtype, case, detail) = (dtype.to_owned(), "odd".to_owned(), "is wrong".to_owned());
        let (check, worst_error, limit, cases) = ("correct", 0.5, 1.0, 7);
        Row { op, dtype, check, worst_error, limit, ok, cases, case, detail }
    }

    fn sheet(conformance: Conformance) -> Sheet {
        let exchange =
            Exchange { rows: vec![row("AllReduce", "f32", true)], ..Exchange::default() };
        let (device, numeric_class) = ("cpu:isa=x".to_owned(), "cpu/x".to_owned());
        let column = Column { device, numeric_class, emulated: false, conformance, exchange };
        let [date, machine, command] = ["today", "a desk", "qualify"].map(str::to_owned);
        Sheet { date, machine, command, seed: 1, columns: vec![column], waivers: Vec::new() }
    }

    #[test]
    fn every_operation_has_a_row_and_what_fails_or_is_refused_is_named() {
        let reason = "it has no kernel".to_owned();
        let one = Unsupported { op: "Muon", dtype: "f32".to_owned(), reason };
        let rows = vec![row("Copy", "f32", true), row("Copy", "bf16", false)];
        let suite = Conformance { rows, unsupported: vec![one], ..Conformance::default() };
        let page = page(&sheet(suite));
        for op in OpName::ALL {
            assert!(page.contains(&format!("\n| {} |", op.name())), "{op:?}");
        }
        assert!(page.contains("| Copy | correct | 7 | **fails** | – |"), "{page}");
        assert!(page.contains("| Muon |  | no | – | – |"), "{page}");
        assert!(page.contains("| AllReduce | correct | 7 | – | – |"), "{page}");
        assert!(page.contains("Muon f32 is not supported: it has no kernel"), "{page}");
        assert!(page.contains("Copy bf16 fails *correct* (odd): is wrong"), "{page}");
    }

    /// The page is made again by `cargo xtask support`.
    #[test]
    fn the_published_page_has_every_operation_of_the_waist_and_no_failure() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/support.md");
        let page = std::fs::read_to_string(path).unwrap();
        for op in OpName::ALL {
            let row =
                page.lines().find(|line| line.starts_with(&format!("| {} | correct", op.name())));
            assert!(row.is_some(), "docs/support.md lacks {op:?}: run `cargo xtask support`");
        }
        let rows =
            page.lines().filter(|line| line.starts_with("| ") && line.contains(" | correct"));
        assert_eq!(rows.count(), OpName::ALL.len(), "docs/support.md: run `cargo xtask support`");
        assert!(!page.contains("**fails**") && !page.contains("ended early"));
    }
}
