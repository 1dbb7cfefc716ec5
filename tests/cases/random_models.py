# SPDX-License-Identifier: Apache-2.0
"""Random models with dense blocks, and what people do to them: each drawn from a seed, the same for a plain and a
converted copy."""

from collections.abc import Callable
from functools import partial
from random import Random

import monai.networks.nets.densenet as monai_densenet
import timm.models.densenet as timm_densenet
import torch
import torch.nn.functional as F
import torchvision.models.densenet as tv_densenet
from timm.models.dpn import DPN
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastdense
from fastdense.models.fc_densenet import FCDenseNet
from tests.cases.converted import randomise
from tests.cases.families import ResidualDenseBlock


class HandWrittenLayer(nn.Module):
    """Norm, ReLU, convolution, once or twice; new features behind the others, in front, or by themselves."""

    def __init__(self, channels: int, growth: int, bottleneck: int, joins: str) -> None:
        super().__init__()
        self.joins = joins
        self.squeeze = nn.Sequential()
        read = channels
        if bottleneck:
            self.squeeze = nn.Sequential(
                nn.BatchNorm2d(channels), nn.ReLU(inplace=False), nn.Conv2d(channels, bottleneck, 1, bias=False)
            )
            read = bottleneck
        self.act = nn.ReLU()
        self.expand = nn.Conv2d(read, growth, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(read)

    def forward(self, x: Tensor) -> Tensor:
        new = self.expand(self.act(self.norm(self.squeeze(x))))
        return {"behind": torch.cat([x, new], 1), "front": torch.cat([new, x], 1), "new": new}[self.joins]


class HandWrittenBlock(nn.Module):
    def __init__(self, channels: int, growth: int, layers: int, bottleneck: int, joins: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            HandWrittenLayer(channels + at * growth, growth, bottleneck, joins) for at in range(layers)
        )
        self.out_channels = channels + layers * growth

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1) if layer.joins == "new" else layer(x)
        return x


def _sizes(random: Random) -> dict[str, int]:
    return {"growth": random.randint(2, 7), "layers": random.randint(1, 4), "channels": random.randint(3, 9)}


def _torchvision(random: Random) -> tuple[nn.Module, tuple[int, ...]]:
    blocks = tuple(random.randint(1, 3) for _ in range(random.randint(1, 2)))
    options = {"growth_rate": random.randint(2, 6), "bn_size": random.randint(1, 3), "num_init_features": 6}
    return tv_densenet.DenseNet(block_config=blocks, num_classes=3, **options), (2, 3, 48, 40)


def _timm(random: Random) -> tuple[nn.Module, tuple[int, ...]]:
    blocks = tuple(random.randint(1, 3) for _ in range(2))
    return timm_densenet.DenseNet(random.randint(2, 6), blocks, num_classes=3), (2, 3, 48, 40)


def _monai(random: Random) -> tuple[nn.Module, tuple[int, ...]]:
    dims = random.randint(1, 3)
    options = {"growth_rate": random.randint(2, 6), "init_features": 6, "block_config": (random.randint(1, 3), 2)}
    return monai_densenet.DenseNet(dims, 1, 3, **options), (2, 1, *(300, 40, 20)[dims - 1 : dims] * dims)


def _dual_path(random: Random) -> tuple[nn.Module, tuple[int, ...]]:
    layers = tuple(random.randint(1, 2) for _ in range(4))
    net = DPN(layers, (random.choice((4, 8)),) * 4, k_r=8, groups=2, num_classes=3, small=True, num_init_features=6)
    return net, (2, 3, 64, 64)


def _fc_densenet(random: Random) -> tuple[nn.Module, tuple[int, ...]]:
    down, up = [[random.randint(1, 3) for _ in range(2)] for _ in range(2)]
    return FCDenseNet(random.randint(2, 4), down, 2, up, init_features=6, num_classes=2, drop_rate=0.0), (2, 3, 17, 20)


def _own(random: Random) -> tuple[nn.Module, tuple[int, ...]]:
    s = _sizes(random)
    block = fastdense.nn.DenseBlock(s["layers"], s["channels"], s["growth"], bottleneck=random.random() < 0.7)
    transition = fastdense.nn.Transition(block.out_channels, random.randint(2, 6))
    return fastdense.nn.DenseFeatures(block, transition, nn.BatchNorm2d(transition.conv.out_channels)), (
        3,
        s["channels"],
        9,
        8,
    )


