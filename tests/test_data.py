import io
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from sklearn.datasets import load_digits

from hf_ihb import access
from hf_ihb.config.data import DataArguments
from hf_ihb.data import (
    DIGITS,
    ImageSplit,
    collate_images,
    load_image_data,
    load_image_split,
    stratified_sample,
)
from hf_ihb.errors import DataError, RecipeError
from tests.image_sets import NAMES, as_bytes, picture, pixels, png, rows, write


def load(name, **kwargs):
    return load_image_data(DataArguments(dataset_name=name, **kwargs))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "set"


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
    for name in ("fit", "held"):
        columns = {"image": [as_bytes(i) for i, _ in rows(12)], "label": [v for _, v in rows(12)]}
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
    name = write(folder, train=rows(6), test=rows(3))
    for key in ("image_column_name", "label_column_name"):
        with pytest.raises(DataError, match=rf"key '{key}': no column 'img'; it has image, label"):
            load(name, **{key: "img"})


def test_a_set_without_images_is_refused_with_its_columns(folder):
    folder.mkdir()
    for name in ("train", "test"):
        datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).to_parquet(folder / f"{name}-0.parquet")
    with pytest.raises(DataError, match="expected one image column, found none among text, label"):
        load(str(folder))


@pytest.mark.parametrize("key", ["train_split", "test_split", "validation_split"])
def test_a_missing_split_is_refused_with_those_there_are(folder, key):
    name = write(folder, train=rows(6), test=rows(3))
    with pytest.raises(DataError, match=rf"key '{key}': no split 'nowhere'; it has train, test"):
        load(name, **{key: "nowhere"})


def test_a_set_with_one_split_alone_is_refused(folder):
    with pytest.raises(DataError, match="key 'test_split': no split 'test'; it has train"):
        load(write(folder, train=rows(6)))


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_split_is_refused_by_name(folder, split):
    name = write(folder, **({"train": rows(6), "test": rows(6)} | {split: []}))
    with pytest.raises(DataError, match=rf"split '{split}' is empty|\"{split}\" corresponds to no data"):
        load(name)


def test_a_folder_that_holds_no_data_set_is_one_line(folder, tmp_path):
    folder.mkdir()
    datasets.Dataset.from_dict({"label": [0]}).save_to_disk(tmp_path / "saved")
    for name in (folder, tmp_path / "saved"):
        with pytest.raises(DataError, match=f"folder '{name}' could not be loaded") as error:
            load(str(name))
        assert "\n" not in str(error.value)


def test_a_hub_set_that_cannot_be_reached_is_one_line():
    with pytest.raises(DataError, match=r"^data set 'someone/nothing': not in the cache") as error:
        load("someone/nothing")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("value", "shown"), [(-1, "-1"), (3, "3"), (None, "None")])
def test_a_label_out_of_range_is_refused_with_its_row(folder, value, shown):
    test = [*rows(5), (picture(9), value)]
    name = write(folder, class_label=False, train=rows(30), test=test)
    with pytest.raises(DataError, match=rf"split 'test', row 5: expected a label in \[0, 3\), found {shown}"):
        load(name)


def test_a_missing_class_label_is_refused_with_its_row(folder):
    train = rows(30)
    train[7] = (train[7][0], None)
    with pytest.raises(DataError, match=r"split 'train', row 7: expected a label in \[0, 3\), found None"):
        load(write(folder, train=train, test=rows(3)))


