//! Memory that the processes of a run map: the one place where it is touched.
//!
//! A worker that was given up may still write while another one reads, so nobody holds a reference
//! to plain bytes of it: they are copied by atomic words. Read next: `exchange.rs`.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use memmap2::MmapRaw;

/// A whole file in memory.
#[derive(Debug)]
pub(crate) struct Shared(MmapRaw);

impl Shared {
    /// Maps a file as long as it is now.
    pub(crate) fn map(file: &File) -> io::Result<Shared> {
        MmapRaw::map_raw(file).map(Shared)
    }

    /// Copies bytes to a position.
    pub(crate) fn write(&self, position: u64, bytes: &[u8]) -> io::Result<()> {
        let (head, words, tail) = self.place(position, bytes.len())?;
        let (first, rest) = bytes.split_at(head.len());
        let (middle, last) = rest.split_at(8 * words.len());
        let store = |to: &AtomicU8, byte: &u8| to.store(*byte, Ordering::Relaxed);
        head.iter().zip(first).for_each(|(to, byte)| store(to, byte));
        for (to, word) in words.iter().zip(middle.as_chunks::<8>().0) {
            to.store(u64::from_ne_bytes(*word), Ordering::Relaxed);
        }
        tail.iter().zip(last).for_each(|(to, byte)| store(to, byte));
        Ok(())
    }

    /// Copies bytes from a position.
    pub(crate) fn read(&self, position: u64, bytes: &mut [u8]) -> io::Result<()> {
        let (head, words, tail) = self.place(position, bytes.len())?;
        let (first, rest) = bytes.split_at_mut(head.len());
        let (middle, last) = rest.split_at_mut(8 * words.len());
        let load = |from: &AtomicU8, byte: &mut u8| *byte = from.load(Ordering::Relaxed);
        head.iter().zip(first).for_each(|(from, byte)| load(from, byte));
        for (from, word) in words.iter().zip(middle.as_chunks_mut::<8>().0) {
            *word = from.load(Ordering::Relaxed).to_ne_bytes();
        }
        tail.iter().zip(last).for_each(|(from, byte)| load(from, byte));
        Ok(())
    }

    /// A place as atomics: whole words, and what lies before and after them.
    fn place(&self, position: u64, count: usize) -> io::Result<Place<'_>> {
        let start = usize::try_from(position).ok();
        let start =
            start.filter(|start| start.checked_add(count).is_some_and(|end| end <= self.0.len()));
        let Some(start) = start else {
            let text = format!("{count} bytes from {position} on of {}", self.0.len());
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
        };
        // SAFETY: the range lies in the mapping, as was just checked, and the mapping lives as long
        // as `self`. It can be read and written, its file is never made shorter, and atomics may be
        // changed by others; any bytes are a valid word.
        unsafe {
            let first = self.0.as_mut_ptr().add(start).cast::<AtomicU8>();
            let bytes = std::slice::from_raw_parts(first.cast_const(), count);
            Ok(bytes.align_to::<AtomicU64>())
        }
    }
}

/// Bytes, words, bytes.
type Place<'a> = (&'a [AtomicU8], &'a [AtomicU64], &'a [AtomicU8]);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_any_place_and_length_come_back_and_others_stay() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(100).unwrap();
        let (here, there) = (Shared::map(&file).unwrap(), Shared::map(&file).unwrap());
        for position in 0..20 {
            for count in 0..40 {
                here.write(0, &[0xff; 100]).unwrap();
                let bytes: Vec<u8> = (0..count).map(|index| index as u8 + 1).collect();
                here.write(position, &bytes).unwrap();
                let mut all = [0; 100];
                there.read(0, &mut all).unwrap();
                let end = position as usize + bytes.len();
                assert_eq!(all[position as usize..end], bytes);
                let others = all[..position as usize].iter().chain(&all[end..]);
                assert!(others.into_iter().all(|byte| *byte == 0xff), "{position}, {count}");
                let mut found = vec![0; bytes.len()];
                there.read(position, &mut found).unwrap();
                assert_eq!(found, bytes);
            }
        }
    }

    #[test]
    fn what_lies_outside_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(100).unwrap();
        let shared = Shared::map(&file).unwrap();
        shared.write(90, &[1; 10]).unwrap();
        for position in [91, 200, u64::MAX] {
            assert!(shared.write(position, &[1; 10]).is_err());
            assert!(shared.read(position, &mut [0; 10]).is_err());
        }
    }
}
