# SPDX-License-Identifier: Apache-2.0
"""FractalNet: counts, the recursive definition, drop-path, columns that are plain networks."""

import copy
import math

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn

from fastdense import models
from fastdense.models.fractalnet import FractalBlock, FractalConv, FractalNet, anytime_loss, draw_survivors, join


def small(**arguments) -> FractalNet:
    options = {"columns": 3, "widths": (4, 6), "affine": True, "drop_rates": (0.0, 0.0), **arguments}
    return models.fractalnet(**options).double()


def image(size: int = 8, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, dtype=torch.float64)


def randomise(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def count(**arguments) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in models.create("fractalnet", **arguments).parameters())


@pytest.mark.parametrize(
    ("columns", "parameters"),
    [(1, 258_292), (2, 847_716), (3, 2_125_204), (4, 4_778_820), (5, 10_184_692), (6, 21_095_076)],
)
def test_parameters_by_depth(columns, parameters):
    widths = (16, 32, 64, 128, 128)
    assert count(columns=columns, widths=widths, num_classes=100, bias=False, affine=True) == parameters


def test_parameters_of_the_main_net():
    assert count(bias=False, affine=True) == 33_724_618
    assert count(bias=False, affine=True, num_classes=100) == 33_770_788
    assert count() == 33_714_314
    assert count(bias=False, doubling=True) == 38_621_376 + 5_130


@pytest.mark.parametrize("columns", [1, 2, 3, 4])
def test_joins_and_convolutions_of_a_block(columns):
    block = FractalBlock(columns, 3, 4)
    assert sum(isinstance(m, FractalConv) for m in block.modules()) == 2**columns - 1
    sizes = [len(c) for c in block.joins().values() if len(c) > 1]
    assert sizes == {1: [], 2: [2], 3: [2, 3], 4: [2, 3, 2, 4]}[columns]
    for step, meeting in block.joins().items():
        twos = (step & -step).bit_length() - 1
        assert meeting == list(range(columns - 1 - twos, columns))


def recursive(block: FractalBlock, x: torch.Tensor) -> list[torch.Tensor]:
    """Ends of all columns, shallowest first, by f_{C+1} = join(f_C o f_C, conv)."""
    positions = [0] * len(block.columns)

    def convolve(column, z):
        positions[column] += 1
        return block.columns[column][positions[column] - 1](z)

    def fractal(column, z):
        """Unjoined ends of the fractal whose shallowest column is ``column``."""
        if column == len(block.columns) - 1:
            return [convolve(column, z)]
        first = fractal(column + 1, z)
        deeper = fractal(column + 1, torch.stack(first).mean(0))
        return [convolve(column, z), *deeper]

    return fractal(0, x)


@pytest.mark.parametrize("join_first", [False, True])
@pytest.mark.parametrize("columns", [1, 2, 3, 4])
def test_block_is_the_recursive_definition(columns, join_first):
    block = randomise(FractalBlock(columns, 3, 4, affine=True, join_first=join_first)).double().eval()
    x = image()
    ends = recursive(block, x)
    if join_first:
        expected = F.max_pool2d(torch.stack(ends).mean(0), 2)
    else:
        expected = torch.stack([F.max_pool2d(end, 2) for end in ends]).mean(0)
    torch.testing.assert_close(block(x), expected)


def test_pooling_and_joining_do_not_commute():
    block = FractalBlock(2, 3, 4).double().eval()
    x = image()
    pooled_first = block(x)
    block.join_first = True
    assert (block(x) <= pooled_first + 1e-12).all()
    assert (block(x) < pooled_first - 1e-3).any()


def test_one_column_is_a_plain_chain():
    net = randomise(small(columns=1)).eval()
    x = y = image()
    for block in net.blocks:
        y = F.max_pool2d(block.columns[0][0](y), 2)
    torch.testing.assert_close(net(x), net.classifier(y.mean((2, 3))))


@pytest.mark.parametrize("column", [0, 1, 2])
def test_a_column_alone_is_a_plain_chain(column):
    net = randomise(small()).eval()
    x = y = image()
    called = []
    for module in net.modules():
        if isinstance(module, FractalConv):
            module.register_forward_hook(lambda *_: called.append(1))
    made = net.column(x, column)
    assert len(called) == len(net.blocks) * 2**column
    for block in net.blocks:
        for conv in block.columns[column]:
            y = conv(y)
        y = F.max_pool2d(y, 2)
    torch.testing.assert_close(made, net.classifier(y.mean((2, 3))))


def test_anytime_outputs():
    net = randomise(small()).eval()
    x = image()
    outputs = net.anytime(x)
    assert len(outputs) == 4
    for column in range(3):
        assert torch.equal(outputs[column], net.column(x, column))
    assert torch.equal(outputs[-1], net(x))
    target = torch.tensor([3, 9])
    losses = [F.cross_entropy(output, target) for output in outputs]
    torch.testing.assert_close(anytime_loss(outputs, target), losses[3] + (losses[0] + losses[1] + losses[2]) / 3)


