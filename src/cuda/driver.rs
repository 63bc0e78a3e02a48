//! The CUDA driver, loaded at run time: the dozen functions that a launch needs.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::path::Path;
use std::sync::Mutex;

use libloading::os::unix::Library;

use crate::error::LapsError;

type Status = c_int;
type Handle = *mut c_void;

const SUCCESS: Status = 0;
const MULTIPROCESSORS: c_int = 16;
const MAJOR: c_int = 75;
const MINOR: c_int = 76;
const SHARED_PER_BLOCK: c_int = 97;
const FUNCTION_SHARED: c_int = 8;

functions!(Functions {
    init = "cuInit": fn(c_uint) -> Status;
    error_name = "cuGetErrorName": fn(Status, *mut *const c_char) -> Status;
    error_string = "cuGetErrorString": fn(Status, *mut *const c_char) -> Status;
    driver_version = "cuDriverGetVersion": fn(*mut c_int) -> Status;
    device_get = "cuDeviceGet": fn(*mut c_int, c_int) -> Status;
    device_attribute = "cuDeviceGetAttribute": fn(*mut c_int, c_int, c_int) -> Status;
    retain_context = "cuDevicePrimaryCtxRetain": fn(*mut Handle, c_int) -> Status;
    push_context = "cuCtxPushCurrent_v2": fn(Handle) -> Status;
    pop_context = "cuCtxPopCurrent_v2": fn(*mut Handle) -> Status;
    load_module = "cuModuleLoadData": fn(*mut Handle, *const c_void) -> Status;
    get_function = "cuModuleGetFunction": fn(*mut Handle, Handle, *const c_char) -> Status;
    set_attribute = "cuFuncSetAttribute": fn(Handle, c_int, c_int) -> Status;
    launch = "cuLaunchKernel":
        fn(Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut *mut c_void, *mut *mut c_void)
            -> Status;
});

/// A stream of the device's primary context, as an address; 0 is the default stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream(pub usize);

/// What a device can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// The number that torch and the driver know it by.
    pub index: i32,
    /// Compute capability: 9.0 is 90.
    pub architecture: u32,
    pub multiprocessors: u32,
    /// Bytes of shared memory that a block may ask for.
    pub shared_memory: usize,
}

/// A compiled kernel on one device.
#[derive(Clone, Copy, Debug)]
pub struct Function(usize);

/// The loaded driver.
pub struct Driver {
    functions: Functions,
    /// Whether it is a stand-in that runs kernels on the CPU, for tests.
    pub emulated: bool,
    /// Contexts by device: retained once and never released, as torch's are.
    contexts: Mutex<Vec<(i32, usize)>>,
    _library: Library,
}

impl Driver {
    /// Loads the driver's library.
    pub(super) fn load(path: &Path) -> Result<Self, LapsError> {
        let operation = "cuda";
        // SAFETY: NVIDIA's driver (or what the user named in its place) runs its initialisers.
        let library = unsafe { Library::open(Some(path), libloading::os::unix::RTLD_NOW) }
            .map_err(|error| LapsError::device(operation, "no CUDA driver", path.display(), error))?;
        let functions = Functions::load(&library).map_err(|symbol| {
            LapsError::device(
                operation,
                "the CUDA driver is too old",
                format!("the function {symbol}"),
                "none",
            )
        })?;
        // SAFETY: only whether the name exists is asked.
        let emulated = unsafe { library.get::<*const c_void>(b"laps_emulated_driver") }.is_ok();
        let driver = Driver { functions, emulated, contexts: Mutex::new(Vec::new()), _library: library };
        // SAFETY: takes no pointer.
        driver.check(operation, "cuInit", unsafe { (driver.functions.init)(0) })?;
        Ok(driver)
    }

    fn check(&self, operation: &'static str, function: &str, status: Status) -> Result<(), LapsError> {
        if status == SUCCESS {
            return Ok(());
        }
        let text = |ask: unsafe extern "C" fn(Status, *mut *const c_char) -> Status| {
            let mut name = std::ptr::null();
            // SAFETY: the driver stores a pointer to a constant string, or leaves null.
            unsafe {
                if ask(status, &mut name) != SUCCESS || name.is_null() {
                    return format!("{status}");
                }
                CStr::from_ptr(name).to_string_lossy().into_owned()
            }
        };
        let got = format!("{}: {}", text(self.functions.error_name), text(self.functions.error_string));
        Err(LapsError::device(operation, format!("{function} failed"), "success", got))
    }

    /// The driver's version: 13000 for CUDA 13.0.
    pub fn version(&self) -> Result<i32, LapsError> {
        let mut version = 0;
        // SAFETY: writes the one integer.
        self.check("cuda", "cuDriverGetVersion", unsafe { (self.functions.driver_version)(&mut version) })?;
        Ok(version)
    }

