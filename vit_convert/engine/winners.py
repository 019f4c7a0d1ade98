"""What `tune` found: the fastest trials, the config words that get them, and a table for people."""

from collections.abc import Mapping, Sequence
from typing import Any

from vit_convert.engine.table import text_table

DEFAULT = "default"  # the spelling of the bundle's own graph
FIXED = "fixed"  # how the name of a profile of one batch size begins


def winners(trials: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The fastest trial that passed its check, for each precision and batch.

    Args:
        trials: finished ones.

    Returns:
        [{"precision", "batch", "spelling", "profile", "images_per_second", "noise_percent", "ratio" (to the default spelling's best)}].
    """
    found: dict[tuple[str, int], list[tuple[float, Mapping[str, Any], Mapping[str, Any]]]] = {}
    for trial in trials:
        for row in trial.get("rows", []) if trial.get("passed") else []:
            found.setdefault((trial["precision"], row["batch"]), []).append((row["images_per_second"], trial, row))
    result = []
    for (precision, batch), candidates in sorted(found.items()):
        rate, trial, row = max(candidates, key=lambda candidate: candidate[0])
        plain = max((other for other, candidate, _ in candidates if candidate["spelling"] == DEFAULT), default=None)
        result.append(
            {
                "precision": precision,
                "batch": batch,
                "spelling": trial["spelling"],
                "profile": trial["profile"],
                "images_per_second": rate,
                "noise_percent": row["noise_percent"],
                "ratio": None if plain is None else round(rate / plain, 4),
            }
        )
    return result


def config_words(winner: Mapping[str, Any]) -> str:
    """What gets a winner from `build`, as `--config.key=value` words.

    Args:
        winner: one of `winners`.

    Returns:
        '--config.engine.spelling=matmul --config.batch.profiles="(256,)"'.
    """
    profiles = f"({winner['batch']},)" if winner["profile"].startswith(FIXED) else "()"
    spelling = "" if winner["spelling"] == DEFAULT else winner["spelling"]
    return f'--config.engine.spelling={spelling} --config.batch.profiles="{profiles}"'


def tune_table(result: Mapping[str, Any]) -> str:
    """All trials as text for a terminal, the winners marked, and below it how to get each of them.

    Args:
        result: of `tune_bundle`.
    """
    best = {(row["batch"], *_names(row)) for row in result["winners"]}
    rows = []
    for trial in result["trials"]:
        names = _names(trial)
        if "failed" in trial:
            rows.append([*names, "", "", "", f"failed: {trial['failed'][:60]}"])
            continue
        fused = trial["fused_attention"]["text"] if trial["fused_attention"] else "unknown"
        for row in trial["rows"]:
            note = "missed its tolerance" if not trial["passed"] else "fastest" if (row["batch"], *names) in best else ""
            rows.append([*names, str(row["batch"]), f"{row['images_per_second']:,.0f}", fused, note])
    table = text_table(("spelling", "profile", "precision", "batch", "images/s", "fused attention", ""), rows)
    return "\n".join([table, *(f"{row['precision']} at batch {row['batch']}: {config_words(row)}" for row in result["winners"])])


def _names(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["spelling"], row["profile"], row["precision"]
