"""What a plan says: as text, JSON and a picture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fathom.plan.chip_memory import HeapUse
from fathom.plan.collectives import Traffic
from fathom.plan.roofline import Bound

GIB = 2**30
DAY = 86400

PARTS = {
    "weights": "weights",
    "optimizer": "optimizer",
    "other": "router biases, hash tables, batch, padding",
    "gradients": "gradients",
    "activations": "activations saved for the backward",
    "working": "temporaries at work",
    "gaps": "gaps between temporaries",
}
"""Parts of a device's memory, in the order of the table and of the picture."""


@dataclasses.dataclass(frozen=True)
class PlanReport:
    """Whether a recipe's step fits a slice, and what it costs at least.

    Attributes:
      recipe, model: names. stage: its number and its name, "" where the recipe has none. topology: the slice, "cpu" for
        this machine. chips, devices, hosts: of all slices.
      rows, sequence_length: of a step. memory: bytes of one device by `PARTS`. total: their sum; limit: what the
        compiler lets a program use, None for a CPU. fits: whether the compiler takes it.
      largest: the largest buffers when most memory is used. parameters: of the model, as the program holds them;
        formula_parameters: by the config. flops: of the program's matrix products in a step, loops counted as often as
        they run; expected_flops: what formulas say that they are, by purpose, "again" being recomputation, None for
        models and policies without them; model_flops: those of the model alone, None where the stage's are not known.
        tokens: of a step; read_tokens: what one host makes of text for it, more than its share where rows lie over
        several hosts. remat: the recipe's policy.
      traffic: collectives of one device. bound: None for a CPU. rows_of_parameters: see `fathom.plan.parameters`.
      seconds: to trace and compile. codegen: whether machine code was written too.
      advice: changes that were tried because it does not fit, with what they come to. largest_fit: of `--fit`.
      steps: of the stage, or of the run without stages. not_compiled: what else runs in it, a sentence each.
    """

    recipe: str
    stage: str
    model: str
    topology: str
    chips: int
    devices: int
    hosts: int
    rows: int
    sequence_length: int
    memory: dict[str, int]
    total: int
    limit: int | None
    fits: bool
    largest: tuple[tuple[str, str, int], ...]
    parameters: int
    formula_parameters: int
    tokens: int
    read_tokens: int
    flops: float
    model_flops: float | None
    remat: str
    expected_flops: dict[str, float] | None
    traffic: tuple[Traffic, ...]
    bound: Bound | None
    rows_of_parameters: tuple[dict[str, Any], ...]
    seconds: float
    codegen: bool
    advice: tuple[str, ...] = ()
    largest_fit: dict[str, Any] | None = None
    steps: int = 0
    not_compiled: tuple[str, ...] = ()

    @property
    def days(self) -> float | None:
        """Of all steps, if each takes no longer than the bound; None without one."""
        return None if self.bound is None else self.steps * self.bound.seconds / DAY

    @property
    def chip_hours(self) -> float | None:
        """The same in hours of all chips together."""
        return None if self.days is None else 24 * self.days * self.chips

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**dataclasses.asdict(self), "days": self.days, "chip_hours": self.chip_hours}

    def write_json(self, path: str | Path) -> None:
        """Writes `to_dict`."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    def to_text(self, parameters: bool = True) -> str:
        """The report for a terminal."""
        lines = [
            f"{self.name}: {self.model}, {self.rows} rows of {self.sequence_length} tokens, on {self.where}",
            "",
            *self._memory_lines(),
            "",
            *self._cost_lines(),
        ]
        if self.traffic:
            lines += ["", *self._traffic_lines()]
        if parameters:
            lines += ["", *parameter_lines(self.rows_of_parameters)]
        if self.advice:
            lines += ["", *self.advice]
        if self.largest_fit:
            what, value, total = (self.largest_fit[key] for key in ("what", "value", "total"))
            lines += ["", f"largest {what} that fits, of those tried: {value} ({total / GIB:.2f} GiB a device)"]
        how = "compiled to machine code" if self.codegen else "compiled as far as buffers are assigned"
        lines += ["", f"traced and {how} in {self.seconds:.0f} s; nothing was run"]
        return "\n".join(lines)

    @property
    def name(self) -> str:
        """Of the recipe, and the stage where it has some."""
        return f"{self.recipe}, stage {self.stage}" if self.stage else self.recipe

    @property
    def where(self) -> str:
        """The machine in words."""
        if self.topology == "cpu":
            return f"{self.devices} devices of this machine's CPU"
        more = f", {self.devices} devices" if self.devices != self.chips else ""
        return f"{self.topology}: {self.chips} chips{more}, {self.hosts} hosts"

    def _memory_lines(self) -> list[str]:
        width = max(len(text) for text in PARTS.values())
        lines = ["memory of one device" + (" (a chip is two)" if self.devices > self.chips else "")]
        lines += [f"  {text:{width}} {self.memory[part] / GIB:8.2f} GiB" for part, text in PARTS.items()]
        if self.limit is None:
            return [*lines, f"  {'total':{width}} {self.total / GIB:8.2f} GiB"]
        verdict = "fits" if self.fits else "does NOT fit"
        room = (self.limit - self.total) / GIB
        lines.append(
            f"  {'total':{width}} {self.total / GIB:8.2f} GiB of {self.limit / GIB:.2f}: {verdict}, "
            + (f"{room:.2f} to spare" if self.fits else f"{-room:.2f} too many")
        )
        return lines

    def _cost_lines(self) -> list[str]:
        operations = f"operations {self.flops:.4g} a step, {self.flops / self.tokens:.4g} a token"
        if self.model_flops is not None:
            operations += f": {self.flops / self.model_flops:.3f} x the model's formula"
        if self.expected_flops is not None:
            whole = sum(self.expected_flops.values())
            parts = ", ".join(f"{name} {value / whole:.1%}" for name, value in self.expected_flops.items())
            operations += f"\n  {self.flops / whole:.3f} x what formulas say it multiplies ({parts})"
        lines = [
            f"parameters {self.parameters:,} (the config's formula: {self.formula_parameters:,})",
            operations,
        ]
        if self.bound is not None:
            b = self.bound
            lines += [
                f"bound: a step takes at least {b.seconds:.3g} s ({b.limited_by}; compute {b.compute:.3g}, network "
                f"{b.network:.3g}, memory {b.memory:.3g}), {self.tokens / b.seconds / self.chips:,.0f} tokens a second "
                "and chip"
                + ("" if b.mfu is None else f",\n  and MFU is at most {b.mfu:.1%}")
                + ". A bound from peak rates, not a prediction.",
            ]
            lines.append(f"each host reads {self.read_tokens:,} of the step's {self.tokens:,} tokens")
            if self.steps:
                lines.append(f"{self.steps:,} steps take at least {duration(self.days, self.chip_hours)}")
        return [*lines, *(f"not compiled: {text}" for text in self.not_compiled)]

    def _traffic_lines(self) -> list[str]:
        lines = ["sent by one device in a step", f"  {'collective':20} {'along':32} {'runs':>8} {'GiB':>10}"]
        shown = [t for t in self.traffic if t.between_slices or t.sent_bytes >= 1e-3 * self.traffic[0].sent_bytes]
        for t in shown:
            along = (" x ".join(t.axes) or "nobody else") + (", between slices" if t.between_slices else "")
            lines.append(f"  {t.kind:20} {along:32} {t.runs:8.0f} {t.sent_bytes / GIB:10.3f}")
        total = sum(t.sent_bytes for t in self.traffic)
        return [*lines, f"  {'all':53} {sum(t.runs for t in self.traffic):8.0f} {total / GIB:10.3f}"]

    def draw(self, path: str | Path) -> None:
        """Writes the picture of one device's memory."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(9, 3.2), layout="constrained")
        left = 0.0
        for number, (part, text) in enumerate(PARTS.items()):
            size = self.memory[part] / GIB
            axes.barh(0, size, left=left, color=f"C{number}", label=f"{text}, {size:.1f}")
            left += size
        if self.limit is not None:
            axes.axvline(self.limit / GIB, color="black", linestyle="--")
            axes.text(self.limit / GIB, 0.46, f" limit {self.limit / GIB:.1f}", va="bottom", ha="right")
        axes.set(yticks=[], xlabel="GiB of one device", title=f"{self.name} on {self.where}")
        axes.set_xlim(0, 1.02 * max(left, (self.limit or 0) / GIB))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.45), ncols=3, fontsize=8, frameon=False)
        figure.savefig(path, dpi=120)
        pyplot.close(figure)


