//! Launches of the similarity kernels: their parameters, and how a launch is cut into blocks.

use super::compile::{Build, Kernel, Kernels};
use super::driver::{Device, Function, Stream};
use super::libraries::libraries;
use crate::error::LapsError;

/// Threads of a warp; a warp works on a pair.
const WARP: usize = 32;
/// As many warps as fit the registers of a multiprocessor, with 255 for each thread.
const MOST_WARPS: usize = 8;
/// Texts per warp below which the image is read from L2: copying it to shared memory would cost more.
const FEW_TEXTS: usize = 4;

/// Element types of the tensor cores' products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Element {
    F32 = 0,
    F16 = 1,
    Bf16 = 2,
}

impl Element {
    pub fn bytes(self) -> usize {
        if self == Element::F32 { 4 } else { 2 }
    }
}

/// How a pair's patches are selected; as the kernels number it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Selection {
    Top = 0,
    Gumbel = 1,
    Perturbed = 2,
    Mask = 3,
    Soft = 4,
    Saved = 5,
}

/// An address on the device; 0 for none.
pub type Address = u64;

/// Parameters of the forward kernel: `Call` in kernels/call.cuh, field for field, where each is explained.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Call {
    pub weights: Address,
    pub gram: Address,
    pub rows: Address,
    pub norms: Address,
    pub self_scores: Address,
    pub text_factor: Address,
    pub keep_prob: Address,
    pub logits: Address,
    pub image_finite: Address,
    pub words: Address,
    pub word_inverse: Address,
    pub first_word: Address,
    pub word_count: Address,
    pub text_finite: Address,
    pub products: Address,
    pub text_products: Address,
    pub mask: Address,
    pub scores: Address,
    pub fraction: Address,
    pub selection: Address,
    pub best_token: Address,
    pub best_word: Address,
    pub word_offset: i64,
    pub product_pitch: i64,
    pub product_image: i64,
    pub text_pitch: i64,
    pub text_image: i64,
    pub mask_pitch: i64,
    pub seed: u64,
    pub images: i32,
    pub texts: i32,
    pub first_image: i32,
    pub first_text: i32,
    pub columns: i32,
    pub diagonal: i32,
    pub patches: i32,
    pub stride: i32,
    pub pitch: i32,
    pub slots: i32,
    pub aggregated: i32,
    pub prefix: i32,
    pub channels: i32,
    pub max_words: i32,
    pub kept: i32,
    pub selection_mode: i32,
    pub soft: i32,
    pub seeded: i32,
    pub paper: i32,
    pub language_context: i32,
    pub fusion: i32,
    pub shared: i32,
    pub attention_weight: f32,
    pub temperature: f32,
    pub negative_slope: f32,
    pub word_to_patch: f32,
    pub patch_to_word: f32,
}

/// Parameters of the backward kernel: `BackwardCall` in kernels/gradient.cuh.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct BackwardCall {
    pub call: Call,
    pub grad_scores: Address,
    pub grad_fraction: Address,
    pub grad_products: Address,
    pub tokens: Address,
    pub shrunk_tokens: Address,
    pub grad_weights: Address,
    pub grad_keep: Address,
    pub grad_mask: Address,
    pub poisoned_images: Address,
    pub poisoned_texts: Address,
    pub warps_per_image: i64,
}

/// How a launch is cut: a block works on one image and some of the texts, each of its warps on one pair at a time; for the
/// diagonal, each warp on one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    pub warps: usize,
    /// Blocks that share an image.
    pub splits: usize,
    /// Whether an image's weights and G lie in shared memory.
    pub shared: bool,
    /// Bytes of shared memory of a block.
    pub bytes: usize,
}

fn align16(bytes: usize) -> usize {
    bytes.next_multiple_of(16)
}

