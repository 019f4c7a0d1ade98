"""Triton's module for Python models, as far as ours use it, for tests without a server."""

import dataclasses
import types
from typing import ClassVar


@dataclasses.dataclass
class Tensor:
    tensor_name: str
    value: object

    def as_numpy(self):
        return self.value

    def name(self):
        return self.tensor_name


@dataclasses.dataclass
class TritonError:
    text: str

    def message(self):
        return self.text


class TritonModelException(Exception):
    pass


@dataclasses.dataclass
class InferenceResponse:
    tensors: list
    problem: TritonError | None = None

    def has_error(self):
        return self.problem is not None

    def error(self):
        return self.problem

    def __getitem__(self, name):
        assert self.problem is None, self.problem.text
        return next(tensor.value for tensor in self.tensors if tensor.tensor_name == name)


class MetricFamily:
    COUNTER, GAUGE = "counter", "gauge"
    values: ClassVar[dict] = {}  # by metric's name and labels, of all families

    def __init__(self, name, description, kind):
        self._name = name

    def Metric(self, labels):
        key = (self._name, *sorted(labels.items()))
        MetricFamily.values[key] = 0.0

        def increment(by):
            MetricFamily.values[key] += by

        return types.SimpleNamespace(increment=increment, set=lambda to: MetricFamily.values.__setitem__(key, to))


TRITONSERVER_MEMORY_CPU = 0
MODELS = {}  # what InferenceRequest asks, by name: {input: array} → {output: array}; an exception is a refusal


def PreferredMemory(kind):
    return kind


@dataclasses.dataclass
class InferenceRequest:
    model_name: str
    requested_output_names: list
    inputs: list
    preferred_memory: object = None

    def exec(self):
        try:
            found = MODELS[self.model_name]({tensor.name(): tensor.as_numpy() for tensor in self.inputs})
        except Exception as e:
            return InferenceResponse([], TritonError(str(e)))
        return InferenceResponse([Tensor(name, found[name]) for name in self.requested_output_names])


def get_output_tensor_by_name(response, name):
    return next(tensor for tensor in response.tensors if tensor.tensor_name == name)


def request(**inputs):
    """A request of these inputs."""
    return {name: Tensor(name, value) for name, value in inputs.items()}


def get_input_tensor_by_name(of, name):
    return of.get(name)
