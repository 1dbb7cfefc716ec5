# SPDX-License-Identifier: Apache-2.0
"""Plans of memory: what they promise is what a step takes, and no other choice is better."""

import copy
import itertools
import json
import random

import pytest
import timm
import torch
from torch import Tensor, nn

import fastdense
from fastdense._C import AllocationTape
from fastdense.cli import main
from fastdense.memory import rivals
from fastdense.memory.choice import Option, Problem, cheapest, least_peak, pareto_front
from fastdense.memory.plan import InsufficientMemory, largest_batch, memory_front, plan_memory
from fastdense.memory.sizes import device_memory, read_budget, show_bytes
from fastdense.memory.tape import Part
from tests.cases.converted import fastdense_warnings
from tests.cases.monai import monai_net

pytestmark = [pytest.mark.filterwarnings("error:fastdense"), pytest.mark.usefixtures("one_thread")]


def dpn() -> nn.Module:
    net = timm.models.dpn.DPN((2, 2, 2, 2), (8,) * 4, k_r=8, groups=2, num_classes=5, small=True, num_init_features=8)
    return fastdense.convert(net)


NETWORKS = {
    "DenseNet-BC": (lambda: fastdense.models.densenet_cifar(22), (3, 32, 32)),
    "DPN": (dpn, (3, 64, 64)),
    "FC-DenseNet": (lambda: fastdense.models.create("fc_densenet56", num_classes=3), (3, 32, 32)),
    "RRDBNet": (lambda: fastdense.models.create("rrdbnet", blocks=1, width=16), (3, 12, 12)),
    "MONAI 3-D": (lambda: fastdense.convert(monai_net().float()), (1, 24, 20, 28)),
}


