"""Compares measurements with the model's work and the GPU's limits: a figure, and the rows of a table."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from vit_convert.core.recommend import RESIDENT
from vit_convert.core.roofline import Roofline
from vit_convert.report.drawing import COLOURS, draw, tip

Report = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Reached:
    """One measurement under its ceiling.

    Attributes:
        precision: of the engine.
        batch: images of a run.
        images_per_second: with the best number of streams, without transfers.
        tflops: the same in TFLOP/s.
        flop_per_byte: at least, assuming that nothing is moved twice.
        attainable: the ceiling at this intensity, in TFLOP/s.
        bound: "memory" or "products".
    """

    precision: str
    batch: int
    images_per_second: float
    tflops: float
    flop_per_byte: float
    attainable: float
    bound: str

    @property
    def share(self) -> float:
        """Share of the ceiling, in percent."""
        return 100.0 * self.tflops / self.attainable


def roofline_of(report: Report) -> Roofline | None:
    """A report's roofline, or None."""
    found = report.get("roofline")
    return Roofline.from_dict(found) if found else None


def reached(report: Report) -> list[Reached]:
    """Each precision and batch of a report's benchmark for which there is a ceiling."""
    roofline = roofline_of(report)
    if roofline is None or roofline.ceilings is None:
        return []
    best: dict[tuple[str, int], float] = {}
    for row in report.get("benchmark") or []:
        if row.get("transfers") == RESIDENT:
            key = row["precision"], row["batch"]
            best[key] = max(best.get(key, 0.0), row["images_per_second"])
    found = []
    for (precision, batch), rate in sorted(best.items()):
        intensity = roofline.work.flop_per_byte(batch, precision)
        attainable = roofline.ceilings.attainable_tflops(intensity, precision)
        if attainable > 0:
            peak = roofline.ceilings.tflops[precision]
            bound = "products" if attainable == peak else "memory"
            tflops = rate * roofline.work.gflop_per_image / 1e3
            found.append(Reached(precision, batch, rate, tflops, intensity, attainable, bound))
    return found


def roofline_figure(report: Report, title: str) -> str:
    """The roofline as SVG; "" without numbers."""
    rows, roofline = reached(report), roofline_of(report)
    if not rows or roofline is None or roofline.ceilings is None:
        return ""
    ceilings, intensities = roofline.ceilings, [row.flop_per_byte for row in rows]

    def paint(axes: Any) -> None:
        for precision in dict.fromkeys(row.precision for row in rows):
            peak, colour = ceilings.tflops[precision], COLOURS.get(precision, COLOURS["fp32"])
            ridge = 1e3 * peak / ceilings.memory_gb_per_s
            places = [min(*intensities, ridge) / 2, ridge, max(*intensities, ridge) * 2]
            heights = [ceilings.attainable_tflops(place, precision) for place in places]
            (line,) = axes.plot(places, heights, color=colour, linewidth=1.2)
            tip(line, f"{precision}: {peak:,.0f} TFLOP/s, {ceilings.memory_gb_per_s:,.0f} GB/s")
            own = [row for row in rows if row.precision == precision]
            axes.plot(
                [row.flop_per_byte for row in own], [row.tflops for row in own], "o", color=colour, label=precision
            )
        for row in rows:
            place = row.flop_per_byte, row.tflops
            axes.annotate(str(row.batch), place, textcoords="offset points", xytext=(6, -10), fontsize=8)
            spot = axes.plot(*place, "o", ms=10, alpha=0.01)[0]
            tip(
                spot, f"{row.precision}, batch {row.batch}: {row.tflops:,.1f} TFLOP/s, {row.share:.0f} % of the ceiling"
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.legend(fontsize=8)

    return draw(paint, title, "FLOP per byte moved", "TFLOP/s")


def kernels(engine: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The kernels that a run of an engine launches, by kind, for its first profile, if known."""
    fused = engine.get("fused_attention") or {}
    profiles = fused.get("profiles") or []
    return fused.get("kinds") or next((row["kinds"] for row in profiles if row.get("kinds")), [])
