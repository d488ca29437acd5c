//! Products of groups of rows with one matrix each: mixture-of-experts layers.
//!
//! Each group is an ordinary product, so the bits rule carries over: a row's result does not depend
//! on which rows share its group.

use super::{
    Asked, Data, GemmArgs, Layout, Matrix, MatrixMut, Store, WrongColumn, gemm, gemm_checked,
};
use crate::pool::Pool;
use crate::scratch::Scratch;
use crate::simd::Isa;

/// One grouped product. Group g covers `offsets[g]..offsets[g + 1]` of the split dimension.
#[derive(Debug)]
pub struct GroupedGemmArgs<'a> {
    /// NT and NN split the rows of A and C and have one B per group; TN splits k (the rows of A and
    /// of B) and has one C per group.
    pub layout: Layout,
    /// Ascending bounds of the groups, one more than there are groups. Groups may be empty.
    pub offsets: &'a [usize],
    /// Rows of each C in TN; ignored otherwise.
    pub m: usize,
    /// Columns of C.
    pub n: usize,
    /// Length of the sums in NT and NN; ignored in TN.
    pub k: usize,
    /// Left operand of all groups.
    pub a: Matrix<'a>,
    /// Right operand: in NT and NN the groups' matrices, in TN the rows of all groups.
    pub b: Matrix<'a>,
    /// Elements from one group's matrix to the next: in B (NT, NN) or in C (TN).
    pub group_stride: usize,
    /// The result: in NT and NN the rows of all groups, in TN the groups' matrices.
    pub c: MatrixMut<'a>,
    /// What happens to the old contents of C. In TN an empty group's sums are zero.
    pub store: Store,
}

/// Computes the products of all groups.
///
/// Panics if the offsets are not ascending or an operand is smaller than its shape.
pub fn grouped_gemm(pool: &Pool, isa: Isa, scratch: &mut Scratch, args: GroupedGemmArgs<'_>) {
    each_group(args, |one| gemm(pool, isa, scratch, one));
}

/// The same with every group's product checked as [`gemm_checked`] does.
pub fn grouped_gemm_checked(
    pool: &Pool,
    isa: Isa,
    scratch: &mut Scratch,
    args: GroupedGemmArgs<'_>,
) -> Result<(), WrongColumn> {
    let mut wrong = Ok(());
    each_group(args, |one| {
        if let Err(column) = gemm_checked(pool, isa, scratch, one, Asked::default()) {
            wrong = Err(column);
        }
    });
    wrong
}

fn each_group(mut args: GroupedGemmArgs<'_>, mut product: impl FnMut(GemmArgs<'_>)) {
    for (group, bounds) in args.offsets.windows(2).enumerate() {
        let (start, end) = (bounds[0], bounds[1]);
        assert!(start <= end, "group {group} ends at {end}, before its start {start}");
        let matrix = group * args.group_stride;
        let (m, k) = match args.layout {
            Layout::Nt | Layout::Panels | Layout::Nn => (end - start, args.k),
            Layout::Tn => (args.m, end - start),
        };
        if m == 0 || args.n == 0 {
            continue;
        }
        let rows_of_a = skip(args.a.data, start, args.a.row_stride, end - start);
        let (b, c_start) = match args.layout {
            Layout::Tn => (skip(args.b.data, start, args.b.row_stride, k), matrix),
            _ => (skip(args.b.data, matrix, 1, k), start * args.c.row_stride),
        };
        let one = GemmArgs {
            layout: args.layout,
            m,
            n: args.n,
            k,
            a: Matrix { data: rows_of_a, row_stride: args.a.row_stride },
            b: Matrix { data: b, row_stride: args.b.row_stride },
            bias: None,
            c: MatrixMut { data: args.c.data.from(c_start), row_stride: args.c.row_stride },
            store: args.store,
        };
        product(one);
    }
}

/// The elements from row `row` on; nothing when no row is read, so that an empty last group may
/// start at the end of an operand without trailing padding.
fn skip(data: Data<'_>, row: usize, row_stride: usize, rows: usize) -> Data<'_> {
    if rows == 0 { data } else { data.from(row * row_stride) }
}
