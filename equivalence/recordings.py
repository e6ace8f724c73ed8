"""The cache of the reference's training runs: a safetensors file, keyed by everything that the runs depend on.

A recording is used only after its first epoch was run again and came out bit for bit the same.
"""

from __future__ import annotations

import dataclasses
import dis
import hashlib
import inspect
import json
import os
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any

import numpy as np

from equivalence.errors import InputError
from equivalence.observation import Observation, load, save
from equivalence.randomness import Draw
from equivalence.spec import TrainingData
from equivalence.training import JITTERED, TWINS, Recorded

if TYPE_CHECKING:
    from equivalence.optimizers import OptimizerPair
    from equivalence.runtimes.torch import TorchRunner

FORMAT = 2


class Unknowable(Exception):
    """Something whose behaviour no key can hold: the run is not cached."""


def folder() -> Path:
    """Where recordings are kept: `EQUIVALENCE_CACHE`, or the user's cache folder."""
    own = os.environ.get("EQUIVALENCE_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "equivalence"


def key(
    runner: TorchRunner, weights: Observation, optimizer: OptimizerPair, data: TrainingData, seed: int
) -> str | None:
    """The name of a recording, or None where something it depends on cannot be known."""
    import torch

    shapes = [np.shape(value) for path, value in runner.subject.params.items() if path not in runner.subject.frozen]
    trained = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    made = optimizer.reference(trained, optimizer.learning_rate)
    groups = [{name: value for name, value in group.items() if name != "params"} for group in made.param_groups]
    from equivalence import randomness, training
    from equivalence.runtimes import constants, torch_environment, torch_lift, torch_steps, torch_tape, torch_training
    from equivalence.runtimes import torch as runtime

    depends = [
        FORMAT,
        JITTERED,
        TWINS,
        torch.__version__,
        torch.__config__.show(),
        runner.threads or torch.get_num_threads(),
        [runtime, constants, torch_environment, torch_lift, torch_steps, torch_tape, torch_training],
        [training, randomness],
        runner.lifting.constants,
        dict(weights),
        [data.inputs, data.targets, data.plan.order, data.plan.batch_size, data.rows_are_batches],
        [type(made), groups, optimizer.learning_rate, optimizer.changes_rate, optimizer.reference, optimizer.scheduler],
        [runner.loss, runner.own_step, runner.select],
        [(name, type(part), _plain(vars(part))) for name, part in runner.subject.model.named_modules()],
        sorted(runner.subject.frozen),
        seed,
    ]
    digest = hashlib.sha256()
    try:
        for piece in _pieces(depends, 0, set()):
            digest.update(len(piece).to_bytes(8, "little") + piece)
    except Unknowable:
        return None
    return digest.hexdigest()[:32]


def _plain(attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a torch module that are its own: not its hooks, leaves or submodules."""
    return {n: v for n, v in attributes.items() if not n.startswith("_") and n != "training"}


def _pieces(thing: Any, depth: int, seen: set[int]) -> Iterator[bytes]:
    """Everything that tells one thing from another, as bytes; functions already `seen` by their name alone. Raises
    Unknowable for what it cannot look into."""
    if depth > 24:
        raise Unknowable(type(thing))
    yield type(thing).__qualname__.encode()
    if thing is None or thing is ... or isinstance(thing, (bool, int, float, str, bytes, complex)):
        yield repr(thing).encode()
    elif isinstance(thing, np.ndarray):
        yield f"{thing.dtype} {thing.shape}".encode()
        yield np.ascontiguousarray(thing).tobytes()
    elif isinstance(thing, Mapping):
        for name in sorted(thing, key=str):
            yield from _pieces(str(name), depth + 1, seen)
            yield from _pieces(thing[name], depth + 1, seen)
    elif isinstance(thing, (list, tuple, set, frozenset)):
        for item in sorted(thing, key=repr) if isinstance(thing, (set, frozenset)) else thing:
            yield from _pieces(item, depth + 1, seen)
    elif inspect.ismodule(thing):
        yield _source(thing.__name__)
    elif isinstance(thing, partial):
        yield from _pieces([thing.func, thing.args, thing.keywords], depth + 1, seen)
    elif isinstance(thing, type):
        yield thing.__qualname__.encode()
        yield _source(thing.__module__)
    elif inspect.isfunction(thing):
        yield thing.__qualname__.encode()
        yield _source(thing.__module__)
        if id(thing) not in seen:
            seen.add(id(thing))
            cells = [cell.cell_contents for cell in thing.__closure__ or ()]
            held = [thing.__code__, cells, thing.__defaults__, thing.__kwdefaults__, _globals(thing)]
            yield from _pieces(held, depth + 1, seen)
    elif isinstance(thing, CodeType):
        # two lambdas of one file may differ in a number alone, which is not in co_code
        yield from _pieces([thing.co_code, thing.co_consts, thing.co_names], depth + 1, seen)
    elif inspect.ismethod(thing):
        yield from _pieces([thing.__func__, thing.__self__], depth + 1, seen)
    elif inspect.isbuiltin(thing):
        yield f"{thing.__module__}.{thing.__qualname__}".encode()
    elif dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        yield from _pieces(vars(thing) if hasattr(thing, "__dict__") else dataclasses.asdict(thing), depth + 1, seen)
        yield _source(type(thing).__module__)
    elif type(thing).__module__.startswith("torch") and hasattr(thing, "detach"):
        yield from _pieces(thing.detach().cpu().numpy(), depth + 1, seen)
    else:
        raise Unknowable(type(thing))


def _globals(function: Any) -> dict[str, Any]:
    """The global values that a function reads: a script may change them between two runs. Those of installed packages
    and of this one stay as they are."""
    file = getattr(sys.modules.get(function.__module__), "__file__", None) or ""
    if "site-packages" in file or function.__module__.split(".")[0] == "equivalence":
        return {}
    codes, names = [function.__code__], set()
    while codes:
        code = codes.pop()
        codes += [const for const in code.co_consts if isinstance(const, CodeType)]
        names |= {line.argval for line in dis.get_instructions(code) if line.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return {name: function.__globals__[name] for name in names if name in function.__globals__}


def _source(module: str) -> bytes:
    """The text of the file a module comes from; installed packages are known by their version elsewhere."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        if module in sys.builtin_module_names or module in ("builtins", "torch"):
            return module.encode()
        raise Unknowable(module)
    if "site-packages" in file or file.endswith((".so", ".pyd")):
        return module.encode()
    return Path(file).read_bytes()


def write(name: str, recorded: Recorded) -> None:
    """Keep a recording. A folder that cannot be written keeps nothing."""
    arrays: Observation = {"losses": recorded.losses, "losses32": recorded.losses32}
    groups = ("parameters", "final32", "rounding", "jittered", "twins")
    for group in groups:
        arrays |= {f"{group}/{path}": value for path, value in getattr(recorded, group).items()}
    for number, (_, final) in enumerate(recorded.twin_ends):
        arrays |= {f"twin{number}/{path}": value for path, value in final.items()}
    provenance = {
        "format": FORMAT,
        "paths": list(recorded.rounding),
        "twin_losses": [loss for loss, _ in recorded.twin_ends],
        "draws": {str(rows): [dataclasses.asdict(d) for d in draws] for rows, draws in recorded.draws.items()},
    }
    try:
        save(folder() / f"{name}.safetensors", arrays, provenance)
    except OSError:
        return


def read(name: str) -> Recorded | None:
    """A kept recording, or None when there is none that can be read."""
    path = folder() / f"{name}.safetensors"
    if not path.is_file():
        return None
    try:
        arrays, provenance = load(path)
    except (InputError, json.JSONDecodeError):
        return None
    if provenance.get("format") != FORMAT:
        return None
    grouped: dict[str, Observation] = {}
    for place, value in arrays.items():
        group, slash, leaf = place.partition("/")
        if slash:
            grouped.setdefault(group, {})[leaf] = value
    # the file sorts its arrays; a report reads the same whether the runs were made now or then
    order = provenance["paths"]
    grouped = {group: {path: held[path] for path in order if path in held} for group, held in grouped.items()}
    draws = {
        int(rows): tuple(Draw(d["kind"], tuple(d["shape"]), d["probability"]) for d in listed)
        for rows, listed in provenance["draws"].items()
    }
    return Recorded(
        arrays["losses"],
        grouped["parameters"],
        arrays["losses32"],
        grouped["final32"],
        grouped["rounding"],
        grouped["jittered"],
        grouped["twins"],
        tuple((loss, grouped[f"twin{n}"]) for n, loss in enumerate(provenance["twin_losses"])),
        draws,
    )


def still_true(
    recorded: Recorded,
    runner: TorchRunner,
    weights: Observation,
    optimizer: OptimizerPair,
    data: TrainingData,
    seed: int,
) -> bool:
    """Whether the reference, run again for one epoch, takes the recorded steps bit for bit."""
    from equivalence.runtimes.torch_training import Trajectory, train

    first = dataclasses.replace(data, plan=data.plan.first(1))
    for news in train(runner, 64, weights, optimizer, first, seed):
        if isinstance(news, Trajectory):
            steps = len(news.losses)
            same = np.array_equal(news.losses, recorded.losses[:steps], equal_nan=True)
            return same and all(
                np.array_equal(value, recorded.parameters[path][:steps], equal_nan=True)
                for path, value in news.parameters.items()
            )
    return False
