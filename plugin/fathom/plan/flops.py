"""Operations of the matrix products of a function, counted from its jaxpr.

XLA's cost analysis counts the body of a loop once, whatever its length; here a body counts as often as it runs. What
the results do not depend on counts nothing, and what stands twice in a body, of the same operands, counts once, as the
compiler drops the one and merges the other.

Only matrix products count, at 2 M N K each: they are what the peak rate of a chip is stated for. Sorts, gathers,
elementwise work and the factorisations of `jnp.linalg` count nothing.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import eval_jaxpr
from jax.extend.core import JaxprEqn, Literal, jaxprs_in_params
from jax.extend.source_info_util import summarize
from jax.interpreters.partial_eval import dce_jaxpr

BRANCHES = ("mean", "max")
MAX_TRIPS = 2**24
"""A while loop is followed this far to see how often it runs."""


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product as it stands in a program.

    Attributes:
      primitive: its name in JAX, e.g. "dot_general".
      shapes: operands and result, e.g. "float32[8,64] float32[64,3] -> float32[8,3]".
      flops: operations of one run.
      source: file, line and function that called it.
    """

    primitive: str
    shapes: str
    flops: float
    source: str


Products = collections.Counter[Product]
"""How often each product runs; not always a whole number, see `branches` of `matrix_products`."""


def count_flops(
    function: Callable,
    *args: Any,
    branches: str = "mean",
    platform: str | None = None,
    loops: Mapping[str, float] | None = None,
) -> float:
    """Operations of the matrix products of one call `function(*args)`; nothing is run.

    Arguments and errors are those of `matrix_products`.
    """
    found = _products(function, args, branches, platform, loops)
    return sum(product.flops * times for product, times in found.items())


def count_jaxpr(
    jaxpr: Any, branches: str = "mean", platform: str | None = None, loops: Mapping[str, float] | None = None
) -> float:
    """`count_flops` of a function that is traced already: its closed jaxpr."""
    return sum(product.flops * times for product, times in _walk(jaxpr, branches, platform, loops).items())


def matrix_products(
    function: Callable,
    *args: Any,
    branches: str = "mean",
    platform: str | None = None,
    loops: Mapping[str, float] | None = None,
) -> list[tuple[Product, float]]:
    """Every matrix product of one call `function(*args)` and how often it runs, the costliest first.

    Args:
      function: anything that `jax.make_jaxpr` traces. Inside a `shard_map` the products of all its devices count;
        elsewhere shapes are those of the whole arrays. Rows of a ragged product count whether or not a group has them,
        zeros of a dilated convolution too.
      args: arrays or `jax.ShapeDtypeStruct`s. A number here is traced; close over the ones that bound a loop.
      branches: of a `cond` or `switch` whose index is not known, count the "mean" over the branches (as often as
        `fathom.ops.ranges.taken` says, else all equally often) or the costliest ("max").
      platform: whose branch of a `platform_dependent` counts: "cpu", "tpu", "cuda" or "rocm"; JAX's default backend
        unless given.
      loops: name of a while loop's body -> how often to expect it to run, where that depends on the data; not always
        a whole number.

    Raises:
      ValueError: for any other while loop with matrix products whose trips do not follow from constants; for a
        `platform_dependent` without a branch for the platform; for another value of `branches`; for a Pallas kernel
        without a cost estimate, or a call that cannot be looked into, for to count it as nothing would be a wrong sum.
    """
    found = _products(function, args, branches, platform, loops)
    return sorted(found.items(), key=lambda item: item[0].flops * item[1], reverse=True)


def product_table(
    function: Callable,
    *args: Any,
    top: int = 10,
    branches: str = "mean",
    platform: str | None = None,
    loops: Mapping[str, float] | None = None,
) -> str:
    """The costliest `top` of `matrix_products` as lines: share of all operations, operations, runs, shapes, source."""
    found = matrix_products(function, *args, branches=branches, platform=platform, loops=loops)
    total = sum(product.flops * times for product, times in found)
    lines = [f"{'share':>6} {'flops':>10} {'runs':>10}  product, {total:.4g} flops in all"]
    for product, times in found[:top]:
        flops = product.flops * times
        what = f"{product.primitive} {product.shapes}  {product.source}"
        lines.append(f"{flops / total:6.1%} {flops:10.4g} {times:10.6g}  {what}")
    return "\n".join(lines)


