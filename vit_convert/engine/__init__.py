"""Engines: one thin layer over TensorRT 8.6, 10, 11 and TensorRT-RTX."""
