"""What cannot be used is found before the first epoch: refused by name, or counted and left out."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from laps import LapsValueError
from laps.data import CaptionTokenizer, RetrievalData
from laps.data.usable import usable
from PIL import Image


@pytest.fixture
def data(tmp_path: Path) -> RetrievalData:
    """Six images in the order of their letters; caption 2t and 2t + 1 describe image t."""
    paths = [tmp_path / f"{letter}.png" for letter in "abcdef"]
    for path in paths:
        Image.new("RGB", (30, 20)).save(path)
    captions = [f"picture {t} of them" for t in range(12)]
    return RetrievalData(paths, captions, np.arange(12) // 2, "mine/dev")


@pytest.fixture
def spoiled(data: RetrievalData) -> RetrievalData:
    """Image b is missing, image d damaged; caption 0 has no token, nor has caption 9."""
    data.image_paths[1].unlink()
    data.image_paths[3].write_bytes(data.image_paths[3].read_bytes()[:40])
    data.captions[0] = "\u200b"
    data.captions[9] = "\ufffd"  # which BERT's rules drop
    return data


@pytest.fixture
def tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer.train([f"picture {t} of them" for t in range(12)], vocab_size=80)


def test_sound_data_stays_as_it_is_without_a_warning(
    data: RetrievalData, tokenizer: CaptionTokenizer
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for on_error in ("raise", "skip"):
            assert usable("test", data, tokenizer, on_error=on_error, read_images=True) is data


def test_what_is_left_out_is_counted_in_one_warning_and_the_rest_keeps_its_pairs(
    spoiled: RetrievalData, tokenizer: CaptionTokenizer
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rest = usable("test", spoiled, tokenizer, on_error="skip", read_images=True)
    assert [path.stem for path in rest.image_paths] == ["a", "c", "e", "f"]
    kept = [1, 4, 5, 8, 10, 11]
    assert rest.captions == [spoiled.captions[t] for t in kept]
    assert [rest.image_paths[i] for i in rest.caption_to_image] == [
        spoiled.image_paths[spoiled.caption_to_image[t]] for t in kept
    ]
    assert rest.name == "mine/dev"
    assert len(caught) == 1
    message = str(caught[0].message)
    assert message.startswith(
        "test: mine/dev: skipped 2 of 6 images, with their captions, and 2 captions without a token; "
        f"4 images and 6 of 12 captions are left: {spoiled.image_paths[1]} is missing; "
        f"{spoiled.image_paths[3]} cannot be read"
    )
    assert message.endswith("caption 0, '\\u200b', has no token; caption 9, '\ufffd', has no token")


def test_images_are_read_only_if_asked(spoiled: RetrievalData, tokenizer: CaptionTokenizer) -> None:
    with pytest.warns(UserWarning, match="skipped 1 of 6 images"):
        rest = usable("test", spoiled, tokenizer, on_error="skip", read_images=False)
    assert [path.stem for path in rest.image_paths] == ["a", "c", "d", "e", "f"]


def test_each_fault_is_refused_by_name(spoiled: RetrievalData, tokenizer: CaptionTokenizer) -> None:
    def refused(match: str) -> None:
        with pytest.raises(LapsValueError, match=match) as caught:
            usable("test", spoiled, tokenizer, on_error="raise", read_images=True)
        assert "\n" not in str(caught.value)

    refused(r"test: mine/dev: .*b\.png is missing .*got 2 of 6 that cannot be read")
    Image.new("RGB", (30, 20)).save(spoiled.image_paths[1])
    refused(r"test: mine/dev: .*d\.png cannot be read")
    Image.new("RGB", (30, 20)).save(spoiled.image_paths[3])
    refused(
        r"test: mine/dev: caption 0, '\\u200b', has no token; its image is .*a\.png .*got 2 of 12 without"
    )


def test_nothing_left_is_refused_with_the_numbers(data: RetrievalData, tokenizer: CaptionTokenizer) -> None:
    for path in data.image_paths:
        path.unlink()
    with pytest.raises(
        LapsValueError, match=r"skipped 6 of 6 images, .* 0 images and 0 of 12 captions are left"
    ):
        usable("test", data, tokenizer, on_error="skip", read_images=True)
