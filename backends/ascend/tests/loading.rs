//! Opening libraries from a toolkit's folder, as with CANN installed: the emulator's dynamic
//! library stands there under CANN's names.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use pontoon_ascend::{AscendBackend, Library};
use pontoon_ops::{Backend, DType, DeviceErrorKind, Scale, View};

/// The emulator as a dynamic library, which is built beside this test.
fn emulator() -> PathBuf {
    let folder = std::env::current_exe().unwrap().parent().unwrap().to_path_buf();
    let is_ours = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        name.starts_with("libpontoon_emu_ascend") && name.ends_with(".so")
    };
    let files = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<PathBuf> = files.filter(is_ours).collect();
    found.sort_by_key(|path| std::fs::metadata(path).unwrap().modified().unwrap());
    found.pop().expect("cargo builds a dependency's dynamic library too")
}

/// A toolkit's folder with some of CANN's libraries.
fn toolkit(names: &[&str]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let libraries = folder.path().join("lib64");
    std::fs::create_dir(&libraries).unwrap();
    for name in names {
        std::os::unix::fs::symlink(emulator(), libraries.join(name)).unwrap();
    }
    folder
}

fn open(home: &Path) -> Result<Library, pontoon_ops::DeviceError> {
    Library::open_from(&[home.to_path_buf()])
}

#[test]
fn libraries_in_a_toolkits_folder_are_opened_and_work() {
    let home = toolkit(&["libascendcl.so", "libnnopbase.so", "libopapi.so", "libopapi_math.so"]);
    let library = Arc::new(open(home.path()).unwrap());
    assert!(AscendBackend::count(&library).unwrap() >= 1);
    let mut backend = AscendBackend::open(&library, "ascend:0", 0).unwrap();
    let x = View::contiguous(backend.alloc(16).unwrap(), DType::F32, [4]);
    backend.upload(x.buffer, 0, &3_f32.to_le_bytes().repeat(4)).unwrap();
    backend.launch(&Scale { x, factor: 2.0, y: x }.into()).unwrap();
    backend.wait(Duration::from_secs(10)).unwrap();
    let mut bytes = [0; 16];
    backend.download(x.buffer, 0, &mut bytes).unwrap();
    assert_eq!(bytes, *6_f32.to_le_bytes().repeat(4));
    assert!(backend.info().emulated, "{}", backend.info().chip);
    let many = AscendBackend::open(&library, "ascend:99", 99).map(drop).unwrap_err();
    assert_eq!(many.kind, DeviceErrorKind::BadArgument);
}

#[test]
fn what_is_missing_is_named_in_one_line() {
    let nothing = open(Path::new("/nonexistent")).map(drop).unwrap_err();
    assert!(nothing.text.contains("libascendcl.so"), "{nothing}");
    let half = toolkit(&["libascendcl.so", "libnnopbase.so"]);
    let error = open(half.path()).map(drop).unwrap_err();
    assert_eq!(error.kind, DeviceErrorKind::Unsupported);
    assert!(error.text.contains("libopapi.so") && !error.text.contains('\n'), "{error}");
    let broken = toolkit(&[]);
    std::fs::write(broken.path().join("lib64/libascendcl.so"), b"no library").unwrap();
    assert!(open(broken.path()).map(drop).unwrap_err().text.contains("libascendcl.so"));
}
