"""The figures of a report: which there are, and what each shows."""

from collections.abc import Mapping, Sequence
from typing import Any

from vit_convert.report.drawing import COLOURS, apart, draw, tip
from vit_convert.report.roofline import roofline_figure

Report = Mapping[str, Any]

_MOST_BARS = 16
MOST_DRAWN = 12  # reports on one page with figures and all numbers; more are only compared in a table
_OTHERS = ("#7c3aed", "#16a34a", "#db2777", "#ca8a04")


def figures(reports: Sequence[Report]) -> list[str]:
    """All figures for which the reports have numbers.

    Args:
        reports: as in `report.json`; several are drawn into one figure where they can be compared.

    Returns:
        SVG elements; none for more than MOST_DRAWN reports.
    """
    if len(reports) > MOST_DRAWN:
        return []  # for a zoo, lines would be indistinguishable
    found = [_throughput(reports), _accuracy(reports)]
    for report in reports:
        found.append(roofline_figure(report, _titled("Roofline, by batch", report, reports)))
        found += [_blocks(report, reports), _thresholds(report, reports), _stages(report, reports)]
    numbered = [svg for svg in found if svg]
    return [apart(svg, number) for number, svg in enumerate(numbered)]


def _titled(title: str, report: Report, reports: Sequence[Report]) -> str:
    return f"{title}: {report.get('name', '')}" if len(reports) > 1 else title


def _colour(precision: str, number: int = 0) -> str:
    return COLOURS.get(precision, _OTHERS[number % len(_OTHERS)])


def _throughput(reports: Sequence[Report]) -> str:
    measured = [(report.get("name", ""), row) for report in reports for row in report.get("benchmark") or []]
    if not measured:
        return ""
    lines: dict[tuple[str, str, int, str], list[Any]] = {}
    for name, row in measured:
        lines.setdefault((name, row["precision"], row["streams"], row.get("transfers", "")), []).append(row)

    def paint(axes: Any) -> None:
        names = list(dict.fromkeys(name for name, *_ in lines))
        for (name, precision, streams, transfers), rows in lines.items():
            rows = sorted(rows, key=lambda row: row["batch"])
            ends = "with transfers" if transfers.startswith("images in") else f"{streams} stream{'s'[: streams - 1]}"
            label = f"{name + ', ' if len(names) > 1 else ''}{precision}, {ends}"
            style = {"color": _colour(precision), "marker": "osD^v"[names.index(name) % 5], "label": label}
            dashes = ":" if ends == "with transfers" else "-" if streams == 1 else "--"
            axes.plot([r["images_per_second"] for r in rows], [r["p99_ms"] for r in rows], linestyle=dashes, **style)
            for row in rows:
                place = row["images_per_second"], row["p99_ms"]
                axes.annotate(str(row["batch"]), place, textcoords="offset points", xytext=(6, 4), fontsize=8)
                spot = axes.plot(*place, "o", ms=10, alpha=0.01)[0]
                tip(spot, f"{label}, batch {row['batch']}: {place[0]:,.0f} images/s, P99 {place[1]:.2f} ms")
        axes.set_yscale("log")
        axes.legend(fontsize=8)

    return draw(paint, "Latency against throughput, by batch", "images/s", "P99, ms")


def _accuracy(reports: Sequence[Report]) -> str:
    rows = [
        (report.get("name", ""), name, value)
        for report in reports
        for name, value in (report.get("accuracy") or {}).items()
        if value is not None
    ]
    if not rows:
        return ""

    def paint(axes: Any) -> None:
        labels = [f"{name}, {what}" if len(reports) > 1 else what for name, what, _ in rows]
        for label, (_, what, value) in zip(labels, rows):
            (spot,) = axes.plot([value], [label], "o", ms=8, color=COLOURS.get(what, COLOURS["fp32"]))
            axes.annotate(f"{value:.2f}", (value, label), textcoords="offset points", xytext=(8, -3), fontsize=8)
            tip(spot, f"{label}: {value:.2f} %")
        axes.invert_yaxis()
        axes.margins(x=0.25, y=0.15)

    return draw(paint, "Top-1 on the labelled images", "percent", "", len(rows))


