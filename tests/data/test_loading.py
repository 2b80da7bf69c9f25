import io
import itertools

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.model_selection import train_test_split

from hf_ihb.analysis import AnalysisArguments, analyze
from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.config.data import DataArguments
from hf_ihb.config.model import ModelArguments
from hf_ihb.data import (
    DIGITS,
    ImageSplit,
    MappedSplit,
    StreamedSplit,
    collate_images,
    load_image_data,
    load_image_split,
    loading,
    splits,
)
from hf_ihb.data.decode import EncodedImages
from hf_ihb.data.decoded_cache import DecodedCache
from hf_ihb.errors import DataError, RecipeError
from hf_ihb.evaluation import evaluate_model
from hf_ihb.models.pretrained import Pretrained
from hf_ihb.models.processing import pixel_format
from hf_ihb.models.student import build_student
from hf_ihb.trainer import SupervisedTrainer
from hf_ihb.trainer.arguments import SupervisedTrainingArguments
from tests.image_sets import picture, rows, write

# Class of a split, and the keys that make it.
WAYS = {
    "memory": (ImageSplit, {"decode": "once"}),
    "file": (MappedSplit, {"decode": "once", "decoded_memory_fraction": 0.0}),
    "stream": (StreamedSplit, {"decode": "stream"}),
}


@pytest.fixture
def load(tmp_path):
    def load(name, way="memory", **options):
        cache = str(tmp_path / "decoded")
        return load_image_data(DataArguments(name, decoded_cache_dir=cache, **WAYS[way][1], **options))

    return load


def jpeg(image):
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=90)
    return stream.getvalue()


def broken_but(chosen, count):
    """Rows whose images cannot be decoded, but for some."""
    return [(image if i in chosen else b"broken", label) for i, (image, label) in enumerate(rows(count))]


def assert_same(split, expected):
    """Every way of asking for rows gives the same pixels, labels and numbers."""
    assert (len(split), split.label_names) == (len(expected), expected.label_names)
    assert (split.image_size, split.num_channels) == (expected.image_size, expected.num_channels)
    everything = expected.__getitems__(range(len(expected)))
    for some in (range(len(split)), [2, 0, len(split) - 1, 0], torch.tensor([1])):
        batch = split.__getitems__(some)
        assert batch.keys() == everything.keys()
        assert batch.pop("split") == split.key != expected.key
        chosen = {name: torch.as_tensor(everything[name])[torch.as_tensor(some)] for name in batch}
        assert all(torch.equal(torch.as_tensor(batch[name]), chosen[name]) for name in batch)
    assert torch.equal(split[1]["pixel_values"], everything["pixel_values"][1])
    assert (split[1]["labels"], split[1]["index"]) == (int(expected.labels[1]), 1)
    part = split.select(np.array([3, 1]))
    assert type(part).__name__ in ("ImageSplit", "StreamedSplit")
    again = part.__getitems__([0, 1])
    assert torch.equal(again["pixel_values"], everything["pixel_values"][[3, 1]])
    assert torch.equal(again["labels"], expected.labels[[3, 1]])
    assert again["index"].tolist() == [0, 1]
    last = split[-1]
    assert torch.equal(last["pixel_values"], everything["pixel_values"][-1])
    assert (last["labels"], last["index"]) == (int(expected.labels[-1]), len(split) - 1)
    with pytest.raises(IndexError):
        split[len(split)]


