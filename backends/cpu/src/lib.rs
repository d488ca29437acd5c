//! The CPU backend: SIMD kernels behind the waist, deterministic at any thread count.
//!
//! Kernels are generic over `simd::Simd`; matrix products are in `gemm`.

pub mod ffi;
pub mod gemm;
pub mod peak;
pub mod pool;
pub mod scratch;
pub mod simd;
