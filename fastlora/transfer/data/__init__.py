"""Labelled pictures from folders, lists and data sets, split, checked and transformed."""

from fastlora.transfer.data.check import find_corrupt, readable, tell_copies, tell_overlap
from fastlora.transfer.data.features import cached_features
from fastlora.transfer.data.files import Files, find_pictures
from fastlora.transfer.data.images import LabelledImages
from fastlora.transfer.data.picture import as_picture, open_picture
from fastlora.transfer.data.sources import open_images, open_parts
from fastlora.transfer.data.split import class_weights, stratified_split
from fastlora.transfer.data.transforms import pretrained_transforms

__all__ = [
    "Files",
    "LabelledImages",
    "as_picture",
    "cached_features",
    "class_weights",
    "find_corrupt",
    "find_pictures",
    "open_images",
    "open_parts",
    "open_picture",
    "pretrained_transforms",
    "readable",
    "stratified_split",
    "tell_copies",
    "tell_overlap",
]