impl Geometry {
    /// The same sums as `take_work`, `warp_bytes` and `gradient_bytes` of the kernels.
    pub fn new(device: &Device, call: &Call, element: Element, backward: bool) -> Result<Self, LapsError> {
        let size = |x: i32| x as usize;
        let (stride, slots) = (size(call.stride), size(call.slots));
        let soft_mask = call.selection_mode == Selection::Soft as i32;
        let mut warp = align16(stride * element.bytes())
            + align16(8 * size(call.patches))
            + align16(4 * (stride / 32 + 1))
            + align16(12 * slots)
            + 64
            + if soft_mask { align16(4 * stride) } else { 0 };
        if backward {
            warp += 32 * slots * element.bytes()
                + align16(4 * slots)
                + if call.soft != 0 { 8 * stride } else { 0 };
        }
        let image = (slots + stride) * size(call.pitch) * element.bytes();
        let limit = device.shared_memory;
        let warps_beside = |image: usize| (limit.saturating_sub(image) / warp).min(MOST_WARPS);
        if warps_beside(0) == 0 {
            let pass = if backward { "backward" } else { "forward" };
            let problem = format!(
                "GPU {} has too little shared memory for the {pass} pass of these sizes",
                device.index
            );
            let expected = format!("at least {warp} bytes per block, or backend=\"torch\"");
            return Err(LapsError::device("similarity", problem, expected, limit));
        }
        let (images, texts) = (size(call.images), size(call.texts));
        if call.diagonal != 0 {
            let warps = warps_beside(0).min(images);
            return Ok(Geometry { warps, splits: 1, shared: false, bytes: warps * warp });
        }
        let shared = warps_beside(image) >= MOST_WARPS / 2 && texts >= FEW_TEXTS;
        let image = if shared { image } else { 0 };
        let warps = warps_beside(image).min(texts);
        // Enough blocks to fill the device twice, so that the last ones do not leave most of it idle.
        let wanted = (2 * device.multiprocessors as usize).div_ceil(images);
        let splits = wanted.clamp(1, texts.div_ceil(warps).max(1));
        Ok(Geometry { warps, splits, shared, bytes: image + warps * warp })
    }

    /// Warps that work on one image.
    pub fn warps_per_image(&self, diagonal: bool) -> usize {
        if diagonal { 1 } else { self.warps * self.splits }
    }

    fn grid(&self, call: &Call) -> (u32, u32) {
        if call.diagonal != 0 {
            ((call.images as usize).div_ceil(self.warps) as u32, 1)
        } else {
            (self.splits as u32, call.images as u32)
        }
    }
}

static KERNELS: std::sync::LazyLock<Kernels> = std::sync::LazyLock::new(Kernels::default);

/// How a call would be cut on a device, for what its caller has to allocate.
pub fn geometry(device: i32, call: &Call, element: Element, backward: bool) -> Result<Geometry, LapsError> {
    Geometry::new(&libraries()?.driver.device(device)?, call, element, backward)
}

/// A launch that is ready but for its parameters.
struct Prepared {
    device: Device,
    function: Function,
    geometry: Geometry,
}

fn prepare(device: i32, build: Build, call: &Call) -> Result<Prepared, LapsError> {
    let (device, function) = KERNELS.get(libraries()?, device, build)?;
    let geometry = Geometry::new(&device, call, build.element, build.kernel == Kernel::Backward)?;
    Ok(Prepared { device, function, geometry })
}

impl Prepared {
    /// # Safety
    ///
    /// As [`forward`].
    unsafe fn launch<P>(&self, stream: Stream, call: &Call, parameters: &P) -> Result<(), LapsError> {
        let Prepared { device, function, geometry } = self;
        let shape = (geometry.grid(call), (geometry.warps * WARP) as u32, geometry.bytes);
        // SAFETY: the caller's promise.
        unsafe { libraries()?.driver.launch("similarity", device, *function, stream, shape, parameters) }
    }
}

fn build(kernel: Kernel, element: Element, tf32: bool, call: &Call) -> Result<Build, LapsError> {
    let soft_mask = call.selection_mode == Selection::Soft as i32;
    let build = Build { kernel, element, tf32: tf32 && element == Element::F32, soft_mask };
    if !build.is_offered() {
        return Err(LapsError::type_("similarity", "patches", "float32 or bfloat16", build));
    }
    Ok(build)
}

/// Launches the forward kernel.
///
/// # Safety
///
/// Every address must be valid on the device for what kernels/call.cuh says, until the stream has run the launch.
pub unsafe fn forward(
    device: i32,
    stream: Stream,
    element: Element,
    tf32: bool,
    call: &Call,
) -> Result<(), LapsError> {
    let prepared = prepare(device, build(Kernel::Forward, element, tf32, call)?, call)?;
    if call.selection != 0 {
        // What the backward pass would need: now is the time to refuse it, and not in mid-training.
        let element = if element == Element::F16 { Element::F32 } else { element };
        Geometry::new(&prepared.device, call, element, true)?;
    }
    let call = Call { shared: i32::from(prepared.geometry.shared), ..*call };
    // SAFETY: the caller's promise.
    unsafe { prepared.launch(stream, &call, &call) }
}

