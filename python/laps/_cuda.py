"""What the binding's CUDA functions take, where NVRTC is, and what torch says about devices and TF32."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import _laps
from .errors import LapsError

__all__ = ["Gradient", "Launch", "device_and_stream", "nvrtc_files", "state", "tf32_allowed", "usable"]


@dataclass
class Launch:
    """The parameters of a launch; ``src/cuda/kernels/call.cuh`` explains them."""

    weights: Tensor
    gram: Tensor
    rows: Tensor
    norms: Tensor
    self_scores: Tensor
    text_factor: Tensor
    keep_prob: Tensor | None
    logits: Tensor
    image_finite: Tensor
    words: Tensor
    word_inverse: Tensor
    first_word: Tensor
    word_count: Tensor
    text_finite: Tensor
    products: Tensor
    text_products: Tensor
    mask: Tensor | None
    scores: Tensor
    fraction: Tensor
    selection: Tensor | None
    best_token: Tensor | None
    best_word: Tensor | None
    word_offset: int
    word_rows: int
    product_pitch: int
    product_image: int
    text_pitch: int
    text_image: int
    seed: int
    images: int
    texts: int
    first_image: int
    first_text: int
    result_rows: int
    columns: int
    diagonal: bool
    patches: int
    stride: int
    pitch: int
    slots: int
    aggregated: int
    prefix_tokens: int
    channels: int
    max_words: int
    kept: int
    selection_mode: int
    soft: bool
    seeded: bool
    paper: bool
    language_context: bool
    fusion: bool
    attention_weight: float
    temperature: float
    negative_slope: float
    word_to_patch: float
    patch_to_word: float

    @property
    def token_shape(self) -> tuple[int, int]:
        """Of a pair's tokens as rows of weights."""
        return self.slots, self.stride


@dataclass
class Gradient:
    """What the backward launch takes besides; ``src/cuda/kernels/gradient.cuh`` explains it."""

    grad_scores: Tensor
    grad_fraction: Tensor | None
    grad_products: Tensor
    tokens: Tensor
    shrunk_tokens: Tensor
    grad_weights: Tensor
    grad_keep: Tensor | None
    grad_mask: Tensor | None
    poisoned_images: Tensor
    poisoned_texts: Tensor
    warps_per_image: int


def device_and_stream(device: torch.device) -> tuple[int, int]:
    """The device's number and torch's current stream on it; zeros for the CPU of the tests' emulator."""
    if device.type != "cuda":
        return 0, 0
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


def tf32_allowed() -> bool:
    """Whether torch may round float32 factors of products to TF32."""
    # Not allow_tf32, which raises once the newer setting has been used.
    return str(torch.backends.cuda.matmul.fp32_precision) == "tf32"


def nvrtc_files() -> list[Path]:
    """NVRTC in the packages that torch's CUDA builds install: that of its own CUDA first, then the newest."""
    spec = importlib.util.find_spec("nvidia")
    folders = (
        [] if spec is None or spec.submodule_search_locations is None else spec.submodule_search_locations
    )
    found = (file for folder in folders for file in Path(folder).glob("*/lib/libnvrtc.so.*"))
    numbered = {file: int(file.suffix[1:]) for file in found if file.suffix[1:].isdigit()}
    own = (torch.version.cuda or "").split(".")[0]
    return sorted(numbered, key=lambda file: (str(numbered[file]) == own, numbered[file]), reverse=True)


def state() -> bool | str:
    """Whether the kernels can run on the current GPU, or why not."""
    if not torch.cuda.is_available():
        return "no GPU that torch sees"
    return _reason(torch.device("cuda", torch.cuda.current_device())) or True


@functools.cache
def _reason(device: torch.device) -> str:
    """Why the kernels cannot run on a GPU; empty if they can."""
    try:
        _laps.cuda_info()
    except LapsError as error:
        return str(error)
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"compute capability {major}.{minor}, and the kernels need 8.0"


# Under torch.compile it is asked once, while tracing.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def usable(device: torch.device) -> bool:
    """Whether the kernels can run on this GPU; a warning says why not, once."""
    reason = _reason(device)
    if reason:
        warnings.warn(f"laps computes on {device} with the torch backend: {reason}", stacklevel=3)
    return not reason


_laps.cuda_configure(nvrtc_files())
