//! The kernels, compiled by NVRTC for the device at hand, and kept on disk.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use super::driver::{Device, Function};
use super::libraries::{Libraries, first};
use super::similarity::Element;
use crate::error::LapsError;

const OPERATION: &str = "cuda";

type Program = *mut std::ffi::c_void;
type Status = c_int;

/// The files that kernels include.
const HEADERS: [(&str, &str); 8] = [
    ("align.cuh", include_str!("kernels/align.cuh")),
    ("call.cuh", include_str!("kernels/call.cuh")),
    ("device.cuh", include_str!("kernels/device.cuh")),
    ("element.cuh", include_str!("kernels/element.cuh")),
    ("gradient.cuh", include_str!("kernels/gradient.cuh")),
    ("pair.cuh", include_str!("kernels/pair.cuh")),
    ("select.cuh", include_str!("kernels/select.cuh")),
    ("tokens.cuh", include_str!("kernels/tokens.cuh")),
];

/// A kernel: its file, and its name within.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kernel {
    Forward,
    Backward,
}

impl Kernel {
    pub const ALL: [Kernel; 2] = [Kernel::Forward, Kernel::Backward];

    pub fn name(self) -> &'static str {
        match self {
            Kernel::Forward => "similarity_forward",
            Kernel::Backward => "similarity_backward",
        }
    }

    fn source(self) -> (&'static str, &'static str) {
        match self {
            Kernel::Forward => ("similarity.cu", include_str!("kernels/similarity.cu")),
            Kernel::Backward => ("similarity_backward.cu", include_str!("kernels/similarity_backward.cu")),
        }
    }
}

/// What a kernel is built for, beside the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Build {
    pub kernel: Kernel,
    pub element: Element,
    /// Whether products of f32 may round their factors to TF32.
    pub tf32: bool,
    /// Whether the caller's mask has values between 0 and 1.
    pub soft_mask: bool,
}

impl std::fmt::Display for Build {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let tf32 = if self.tf32 { ", TF32" } else { "" };
        let soft = if self.soft_mask { ", soft mask" } else { "" };
        write!(f, "{} {:?}{tf32}{soft}", self.kernel.name(), self.element)
    }
}

impl Build {
    /// Every build that a device may be asked for.
    pub fn all() -> impl Iterator<Item = Build> {
        let elements =
            [(Element::F32, false), (Element::F32, true), (Element::F16, false), (Element::Bf16, false)];
        let builds = Kernel::ALL.into_iter().flat_map(move |kernel| {
            elements.into_iter().flat_map(move |(element, tf32)| {
                [false, true].map(|soft_mask| Build { kernel, element, tf32, soft_mask })
            })
        });
        builds.filter(|build| build.is_offered())
    }

    /// What f16 has no range for (gradients) or no registers (a soft mask), its caller converts to f32, and allows TF32.
    pub fn is_offered(self) -> bool {
        self.element != Element::F16 || (self.kernel == Kernel::Forward && !self.soft_mask)
    }

    fn options(self, architecture: u32) -> Vec<String> {
        vec![
            format!("--gpu-architecture=sm_{architecture}"),
            "--std=c++17".to_string(),
            // Registers and spills go to the log.
            "--ptxas-options=-v".to_string(),
            format!("-DLAPS_ELEMENT={}", self.element as u32),
            format!("-DLAPS_TF32={}", u32::from(self.tf32)),
            format!("-DSOFT_MASK={}", u32::from(self.soft_mask)),
        ]
    }
}

functions!(Functions {
    version = "nvrtcVersion": fn(*mut c_int, *mut c_int) -> Status;
    create = "nvrtcCreateProgram":
        fn(*mut Program, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char) -> Status;
    compile = "nvrtcCompileProgram": fn(Program, c_int, *const *const c_char) -> Status;
    log_size = "nvrtcGetProgramLogSize": fn(Program, *mut usize) -> Status;
    log = "nvrtcGetProgramLog": fn(Program, *mut c_char) -> Status;
    cubin_size = "nvrtcGetCUBINSize": fn(Program, *mut usize) -> Status;
    cubin = "nvrtcGetCUBIN": fn(Program, *mut c_char) -> Status;
    destroy = "nvrtcDestroyProgram": fn(*mut Program) -> Status;
});

/// NVIDIA's run-time compiler. It needs no GPU.
pub struct Nvrtc {
    functions: Functions,
    /// Major and minor.
    pub version: (i32, i32),
    pub path: PathBuf,
    _libraries: Vec<Library>,
}

