import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from hf_ihb.config.data import DataArguments
from hf_ihb.data import DIGITS, load_image_data, load_image_split, stratified_sample
from hf_ihb.errors import DataError, RecipeError
from tests.image_sets import load, picture, pixels, rows, write


@pytest.mark.parametrize("key", ["train_split", "test_split", "validation_split"])
def test_a_missing_split_is_refused_with_those_there_are(folder, key):
    name = write(folder, train=rows(6), test=rows(3, start=900))
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


@pytest.mark.parametrize(("options", "keys"), [
    ({"validation_split": "test"}, "'validation_split' and 'test_split'"),
    ({"test_split": "validation", "validation_split": "validation"}, "'validation_split' and 'test_split'"),
    ({"validation_split": "train"}, "'train_split' and 'validation_split'"),
    ({"test_split": "train"}, "'train_split' and 'test_split'"),
    ({"test_split": "train", "selection_split": "test"}, "'train_split' and 'test_split'"),
])  # fmt: skip
def test_a_split_has_one_role(options, keys):
    with pytest.raises(RecipeError, match=f"^keys {keys} contradict: both name split '") as error:
        load("someone/nothing", **options)
    assert ("selection_split" in str(error.value)) == ("train" not in keys)


@pytest.mark.parametrize("role", ["test_split", "train_split"])
def test_a_validation_split_with_another_role_is_not_selected_on(folder, role, capsys):
    splits = {"train": rows(30), "validation": rows(30, start=500), "test": rows(6, start=900)}
    del splits[role.removesuffix("_split")]
    data = load(write(folder, **splits), **{role: "validation"})
    parts = [as_set(part.images) for part in (data.train, data.validation, data.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == sum(len(split) for split in splits.values())
    own = as_set(pixels([image for image, _ in splits["validation"]]))
    assert own == (parts[2] if role == "test_split" else parts[0] | parts[1])
    assert "split 'validation' is taken for something else; 0.1 of split" in capsys.readouterr().out


def as_set(images):
    return {image.numpy().tobytes() for image in images}


def test_the_validation_split_is_stratified_disjoint_and_fixed_by_its_seed(folder):
    name = write(folder, train=rows(90), test=rows(3, start=900))
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
    name = write(folder, train=rows(3), test=rows(3, start=900))
    with pytest.raises(DataError, match=r"train: cannot be split by class .*give 'validation_split'"):
        load(name)


@pytest.mark.parametrize("split", ["validation", "dev"])
def test_a_validation_split_that_exists_is_used(folder, split):
    held_out = rows(6, start=500)
    name = write(folder, train=rows(9), test=rows(3, start=200), **{split: held_out})
    data = load(name)
    assert len(data.train) == 9
    assert torch.equal(data.validation.images, pixels([image for image, _ in held_out]))


def test_limits_keep_the_classes_in_proportion(folder):
    train = [(picture(i), 0 if i < 60 else 1 + i % 2) for i in range(120)]
    name = write(folder, train=train, test=rows(30, start=900))
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
    name = write(folder, train=[*rows(29), (b"broken", 0)], test=rows(6, start=900))
    assert len(load_image_split(DataArguments(name), "test")[0]) == 6
    with pytest.raises(DataError, match="row 29: the image cannot be decoded"):
        load_image_split(DataArguments(name), "train")


def test_a_set_without_a_training_split_can_be_tested_on(folder):
    found, _ = load_image_split(DataArguments(write(folder, test=rows(6, start=900))), "test")
    assert torch.equal(found.images, pixels([image for image, _ in rows(6, start=900)]))
    with pytest.raises(DataError, match="key 'test_split': no split 'test'"):
        load_image_split(DataArguments(write(folder.with_name("other"), train=rows(6))), "test")


def test_a_sample_has_every_class_in_proportion_and_is_fixed_by_its_seed(folder):
    split, _ = load_image_split(DataArguments(write(folder, test=rows(24, start=900))), "test")
    one, again, other = (stratified_sample(split, 12, seed, "here") for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(one, one.unique())
    assert torch.bincount(split.labels[one]).tolist() == [4, 4, 4]
    assert torch.equal(stratified_sample(split, 99, 0, "here"), torch.arange(24))
    with pytest.raises(DataError, match="here: cannot be split by class"):
        stratified_sample(split, 2, 0, "here")
