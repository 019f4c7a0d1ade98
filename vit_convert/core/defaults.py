"""Every config key, with its default and its meaning."""

import ml_collections
from ml_collections import config_dict

from vit_convert.core.renamed import Config
from vit_convert.core.tower_config import tower_keys


def default_config() -> ml_collections.ConfigDict:
    """Every key with its default; a config file changes what it needs.

    Returns:
        A locked ConfigDict. Setting an unknown key is an error that names the nearest valid ones.

    Example:
        >>> config = default_config()
        >>> config.batch.max
        64
    """
    config = Config()
    config.name = ""  # name of the bundle folder; empty: the config file's
    config.checkpoint = ""  # .npz, .safetensors or .msgpack: a path, or an https:// or gs:// address
    config.family = "auto"  # auto: read from the file; any other is checked against it
    # more families of models: ("my_module:FAMILY", "/path/my_family.py:FAMILY"), tried before the package's own
    config.families = ()
    # of a text tower: its .model, vocab.txt, merges.txt or tokenizer.json, or their folder; not needed for ids in .npy
    config.tokenizer = ""
    # of a text tower: tokens of a text, 32, or a range, "dynamic:8..77@16"; empty: as many as the checkpoint has
    config.text_length = config_dict.placeholder(object)
    config.variant = "auto"  # "B/32", "ViT-B_32", …; auto: read from the file; any other is checked against it
    # your own model instead of a checkpoint: a function that returns (module, variables)
    config.model = config_dict.placeholder(object)
    # 224, (224, 384), "224x384" or "dynamic:160..448@224"; empty: the checkpoint's
    config.image_size = config_dict.placeholder(object)
    config.posemb_grid = config_dict.placeholder(tuple)  # (rows, columns) of a stored position table that is not square
    # how images become inputs: vit_jax, big_vision, siglip, imagenet, …; auto: as the checkpoint was trained
    config.preprocess = "auto"
    config.layout = "NHWC"  # order of the `images` input's axes
    config.input = "float32"  # float32: normalised as `preprocess` says; uint8: pixels, which the graph normalises
    # logits, embedding (a tower's), features (before the head), tokens, grid, class_tokens, several with commas
    # between; if your own model has several outputs, which is judged
    config.outputs = "auto"
    config.normalize = True  # divide a tower's embeddings by their norm
    config.taps = False  # keep block_00 … encoder_norm as outputs of model.onnx
    config.num_classes = 0  # checked against the checkpoint's head; 0: whatever it has
    # block names and patterns that int8 is limited to; empty: all linears between the first and the last
    config.quantize_only = ()
    config.keep_fp16 = ()  # block names and patterns that int8 leaves in fp16
    # comma-separated; int8 and fp8 also build fp16; auto quantizes, to plan.type, what the budget allows
    config.precision = "fp16"
    config.target = "auto"  # the TensorRT generation that the graph is written for; auto: the backend's
    # other ways to write model.onnx, for `tune` to choose from: ("plugin", "kernels", "matmul") for trt8
    config.lowerings = ()
    config.keep_fp32 = ()  # block names and patterns that stay in fp32: ("block_11", "head*")

    config.batch = Config()
    config.batch.min = 1
    config.batch.opt = 8
    config.batch.max = 64
    config.batch.profiles = ()  # batch sizes that get a fixed profile beside the range, which is faster: (1, 64)

    config.calibration = Config()
    config.calibration.data = ""  # folder, .zip, .npz or list file; empty: seeded noise, enough only to measure speed
    # entropy, widened where clipping costs more than it gains; entropy_plain, minmax, percentile, mse
    config.calibration.method = "entropy"
    # entropy: a product that loses more of its mean square to int8 stays fp16; 1/20 of cosine 0.99
    config.calibration.max_error = 0.001
    # with engine.int8_lowering: smallest cosine of the output to fp32 on any calibration image; what costs the output
    # most for its time stays fp16 until it holds; 0: the output is not judged
    config.calibration.min_cosine = 0.99
    config.calibration.num_images = 512
    config.calibration.batch_size = 8
    config.calibration.device = "auto"  # of the graph: cpu, cuda (needs onnxruntime-gpu), auto: cuda where there is one
    config.calibration.attention = False  # quantize the attention products too
    # with engine.int8_lowering: quantize what blocks add to the residual stream too
    config.calibration.branches = False
    # int8: subtract the middle of a one-sided range before rounding; biases add it back
    config.calibration.shift = True
    # mix the channels of the residual stream by an orthogonal matrix, in the weights: no channel stands out then
    config.calibration.rotate = False
    config.calibration.smooth = 0.0  # SmoothQuant's strength, 0.5 for outlier channels after LayerNorms; 0: off

    config.sensitivity = False  # measure what each layer loses in plan.type, also without precision=auto

    config.plan = Config()
    config.plan.type = "int8"  # int8 or fp8: what precision=auto computes as much of the model in as the budget allows
    config.plan.accuracy_budget = 0.5  # points of top-1 that the plan may lose, if there are labels
    config.plan.cosine = 0.0  # smallest cosine to the fp32 output that is allowed on any image; 0: check.int8_cosine
    # how many images to measure on: of the evaluation images, else of the calibration images
    config.plan.num_images = 256
    # combinations of layers that are tried beyond the bisection; each takes a run over some of the images
    config.plan.runs = 6
    config.plan.file = ""  # a precision_plan.json from an earlier search, perhaps edited; then nothing is searched

    config.evaluation = Config()
    config.evaluation.data = ""  # labelled images; empty: no accuracy is measured
    config.evaluation.num_images = 0  # 0: all
    # of a pair: a file of class names, one a line, in the order of the labels: zero-shot top-1 is measured
    config.evaluation.prompts = ""
    # "a photo of a {}", and files of such lines; empty: the lines of evaluation.prompts as they are
    config.evaluation.templates = ()

    config.check = Config()
    config.check.num_images = 4  # images in reference.npz; the largest batch onnxruntime is checked with
    config.check.atol = 1e-6  # fp32: max_abs <= atol + rtol * scale of the output, for the output and for every block
    config.check.rtol = 1e-4
    config.check.consistency = True  # also without JAX: equal rows agree, order and batch do not matter, all is finite
    config.check.engine_rtol = 1e-3  # the same for fp32 engines, which sum in other orders, through up to 32 blocks
    config.check.cosine = 0.99999
    config.check.fp16_cosine = 0.999  # against JAX fp32, for the output
    config.check.int8_cosine = 0.98
    config.check.max_top1_drop = 1.0  # points of top-1 that a lower precision may lose, if there are labels
    # percent of labelled images on which an unquantized engine has to give JAX's first class
    config.check.min_agreement = 99.0

    config.check.fp16_similarity = 0.01  # of a pair: largest error of the cosine of an image and a text
    config.check.int8_similarity = 0.1
    # of a pair: percent of the images for which a quantized pair has to put JAX's first text first
    config.check.int8_agreement = 90.0
    # of a pair: percent of the images whose first text by JAX has to be among a lower precision's first five
    config.check.min_recall = 99.0

    config.engine = Config()
    config.engine.backend = "auto"  # auto: tensorrt on a host with a GPU, else rtx; none: stop after ONNX
    # jetson_orin, jetson_thor, t4, l4, a10, a100, h100 or rtx: batches and memory that suit such a GPU, in place of
    # defaults, and a look at its memory before the build; empty: none
    config.engine.preset = ""
    config.engine.workspace_gib = 4.0
    config.engine.timing_cache = ""  # a folder for kernel timings, which models may share; empty: one in the bundle
    config.engine.opt_level = 3
    config.engine.tf32 = False
    # what trt8's fp16 engines are built from; auto: "groupnorm", then "plugin", if they fit; empty: model.onnx
    config.engine.lowering = "auto"
    # what trt8's int8 engines are built from: "fused", which needs our kernels, or the Q/DQ graph (empty); auto: with
    # precision=auto "fused", where the kernels are built on this host and it fits the model; else the Q/DQ graph
    config.engine.int8_lowering = "auto"
    config.engine.hardware_compatible = False  # an engine for Ampere and every later GPU, at some cost in speed
    config.engine.version_compatible = False  # an engine that later versions of the same TensorRT major load
    config.engine.calibrator = False  # INT8 by TensorRT's own calibrator (TensorRT 10 and earlier) instead of Q/DQ

    config.benchmark = Config()
    config.benchmark.batches = (1, 8, 64)
    config.benchmark.streams = (1, 2)
    config.benchmark.seconds = 3.0
    config.benchmark.min_gain = 1.0  # percent by which a quantized engine must be faster to be recommended

    config.image = tower_keys(config, "image")  # any key above for a pair's image tower only: image.batch.max
    config.text = tower_keys(config, "text")  # for its text tower: text.precision, text.calibration.data (prompts)
    return config.lock()