impl Nvrtc {
    pub(super) fn load(path: &Path) -> Result<Self, String> {
        let open = |path: &Path, flags| {
            // SAFETY: NVIDIA's library (or what the user named in its place) runs its initialisers.
            unsafe { Library::open(Some(path), flags) }
                .map_err(|error| format!("{}: {error}", path.display()))
        };
        // It looks for its built-ins by name, where the system does: not in Python's folders. So they come first.
        let mut libraries = Vec::new();
        for file in path.parent().and_then(|folder| folder.read_dir().ok()).into_iter().flatten().flatten() {
            let name = file.file_name();
            if name.to_string_lossy().starts_with("libnvrtc-builtins.so") {
                libraries.push(open(&file.path(), RTLD_NOW | RTLD_GLOBAL)?);
            }
        }
        let library = open(path, RTLD_NOW)?;
        let functions =
            Functions::load(&library).map_err(|symbol| format!("{}: no {symbol}", path.display()))?;
        let mut version = (0, 0);
        // SAFETY: writes the two integers.
        if unsafe { (functions.version)(&mut version.0, &mut version.1) } != 0 {
            return Err(format!("{}: nvrtcVersion failed", path.display()));
        }
        libraries.push(library);
        Ok(Nvrtc { functions, version, path: path.to_path_buf(), _libraries: libraries })
    }

    /// Compiles to a CUBIN; returns it with the compiler's log.
    fn compile(&self, build: Build, architecture: u32) -> Result<(Vec<u8>, String), LapsError> {
        let text = |s: &str| CString::new(s).expect("no zero byte in a source");
        let (file, source) = build.kernel.source();
        let (file, source) = (text(file), text(source));
        let headers: Vec<[CString; 2]> =
            HEADERS.iter().map(|(name, source)| [text(name), text(source)]).collect();
        let names: Vec<*const c_char> = headers.iter().map(|[name, _]| name.as_ptr()).collect();
        let sources: Vec<*const c_char> = headers.iter().map(|[_, source]| source.as_ptr()).collect();
        let options: Vec<CString> = build.options(architecture).iter().map(|option| text(option)).collect();
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let mut program = std::ptr::null_mut();
        // SAFETY: all pointers are to C strings that outlive the calls; sizes are asked for before buffers are filled;
        // the program is destroyed once, at the end.
        unsafe {
            let count = headers.len() as c_int;
            let (sources, names) = (sources.as_ptr(), names.as_ptr());
            let status =
                (self.functions.create)(&mut program, source.as_ptr(), file.as_ptr(), count, sources, names);
            if status != 0 {
                let got = format!("error {status}");
                return Err(LapsError::device(OPERATION, "nvrtcCreateProgram failed", "success", got));
            }
            let status = (self.functions.compile)(program, options.len() as c_int, options.as_ptr());
            let log = self.read(program, self.functions.log_size, self.functions.log);
            let log = CStr::from_bytes_until_nul(&log).unwrap_or_default().to_string_lossy().into_owned();
            let cubin = self.read(program, self.functions.cubin_size, self.functions.cubin);
            (self.functions.destroy)(&mut program);
            if status != 0 || cubin.is_empty() {
                let (major, minor) = self.version;
                let problem = format!("NVRTC {major}.{minor} cannot compile {}", build.kernel.name());
                let expected = format!("an architecture that it knows, for sm_{architecture}");
                return Err(LapsError::device(OPERATION, problem, expected, log.trim()));
            }
            Ok((cubin, log))
        }
    }

    /// # Safety
    ///
    /// `program` must exist, and the two functions belong together.
    unsafe fn read(
        &self,
        program: Program,
        size: unsafe extern "C" fn(Program, *mut usize) -> Status,
        fill: unsafe extern "C" fn(Program, *mut c_char) -> Status,
    ) -> Vec<u8> {
        let mut bytes = 0;
        // SAFETY: the caller's promise; the buffer has the size that was answered, and one more byte.
        unsafe {
            if size(program, &mut bytes) != 0 {
                return Vec::new();
            }
            let mut buffer = vec![0u8; bytes + 1];
            if fill(program, buffer.as_mut_ptr().cast()) != 0 {
                return Vec::new();
            }
            buffer.truncate(bytes);
            buffer
        }
    }
}

/// The kernels of a process, loaded as they are asked for.
#[derive(Default)]
pub struct Kernels {
    loaded: Mutex<HashMap<(Build, i32), (Device, Function)>>,
}

