//! Matrix products.

use super::arguments::{ScalarIn, TensorIn};
use super::operators;
use crate::ops::elementwise::Target;
use crate::ops::product::{Factors, add_product, matmul};

operators! {
    aclnnMatmul, aclnnMatmulGetWorkspaceSize |plan|
        (a: TensorIn, b: TensorIn, out: TensorIn, cube: i8) {
        matmul(plan, Factors { a: &a, b: &b, out: &out }, cube)
    }
    aclnnMm, aclnnMmGetWorkspaceSize |plan|
        (a: TensorIn, b: TensorIn, out: TensorIn, cube: i8) {
        plan.demand(a.tensor.shape.len() == 2, || "operands should be matrices".to_owned())?;
        matmul(plan, Factors { a: &a, b: &b, out: &out }, cube)
    }
    aclnnBatchMatMul, aclnnBatchMatMulGetWorkspaceSize |plan|
        (a: TensorIn, b: TensorIn, out: TensorIn, cube: i8) {
        let stacks = a.tensor.shape.len() == 3 && b.tensor.shape.len() == 3;
        plan.demand(stacks, || "operands should be stacks of matrices".to_owned())?;
        matmul(plan, Factors { a: &a, b: &b, out: &out }, cube)
    }
    aclnnAddmm, aclnnAddmmGetWorkspaceSize |plan|
        (
            x: TensorIn,
            a: TensorIn,
            b: TensorIn,
            beta: ScalarIn,
            alpha: ScalarIn,
            out: TensorIn,
            cube: i8,
        ) {
        plan.order([0, 2, 3, 1]);
        let factors = Factors { a: &a, b: &b, out: &out };
        add_product(plan, (&x, factors), (beta, alpha), (cube, Target::Out))
    }
    aclnnInplaceAddmm, aclnnInplaceAddmmGetWorkspaceSize |plan|
        (x: TensorIn, a: TensorIn, b: TensorIn, beta: ScalarIn, alpha: ScalarIn, cube: i8) {
        let factors = Factors { a: &a, b: &b, out: &x };
        add_product(plan, (&x, factors), (beta, alpha), (cube, Target::SelfRef))
    }
}
