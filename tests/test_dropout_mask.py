# SPDX-License-Identifier: Apache-2.0
"""dropout_mask against published Philox vectors, a written-out reference and binomial bounds."""

import math

import numpy
import pytest
import torch

from fastdense import _C
from fastdense.ops import dropout_mask

ROWS, CHANNELS = 257, 61

# Known-answer vectors of the Random123 library for philox4x32 with 10 rounds: key, counter, output.
KNOWN_ANSWERS = [
    ("00000000 00000000", "00000000 " * 4, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff", "ffffffff " * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "a4093822 299f31d0",
        "243f6a88 85a308d3 13198a2e 03707344",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def make_seed(value: int, device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int64, device=device)


@pytest.mark.parametrize(("key", "counter", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(key, counter, expected):
    assert _C.scalar.philox4x32(words(key), words(counter)) == words(expected)


@pytest.mark.parametrize(
    ("drop_rate", "threshold"),
    [(0.0, 0), (0.5, 2**31), (1.0, 2**32), (2.0**-33, 1), (0.2, 858993460)],
)
def test_threshold_rounds_up(drop_rate, threshold):
    assert _C.scalar.dropout_threshold(drop_rate) == threshold


@pytest.mark.parametrize("index", [0, 3, 4, 2**33 + 1, 2**63 - 1])
def test_keep_uses_64_bit_seed_and_index(index):
    seed, layer, threshold = 0x0123456789ABCDEF, 0xFFFFFFFF, 2**31
    block = index // 4
    counter = [block % 2**32, block // 2**32, layer, 0]
    word = _C.scalar.philox4x32([0x89ABCDEF, 0x01234567], counter)[index % 4]
    assert _C.scalar.dropout_keep(seed, layer, index, threshold) == (word >= threshold)


@pytest.mark.parametrize("seed", [5, -1, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize(("rows", "channels"), [(1, 1), (3, 5), (16, 12)])
def test_mask_is_row_major(device, seed, rows, channels):
    mask = dropout_mask(make_seed(seed, device), 3, rows, channels, 0.3)
    key = [seed % 2**32, seed % 2**64 // 2**32]
    random = [word for block in range(-(-rows * channels // 4)) for word in _C.scalar.philox4x32(key, [block, 0, 3, 0])]
    expected = numpy.array(random[: rows * channels]) >= 0.3 * 2**32
    assert mask.dtype == torch.bool
    assert mask.device.type == device.type
    assert mask.tolist() == expected.reshape(rows, channels).tolist()


@pytest.mark.parametrize("drop_rate", [0.01, 0.2, 0.5, 0.9])
def test_keep_rate_is_binomial(device, drop_rate):
    mask = dropout_mask(make_seed(11, device), 0, ROWS, CHANNELS, drop_rate)
    count = mask.numel()
    sigma = math.sqrt(count * drop_rate * (1 - drop_rate))
    assert abs(int(mask.sum()) - count * (1 - drop_rate)) < 5 * sigma


@pytest.mark.parametrize(("seed", "layer"), [(0, 1), (1, 0), (2**32, 0), (0, 2**32 - 1)])
def test_layers_and_seeds_are_independent(device, seed, layer):
    one = dropout_mask(make_seed(0, device), 0, ROWS, CHANNELS, 0.5)
    other = dropout_mask(make_seed(seed, device), layer, ROWS, CHANNELS, 0.5)
    count = one.numel()
    assert abs(int((one == other).sum()) - count / 2) < 5 * math.sqrt(count / 4)


def test_extreme_rates(device):
    assert dropout_mask(make_seed(0, device), 0, ROWS, CHANNELS, 0.0).all()
    assert not dropout_mask(make_seed(0, device), 0, ROWS, CHANNELS, 1.0).any()


@pytest.mark.parametrize(("rows", "channels"), [(0, 4), (4, 0), (0, 0)])
def test_empty(device, rows, channels):
    assert dropout_mask(make_seed(0, device), 0, rows, channels, 0.5).shape == (rows, channels)


def test_does_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        serial = dropout_mask(make_seed(9), 1, 4 * ROWS, CHANNELS, 0.5)
        torch.set_num_threads(2)
        parallel = dropout_mask(make_seed(9), 1, 4 * ROWS, CHANNELS, 0.5)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(serial, parallel)


@pytest.mark.gpu
def test_cuda_equals_cpu():
    for drop_rate in (0.0, 0.2, 0.5, 1.0):
        cpu = dropout_mask(make_seed(-7), 5, ROWS, CHANNELS, drop_rate)
        cuda = dropout_mask(make_seed(-7, "cuda"), 5, ROWS, CHANNELS, drop_rate)
        assert torch.equal(cuda.cpu(), cpu)


@pytest.mark.gpu
def test_cuda_graph_reads_the_seed_on_the_device():
    seed = make_seed(1, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask = dropout_mask(seed, 0, ROWS, CHANNELS, 0.5)
    seed.fill_(2)
    graph.replay()
    assert torch.equal(mask.cpu(), dropout_mask(make_seed(2), 0, ROWS, CHANNELS, 0.5))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": torch.zeros(1, dtype=torch.int64)}, "seed to have 0 dimensions, got shape [1]"),
        ({"layer": -1}, "layer to be at least 0, got -1"),
        ({"layer": 2**32}, "layer to be at most 4294967295, got 4294967296"),
        ({"rows": -1}, "rows to be at least 0, got -1"),
        ({"channels": -2}, "channels to be at least 0, got -2"),
        ({"drop_rate": -0.5}, "drop_rate to be a probability in [0, 1], got -0.5"),
        ({"drop_rate": 1.5}, "drop_rate to be a probability in [0, 1], got 1.5"),
        ({"drop_rate": math.nan}, "drop_rate to be a probability in [0, 1], got nan"),
    ],
)
def test_wrong_values(changed, message):
    arguments = {"seed": make_seed(0), "layer": 0, "rows": 2, "channels": 3, "drop_rate": 0.5}
    with pytest.raises(ValueError) as raised:
        dropout_mask(**arguments | changed)
    assert str(raised.value) == f"dropout_mask: expected {message}"


def test_wrong_dtype():
    with pytest.raises(TypeError, match="dropout_mask: expected seed to be int64, got float32"):
        dropout_mask(torch.tensor(0.0), 0, 2, 3, 0.5)


def test_opcheck(device):
    op = torch.ops.fastdense.dropout_mask.default
    torch.library.opcheck(op, (make_seed(3, device), 2, 5, 7, 0.25))
