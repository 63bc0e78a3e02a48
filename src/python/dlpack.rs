//! The C structures of DLPack 1.x, as its header `dlpack.h` lays them out
//! (<https://dmlc.github.io/dlpack/latest/c_api.html>).

use std::ffi::{c_int, c_void};

pub(super) const CPU: i32 = 1;
pub(super) const CUDA: i32 = 2;
pub(super) const READ_ONLY: u64 = 1;

pub(super) const INT: u8 = 0;
pub(super) const UINT: u8 = 1;
pub(super) const FLOAT: u8 = 2;
pub(super) const BFLOAT: u8 = 4;
pub(super) const COMPLEX: u8 = 5;
pub(super) const BOOL: u8 = 6;

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Version {
    pub major: u32,
    pub minor: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Device {
    pub kind: i32,
    pub index: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct DataType {
    pub code: u8,
    pub bits: u8,
    pub lanes: u16,
}

#[repr(C)]
pub(super) struct Tensor {
    pub data: *mut c_void,
    pub device: Device,
    pub ndim: i32,
    pub dtype: DataType,
    pub shape: *mut i64,
    /// Null for C order, in old exporters.
    pub strides: *mut i64,
    pub byte_offset: u64,
}

#[repr(C)]
pub(super) struct ManagedTensor {
    pub tensor: Tensor,
    pub manager_context: *mut c_void,
    pub deleter: Option<unsafe extern "C" fn(*mut ManagedTensor)>,
}

#[repr(C)]
pub(super) struct ManagedTensorVersioned {
    pub version: Version,
    pub manager_context: *mut c_void,
    pub deleter: Option<unsafe extern "C" fn(*mut ManagedTensorVersioned)>,
    pub flags: u64,
    pub tensor: Tensor,
}

#[repr(C)]
pub(super) struct ExchangeApiHeader {
    pub version: Version,
    pub previous: *mut ExchangeApiHeader,
}

/// What the capsule `__dlpack_c_exchange_api__` of a tensor type points to.
#[repr(C)]
pub(super) struct ExchangeApi {
    pub header: ExchangeApiHeader,
    pub allocate: *const c_void,
    pub managed_tensor_from_py_object:
        Option<unsafe extern "C" fn(*mut c_void, *mut *mut ManagedTensorVersioned) -> c_int>,
}
