"""Makes a retrieval set of drawn scenes, on which it matters which word belongs to which object.

Synthetic, so that a model can be trained and judged anywhere, in minutes, with nothing to download; hard in
one way: the images of a group differ in one attribute, or in whose attribute it is, and captions tell which.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from tqdm.auto import tqdm

from .. import _check, _files
from ..errors import LapsValueError
from .scene_captions import write_captions
from .scene_drawing import draw
from .scene_facts import ObjectEntry
from .scene_groups import GROUP_SIZE, make_group
from .scene_objects import Scene

__all__ = ["make_scenes"]

# Counts up when the same parameters would give other files.
VERSION = 1
JPEG_QUALITY = 92
# Holds the parameters from the first image to the last, so that the same call can finish a broken-off one.
UNFINISHED = "unfinished.json"


@dataclass(frozen=True)
class _Parameters:
    """All that the files depend on; kept in dataset.json under "scenes"."""

    num_train: int
    num_dev: int
    num_test: int
    image_size: int
    captions_per_image: int
    seed: int
    version: int = VERSION

    @property
    def splits(self) -> tuple[tuple[str, int], ...]:
        """The splits by Karpathy's names, and their numbers of images."""
        return ("train", self.num_train), ("val", self.num_dev), ("test", self.num_test)


@dataclass(frozen=True)
class _Task:
    """One group to draw; the last one of a split may have to leave some images out."""

    split: str
    group: int  # in the data set
    first_image: int  # in the data set
    first_in_split: int
    images: int


