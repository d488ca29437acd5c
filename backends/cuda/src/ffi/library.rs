//! Where symbols come from: the driver's library and the run-time compiler's, opened when a device
//! is asked for.
//!
//! Opens nothing before, and never closes what it opened: both keep threads and state of their own.
//! Read next: `session.rs`.

use std::path::{Path, PathBuf};

use pontoon_ops::{DeviceError, DeviceErrorKind};

/// The driver's library, by the names the loader may know.
const DRIVERS: [&str; 2] = ["libcuda.so.1", "libcuda.so"];
/// The compiler's library, newest first.
const COMPILERS: [&str; 3] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];
/// Names the compiler's library itself, where it lies at no usual place.
const COMPILER_VARIABLE: &str = "PONTOON_NVRTC";
/// Where a toolkit says it is installed.
const HOMES: [&str; 2] = ["CUDA_HOME", "CUDA_PATH"];
/// Where it is installed if nobody says.
const HOME_DEFAULT: &str = "/usr/local/cuda";

/// The libraries of a machine.
pub struct Library {
    driver: &'static libloading::Library,
    compiler: &'static libloading::Library,
}

impl Library {
    /// Opens the driver, and the compiler: by [`COMPILER_VARIABLE`], by name (the loader's path),
    /// in a toolkit's folder, or among a Python environment's packages.
    pub fn open() -> Result<Library, DeviceError> {
        let driver = DRIVERS.iter().find_map(|name| open_path(Path::new(name)));
        let driver = driver.ok_or_else(|| {
            missing(format!("no driver here: neither {} can be opened", DRIVERS.join(" nor ")))
        })?;
        Ok(Library { driver: keep(driver), compiler: open_compiler()? })
    }

    /// A symbol of the driver.
    pub(super) fn driver<T: Copy>(&self, name: &str) -> Result<T, DeviceError> {
        symbol(self.driver, name)
    }

    /// The compiler's library.
    pub(super) fn compiler(&self) -> &'static libloading::Library {
        self.compiler
    }
}

/// The compiler's library alone: it needs no device.
pub(super) fn open_compiler() -> Result<&'static libloading::Library, DeviceError> {
    if let Some(path) = std::env::var_os(COMPILER_VARIABLE) {
        let path = PathBuf::from(path);
        let shown = path.display();
        return open_beside(&path)
            .map(keep)
            .ok_or_else(|| missing(format!("{COMPILER_VARIABLE}={shown} cannot be opened")));
    }
    let by_name = COMPILERS.iter().find_map(|name| open_path(Path::new(name)));
    let folders = folders();
    let named = |folder: &PathBuf| COMPILERS.iter().find_map(|n| open_beside(&folder.join(n)));
    by_name.or_else(|| folders.iter().find_map(named)).map(keep).ok_or_else(|| {
        let text = format!(
            "no run-time compiler here: {} is not on the loader's path, under CUDA_HOME, CUDA_PATH \
             or {HOME_DEFAULT}, nor in VIRTUAL_ENV's packages; name it by {COMPILER_VARIABLE}",
            COMPILERS[2]
        );
        missing(text)
    })
}

/// Folders that may hold the compiler's library.
fn folders() -> Vec<PathBuf> {
    let homes = HOMES.iter().filter_map(std::env::var_os).map(PathBuf::from);
    let mut all: Vec<PathBuf> = homes
        .chain([PathBuf::from(HOME_DEFAULT)])
        .flat_map(|home| [home.join("lib64"), home.join("targets/x86_64-linux/lib")])
        .collect();
    if let Some(environment) = std::env::var_os("VIRTUAL_ENV") {
        let library = PathBuf::from(environment).join("lib");
        let pythons = inside(&library).into_iter().map(|one| one.join("site-packages/nvidia"));
        all.extend(pythons.flat_map(|one| inside(&one)).map(|package| package.join("lib")));
    }
    all
}

fn inside(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

/// Opens the compiler by its path, after the part of it that it looks for by name only.
fn open_beside(path: &Path) -> Option<libloading::Library> {
    let beside = path.parent().map(inside).unwrap_or_default();
    let is_part = |path: &&PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with("libnvrtc-builtins.so")
    };
    if path.exists()
        && let Some(part) = beside.iter().find(is_part).and_then(|part| open_path(part))
    {
        keep(part);
    }
    open_path(path)
}

fn open_path(path: &Path) -> Option<libloading::Library> {
    // SAFETY: the vendor's libraries run initialisers of their own; the user has installed them
    // and asked for this device.
    unsafe { libloading::Library::new(path) }.ok()
}

/// A function of a library, as the pointer type that the caller states.
pub(super) fn symbol<T: Copy>(library: &libloading::Library, name: &str) -> Result<T, DeviceError> {
    // SAFETY: the address is used with the prototype that the vendor publishes for this name, and
    // libraries are never closed.
    let found = unsafe { library.get::<T>(name) };
    found.map(|symbol| *symbol).map_err(|_| {
        let text = format!("the installed library has no `{name}`; it is of another version");
        DeviceError::new(DeviceErrorKind::Unsupported, text)
    })
}

/// Keeps a library for as long as the process runs: its threads would outlive its code.
fn keep(library: libloading::Library) -> &'static libloading::Library {
    Box::leak(Box::new(library))
}

fn missing(text: String) -> DeviceError {
    DeviceError::new(DeviceErrorKind::Unsupported, text)
}
