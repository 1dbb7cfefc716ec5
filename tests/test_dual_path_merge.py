# SPDX-License-Identifier: Apache-2.0
"""The merge of a dual path block and the split against concatenation."""

import pytest
import torch
from torch import Tensor

from fastdense.ops import dual_path_merge, dual_path_split

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# batch, residual, dense and new channels, spatial sizes
SHAPES = [
    (3, 4, 5, 2, (7, 5)),
    (2, 0, 5, 3, (4,)),
    (2, 6, 3, 0, (3, 2, 4)),
    (1, 5, 0, 1, (1, 1)),
    (4, 3, 2, 1, ()),
    (2, 64, 48, 16, (56, 31)),
]


def reference_merge(x: Tensor, z: Tensor, r: int) -> Tensor:
    return torch.cat([x[:, :r] + z[:, :r], x[:, r:], z[:, r:]], 1)


def tensors(shape, dtype: torch.dtype, channels_last: bool = False) -> tuple[Tensor, Tensor, int]:
    batch, residual, dense, new, spatial = shape
    x = torch.randn(batch, residual + dense, *spatial).to(dtype)
    z = torch.randn(batch, residual + new, *spatial).to(dtype)
    if channels_last:
        x, z = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, z))
    return x, z, residual


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_merge_is_bit_equal_to_concatenation(shape, dtype, channels_last, device):
    x, z, r = (t.to(device) if isinstance(t, Tensor) else t for t in tensors(shape, dtype, channels_last))
    out = dual_path_merge(x, z, r)
    assert torch.equal(out, reference_merge(x, z, r))
    assert (out.movedim(1, -1) if channels_last else out).is_contiguous()
    first, second = dual_path_split(out, x.shape[1], r)
    assert torch.equal(first, out[:, : x.shape[1]])
    assert torch.equal(second, torch.cat([out[:, :r], out[:, x.shape[1] :]], 1))


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_of_any_order(channels_last):
    x, z, r = tensors((2, 3, 2, 2, (3, 2)), torch.float64, channels_last)
    x.requires_grad_()
    z.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, z: dual_path_merge(x, z, r), (x, z))
    assert torch.autograd.gradgradcheck(lambda x, z: dual_path_merge(x, z, r).square(), (x, z))
    assert torch.autograd.gradcheck(lambda x: dual_path_split(x, 4, r), (x,))


def test_only_what_needs_a_gradient_gets_one():
    x, z, r = tensors(SHAPES[0], torch.float64)
    dual_path_merge(x.requires_grad_(), z, r).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert z.grad is None


def test_any_strides_and_mixed_layouts():
    base = torch.randn(6, 20, 14, 10)
    x, z = base[::2, :9, ::2, ::2], base[::2, 9:15, 1::2, ::2].to(memory_format=torch.channels_last)
    assert torch.equal(dual_path_merge(x, z, 4), reference_merge(x, z, 4))
    assert torch.equal(dual_path_merge(z, x, 4), reference_merge(z, x, 4))
    assert torch.equal(dual_path_merge(x[:1].expand(3, -1, -1, -1), z, 4), reference_merge(x[:1].expand_as(x), z, 4))


def test_empty_tensors():
    for shape in ((0, 4, 5, 2, (3, 3)), (2, 4, 5, 2, (0, 3)), (2, 0, 0, 0, (3,))):
        x, z, r = tensors(shape, torch.float32)
        assert dual_path_merge(x, z, r).shape == reference_merge(x, z, r).shape


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_rows(threads):
    x, z, r = tensors((3, 7, 6, 5, (61, 67)), torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(dual_path_merge(x, z, r), reference_merge(x, z, r))
    finally:
        torch.set_num_threads(before)


def test_compile_with_a_changing_batch():
    merge = torch.compile(lambda x, z: dual_path_merge(x, z, 4), fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3):
        x, z, r = tensors((batch, 4, 5, 2, (7, 5)), torch.float32)
        assert torch.equal(merge(x.requires_grad_(), z), reference_merge(x, z, r))


@pytest.mark.parametrize(
    ("error", "message", "run"),
    [
        (TypeError, "merge: expected input to be float32", lambda x, z: dual_path_merge(x.long(), z, 4)),
        (TypeError, "merge: expected features to be float32 like", lambda x, z: dual_path_merge(x, z.double(), 4)),
        (ValueError, "merge: expected features to have 4 dim", lambda x, z: dual_path_merge(x, z[0], 4)),
        (ValueError, "merge: expected features to have shape", lambda x, z: dual_path_merge(x, z[..., :1], 4)),
        (ValueError, "merge: expected residual_channels to be at least 0", lambda x, z: dual_path_merge(x, z, -1)),
        (ValueError, "merge: expected residual_channels to be at most 6", lambda x, z: dual_path_merge(x, z, 7)),
        (ValueError, "merge: expected input to have 2 to 5 dim", lambda x, z: dual_path_merge(x[0, 0, 0], z, 4)),
        (ValueError, "split: expected channels to be at least 4", lambda x, z: dual_path_split(x, 3, 4)),
        (ValueError, "split: expected channels to be at most 9", lambda x, z: dual_path_split(x, 10, 4)),
    ],
)
def test_errors(error, message, run):
    x, z, _ = tensors(SHAPES[0], torch.float32)
    with pytest.raises(error, match=message):
        run(x, z)