def _blocks(report: Report, reports: Sequence[Report]) -> str:
    checks = {name: check.get("blocks") or [] for name, check in (report.get("checks") or {}).items()}
    checks = {name: rows for name, rows in checks.items() if rows}
    if not checks:
        return ""

    def paint(axes: Any) -> None:
        names = list(dict.fromkeys(row["tensor"] for rows in checks.values() for row in rows))
        for number, (precision, rows) in enumerate(checks.items()):
            places = [names.index(row["tensor"]) for row in rows]
            values = [max(row["max_rel"], 1e-9) for row in rows]
            axes.semilogy(places, values, "o-", ms=4, color=_colour(precision, number), label=precision)
            for place, row in zip(places, rows):
                spot = axes.plot(place, max(row["max_rel"], 1e-9), "o", ms=10, alpha=0.01)[0]
                tip(spot, f"{precision}, {row['tensor']}: {row['max_rel']:.2g} of scale, cosine {row['cosine']:.6f}")
        shown = range(0, len(names), max(1, len(names) // 14))
        axes.set_xticks(list(shown), [names[i].replace("block_", "") for i in shown], rotation=30, ha="right")
        axes.legend(fontsize=8)

    return draw(paint, _titled("Error of each block against JAX", report, reports), "block", "largest error over scale")


def _thresholds(report: Report, reports: Sequence[Report]) -> str:
    """Thresholds that were widened: what entropy's would have cost, and what they cost now."""
    rows = (report.get("calibration") or {}).get("widened") or []
    rows = sorted(rows, key=lambda row: -row["error_entropy"])[:_MOST_BARS]
    if not rows:
        return ""

    def paint(axes: Any) -> None:
        for place, row in enumerate(rows):
            axes.plot([row["error"], row["error_entropy"]], [place, place], color="#94a3b8", zorder=1)
            before = axes.plot(
                row["error_entropy"], place, "o", color=COLOURS["fp8"], label="entropy's" if not place else ""
            )
            after = axes.plot(row["error"], place, "o", color=COLOURS["bf16"], label="as taken" if not place else "")
            tip(
                before[0], f"{row['tensor']}: entropy's threshold {row['entropy']:.3g} loses {row['error_entropy']:.2%}"
            )
            tip(after[0], f"{row['tensor']}: threshold {row['threshold']:.3g} loses {row['error']:.2%}")
        axes.set_yticks(range(len(rows)), [_short(row["tensor"]) for row in rows], fontsize=7)
        axes.set_xscale("log")
        axes.invert_yaxis()
        axes.legend(fontsize=8)

    title = _titled("Widened INT8 thresholds", report, reports)
    return draw(paint, title, "share of the product's mean square that is lost", "", len(rows))


def _short(tensor: str) -> str:
    """The last two parts of a value's name, with its block."""
    parts = tensor.split("/")
    return "/".join(parts[-3:]) if len(parts) > 3 else tensor


def _stages(report: Report, reports: Sequence[Report]) -> str:
    rows = [row for row in report.get("stages") or [] if row.get("seconds")]
    if not rows:
        return ""

    def paint(axes: Any) -> None:
        for row in rows:
            (bar,) = axes.barh([row["name"]], [row["seconds"]], color=COLOURS["fp16"])
            axes.text(row["seconds"], row["name"], f" {row['peak_rss_mib']:,.0f} MiB", va="center", fontsize=8)
            tip(
                bar,
                f"{row['name']}: {row['seconds']:.1f} s, {row['status']}, peak memory {row['peak_rss_mib']:,.0f} MiB",
            )
        axes.invert_yaxis()
        axes.margins(x=0.2)

    return draw(paint, _titled("Stages, with peak memory", report, reports), "seconds", "", len(rows))
