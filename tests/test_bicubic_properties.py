# SPDX-License-Identifier: Apache-2.0
"""What bicubic resampling keeps and commutes with, its storage types, derivatives and devices."""

import itertools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from fastdense import bicubic_resize, reference
from fastdense.nn import BicubicResize, BicubicUpsample
from fastdense.ops.bicubic import PRESETS
from tests.cases.bicubic import SHAPES, as_batch, expected, photograph, random

# Properties


PRESET_SIZES = list(itertools.product(PRESETS, [(9, 20), (9, 4), (3, 17), (2, 1), (1, 6), (64, 5)]))


@pytest.mark.parametrize(("preset", "sizes"), PRESET_SIZES)
def test_constants_are_kept(preset, sizes):
    n, m = sizes
    made = bicubic_resize(torch.full((1, 1, n), 3.0, dtype=torch.float64), m, preset=preset)
    torch.testing.assert_close(made, torch.full_like(made, 3.0), rtol=1e-14, atol=1e-14)


def test_degree_of_reproduced_polynomials():
    x = torch.arange(40, dtype=torch.float64)
    u = (torch.arange(90, dtype=torch.float64) + 0.5) * 40 / 90 - 0.5
    inner = slice(10, -10)

    def error(a: float, degree: int) -> float:
        made = bicubic_resize((x**degree).view(1, 1, -1), 90, a=a).flatten()
        return (made - u**degree)[inner].abs().max().item()

    assert error(-0.5, 1) < 1e-9 and error(-0.5, 2) < 1e-9
    assert 0.09 < error(-0.5, 3) < 0.0963
    assert 0.04 < error(-0.75, 1) < 0.0482


@pytest.mark.parametrize(("preset", "sizes"), PRESET_SIZES)
def test_backward_is_the_adjoint(preset, sizes):
    n, m = sizes
    x, y = random(1, 2, n, m).requires_grad_(), random(1, 2, m, n)
    out = bicubic_resize(x, (m, n), preset=preset)
    (grad,) = torch.autograd.grad(out, x, y)
    torch.testing.assert_close((out * y).sum(), (x * grad).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("preset", PRESETS)
def test_flips_and_turns(preset):
    x = random(1, 2, 11, 14)
    out = bicubic_resize(x, (23, 6), preset=preset)
    torch.testing.assert_close(bicubic_resize(x.flip(2, 3), (23, 6), preset=preset), out.flip(2, 3), rtol=0, atol=1e-13)
    turned = bicubic_resize(x.transpose(2, 3), (6, 23), preset=preset)
    torch.testing.assert_close(turned, out.transpose(2, 3), rtol=0, atol=1e-13)


@pytest.mark.parametrize("preset", PRESETS)
def test_equal_size_is_the_identity(preset):
    x = random(1, 2, 5, 7)
    assert torch.equal(bicubic_resize(x, (5, 7), preset=preset), x)
    x = as_batch(photograph())
    assert torch.equal(bicubic_resize(x, x.shape[2:], preset=preset), x)


def test_odd_enlargement_keeps_the_samples():
    x = random(1, 1, 6, 7)
    assert torch.allclose(bicubic_resize(x, scale_factor=3.0)[..., 1::3, 1::3], x, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_plane_does_not_depend_on_batch_layout_or_threads(preset, dtype):
    x = (random(3, 5, 37, 41) * 100 + 120).clamp(0, 255).to(dtype)
    for size in ((80, 90), (9, 70), (11, 12)):
        wanted = bicubic_resize(x[1:2, 2:3].contiguous(), size, preset=preset)
        threads = torch.get_num_threads()
        for count in (1, 3):
            torch.set_num_threads(count)
            try:
                for layout in (torch.contiguous_format, torch.channels_last):
                    made = bicubic_resize(x.to(memory_format=layout), size, preset=preset)
                    assert made.is_contiguous(memory_format=layout)
                    assert torch.equal(made[1:2, 2:3], wanted)
            finally:
                torch.set_num_threads(threads)


def test_gradients_are_bit_identical():
    x = random(2, 3, 30, 31, dtype=torch.float32).requires_grad_()
    grads = [torch.autograd.grad(bicubic_resize(x, (70, 11)).square().sum(), x)[0] for _ in range(3)]
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


# Storage


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", PRESETS)
def test_two_byte_types_are_the_rounded_float32_result(preset, dtype):
    for shape, size in (((2, 3, 13, 17), (29, 8)), ((1, 2, 5, 6, 7), (9, 4, 8))):
        x = random(*shape, dtype=dtype)
        wanted = bicubic_resize(x.float(), size, preset=preset).to(dtype)
        assert torch.equal(bicubic_resize(x, size, preset=preset), wanted)


def test_gradient_of_a_constant_in_half():
    """Adding up in half sticks at 2048."""
    x = torch.ones(2, 2, 1, 1, dtype=torch.float16, requires_grad=True)
    (grad,) = torch.autograd.grad(bicubic_resize(x, (128, 128)).sum(), x)
    assert grad.flatten().tolist() == [16384.0] * 4


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :, ::2, 1::3],
        lambda x: x.flip(2),
        lambda x: x.transpose(2, 3),
        lambda x: x[:, :1].expand(-1, 4, -1, -1),
        lambda x: x[1:, 1:],
        lambda x: x[:0],
    ],
    ids=["slices", "flipped", "transposed", "expanded", "offset", "empty batch"],
)
def test_views(view):
    x = view(random(2, 3, 12, 15))
    torch.testing.assert_close(bicubic_resize(x, (7, 19)), expected(x, (7, 19), "torch"), rtol=1e-12, atol=1e-12)