def _products(
    function: Callable,
    args: Sequence[Any],
    branches: str,
    platform: str | None,
    loops: Mapping[str, float] | None,
) -> Products:
    return _walk(jax.make_jaxpr(function)(*args), branches, platform, loops)


def _walk(closed: Any, branches: str, platform: str | None, loops: Mapping[str, float] | None) -> Products:
    if branches not in BRANCHES:
        raise ValueError(f"branches: found {branches!r}, expected one of {BRANCHES}")
    backend = jax.default_backend() if platform is None else platform
    live, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    counter = _Counter(branches, "cuda" if backend == "gpu" else backend, loops or {})
    return counter.walk(live, closed.consts, [None] * len(live.invars))[0]


def _times(products: Products, times: float) -> Products:
    return collections.Counter({product: times * runs for product, runs in products.items() if times})


def _sum(products: Products) -> float:
    return sum(product.flops * times for product, times in products.items())


def _dot(eqn: JaxprEqn) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contracted)


def _ragged_dot(eqn: JaxprEqn) -> float:
    # Every element of lhs meets every column of rhs once, whichever dimension is cut into groups.
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    taken = {*contracted, *batch, *numbers.rhs_group_dimensions}
    lhs, rhs = (var.aval.shape for var in eqn.invars[:2])
    return 2.0 * math.prod(lhs) * math.prod(size for i, size in enumerate(rhs) if i not in taken)


def _convolution(eqn: JaxprEqn) -> float:
    kernel = eqn.invars[1].aval.shape
    per_output = math.prod(kernel) // max(kernel[eqn.params["dimension_numbers"].rhs_spec[0]], 1)
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * per_output


_PRODUCTS = {"dot_general": _dot, "ragged_dot_general": _ragged_dot, "conv_general_dilated": _convolution}
# Their one jaxpr runs once, on their own operands.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "composite": "jaxpr",
    "call": "call_jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "eval_jaxpr": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vmap_call": "call",
    "custom_partitioning": "call",
}
# Products that no jaxpr shows.
_OPAQUE = (
    "call_exported",
    "dot_product_attention_bwd",
    "dot_product_attention_fwd",
    "ffi_call",
    "scaled_dot",
    "scaled_matmul",
    "tpu_custom_call",
)
# What bounds of loops and indices of branches are made with.
_SCALARS = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
    "clamp": lambda low, x, high: np.clip(x, low, high),
    "convert_element_type": lambda x: x,
}


