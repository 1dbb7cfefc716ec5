# SPDX-License-Identifier: Apache-2.0
"""The benchmark: workers, believed and disbelieved times, derived numbers, JSON and pictures."""

import copy
import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from fastdense._choices import COMPARED_IN_EVAL
from fastdense._support import InputError, write_json
from fastdense.bench import BenchConfig, BenchResult, Net, Row, SweepConfig, run_bench, run_sweep
from fastdense.bench.memory import mib_per_image
from fastdense.bench.nets import VARIANTS, build, cifar_densenet, plain_model
from fastdense.bench.plots import save_bench, save_sweep
from fastdense.bench.results import disagreement, median_ratio
from fastdense.bench.roofline import Ceilings, tensor_core_kernels, training_roofline
from fastdense.bench.run import count_ticks
from fastdense.bench.tables import bench_table
from fastdense.bench.worker import restored
from fastdense.cli.bench import make_config
from fastdense.cli.commands import make_parser

ROOT = Path(__file__).resolve().parents[1]

TINY = BenchConfig(
    net=Net("densenet_cifar", depth=10, growth_rate=4),
    variants=("plain", "balanced"),
    batch=2,
    size=16,
    steps=2,
    warmup=2,
    memory_batches=(),
    threads=1,
    timeout=120,
)


@pytest.fixture(scope="module")
def result(forked_workers) -> BenchResult:
    ticks = []
    measured = run_bench(dataclasses.replace(TINY, memory_batches=(2, 4), memory_steps=2), ticks.append)
    assert len(ticks) == count_ticks(measured.config)
    return measured


def test_a_run_gives_every_number(result):
    assert result.ok
    for row in result.rows:
        assert len(row.seconds) == 2
        assert row.loss_difference is not None
        assert row.loss_difference < 1e-3
        assert sorted(row.peaks) == [2, 4]
    assert result.time_baseline.variant == "plain"


def test_json_holds_samples_environment_and_arguments(result, tmp_path):
    write_json(tmp_path / "out.json", result.to_json())
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["kind"] == "bench"
    assert found["arguments"]["net"]["depth"] == 10
    assert {"cpu", "threads", "versions", "commit", "build"} <= found["environment"].keys()
    assert [row["variant"] for row in found["rows"]] == ["plain", "balanced"]
    assert all(len(row["seconds"]) == 2 for row in found["rows"])