def stages_text(reports: Sequence[PlanReport]) -> str:
    """One line for each stage of a recipe, and the sum of their steps, as the end of its plan."""
    width = max(len(report.stage) for report in reports)
    steps_width = max(len(f"{report.steps:,}") for report in reports)
    lines = [f"stages: {sum(report.fits for report in reports)} of {len(reports)} fit"]
    for report in reports:
        limit = "" if report.limit is None else f" of {report.limit / GIB:.2f}"
        verdict = "fits" if report.fits else "does NOT fit"
        bound = ""
        if report.bound is not None:
            bound = f", {report.steps:{steps_width},} steps of at least {report.bound.seconds:.3g} s, "
            bound += duration(report.days, report.chip_hours)
        lines.append(f"  {report.stage:{width}} {report.total / GIB:8.2f} GiB{limit}: {verdict}{bound}")
    total = run_total(reports)
    if total["days"] is not None:
        lines.append(f"the run: {total['steps']:,} steps take at least {duration(total['days'], total['chip_hours'])}")
    return "\n".join(lines)


def run_total(reports: Sequence[PlanReport]) -> dict[str, Any]:
    """Steps, days and chip-hours of stages together, the latter None without bounds."""
    steps, known = sum(report.steps for report in reports), all(report.bound is not None for report in reports)
    days, chip_hours = (sum(getattr(r, name) for r in reports) if known else None for name in ("days", "chip_hours"))
    return {"steps": steps, "days": days, "chip_hours": chip_hours}


