//! Scalars for TensorBoard: TFRecord files of `Event` messages, written by hand as there are only
//! three fields.
//!
//! Format: each record is u64 length, masked CRC-32C of it, the bytes, masked CRC-32C of them
//! (TensorFlow, `tfrecord` documentation); messages are protocol buffers (`event.proto`,
//! `summary.proto`). Read next: `trainer.rs`.

use std::io::Write;
use std::path::Path;

use pontoon_fleet::world::{Disk, DiskFile};

use crate::error::TrainError;

/// An open file of events.
pub(crate) struct TensorBoard {
    file: Box<dyn DiskFile>,
    path: std::path::PathBuf,
}

impl TensorBoard {
    /// Begins a file in the run folder's `tb`; a resumed run begins another.
    pub(crate) fn create(disk: &dyn Disk, dir: &Path, unix: f64) -> Result<Self, TrainError> {
        let folder = dir.join("tb");
        let wrong = |path: &Path| {
            let path = path.to_owned();
            move |source| TrainError::WriteFile { path, source }
        };
        disk.create_dir_all(&folder).map_err(wrong(&folder))?;
        let path = folder.join(format!("events.out.tfevents.{:.0}.pontoon", unix * 1000.0));
        let file = disk.create_file(&path).map_err(wrong(&path))?;
        let mut board = TensorBoard { file, path };
        let mut event = double(1, unix);
        event.extend(bytes(3, b"brain.Event:2"));
        board.record(&event)?;
        Ok(board)
    }

    /// Appends the scalars of a step.
    pub(crate) fn scalars(
        &mut self,
        unix: f64,
        step: u64,
        values: &[(&str, f64)],
    ) -> Result<(), TrainError> {
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut one = bytes(1, tag.as_bytes());
            one.push(2 << 3 | 5);
            one.extend((*value as f32).to_le_bytes());
            summary.extend(bytes(1, &one));
        }
        let mut event = double(1, unix);
        event.push(2 << 3);
        event.extend(varint(step));
        event.extend(bytes(5, &summary));
        self.record(&event)
    }

    fn record(&mut self, event: &[u8]) -> Result<(), TrainError> {
        let length = (event.len() as u64).to_le_bytes();
        let mut record = length.to_vec();
        record.extend(masked_crc(&length).to_le_bytes());
        record.extend(event);
        record.extend(masked_crc(event).to_le_bytes());
        let written = self.file.write_all(&record).and_then(|()| self.file.flush());
        written.map_err(|source| TrainError::WriteFile { path: self.path.clone(), source })
    }
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
    out
}

fn bytes(field: u8, content: &[u8]) -> Vec<u8> {
    let mut out = vec![field << 3 | 2];
    out.extend(varint(content.len() as u64));
    out.extend(content);
    out
}

fn double(field: u8, value: f64) -> Vec<u8> {
    let mut out = vec![field << 3 | 1];
    out.extend(value.to_le_bytes());
    out
}

fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), bit by bit: a step writes some hundred bytes.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = !0_u32;
    for &byte in bytes {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_the_published_one() {
        // RFC 3720, appendix B.4.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&(0..32).collect::<Vec<u8>>()), 0x46dd_794e);
    }
}
