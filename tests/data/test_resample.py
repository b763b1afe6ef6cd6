"""The batch-independent resize: exact weights, and agreement with Pillow's triangle filter."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from polypatch.data.resample import resample, triangle_weights


@given(window=st.integers(1, 80), size=st.integers(1, 80))
def test_weights_are_whole_and_sum_to_256(window, size):
    weights = triangle_weights(window=window, size=size)
    assert weights.shape == (size, window)
    assert (weights == np.rint(weights)).all()
    assert (weights >= 0).all()
    assert (weights.sum(axis=1) == 256).all()


@given(window=st.integers(1, 40), size=st.integers(1, 40), level=st.integers(0, 255))
def test_a_flat_image_stays_flat(window, size, level):
    flat = torch.full((1, window, window, 3), level, dtype=torch.uint8)
    weights = torch.from_numpy(triangle_weights(window=window, size=size))
    assert (resample(flat, weights[None]) == level).all()


def test_the_same_size_is_the_identity():
    image = torch.randint(0, 256, (2, 9, 9, 3), dtype=torch.uint8)
    weights = torch.from_numpy(triangle_weights(window=9, size=9))
    assert torch.equal(resample(image, weights[None]), image.permute(0, 3, 1, 2).float())


def test_agrees_with_pillow_and_ignores_padding():
    pixels = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    for window in (32, 47, 60):
        weights = triangle_weights(window=window, size=32, padded=60)
        ours = resample(torch.from_numpy(pixels)[None], torch.from_numpy(weights)[None])[0]
        cut = Image.fromarray(pixels[:window, :window])
        theirs = np.asarray(cut.resize((32, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        # Our weights have 8 bits, Pillow's 22.
        assert np.abs(ours.numpy() - theirs).max() <= 2
