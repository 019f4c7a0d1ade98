"""The results of `tune`: the fastest trials, the config words that build them, and a table for people."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from vit_convert.core.benchmark_results import BenchmarkRow
from vit_convert.core.text_table import text_table
from vit_convert.core.tune_results import TunedEngine, TunedTrial, TuneResult, Winner

DEFAULT = "default"  # the lowering of the bundle's own graph


def winners(trials: Iterable[TunedTrial], usual: Mapping[str, Any]) -> list[Winner]:
    """The fastest trial that passed its check, for each precision and batch.

    Args:
        trials: finished ones.
        usual: the bundle's own options; a winner lists only those in which it differs.
    """
    found: dict[tuple[str, int], list[tuple[TunedTrial, BenchmarkRow]]] = {}
    for trial in trials:
        for row in trial.rows if trial.passed else ():
            found.setdefault((trial.precision, row.batch), []).append((trial, row))
    return [_winner(candidates, usual) for _, candidates in sorted(found.items(), key=lambda item: item[0])]


def _winner(candidates: Sequence[tuple[TunedTrial, BenchmarkRow]], usual: Mapping[str, Any]) -> Winner:
    """The fastest of some trials at one batch."""
    (trial, row), *others = sorted(candidates, key=lambda candidate: -candidate[1].images_per_second)
    plain = max(
        (other.images_per_second for candidate, other in candidates if candidate.lowering == DEFAULT), default=None
    )
    rival = next((other for other in others if _engine(other[0]) != _engine(trial)), None)
    return Winner(
        precision=trial.precision,
        batch=row.batch,
        key=trial.key,
        lowering=trial.lowering,
        profile=trial.profile,
        sizes=trial.sizes,
        options={key: value for key, value in trial.options.items() if value != usual.get(key)},
        images_per_second=row.images_per_second,
        noise_percent=row.noise_percent,
        ratio=None if plain is None else round(row.images_per_second / plain, 4),
        within_noise_of=f"{rival[0].lowering}, {rival[0].profile}" if rival and not _leads(row, rival[1]) else "",
    )


def config_words(winner: Winner) -> str:
    """The `--config.key=value` words with which `build` makes a winner's engine.

    Args:
        winner: one of `winners`.

    Returns:
        '--config.engine.lowering=matmul --config.batch.min=256 --config.batch.opt=256 --config.batch.max=256
        --config.batch.profiles="()"', and the options that differ from the bundle's own config.
    """
    lowering = "" if winner.lowering == DEFAULT else winner.lowering
    words = [
        f"--config.engine.lowering={lowering}",
        *(f"--config.batch.{key}={winner.sizes[key]}" for key in ("min", "opt", "max")),
    ]
    words.append('--config.batch.profiles="()"')  # the trial had one profile
    for key, value in winner.options.items():
        words.append(f'--config.{key}="{tuple(value)}"' if isinstance(value, list) else f"--config.{key}={value}")
    return " ".join(words)


def tuned_engines(result: TuneResult) -> Iterator[TunedEngine]:
    """All trials at each batch, with instructions for the winners.

    Args:
        result: of `tune_bundle`.
    """
    best = {(row.batch, row.precision, row.key): row for row in result.winners}
    for trial in result.trials:
        about = {"precision": trial.precision, "lowering": trial.lowering, "profile": trial.profile}
        fused = trial.fused_attention.text if trial.fused_attention else "unknown"
        if trial.failed is not None:
            reason = re.sub(r"[^ ]*/", "", trial.failed)[:80]  # the reason, without the place
            note = f"failed: {reason}"
            yield TunedEngine(**about, batch=None, images_per_second=None, fused_attention="", note=note, words="")
        for row in trial.rows:
            winner = best.get((row.batch, trial.precision, trial.key))
            note = "" if trial.passed else "missed its tolerance"
            if winner:
                rival = winner.within_noise_of
                note = f"fastest, within the noise of {rival}" if rival else "fastest"
            yield TunedEngine(
                **about,
                batch=row.batch,
                images_per_second=row.images_per_second,
                fused_attention=fused,
                note=note,
                words=config_words(winner) if winner else "",
            )


def tune_table(result: TuneResult) -> str:
    """All trials as text for a terminal, with the winners marked and, below, how to build each of them.

    Args:
        result: of `tune_bundle`.
    """
    rows = [
        [
            *(row.lowering, row.profile, row.precision),
            "" if row.batch is None else str(row.batch),
            "" if row.images_per_second is None else f"{row.images_per_second:,.0f}",
            *(row.fused_attention, row.note),
        ]
        for row in tuned_engines(result)
    ]
    table = text_table(("lowering", "profile", "precision", "batch", "images/s", "fused attention", ""), rows)
    return "\n".join([table, *(f"{row.precision} at batch {row.batch}: {config_words(row)}" for row in result.winners)])


def _leads(row: BenchmarkRow, other: BenchmarkRow) -> bool:
    """Whether a row is faster than another by more than the noise of both."""
    lead_percent = 100 * (row.images_per_second / other.images_per_second - 1)
    return lead_percent > (row.noise_percent or 0.0) + (other.noise_percent or 0.0)


def _engine(trial: TunedTrial) -> tuple[Any, ...]:
    """Distinguishes a trial's engine from others of its precision; one engine may be timed more than once."""
    return trial.lowering, trial.profile, trial.options
