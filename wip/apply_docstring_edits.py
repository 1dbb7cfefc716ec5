#!/usr/bin/env python3
"""Rewrites docstrings and error messages in plain words, wherever their files lie now.

    python /work/wt/apply_docstring_edits.py [ROOT] [--dry-run]

ROOT is a checkout of fastdense (default: the current folder). Each edit is a pair (old, new). The old text is looked for
in all .py, .h, .cpp and .cu files under fastdense/ and csrc/, whatever its indentation and line breaks, and replaced
where it occurs exactly once (or as often as the edit says). What is not found, or found more often, is printed and left
alone; what was applied before is counted and left alone. With each edit go pairs for tests/, README.md and docs/ that
match its message; they are replaced everywhere there, if the edit was or is applied.

Afterwards: ruff format, clang-format, ruff check, mypy, and the tests that it names at the end.
"""

import re
import sys
import textwrap
from pathlib import Path

# (old, new, {"times": n, "tests": [(old, new), ...]})
EDITS: list[tuple] = []
WIDTH = 120


def edit(old: str, new: str, *tests: tuple[str, str], times: int = 1) -> None:
    EDITS.append((old.strip("\n"), new.strip("\n"), times, tests))


# --- convert, restore, report -----------------------------------------------------------------------------------------

edit(
    "Makes the dense and dual path blocks of an existing model fast, in place, and plain again.",
    "Converts the dense and dual path blocks of an existing model in place to fused ones, and back.",
)
edit(
    "Lets every dense block of ``model`` run on one shared buffer, and every dual path stage on its output.",
    "Converts the dense and dual path blocks of ``model`` in place, so that they run on shared buffers.",
)
edit(
    """
    Finds the dense blocks and transitions of torchvision, timm and MONAI DenseNets, the blocks of the dual path
    networks of timm, segmentation_models_pytorch and pretrainedmodels, and those of models that contain them. Dense
    blocks and residual dense blocks of any other classes are found by the widths of their layers, and fused where a
    trial on random numbers, on a copy, gives the results of such a block. A module only changes its class: parameters,
    buffers, hooks, ``state_dict`` keys and outputs stay what they are, an existing optimizer keeps working.
    """,
    """
Dense blocks and transitions of torchvision, timm and MONAI are recognised by class, and so are dual path blocks of
timm, segmentation_models_pytorch and pretrainedmodels. Dense blocks and residual dense blocks of any other class
are recognised by their channel pattern. They are fused if they pass a numerical check: on a copy, outputs and
gradients must agree with the definition of such a block.

Only the class of a module changes. Parameters, buffers, hooks, ``state_dict`` keys and outputs stay the same. An
existing optimizer keeps working.
""",
)
edit(
    """
        memory: "balanced" (default) keeps the outputs inside the bottlenecks for the backward pass, "min" computes them
            again, "reversible", for dual path blocks alone, computes the residual path again. A converted model may be
            converted again to change it.
    """,
    """
memory: "balanced" (default) saves the outputs inside the bottlenecks for backward, "min" recomputes them.
    "reversible", for dual path blocks only, reconstructs the residual path from its final value. Convert again
    to change the mode.
""",
)
edit(
    """
        What cannot be fused (another norm or activation, a convolution with bias, hooks on inner modules ...) stays
        plain, with one warning that names the module and the reason. See :func:`restore`.
    """,
    """
Modules that cannot be fused (another norm or activation, a convolution with bias, hooks on inner modules ...)
stay plain. One warning names the module and the reason. See :func:`restore`.
""",
)
edit(
    """
            f"convert: expected model to contain residual dense blocks, dense or dual path blocks "
            f"(looked for {looked_for}, and for layers that read all earlier features), got {type(model).__name__}"
    """,
    '''
f"convert: expected model to contain dense, residual dense or dual path blocks, got {type(model).__name__} "
f"with none (looked for {looked_for}, and for layers that read all earlier features)"
''',
)
edit("Gives the plain modules of a converted model back, in place.", "Turns a converted model back into plain modules, in place.")
edit(
    "Models of :mod:`fastdense.models` become plain PyTorch as well; :func:`convert` makes them fast again.",
    "Models of :mod:`fastdense.models` become plain PyTorch as well; :func:`convert` converts them again.",
)
edit("What runs fused in a model, what runs plainly, and why.", "Reports which modules of a model run fused, which run plain, and why.")
edit(
    "The rows, and the bytes kept for the backward pass of one image, plainly and as the model is now.",
    "The rows, and the bytes saved for backward per image: by plain modules, and by the model as it is now.",
)
edit("What the model as it is now keeps less for one image.", "How many bytes fewer the model saves for backward than plain modules, per image.")
edit("Kept to plain: 0.25 where a quarter is kept.", "``kept_bytes / plain_bytes``: 0.25 if a quarter is saved for backward.")
edit(
    "Lists the dense blocks, transitions and dual path blocks of a model; ``print`` shows it as a table.",
    "Lists the dense blocks, transitions and dual path blocks of a model; ``print`` shows a table.",
)
edit(
    """
        model: converted or not; left as it is. A reason is the one of this moment: hooks that are removed or a mode
            that changes later change it.
        input_shape: of one image, ``[channels, spatial]``. With it, the bytes that a training step keeps for its
            backward pass are counted, on a copy without memory.
    """,
    """
model: converted or not; it is not changed. Reasons describe the model as it is now; they change with hooks and
    training mode.
input_shape: of one image, ``[channels, spatial]``. If given, the bytes that a training step saves for backward
    are counted, on a copy on the meta device.
""",
)
edit(
    '''
                f"kept for the backward pass of one image: {kept:.1f} MiB, plainly {plain:.1f} MiB "
                f"(ratio {self.kept_ratio:.2f}, {saved:.1f} MiB saved)"
    ''',
    '''
f"saved for backward, per image: {kept:.1f} MiB; by plain modules: {plain:.1f} MiB "
f"(ratio {self.kept_ratio:.2f}, {saved:.1f} MiB less)"
''',
    (
        "MiB, plainly 124.3 MiB (ratio 0.21, 98.3 MiB saved)\")",
        "MiB; by plain modules: 124.3 MiB (ratio 0.21, 98.3 MiB less)\")",
    ),
    (
        "kept for the backward pass of one image: 26.0 MiB, plainly 124.3 MiB (ratio 0.21, 98.3 MiB saved)",
        "saved for backward, per image: 26.0 MiB; by plain modules: 124.3 MiB (ratio 0.21, 98.3 MiB less)",
    ),
)
edit(
    "kept for the backward pass of one image: ... MiB, plainly ... MiB (ratio 0..., ... MiB saved)",
    "saved for backward, per image: ... MiB; by plain modules: ... MiB (ratio 0..., ... MiB less)",
)
edit('reason = "its class has a forward of its own"', 'reason = "its class overrides forward"')

# --- why a block stays plain --------------------------------------------------------------------------------------------