def made(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    return make().train(), shape


def measured_peak(model: nn.Module, x: Tensor) -> int:
    """The most bytes in use in a step: images and weights, an optimizer's state as large as these, and the step."""
    for parameter in model.parameters():
        parameter.grad = None
    with AllocationTape("cpu") as tape:
        model(x).mean().backward()
    parameters = sum(p.nbytes for p in model.parameters())
    buffers = sum(b.nbytes for b in model.buffers())
    return 2 * parameters + buffers + x.nbytes + max(itertools.accumulate(tape.bytes))


@pytest.mark.parametrize("name", NETWORKS)
def test_counted_plans_are_the_same_every_time(name):
    model, shape = made(name)
    front = memory_front(model, shape, batch_size=4, measure=False)
    assert memory_front(copy.deepcopy(model), shape, batch_size=4, measure=False) == front
    budget = (front[0][0] + front[-1][0]) // 2
    plans = [
        plan_memory(net, shape, batch_size=4, budget=budget, measure=False) for net in (model, copy.deepcopy(model))
    ]
    assert plans[0].to_dict() == plans[1].to_dict()
    assert plans[0].peak_bytes <= budget


def test_what_is_computed_again_is_counted():
    """A block of one layer by hand: 3 channels, 8 of the bottleneck, 4 new ones, 30 pixels an image."""
    model = nn.Sequential(fastdense.nn.DenseBlock(1, 3, 4, bn_size=2)).train()
    plan = plan_memory(model, (3, 5, 6), batch_size=2, budget="1GiB", measure=False)
    seconds = plan.rows[0].seconds_by_mode
    conv1, conv2 = (2 * 2 * 30 * products for products in (3 * 8, 8 * 4 * 9))
    assert seconds["balanced"] == pytest.approx(3 * (conv1 + conv2) / 1e11)  # forward, and both gradients
    assert seconds["min"] == pytest.approx(seconds["balanced"] + conv1 / 1e11)
    assert seconds["recompute"] == pytest.approx(seconds["balanced"] + (2 * conv1 + conv2) / 1e11)


@pytest.mark.parametrize("batch", [4, 20])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_takes_what_the_plan_promises(name, batch):
    model, shape = made(name)
    x = torch.randn(batch, *shape)
    front = memory_front(model, shape, batch_size=batch)
    least, most = front[-1][0], front[0][0]
    assert least <= most
    for at in range(5):
        budget = least + (most - least) * at // 4
        plan = plan_memory(model, shape, batch_size=batch, budget=budget)
        plan.apply()
        peak = measured_peak(model, x)
        assert peak <= plan.peak_bytes <= budget
        assert plan.peak_bytes <= 1.02 * peak


def test_a_plan_leaves_the_model_and_the_generator_alone():
    model, shape = made("DenseNet-BC")
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    plan = plan_memory(model, shape, batch_size=2, budget="1GiB")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    twin = fastdense.models.densenet_cifar(22, memory="min")
    plan.apply(twin)
    assert {module.memory for module in twin.modules() if hasattr(module, "memory")} == {*plan.modes.values()}


def test_frozen_models_and_no_optimizer():
    model, shape = made("DenseNet-BC")
    whole = plan_memory(model, shape, batch_size=2, budget="1GiB")
    without = plan_memory(model, shape, batch_size=2, budget="1GiB", optimizer_state=0)
    weights = sum(p.nbytes for p in model.parameters())
    assert whole.fixed_bytes - without.fixed_bytes == weights
    model.eval().requires_grad_(False)
    model.classifier.requires_grad_(True)
    with pytest.raises(ValueError, match="run backward"):
        plan_memory(model, shape, batch_size=2, budget="1GiB")


def test_too_small_a_budget_says_what_would_do():
    model, shape = made("DenseNet-BC")
    with pytest.raises(InsufficientMemory, match=r"at least .* the largest batch that fits is") as caught:
        plan_memory(model, shape, batch_size=64, budget="30MB")
    least, fits = caught.value.least, caught.value.largest_batch
    assert plan_memory(model, shape, batch_size=64, budget=least).peak_bytes <= least
    assert 0 < fits < 64
    assert largest_batch(model, shape, budget="30MB") == fits
    assert plan_memory(model, shape, batch_size=fits, budget="30MB").peak_bytes <= 30e6
    with pytest.raises(InsufficientMemory):
        plan_memory(model, shape, batch_size=fits + 1, budget="30MB")
    with pytest.raises(InsufficientMemory, match="not even one image fits"):
        plan_memory(model, shape, batch_size=1, budget="1kB")
    assert largest_batch(model, shape, budget=1000) == 0


def test_autocast_and_a_loss_of_ones_own():
    model, shape = made("DenseNet-BC")
    x = torch.randn(4, *shape)
    plan = plan_memory(
        model, shape, batch_size=4, budget="1GiB", dtype=torch.bfloat16, loss=lambda out: out.float().square().sum()
    )
    plain = plan_memory(model, shape, batch_size=4, budget="1GiB")
    assert plan.peak_bytes < plain.peak_bytes
    assert plan.to_dict()["batch_size"] == 4
    assert x.shape[0] == plan.batch_size


def test_reversible_is_chosen_by_wish_alone():
    model, shape = made("DPN")
    exact = plan_memory(model, shape, batch_size=2, budget="1GiB")
    free = plan_memory(model, shape, batch_size=2, budget="1GiB", exact=False)
    assert all("reversible" not in row.kept_by_mode for row in exact.rows)
    assert all("reversible" in row.kept_by_mode for row in free.rows)


def test_what_is_printed():
    model, shape = made("DenseNet-BC")
    plan = plan_memory(model, shape, batch_size=2, budget="1GiB")
    text = str(plan)
    for block in ("features.denseblock1", "features.denseblock3"):
        assert block in text
    assert "batch 2: peak" in text
    assert json.loads(json.dumps(plan.to_dict()))["rows"][0]["blocks"] == ["features.denseblock1"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.5}, "batch_size to be an integer of at least 1, got 2.5"),
        ({"batch_size": True}, "batch_size to be an integer of at least 1, got True"),
        ({"budget": "eight"}, "budget"),
        ({"budget": -1}, "budget"),
        ({"budget": "0%"}, "budget"),
        ({"budget": "101%"}, "budget to be at most 100% of the device's memory, got '101%'"),
        ({"input_shape": 32}, r"input_shape to be \[channels, spatial\] of one image, got 32"),
        ({"input_shape": (3, 0, 32)}, "input_shape"),
        ({"input_shape": ()}, "input_shape"),
        ({"optimizer_state": -1.0}, "optimizer_state"),
        ({"optimizer_state": "adam"}, "optimizer_state to be a number of at least 0, got 'adam'"),
    ],
)
def test_bad_arguments(change, message):
    model, shape = made("DenseNet-BC")
    arguments = {"input_shape": shape, "batch_size": 2, "budget": "1GiB"} | change
    with pytest.raises(ValueError, match=message):
        plan_memory(model, arguments.pop("input_shape"), **arguments)


def test_what_cannot_be_trained_has_no_plan():
    model, shape = made("DenseNet-BC")
    with pytest.raises(TypeError, match="expected loss to be a function of the model's output, got 3"):
        plan_memory(model, shape, batch_size=2, budget="1GiB", loss=3)
    with pytest.raises(ValueError, match="expected model to have parameters that require grad, got none"):
        largest_batch(model.requires_grad_(False), shape, budget="1GiB")