impl Kernels {
    /// A kernel on a device: from memory, from the disk, or compiled now, which takes seconds.
    pub fn get(
        &self,
        libraries: &Libraries,
        device: i32,
        build: Build,
    ) -> Result<(Device, Function), LapsError> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = loaded.get(&(build, device)) {
            return Ok(*found);
        }
        let description = libraries.driver.device(device)?;
        let architecture = description.architecture;
        if architecture < 80 {
            let problem = format!("GPU {device} is too old for the kernels");
            let got = format!("sm_{architecture}; backend=\"torch\" runs there");
            return Err(LapsError::device(OPERATION, problem, "compute capability 8.0 or higher", got));
        }
        let function = load(libraries, &description, build, architecture).or_else(|error| {
            // A GPU newer than this NVRTC runs what is made for the first of its family.
            let first = architecture / 10 * 10;
            if first == architecture {
                return Err(error);
            }
            load(libraries, &description, build, first).map_err(|_| error)
        })?;
        loaded.insert((build, device), (description, function));
        Ok((description, function))
    }
}

fn load(
    libraries: &Libraries,
    device: &Device,
    build: Build,
    architecture: u32,
) -> Result<Function, LapsError> {
    let key = cache_key(&libraries.nvrtc, build, architecture);
    let file = cache_folder()
        .map(|folder| folder.join(format!("{}-{:016x}.cubin", build.kernel.name(), hash(&key))));
    let load = |image: &[u8]| libraries.driver.load_module(device, image, [build.kernel.name()]);
    // A file that is damaged, or that the driver does not take, is as good as none.
    let kept = file.as_ref().and_then(|file| read_cached(file, &key)).and_then(|image| load(&image).ok());
    let [function] = match kept {
        Some(functions) => functions,
        None => {
            let (image, _) = libraries.nvrtc.compile(build, architecture)?;
            let functions = load(&image)?;
            if let Some(file) = file {
                // Without it the next process compiles again: no reason to fail.
                let _ = write_cached(&file, &key, &image);
            }
            functions
        }
    };
    Ok(function)
}

/// Compiles every build for an architecture, on any machine that has one of these NVRTCs; returns each with its log.
pub fn compile_all(nvrtc: &[PathBuf], architecture: u32) -> Result<Vec<(Build, String)>, LapsError> {
    let nvrtc = first(nvrtc)?;
    Build::all().map(|build| nvrtc.compile(build, architecture).map(|(_, log)| (build, log))).collect()
}

// ---- the cache: a line that says what it is, a checksum, the CUBIN

fn hash(value: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

fn cache_key(nvrtc: &Nvrtc, build: Build, architecture: u32) -> String {
    let sources = hash((build.kernel.source(), HEADERS));
    let options = build.options(architecture).join(" ");
    format!("laps {} nvrtc {:?} sources {sources:016x} {options}", env!("CARGO_PKG_VERSION"), nvrtc.version)
}

/// `LAPS_CACHE_DIR`, or `laps` in the user's cache folder.
fn cache_folder() -> Option<PathBuf> {
    let named = |variable| std::env::var_os(variable).filter(|name| !name.is_empty()).map(PathBuf::from);
    named("LAPS_CACHE_DIR").or_else(|| {
        let folder = named("XDG_CACHE_HOME").or_else(|| Some(named("HOME")?.join(".cache")))?;
        Some(folder.join("laps"))
    })
}

fn read_cached(file: &Path, key: &str) -> Option<Vec<u8>> {
    let bytes = std::fs::read(file).ok()?;
    let rest = bytes.strip_prefix(key.as_bytes())?.strip_prefix(b"\n")?;
    let (checksum, image) = rest.split_at_checked(8)?;
    (checksum == hash(image).to_le_bytes()).then(|| image.to_vec())
}

fn write_cached(file: &Path, key: &str, image: &[u8]) -> std::io::Result<()> {
    let folder = file.parent().expect("a file in the cache folder");
    std::fs::create_dir_all(folder)?;
    // Of its own name, since other processes may write the same kernel now; the last one stays.
    let partial = file.with_extension(format!("{}.partial", std::process::id()));
    let written = std::fs::File::create(&partial).and_then(|mut out| {
        out.write_all(key.as_bytes())?;
        out.write_all(b"\n")?;
        out.write_all(&hash(image).to_le_bytes())?;
        out.write_all(image)?;
        out.sync_all()
    });
    let done = written.and_then(|()| std::fs::rename(&partial, file));
    if done.is_err() {
        let _ = std::fs::remove_file(&partial);
    }
    done
}
