"""Readers of labelled images: bundled samples, folders, parquet files, the Hugging Face hub; of
images with a class for every pixel; and of series: bundled ones, CSV and parquet tables."""

from .base import ImageData, Split
from .load import load_images
from .masks import load_masks

__all__ = ["ImageData", "Split", "load_images", "load_masks"]
