"""Which format a path holds: the one place that decides it, for reading and for checking."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .. import _check
from ..errors import LapsValueError
from .hub import SAVED_DICT, saved_splits
from .hub_rows import PARQUET_END, is_saved
from .json_files import json_kind
from .pairs import PAIR_SUFFIXES, pair_files, split_of_file
from .parsers import CAPTIONS_END, is_name_list
from .regions import REGIONS_END
from .shards import shard_files
from .splits import canonical_split, files_of_splits, grouped, in_order, split_of_name
from .tar_files import TAR_END, is_compressed_tar

__all__ = ["CONTAINERS", "Source", "detect"]

# Formats whose files hold the images too.
CONTAINERS = ("shards", "parquet", "saved")
FILES = (
    f".json, .csv, .tsv, .jsonl, {PARQUET_END}, {TAR_END}, *{CAPTIONS_END} or .txt of lines NAME.jpg,CAPTION"
)
FOLDERS = (
    f"dataset*.json, *{CAPTIONS_END}, a csv, tsv or JSONL file, or one of these for each split; "
    f"captions_*.json, *train*.json, *test*.txt, ...; *{PARQUET_END}; *{TAR_END}; "
    "a data set of save_to_disk; train/metadata.csv, ... of imagefolder"
)
# Where the files of a data set are, if not in its folder itself.
INNER = ("annotations", "annotation", "data")
# How many names of a folder's content a message has.
SHOWN = 8


@dataclass(frozen=True)
class Source:
    """What to read.

    Attributes:
        kind: "json" (Karpathy's, COCO's or ALBEF's, as its content tells), "karpathy" (that alone),
            "caption_files", "name_lists", "pairs", "saved", "parquet" or "shards".
        path: the file or folder, for messages.
        files: those to read, in order; of "caption_files" the folder.
        groups: of containers, the files by the split that their names tell.
    """

    kind: str
    path: Path
    files: tuple[Path, ...]
    groups: Mapping[str, tuple[Path, ...]] | None = None


def detect(operation: str, path: Path) -> Source:
    """The format of `path`; LapsValueError, with what was seen, if it is none or several."""
    if path.is_dir():
        return _of_folder(operation, path)
    if is_compressed_tar(path):
        raise LapsValueError(
            _check.message(
                operation,
                f"{path} is a compressed tar file, which has to be read from front to back",
                f"a {TAR_END} file; or train on it by laps train --epoch-length (CaptionStream)",
            )
        )
    if "{" in str(path) and path.suffix == TAR_END and not path.exists():
        return _grouped("shards", path, shard_files(operation, path))
    if not path.is_file():
        raise LapsValueError(_check.message(operation, f"{path} is missing", "a file or a folder"))
    if path.suffix == ".json":
        return Source("json", path, (path,))
    if path.suffix in PAIR_SUFFIXES:
        return Source("pairs", path, (path,))
    if path.name.endswith((CAPTIONS_END, REGIONS_END)):
        return Source("caption_files", path.parent, (path.parent,))
    if path.suffix in (TAR_END, PARQUET_END):
        return _grouped("shards" if path.suffix == TAR_END else "parquet", path, [path])
    if path.suffix == ".txt" and is_name_list(path):
        return Source("name_lists", path, (path,))
    raise LapsValueError(_check.message(operation, f"{path} has no known format", FILES))


def _grouped(kind: str, path: Path, files: Iterable[Path]) -> Source:
    groups = grouped(files)
    return Source(kind, path, tuple(file for group in groups.values() for file in group), groups)


def _of_folder(operation: str, path: Path) -> Source:
    found = [source for look in LOOKS for source in look(operation, path)]
    if not found:
        # Tables that lie beside others are something else: results, for example.
        found = _pairs(path)
    if not found:
        inner = [path / name for name in INNER if (path / name).is_dir()]
        if len(inner) == 1:
            return _of_folder(operation, inner[0])
    if len(found) == 1:
        return found[0]
    if found:
        seen = ", ".join(_shown(source) for source in found)
    else:
        names = sorted(entry.name for entry in path.iterdir())
        more = f", ... {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        seen = f"none of them in: {', '.join(names[:SHOWN])}{more}" if names else "none of them: it is empty"
        if any(is_compressed_tar(path / name) for name in names):
            seen += "; compressed tar files can only be streamed, and have to be named"
    raise LapsValueError(_check.message(operation, f"{path} does not tell which data to read", FOLDERS, seen))


def _shown(source: Source) -> str:
    names = [file.name for file in source.files]
    return ", ".join(names[:2]) + (f", ... ({len(names)} files)" if len(names) > 2 else "")


# ---- what a folder may hold, each by itself


def _karpathy(operation: str, path: Path) -> list[Source]:
    files = [file for file in sorted(path.glob("dataset*.json")) if not _is_of_library(file)]
    return [Source("karpathy", file, (file,)) for file in files]


def _is_of_library(file: Path) -> bool:
    return file.name in (SAVED_DICT, "dataset_info.json", "dataset_infos.json")


def _caption_files(operation: str, path: Path) -> list[Source]:
    files = sorted(path.glob(f"*{CAPTIONS_END}"))
    # The file is what a message shows.
    return [Source("caption_files", path, (files[0],))] if files else []


def _json(operation: str, path: Path) -> list[Source]:
    """COCO's and ALBEF's files, one for each split, whose names say which."""
    kinds: dict[str, list[Path]] = {}
    for file in in_order(path.glob("*.json")):
        if not file.name.startswith("dataset") and (split_of_name(file.stem) or "captions" in file.stem):
            kind = json_kind(file)
            if kind is not None:
                kinds.setdefault(kind, []).append(file)
    return [source for files in kinds.values() for source in _one_per_split("json", path, files)]


def _name_lists(operation: str, path: Path) -> list[Source]:
    files = [
        file
        for file in in_order(path.glob("*.txt"))
        if not file.name.endswith(CAPTIONS_END)
        and (split_of_name(file.stem) or "captions" in file.stem)
        and is_name_list(file)
    ]
    return _one_per_split("name_lists", path, files)


def _one_per_split(kind: str, path: Path, files: list[Path]) -> list[Source]:
    """The files as one source, or as many as there are where two hold the same split."""
    splits = [split_of_name(file.stem) or "all" for file in files]
    if len(set(splits)) == len(splits):
        return [Source(kind, path, tuple(files))] if files else []
    return [Source(kind, file, (file,)) for file in files]


def _saved(operation: str, path: Path) -> list[Source]:
    if (path / SAVED_DICT).is_file():
        folders = saved_splits(operation, path)
        groups: dict[str, tuple[Path, ...]] = {}
        for name, folder in folders.items():
            groups[canonical_split(name)] = (*groups.get(canonical_split(name), ()), folder)
        return [Source("saved", path, tuple(folders.values()), groups)]
    return (
        [Source("saved", path, (path,), {split_of_name(path.name) or "all": (path,)})]
        if is_saved(path)
        else []
    )


def _parquet(operation: str, path: Path) -> list[Source]:
    # img2dataset leaves the table of its downloads beside each shard.
    files = [file for file in files_of_splits(path, PARQUET_END) if not file.with_suffix(TAR_END).is_file()]
    return [_grouped("parquet", path, files)] if files else []


def _shards(operation: str, path: Path) -> list[Source]:
    files = files_of_splits(path, TAR_END)
    return [_grouped("shards", path, files)] if files else []


def _pairs(path: Path) -> list[Source]:
    files = pair_files(path)
    splits = {split_of_file(file) for file in files}
    if len(files) > 1 and None not in splits and len(splits) == len(files):
        return [Source("pairs", path, tuple(files))]
    return [Source("pairs", file, (file,)) for file in files]


Look = Callable[[str, Path], list[Source]]
LOOKS: tuple[Look, ...] = (_karpathy, _caption_files, _json, _name_lists, _saved, _parquet, _shards)