edit(
    '"forward-mode derivatives go through plain modules only"',
    '"only plain modules support forward-mode derivatives"',
)
edit(
    '"forward-mode derivatives and function transforms go through plain modules only"',
    '"only plain modules support forward-mode derivatives and function transforms"',
)
edit('"the operator knows no such pool or mix of types"', '"the fused operator does not support this pool or mix of dtypes"')
edit('"a batch of nothing has no statistics"', '"empty batch: no batch statistics"')
edit(
    '"its norms share batch statistics with different processes"',
    '"its norms belong to different process groups"',
    ("its norms share batch statistics with different processes", "its norms belong to different process groups"),
)
edit(
    'f"{name} has hooks, a parametrization or a forward of its own"',
    'f"{name} has hooks, a parametrization or an overridden forward"',
    ("hooks, a parametrization or a forward of its own", "hooks, a parametrization or an overridden forward"),
    ('"denselayer1", "forward of its own"', '"denselayer1", "overridden forward"'),
)
edit(
    '"it has a forward of its own"',
    '"its forward was replaced on the instance"',
    ("it has a forward of its own", "its forward was replaced on the instance"),
)
edit(
    'f"{where}stochastic_depth drops single samples"',
    'f"{where}stochastic_depth drops per sample"',
    ("stochastic_depth drops single samples", "stochastic_depth drops per sample"),
)
edit(
    'f"{where}dropout is a {type(dropout).__name__}, not a Dropout of single features"',
    'f"{where}dropout is a {type(dropout).__name__}, not an nn.Dropout"',
    ("not a Dropout of single features", "not an nn.Dropout"),
)
edit(
    "not the known norm and ReLU in front of a convolution",
    "expected a norm and ReLU before a convolution",
    ("not the known norm and ReLU in front of a convolution", "expected a norm and ReLU before a convolution"),
)
edit(
    '"its weights have no values to try it with"',
    '"its weights are on the meta device; convert after loading them"',
    ("its weights have no values to try it with", "its weights are on the meta device; convert after loading them"),
)
edit(
    "parameters, too many to try it",
    "parameters, too many for the equivalence check",
    ("parameters, too many to try it", "parameters, too many for the equivalence check"),
)
edit(
    'f"a {type(inner).__name__} cannot be tried in one process: convert the model before"',
    'f"the equivalence check cannot run a {type(inner).__name__}: convert the model before its norms"',
    ("cannot be tried in one process: convert the model before", "convert the model before its norms"),
)
edit('"its forward draws random numbers"', '"its forward draws random numbers other than those of dropout"')
edit(
    'f"it cannot be tried on one tensor: {error}"',
    'f"it fails when called with one tensor: {error}"',
    ("it cannot be tried on one tensor", "it fails when called with one tensor"),
)
edit(
    '"its results are not those of norm, ReLU and convolution on all earlier features, joined in front or behind"',
    '"its results differ from those of a dense block: norm, ReLU and convolution on all earlier features"',
    (
        "its results are not those of norm, ReLU and convolution on all earlier features, joined in front or behind",
        "its results differ from those of a dense block: norm, ReLU and convolution on all earlier features",
    ),
    (
        "its results are not those of norm, ReLU and convolution",
        "its results differ from those of a dense block: norm, ReLU and convolution",
    ),
)
edit(
    '"its results are not those of a residual dense block"',
    '"its results differ from those of a residual dense block"',
    ("its results are not those of a residual dense block", "its results differ from those of a residual dense block"),
)
edit(
    '"its results are not its input and the features of its layers"',
    '"its results differ from its input, concatenated with the features of its layers"',
    (
        "its results are not its input and the features of its layers",
        "its results differ from its input, concatenated with the features of its layers",
    ),
)
edit(
    '"its result is not one tensor with gradients"',
    '"its output is not one tensor that requires grad"',
    ("its result is not one tensor with gradients", "its output is not one tensor that requires grad"),
)
edit(
    '"it has dropout, and some of its modules are in training mode, some are not"',
    '"it has dropout, and only some of its modules are in training mode"',
    (
        "it has dropout, and some of its modules are in training mode, some are not",
        "it has dropout, and only some of its modules are in training mode",
    ),
)
edit(
    '"its dropout has several rates, or one in eval mode"',
    '"its dropout has more than one rate, or is active in eval mode"',
    ("its dropout has several rates, or one in eval mode", "its dropout has more than one rate, or is active in eval mode"),
)
edit(
    "expected batch norms, ReLU, convolutions and dropout alone",
    "expected only batch norms, ReLU, convolutions and dropout",
    (
        "expected batch norms, ReLU, convolutions and dropout alone",
        "expected only batch norms, ReLU, convolutions and dropout",
    ),
    ("its layers have GELU: expected batch norms, ReLU", "its layers have GELU: expected only batch norms, ReLU"),
)
edit(
    '"its modules are not a norm, ReLU, 1x1 convolution, perhaps a dropout, and a max pool"',
    '"its modules are not norm, ReLU, 1x1 convolution, optional dropout, max pool"',
    ("its modules are not a norm", "its modules are not norm, ReLU"),
)
edit(
    'f"norm is a {class_name(modules[0])}, not a BatchNorm of one process"',
    'f"norm is a {class_name(modules[0])}, expected a BatchNorm that is not shared by processes"',
    ("not a BatchNorm of one process", "expected a BatchNorm that is not shared by processes"),
)
edit(
    """f'memory="reversible" is for float32 and float64, not for {_computes_in(x)}'""",
    """f'memory="reversible" supports float32 and float64, got {_computes_in(x)}'""",
    ("float32 and float64, not for", "supports float32 and float64, got"),
)

# --- fastdense, operators -----------------------------------------------------------------------------------------------

