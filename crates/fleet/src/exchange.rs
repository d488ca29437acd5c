//! The memory that the processes of one run on one machine share: gradients of subtrees, and the
//! state of a replica on its way to another or to a snapshot.
//!
//! It is a file without a name that children inherit. Gradients, which are exchanged in every step,
//! are copied to and from a mapping of it, which costs no system call; states, which are seldom
//! there and given back, are written and read by position. Either way no process ever holds a
//! reference into memory that another one changes. Who writes what when is decided in
//! `supervisor.rs`.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use crate::map::Shared;
use crate::protocol::Area;
use crate::snapshot::Stored;

/// Where things lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Bytes of one gradient.
    pub gradient: u64,
    /// Leaves of a step.
    pub leaves: u32,
    /// Bytes of a replica's state.
    pub state: u64,
}

impl Layout {
    /// Where the gradient of a subtree lies, by its first leaf.
    pub fn slot(&self, first: u32) -> u64 {
        assert!(first < self.leaves, "a step has {} leaves", self.leaves);
        u64::from(first) * self.gradient
    }

    /// Where a state lies.
    pub fn area(&self, area: Area) -> u64 {
        let slots = u64::from(self.leaves) * self.gradient;
        match area {
            // Nobody joins while a step's state is handed on: one place does for both.
            Area::Join | Area::Step => slots,
            Area::Snapshot => slots + self.state,
        }
    }

    fn bytes(&self) -> u64 {
        self.area(Area::Snapshot) + self.state
    }
}

/// The shared memory; only what was written takes space.
#[derive(Debug)]
pub struct Exchange {
    file: File,
    mapped: Shared,
}

impl Exchange {
    /// New memory, which children of this process inherit.
    pub fn create(layout: &Layout) -> io::Result<Exchange> {
        let file = nameless()?;
        file.set_len(layout.bytes())?;
        rustix::io::fcntl_setfd(file.as_fd(), rustix::io::FdFlags::empty())?;
        Exchange::of(file)
    }

    fn of(file: File) -> io::Result<Exchange> {
        let mapped = Shared::map(&file)?;
        Ok(Exchange { file, mapped })
    }

    /// The number by which a child opens it.
    pub fn descriptor(&self) -> i32 {
        self.file.as_raw_fd()
    }

    /// The memory that the parent made, by its number.
    pub fn inherit(descriptor: i32) -> io::Result<Exchange> {
        let path = PathBuf::from(format!("/dev/fd/{descriptor}"));
        Exchange::of(OpenOptions::new().read(true).write(true).open(path)?)
    }

    /// Writes bytes of a gradient from a position on.
    pub fn write_gradient(&self, position: u64, bytes: &[u8]) -> io::Result<()> {
        self.mapped.write(position, bytes)
    }

    /// Reads bytes of a gradient from a position on.
    pub fn read_gradient(&self, position: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.mapped.read(position, bytes)
    }

    /// Writes bytes of a state from a position on.
    pub fn write(&self, position: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, position)
    }

    /// Reads bytes of a state from a position on.
    pub fn read(&self, position: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, position)
    }

    /// Gives back the memory of bytes that nobody reads any more; where the system cannot, they
    /// stay.
    pub fn release(&self, position: u64, count: u64) {
        give_back(&self.file, position, count);
    }
}

impl Stored for Exchange {
    fn read(&self, position: u64, bytes: &mut [u8]) -> io::Result<()> {
        Exchange::read(self, position, bytes)
    }
}

#[cfg(target_os = "linux")]
fn give_back(file: &File, position: u64, count: u64) {
    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    // What is refused costs memory and nothing else.
    let _ = rustix::fs::fallocate(file, flags, position, count);
}

#[cfg(not(target_os = "linux"))]
fn give_back(_file: &File, _position: u64, _count: u64) {}

#[cfg(target_os = "linux")]
fn nameless() -> io::Result<File> {
    let flags = rustix::fs::MemfdFlags::empty();
    Ok(File::from(rustix::fs::memfd_create("pontoon-exchange", flags)?))
}

#[cfg(not(target_os = "linux"))]
fn nameless() -> io::Result<File> {
    let path = std::env::temp_dir().join(format!(".pontoon-exchange-{}", std::process::id()));
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_opening_writes_another_reads_and_places_do_not_overlap() {
        let layout = Layout { gradient: 100, leaves: 4, state: 1000 };
        let here = Exchange::create(&layout).unwrap();
        let there = Exchange::inherit(here.descriptor()).unwrap();
        let places = [
            (layout.slot(0), 100),
            (layout.slot(3), 100),
            (layout.area(Area::Join), 1000),
            (layout.area(Area::Snapshot), 1000),
        ];
        for (index, (position, size)) in places.into_iter().enumerate() {
            let bytes = vec![index as u8 + 1; size];
            let write = if index < 2 { Exchange::write_gradient } else { Exchange::write };
            write(&here, position, &bytes).unwrap();
        }
        for (index, (position, size)) in places.into_iter().enumerate() {
            // Whichever way it was written, it is there either way.
            for read in [Exchange::read_gradient, Exchange::read] {
                let mut bytes = vec![0; size];
                read(&there, position, &mut bytes).unwrap();
                assert!(bytes.iter().all(|&byte| byte == index as u8 + 1), "place {index}");
            }
        }
        // What is given back comes again as nothing, or as it was; its neighbours stay.
        here.release(layout.area(Area::Join), layout.state);
        for (index, place) in [(1, places[1]), (3, places[3])] {
            let mut bytes = vec![0; place.1];
            there.read(place.0, &mut bytes).unwrap();
            assert!(bytes.iter().all(|&byte| byte == index as u8 + 1), "place {index}");
        }
    }
}