def make_scenes(
    folder: str | os.PathLike[str],
    *,
    num_train: int = 4000,
    num_dev: int = 500,
    num_test: int = 500,
    image_size: int = 96,
    captions_per_image: int = 5,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Draw scenes with captions into a folder: ``images/*.jpg`` and ``dataset.json`` in Karpathy's format.

    A scene has three to six objects with a shape, a colour, a size and a texture, on a varied background
    with faint clutter. Images come in groups of four that differ in one attribute of one object, or in an
    attribute or a place that two objects have exchanged; at least one sibling of every image has just the
    same attributes on other objects or places, so a bag of attributes cannot tell them apart. A group lies
    within one split.
    Every caption is true of its image; nine in ten are chosen to be false for all siblings where that is
    possible.

    The files depend on the seed and the sizes only, not on the number of workers or the hash seed. Byte for
    byte they also depend on Pillow's version. Scene n of a split does not depend on how many follow.

    Beyond Karpathy's fields, an image entry in dataset.json has ``"group"`` (a number), ``"changed"`` (the
    edits of the group's first scene that led to this one) and ``"objects"`` (attributes and the box
    ``[x0, y0, x1, y1]`` in pixels), a sentence has ``"facts"`` (what it claims; see
    :mod:`laps.data.scene_facts`), and the file has ``"scenes"``, the arguments of this call.

    Args:
        folder: made if missing. An empty folder, or one that the same call has filled or begun to fill; a
            finished one is left as it is.
        num_train: images of the split "train".
        num_dev: images of the split "val".
        num_test: images of the split "test".
        image_size: side of the square images in pixels, at least 32; below 64 textures are hard to see.
        captions_per_image: at least 1.
        seed: at least 0.
        workers: processes that draw; None for one per processor that this process may use, 1 for none beside
            this one.
        progress: show a progress bar in a terminal or a notebook.

    Returns:
        The path of dataset.json, which is written last.

    Raises:
        LapsValueError: a number is out of range, no image is asked for, or the folder holds something else.
        LapsTypeError: a number is no integer, a flag is no bool.

    Example:
        >>> import json, laps.data, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = laps.data.make_scenes(folder, num_train=8, num_dev=4, num_test=4, workers=1)
        ...     images = json.loads(file.read_text())["images"]
        >>> len(images), len(images[0]["sentences"]), images[0]["split"]
        (16, 5, 'train')
    """
    parameters = _Parameters(
        num_train=_check.count("make_scenes", "num_train", num_train, 0),
        num_dev=_check.count("make_scenes", "num_dev", num_dev, 0),
        num_test=_check.count("make_scenes", "num_test", num_test, 0),
        image_size=_check.count("make_scenes", "image_size", image_size, 32),
        captions_per_image=_check.count("make_scenes", "captions_per_image", captions_per_image),
        seed=_check.count("make_scenes", "seed", seed, 0),
    )
    workers = _processors() if workers is None else _check.count("make_scenes", "workers", workers)
    progress = _check.flag("make_scenes", "progress", progress)
    tasks = list(_tasks(parameters))
    if not tasks:
        raise LapsValueError(
            _check.message("make_scenes", "num_train, num_dev and num_test are all 0", "at least one image")
        )

    root = Path(folder)
    file = root / "dataset.json"
    if _claim(root, parameters):
        return file
    entries: list[dict[str, object]] = []
    with ExitStack() as stack:
        bar = stack.enter_context(
            # None: shown in terminals and notebooks, not in logs.
            tqdm(
                total=sum(task.images for task in tasks),
                unit="img",
                desc="scenes",
                disable=None if progress else True,
            )
        )
        work = partial(_draw_group, parameters, root / "images")
        if workers == 1:
            groups: Iterator[list[dict[str, object]]] = map(work, tasks)
        else:
            pool = ProcessPoolExecutor(workers, multiprocessing.get_context())
            # On an error or Ctrl-C the groups in hand are finished, not all that wait.
            stack.callback(pool.shutdown, cancel_futures=True)
            groups = pool.map(work, tasks, chunksize=8)
        for group in groups:
            entries += group
            bar.update(len(group))

    content = {"dataset": "scenes", "scenes": asdict(parameters), "images": entries}
    _files.write_atomically(file, json.dumps(content, separators=(",", ":")))
    (root / UNFINISHED).unlink()
    return file


# ---- the folder


def _claim(root: Path, parameters: _Parameters) -> bool:
    """Whether the folder holds this very set already. If not, it is ours to fill, or an error says why."""
    if root.exists() and not root.is_dir():
        raise LapsValueError(_check.message("make_scenes", f"{root} is no folder", "a folder"))
    wanted = asdict(parameters)
    for name in ("dataset.json", UNFINISHED):
        if (root / name).exists():
            _compare(root / name, wanted)
            if name == UNFINISHED:
                return False
            missing = [image for image in _image_names(parameters) if not (root / "images" / image).is_file()]
            if missing:
                raise LapsValueError(
                    _check.message(
                        "make_scenes",
                        f"{root} lacks {len(missing)} of its images, such as {missing[0]}",
                        "all of them; delete the folder to draw it anew",
                    )
                )
            return True
    if root.exists() and any(root.iterdir()):
        raise LapsValueError(
            _check.message("make_scenes", f"{root} holds something else", "an empty folder, or a new one")
        )
    (root / "images").mkdir(parents=True, exist_ok=True)
    _files.write_atomically(root / UNFINISHED, json.dumps({"scenes": wanted}))
    return False


def _compare(file: Path, wanted: dict[str, int]) -> None:
    """Refuse a set that was made otherwise."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["scenes"]
        differing = [name for name in wanted if found.get(name) != wanted[name]]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise LapsValueError(
            _check.message("make_scenes", f"{file} is no set of scenes", "an empty folder, or a new one")
        ) from None
    if differing:
        asked, got = (", ".join(f"{name}={each.get(name)}" for name in differing) for each in (wanted, found))
        raise LapsValueError(
            _check.message(
                "make_scenes",
                f"{file.parent} holds other scenes",
                f"{asked}, or another folder",
                got,
            )
        )


# ---- drawing


def _processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tasks(parameters: _Parameters) -> Iterator[_Task]:
    group = image = 0
    for split, number in parameters.splits:
        for first in range(0, number, GROUP_SIZE):
            task = _Task(split, group, image, first, min(GROUP_SIZE, number - first))
            yield task
            group, image = group + 1, image + task.images


def _image_names(parameters: _Parameters) -> Iterator[str]:
    for split, number in parameters.splits:
        yield from (_image_name(split, index) for index in range(number))


def _image_name(split: str, index: int) -> str:
    return f"{split}_{index:06d}.jpg"


def _draw_group(parameters: _Parameters, folder: Path, task: _Task) -> list[dict[str, object]]:
    """Write the images of a group and return their entries; runs in any process, with the same result."""
    # A string seeds through SHA-512, so neither the hash seed nor the other groups matter.
    rng = random.Random(f"laps scenes {VERSION} {parameters.seed} {task.split} {task.first_in_split}")
    size, members = parameters.image_size, make_group(rng)
    shown = [_object_entries(scene, size) for scene, _ in members]
    edited = {touched for _, edits in members for edit in edits for touched in edit.touched()}
    entries: list[dict[str, object]] = []
    for index, (scene, edits) in enumerate(members[: task.images]):
        number = task.first_image + index
        name = _image_name(task.split, task.first_in_split + index)
        picture = draw(scene, size, rng)
        # Without chroma subsampling: it would blur colours over two pixels.
        picture.save(folder / name, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        captions = write_captions(
            rng,
            shown[index],
            shown[:index] + shown[index + 1 :],
            edited,
            size,
            parameters.captions_per_image,
        )
        entries.append(
            {
                "filename": name,
                "imgid": number,
                "split": task.split,
                "group": task.group,
                "changed": [edit.to_json() for edit in edits],
                "objects": shown[index],
                "sentences": [
                    {
                        "raw": caption.text,
                        "tokens": caption.tokens,
                        "imgid": number,
                        "sentid": number * parameters.captions_per_image + position,
                        "facts": caption.facts,
                    }
                    for position, caption in enumerate(captions)
                ],
            }
        )
    return entries


def _object_entries(scene: Scene, size: int) -> list[ObjectEntry]:
    return [
        {
            "shape": each.shape,
            "color": each.color,
            "size": each.size,
            "texture": each.texture,
            "box": [round(side * size, 1) for side in each.box],
        }
        for each in scene
    ]
