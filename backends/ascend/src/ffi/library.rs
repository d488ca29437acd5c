//! Where symbols come from: CANN's shared libraries, opened at run time, or a lookup that was
//! linked into the program (the emulator's).
//!
//! Opens nothing before it is asked to, and never closes what it opened: the vendor's libraries
//! keep threads of their own. Read next: `session.rs`.

use std::collections::HashMap;
use std::ffi::c_void;
use std::path::PathBuf;
use std::sync::Mutex;

use pontoon_ops::{DeviceError, DeviceErrorKind};

/// Finds a symbol by its name.
pub type Lookup = fn(&str) -> Option<*const c_void>;

/// Libraries without which nothing works, and what each holds.
const NEEDED: [(&str, &str); 3] = [
    ("libascendcl.so", "the runtime"),
    ("libnnopbase.so", "descriptors and executors"),
    ("libopapi.so", "the operators"),
];
/// Libraries that add operators or collectives where they are installed.
const ADDED: [&str; 2] = ["libcust_opapi.so", "libhccl.so"];
/// Where the toolkit's set-up script says it is installed.
const HOMES: [&str; 2] = ["ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"];

/// The source of all symbols of a device.
pub struct Library {
    source: Source,
    /// What was looked for and found, as addresses; 0 where it is missing.
    found: Mutex<HashMap<String, usize>>,
}

enum Source {
    Linked(Lookup),
    Opened(Vec<libloading::Library>),
}

impl Library {
    /// A library that is linked into the program.
    pub fn linked(lookup: Lookup) -> Library {
        Library { source: Source::Linked(lookup), found: Mutex::default() }
    }

    /// Opens CANN's libraries: by name (the loader's path), else where the environment says that
    /// the toolkit is installed.
    pub fn open() -> Result<Library, DeviceError> {
        let homes: Vec<PathBuf> =
            HOMES.iter().filter_map(std::env::var_os).map(PathBuf::from).collect();
        Library::open_from(&homes)
    }

    /// The same with the toolkit's folders given.
    pub fn open_from(homes: &[PathBuf]) -> Result<Library, DeviceError> {
        let folders: Vec<PathBuf> = homes.iter().map(|home| home.join("lib64")).collect();
        let open_one = |name: &str| {
            let places = folders.iter().map(|folder| folder.join(name));
            std::iter::once(PathBuf::from(name)).chain(places).find_map(|path| open_path(&path))
        };
        let mut libraries = Vec::new();
        for (name, what) in NEEDED {
            libraries.push(open_one(name).ok_or_else(|| missing(name, what))?);
        }
        libraries.extend(parts(&folders).into_iter().filter_map(|path| open_path(&path)));
        libraries.extend(ADDED.iter().filter_map(|name| open_one(name)));
        Ok(Library { source: Source::Opened(libraries), found: Mutex::default() })
    }

    /// A symbol's address, if some library has it.
    pub fn find(&self, name: &str) -> Option<*const c_void> {
        let mut found = self.found.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let address = match found.get(name) {
            Some(address) => *address,
            None => {
                let address = self.search(name).map_or(0, |pointer| pointer as usize);
                found.insert(name.to_owned(), address);
                address
            }
        };
        (address != 0).then_some(address as *const c_void)
    }

    fn search(&self, name: &str) -> Option<*const c_void> {
        match &self.source {
            Source::Linked(lookup) => lookup(name),
            Source::Opened(libraries) => libraries.iter().find_map(|library| {
                // SAFETY: only the address is taken; it is called with the prototype that the
                // table states, which `cargo xtask ascend-abi` compares with the headers.
                let symbol = unsafe { library.get::<*const c_void>(name) }.ok()?;
                // SAFETY: libraries are never closed, so the address stays valid.
                let address = unsafe { symbol.try_as_raw_ptr()? };
                Some(address.cast_const())
            }),
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        if let Source::Opened(libraries) = self {
            libraries.drain(..).for_each(std::mem::forget);
        }
    }
}

/// The error of a symbol that an operation needs and no library has.
pub fn lacks(symbol: &str) -> DeviceError {
    let text = format!("the installed library has no `{symbol}`; it is of another version");
    DeviceError::new(DeviceErrorKind::Unsupported, text)
}

fn missing(name: &str, what: &str) -> DeviceError {
    let text = format!("CANN is not installed here: {name} ({what}) cannot be opened");
    DeviceError::new(DeviceErrorKind::Unsupported, text)
}

fn open_path(path: &std::path::Path) -> Option<libloading::Library> {
    // SAFETY: the vendor's libraries run initialisers of their own; the user has installed them
    // and asked for this device, and nothing else opens them.
    unsafe { libloading::Library::new(path) }.ok()
}

/// Every part of the operator library that newer toolkits split it into.
fn parts(folders: &[PathBuf]) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = folders
        .iter()
        .filter_map(|folder| std::fs::read_dir(folder).ok())
        .flat_map(|entries| entries.flatten())
        .map(|entry| entry.path())
        .filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            name.starts_with("libopapi_") && name.ends_with(".so")
        })
        .collect();
    paths.sort();
    paths.dedup();
    paths
}
