"""Plans of a small model for slices that are not there: the figures against the compiler's own, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest

import fathom
from fathom.cli import main
from fathom.mesh import make_mesh, sharding_scope
from fathom.plan import planner
from fathom.plan.child import devices_of, step_facts
from fathom.plan.collectives import Traffic
from fathom.plan.compiler import compile_step
from fathom.plan.report import PARTS, PlanReport
from fathom.recipe import Recipe, RecipeError
from fathom.recipe_files import recipe_names
from fathom.recipe_stages import stage_recipes
from fathom.topology import GENERATIONS, TopologyError, parse_topology
from fathom.train.step import make_program
from fathom.zoo import get
from tests.plan.test_roofline import crossing

pytestmark = pytest.mark.xdist_group("planner")

SMALL = {
    "name": "small",
    "model": {
        "name": "deepseek-v4-tiny",
        "config": {
            "attention_kinds": ["hca"],
            "compress_ratios": [8],
            "router_kinds": ["learned"],
            "num_mtp_layers": 0,
        },
        "remat": "sublayers",
    },
    "data": {"path": ".", "sequence_length": 512, "batch_size": 16},
    "optimizer": {"name": "muon", "learning_rate": 1e-3},
    "mesh": {"fsdp": 2, "expert": 2, "topology": "v5p:2x2x1"},
    "train": {"steps": 10},
}


QUICK = ("v4-flash-sft-32k-v5p", "v32-128k-v5p")
"""Traced in the suite; the others with -m slow."""


def recipe(**blocks) -> Recipe:
    return Recipe.model_validate({**SMALL, **{k: {**SMALL[k], **v} for k, v in blocks.items()}})


@pytest.fixture(scope="module")
def whole():
    """Compiled to machine code, so that the executable tells its own figures too."""
    return compile_step(recipe(), "v5p:2x2x1", codegen=True)


@pytest.fixture(scope="module")
def report(whole):
    return planner.make_report(recipe(), "", "v5p:2x2x1", whole)


def test_memory_is_the_executables_own(whole, report):
    sizes = whole.sizes
    assert report.memory.keys() == PARTS.keys() and sum(report.memory.values()) == report.total
    arguments = sum(report.memory[part] for part in ("weights", "optimizer", "other"))
    assert arguments == pytest.approx(sizes["argument"] + sizes["output"] - sizes["alias"], rel=0.02)
    temporaries = sum(report.memory[part] for part in ("gradients", "activations", "working", "gaps"))
    assert temporaries == pytest.approx(sizes["temp"], rel=0.02)
    assert min(report.memory.values()) >= 0 and report.fits
    assert report.limit == GENERATIONS["v5p"].hbm_bytes


def test_parameters_are_the_formulas_exactly(report):
    spec = recipe().model_spec()
    assert report.parameters == report.formula_parameters == spec.num_params(spec.config).total
    assert report.tokens == 16 * 512
    assert report.model_flops == pytest.approx(spec.flops_per_token(spec.config, 512) * report.tokens, rel=1e-9)


FULL_SIZE = [name for name in recipe_names() if not name.startswith("tiny")]
STAGES = [(name, stage) for name in FULL_SIZE for stage in range(len(stage_recipes(fathom.load_recipe(name))))]


@pytest.mark.parametrize(
    ("name", "stage"), [pytest.param(*one, marks=[] if one[0] in QUICK else pytest.mark.slow) for one in STAGES]
)
def test_operations_are_what_formulas_say(name, stage):
    """Of every full-size recipe, traced and not compiled: the model's products, those made again, and Muon's."""
    full = stage_recipes(fathom.load_recipe(name))[stage]
    program = make_program(full, make_mesh(full.mesh.shape, devices_of(full, full.mesh.topology)))
    batch = program.abstract_batch(full.data.batch_size, full.data.sequence_length)
    with sharding_scope(program.mesh, program.rules):
        facts = step_facts(program, batch, program.step.trace(program.state, batch).jaxpr, full)
    assert facts["parameters"] == facts["formula_parameters"]
    expected = facts["expected_flops"]
    print(f"{name} {stage + 1}: {facts['flops'] / sum(expected.values()):.4f} of {expected}")
    if full.train.stage == "sparse":
        assert expected["model"] == pytest.approx(facts["formula_flops"], rel=1e-9)
    # Above: what blocks and masks multiply beside the selected entries, and matrices that Muon makes more than once.
    assert 0.95 < facts["flops"] / sum(expected.values()) < 1.05


def test_weights_and_moments_are_counted_by_their_shards(report):
    # All are float32; Muon has one moment for a matrix, AdamW two for the rest; nothing small enough matters here.
    rows = report.rows_of_parameters
    muon = sum(row["elements"] for row in rows if row["optimizer"].startswith("muon"))
    adamw = sum(row["elements"] for row in rows if row["optimizer"].startswith("adamw"))
    assert 4 * (muon + adamw) / 4 <= report.memory["weights"] <= 4 * (muon + adamw)
    assert report.memory["optimizer"] < 2 * report.memory["weights"]
    by_name = {row["name"]: row for row in rows}
    assert by_name["layers/attn/wq_a/weight"]["optimizer"] == "muon"
    assert by_name["embed/weight"]["optimizer"].startswith("adamw")
    assert by_name["layers/ffn/experts/w1"]["matrix"].endswith("of them")


def test_text_json_and_picture(report, tmp_path):
    text = report.to_text()
    assert "fits" in text and "a step takes at least" in text and "layers/ffn/experts/w1" in text
    assert "each host reads 8,192 of the step's 8,192 tokens" in text  # it has one
    report.write_json(tmp_path / "plan.json")
    read = json.loads((tmp_path / "plan.json").read_text())
    assert read["total"] == report.total and read["bound"]["limited_by"] in ("compute", "network", "memory")
    report.draw(tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_what_leaves_a_slice_bounds_the_step(whole):
    two = whole.facts | {"mesh": {"data": 2, **{axis: n for axis, n in whole.facts["mesh"].items() if axis != "data"}}}
    compiled = dataclasses.replace(whole, hlo=None, facts=two, module=crossing("ALL_GATHER", "{1,2}x{0:3}"))
    report = planner.make_report(recipe(), "", "2*v5p:2x2x1", compiled)
    assert report.traffic == (Traffic("all-gather", ("data",), 1.0, 1e9, between_slices=True),)
    assert report.bound.network == pytest.approx(1e9 / GENERATIONS["v5p"].dcn_rate)
    assert re.search(r"all-gather +data, between slices +1 +0.931\n", report.to_text())


def test_buffers_are_known_without_machine_code(whole, report):
    early = planner.compile_report(recipe(), "", "v5p:2x2x1")
    assert not early.codegen and report.codegen
    assert (early.total, early.memory, early.traffic) == (report.total, report.memory, report.traffic)


def test_what_does_not_fit_is_told_and_what_would(monkeypatch):
    large = recipe(
        model={"remat": "none"},
        data={"sequence_length": 4096, "batch_size": 8192},
        mesh={"topology": "v5e:2x2"},
    )
    tried = []

    def changed(recipe, stage, topology, *rest):
        tried.append(recipe.model.remat)
        return dataclasses.replace(first, total=first.limit - 1, fits=recipe.model.remat == "unit")

    first = next(planner.plan(large, advise=False))
    assert not first.fits and first.total > first.limit == GENERATIONS["v5e"].hbm_bytes
    assert "does NOT fit" in first.to_text()
    monkeypatch.setattr(planner, "compile_report", changed)
    lines = list(planner._advice(large, "v5e:2x2", first, lambda text: None))
    assert tried == ["full", "unit"] and lines[-1].startswith("  model.remat=unit") and lines[-1].endswith("fits")


@pytest.mark.parametrize(("limit", "best"), [(23, 20), (16, 16), (7, 4), (3, 0), (64, 64)])
def test_the_largest_that_fits(monkeypatch, limit, best):
    def compiled(recipe, *rest):
        rows = recipe.data.batch_size
        return dataclasses.replace(blank(), total=rows, fits=rows <= limit)

    monkeypatch.setattr(planner, "compile_report", compiled)
    first = compiled(recipe())
    found = planner.largest_fit(recipe(), "v5p:2x2x1", "batch", first, lambda text: None)
    assert found["value"] == best  # in rows of 4, the mesh's row shards
    assert all(size % 4 == 0 for size in found["tried"])


def blank() -> PlanReport:
    values = {field.name: None for field in dataclasses.fields(PlanReport) if field.default is dataclasses.MISSING}
    return PlanReport(**values)


@pytest.mark.parametrize(
    ("topology", "said"),
    [
        ("v5q:2x2x1", "generation 'v5q'.*did you mean v5p"),
        ("v5p:4x4", "2 dimensions, TPU v5p has 3"),
        ("v5p:3x2x1", "found 3x2x1, which is no slice of TPU v5p.*did you mean v5p:2x2x2"),
        ("512", "expected a generation and its chips"),
    ],
)
def test_topologies_that_are_none(topology, said):
    with pytest.raises(TopologyError, match=said):
        fathom.plan(recipe(), topology=topology)


def test_a_slice_that_the_mesh_does_not_fill():
    with pytest.raises(RecipeError, match="found v5p:2x2x2, of 8 devices; expected a slice of 4 devices"):
        fathom.plan(recipe(), topology="v5p:2x2x2")
    with pytest.raises(ValueError, match="mesh.topology"):
        recipe(mesh={"topology": "v6e:4x4"}).check(4)


def small_file(folder: Path, **blocks) -> Path:
    path = folder / "small.yaml"
    path.write_text(json.dumps({k: v for k, v in (SMALL | blocks).items() if k != "name"}))
    return path


def test_the_command_refuses_in_one_line(capsys, tmp_path):
    path = small_file(tmp_path)
    assert main(["plan", str(path), "--topology", "v5p:2x2"]) == 2
    assert "2 dimensions" in capsys.readouterr().err
    assert main(["plan", str(path), "--stage", "3"]) == 2
    assert "--stage: found 3; expected 1 to 1" in capsys.readouterr().err
    path = small_file(tmp_path, stages=[{"name": "short", "until": 2}, {"name": "long", "until": 10}])
    assert main(["plan", str(path), "--stage", "lonk"]) == 2
    said = "--stage: found lonk; expected 1 to 2, the recipe's stages, or short, long; fix: did you mean 'long'?"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "file", "said"),
    [
        ("--json", "missing/plan.json", "no folder .*missing, expected one that exists"),
        ("--json", "small.yaml/plan.json", "no folder .*small.yaml, expected one that exists"),
        ("--json", "", "found a folder, expected the name of a file"),
        ("--picture", "missing/memory.png", "no folder .*missing"),
        ("--picture", "memory.xyz", "found suffix '.xyz', expected one of .*.png.*; for example memory.png"),
        ("--picture", "memory", "found suffix ''"),
        ("--picture", "memory.pgf", "found suffix '.pgf'"),
    ],
)
def test_outputs_are_checked_before_anything_is_compiled(capsys, tmp_path, monkeypatch, option, file, said):
    path = small_file(tmp_path)
    monkeypatch.setattr(planner, "compile_step", lambda *_, **__: pytest.fail("compiled"))
    before = sorted(tmp_path.iterdir())
    assert main(["plan", str(path), option, str(tmp_path / file)]) == 2
    error = capsys.readouterr().err
    assert re.search(f"{option} .*: {said}", error) and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_both_outputs_that_cannot_be_written_are_told(capsys, tmp_path, monkeypatch):
    (tmp_path / "plan.json").write_text("[]")
    closed = {str(tmp_path / "plan.json"), str(tmp_path / "folder")}
    monkeypatch.setattr("os.access", lambda path, mode: str(path) not in closed)  # root may write anywhere
    (tmp_path / "folder").mkdir()
    outputs = ["--json", str(tmp_path / "plan.json"), "--picture", str(tmp_path / "folder" / "memory.png")]
    assert main(["plan", str(small_file(tmp_path)), *outputs]) == 2
    error = capsys.readouterr().err
    assert error.count("it cannot be written there") == 2 and "--json" in error and "--picture" in error


@pytest.mark.parametrize("fit", [(True, True, True), (True, False, True)])
def test_stages_are_all_planned_and_told(capsys, tmp_path, monkeypatch, report, fit):
    """One that does not fit ends nothing and makes the exit code 1."""
    stages = [{"name": "short", "until": 2}, {"until": 5, "data": {"batch_size": 32}}, {"name": "last", "until": 10}]
    path = small_file(tmp_path, stages=stages)

    def compiled(recipe, stage, *rest):
        fits = fit[int(stage[0]) - 1]
        return dataclasses.replace(report, stage=stage, rows=recipe.data.batch_size, recipe=recipe.name, fits=fits)

    monkeypatch.setattr(planner, "compile_report", compiled)
    outputs = ["--no-advice", "--json", str(tmp_path / "plan.json"), "--picture", str(tmp_path / "memory.PNG")]
    assert main(["plan", str(path), *outputs]) == (0 if all(fit) else 1)
    told, names = capsys.readouterr().out, ["1 of 3, short", "2 of 3", "3 of 3, last"]
    for name, rows in zip(names, (16, 32, 16), strict=True):
        assert f"small, stage {name}: deepseek-v4-tiny, {rows} rows of 512 tokens" in told
    *end, total = told[told.index(f"stages: {sum(fit)} of 3 fit\n") :].splitlines()[1:]
    assert [line.split(" GiB")[0].rpartition(" ")[0].strip() for line in end] == names
    assert ["does NOT fit" not in line for line in end] == list(fit)
    read = json.loads((tmp_path / "plan.json").read_text())
    assert [stage["stage"] for stage in read] == names
    # Days and chip-hours at the bound: of each stage's own steps, and of all.
    assert [stage["steps"] for stage in read] == [2, 3, 5] and read[-1]["run_so_far"]["steps"] == 10
    hours = 10 * report.bound.seconds / 3600
    assert read[-1]["run_so_far"]["days"] == pytest.approx(hours / 24) == pytest.approx(5 * read[0]["days"])
    assert read[-1]["run_so_far"]["chip_hours"] == pytest.approx(4 * hours) == pytest.approx(2 * read[2]["chip_hours"])
    assert total == f"the run: 10 steps take at least {hours / 24:.3g} days, 0 chip-hours"
    assert f"2 steps of at least {report.bound.seconds:.3g} s, " in end[0]
    assert {file.name for file in tmp_path.glob("*.PNG")} == {"memory.PNG", "memory-2.PNG", "memory-3.PNG"}
    assert main(["plan", str(path), "--no-advice", "--stage", "2"]) == (0 if fit[1] else 1)
    told = capsys.readouterr().out
    assert "stage 2 of 3:" in told and "stage 1" not in told and "stages:" not in told
    assert main(["plan", str(path), "--no-advice", "--stage", "last"]) == 0
    told = capsys.readouterr().out
    assert "stage 3 of 3, last:" in told and "\n5 steps take at least" in told and "stage 2" not in told


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({}, []),
        ({"spike": {"factor": 20}}, []),
        ({"eval_every": 5}, ["evaluation, every 5 steps: forward passes, of as many rows at a time as a step's"]),
        (
            {"spike": {"factor": 20}, "anticipatory_routing": {"delay": 4, "after_spike": 500}},
            ["train.anticipatory_routing, up to 500 steps after a spike: a forward pass more for each step, the step "
             "with experts that are given, and 4 x 4 bytes for each token, learned router and expert that it chooses"],
        ),
        ({"anticipatory_routing": {"always": True}}, ["train.anticipatory_routing, in all steps: "]),
    ],
)  # fmt: skip
def test_what_is_not_compiled_is_told(report, monkeypatch, train, said):
    asked = recipe(train=train, data={"holdout": 0.1})
    monkeypatch.setattr(planner, "compile_report", lambda *_: report)
    told = next(planner.plan(asked, advise=False))
    assert len(told.not_compiled) == len(said) == told.to_text().count("\nnot compiled: ")
    assert all(text.startswith(start) for text, start in zip(told.not_compiled, said, strict=True))


@pytest.mark.parametrize("name", [n for n in recipe_names() if not n.startswith("tiny")])
def test_full_size_recipes_fill_their_slices(name):
    read = fathom.load_recipe(name)
    slice_ = parse_topology(read.mesh.topology)
    assert slice_.devices == math.prod(read.mesh.shape.values())
    assert get(read.model.name)  # the rest is checked where each is planned, in test_full_size.py
