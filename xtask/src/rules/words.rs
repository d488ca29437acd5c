//! Words that must not stand somewhere: vendors' names (INV-1), and text that is true of one
//! machine only.
//!
//! Does not look at meaning: a vendor's name in a comment counts too, because that is how a
//! special case begins. Read next: `comments.rs`.

use super::finding;
use crate::report::Finding;
use crate::source::Source;

/// Names of accelerator vendors, their chips and their libraries. `cpu` is not a vendor.
const VENDORS: [&str; 27] = [
    "nvidia", "cuda", "cudarc", "cublas", "cublaslt", "cudnn", "cutlass", "nccl", "nvrtc", "nvml",
    "ptx", "ascend", "ascendc", "cann", "acl", "aclnn", "aclrt", "hccl", "huawei", "npu", "vulkan",
    "wgpu", "naga", "wgsl", "rocm", "hipblas", "miopen",
];

/// Folders of one machine that must not be written into the repository.
const MACHINE_PATHS: [&str; 2] = ["/work/", "/root/"];

/// Hosts of package registries: the ordinary clients know them, and mirrors differ by machine.
const REGISTRY_HOSTS: [&str; 6] = [
    "index.crates.io",
    "static.crates.io",
    "pypi.org",
    "files.pythonhosted.org",
    "registry.npmjs.org",
    "proxy.golang.org",
];

/// The only source that `Cargo.lock` may name.
const LOCK_SOURCE: &str = "source = \"registry+https://github.com/rust-lang/crates.io-index\"";

/// Whether a file may name vendors: its own backend or emulator, the list of devices, these rules.
fn may_name_vendors(path: &str) -> bool {
    let parts: Vec<&str> = path.split('/').collect();
    match parts.as_slice() {
        ["backends" | "emulators", vendor, _, ..] => *vendor != "cpu",
        ["xtask", ..] => true,
        _ => path == "crates/cli/src/devices.rs",
    }
}

/// No vendor's name outside its folder.
pub fn vendors(source: &Source) -> Vec<Finding> {
    if may_name_vendors(&source.path) {
        return Vec::new();
    }
    let mut findings = Vec::new();
    for (line, text) in source.lines.iter().enumerate() {
        if let Some(name) = vendor_in(text) {
            let message =
                format!("`{name}` may be named only in its backend, its emulator and cli");
            findings.push(finding(source, line, "vendor", message));
        }
    }
    findings
}

/// The first vendor's name in a line: as a whole word, a part of a `snake_case` or of a
/// `CamelCase` name.
fn vendor_in(text: &str) -> Option<&'static str> {
    let segments = text.split(|c: char| !c.is_alphanumeric()).filter(|segment| !segment.is_empty());
    for segment in segments {
        let lower = segment.to_lowercase();
        let digits_end = lower.trim_end_matches(|c: char| c.is_ascii_digit());
        let parts = camel_parts(segment);
        for vendor in VENDORS {
            let is_part = parts.iter().any(|part| part == vendor);
            if lower == vendor || digits_end == vendor || is_part {
                return Some(vendor);
            }
        }
    }
    None
}

/// The words of a `CamelCase` name in lower case; a new one begins at each capital after a small
/// letter.
fn camel_parts(segment: &str) -> Vec<String> {
    let mut parts: Vec<String> = vec![String::new()];
    let mut after_small = false;
    for character in segment.chars() {
        if character.is_uppercase() && after_small {
            parts.push(String::new());
        }
        after_small = character.is_lowercase();
        let part = parts.last_mut().expect("a first part is always there");
        part.extend(character.to_lowercase());
    }
    parts
}

/// No text that is true of one machine only, in any file.
pub fn machine_text(path: &str, content: &str) -> Vec<Finding> {
    // This file has to spell the words out, and a lock file's checksums are no prose.
    if path == "xtask/src/rules/words.rs" {
        return Vec::new();
    }
    let mut findings = Vec::new();
    for (line, text) in content.lines().enumerate() {
        let mut add = |message: String| {
            let file = path.to_owned();
            findings.push(Finding { file, line: line + 1, rule: "machine", message });
        };
        if let Some(folder) = MACHINE_PATHS.iter().find(|folder| has_path(text, folder)) {
            add(format!("`{folder}` is a folder of one machine"));
        }
        if let Some(host) = REGISTRY_HOSTS.iter().find(|host| text.contains(*host)) {
            add(format!("`{host}` is a registry's host: leave it to the client"));
        }
        let is_source = path.ends_with("Cargo.lock") && text.starts_with("source = ");
        if is_source && text != LOCK_SOURCE {
            add(format!("`{text}` is not the public index"));
        }
    }
    findings
}

/// Whether a text holds an absolute path below a folder; a relative one may share its name.
fn has_path(text: &str, folder: &str) -> bool {
    text.match_indices(folder).any(|(at, _)| {
        let before = text[..at].chars().next_back();
        !before.is_some_and(|c| c.is_alphanumeric() || "._-}*~/".contains(c))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vendor_findings(path: &str, text: &str) -> usize {
        vendors(&Source::new(path, text)).len()
    }

    #[test]
    fn a_vendor_is_named_only_at_home() {
        let text = "use pontoon_cuda::CudaBackend;\n";
        assert_eq!(vendor_findings("crates/ops/src/op.rs", text), 1);
        assert_eq!(vendor_findings("backends/cpu/src/lib.rs", text), 1);
        assert_eq!(vendor_findings("backends/cuda/src/lib.rs", text), 0);
        assert_eq!(vendor_findings("emulators/ascend/src/lib.rs", text), 0);
        assert_eq!(vendor_findings("crates/cli/src/devices.rs", text), 0);
        assert_eq!(vendor_findings("crates/cli/src/main.rs", text), 1);
    }

    #[test]
    fn a_vendor_is_found_in_comments_strings_and_names_but_not_inside_words() {
        let count = |text: &str| vendor_findings("crates/ops/src/op.rs", text);
        for text in ["// As NVIDIA does.", "\"cuda:0\"", "let acl_stream = 1;", "struct AclStream;"]
        {
            assert_eq!(count(text), 1, "{text}");
        }
        for text in ["// ascending, scanned, input", "oracle()", "cpu", "miracle_cannot"] {
            assert_eq!(count(text), 0, "{text}");
        }
    }

    #[test]
    fn folders_of_one_machine_and_registry_hosts_are_found_in_any_file() {
        let found = |text: &str| machine_text("docs/a.md", text).len();
        assert_eq!(found("see /work/main and `/root/.cargo`"), 1);
        assert_eq!(found("cd /root/x\npip install -i https://pypi.org/simple x"), 2);
        assert_eq!(found("net/work/a, ./root/b, $OUT/work/c, https://example.org"), 0);
    }

    #[test]
    fn a_lock_file_names_only_the_public_index() {
        assert!(machine_text("Cargo.lock", LOCK_SOURCE).is_empty());
        assert_eq!(machine_text("Cargo.lock", "source = \"registry+https://mirror/i\"").len(), 1);
    }
}
