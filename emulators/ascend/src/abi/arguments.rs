//! What operators are passed, looked up: handles become descriptors, numbers stay.

use std::sync::Arc;

use super::pointers::{Out, Text};
use crate::code;
use crate::driver::{DRIVER, Object};
use crate::dtype::DataType;
use crate::failure::{Done, Failure};
use crate::plan::{Argument, Plan, list_of, optional};
use crate::tensor::Scalar;

/// Counts the tensors and lists of a call that are there.
#[derive(Default)]
pub struct Resolver {
    tensors: usize,
}

impl Resolver {
    fn next(&mut self) -> usize {
        self.tensors += 1;
        self.tensors - 1
    }
}

/// A parameter of an operator.
pub trait Resolve {
    /// What the operator's plan takes.
    type Value;
    /// Looks it up.
    fn resolve(self, name: &'static str, resolver: &mut Resolver) -> Done<Self::Value>;
}

macro_rules! plain {
    ($($type:ty),*) => {$(
        impl Resolve for $type {
            type Value = $type;
            fn resolve(self, _: &'static str, _: &mut Resolver) -> Done<$type> {
                Ok(self)
            }
        }
    )*};
}

plain!(i8, i32, i64, u64, f32, f64, bool);

/// `aclTensor*` that must be there.
#[repr(transparent)]
pub struct TensorIn(u64);

/// `aclTensor*` that may be null.
#[repr(transparent)]
pub struct TensorIf(u64);

/// `aclTensorList*` that must be there.
#[repr(transparent)]
pub struct ListIn(u64);

/// `aclTensorList*` that may be null.
#[repr(transparent)]
pub struct ListIf(u64);

/// `aclScalar*`.
#[repr(transparent)]
pub struct ScalarIn(u64);

/// `aclScalar*` that may be null.
#[repr(transparent)]
pub struct ScalarIf(u64);

/// `aclIntArray*` that may be null.
#[repr(transparent)]
pub struct IntegersIf(u64);

/// `aclDataType`.
#[repr(transparent)]
pub struct TypeIn(i32);

impl Resolve for TensorIn {
    type Value = Argument;
    fn resolve(self, name: &'static str, resolver: &mut Resolver) -> Done<Argument> {
        let tensor = DRIVER.get(self.0, name)?;
        Ok(Argument { handle: self.0, tensor, relative: None, ir: resolver.next() })
    }
}

impl Resolve for TensorIf {
    type Value = Option<Argument>;
    fn resolve(self, name: &'static str, resolver: &mut Resolver) -> Done<Option<Argument>> {
        if self.0 == 0 { Ok(None) } else { TensorIn(self.0).resolve(name, resolver).map(Some) }
    }
}

impl Resolve for ListIn {
    type Value = Vec<Argument>;
    fn resolve(self, name: &'static str, resolver: &mut Resolver) -> Done<Vec<Argument>> {
        list_of(self.0, name, resolver.next())
    }
}

impl Resolve for ListIf {
    type Value = Option<Vec<Argument>>;
    fn resolve(self, name: &'static str, resolver: &mut Resolver) -> Done<Option<Vec<Argument>>> {
        if self.0 == 0 { Ok(None) } else { ListIn(self.0).resolve(name, resolver).map(Some) }
    }
}

impl Resolve for ScalarIn {
    type Value = Scalar;
    fn resolve(self, name: &'static str, _: &mut Resolver) -> Done<Scalar> {
        DRIVER.get(self.0, name)
    }
}

impl Resolve for ScalarIf {
    type Value = Option<Scalar>;
    fn resolve(self, name: &'static str, _: &mut Resolver) -> Done<Option<Scalar>> {
        optional(self.0, name)
    }
}

impl Resolve for IntegersIf {
    type Value = Option<Arc<Vec<i64>>>;
    fn resolve(self, name: &'static str, _: &mut Resolver) -> Done<Option<Arc<Vec<i64>>>> {
        optional(self.0, name)
    }
}

impl Resolve for TypeIn {
    type Value = DataType;
    fn resolve(self, _: &'static str, _: &mut Resolver) -> Done<DataType> {
        DataType::from_number(self.0)
    }
}

impl Resolve for Text {
    type Value = String;
    fn resolve(self, _: &'static str, _: &mut Resolver) -> Done<String> {
        Ok(self.read())
    }
}

/// Hands out a planned operator.
pub fn finish(plan: Plan, workspace_bytes: Out<u64>, executor: Out<u64>) -> Done {
    if workspace_bytes.is_null() || executor.is_null() {
        return Err(Failure::new(code::OP_NULL, "`workspaceSize` or `executor` is null"));
    }
    let planned = plan.finish()?;
    workspace_bytes.set(planned.workspace, code::OP_NULL, "workspaceSize")?;
    let handle = DRIVER.keep(Object::Executor(Arc::new(planned)));
    executor.set(handle, code::OP_NULL, "executor")
}
