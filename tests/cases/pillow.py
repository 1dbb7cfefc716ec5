# SPDX-License-Identifier: Apache-2.0
"""Pictures of any size that Pillow resizes, and one digest of all results.

``python -m tests.cases.pillow`` prints the digest of the Pillow that is installed.
"""

import hashlib
from collections.abc import Callable, Iterator

import numpy

# Of Pillow's own results.
DIGESTS = {
    "11.3.0": "95194ae0c8aaf80ef90eb98f67a7c5d51b549a4fa91ece00607144d843ef1d07",
    "12.3.0": "95194ae0c8aaf80ef90eb98f67a7c5d51b549a4fa91ece00607144d843ef1d07",
    "13.0.0": "0cbe8bf00af99a5844889db69371c469ce5dfa55cd1790a0d92c1f55c170ab81",
}

Resize = Callable[[numpy.ndarray, tuple[int, int]], numpy.ndarray]


def random_bytes(name: str, *shape: int) -> numpy.ndarray:
    """The same with every version of every library."""
    digest = hashlib.shake_256(name.encode()).digest(int(numpy.prod(shape)))
    return numpy.frombuffer(digest, numpy.uint8).reshape(shape)


def cases(count: int, seed: str = "") -> Iterator[tuple[numpy.ndarray, tuple[int, int]]]:
    """Pictures of 0 and 255, where rounding and clipping matter most, or of noise, and sizes to make of them."""
    sides = 1 + random_bytes(f"sides {seed}", count, 4).astype(int) // 3
    for at, (height, width, *size) in enumerate(sides.tolist()):
        picture = random_bytes(f"picture {seed} {at}", height, width)
        yield (numpy.where(picture > 127, 255, 0).astype(numpy.uint8) if at % 2 else picture), tuple(size)


def digest(resize: Resize) -> str:
    """Of 500 results."""
    total = hashlib.sha256()
    for picture, size in cases(500):
        total.update(resize(picture, size).tobytes())
    return total.hexdigest()


def resize_by_pillow(picture: numpy.ndarray, size: tuple[int, int]) -> numpy.ndarray:
    from PIL import Image

    return numpy.asarray(Image.fromarray(picture).resize(size[::-1], Image.Resampling.BICUBIC))


if __name__ == "__main__":
    import PIL

    print(PIL.__version__, digest(resize_by_pillow))