def test_large_reduction():
    x = random(1, 1, 3000, 4)
    for preset in ("torch_antialias", "matlab"):
        made = bicubic_resize(x, (2, 4), preset=preset)
        torch.testing.assert_close(made, expected(x, (2, 4), preset), rtol=1e-12, atol=1e-12)


def test_scale_is_used_as_given():
    x = random(1, 1, 10)
    assert bicubic_resize(x, scale_factor=(1.55,), preset="matlab").shape[-1] == 16
    assert bicubic_resize(x, scale_factor=(1.55,), preset="opencv").shape[-1] == 16
    assert bicubic_resize(x, scale_factor=(1.55,)).shape[-1] == 15
    assert bicubic_resize(x, scale_factor=(1.55,), rounding="ceil").shape[-1] == 16
    given = bicubic_resize(x, scale_factor=(1.55,), preset="matlab")
    wanted = reference.bicubic(x, [16], [1 / 1.55], -0.5, True, "symmetric", False)
    torch.testing.assert_close(given, wanted, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(given, bicubic_resize(x, 16, preset="matlab"))


# Derivatives, transforms, compilers


@pytest.mark.parametrize("preset", ["torch", "matlab"])
def test_gradcheck(preset):
    x = random(1, 2, 5, 6).requires_grad_()
    for size in ((9, 4), (5, 11), (3, 2)):
        run = lambda x, size=size: bicubic_resize(x, size, preset=preset)  # noqa: E731
        assert torch.autograd.gradcheck(run, x, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(run, x)


def test_forward_mode_with_residual_and_clamp():
    x, tangent, residual = random(1, 1, 4, 4), random(1, 1, 4, 5), random(1, 1, 8, 8)
    tangent = tangent[..., :4]
    with forward_ad.dual_level():
        dual = bicubic_resize(forward_ad.make_dual(x, tangent), 8, residual=residual, clamp=(-1, 1))
        value, derivative = forward_ad.unpack_dual(dual)
    plain = bicubic_resize(x, 8) + residual
    torch.testing.assert_close(value, plain.clamp(-1, 1))
    torch.testing.assert_close(derivative, bicubic_resize(tangent, 8) * ((plain >= -1) & (plain <= 1)))


def test_residual_and_clamp():
    x, residual = random(2, 3, 6, 7).requires_grad_(), random(2, 3, 12, 14).requires_grad_()
    plain = bicubic_resize(x, (12, 14)) + residual
    wanted = plain.clamp(-0.5, 0.5)
    made = bicubic_resize(x, (12, 14), residual=residual, clamp=(-0.5, 0.5))
    torch.testing.assert_close(made, wanted)
    for mine, theirs in zip(
        *(torch.autograd.grad(y.square().sum(), (x, residual)) for y in (made, wanted)), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        for layout in (torch.contiguous_format, torch.channels_last):
            fused = bicubic_resize(x.to(memory_format=layout), (12, 14), residual=residual, clamp=(-0.5, 0.5))
            torch.testing.assert_close(fused, wanted)


def test_vmap():
    x = random(4, 2, 3, 6, 7)
    wanted = torch.stack([bicubic_resize(item, (9, 4)) for item in x])
    torch.testing.assert_close(torch.vmap(lambda x: bicubic_resize(x, (9, 4)))(x), wanted)
    moved = torch.vmap(lambda x: bicubic_resize(x, (9, 4)), in_dims=2)(x.movedim(0, 2))
    torch.testing.assert_close(moved, wanted)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_with_changing_sizes(backend):
    def run(x: Tensor, scale: float) -> Tensor:
        return bicubic_resize(x * 2, scale_factor=scale, preset="matlab").sin()

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=backend)
    for shape in ((2, 3, 8, 9), (3, 3, 10, 12)):
        x = random(*shape).requires_grad_()
        made, wanted = compiled(x, 2.0), run(x, 2.0)
        torch.testing.assert_close(made, wanted)
        torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (made, wanted)))