edit(
    "Densely connected networks on shared buffers: the same numbers, less memory, more speed.",
    "Densely connected networks on shared buffers: the same results in less memory and time.",
)
edit(
    "What was compiled, and what it makes of this machine.",
    "Returns what was compiled, and which code paths this machine uses.",
)
edit("Functional operators, one module each; importing it registers their fakes and gradients.", "Functional operators. Importing this package registers their fakes and gradients.")
edit("Modules: parameters and one operator call.", "Modules: each has parameters and makes one operator call.")
edit(
    "The dense block on one shared buffer, as a single differentiable operator.",
    "The dense block on one shared buffer, as one differentiable operator.",
)
edit(
    """
    Batch statistics are taken once per channel. A transition pools
    before its 1x1 convolution, which gives the same values with a quarter of the work.
    """,
    """
Batch statistics are computed once per channel. A transition
pools before its 1x1 convolution, which gives the same values with a quarter of the work.
""",
)
edit(
    'memory: "balanced" keeps the outputs of conv1 for the backward pass, "min" computes them again.',
    'memory: "balanced" saves the outputs of conv1 for backward, "min" recomputes them.',
)
edit(
    """
        active: which layers are computed; None for all. The new channels of the others are zeros, which later layers
            read like any values: their norms see mean and variance 0.
    """,
    """
active: which layers are computed; None for all. The other layers append zeros. Later layers read these like
    any values: their norms see mean and variance 0.
""",
)
edit(
    """
        Running statistics are not touched: see :func:`update_running_stats_`. Kept for backward: the buffer
        (``C0 + L * k`` numbers per pixel), in "balanced" mode ``b`` more for every active layer, and the statistics,
        which are 0 where a layer is not active. Reruns on one machine with one thread count are bit-identical. Double
        backward raises. With a process group a layer exchanges the statistics of its ``b`` and ``k`` new channels in
        forward, and as many corrections in backward, not those of the whole prefix.
    """,
    """
Running statistics are not updated: see :func:`update_running_stats_`. Saved for backward: the buffer
(``C0 + L * k`` numbers per pixel), in "balanced" mode ``b`` more for every active layer, and the statistics,
which are 0 where a layer is not active. Reruns on one machine with one thread count are bit-identical. Double
backward raises. With a process group, a layer only exchanges the statistics of its ``b`` and ``k`` new channels
in forward, and as many corrections in backward.
""",
)
edit(
    "so a backward pass can ask again instead of keeping the mask.",
    "so the backward pass recomputes the mask instead of storing it.",
)
edit("Returns which elements dropout keeps.", "Returns a mask of the elements that dropout keeps.")
edit(
    """
        memory: "balanced" keeps the residual path behind every block and the outputs of conv_a and conv_b for the
            backward pass; "min" makes the latter again; "reversible" keeps them, and makes the residual path again
            from its end, block by block, by subtraction (float32 and float64 only: 16 bits would lose it).
    """,
    """
memory: what is saved for backward. "balanced": the residual path after each block and the outputs of conv_a and
    conv_b. "min": the residual path only; the convolutions are recomputed. "reversible": the outputs of the
    convolutions only; the residual path is reconstructed from its final value by subtraction (float32 and
    float64 only: 16 bits are not accurate enough).
""",
)
edit(
    """
        Running statistics are not touched: see :func:`update_running_stats_`. Kept for backward besides the output,
        in numbers per pixel: ``(n - 1) * R + n * (ra + rb)``, ``(n - 1) * R`` and ``n * (ra + rb)`` by mode. Reruns
        on one machine with one thread count are bit-identical. Double backward raises.
    """,
    """
Running statistics are not updated: see :func:`update_running_stats_`. Saved for backward beside the output, in
numbers per pixel: ``(n - 1) * R + n * (ra + rb)`` ("balanced"), ``(n - 1) * R`` ("min") or ``n * (ra + rb)``
("reversible"). Reruns on one machine with one thread count are bit-identical. Double backward raises.
""",
)
edit(
    "A stage of dual path blocks on one output buffer, as a single differentiable operator.",
    "A stage of dual path blocks on one output buffer, as one differentiable operator.",
)
edit(
    """
    (with a projection the first block's conv_a reads the input). Batch statistics are taken once per dense channel,
    and once per block of the residual path.
    """,
    """
(with a projection the first block's conv_a reads the input). Batch statistics are computed once per dense channel,
and once per block of the residual path.
""",
)
edit(
    "Linear: derivatives of any order, nothing is kept for backward. A stage of blocks needs no merges: see :func:`dual_path_stage`.",
    """
Linear: derivatives of any order, nothing is saved for
backward. A stage of blocks needs no merges: see :func:`dual_path_stage`.
""",
)
edit(
    "The merge of a dual path block in one pass, and its adjoint, the split: for blocks of one's own.",
    "The merge of a dual path block in one pass, and its adjoint, the split: for writing your own blocks.",
)
edit(
    """
        Deterministic; arithmetic in float32 for 16-bit types. Kept for backward: ``input`` and ``projection``; ``H``
        and ``T`` are computed again.
    """,
    """
Deterministic; arithmetic in float32 for 16-bit types. Saved for backward: ``input`` and ``projection``; ``H``
and ``T`` are recomputed.
""",
)
edit(
    """
        once. Linear: derivatives of any order, nothing is kept for backward, and all inputs get the same tensor
        ``dy / m`` as gradient.
    """,
    """
once. Linear: derivatives of any order, nothing is saved for backward, and all inputs get the same tensor
``dy / m`` as gradient.
""",
)
edit(
    "Batch norm, ReLU and max pool of a stem in one operator that keeps its input and a byte a pooled value.",
    "Batch norm, ReLU and max pool of a stem in one operator, which saves its input and one byte per output.",
)
edit(
    "Runs ``max_pool(relu(batch_norm(input)))`` in one pass over the input behind its statistics.",
    "Runs ``max_pool(relu(batch_norm(input)))`` in one pass over the input, after one for the statistics.",
)
edit(
    "padding: likewise, at most half of the kernel; what it adds never wins.",
    "padding: likewise, at most half of the kernel; padded values are never the maximum.",
)
edit(
    """
        Running statistics are not touched: see :func:`update_running_stats_`. Kept for backward: the input, the
        statistics, and a byte for each pooled value, the position in the window that won it; it gets the gradient, or
        nobody where the maximum is 0. Of equal values the first wins, and a NaN wins always, as in torch; values are
        compared before they are rounded to a 16-bit type. Sums are float32 for 16-bit types. Deterministic: reruns on
        one machine with one thread count are bit-identical. Double backward raises.
    """,
    """
Running statistics are not updated: see :func:`update_running_stats_`. Saved for backward: the input, the
statistics, and one byte per output with the index of the maximum in its window. That element gets the gradient;
where the maximum is 0, none does. As in torch, the first of equal values is taken, and NaN counts as the
maximum. Values are compared before they are rounded to a 16-bit type. Sums are float32 for 16-bit types. Reruns
on one machine with one thread count are bit-identical. Double backward raises.
""",
)
edit(
    "The dense blocks of super-resolution networks on one shared buffer, as a single differentiable operator.",
    "The dense blocks of super-resolution networks on one shared buffer, as one differentiable operator.",
)
edit(
    "outer: ``[N, C0, H, W]`` of the input's dtype, or None: what a chain of blocks began with.",
    "outer: ``[N, C0, H, W]`` of the input's dtype, or None: the input of a chain of blocks.",
)
edit(
    """
        Kept for backward: the buffer of ``C0 + L * k`` numbers per pixel and nothing else; LeakyReLU's gradient reads
        the sign of its output. Reruns on one machine with one thread count are bit-identical. Double backward raises.
    """,
    """
Saved for backward: the buffer, ``C0 + L * k`` numbers per pixel. The gradient of LeakyReLU only needs the sign
of its output. Reruns on one machine with one thread count are bit-identical. Double backward raises.
""",
)
edit("Running statistics of all norms of a block, updated once a step.", "Running statistics of all norms of a block, updated once per step.")
edit("Moves running statistics towards those of the batch, in place.", "Updates running statistics with those of the batch, in place.")
edit(
    """
        Does nothing inside a backward pass: there an outer activation checkpoint runs the forward pass a second time,
        and the step has been counted already.
    """,
    """
Does nothing inside a backward pass: there ``torch.utils.checkpoint`` runs the forward pass again, whose
statistics have been counted already.
""",
)
edit("size: of the result, one number or one an axis. ``s`` is then out / in.", "size: of the result, one number or one per axis. ``s`` is then out / in.")
edit(
    """
        ``[N, C, size]``, contiguous, or channels_last for channels_last input. uint8 results are rounded and saturated
        as the preset's library does it: bit-equal to Pillow and MATLAB, and to OpenCV but for its float32 sums.
    """,
    """
``[N, C, size]``, contiguous, or channels_last for channels_last input. uint8 results are rounded and saturated
as in the preset's library. They are bit-identical to Pillow's and MATLAB's, and to OpenCV's but for the
rounding of its float32 sums.
""",
)
edit(
    """
        Linear: gradients of any order and forward-mode derivatives use the transposed matrices, without atomics, and
        are deterministic. A plane's result does not depend, bit for bit, on batch, layout or number of threads.
    """,
    """
Linear: gradients of any order and forward-mode derivatives use the transposed matrices. They need no atomics
and are deterministic. The result of a plane is bit-identical for any batch, layout and number of threads.
""",
)
edit(
    'f"large enough for a result of at least one sample of {old}"',
    'f"large enough for an output of at least 1 from an input of {old}"',
    ("large enough for a result of at least one sample", "large enough for an output of at least 1"),
)
edit('"left out for uint8 results"', '"None for uint8 results"', ("left out for uint8", "None for uint8"))
edit(
    '"bicubic: expected low and high to be infinite where gradients are wanted"',
    '"bicubic: expected low and high to be infinite if gradients are required"',
)
edit(
    '"fastdense: expected a kernel to start, got: ", cudaGetErrorString(error)',
    '"fastdense: CUDA kernel launch failed: ", cudaGetErrorString(error)',
)
edit(
    '"update_running_stats_: expected a kernel to start, got: ", cudaGetErrorString(error)',
    '"update_running_stats_: CUDA kernel launch failed: ", cudaGetErrorString(error)',
)