    /// A device by its number.
    pub fn device(&self, index: i32) -> Result<Device, LapsError> {
        let operation = "cuda";
        let mut handle = 0;
        // SAFETY: writes the one integer.
        self.check(operation, "cuDeviceGet", unsafe { (self.functions.device_get)(&mut handle, index) })?;
        let attribute = |number| {
            let mut value = 0;
            // SAFETY: writes the one integer.
            let status = unsafe { (self.functions.device_attribute)(&mut value, number, handle) };
            self.check(operation, "cuDeviceGetAttribute", status).map(|()| value.max(0) as u32)
        };
        Ok(Device {
            index,
            architecture: 10 * attribute(MAJOR)? + attribute(MINOR)?,
            multiprocessors: attribute(MULTIPROCESSORS)?,
            shared_memory: attribute(SHARED_PER_BLOCK)? as usize,
        })
    }

    /// Runs `job` in the device's primary context, which is torch's, and leaves the thread's own as it was.
    fn within<R>(
        &self,
        operation: &'static str,
        device: i32,
        job: impl FnOnce() -> Result<R, LapsError>,
    ) -> Result<R, LapsError> {
        let context = self.context(operation, device)?;
        // SAFETY: the context is retained and so valid; every push meets its pop.
        self.check(operation, "cuCtxPushCurrent", unsafe { (self.functions.push_context)(context) })?;
        let result = job();
        let mut popped = std::ptr::null_mut();
        // SAFETY: as above.
        let status = unsafe { (self.functions.pop_context)(&mut popped) };
        result.and_then(|value| self.check(operation, "cuCtxPopCurrent", status).map(|()| value))
    }

    fn context(&self, operation: &'static str, device: i32) -> Result<Handle, LapsError> {
        let mut contexts = self.contexts.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(&(_, context)) = contexts.iter().find(|(index, _)| *index == device) {
            return Ok(context as Handle);
        }
        let (mut handle, mut context) = (0, std::ptr::null_mut());
        // SAFETY: each writes its one result.
        unsafe {
            self.check(operation, "cuDeviceGet", (self.functions.device_get)(&mut handle, device))?;
            let status = (self.functions.retain_context)(&mut context, handle);
            self.check(operation, "cuDevicePrimaryCtxRetain", status)?;
        }
        contexts.push((device, context as usize));
        Ok(context)
    }

    /// Loads a CUBIN onto a device and finds kernels in it by name. The module stays loaded.
    pub(super) fn load_module<const N: usize>(
        &self,
        device: &Device,
        image: &[u8],
        names: [&str; N],
    ) -> Result<[Function; N], LapsError> {
        let operation = "cuda";
        self.within(operation, device.index, || {
            let mut module = std::ptr::null_mut();
            // SAFETY: the image is a whole CUBIN, which the driver copies.
            let status = unsafe { (self.functions.load_module)(&mut module, image.as_ptr().cast()) };
            self.check(operation, "cuModuleLoadData", status)?;
            let mut found = [Function(0); N];
            for (function, name) in found.iter_mut().zip(names) {
                let name = CString::new(name).expect("no zero byte");
                let mut handle = std::ptr::null_mut();
                let shared = device.shared_memory as c_int;
                // SAFETY: the module is loaded, the name a C string.
                unsafe {
                    let status = (self.functions.get_function)(&mut handle, module, name.as_ptr());
                    self.check(operation, "cuModuleGetFunction", status)?;
                    // Beyond 48 KiB a kernel must be told first what its launches may ask for.
                    let status = (self.functions.set_attribute)(handle, FUNCTION_SHARED, shared);
                    self.check(operation, "cuFuncSetAttribute", status)?;
                }
                *function = Function(handle as usize);
            }
            Ok(found)
        })
    }

    /// Launches a kernel that takes one structure by value.
    ///
    /// # Safety
    ///
    /// `parameters` must be what the kernel takes, and every pointer in it valid on the device for what the kernel does
    /// with it, until the stream has run it.
    pub(super) unsafe fn launch<P>(
        &self,
        operation: &'static str,
        device: &Device,
        function: Function,
        stream: Stream,
        (blocks, threads, shared): ((u32, u32), u32, usize),
        parameters: &P,
    ) -> Result<(), LapsError> {
        self.within(operation, device.index, || {
            let mut pointers = [std::ptr::from_ref(parameters).cast_mut().cast::<c_void>()];
            // SAFETY: the driver copies the parameters before it returns; the rest is the caller's promise.
            let status = unsafe {
                (self.functions.launch)(
                    function.0 as Handle,
                    blocks.0,
                    blocks.1,
                    1,
                    threads,
                    1,
                    1,
                    shared as c_uint,
                    stream.0 as Handle,
                    pointers.as_mut_ptr(),
                    std::ptr::null_mut(),
                )
            };
            self.check(operation, "cuLaunchKernel", status)
        })
    }
}
