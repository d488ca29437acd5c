//! Kernels by need: a source with its definitions is compiled when an operation first asks for it,
//! and kept on the device.
//!
//! Nothing is kept on disk. Read next: `ops.rs`, then `../kernels/`.

use std::collections::HashMap;
use std::ffi::CStr;

use pontoon_ops::{DType, DeviceError};

use crate::ffi::compiler::Compiler;
use crate::ffi::session::{Function, Module, Session};

/// What every source begins with.
const COMMON: &str = include_str!("../kernels/common.cuh");
/// What those for the tensor cores go on with.
const TENSOR: &str = include_str!("../kernels/tensor.cuh");

macro_rules! sources {
    ($($variant:ident = $file:literal,)*) => {
        /// A source of kernels.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Source {
            $(#[doc = concat!("See `kernels/", $file, "`.")] $variant,)*
        }

        impl Source {
            fn name(self) -> &'static str {
                match self { $(Source::$variant => $file),* }
            }

            fn text(self) -> &'static str {
                match self { $(Source::$variant => include_str!(concat!("../kernels/", $file))),* }
            }
        }
    };
}

sources! {
    Elementwise = "elementwise.cu",
    Norm = "norm.cu",
    Gemm = "gemm.cu",
    GemmHopper = "gemm_hopper.cu",
    GemmWide = "gemm_wide.cu",
    Plan = "plan.cu",
    Attention = "attention.cu",
    AttentionFast = "attention_fast.cu",
    Loss = "loss.cu",
    Optim = "optim.cu",
    Moe = "moe.cu",
    Sample = "sample.cu",
    Sums = "sums.cu",
}

/// How the products' operands are loaded.
const SHARE: &str = include_str!("../kernels/share.cuh");

impl Source {
    /// What stands before its own text.
    fn before(self) -> [&'static str; 3] {
        match self {
            Source::Gemm | Source::GemmHopper => [COMMON, TENSOR, SHARE],
            Source::AttentionFast => [COMMON, TENSOR, ""],
            _ => [COMMON, "", ""],
        }
    }
}

/// A source with the numbers it is compiled with.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Unit {
    source: Source,
    dtype: i64,
    defines: Vec<(&'static str, i64)>,
}

impl Unit {
    /// A source for a storage type.
    pub fn new(source: Source, dtype: DType) -> Unit {
        Unit { source, dtype: kind(dtype), defines: Vec::new() }
    }

    /// With more definitions.
    pub fn with(mut self, defines: &[(&'static str, i64)]) -> Unit {
        self.defines.extend_from_slice(defines);
        self
    }

    /// Machine code for a compute capability.
    pub fn compile(
        &self,
        compiler: &Compiler,
        (major, minor): (i32, i32),
    ) -> Result<Vec<u8>, DeviceError> {
        // Warp groups are a part of this one architecture, not of later ones.
        let suffix = if self.source == Source::GemmHopper { "a" } else { "" };
        let mut options = vec![
            format!("--gpu-architecture=sm_{major}{minor}{suffix}"),
            "--std=c++17".to_owned(),
            format!("-DDT={}", self.dtype),
        ];
        options.extend(self.defines.iter().map(|(name, value)| format!("-D{name}={value}")));
        let (name, text) = (self.source.name(), self.source.text());
        let [common, tensor, share] = self.source.before();
        let source = format!("{common}{tensor}{share}#line 1 \"{name}\"\n{text}");
        compiler.compile(name, &source, &options)
    }
}

/// Every source with some of the numbers it is compiled with, for a compute capability: what a test
/// compiles.
pub fn samples(capability: (i32, i32)) -> Vec<Unit> {
    let mut all = crate::ops::linear::units(capability);
    let typed = [Source::Elementwise, Source::Norm, Source::Loss, Source::Optim, Source::Moe];
    for dtype in DType::FLOATS {
        all.extend(typed.map(|source| Unit::new(source, dtype)));
    }
    all.extend([Source::Plan, Source::Sample, Source::Sums].map(|s| Unit::new(s, DType::F32)));
    let widths = |[qk, v]: [i64; 2]| [("QK", qk), ("VW", v)];
    all.push(Unit::new(Source::Attention, DType::F32).with(&widths([17, 33])));
    all.push(Unit::new(Source::AttentionFast, DType::Bf16).with(&widths([64, 64])));
    all.push(Unit::new(Source::AttentionFast, DType::F16).with(&widths([192, 128])));
    all
}

/// The number by which kernels know a storage type.
fn kind(dtype: DType) -> i64 {
    match dtype {
        DType::Bf16 => 1,
        DType::F16 => 2,
        _ => 0,
    }
}

/// A unit on a device, with the kernels that were asked for.
struct Loaded {
    module: Module,
    functions: Vec<(&'static CStr, Function)>,
}

/// Everything compiled so far.
pub struct Modules {
    compiler: Compiler,
    loaded: HashMap<Unit, Loaded>,
}

impl Modules {
    /// Nothing yet.
    pub fn new(compiler: Compiler) -> Modules {
        Modules { compiler, loaded: HashMap::new() }
    }

    /// A kernel, compiled if it is not there yet.
    pub fn function(
        &mut self,
        session: &Session,
        unit: &Unit,
        name: &'static CStr,
        shared_bytes: usize,
    ) -> Result<Function, DeviceError> {
        if !self.loaded.contains_key(unit) {
            let code = unit.compile(&self.compiler, session.capability)?;
            let loaded = Loaded { module: session.load(&code)?, functions: Vec::new() };
            self.loaded.insert(unit.clone(), loaded);
        }
        let loaded = self.loaded.get_mut(unit).expect("it was just inserted");
        if let Some((_, function)) = loaded.functions.iter().find(|(known, _)| *known == name) {
            return Ok(*function);
        }
        let function = session.function(loaded.module, name, shared_bytes)?;
        loaded.functions.push((name, function));
        Ok(function)
    }
}