@pytest.mark.parametrize("way", ["file", "stream"])
@pytest.mark.parametrize(("mode", "side"), [("rgb", None), ("rgb", 9), ("grayscale", None), ("grayscale", 4)])
def test_every_way_gives_the_same_splits(folder, load, way, mode, side):
    def stored(count, start):
        sizes, grey = [(6, 6) if side is None else (5 + i % 3, 7) for i in range(count)], mode == "grayscale"
        sized = [(picture(start + i, size, "L" if grey else "RGB"), i % 3) for i, size in enumerate(sizes)]
        return [(jpeg(image) if i % 2 else image, label) for i, (image, label) in enumerate(sized)]

    name = write(folder, train=stored(60, 0), test=stored(21, 100))
    options = {"color_mode": mode, "image_size": side, "max_train_samples": 33, "max_eval_samples": 6}
    expected, found = load(name, **options), load(name, way, **options, preprocessing_num_workers=3)
    for split in ("train", "validation", "test"):
        assert isinstance(getattr(expected, split), ImageSplit)
        assert isinstance(getattr(found, split), WAYS[way][0])
        assert_same(getattr(found, split), getattr(expected, split))
        assert getattr(found, split).statistics() == getattr(expected, split).statistics()
    assert found.image_size == expected.image_size
    again = load(name, way, **options, preprocessing_num_workers=1)
    assert again.train.fingerprint() == found.train.fingerprint() != found.validation.fingerprint()


@pytest.mark.parametrize("way", ["file", "stream"])
def test_digits_are_read_every_way(load, way):
    expected, found = load(DIGITS, max_train_samples=50), load(DIGITS, way, max_train_samples=50)
    assert_same(found.train, expected.train)
    assert_same(found.test, expected.test)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("num_workers", [1, 4])
def test_the_first_bad_row_is_named_by_its_place_in_the_data_set(folder, load, way, num_workers):
    train = rows(90)
    train[31], train[80] = (b"broken", 1), (b"broken", 2)
    name = write(folder, train=train, test=rows(6, start=900))
    options = {"selection_split": "test", "preprocessing_num_workers": num_workers}
    with pytest.raises(DataError, match="split 'train', row 31: the image cannot be decoded"):
        load(name, way, **options).train.__getitems__(range(90))


@pytest.mark.parametrize("way", ["memory", "file"])
def test_the_rows_are_those_that_a_choice_by_label_has_always_made_and_no_other_is_decoded(folder, load, way):
    labels = np.array([label for _, label in rows(90)])
    rest, held_out = (np.sort(part) for part in train_test_split(
        np.arange(90), test_size=0.2, stratify=labels, random_state=7
    ))  # fmt: skip
    chosen = {"train": rest, "validation": held_out}
    for part, limit in (("train", 30), ("validation", 9)):
        _, some = train_test_split(
            np.arange(len(chosen[part])), test_size=limit, stratify=labels[chosen[part]], random_state=7
        )
        chosen[part] = chosen[part][np.sort(some)]
    kept = {0, *chosen["train"], *chosen["validation"]}  # the first one gives the size
    name = write(folder, train=broken_but(kept, 90), test=rows(9, start=200))
    data = load(name, way, validation_fraction=0.2, split_seed=7, max_train_samples=30, max_eval_samples=9)
    for part in ("train", "validation"):
        expected = np.stack([np.array(picture(i)).transpose(2, 0, 1) for i in chosen[part]])
        assert np.array_equal(getattr(data, part).images.numpy(), expected)
        assert np.array_equal(getattr(data, part).labels.numpy(), labels[chosen[part]])


def test_a_single_split_decodes_nothing_else(folder, load, tmp_path):
    args = DataArguments(write(folder, train=rows(30), test=[(b"broken", 0)] * 3))
    assert len(load_image_split(args, "train")[0]) == 27
    assert len(load_image_split(args, "validation")[0]) == 3
    with pytest.raises(DataError, match="split 'test', row 0"):
        load_image_split(args, "test")


def test_an_image_of_another_size_in_a_stream_is_one_line_naming_the_key(folder, load):
    name = write(folder, train=[*rows(29), (picture(50, (8, 7)), 2)], test=rows(3, start=900, size=(9, 9)))
    data = load(name, "stream", selection_split="test")
    assert data.test.__getitems__([0, 1])["pixel_values"].shape == (2, 3, 6, 6)
    with pytest.raises(DataError, match=r"row 29: expected 6 x 6 px like row 0, found 8 x 7; give 'image_size'"):
        data.train.__getitems__(range(30))
    assert load(name, "stream", image_size=10).train[0]["pixel_values"].shape == (3, 10, 10)


