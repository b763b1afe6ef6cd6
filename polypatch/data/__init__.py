"""Readers of labelled images: bundled samples, folders, parquet files, the Hugging Face hub."""

from .base import ImageData, Split
from .load import load_images

__all__ = ["ImageData", "Split", "load_images"]
