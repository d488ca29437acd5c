//! Matrix products: 16-bit elements on the tensor cores, f32 and weights of few bits by fused
//! multiply-adds.
//!
//! How large a tile is follows from the extents; an element's bits do not follow from the tile.

use std::ffi::CStr;

use pontoon_ops::{self as ops, Accumulate, DType, DeviceError, Extents, Layout, View};

use crate::core::{Core, Done, blocks, row_stride};
use crate::ffi::session::{Args, Grid};
use crate::modules::{Source, Unit};

/// Threads of the kernel that lists tiles.
const PLAN_THREADS: usize = 1024;
/// Elements of k that the tensor-core kernel takes at a time.
const STEP: usize = 32;
/// Elements by which its rows are apart beyond their width.
const PITCH_MORE: usize = 8;

/// Extents of a tile on the tensor cores, its warps, and how many steps are loaded ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    rows: usize,
    columns: usize,
    warps: [usize; 2],
    stages: usize,
}

/// The architecture whose warp groups take large results.
const HOPPER: (i32, i32) = (9, 0);
/// Shared memory of their blocks: three stages of both operands, and room to align them.
const HOPPER_SHARED_BYTES: usize = 3 * 2 * 16_384 + 1024;
const HOPPER_THREADS: usize = 256;

const LARGE: Tile = Tile { rows: 128, columns: 128, warps: [2, 4], stages: 4 };
const MIDDLE: Tile = Tile { rows: 64, columns: 64, warps: [2, 2], stages: 4 };
/// For few rows, which read b once whatever the tile: many narrow blocks.
const FLAT: Tile = Tile { rows: 16, columns: 32, warps: [1, 2], stages: 8 };
/// Threads of a block without tensor cores.
const WIDE_THREADS: usize = 256;
/// Extents of tiles without tensor cores.
const WIDE: [usize; 3] = [128, 64, 32];

impl Tile {
    fn shared_bytes(&self, layout: Layout) -> usize {
        let along = |extent: usize| extent * (STEP + PITCH_MORE);
        let across = |extent: usize| STEP * (extent + PITCH_MORE);
        let a = if layout == Layout::Tn { across(self.rows) } else { along(self.rows) };
        let b = if layout == Layout::Nt { along(self.columns) } else { across(self.columns) };
        2 * self.stages * (a + b)
    }
}

/// The number by which kernels know a layout.
fn number(layout: Layout) -> i64 {
    match layout {
        Layout::Nt => 0,
        Layout::Nn => 1,
        Layout::Tn => 2,
    }
}

/// A matrix in memory.
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    /// Where it begins.
    pub at: usize,
    /// Elements from row to row.
    pub stride: usize,
}

impl Matrix {
    /// A view of two dimensions.
    pub fn of(core: &Core, view: &View) -> Result<Matrix, DeviceError> {
        Ok(Matrix { at: core.at(view)?, stride: row_stride(view) })
    }

    /// Whether rows of 16-bit elements begin at multiples of 16 bytes.
    fn whole(self) -> bool {
        self.at.is_multiple_of(16) && self.stride.is_multiple_of(8)
    }
}

/// How weights of few bits are scaled.
#[derive(Clone, Copy, Debug)]
pub struct Quant {
    /// What they are stored in.
    pub dtype: DType,
    /// The scales.
    pub scales: usize,
    /// Weights of one scale.
    pub block: [usize; 2],
    /// Scales from row to row.
    pub stride: usize,
    /// Scales from group to group.
    pub group: usize,
}

/// One product for each group of rows.
#[derive(Clone, Copy, Debug)]
pub struct Groups {
    /// Where groups begin.
    pub offsets: usize,
    /// Groups.
    pub count: usize,
    /// Elements of b from group to group.
    pub b: usize,
    /// Elements of c from group to group.
    pub c: usize,
}

/// How a product is run.
struct Kernel {
    unit: Unit,
    name: &'static CStr,
    /// Rows and columns of the result that a block takes.
    tile: [usize; 2],
    threads: usize,
    shared_bytes: usize,
}

