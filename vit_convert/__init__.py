"""vit_convert: pretrained Flax/JAX vision transformers to TensorRT engines, with the numbers proved at every step."""

__version__ = "0.1.0"