def test_keeping_all_is_the_mean_of_evaluation():
    net = small(drop_path=0.0, global_ratio=0.0)
    x = image()
    assert [block.draw_local(0.0) for block in net.blocks] == [block.joins() for block in net.blocks]
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    torch.testing.assert_close(net.train()(x), net.eval()(x), rtol=0, atol=0)


def test_gradient_goes_to_survivors_in_equal_parts():
    outputs = [torch.randn(2, 3, requires_grad=True) for _ in range(4)]
    join([outputs[i] for i in (0, 2, 3)]).sum().backward()
    for index, output in enumerate(outputs):
        if index == 1:
            assert output.grad is None
        else:
            torch.testing.assert_close(output.grad, torch.full((2, 3), 1 / 3))


def test_local_paths_average_survivors_and_skip_the_rest():
    """Step 2 keeps column 2 alone, step 4 columns 0 and 2: column 1 is not called."""
    block = randomise(FractalBlock(3, 3, 4, affine=True)).double().eval()
    x = image()
    called = []
    for module in block.columns[1]:
        module.register_forward_hook(lambda *_: called.append(1))
    deep = block.columns[2]
    expected = (F.max_pool2d(block.columns[0][0](x), 2) + F.max_pool2d(deep[3](deep[2](deep[1](deep[0](x)))), 2)) / 2
    torch.testing.assert_close(block(x, {1: [2], 2: [2], 3: [2], 4: [0, 2]}), expected)
    assert not called


def test_paths_that_lead_nowhere_are_not_computed():
    """The last join keeps column 0 alone: the others, alive up to there, are not called."""
    block = randomise(FractalBlock(3, 3, 4, affine=True)).double().eval()
    x, called = image(), []
    for column in (1, 2):
        for module in block.columns[column]:
            module.register_forward_hook(lambda *_: called.append(1))
    made = block(x, {1: [2], 2: [1, 2], 3: [2], 4: [0]})
    torch.testing.assert_close(made, F.max_pool2d(block.columns[0][0](x), 2))
    assert not called


def test_dropped_columns_keep_statistics_and_get_no_gradient():
    net, x = small(drop_path=0.15, global_ratio=1.0), image()
    torch.manual_seed(1)
    paths = net.draw_paths()
    (column,) = {c for block in paths for columns in block.values() for c in columns}
    torch.manual_seed(1)
    net(x).sum().backward()
    for block in net.blocks:
        for index, convs in enumerate(block.columns):
            for conv in convs:
                assert int(conv.norm.num_batches_tracked) == (index == column)
                assert (conv.conv.weight.grad is not None) == (index == column)


def test_global_column_is_the_same_everywhere_and_uniform():
    net = FractalNet(3, (2, 2, 2), drop_rates=(0, 0, 0), global_ratio=1.0)
    seen = []
    for _ in range(300):
        columns = {c for block in net.draw_paths() for alive in block.values() for c in alive}
        assert len(columns) == 1
        seen += columns
    for column in range(3):
        assert abs(seen.count(column) - 100) < 5 * math.sqrt(300 * 2 / 9)


def test_share_of_global_batches():
    net = FractalNet(3, (2,), drop_rates=(0,), drop_path=0.0, global_ratio=0.3)
    whole = net.blocks[0].joins()
    draws = sum(net.draw_paths()[0] != whole for _ in range(1000))
    assert abs(draws - 300) < 5 * math.sqrt(1000 * 0.3 * 0.7)


def test_local_survivors_have_the_published_probabilities():
    draws = 4000
    pairs = [draw_survivors([1, 2], 0.15) for _ in range(draws)]
    both = sum(kept == [1, 2] for kept in pairs)
    assert abs(both - draws * 0.7225) < 5 * math.sqrt(draws * 0.7225 * 0.2775)
    half = [draw_survivors([0, 1, 2], 0.5) for _ in range(draws)]
    assert all(half)
    # One survivor: drawn so (3/8), or put back because all were dropped (1/8).
    single = sum(len(kept) == 1 for kept in half)
    assert abs(single - draws / 2) < 5 * math.sqrt(draws / 4)
    assert {kept[0] for kept in half if len(kept) == 1} == {0, 1, 2}


def test_all_dropped_puts_one_back_at_random():
    kept = [draw_survivors([0, 1, 2], 1.0) for _ in range(300)]
    assert {len(k) for k in kept} == {1}
    for column in range(3):
        assert abs(kept.count([column]) - 100) < 5 * math.sqrt(300 * 2 / 9)


def test_paths_are_drawn_anew_and_a_seed_fixes_them():
    net, x = small(), image()
    drawn = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        drawn.append([net.draw_paths() for _ in range(8)])
    assert drawn[0] == drawn[1] != drawn[2]
    assert any(paths != drawn[0][0] for paths in drawn[0])
    torch.manual_seed(5)
    first = net(x)
    torch.manual_seed(5)
    assert torch.equal(net(x), first)


