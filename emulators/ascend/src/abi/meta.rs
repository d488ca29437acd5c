//! Descriptors, scalars, arrays, lists and executors: what operators are passed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::calls;
use super::pointers::{Host, Many, Out};
use crate::code;
use crate::driver::{DRIVER, Object};
use crate::dtype::DataType;
use crate::failure::{Done, Failure, note};
use crate::plan::Executor;
use crate::tensor::{Scalar, Tensor};

/// Most dimensions of a tensor.
const RANK_MAX: u64 = 8;

/// Gives a made object's handle, or null and the text.
fn made(name: &'static str, object: Done<Object>) -> u64 {
    match object {
        Ok(object) => DRIVER.keep(object),
        Err(failure) => {
            note(name, Err(failure));
            0
        }
    }
}

fn extents(from: Many<i64>, count: u64, name: &str) -> Done<Vec<usize>> {
    if count > RANK_MAX {
        return Err(Failure::operator(format!("{count} dimensions are more than {RANK_MAX}")));
    }
    let read = from.read(count as usize);
    let read = read
        .or((count == 0).then(Vec::new))
        .ok_or_else(|| Failure::new(code::OP_NULL, format!("`{name}` is null")))?;
    let whole = |&extent: &i64| {
        usize::try_from(extent)
            .map_err(|_| Failure::operator(format!("`{name}` {read:?} has a negative number")))
    };
    read.iter().map(whole).collect()
}

/// What `aclCreateTensor` is passed.
struct Parts {
    dims: (Many<i64>, u64),
    dtype: i32,
    strides: Many<i64>,
    offset: i64,
    format: i32,
    storage: (Many<i64>, u64),
    address: u64,
}

fn tensor(parts: &Parts) -> Done<Object> {
    let shape = extents(parts.dims.0, parts.dims.1, "viewDims")?;
    let strides = match parts.strides.read(shape.len()) {
        Some(_) => extents(parts.strides, shape.len() as u64, "strides")?,
        None => dense(&shape),
    };
    let storage = extents(parts.storage.0, parts.storage.1, "storageDims")?;
    let offset = usize::try_from(parts.offset)
        .map_err(|_| Failure::operator(format!("offset {} is negative", parts.offset)))?;
    let dtype = DataType::from_number(parts.dtype)?;
    let address = AtomicU64::new(parts.address);
    let format = parts.format;
    let tensor = Tensor { dtype, shape, strides, offset, storage, format, address };
    Ok(Object::Tensor(Arc::new(tensor)))
}

fn dense(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for axis in (0..shape.len().saturating_sub(1)).rev() {
        strides[axis] = strides[axis + 1] * shape[axis + 1];
    }
    strides
}

/// CANN's `aclCreateTensor`.
#[unsafe(no_mangle)]
pub extern "C" fn aclCreateTensor(
    view_dims: Many<i64>,
    view_count: u64,
    dtype: i32,
    strides: Many<i64>,
    offset: i64,
    format: i32,
    storage_dims: Many<i64>,
    storage_count: u64,
    address: u64,
) -> u64 {
    let parts = Parts {
        dims: (view_dims, view_count),
        dtype,
        strides,
        offset,
        format,
        storage: (storage_dims, storage_count),
        address,
    };
    made("aclCreateTensor", tensor(&parts))
}

/// CANN's `aclCreateScalar`.
#[unsafe(no_mangle)]
pub extern "C" fn aclCreateScalar(value: Host, dtype: i32) -> u64 {
    let scalar = || {
        if value.0 == 0 {
            return Err(Failure::new(code::OP_NULL, "`value` is null"));
        }
        let dtype = DataType::from_number(dtype)?;
        let mut bytes = [0; 8];
        let read = value.read(dtype.bytes(1));
        bytes[..read.len()].copy_from_slice(&read);
        Ok(Object::Scalar(Scalar::read(dtype, bytes)?))
    };
    made("aclCreateScalar", scalar())
}

fn array<T: Copy>(
    from: Many<T>,
    count: u64,
    object: impl FnOnce(Arc<Vec<T>>) -> Object,
) -> Done<Object> {
    let read = from.read(count as usize).or((count == 0).then(Vec::new));
    let null = || Failure::new(code::OP_NULL, "`value` is null");
    Ok(object(Arc::new(read.ok_or_else(null)?)))
}

/// CANN's `aclCreateIntArray`.
#[unsafe(no_mangle)]
pub extern "C" fn aclCreateIntArray(value: Many<i64>, count: u64) -> u64 {
    made("aclCreateIntArray", array(value, count, Object::Integers))
}

/// CANN's `aclCreateFloatArray`.
#[unsafe(no_mangle)]
pub extern "C" fn aclCreateFloatArray(value: Many<f32>, count: u64) -> u64 {
    made("aclCreateFloatArray", array(value, count, Object::Floats))
}

/// CANN's `aclCreateBoolArray`.
#[unsafe(no_mangle)]
pub extern "C" fn aclCreateBoolArray(value: Many<bool>, count: u64) -> u64 {
    made("aclCreateBoolArray", array(value, count, Object::Truths))
}

/// CANN's `aclCreateTensorList`.
#[unsafe(no_mangle)]
pub extern "C" fn aclCreateTensorList(value: Many<u64>, count: u64) -> u64 {
    made("aclCreateTensorList", array(value, count, Object::Tensors))
}

