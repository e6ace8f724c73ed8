"""A spec: what the implementations of one model agree on. Found in `impls/`, in a package, or in a user's file."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from equivalence.errors import InputError, unknown

if TYPE_CHECKING:
    from equivalence.weights import Rule

Arrays = tuple[np.ndarray, ...]

REFERENCE = "torch"


@dataclass(frozen=True)
class BatchPlan:
    """The index of every batch of every epoch, drawn once: int64, shape (epochs, rows of the data set).

    Row `e` is epoch e's permutation; batches are its consecutive slices of `batch_size`, the last one as short
    as it falls.
    """

    order: np.ndarray
    batch_size: int

    @property
    def epochs(self) -> int:
        return int(self.order.shape[0])

    @property
    def batches(self) -> int:
        """Batches an epoch, the short last one included."""
        return -(-int(self.order.shape[1]) // self.batch_size)

    @property
    def steps(self) -> int:
        return self.epochs * self.batches

    def batch(self, step: int) -> np.ndarray:
        """The row indices of one step, counted over all epochs."""
        epoch, number = divmod(step, self.batches)
        return self.order[epoch, number * self.batch_size : (number + 1) * self.batch_size]

    def first(self, epochs: int) -> BatchPlan:
        """The same plan, cut after `epochs` epochs."""
        return BatchPlan(self.order[:epochs], self.batch_size)


@dataclass(frozen=True)
class TrainingData:
    """What a whole training run reads: rows to train on, rows held out, and the batch plan.

    `inputs` and `targets` are tuples of float32 or integer arrays whose first axis is the row;
    `held_out_*` likewise. `accuracy(outputs, *held_out_targets)` is a NumPy function, a fraction 0..1.
    """

    inputs: Arrays
    targets: Arrays
    held_out_inputs: Arrays
    held_out_targets: Arrays
    plan: BatchPlan
    accuracy: Callable[..., float] | None = None
    rows_are_batches: bool = False
    """Whether each row is a whole batch (then `plan.batch_size` is 1 and the row axis is dropped)."""
    must_learn: bool = True
    """Whether a run whose loss did not fall judges nothing."""

    names: tuple[str, ...] | None = None
    """The keywords of `inputs`, where a model takes them by keyword."""

    def named(self, arrays: tuple[Any, ...]) -> Any:
        """Inputs as the model takes them: a dict by keyword, or the tuple."""
        return arrays if self.names is None else dict(zip(self.names, arrays, strict=True))

    def rows(self, index: np.ndarray) -> tuple[Any, Arrays]:
        """Inputs and targets of one batch."""
        pick = index[0] if self.rows_are_batches else index
        return self.named(tuple(a[pick] for a in self.inputs)), tuple(a[pick] for a in self.targets)


@dataclass(frozen=True)
class Spec:
    """What the implementations of one model agree on.

    An implementation is a module (`impls/<model>/pytorch.py`, `nnx.py`, `linen.py`, ...) with the same functions
    in every framework:

    - `build(config, seed)`: the model, freshly initialised. For Linen `equivalence.linen(module, variables)`.
    - `loss_fn(outputs, *targets)`: a scalar.
    - `make_optimizer(learning_rate)`: torch: a callable from parameters to an optimizer; jax: an Optax
      transformation (there `learning_rate` may be a schedule).
    - `train_step`: the framework's idiomatic one. torch and nnx: `(model, optimizer, *inputs, *targets) -> loss`;
      linen: `(state, *inputs, *targets) -> (state, loss)`, its state from the module's
      `create_state(module, variables, transformation)`.
    """

    name: str
    title: str
    config: Any
    """The default configuration, a frozen dataclass; `learning_rate` is among its fields."""
    configurations: Callable[[], Any]
    """A Hypothesis strategy of configurations: few structures, small sizes."""
    example: Callable[[Any, np.random.Generator, str], tuple[Arrays, Arrays]]
    """`(config, generator, kind) -> (inputs, targets)`; kind is one of `equivalence.search.KINDS`."""
    implementations: Mapping[str, str]
    """framework -> module name, the reference (torch) included."""
    rules: Mapping[str, Sequence[Rule]]
    """framework -> the rules that carry the reference's leaves to that port."""
    training: Callable[[Any, int], TrainingData] | None = None
    """`(config, seed) -> TrainingData` of the real run."""
    first: Callable[[Any], tuple[Arrays, Arrays]] | None = None
    """Real inputs and targets for the first example; None draws them like any other."""
    ordinary: tuple[str, ...] = ("ordinary",)
    """The kinds of inputs in which a convention at a tie or a kink counts as a divergence."""
    origin: str = field(default="", compare=False)

    @property
    def ports(self) -> tuple[str, ...]:
        """The frameworks judged against the reference, in the order declared."""
        return tuple(name for name in self.implementations if name != REFERENCE)

    def implementation(self, framework: str) -> ModuleType:
        """Import one implementation. Raises InputError for a framework the model has none in."""
        if framework not in self.implementations:
            raise unknown("port", framework, self.ports)
        return importlib.import_module(self.implementations[framework])


def models() -> dict[str, str]:
    """Every model in `impls/`: name -> module of its spec. Nothing is imported."""
    root = importlib.util.find_spec("impls")
    if root is None or root.submodule_search_locations is None:
        return {}
    found = {}
    for location in root.submodule_search_locations:
        for path in sorted(Path(location).glob("*/spec.py")):
            found[path.parent.name] = f"impls.{path.parent.name}.spec"
    return found


def load(target: str) -> Spec:
    """The spec that TARGET names: a model in `impls/`, `package.module:SPEC`, or `path/to/file.py:SPEC`.

    Raises InputError, in one line, for a target that is none of these.
    """
    place, colon, attribute = target.rpartition(":")
    if not colon:
        known = models()
        if target not in known:
            raise unknown("model", target, known)
        module, attribute, place = importlib.import_module(known[target]), "SPEC", target
    elif place.endswith(".py"):
        module = _load_file(Path(place))
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise InputError(f"cannot import {place!r}: {error}") from None
    spec = getattr(module, attribute, None)
    if spec is None:
        raise InputError(f"{place} has no {attribute!r}")
    if not isinstance(spec, Spec):
        raise InputError(f"{target} is a {type(spec).__name__}, not an equivalence.Spec")
    return replace(spec, origin=target)


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    name = f"_equivalence_spec_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise InputError(f"{path} cannot be loaded as a spec")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InputError(f"{path} cannot be loaded as a spec: {type(error).__name__}: {error}") from None
    return module