/// A product to run.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    /// Which operand is transposed.
    pub layout: Layout,
    /// Of a, and of b if that is not quantised.
    pub dtype: DType,
    /// Left operand.
    pub a: Matrix,
    /// Right operand.
    pub b: Matrix,
    /// Result.
    pub c: Matrix,
    /// Of c: f32 or as a.
    pub out: DType,
    /// Added to every row; 0 for none.
    pub bias: usize,
    /// Extents.
    pub extents: Extents,
    /// Whether the result is added.
    pub accumulate: Accumulate,
    /// Groups of rows.
    pub groups: Option<Groups>,
    /// Scales of b.
    pub quant: Option<Quant>,
}

impl Product {
    fn by_tensor_cores(&self) -> bool {
        self.dtype != DType::F32 && self.quant.is_none()
    }

    /// The tile, by how many blocks it gives.
    fn tile(&self, multiprocessors: usize) -> Tile {
        let Extents { m, n, .. } = self.extents;
        let rows = match self.groups {
            Some(groups) if self.layout != Layout::Tn => m.div_ceil(groups.count.max(1)),
            _ => m,
        };
        let many = m.div_ceil(LARGE.rows) * n.div_ceil(LARGE.columns) >= multiprocessors;
        match () {
            () if rows <= FLAT.rows => FLAT,
            () if many && rows > MIDDLE.rows => LARGE,
            () => MIDDLE,
        }
    }

    /// The same without tensor cores.
    fn extent(&self, multiprocessors: usize) -> usize {
        let Extents { m, n, .. } = self.extents;
        let fits = |extent: &&usize| {
            m > **extent / 2 && m.div_ceil(**extent) * n.div_ceil(**extent) >= multiprocessors
        };
        WIDE.iter().find(fits).copied().unwrap_or(WIDE[2])
    }

    /// The kernel that runs it.
    fn kernel(&self, capability: (i32, i32), multiprocessors: usize) -> Kernel {
        if !self.by_tensor_cores() {
            let extent = self.extent(multiprocessors);
            let (unit, name, tile) = (self.wide_unit(extent), c"gemm_wide", [extent; 2]);
            return Kernel { unit, name, tile, threads: WIDE_THREADS, shared_bytes: 0 };
        }
        let (tile, name) = (self.tile(multiprocessors), c"gemm");
        let (unit, threads, shared_bytes) = match tile == LARGE && capability == HOPPER {
            true => (self.hopper_unit(), HOPPER_THREADS, HOPPER_SHARED_BYTES),
            false => {
                let threads = 32 * tile.warps[0] * tile.warps[1];
                (self.unit(tile), threads, tile.shared_bytes(self.layout))
            }
        };
        Kernel { unit, name, tile: [tile.rows, tile.columns], threads, shared_bytes }
    }

    /// Runs it.
    pub fn run(&self, core: &mut Core) -> Done {
        let Extents { m, n, .. } = self.extents;
        if m == 0 || n == 0 {
            return Ok(());
        }
        let Kernel { unit, name, tile: [rows, columns], threads, shared_bytes } =
            self.kernel(core.session.capability, core.session.multiprocessors);
        let (mut down, mut deep, mut plan) = (m.div_ceil(rows), 1, 0);
        if let Some(groups) = self.groups {
            (down, deep, plan) = match self.layout {
                Layout::Tn => (down, groups.count, groups.offsets),
                _ => {
                    let entries = down + groups.count;
                    let parts = Parts { starts: groups.offsets, count: groups.count, lengths: 0 };
                    (entries, 1, parts.tiles(core, rows, entries)?)
                }
            };
        }
        let blocks = [n.div_ceil(columns), down, deep];
        let grid = Grid { blocks, threads: [threads, 1], shared_bytes };
        core.run(&unit, name, grid, self.args(plan))
    }

