"""Every strategy on every model of the zoo, against Jacobians multiplied in NumPy; plans, blocks, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entk import (
    FullJacobian,
    JacobianBlocks,
    NtkBlocks,
    PositionPairs,
    Structured,
    empirical_ntk,
    jacobian,
    plan,
)
from entk._structured.strategy import Layout, _kernel, in_slices, matched, workspace
from tests.entk.mlp_oracle import assert_close, batch, init
from tests.entk.mlp_oracle import wavy_fn as mlp
from tests.entk.model_zoo import ZOO

PAIRS, BLOCKS = Structured(contractions=(PositionPairs(),)), Structured(contractions=(JacobianBlocks(),))
MODELS = {model.name: model for model in ZOO}
ROUNDED = {"weight_through_bfloat16": 2e-2, "weight_cast": 1e-6, "nnx_attention": 1e-6}  # inside the model itself


def rows(apply_fn, params, *batches):
    """The Jacobians of several batches, each (n·c, p), in float64."""
    jac = [np.asarray(jacobian(apply_fn, params, x), np.float64) for x in batches]
    return [one.reshape(-1, one.shape[2]) for one in jac]


# ---------------------------------------------------------------------------------------------------- right numbers


@pytest.mark.parametrize("model", ZOO, ids=lambda model: model.name)
def test_every_strategy_on_every_model(model):
    """All in one program, so that what they share is compiled once."""
    apply_fn, params, x1, x2 = model.build(jnp.float64)
    tolerance = ROUNDED.get(model.name, 1e-10)

    @jax.jit
    def everything(params, x1, x2):
        k_qs = [empirical_ntk(apply_fn, params, x2, x1, strategy=each) for each in (PAIRS, BLOCKS)]
        return jacobian(apply_fn, params, x1), jacobian(apply_fn, params, x2), empirical_ntk(apply_fn, params, x1), k_qs

    *jacobians, k_ss, k_qs = jax.device_get(everything(params, x1, x2))
    jac1, jac2 = (jac.astype(np.float64).reshape(-1, jac.shape[2]) for jac in jacobians)
    assert_close(k_ss, jac1 @ jac1.T, tolerance)
    for kernel in k_qs:
        assert_close(kernel, jac2 @ jac1.T, tolerance)
    eigenvalues = np.linalg.eigvalsh(k_ss)
    assert np.abs(k_ss - k_ss.T).max() <= 1e-14 * eigenvalues[-1]
    assert eigenvalues[0] >= -1e-14 * eigenvalues[-1]


def sequence_model(params, x):
    """Dense layers shared over positions, one of them used again transposed, and a bias on each."""
    hidden = jnp.tanh(x @ params["w_in"] + params["b_in"])
    mixed = hidden + jnp.sin(hidden.mean(1, keepdims=True) @ params["square"] + params["b"])
    back = jnp.tanh(mixed @ params["square"].T)
    return jnp.sin((mixed * back).mean(1) @ params["w_out"])


@settings(max_examples=6)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 5),
    m=st.integers(1, 5),
    c=st.integers(1, 3),
    width=st.integers(1, 6),
    length=st.integers(1, 5),
    other_length=st.integers(1, 5),
    strategy=st.sampled_from([Structured(), PAIRS, BLOCKS, Structured(workspace_bytes=40_000)]),
)
def test_any_shape(seed, n, m, c, width, length, other_length, strategy):
    rng = np.random.default_rng(seed)
    shapes = {"w_in": (3, width), "b_in": (width,), "square": (width, width), "b": (width,), "w_out": (width, c)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    x1, x2 = rng.normal(size=(n, length, 3)), rng.normal(size=(m, other_length, 3))
    jac1, jac2 = rows(sequence_model, params, x1, x2)
    assert_close(empirical_ntk(sequence_model, params, x1, x2, strategy=strategy), jac1 @ jac2.T, 1e-10)
    assert_close(empirical_ntk(sequence_model, params, x1, strategy=strategy), jac1 @ jac1.T, 1e-10)


@pytest.mark.parametrize("n", [40, 61])
def test_one_triangle_in_pieces_is_the_whole_kernel(n):
    """N = 480 and more: a loop over pairs of tiles, of which the last one overlaps the one before."""
    rng = np.random.default_rng(0)
    shapes = {"w_in": (3, 8), "b_in": (8,), "square": (8, 8), "b": (8,), "w_out": (8, 12)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    x = rng.normal(size=(n, 4, 3))
    (jac,) = rows(sequence_model, params, x)
    for strategy in (Structured(), PAIRS, BLOCKS, Structured(workspace_bytes=1_000_000)):
        chosen = plan(sequence_model, params, x, strategy=strategy)
        assert chosen.triangle == (strategy.workspace_bytes > 1_000_000)
        assert_close(empirical_ntk(sequence_model, params, x, strategy=strategy), jac @ jac.T, 1e-10)


@pytest.mark.parametrize("n", [40, 61])
@pytest.mark.parametrize("every_leaf", [False, True])
def test_jacobians_formed_in_slices_make_the_same_kernel(monkeypatch, n, every_leaf):
    """Leaves with and without biases, in groups (a scan's layers), beside leaves whose Jacobian is kept, or alone."""
    monkeypatch.setattr("entk._structured.strategy.SLICE_NUMBERS", 8)
    rng = np.random.default_rng(0)
    shapes = {"w_in": (9, 6), "b_in": (6,), "layers": (2, 6, 6), "w_out": (6, 12)}
    params = {name: rng.normal(size=shape) / 2 for name, shape in shapes.items()}

    def model(params, x):
        hidden = jnp.tanh(x @ params["w_in"] + params["b_in"])
        if every_leaf:
            return jnp.sin(hidden @ params["w_out"]).sum(1)
        hidden, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h + h[:, ::-1] @ w), None), hidden, params["layers"])
        return jnp.sin(hidden.mean(1) @ params["w_out"]) * params["b_in"].sum()  # which leaves b_in to autodiff

    if every_leaf:
        del params["layers"]
    x = rng.normal(size=(n, 2, 9))
    choices = in_slices(BLOCKS.choose(matched(model, params, x, None)[0], n, n), 12)
    sliced = [choice.slices > 1 for choice in choices]
    assert all(sliced) if every_leaf else {True, False} == set(sliced)
    assert not every_leaf or choices[0].part.has_bias
    (jac,) = rows(model, params, x)
    assert_close(empirical_ntk(model, params, x, strategy=BLOCKS), jac @ jac.T, 1e-10)


