"""Readers of labelled images: bundled samples, folders, parquet files, the Hugging Face hub."""

from polypatch.data.base import ImageData, Split
from polypatch.data.load import load_images

__all__ = ["ImageData", "Split", "load_images"]
