"""The native half of :mod:`laps.encoders.native`: encoders in Rust that compute with torch's tensors."""

from collections.abc import Sequence
from pathlib import Path
from typing import final

from torch import Tensor

__all__ = ["Encoder", "__version__", "read_checkpoint"]

__version__: str

@final
class Encoder:
    """An encoder without weights: its parameters come with every call.

    `part` is "vision" or "text", `config` the JSON object that transformers writes. Raises LapsValueError for
    values that are out of range or do not fit each other; `forward` LapsError for what torch refuses.
    """

    def __new__(cls, part: str, config: str) -> Encoder: ...
    def __getnewargs__(self) -> tuple[str, str]: ...
    def parameters(self) -> list[tuple[str, list[int]]]: ...
    def random(self) -> list[tuple[str, Tensor]]: ...
    def forward(
        self, parameters: Sequence[Tensor], inputs: Tensor, mask: Tensor | None, train: bool
    ) -> Tensor: ...
    @property
    def image_size(self) -> int | None: ...
    @property
    def num_prefix_tokens(self) -> int | None: ...
    @property
    def max_length(self) -> int | None: ...
    @property
    def vocab_size(self) -> int | None: ...

def read_checkpoint(
    folder: str | Path, part: str, image_size: int | None = None
) -> tuple[str, str, list[tuple[str, Tensor]]]: ...