@pytest.mark.parametrize("name", ["mlp_tanh", "cnn_stride_2", "recurrent", "attention_with_tied_embeddings"])
def test_blocks_of_two_examples_make_the_same_kernel(name):
    """The least workspace for two examples a block: loops over blocks, the last one overlapping the one before."""
    apply_fn, params, x1, x2 = MODELS[name].build(jnp.float64)
    model, _ = matched(apply_fn, params, x1, None)
    choices = Structured().choose(model, 2, 2)
    strategy = Structured(workspace_bytes=workspace(model, choices, Layout(2, 2, 1, False)))
    assert plan(apply_fn, params, x1, strategy=strategy).rows == 2 < len(x1)
    jac1, jac2 = rows(apply_fn, params, x1, x2)
    assert_close(empirical_ntk(apply_fn, params, x1, strategy=strategy), jac1 @ jac1.T, 1e-10)
    assert_close(empirical_ntk(apply_fn, params, x2, x1, strategy=strategy), jac2 @ jac1.T, 1e-10)


@pytest.mark.parametrize("strategy", [PAIRS, BLOCKS])
def test_a_bias_of_a_scaled_weight_and_of_stacked_layers(strategy):
    """The weight's factor is not the bias's, and a bias shared by stacked layers has one cotangent for all of them."""
    rng = np.random.default_rng(4)
    params = {"w": rng.normal(size=(3, 3)), "b": rng.normal(size=3), "layers": rng.normal(size=(4, 3, 3))}
    params["shared"] = rng.normal(size=3)

    def model(params, x):
        hidden = jnp.tanh(x @ (params["w"] * 0.5) + params["b"])
        return jnp.sin(
            jax.lax.scan(lambda h, w: (jnp.tanh(h @ w + params["shared"]), None), hidden, params["layers"])[0]
        )

    x = rng.normal(size=(5, 3))
    (jac,) = rows(model, params, x)
    assert_close(empirical_ntk(model, params, x, strategy=strategy), jac @ jac.T, 1e-10)