def test_statistics_of_a_stream_are_those_of_evenly_spaced_rows(folder, load, monkeypatch):
    name = write(folder, train=rows(31), test=rows(6, start=900))
    options = {"selection_split": "test"}
    whole, stream = load(name, **options).train, load(name, "stream", **options).train
    assert stream.statistics() == whole.statistics()
    monkeypatch.setattr(splits, "STATISTICS_IMAGES", 7)
    pixels = whole.images[[0, 5, 10, 15, 20, 25, 30]].numpy() / 255
    mean, std = stream.statistics()
    np.testing.assert_allclose(mean, pixels.mean(axis=(0, 2, 3)), atol=5.1e-5)
    np.testing.assert_allclose(std, pixels.std(axis=(0, 2, 3)), atol=5.1e-5)


# ---- Which way ----


@pytest.mark.parametrize(("decode", "memory", "disk", "way"), [
    ("auto", 1, 0, "memory"), ("auto", 0.99, 1, "file"), ("auto", 0.99, 0.99, "stream"),
    ("once", 1, 0, "memory"), ("once", 0.99, 1, "file"),
    ("stream", 1, 1, "stream"),
])  # fmt: skip
@pytest.mark.parametrize("processes", [1, 4])
def test_the_way_follows_from_memory_and_disk(
    folder, tmp_path, monkeypatch, capsys, decode, memory, disk, way, processes
):
    name = write(folder, train=rows(30), test=rows(6, start=900))
    num_bytes = 36 * 3 * 36
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(loading, "available_memory", lambda whole: 2 * processes * memory * num_bytes)
    monkeypatch.setattr(DecodedCache, "bytes_free", lambda self: disk * (num_bytes + 1) / loading.DISK_SHARE + 1)
    args = DataArguments(name, decode=decode, decoded_cache_dir=str(tmp_path / "decoded"))
    data = load_image_data(args)
    assert {type(split) for split in (data.train, data.validation, data.test)} == {WAYS[way][0]}
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"decode {decode}: ")]
    assert len(said) == (way != "memory" and decode != "stream")
    if said:
        assert "0.00 MB of pixels, 0.00 MB of memory for them" in said[0]
    assert (tmp_path / "decoded").exists() == (way == "file")


def test_a_file_that_is_there_needs_no_room(folder, load, tmp_path, monkeypatch):
    name = write(folder, train=rows(30), test=rows(6, start=900))
    load(name, "file")
    monkeypatch.setattr(DecodedCache, "bytes_free", lambda self: 0)
    cache = str(tmp_path / "decoded")
    options = {"decoded_memory_fraction": 0.0, "decoded_cache_dir": cache}
    assert isinstance(load_image_data(DataArguments(name, **options)).train, MappedSplit)


def test_decoded_images_are_never_written_among_the_data(folder):
    name = write(folder, train=rows(30), test=rows(6, start=900))
    for inside in (folder, folder / "decoded" / "here", folder.parent / "other" / ".." / "set" / "decoded"):
        args = DataArguments(name, decoded_memory_fraction=0.0, decoded_cache_dir=str(inside))
        with pytest.raises(RecipeError, match="key 'decoded_cache_dir': expected a folder outside of the data set"):
            load_image_data(args)
    assert sorted(path.name for path in folder.iterdir()) == [f"{s}-00000-of-00001.parquet" for s in ("test", "train")]


def test_another_data_set_under_the_same_name_has_another_file(folder, load):
    first = load(write(folder, train=rows(30), test=rows(6, start=900)), "file")
    second = load(write(folder, train=rows(30, start=50), test=rows(6, start=950)), "file")
    assert first.train.cache.folder != second.train.cache.folder
    assert torch.equal(second.test.images, load(str(folder)).test.images)
    assert not torch.equal(second.test.images, first.test.images)


