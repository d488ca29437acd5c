//! One task's rows of a matrix that is streamed in place, and what is asked for around them, so
//! that memory never rests: products of few rows and those with small integers stream alike.

use crate::pool::Pool;
use crate::simd::Isa;
use crate::simd::micro::{Ahead, fetch};

/// Stretches per thread: a few, so that a thread that is held up can be helped out.
const PER_THREAD: usize = 4;

/// Rows of a task, in whole groups of `vectors` vectors.
pub(crate) fn rows_of_task(pool: &Pool, isa: Isa, rows: usize, vectors: usize) -> usize {
    rows.div_ceil(pool.threads() * PER_THREAD).next_multiple_of(vectors * isa.geometry().lanes)
}

/// Where a task's rows lie.
#[derive(Clone, Copy)]
pub(super) struct Stretch<'a> {
    matrix: &'a [u8],
    row_bytes: usize,
    pub first: usize,
    pub rows: usize,
    /// What this thread will read after it.
    after: Ahead,
    /// Nobody has asked for its first rows.
    cold: bool,
}

impl<'a> Stretch<'a> {
    /// Stretch `index` of a matrix of `rows` rows, `each` of them a task.
    pub fn new(
        pool: &Pool,
        (matrix, row_bytes): (&'a [u8], usize),
        index: usize,
        (rows, each): (usize, usize),
    ) -> Stretch<'a> {
        // This thread's next stretch, as long as threads take turns; then the next product's.
        let (count, later) = (rows.div_ceil(each), index + pool.threads());
        let after = if later < count {
            Ahead::of(&matrix[later * each * row_bytes..])
        } else {
            pool.soon().at(later - count).map_or(Ahead::default(), Ahead::at)
        };
        let first = index * each;
        let cold = index < pool.threads();
        Stretch { matrix, row_bytes, first, rows: each.min(rows - first), after, cold }
    }

    /// Asks for the first rows, where nobody has.
    #[inline(always)]
    pub fn open(&self, rows: usize) {
        if self.cold {
            let rest = &self.matrix[self.first * self.row_bytes..];
            let begin = self.rows.min(rows) * self.row_bytes;
            fetch(&rest[..begin.min(rest.len())]);
        }
    }

    /// What to ask for while `rows` rows from `row` on are computed: as many that follow them,
    /// then what follows the stretch.
    #[inline(always)]
    pub fn next(&self, row: usize, rows: usize) -> Ahead {
        if row + 2 * rows > self.rows {
            return self.after;
        }
        Ahead::of(&self.matrix[(self.first + row + rows) * self.row_bytes..])
    }
}
