//! The dynamic library under the names of the vendor's, opened as a backend opens those.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use pontoon_ascend::{AscendBackend, Library};
use pontoon_ops::{Add, Backend, DType, View};

/// The vendor's names for the parts of its library.
const NAMES: [&str; 4] = ["libascendcl.so", "libnnopbase.so", "libopapi.so", "libhccl.so"];

/// The library that was built beside this test.
fn built() -> PathBuf {
    let mut folder = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    loop {
        let path = folder.join("libpontoon_emu_ascend.so");
        if path.exists() {
            return path;
        }
        assert!(folder.pop(), "the dynamic library was not built");
    }
}

/// Set in the child that has the library on its path.
const CHILD: &str = "PONTOON_EMU_CHILD";

#[test]
fn a_folder_of_the_vendors_names_serves_the_backend_that_opens_them() {
    if std::env::var_os(CHILD).is_some() {
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let folder = home.path().join("lib64");
    std::fs::create_dir(&folder).unwrap();
    for name in NAMES {
        std::os::unix::fs::symlink(built(), folder.join(name)).unwrap();
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "in_a_child_the_backend_adds_on_the_opened_library", "--nocapture"])
        .env("ASCEND_HOME_PATH", home.path())
        .env("PONTOON_EMU_FAULTS", r#"{"kind": "no_kernel", "op": "aclnnExp"}"#)
        .env(CHILD, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{text}");
}

#[test]
fn in_a_child_the_backend_adds_on_the_opened_library() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let library = Arc::new(Library::open().unwrap());
    let mut backend = AscendBackend::open(&library, "ascend:0", 0).unwrap();
    assert!(backend.info().chip.to_lowercase().contains("emulated"));
    let [a, y] = [0, 1].map(|_| View::contiguous(backend.alloc(16).unwrap(), DType::F32, [4]));
    let ones: Vec<u8> = [1.5_f32; 4].iter().flat_map(|value| value.to_le_bytes()).collect();
    backend.upload(a.buffer, 0, &ones).unwrap();
    backend.launch(&Add { a, b: a, y }.into()).unwrap();
    let mut bytes = [0; 16];
    backend.download(y.buffer, 0, &mut bytes).unwrap();
    assert_eq!(f32::from_le_bytes(bytes[..4].try_into().unwrap()), 3.0);
}
