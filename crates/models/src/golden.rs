//! Where the golden files lie, for tests only; `tests/golden/make_goldens.py` makes them.

use std::path::{Path, PathBuf};

/// Every model case.
pub(crate) const CASES: [&str; 12] = [
    "llama2",
    "llama3",
    "llama_linear",
    "llama_dynamic",
    "llama_yarn",
    "llama_bias",
    "qwen3",
    "qwen3_moe",
    "qwen3_moe_mixed",
    "deepseek_v3",
    "deepseek_v3_plain_mtp",
    "deepseek_v3_fp8",
];

/// Tokens in each of the two sequences of a case.
pub(crate) const TOKENS: usize = 13;

/// The folder of golden data with this name.
pub(crate) fn folder(name: &str) -> PathBuf {
    root().join("data").join(name)
}

/// The folder that holds all of it.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden")
}
