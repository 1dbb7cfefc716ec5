# SPDX-License-Identifier: Apache-2.0
"""FractalNet: columns of different depth that meet in means, and drop-path.

A block of ``C`` columns takes ``2^(C-1)`` steps. Column ``c`` is a chain of ``2^c`` convolutions, each
``2^(C-1-c)`` steps long; wherever several columns end a convolution, their outputs are averaged. For ``C = 3``::

    step      1     2     3     4
    column 2  conv  conv  conv  conv
    column 1  --- conv -  --- conv -
    column 0  -------- conv --------
    joins           *           *

Reference:
    G. Larsson, M. Maire, G. Shakhnarovich. FractalNet: Ultra-Deep Neural Networks without Residuals. ICLR 2017,
    arXiv:1605.07648, equations 1 and 2 (fractals), section 3 (drop-path).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdense.models.recipe import keeps_recipe
from fastdense.ops import mean_join
from fastdense.plain.stochastic_depth import check_probability, statistics_move_if

# Which columns a join averages, by step.
Paths = Mapping[int, Sequence[int]]
# The same as a bool tensor [steps, columns] on the CPU, for graphs that serve any choice.
Gates = Tensor


def join(outputs: Sequence[Tensor]) -> Tensor:
    """The element-wise mean of the columns that take part."""
    return mean_join(outputs) if len(outputs) > 1 else outputs[0]


def draw_survivors(columns: Sequence[int], rate: float) -> list[int]:
    """Drops each column with probability ``rate``; if none is left, one of them at random stays."""
    draws = torch.rand(len(columns), device="cpu").tolist()
    kept = [column for column, u in zip(columns, draws, strict=True) if u >= rate]
    return kept or [columns[int(torch.randint(len(columns), (), device="cpu"))]]


class FractalConv(nn.Module):
    """3x3 convolution, dropout, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, drop_rate: float, bias: bool, affine: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)
        self.dropout = nn.Dropout(drop_rate)
        self.norm = nn.BatchNorm2d(out_channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.dropout(self.conv(x))))


