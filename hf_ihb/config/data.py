"""Keys of the data set."""

from dataclasses import dataclass
from typing import Literal

from hf_ihb.config.fields import AT_LEAST_ONE, FRACTION, NON_NEGATIVE, Checked, Range, key

MAX_CLASSES = 1 << 20  # more are a column of something else, or a mistake; refused before anything is allocated


@dataclass
class DataArguments(Checked):
    """Which images, and how they are split."""

    _argument_group_name = "data"

    dataset_name: str = key(
        "uoft-cs/cifar10",
        "Image-classification set: a Hub id, a local folder that `datasets.load_dataset` reads (an image folder too), "
        "or 'sklearn:digits', which needs no network.",
    )
    dataset_config_name: str | None = key(None, "Configuration of the data set, where it has several.")
    dataset_revision: str | None = key(None, "Branch, tag or commit of the data set on the Hub.")
    image_column_name: str | None = key(None, "Column of the images; found by its type if not given.")
    label_column_name: str | None = key(None, "Column of the labels; found by its type if not given.")
    compact_labels: bool = key(
        False,
        "Number the classes of integer labels anew, from 0 and without gaps; each keeps its integer as its name. "
        "Labels with gaps are refused otherwise.",
    )
    train_split: str = key("train", "Name of the training split.")
    test_split: str = key("test", "Name of the test split; evaluated once, at the end.")
    validation_split: str | None = key(
        None,
        "Name of the validation split; if not given, a split named 'validation', 'valid', 'val' or 'dev' that is "
        "neither the training nor the test split.",
    )
    validation_fraction: float = key(
        0.1,
        "Share of the training split that becomes the validation split, stratified by class, where the set has none.",
        within=Range(0, 1, low_open=True, high_open=True),
    )
    split_seed: int = key(0, "Seed of that split; apart from `seed`, so that runs share it.", within=NON_NEGATIVE)
    max_train_samples: int | None = key(
        None, "Train on a stratified part of the training split.", within=AT_LEAST_ONE, unit="images"
    )
    max_eval_samples: int | None = key(
        None, "Evaluate on stratified parts of the validation and test splits.", within=AT_LEAST_ONE, unit="images"
    )
    image_size: int | None = key(
        None,
        "Side of the decoded images; the size of the first image if not given. Images that are evaluated are as the "
        "model's image processor makes them of the encoded ones.",
        within=AT_LEAST_ONE,
        unit="px",
    )
    color_mode: Literal["rgb", "grayscale"] = key("rgb", "Decode images to three channels, or grey ones to one.")
    decode: Literal["auto", "once", "stream"] = key(
        "auto",
        "When images are decoded. 'once': before training, into memory, or into a file that is mapped into it and kept "
        "for later runs where they take more than decoded_memory_fraction. 'stream': whenever they are asked for, by "
        "dataloader_num_workers processes; needs no room. 'auto': 'once' where memory or disk has the room.",
    )
    decoded_memory_fraction: float = key(
        0.5,
        "Share of the memory that is available which decoded images may take, in all processes of a machine together; "
        "0 keeps them in a file.",
        within=FRACTION,
    )
    decoded_cache_dir: str | None = key(
        None,
        "Folder of decoded images, shared by runs; 'hf_ihb/decoded' in HF_HOME if not given. What is in it may be "
        "deleted.",
    )
    preprocessing_num_workers: int | None = key(
        None, "Threads that decode images; one for each core if not given.", within=AT_LEAST_ONE
    )
    selection_split: Literal["validation", "test"] = key(
        "validation",
        "What epochs are compared on. 'test' holds no training images out and selects on the test split.",
        published={"test": "epochs are selected, and training is stopped, on the images that are reported"},
    )
