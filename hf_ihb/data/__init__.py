"""Any `datasets` image-classification set -> splits of uint8 images."""

from hf_ihb.data.labels import CheckedLabels
from hf_ihb.data.loading import DIGITS, ImageSource, load_image_data, load_image_split, open_image_data
from hf_ihb.data.placement import onto, placement, rows_onto
from hf_ihb.data.splits import (
    ImageData,
    ImageSplit,
    MappedSplit,
    StoredSplit,
    StreamedSplit,
    collate_images,
    host_index,
    stratified_sample,
)

__all__ = [
    "DIGITS",
    "CheckedLabels",
    "ImageData",
    "ImageSource",
    "ImageSplit",
    "MappedSplit",
    "StoredSplit",
    "StreamedSplit",
    "collate_images",
    "host_index",
    "load_image_data",
    "load_image_split",
    "onto",
    "open_image_data",
    "placement",
    "rows_onto",
    "stratified_sample",
]
