//! The fixed binary tree along which gradients of micro-batches are summed, as a list of moves.
//!
//! Leaves are computed in order; like a binary counter, two sums of equal size are added as soon
//! as both are there. So log2(leaves) + 1 buffers do, and the additions are those of the balanced
//! tree, whoever computes which leaf. Computes nothing. Read next: `step.rs`.

/// One move of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Move {
    /// Computes the gradient of a micro-batch into a buffer.
    Leaf {
        /// Which micro-batch of the step.
        leaf: usize,
        /// The buffer's place in the stack.
        buffer: usize,
    },
    /// Adds the buffer above to this one.
    Add {
        /// The buffer that holds the earlier leaves, and then the sum.
        buffer: usize,
    },
}

/// The moves for a power of two of leaves; the sum ends in buffer 0.
pub fn moves(leaves: usize) -> Vec<Move> {
    assert!(leaves.is_power_of_two(), "the tree is balanced");
    let mut moves = Vec::with_capacity(2 * leaves);
    let mut depth = 0;
    for leaf in 0..leaves {
        moves.push(Move::Leaf { leaf, buffer: depth });
        depth += 1;
        // As many sums close as the number of leaves so far has trailing zeros.
        for _ in 0..(leaf + 1).trailing_zeros() {
            depth -= 1;
            moves.push(Move::Add { buffer: depth - 1 });
        }
    }
    moves
}

/// Buffers that [`moves`] needs.
pub fn buffers(leaves: usize) -> usize {
    leaves.ilog2() as usize + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_is_the_balanced_tree_of_the_leaves_in_order() {
        for leaves in [1, 2, 4, 16] {
            let mut stack = vec![String::new(); buffers(leaves)];
            for step in moves(leaves) {
                match step {
                    Move::Leaf { leaf, buffer } => stack[buffer] = leaf.to_string(),
                    Move::Add { buffer } => {
                        stack[buffer] = format!("({}+{})", stack[buffer], stack[buffer + 1]);
                    }
                }
            }
            assert_eq!(stack[0], balanced(0, leaves));
        }
        assert_eq!(balanced(0, 4), "((0+1)+(2+3))");
    }

    fn balanced(first: usize, count: usize) -> String {
        if count == 1 {
            return first.to_string();
        }
        let half = count / 2;
        format!("({}+{})", balanced(first, half), balanced(first + half, half))
    }
}