# --- modules ------------------------------------------------------------------------------------------------------------

edit(
    "stochastic_depth: leaves the layer out at random: then the new channels are zeros, ``b * H(x)`` in general.",
    "stochastic_depth: drops the layer at random. The new channels are ``b * H(x)``: zeros if it is dropped.",
)
edit(
    """
        memory: "balanced" keeps ``C0 + L*k + L*bn_size*k`` numbers per pixel for the backward pass, "min" only
            ``C0 + L*k`` and computes one 1x1 product per layer again.
    """,
    """
memory: "balanced" saves ``C0 + L*k + L*bn_size*k`` numbers per pixel for backward. "min" saves ``C0 + L*k`` and
    recomputes one 1x1 convolution per layer.
""",
)
edit(
    """
        With stochastic depth layer ``l`` appends ``b_l * H_l(x)``. Left out, it appends zeros, which later layers read
        like any other values: their norms see, and their running statistics take up, mean and variance 0 in those
        channels. In "batch" mode a layer left out is not computed, the statistics of its own norms stay, its
        parameters get no gradient (None), and nothing but the zeros is kept for it. "sample" mode computes all layers
        and runs as plain modules in training, with a warning.

        Sub-modules may be replaced, frozen or hooked: where the fused operator cannot stand in for them, the block
        runs plainly and warns once.
    """,
    """
With stochastic depth, layer ``l`` appends ``b_l * H_l(x)``. A dropped layer appends zeros. Later layers read these
like any other values: their norms see mean and variance 0 in those channels, and so do their running statistics.

In "batch" mode a dropped layer is not computed. The running statistics of its norms do not change, its parameters
get no gradient (None), and only the zeros are saved for it. "sample" mode computes all layers, and runs as plain
modules in training, with a warning.

Sub-modules may be replaced, frozen or hooked. If the fused operator cannot replace them, the block runs as plain
modules and warns once.
""",
)
edit(
    "Compression between two dense blocks: ``pool(conv(relu(norm(x))))``, pooling done before the product.",
    "Compression between two dense blocks: ``pool(conv(relu(norm(x))))``, pooled before the convolution.",
)
edit(
    "Average pooling and a 1x1 convolution commute, so the product runs on a quarter of the pixels.",
    "Average pooling and a 1x1 convolution commute, so the convolution runs on a quarter of the pixels.",
)
edit("out_channels: channels behind the transition.", "out_channels: channels after the transition.")
edit(
    "A sequence of modules in which each dense block runs together with the transition or norm behind it.",
    "A sequence of modules in which each dense block runs together with the transition or norm after it.",
)
edit(
    """
        stochastic_depth: leaves ``z`` out at random: then the output is ``[r; d; 0]``, ``[r + b z[:R]; d; b z[R:]]`` in
            general. A projection always runs.
    """,
    """
stochastic_depth: drops ``z`` at random. The output is ``[r + b z[:R]; d; b z[R:]]``: ``[r; d; 0]`` if it is
    dropped. A projection always runs.
""",
)
edit(
    "memory: what is kept for the backward pass, see :func:`fastdense.ops.dual_path_stage`.",
    "memory: what is saved for backward, see :func:`fastdense.ops.dual_path_stage`.",
)
edit(
    """
        Sub-modules may be replaced, frozen or hooked: where the fused operator cannot stand in for them, the block
        runs plainly and warns once. Blocks in a row in a :class:`DualPathStage` share one operator call.
    """,
    """
Sub-modules may be replaced, frozen or hooked. If the fused operator cannot replace them, the block runs as plain
modules and warns once. Consecutive blocks of a :class:`DualPathStage` share one operator call.
""",
)
edit("Dual path blocks ``block1 ... blockn`` in a row, as one operator call.", "Consecutive dual path blocks ``block1 ... blockn``, as one operator call.")
edit(
    """
        survival, survival_mode, survival_scale: stochastic depth, as of :class:`fastdense.nn.DenseBlock`, for blocks in
            the place of layers.
    """,
    """
survival, survival_mode, survival_scale: stochastic depth as in :class:`fastdense.nn.DenseBlock`, for blocks
    instead of layers.
""",
)
edit(
    """
        A block that stochastic depth leaves out is not computed, its norms (but a projection's) keep their statistics,
        its parameters get no gradient, and nothing is kept for it but the zeros that it appends. It ends the operator
        call: every row of blocks between such blocks is a call of its own, which keeps its own copy of both paths.
    """,
    """
A block that stochastic depth drops is not computed. The running statistics of its norms (except a projection's)
do not change, its parameters get no gradient, and only the zeros that it appends are saved. A dropped block
splits the stage: each run of blocks between dropped ones is one operator call with its own copy of both paths.
""",
)
edit("Kept for backward: ``C0 + L * k`` numbers per pixel.", "Saved for backward: ``C0 + L * k`` numbers per pixel.")
edit(
    "A dense block without norms on one shared buffer, its local fusion and residual sum.",
    "A dense block without norms on one shared buffer, with local fusion and residual sum.",
)
edit("Stochastic depth: residual branches that training leaves out at random.", "Stochastic depth: residual branches that are dropped at random in training.")
edit(
    "Adds a residual branch to its shortcut, or leaves it out: ``shortcut + b * branch(x)``.",
    "Adds a residual branch to its shortcut, or drops it: ``shortcut + b * branch(x)``.",
)
edit(
    """
        mode: "batch" draws one ``b`` for the mini-batch; a branch left out is not called, so its norms keep their
            statistics and nothing is kept for backward. "sample" draws one ``b`` for each sample and computes
            the branch for all of them.
    """,
    """
mode: "batch" draws one ``b`` for the mini-batch. A dropped branch is not called, so its running statistics do not
    change and nothing is saved for backward. "sample" draws one ``b`` for each sample and computes the branch for
    all of them.
""",
)
edit(
    """
        ``b`` comes from torch's CPU generator: a seed fixes it, and no device is waited for. The parameters of a branch
        left out get no gradient at all (None), so optimisers leave them alone; the authors' code applied weight decay
        and momentum to them as to zero gradients, which ``zero_grad(set_to_none=False)`` restores. This module has no
        parameters, so a network's ``state_dict`` is the same with and without it.

        Under ``torch.compile`` one graph serves every draw, so in "batch" mode all branches are computed and those left
        out are multiplied by 0: numbers and statistics are the same, the time and memory are those of the whole
        network, and the gradients are zeros instead of None.
    """,
    """
``b`` comes from torch's CPU generator: a seed fixes it, and no device is synchronised. The parameters of a dropped
branch get no gradient (None), so optimizers skip them. The authors' code applied weight decay and momentum to
them, as to zero gradients; ``zero_grad(set_to_none=False)`` does the same. This module has no parameters, so a
network's ``state_dict`` is the same with and without it.

Under ``torch.compile`` one graph serves every draw. In "batch" mode all branches are computed there, and dropped
ones are multiplied by 0. Results and running statistics are the same. Time and memory are those of the whole
network, and the gradients are zeros instead of None.
""",
)
edit(
    "The general form behind residual, dense and dual path networks: a recurrence of higher order.",
    "The general form of residual, dense and dual path networks: a recurrence of higher order.",
)
edit(
    """
    Plainly it keeps the normalised block, the convolution's result, a mask and the pool's indices: more than the block. So
    does a stem whose max pool :func:`fastdense.ops.norm_relu_max_pool` does not know. Here they keep their input alone; the
    numbers are the same, bit for bit.
    """,
    """
Plain modules save the normalised block, the output of the convolution, a mask and the indices of the pool: more than
the block. So does a stem whose max pool :func:`fastdense.ops.norm_relu_max_pool` does not support. Here only the input
is saved for backward, and the modules run again there. Results are bit-identical.
""",
)
edit(
    "Norms in front of a max pool, computed again in the backward pass.",
    "Norms before a max pool, recomputed in the backward pass.",
)
edit(
    "There is one memory mode, by whatever name: the buffer alone is kept.",
    "All memory modes are the same: only the buffer is saved for backward.",
)
edit(
    "There is one memory mode, by whatever name: the buffer, which is the result, is all that is kept.",
    "All memory modes are the same: only the buffer, which is the output, is saved for backward.",
)

