"""For runs of weeks: log.txt, traces of chosen steps, and a compilation cache that the next process reads."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from fathom import zoo
from fathom.recipe import Recipe, load_recipe
from fathom.recipe_checks import RecipeError
from fathom.train.compilation_cache import compilation_cache
from fathom.train.loop import NonFiniteError, train
from tests.train import runs, toy_model
from tests.train.runs import at_steps, interrupted, make_recipe, read_log, write_text
from tests.train.small_recipe import write_recipe


@pytest.fixture(autouse=True)
def toy(monkeypatch, tmp_path):
    monkeypatch.setitem(zoo._registered, "toy-lm", toy_model.TOY)
    write_text(tmp_path / "text")


def test_the_log_tells_what_happened_over_all_processes_of_a_run(tmp_path, monkeypatch):
    recipe = make_recipe(tmp_path)
    interrupted(recipe, monkeypatch, {6: runs.sigterm, 9: runs.crash})
    stamps = [line[:20] for line in (recipe.run_dir / "log.txt").read_text().splitlines()]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", stamp) for stamp in stamps)
    lines = read_log(recipe.run_dir)
    short = [re.split(r"  |,|: ", line.removeprefix("run: "))[0] for line in lines]
    wanted = [
        "toy-lm", "step 5/12", "checkpoint of step 5 is complete", "checkpoint of step 6 is complete", "time",
        "stopped early", "toy-lm", "ended by InterruptedError", "toy-lm", "step 10/12", "step 12/12",
        "checkpoint of step 10 is complete", "checkpoint of step 12 is complete", "time", "done with step 12",
    ]  # fmt: skip
    order = [text for text in short if not text.startswith("checkpoint of step 10")]
    assert order == [text for text in wanted if not text.startswith("checkpoint of step 10")]
    assert wanted[11] in short  # its save ran in the background
    assert "from the beginning" in lines[0] and "resuming after step 6" in lines[short.index("toy-lm", 1)]
    metrics = r"step 10/12  loss \d\.\d+  grad_norm .*  learning_rate .*  tokens_per_second .*"
    assert any(re.match(metrics, line) for line in lines)


def test_warnings_of_fathom_and_how_a_run_failed_are_in_the_log(tmp_path, monkeypatch):
    result = train(make_recipe(tmp_path, train__steps=10))
    shutil.rmtree(Path(result.checkpoint_dir) / "10" / "train")
    monkeypatch.setitem(zoo._registered, "toy-lm", runs.exploding(toy_model.TOY))
    at_steps(monkeypatch, {7: runs.mark})
    recipe = make_recipe(tmp_path)
    with pytest.raises(NonFiniteError):
        train(recipe)
    logging.getLogger("fathom").warning("nobody listens any more")
    text = "\n".join(read_log(recipe.run_dir))
    assert re.search(r"WARNING: checkpoint .*/10 is not used", text)
    assert "resuming after step 5" in text and "ended by NonFiniteError: step 7: loss nan" in text
    assert "nobody listens" not in text


def traces(folder):
    return [path for path in (folder / "profile").rglob("*") if path.is_file()]


TRACED_RUNS = """
import json, sys
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
from fathom import zoo
from fathom.recipe import Recipe
from fathom.train.loop import train
from tests.train import runs, toy_model

zoo.register(toy_model.TOY)
for number, (steps, stop) in enumerate(json.loads(sys.argv[2])):
    values = runs.make_recipe(Path(sys.argv[1]), str(number), train__steps=5, train__stop_at=stop).to_dict()
    recipe = Recipe.model_validate({**values, "profile": {"steps": steps}})
    train(recipe)
    print(recipe.run_dir)
"""


def test_chosen_steps_are_traced(tmp_path):
    """In a process of its own: a trace ends one in which libtpu has compiled before."""
    cases = [("3-4", None), ("3-4", 3), (2, None)]
    done = subprocess.run(
        [sys.executable, "-c", TRACED_RUNS, str(tmp_path), json.dumps(cases)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    folders = [Path(line) for line in done.stdout.splitlines() if Path(line).is_dir()]
    assert len(folders) == len(cases)
    for folder, (_, stop) in zip(folders, cases, strict=True):
        files = traces(folder)
        assert any(path.name.endswith(".xplane.pb") and path.stat().st_size > 1000 for path in files), files
        # A run that is cut short among the steps leaves what it has, and says nothing of a whole trace.
        assert any("traced steps up to" in line for line in read_log(folder)) == (stop is None)


def test_steps_that_a_run_does_not_come_to_leave_no_trace(tmp_path):
    values = make_recipe(tmp_path, train__steps=4).to_dict()
    recipe = Recipe.model_validate({**values, "profile": {"steps": "4"}, "train": {**values["train"], "stop_at": 3}})
    train(recipe)
    assert not (recipe.run_dir / "profile").exists()


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ("12-10", "profile.steps: found '12-10'; expected a range of steps like 10-12, or one step"),
        ("0-3", "found '0-3'; expected a range of steps"),
        ("ten", "found 'ten'; expected a range of steps"),
        ("steps 10-12", "found 'steps 10-12'; expected a range of steps"),
        ("10-13", "found '10-13'; expected steps up to 12, train.steps"),
    ],
)
def test_impossible_steps_are_refused(tmp_path, steps, said):
    file = write_recipe(tmp_path, {**make_recipe(tmp_path).to_dict(), "profile": {"steps": steps}})
    with pytest.raises(RecipeError, match=re.escape(said)):
        load_recipe(file).check(8)


CACHED_RUN = """
import json, sys
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
from fathom import zoo
from fathom.train import loop
from tests.train import runs, toy_model

counts = {}
def count(event, **keywords):
    counts[event] = counts.get(event, 0) + 1
jax.monitoring.register_event_listener(count)
zoo.register(toy_model.TOY)
jax.jit(lambda x: x + 1)(1.0)  # jax has compiled before the run sets its folder
counts.clear()
folder = Path(sys.argv[1])
loop.train(runs.make_recipe(folder, sys.argv[2], train__steps=2, train__compilation_cache=str(folder / "cache")))
print(json.dumps({name.rpartition("/")[2]: number for name, number in counts.items()}))
"""


def run_with_cache(folder, name):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}
    done = subprocess.run(
        [sys.executable, "-c", CACHED_RUN, str(folder), name],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_next_process_finds_the_compiled_programs(tmp_path):
    first = run_with_cache(tmp_path, "one")
    programs = {path.name for path in (tmp_path / "cache").iterdir()}
    assert any("train_step" in name for name in programs)
    second = run_with_cache(tmp_path, "two")
    assert first["cache_misses"] > 2 and second["cache_hits"] >= first["cache_misses"]
    assert second.get("cache_misses", 0) == 0


def test_the_cache_is_the_runs_alone_and_must_be_writable(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    with compilation_cache(str(tmp_path / "cache")):
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "cache")
    assert jax.config.jax_compilation_cache_dir == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"train\.compilation_cache: .*file/x cannot be written"):
        train(make_recipe(tmp_path, train__compilation_cache=str(tmp_path / "file" / "x")))
