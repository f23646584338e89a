"""Images of any usual form become the pixels that a person expects."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tracking import TrackingWarning
from tracking.artifacts.images import encode_png, is_picture, make_pixels

GREY = np.arange(6).reshape(2, 3) / 5  # bytes 0, 51, 102, 153, 204, 255
BYTES = np.array([[0, 51, 102], [153, 204, 255]], np.uint8)
COLOUR = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)


def pixels(image):
    return make_pixels(image, "test")


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (GREY, BYTES[..., None]),
        (GREY.tolist(), BYTES[..., None]),
        (torch.tensor(GREY)[None], BYTES[..., None]),
        (torch.tensor(GREY)[..., None], BYTES[..., None]),
        (torch.tensor(GREY, requires_grad=True), BYTES[..., None]),
        (BYTES.astype(np.int64), BYTES[..., None]),
        (BYTES > 100, np.where(BYTES > 100, 255, 0)[..., None]),
        (COLOUR, COLOUR),
        (np.tile(COLOUR, (1, 2, 1)).transpose(2, 0, 1), np.tile(COLOUR, (1, 2, 1))),
        (torch.tensor(COLOUR).permute(2, 0, 1), COLOUR),
        (Image.fromarray(COLOUR), COLOUR),
        # -1 is black, 3 is white.
        (np.array([[-1.0, 1.0, 3.0]]), np.array([[[0], [128], [255]]])),
        (torch.tensor([[0.0, 1.0]], dtype=torch.bfloat16), [[[0], [255]]]),
    ],
)
def test_image_of_a_usual_form_is_read(image, expected):
    assert np.array_equal(pixels(image), expected)


def test_ambiguous_shape_is_read_as_the_library_has_images():
    square = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    assert np.array_equal(pixels(square), square)
    assert np.array_equal(pixels(torch.tensor(square)), square.transpose(1, 2, 0))


def test_batch_is_a_grid_with_one_scale():
    batch = torch.stack([torch.zeros(1, 2, 2), torch.full((1, 2, 2), 2.0)] * 2)
    grid = pixels(batch)[..., 0]
    assert grid.shape == (6, 6)
    assert grid[:2, :2].max() == 0  # black by the scale of the whole batch
    assert grid[:2, 4:].min() == 255
    assert grid[2:4].max() == 0  # the gap
    assert pixels(torch.rand(100, 1, 4, 4)).shape == (46, 46, 1)  # the first 64


def test_list_of_different_images_is_a_grid():
    grid = pixels([COLOUR, BYTES, Image.new("RGBA", (5, 5), (1, 2, 3, 4))])
    assert grid.shape == (12, 12, 4)
    assert np.array_equal(grid[:2, :3], np.dstack([COLOUR, np.full((2, 3), 255)]))
    assert np.array_equal(grid[7, 0], [1, 2, 3, 4])


def test_values_that_are_not_finite_are_black_and_told():
    image = np.array([[np.nan, -np.inf, 2.0, 4.0]])
    with pytest.warns(TrackingWarning, match="finite values, got 2 that are NaN"):
        assert pixels(image).ravel().tolist() == [0, 0, 0, 255]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros(5), r"got the shape \(5,\)"),
        (np.zeros((7, 5, 5)), r"pass list\(images\)"),
        (np.zeros((0, 5)), "at least one pixel, got none"),
        ([], "got the shape"),
        (np.full((2, 2), 256), "integers from 0 to 255, got 256 to 256"),
        (np.zeros((5000, 5000)), "at most 16777216 pixels, got 25000000"),
        ("cat.png", "tensor or array of bools, integers or floats, got str"),
        (torch.zeros(2, 2, dtype=torch.complex64), "got Tensor of torch.complex64"),
        (torch.eye(2).to_sparse(), "expected a tensor or array"),
    ],
)
def test_what_is_no_image_is_refused(image, message):
    with pytest.raises((TypeError, ValueError), match=message):
        pixels(image)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_has_the_pixels(channels):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    read = np.asarray(Image.open(io.BytesIO(encode_png(image))))
    assert np.array_equal(read, image[..., 0] if channels == 1 else image)


def test_picture_in_a_table_is_told_from_a_small_array():
    assert is_picture(COLOUR)
    assert is_picture(Image.new("L", (2, 2)))
    assert not is_picture(GREY)
    assert not is_picture("text")
