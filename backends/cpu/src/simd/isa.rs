//! Which instruction set runs: detection, the override for tests, and the entry into kernels.
//!
//! Nothing here computes; the sets themselves are in the sibling files.

use super::{Kernel, Simd, portable};

/// The environment variable that forces an instruction set.
pub const ISA_VARIABLE: &str = "PONTOON_CPU_ISA";

/// An instruction set this build knows and this CPU has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Isa(Set);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Set {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    #[cfg(target_arch = "aarch64")]
    Neon,
}

/// Why an instruction set cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IsaError {
    /// The name is not one of those known.
    Unknown {
        /// What was asked for.
        name: String,
    },
    /// The name is known, but this CPU (or this build's architecture) lacks it.
    Missing {
        /// What was asked for.
        name: String,
        /// What could be asked for here.
        have: Vec<&'static str>,
    },
}

impl std::error::Error for IsaError {}

impl std::fmt::Display for IsaError {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            IsaError::Unknown { name } => {
                let known = NAMES.join(", ");
                write!(out, "unknown instruction set `{name}`; known are {known}")
            }
            IsaError::Missing { name, have } => {
                let have = have.join(", ");
                write!(out, "this CPU has no `{name}`; it has {have}")
            }
        }
    }
}

/// Every name that some build knows, slowest first.
const NAMES: [&str; 5] = ["portable", "neon", "avx2", "avx512", "avx512-bf16"];

/// Sizes of a set's vectors and register tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// f32 values in one vector.
    pub lanes: usize,
    /// Rows of the register tile of matrix products.
    pub micro_rows: usize,
    /// Columns of the register tile: two vectors.
    pub micro_columns: usize,
}

struct Measure;

impl Kernel for Measure {
    type Output = Geometry;
    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) -> Geometry {
        Geometry { lanes: S::LANES, micro_rows: S::MICRO_ROWS, micro_columns: 2 * S::LANES }
    }
}

impl Isa {
    /// The set of plain Rust, which every CPU has.
    pub const PORTABLE: Isa = Isa(Set::Portable);

    /// The fastest set of this CPU, or the one that `PONTOON_CPU_ISA` names.
    pub fn detect() -> Result<Isa, IsaError> {
        match std::env::var(ISA_VARIABLE) {
            Ok(name) if !name.is_empty() => Isa::from_name(&name),
            _ => Ok(*Isa::available().last().expect("the portable set is always available")),
        }
    }

    /// The set of that name, if this CPU has it.
    pub fn from_name(name: &str) -> Result<Isa, IsaError> {
        let available = Isa::available();
        if let Some(isa) = available.iter().find(|isa| isa.name() == name) {
            return Ok(*isa);
        }
        let name = name.to_owned();
        if !NAMES.contains(&name.as_str()) {
            return Err(IsaError::Unknown { name });
        }
        Err(IsaError::Missing { name, have: available.iter().map(|isa| isa.name()).collect() })
    }

    /// Every set this CPU has, slowest first.
    pub fn available() -> Vec<Isa> {
        let mut sets = vec![Isa::PORTABLE];
        #[cfg(target_arch = "x86_64")]
        {
            use super::{avx2, avx512};
            if avx2::is_present() {
                sets.push(Isa(Set::Avx2));
            }
            if avx512::is_present() {
                sets.push(Isa(Set::Avx512));
            }
            if avx512::is_present() && avx512::is_bf16_present() {
                sets.push(Isa(Set::Avx512Bf16));
            }
        }
        #[cfg(target_arch = "aarch64")]
        if super::neon::is_present() {
            sets.push(Isa(Set::Neon));
        }
        sets
    }

    /// The name that `PONTOON_CPU_ISA` takes.
    pub fn name(self) -> &'static str {
        match self.0 {
            Set::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512Bf16 => "avx512-bf16",
            #[cfg(target_arch = "aarch64")]
            Set::Neon => "neon",
        }
    }

    /// Whether products of bf16 matrices use the hardware's dot product of pairs.
    pub fn has_bf16_dot(self) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Set::Avx512Bf16 => true,
            _ => false,
        }
    }

    /// Vector and tile sizes.
    pub fn geometry(self) -> Geometry {
        dispatch(self, Measure)
    }
}

/// Runs a kernel compiled for `isa`.
#[inline]
pub fn dispatch<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    match isa.0 {
        Set::Portable => kernel.run(portable::Portable),
        // SAFETY: an `Isa` other than the portable one is only made after its detection succeeded.
        #[cfg(target_arch = "x86_64")]
        Set::Avx2 => unsafe { super::avx2::enter(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Set::Avx512 => unsafe { super::avx512::enter(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Set::Avx512Bf16 => unsafe { super::avx512::enter_bf16(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Set::Neon => unsafe { super::neon::enter(kernel) },
    }
}
