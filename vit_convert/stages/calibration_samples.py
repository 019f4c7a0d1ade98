"""The images or texts used for calibration."""

import numpy as np

from vit_convert.core.bundle import atomic
from vit_convert.core.errors import UsageError
from vit_convert.core.pipeline import Context
from vit_convert.stages.common import decode, noise
from vit_convert.stages.text import calibration_tokens, noise_tokens, samples_file, takes_text

_NOISE_IMAGES = 32


def calibration_samples(context: Context) -> tuple[np.ndarray, str]:
    """The images or token ids to calibrate with: those that the config names, or seeded noise with a warning.

    Args:
        context: of the conversion.

    Returns:
        Pixels [n, height, width, 3], packed patches [n, patches, bytes] or token ids [n, length], and their source in
        words.

    Raises:
        CalibrationError: they cannot be read.
        UsageError: TensorRT's own calibrator is requested, and cannot take them.
    """
    from vit_convert.images.sources import open_images

    config, is_text = context.config.calibration, takes_text(context)
    if context.config.engine.calibrator and context.results.checkpoint.patches:
        raise UsageError(
            "config.engine.calibrator: TensorRT's own calibrator takes images of one size, this tower takes patches",
            fix="Leave engine.calibrator off: INT8 is then written into the graph.",
        )
    if is_text and (found := calibration_tokens(context)):
        return found
    if config.data:
        source = open_images(config.data, labelled=False)
        return decode(context, "calibration", source, config.num_images).images, config.data
    count = min(config.num_images, _NOISE_IMAGES)
    images = noise_tokens(context, count) if is_text else noise(context, count)
    context.progress.warn(
        f"calibration.data is empty: ranges come from {'seeded tokens' if is_text else 'noise'}, so the quantized "
        "engine shows speed and not accuracy"
    )
    with atomic(samples_file(context, "calibration")) as temporary, open(temporary, "wb") as f:
        np.save(f, images)
    return images, "seeded noise"
