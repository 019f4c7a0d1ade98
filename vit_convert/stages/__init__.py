"""The stages of one conversion, from the checkpoint to the engines; each imports what it needs when it runs."""

from vit_convert.core.errors import UsageError, nearest
from vit_convert.core.pipeline import Stage
from vit_convert.stages.build import BENCHMARK, BUILD, VERIFY
from vit_convert.stages.calibrate import CALIBRATE
from vit_convert.stages.check import CHECK
from vit_convert.stages.checkpoint import CHECKPOINT
from vit_convert.stages.export import EXPORT
from vit_convert.stages.images import IMAGES
from vit_convert.stages.plan import PLAN, SENSITIVITY
from vit_convert.stages.quantize import QUANTIZE
from vit_convert.stages.reference import REFERENCE


def stages() -> list[Stage]:
    """All stages in order; each reads what the ones before it left in the bundle."""
    return [
        CHECKPOINT,
        IMAGES,
        EXPORT,
        REFERENCE,
        CHECK,
        CALIBRATE,
        SENSITIVITY,
        PLAN,
        QUANTIZE,
        BUILD,
        VERIFY,
        BENCHMARK,
    ]


def require_stage(name: str) -> None:
    """Refuses a name that is not a stage's; "" stands for all of them.

    Raises:
        UsageError: see above.
    """
    names = [stage.name for stage in stages()]
    if name and name not in names:
        raise UsageError(f"--until={name}: not one of {', '.join(names)}.{nearest(name, names)}")