@pytest.mark.parametrize("preset", PRESETS)
def test_export_rounds_floating_point_to_the_same_bytes(preset):
    net, x = BicubicResize((17, 5), preset=preset, out_dtype=torch.uint8), random(1, 3, 9, 11) * 100 + 100
    assert torch.equal(torch.export.export(net, (x,)).module()(x), net(x))


def test_export_needs_no_operator_of_ours():
    """ONNX and other runtimes get torch's own operators."""

    class Net(torch.nn.Module):
        def __init__(self, preset: str) -> None:
            super().__init__()
            self.resize = BicubicResize(scale_factor=2.0, preset=preset)

        def forward(self, x: Tensor) -> Tensor:
            return self.resize(x)

    x = random(1, 3, 6, 7, dtype=torch.float32)
    for preset in PRESETS:
        net = Net(preset)
        program = torch.export.export(net, (x,))
        assert "fastdense" not in str(program.graph)
        torch.testing.assert_close(program.module()(x), net(x))


def test_autocast_leaves_the_dtype_alone():
    x = random(1, 1, 4, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert bicubic_resize(x, 8).dtype == torch.float32


def test_modules():
    x = random(1, 3, 6, 7)
    torch.testing.assert_close(BicubicUpsample(2)(x), F.interpolate(x, scale_factor=2, mode="bicubic"))
    torch.testing.assert_close(BicubicResize((4, 5), preset="matlab")(x), bicubic_resize(x, (4, 5), preset="matlab"))
    assert "matlab" in repr(BicubicResize((4, 5), preset="matlab"))


# GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8])
@pytest.mark.parametrize("preset", PRESETS)
def test_cuda_equals_cpu(preset, dtype):
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.uint8: 0}
    for (old, new), channels in itertools.product(SHAPES, (1, 3, 21)):
        x = (random(2, channels, *old) * 50 + 120).clamp(0, 255).to(dtype)
        for layout in (torch.contiguous_format, torch.channels_last):
            cpu = bicubic_resize(x.to(memory_format=layout), new, preset=preset)
            cuda = bicubic_resize(x.cuda().to(memory_format=layout), new, preset=preset)
            assert cuda.stride() == cpu.stride()
            error = (cuda.cpu().double() - cpu.double()).abs().max()
            # float32 sums in another order may fall on the other side of a half.
            assert error <= 255 * tolerance[dtype] + (dtype == torch.uint8 and PRESETS[preset].bytes == "last")


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(9,), (5, 12), (4, 13, 6)], ids=["1d", "2d", "3d"])
@pytest.mark.parametrize("preset", PRESETS)
def test_cuda_gradients(preset, size):
    x = random(2, 3, *(7, 8, 9)[: len(size)]).requires_grad_()
    out = bicubic_resize(x, size, preset=preset)
    grad = random(*out.shape)
    (wanted,) = torch.autograd.grad(out, x, grad)
    y = x.detach().cuda().requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (torch.autograd.grad(bicubic_resize(y, size, preset=preset), y, grad.cuda())[0] for _ in "12")
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, second)
    torch.testing.assert_close(first.cpu(), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
def test_cuda_graph():
    x = random(1, 3, 20, 21, dtype=torch.float32).cuda()
    wanted = bicubic_resize(x + 1, (40, 9), preset="matlab")  # the tables are on the device now
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = bicubic_resize(x, (40, 9), preset="matlab")
    x.add_(1)
    graph.replay()
    assert torch.equal(made, wanted)


@pytest.mark.gpu
def test_cuda_reduction_without_limit():
    x = random(1, 2, 3000, 2500, dtype=torch.float32)
    cuda = bicubic_resize(x.cuda(), (2, 3), preset="torch_antialias")
    torch.testing.assert_close(cuda.cpu(), bicubic_resize(x, (2, 3), preset="torch_antialias"), rtol=1e-4, atol=1e-4)