def test_labels_that_are_no_classes_are_refused(folder):
    folder.mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    for name in ("train", "test"):
        columns = {"image": [as_bytes(picture(0))], "label": ["cat"]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{name}-0.parquet")
    with pytest.raises(DataError, match="column 'label': expected class labels or integers, found str"):
        load(str(folder))


def test_integer_labels_are_named_by_their_number(folder):
    data = load(write(folder, class_label=False, train=rows(30), test=rows(6)))
    assert data.label_names == ["0", "1", "2"]


@pytest.mark.parametrize("broken", [b"no image", b"", "truncated"])
def test_an_image_that_cannot_be_decoded_is_refused_with_its_row(folder, broken):
    data = png(picture(1, (64, 64)))[:2000] if broken == "truncated" else broken
    test = [*rows(4), (data, 0), *rows(2)]
    with pytest.raises(DataError, match=r"split 'test', row 4: the image cannot be decoded") as error:
        load(write(folder, train=rows(30), test=test))
    assert "\n" not in str(error.value)


def test_a_missing_image_is_refused_with_its_row(folder):
    folder.mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    images = [as_bytes(image) for image, _ in rows(6)]
    for name, column in (("train", images), ("test", [*images[:5], None])):
        split = datasets.Dataset.from_dict({"image": column, "label": [0, 1, 2] * 2}, features=features)
        split.to_parquet(folder / f"{name}-0.parquet")
    with pytest.raises(DataError, match=r"split 'test', row 5"):
        load(str(folder), validation_fraction=0.5)


@pytest.mark.parametrize(
    ("side", "reason"), [(8200, "expected at most 67108864 px, found 8200 x 8200"), (9600, "bomb")]
)
def test_a_decompression_bomb_is_refused_with_its_row(folder, side, reason):
    stream = io.BytesIO()
    Image.new("1", (side, side)).save(stream, "PNG")
    with pytest.raises(DataError, match=rf"split 'train', row 1: .*{reason}"):
        load(write(folder, train=[*rows(1), (stream.getvalue(), 0), *rows(30)], test=rows(3)))


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1", "LA"])
def test_every_colour_mode_becomes_rgb(folder, mode):
    test = [(picture(i, mode=mode), i % 3) for i in range(6)]
    data = load(write(folder, train=rows(30), test=test))
    assert torch.equal(data.test.images, pixels([Image.open(io.BytesIO(png(image))) for image, _ in test]))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK", "P", "1"])
def test_grey_images_are_pils_luma_in_one_channel(folder, mode):
    test = [(picture(i, mode=mode), i % 3) for i in range(6)]
    name = write(folder, train=rows(30), test=test)
    opened = [Image.open(io.BytesIO(png(image))) for image, _ in test]
    for side in (None, 9):
        data = load(name, color_mode="grayscale", image_size=side)
        grey = [image.convert("L") for image in opened]
        if side:
            grey = [image.resize((9, 9), Image.Resampling.BICUBIC) for image in grey]
        assert torch.equal(data.test.images, torch.stack([torch.from_numpy(np.array(g))[None] for g in grey]))
        assert data.train.images.shape[1] == 1
        assert [len(values) for values in data.train.statistics()] == [1, 1]


def test_images_of_other_sizes_are_refused_until_a_size_is_given(folder):
    train = [*rows(29), (picture(50, (8, 7)), 2)]
    name = write(folder, train=train, test=rows(3, size=(9, 9)))
    with pytest.raises(DataError, match=r"row 29: expected 6 x 6 px like row 0, found 8 x 7; give 'image_size'"):
        load(name)
    data = load(name, image_size=10)
    assert data.image_size == (10, 10)
    assert data.test.images.shape == (3, 3, 10, 10)
    expected = [image.resize((10, 10), Image.Resampling.BICUBIC) for image, _ in rows(3, size=(9, 9))]
    assert torch.equal(data.test.images, pixels(expected))


def test_an_image_folder_is_read_with_its_classes(folder):
    for split, count in (("train", 12), ("test", 3)):
        for i in range(count):
            path = folder / split / NAMES[i % 3] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(i).save(path)
    data = load(str(folder), validation_fraction=0.25)
    assert data.label_names == NAMES
    assert (len(data.train), len(data.validation), len(data.test)) == (9, 3, 3)
    expected = {NAMES[i]: pixels([picture(i)])[0] for i in range(3)}
    for image, label in zip(data.test.images, data.test.labels, strict=True):
        assert torch.equal(image, expected[NAMES[label]])


@pytest.mark.parametrize("own", [{}, {"validation": [(b"is not even looked at", 0)]}])
def test_selecting_on_the_test_split_holds_no_image_out(folder, own):
    train, test = rows(30), rows(6, start=100)
    name = write(folder, train=train, test=test, **own)
    data = load(name, selection_split="test")
    assert torch.equal(data.train.images, pixels([image for image, _ in train]))
    assert torch.equal(data.validation.images, pixels([image for image, _ in test]))
    assert data.validation is data.test
    limited = load(name, selection_split="test", max_eval_samples=3)
    assert limited.validation is limited.test
    assert len(limited.test) == 3


@pytest.mark.parametrize("option", [{"validation_split": "validation"}, {"validation_fraction": 0.2}])
def test_selecting_on_the_test_split_and_a_validation_split_contradict(option):
    (key,) = option
    with pytest.raises(RecipeError, match=f"^keys 'selection_split' and '{key}' contradict: .*found {key}="):
        load("someone/nothing", selection_split="test", **option)


def as_set(images):
    return {image.numpy().tobytes() for image in images}


def test_the_validation_split_is_stratified_disjoint_and_fixed_by_its_seed(folder):
    name = write(folder, train=rows(90), test=rows(3))
    data, again, other = load(name), load(name), load(name, split_seed=1)
    assert torch.bincount(data.validation.labels).tolist() == [3, 3, 3]
    assert torch.bincount(data.train.labels).tolist() == [27, 27, 27]
    assert as_set(data.train.images) | as_set(data.validation.images) == as_set(pixels([i for i, _ in rows(90)]))
    assert not as_set(data.train.images) & as_set(data.validation.images)
    assert torch.equal(data.validation.images, again.validation.images)
    assert torch.equal(data.train.images, again.train.images)
    assert as_set(data.validation.images) != as_set(other.validation.images)
    lookup = {image.numpy().tobytes(): label for image, label in zip(data.train.images, data.train.labels, strict=True)}
    for image, label in rows(90):
        key = pixels([image])[0].numpy().tobytes()
        assert lookup.get(key, label) == label


def test_a_split_that_cannot_be_stratified_says_what_to_give(folder):
    name = write(folder, train=rows(3), test=rows(3))
    with pytest.raises(DataError, match=r"train: cannot be split by class .*give 'validation_split'"):
        load(name)


@pytest.mark.parametrize("split", ["validation", "dev"])
def test_a_validation_split_that_exists_is_used(folder, split):
    held_out = rows(6, start=500)
    name = write(folder, train=rows(9), test=rows(3, start=200), **{split: held_out})
    data = load(name)
    assert len(data.train) == 9
    assert torch.equal(data.validation.images, pixels([image for image, _ in held_out]))
    named = load(name, validation_split="test")
    assert torch.equal(named.validation.images, named.test.images)


def test_limits_keep_the_classes_in_proportion(folder):
    train = [(picture(i), 0 if i < 60 else 1 + i % 2) for i in range(120)]
    name = write(folder, train=train, test=rows(30))
    data = load(name, validation_fraction=0.5, max_train_samples=12, max_eval_samples=6)
    assert torch.bincount(data.train.labels).tolist() == [6, 3, 3]
    assert torch.bincount(data.validation.labels).tolist() == [3, 2, 1] or len(data.validation) == 6
    assert torch.bincount(data.test.labels).tolist() == [2, 2, 2]
    whole = load(name, validation_fraction=0.5)
    assert as_set(data.train.images) < as_set(whole.train.images)
    unlimited = load(name, validation_fraction=0.5, max_train_samples=60, max_eval_samples=10_000)
    assert torch.equal(unlimited.train.images, whole.train.images)


def test_digits_need_no_files():
    data = load(DIGITS)
    bunch = load_digits()
    assert data.label_names == [str(n) for n in range(10)]
    assert len(data.train) + len(data.validation) + len(data.test) == 1797
    assert data.train.images.shape[1:] == (3, 8, 8)
    everything = torch.cat((data.train.images, data.validation.images, data.test.images))
    expected = np.rint(bunch.images * 255 / 16).astype(np.uint8)
    assert sorted(image[0].numpy().tobytes() for image in everything) == sorted(image.tobytes() for image in expected)
    assert all(torch.equal(everything[:, 0], everything[:, channel]) for channel in (1, 2))
    share = torch.bincount(data.test.labels) / torch.from_numpy(np.bincount(bunch.target))
    assert share.sub(0.2).abs().max() < 0.01
    assert torch.equal(load(DIGITS, split_seed=5).test.images, data.test.images)
    assert load(DIGITS, image_size=16).image_size == (16, 16)
    grey = load(DIGITS, color_mode="grayscale")
    assert torch.equal(grey.train.images, data.train.images[:, :1])
    selected = load(DIGITS, selection_split="test")
    assert len(selected.train) == len(data.train) + len(data.validation)
    assert torch.equal(selected.validation.images, data.test.images)


@pytest.fixture
def split(generator):
    images = torch.randint(256, (40, 3, 5, 7), generator=generator, dtype=torch.uint8)
    return ImageSplit(images, torch.arange(40) % 3, NAMES)


def test_a_batch_equals_its_items(split):
    indices = [3, 0, 39, 3]
    batch, items = collate_images(split.__getitems__(indices)), [split[i] for i in indices]
    assert batch.pop("rows").tolist() == indices
    assert batch.pop("split") == split.key
    assert batch.keys() == items[0].keys() == {"pixel_values", "labels", "index"}
    for i, item in enumerate(items):
        assert torch.equal(batch["pixel_values"][i], item["pixel_values"])
        assert batch["labels"][i] == item["labels"]
        assert batch["index"][i] == item["index"] == indices[i]
    stacked = collate_images(items)
    assert all(torch.equal(stacked[name], batch[name]) for name in batch)


def test_a_data_loader_gives_whole_batches(split):
    loader = torch.utils.data.DataLoader(split, 16, collate_fn=collate_images)
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in loader]), split.images)
    assert torch.equal(torch.cat([batch["index"] for batch in loader]), torch.arange(40))


