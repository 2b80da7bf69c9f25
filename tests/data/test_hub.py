import io
import re
import shutil
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
import torch
from huggingface_hub import constants

from hf_ihb import access
from hf_ihb.config.data import DataArguments
from hf_ihb.data import load_image_split
from hf_ihb.errors import DataError
from tests.image_sets import NAMES, as_bytes, load, picture, pixels, rows, write


def test_columns_are_found_by_their_type(folder):
    train, test = rows(30), rows(6, start=100)
    data = load(write(folder, images="picture", labels="animal", train=train, test=test))
    assert data.label_names == NAMES
    assert data.image_size == (6, 6)
    assert data.revision is None
    assert torch.equal(data.test.images, pixels([image for image, _ in test]))
    assert data.test.labels.tolist() == [label for _, label in test]
    assert data.test.images.dtype == torch.uint8
    assert len(data.train) + len(data.validation) == 30


def test_columns_and_splits_can_be_named(folder):
    extra = {"thumbnail": datasets.Image(), "origin": datasets.ClassLabel(names=["web"])}
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)} | extra
    folder.mkdir()
    for name, start in (("fit", 0), ("held", 12)):
        columns = {"image": [as_bytes(i) for i, _ in rows(12, start)], "label": [v for _, v in rows(12)]}
        columns |= {"thumbnail": [as_bytes(picture(9, (2, 2)))] * 12, "origin": [0] * 12}
        split = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        split.to_parquet(folder / f"data_{name}.parquet")
    config = "configs:\n- config_name: default\n  data_files:\n"
    config += "".join(f"  - split: {name}\n    path: data_{name}.parquet\n" for name in ("fit", "held"))
    (folder / "README.md").write_text(f"---\n{config}---\n")
    splits = {"train_split": "fit", "test_split": "held"}
    with pytest.raises(DataError, match=r"found image and thumbnail .*'image_column_name'"):
        load(str(folder), **splits)
    with pytest.raises(DataError, match=r"found label and origin .*'label_column_name'"):
        load(str(folder), **splits, image_column_name="image")
    data = load(str(folder), **splits, image_column_name="image", label_column_name="label", validation_fraction=0.5)
    assert data.label_names == NAMES
    assert data.image_size == (6, 6)


def test_a_column_that_does_not_exist_is_refused_with_those_that_do(folder):
    name = write(folder, train=rows(6), test=rows(3, start=900))
    for key in ("image_column_name", "label_column_name"):
        with pytest.raises(DataError, match=rf"key '{key}': no column 'img'; it has image, label"):
            load(name, **{key: "img"})


def test_a_set_without_images_is_refused_with_its_columns(folder):
    folder.mkdir()
    for name in ("train", "test"):
        datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).to_parquet(folder / f"{name}-0.parquet")
    with pytest.raises(DataError, match="expected one image column, found none among text, label"):
        load(str(folder))


def test_a_folder_that_holds_no_data_set_is_one_line(folder, tmp_path):
    folder.mkdir()
    datasets.Dataset.from_dict({"label": [0]}).save_to_disk(tmp_path / "saved")
    for name in (folder, tmp_path / "saved"):
        with pytest.raises(DataError, match=f"folder '{name}' could not be loaded") as error:
            load(str(name))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "lure"), [("a[b]", "ab"), ("a*", "abc"), ("a?", "ab"), ("[a-z]!{x}", "b!{x}")])
