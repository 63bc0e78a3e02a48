"""Image-caption data: files on the disk to batches for a training step.

- :func:`load` and the ``read_*`` functions: any supported format to a :class:`RetrievalData`;
  :func:`from_dataset`: a data set of the library `datasets`;
- :class:`CaptionTokenizer`, :class:`ImageTransform`, :func:`open_image`: text to ids, image files to pixels;
- :class:`CaptionDataset`, :class:`ImageDataset`: PyTorch datasets of these, for any DataLoader;
  :class:`CaptionStream`: of shards that are read front to back;
- :func:`read_dense_captions`: a second, longer text for each training image;
- :mod:`laps.data.phrases`: phrases of captions with the boxes that they name, for :mod:`laps.grounding`;
- :func:`check`: what is wrong with a data set;
- :func:`make_scenes`: a data set of drawn scenes, to try all of it without a download.
"""

from . import phrases
from .check import CheckReport, check
from .dataset import Batch, CaptionDataset, ImageDataset
from .dense import read_dense_captions
from .formats import load, read_caption_files, read_karpathy, read_pairs
from .hub import from_dataset
from .images import open_image
from .records import RetrievalData
from .regions import RegionTransform
from .scenes import make_scenes
from .stream import CaptionStream
from .tokenizer import CaptionTokenizer, Tokens
from .transforms import ImageTransform

__all__ = [
    "Batch",
    "CaptionDataset",
    "CaptionStream",
    "CaptionTokenizer",
    "CheckReport",
    "ImageDataset",
    "ImageTransform",
    "RegionTransform",
    "RetrievalData",
    "Tokens",
    "check",
    "from_dataset",
    "load",
    "make_scenes",
    "open_image",
    "phrases",
    "read_caption_files",
    "read_dense_captions",
    "read_karpathy",
    "read_pairs",
]
