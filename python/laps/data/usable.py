"""The part of a split that can be trained on or evaluated, known before the first epoch starts."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np

from .. import _check
from ..errors import LapsValueError
from .images import open_image
from .listing import is_blank, missing_files
from .reading import with_each_image
from .records import RetrievalData
from .tokenizer import CaptionTokenizer

__all__ = ["usable"]

# How many of the things left out a warning names.
NAMED = 3


def usable(
    operation: str,
    data: RetrievalData,
    tokenizer: CaptionTokenizer,
    *,
    on_error: str,
    read_images: bool,
    open_file: Callable[[Path], object] = open_image,
    progress: bool = True,
) -> RetrievalData:
    """The data, without what cannot be used or with an error that names it.

    Args:
        operation: for messages.
        data: one split.
        tokenizer: what makes tokens of the captions.
        on_error: "raise" refuses missing images and captions without tokens; "skip" leaves them out, an image
            with its captions, and warns once, with the numbers.
        read_images: also read every image, so that damaged ones count too. It takes as long as an evaluation
            waits for its images.
        open_file: how one is read.
        progress: whether to show a bar while images are read.

    Raises:
        LapsValueError: what is wrong first and how much there is of it; or nothing is left.
    """
    bad_images = {i: f"{data.image_paths[i]} is missing" for i in missing_files(data.image_paths)}
    if read_images:
        present = [i for i in range(data.num_images) if i not in bad_images]
        faults = with_each_image(
            partial(_fault, open_file),
            [data.image_paths[i] for i in present],
            threads=min(8, os.cpu_count() or 1),
            progress=progress,
        )
        bad_images |= {i: fault for i, fault in zip(present, faults, strict=True) if fault}
    # Two tokens: the start and the end.
    blank = {
        t: f"caption {t}, {text!r}, has no token"
        for t, text in enumerate(data.captions)
        if is_blank(text) or tokenizer.count(text) == 2
    }
    if not bad_images and not blank:
        return data
    if on_error == "raise":
        _refuse(operation, data, bad_images, blank)

    images = [i for i in range(data.num_images) if i not in bad_images]
    captions = [t for t, i in enumerate(data.caption_to_image) if i not in bad_images and t not in blank]
    reasons = [bad_images[i] for i in sorted(bad_images)][:NAMED] + [blank[t] for t in sorted(blank)][:NAMED]
    counts = (
        f"{operation}: {data.name}: skipped {len(bad_images)} of {data.num_images} images, with their "
        f"captions, and {len(blank)} captions without a token; {len(images)} images and {len(captions)} of "
        f"{data.num_captions} captions are left: {'; '.join(reasons)}"
    )
    if not images or not captions:
        raise LapsValueError(counts)
    warnings.warn(_check.printable(counts), stacklevel=3)
    new_index = np.cumsum([i not in bad_images for i in range(data.num_images)]) - 1
    return RetrievalData(
        [data.image_paths[i] for i in images],
        [data.captions[t] for t in captions],
        new_index[data.caption_to_image[captions]],
        data.name,
    )


def _fault(open_file: Callable[[Path], object], path: Path) -> str:
    try:
        open_file(path)
    except LapsValueError as error:
        return str(error).removeprefix("open_image: ")
    return ""


def _refuse(
    operation: str, data: RetrievalData, bad_images: dict[int, str], blank: dict[int, str]
) -> NoReturn:
    if bad_images:
        raise LapsValueError(
            _check.message(
                operation,
                f"{data.name}: {bad_images[min(bad_images)]}",
                'every image, or on_error="skip"',
                f"{len(bad_images)} of {data.num_images} that cannot be read",
            )
        )
    first = min(blank)
    image = data.image_paths[int(data.caption_to_image[first])]
    raise LapsValueError(
        _check.message(
            operation,
            f"{data.name}: {blank[first]}; its image is {image}",
            'text, or on_error="skip"',
            f"{len(blank)} of {data.num_captions} without a token",
        )
    )
