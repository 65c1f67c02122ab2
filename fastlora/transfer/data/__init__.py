"""Labelled pictures from folders, lists and data sets, split, checked and transformed."""

from fastlora.transfer.data.check import find_corrupt, readable
from fastlora.transfer.data.features import cached_features
from fastlora.transfer.data.images import LabelledImages
from fastlora.transfer.data.sources import open_images
from fastlora.transfer.data.split import class_weights, stratified_split
from fastlora.transfer.data.transforms import pretrained_transforms

__all__ = [
    "LabelledImages",
    "cached_features",
    "class_weights",
    "find_corrupt",
    "open_images",
    "pretrained_transforms",
    "readable",
    "stratified_split",
]
