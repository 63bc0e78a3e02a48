//! `laps._laps.cuda_*`: the kernels for NVIDIA GPUs, with their parameters checked.

use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::dlpack::{self, BFLOAT, BOOL, FLOAT, INT, UINT};
use super::tensors::Tensor;
use crate::cuda::{self, Address, BackwardCall, Call, Element, Selection, Stream};
use crate::error::LapsError;

const OPERATION: &str = "similarity";
const F32: (u8, u8) = (FLOAT, 32);
const I64: (u8, u8) = (INT, 64);
const I16: (u8, u8) = (INT, 16);
const BYTE: (u8, u8) = (UINT, 8);
const FLAG: (u8, u8) = (BOOL, 8);

/// Imports attributes of a Python object as addresses, and keeps what they point to.
struct Importer<'a, 'py> {
    object: &'a Bound<'py, PyAny>,
    device: (i32, i32),
    held: Vec<Tensor>,
}

impl Importer<'_, '_> {
    fn maybe(&mut self, name: &'static str, element: (u8, u8), elements: usize) -> PyResult<Address> {
        let value = self.object.getattr(name)?;
        if value.is_none() {
            return Ok(0);
        }
        let tensor = Tensor::import_on(&value, OPERATION, name, self.device)?;
        let address = tensor.address(element, elements)?;
        self.held.push(tensor);
        Ok(address)
    }

    fn tensor(&mut self, name: &'static str, element: (u8, u8), elements: usize) -> PyResult<Address> {
        match self.maybe(name, element, elements)? {
            0 if elements > 0 => Err(LapsError::type_(OPERATION, name, "a tensor", "None").into()),
            address => Ok(address),
        }
    }

    fn count(&self, name: &'static str, most: usize) -> PyResult<usize> {
        let value: i64 = self.object.getattr(name)?.extract()?;
        match usize::try_from(value) {
            Ok(count) if count <= most => Ok(count),
            _ => Err(LapsError::value(OPERATION, name, format!("0 to {most}"), value).into()),
        }
    }

    fn flag(&self, name: &str) -> PyResult<i32> {
        Ok(i32::from(self.object.getattr(name)?.extract::<bool>()?))
    }

    fn number(&self, name: &str) -> PyResult<f32> {
        self.object.getattr(name)?.extract()
    }
}

/// Sizes beyond these overflow 32-bit indices of the kernels, or 16-bit arg-maxes.
const MOST: usize = 1 << 30;
const MOST_TOKENS: usize = 16384;

fn element_of(name: &str) -> Result<(Element, (u8, u8)), LapsError> {
    match name {
        "float32" => Ok((Element::F32, F32)),
        "float16" => Ok((Element::F16, (FLOAT, 16))),
        "bfloat16" => Ok((Element::Bf16, (BFLOAT, 16))),
        got => Err(LapsError::type_(OPERATION, "element", "float32, float16 or bfloat16", got)),
    }
}

