"""What every key is unless somebody says otherwise: written down here apart from the code, since another default makes
other engines of everybody's next conversion. Whoever changes one says so in the changelog, and changes it here."""

import pytest
from ml_collections import config_dict

from vit_convert.core.defaults import default_config

DEFAULTS = {
    "": {
        "name": "", "checkpoint": "", "family": "auto", "families": (), "tokenizer": "", "variant": "auto",
        "model": None, "image_size": None, "posemb_grid": None, "preprocess": "auto", "layout": "NHWC",
        "input": "float32", "outputs": "auto", "normalize": True, "taps": False, "num_classes": 0,
        "quantize_only": (), "keep_fp16": (), "precision": "fp16", "target": "auto", "lowerings": (),
        "keep_fp32": (), "sensitivity": False, "text_length": None,
    },
    "batch": {"min": 1, "opt": 8, "max": 64, "profiles": ()},
    "calibration": {
        "data": "", "method": "entropy", "max_error": 0.001, "min_cosine": 0.99, "num_images": 512,
        "batch_size": 8, "device": "auto", "attention": False, "branches": False, "shift": True, "rotate": False,
        "smooth": 0.0,
    },
    "plan": {
        "type": "int8", "accuracy_budget": 0.5, "cosine": 0.0, "num_images": 256, "runs": 6, "file": "",
    },
    "evaluation": {"data": "", "num_images": 0, "prompts": "", "templates": ()},
    "check": {
        "num_images": 4, "atol": 1e-6, "rtol": 1e-4, "consistency": True, "engine_rtol": 1e-3, "cosine": 0.99999,
        "fp16_cosine": 0.999, "int8_cosine": 0.98, "max_top1_drop": 1.0, "min_agreement": 99.0,
        "fp16_similarity": 0.01, "int8_similarity": 0.1, "int8_agreement": 90.0, "min_recall": 99.0,
    },
    "engine": {
        "backend": "auto", "preset": "", "workspace_gib": 4.0, "timing_cache": "", "opt_level": 3, "tf32": False,
        "lowering": "auto", "int8_lowering": "auto", "hardware_compatible": False, "version_compatible": False,
        "calibrator": False,
    },
    "benchmark": {"batches": (1, 8, 64), "streams": (1, 2), "seconds": 3.0, "min_gain": 1.0},
}  # fmt: skip


def flat(config, sections):
    return {key: value for key, value in config.items() if key not in sections}


@pytest.mark.parametrize("section", DEFAULTS)
def test_defaults(section):
    config = default_config()
    found = flat(config, {*DEFAULTS, "image", "text"}) if not section else dict(config[section])
    assert {key: (type(value), value) for key, value in found.items()} == {
        key: (type(value), value) for key, value in DEFAULTS[section].items()
    }


def test_it_is_locked():
    assert default_config().is_locked
    assert all(default_config()[section].is_locked for section in DEFAULTS if section)
    assert isinstance(default_config().get_ref("model"), config_dict.FieldReference)  # a placeholder of any type
