//! What a C caller passes, as types that can be read and written safely as far as that is
//! possible: null is refused, handles are looked up and never followed.
//!
//! The caller upholds what C always asks for: a pointer that is not null points to what its type
//! says. All other checks are the library's. No other file follows a caller's pointer.

use std::ffi::{CStr, c_char};

use crate::failure::{Done, Failure};

/// Where a result goes.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Out<T>(*mut T);

impl<T> Out<T> {
    /// Puts the result there.
    pub fn set(self, value: T, code: i32, name: &str) -> Done {
        if self.0.is_null() {
            return Err(Failure::new(code, format!("`{name}` is null")));
        }
        // SAFETY: the caller passes a pointer to a T that it may write.
        unsafe { self.0.write(value) };
        Ok(())
    }

    /// Whether the caller passed null.
    pub fn is_null(&self) -> bool {
        self.0.is_null()
    }

    /// Puts several results there.
    pub fn set_many(self, values: impl IntoIterator<Item = T>) {
        for (index, value) in values.into_iter().enumerate() {
            // SAFETY: the caller passes room for as many as it says; `values` holds no more.
            unsafe { self.0.add(index).write(value) }
        }
    }
}

/// An array that is read.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Many<T>(*const T);

impl<T: Copy> Many<T> {
    /// Reads `count` elements; none from null.
    pub fn read(self, count: usize) -> Option<Vec<T>> {
        if self.0.is_null() {
            return None;
        }
        // SAFETY: the caller passes at least `count` initialised elements.
        Some((0..count).map(|index| unsafe { self.0.add(index).read() }).collect())
    }
}

/// A text that ends with a zero.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Text(*const c_char);

impl Text {
    /// Reads it; an empty one from null.
    pub fn read(self) -> String {
        if self.0.is_null() {
            return String::new();
        }
        // SAFETY: the caller passes a text that ends with a zero.
        unsafe { CStr::from_ptr(self.0) }.to_string_lossy().into_owned()
    }
}

/// Host memory of the caller.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host(pub usize);

impl Host {
    /// Copies bytes from there.
    pub fn read(self, bytes: usize) -> Vec<u8> {
        let mut to = vec![0; bytes];
        let from = std::ptr::with_exposed_provenance::<u8>(self.0);
        // SAFETY: the caller passes memory that holds as many bytes as it says.
        unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), bytes) };
        to
    }

    /// Copies bytes there.
    pub fn write(self, bytes: &[u8]) {
        let to = std::ptr::with_exposed_provenance_mut::<u8>(self.0);
        // SAFETY: the caller passes memory that may be written for as many bytes as it says.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
    }
}