def test_plans_are_of_the_model_as_it_is():
    model, shape = made("MONAI 3-D")
    assert plan_memory(model, shape, batch_size=2, budget="1GiB").rows
    fastdense.restore(model)
    with pytest.raises(ValueError, match="fused blocks"):
        plan_memory(model, shape, batch_size=2, budget="1GiB")
    with pytest.raises(TypeError, match="expected options out of optimizer_state"):
        largest_batch(model, shape, budget="1GiB", optimiser_state=2.0)


@pytest.mark.parametrize("memory", ["min", "balanced"])
def test_dual_path_blocks_that_no_operator_runs_keep_their_mode(memory):
    stage = fastdense.nn.DualPathStage(2, 8, 4, 4, 2, act="silu", memory=memory)
    model = nn.Sequential(fastdense.nn.DenseBlock(1, 4, 4), stage)
    with fastdense_warnings() as messages:
        plan = plan_memory(model, (4, 8, 8), batch_size=2, budget="1GiB", measure=False)
    assert {"runs as plain modules" in message for message in messages} == ({True} if memory == "balanced" else set())
    assert [row.blocks for row in plan.rows] == [("0",)]
    plan.apply()
    assert {block.memory for block in stage} == {memory}


def test_what_has_no_blocks_has_no_plan():
    with pytest.raises(ValueError, match="fused blocks"):
        plan_memory(nn.Linear(2, 2), (2,), batch_size=2, budget="1GiB")
    with pytest.raises(TypeError, match="plan_memory"):
        plan_memory("net", (2,), batch_size=2, budget="1GiB")


def test_errors_begin_with_the_function():
    plain, shape = nn.Conv2d(3, 3, 1), (3, 32, 32)
    model = fastdense.models.densenet_cifar(10)
    for ask, options in ((plan_memory, {"batch_size": 2}), (largest_batch, {})):
        for budget in ("eight", "101%", 0, True):
            with pytest.raises(ValueError, match=f"^{ask.__name__}: expected budget to be"):
                ask(model, shape, budget=budget, **options)
        with pytest.raises(ValueError, match=f"^{ask.__name__}: expected model to have fused blocks"):
            ask(plain, shape, budget="1GiB", **options)
    for ask, options in ((plan_memory, {"budget": "1GiB"}), (memory_front, {})):
        for batch in (0, True, 2.0):
            with pytest.raises(ValueError, match=f"^{ask.__name__}: expected batch_size to be an integer"):
                ask(model, shape, batch_size=batch, **options)


def test_a_model_of_unknown_sizes_is_refused():
    model = nn.Sequential(fastdense.nn.DenseBlock(1, 4, 4), nn.Flatten(), nn.LazyLinear(2))
    with pytest.raises(ValueError, match=r"^plan_memory: expected a model that has run once, as 2\.weight"):
        plan_memory(model, (4, 8, 8), batch_size=2, budget="1GiB")
    with pytest.raises(ValueError, match=r"^report: expected a model that has run once, as 2\.weight"):
        fastdense.report(model, (4, 8, 8))
    model(torch.zeros(2, 4, 8, 8))
    assert fastdense.report(model, (4, 8, 8)).kept_bytes


def test_blocks_that_run_twice_are_refused():
    block = fastdense.nn.DenseBlock(2, 8, 4)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.conv = block, nn.Conv2d(16, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.conv(self.block(x)))

    with pytest.raises(ValueError, match="more than once"):
        plan_memory(Twice(), (8, 6, 6), batch_size=2, budget="1GiB")


# The choice itself, against all choices.


def random_problem(chance: random.Random) -> Problem:
    options = []
    for _ in range(chance.randint(1, 5)):
        left = chance.randint(0, 5)
        of_unit = []
        for mode in ("balanced", "min", "recompute")[: chance.randint(1, 3)]:
            kept, above = chance.randint(0, 20), chance.randint(0, 20)
            forward = Part((kept + above, -above), chance.random())
            backward = Part((chance.randint(0, 20), 0), chance.random())
            backward = Part((*backward.changes, left - kept - backward.net), backward.seconds)
            of_unit.append(Option(mode, forward, backward))
        options.append(tuple(of_unit))
    return Problem(
        tuple((str(at),) for at in range(len(options))), tuple(options), Part((chance.randint(0, 5), -1), 0.0)
    )


def all_choices(problem: Problem) -> list[tuple[int, float, tuple[str, ...]]]:
    found = []
    for chosen in itertools.product(*problem.options):
        parts = [option.forward for option in chosen] + [problem.turn] + [option.backward for option in chosen[::-1]]
        peak = max(0, *itertools.accumulate(change for part in parts for change in part.changes))
        found.append((peak, sum(option.seconds for option in chosen), tuple(option.memory for option in chosen)))
    return found


