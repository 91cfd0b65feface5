"""Plans a recipe: compiles its step for a slice, reads what it takes, and looks for what would fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from fathom.mesh import across_slices
from fathom.plan.chip_memory import HeapUse, heap_use
from fathom.plan.collectives import step_traffic
from fathom.plan.compiler import Compiled, PlanError, compile_step
from fathom.plan.report import GIB, PlanReport, memory_parts
from fathom.plan.roofline import step_bound
from fathom.recipe import Recipe
from fathom.recipe_checks import Problem, RecipeError, nearest
from fathom.recipe_stages import check_elsewhere, stage_blocks, stage_number, stage_recipes
from fathom.topology import parse_topology

FITS = ("batch", "sequence")
MOST_DOUBLINGS = 8
Progress = Callable[[str], None]


def plan(
    recipe: Recipe,
    topology: str | None = None,
    *,
    fit: str | None = None,
    codegen: bool = False,
    advise: bool = True,
    stage: int | str | None = None,
    progress: Progress = lambda text: None,
) -> Iterator[PlanReport]:
    """Compiles the train step of each stage of a recipe for a slice that need not be there.

    What runs beside the step, evaluation and what anticipatory routing adds, is not compiled; the report says so.

    Args:
      topology: "v5p:8x8x8", "2*v6e:16x16", or "cpu" for this machine; the recipe's `mesh.topology` unless given, and
        "cpu" where it has none.
      fit: "batch" or "sequence": look for the most rows, or the longest sequence, that fit, by bisection.
      codegen: have machine code written too, minutes more.
      advise: where it does not fit, compile with changes that save memory until one does.
      stage: plan this one alone, by its number, counted from 1, or its name.
      progress: told what is going on, a line at a time.

    Yields:
      One report per stage, each as soon as it is there.

    Raises:
      RecipeError: for a recipe that cannot run on the slice, every problem at once; for other values of `fit`, `stage`.
      TopologyError: for a topology that is none.
      PlanError: when the step does not compile for another reason than memory.
    """
    where = topology or recipe.mesh.topology or "cpu"
    recipe = changed_recipe(recipe, {"mesh": {"topology": None if where == "cpu" else str(parse_topology(where))}})
    chosen = _check(recipe, where, fit, stage)
    blocks, stages, done = stage_blocks(recipe), stage_recipes(recipe), 0
    for number, part in enumerate(stages, 1):
        steps = (blocks[number - 1].until if blocks else recipe.train.steps) - done
        done += steps
        if chosen in (None, number):
            named = [f"{number} of {len(stages)}", blocks[number - 1].name] if blocks else []
            report = _plan_stage(part, ", ".join(filter(None, named)), where, fit, codegen, advise, progress)
            yield dataclasses.replace(report, steps=steps, not_compiled=not_compiled(part))


def not_compiled(recipe: Recipe) -> tuple[str, ...]:
    """What a stage's run has that a plan does not look at, a sentence each."""
    train, told = recipe.train, []
    block = train.anticipatory_routing
    if block.always or block.after_spike:
        when = "in all steps" if block.always else f"up to {block.after_spike} steps after a spike"
        told.append(
            f"train.anticipatory_routing, {when}: a forward pass more for each step, the step with experts that are "
            f"given, and {block.delay} x 4 bytes for each token, learned router and expert that it chooses"
        )
    if train.eval_every:
        every = f"every {train.eval_every} steps"
        told.append(f"evaluation, {every}: forward passes, of as many rows at a time as a step's")
    return tuple(told)


def _check(recipe: Recipe, topology: str, fit: str | None, stage: int | str | None) -> int | None:
    """The number of the stage asked for; RecipeError listing what is wrong before anything is compiled."""
    problems = check_elsewhere(recipe, None if topology == "cpu" else parse_topology(topology).devices)
    if fit not in (None, *FITS):
        problems.append(Problem("--fit", repr(fit), f"one of {FITS}", "correct it"))
    if fit and topology == "cpu":
        problems.append(Problem("--fit", repr(fit), "a slice with a limit to fit", "add --topology"))
    chosen = None
    if stage is not None and not problems:
        blocks = stage_blocks(recipe)
        chosen = stage_number(blocks, stage)
        if chosen is None:
            names = [block.name for block in blocks if block.name]
            named = f", or {', '.join(names)}" if names else ""
            expected = f"1 to {max(len(blocks), 1)}, the recipe's stages{named}"
            problems.append(Problem("--stage", f"{stage}", expected, nearest(str(stage), names) or "correct it"))
    if problems:
        raise RecipeError(problems, recipe.name)
    return chosen


