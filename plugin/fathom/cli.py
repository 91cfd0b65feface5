"""The command line: fathom train | plan | launch | convert | logits | inspect | doctor.

Exit codes: 0 done, 1 failed, 2 bad arguments or recipe, 3 stopped for preemption after a complete
save, 4 ended by the watchdog (train.watchdog) for standing still, 5 diverged (not finite, or too many
spikes of the loss: the same start would end the same), 130 interrupted. jax and the rest are imported by
the command that needs them: `--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from fathom import cli_convert, cli_launch, cli_plan
from fathom.cli_problem import ArgumentProblem, output_problem

DONE, FAILED, BAD_INPUT, PREEMPTED, INTERRUPTED = 0, 1, 2, 3, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    Args:
      argv: the arguments, those of the process unless given.
    """
    parser = make_parser()
    try:
        arguments = parse_arguments(parser, argv)
    except SystemExit as stop:  # argparse has spoken: 0 after --help, 2 after a mistake
        return stop.code if isinstance(stop.code, int) else BAD_INPUT
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    logging.getLogger("fathom").setLevel(logging.INFO)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("fathom: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output is gone, and so is anybody to tell
        return FAILED
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        code, text = describe_error(error)
        print(f"fathom {arguments.command}: {text}", file=sys.stderr)
        return code


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, of which key=value ones may stand anywhere: argparse takes them in one place only."""
    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "overrides") or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def describe_error(error: Exception) -> tuple[int, str]:
    """Exit code and text of an error that ended a command."""
    from fathom.recipe_checks import RecipeError
    from fathom.topology import TopologyError

    if isinstance(error, ArgumentProblem | RecipeError | TopologyError):
        return BAD_INPUT, str(error)
    text = str(error).strip()
    # Our own errors are ValueErrors, OSErrors and our classes, with a text for people. Others are
    # bugs: name the kind, and keep to one line.
    ours = isinstance(error, ValueError | OSError) or type(error).__module__.startswith("fathom")
    if ours and text:
        return getattr(error, "exit_code", FAILED), text
    first = text.splitlines()[0] if text else "no message"
    return FAILED, f"{type(error).__name__}: {first} (--debug shows where)"


def make_parser() -> argparse.ArgumentParser:
    """The argument parser with all subcommands."""
    parser = argparse.ArgumentParser(
        prog="fathom",
        description="Train DeepSeek-V4 and DeepSeek-V3.2 in JAX.",
        epilog="Exit codes: 0 done, 1 failed, 2 bad arguments or recipe, 3 stopped for preemption "
        "after a complete save, 4 ended by the watchdog for standing still, 5 diverged, 130 interrupted.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.set_defaults(run=_no_command(parser), command="", debug=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(name: str, text: str, run: Callable) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(run=run, command=name)
        return sub

    sub = command("train", "train from a recipe, or resume the run it describes", run_train)
    sub.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of one in recipes/")
    sub.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for example train.steps=5 mesh.fsdp=4"
    )

    sub = command("plan", "compile a recipe's step for a TPU slice, with no TPU, and say whether it fits", run_plan)
    cli_plan.add_arguments(sub)
    sub = command("launch", "start a recipe as several processes here, or on the hosts of a slice", run_launch)
    cli_launch.add_arguments(sub)

    sub = command("logits", "run a model on token ids and write its logits", run_logits)
    sub.add_argument("path", metavar="PATH", help="a Hub-format folder or a Fathom checkpoint")
    sub.add_argument(
        "--tokens", required=True, metavar="ids.npy", help="integer token ids, [B, S] or [S]"
    )
    sub.add_argument("--out", required=True, metavar="out.npz", help="the file to write")
    sub.add_argument(
        "--streams", action="store_true", help="also write hidden_streams_<layer> [B, S, n, D]"
    )
    sub.add_argument(
        "--simulate-quant",
        action="store_true",
        help="reproduce the FP8/FP4 rounding of the released inference code",
    )
    sub.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="weights and computation"
    )

    sub = command("convert", "convert between Hub folders and Fathom checkpoints, exactly", run_convert)
    cli_convert.add_arguments(sub)

    sub = command("inspect", "say what a checkpoint or a recipe is and what is wrong with it", run_inspect)
    sub.add_argument(
        "path", metavar="PATH", help="a file or folder of the Hub's, a Fathom run, or a recipe: prints all its keys"
    )
    sub.add_argument("--json", metavar="F", help="also write the report to this file")
    sub.add_argument(
        "--verify", action="store_true", help="also recompute the checksums a conversion left (reads everything)"
    )

    command("doctor", "check versions and devices, and say what to do", run_doctor)
    return parser


def _no_command(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    def run(arguments: argparse.Namespace) -> int:
        if arguments.version:
            from importlib import metadata

            print(f"fathom {metadata.version('fathom-jax')}")
            return DONE
        parser.print_help(sys.stderr)
        return BAD_INPUT

    return run


def run_train(arguments: argparse.Namespace) -> int:
    """fathom train."""
    from fathom.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from fathom.distributed import initialize_distributed

    # Both before anything can start a backend: what it runs on cannot be changed afterwards.
    initialize_distributed()
    recipe.use_simulated_devices()
    from fathom.train.loop import train

    result = train(recipe)
    loss = result.metrics.get("loss")
    ending = "stopped early, saved" if result.preempted else "done"
    text = "" if loss is None else f", loss {float(loss):.4f}"
    print(f"{recipe.name}: {ending} at step {result.step}{text}; run folder {recipe.run_dir}")
    print(f"checkpoints in {result.checkpoint_dir}")
    return PREEMPTED if result.preempted else DONE


def run_plan(arguments: argparse.Namespace) -> int:
    """fathom plan: exit code 1 when it does not fit."""
    return DONE if cli_plan.run_plan(arguments) else FAILED


def run_launch(arguments: argparse.Namespace) -> int:
    """fathom launch: the exit code of the run (local), or 0 when it was handed over."""
    return cli_launch.run_launch(arguments)


def run_logits(arguments: argparse.Namespace) -> int:
    """fathom logits."""
    from fathom.cli_logits import write_logits

    print(write_logits(arguments))
    return DONE


def run_convert(arguments: argparse.Namespace) -> int:
    """fathom convert."""
    print(cli_convert.run_convert(arguments))
    return DONE


def run_inspect(arguments: argparse.Namespace) -> int:
    """fathom inspect: exit code 1 when the checkpoint has problems."""
    from fathom.cli_inspect import inspect_path
    from fathom.recipe import load_recipe
    from fathom.recipe_files import is_recipe

    if arguments.json and (problem := output_problem(Path(arguments.json))):
        raise ArgumentProblem(f"--json {arguments.json}: {problem}")  # before checksums of hours
    if is_recipe(arguments.path):
        recipe = load_recipe(arguments.path)
        print(recipe.to_yaml(), end="")
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(recipe.to_dict(), indent=2) + "\n", encoding="utf-8")
        return DONE
    report = inspect_path(arguments.path, verify=arguments.verify)
    print(report.to_text())
    if arguments.json:
        report.write_json(arguments.json)
    return FAILED if report.problems else DONE


def run_doctor(arguments: argparse.Namespace) -> int:
    """fathom doctor: exit code 1 when something is broken."""
    from fathom.doctor import examine

    findings = examine()
    for finding in findings:
        print(finding)
    return FAILED if any(finding.level == "bad" for finding in findings) else DONE
