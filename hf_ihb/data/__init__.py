"""Any `datasets` image-classification set -> splits of uint8 images."""

from hf_ihb.data.loading import DIGITS, load_image_data, load_image_split
from hf_ihb.data.placement import placement
from hf_ihb.data.splits import (
    ImageData,
    ImageSplit,
    MappedSplit,
    StoredSplit,
    StreamedSplit,
    collate_images,
    stratified_sample,
)

__all__ = [
    "DIGITS",
    "ImageData",
    "ImageSplit",
    "MappedSplit",
    "StoredSplit",
    "StreamedSplit",
    "collate_images",
    "load_image_data",
    "load_image_split",
    "placement",
    "stratified_sample",
]