/// A launch's parameters, read from a `laps._cuda.Launch`.
fn read_call(importer: &mut Importer<'_, '_>, element: (u8, u8)) -> PyResult<Call> {
    let i = importer;
    let [images, texts] = [i.count("images", MOST)?, i.count("texts", MOST)?];
    let [patches, stride] = [i.count("patches", MOST_TOKENS)?, i.count("stride", 2 * MOST_TOKENS)?];
    let [pitch, slots] = [i.count("pitch", 2 * MOST_TOKENS)?, i.count("slots", 2 * MOST_TOKENS)?];
    let [aggregated, prefix] = [i.count("aggregated", MOST_TOKENS)?, i.count("prefix_tokens", MOST_TOKENS)?];
    let [channels, max_words] = [i.count("channels", MOST)?, i.count("max_words", MOST_TOKENS)?];
    let [rows, columns] = [i.count("result_rows", MOST)?, i.count("columns", MOST)?];
    let [first_image, first_text] = [i.count("first_image", MOST)?, i.count("first_text", MOST)?];
    let [word_rows, kept] = [i.count("word_rows", MOST)?, i.count("kept", MOST_TOKENS)?];
    let diagonal = i.flag("diagonal")?;
    let mode: i32 = i.object.getattr("selection_mode")?.extract()?;
    let [product_pitch, product_image] =
        [i.count("product_pitch", usize::MAX >> 1)?, i.count("product_image", MOST)?];
    let [text_pitch, text_image] = [i.count("text_pitch", usize::MAX >> 1)?, i.count("text_image", MOST)?];
    let fits = patches > 0
        && stride >= patches
        && stride % 16 == 0
        && pitch >= stride
        && pitch % 8 == 0
        && slots % 16 == 0
        && slots > prefix + aggregated
        && (1..=patches).contains(&kept)
        && first_image + images <= rows
        && (diagonal != 0 || first_text + texts <= columns)
        && (diagonal == 0 || texts == images);
    if !fits {
        return Err(LapsError::value(OPERATION, "sizes", "sizes that fit each other", "others").into());
    }
    // The last element that a kernel touches of a strided table, and one more.
    let table = |rows: usize, pitch: usize, image: usize, width: usize| {
        if rows == 0 { 0 } else { (rows - 1) * pitch + images.saturating_sub(1) * image + width }
    };
    let pairs = rows * columns;
    let masks = if diagonal != 0 { 1 } else { texts };
    let mask = match mode {
        m if m == Selection::Mask as i32 => i.tensor("mask", FLAG, images * masks * patches)?,
        m if m == Selection::Soft as i32 => i.tensor("mask", F32, images * masks * patches)?,
        _ => 0,
    };
    Ok(Call {
        weights: i.tensor("weights", element, images * slots * pitch)?,
        gram: i.tensor("gram", element, images * stride * pitch)?,
        rows: i.tensor("rows", element, images * stride * channels)?,
        norms: i.tensor("norms", F32, images * stride)?,
        self_scores: i.tensor("self_scores", F32, images * patches)?,
        text_factor: i.tensor("text_factor", F32, images * patches)?,
        keep_prob: i.maybe("keep_prob", F32, images * patches)?,
        logits: i.tensor("logits", F32, images * patches * aggregated)?,
        image_finite: i.tensor("image_finite", FLAG, images)?,
        words: i.tensor("words", element, word_rows * channels)?,
        word_inverse: i.tensor("word_inverse", F32, word_rows)?,
        first_word: i.tensor("first_word", I64, texts)?,
        word_count: i.tensor("word_count", I64, texts)?,
        text_finite: i.tensor("text_finite", FLAG, texts)?,
        products: i.tensor("products", element, table(word_rows, product_pitch, product_image, stride))?,
        text_products: i.tensor("text_products", F32, table(texts, text_pitch, text_image, patches))?,
        mask,
        scores: i.tensor("scores", F32, pairs)?,
        fraction: i.tensor("fraction", F32, pairs)?,
        selection: i.maybe("selection", BYTE, pairs * patches.div_ceil(8))?,
        best_token: i.maybe("best_token", I16, pairs * max_words)?,
        best_word: i.maybe("best_word", I16, pairs * (prefix + aggregated + 1))?,
        word_offset: i.count("word_offset", usize::MAX >> 1)? as i64,
        product_pitch: product_pitch as i64,
        product_image: product_image as i64,
        text_pitch: text_pitch as i64,
        text_image: text_image as i64,
        mask_pitch: (masks * patches) as i64,
        seed: i.object.getattr("seed")?.extract()?,
        images: images as i32,
        texts: texts as i32,
        first_image: first_image as i32,
        first_text: first_text as i32,
        columns: columns as i32,
        diagonal,
        patches: patches as i32,
        stride: stride as i32,
        pitch: pitch as i32,
        slots: slots as i32,
        aggregated: aggregated as i32,
        prefix: prefix as i32,
        channels: channels as i32,
        max_words: max_words as i32,
        kept: kept as i32,
        selection_mode: mode,
        soft: i.flag("soft")?,
        seeded: i.flag("seeded")?,
        paper: i.flag("paper")?,
        language_context: i.flag("language_context")?,
        fusion: i.flag("fusion")?,
        shared: 0,
        attention_weight: i.number("attention_weight")?,
        temperature: i.number("temperature")?,
        negative_slope: i.number("negative_slope")?,
        word_to_patch: i.number("word_to_patch")?,
        patch_to_word: i.number("patch_to_word")?,
    })
}

/// Where the tensors of a launch are: on the GPU, or on the CPU for the tests' stand-in of the driver.
fn device_of(index: i32) -> Result<(i32, i32), LapsError> {
    let kind = if cuda::libraries()?.driver.emulated { dlpack::CPU } else { dlpack::CUDA };
    Ok((kind, index))
}

/// Names the files to look for NVRTC in, best first.
#[pyfunction]
pub(super) fn cuda_configure(nvrtc: Vec<PathBuf>) {
    cuda::configure(nvrtc);
}

/// Loads driver and NVRTC; their versions.
#[pyfunction]
pub(super) fn cuda_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let libraries = cuda::libraries()?;
    let info = PyDict::new(py);
    let version = libraries.driver.version()?;
    info.set_item("driver", format!("{}.{}", version / 1000, version % 1000 / 10))?;
    let (major, minor) = libraries.nvrtc.version;
    info.set_item("nvrtc", format!("{major}.{minor}"))?;
    info.set_item("nvrtc_path", &libraries.nvrtc.path)?;
    info.set_item("emulated", libraries.driver.emulated)?;
    Ok(info)
}