@pytest.mark.parametrize("seed", range(40))
def test_the_choice_is_the_best_of_all(seed):
    problem = random_problem(random.Random(seed))
    everything = all_choices(problem)
    peaks = sorted({peak for peak, _, _ in everything})
    assert least_peak(problem) == peaks[0]
    assert cheapest(problem, peaks[0] - 1) is None
    for budget in peaks:
        best = min(seconds for peak, seconds, _ in everything if peak <= budget)
        chosen = cheapest(problem, budget)
        assert any(c == chosen and p <= budget and s == pytest.approx(best) for p, s, c in everything)
    by_choice = {chosen: (peak, seconds) for peak, seconds, chosen in everything}
    front = [by_choice[chosen] for chosen in pareto_front(problem)]
    assert front[-1][0] == peaks[0]
    for (peak, seconds), (lower, slower) in itertools.pairwise(front):
        assert lower < peak and slower >= seconds
    for peak, seconds, _ in everything:
        assert any(p <= peak and s <= seconds + 1e-12 for p, s in front)


# Amounts.


@pytest.mark.parametrize(
    "text, expected",
    [
        ("8GiB", 8 * 2**30),
        ("1.5 GB", 1_500_000_000),
        ("500M", 500 * 2**20),
        ("2kb", 2000),
        ("77", 77),
        (3.0, 3),
        (5, 5),
    ],
)
def test_budgets(text, expected):
    assert read_budget("op", text, torch.device("cpu")) == expected


def test_a_share_of_the_device():
    whole = device_memory(torch.device("cpu"))
    assert read_budget("op", "50%", torch.device("cpu")) == int(whole / 2)
    assert whole > 2**27
    assert show_bytes(3 * 2**30) == "3.00 GiB"
    assert show_bytes(2**19) == "0.5 MiB"


# The command.


def test_command(capsys, tmp_path):
    picture = tmp_path / "plan.png"
    model = ["plan", "--model", "densenet_cifar", "--depth", "22"]
    arguments = [*model, "--batch", "4", "--budget", "1GiB"]
    assert main([*arguments, "--plot", str(picture)]) == 0
    assert "features.denseblock1" in capsys.readouterr().out
    assert picture.stat().st_size > 1000
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["batch_size"] == 4
    assert main([*model, "--budget", "25MB", "--largest-batch", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["batch_size"] > 4


def test_plain_modules_and_checkpoints_beside_a_plan():
    plain = fastdense.restore(fastdense.models.densenet_cifar(22)).train()
    front = memory_front(fastdense.convert(copy.deepcopy(plain)), (3, 32, 32), batch_size=12)
    blocks = [f"features.denseblock{index}" for index in (1, 2, 3)]
    steps = rivals.rival_steps(plain, blocks, (3, 32, 32), batch_size=12)
    assert [step.name for step in steps] == ["plain", "checkpoint"]
    assert steps[0].peak_bytes > front[0][0]  # any plan saves memory
    assert steps[1].peak_bytes < steps[0].peak_bytes
    assert all(step.step_seconds > 0 for step in steps)
    # A batch that is run, and the same one from smaller ones.
    with AllocationTape("cpu") as tape:
        plain(torch.randn(12, 3, 32, 32)).mean().backward()
    parameters = sum(p.nbytes for p in plain.parameters())
    fixed = 2 * parameters + sum(b.nbytes for b in plain.buffers()) + 12 * 3 * 32 * 32 * 4
    assert steps[0].peak_bytes == pytest.approx(fixed + max(itertools.accumulate(tape.bytes)), rel=0.02)


def test_torch_compile_beside_a_plan(monkeypatch):
    monkeypatch.setattr(rivals, "COMPILE_BUDGETS", (0.5,))
    plain = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))
    *_, step = rivals.rival_steps(plain, [], (8,), batch_size=2, compiled=True)
    assert step.name == "compile, budget 0.5"
    assert step.peak_bytes > 2 * sum(parameter.nbytes for parameter in plain.parameters())
    assert step.step_seconds > 0
    assert all(parameter.grad is None for parameter in plain.parameters())


def test_command_says_what_fits(capsys):
    arguments = ["plan", "--model", "densenet_cifar", "--depth", "22", "--batch", "64", "--budget", "30MB"]
    assert main(arguments) == 2
    assert "largest batch that fits" in capsys.readouterr().err
    assert main([*arguments[:-1], "eight"]) == 2
    assert 'like "8GiB"' in capsys.readouterr().err
