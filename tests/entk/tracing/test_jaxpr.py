"""Jaxprs as another release of JAX might make them: the right numbers by autodiff, and a plan that says why."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import entk._structured.factors as factors
import entk._structured.uses as uses
from entk import empirical_ntk, gradient_moments, plan
from entk._tracing.jaxpr import PARAMETERS, Unread, called, parameters, scanned
from tests.entk.mlp_oracle import assert_close

N = 3


def build():
    """(apply_fn, params, x): a convolution, a lookup, dense layers and a scan; a new function each time."""

    def apply_fn(params, x):
        pixels = lax.conv_general_dilated(x["image"], params["filter"], (1, 1), "SAME")[:, 0, 0]
        rows = params["table"][x["tokens"]] + (pixels @ (params["dense"].T * 2))[:, None]
        hidden = jnp.zeros((len(rows), 3))
        hidden, _ = lax.scan(
            lambda h, row: (jnp.tanh(h @ -params["inner"] + row), None), hidden, rows.swapaxes(0, 1)[::-1]
        )
        return jnp.sin(hidden @ jnp.squeeze(params["last"][::-1], 0))

    rng = np.random.default_rng(0)
    shapes = {
        "filter": (1, 1, 2, 2),
        "table": (5, 3),
        "dense": (3, 4),
        "inner": (3, 3),
        "last": (1, 3, 2),
    }
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    x = {"image": jnp.asarray(rng.normal(size=(N, 1, 4, 4))), "tokens": jnp.asarray(rng.integers(0, 5, (N, 4)))}
    return apply_fn, params, x


def by_autodiff(apply_fn, params, x):
    """The Jacobian one example at a time, (n c, p)."""
    rows = []
    for i in range(N):
        jac = jax.jacrev(apply_fn)(params, jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], x))
        rows.append(
            np.concatenate([np.asarray(leaf[0]).reshape(leaf.shape[1], -1) for leaf in jax.tree.leaves(jac)], 1)
        )
    return np.concatenate(rows)


@pytest.fixture(scope="module")
def expected():
    return by_autodiff(*build())


def check(expected, reason, given_up):
    """Kernel and moments are right, and the leaves named are differentiated by autodiff for this reason."""
    apply_fn, params, x = build()
    assert_close(empirical_ntk(apply_fn, params, x), expected @ expected.T, 1e-12)
    moments = gradient_moments(lambda params, x: apply_fn(params, x).sum(1), params, x)
    each = expected.reshape(N, 2, -1).sum(1)
    assert_close(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(moments.mean_grads)]), each.mean(0), 1e-12)
    found = {leaf.names: leaf.reason for leaf in plan(apply_fn, params, x).leaves if leaf.reason}
    assert {name for names in found for name in names} == {f"['{name}']" for name in given_up}
    assert all(reason in why for why in found.values()), found


EVERY = {"filter", "table", "dense", "inner", "last"}
READ = {
    "conv_general_dilated": {"filter"},
    "gather": {"table"},
    "dot_general": {"dense", "inner", "last"},
    "scan": {"inner"},
    "transpose": {"dense"},
    "mul": {"dense"},
    "neg": {"inner"},
    "rev": {"last"},
    "squeeze": {"last"},
}


def test_a_model_that_is_read_whole(expected):
    check(expected, "", set())


@pytest.mark.parametrize("name", READ)
def test_a_parameter_that_is_missing(expected, monkeypatch, name):
    """As `num_consts` of a scan was after JAX 0.10."""
    needed, others = PARAMETERS[name]
    monkeypatch.setitem(PARAMETERS, name, (f"{needed} renamed", others))
    check(expected, f"is consumed by {name}, which cannot be read: {name} has no renamed", READ[name])


@pytest.mark.parametrize(
    ("name", "unknown"), [("scan", "unroll"), ("dot_general", "precision"), ("gather", "fill_value")]
)
def test_a_parameter_that_is_new(expected, monkeypatch, name, unknown):
    needed, others = (" ".join(set(names.split()) - {unknown}) for names in PARAMETERS[name])
    monkeypatch.setitem(PARAMETERS, name, (needed, others))
    check(expected, f"{name} has {unknown}, which is not known", READ[name])


def test_a_primitive_that_is_new(expected, monkeypatch):
    monkeypatch.delitem(PARAMETERS, "rev")
    check(expected, "is consumed by rev", {"last"})


def test_a_parameter_of_another_kind(expected, monkeypatch):
    """Whatever an unexpected value makes of a rule, it is not the user who sees it."""
    monkeypatch.setattr(uses, "_dot", lambda eqn, *_: eqn.params["dimension_numbers"].contracting)
    check(expected, "AttributeError", READ["dot_general"])


def test_a_jaxpr_of_another_kind(expected, monkeypatch):
    monkeypatch.setattr(factors, "Uses", lambda closed, num_leaves: closed.equations)
    check(expected, "is in a model that cannot be read: AttributeError", EVERY)


def test_an_equation_that_cannot_be_run_again(expected, monkeypatch):
    def bind(eqn, operands):
        raise TypeError(f"{eqn.primitive.name} takes no operands")

    monkeypatch.setattr(factors, "bind", bind)
    check(expected, "is in a model that cannot be read: TypeError", EVERY)


def test_errors_of_the_model_itself_are_its_own():
    with pytest.raises(ZeroDivisionError):
        plan(lambda w, x: x @ w / (1 // 0), jnp.ones(2), jnp.ones((3, 2)))


# --------------------------------------------------------------------------------------------------- what is read


def equation(function, *args):
    """The one equation of a function."""
    (eqn,) = jax.make_jaxpr(function)(*args).jaxpr.eqns
    return eqn


@pytest.mark.parametrize(("num_consts", "num_carry", "sliced", "stacked"), [(2, 1, 1, 1), (0, 2, 0, 1), (1, 0, 2, 2)])
@pytest.mark.parametrize("options", [{}, {"reverse": True, "unroll": 2}])
def test_a_scan_is_divided_by_the_ranks_of_its_operands(num_consts, num_carry, sliced, stacked, options):
    consts, carry = [jnp.ones((4, k + 1)) for k in range(num_consts)], [jnp.ones(4)] * num_carry
    slices = [jnp.ones((4, k + 1)) for k in range(sliced)]

    def body(carry, slices):
        total = sum(leaf.sum() for leaf in (*consts, *slices))
        return [one + total for one in carry], [total] * stacked

    def loop(consts_, carry, slices):
        consts[:] = consts_
        return lax.scan(body, carry, slices, length=4, **options)

    scan = scanned(equation(loop, consts, carry, slices))
    assert scan[1:3] == (num_consts, num_carry)
    assert scan[3:] == (4, options.get("reverse", False), options.get("unroll", 1))


def changed(eqn, **params):
    """An equation with other parameters; those that are None are taken away."""
    both = {**eqn.params, **params}
    kept = {name: value for name, value in both.items() if value is not None}
    return SimpleNamespace(primitive=eqn.primitive, params=kept, invars=eqn.invars, outvars=eqn.outvars)


def test_equations_that_are_not_as_they_were_are_refused():
    scan = equation(lambda h, x: lax.scan(lambda h, row: (h + row, h), h, x), jnp.ones(2), jnp.ones((3, 2)))
    assert scanned(changed(scan, num_consts=None, num_carry=None, ft_in=None, ft_out=None)) == scanned(scan)
    with pytest.raises(Unread, match="scan has no length"):
        scanned(changed(scan, length=None, steps=3))
    with pytest.raises(Unread, match="scan has backwards, which is not known"):
        scanned(changed(scan, backwards=True))
    with pytest.raises(Unread, match="other shapes than constants, carries and slices"):
        scanned(changed(scan, length=4))
    with pytest.raises(Unread, match="sin is not known"):
        parameters(equation(jnp.sin, 1.0))


def test_a_call_is_read_under_whatever_name_its_jaxpr_is_kept():
    call = equation(jax.jit(lambda w, x: x @ w), jnp.ones((2, 3)), jnp.ones((4, 2)))
    inner = call.params["jaxpr"]
    assert called(changed(call, jaxpr=None, program=inner)) == called(call)
    with pytest.raises(Unread, match="jit holds 0 jaxprs"):
        called(changed(call, jaxpr=None))
    with pytest.raises(Unread, match="jit holds 2 jaxprs"):
        called(changed(call, other=inner))
    call.invars.append(call.invars[0])
    with pytest.raises(Unread, match="passes on other operands"):
        called(changed(call))


def test_equations_run_again_under_the_settings_of_their_tracing():
    """Random numbers of a model that asks for another generator are those of that generator."""

    def apply_fn(w, x):
        with jax.threefry_partitionable(False):
            noise = jax.random.bits(jax.random.key(0), (1, 3)) / 2.0**32
        return jnp.tanh(x @ w) * noise

    w, x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3))), jnp.ones((N, 2))
    jac = by_autodiff(apply_fn, w, x)
    assert_close(empirical_ntk(apply_fn, w, x), jac @ jac.T, 1e-12)