def test_lengths_may_differ_even_where_the_uses_then_do():
    """A model that uses its weight once on short sequences and twice on long ones has no common factors."""

    def model(w, x):
        hidden = jnp.tanh(x @ w)
        return jnp.sin((jnp.tanh(hidden @ w) if x.shape[1] > 2 else hidden).sum(1))

    w, rng = np.random.default_rng(1).normal(size=(3, 3)), np.random.default_rng(2)
    x1, x2 = rng.normal(size=(4, 2, 3)), rng.normal(size=(3, 5, 3))
    jac1, jac2 = rows(model, w, x1, x2)
    assert_close(empirical_ntk(model, w, x1, x2), jac1 @ jac2.T, 1e-10)
    assert plan(model, w, x1).leaves[0].reason == ""
    assert "differently" in plan(model, w, x1, x2).leaves[0].reason


@pytest.mark.parametrize("name", ["mlp_tanh", "cnn_stride_2", "recurrent"])
def test_float32_and_bfloat16_to_their_digits(name):
    apply_fn, params, x1, _ = MODELS[name].build(jnp.float64)
    (jac,) = rows(apply_fn, params, x1)

    def cast(tree, dtype):
        return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)

    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.1)):
        kernel = empirical_ntk(apply_fn, cast(params, dtype), cast(x1, dtype))
        assert kernel.dtype == jnp.float32
        assert_close(kernel, jac @ jac.T, tolerance)


def test_precision_changes_the_products():
    """On a CPU every precision is full; the program that is compiled says which was asked for."""
    for precision, word in ((jax.lax.Precision.HIGHEST, "HIGHEST"), (jax.lax.Precision.DEFAULT, "DEFAULT")):
        strategy = Structured(precision=precision)
        program = _kernel.lower(strategy, lambda w, x: jnp.tanh(x @ w), jnp.ones((3, 2)), jnp.ones((4, 3)), None)
        assert word in program.as_text()


# -------------------------------------------------------------------------------------------------------------- plans


def test_a_plan_counts_by_hand():
    """Dense layer with its bias, D = 8 inputs, H = 4 = c outputs: D + c²H products a pair, 55 pairs of 10 examples."""
    params = {"w": jnp.ones((8, 4)), "b": jnp.ones(4)}
    chosen = plan(lambda params, x: x @ params["w"] + params["b"], params, jnp.ones((10, 8)))
    (leaf,) = chosen.leaves
    assert (leaf.names, leaf.num_params, leaf.positions) == (("['w']", "['b']"), 36, 1)
    assert leaf.operations == chosen.operations == 2 * 55 * (8 + 16 * 4)
    assert leaf.bytes == 10 * (8 + 4 * 4) * 8
    assert "PositionPairs" in str(chosen)
    assert "40 x 40" in str(chosen)