# --- models -------------------------------------------------------------------------------------------------------------

edit(
    "What there is to know of a model before it runs: parameters, work, memory for the backward pass, paper.",
    "Facts about each model: parameters, multiply-adds, memory saved for backward, paper.",
)
edit(
    """
Everything is counted on tensors without memory (the meta device), so the largest model takes as little time as the
smallest.
    """,
    "Everything is counted on the meta device.",
)
edit(
    "Parameters; multiply-adds and bytes kept for the backward pass of one image, plain and by fastdense.",
    "Parameters; per image: multiply-adds, and bytes saved for backward by plain modules and by fastdense.",
)
edit(
    ":class:`PlainTransitionDown` that keeps its input alone for the backward pass.",
    ":class:`PlainTransitionDown` that saves only its input for backward.",
)
edit(
    "Going down, a block's whole output is kept as a skip and halved in size.",
    "Going down, a block's whole output is a skip, and is halved in size.",
)
edit("stem: modules in front of the first block, by name.", "stem: modules before the first block, by name.")
edit("in_channels: channels behind the stem.", "in_channels: channels after the stem.")
edit("stem_channels: channels behind the stem.", "stem_channels: channels after the stem.")
edit(
    "Feature maps for detectors and segmenters: behind the stem's convolution, and behind every stage.",
    "Feature maps for detection and segmentation: after the stem's convolution, and after each stage.",
)
edit(
    """
        In training the tail, whose features are ``scale**2`` times as many as the body's, keeps nothing for the
        backward pass but runs again there, in stripes of rows; ``recompute_tail = False`` turns that off, and so
        do hooks on its modules.
    """,
    """
The tail has ``scale**2`` times as many features as the body. In training it saves nothing for backward, and runs
again there in stripes of rows. ``recompute_tail = False`` turns that off, and so do hooks on its modules.
""",
)
edit(
    "recompute_tail: whether the tail keeps nothing for the backward pass but runs again there, stripe by stripe.",
    "recompute_tail: whether the tail saves nothing for backward, and runs again there stripe by stripe.",
)
edit(
    "One convolution applied again and again, every state of which is reconstructed.",
    "One convolution applied repeatedly, with an output from every state.",
)
edit(
    "Checkpoints of super-resolution networks by other people's names, read without running code from a file.",
    "Loads checkpoints of super-resolution networks from other projects. No code in a file is executed.",
)
edit("Makes the network that a checkpoint belongs to, with its weights.", "Creates the network of a checkpoint and loads its weights.")
edit(
    "Writes a network so that :func:`load_super_resolution` makes it again.",
    "Saves a network for :func:`load_super_resolution`.",
)
edit(
    'f"{_OP}: expected {path} to hold a whole {name}, got a problem with {error}"',
    'f"{_OP}: cannot load {name} from {path}: problem with {error}"',
    ("hold a whole srcnn, got a problem with its scale, which", "cannot load srcnn from .*: problem with its scale, which"),
    (
        "hold a whole rrdbnet, got a problem with 'conv_first.weight'",
        "cannot load rrdbnet from .*: problem with 'conv_first.weight'",
    ),
)
edit(
    '"its scale, which these weights do not tell: only files of this library do"',
    '"its scale, which these weights do not contain: only files of this library do"',
)
edit(
    'f"{_OP}: expected {path} to hold a network that is known, got entries like {some}"',
    'f"{_OP}: expected {path} to hold a known network, got entries such as {some}"',
    ("hold a network that is known, got entries like", "hold a known network, got entries such as"),
)
edit('f"{key}, which stands twice"', 'f"{key}, which occurs twice"', ("which stands twice", "which occurs twice"))
edit(
    'f"read_ncnn: expected {param.name} and {weights.name} to lie together, got no {file}"',
    'f"read_ncnn: expected {param.name} and {weights.name} in one folder, but {file} is missing"',
    ("net.param and net.bin to lie together, got no", "net.param and net.bin in one folder, but"),
)
edit(
    'f"layer {name} of type {kind}, which this library does not know"',
    'f"layer {name} of type {kind}, which is not supported"',
    ("which this library does not know", "which is not supported"),
)
edit("Checkpoints of DenseNets by other people's names: the same tensors under torchvision's.", "Key mappings: renames DenseNet checkpoints of other libraries to torchvision's names.")
edit(
    "Loads a checkpoint of any known dialect into a DenseNet with torchvision's names.",
    "Loads a DenseNet checkpoint of any known library into a model with torchvision's names.",
)
edit(
    'f"torchvision_keys: expected state_dict to name {name} once, got it again as {key}"',
    'f"torchvision_keys: expected one entry for {name}, got a second one: {key}"',
    (r"to name classifier\.bias once", r"one entry for classifier\.bias, got a second one"),
)
edit(
    'f"{op}: expected state_dict to have {key}, got none"',
    'f"{op}: expected state_dict to have {key}, but it is missing"',
    (r"state_dict to have features\.norm5\.weight, got none", r"state_dict to have features\.norm5\.weight, but it is missing"),
)
edit(
    """f"{op}: expected state_dict to have the model's entries only, got {unknown[0]}\"""",
    """f"{op}: expected only entries of the model, got unknown {unknown[0]}\"""",
    ("entries only, got conv1x1.weight", "only entries of the model, got unknown conv1x1.weight"),
    ("the model's entries only, got head", "only entries of the model, got unknown head"),
)

