"""The roofline with which measurements of a bundle's engines are compared."""

import dataclasses
from collections.abc import Sequence

from vit_convert.core.errors import ConvertError
from vit_convert.core.roofline import Roofline, Work, data_sheet
from vit_convert.core.text_length import sides_of
from vit_convert.engine.host import EngineHost
from vit_convert.engine.inspection.onnx_wire import read_graph
from vit_convert.engine.inspection.work import count_work
from vit_convert.engine.measure.ceilings import measure_ceilings


def roofline_of(host: EngineHost, precisions: Sequence[str], *, measured: bool) -> Roofline | None:
    """Counts the model's work, and looks up or measures what the GPU can.

    Args:
        host: whose bundle holds model.onnx.
        precisions: of the engines.
        measured: build and time a product in each precision, and a copy; otherwise use only the data sheet.

    Returns:
        The Roofline; None if the graph does not reveal its work.
    """
    gpu = host.backend.gpu.name if host.backend.gpu else ""
    work = work_of(host)
    if work is None:
        return None
    ceilings = measure_ceilings(host.backend, precisions, progress=host.progress) if measured else data_sheet(gpu)
    return Roofline(gpu=gpu, work=work, ceilings=ceilings)


def work_of(host: EngineHost) -> Work | None:
    """The work of a bundle's model for one image, at its best size."""
    size, leading = host.facts.image_size, host.facts.signature.inputs[0].shape[0]
    given = sides_of(size, "optimal")
    try:
        found = count_work(read_graph(host.bundle.onnx()), given | ({leading: 1} if isinstance(leading, str) else {}))
    except ConvertError as e:
        host.progress.warn(f"no roofline: {e}")
        return None
    if found is None or isinstance(leading, str):
        return found
    flop, values = found.gflop_per_image / leading, found.values_per_image // leading  # the graph is of one batch
    return dataclasses.replace(found, gflop_per_image=flop, values_per_image=values)