/// Compiles all kernels for an architecture, without a GPU; each one's name and the compiler's log.
#[pyfunction]
pub(super) fn cuda_compile(
    py: Python<'_>,
    nvrtc: Vec<PathBuf>,
    architecture: u32,
) -> PyResult<Vec<(String, String)>> {
    let built = py.detach(|| cuda::compile_all(&nvrtc, architecture))?;
    Ok(built.into_iter().map(|(build, log)| (build.to_string(), log)).collect())
}

/// How many warps add up gradients of one image: rows of `grad_weights` per image.
#[pyfunction]
pub(super) fn cuda_warps_per_image(device: i32, element: &str, launch: &Bound<'_, PyAny>) -> PyResult<usize> {
    let (element, code) = element_of(element)?;
    let mut importer = Importer { object: launch, device: device_of(device)?, held: Vec::new() };
    let call = read_call(&mut importer, code)?;
    Ok(cuda::geometry(device, &call, element, true)?.warps_per_image(call.diagonal != 0))
}

/// Launches the forward kernel on a stream.
#[pyfunction]
pub(super) fn cuda_forward(
    device: i32,
    stream: usize,
    element: &str,
    tf32: bool,
    launch: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let (element, code) = element_of(element)?;
    let mut importer = Importer { object: launch, device: device_of(device)?, held: Vec::new() };
    let call = read_call(&mut importer, code)?;
    if call.images == 0 || call.texts == 0 {
        return Ok(());
    }
    let py = launch.py();
    // SAFETY: all addresses are of tensors on the device with at least the elements that the kernel touches (`read_call`),
    // which their allocator keeps until the stream has passed this launch.
    py.detach(|| unsafe { cuda::forward(device, Stream(stream), element, tf32, &call) })?;
    Ok(())
}

/// Launches the backward kernel on a stream.
#[pyfunction]
pub(super) fn cuda_backward(
    device: i32,
    stream: usize,
    element: &str,
    tf32: bool,
    launch: &Bound<'_, PyAny>,
    gradient: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let (element, code) = element_of(element)?;
    let on = device_of(device)?;
    let mut importer = Importer { object: launch, device: on, held: Vec::new() };
    let call = read_call(&mut importer, code)?;
    let size = |x: i32| x as usize;
    if call.selection == 0 || call.best_token == 0 || call.best_word == 0 {
        return Err(LapsError::type_(OPERATION, "selection", "what the forward call saved", "None").into());
    }
    if call.images == 0 || call.texts == 0 {
        return Ok(());
    }
    let (images, pairs) =
        (size(call.images), size(call.images) * if call.diagonal != 0 { 1 } else { size(call.texts) });
    let results = importer.count("result_rows", MOST)? * size(call.columns);
    let products = importer.object.getattr("word_rows")?.extract::<usize>()?;
    let table = products.saturating_sub(1) * call.product_pitch as usize
        + (images - 1) * call.product_image as usize
        + size(call.stride);
    let least = cuda::geometry(device, &call, element, true)?.warps_per_image(call.diagonal != 0);
    let token = size(call.slots) * size(call.stride);
    let mut i = Importer { object: gradient, device: on, held: Vec::new() };
    let warps = i.count("warps_per_image", MOST)?;
    if warps < least {
        return Err(LapsError::value(OPERATION, "warps_per_image", format!("at least {least}"), warps).into());
    }
    let backward = BackwardCall {
        call,
        grad_scores: i.tensor("grad_scores", F32, results)?,
        grad_fraction: i.maybe("grad_fraction", F32, results)?,
        grad_products: i.tensor("grad_products", code, table)?,
        tokens: i.tensor("tokens", code, pairs * token)?,
        shrunk_tokens: i.tensor("shrunk_tokens", code, pairs * token)?,
        grad_weights: i.tensor("grad_weights", F32, images * warps * token)?,
        grad_keep: i.maybe("grad_keep", F32, images * warps * size(call.patches))?,
        grad_mask: i.maybe("grad_mask", F32, pairs * size(call.patches))?,
        poisoned_images: i.tensor("poisoned_images", FLAG, images)?,
        poisoned_texts: i.tensor("poisoned_texts", FLAG, size(call.texts))?,
        warps_per_image: warps as i64,
    };
    let py = launch.py();
    // SAFETY: as in `cuda_forward`.
    py.detach(|| unsafe { cuda::backward(device, Stream(stream), element, tf32, &backward) })?;
    Ok(())
}