# --- super-resolution and pictures --------------------------------------------------------------------------------------

edit(
    "Runs super-resolution networks on pictures larger than memory, with the result of running them whole.",
    "Runs super-resolution networks in bounded memory, with the same result as in one piece.",
)
edit(
    "Chooses stripes such that weights excepted all tensors together take at most ``max_memory`` bytes, by estimate.",
    "Chooses stripes so that all tensors except the weights take at most ``max_memory`` bytes, by estimate.",
)
edit(
    "ValueError: if even stripes of one row take more; the message says how much.",
    "ValueError: even stripes of one row take more; the message says how much.",
)
edit(
    "Enlarges pictures; the result is that of ``net(pictures)``, but for rounding.",
    "Enlarges pictures in bounded memory. The result is that of ``net(pictures)``, except for rounding.",
)
edit(
    """
    The trunk works on the small picture, where the feature buffer is reused; the tail, which would need most memory,
    runs in stripes of rows with as many rows around them as its convolutions see. Where the trunk does not fit either,
    it runs in stripes too, whose halo covers its receptive field: exact, but only worth it for pictures that are high.
    """,
    """
The trunk runs on the whole small picture. The tail, which would need most memory, runs in stripes of rows, each with
the neighbouring rows that its convolutions see. If the trunk does not fit either, it runs in stripes too. Their halo
covers its receptive field: this is exact, but only pays for high pictures.
""",
)
edit(
    "progress: called as ``progress(done, steps)`` behind every block of the trunk and every stripe of the tail.",
    "progress: called as ``progress(done, steps)`` after each block of the trunk and each stripe of the tail.",
)
edit("without zeros,", "with positive sizes,")
edit(
    "expected pictures of 11 x 11 pixels or more behind shaving",
    "expected pictures of 11 x 11 pixels or more after shaving",
    ("pixels or more behind shaving", "pixels or more after shaving"),
)
edit(
    """
    bicubic in floating point without rounding; a network gets the small picture of 8 bits that MATLAB would make, RGB
    or Y as it takes. Results are clipped and rounded once; ``scale`` pixels at each border do not count.
    """,
    """
bicubic in floating point without rounding. A network gets the small 8-bit picture that MATLAB would make, as RGB or Y.
Results are clipped and rounded once. ``scale`` pixels at each border are left out.
""",
)
edit(
    'f"{command}: expected {path} to be of a format that holds the picture: {error}"',
    'f"{command}: the format of {path} cannot store this picture: {error}"',
    ("expected out.jpg to be of a format that holds the picture", "the format of out.jpg cannot store this picture"),
)
edit(
    '''
            f"fastdense: expected OpenCV for {path}, a PNG of 16 bits and colours, got no such module; run: "
            "pip install opencv-python-headless"
    ''',
    'f"fastdense: {path} is a 16-bit colour PNG, which needs OpenCV; run: pip install opencv-python-headless"',
    ("expected OpenCV for", "needs OpenCV"),
)
edit(
    'f"{command}: expected IN to be a picture, got {error}"',
    'f"{command}: cannot read IN: {error}"',
    ("expected IN to be a picture, got", "cannot read IN:"),
)

# --- training, benchmarks, command line ---------------------------------------------------------------------------------

