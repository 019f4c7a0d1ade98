"""Sends the questions of an .npz file over gRPC by Triton's own client; a script for the environment that has it.

Usage: grpc_client.py HOST:PORT QUESTIONS.npz ANSWERS.npz, where QUESTIONS holds arrays "<model>/<input>/<output>".
"""

import sys

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import np_to_triton_dtype

address, asked, answered = sys.argv[1:]
answers = {}
with triton.InferenceServerClient(address) as client, np.load(asked, allow_pickle=True) as questions:
    for key in questions.files:
        model, name, output = key.split("/")
        value = questions[key]
        tensor = triton.InferInput(name, list(value.shape), np_to_triton_dtype(value.dtype))
        tensor.set_data_from_numpy(value)
        answers[key] = client.infer(model, [tensor]).as_numpy(output)
np.savez(answered, **answers)
