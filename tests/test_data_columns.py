"""Tables of other libraries are read by the names that their columns have, and never by a guess."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from _refused import refused
from hypothesis import given
from hypothesis import strategies as st
from laps import LapsTypeError
from laps.cli import main
from laps.data import RetrievalData, check, from_dataset, load, open_image, read_dense_captions
from laps.data.listing import is_blank
from PIL import Image

datasets = pytest.importorskip("datasets")
pandas = pytest.importorskip("pandas")

FILES = ["a.png", "b.png", "c.png"]
TEXTS = ['a cat, asleep; or "so"', "two dogs | a bird", "a house"]
# As Karpathy's files and their mirrors on the hub have them.
SENTENCES = [
    [
        {"raw": text, "tokens": text.split(), "sentid": 2 * i + j}
        for j, text in enumerate((text, f"{text} too"))
    ]
    for i, text in enumerate(TEXTS)
]
BOTH = [sentence["raw"] for sentences in SENTENCES for sentence in sentences]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library copies what it reads into its cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def write_images(folder: Path, names: list[str] = FILES) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(folder / name)
    return folder


def encoded() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    return stream.getvalue()


def with_images(columns: dict[str, list[Any]], features: Any = None) -> Any:
    """A data set of the hub with these columns beside its images."""
    rows = datasets.Dataset.from_dict(columns, features=features)
    images = [{"bytes": encoded(), "path": None}] * len(rows)
    return rows.add_column("image", images).cast_column("image", datasets.Image())


def found(data: RetrievalData) -> tuple[list[str], list[str], list[int]]:
    return [path.name for path in data.image_paths], data.captions, data.caption_to_image.tolist()


# ---- names of columns


@pytest.mark.parametrize(
    ("image", "caption"),
    [
        ("file_name", "text"),  # imagefolder
        ("filepath", "title"),  # open_clip
        ("Image", "Caption"),
        ("image_path", "caption"),
        ("filename", "sentence"),
        ("Image Path", "TEXT"),
        ("image_name", " comment"),  # Kaggle's Flickr30K
    ],
)
@pytest.mark.parametrize("form", ["comma", "tab", "semicolon", "bar", "tsv", "jsonl", "json"])
def test_known_names_are_read_from_all_that_pandas_writes(
    tmp_path: Path, image: str, caption: str, form: str
) -> None:
    write_images(tmp_path)
    table = pandas.DataFrame({"id": [1, 2, 3], caption: TEXTS, image: FILES})
    file = tmp_path / f"pairs.{form if form in ('tsv', 'jsonl', 'json') else 'csv'}"
    separators = {"comma": ",", "tab": "\t", "tsv": "\t", "semicolon": ";", "bar": "|"}
    if form in separators:
        table.to_csv(file, sep=separators[form], index=form == "comma")
    else:
        table.to_json(file, orient="records", lines=form == "jsonl")
    assert found(load(file, "all")) == (FILES, TEXTS, [0, 1, 2])
    assert check(file, progress=False).splits["all"].images == 3


def test_dense_captions_are_found_by_the_same_names(tmp_path: Path) -> None:
    data = RetrievalData([tmp_path / name for name in FILES], TEXTS, [0, 1, 2])
    table = pandas.DataFrame({"file_name": FILES, "text": ["one", "two", "three"]})
    table.to_csv(tmp_path / "dense.csv", sep="\t", index=False)
    table.to_json(tmp_path / "dense.json", orient="records")
    for name in ("dense.csv", "dense.json"):
        assert read_dense_captions(tmp_path / name, data) == ["one", "two", "three"]


def test_the_exact_name_wins_over_others_and_other_spellings(tmp_path: Path) -> None:
    write_images(tmp_path)
    other = ["none.png"] * 3
    for columns in (
        {"image": FILES, "image_path": other, "caption": TEXTS, "text": other, "title": other},
        {"Image": other, "image": FILES, "Caption": other, "caption": TEXTS},
        {"path": other, "Image": FILES, "title": other, "caption_1": other, "Caption": TEXTS},
        {"img": FILES, "filename": other, "filepath": other, "text": TEXTS, "description": other},
    ):
        pandas.DataFrame(columns).to_csv(tmp_path / "pairs.csv", index=False)
        assert found(load(tmp_path / "pairs.csv", "all")) == (FILES, TEXTS, [0, 1, 2])


def test_numbered_columns_are_captions_in_order_and_an_image_may_have_fewer(tmp_path: Path) -> None:
    write_images(tmp_path)
    table = pandas.DataFrame(
        {"image": FILES, **{f"caption_{t}": [f"{t} of {f}" for f in FILES] for t in (10, 2)}}
    )
    table.loc[1, "caption_10"] = None
    expected = ["2 of a.png", "10 of a.png", "2 of b.png", "2 of c.png", "10 of c.png"]
    table.to_csv(tmp_path / "pairs.csv", index=False)
    table.to_json(tmp_path / "pairs.jsonl", orient="records", lines=True)
    for name in ("pairs.csv", "pairs.jsonl"):
        assert found(load(tmp_path / name, "all"))[1:] == (expected, [0, 0, 1, 2, 2])


# ---- what is not clear


def test_two_columns_that_may_be_meant_are_named_and_one_can_be_chosen(tmp_path: Path) -> None:
    write_images(tmp_path)
    other = [f"other {text}" for text in TEXTS]
    columns = {"text": TEXTS, "sentence": other}
    table = pandas.DataFrame({"image": FILES, **columns})
    table.to_csv(tmp_path / "p.csv", index=False)
    table.to_json(tmp_path / "p.jsonl", orient="records", lines=True)
    table.to_json(tmp_path / "p.json", orient="records")
    rows = with_images(columns)
    # A name without a split's would leave that to the folder's, which is the test's.
    (tmp_path / "set").mkdir()
    rows.to_parquet(tmp_path / "set" / "p.parquet")
    rows.save_to_disk(tmp_path / "saved")
    for name in ("p.csv", "p.jsonl", "p.json", "set/p.parquet", "saved"):
        file = tmp_path / name
        refused(
            lambda file=file: load(file, "all"), name, "several columns", "caption_column", "text, sentence"
        )
        assert load(file, "all", caption_column="text").captions == TEXTS
        assert load(file, "all", caption_column=["sentence"]).captions == other
        assert check(file, caption_column=["text", "sentence"], progress=False).splits["all"].captions == 6
        refused(
            lambda file=file: load(file, "all", caption_column="titel"), name, "no column 'titel'", "sentence"
        )
    refused(lambda: from_dataset(rows), "several columns", "text, sentence")
    assert from_dataset(rows, caption_column="sentence").captions == other


@pytest.mark.parametrize(
    ("header", "parts"),
    [
        ("image_path,img_path,caption", ("may name images", "image_path, img_path")),
        ("image,image,caption", ("may name images", "image, image")),
        ("Image,IMAGE,caption", ("may name images", "Image, IMAGE")),
        ("image,text,caption_0,caption_1", ("may be captions", "text, caption_0+caption_1")),
        ("image,Caption,CAPTION", ("may be captions", "Caption, CAPTION")),
        ("image,caption,Split,SPLIT", ("may tell the split", "Split, SPLIT")),
        ("image,words", ("no column of captions", "caption, captions, text", "got image, words")),
        ("photo,caption", ("no column of image files", "image, image_path", "got photo, caption")),
    ],
)
def test_a_header_that_does_not_tell_is_refused_without_rows_too(
    tmp_path: Path, header: str, parts: tuple[str, ...]
) -> None:
    (tmp_path / "pairs.csv").write_text(header + "\n")
    refused(lambda: load(tmp_path / "pairs.csv", "all"), "pairs.csv", *parts)


def test_a_choice_of_columns_is_for_tables_alone(tmp_path: Path) -> None:
    write_images(tmp_path)
    images = [{"filename": "a.png", "split": "test", "sentences": [{"raw": "a cat"}]}]
    file = tmp_path / "dataset.json"
    file.write_text(json.dumps({"images": images}))
    refused(lambda: load(file, "test", caption_column="raw"), "caption_column", "dataset.json")
    refused(lambda: load(tmp_path, "test", caption_column="raw"), "caption_column", "dataset.json")
    (tmp_path / "pairs.csv").write_text("image,caption\na.png,a cat\n")
    refused(lambda: load(tmp_path / "pairs.csv", "all", caption_column=[]), "caption_column is empty")
    with pytest.raises(LapsTypeError, match="caption_column is no name"):
        load(tmp_path / "pairs.csv", "all", caption_column=3)  # type: ignore[arg-type]


# ---- addresses


def test_addresses_in_place_of_files_are_refused_with_what_to_do(tmp_path: Path) -> None:
    urls = ["https://host/a.png", "https://host/b.png"]
    for column in ("url", "URL", "image_url"):
        table = pandas.DataFrame({column: urls, "caption": ["x", "y"]})
        table.to_csv(tmp_path / "p.csv", index=False)
        table.to_csv(tmp_path / "p.tsv", index=False, sep="\t")
        table.to_json(tmp_path / "p.jsonl", orient="records", lines=True)
        datasets.Dataset.from_pandas(table).to_parquet(tmp_path / f"{column}.parquet")
        for name in ("p.csv", "p.tsv", "p.jsonl"):
            file = tmp_path / name
            refused(lambda file=file: load(file, "all"), name, "addresses of images", "download", column)
        file = tmp_path / f"{column}.parquet"
        refused(lambda file=file: load(file, "test"), "no column of images", "download", column)
    pandas.DataFrame({"image": urls, "caption": ["x", "y"]}).to_csv(tmp_path / "p.csv", index=False)
    refused(lambda: load(tmp_path / "p.csv", "all"), "p.csv:2", "address of an image", urls[0])


def test_a_data_set_of_file_names_becomes_pairs_as_the_error_says(tmp_path: Path) -> None:
    """As yerevann/coco-karpathy: Karpathy's entries as rows, and no image."""
    write_images(tmp_path, ["train2014/a.png", "val2014/b.png", "val2014/c.png"])
    columns = {
        "filepath": ["train2014", "val2014", "val2014"],
        "filename": FILES,
        "split": ["train", "restval", "test"],
        "sentences": SENTENCES,
        "cocoid": [1, 2, 3],
        "url": ["https://host/x"] * 3,
    }
    rows = datasets.Dataset.from_dict(columns)
    rows.to_parquet(tmp_path / "all.parquet")
    refused(lambda: load(tmp_path / "all.parquet", "test"), "no column of images", "Dataset.to_json")
    rows.to_json(tmp_path / "all.jsonl")
    rows.to_json(tmp_path / "list.json", lines=False)
    for name in ("all.jsonl", "list.json"):
        assert found(load(tmp_path / name, "train")) == (FILES[:2], BOTH[:4], [0, 0, 1, 1])
        test = load(tmp_path / name, "test")
        assert test.image_paths == [tmp_path / "val2014" / "c.png"]
        assert test.captions == BOTH[4:]
    whole = datasets.Dataset.from_dict({**columns, "filepath": [f"val2014/{name}" for name in FILES]})
    whole.select([1, 2]).to_json(tmp_path / "whole.jsonl")
    assert load(tmp_path / "whole.jsonl", "test").image_paths == [tmp_path / "val2014" / "c.png"]