edit(
    "Trains a model on digits or a folder of pictures; a run that was killed continues with the same bits.",
    "Trains a model on digits or a folder of pictures. A killed run resumes bit-identically.",
)
edit(
    """
    A run that ended at any moment and continues with ``resume`` ends with the same bits as one that ran through, with
    the same machine, threads, memory mode and number of processes. Under ``torchrun`` the processes share every batch
    and average their gradients; the first one writes the files.
    """,
    """
A run may be killed at any moment and continued with ``resume``. The final weights are bit-identical to those of an
uninterrupted run, with the same machine, threads, memory mode and number of processes. Under ``torchrun`` the
processes share each batch and average their gradients; the first one writes the files.
""",
)
edit("What to train, on what, and how.", "Configuration of a training run.", times=2)
edit("The loss became infinite or NaN; the last checkpoint is from before.", "The loss became infinite or NaN. The last checkpoint was written before that.")
edit(
    """
                f"train: expected a finite loss, got {value} in step {now.step + 1} (epoch {now.epoch + 1}, learning"
                f" rate {rate:.3g}); choose a smaller lr. The last checkpoint is from before"
    """,
    '''
f"train: expected a finite loss, got {value} in step {now.step + 1} (epoch {now.epoch + 1}, learning"
f" rate {rate:.3g}); choose a smaller lr. The last checkpoint was written before that"
''',
)
edit("What a run came to.", "The result of a training run.")
edit(
    """f"train: expected device to be one of torch's, got {name!r}\"""",
    """f"train: expected device to be a torch device such as 'cpu' or 'cuda', got {name!r}\"""",
)
edit(
    'f"train: expected device to be there, got {name!r} but torch finds no CUDA GPU"',
    'f"train: device {name!r} is not available: torch finds no CUDA GPU"',
    ("expected device to be there, got 'cuda' but torch", "device 'cuda' is not available: torch"),
)
edit(
    '''
            f"train: expected {config.out} to hold no checkpoint, got {path};"
            " continue it with --resume, or start anew with --fresh"
    ''',
    '''
f"train: {config.out} already has a checkpoint, {path};"
" continue it with --resume, or start anew with --fresh"
''',
    ("to hold no checkpoint", "already has a checkpoint"),
)
edit(
    'f"train: expected --out without a checkpoint, got {path}; give --resume or --fresh"',
    'f"train: {path} exists; continue it with --resume, or start anew with --fresh"',
    ("train: expected --out without a checkpoint, got .*checkpoint.pt", "train: .*checkpoint.pt exists; continue it"),
)
edit(
    'f"train: expected arguments that make a model, got {config.model!r}: {error}"',
    'f"train: cannot create {config.model!r}: {error}"',
    (
        'match="train: expected"):\n        train(tiny(tmp_path, **changes), progress=False)',
        'match=r"train: (expected|cannot create)"):\n        train(tiny(tmp_path, **changes), progress=False)',
    ),
)
edit(
    '''
                    f"train: expected a model that computes all layers in every step with {self.world} processes, "
                    f"got {type(model).__name__}, which leaves some out at random; train it in one process, or without"
    ''',
    '''
f"train: {type(model).__name__} drops layers at random, which {self.world} processes do not "
"support; train it in one process, or without stochastic depth and drop-path"
''',
    (
        'f"expected a model that computes all layers .* got {what}"',
        'f"train: {what} drops layers at random, which 2 processes do not support"',
    ),
)
edit(
    'f"train: expected a picture of {side * scale} pixels or more to train on, got none"',
    'f"train: expected at least one picture of {side * scale} x {side * scale} pixels or more, got none"',
    ("expected a picture of 1998 pixels or more to train on", "expected at least one picture of 1998 x 1998 pixels or more"),
)
edit(
    "Reads the digits or a folder.",
    "Loads the digits, or a folder of pictures.",
)
edit(
    "Small patches are made by MATLAB's bicubic on 8 bits. A run that was stopped goes on from its checkpoint with the same patches, and on the same machine with the same number of threads to the same weights.",
    """
Small patches are made by MATLAB's bicubic from 8-bit pictures. A stopped run resumes from its checkpoint with the
same patches. On the same machine, with the same number of threads, the weights are bit-identical.
""",
)
edit(
    "Compares training steps of plain PyTorch and fastdense, process by process.",
    "Compares time and memory of training steps of plain PyTorch and fastdense.",
)
edit(
    """
`run_bench` measures time and memory of the variants of one network, `run_sweep` memory against
depth; `tables` and `plots` show what they return.
    """,
    """
`run_bench` measures the variants of one network, each in its own process. `run_sweep` measures memory against depth.
The modules `tables` and `plots` show the results.
""",
)
edit("What to compare, on what, and how long.", "Configuration of a benchmark.")
edit("Marks the row's times as not to be had, or not to be believed.", "Marks the row's times as failed or invalid.")
edit(
    """
what plain PyTorch keeps for the backward pass grows with the square of a block's depth, what one
shared buffer keeps grows linearly.
    """,
    """
what plain PyTorch saves for backward grows with the square of a block's depth, what one shared
buffer saves grows linearly.
""",
)
edit("Which depths to measure, and everything else in `base`.", "Configuration of a sweep: the depths, and everything else in `base`.")
edit(
    'f"bench: torchvision has no memory_efficient form of {net.label}"',
    'f"bench: {net.label} has no memory_efficient variant in torchvision"',
    ("torchvision has no memory_efficient form of", "has no memory_efficient variant in torchvision"),
)
edit(
    """f"bench: expected a network of torchvision to compare timm's with, got {net.label}\"""",
    'f"bench: expected a torchvision network for the timm variants, got {net.label}"',
    ("of torchvision to compare timm's with, got DenseNet-BC", "a torchvision network for the timm variants, got DenseNet-BC"),
)
edit(
    '"bench: expected --device to be usable, got cuda without a CUDA GPU; use --device cpu"',
    """"bench: device 'cuda' is not available; use --device cpu\"""",
    ("expected --device to be usable, got cuda", "device 'cuda' is not available"),
)
edit(
    '''
            "bench: expected scikit-image to ship photographs, got none in this installation;"
            " give your own with --images DIR"
    ''',
    '"bench: this installation of scikit-image has no photographs; give your own with --images DIR"',
    ("expected scikit-image to ship photographs", "this installation of scikit-image has no photographs"),
)
edit(
    '''
            f"{command}: expected scikit-image to be installed for its photographs, got no such module;"
            f" run: pip install 'fastdense[train]', or give your own with {option} DIR"
    ''',
    '''
f"{command}: scikit-image, whose photographs are used by default, is not installed;"
f" run: pip install 'fastdense[train]', or give your own with {option} DIR"
''',
    ("expected scikit-image to be installed", "scikit-image, whose photographs are used by default, is not installed"),
)
edit(
    '''f"fastdense: expected {package} to be installed, got no such module; run: pip install 'fastdense[{name}]'"''',
    '''f"fastdense: {package} is not installed; run: pip install 'fastdense[{name}]'"''',
    ("to be installed, got no such module", "is not installed"),
)
edit(
    '"upscale: expected --scale to be given without --model, got neither"',
    '"upscale: expected --model or --scale to be given, got neither"',
    ("upscale: expected --scale to be given without --model, got neither", "upscale: expected --model or --scale to be given, got neither"),
)
edit(
    '"resize: expected either --scale or --size to be given"',
    '"resize: expected exactly one of --scale and --size to be given"',
    ('"either --scale or --size"', '"exactly one of --scale and --size"'),
)
edit(
    """
Trains the plain torchvision or timm model, the same with its checkpointing, and fastdense's modes, each in its own
process, one step at a time in turns, and compares time and memory. Losses must agree before a time is believed.
    """,
    """
Compares time and memory of the plain torchvision or timm model, the same with checkpointing, and fastdense's modes.
Each runs in its own process; they take turns, one training step at a time. A timing counts only if all variants reach
the same loss.
""",
)
edit(
    """
Follows the convention of a library to the bit: torch, torch_antialias, pillow, opencv or matlab. Alpha and 16 bits a
sample are kept; every channel is resampled as it is. A folder is resized with all its sub-folders.
    """,
    """
Resizes as a library does, bit for bit: torch, torch_antialias, pillow, opencv or matlab. Alpha and 16 bits per sample
are kept. Each channel is resampled by itself. A folder is resized with all its sub-folders.
""",
)
edit(
    """
Enlarges by a network, or without one by MATLAB's bicubic. Alpha and 16 bits a sample are kept. A picture larger than
memory runs in stripes, with the same result. MODEL is a checkpoint of RRDBNet (Real-ESRGAN, ESRGAN), RDN, EDSR or
    """,
    """
Enlarges pictures by a network, or without one by MATLAB's bicubic. Alpha and 16 bits per sample are kept. A picture
that does not fit into memory runs in stripes, with the same result.
MODEL is a checkpoint of RRDBNet (Real-ESRGAN, ESRGAN), RDN, EDSR or
""",
)
edit(
    """
of bicubic enlargement and of a model, with as many pixels shaved at the border as the scale. GAN-trained models are
not made for this comparison.
    """,
    """
of bicubic enlargement and of a model. As many pixels as the scale are left out at each border. GAN-trained models are
not made for this comparison.
""",
)
edit(
    '"MiB: kept for the backward pass of one image in float32, by plain PyTorch and by fastdense."',
    '"MiB: saved for backward, one image in float32, by plain PyTorch and by fastdense."',
    ("kept for the backward pass of one image in float32", "saved for backward, one image in float32"),
)
edit('"MiB plain", "MiB here"', '"MiB plain", "MiB fastdense"', ("MiB here", "MiB fastdense"))
edit(
    "0 on success, 1 when the command ran and its result is not what it should be, 2 for input that cannot be used, 130 when interrupted.",
    """
0 on success; 1 if the command ran, but its result is not as expected; 2 for input that cannot be used; 130 if
interrupted.
""",
)