def duration(days: float, chip_hours: float) -> str:
    """For a table: "5.96 days, 73,200 chip-hours"."""
    return f"{days:.3g} days, {float(f'{chip_hours:.3g}'):,.0f} chip-hours"


def parameter_lines(rows: Any) -> list[str]:
    """The table of which optimizer moves which parameter."""
    width = max((len(row["name"]) for row in rows), default=0)
    lines = ["optimizer of each parameter", f"  {'name':{width}} {'shape':>20} {'layers':>6}  optimizer, its matrices"]
    for row in sorted(rows, key=lambda row: (row["optimizer"], row["name"])):
        shape = " x ".join(map(str, row["shape"])) or "1"
        matrix = f", {row['matrix']}" if row["matrix"] else ""
        lines.append(f"  {row['name']:{width}} {shape:>20} {row['layers']:6}  {row['optimizer']}{matrix}")
    totals: dict[str, int] = {}
    for row in rows:
        kind = row["optimizer"].partition(",")[0]
        totals[kind] = totals.get(kind, 0) + row["elements"]
    return [*lines, "  " + ", ".join(f"{kind} {count / 1e9:.4g}e9" for kind, count in sorted(totals.items()))]


def memory_parts(use: HeapUse, facts: dict[str, Any]) -> dict[str, int]:
    """A device's bytes by `PARTS`; their sum is `use.total`."""
    return {
        "weights": facts["weights"],
        "optimizer": facts["optimizer"],
        "other": use.arguments + use.outputs - facts["weights"] - facts["optimizer"],
        "gradients": use.gradients,
        "activations": use.saved,
        "working": use.working,
        "gaps": use.gaps,
    }
