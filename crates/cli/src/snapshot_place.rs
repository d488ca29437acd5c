//! Where snapshots are kept: a folder of this machine, or a store where this program was built with
//! one.
//!
//! Read next: `crates/fleet/src/store.rs`.

use std::path::Path;

use anyhow::Result;
use pontoon_fleet::world::{Disk, RealDisk};

/// The disk that reaches snapshots in `place`; `staging` is a folder for those in the making.
#[cfg(feature = "s3")]
pub fn disk_of(place: &Path, staging: &Path) -> Result<Box<dyn Disk>> {
    match pontoon_fleet::snapshot::is_url(place) {
        true => Ok(Box::new(pontoon_fleet::store::StoreDisk::open(place, staging, &RealDisk)?)),
        false => Ok(Box::new(RealDisk)),
    }
}

/// The disk that reaches snapshots in `place`.
#[cfg(not(feature = "s3"))]
pub fn disk_of(place: &Path, _staging: &Path) -> Result<Box<dyn Disk>> {
    let text = place.display();
    anyhow::ensure!(
        !pontoon_fleet::snapshot::is_url(place),
        "cannot keep snapshots in `{text}`: this program was built without the feature s3"
    );
    Ok(Box::new(RealDisk))
}
