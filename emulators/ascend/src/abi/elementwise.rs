//! Operators on single elements, and those that compare and choose.

use super::arguments::{ScalarIf, ScalarIn, TensorIn, TypeIn};
use super::operators;
use crate::dtype::DataType;
use crate::ops::choose::{self, Compare, Logic};
use crate::ops::elementwise::{
    Abs, Binary, Exp, Neg, Reciprocal, Rsqrt, Sigmoid, Silu, Sqrt, Target, add, binary, convert,
    divide_by, fill, log, scale, shift, sigmoid_backward, unary,
};
use crate::tensor::Scalar;

const ZERO: Scalar = Scalar { dtype: DataType::I64, value: 0.0, integer: 0 };
const ONE: Scalar = Scalar { dtype: DataType::I64, value: 1.0, integer: 1 };

fn minus(scalar: Scalar) -> Scalar {
    Scalar { value: -scalar.value, integer: scalar.integer.wrapping_neg(), ..scalar }
}

operators! {
    aclnnAdd, aclnnAddGetWorkspaceSize |plan|
        (a: TensorIn, b: TensorIn, alpha: ScalarIn, out: TensorIn) {
        add(plan, (&a, &b), alpha, (&out, Target::Out))
    }
    aclnnInplaceAdd, aclnnInplaceAddGetWorkspaceSize |plan|
        (a: TensorIn, b: TensorIn, alpha: ScalarIn) {
        add(plan, (&a, &b), alpha, (&a, Target::SelfRef))
    }
    aclnnSub, aclnnSubGetWorkspaceSize |plan|
        (a: TensorIn, b: TensorIn, alpha: ScalarIn, out: TensorIn) {
        add(plan, (&a, &b), minus(alpha), (&out, Target::Out))
    }
    aclnnInplaceSub, aclnnInplaceSubGetWorkspaceSize |plan|
        (a: TensorIn, b: TensorIn, alpha: ScalarIn) {
        add(plan, (&a, &b), minus(alpha), (&a, Target::SelfRef))
    }
    aclnnMul, aclnnMulGetWorkspaceSize |plan| (a: TensorIn, b: TensorIn, out: TensorIn) {
        binary(plan, (&a, &b), (&out, Target::Out), Binary::Mul)
    }
    aclnnInplaceMul, aclnnInplaceMulGetWorkspaceSize |plan| (a: TensorIn, b: TensorIn) {
        binary(plan, (&a, &b), (&a, Target::SelfRef), Binary::Mul)
    }
    aclnnDiv, aclnnDivGetWorkspaceSize |plan| (a: TensorIn, b: TensorIn, out: TensorIn) {
        binary(plan, (&a, &b), (&out, Target::Out), Binary::Div)
    }
    aclnnInplaceDiv, aclnnInplaceDivGetWorkspaceSize |plan| (a: TensorIn, b: TensorIn) {
        binary(plan, (&a, &b), (&a, Target::SelfRef), Binary::Div)
    }
    aclnnMaximum, aclnnMaximumGetWorkspaceSize |plan| (a: TensorIn, b: TensorIn, out: TensorIn) {
        binary(plan, (&a, &b), (&out, Target::Out), Binary::Maximum)
    }
    aclnnMinimum, aclnnMinimumGetWorkspaceSize |plan| (a: TensorIn, b: TensorIn, out: TensorIn) {
        binary(plan, (&a, &b), (&out, Target::Out), Binary::Minimum)
    }
    aclnnFloorDivide, aclnnFloorDivideGetWorkspaceSize |plan|
        (a: TensorIn, b: TensorIn, out: TensorIn) {
        binary(plan, (&a, &b), (&out, Target::Out), Binary::FloorDivide)
    }
    aclnnMuls, aclnnMulsGetWorkspaceSize |plan| (a: TensorIn, factor: ScalarIn, out: TensorIn) {
        scale(plan, &a, factor, (&out, Target::Out))
    }
    aclnnInplaceMuls, aclnnInplaceMulsGetWorkspaceSize |plan| (a: TensorIn, factor: ScalarIn) {
        scale(plan, &a, factor, (&a, Target::SelfRef))
    }
    aclnnAdds, aclnnAddsGetWorkspaceSize |plan|
        (a: TensorIn, summand: ScalarIn, alpha: ScalarIf, out: TensorIn) {
        shift(plan, &a, (summand, alpha.unwrap_or(ONE)), (&out, Target::Out))
    }
    aclnnInplaceAdds, aclnnInplaceAddsGetWorkspaceSize |plan|
        (a: TensorIn, summand: ScalarIn, alpha: ScalarIf) {
        shift(plan, &a, (summand, alpha.unwrap_or(ONE)), (&a, Target::SelfRef))
    }
    aclnnSubs, aclnnSubsGetWorkspaceSize |plan|
        (a: TensorIn, summand: ScalarIn, alpha: ScalarIf, out: TensorIn) {
        shift(plan, &a, (summand, minus(alpha.unwrap_or(ONE))), (&out, Target::Out))
    }
    aclnnDivs, aclnnDivsGetWorkspaceSize |plan| (a: TensorIn, divisor: ScalarIn, out: TensorIn) {
        divide_by(plan, &a, divisor, &out)
    }
    aclnnExp, aclnnExpGetWorkspaceSize |plan| (a: TensorIn, out: TensorIn) {
        unary(plan, &a, &out, Exp)
    }
    aclnnLog, aclnnLogGetWorkspaceSize |plan| (a: TensorIn, out: TensorIn) {
        log(plan, &a, &out)
    }
    aclnnSqrt, aclnnSqrtGetWorkspaceSize |plan| (a: TensorIn, out: TensorIn) {
        unary(plan, &a, &out, Sqrt)
    }
    aclnnRsqrt, aclnnRsqrtGetWorkspaceSize |plan| (a: TensorIn, out: TensorIn) {
        unary(plan, &a, &out, Rsqrt)
    }
    aclnnReciprocal, aclnnReciprocalGetWorkspaceSize |plan| (a: TensorIn, out: TensorIn) {
        unary(plan, &a, &out, Reciprocal)
    }
    aclnnNeg, aclnnNegGetWorkspaceSize |plan| (a: TensorIn, out: TensorIn) {
        unary(plan, &a, &out, Neg)
    }
    aclnnAbs, aclnnAbsGetWorkspaceSize |plan| (a: TensorIn, out: TensorIn) {
        unary(plan, &a, &out, Abs)
    }
    aclnnSigmoid, aclnnSigmoidGetWorkspaceSize |plan| (a: TensorIn, out: TensorIn) {
        unary(plan, &a, &out, Sigmoid)
    }
    aclnnSilu, aclnnSiluGetWorkspaceSize |plan| (a: TensorIn, out: TensorIn) {
        unary(plan, &a, &out, Silu)
    }
    aclnnSigmoidBackward, aclnnSigmoidBackwardGetWorkspaceSize |plan|
        (grad: TensorIn, output: TensorIn, out: TensorIn) {
        sigmoid_backward(plan, &grad, &output, &out)
    }
    aclnnCast, aclnnCastGetWorkspaceSize |plan| (a: TensorIn, dtype: TypeIn, out: TensorIn) {
        convert(plan, &a, (&out, Some(dtype)))
    }
    aclnnInplaceCopy, aclnnInplaceCopyGetWorkspaceSize |plan| (to: TensorIn, from: TensorIn) {
        plan.order([1, 0]);
        convert(plan, &from, (&to, None))
    }
    aclnnInplaceFillScalar, aclnnInplaceFillScalarGetWorkspaceSize |plan|
        (to: TensorIn, value: ScalarIn) {
        fill(plan, &to, value)
    }
    aclnnInplaceZero, aclnnInplaceZeroGetWorkspaceSize |plan| (to: TensorIn) {
        fill(plan, &to, ZERO)
    }
    aclnnInplaceOne, aclnnInplaceOneGetWorkspaceSize |plan| (to: TensorIn) {
        fill(plan, &to, ONE)
    }
    aclnnEqScalar, aclnnEqScalarGetWorkspaceSize |plan|
        (a: TensorIn, number: ScalarIn, out: TensorIn) {
        choose::compare_with(plan, &a, number, &out, Compare::Eq)
    }
    aclnnNeScalar, aclnnNeScalarGetWorkspaceSize |plan|
        (a: TensorIn, number: ScalarIn, out: TensorIn) {
        choose::compare_with(plan, &a, number, &out, Compare::Ne)
    }
    aclnnLtScalar, aclnnLtScalarGetWorkspaceSize |plan|
        (a: TensorIn, number: ScalarIn, out: TensorIn) {
        choose::compare_with(plan, &a, number, &out, Compare::Lt)
    }
    aclnnLeScalar, aclnnLeScalarGetWorkspaceSize |plan|
        (a: TensorIn, number: ScalarIn, out: TensorIn) {
        choose::compare_with(plan, &a, number, &out, Compare::Le)
    }
    aclnnGtScalar, aclnnGtScalarGetWorkspaceSize |plan|
        (a: TensorIn, number: ScalarIn, out: TensorIn) {
        choose::compare_with(plan, &a, number, &out, Compare::Gt)
    }
    aclnnGeScalar, aclnnGeScalarGetWorkspaceSize |plan|
        (a: TensorIn, number: ScalarIn, out: TensorIn) {
        choose::compare_with(plan, &a, number, &out, Compare::Ge)
    }
    aclnnEqTensor, aclnnEqTensorGetWorkspaceSize |plan|
        (a: TensorIn, b: TensorIn, out: TensorIn) {
        choose::compare(plan, (&a, &b), &out, Compare::Eq)
    }
    aclnnNeTensor, aclnnNeTensorGetWorkspaceSize |plan|
        (a: TensorIn, b: TensorIn, out: TensorIn) {
        choose::compare(plan, (&a, &b), &out, Compare::Ne)
    }
    aclnnLtTensor, aclnnLtTensorGetWorkspaceSize |plan|
        (a: TensorIn, b: TensorIn, out: TensorIn) {
        choose::compare(plan, (&a, &b), &out, Compare::Lt)
    }
    aclnnLeTensor, aclnnLeTensorGetWorkspaceSize |plan|
        (a: TensorIn, b: TensorIn, out: TensorIn) {
        choose::compare(plan, (&a, &b), &out, Compare::Le)
    }
    aclnnGtTensor, aclnnGtTensorGetWorkspaceSize |plan|
        (a: TensorIn, b: TensorIn, out: TensorIn) {
        choose::compare(plan, (&a, &b), &out, Compare::Gt)
    }
    aclnnGeTensor, aclnnGeTensorGetWorkspaceSize |plan|
        (a: TensorIn, b: TensorIn, out: TensorIn) {
        choose::compare(plan, (&a, &b), &out, Compare::Ge)
    }
    aclnnLogicalOr, aclnnLogicalOrGetWorkspaceSize |plan|
        (a: TensorIn, b: TensorIn, out: TensorIn) {
        choose::logical(plan, (&a, &b), &out, Logic::Or)
    }
    aclnnLogicalAnd, aclnnLogicalAndGetWorkspaceSize |plan|
        (a: TensorIn, b: TensorIn, out: TensorIn) {
        choose::logical(plan, (&a, &b), &out, Logic::And)
    }
    aclnnLogicalNot, aclnnLogicalNotGetWorkspaceSize |plan| (a: TensorIn, out: TensorIn) {
        choose::not(plan, &a, &out)
    }
    aclnnIsFinite, aclnnIsFiniteGetWorkspaceSize |plan| (a: TensorIn, out: TensorIn) {
        choose::is_finite(plan, &a, &out)
    }
    aclnnSWhere, aclnnSWhereGetWorkspaceSize |plan|
        (condition: TensorIn, a: TensorIn, b: TensorIn, out: TensorIn) {
        choose::select(plan, &condition, (&a, &b), &out)
    }
    aclnnInplaceMaskedFillScalar, aclnnInplaceMaskedFillScalarGetWorkspaceSize |plan|
        (to: TensorIn, mask: TensorIn, value: ScalarIn) {
        choose::masked_fill(plan, &to, &mask, value)
    }
}