@pytest.mark.parametrize(
    ("length", "width", "outputs", "contraction"), [(2, 64, 8, PositionPairs), (64, 4, 2, JacobianBlocks)]
)
def test_the_cheaper_contraction_is_chosen(length, width, outputs, contraction):
    """Few positions of a wide layer, many positions of a narrow one; the other one does as many operations or more."""
    params, x = jnp.ones((width, outputs)), jnp.ones((6, length, width))

    def model(w, x):
        return jnp.tanh(x @ w).sum(1)

    chosen = plan(model, params, x)
    assert type(chosen.leaves[0].contraction) is contraction
    for strategy in (PAIRS, BLOCKS):
        assert chosen.operations <= plan(model, params, x, strategy=strategy).operations
    r, d, h, c = length, width, outputs, outputs
    by_hand = {
        PositionPairs: 21 * r * (r * d + c * r * h + c * c * h),
        JacobianBlocks: 21 * c * c * d * h + 6 * c * r * d * h,
    }
    assert chosen.operations == 2 * by_hand[contraction]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("layer_norm", "consumed by mul"),
        ("branch_by_a_constant", "consumed by"),
        ("custom_vjp_of_a_weight", "consumed by custom_vjp_call"),
        ("unused_and_empty_parameters", "not used"),
    ],
)
def test_a_plan_says_why_a_leaf_is_left_to_autodiff(name, reason):
    apply_fn, params, x1, _ = MODELS[name].build(jnp.float64)
    assert any(reason in leaf.reason for leaf in plan(apply_fn, params, x1).leaves)


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("recomputed_block", {"['first'][0]['w']", "['first'][0]['b']", "['second'][1]['w']"}),
        ("nested_jit", {"['first']", "['second']"}),
        ("recurrent", {"['hidden']", "['in']", "['out']"}),
        ("scanned_layers", {"['layers']['w']", "['out']"}),
        ("attention_with_tied_embeddings", {"['table']", "['q']", "['k']", "['v']", "['o']"}),
        ("embedding_by_take", {"['table']"}),
        ("weight_cast", {"['w']", "['out']"}),
        ("kernel_on_the_left", {"['w']", "['b']"}),
        ("equinox_mlp", {".layers[0].weight", ".layers[0].bias"}),
        ("mixture_of_experts", {"['down']", "['up']", "['gate']"}),
        ("custom_jvp_activation", {"[0]['w']", "[0]['b']", "[1]['w']"}),
    ],
)
def test_uses_are_found_through_what_surrounds_them(name, names):
    apply_fn, params, x1, _ = MODELS[name].build(jnp.float64)
    found = {name for leaf in plan(apply_fn, params, x1).leaves if leaf.positions for name in leaf.names}
    assert names <= found


# ------------------------------------------------------------------------------------------------------------- memory


def test_one_triangle_is_computed_of_a_symmetric_kernel():
    """By the compiler's own count: 5/8 of the operations of the square."""
    params, x = init(0, inputs=64, width=64, outputs=8), batch(0, 128, inputs=64)
    counts = [_kernel.lower(Structured(), mlp, params, x, x2).compile().cost_analysis()["flops"] for x2 in (None, x)]
    assert counts[0] < 0.75 * counts[1]


@pytest.mark.parametrize("name", ["dense", "sequence", "convolution"])
@pytest.mark.parametrize("examples", [None, 4])
def test_the_workspace_is_kept(name, examples):
    """What the compiled program takes beside the kernel is less than the budget, and than what the plan says."""
    rng = np.random.default_rng(0)
    if name == "dense":
        model, params, x = mlp, init(0, inputs=128, width=128, outputs=8), batch(0, 96, inputs=128)
    elif name == "sequence":
        shapes = {"w_in": (3, 32), "b_in": (32,), "square": (32, 32), "b": (32,), "w_out": (32, 8)}
        params = {key: rng.normal(size=shape) for key, shape in shapes.items()}
        model, x = sequence_model, rng.normal(size=(48, 6, 3))
    else:
        params = [rng.normal(size=(3, 3, 3, 8)), rng.normal(size=(512, 4))]
        x = rng.normal(size=(24, 8, 8, 3))

        def model(params, x):
            hidden = jax.lax.conv_general_dilated(
                x, params[0], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            return jnp.sin(jnp.tanh(hidden).reshape(len(x), -1) @ params[1])

    strategy = Structured()
    if examples is not None:
        traced, _ = matched(model, params, x, None)
        choices = strategy.choose(traced, len(x), len(x))
        strategy = Structured(workspace_bytes=workspace(traced, choices, Layout(examples, examples, 1, False)))
    chosen = plan(model, params, x, strategy=strategy)
    assert chosen.triangle == (examples is None)
    taken = _kernel.lower(strategy, model, params, x, None).compile().memory_analysis().temp_size_in_bytes
    assert taken <= min(strategy.workspace_bytes, chosen.bytes - 8 * chosen.shape[0] ** 2)


def test_a_jacobian_larger_than_its_factors_is_never_held():
    """A dense layer over 32 positions of 128 examples, whose Jacobian takes 80 MiB."""
    params = {"w": jax.ShapeDtypeStruct((128, 128), jnp.float32), "out": jax.ShapeDtypeStruct((128, 10), jnp.float32)}
    x = jax.ShapeDtypeStruct((128, 32, 128), jnp.float32)

    def model(params, x):
        return jnp.tanh(x @ params["w"]).mean(1) @ params["out"]

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (params, x))
    assert plan(model, *zeros).leaves[1].contraction == JacobianBlocks()
    memory = _kernel.lower(Structured(), model, params, x, None).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.6 * 4 * 128 * 10 * 128 * 128
    assert memory.temp_size_in_bytes < plan(model, *zeros).bytes


