"""Two builds of one precision in a bundle, such as one for this GPU and a portable one, must agree."""

import dataclasses
import pathlib
from collections.abc import Iterator

from vit_convert.core.bundle import Bundle
from vit_convert.core.consistency import agreement
from vit_convert.core.engine_results import EngineCheck
from vit_convert.core.errors import ConvertError
from vit_convert.core.tolerance import tolerance_for
from vit_convert.engine.backend.sidecar import check_sidecar
from vit_convert.engine.backend.trt import Backend
from vit_convert.engine.bundle_engines import open_engine, require_conversion
from vit_convert.engine.host import EngineHost
from vit_convert.engine.runtime.session import Session
from vit_convert.engine.verify import probes_of


def compare_builds(session: Session, host: EngineHost, found: EngineCheck) -> EngineCheck:
    """Runs noise, black and white through the other engines of the same precision that load here.

    Args:
        session: of the engine that was verified.
        host: whose bundle holds them; its config has the tolerances.
        found: the result of `verify_session` for it.

    Returns:
        `found` with the comparisons in its `consistency`, and misses in its `misses`.
    """
    backend, bundle, facts = host.backend, host.bundle, host.facts
    result, probes = found, None
    record = session.engine.record
    tolerance = tolerance_for(host.config, record.precision, engine=True, tf32=record.options.tf32)
    for plan in _others(backend, bundle, session.engine.path):
        probes = probes or {name: values[:3] for name, values in probes_of(facts).items()}
        with Session(open_engine(backend, bundle, plan)) as other:
            rows = agreement(
                plan.parent.name, session.run(probes), other.run(probes), list(facts.signature.judged), tolerance
            )
        misses = (*result.misses, *(str(row) for row in rows if not row.passed))
        consistency = (*result.consistency, *rows)
        result = dataclasses.replace(result, consistency=consistency, misses=misses, passed=not misses)
    return result


def _others(backend: Backend, bundle: Bundle, plan: pathlib.Path) -> Iterator[pathlib.Path]:
    for path in sorted(bundle.root.glob(f"engines/{backend.name}-*/{plan.name}")):
        if path != plan:
            try:
                check_sidecar(path, backend)
                require_conversion(bundle, path)
            except ConvertError:
                continue  # from another host, or an earlier graph
            yield path