def _plan_stage(recipe, name, where, fit, codegen, advise, progress) -> PlanReport:
    report = compile_report(recipe, name, where, codegen, progress)
    if not report.fits and advise:
        report = dataclasses.replace(report, advice=tuple(_advice(recipe, where, report, progress)))
    if fit:
        report = dataclasses.replace(report, largest_fit=largest_fit(recipe, where, fit, report, progress))
    return report


def compile_report(
    recipe: Recipe, stage: str, topology: str, codegen: bool = False, progress: Progress = lambda text: None
) -> PlanReport:
    """One compilation and what it tells."""
    return make_report(recipe, stage, topology, compile_step(recipe, topology, codegen=codegen, progress=progress))


def make_report(recipe: Recipe, stage: str, topology: str, compiled: Compiled) -> PlanReport:
    """What a compilation tells of a recipe."""
    slice_ = None if topology == "cpu" else parse_topology(topology)
    facts = compiled.facts
    use = _use(compiled)
    sizes = tuple(facts["mesh"].values())
    across = dict(zip(facts["mesh"], across_slices(sizes, slice_.slices if slice_ else 1), strict=True))
    traffic = step_traffic(compiled.module, facts["mesh"], across=across)
    bound = None
    # A model's one formula is of sparse attention and of all weights training.
    model_flops = facts["formula_flops"] if recipe.train.stage == "sparse" else None
    if facts["expected_flops"] is not None:
        model_flops = facts["expected_flops"]["model"]
    if slice_ is not None:
        bound = step_bound(slice_, facts["flops"], model_flops, traffic, facts["optimizer"])
    devices = math.prod(sizes)
    limit = slice_.generation.hbm_bytes if slice_ else None
    return PlanReport(
        recipe=recipe.name,
        stage=stage,
        model=recipe.model.name,
        topology=topology,
        chips=slice_.chips if slice_ else 1,
        devices=devices,
        hosts=slice_.hosts if slice_ else 1,
        rows=recipe.data.batch_size,
        sequence_length=recipe.data.sequence_length,
        memory=memory_parts(use, facts),
        total=use.total,
        limit=limit,
        fits=compiled.refused is None and (limit is None or use.total <= limit),
        largest=use.largest,
        parameters=facts["parameters"],
        formula_parameters=facts["formula_parameters"],
        tokens=facts["tokens"],
        read_tokens=facts["read_tokens"],
        flops=facts["flops"],
        model_flops=model_flops,
        remat=recipe.model.remat,
        expected_flops=facts["expected_flops"],
        traffic=tuple(traffic),
        bound=bound,
        rows_of_parameters=tuple(facts["rows"]),
        seconds=compiled.seconds,
        codegen=compiled.sizes is not None,
    )


def _use(compiled: Compiled) -> HeapUse:
    if compiled.hlo is not None:
        return heap_use(compiled.hlo, compiled.facts["weight_shapes"])
    sizes = compiled.sizes or {}
    outputs = sizes["output"] - sizes["alias"]
    return HeapUse(sizes["argument"], sizes["temp"], outputs, 0, 0, sizes["temp"], 0, ())


CHANGES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("model.remat=full", {"model": {"remat": "full"}}),
    ("model.remat=unit", {"model": {"remat": "unit"}}),
    ("optimizer.momentum_dtype=bfloat16", {"optimizer": {"momentum_dtype": "bfloat16"}}),
    (
        "model.remat=unit optimizer.momentum_dtype=bfloat16",
        {"model": {"remat": "unit"}, "optimizer": {"momentum_dtype": "bfloat16"}},
    ),
)
"""What saves memory without another mesh, the cheapest first."""


def _advice(recipe: Recipe, topology: str, report: PlanReport, progress: Progress) -> Iterator[str]:
    """What each of the changes comes to, until one fits."""
    yield f"it needs {(report.total - (report.limit or 0)) / GIB:.2f} GiB less; tried:"
    for text, values in _changes(recipe):
        progress(f"does it fit with {text}?")
        try:
            changed = compile_report(changed_recipe(recipe, values), "", topology)
        except PlanError as error:
            yield f"  {text}: {error}"
            continue
        yield f"  {text}: {changed.total / GIB:.2f} GiB, {'fits' if changed.fits else 'does not fit'}"
        if changed.fits:
            return
    yield "  none of these fits: take more chips, or cut the sequence or the experts over more of them"