    fn args(&self, plan: usize) -> Args {
        let Extents { m, n, k } = self.extents;
        let mut args = Args::new();
        for matrix in [self.a, self.b, self.c] {
            args = args.at(matrix.at).int(matrix.stride);
        }
        let args = args.at(self.bias).int(m).int(n).int(k);
        let args = args.flag(self.accumulate == Accumulate::Add);
        let (b_group, c_group) = self.groups.map_or((0, 0), |groups| (groups.b, groups.c));
        if self.by_tensor_cores() {
            let whole_b = self.b.whole() && b_group.is_multiple_of(8);
            let args = args.flag(self.a.whole()).flag(whole_b);
            return args.at(plan).int(b_group).int(c_group);
        }
        let args = args.at(plan).int(b_group).int(c_group);
        let none = Quant { dtype: DType::F32, scales: 0, block: [1; 2], stride: 0, group: 0 };
        let quant = self.quant.unwrap_or(none);
        let args = args.at(quant.scales).int(quant.block[0]).int(quant.block[1]);
        args.int(quant.stride).int(quant.group)
    }

    fn common(&self) -> [(&'static str, i64); 3] {
        [
            ("LAYOUT", number(self.layout)),
            ("OUT32", i64::from(self.out == DType::F32)),
            ("GROUPS", i64::from(self.groups.is_some())),
        ]
    }

    fn unit(&self, tile: Tile) -> Unit {
        let unit = Unit::new(Source::Gemm, self.dtype).with(&self.common());
        unit.with(&[
            ("BM", tile.rows as i64),
            ("BN", tile.columns as i64),
            ("WARPS_M", tile.warps[0] as i64),
            ("WARPS_N", tile.warps[1] as i64),
            ("STAGES", tile.stages as i64),
        ])
    }

    fn hopper_unit(&self) -> Unit {
        Unit::new(Source::GemmHopper, self.dtype).with(&self.common())
    }

    fn wide_unit(&self, extent: usize) -> Unit {
        let quant = match self.quant.map(|quant| quant.dtype) {
            None => 0,
            Some(DType::F8e4m3) => 1,
            Some(DType::I8) => 2,
            Some(_) => 3,
        };
        let unit = Unit::new(Source::GemmWide, self.dtype).with(&self.common());
        unit.with(&[("QUANT", quant), ("BM", extent as i64), ("BN", extent as i64)])
    }
}

/// Kernels of every kind of product on an architecture: what a test compiles.
pub fn units(capability: (i32, i32)) -> Vec<Unit> {
    let matrix = Matrix { at: 0, stride: 0 };
    let extents = Extents { m: 0, n: 0, k: 0 };
    let groups = Groups { offsets: 0, count: 0, b: 0, c: 0 };
    let mut all = Vec::new();
    for layout in [Layout::Nt, Layout::Nn, Layout::Tn] {
        for (dtype, groups) in [(DType::Bf16, None), (DType::F16, Some(groups))] {
            let (bias, accumulate, quant) = (0, Accumulate::Add, None);
            let (a, b, c, out) = (matrix, matrix, matrix, DType::F32);
            let mut product =
                Product { layout, dtype, a, b, c, out, bias, extents, accumulate, groups, quant };
            all.extend([LARGE, MIDDLE, FLAT].map(|tile| product.unit(tile)));
            if capability == HOPPER {
                all.push(product.hopper_unit());
            }
            product.dtype = DType::F32;
            all.push(product.wide_unit(WIDE[1]));
            for dtype in [DType::F8e4m3, DType::I8, DType::I4] {
                let (scales, block, stride, group) = (0, [1; 2], 0, 0);
                product.quant = Some(Quant { dtype, scales, block, stride, group });
                if layout == Layout::Nt {
                    all.push(product.wide_unit(WIDE[2]));
                }
            }
        }
    }
    all
}

/// Rows in parts that only the device knows.
#[derive(Clone, Copy, Debug)]
pub struct Parts {
    /// Where parts begin, and where the last one ends.
    pub starts: usize,
    /// Parts.
    pub count: usize,
    /// What each part's sequence holds in all; 0 for as much as the part.
    pub lengths: usize,
}

impl Parts {
    /// Lists tiles of so many rows: at most `entries`, four integers each.
    pub fn tiles(self, core: &mut Core, rows: usize, entries: usize) -> Result<usize, DeviceError> {
        let plan = core.room(DType::I32, 4 * entries)?;
        let args = Args::new().at(self.starts).int(self.count).at(self.lengths).int(rows);
        let args = args.at(plan).int(entries);
        let unit = Unit::new(Source::Plan, DType::F32);
        core.run(&unit, c"plan_tiles", blocks(1, PLAN_THREADS), args)?;
        Ok(plan)
    }
}

pub fn matmul(core: &mut Core, op: &ops::Matmul) -> Done {
    let product = Product {
        layout: op.layout,
        dtype: op.a.dtype,
        a: Matrix::of(core, &op.a)?,
        b: Matrix::of(core, &op.b)?,
        c: Matrix::of(core, &op.c)?,
        out: op.c.dtype,
        bias: core.at_if(&op.bias)?,
        extents: op.extents(),
        accumulate: op.accumulate,
        groups: None,
        quant: None,
    };
    product.run(core)
}

pub fn matmul_quant(core: &mut Core, op: &ops::MatmulQuant) -> Done {
    let (m, n, k) = (op.x.dim(0), op.weight.dim(0), op.x.dim(1));
    let quant = Quant {
        dtype: op.weight.dtype,
        scales: core.at(&op.scales)?,
        block: [op.block_n, op.block_k],
        stride: op.scales.dim(1),
        group: 0,
    };
    let product = Product {
        layout: Layout::Nt,
        dtype: op.x.dtype,
        a: Matrix::of(core, &op.x)?,
        b: Matrix { at: core.at(&op.weight)?, stride: k },
        c: Matrix::of(core, &op.c)?,
        out: op.c.dtype,
        bias: core.at_if(&op.bias)?,
        extents: Extents { m, n, k },
        accumulate: Accumulate::Overwrite,
        groups: None,
        quant: Some(quant),
    };
    product.run(core)
}

pub fn grouped_matmul(core: &mut Core, op: &ops::GroupedMatmul) -> Done {
    let (rows, width) = (op.a.dim(0), op.a.dim(1));
    let n = op.c.dim(op.c.shape.rank() - 1);
    let count = op.offsets.dim(0) - 1;
    let stacked = width * n;
    let extents = match op.layout {
        Layout::Tn => Extents { m: width, n, k: rows },
        _ => Extents { m: rows, n, k: width },
    };
    let b_stride = match op.layout {
        Layout::Nt => width,
        Layout::Nn => n,
        Layout::Tn => row_stride(&op.b),
    };
    let c_stride = if op.layout == Layout::Tn { n } else { row_stride(&op.c) };
    let product = Product {
        layout: op.layout,
        dtype: op.a.dtype,
        a: Matrix::of(core, &op.a)?,
        b: Matrix { at: core.at(&op.b)?, stride: b_stride },
        c: Matrix { at: core.at(&op.c)?, stride: c_stride },
        out: op.c.dtype,
        bias: 0,
        extents,
        accumulate: op.accumulate,
        groups: Some(Groups { offsets: core.at(&op.offsets)?, count, b: stacked, c: stacked }),
        quant: None,
    };
    product.run(core)
}

pub fn grouped_matmul_quant(core: &mut Core, op: &ops::GroupedMatmulQuant) -> Done {
    let (rows, k, n) = (op.x.dim(0), op.x.dim(1), op.weight.dim(1));
    let count = op.offsets.dim(0) - 1;
    let quant = Quant {
        dtype: op.weight.dtype,
        scales: core.at(&op.scales)?,
        block: [op.block_n, op.block_k],
        stride: op.scales.dim(2),
        group: op.scales.dim(1) * op.scales.dim(2),
    };
    let product = Product {
        layout: Layout::Nt,
        dtype: op.x.dtype,
        a: Matrix::of(core, &op.x)?,
        b: Matrix { at: core.at(&op.weight)?, stride: k },
        c: Matrix::of(core, &op.c)?,
        out: op.c.dtype,
        bias: 0,
        extents: Extents { m: rows, n, k },
        accumulate: Accumulate::Overwrite,
        groups: Some(Groups { offsets: core.at(&op.offsets)?, count, b: n * k, c: 0 }),
        quant: Some(quant),
    };
    product.run(core)
}