def _hand_written(random: Random) -> tuple[nn.Module, tuple[int, ...]]:
    s = _sizes(random)
    joins = random.choice(("behind", "front", "new"))
    block = HandWrittenBlock(s["channels"], s["growth"], s["layers"] + 1, random.choice((0, 5)), joins)
    behind: list[nn.Module] = random.choice(
        (
            lambda: [],
            lambda: [nn.BatchNorm2d(block.out_channels), nn.ReLU()],
            lambda: [tv_densenet._Transition(block.out_channels, 5)],
            lambda: [nn.Conv2d(block.out_channels, 4, 1)],
        )
    )()
    return nn.Sequential(block, *behind), (3, s["channels"], 8, 7)


def _blocks(random: Random) -> tuple[nn.Module, tuple[int, ...]]:
    s = _sizes(random)
    modules: list[nn.Module] = []
    channels = s["channels"]
    for _ in range(random.randint(1, 2)):
        modules.append(tv_densenet._DenseBlock(s["layers"], channels, random.randint(1, 3), s["growth"], 0.0))
        channels += s["layers"] * s["growth"]
        kind = random.choice(("transition", "norm", "relu", "nothing"))
        if kind == "transition":
            modules.append(tv_densenet._Transition(channels, channels := random.randint(3, 8)))
        elif kind == "norm":
            modules.append(nn.BatchNorm2d(channels))
        elif kind == "relu":
            modules.append(nn.ReLU())
    return nn.Sequential(*modules), (3, s["channels"], 12, 10)


def _residual(random: Random) -> tuple[nn.Module, tuple[int, ...]]:
    channels = random.randint(3, 9)
    blocks = [ResidualDenseBlock(channels, random.randint(2, 6), random.randint(2, 4)) for _ in range(2)]
    return nn.Sequential(*blocks), (2, channels, 9, 8)


def _rrdb(random: Random) -> tuple[nn.Module, tuple[int, ...]]:
    return fastdense.models.create("rrdbnet", blocks=1, width=random.choice((8, 16))), (1, 3, 8, 7)


MAKERS = [
    _torchvision, _timm, _monai, _dual_path, _fc_densenet, _own, _hand_written, _hand_written, _blocks, _blocks,
    _residual, _rrdb,
]  # fmt: skip


def random_model(random: Random) -> tuple[nn.Module, Tensor]:
    """A plain model in float64, in training, and an input."""
    torch.manual_seed(random.randrange(2**31))
    net, shape = random.choice(MAKERS)(random)
    return randomise(fastdense.restore(net).double()).train(), torch.randn(shape, dtype=torch.float64)


# --- what people do to a model ----------------------------------------------------------------------------------------


