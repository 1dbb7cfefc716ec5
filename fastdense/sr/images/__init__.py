# SPDX-License-Identifier: Apache-2.0
"""Picture files: one table of what formats hold, a reader that keeps what a file means, a writer that loses nothing."""

from fastdense.sr.images.folders import Found, find_images, image_pairs, search_folder
from fastdense.sr.images.formats import FORMATS, SUFFIXES, Kind, check_format, find_format, kind_of
from fastdense.sr.images.limits import check_fits
from fastdense.sr.images.picture import CorruptImageError, Metadata, Picture
from fastdense.sr.images.reading import open_rgb, read_bytes, read_picture
from fastdense.sr.images.writing import write_picture

__all__ = [
    "FORMATS",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "SUFFIXES",
    "CorruptImageError",
    "Found",
    "Kind",
    "Metadata",
    "Picture",
    "check_fits",
    "check_format",
    "find_format",
    "find_images",
    "image_pairs",
    "kind_of",
    "open_rgb",
    "read_bytes",
    "read_picture",
    "search_folder",
    "write_picture",
]

# Mean and standard deviation of ImageNet's training images, per RGB channel in [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
