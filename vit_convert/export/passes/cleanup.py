"""What every step of the export may rely on: no unused node, no value computed twice, every shape known."""

import onnx_ir as ir
import onnx_ir.passes.common as passes


def clean(model: ir.Model) -> None:
    """Removes identities, duplicates and whatever no output needs, infers shapes and orders operands, in place."""
    for step in (
        passes.IdentityEliminationPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.ShapeInferencePass(),
    ):
        step(model)
    _constants_last(model)


def _constants_last(model: ir.Model) -> None:
    """Makes constants and weights the right operand of every Add and Mul, so that patterns need only one order."""
    for node in model.graph:
        if node.op_type in ("Add", "Mul"):
            left, right = node.inputs
            if _is_constant(left) and not _is_constant(right):
                node.replace_input_with(0, right)
                node.replace_input_with(1, left)


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and (value.is_initializer() or value.const_value is not None)
