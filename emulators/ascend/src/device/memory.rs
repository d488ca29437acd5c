//! Device memory: an address space of its own, in which no address is a host address and none is
//! given out twice.
//!
//! So every stale, foreign or stray address is told apart for certain. Contents are in `ffi.rs`.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::code;
use crate::failure::{Done, Failure};
use crate::ffi::Block;
use crate::strict::{self, Breach};

/// Where the first device's addresses begin: beyond what any host gives to a process, so that the
/// host traps when it follows one.
const BASE: u64 = 0x0120 << 44;
/// Addresses of one device.
const DEVICE_SPAN: u64 = 1 << 44;
/// Allocations begin at multiples of this, as those of the driver do.
const ALIGNMENT: u64 = 512;
/// Addresses left unused after each allocation, so that a stray one names nothing.
const GUARD: u64 = 1 << 20;
/// Freed allocations remembered, to name what a stale address was.
const FREED_MAX: usize = 65_536;

/// One allocation.
pub struct Allocation {
    /// Its bytes.
    pub block: Block,
}

/// A range of an allocation.
#[derive(Clone)]
pub struct Place {
    /// The allocation.
    pub allocation: Arc<Allocation>,
    /// Bytes from its start.
    pub offset: usize,
}

#[derive(Default)]
struct Space {
    live: BTreeMap<u64, Arc<Allocation>>,
    freed: BTreeMap<u64, u64>,
    next: u64,
    used: u64,
    peak: u64,
    /// Bytes a leaking device has lost.
    lost: u64,
}

/// The memory of one device.
pub struct Memory {
    device: i32,
    total: u64,
    space: Mutex<Space>,
}

/// The device whose address space holds an address.
pub fn device_of(address: u64) -> Option<i32> {
    let index = address.checked_sub(BASE)? / DEVICE_SPAN;
    (index < 256).then_some(index as i32)
}

impl Memory {
    /// Memory of `total` bytes.
    pub fn new(device: i32, total: u64) -> Memory {
        Memory { device, total, space: Mutex::default() }
    }

    fn space(&self) -> MutexGuard<'_, Space> {
        self.space.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Allocates; contents are no valid numbers.
    pub fn allocate(&self, bytes: u64) -> Done<u64> {
        if bytes == 0 {
            return Err(Failure::parameter("a size of 0 bytes cannot be allocated"));
        }
        let mut space = self.space();
        let free = self.total.saturating_sub(space.used + space.lost);
        let out = |text: String| Err(Failure::new(code::MEMORY_ALLOCATION, text));
        if bytes > free {
            return out(format!("{bytes} bytes were wanted, {free} of {} are free", self.total));
        }
        let Some(block) = usize::try_from(bytes).ok().and_then(Block::new) else {
            return out(format!("the host has no {bytes} bytes for the emulated memory"));
        };
        let start = BASE + self.device as u64 * DEVICE_SPAN + ALIGNMENT.max(space.next);
        space.next = (start % DEVICE_SPAN + bytes + GUARD).next_multiple_of(ALIGNMENT);
        space.used += bytes;
        space.peak = space.peak.max(space.used);
        space.live.insert(start, Arc::new(Allocation { block }));
        Ok(start)
    }

    /// Gives an allocation back.
    pub fn free(&self, start: u64) -> Done {
        let mut space = self.space();
        if let Some(allocation) = space.live.remove(&start) {
            let bytes = allocation.block.len() as u64;
            space.used -= bytes;
            space.freed.insert(start, bytes);
            if space.freed.len() > FREED_MAX {
                space.freed.pop_first();
            }
            return Ok(());
        }
        let (kind, text) = if space.freed.contains_key(&start) {
            (Breach::DoubleFree, format!("address {start:#x} was freed before"))
        } else {
            (Breach::OutOfBounds, format!("address {start:#x} is not the start of an allocation"))
        };
        Err(strict::breach(self.device, kind, Failure::parameter(text)))
    }

    /// Loses bytes for good, as a device does that leaks.
    pub fn lose(&self, bytes: u64) {
        self.space().lost += bytes;
    }

    /// The length of the allocation that starts at an address.
    pub fn length(&self, start: u64) -> Option<u64> {
        self.space().live.get(&start).map(|allocation| allocation.block.len() as u64)
    }

    /// The place of a range of addresses.
    pub fn find(&self, address: u64, bytes: u64, what: &str) -> Done<Place> {
        let space = self.space();
        let before = |map: &BTreeMap<u64, u64>| {
            let (start, len) = map.range(..=address).next_back()?;
            (address < start + len).then_some(*start)
        };
        if let Some((start, allocation)) = space.live.range(..=address).next_back() {
            let (offset, len) = (address - start, allocation.block.len() as u64);
            if offset.checked_add(bytes).is_some_and(|end| end <= len) {
                let place = Place { allocation: Arc::clone(allocation), offset: offset as usize };
                return Ok(place);
            }
            if offset < len {
                let text = format!(
                    "{what}: {bytes} bytes at {address:#x} reach beyond the allocation of {len} \
                     bytes at {start:#x}"
                );
                return Err(self.breach(Breach::OutOfBounds, text));
            }
        }
        if let Some(start) = before(&space.freed) {
            let text = format!("{what}: address {address:#x} lies in memory at {start:#x}, freed");
            return Err(self.breach(Breach::UseAfterFree, text));
        }
        let text = format!("{what}: address {address:#x} lies in no allocation of this device");
        Err(self.breach(Breach::OutOfBounds, text))
    }

    fn breach(&self, kind: Breach, text: String) -> Failure {
        strict::breach(self.device, kind, Failure::parameter(text))
    }

    /// Bytes free and in all.
    pub fn room(&self) -> (u64, u64) {
        let space = self.space();
        (self.total.saturating_sub(space.used + space.lost), self.total)
    }

    /// Drops everything; gives the number and bytes of what was left.
    pub fn reset(&self) -> (usize, u64) {
        let mut space = self.space();
        let left = (space.live.len(), space.used);
        let next = space.next;
        for (start, allocation) in std::mem::take(&mut space.live) {
            space.freed.insert(start, allocation.block.len() as u64);
        }
        let freed = std::mem::take(&mut space.freed);
        *space = Space { next, freed, ..Space::default() };
        left
    }
}