/// Launches the backward kernel.
///
/// # Safety
///
/// As [`forward`], and kernels/gradient.cuh.
pub unsafe fn backward(
    device: i32,
    stream: Stream,
    element: Element,
    tf32: bool,
    backward: &BackwardCall,
) -> Result<(), LapsError> {
    let prepared = prepare(device, build(Kernel::Backward, element, tf32, &backward.call)?, &backward.call)?;
    let call = Call { shared: i32::from(prepared.geometry.shared), ..backward.call };
    let backward = BackwardCall { call, ..*backward };
    // SAFETY: the caller's promise.
    unsafe { prepared.launch(stream, &call, &backward) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (kind, name) of the fields of a structure in the kernels' sources: a for addresses, l, u, i, f for numbers.
    fn kernel_fields(source: &str, name: &str) -> Vec<(char, String)> {
        let body = source.split_once(&format!("struct {name} {{")).unwrap().1.split_once("};").unwrap().0;
        let mut fields = Vec::new();
        for line in body.lines() {
            let line = line.split("//").next().unwrap().trim();
            let Some(declaration) = line.strip_suffix(';') else { continue };
            if let Some((_, name)) = declaration.split_once('*') {
                fields.push(('a', name.trim().to_string()));
                continue;
            }
            let (kind, names) = declaration.split_once(' ').unwrap();
            let kind = match kind {
                "i64" => 'l',
                "u64" => 'u',
                "int" => 'i',
                "float" => 'f',
                "Call" => 'c',
                other => panic!("unknown type {other}"),
            };
            fields.extend(names.split(',').map(|name| (kind, name.trim().to_string())));
        }
        fields
    }

    fn own_fields(name: &str) -> Vec<(char, String)> {
        let source = include_str!("similarity.rs");
        let body = source.split_once(&format!("pub struct {name} {{")).unwrap().1.split_once('}').unwrap().0;
        let fields = body.lines().filter_map(|line| line.trim().strip_prefix("pub ")?.strip_suffix(','));
        fields
            .map(|field| {
                let (name, kind) = field.split_once(": ").unwrap();
                let kind = match kind {
                    "Address" => 'a',
                    "i64" => 'l',
                    "u64" => 'u',
                    "i32" => 'i',
                    "f32" => 'f',
                    "Call" => 'c',
                    other => panic!("unknown type {other}"),
                };
                (kind, name.to_string())
            })
            .collect()
    }

    #[test]
    fn parameters_are_laid_out_as_the_kernels_expect() {
        let call = kernel_fields(include_str!("kernels/call.cuh"), "Call");
        assert!(call.len() > 40);
        assert_eq!(own_fields("Call"), call);
        assert_eq!(
            own_fields("BackwardCall"),
            kernel_fields(include_str!("kernels/gradient.cuh"), "BackwardCall")
        );
        // Kernel parameters end at 4 KiB.
        assert!(size_of::<BackwardCall>() <= 4096);
    }

    #[test]
    fn blocks_fit_the_device_and_cover_it() {
        let mut call = Call {
            images: 128,
            texts: 160,
            patches: 196,
            stride: 208,
            pitch: 208,
            slots: 48,
            ..Call::default()
        };
        let h200 = Device { index: 0, architecture: 90, multiprocessors: 132, shared_memory: 232_448 };
        let ada = Device { index: 0, architecture: 89, multiprocessors: 128, shared_memory: 101_376 };
        for device in [h200, ada] {
            for backward in [false, true] {
                for element in [Element::F32, Element::Bf16] {
                    let geometry = Geometry::new(&device, &call, element, backward).unwrap();
                    assert!(geometry.bytes <= device.shared_memory);
                    assert!((1..=MOST_WARPS).contains(&geometry.warps));
                }
            }
        }
        let geometry = Geometry::new(&h200, &call, Element::Bf16, false).unwrap();
        assert_eq!((geometry.warps, geometry.splits, geometry.shared), (8, 3, true));
        call.texts = 1;
        let geometry = Geometry::new(&h200, &call, Element::Bf16, false).unwrap();
        assert_eq!((geometry.warps, geometry.splits, geometry.shared), (1, 1, false));
        call.diagonal = 1;
        let geometry = Geometry::new(&h200, &call, Element::Bf16, true).unwrap();
        assert_eq!((geometry.warps, geometry.warps_per_image(true)), (8, 1));
    }
}