# --- what docs/ calls files and kernels, once these have moved: (old, new, the file that shows it) ------------------------

MOVED = [
    ("csrc/common/row_product_launch.h", "csrc/cuda/conv1x1/conv1x1_launch.h", "csrc/cuda/conv1x1/conv1x1_launch.h"),
    ("csrc/common/row_product_cuda.h", "csrc/cuda/conv1x1/conv1x1.h", "csrc/cuda/conv1x1/conv1x1.h"),
    ("csrc/common/tensor_core.h", "csrc/cuda/mma.h", "csrc/cuda/mma.h"),
    ("csrc/common/shared_tile.h", "csrc/cuda/smem_tile.h", "csrc/cuda/smem_tile.h"),
    ("csrc/common/cuda_choice.h", "csrc/cuda/kernel_choice.h", "csrc/cuda/kernel_choice.h"),
    ("csrc/common/row_launch.h", "csrc/cuda/norm_relu/norm_relu_launch.h", "csrc/cuda/norm_relu/norm_relu_launch.h"),
    ("csrc/common/row_cuda.h", "csrc/cuda/block_forward.h", "csrc/cuda/block_forward.h"),
    ("csrc/common/row_cuda_gradients.h", "csrc/cuda/block_backward.h", "csrc/cuda/block_backward.h"),
    ("| row_product_backward_kernels, row_product_gradient_kernel |", "| conv1x1_backward, conv1x1_backward_kernel |", "csrc/cuda/conv1x1/conv1x1_backward.cu"),
    ("| row_product_backward_kernels, conv1x1_backward_kernel |", "| conv1x1_backward, conv1x1_backward_kernel |", "csrc/cuda/conv1x1/conv1x1_backward.cu"),
    ("| row_product_backward_kernels,", "| conv1x1_backward,", "csrc/cuda/conv1x1/conv1x1_backward.cu"),
    ("| row_product_forward_kernels, row_product_kernel |", "| conv1x1_forward, conv1x1_kernel |", "csrc/cuda/conv1x1/conv1x1_forward.cu"),
    ("| row_product_forward_kernels, conv1x1_kernel |", "| conv1x1_forward, conv1x1_kernel |", "csrc/cuda/conv1x1/conv1x1_forward.cu"),
    ("| row_backward_kernels,", "| norm_relu_backward,", "csrc/cuda/norm_relu/norm_relu_backward.cu"),
    ("| row_forward_kernels,", "| norm_relu_forward,", "csrc/cuda/norm_relu/norm_relu_forward.cu"),
    ("| tensor_core_build,", "| mma_available,", "csrc/cuda/mma_available.cu"),
    ("reference/fastdense.quality.md", "reference/fastdense.sr.quality.md", "fastdense/sr/quality.py"),
    ("- fastdense.quality:", "- fastdense.sr.quality:", "fastdense/sr/quality.py"),
    ('"train", "bench", "quality")', '"train", "bench", "sr.quality")', "fastdense/sr/quality.py"),
]

# --------------------------------------------------------------------------------------------------------------------------


def pattern(text: str) -> re.Pattern[str]:
    """The text with any indentation and line breaks."""
    return re.compile(r"\s+".join(re.escape(word) for word in text.split()))


def indented(text: str, source: str, start: int) -> str:
    """The new text with the indentation of the line on which the old one starts; long paragraphs are wrapped again."""
    begin = source[source.rfind("\n", 0, start) + 1 : start]
    margin = begin[: len(begin) - len(begin.lstrip())]
    groups: list[list[str]] = []
    for line in text.split("\n"):
        same = groups and groups[-1] and line and groups[-1][0] and (
            depth(line) == depth(groups[-1][-1]) or depth(line) > depth(groups[-1][0])
        )
        if same and not (depth(line) == 0 and len(groups[-1]) > 1 and depth(groups[-1][-1]) > 0):
            groups[-1].append(line)
        else:
            groups.append([line])
    lines: list[str] = []
    for group in groups:
        rest = margin + " " * depth(group[-1])
        made = [margin + line if line else "" for line in group]
        if not lines:
            made[0] = begin + group[0]
        if max(map(len, made)) > WIDTH and '"' + "f" not in group[0] and not group[0].startswith(('"', "f")):
            words = " ".join(" ".join(group).split())
            first = begin if not lines else margin
            made = textwrap.wrap(words, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False,
                                 break_on_hyphens=False)
        lines += made
    return "\n".join(lines)[len(begin) :]


def depth(line: str) -> int:
    return len(line) - len(line.lstrip())


def replace(source: str, old: str, new: str) -> str:
    return pattern(old).sub(lambda found: indented(new, source, found.start()), source)


def main() -> int:
    arguments = [a for a in sys.argv[1:] if not a.startswith("-")]
    root, dry = Path(arguments[0] if arguments else "."), "--dry-run" in sys.argv
    code = {p: p.read_text() for folder in ("fastdense", "csrc") for p in sorted((root / folder).rglob("*"))
            if p.suffix in (".py", ".h", ".cpp", ".cu")}
    others = {p: p.read_text() for p in [*(root / "tests").rglob("*.py"), root / "README.md", root / "mkdocs.yml", *(root / "docs").glob("*.md")]}
    before = dict(code), dict(others)
    applied = already = 0
    missing: list[str] = []
    for old, new, times, tests in EDITS:
        places = [path for path, text in code.items() for _ in pattern(old).finditer(text)]
        is_new = any(pattern(new).search(text) for text in code.values())
        head = " ".join(old.split())[:100]
        if len(places) == times:
            for path in set(places):
                code[path] = replace(code[path], old, new)
            applied += 1
        elif not places and is_new:
            already += 1
        else:
            where = ", ".join(str(path.relative_to(root)) for path in places) or "nowhere"
            missing.append(f"{len(places)} times instead of {times} ({where}): {head}")
            continue
        for old_text, new_text in tests:
            for path, text in others.items():
                others[path] = text.replace(old_text, new_text)
    for old_text, new_text, shown_by in MOVED:
        if (root / shown_by).exists():
            for path, text in others.items():
                if path.suffix in (".md", ".yml") or path.name == "test_docs.py":
                    others[path] = text.replace(old_text, new_text)
    changed = [(path, text) for now, was in zip((code, others), before) for path, text in now.items() if was[path] != text]
    if not dry:
        for path, text in changed:
            path.write_text(text)
    print(f"{len(EDITS)} edits: {applied} applied, {already} applied before, {len(missing)} not applied; "
          f"{len(changed)} files changed{' (dry run)' if dry else ''}")
    for line in missing:
        print("not applied, found", line)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