@pytest.mark.parametrize("kind", ["parquet", "readme", "images"])
def test_a_name_with_brackets_is_that_of_its_folder(tmp_path, name, lure, kind, monkeypatch):
    for folder, start in ((tmp_path / name, 0), (tmp_path / lure, 500)):
        if kind == "images":
            for i in range(18):
                path = folder / ("train", "test")[i % 2] / f"{NAMES[i % 3]} [{i % 3}]" / f"{i:02}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture(start + i).save(path)
        else:
            write(folder, train=rows(9, start), test=rows(3, start + 100))
        if kind == "readme":
            files = "".join(f"  - split: {split}\n    path: {split}-*\n" for split in ("train", "test"))
            (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: x\n  data_files:\n{files}---\n")
    chosen = [picture(i) for i in range(1, 18, 2)] if kind == "images" else [image for image, _ in rows(3, 100)]
    expected = {image.numpy().tobytes() for image in pixels(chosen)}
    monkeypatch.chdir(tmp_path)
    for given in (str(tmp_path / name), name):
        data = load(given, selection_split="test")
        assert {image.numpy().tobytes() for image in data.test.images} == expected
        assert len(data.train) == 9


@pytest.mark.parametrize(
    ("column", "found"), [("label", "int64"), ("score", "float64"), ("words", "found the path|decoded")]
)
def test_a_column_that_holds_no_images_is_refused(folder, column, found):
    folder.mkdir()
    for name, start in (("train", 0), ("test", 6)):
        columns = {"image": [as_bytes(image) for image, _ in rows(6, start)], "label": [0, 1, 2] * 2}
        columns |= {"score": [0.5] * 6, "words": ["a cat"] * 6}
        table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        table.to_parquet(folder / f"{name}-0.parquet")
    with pytest.raises(DataError, match=found) as error:
        load(folder, image_column_name=column)
    line = str(error.value)
    assert len(line.splitlines()) == 1
    assert f"column '{column}': expected images" in line or column == "words"


def test_a_set_that_breaks_off_in_the_middle_says_what_is_wrong_with_it(folder):
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"label": 0}\n{"label": \n')
    with pytest.raises(
        DataError, match=rf"^folder '{folder}' could not be loaded: (?!An error occurred).*JSON"
    ) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_a_hub_set_that_cannot_be_reached_is_one_line():
    with pytest.raises(DataError, match=r"^data set 'someone/nothing': not in the cache") as error:
        load("someone/nothing")
    assert "\n" not in str(error.value)


def test_an_image_folder_is_read_with_its_classes(folder):
    for split, first, count in (("train", 3, 12), ("test", 0, 3)):
        for i in range(first, first + count):
            path = folder / split / NAMES[i % 3] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(i).save(path)
    data = load(str(folder), validation_fraction=0.25)
    assert data.label_names == NAMES
    assert (len(data.train), len(data.validation), len(data.test)) == (9, 3, 3)
    expected = {NAMES[i]: pixels([picture(i)])[0] for i in range(3)}
    for image, label in zip(data.test.images, data.test.labels, strict=True):
        assert torch.equal(image, expected[NAMES[label]])


def test_nothing_is_written_beside_the_data(folder):
    name = write(folder, train=rows(30), test=rows(3, start=900))
    before = sorted(p.name for p in Path(name).iterdir())
    load(name)
    assert sorted(p.name for p in Path(name).iterdir()) == before


# ---- From the Hub ----


@pytest.fixture
def published(hub_here, folder, request):
    """A data set on the Hub under a name that no other test uses: the clients keep listings by name and commit."""
    access._confirmed.clear()
    write(folder, train=rows(30), test=rows(6, start=100))
    name = f"me/set{abs(hash(request.node.name))}"
    hub_here.add_folder(name, folder, "dataset")
    return name


def publish(hub, name, folder, start):
    """Another commit with other images; its id."""
    shutil.rmtree(folder)
    write(folder, train=rows(30, start=start), test=rows(6, start=start + 100))
    return hub.commit(name, {path.name: path.read_bytes() for path in folder.iterdir()}, "dataset")


def go_offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    access._confirmed.clear()


def refusal(name, **options):
    """The line of a `DataError`, which names the data set and shows no token."""
    with pytest.raises(DataError) as error:
        load(name, **options)
    line = str(error.value)
    assert len(line.splitlines()) == 1
    assert line.startswith(f"data set '{name}': ")
    assert "canary" not in line
    return line


def test_a_data_set_of_the_hub_is_that_of_the_folder(hub_here, published, folder):
    here, there = load(str(folder)), load(published)
    for split in ("train", "validation", "test"):
        assert torch.equal(getattr(here, split).images, getattr(there, split).images)
        assert torch.equal(getattr(here, split).labels, getattr(there, split).labels)
    assert there.label_names == NAMES
    assert (here.revision, [there.revision]) == (None, hub_here.history(published, repo_type="dataset"))
    assert load_image_split(DataArguments(published), "test")[1] == there.revision


def test_a_revision_is_the_one_that_is_loaded(hub_here, published, folder):
    (first,) = hub_here.history(published, repo_type="dataset")
    before = load(str(folder)).test.images
    second = publish(hub_here, published, folder, 500)
    old, new = load(published, dataset_revision=first), load(published)
    assert (old.revision, new.revision) == (first, second)
    assert torch.equal(old.test.images, before)
    assert not torch.equal(new.test.images, before)


def test_all_of_a_data_set_is_of_one_commit_while_the_branch_moves_on(hub_here, published, folder, monkeypatch):
    (first,) = hub_here.history(published, repo_type="dataset")
    expected = load(str(folder)).test.images
    build = datasets.load_dataset_builder

    def build_then_move(*args, **options):
        publish(hub_here, published, folder, 500)
        return build(*args, **options)

    monkeypatch.setattr(datasets, "load_dataset_builder", build_then_move)
    data = load(published)
    assert len(hub_here.history(published, repo_type="dataset")) == 2
    assert data.revision == first
    assert torch.equal(data.test.images, expected)


def test_offline_every_commit_that_was_loaded_is_there_and_no_other(hub_here, published, folder, monkeypatch):
    (first,) = hub_here.history(published, repo_type="dataset")
    online = {first: load(published).test.images}
    second = publish(hub_here, published, folder, 500)
    online[second] = load(published).test.images
    third = publish(hub_here, published, folder, 900)
    access.resolve_commit(published, repo_type="dataset", what="data set")
    go_offline(monkeypatch)
    hub_here.requests.clear()
    for commit in (first, second):
        data = load(published, dataset_revision=commit)
        assert data.revision == commit
        assert torch.equal(data.test.images, online[commit])
    assert f"commit {third} is not in the cache" in refusal(published)
    assert "not in the cache, and the Hub may not be asked" in refusal(published, dataset_revision="0" * 40)
    assert not hub_here.requests


def test_offline_a_configuration_must_be_the_only_one_or_be_named(hub_here, published, folder, monkeypatch):
    files = {"a": ("train", "test"), "b": ("test", "train")}
    config = "".join(
        f"- config_name: {c}\n  data_files:\n  - split: train\n    path: {one}-*\n  - split: test\n    path: {two}-*\n"
        for c, (one, two) in files.items()
    )
    hub_here.commit(published, {"README.md": f"---\nconfigs:\n{config}---\n".encode()}, "dataset")
    options = {"selection_split": "test"}
    sizes = {c: len(load(published, dataset_config_name=c, **options).train) for c in "ab"}
    assert sizes == {"a": 30, "b": 6}
    go_offline(monkeypatch)
    assert {c: len(load(published, dataset_config_name=c, **options).train) for c in "ab"} == sizes
    assert refusal(published, **options).endswith("found a and b; give 'dataset_config_name'")


def test_a_cached_copy_never_stands_in_for_a_refusal(hub_here, published, monkeypatch):
    load(published)
    monkeypatch.setenv("HF_TOKEN", "hf_canarynobody")
    assert "the Hub answered 401 (the token is not valid; token sent: yes)" in refusal(published)
    hub_here.repos["dataset", published].private = True
    monkeypatch.delenv("HF_TOKEN")
    assert "401 (no such repo, or a private one and no access; token sent: no)" in refusal(published)


def test_a_hub_that_falls_silent_gives_the_same_commit_or_an_error(hub_here, published, folder, caplog):
    first = load(published)
    hub_here.fail("HEAD", "/resolve/", 503, times=999)
    again = load(published)
    assert again.revision == first.revision
    assert torch.equal(again.test.images, first.test.images)
    second = publish(hub_here, published, folder, 500)
    hub_here.fail("GET", "/revision/", 503, times=999)
    assert second in refusal(published) or "the Hub answered 503" in refusal(published)


@pytest.mark.parametrize("fault", ["503", "drop"])
def test_a_download_that_breaks_off_is_one_line_and_the_next_try_succeeds(hub_here, published, fault):
    if fault == "503":
        hub_here.fail("GET", "/object/", 503, times=99)
    else:
        hub_here.drop("GET", "/object/", times=99, answered=True)
    line = refusal(published)
    assert ("the Hub answered 503" if fault == "503" else "the connection broke off") in line
    hub_here.faults.clear()
    assert len(load(published).test) == 6


def test_a_published_local_data_set_is_refused_for_what_it_is(hub_here):
    line = refusal("local:cifar_png")
    assert "the data set was a local folder called 'cifar_png', which was not published; give --dataset_name" in line
    with pytest.raises(DataError, match="local folder called 'cifar_png'"):
        load_image_split(DataArguments("local:cifar_png"), "test")
    assert not hub_here.requests


@pytest.mark.parametrize("foreign", ["absolute", "above", "elsewhere"])
def test_a_data_set_of_the_hub_reads_its_own_files_alone(hub_here, published, folder, foreign, request):
    other = f"me/other{abs(hash(request.node.name))}"
    hub_here.add_folder(other, folder, "dataset")
    commit = hub_here.history(other, repo_type="dataset")[0]
    file = "train-00000-of-00001.parquet"
    path = {
        "absolute": str(folder / file),
        "above": f"../../../../../../../..{folder / file}",
        "elsewhere": f"hf://datasets/{other}@{commit}/{file}",
    }[foreign]
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {path}\n"
    hub_here.commit(published, {"README.md": f"{card}  - split: test\n    path: test-*\n---\n".encode()}, "dataset")
    hub_here.requests.clear()
    assert re.search("Data files don't belong|files of its repo alone|Unable to find", refusal(published))
    assert not [r.path for r in hub_here.requests if "/object/" in r.path]


def test_files_of_elsewhere_are_refused_whatever_the_library_makes_of_them(hub_here, published, folder, monkeypatch):
    build = datasets.load_dataset_builder

    def build_astray(*args, **options):
        builder = build(*args, **options)
        builder.config.data_files["test"][0] = str(folder / "test-00000-of-00001.parquet")
        return builder

    monkeypatch.setattr(datasets, "load_dataset_builder", build_astray)
    assert f"expected files of its repo alone, found '{folder}/test-00000-of-00001.parquet'" in refusal(published)


def test_a_card_that_cannot_be_read_is_blamed_itself(hub_here, published):
    hub_here.commit(published, {"README.md": b"---\nconfigs: 3\n---\n"}, "dataset")
    assert re.search(r"': .*configs.* list", line := refusal(published)), line


@pytest.mark.parametrize("path", ["{here}", "{cache}/../../{name}"])
def test_an_image_of_a_data_set_of_the_hub_is_no_file_of_this_machine(hub_here, published, tmp_path, path):
    picture(7).save(tmp_path / "private.png")
    path = path.format(here=tmp_path / "private.png", cache=datasets.config.HF_DATASETS_CACHE, name="private.png")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    stolen = datasets.Dataset.from_dict(
        {"image": [{"bytes": None, "path": path}] * 6, "label": [0, 1, 2] * 2}, features=features
    )
    # written as it stands: `to_parquet` would put the image's bytes in
    table = io.BytesIO()
    pyarrow.parquet.write_table(stolen.data.table, table)
    hub_here.commit(published, {"test-00000-of-00001.parquet": table.getvalue()}, "dataset")
    with pytest.raises(DataError, match=r"split 'test', row 0: expected an image of the data set, found the path"):
        load(published)


def test_an_image_folder_of_the_hub_is_that_of_this_machine(hub_here, tmp_path):
    for i in range(24):
        path = tmp_path / "pictures" / ("train", "test")[i % 2] / NAMES[i % 3] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    hub_here.add_folder("me/pictures", tmp_path / "pictures", "dataset")
    here, there = (load(name, validation_fraction=0.5) for name in (str(tmp_path / "pictures"), "me/pictures"))
    assert torch.equal(here.test.images, there.test.images)
    assert torch.equal(here.train.labels, there.train.labels)