def _norms(net: nn.Module) -> list[nn.Module]:
    return [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def _convs(net: nn.Module) -> list[nn.Module]:
    return [module for module in net.modules() if isinstance(module, nn.modules.conv._ConvNd)]


def _one(random: Random, modules: list[nn.Module]) -> list[nn.Module]:
    return [random.choice(modules)] if modules else []


def freeze_all_norms(net: nn.Module, random: Random) -> None:
    for norm in _norms(net):
        norm.eval()


def freeze_a_norm(net: nn.Module, random: Random) -> None:
    for norm in _one(random, _norms(net)):
        norm.eval()


def freeze_parameters(net: nn.Module, random: Random) -> None:
    for p in net.parameters():
        if random.random() < 0.3:
            p.requires_grad_(False)


def change_momentum(net: nn.Module, random: Random) -> None:
    for norm in _one(random, _norms(net)):
        norm.momentum = random.choice((None, 0.0, 0.3, 1.0))


def change_eps(net: nn.Module, random: Random) -> None:
    for norm in _one(random, _norms(net)):
        norm.eps = random.choice((1e-3, 0.1))


def forget_statistics(net: nn.Module, random: Random) -> None:
    for norm in _one(random, _norms(net)):
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None


def keep_statistics_still(net: nn.Module, random: Random) -> None:
    for norm in _one(random, _norms(net)):
        norm.track_running_stats = False


def drop_scale_and_shift(net: nn.Module, random: Random) -> None:
    for norm in _one(random, _norms(net)):
        norm.affine = False
        norm.weight = norm.bias = None


def drop_a_shift(net: nn.Module, random: Random) -> None:
    for norm in _one(random, _norms(net)):
        norm.bias = None


def hook_a_module(net: nn.Module, random: Random) -> None:
    for module in _one(random, list(net.modules())):
        module.register_forward_hook(lambda m, args, out: out * 1.25 if isinstance(out, Tensor) else out)


def hook_an_input(net: nn.Module, random: Random) -> None:
    for module in _one(random, _norms(net) + _convs(net)):
        module.register_forward_pre_hook(lambda m, args: (args[0] * 0.75,))


def hook_a_gradient(net: nn.Module, random: Random) -> None:
    for module in _one(random, _convs(net)):
        module.register_full_backward_hook(lambda m, gi, go: tuple(None if g is None else g * 2 for g in gi))


def hook_a_parameter(net: nn.Module, random: Random) -> None:
    for module in _one(random, _convs(net)):
        if module.weight.is_leaf and module.weight.requires_grad:
            module.weight.register_hook(lambda grad: grad * 3)


def replace_a_relu(net: nn.Module, random: Random) -> None:
    places = [(m, name) for m in net.modules() for name, child in m.named_children() if isinstance(child, nn.ReLU)]
    if places:
        parent, name = random.choice(places)
        setattr(parent, name, random.choice((nn.LeakyReLU(0.1), nn.Identity(), nn.ReLU6(), nn.SiLU())))


def add_a_bias(net: nn.Module, random: Random) -> None:
    for conv in _one(random, _convs(net)):
        if conv.bias is None:
            conv.bias = nn.Parameter(torch.linspace(-1, 1, conv.out_channels, dtype=torch.float64))


def _circular(stride: tuple[int, int], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(F.pad(x, (1, 1, 1, 1), "circular"), weight, bias, stride)


def change_borders(net: nn.Module, random: Random) -> None:
    """As people make networks for tiles: circular borders, by an attribute or by code."""
    convs = [
        conv for conv in _convs(net) if type(conv) is nn.Conv2d and conv.kernel_size == (3, 3) and conv.groups == 1
    ]
    for conv in _one(random, [conv for conv in convs if conv.padding == (1, 1)]):
        if random.random() < 0.5:
            conv.padding_mode = "circular"
            conv._reversed_padding_repeated_twice = [1, 1, 1, 1]
        else:
            conv._conv_forward = partial(_circular, conv.stride)


def parametrise(net: nn.Module, random: Random) -> None:
    for conv in _one(random, _convs(net)):
        parametrizations.weight_norm(conv)


def _halved(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return forward(x) * 0.5


def replace_a_forward(net: nn.Module, random: Random) -> None:
    for module in _one(random, _norms(net) + _convs(net)):
        module.forward = partial(_halved, module.forward)


def replace_weights(net: nn.Module, random: Random) -> None:
    net.load_state_dict({name: t.clone() * 1.01 for name, t in net.state_dict().items()}, assign=random.random() < 0.5)


def write_weights(net: nn.Module, random: Random) -> None:
    with torch.no_grad():
        for p in net.parameters():
            (p if random.random() < 0.5 else p.data).mul_(1.02)


def lay_out_channels_last(net: nn.Module, random: Random) -> None:
    if all(p.dim() <= 4 for p in net.parameters()):
        net.to(memory_format=torch.channels_last)


def evaluate(net: nn.Module, random: Random) -> None:
    net.eval()


def train(net: nn.Module, random: Random) -> None:
    net.train()


def evaluate_a_part(net: nn.Module, random: Random) -> None:
    for module in _one(random, list(net.modules())):
        module.eval()


CHANGES: list[Callable[[nn.Module, Random], None]] = [
    freeze_all_norms, freeze_a_norm, freeze_parameters, change_momentum, change_eps, forget_statistics,
    keep_statistics_still, drop_scale_and_shift, drop_a_shift, hook_a_module, hook_an_input, hook_a_gradient,
    hook_a_parameter, replace_a_relu, add_a_bias, change_borders, parametrise, replace_a_forward, replace_weights,
    write_weights, lay_out_channels_last, evaluate, train, evaluate_a_part,
]  # fmt: skip


def change(net: nn.Module, kind: Callable[[nn.Module, Random], None], seed: int) -> None:
    kind(net, Random(seed))