class FractalBlock(nn.Module):
    """A fractal of ``2^C - 1`` convolutions, then a 2x2 max pooling.

    Args:
        columns: number of columns ``C``.
        in_channels, out_channels: of the block.
        drop_rate: probability in [0, 1] of dropout behind each convolution.
        bias: whether convolutions have one.
        affine: whether norms have weights and biases.
        doubling: a 1x1 convolution widens the input where the width changes, so that all 3x3 convolutions keep it.
        join_first: average the columns at the end, then pool; the authors pool every column, then average.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, out_channels, H // 2, W // 2]``.
    """

    def __init__(
        self,
        columns: int,
        in_channels: int,
        out_channels: int,
        *,
        drop_rate: float = 0.0,
        bias: bool = True,
        affine: bool = False,
        doubling: bool = False,
        join_first: bool = False,
    ) -> None:
        super().__init__()
        if columns < 1:
            raise ValueError(f"FractalBlock: expected columns to be positive, got {columns!r}")
        check_probability("FractalBlock", "drop_rate", drop_rate)
        widens = doubling and in_channels != out_channels
        self.widen = nn.Conv2d(in_channels, out_channels, 1, bias=bias) if widens else nn.Identity()
        first = out_channels if widens else in_channels
        self.columns = nn.ModuleList(
            nn.ModuleList(
                FractalConv(first if index == 0 else out_channels, out_channels, drop_rate, bias, affine)
                for index in range(2**column)
            )
            for column in range(columns)
        )
        self.steps = 2 ** (columns - 1)
        self.join_first = join_first

    def length(self, column: int) -> int:
        """Steps that one convolution of a column takes."""
        return self.steps >> column

    def joins(self) -> dict[int, list[int]]:
        """The columns that end a convolution at each step ``1 ... 2^(C-1)``: those that meet there."""
        columns = range(len(self.columns))
        return {step: [c for c in columns if step % self.length(c) == 0] for step in range(1, self.steps + 1)}

    def draw_local(self, rate: float) -> dict[int, list[int]]:
        """Local drop-path: the survivors of every join, each input dropped with probability ``rate``."""
        return {
            step: draw_survivors(columns, rate) if len(columns) > 1 else columns
            for step, columns in self.joins().items()
        }

    def members(self) -> Gates:
        """:meth:`joins` as gates."""
        columns = range(len(self.columns))
        return torch.tensor([[c in meeting for c in columns] for meeting in self.joins().values()], device="cpu")

    def draw_local_gates(self, rate: float) -> Gates:
        """:meth:`draw_local` without a decision in Python."""
        members = self.members()
        kept = members & (torch.rand(members.shape, device="cpu") >= rate)
        spare = (torch.rand(members.shape, device="cpu") * members).argmax(1, keepdim=True)
        last = torch.arange(members.shape[1], device="cpu") == spare
        return torch.where(kept.any(1, keepdim=True), kept, last)

    def only(self, column: int) -> dict[int, list[int]]:
        """The paths of one column alone."""
        return {step: [column] for step, columns in self.joins().items() if column in columns}

    def forward(self, x: Tensor, paths: Paths | Gates | None = None) -> Tensor:
        """The block along ``paths``, all by default; what no path needs is not computed, except along gates."""
        if isinstance(paths, Tensor):
            return self._gated(x, paths)
        paths = self.joins() if paths is None else paths
        needed = {self.steps}
        for step in range(self.steps, 0, -1):
            if step in needed:
                needed.update(step - self.length(column) for column in paths[step])
        values = {0: self.widen(x)}
        outputs: list[Tensor] = []
        for step in range(1, self.steps + 1):
            if step in needed:
                outputs = [self._convolve(column, step, values) for column in paths[step]]
                if step < self.steps:
                    values[step] = join(outputs)
        return self._end(outputs, join)

    def _end(self, outputs: Sequence[Tensor], join: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
        if self.join_first:
            return F.max_pool2d(join(outputs), 2)
        return join([F.max_pool2d(output, 2) for output in outputs])

    def _gated(self, x: Tensor, gates: Gates) -> Tensor:
        """Computes everything; only what the gates need counts and moves its running statistics."""
        needed = {step: torch.tensor(step == self.steps) for step in range(self.steps + 1)}
        used = {}
        for step, columns in reversed(self.joins().items()):
            for column in columns:
                used[column, step] = needed[step] & gates[step - 1, column]
                before = step - self.length(column)
                needed[before] = needed[before] | used[column, step]
        values = {0: self.widen(x)}
        for step, columns in self.joins().items():
            outputs = []
            for column in columns:
                with statistics_move_if(used[column, step], [self._module(column, step).norm]):
                    outputs.append(self._convolve(column, step, values))
            alive = gates[step - 1, columns].to(outputs[0])
            weights = alive / alive.sum().clamp(min=1)
            gated = partial(_weighted_sum, weights)
            if step < self.steps:
                values[step] = gated(outputs)
        return self._end(outputs, gated)

    def _convolve(self, column: int, step: int, values: Mapping[int, Tensor]) -> Tensor:
        """The convolution of ``column`` that ends at ``step``."""
        return self._module(column, step)(values[step - self.length(column)])

    def _module(self, column: int, step: int) -> FractalConv:
        modules = self.columns[column]
        assert isinstance(modules, nn.ModuleList)
        module = modules[step // self.length(column) - 1]
        assert isinstance(module, FractalConv)
        return module


def _weighted_sum(weights: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    return sum((w * output for w, output in zip(weights, outputs, strict=True)), torch.zeros_like(outputs[0]))


class FractalNet(nn.Module):
    """Fractal blocks with max pooling behind each, global average pooling and a linear classifier.

    Args:
        columns: number of columns ``C``; the longest path has ``B * 2^(C-1)`` convolutions in ``B`` blocks.
        widths: channels of the blocks.
        num_classes: outputs of the classifier.
        drop_rates: probability of dropout in each block.
        drop_path: probability in [0, 1) that local drop-path drops an input of a join, in training.
        global_ratio: share of mini-batches in training that run one column, the same in all blocks; the others use
            local drop-path.
        bias: whether convolutions have one.
        affine: whether norms have weights and biases.
        doubling: see :class:`FractalBlock`.
        join_first: see :class:`FractalBlock`.
        in_channels: channels of the images.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, num_classes]``; sizes of at least ``2^B``, published for 32.

    Raises:
        ValueError: if an argument is out of range, ``drop_rates`` does not match ``widths``, or an image is too small.

    Note:
        Drop-path averages the survivors and does not rescale them. Paths are drawn anew for every mini-batch, from
        torch's CPU generator; convolutions that no path needs are not called, so their norms keep their statistics.
        Under ``torch.compile`` one graph serves every choice of paths, so all convolutions are computed, and those that
        no path needs are multiplied by 0: numbers and statistics are those of the paths drawn, time and memory those of
        the whole network.

    Reference:
        G. Larsson, M. Maire, G. Shakhnarovich. FractalNet. ICLR 2017, arXiv:1605.07648, figure 1.
    """

    def __init__(
        self,
        columns: int = 3,
        widths: Sequence[int] = (64, 128, 256, 512, 512),
        *,
        num_classes: int = 10,
        drop_rates: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4),
        drop_path: float = 0.15,
        global_ratio: float = 0.5,
        bias: bool = True,
        affine: bool = False,
        doubling: bool = False,
        join_first: bool = False,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_probability("FractalNet", "drop_path", drop_path)
        check_probability("FractalNet", "global_ratio", global_ratio)
        if not widths or len(drop_rates) != len(widths):
            raise ValueError(
                f"FractalNet: expected drop_rates to have one number for each of {len(widths)} widths, "
                f"got {len(drop_rates)}"
            )
        blocks = []
        channels = in_channels
        for width, drop_rate in zip(widths, drop_rates, strict=True):
            block = FractalBlock(
                columns,
                channels,
                width,
                drop_rate=drop_rate,
                bias=bias,
                affine=affine,
                doubling=doubling,
                join_first=join_first,
            )
            blocks.append(block)
            channels = width
        self.blocks = nn.ModuleList(blocks)
        self.classifier = nn.Linear(channels, num_classes)
        self.num_columns = columns
        self.drop_path = float(drop_path)
        self.global_ratio = float(global_ratio)
        self._initialise()

    def _initialise(self) -> None:
        """Xavier initialisation, zero biases."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _fractals(self) -> list[FractalBlock]:
        return [block for block in self.blocks if isinstance(block, FractalBlock)]

    def draw_paths(self) -> list[dict[int, list[int]]]:
        """Draws one mini-batch's paths through each block: one column of the whole net, or local survivors."""
        if self.global_ratio > 0 and torch.rand((), device="cpu").item() < self.global_ratio:
            column = int(torch.randint(self.num_columns, (), device="cpu"))
            return [block.only(column) for block in self._fractals()]
        return [block.draw_local(self.drop_path) for block in self._fractals()]

    def draw_gates(self) -> list[Gates]:
        """:meth:`draw_paths` without a decision in Python; the random numbers are others."""
        alone = torch.rand((), device="cpu") < self.global_ratio
        column = torch.arange(self.num_columns, device="cpu") == torch.randint(self.num_columns, (), device="cpu")
        return [
            torch.where(alone, block.members() & column, block.draw_local_gates(self.drop_path))
            for block in self._fractals()
        ]

    def forward(self, x: Tensor, paths: Sequence[Paths | Gates] | None = None) -> Tensor:
        """Logits; along ``paths``, one mapping for each block, or along those that training draws.

        Args:
            x: ``[N, in_channels, H, W]``.
            paths: as :meth:`draw_paths` or :meth:`draw_gates` returns them; None draws them in training and takes all
                in evaluation.
        """
        smallest = 2 ** len(self.blocks)
        if min(x.shape[2:]) < smallest:
            raise ValueError(f"FractalNet: expected x to have at least {smallest} pixels a side, got {list(x.shape)}")
        if paths is None and self.training and (self.drop_path > 0 or self.global_ratio > 0):
            paths = self.draw_gates() if torch.compiler.is_compiling() else self.draw_paths()
        for index, block in enumerate(self.blocks):
            x = block(x, None if paths is None else paths[index])
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))

    def column(self, x: Tensor, column: int) -> Tensor:
        """Logits of one column alone: a plain net of ``B * 2^column`` convolutions with the same weights."""
        if not 0 <= column < self.num_columns:
            raise ValueError(
                f"FractalNet: expected column to be at least 0 and below {self.num_columns}, got {column!r}"
            )
        return self(x, [block.only(column) for block in self._fractals()])

    def anytime(self, x: Tensor) -> list[Tensor]:
        """Logits of every column alone, from the shallowest to the deepest, and last those of the whole net.

        In training each pass updates the running statistics that it meets.
        """
        return [*(self.column(x, column) for column in range(self.num_columns)), self(x)]


def anytime_loss(outputs: Sequence[Tensor], target: Tensor) -> Tensor:
    """Cross entropy of the whole net plus the mean of the columns'.

    Args:
        outputs: of :meth:`FractalNet.anytime`.
        target: ``[N]``, int64, the classes.

    Returns:
        ``[]``: ``loss(outputs[-1]) + sum of loss(outputs[c]) / C``.

    Example:
        >>> outputs = [torch.zeros(2, 4)] * 3
        >>> bool(anytime_loss(outputs, torch.tensor([1, 2])).isclose(2 * torch.tensor(4.0).log()))
        True
    """
    *columns, whole = (F.cross_entropy(output, target) for output in outputs)
    return whole + torch.stack(columns).mean()


@keeps_recipe
def fractalnet(
    columns: int = 3,
    widths: Sequence[int] = (64, 128, 256, 512, 512),
    num_classes: int = 10,
    drop_rates: Sequence[float] | None = None,
    drop_path: float = 0.15,
    global_ratio: float = 0.5,
    bias: bool = True,
    affine: bool = False,
    doubling: bool = False,
    join_first: bool = False,
    in_channels: int = 3,
) -> FractalNet:
    """FractalNet of 20 layers as in the authors' file, 33,714,314 parameters; see :class:`FractalNet`.

    Args:
        columns, widths, num_classes, drop_path, global_ratio, bias, affine, doubling, join_first, in_channels: of
            :class:`FractalNet`.
        drop_rates: of dropout in each block; None for 0, 0.1, 0.2 and so on.

    Example:
        >>> sum(p.numel() for p in fractalnet(1, (16, 32, 64, 128, 128), 100, bias=False, affine=True).parameters())
        258292
    """
    return FractalNet(
        columns,
        widths,
        num_classes=num_classes,
        drop_rates=[min(0.1 * index, 0.5) for index in range(len(widths))] if drop_rates is None else drop_rates,
        drop_path=drop_path,
        global_ratio=global_ratio,
        bias=bias,
        affine=affine,
        doubling=doubling,
        join_first=join_first,
        in_channels=in_channels,
    )