@pytest.mark.parametrize("doubling", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trains_and_reloads(doubling, dtype):
    options = {"widths": (4, 8), "num_classes": 5, "doubling": doubling}
    net = models.create("fractalnet", **options).to(dtype)
    x = torch.randn(4, 3, 9, 8, dtype=dtype)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.01)
    before = net.classifier.weight.detach().clone()
    loss = anytime_loss([y.float() for y in net.anytime(x)], torch.arange(4))
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())
    optimiser.step()
    assert loss.isfinite()
    assert not torch.equal(net.classifier.weight, before)
    copied = models.create("fractalnet", **options).to(dtype)
    copied.load_state_dict(net.state_dict())
    assert torch.equal(copied.eval()(x), net.eval()(x))


def as_gates(block: FractalBlock, paths) -> torch.Tensor:
    gates = torch.zeros_like(block.members())
    for step, columns in paths.items():
        gates[step - 1, list(columns)] = True
    return gates


@pytest.mark.parametrize("join_first", [False, True])
def test_gates_are_paths(join_first):
    """Outputs, gradients and running statistics of whatever training may draw."""
    nets = [randomise(small(join_first=join_first))]
    nets.append(copy.deepcopy(nets[0]))
    x = image()
    for seed in range(8):
        torch.manual_seed(seed)
        paths = nets[0].draw_paths()
        gates = [as_gates(block, p) for block, p in zip(nets[0].blocks, paths, strict=True)]
        outputs = [net(x, p) for net, p in zip(nets, (paths, gates), strict=True)]
        torch.testing.assert_close(outputs[1], outputs[0])
        for net, output in zip(nets, outputs, strict=True):
            net.zero_grad()
            output.square().sum().backward()
        for wanted, made in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            torch.testing.assert_close(made.grad, torch.zeros_like(made) if wanted.grad is None else wanted.grad)
        for wanted, made in zip(nets[0].buffers(), nets[1].buffers(), strict=True):
            torch.testing.assert_close(made, wanted)


def test_gates_are_drawn_like_paths():
    net = FractalNet(3, (2, 2), drop_rates=(0, 0), drop_path=0.3, global_ratio=0.4)
    members, draws, alone, pairs = net.blocks[0].members(), 1500, 0, 0
    for _ in range(draws):
        gates = net.draw_gates()
        assert not any((g & ~members).any() for g in gates)
        alone += not gates[0].any(1).all()  # steps that a column of the whole net passes over
    # Column 2 ends a convolution at every step and cannot be told from local paths.
    assert abs(alone - draws * 0.4 * 2 / 3) < 5 * math.sqrt(draws * 0.27 * 0.73)
    net.global_ratio = 1.0
    for _ in range(50):
        gates = net.draw_gates()
        assert {int(g.any(0).sum()) for g in gates} == {1}
        assert gates[0].equal(gates[1])
    for _ in range(draws):
        gates = net.blocks[0].draw_local_gates(0.3)
        assert gates.any(1).all()
        pairs += bool(gates[1].sum() == 2)
    assert abs(pairs - draws * 0.49) < 5 * math.sqrt(draws * 0.49 * 0.51)
    everyone = [net.blocks[0].draw_local_gates(1.0)[3].nonzero().flatten().tolist() for _ in range(300)]
    for column in range(3):
        assert abs(everyone.count([column]) - 100) < 5 * math.sqrt(300 * 2 / 9)


def test_training_compiles_as_one_graph():
    net, x = small(), image()
    torch._dynamo.reset()  # shapes that other tests compiled for would count as changing ones
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    outputs = [compiled(x) for _ in range(8)]
    outputs[-1].sum().backward()
    assert counter.frame_count == 1
    assert len({float(y.detach().sum()) for y in outputs}) > 1


def test_compiles_as_one_graph():
    net = small().eval()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = image()
    torch.testing.assert_close(compiled(x), net(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"columns": 0}, "FractalBlock: expected columns to be positive, got 0"),
        ({"drop_rates": (0.0,)}, "FractalNet: expected drop_rates to have one number for each of 2 widths, got 1"),
        ({"widths": (), "drop_rates": ()}, "FractalNet: expected drop_rates to have one number for each of 0 widths"),
        ({"drop_rates": (0.0, 2.0)}, "FractalBlock: expected drop_rate to be a probability"),
        ({"drop_path": 1.5}, "FractalNet: expected drop_path to be a probability"),
        ({"global_ratio": -0.5}, "FractalNet: expected global_ratio to be a probability"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


def test_wrong_inputs():
    net = small()
    with pytest.raises(ValueError, match=r"expected x to have at least 4 pixels a side, got \[2, 3, 3, 3\]"):
        net(image(3))
    with pytest.raises(ValueError, match="expected column to be at least 0 and below 3, got 3"):
        net.column(image(), 3)