def _changes(recipe: Recipe) -> Iterator[tuple[str, dict[str, Any]]]:
    for text, values in CHANGES:
        saves_less = recipe.model.remat == "unit" and values.get("model") == {"remat": "full"}
        if changed_recipe(recipe, values) != recipe and not saves_less:
            yield text, values
    accumulation = recipe.train.accumulation
    if recipe.data.batch_size % (2 * _row_unit(recipe)) == 0:
        yield f"train.accumulation={2 * accumulation}", {"train": {"accumulation": 2 * accumulation}}


def changed_recipe(recipe: Recipe, values: dict[str, dict[str, Any]]) -> Recipe:
    """The recipe with these keys of its blocks changed."""
    written = recipe.to_dict()
    for block, changes in values.items():
        written[block] = {**written[block], **changes}
    return Recipe.model_validate(written)


def largest_fit(
    recipe: Recipe, topology: str, what: str, first: PlanReport, progress: Progress
) -> dict[str, Any]:
    """The most rows, or the longest sequence, that fit: doubled or halved, then bisected.

    Rows are tried in multiples of what the mesh and `train.accumulation` cut them into, lengths in eighths of the
    recipe's own.
    """
    key = "batch_size" if what == "batch" else "sequence_length"
    own = getattr(recipe.data, key)
    unit = _row_unit(recipe) if what == "batch" else _length_unit(recipe)
    tried: dict[int, PlanReport] = {own: first}
    refused: dict[int, str] = {}

    def fits(count: int) -> bool:
        size = count * unit
        if size in refused:
            return False
        if size not in tried:
            progress(f"does it fit with data.{key}={size}?")
            changed = with_positions(recipe, size) if what == "sequence" else recipe
            try:
                tried[size] = compile_report(changed_recipe(changed, {"data": {key: size}}), "", topology)
            except PlanError as error:
                refused[size] = str(error)
                return False
        return tried[size].fits

    _search(own // unit, fits)
    best = max((size for size, report in tried.items() if report.fits), default=0)
    return {
        "what": "data." + key,
        "value": best,
        "total": tried[best].total if best else 0,
        "tried": {size: {"total": r.total, "fits": r.fits} for size, r in sorted(tried.items())},
        "refused": refused,
    }


def _row_unit(recipe: Recipe) -> int:
    """The rows of a step come in multiples of this: row shards times microbatches."""
    spec = recipe.model_spec()
    axes = spec.preset(recipe.mesh.preset)["act_batch"] or ()
    axes = (axes,) if isinstance(axes, str) else axes
    return math.prod(recipe.mesh.shape[axis] for axis in axes) * recipe.train.accumulation


def _length_unit(recipe: Recipe) -> int:
    """Lengths are tried in eighths of the recipe's own, where the mesh cuts those evenly."""
    axes = recipe.model_spec().preset(recipe.mesh.preset)["act_sequence"] or ()
    axes = (axes,) if isinstance(axes, str) else axes
    columns = math.prod(recipe.mesh.shape[axis] for axis in axes)
    own = recipe.data.sequence_length
    return next(own // parts for parts in (8, 4, 2, 1) if own % parts == 0 and own // parts % columns == 0)


def with_positions(recipe: Recipe, length: int) -> Recipe:
    """The recipe, its model allowing as many positions as that."""
    config = recipe.model_spec().config
    if getattr(config, "max_position_embeddings", length) >= length:
        return recipe
    written = {**recipe.model.config, "max_position_embeddings": length}
    return changed_recipe(recipe, {"model": {"config": written}})


def _search(own: int, fits: Callable[[int], bool]) -> None:
    """Asks about counts from `own` up or down by factors of two, and then between, down to an eighth or to one."""
    low, high = 0, None
    count = own
    for _ in range(MOST_DOUBLINGS):
        if fits(count):
            low = count
        else:
            high = count
        if (low and high) or (high == 1):
            break
        count = low * 2 if low else max(high // 2, 1)
    while low and high and high - low > max(low // 8, 1):
        count = (low + high) // 2
        if fits(count):
            low = count
        else:
            high = count
