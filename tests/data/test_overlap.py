"""No image is both learned from and reported on."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from hf_ihb.data.overlap import refuse_shared_images
from hf_ihb.errors import DataError
from tests.image_sets import NAMES, load, picture, rows, write


def image_folder(folder, classes, splits=("train", "test"), count=12):
    """``split/class/number.png``, every image another one."""
    for i in range(count * len(splits)):
        path = folder / splits[i // count] / classes[i % len(classes)] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    return folder


def refusal(*args, **options):
    with pytest.raises(DataError) as error:
        load(*args, **options)
    line = str(error.value)
    assert len(line.splitlines()) == 1
    return line


@pytest.mark.parametrize(("name", "remote"), [
    *((name, False) for name in ("train", "test", "eval", "val", "testing", "dev_2")), ("test", True),
])  # fmt: skip
def test_a_class_called_like_a_split_leaks_no_image(folder, name, remote, hub_here, request):
    image_folder(folder, ["cat", name, "owl"])
    where = str(folder)
    if remote:
        where = f"me/leak{abs(hash(request.node.name))}"
        hub_here.add_folder(where, folder, "dataset")
    line = refusal(where, validation_fraction=0.5)
    assert "images: expected different ones, found " in line
    assert f"/{name}/" in line
    assert "folder called train, test, eval or the like" in line


def test_other_classes_in_the_same_folders_are_read(folder):
    data = load(image_folder(folder, ["cat", "untested", "trainers"]), validation_fraction=0.5)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [6, 6, 12]


def test_names_in_a_readme_are_the_way_out(folder):
    image_folder(folder, ["cat", "test", "owl"])
    files = "".join(f"  - split: {split}\n    path: {split}/**\n" for split in ("train", "test"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n")
    data = load(folder, validation_fraction=0.5)
    assert data.label_names == ["cat", "owl", "test"]
    assert [len(split) for split in (data.train, data.validation, data.test)] == [6, 6, 12]


def test_a_file_that_is_in_a_split_twice_is_refused(folder):
    # `datasets` finds it by the folder "train" and once more by the folder "train_1"
    line = refusal(image_folder(folder, ["cat", "train_1", "owl"]), selection_split="test")
    assert "/train/train_1/01.png is there twice" in line or "are the file" in line


@pytest.mark.parametrize("how", ["copy", "link", "parquet"])
def test_the_same_content_under_another_name_is_refused(folder, how):
    if how == "parquet":
        train = rows(30)
        write(folder, train=train, test=[*rows(5, start=900), train[11]])
    else:
        image_folder(folder, NAMES)
        source, target = folder / "train" / NAMES[1] / "01.png", folder / "test" / NAMES[1] / "other.png"
        shutil.copy(source, target) if how == "copy" else target.symlink_to(source)
    line = refusal(folder, selection_split="test")
    assert "test and train images: expected different ones, found 1 of " in line
    assert "by their content; take them out of one of the splits" in line
    if how == "parquet":
        assert "split 'test', row 5, and " in line
        assert "split 'train', row 11, by" in line


def test_few_of_the_same_content_are_said_and_go_on(folder, capsys):
    train = rows(12, size=(2, 2))
    name = write(folder, train=train, test=[*rows(99, start=900, size=(2, 2)), train[4]])
    assert len(load(name, selection_split="test").test) == 100
    said = capsys.readouterr().out
    assert "test and train images: expected different ones, found 1 of 100 in both" in said
    assert "split 'test', row 99, and" in said


def test_a_split_that_shows_an_image_twice_may_hold_it_out(folder, capsys):
    data = load(write(folder, train=rows(15) * 2, test=rows(3, start=900)), validation_fraction=0.4)
    seen = {image.numpy().tobytes() for image in data.train.images}
    shared = sum(image.numpy().tobytes() in seen for image in data.validation.images)
    assert shared > 1
    assert (
        f"validation and train images: expected different ones, found {shared} of 12 in both" in capsys.readouterr().out
    )


@pytest.mark.parametrize("seed", range(5))
def test_what_is_shared_is_what_a_comparison_of_all_bytes_finds(encode, seed, monkeypatch):
    monkeypatch.setattr("hf_ihb.data.overlap.MAX_SHARE", 1)
    random = np.random.default_rng(seed)
    # long ones that begin alike, as images of one camera do, and short ones; few contents, so that many are shared
    pool = [b"x" * 5000 * int(random.integers(0, 2)) + random.bytes(int(random.integers(1, 3))) for _ in range(40)]
    chosen = [[pool[k] for k in random.integers(0, 40, size)] for size in (30, 20)]
    parts = {n: encode(part, identity=(n,)) for n, part in zip(("train", "test"), chosen, strict=True)}
    shared = [k for k, content in enumerate(chosen[1]) if content in chosen[0]]
    note = refuse_shared_images(parts)
    assert f"found {len(shared)} of 20 in both, first here, row {shared[0]}, and" in note
    some = np.sort(random.choice(30, 10, replace=False))
    chosen[0] = [chosen[0][k] for k in some]
    parts["train"] = parts["train"].select(torch.from_numpy(some))
    shared = [k for k, content in enumerate(chosen[1]) if content in chosen[0]]
    assert f"found {len(shared)} of 20 " in refuse_shared_images(parts) if shared else True


def test_files_that_begin_alike_are_others(folder):
    for split in ("train", "test"):
        (folder / split / "cat").mkdir(parents=True)
    image = Image.fromarray(np.zeros((90, 90, 3), np.uint8))
    for i in range(8):
        image.putpixel((80, 80), (i, 0, 0))
        for name in NAMES[:2]:
            path = folder / ("train", "test")[i % 2] / name / f"{i}.bmp"
            path.parent.mkdir(exist_ok=True)
            image.putpixel((81, 80), (0, NAMES.index(name), 0))
            image.save(path)
    assert len(load(folder, selection_split="test").test) == 8
