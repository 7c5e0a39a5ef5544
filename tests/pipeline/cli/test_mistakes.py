"""Typing errors: what is said, with which exit code, before torch is imported."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.settings.names import next_run
from teacher_cache.storage.files.places import described, kind_of, misplaced, similar_names
from tests.conftest import make_known_cache, plan_known_cache
from tests.pipeline.data.dataset_files import write_tar

TRAIN = "train --cache known.cache --student scenes-small --out o"
PRECOMPUTE = "precompute --teacher bundled:scenes --cache new.cache --dataset"
IMPORT = "import --dataset table:pairs.csv --teacher bundled:scenes --cache new.cache"
CACHE = "precompute --dataset table:pairs.csv --teacher bundled:scenes --cache"
TEACHER = "precompute --dataset table:pairs.csv --cache new.cache --teacher"
CASES = [
    # dataset, teacher, student, device
    (f"{PRECOMPUTE} flikr:x", 2, "dataset kind 'flikr' is not known"),
    (f"{TEACHER} ViT-B32", 2, "teacher 'ViT-B32': no open_clip model has this name. Did you mean ViT-B-32, "),
    (f"{TEACHER} ViT-B32 --pretrained openai", 2, "Did you mean ViT-B-32, "),
    (f"{TEACHER} ViT-B-32", 2, "needs --pretrained, one of openai, laion2b_e16, "),
    (f"{TEACHER} ViT-B-32", 2, " and 14 more, or a weights file; without"),
    (f"{TEACHER} ViT-B-32 --pretrained openay", 2, "'openay' is no tag of it and no file. Did you mean openai?"),
    (f"{TEACHER} zzz", 2, "no open_clip model has this name. There are EVA01-g-14, "),
    (f"{TEACHER} bundled:scene", 2, "teacher 'bundled:scene' is not known. Did you mean bundled:scenes?"),
    (f"{TEACHER} bundled:scenes --pretrained x", 2, "brings its own weights; leave pretrained ('x') out"),
    (f"{TEACHER} local-dir:no", 2, "teacher 'local-dir:no': no open_clip_config.json in no. Name the folder of an"),
    (f"{TEACHER} local-dir:r1", 2, "teacher 'local-dir:r1': r1 is a run, of known.cache. Name the folder of an"),
    (TRAIN.replace("scenes-small", "vit-ti32"), 2, "Did you mean vit-ti-32, vit-s-32 or "),
    (TRAIN.replace("scenes-small", "vit-ti32"), 2, "Presets are vit-ti-32, vit-s-32, "),
    (TRAIN.replace("scenes-small", "x.json"), 2, "student 'x.json': no such file. Presets are effnet-lite0-t1"),
    (TRAIN.replace("scenes-small", "zzz"), 2, "student 'zzz' is not known. Presets are "),
    (TRAIN.replace("scenes-small", "checkpoint"), 2, "is a checkpoint: write checkpoint/open_clip_config.json"),
    (f"{TRAIN} --device cuda", 2, "device 'cuda' asked for, but this machine has 0 CUDA devices; use --device cpu"),
    (f"{TRAIN} --device gpu", 2, "--device: device 'gpu' is not known; use auto, cpu, cuda or cuda:N"),
    (f"{TRAIN} --recipe guid", 2, "--recipe: recipe 'guid' is not known; there are default, guide, clip-kd, mobile"),
    ("zero-shot table:pairs.csv", 2, "table:pairs.csv: images without labels. Labelled images are imagefolder:PATH"),
    ("zero-shot imagefolder:folder", 2, "folder: no <class>/*.jpg and no <split>/<class>/*.jpg; found x"),
    ("zero-shot imagefolder:r1 --prompts cifar", 2, "prompts 'cifar' are not known. Did you mean cifar10"),
    # datasets typed in another place or form
    (f"{PRECOMPUTE} table:images.tar", 2, "images.tar is a tar of images: write webdataset:images.tar"),
    (f"{PRECOMPUTE} book.xlsx", 2, "book.xlsx is a spreadsheet: save it as CSV (UTF-8) with the columns path and"),
    (f"{PRECOMPUTE} webdataset:0.tar webdataset:1.tar", 2, "webdataset:1.tar: no such run file; quote a dataset with"),
    (
        f"{PRECOMPUTE} 0.tar 1.tar 2.tar 3.tar",
        2,
        "Unexpected words: 2.tar 3.tar; did the shell expand a pattern? Quote it: '{0..3}.tar'",
    ),
    (f"{PRECOMPUTE} w:s/008.tar w:s/x.tar w:s/y.tar", 2, "Quote it: 'w:s/*.tar'"),
    ("train --out o a.toml b.toml c.toml", 2, "Unexpected words: b.toml c.toml; did the shell expand a pattern?"),
    ("train --cache p/1.cache p/2.cache p/3.cache", 2, "did the shell expand a pattern? Quote it: 'p/*.cache'"),
    ("train a.toml b", 2, "Unexpected words: b\n"),
    (f"{PRECOMPUTE} webdataset:no/{{0..3}}.tar", 2, "/no is not there; "),
    (f"{PRECOMPUTE} webdataset:images.tar?txt=line", 2, "txt='line' is not known; it is one of whole, lines"),
    ("train images.tar", 2, "images.tar is a tar of images; a run file is wanted here"),
    (f"{CACHE} pairs.csv", 2, "pairs.csv is a table; a cache is wanted here"),
    ("zero-shot --dataset imagefolder:x", 2, "It stands without a flag: teacher-cache zero-shot DATASET"),
    ("students list --registry st", 2, "No such option '--registry'. It stands without a flag: "),
    ("evaluate --run r1 --image-root folders", 2, "--image-root folders: no folder there. Did you mean folder?"),
    (f"{PRECOMPUTE} table:photos", 2, "photos: it holds pictures: write images:photos\n"),
    (f"{PRECOMPUTE} coco:classes", 2, "classes: it holds pictures: write imagefolder:classes\n"),
    (f"{TEACHER} bundled:scenes --dataset photos", 2, "--dataset is given twice; it takes one value"),
    ("precompute photos --cache new.cache", 2, "photos: is a folder, not a run file. If it is a folder of pictures: "),
    ("precompute --folder photos", 2, "No such option '--folder'. Pictures are named by --dataset images:FOLDER"),
    ("precompute --images photos", 2, "No such option '--images'. Pictures are named by --dataset images:FOLDER"),
    ("zero-shot imagefolder:classes", 2, "nothing to measure: give --run, --teacher or both; or --cache, for the "),
    ("zero-shot imagefolder:classes --cache done.cache", 2, "done.cache holds captions of images, to train on; zero-"),
    ("zero-shot imagefolder:classes --class-names names.txt", 2, '; class names are JSON: {"airplane": "Flugzeug"}'),
    (TRAIN.replace("known", "bare"), 2, "bare.cache: 3 of 8 images have no caption. To learn from the images alone: "),
    (
        TRAIN.replace("known", "done"),
        2,
        "/nowhere is not there: were the images of done.cache moved? Name their",
    ),
    (f"{TRAIN.replace('known', 'done')} --image-root photos", 2, "--image-root photos: img-0.jpg of done.cache is not"),
    (f"{PRECOMPUTE} known.cache", 2, "known.cache is a cache; name the pictures, as KIND:PATH"),
    ("zero-shot imagefolder:classes --run r7", 2, "r7: no run here (run.json not found)."),
    (f"{TRAIN} --init r1", 2, "r1: no student checkpoint here (open_clip_config.json and open_clip_model.safetensors"),
    ("info classes", 2, "classes: no cache here (manifest.json not found). Did you mean classes.cache?"),
    ("look known.cache --image x", 2, "No such option '--image'. It stands without a flag: "),
    ("students list --home rt", 2, "No such option '--home'."),
    (
        "students --home rt",
        2,
        "No such option '--home'. A command stands first: teacher-cache students list or promote",
    ),
    ("students rt", 2, "No such command 'rt'. Write teacher-cache students list rt/students\n"),
    ("students list rt", 2, "rt: no registry of students. It holds rt/students.\n"),
    ("students zz", 2, "No such command 'zz'. A command stands first: teacher-cache students list or promote or"),
    ("student open-clip-train --cache a --model b", 2, "'--model'. Options of the other program stand behind ' -- '."),
    ("deploy --run r1 --out folder", 2, "folder: is there already. Choose another --out"),
    ("student mean r1 r1 --out folder", 2, "folder: is there already. Choose another --out"),
    (
        f"{IMPORT} foldr",
        2,
        "foldr is no folder; give the one that holds img_emb, text_emb and metadata. Did you mean fo",
    ),
    (f"{IMPORT} sidecar", 2, "(param_aug); here are tars, as export --sidecar writes them: export without --sidecar\n"),
    (f"{IMPORT} foreign/img_emb", 2, "write them; name the folder above: foreign\n"),
    (
        f"{IMPORT} foreign",
        2,
        "write them; without metadata/metadata_N.parquet, whose column image_path names the image",
    ),
    (f"{IMPORT} classes", 2, "write them; found cat/, dog/\n"),
    ("infer pears.csv --text a --student shipped", 2, "pears.csv is not there; "),
    ("infer pairs.csv --text= --student shipped", 2, "--text is empty"),
    (
        "infer pairs.csv --text a --student r1",
        2,
        "wanted here: teacher-cache deploy --run r1 --out deployed/a makes one",
    ),
    ("students retrain --batch-size 3", 2, "No such option '--batch-size'. Did you mean --set train.batch_size=VALUE?"),
    # values: the message names what was typed
    (f"{TRAIN} --epochs three", 2, "train: --epochs: 'three' is not a whole number\n"),
    (f"{TRAIN} --epochs 0", 2, "train: --epochs: must be greater than 0, not 0\n"),
    (f"{TRAIN} --set epochs=0", 2, "train: epochs: must be greater than 0, not 0\n"),
    (f"{TRAIN} --learning-rate x", 2, "train: --learning-rate: 'x' is not a number\n"),
    (f"{TRAIN} --set precision=amp", 2, "train: precision: 'amp' is not one of 'fp32' or 'bf16'\n"),
    (f"{TRAIN} --set compile=perhaps", 2, "train: compile: 'perhaps' is neither true nor false\n"),
    (f"{TRAIN} --lr 0.1", 2, "No such option '--lr'. Did you mean --learning-rate?"),
    (f"{TRAIN} --bs 8", 2, "No such option '--bs'. Did you mean --batch-size?"),
    # splits and places
    (
        f"{TRAIN} --split trian",
        2,
        "known.cache: no split 'trian'; this cache has 'train' (8 images), ",
    ),
    (f"{TRAIN} --select-split dve", 2, "known.cache: no split 'dve'"),
    (TRAIN, 1, "known.cache: 0 of 10 chunks are there. Run the same precompute command again to finish it.\n"),
    ("evaluate --cache known.cache", 1, "known.cache: 0 of 10 chunks are there. Run the same precompute command again"),
    ("evaluate --cache known.cache --split dve", 2, "known.cache: no split 'dve'"),
    ("info nothing", 2, "nothing: no cache here (manifest.json not found). Check the path"),
    ("info known.cach", 2, "known.cach: no cache here (manifest.json not found). Did you mean known.cache? Check"),
    (TRAIN.replace("known", "nothing"), 2, "nothing.cache: no cache here"),
    ("info sidecar", 2, "error: sidecar is a folder of exported rows, of known.cache; a cache is wanted here\n"),
    ("info r1", 2, "error: r1 is a run, of known.cache; a cache is wanted here\n"),
    ("verify pairs.csv", 2, "error: pairs.csv is a table; a cache is wanted here\n"),
    ("stats shipped", 2, "error: shipped is a deployed student, of r1; a cache is wanted here\n"),
    ("report r1", 2, "error: r1 is a run, of known.cache: --run r1\n"),
    ("report known.cache --run known.cache", 2, "error: known.cache is a cache; a run is wanted here\n"),
    ("students list known.cache", 2, "error: known.cache is a cache; a registry of students is wanted here\n"),
    ("evaluate r1", 2, "error: r1 is a run, of known.cache: --run r1\n"),
    ("evaluate known.cache", 2, "error: known.cache is a cache: --cache known.cache\n"),
    ("evaluate folder", 2, "error: folder: is a folder, not a run file\n"),
    ("evaluate --run known.cache", 2, "error: known.cache is a cache: --cache known.cache\n"),
    ("evaluate --run .", 2, ".: no run here (run.json not found). It holds r1. Train one with --out."),
    ("info nowhere", 2, "nowhere: no cache here (manifest.json not found). Check the path"),
    ("evaluate --run r11", 2, "r11: no run here (run.json not found). Did you mean r1? Train one with --out."),
    ("deploy r1", 2, "error: r1 is a run, of known.cache: --run r1\n"),
    ("deploy r7", 2, "Error: Unexpected words: r7\n"),
    (
        "students promote --run r1 --registry known.cache",
        2,
        "error: known.cache is a cache; a registry of students is wanted here: --registry students\n",
    ),
    ("student open-clip-train --cache known.cache -- --model a", 1, "known.cache: 0 of 10 chunks are there"),
    (
        "student open-clip-train --cache known.cache -- --distill-model a",
        2,
        "--distill-model names a teacher, and here the cache is the teacher; leave it out",
    ),
    (TRAIN.replace("known.cache", "r1"), 2, "error: r1 is a run, of known.cache; a cache is wanted here\n"),
    (
        TRAIN.replace("known", "done").replace("--out o", "--out busy --image-root imgs"),
        2,
        "busy: is being written by process ",
    ),
    (TRAIN.replace("--out o", "--out known.cache"), 2, "error: known.cache is a cache; a run is wanted here\n"),
    (f"{CACHE} r1", 2, "error: r1 is a run, of known.cache; a cache is wanted here\n"),
    (f"{CACHE} folder", 2, "folder: contains x, but a cache needs a folder of its own."),
]

# all commands in one process, where importing torch is an error
ALL = """
import contextlib, io, json, sys
sys.modules |= dict.fromkeys(("torch", "torchvision", "altair"))
from teacher_cache.pipeline.cli.app import main
answers = {}
for words in json.load(sys.stdin):
    sys.argv = ["teacher-cache", *words]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            main()
        except SystemExit as end:
            answers[" ".join(words)] = end.code, said.getvalue()
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache, a run, a checkpoint, a deployed student, a table and a strange folder."""
    here = tmp_path_factory.mktemp("places")
    plan_known_cache(here / "known.cache")
    plan_known_cache(here / "classes.cache")
    for name in (
        "r1",
        "checkpoint",
        "shipped",
        "folder",
        "rt/students/candidates",
        "sidecar",
        "foreign/img_emb",
        "foreign/metadata",
    ):
        (here / name).mkdir(parents=True)
    (here / "r1/run.json").write_text(json.dumps({"config": {"cache": str(here / "known.cache")}}))
    (here / "shipped/deploy.json").write_text('{"run": "r1"}')
    (here / "checkpoint/open_clip_config.json").write_text("{}")
    (here / "folder/x").write_text("")
    (here / "sidecar/export.json").write_text(json.dumps({"cache": "known.cache"}))
    for name in ("cat", "dog"):
        (here / "classes" / name).mkdir(parents=True)
        (here / "classes" / name / "a.jpg").write_bytes(b"")
    make_known_cache(here / "done.cache")
    make_known_cache(here / "bare.cache", captions=5)
    for photo in ("photos/a.jpg", "imgs/img-0.jpg"):
        (here / photo).parent.mkdir()
        (here / photo).write_bytes(b"")
    (here / "names.txt").write_text("Katze\nHund\n")
    for name in ("images.tar", "book.xlsx", "foreign/img_emb/img_emb_0.npy"):
        (here / name).write_bytes(bytes(1024))
    write_tar(here / "sidecar/0.tar", [("000.npz", b"")])
    (here / "pairs.csv").write_text("path,caption\na.jpg,b\n")
    return here


@pytest.fixture(scope="module")
def answers(places: Path) -> dict[str, tuple[int, str]]:
    words = [shlex.split(command) for command, _, _ in CASES]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    with RunFolder(places / "busy").locked():
        done = subprocess.run(
            [sys.executable, "-c", ALL], input=json.dumps(words), cwd=places, env=env, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    return {command: tuple(answer) for command, answer in json.loads(done.stdout).items()}


@pytest.mark.parametrize(("command", "code", "message"), CASES)
def test_a_typing_error_is_answered_before_torch_is_imported(
    command: str, code: int, message: str, answers: dict[str, tuple[int, str]]
) -> None:
    assert (answers[command][0], message in answers[command][1]) == (code, True), answers[command]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("known.cache", "cache"),
        ("r1", "run"),
        ("shipped", "deployed student"),
        ("pairs.csv", "table"),
        ("folder/x", "file"),
        ("folder", ""),
        ("nothing", ""),
        ("s3://bucket/known.cache", ""),
    ],
)
def test_a_place_is_told_by_what_lies_in_it(
    name: str, kind: str, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(places)
    assert kind_of(name) == kind
    assert described(name).startswith(f"{name} is a {kind}" if kind else "")
    assert bool(misplaced(name, "nothing of these")) == bool(kind)


def test_the_next_run_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert next_run() == "runs/a"
    (tmp_path / "runs/a").mkdir(parents=True)
    assert next_run() == "runs/b"


def test_only_names_in_the_same_folder_are_suggested(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(places)
    assert similar_names("known.cach") == " Did you mean known.cache?"
    assert similar_names(f"{places}/knwn.cache") == f" Did you mean {places}/known.cache?"
    assert similar_names("known.cache") == similar_names("zzz") == similar_names("nowhere/known") == ""