def test_selected_rows_are_numbered_anew(split):
    part = split.select(np.array([5, 2]))
    assert [part[i]["index"] for i in range(2)] == [0, 1]
    assert torch.equal(part.images, split.images[[5, 2]])
    assert part.label_names == NAMES


def test_statistics_equal_numpy(split):
    mean, std = split.statistics()
    pixels = split.images.numpy() / 255
    np.testing.assert_allclose(mean, pixels.mean(axis=(0, 2, 3)), atol=5.1e-5)
    np.testing.assert_allclose(std, pixels.std(axis=(0, 2, 3)), atol=5.1e-5)


def test_the_deviation_of_a_constant_channel_can_be_divided_by():
    constant = ImageSplit(torch.full((4, 3, 2, 2), 7, dtype=torch.uint8), torch.zeros(4, dtype=torch.long), ["a"])
    assert min(constant.statistics()[1]) > 0


def test_nothing_is_written_beside_the_data(folder):
    name = write(folder, train=rows(30), test=rows(3))
    before = sorted(p.name for p in Path(name).iterdir())
    load(name)
    assert sorted(p.name for p in Path(name).iterdir()) == before


@pytest.mark.parametrize("split", ["test", "validation", "train"])
def test_a_single_split_is_the_one_of_the_whole_set(folder, split):
    args = DataArguments(write(folder, train=rows(30), test=rows(9, start=100, size=(8, 8))), max_eval_samples=6)
    found, revision = load_image_split(args, split)
    expected = getattr(load_image_data(args), split)
    assert torch.equal(found.images, expected.images)  # of the training images' size, all of them
    assert torch.equal(found.labels, expected.labels)
    assert found.label_names == expected.label_names
    assert revision is None