# ---- lists of captions


def test_lists_in_cells_are_captions_however_they_were_written(tmp_path: Path) -> None:
    """As flickr_annotations_30k.csv of nlphuji/flickr30k (JSON), and as pandas writes a column of lists."""
    write_images(tmp_path / "flickr30k-images")
    texts = [[sentence["raw"] for sentence in sentences] for sentences in SENTENCES]
    for cells in ([json.dumps(cell) for cell in texts], texts, [json.dumps(cell) for cell in SENTENCES]):
        table = pandas.DataFrame({"raw": cells, "sentids": [[0, 1]] * 3, "split": "test", "filename": FILES})
        table.to_csv(tmp_path / "flickr_annotations_30k.csv")
        data = load(tmp_path / "flickr_annotations_30k.csv", "test")
        assert found(data) == (FILES, BOTH, [0, 0, 1, 1, 2, 2])
    (tmp_path / "p.csv").write_text("image,caption\na.png,[]\nb.png,[a sign] of [stone]\n")
    data = load(tmp_path / "p.csv", "all", images=tmp_path / "flickr30k-images")
    assert found(data) == (FILES[:2], ["[a sign] of [stone]"], [1])


def test_a_list_that_numpy_has_printed_is_refused(tmp_path: Path) -> None:
    """Between its strings are no commas: Python would read one caption."""
    write_images(tmp_path)
    with_images({"caption": [["a cat", "cats"]]}).remove_columns("image").to_parquet(tmp_path / "p.parquet")
    table = pandas.read_parquet(tmp_path / "p.parquet")
    table.assign(image="a.png").to_csv(tmp_path / "p.csv", index=False)
    assert "['a cat' 'cats']" in (tmp_path / "p.csv").read_text()
    refused(lambda: load(tmp_path / "p.csv", "all"), "p.csv:2", "malformed list in 'caption'", "JSON")


