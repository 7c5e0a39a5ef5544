"""Options of the commands, generated from the settings models; and the options for logs and metrics."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from teacher_cache.pipeline.settings.base import CachesConfig, StageConfig, learned_split
from teacher_cache.pipeline.settings.deploy import DeployConfig
from teacher_cache.pipeline.settings.evaluate import ZeroShotConfig
from teacher_cache.pipeline.settings.names import HUB, check_device, check_student, check_teacher
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig, ProofConfig
from teacher_cache.pipeline.settings.run_file import RUN_FILE_STAGES, explicit_settings, load_config
from teacher_cache.pipeline.settings.student import InheritConfig, MeanConfig, ResizeConfig
from teacher_cache.pipeline.settings.train import IMAGES_ALONE, TrainConfig
from teacher_cache.storage.cli.app import Argument, Command, Option, complete_cache
from teacher_cache.storage.errors import CacheNotFoundError, MissingPackageError, UsageError
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.files.new_files import require_free
from teacher_cache.storage.files.places import CACHE, DEPLOYED, REGISTRY, RUN, misplaced, similar_names
from teacher_cache.storage.observe.logs import LOG_FORMAT, start_json_logs, start_text_logs
from teacher_cache.storage.observe.telemetry import METRICS_PORT, require_metrics

if TYPE_CHECKING:
    from teacher_cache.storage.format.identity import DatasetIdentity
    from teacher_cache.storage.format.manifest import CacheManifest

_C = TypeVar("_C", bound=StageConfig)
_Callback = Callable[..., Any]
_METAVARS = {int: "N", float: "X"}
# values of settings that need an optional package
_OPTIONAL = (("executor", "ray", "ray"), ("decoder", "jpeg-scaled", "simplejpeg"))
_NEW_FOLDERS = (DeployConfig, InheritConfig, MeanConfig, ResizeConfig)  # what their --out names is made
_PICTURES = ("folder", "images", "pictures", "photos", "path")  # flags of the dataset in other tools
# settings that name a place, and the kind that must be there, if anything is
_PLACES = {"cache": CACHE, "reuse": CACHE, "run": RUN, "registry": REGISTRY, "deployed": DEPLOYED}


@dataclass(frozen=True)
class Settings(Generic[_C]):
    """Settings that a user typed for one stage; ``load`` checks them."""

    kind: type[_C]
    stage: str
    run_file: Path | None
    flags: dict[str, Any]
    assignments: tuple[str, ...]
    argument: str | None = None

    def explicit(self) -> dict[str, Any]:
        """Return the settings from the run file and the command line, unchecked."""
        return explicit_settings(self.stage, self.run_file, self.flags, self.assignments)

    def load(self) -> _C:
        """Return the checked settings; see :func:`check_names` too."""
        config = load_config(self.kind, self.stage, self.run_file, self.flags, self.assignments, self.argument)
        check_names(config)
        return config


def settings_command(
    name: str,
    kind: type[_C],
    flags: Sequence[str] | None = None,
    argument: str | None = None,
    optional: Sequence[str] = (),
    example: str = "",
    checked: bool = True,
) -> Callable[[_Callback], click.Command]:
    """Return a decorator that turns a function whose first argument is a settings object into a command.

    Args:
        flags: fields with a flag, in this order; the others are set in the run file or by ``--set``. Default: all.
        argument: a required field that is typed without a flag.
        optional: required fields that this command can do without.
        example: words after ``teacher-cache``, shown below the help.
        checked: False to pass :class:`Settings` to a command that checks them itself.
    """
    several = issubclass(kind, CachesConfig)
    elsewhere = {argument, "other_caches"}  # --cache that is repeated gives the latter
    names = [field for field in (flags or kind.model_fields) if field not in elsewhere]
    params: list[click.Parameter] = []
    if argument is not None:
        params.append(_argument(argument, kind.model_fields[argument]))
    if name in RUN_FILE_STAGES:
        described = "TOML file with a table per stage. Options win over it."
        params.append(Argument(["run_file"], described, type=Path, required=False, metavar="[RUN.toml]"))
    params += [
        _option(field, kind.model_fields[field], field not in optional, several and field == "cache") for field in names
    ]
    if set(kind.model_fields) - {*names, *elsewhere}:
        params.append(_set_option(kind, [*names, *elsewhere]))
    fields = {*names, argument}

    def decorate(function: _Callback) -> click.Command:
        def run(run_file: Path | None = None, assignments: tuple[str, ...] = (), **typed: Any) -> None:
            # a repeatable option that was not typed is an empty tuple
            values = {field: None if typed[field] == () else typed[field] for field in typed if field in fields}
            others = {option: value for option, value in typed.items() if option not in fields}
            settings = Settings(kind, name, run_file, values, assignments, argument)
            function(settings.load() if checked else settings, **others)

        run.__doc__ = function.__doc__
        params.extend(reversed(getattr(function, "__click_params__", [])))
        return _SettingsCommand(
            name, callback=run, params=params, help=function.__doc__, example=example, fields=tuple(kind.model_fields)
        )

    return decorate


def check_names(config: StageConfig) -> None:
    """Check the names and places in settings before torch is imported, which takes seconds.

    Raises:
        UsageError: a dataset, teacher, student, device, path or split cannot be used.
        CacheError: a cache that must exist cannot be read.
    """
    named: dict[str, Any] = {name: value for name, value in config if value is not None}
    _check_places(config, named)
    check_device(named.get("device", "cpu"))
    for setting, value, module in _OPTIONAL:
        if str(named.get(setting)).startswith(value) and find_spec(module) is None:
            raise MissingPackageError(module, f"{setting} {named[setting]!r}")
    if "dataset" in named:
        _check_dataset(config, named["dataset"])
    if "teacher" in named:
        check_teacher(named["teacher"], named.get("pretrained"))
    if "student" in named:
        check_student(named["student"])
    init = config.init if isinstance(config, TrainConfig) else None
    if init is not None and not init.startswith(HUB):
        from teacher_cache.pipeline.models.run_record import require_checkpoint

        require_checkpoint(Path(init))
    for what, name in (("student", named.get("student")), ("init", init), ("teacher", named.get("teacher"))):
        if name is not None and name.startswith(HUB):
            from teacher_cache.pipeline.models.hub import hub_config

            hub_config(name, f"{what} {name!r}")
    if isinstance(config, PrecomputeConfig):
        from teacher_cache.storage.write.plan import require_place

        require_place(open_files(config.cache))
    elif not isinstance(config, ProofConfig):
        _check_cache(config, named)


def _check_places(config: StageConfig, named: dict[str, Any]) -> None:
    """Check that nothing else lies where a setting points, and that images do."""
    places = _PLACES | ({"out": RUN} if isinstance(config, TrainConfig) else {})
    for name in places.keys() & named.keys():
        # a setting that has a value already is not what was meant
        free = type(config).model_fields.keys() - named.keys() | {name}
        if problem := misplaced(named[name], places[name], free):
            raise UsageError(problem)
    if isinstance(config, _NEW_FOLDERS):
        require_free(Path(config.out))
    root = named.get("image_root", "")
    if root and "://" not in root and not Path(root).is_dir():
        raise UsageError(f"--image-root {root}: no folder there.{similar_names(root)}")


def _check_dataset(config: StageConfig, dataset: str) -> None:
    if isinstance(config, ZeroShotConfig):
        if config.all:
            config.require_root()
        else:
            from teacher_cache.pipeline.evaluate.zero_shot.labelled_images import labelled_spec

            labelled_spec(config)
        config.require_model()
    else:
        from teacher_cache.pipeline.data.datasets.spec import check_dataset

        check_dataset(dataset)


def _check_cache(config: StageConfig, named: dict[str, Any]) -> None:
    """Check that the run is one, and that the cache is finished and has the splits, the captions and the pictures."""
    from teacher_cache.pipeline.models.run_folder import RunFolder
    from teacher_cache.storage.format.manifest_file import require_sealed
    from teacher_cache.storage.read.several.parts import named_manifest

    cache, roots = named.get("cache"), []
    if "run" in named:
        record = RunFolder(named["run"]).read()
        cache, roots = cache or record.config.cache, [record.image_root]
    if cache is None:
        return
    files = open_files(cache)
    try:
        manifest = named_manifest(cache)
    except CacheNotFoundError:
        if "cache" in named and not isinstance(config, ZeroShotConfig):  # which may make its cache
            raise
        return  # a run whose cache has moved: the command says so
    if isinstance(config, ZeroShotConfig):
        if "cache" in named and manifest.identity.dataset.kind != "labelled":
            teacher = manifest.identity.teacher.name
            raise UsageError(
                f"{cache} holds captions of images, to train on; zero-shot needs a cache of the prompts of all "
                f"classes. Leave --cache out, or name a new one: --cache zs.cache --teacher {teacher}"
            )
        return
    splits = manifest.identity.dataset.splits
    if "split" in named:
        manifest.require_split(learned_split(config, splits), cache)
    if "select_split" in named:
        manifest.require_split(named["select_split"], cache)
    require_sealed(files, manifest)
    if isinstance(config, TrainConfig):
        config.fitted(splits, splits.__getitem__)
        _require_captions(config, manifest.identity.dataset)
    fields = type(config).model_fields
    if "image_root" in fields and "pixels" not in named and ("run" not in fields or "run" in named):
        _require_pictures(cache, manifest, [manifest.source.image_root, *roots], named.get("image_root"))


def _require_captions(config: TrainConfig, dataset: DatasetIdentity) -> None:
    """Check that the images have captions, where the counts tell at once that some have none."""
    if config.captions_per_image and dataset.captions < dataset.images:
        from teacher_cache.storage.read.reader import EmbeddingReader

        reader = EmbeddingReader(config.cache)
        reader.require_captions(reader.row_set(learned_split(config, dataset.splits)), IMAGES_ALONE)


def _require_pictures(cache: str, manifest: CacheManifest, roots: Sequence[str], typed: str | None) -> None:
    """Check that the first, the middle or the last picture of a cache is there. Opens none.

    Args:
        roots: folders that the pictures were below.
        typed: folder that was typed in their place.
    """
    if typed and not manifest.source.image_root:
        raise UsageError(
            f"--image-root {typed}: the pictures of {cache} were in several folders. Leave it out, or put links where "
            "they were"
        )
    if typed is None and any("://" in root or (root and Path(root).is_dir()) for root in roots):
        return
    import numpy as np

    from teacher_cache.pipeline.data.datasets.parquet_cells import in_cell
    from teacher_cache.pipeline.data.datasets.samples import ImageSource
    from teacher_cache.storage.format.tables import SAMPLES
    from teacher_cache.storage.read.reader import EmbeddingReader

    last = manifest.layout.image_rows - 1
    samples = EmbeddingReader(cache).table(SAMPLES, columns=["uri"]).take(np.unique([0, last // 2, last]))
    uris = samples["uri"].to_pylist()
    for target in (ImageSource(root).resolve(uri) for root in ([typed] if typed else roots) for uri in uris):
        if "://" in target or in_cell(target) or Path(target).exists():
            return
    if typed:
        raise UsageError(f"--image-root {typed}: {uris[0]} of {cache} is not in it; name the folder that holds it")
    raise UsageError(
        f"{roots[-1]} is not there: were the images of {cache} moved? Name their folder: --image-root FOLDER"
    )


class _SettingsCommand(Command):
    """Command that knows the settings without a flag, and explains when one is typed as a flag."""

    def __init__(self, *args: Any, fields: tuple[str, ...], **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.fields = fields

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words after the command."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            setting = error.option_name.lstrip("-").replace("-", "_")
            flags = [name for param in self.params for name in (*param.opts, *param.secondary_opts)]
            initials = {"".join(word[0] for word in field.split("_")): field for field in self.fields}
            similar = [initials[setting]] if setting in initials else []
            similar += get_close_matches(setting, [*self.fields, *(flag.lstrip("-") for flag in flags)], n=1)
            advice = " Options of the other program stand behind ' -- '." if "arguments" in self.fields else ""
            if setting in _PICTURES and "--dataset" in flags:
                advice = " Pictures are named by --dataset images:FOLDER"
            elif similar and (flag := "--" + similar[0].replace("_", "-")) in flags:
                advice = f" Did you mean {flag}?"
            elif not similar and setting in TrainConfig.model_fields and "train" in self.fields:
                advice = f" Did you mean --set train.{setting}=VALUE?"
            elif similar:
                advice = f" Did you mean --set {similar[0]}=VALUE?"
            raise click.UsageError(f"No such option {error.option_name!r}.{advice}", ctx) from error


def _set_option(kind: type[StageConfig], flags: Sequence[str | None]) -> click.Option:
    others = [name for name in kind.model_fields if name not in flags]
    described = f"Any other setting, also from the run file: {', '.join(others)}."
    return click.Option(["--set", "assignments"], multiple=True, metavar="NAME=VALUE", help=described)


def _argument(name: str, field: FieldInfo) -> Argument:
    many = get_origin(field.annotation) is tuple
    settings: dict[str, Any] = {"nargs": -1, "metavar": f"{name.upper().rstrip('S')}..."} if many else {}
    if name == "cache":
        settings["shell_complete"] = complete_cache
    return Argument([name], str(field.description), required=True, **settings)


def _option(name: str, field: FieldInfo, may_be_required: bool, repeatable: bool = False) -> click.Option:
    """Return the flag of a field. It has no default of its own, so that a run file counts where nothing is typed."""
    flag = "--" + name.replace("_", "-")
    settings: dict[str, Any] = {"help": _help(field, may_be_required)}
    kind = _without_none(field.annotation)
    items = get_args(kind)
    if kind is bool:
        # default=None: neither form was typed
        return click.Option([f"{flag}/--no-{flag[2:]}", name], default=None, **settings)
    if get_origin(kind) is Literal:
        settings["type"] = click.Choice(items)
    elif get_origin(kind) is tuple and items[-1] is not Ellipsis:
        settings |= {"nargs": len(items), "type": items[0]}
    elif get_origin(kind) is tuple and items[0] is str:
        settings["multiple"] = True
    elif get_origin(kind) is tuple:
        settings["metavar"] = "N,N,..." if items[0] is int else "NAME,..."
    else:
        # a text, which the settings convert and check: one wording of mistakes for flags and run files
        settings["metavar"] = _METAVARS.get(kind)
        if isinstance(field.json_schema_extra, dict) and "bare" in field.json_schema_extra:  # typed without a value
            settings |= {"is_flag": False, "flag_value": str(field.json_schema_extra["bare"])}
        settings["multiple"] = repeatable
    return click.Option([flag, name], **settings)


def _without_none(annotation: Any) -> Any:
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    return kinds[0] if NoneType in get_args(annotation) else annotation


def _help(field: FieldInfo, may_be_required: bool) -> str:
    """Return the description, with the default or the word required unless the description says it."""
    text = " ".join(str(field.description).split())
    if field.is_required():
        return f"{text} [required]" if may_be_required else text
    if "Default:" in text or field.default is False or field.default in (None, (), ""):
        return text
    if isinstance(field.default, tuple):
        return f"{text} Default: {','.join(map(str, field.default))}."
    return f"{text} Default: {'yes' if field.default is True else field.default}."


def _choose_log_format(ctx: click.Context, param: click.Parameter, chosen: str) -> None:
    if chosen == "json":
        start_json_logs()
    else:  # the environment may say json
        os.environ.pop(LOG_FORMAT, None)
        start_text_logs()


def _choose_metrics_port(ctx: click.Context, param: click.Parameter, port: int | None) -> None:
    source = ctx.get_parameter_source("metrics_port")
    if port is not None and source is click.core.ParameterSource.COMMANDLINE:
        require_metrics(port)


log_format_option = click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    envvar=LOG_FORMAT,
    is_eager=True,
    expose_value=False,
    callback=_choose_log_format,
    help="Format of stderr: text or JSON lines. Default: text.",
)
metrics_option = click.option(
    "--metrics-port",
    cls=Option,
    type=click.IntRange(0, 65_535),
    metavar="PORT",
    envvar=METRICS_PORT,
    expose_value=False,
    callback=_choose_metrics_port,
    help="Port for Prometheus; 0 takes a free one. Default: none.",
)
