"""The tasks by name: the problem, which layers are adapted, and how long a run is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .problems import DATA, ENCODER, LANGUAGE_MODEL, WIDTH, Classified, Problem, Setting, Teacher, Written


@dataclass(frozen=True)
class Task:
    """title: for people; kind: which ranks and learning rates a method begins with; unit: of the loss; layers: what all
    methods adapt, a regular expression; norms: the modules that "norm" trains; needs: files and folders, and the command that
    fetches them; all_methods: measured with all of them, not only the main ones; main: drawn for README; most: the largest
    rank of a sweep."""

    name: str
    title: str
    kind: str
    unit: str
    layers: str
    setting: Setting
    quick: Setting
    make: Callable[[Setting], Problem]
    norms: str = ""
    needs: tuple[Path, ...] = ()
    command: str = ""
    all_methods: bool = False
    main: bool = False
    most: int = 64

    def check(self) -> None:
        """Raises FileNotFoundError where what it needs is not there."""
        for path in self.needs:
            if not path.exists():
                raise FileNotFoundError(f"task: expected {path} for {self.name}, found nothing; run {self.command}")


def _teacher(name: str, title: str, shared: float, **further: bool) -> Task:
    return Task(
        name=f"teacher-{name}",
        title=f"synthetic teacher, {title}",
        kind="teacher",
        unit="squared errors of the model as it is",
        layers=r"blocks\.\d+\.(up|down)",
        setting=Setting(400, 64, 1000, 2000),
        quick=Setting(40, 64, 200, 200),
        make=lambda setting: Teacher(shared, setting),
        all_methods=True,
        most=WIDTH,
        **further,
    )


def _classified(name: str, title: str, file: str, setting: Setting, **further: bool) -> Task:
    return Task(
        name=f"minilm-{name}",
        title=f"MiniLM on {title}",
        kind="classifier",
        unit="nats a text",
        layers=r".*\.layer\.\d+\..*\.(query|key|value|dense)",
        norms=r".*\.LayerNorm",
        setting=setting,
        quick=Setting(4, 16, 50, 50),
        make=lambda setting: Classified(DATA / file, setting),
        needs=(ENCODER, DATA / file),
        command="make setup",
        **further,
    )


def _written(name: str, title: str, file: str, **further: bool) -> Task:
    return Task(
        name=f"smollm2-{name}",
        title=f"SmolLM2-135M on {title}",
        kind="language",
        unit="nats a token",
        layers=r".*\.layers\.\d+\..*_proj",
        norms=r".*(norm|layernorm)",
        setting=Setting(60, 4, 32, 96),
        quick=Setting(2, 2, 4, 4),
        make=lambda setting: Written(DATA / file, setting),
        needs=(LANGUAGE_MODEL, DATA / file),
        command="python examples/causal_data.py",
        **further,
    )


ALL = (
    _teacher("shared", "the change shared between layers", 1.0),
    _teacher("half", "the change half shared", 0.5),
    _teacher("own", "the change not shared", 0.0),
    _classified(
        "movies", "snippets of movie reviews", "movie_snippets.tsv", Setting(150, 32, 500, 1500), all_methods=True, main=True
    ),
    _classified("tweets", "tweets", "tweets.tsv", Setting(100, 32, 400, 1000)),
    _classified("products", "snippets of product reviews", "product_snippets.tsv", Setting(100, 32, 400, 1000)),
    _classified("editorials", "snippets of editorials", "editorial_snippets.tsv", Setting(100, 32, 400, 1000)),
    _written("kjv", "the King James Bible", "kjv.txt", all_methods=True, main=True),
    _written("wycliffe", "Wycliffe's Bible, in Middle English", "wycliffe.txt"),
    _written("verilog", "SystemVerilog", "verilog.txt", main=True),
)
TASKS = {task.name: task for task in ALL}


@functools.lru_cache(maxsize=1)
def problem_of(name: str, setting: Setting) -> Problem:
    """The problem of a task. A process keeps that of its last run."""
    return TASKS[name].make(setting)
