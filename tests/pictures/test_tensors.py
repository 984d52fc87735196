import numpy as np
import pytest
import torch
from PIL import Image

from tudsr_core.pictures.tensors import fill_transparent, join_alpha, pad_to_multiple, resize, split_alpha


def pillow_bicubic(image, size):
    planes = [np.array(Image.fromarray(p.numpy()).resize(size[::-1], Image.Resampling.BICUBIC)) for p in image[0]]
    return torch.from_numpy(np.stack(planes))[None]


@pytest.mark.parametrize("size", [(40, 60), (7, 9), (10, 15), (1, 1), (33, 8)])
def test_resize_is_pillows_bicubic(size, noise):
    image = noise(1, 3, 10, 15)
    assert (resize(image, size) - pillow_bicubic(image, size)).abs().max() < 2e-6


def test_resize_of_8_bit_pictures_gives_pillows_bytes(noise):
    # Contrast is kept off the ends of the range: Pillow clips between its two passes.
    image = (noise(1, 3, 21, 34) * 120 + 60).round()
    theirs = Image.fromarray(image[0].permute(1, 2, 0).byte().numpy()).resize((136, 84), Image.Resampling.BICUBIC)
    ours = resize(image, (84, 136)).round().clamp(0, 255)[0].permute(1, 2, 0).numpy()
    assert np.abs(ours - np.asarray(theirs, np.float32)).max() <= 1


@pytest.mark.parametrize("multiple", [8, 64])
def test_pad_then_crop_is_identity_from_1_to_257(multiple, noise):
    for side in range(1, 258):
        image = noise(1, 1, side, 258 - side)
        padded, padding = pad_to_multiple(image, multiple)
        assert padded.shape[-1] % multiple == padded.shape[-2] % multiple == 0
        assert max(padded.shape[-1] - image.shape[-1], padded.shape[-2] - image.shape[-2]) < multiple
        assert torch.equal(padding.crop(padded), image)


def test_padding_mirrors_again_and_again_and_repeats_single_pixels():
    row = torch.tensor([[[[1.0, 2.0, 3.0]]]])
    padded, _ = pad_to_multiple(row, 8)
    assert padded[0, 0, 0].tolist() == [1, 2, 3, 2, 1, 2, 3, 2]
    assert torch.equal(padded[0, 0, 1:], padded[0, 0, :1].expand(7, 8))


def test_alpha_splits_and_joins_without_loss(noise):
    image = noise(2, 4, 9, 7) * 0.9 + 0.05
    assert torch.equal(join_alpha(*split_alpha(image)), image)
    assert split_alpha(image[:, :3])[1] is None
    with pytest.raises(ValueError, match="channels"):
        split_alpha(image[:, :2])


def test_hidden_colour_takes_the_nearest_visible_colour():
    color = torch.zeros(1, 3, 8, 8)
    color[..., :2] = 0.8
    alpha = torch.zeros(1, 1, 8, 8)
    alpha[..., :2] = 1
    filled = fill_transparent(color, alpha)
    assert torch.equal(filled[..., :2], color[..., :2])
    assert (filled - 0.8).abs().max() < 1e-6