class _Counter:
    """Counts the products of a jaxpr. A "known" is the value of a scalar that follows from constants, else None."""

    def __init__(self, branches: str, platform: str, loops: Mapping[str, float]):
        self.branches, self.platform, self.loops = branches, platform, loops

    def walk(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any]) -> tuple[Products, list[Any]]:
        """(the products of one run, the knowns of its results), given the knowns of its inputs."""
        known = dict(zip(jaxpr.constvars, map(_scalar, consts), strict=False))
        known |= zip(jaxpr.invars, inputs, strict=True)

        def read(atom):
            return _scalar(atom.val) if isinstance(atom, Literal) else known.get(atom)

        products: Products = collections.Counter()
        merge = _Merge()
        for eqn in jaxpr.eqns:
            if merge.seen(eqn):
                known |= zip(eqn.outvars, [None] * len(eqn.outvars), strict=False)
                continue
            found, results = self.equation(eqn, [read(atom) for atom in eqn.invars])
            for product, times in found.items():
                products[product] += times
            known |= zip(eqn.outvars, results, strict=False)
        return products, [read(atom) for atom in jaxpr.outvars]

    def inside(self, jaxpr: Any, inputs: Sequence[Any] | None = None) -> tuple[Products, list[Any]]:
        """`walk` of a sub-jaxpr, which may come with its constants."""
        jaxpr, consts = _open(jaxpr)
        return self.walk(jaxpr, consts, [None] * len(jaxpr.invars) if inputs is None else inputs)

    def equation(self, eqn: JaxprEqn, inputs: list[Any]) -> tuple[Products, list[Any]]:
        name, params = eqn.primitive.name, eqn.params
        if name in _PRODUCTS:
            return _one(eqn, _PRODUCTS[name](eqn)), []
        if name in _CALLS:
            return self.inside(params[_CALLS[name]], inputs)
        if name in ("scan", "while", "cond", "shard_map", "pallas_call"):
            return getattr(self, f"_{name}")(eqn, inputs), []
        if name in _OPAQUE:
            raise ValueError(f"{name} at {_source(eqn)}: its operations cannot be counted from outside; leave it out")
        if name in _SCALARS and not any(value is None for value in inputs):
            with np.errstate(all="ignore"):  # integers wrap around in XLA
                return collections.Counter(), [np.asarray(_SCALARS[name](*inputs), eqn.outvars[0].aval.dtype)]
        if any(self.inside(jaxpr)[0] for jaxpr in jaxprs_in_params(params)):
            raise ValueError(
                f"{name} at {_source(eqn)}: it holds matrix products, and how often it runs them is not known here"
            )
        return collections.Counter(), []

    def _scan(self, eqn: JaxprEqn, inputs: list[Any]) -> Products:
        params = eqn.params
        # jax 0.12 keeps (constants, carry, slices) as a tree instead of two numbers.
        consts = params["num_consts"] if "num_consts" in params else len(list(params["ft_in"].unpack()[0]))
        body = self.inside(params["jaxpr"], inputs[:consts] + [None] * (len(inputs) - consts))[0]
        return _times(body, params["length"])

    def _while(self, eqn: JaxprEqn, inputs: list[Any]) -> Products:
        params = eqn.params
        of_test, of_both = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        carry = [None] * (len(inputs) - of_both)
        test = self.inside(params["cond_jaxpr"], inputs[:of_test] + carry)[0]
        body = self.inside(params["body_jaxpr"], inputs[of_test:of_both] + carry)[0]
        if not test and not body:
            return collections.Counter()
        trips = _trip_count(eqn, inputs)
        if trips is None:
            # Its body's name: the place that an equation is said to stand at may be that of a call around it.
            trips = self.loops.get(_open(params["body_jaxpr"])[0].debug_info.func_name)
        if trips is None:
            raise ValueError(
                f"while loop at {_source(eqn)}: it holds matrix products, and its number of trips does not follow from "
                f"constants (or passes {MAX_TRIPS}); give jax.lax.fori_loop bounds that are known when it is traced, "
                "use jax.lax.scan, or tell the expected number in `loops`"
            )
        return _times(body, trips)  # a product in the condition decides it, so that no constant does

    def _cond(self, eqn: JaxprEqn, inputs: list[Any]) -> Products:
        branches = eqn.params["branches"]
        platforms = eqn.params.get("branches_platforms")
        if platforms is not None:
            for branch, names in zip(branches, platforms, strict=True):
                if names is None or self.platform in names:
                    return self.inside(branch, inputs[1:])[0]
            raise ValueError(
                f"platform_dependent at {_source(eqn)}: found branches for {platforms}, expected one for "
                f"{self.platform!r}"
            )
        found = [self.inside(branch, inputs[1:])[0] for branch in branches]
        if inputs[0] is not None:
            return found[min(max(int(inputs[0]), 0), len(found) - 1)]
        if self.branches == "max":
            return max(found, key=_sum)
        products: Products = collections.Counter()
        for one, share in zip(found, _shares(branches), strict=True):
            products += _times(one, share)
        return products

    def _shard_map(self, eqn: JaxprEqn, inputs: list[Any]) -> Products:
        # Shapes inside are one device's along these axes, and still whole along the others.
        mesh, axes = eqn.params["mesh"], eqn.params["newly_manual_axes"]
        return _times(self.inside(eqn.params["jaxpr"], inputs)[0], math.prod(mesh.shape[axis] for axis in axes))

    def _pallas_call(self, eqn: JaxprEqn, inputs: list[Any]) -> Products:
        estimate = eqn.params["cost_estimate"]
        if estimate is None:
            raise ValueError(
                f"pallas_call {eqn.params.get('name') or ''!r} at {_source(eqn)}: its operations cannot be counted "
                "from outside; give it a cost_estimate=pl.CostEstimate(...)"
            )
        return _one(eqn, float(estimate.flops))


