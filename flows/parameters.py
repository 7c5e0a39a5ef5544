"""The settings of a stage as the parameters of a flow: a form in the UI, ``-p name=value`` on the command line.

Flat rather than one ``config`` object: a deployment's defaults and a run's ``-p`` are merged name by name, so
changing one setting does not mean repeating all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

ReportPage = Annotated[
    bool, Field(description="Report page beside the result and main chart as an artifact. Default: true.")
]
TimeoutSeconds = Annotated[
    float | None, Field(gt=0, description="Time limit of the main task in seconds; it is not retried. Default: none.")
]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def parameters_of(config: type[BaseModel], filled_by_config: Collection[str] = ()) -> Callable[[_Function], _Function]:
    """Give a function ``f(*, own, **settings)`` one keyword parameter per setting of ``config``.

    Names, types, limits, defaults and descriptions come from the model, so there is one place to change them. The
    function's own parameters replace settings of the same name; the others come last. Their descriptions are read
    from ``Annotated[..., Field(description=...)]``.

    A flow passes all its parameters, so every setting would look chosen by the user. Settings that the model derives
    from others, ``filled_by_config``, are therefore None by default, and the model reads None as not set.

    Prefect reads types and limits from the signature, but descriptions from ``Args:`` in the docstring. So both are
    made here.

    Args:
        config: the model of the stage.
        filled_by_config: settings that the model derives if they are None.
    """

    def give(function: _Function) -> _Function:
        signature = inspect.signature(function, eval_str=True)
        own = {
            name: parameter
            for name, parameter in signature.parameters.items()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        }
        parameters = {
            name: own.get(name) or _parameter(name, field, name in filled_by_config)
            for name, field in config.model_fields.items()
        }
        parameters.update(own)
        described = "\n".join(f"    {name}: {_description(parameter)}" for name, parameter in parameters.items())
        function.__doc__ = f"{inspect.getdoc(function)}\n\nArgs:\n{described}\n"
        function.__signature__ = signature.replace(parameters=list(parameters.values()))  # type: ignore[attr-defined]
        return function

    return give


def _parameter(name: str, field: FieldInfo, filled_by_config: bool) -> inspect.Parameter:
    default = inspect.Parameter.empty if field.is_required() else field.get_default(call_default_factory=True)
    description = Field(description=field.description)
    annotation: Any = Annotated[field.annotation, *field.metadata, description]
    if filled_by_config:  # None has no limits: they stay inside the annotation
        default, annotation = None, Annotated[annotation | None, description]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _description(parameter: inspect.Parameter) -> str:
    texts = [item.description for item in parameter.annotation.__metadata__ if isinstance(item, FieldInfo)]
    assert texts, f"{parameter.name} has no description"
    return str(texts[-1])