def test_plot_is_a_picture(result, tmp_path):
    save_bench(result, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize(("fault", "reason"), [("loss", "losses disagree"), ("raise", "planted fault"), ("kill", "")])
def test_a_faulty_variant_gives_a_reason_and_no_time(fault, reason):
    result = run_bench(dataclasses.replace(TINY, faults={"balanced": fault}))
    plain, faulty = result.rows
    assert not result.ok
    assert len(plain.seconds) == 2
    assert faulty.seconds == []
    assert faulty.time_error
    assert reason in faulty.time_error


@pytest.mark.usefixtures("forked_workers")
def test_other_engines_and_frozen_weights_in_eval_mode():
    names = ("plain", "balanced", "frozen", "onnxruntime")
    result = run_bench(dataclasses.replace(TINY, variants=names, mode="eval"))
    assert [row.time_error for row in result.rows] == [None] * 4
    assert all(row.loss_difference is not None and row.loss_difference < 1e-4 for row in result.rows)


@pytest.mark.parametrize("name", ["frozen", "onnxruntime"])
def test_what_only_infers_does_not_train(name):
    options = ["bench", "--model=densenet_cifar", f"--variants=plain,{name}"]
    with pytest.raises(InputError, match=f"expected --mode eval, --device cpu and --dtype float32 with {name}"):
        make_config(make_parser().parse_args(options))


def test_against_adds_engines_to_what_is_compared_in_eval_mode():
    config = make_config(make_parser().parse_args(["bench", "--mode=eval", "--against=onnxruntime,compile"]))
    assert config.variants == (*COMPARED_IN_EVAL, "onnxruntime", "compile")


@pytest.mark.parametrize(("model", "is_frozen"), [("dpn68", True), ("dpn68b", False), ("densenet121", True)])
def test_what_cannot_be_frozen_is_not_unless_asked(model, is_frozen):
    config = make_config(make_parser().parse_args(["bench", "--mode=eval", f"--model={model}"]))
    assert config.variants == tuple(name for name in COMPARED_IN_EVAL if name != "frozen" or is_frozen)


@pytest.mark.usefixtures("forked_workers")
def test_a_budget_is_a_variant():
    config = dataclasses.replace(TINY, variants=("plain", "budget"), budget="1GiB")
    measured = run_bench(config)
    assert measured.ok
    assert [row.variant for row in measured.rows] == ["plain", "budget"]
    refused = run_bench(dataclasses.replace(config, budget="1kB"))
    assert not refused.ok
    assert "not even one image fits" in str(refused.rows[1].time_error)


@pytest.mark.usefixtures("forked_workers")
def test_sweep_measures_and_draws(tmp_path):
    result = run_sweep(SweepConfig(dataclasses.replace(TINY, variants=("plain", "min"), memory_steps=2), (10, 16)))
    assert result.ok
    assert [point.depth for point in result.line("min")] == [10, 16]
    save_sweep(result, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_slope_and_ratios_are_plain_arithmetic():
    assert mib_per_image({4: 100.0, 12: 180.0}) == pytest.approx(10.0)
    assert median_ratio([2.0, 3.0, 8.0], [1.0, 1.0, 2.0]) == 3.0
    assert median_ratio([], [1.0]) is None
    assert disagreement([1.0, 2.0], [1.0, 2.001], "float32") is None
    assert "step 2" in (disagreement([1.0, 2.0], [1.0, 3.0], "float32") or "")
    assert "step 1" in (disagreement([float("nan")], [1.0], "float32") or "")


def test_the_better_plain_layout_is_the_baseline():
    rows = [Row("plain", seconds=[3.0]), Row("plain-channels-last", seconds=[2.0]), Row("balanced", seconds=[1.0])]
    result = BenchResult(TINY, {}, "", [], rows)
    assert result.time_baseline is rows[1]
    assert result.summary(rows[2])["time_ratio"] == 0.5


def test_cifar_net_is_the_published_one():
    parameters = sum(p.numel() for p in cifar_densenet(Net("densenet_cifar", depth=100)).parameters())
    assert parameters == 769_162
    with pytest.raises(InputError, match="6 n \\+ 4"):
        cifar_densenet(Net("densenet_cifar", depth=41))


@pytest.mark.parametrize("net", [TINY.net, Net("dpn48b", num_classes=2)], ids=lambda net: net.name)
def test_variants_share_weights_and_only_fastdense_is_converted(net):
    import torch

    from fastdense.fusion.base import FusedModule

    states = []
    for name, variant in VARIANTS.items():
        if variant.timm:  # which knows the published networks only
            continue
        torch.manual_seed(0)
        if name == "reversible" and net.is_cifar:
            with pytest.raises(InputError, match="a memory mode of DenseNet-BC"):
                build(net, variant)
            continue
        model = build(net, variant)
        states.append(model.state_dict())
        assert any(isinstance(m, FusedModule) for m in model.modules()) == (variant.memory is not None), name
    for state in states[1:]:
        assert all(torch.equal(state[key], states[0][key]) for key in states[0])


def test_timm_model_has_the_weights_of_torchvision():
    import torch

    net = Net("densenet121", num_classes=5)
    torch.manual_seed(0)
    expected = plain_model(net).eval()
    torch.manual_seed(0)
    model = build(net, VARIANTS["timm"]).eval()
    x = torch.randn(1, 3, 32, 32)
    assert type(model) is not type(expected)
    torch.testing.assert_close(model(x), expected(x))
    with pytest.raises(InputError, match="a torchvision network for the timm variants, got DenseNet-BC"):
        build(TINY.net, VARIANTS["timm"])


def test_floors_agree_with_sums_by_hand():
    """One layer of a network with one layer a block, and what the modes add."""
    ceilings = Ceilings(1e12, 1e30)
    net = Net("densenet_cifar", depth=10, growth_rate=4)
    floors = {name: training_roofline(net, VARIANTS[name], 2, 16, 2, ceilings) for name in ("plain", "balanced", "min")}
    assert all(floor.seconds == pytest.approx(floor.bytes / 1e12) for floor in floors.values())
    # min: one more product a layer, from c to 16 channels, at 16, 8 and 4 pixels a side with c = 8, 6, 5
    more = sum(2 * side * side * (c + 16) for side, c in ((16, 8), (8, 6), (4, 5)))
    assert floors["min"].bytes - floors["balanced"].bytes == 2 * more
    assert floors["plain"].bytes > 1.5 * floors["balanced"].bytes
    # fused kernels: 4 c + 16 b + 8 k numbers a pixel and layer become 4 c + 9 b + 6 k
    fused = training_roofline(net, VARIANTS["balanced"], 2, 16, 2, ceilings, tensor_cores=True)
    less = sum(2 * side * side * (7 * 16 + 2 * 4) for side in (16, 8, 4))
    assert floors["balanced"].bytes - fused.bytes == 2 * less
    assert training_roofline(net, VARIANTS["compile"], 2, 16, 2, ceilings) is None
    # The arithmetic is that of the network: three products for every multiply-add of the forward pass.
    densenet121 = training_roofline(Net("densenet121"), VARIANTS["plain"], 1, 224, 4, ceilings)
    assert densenet121.flops == pytest.approx(6 * 2.83e9, rel=0.05)


def test_table_shows_the_share_of_the_floor():
    rows = [Row("plain", seconds=[2e-6]), Row("compile", seconds=[2e-6]), Row("min", time_error="failed")]
    config = dataclasses.replace(TINY, variants=("plain", "compile", "min"))
    result = BenchResult(config, {}, "", [], rows, Ceilings(1e12, 1e15))
    floor = training_roofline(config.net, VARIANTS["plain"], config.batch, config.size, 4, result.ceilings)
    assert result.summary(rows[0])["floor_share"] == pytest.approx(floor.seconds / 2e-6)
    assert result.summary(rows[0])["gb_per_second"] == pytest.approx(floor.bytes / 2e-6 / 1e9)
    assert result.summary(rows[1])["floor_share"] is None
    assert [column.header for column in bench_table(result).columns][-2:] == ["GB/s", "of floor"]
    assert bench_table(result).row_count == 3


def test_steps_are_undone_before_a_graph_is_replayed():
    import torch

    def losses(model, optimizer, steps):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
        found = []
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            loss = model(x).square().sum()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    twin = copy.deepcopy(model)
    with restored(model, optimizer):
        losses(model, optimizer, 3)
    other = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    assert losses(model, optimizer, 3) == losses(twin, other, 3)
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in model.state_dict().items())


def test_unknown_model_lists_the_known_ones():
    with pytest.raises(InputError, match="densenet121"):
        plain_model(Net("densenet999"))


def test_rates_of_kernels():
    """Of a layer of 64 channels with growth rate 32, at 1000 pixels."""
    from benchmarks.cuda_kernels import Layer, rate, table

    ceilings = Ceilings(1e12, 1e14)
    times = [("void fastdense::conv1x1_kernel<bfloat16, 1>(Params)", 4.0), ("elementwise_kernel", 2.0)]
    product, other = rate(times, 1000, 64, 32, ceilings)
    moved, computed = 2 * 1000 * (64 + 128), 1000 * 2 * 64 * 128
    assert product.gb_per_second == pytest.approx(moved / 4e-6 / 1e9)
    assert product.tflop_per_second == pytest.approx(computed / 4e-6 / 1e12)
    assert product.floor_share == pytest.approx(max(moved / 1e12, computed / 1e14) / 4e-6)
    assert other.gb_per_second is None
    text = table(Layer(56, 64, 32, [product, other], {"fused": 6.0, "library": 9.0}))
    assert "| conv1x1_kernel | 4.0 | 96 | 4.1 | 0.10 |" in text
    assert "6 us fused, 9 us by the library" in text


def test_the_roofline_knows_kernels_by_their_names():
    """A layer's kernels, or what a column reduction reduces."""
    sources = "".join(path.read_text() for path in (ROOT / "csrc").rglob("*.cu"))
    for name in tensor_core_kernels(64, 128, 32):
        assert re.search(rf"\b{name}\b", sources), name


def test_every_operator_has_a_benchmark():
    """Results are compared where the benchmark makes its runs."""
    from benchmarks.bench_operators import CASES, make_runs

    elsewhere = {"dense_block", "dense_block_inference", "pack_dense_block", "bicubic"}  # in files of their own
    elsewhere.add("dual_path_split")  # the merge's backward
    elsewhere |= {"dual_path_stage_inference", "pack_dual_path_stage"}  # with the networks, as "frozen"
    names = [name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastdense::")]
    assert {name.split()[0] for name in CASES} | elsewhere == {name for name in names if not name.startswith("_")}
    for name in CASES:
        for runs in make_runs(name, "channels_last", batch=1).values():
            assert set(runs) == {"torch", "fastdense"}
