# SPDX-License-Identifier: Apache-2.0
"""What scripts around a network do: mixed precision, threads, workers that load data, volumes in channels_last_3d."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.amp import custom_bwd, custom_fwd
from torch.utils.data import DataLoader, Dataset

import fastdense
from tests.cases.converted import FUSED, assert_bit_equal, assert_same, fused_calls, images, norms, pair, step
from tests.cases.monai import monai_net, volume
from tests.cases.random_block import relative

# A block that falls back where the test does not expect it fails the test.
pytestmark = [pytest.mark.filterwarnings("error:fastdense"), pytest.mark.usefixtures("one_thread")]
TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def train_scaled(net: nn.Module, batches: list[Tensor]) -> tuple[dict[str, Tensor], list[float]]:
    """Steps with a scaler; an overflow in the second batch skips its step and halves the scale."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    scales = []
    for index, x in enumerate(batches):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = net(x).float().square().mean() * (float("inf") if index == 1 else 1.0)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return net.state_dict(), scales


def test_grad_scaler_skips_and_scales_as_with_plain_modules():
    plain, fast = (net.float() for net in pair())
    batches = [images(4).float() for _ in range(4)]
    (mine, my_scales), (theirs, their_scales) = (train_scaled(net, batches) for net in (fast, plain))
    assert my_scales == their_scales == [1024.0, 512.0, 512.0, 1024.0]
    for name, value in mine.items():
        assert relative(value.double(), theirs[name].double()) <= 0.02, name  # bfloat16


class InFloat32(torch.autograd.Function):
    """Runs a network outside of autocast, on an input cast to float32."""

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, x, net):
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.out = net(ctx.x)
        return ctx.out.detach()

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx, grad):
        return torch.autograd.grad(ctx.out, ctx.x, grad)[0], None


def test_custom_fwd_takes_a_block_out_of_autocast():
    plain, fast = (net.float() for net in pair())
    x = images().float()
    made = []
    for net in (plain, fast):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = InFloat32.apply(leaf.bfloat16(), net)
        out.sum().backward()
        made.append((out.detach(), leaf.grad))
    for mine, theirs in zip(made[1], made[0], strict=True):
        assert mine.dtype == theirs.dtype == torch.float32
        assert relative(mine, theirs) <= 1e-4


def outcome(net: nn.Module, x: Tensor) -> object:
    """The types of the result and of all gradients, or an error's class."""
    try:
        return {name: value.dtype for name, value in step(net, x).items()}
    except RuntimeError as error:
        return type(error)


@pytest.mark.parametrize("training", [True, False])
def test_types_of_parameters_and_inputs_as_plain_modules_take_them(training):
    """Where plain modules run, so does the converted net, with the same types; where they raise, so does it."""
    ran = 0
    for given, weights, scales in itertools.product(TYPES, repeat=3):
        plain, fast = (net.to(weights).train(training) for net in pair(block_config=(1, 1)))
        for norm in itertools.chain(norms(plain), norms(fast)):
            norm.to(scales)
        x = images(2, 32).to(given)
        wanted, made = outcome(plain, x), outcome(fast, x)
        assert made == wanted, (given, weights, scales)
        ran += wanted is not RuntimeError
    assert ran == 6  # one type for all, or norms of float32 and the rest in 16 bits


@pytest.mark.parametrize("memory", ["balanced", "min"])
def test_volumes_in_channels_last_3d(memory):
    plain, fast = pair(monai_net, memory)
    x = volume(3)
    expected = step(plain, x)
    fast.to(memory_format=torch.channels_last_3d)
    assert_same(step(fast, x.to(memory_format=torch.channels_last_3d)), expected)
    assert fused_calls(fast, x) == FUSED


def test_number_of_threads_may_change_between_and_within_steps():
    plain, fast = pair()
    x = images()
    expected = step(plain, x)
    made = []
    for forward, backward in ((1, 1), (2, 2), (1, 2), (2, 1), (1, 1)):
        torch.set_num_threads(forward)

        def run(x: Tensor, backward: int = backward) -> Tensor:
            out = fast(x)
            torch.set_num_threads(backward)
            return out

        made.append({name: value for name, value in step(fast, x, run=run).items() if not name.startswith("buffer")})
        assert_same(made[-1], {name: value for name, value in expected.items() if name in made[-1]})
    assert_bit_equal(made[0], made[-1])


class Resized(Dataset):
    """Pictures made in a worker by this library's operators and a converted network."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        picture = torch.full((1, 3, 24, 24), index / 4, dtype=torch.float64) + torch.linspace(0, 1, 24)
        with torch.no_grad():
            return self.net(fastdense.bicubic_resize(picture, (64, 64), preset="pillow"))[0]


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_workers_of_a_data_loader(start):
    _, fast = pair(block_config=(1, 1))
    torch.set_num_threads(2)  # so that a forked worker inherits a pool of threads
    step(fast, images())
    data = Resized(fast.eval())
    wanted = torch.stack([data[index] for index in range(4)])
    loader = DataLoader(data, batch_size=2, num_workers=1, multiprocessing_context=start, timeout=60)
    assert relative(torch.cat(list(loader)), wanted) <= 1e-12
