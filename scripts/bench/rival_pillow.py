"""A peer of our input pipeline: PyTorch's DataLoader with Pillow.

The transforms call Pillow as torchvision and timm do.

RandAugment has all sixteen operations of `halonet_jax.data.randaugment` at the same strengths, with nearest pixels and
gray fill. Pillow's bicubic filter widens as it shrinks the image, so it averages. Random numbers are Python's. Batches
are uint8 [B, S, S, 3] in shared memory.
"""

import math
import os
import random

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

_GRAY = (128, 128, 128)


def batches(c):
    """Returns endless batches, `{"image": uint8 [B, S, S, 3], "label": int64 [B]}`.

    There are as many worker processes as cores.

    Args:
        c: the config's `data` block with `batch` and `cores`, see `bench_input.py`.
    """
    dataset = _Photos(c)
    endless = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=10**9)
    return iter(torch.utils.data.DataLoader(dataset, c.batch, sampler=endless, num_workers=c.cores))


class _Photos(torch.utils.data.Dataset):
    def __init__(self, c):
        root = os.path.join(c.dir, c.train_split)
        names = sorted(os.listdir(root))
        self.files = [(os.path.join(root, n, f), i) for i, n in enumerate(names) for f in os.listdir(os.path.join(root, n))]
        self.config = c

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        file, label = self.files[index]
        c = self.config
        with open(file, "rb") as f:
            image = Image.open(f).convert("RGB")
        image = _random_resized_crop(image, c.image_size, c.crop_scale, c.crop_ratio)
        if c.flip and random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for op in random.choices(_OPS, k=c.randaugment_layers):
            image = op(image, c.randaugment_magnitude)
        return {"image": torch.from_numpy(np.array(image)), "label": label}


def _random_resized_crop(image, size, scale, ratio):
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(*scale)
        shape = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    left, top = random.randint(0, width - w), random.randint(0, height - h)
    return image.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BICUBIC)


def _auto_contrast(image, m):
    return ImageOps.autocontrast(image)


def _equalize(image, m):
    return ImageOps.equalize(image)


def _invert(image, m):
    return ImageOps.invert(image)


def _rotate(image, m):
    return image.rotate(_sign() * 3 * m, fillcolor=_GRAY)


def _posterize(image, m):
    return ImageOps.posterize(image, min(max(int(0.4 * m), 1), 8))


def _solarize(image, m):
    return ImageOps.solarize(image, int(25.6 * m))


def _solarize_add(image, m):
    return image.point([min(v + int(11 * m), 255) if v < 128 else v for v in range(256)] * 3)


def _color(image, m):
    return ImageEnhance.Color(image).enhance(0.1 + 0.18 * m)


def _contrast(image, m):
    return ImageEnhance.Contrast(image).enhance(0.1 + 0.18 * m)


def _brightness(image, m):
    return ImageEnhance.Brightness(image).enhance(0.1 + 0.18 * m)


def _sharpness(image, m):
    return ImageEnhance.Sharpness(image).enhance(0.1 + 0.18 * m)


def _shear_x(image, m):
    return _warp(image, (1, _sign() * 0.03 * m, 0, 0, 1, 0))


def _shear_y(image, m):
    return _warp(image, (1, 0, 0, _sign() * 0.03 * m, 1, 0))


def _translate_x(image, m):
    return _warp(image, (1, 0, _sign() * min(10 * m, 0.75 * image.width), 0, 1, 0))


def _translate_y(image, m):
    return _warp(image, (1, 0, 0, 0, 1, _sign() * min(10 * m, 0.75 * image.height)))


def _cutout(image, m):
    half = round(min(4 * m, 0.5 * min(image.size)))
    x, y = (random.randrange(side) for side in image.size)
    image.paste(_GRAY, (max(x - half, 0), max(y - half, 0), min(x + half, image.width), min(y + half, image.height)))
    return image


_OPS = (
    _auto_contrast, _equalize, _invert, _rotate, _posterize, _solarize, _solarize_add, _color, _contrast, _brightness,
    _sharpness, _shear_x, _shear_y, _translate_x, _translate_y, _cutout,
)  # fmt: skip


def _sign():
    return random.choice((1, -1))


def _warp(image, matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=_GRAY)