def _shares(branches: Sequence[Any]) -> list[float]:
    """How often each branch is taken, as `fathom.ops.ranges.taken` names it; equally often without such names."""
    names = [re.fullmatch(r"taken_(\d+)_of_(\d+)", _open(branch)[0].debug_info.func_name) for branch in branches]
    if not all(names):
        return [1 / len(branches)] * len(branches)
    return [int(name[1]) / int(name[2]) for name in names]


class _Merge:
    """Finds equations of a body that do again what one before them has done, of the same operands."""

    def __init__(self) -> None:
        self.done: dict[tuple, list[Any]] = {}
        self.same: dict[Any, Any] = {}

    def seen(self, eqn: JaxprEqn) -> bool:
        if eqn.effects or eqn.primitive.name in ("scan", "while", "cond", "shard_map", "pallas_call"):
            return False
        operands = [repr(a.val) if isinstance(a, Literal) else id(self.same.get(a, a)) for a in eqn.invars]
        key = eqn.primitive.name, str(eqn.params), *operands
        if key not in self.done:
            self.done[key] = eqn.outvars
            return False
        self.same |= zip(eqn.outvars, self.done[key], strict=True)
        return True


def _trip_count(eqn: JaxprEqn, inputs: list[Any]) -> int | None:
    """How often a while loop runs; None if that does not follow from knowns, or is above MAX_TRIPS.

    The part of the loop that its condition depends on is cut out and run.
    """
    (test, test_consts), (body, body_consts) = (_open(eqn.params[f"{part}_jaxpr"]) for part in ("cond", "body"))
    of_test, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    test_inputs, body_inputs = inputs[:of_test], inputs[of_test : of_test + of_body]
    carry = inputs[of_test + of_body :]
    test, test_uses = dce_jaxpr(test, [True])
    needed: list[bool] = test_uses[of_test:]
    while True:
        sliced, body_uses = dce_jaxpr(body, needed)
        wider = [a or b for a, b in zip(needed, body_uses[of_body:], strict=True)]
        if wider == needed:
            break
        needed = wider
    used = _picked([*test_inputs, *body_inputs, *carry], [*test_uses[:of_test], *body_uses[:of_body], *needed])
    if any(value is None for value in used):
        return None

    def again(state):
        count, carry = state
        return (count < MAX_TRIPS) & eval_jaxpr(test, test_consts, *_picked([*test_inputs, *carry], test_uses))[0]

    def step(state):
        count, carry = state
        made = iter(eval_jaxpr(sliced, body_consts, *_picked([*body_inputs, *carry], body_uses)))
        return count + 1, [next(made) if need else None for need in needed]

    avals = (var.aval for var in body.invars[of_body:])
    start = [jnp.asarray(v, a.dtype) if n else None for v, a, n in zip(carry, avals, needed, strict=True)]
    with jax.ensure_compile_time_eval():
        trips = int(jax.lax.while_loop(again, step, (jnp.int32(0), start))[0])
    return None if trips >= MAX_TRIPS else trips


def _picked(values: Sequence[Any], used: Sequence[bool]) -> list[Any]:
    return [value for value, use in zip(values, used, strict=True) if use]


def _open(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """(jaxpr, its constants) of a jaxpr with or without them."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def _scalar(value: Any) -> np.ndarray | None:
    """A concrete scalar; None for anything else."""
    dtype = getattr(value, "dtype", None)
    opaque = dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.extended)  # random keys
    return None if isinstance(value, jax.core.Tracer) or opaque or np.ndim(value) else np.asarray(value)


def _one(eqn: JaxprEqn, flops: float) -> Products:
    if not flops:
        return collections.Counter()
    operands, results = (" ".join(_shape(v.aval) for v in part) for part in (eqn.invars, eqn.outvars))
    return collections.Counter({Product(eqn.primitive.name, f"{operands} -> {results}", flops, _source(eqn)): 1})


def _shape(aval: Any) -> str:
    return f"{aval.dtype}[{','.join(map(str, aval.shape))}]"


def _source(eqn: JaxprEqn) -> str:
    return summarize(eqn.source_info).rsplit("/", 1)[-1] or "an unknown place"
