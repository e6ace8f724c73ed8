"""Proposing a mapping from names and layer types. Shape alone never decides; what is ambiguous is asked."""

from __future__ import annotations

from collections.abc import Mapping as MappingOf

from equivalence.errors import MappingError, nearest
from equivalence.paths import natural
from equivalence.weights.layouts import COUNTERS, LAYOUTS
from equivalence.weights.mapping import Leaves, Mapping
from equivalence.weights.rules import Rule


def infer(source: Leaves, target: Leaves, layers: MappingOf[str, str]) -> Mapping:
    """The mapping between models whose modules have the same names.

    Args:
        source, target: leaves of the reference and of the port.
        layers: torch layer type of the module that owns each source leaf, by leaf path (`{"fc.weight": "Linear"}`).

    A leaf keeps its module's path and takes the name and axes that its layer type has in Flax, or keeps both
    (plain functions on torch's own layout, Equinox). When a port has a leaf under both names, or under none,
    MappingError says which rules to write.
    """
    rules: list[Rule] = []
    problems: list[str] = []
    names = set(target.names())
    flat = {_plain(name): name for name in names}
    taken: set[str] = set()
    for path in sorted(source.shapes, key=natural):
        module, _, leaf = path.rpartition(".")
        candidates: dict[str, Rule] = {}
        layout = LAYOUTS.get((layers.get(path, ""), leaf))
        options = [(leaf, None)] if layout is None else [layout, (leaf, None)]
        for name, axes in options:
            wanted = f"{module}.{name}" if module else name
            found = wanted if wanted in names else flat.get(_plain(wanted))
            if found is not None and found not in candidates:
                candidates[found] = Rule(path, found, axes)
        if len(candidates) == 1:
            rules.append(next(iter(candidates.values())))
            taken.add(next(iter(candidates)))
        elif candidates:
            problems.append(f"{path} could be any of: {', '.join(map(repr, candidates.values()))}")
        elif leaf in COUNTERS:
            rules.append(Rule(path, None))
        else:
            near = nearest(path, names, 1)
            problems.append(f"no port leaf is named like {path}" + (f" (nearest: {near[0]})" if near else ""))
    if problems:
        left = sorted(names - taken - set(target.aliases), key=natural)
        raise MappingError(
            "no mapping given and none can be inferred from names: "
            + "; ".join(problems)
            + (f"; port leaves left: {', '.join(left)}" if left else "")
            + "; pass weights=Mapping([Rule(...), ...])"
        )
    return Mapping(rules)


def _plain(path: str) -> str:
    """A path without the difference between `layers.0` and `layers_0`."""
    return path.replace("_", ".")