def test_the_test_split_is_decoded_alone(folder):
    name = write(folder, train=[*rows(29), (b"broken", 0)], test=rows(6))
    assert len(load_image_split(DataArguments(name), "test")[0]) == 6
    with pytest.raises(DataError, match="row 29: the image cannot be decoded"):
        load_image_split(DataArguments(name), "train")


def test_a_set_without_a_training_split_can_be_tested_on(folder):
    found, _ = load_image_split(DataArguments(write(folder, test=rows(6))), "test")
    assert torch.equal(found.images, pixels([image for image, _ in rows(6)]))
    with pytest.raises(DataError, match="key 'test_split': no split 'test'"):
        load_image_split(DataArguments(write(folder.with_name("other"), train=rows(6))), "test")


def test_a_sample_has_every_class_in_proportion_and_is_fixed_by_its_seed(folder):
    split, _ = load_image_split(DataArguments(write(folder, test=rows(24))), "test")
    one, again, other = (stratified_sample(split, 12, seed, "here") for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(one, one.unique())
    assert torch.bincount(split.labels[one]).tolist() == [4, 4, 4]
    assert torch.equal(stratified_sample(split, 99, 0, "here"), torch.arange(24))
    with pytest.raises(DataError, match="here: cannot be split by class"):
        stratified_sample(split, 2, 0, "here")


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
    config = "".join(f"- config_name: {c}\n  data_files: {f}-*\n" for c, f in (("a", "train"), ("b", "test")))
    hub_here.commit(published, {"README.md": f"---\nconfigs:\n{config}---\n".encode()}, "dataset")
    options = {"test_split": "train", "selection_split": "test"}
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
    for i in range(12):
        for split in ("train", "test"):
            path = tmp_path / "pictures" / split / NAMES[i % 3] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(i).save(path)
    hub_here.add_folder("me/pictures", tmp_path / "pictures", "dataset")
    here, there = (load(name, validation_fraction=0.5) for name in (str(tmp_path / "pictures"), "me/pictures"))
    assert torch.equal(here.test.images, there.test.images)
    assert torch.equal(here.train.labels, there.train.labels)
