"""The settings of a stage as the parameters of a flow: a form in the UI, ``-p name=value`` on the command line.

The everyday settings are parameters of their own, so that a deployment's defaults and a run's ``-p`` are merged name by
name. All others are in one object, ``advanced``, which a run gives or leaves as a whole.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from types import NoneType
from typing import Annotated, Any, NamedTuple, TypeVar, get_args

import pydantic
from prefect.runtime import flow_run
from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo
from pydantic.json_schema import SkipJsonSchema

from teacher_cache.pipeline.settings.base import StageConfig
from teacher_cache.pipeline.settings.run_file import check_config
from teacher_cache.storage.errors import CacheError, UsageError

ReportPage = Annotated[
    bool, Field(description="Report page beside the result and main chart as an artifact. Default: true.")
]
TimeoutSeconds = Annotated[
    float | None, Field(gt=0, description="Time limit of the main task in seconds; it is not retried. Default: none.")
]

_ADVANCED = (
    "Settings for experts; leave them as they are. A run that gives this object replaces it as a whole: settings that "
    "it does not name get their own defaults."
)
# a flag with its value, not one in a sentence: --max-problems 16, --set NAME=VALUE; no --towers needs
_FLAG = re.compile(r"--(?:set (\w+)=|([a-z][a-z-]*) )('[^']*'|(?!-)(?=cpu|last|[a-z]*[^a-z\s,;.)])[^\s,;)]*[^\s,;.)])")
_SETTINGS: dict[str, tuple[Sequence[str], type[BaseModel]]] = {}  # of each flow: parameters, and fields of advanced
_FOLDERS = ("out", "run", "home")  # their last part alone says little: a, 0001
_Function = TypeVar("_Function", bound=Callable[..., Any])


def parameters_of(
    config: type[BaseModel], everyday: Sequence[str], filled_by_config: Collection[str] = ()
) -> Callable[[_Function], _Function]:
    """Give a function ``f(*, own, **settings)`` the everyday settings of ``config`` as parameters, and ``advanced``.

    Names, types, limits, defaults and descriptions come from the model, so there is one place to change them. The
    function's own parameters replace settings of the same name; theirs come from ``Annotated[..., Field()]``.

    The form has no choice between a value and None. An empty field is a setting that is not given.

    A flow passes all its parameters, so every setting would look chosen by the user. Settings that the model derives
    from others, ``filled_by_config``, are therefore None by default, and the model reads None as not set.

    Prefect reads types and limits from the signature, but descriptions from ``Args:`` in the docstring. So both are
    made here.

    The flow needs ``validate_parameters=False``: a wrong value that Prefect finds fails the run with a traceback,
    before it is named. Its own parameters are checked here, and the function checks the settings by ``check_config``.

    Args:
        config: the model of the stage.
        everyday: parameters in this order. All others are fields of ``advanced``.
        filled_by_config: settings that the model derives if they are None.
    """

    def give(function: _Function) -> _Function:
        fields = {name: _Field.of(field, name in filled_by_config) for name, field in config.model_fields.items()}
        own: dict[str, Any] = {}
        for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY:
                default = ... if parameter.default is parameter.empty else parameter.default
                own[name] = (parameter.annotation, default)
                fields[name] = _Field.of(FieldInfo.from_annotation(parameter.annotation))._replace(default=default)
        experts = pydantic.create_model(
            "Advanced",
            __config__=ConfigDict(extra="forbid", title="advanced"),
            **{name: field.in_advanced(name) for name, field in fields.items() if name not in everyday},
        )
        checked = pydantic.create_model("Own", __base__=StageConfig, **own)
        where = function.__name__.replace("_", "-")
        _SETTINGS[where] = (everyday, experts)

        @functools.wraps(function)
        def flow(*, advanced: Any = None, **given: Any) -> Any:
            settings = dict(**{name: value for name, value in given.items() if value != ""}, **(advanced or {}))
            checked_settings = check_config(checked, {name: settings[name] for name in settings.keys() & own}, where)
            try:
                return function(**settings | checked_settings.model_dump(exclude_unset=True))
            except Exception as error:
                in_parameters(where, error)
                raise

        described = {name: fields[name].description for name in everyday} | {"advanced": _ADVANCED}
        lines = "".join(f"    {name}: {text}\n" for name, text in described.items())
        flow.__doc__ = f"{inspect.getdoc(function)}\n\nArgs:\n{lines}"
        parameters = [fields[name].parameter(name) for name in everyday]
        last = inspect.Parameter("advanced", inspect.Parameter.KEYWORD_ONLY, default={}, annotation=experts)
        flow.__signature__ = inspect.Signature([*parameters, last])  # type: ignore[attr-defined]
        return flow  # type: ignore[return-value]

    return give


def in_parameters(where: str, error: Exception) -> None:
    """Rewrite flags in the message of an error as parameters of the flow ``where``, and its command as that of Prefect.

    ``--cache NEW`` becomes ``-p cache=NEW``, ``--max-problems 16`` ``-p 'advanced={"max_problems": "16"}'``. What is
    said of another command stays, and so does any other error.
    """
    if where not in _SETTINGS or not isinstance(error, CacheError | UsageError):
        return
    everyday, experts = _SETTINGS[where]

    def rewritten(flag: re.Match[str]) -> str:
        name, value = (flag[1] or flag[2]).replace("-", "_"), flag[3]
        if name in everyday:
            return f"-p {name}={value}"
        if name not in experts.model_fields:
            return flag[0]
        typed = value.strip("'")
        with contextlib.suppress(ValueError):
            typed = experts(**{name: typed}).model_dump(mode="json")[name]
        return f"-p 'advanced={json.dumps({name: typed})}'"

    verb = where.partition("-")[0]
    text, command, rest = str(error).partition("teacher-cache ")
    if rest.startswith(f"{verb} "):
        text, command, rest = f"{text}prefect deployment run {where}/default{rest.removeprefix(verb)}", "", ""
    error.args = (_FLAG.sub(rewritten, text) + command + rest,)


class _Field(NamedTuple):
    """A setting in the form.

    Attributes:
        annotation: type with limits. None is allowed, but not offered, where it is the default.
        default: ``...`` if the setting is required.
    """

    annotation: Any
    default: Any
    description: str

    @classmethod
    def of(cls, field: FieldInfo, derived: bool = False) -> _Field:
        kinds = [kind for kind in get_args(field.annotation) if kind is not NoneType]
        optional = NoneType in get_args(field.annotation)
        annotation: Any = kinds[0] if optional else field.annotation
        if field.metadata:
            annotation = Annotated[annotation, *field.metadata]
        if optional or derived:
            annotation = annotation | Annotated[None, SkipJsonSchema()]  # type: ignore[type-arg]
        default = ... if field.is_required() else field.get_default(call_default_factory=True)
        assert field.description, f"{field} has no description"
        return cls(annotation, None if derived else default, field.description)

    def parameter(self, name: str) -> inspect.Parameter:
        """Return it as a parameter. The UI sends the default of an empty field, so it is "" in place of None."""
        default = inspect.Parameter.empty if self.default is ... else "" if self.default is None else self.default
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=self.annotation)

    def in_advanced(self, name: str) -> Any:
        """Return type and field of a model. A field of the UI whose default is not in the schema is not sent."""

        def forget_null(schema: dict[str, Any]) -> None:
            if schema.get("default", self) is None:
                del schema["default"]

        described = Field(self.default, title=name, description=self.description, json_schema_extra=forget_null)
        return self.annotation, described


def named(template: str, folder: str = "") -> Callable[[], str]:
    """Return a function that names a flow run by its parameters, ``{dataset} x {teacher} -> {cache}``.

    Args:
        folder: as for :func:`default_out`.
    """

    def name() -> str:
        given = dict(flow_run.parameters)
        if folder:
            given["out"] = given.get("out") or default_out(folder, given)
        given = {what: "default" if value in (None, "") else value for what, value in given.items()}
        return template.format_map({what: short(value, 2 if what in _FOLDERS else 1) for what, value in given.items()})

    return name


def short(value: Any, parts: int = 1) -> str:
    """Return the last parts of a place, for a name: ``flickr8k`` for ``flickr:/data/flickr8k``.

    A pattern keeps its folder: ``cc3m/{000..331}.tar``.
    """
    path = str(value).partition("?")[0].rpartition(":")[2].removesuffix(".json")
    parts += any(mark in path.rpartition("/")[2] for mark in "{*")
    return "/".join(path.rstrip("/").split("/")[-parts:])


def default_out(folder: str, given: Mapping[str, Any]) -> str:
    """Return the folder of a flow run that names none. A retry resumes in the same one, another run has its own."""
    return f"{folder}/{short(given.get('student') or given['run'])}-{str(flow_run.id)[:8]}"
