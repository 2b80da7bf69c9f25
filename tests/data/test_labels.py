import datasets
import pytest
import torch

from hf_ihb.config.data import MAX_CLASSES, DataArguments
from hf_ihb.data import CheckedLabels, ImageSplit, collate_images, load_image_split
from hf_ihb.errors import DataError
from tests.image_sets import NAMES, as_bytes, load, picture, rows, write


@pytest.mark.parametrize(("value", "shown"), [(-1, "-1"), (3, "3"), (None, "None")])
def test_a_label_out_of_range_is_refused_with_its_row(folder, value, shown):
    test = [*rows(5, start=900), (picture(9), value)]
    name = write(folder, class_label=False, train=rows(30), test=test)
    with pytest.raises(DataError, match=rf"split 'test', row 5: expected a label in \[0, 3\), found {shown}"):
        load(name)


def test_a_missing_class_label_is_refused_with_its_row(folder):
    train = rows(30)
    train[7] = (train[7][0], None)
    with pytest.raises(DataError, match=r"split 'train', row 7: expected a label in \[0, 3\), found None"):
        load(write(folder, train=train, test=rows(3, start=900)))


@pytest.mark.parametrize(("label", "feature", "found"), [
    ("cat", datasets.Value("string"), r"string; dataset.class_encode_column\('label'\) makes class labels of it"),
    (1.0, datasets.Value("float64"), "float64; give 'label_column_name', or cast it to integers"),
    (True, datasets.Value("bool"), "bool; give 'label_column_name', or cast it to integers"),
    ([0, 1, 1], datasets.List(datasets.Value("int64")), "lists; several classes of one image"),
    ([0, 1, 1], datasets.List(datasets.ClassLabel(names=NAMES)), "lists; several classes of one image"),
])  # fmt: skip
def test_labels_that_are_no_classes_are_refused(folder, label, feature, found):
    folder.mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    for name, start in (("train", 0), ("test", 6)):
        columns = {"image": [as_bytes(image) for image, _ in rows(6, start)], "label": [label] * 6}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{name}-0.parquet")
    with pytest.raises(DataError, match=f"column 'label': expected class labels or integers, found {found}"):
        load(folder)


def test_integer_labels_are_named_by_their_number(folder):
    data = load(write(folder, class_label=False, train=rows(30), test=rows(6, start=900)))
    assert data.label_names == ["0", "1", "2"]


def numbered(folder, numbers, test=None):
    """A set whose classes are called by some integers."""
    train = [(picture(i), numbers[i % len(numbers)]) for i in range(10 * len(numbers))]
    test = [(picture(900 + i), number) for i, number in enumerate(numbers if test is None else test)]
    return write(folder, class_label=False, train=train, test=test)


@pytest.mark.parametrize(("numbers", "missing"), [
    ([1, 2, 3], "expected every integer from 0 to 3, found 3 of them, without 0; give --compact_labels true"),
    ([0, 2, 9000], "from 0 to 9000, found 3 of them, without 1, 3, 4, 5, 6 and 8993 more; give"),
    ([0, 1, 1 << 40], "found 3 of them, without 2, 3, 4, 5, 6 and 1099511627769 more; give"),
])  # fmt: skip
def test_numbers_with_gaps_are_refused_or_numbered_anew_by_a_key(folder, numbers, missing):
    name = numbered(folder, numbers)
    with pytest.raises(DataError, match=missing):
        load(name)
    data = load(name, compact_labels=True)
    assert data.label_names == [str(number) for number in numbers]
    assert data.test.labels.tolist() == [0, 1, 2]
    assert torch.bincount(torch.cat([data.train.labels, data.validation.labels])).tolist() == [10, 10, 10]
    assert load_image_split(DataArguments(name, compact_labels=True), "test")[0].labels.tolist() == [0, 1, 2]


def test_a_number_that_was_not_trained_on_is_refused_with_its_row(folder):
    with pytest.raises(DataError, match=r"split 'test', row 1: expected one of the 3 labels of .* split, found 3"):
        load(numbered(folder, [2, 4, 6], test=[4, 3]), compact_labels=True)


def test_numbers_without_gaps_are_the_labels_with_and_without_the_key(folder):
    name = numbered(folder, [0, 1, 2])
    for compact in (False, True):
        data = load(name, compact_labels=compact)
        assert data.label_names == ["0", "1", "2"]
        assert data.test.labels.tolist() == [0, 1, 2]


