"""`fathom plan`: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from fathom.cli_problem import ArgumentProblem, output_problem


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fathom plan`."""
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of one in recipes/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example model.remat=unit")
    parser.add_argument(
        "--topology",
        metavar="SLICE",
        help="v5p:8x8x8, 2*v6e:16x16 for two slices, or cpu; the recipe's mesh.topology unless given",
    )
    parser.add_argument("--stage", metavar="N", help="plan this stage alone: its number, from 1, or its name")
    parser.add_argument(
        "--fit", choices=("batch", "sequence"), help="look for the most rows, or the longest sequence, that fit"
    )
    parser.add_argument(
        "--codegen", action="store_true", help="have the compiler write machine code too: minutes more, same figures"
    )
    parser.add_argument("--no-advice", action="store_true", help="where it does not fit, do not look for what would")
    parser.add_argument("--json", metavar="F", help="also write the report to this file")
    parser.add_argument("--picture", metavar="F.png", help="also draw one device's memory")


def run_plan(arguments: argparse.Namespace) -> bool:
    """Prints the plan of every stage; True when all fit.

    Raises:
      ArgumentProblem: for a file that could not be written.
      RecipeError: for a recipe or a slice that is impossible. TopologyError: for a name that is none.
      PlanError: when the step does not compile for another reason than memory.
    """
    _check_outputs(arguments)
    from fathom.plan.planner import plan
    from fathom.plan.report import run_total, stages_text
    from fathom.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides, elsewhere=True)
    reports = []
    for report in plan(
        recipe,
        arguments.topology,
        fit=arguments.fit,
        codegen=arguments.codegen,
        advise=not arguments.no_advice,
        stage=arguments.stage,
        progress=lambda text: print(f"fathom plan: {text}", file=sys.stderr, flush=True),
    ):
        reports.append(report)
        # All that is known so far: a later stage may fail.
        print(("\n" if len(reports) > 1 else "") + report.to_text(), flush=True)
        if arguments.json:
            values = [report.to_dict() for report in reports]
            if len(values) > 1:
                values = [{**value, "run_so_far": run_total(reports[:i])} for i, value in enumerate(values, 1)]
            Path(arguments.json).write_text(json.dumps(values[0] if len(values) == 1 else values, indent=1) + "\n")
        if arguments.picture:
            path = Path(arguments.picture)
            report.draw(path if len(reports) == 1 else path.with_stem(f"{path.stem}-{len(reports)}"))
    if len(reports) > 1:
        print("\n" + stages_text(reports))
    return all(report.fits for report in reports)


def _check_outputs(arguments: argparse.Namespace) -> None:
    """ArgumentProblem naming every output that could not be written: compiling takes minutes."""
    problems = []
    for option, text in (("--json", arguments.json), ("--picture", arguments.picture)):
        if text is not None:
            problem = output_problem(Path(text)) or (_picture_problem(Path(text)) if option == "--picture" else None)
            if problem:
                problems.append(f"{option} {text}: {problem}")
    if problems:
        raise ArgumentProblem("; ".join(problems))


def _picture_problem(path: Path) -> str | None:
    from matplotlib.backend_bases import FigureCanvasBase

    known = sorted(set(FigureCanvasBase.get_supported_filetypes()) - {"pgf"})  # which needs LaTeX
    if path.suffix[1:].lower() in known:
        return None
    return f"found suffix {path.suffix!r}, expected one of .{', .'.join(known)}; for example {path.stem}.png"