@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda t: not is_blank(t)),
        min_size=1,
    )
)
def test_any_list_comes_back_from_a_cell(texts: list[str]) -> None:
    from laps.data.pairs import _captions_of_cell, texts_of

    for cell in (repr(texts), json.dumps(texts), json.dumps(texts, ensure_ascii=False)):
        stream = io.StringIO()
        csv.writer(stream).writerow([cell])
        (row,) = csv.reader(io.StringIO(stream.getvalue(), newline=""), strict=True)
        entry = {"caption": _captions_of_cell("test", "place", "caption", row[0])}
        assert texts_of("test", "place", entry, "caption") == texts


# ---- imagefolder


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_imagefolders_tables_are_read_as_the_library_reads_them(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "set"
    for split, name in (("train", "a.png"), ("validation", "a.png"), ("test", "far/c.png")):
        write_images(folder / split, [name])
        table = pandas.DataFrame({"file_name": [name], "text": [f"{split} text"]})
        file = folder / split / f"metadata.{form}"
        if form == "csv":
            table.to_csv(file, index=False)
        else:
            table.to_json(file, orient="records", lines=True)
    theirs = datasets.load_dataset("imagefolder", data_dir=str(folder))
    assert set(theirs) == {"train", "validation", "test"}
    for split in theirs:
        data = load(folder, split)
        assert data.captions == theirs[split]["text"][:]
        assert open_image(data.image_paths[0]).size == theirs[split][0]["image"].size
        assert data.image_paths[0].is_relative_to(folder / split)
        assert load(folder / split / f"metadata.{form}", split).captions == data.captions
    assert check(folder, progress=False).splits.keys() == {"train", "validation", "test"}


def test_imagefolder_without_splits_is_one(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set")
    pandas.DataFrame({"file_name": FILES, "text": TEXTS}).to_csv(folder / "metadata.csv", index=False)
    assert found(load(folder, "all")) == (FILES, TEXTS, [0, 1, 2])


# ---- data sets of Hugging Face


LEGACY = datasets.Sequence({"raw": datasets.Value("string"), "sentid": datasets.Value("int64")})


@pytest.mark.parametrize(
    ("columns", "features"),
    [
        ({"sentences": SENTENCES}, None),
        (
            {"sentences": [{k: [s[k] for s in row] for k in ("raw", "sentid")} for row in SENTENCES]},
            datasets.Features(sentences=LEGACY),
        ),
        ({"sentences_raw": [[s["raw"] for s in row] for row in SENTENCES]}, None),
        (
            {
                "sentences": [["in", "words"]] * 3,
                "sentences_raw": [[s["raw"] for s in row] for row in SENTENCES],
            },
            None,
        ),
        ({"TEXT": [[s["raw"] for s in row] for row in SENTENCES], "URL": ["https://host/x"] * 3}, None),
    ],
    ids=["list of objects", "object of lists", "sentences_raw", "both", "capitals"],
)
def test_karpathys_sentences_are_read_from_the_hubs_forms(
    tmp_path: Path, columns: dict[str, Any], features: Any
) -> None:
    rows = with_images(columns, features)
    rows.save_to_disk(tmp_path / "saved")
    rows.to_parquet(tmp_path / "train.parquet")
    saved, parquet = load(tmp_path / "saved", "all"), load(tmp_path / "train.parquet", "train")
    for data in (saved, parquet, from_dataset(rows)):
        assert data.captions == BOTH
        assert data.caption_to_image.tolist() == [0, 0, 1, 1, 2, 2]


def test_rows_of_one_sentence_each_are_one_image_where_their_ids_are_equal() -> None:
    """As HuggingFaceM4/COCO: an object in each row."""
    single = [sentence for sentences in SENTENCES for sentence in sentences]
    data = from_dataset(with_images({"sentences": single, "cocoid": [9, 9, 4, 4, 7, 7]}))
    assert (data.captions, data.caption_to_image.tolist()) == (BOTH, [0, 0, 1, 1, 2, 2])


def test_two_columns_of_images_are_no_guess() -> None:
    rows = with_images({"caption": TEXTS}).rename_column("image", "png")
    rows = rows.add_column("jpg", rows.with_format("arrow")["png"].to_pylist()).cast_column(
        "jpg", datasets.Image()
    )
    refused(lambda: from_dataset(rows), "several columns of images", "png", "jpg")
    assert from_dataset(rows, image_column="jpg").num_images == 3


def test_the_command_takes_a_choice_of_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pandas.DataFrame({"image": ["0.jpg"], "text": ["a cat"], "sentence": ["a dog"]}).to_csv(
        tmp_path / "train.csv", index=False
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "0.jpg")
    check = ["data", "check", str(tmp_path / "train.csv")]
    assert main(check) == 2
    assert "--caption-column" in capsys.readouterr().err
    assert main([*check, "--caption-column", "sentence", "--json"]) == 0
    assert main([*check, "--caption-column", "text", "--caption-column", "sentence", "--json"]) == 0
    assert main([*check, "--caption-column", "words"]) == 2
    assert "no column 'words'" in capsys.readouterr().err
