//! [`delegate!`](crate::delegate): the methods of a `Backend` that stands before another one and
//! passes most calls on.
//!
//! Adds nothing to a call. Read next: `backend.rs`; a method that is added there is added here.

/// Writes, inside an `impl Backend`, the named methods as calls of the same ones of a field.
///
/// ```ignore
/// impl Backend for Slow {
///     pontoon_ops::delegate!(inner: info alloc free upload download supports wait memory_used);
///
///     fn launch(&mut self, op: &Op) -> Result<(), DeviceError> {
///         std::thread::sleep(self.pause);
///         self.inner.launch(op)
///     }
/// }
/// ```
#[macro_export]
macro_rules! delegate {
    ($field:ident: $($method:ident)*) => { $($crate::delegate!(@$method $field);)* };
    (@info $field:ident) => {
        fn info(&self) -> &$crate::DeviceInfo {
            self.$field.info()
        }
    };
    (@alloc $field:ident) => {
        fn alloc(&mut self, bytes: usize) -> Result<$crate::BufferId, $crate::DeviceError> {
            self.$field.alloc(bytes)
        }
    };
    (@free $field:ident) => {
        fn free(&mut self, buffer: $crate::BufferId) -> Result<(), $crate::DeviceError> {
            self.$field.free(buffer)
        }
    };
    (@upload $field:ident) => {
        fn upload(
            &mut self,
            buffer: $crate::BufferId,
            byte_offset: usize,
            bytes: &[u8],
        ) -> Result<(), $crate::DeviceError> {
            self.$field.upload(buffer, byte_offset, bytes)
        }
    };
    (@download $field:ident) => {
        fn download(
            &mut self,
            buffer: $crate::BufferId,
            byte_offset: usize,
            bytes: &mut [u8],
        ) -> Result<(), $crate::DeviceError> {
            self.$field.download(buffer, byte_offset, bytes)
        }
    };
    (@mapped $field:ident) => {
        fn mapped(
            &mut self,
            buffer: $crate::BufferId,
            byte_offset: usize,
            bytes: usize,
        ) -> Result<Option<&mut [u8]>, $crate::DeviceError> {
            self.$field.mapped(buffer, byte_offset, bytes)
        }
    };
    (@digest $field:ident) => {
        fn digest(
            &mut self,
            buffer: $crate::BufferId,
            byte_offset: usize,
            bytes: usize,
        ) -> Result<u64, $crate::DeviceError> {
            self.$field.digest(buffer, byte_offset, bytes)
        }
    };
    (@supports $field:ident) => {
        fn supports(&self, op: &$crate::Op) -> $crate::Support {
            self.$field.supports(op)
        }
    };
    (@launch $field:ident) => {
        fn launch(&mut self, op: &$crate::Op) -> Result<(), $crate::DeviceError> {
            self.$field.launch(op)
        }
    };
    (@sums_in_place $field:ident) => {
        fn sums_in_place(&self) -> bool {
            self.$field.sums_in_place()
        }
    };
    (@sums $field:ident) => {
        fn sums(&mut self, views: &[$crate::View]) -> Result<Vec<u32>, $crate::DeviceError> {
            self.$field.sums(views)
        }
    };
    (@prepack $field:ident) => {
        fn prepack(&mut self, op: &$crate::Op) -> Result<(), $crate::DeviceError> {
            self.$field.prepack(op)
        }
    };
    (@wait $field:ident) => {
        fn wait(&mut self, deadline: std::time::Duration) -> Result<(), $crate::DeviceError> {
            self.$field.wait(deadline)
        }
    };
    (@memory_used $field:ident) => {
        fn memory_used(&self) -> usize {
            self.$field.memory_used()
        }
    };
}