def test_a_test_split_alone_may_lack_a_class_and_not_be_out_of_bounds(folder):
    split, _ = load_image_split(DataArguments(write(folder, class_label=False, test=[(picture(0), 2)])), "test")
    assert (split.label_names, split.labels.tolist()) == (["0", "1", "2"], [2])
    name = write(folder.with_name("other"), class_label=False, test=[(picture(0), 1 << 40)])
    with pytest.raises(DataError, match=rf"expected at most {MAX_CLASSES} classes, found {(1 << 40) + 1}"):
        load_image_split(DataArguments(name), "test")


# ---- Of batches ----

INTEGERS = torch.tensor([0, 2, 1])
PROBABILITIES = torch.tensor([[0.2, 0.3, 0.5], [0.0, 1.0, 0.0], [0.1, 0.1, 0.8]])
WRONG = {
    "bool": (INTEGERS == 1, r"expected integers \(B,\) or class probabilities \(B, 3\), found torch.bool \(3,\)"),
    "float": (INTEGERS.float(), r"found torch.float32 \(3,\)"),
    "column": (INTEGERS[:, None], r"found torch.int64 \(3, 1\)"),
    "more classes": (torch.eye(4), r"found torch.float32 \(4, 4\)"),
    "ignored": (torch.tensor([0, -100, 1]), r"row 1: expected a label in \[0, 3\), found -100"),
    "too large": (torch.tensor([0, 1, 3]), r"row 2: expected a label in \[0, 3\), found 3"),
    "multi-hot": (
        torch.tensor([[0, 1, 0], [1, 1, 0], [0, 0, 1]]),
        r"row 1: expected class probabilities, .* sum to 1, found \[1, 1, 0\], which sum to 2; several classes of one",
    ),
    "no class": (torch.zeros(3, 3, dtype=torch.bool), r"row 0: .*found \[0, 0, 0\], which sum to 0"),
    "negative": (torch.tensor([[0.5, 0.5, 0.0], [1.5, -0.5, 0.0]]), r"row 1: .*found \[1.5, -0.5, 0\]"),
    "not finite": (torch.tensor([[0.5, 0.5, float("nan")]]), r"row 0: .*which sum to nan"),
    "half": (PROBABILITIES / 2, r"row 0: .*which sum to 0.5"),
}


def collator(labels, **more):
    return CheckedLabels(lambda items: {"pixel_values": torch.zeros(len(labels), 3, 2, 2), "labels": labels} | more, 3)


@pytest.mark.parametrize("case", WRONG)
def test_labels_of_a_batch_that_cannot_be_learned_from_are_one_line_that_names_the_row(case):
    labels, line = WRONG[case]
    with pytest.raises(DataError, match=f"^labels.*{line}"):
        collator(labels)([])
    with pytest.raises(DataError, match=f"^labels.*{line}"):
        ImageSplit(torch.zeros(len(labels), 3, 2, 2, dtype=torch.uint8), labels, NAMES)
    if "row" in line:
        with pytest.raises(DataError, match=r"^labels, image 7[0-2]: expected "):
            collator(labels, index=torch.arange(70, 70 + len(labels)))([])


@pytest.mark.parametrize(
    "labels", [INTEGERS, INTEGERS.int(), INTEGERS.byte(), PROBABILITIES, PROBABILITIES.bfloat16(), torch.eye(3).bool()]
)
def test_labels_of_a_batch_that_can_be_learned_from_pass_as_they_are(labels):
    assert collator(labels)([])["labels"] is labels


def test_a_batch_without_labels_or_on_an_accelerator_passes():
    assert "labels" not in CheckedLabels(lambda items: {"pixel_values": items}, 3)([1])
    meta = torch.tensor([7, -1], device="meta")  # a device that tells no values
    assert collator(meta)([])["labels"] is meta


def test_labels_of_a_split_of_ours_are_looked_at_once(monkeypatch):
    split = ImageSplit(torch.zeros(3, 3, 2, 2, dtype=torch.uint8), INTEGERS, NAMES)
    monkeypatch.setattr("hf_ihb.data.labels.check_labels", None)
    batch = CheckedLabels(collate_images, 3)(split.__getitems__([2, 1]))
    assert batch["labels"].tolist() == [1, 2]