@pytest.mark.parametrize("tokens", [1, 200])
def test_a_large_table_costs_what_its_rows_do(tokens):
    """Rows are compared by index: no Jacobian of the table, and no row of one-hot numbers, is held or planned."""
    params = {"table": np.zeros((50_000, 16), np.float32), "w": np.zeros((16, 4), np.float32)}

    def model(params, x):
        return jnp.tanh(params["table"][x].mean(1)) @ params["w"]

    x = np.zeros((64, tokens), np.int32)
    chosen = plan(model, params, x)
    assert chosen.leaves[0].contraction == PositionPairs()
    memory = _kernel.lower(Structured(), model, params, x, None).compile().memory_analysis()
    assert memory.temp_size_in_bytes < chosen.bytes < 2**26


def test_a_budget_too_small_for_one_example_is_refused():
    message = r"one example needs [\d,]+ bytes of workspace, but workspace_bytes=100\. Pass a larger workspace_bytes"
    for call in (empirical_ntk, plan):
        with pytest.raises(MemoryError, match=message):
            call(mlp, init(0), batch(0, 4), strategy=Structured(workspace_bytes=100))


@pytest.mark.parametrize("workspace_bytes", [1.5e9, True, "1 GiB"])
def test_bad_workspaces(workspace_bytes):
    with pytest.raises(TypeError, match=r"workspace_bytes=.* must be a whole number of bytes"):
        Structured(workspace_bytes=workspace_bytes)


def test_no_contractions():
    with pytest.raises(ValueError, match="leaves nothing to choose from"):
        Structured(contractions=())


# ------------------------------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("strategy", [None, FullJacobian()])
@pytest.mark.parametrize("block_size", [2, 100])
@pytest.mark.parametrize("columns", [None, 5])
def test_blocks_put_together_are_the_kernel(tmp_path, block_size, columns, strategy):
    params, x1 = init(3), batch(3, 7)
    x2 = None if columns is None else batch(4, columns)
    whole = empirical_ntk(mlp, params, x1, x2)
    blocks = NtkBlocks(mlp, params, x1, x2, block_size=block_size, strategy=strategy)
    assert (blocks.shape, blocks.dtype) == (whole.shape, whole.dtype)
    out = np.memmap(tmp_path / "kernel", blocks.dtype, "w+", shape=blocks.shape)
    assert_close(blocks.write_to(out), whole, 1e-12)
    one = blocks[len(blocks) - 1]
    assert_close(whole[one.rows, one.columns], one.values, 1e-12)


def test_blocks_cut_short_go_on_where_they_stopped():
    params, x = init(5), batch(5, 7)
    blocks = NtkBlocks(mlp, params, x, block_size=2)
    assert len(blocks) == 10  # on and below the diagonal of 4 x 4
    out = np.full(blocks.shape, np.nan)
    for rows, columns, values in list(blocks)[:4]:
        out[rows, columns], out[columns, rows] = values, values.T
    assert_close(blocks.write_to(out, start=4), empirical_ntk(mlp, params, x), 1e-12)


def test_bad_blocks():
    blocks = NtkBlocks(mlp, init(0), batch(0, 4))
    with pytest.raises(ValueError, match=r"out has shape \(3, 3\), but must be \(8, 8\)"):
        blocks.write_to(np.empty((3, 3)))
    with pytest.raises(TypeError, match="one index at a time"):
        blocks[0:2]
    with pytest.raises(IndexError):
        blocks[1]
    with pytest.raises(ValueError, match="block_size=0 must be an integer of at least 1"):
        NtkBlocks(mlp, init(0), batch(0, 4), block_size=0)