def test_a_commit_of_the_hub_names_its_files(hub_here, folder, load, request):
    write(folder, train=rows(30), test=rows(6, start=900))
    name = f"me/set{abs(hash(request.node.name))}"
    hub_here.add_folder(name, folder, "dataset")
    data = load(name, "file")
    assert_same(data.test, load(name).test)
    assert data.test.cache.description["table"] == [name, "", data.revision, "test"]


# ---- In use ----


@pytest.fixture
def learnable(folder):
    """Noise with a brighter channel for each class."""
    noise = np.random.default_rng(0)

    def images(count):
        for i in range(count):
            pixels = noise.integers(0, 140, (8, 8, 3), dtype=np.uint8)
            pixels[..., i % 3] += 100
            yield Image.fromarray(pixels), i % 3

    return write(folder, train=list(images(66)), test=list(images(18)))


def student(data):
    torch.manual_seed(0)
    args = ModelArguments(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=4)
    return build_student(args, data.label_names, data.image_size, *data.train.statistics())


def test_training_on_a_stream_is_training_on_the_images(learnable, load, tmp_path):
    def train(way, num_workers):
        data = load(learnable, way)
        model, processor = student(data)
        args = SupervisedTrainingArguments(
            output_dir=str(tmp_path / f"{way}{num_workers}"), max_steps=5, per_device_train_batch_size=16,
            logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
            dataloader_num_workers=num_workers, learning_rate=1e-3,
        )  # fmt: skip
        augmentation = AugmentationArguments(random_crop_padding=1, horizontal_flip=0.5, brightness=0.2)
        trainer = SupervisedTrainer(
            model, args, train_dataset=data.train, eval_dataset=data.validation, processing_class=processor,
            augmentation=augmentation,
        )  # fmt: skip
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        return losses, trainer.evaluate()["eval_loss"], model.state_dict()

    losses, eval_loss, weights = train("memory", 0)
    assert len(set(losses)) == 5
    for way, num_workers in (("stream", 0), ("stream", 2), ("file", 2)):
        found = train(way, num_workers)
        assert found[:2] == (losses, eval_loss)
        assert all(torch.equal(found[2][name], weights[name]) for name in weights)


def test_a_stream_is_evaluated_and_analysed_as_the_images_are(learnable, load):
    data = load(learnable)
    model, processor = student(data)
    subject = Pretrained(model.eval(), pixel_format(processor), "tiny", None)
    args = AnalysisArguments(metrics="attention,cka,hessian", max_images=9, batch_size=4, max_probes=2, lanczos_steps=2)
    results = []
    for way in WAYS:
        split = load(learnable, way).test
        analysis = analyze(subject, split, args, data={"name": "x", "revision": None})
        evaluation = evaluate_model(subject, split, batch_size=5, device=torch.device("cpu"))
        for result in (analysis, evaluation):
            del result["seconds"], result["environment"]
        results.append((analysis, evaluation))
    assert all(repr(result) == repr(results[0]) for result in results[1:])


def test_workers_of_a_loader_decode_what_the_main_process_would(learnable, load):
    split, expected = load(learnable, "stream").train, load(learnable).train
    for num_workers in (0, 2):
        loader = torch.utils.data.DataLoader(split, 16, num_workers=num_workers, collate_fn=collate_images)
        batches = list(itertools.chain(loader))
        assert torch.equal(torch.cat([batch["pixel_values"] for batch in batches]), expected.images)
        assert torch.equal(torch.cat([batch["index"] for batch in batches]), torch.arange(len(expected)))


def test_a_stream_decodes_nothing_before_it_is_asked(learnable, load, monkeypatch):
    monkeypatch.setattr(EncodedImages, "decode", None)
    data = load(learnable, "stream", image_size=12)
    assert (data.train.shape[1:], data.train.select(torch.tensor([0])).shape) == ((3, 12, 12), (1, 3, 12, 12))
    assert isinstance(data.train.encoded.table, datasets.Dataset)
