"""The native module (Rust). Call :mod:`laps.functional` instead: it checks arguments, chooses a backend, has
gradients.

Inputs are DLPack exporters on the CPU without autograd history: ``tensor.detach()``, NumPy arrays (read-only
ones too). Floating arguments share one dtype, float32 or float64; `word_lengths` is int64. Arguments named
``out_*`` are written: contiguous, of the stated shape, allocated by the caller. Everything is checked again
here; wrong arguments raise :class:`laps.LapsValueError` or :class:`laps.LapsTypeError`. The GIL is released
while the work is done.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, final

import numpy as np
import numpy.typing as npt

__all__ = [
    "SimilarityOptions",
    "__version__",
    "align_patches_words",
    "build_info",
    "calibrate_patches",
    "checksum",
    "cuda_backward",
    "cuda_compile",
    "cuda_configure",
    "cuda_forward",
    "cuda_info",
    "cuda_warps_per_image",
    "max_sim",
    "read_records",
    "select_patches",
    "selection_scores",
    "similarity_backward",
    "similarity_forward",
    "unpack_records",
]

class _Exporter(Protocol):
    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

__version__: str

@final
class SimilarityOptions:
    def __new__(
        cls,
        *,
        selection_ratio: float,
        directions: str = "both",
        direction_reduction: str = "sum",
        negative_slope: float = 0.1,
        fusion: bool = True,
        language_context: bool = True,
        attention_weight: float = 0.8,
        score: str = "cosine",
        sampling: str = "gumbel",
        temperature: float = 1.0,
        chunk: int | None = None,
        num_prefix_tokens: int = 0,
    ) -> SimilarityOptions: ...

def checksum(data: _Exporter) -> int: ...
def read_records(
    files: _Exporter, offsets: _Exporter, checksums: _Exporter, num_threads: int, out_records: _Exporter
) -> tuple[int, int] | None: ...
def unpack_records(
    records: _Exporter, start: int, dtype: str, width: int, num_threads: int, out: _Exporter
) -> None: ...
def similarity_forward(
    patches: _Exporter,
    words: _Exporter,
    word_lengths: _Exporter,
    logits: _Exporter,
    prefix: _Exporter | None,
    keep_prob: _Exporter | None,
    mask: _Exporter | None,
    seed: int | None,
    options: SimilarityOptions,
    pairwise: bool,
    num_threads: int,
    out_scores: _Exporter,
    out_kept_fraction: _Exporter,
    out_selection: _Exporter | None,
    out_best_token: _Exporter | None,
    out_best_word: _Exporter | None,
) -> None: ...
def similarity_backward(
    patches: _Exporter,
    words: _Exporter,
    word_lengths: _Exporter,
    logits: _Exporter,
    prefix: _Exporter | None,
    keep_prob: _Exporter | None,
    mask: _Exporter | None,
    seed: int | None,
    options: SimilarityOptions,
    pairwise: bool,
    num_threads: int,
    selection: _Exporter,
    best_token: _Exporter,
    best_word: _Exporter,
    grad_scores: _Exporter,
    grad_kept_fraction: _Exporter | None,
    out_grad_patches: _Exporter,
    out_grad_words: _Exporter,
    out_grad_logits: _Exporter,
    out_grad_prefix: _Exporter | None,
    out_grad_keep_prob: _Exporter | None,
    out_grad_mask: _Exporter | None,
) -> None: ...
def max_sim(
    patches: _Exporter, words: _Exporter, word_lengths: _Exporter, num_threads: int, out_scores: _Exporter
) -> None: ...
def selection_scores(
    patches: _Exporter,
    words: _Exporter,
    word_lengths: _Exporter,
    language_context: bool,
    score: str,
    num_threads: int,
) -> npt.NDArray[np.floating[Any]]: ...
def select_patches(
    patches: _Exporter,
    words: _Exporter,
    word_lengths: _Exporter,
    selection_ratio: float,
    language_context: bool,
    score: str,
    num_threads: int,
) -> npt.NDArray[np.int64]: ...
def calibrate_patches(
    patches: _Exporter,
    logits: _Exporter,
    mask: _Exporter,
    scores: _Exporter,
    prefix: _Exporter | None,
    fusion: bool,
    num_threads: int,
) -> tuple[npt.NDArray[np.floating[Any]], npt.NDArray[np.int64]]: ...
def align_patches_words(
    tokens: _Exporter,
    words: _Exporter,
    word_lengths: _Exporter,
    token_counts: _Exporter | None,
    options: SimilarityOptions,
    num_threads: int,
) -> tuple[npt.NDArray[np.floating[Any]], npt.NDArray[np.floating[Any]]]: ...
def build_info() -> dict[str, object]: ...

# Parameters named `launch` and `gradient` are laps._cuda's; their tensors are on the GPU.
def cuda_configure(nvrtc: Sequence[Path]) -> None: ...
def cuda_info() -> dict[str, object]: ...
def cuda_compile(nvrtc: Sequence[Path], architecture: int) -> list[tuple[str, str]]: ...
def cuda_warps_per_image(device: int, element: str, launch: object) -> int: ...
def cuda_forward(device: int, stream: int, element: str, tf32: bool, launch: object) -> None: ...
def cuda_backward(
    device: int, stream: int, element: str, tf32: bool, launch: object, gradient: object
) -> None: ...
