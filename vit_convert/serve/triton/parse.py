"""Reads configs with Triton's own protobuf; a script without other imports, for the Python of an environment that has
it.

The generated module pins an older protobuf than ONNX needs, so both are rarely in the same environment.
"""

import importlib.util
import json
import pathlib
import sys


def parse(paths: "list[str]") -> "dict[str, dict[str, object]]":
    """Each config as {"config": …} with the protobuf's field names, or {"error": line, column and reason}."""
    from google.protobuf import json_format, text_format

    # Not `import tritonclient.grpc`: that asks for grpcio, which nothing here needs.
    found = importlib.util.find_spec("tritonclient")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("tritonclient", name="tritonclient")
    where = pathlib.Path(found.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", where)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    results: dict[str, dict[str, object]] = {}
    for path in paths:
        try:
            config = text_format.Parse(pathlib.Path(path).read_text(encoding="utf-8"), module.ModelConfig())
            results[path] = {"config": json_format.MessageToDict(config, preserving_proto_field_name=True)}
        except (text_format.ParseError, OSError, UnicodeDecodeError) as e:
            results[path] = {"error": str(e)}
    return results


if __name__ == "__main__":
    print(json.dumps(parse(sys.argv[1:])))
