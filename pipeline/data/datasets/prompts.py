"""Named prompt sets, and the match of a dataset's classes with a list of names. No torch.

Class names and templates of CLIP's evaluation datasets come from clip-benchmark (``clip_benchmark/``, with its
licence), those of ImageNet from open_clip. Birdsnap, Hateful Memes, Kinetics-700 and UCF101, which clip-benchmark
lacks, are in ``clip_paper/prompts.json``, each with its source.

A label is never guessed. The classes of a dataset are matched with a list of names

1. by name, ignoring case, spaces, underscores, hyphens and other marks;
2. by WordNet id, in the order of ImageNet's 1,000 sorted ids, which is the order of open_clip's names;
3. by number, if the dataset's classes are numbers without other names: class ``3`` is the fourth in the list;
4. by position, for datasets whose order clip-benchmark itself relies on (``SAME_ORDER``).

If a class remains without a match, the error asks for a file that maps it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import distribution
from pathlib import Path

from teacher_cache.pipeline.data.datasets.files import open_text, read_json
from teacher_cache.pipeline.settings.names import did_you_mean
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.safe_text import printable

# three of CLIP's own: with its 7 or 80, every training image would get as many captions
DEFAULT_TEMPLATES = ("a photo of a {}.", "a photo of the {}.", "a good photo of a {}.")

# torchvision's dataset -> set whose names clip-benchmark (datasets/builder.py) gives to its numbers; without FER2013,
# which torchvision numbers in another order than clip-benchmark's folders
SAME_ORDER = {
    "Country211": "country211",
    "Flowers102": "flowers",
    "GTSRB": "gtsrb",
    "ImageNet": "imagenet1k",
    "MNIST": "mnist",
    "PCAM": "pcam",
    "SVHN": "svhn",
}

# sorted folder names of the published archives, which clip-benchmark reads with torchvision's ImageFolder
_PUBLISHED_FOLDERS = {
    "eurosat": "AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop Residential River "
    "SeaLake",
    "fer2013": "angry disgust fear happy neutral sad surprise",
}

_SHIPPED = Path(__file__).with_name("clip_benchmark")
_PAPER = Path(__file__).with_name("clip_paper") / "prompts.json"
_IN_PAPER = {"zeroshot_classification_templates": "templates", "classnames": "classes"}
_LEFT_OUT = ("dummy", "voc2007_multilabel")  # not a dataset; several classes per image
_WORDNET_ID = re.compile(r"n\d{8}")
_MARKS = re.compile(r"[\W_]+")
_NAMES_SHOWN = 12


@dataclass(frozen=True)
class PromptSet:
    """Templates and class names of one dataset.

    Attributes:
        templates: templates with ``{}`` for the class.
        class_names: names in the dataset's order. None: the dataset's own names, such as folder names.
    """

    templates: tuple[str, ...]
    class_names: tuple[str, ...] | None


@dataclass(frozen=True)
class Classes:
    """Candidate classes for an image, and the position of each of the dataset's classes among them.

    Attributes:
        names: names of the classes. Two classes may share a name: 1,000 names are always 1,000 classes.
        number: position in ``names`` of each class of the dataset, by the dataset's own key (a folder, a label).
        matched_by: ``name``, ``WordNet id``, ``number``, ``place``, ``file`` or ``own names``.
    """

    names: tuple[str, ...]
    number: dict[str, int]
    matched_by: str


def prompt_sets() -> tuple[str, ...]:
    """Return the names of all sets, sorted."""
    return tuple(sorted({"imagenet1k", *_shipped("zeroshot_classification_templates"), *_shipped("classnames")}))


def prompt_set(name: str) -> PromptSet:
    """Return the set of this name.

    Raises:
        UsageError: the name is unknown; the message lists the known ones.
    """
    if name == "imagenet1k":
        return PromptSet(read_templates("openai"), tuple(_imagenet_names()))
    names, all_templates = _shipped("classnames"), _shipped("zeroshot_classification_templates")
    # the same images with another order of labels
    shipped = all_templates.get(name) or (all_templates.get(name.removesuffix("_vtab")) if name in names else None)
    if shipped is None:
        known = prompt_sets()
        hint = did_you_mean(name, known)
        raise UsageError(f"prompts {printable(name)!r} are not known.{hint} There are {', '.join(known)}")
    templates = tuple(template.replace("{c}", "{}") for template in shipped)
    return PromptSet(templates, tuple(names[name]) if name in names else None)


def read_templates(what: str) -> tuple[str, ...]:
    """Return templates with ``{}`` for the class, by name or from a file.

    Args:
        what: ``photo`` for :data:`DEFAULT_TEMPLATES`, ``simple`` or ``openai`` for CLIP's 7 or 80 templates in
            open_clip, the name of a prompt set, or a text file with one template per line.

    Raises:
        UsageError: none of these, or a template without ``{}``.
    """
    if what == "photo":
        return DEFAULT_TEMPLATES
    if what in ("simple", "openai"):
        import open_clip

        shipped = open_clip.SIMPLE_IMAGENET_TEMPLATES if what == "simple" else open_clip.OPENAI_IMAGENET_TEMPLATES
        return tuple(template("{}") for template in shipped)
    path = Path(what)
    if path.is_file():
        return templates_in(path)
    if what in prompt_sets():
        return prompt_set(what).templates
    raise UsageError(
        f"templates={printable(what)!r} is neither photo, simple nor openai, nor a file of templates that is there, "
        f"nor one of the prompt sets {', '.join(prompt_sets())}"
    )


def templates_in(path: Path) -> tuple[str, ...]:
    """Read the templates of a text file, one per line; ``{c}`` is read as ``{}``, as clip-benchmark writes it.

    Raises:
        UsageError: no template, or one without ``{}``.
    """
    with open_text(path) as file:
        lines = [line.strip().replace("{c}", "{}") for line in file if line.strip()]
    for line in lines:
        if "{}" not in line:
            raise UsageError(f"{path}: the template {printable(line)!r} has no {{}} for the class")
    if not lines:
        raise UsageError(f"{path}: no template in it; write one per line, with {{}} for the class")
    return tuple(lines)


def filled(templates: Sequence[str], name: str) -> tuple[str, ...]:
    """Fill in the prompts of one class."""
    # not str.format: a template may hold other braces
    return tuple(template.replace("{}", name).strip() for template in templates)


def read_class_names(path: str) -> dict[str, str] | list[str]:
    """Read a user's class names: ``{"folder or label": "name"}``, or a list of names as in a prompt set.

    Args:
        path: JSON file, or ``imagenet`` for open_clip's names.

    Raises:
        UsageError: the file is missing, is not JSON, or has another form.
    """
    if path == "imagenet":
        return _imagenet_names()
    if not Path(path).is_file():
        raise UsageError(f"class names {printable(path)!r}: no such file; write JSON, {{folder: name of the class}}")
    content = read_json(Path(path), 'class names are JSON: {"airplane": "Flugzeug"}, a name for each folder')
    names = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise UsageError(f"{path}: an object {{folder: name of the class}} or a list of names is wanted, none empty")
    return {str(key): name.strip() for key, name in content.items()} if isinstance(content, dict) else names


def match_classes(
    where: str,
    own: dict[str, str],
    names: Sequence[str] | dict[str, str] | None,
    *,
    same_order: bool = False,
    prompts: str = "",
) -> Classes:
    """Match each class of a dataset with a class of a list.

    Args:
        where: the dataset, for messages.
        own: the dataset's own class names by key (folder, label), in its order.
        names: the list; or names by key, from a file; or None for the dataset's own.
        same_order: whether the list is known to be in the dataset's order.
        prompts: name of the list's prompt set.

    Raises:
        UsageError: a class of the dataset matches no class of the list, or several.
    """
    if names is None:
        ids = [key for key in own if _WORDNET_ID.fullmatch(key) and own[key] == key]
        if ids and len(ids) == len(own):
            raise UsageError(
                f"{where}: the class folders are WordNet ids ({ids[0]} ...), which make no captions; give "
                "--prompts imagenet1k or --class-names FILE.json; behind the dataset ?classes=imagenet or FILE.json"
            )
        return _classes(own, "own names")
    if isinstance(names, dict):
        nameless = [key for key in own if key not in names]
        if nameless:
            raise UsageError(f"{where}: the class names have none for {_some(nameless)}, of {len(own)} classes; add it")
        return _classes(names, "file")
    positions, how = _numbers(where, own, list(names), same_order, prompts)
    return Classes(tuple(names), positions, how)


def _classes(names: dict[str, str], how: str) -> Classes:
    unique = tuple(dict.fromkeys(names.values()))  # folders with the same name are one class
    return Classes(unique, {key: unique.index(name) for key, name in names.items()}, how)


def _numbers(
    where: str, own: dict[str, str], names: list[str], same_order: bool, prompts: str
) -> tuple[dict[str, int], str]:
    """Return the position in the list of each class of the dataset, and the rule that matched."""
    if same_order:
        if len(own) != len(names):
            raise UsageError(f"{where}: {len(own)} classes and {len(names)} class names in order. {_remedy(own)}")
        return {key: number for number, key in enumerate(own)}, "place"
    plain = [_plain(name) for name in names]
    counts = Counter(plain)
    by_name = {key: plain.index(_plain(name)) for key, name in own.items() if counts[_plain(name)] == 1}
    if len(by_name) == len(own):
        return by_name, "name"
    if all(_WORDNET_ID.fullmatch(key) for key in own) and names == _imagenet_names():
        return _positions_by_wordnet_id(where, own), "WordNet id"
    published = _PUBLISHED_FOLDERS.get(prompts, "").split()
    if published and set(own) == set(published):
        return {key: published.index(key) for key in own}, "place"
    if all(_by_number(key, name, plain) for key, name in own.items()):
        return _positions_by_number(where, own, len(names)), "number"
    if len(names) < len(own):
        raise UsageError(f"{where}: {len(names)} names for {len(own)} classes, {_some(list(own))}. {_remedy(own)}")
    unmatched = [key for key in own if key not in by_name]
    taken = set(by_name.values())
    unused = [name for number, name in enumerate(names) if number not in taken]
    raise UsageError(
        f"{where}: no class name is surely that of {_some(unmatched)} ({len(unmatched)} of {len(own)} classes); the "
        f"{f'{prompts} ' if prompts else ''}names that no class has are {_some(unused)}. {_remedy(own)}"
    )


def _positions_by_wordnet_id(where: str, own: dict[str, str]) -> dict[str, int]:
    order = {key: number for number, key in enumerate(_imagenet_ids())}
    if unknown := [key for key in own if key not in order]:
        raise UsageError(f"{where}: {_some(unknown)} are none of ImageNet's 1,000 WordNet ids; {_remedy(own)}")
    return {key: order[key] for key in own}


def _positions_by_number(where: str, own: dict[str, str], count: int) -> dict[str, int]:
    # only the complete range 0 ... n-1 is unambiguous: numbers from 1 would be off by one
    if sorted(int(key) for key in own) != list(range(count)):
        raise UsageError(
            f"{where}: the classes are numbers, {len(own)} from {min(own, key=int)} to {max(own, key=int)}; by "
            f"number they must be 0 to {count - 1}, for as many class names. {_remedy(own)}"
        )
    return {key: int(key) for key in own}


def _by_number(key: str, name: str, plain: list[str]) -> bool:
    """Return whether a class is a number, named by that number or as in that position of the list."""
    if not (key.isascii() and key.isdigit()):
        return False
    return name.lstrip("0") == key.lstrip("0") or _plain(name) in plain[int(key) : int(key) + 1]


def _remedy(own: dict[str, str]) -> str:
    return (
        f'Say it by --class-names FILE.json, {{"{printable(next(iter(own)))}": "its name", ...}}, or take the '
        "dataset's own names by --templates NAME instead of --prompts NAME; where there are no such flags, by "
        "?classes=FILE.json or ?templates=NAME behind the dataset."
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(printable(name)) for name in names[:_NAMES_SHOWN])
    return (shown + f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else shown) or "none"


def _plain(name: str) -> str:
    return _MARKS.sub("", name.casefold())  # also without spaces: HandstandPushups is Hand Stand Pushups


def _imagenet_names() -> list[str]:
    import open_clip  # takes two seconds, and other sets do not need it

    return list(open_clip.IMAGENET_CLASSNAMES)


@lru_cache(maxsize=1)
def _imagenet_ids() -> list[str]:
    """Read the 1,000 WordNet ids in order from timm, which open_clip requires."""
    return Path(str(distribution("timm").locate_file("timm/data/_info/imagenet_synsets.txt"))).read_text().split()


@lru_cache(maxsize=4)
def _shipped(what: str) -> dict[str, list[str]]:
    sets: dict[str, list[str]] = json.loads((_SHIPPED / f"en_{what}.json").read_text(encoding="utf-8"))
    paper = json.loads(_PAPER.read_text(encoding="utf-8"))
    sets |= {name: values[_IN_PAPER[what]] for name, values in paper.items()}
    # class-specific prompts have another form
    return {name: values for name, values in sets.items() if isinstance(values, list) and name not in _LEFT_OUT}