/// The functions here that return no code, by name.
pub(super) fn makers() -> Vec<(&'static str, *const std::ffi::c_void)> {
    vec![
        ("aclCreateTensor", aclCreateTensor as *const _),
        ("aclCreateScalar", aclCreateScalar as *const _),
        ("aclCreateIntArray", aclCreateIntArray as *const _),
        ("aclCreateFloatArray", aclCreateFloatArray as *const _),
        ("aclCreateBoolArray", aclCreateBoolArray as *const _),
        ("aclCreateTensorList", aclCreateTensorList as *const _),
    ]
}

fn executor(handle: u64) -> Done<Arc<Executor>> {
    DRIVER.get(handle, "executor")
}

calls! {
    fn aclDestroyTensor(tensor: u64) {
        DRIVER.drop_object::<Arc<Tensor>>(tensor, "tensor").map(drop)
    }
    fn aclDestroyScalar(scalar: u64) {
        DRIVER.drop_object::<Scalar>(scalar, "scalar").map(drop)
    }
    fn aclDestroyIntArray(array: u64) {
        DRIVER.drop_object::<Arc<Vec<i64>>>(array, "array").map(drop)
    }
    fn aclDestroyFloatArray(array: u64) {
        DRIVER.drop_object::<Arc<Vec<f32>>>(array, "array").map(drop)
    }
    fn aclDestroyBoolArray(array: u64) {
        DRIVER.drop_object::<Arc<Vec<bool>>>(array, "array").map(drop)
    }
    fn aclDestroyTensorList(list: u64) {
        // The list owns its tensors.
        let handles = DRIVER.drop_object::<Arc<Vec<u64>>>(list, "list")?;
        handles
            .iter()
            .try_for_each(|&tensor| DRIVER.drop_object::<Arc<Tensor>>(tensor, "tensor").map(drop))
    }
    fn aclSetAclOpExecutorRepeatable(executor_handle: u64) {
        executor(executor_handle)?.make_repeatable()
    }
    fn aclDestroyAclOpExecutor(executor_handle: u64) {
        DRIVER.drop_object::<Arc<Executor>>(executor_handle, "executor").map(drop)
    }
    fn aclSetTensorAddr(executor_handle: u64, index: u64, tensor: u64, address: u64) {
        executor(executor_handle)?.set_address(index as usize, tensor, address)
    }
    fn aclSetInputTensorAddr(executor_handle: u64, index: u64, tensor: u64, address: u64) {
        executor(executor_handle)?.set_address(index as usize, tensor, address)
    }
    fn aclSetOutputTensorAddr(executor_handle: u64, index: u64, tensor: u64, address: u64) {
        let executor = executor(executor_handle)?;
        let index = executor.output(index as usize)?;
        executor.set_address(index, tensor, address)
    }
    fn aclSetDynamicTensorAddr(
        executor_handle: u64,
        ir_index: u64,
        relative_index: u64,
        list: u64,
        address: u64,
    ) {
        DRIVER.get::<Arc<Vec<u64>>>(list, "tensors")?;
        let executor = executor(executor_handle)?;
        executor.set_list_address(ir_index as usize, relative_index as usize, address)
    }
    fn aclGetViewShape(tensor: u64, dims: Out<u64>, count: Out<u64>) {
        let tensor: Arc<Tensor> = DRIVER.get(tensor, "tensor")?;
        let shape: Vec<i64> = tensor.shape.iter().map(|&extent| extent as i64).collect();
        count.set(shape.len() as u64, code::OP_NULL, "viewDimsNum")?;
        // The caller frees it with `delete[]`; here it is kept for the life of the process.
        let kept = Box::leak(shape.into_boxed_slice());
        dims.set(kept.as_ptr().expose_provenance() as u64, code::OP_NULL, "viewDims")
    }
    fn aclGetDataType(tensor: u64, dtype: Out<i32>) {
        let tensor: Arc<Tensor> = DRIVER.get(tensor, "tensor")?;
        dtype.set(tensor.dtype.number(), code::OP_NULL, "dataType")
    }
    fn aclGetFormat(tensor: u64, format: Out<i32>) {
        let tensor: Arc<Tensor> = DRIVER.get(tensor, "tensor")?;
        format.set(tensor.format, code::OP_NULL, "format")
    }
    fn aclGetViewOffset(tensor: u64, offset: Out<i64>) {
        let tensor: Arc<Tensor> = DRIVER.get(tensor, "tensor")?;
        offset.set(tensor.offset as i64, code::OP_NULL, "offset")
    }
    fn aclGetTensorListSize(list: u64, size: Out<u64>) {
        let list: Arc<Vec<u64>> = DRIVER.get(list, "tensorList")?;
        size.set(list.len() as u64, code::OP_NULL, "size")
    }
    fn aclGetIntArraySize(array: u64, size: Out<u64>) {
        let array: Arc<Vec<i64>> = DRIVER.get(array, "array")?;
        size.set(array.len() as u64, code::OP_NULL, "size")
    }
    fn aclSetRawTensorAddr(tensor: u64, address: u64) {
        let tensor: Arc<Tensor> = DRIVER.get(tensor, "tensor")?;
        tensor.address.store(address, Ordering::Relaxed);
        Ok(())
    }
    fn aclGetRawTensorAddr(tensor: u64, address: Out<u64>) {
        let tensor: Arc<Tensor> = DRIVER.get(tensor, "tensor")?;
        address.set(tensor.base(), code::OP_NULL, "addr")
    }
    fn aclnnInit(_config: u64) {
        Ok(())
    }
    fn aclnnFinalize() {
        Ok(())
    }
}
