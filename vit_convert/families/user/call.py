"""How to call a user's own model (a Linen module, an NNX module or a function) in inference mode, and what its
parameters are."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax

from vit_convert.core.errors import UsageError

# Arguments that tell modules that they do not train.
EVALUATION = {
    **dict.fromkeys(("train", "training", "is_training", "is_train", "train_mode", "enable_dropout"), False),
    **dict.fromkeys(("deterministic", "inference", "eval_mode", "is_eval", "use_running_average"), True),
}
_WRAP = "Return (f, params) with a function f(params, images) that passes what the model needs."


@dataclasses.dataclass(frozen=True)
class Call:
    """A model and its parameters.

    Attributes:
        run: maps (tree of parameters, images) to whatever the model returns.
        tree: the parameters, with whatever else is among them.
        name: of the module's class, or the function's.
        spoken: how it is called, for messages: "Tiny.apply(variables, images, train=False)".
        warnings: what the user should know.
        outer: number of tree levels that are not scopes of the model: Linen's collections.
    """

    run: Callable[[Any, jax.Array], Any]
    tree: Any
    name: str
    spoken: str
    warnings: tuple[str, ...] = ()
    outer: int = 0


def taken_apart(made: Any) -> tuple[Any, Any]:
    """The module or function, and the variables, from what `config.model()` returned; None for variables that it holds
    itself.

    Raises:
        UsageError: it is a tuple of another length.
    """
    if type(made) is not tuple:
        return made, None
    if len(made) != 2:
        raise UsageError(f"config.model returned a tuple of {len(made)}, expected (module, variables)", fix=_WRAP)
    return made


def call_of(module: Any, variables: Any) -> Call:
    """Finds out how a model is called.

    Args:
        module: a Linen module, an NNX module or a function f(params, images).
        variables: its parameters; None for an NNX module, a Linen module that is bound to them, and a function without.

    Returns:
        The Call.

    Raises:
        UsageError: it is none of these, its parameters are missing, or it needs other arguments.
    """
    from flax import linen, nnx

    if isinstance(module, type):
        raise UsageError(
            f"config.model returned the class {module.__name__}, not an instance of it",
            fix=f"Return {module.__name__}(…).",
        )
    if isinstance(module, linen.Module):
        return _linen(module, variables)
    if isinstance(module, nnx.Module):
        if variables is not None:
            raise UsageError(
                f"model {type(module).__name__}: an NNX module holds its parameters, and variables came with it",
                fix=_WRAP,
            )
        return _nnx(module)
    if _is_callable_tree(module):
        raise UsageError(
            f"model {type(module).__name__}: an object that is both its parameters and its function, as Equinox has; "
            "such take one image, or a key besides",
            fix="Return (f, params): params, rest = eqx.partition(model, eqx.is_inexact_array); "
            "f = lambda params, images: jax.vmap(eqx.combine(params, rest))(images).",
        )
    if not callable(module):
        raise UsageError(
            f"config.model returned {_shown(module)}: neither a Linen module, an NNX module nor a function",
            fix="docs/own-models.md says what config.model may return.",
        )
    return _function(module, {} if variables is None else variables)


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, int | float | str | None) else f"a {type(value).__name__}"
    return text if len(text) < 80 else f"{text[:80]}…"


def _is_callable_tree(module: Any) -> bool:
    if not callable(module) or inspect.isroutine(module) or isinstance(module, functools.partial):
        return False
    return not jax.tree_util.treedef_is_leaf(jax.tree_util.tree_structure(module))


def _linen(module: Any, variables: Any) -> Call:
    from flax.core import meta

    name = type(module).__name__
    if variables is None and module.scope is not None:
        module, variables = module.unbind()
    if variables is None:
        raise UsageError(f"model {name}: a Linen module needs its variables", fix="Return (module, variables).")
    if not isinstance(variables, Mapping):
        hint = " Of a train state, that is {'params': state.params, …}." if hasattr(variables, "params") else ""
        raise UsageError(
            f"model {name}: its variables are a {type(variables).__name__}, not a dictionary",
            fix=f"Return (module, variables).{hint}",
        )
    if not callable(module):
        raise UsageError(f"model {name}: has no __call__", fix=_WRAP)
    arguments = _arguments(module.__call__, 1, name)
    collections = {"params", "batch_stats"} & set(variables)
    wrapped = dict(variables) if collections else {"params": variables}

    def run(tree: Any, images: jax.Array) -> Any:
        return module.apply(tree, images, **arguments)

    return Call(run, meta.unbox(wrapped), name, f"{name}.apply(variables, images{_spelt(arguments)})", outer=1)


def _nnx(module: Any) -> Call:
    from flax import nnx

    name = type(module).__name__
    arguments = _arguments(module, 1, name)
    graph, state = nnx.split(module)
    structure = jax.tree_util.tree_structure(state)

    def run(tree: Any, images: jax.Array) -> Any:
        return nnx.merge(graph, jax.tree_util.tree_unflatten(structure, jax.tree_util.tree_leaves(tree)))(
            images, **arguments
        )

    trains = [
        "/".join(map(str, path)) or name
        for path, part in nnx.iter_modules(module)
        if getattr(part, "use_running_average", None) is False
        or (
            getattr(part, "deterministic", None) is False
            and any(getattr(part, key, None) for key in ("rate", "dropout_rate"))
        )
    ]
    told = (
        ()
        if arguments or not trains
        else (f"model {name}: {', '.join(trains)} still train: call model.eval() before you return it",)
    )
    return Call(run, state, name, f"{name}(images{_spelt(arguments)})", told)


def _function(function: Any, params: Any) -> Call:
    name = getattr(function, "__name__", type(function).__name__)
    arguments = _arguments(function, 2, name)
    return Call(
        lambda tree, images: function(tree, images, **arguments),
        params,
        name,
        f"{name}(params, images{_spelt(arguments)})",
    )


def _spelt(arguments: Mapping[str, Any]) -> str:
    return "".join(f", {name}={value}" for name, value in arguments.items())


def _arguments(function: Any, count: int, name: str) -> dict[str, bool]:
    """The further arguments of a model, from its signature, which tell it that it does not train.

    Args:
        function: bound, without self.
        count: how many positional arguments it gets: 1, images, or 2, params and images.
        name: of the model.

    Raises:
        UsageError: it takes fewer, or needs more.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C
        return {}
    parameters = list(signature.parameters.values())
    kinds = inspect.Parameter
    positional = [p for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    given = "images" if count == 1 else "params, images"
    if len(positional) < count and not any(p.kind == kinds.VAR_POSITIONAL for p in parameters):
        raise UsageError(
            f"model {name}{signature}: takes {len(positional)} arguments, it is called with ({given})", fix=_WRAP
        )
    rest = [
        p for p in parameters if p not in positional[:count] and p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
    ]
    told = {p.name: EVALUATION[p.name] for p in rest if p.name in EVALUATION and p.kind != kinds.POSITIONAL_ONLY}
    if missing := [p.name for p in rest if p.default is kinds.empty and p.name not in told]:
        raise UsageError(
            f"model {name}{signature}: needs {', '.join(missing)} as well, it is called with ({given})", fix=_WRAP
        )
    return told


def without_training(run: Callable[[Any, jax.Array], Any]) -> Callable[[Any, jax.Array], Any]:
    """The call of a Linen model whose layers were not told whether they train: each that asks is told that it does not.

    Dropout, BatchNorm and attention have an argument and a field for it, and refuse to guess when both are None
    (`nn.merge_param`).
    """
    from flax import linen

    def tell(call: Any, arguments: Any, named: Any, context: Any) -> Any:
        try:
            signature = inspect.signature(getattr(type(context.module), context.method_name))
            bound = signature.bind_partial(context.module, *arguments, **named)
        except (AttributeError, TypeError, ValueError):
            return call(*arguments, **named)
        for name in signature.parameters.keys() & EVALUATION.keys():
            if bound.arguments.get(name) is None and getattr(context.module, name, None) is None:
                bound.arguments[name] = EVALUATION[name]
        return call(*bound.args[1:], **bound.kwargs)

    def told(tree: Any, images: jax.Array) -> Any:
        with linen.intercept_methods(tell):
            return run(tree, images)

    return told
