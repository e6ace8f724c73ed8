"""Proposing a mapping from names, layer types and shapes. Shape alone never decides: what is open is asked."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Sequence
from collections.abc import Mapping as MappingOf
from dataclasses import dataclass

from equivalence.errors import MappingError, nearest
from equivalence.paths import natural
from equivalence.weights.candidates import STACK, Module, fusible, modules, ordered, partners, rules, stacked
from equivalence.weights.flattening import flattened
from equivalence.weights.general import general
from equivalence.weights.layouts import COUNTERS, family
from equivalence.weights.mapping import Leaves, Mapping
from equivalence.weights.matching import ALTERNATIVES, Matcher, Pair, assignments, fit, without
from equivalence.weights.rules import Rule

OWN_LAYOUT = ("equinox",)
"""Frameworks that keep torch's own layouts, the first that fits; of a transposed convolution their own, the last."""


@dataclass(frozen=True)
class Choice:
    """What names, types and shapes leave open: alternative sets of rules for the same leaves, likely ones first."""

    alternatives: tuple[tuple[Rule, ...], ...]

    def __str__(self) -> str:
        leaves = list(dict.fromkeys(rule.source for rule in self.alternatives[0] if rule.source))
        if len(self.alternatives) == 1:
            return f"no port leaf is named like {', '.join(leaves)} (by type and shape alone: {self.targets})"
        choices = ", or ".join(", ".join(map(repr, general(rules))) for rules in self.alternatives)
        shown = ", ".join(leaves[:3]) + (f" and {len(leaves) - 3} more" if len(leaves) > 3 else "")
        return f"{shown} could be any of: {choices}"

    @property
    def targets(self) -> str:
        """The port leaves it is about."""
        return ", ".join(dict.fromkeys(rule.target for rule in self.alternatives[0] if rule.target))


@dataclass(frozen=True)
class Proposal:
    """Rules that names settle, what they leave open, and what is wrong, in words."""

    rules: tuple[Rule, ...]
    choices: tuple[Choice, ...] = ()
    problems: tuple[str, ...] = ()
    left: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    """Leaves of the reference and of the port that nothing fits, by name or otherwise."""
    names: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    """All leaf names of both."""

    def mapping(self, picked: Sequence[tuple[Rule, ...]] = ()) -> Mapping:
        """The rules, with one alternative picked for each choice, in the fewest that say the same.

        Raises MappingError, naming both what is open and what is wrong, where something is left.
        """
        if len(picked) < len(self.choices) or self.problems:
            raise MappingError(self.refused)
        return Mapping(general(ordered([*self.rules, *itertools.chain.from_iterable(picked)]), self.names))

    @property
    def refused(self) -> str:
        """The message that asks for rules, with all that is open and all that is wrong."""
        unnamed = [choice.targets for choice in self.choices if len(choice.alternatives) == 1]
        return refusal([*map(str, self.choices), *self.problems], [*self.left[1], *unnamed])

    def with_rules(self, found: Sequence[Rule]) -> Proposal:
        """The proposal once all that was wrong with it is said by further rules."""
        return dataclasses.replace(self, rules=(*self.rules, *found), problems=(), left=((), ()))


def refusal(problems: Sequence[str], left: Sequence[str]) -> str:
    """The message that asks for rules."""
    return (
        "no mapping given and none can be inferred from names: "
        + "; ".join(problems)
        + (f"; port leaves left: {', '.join(sorted(left, key=natural))}" if left else "")
        + "; pass weights=Mapping([Rule(...), ...])"
    )


def infer(
    source: Leaves, target: Leaves, layers: MappingOf[str, str], buffers: Collection[str] = (), framework: str = ""
) -> Mapping:
    """The mapping between two models, where names, layer types and shapes leave no choice.

    Args:
        source, target: leaves of the reference and of the port.
        layers: torch layer type of the module that owns each source leaf, by leaf path (`{"fc.weight": "Linear"}`).
        buffers: the source's buffers and other constants (`layouts.constants`); a port need not keep them.
        framework: the port's.

    Raises MappingError that says which rules to write, with both choices where there are two.
    """
    return propose(source, target, layers, buffers, framework).mapping()


def propose(
    source: Leaves, target: Leaves, layers: MappingOf[str, str], buffers: Collection[str] = (), framework: str = ""
) -> Proposal:
    """What names, layer types and shapes say of the mapping, and what they leave open. Arguments as for `infer`."""
    ours, theirs = modules(source, layers), modules(target, {})
    needed = [[m for m in side if not m.optional] for side in (ours, theirs)]
    matcher = Matcher(ours, theirs)
    made = matcher.match(needed[0], needed[1])
    pairs, left, right = list(made.pairs), made.ours, made.theirs
    for grown in (fusible, stacked, _grown):
        found = _joined(matcher, left, right, grown)
        pairs += found
        left, right = without(left, right, found)
    for first, second in ((left, [m for m in theirs if m.optional]), ([m for m in ours if m.optional], right)):
        found = matcher.match(first, second).pairs
        pairs += found
        left, right = without(left, right, found)
    assigned = assignments(matcher, left, right)
    for alternatives in assigned:
        left, right = without(left, right, alternatives[0])
    spare = {path for m in left for path in m.paths if path in buffers or path.rpartition(".")[2] in COUNTERS}
    settled, choices = _layouts(pairs, assigned, framework, [m for m in ours if not m.optional])
    settled += [Rule(path, None) for path in spare]
    missing = [m for m in left if not m.paths <= spare]
    problems = [_problem(matcher, m, right) for m in missing]
    rest = tuple(sorted((path for m in side for path in m.paths), key=natural) for side in (missing, right))
    if rest[1] and not problems:
        problems.append("the reference has no leaf for what the port has left")
    return Proposal(
        tuple(settled),
        tuple(choices),
        tuple(problems),
        (tuple(rest[0]), tuple(rest[1])),
        (tuple(source.names()), tuple(target.names())),
    )


def _grown(side: list[Module]) -> list[Module]:
    """Modules fused, stacked, and both."""
    parts = fusible(side)
    return [*parts, *stacked(side), *stacked(parts)]


def _joined(
    matcher: Matcher, left: list[Module], right: list[Module], grown: Callable[[list[Module]], list[Module]]
) -> list[Pair]:
    """Pairs of which one side at least is several modules of its model taken as one."""
    ours, theirs = [*left, *grown(left)], [*right, *grown(right)]
    if len(ours) == len(left) and len(theirs) == len(right):
        return []
    taken: set[str] = set()
    found = []
    for a, b in matcher.match(ours, theirs).pairs:
        stacks = all(any(hole == STACK for leaf in m.leaves.values() for hole, _ in leaf.holes) for m in (a, b))
        if not stacks and not (a.paths | b.paths) & taken:
            found.append((a, b))
            taken |= a.paths | b.paths
    return found


def _layouts(
    pairs: list[Pair], assigned: list[list[list[Pair]]], framework: str, ours: list[Module]
) -> tuple[list[Rule], list[Choice]]:
    """The rules of pairs, each with the layout that the port's other leaves of that type and name have; where nothing
    tells, one choice for all of them. A port that keeps one kernel turned is no convention: it is a fault."""
    options = {id(pair): _options(pair, framework) for pair in pairs}
    evidence: dict[object, set[str]] = {}
    for found in options.values():
        for key, listed in found:
            if len(listed) == 1:
                evidence.setdefault(key, set()).add(listed[0][0])
    settled: list[Rule] = []
    open_: dict[object, list[list[Rule]]] = {}
    for pair in pairs:
        for key, listed in options[id(pair)]:
            kept = _conventional(key, listed, evidence)
            if len(kept) == 1:
                settled.append(kept[0][1])
            else:
                open_.setdefault((key, tuple(label for label, _ in kept)), []).append([rule for _, rule in kept])
    settled, choices = flattened(settled, ours)
    made = [Choice(choice) for choice in choices]
    made += [Choice(tuple(zip(*lists, strict=True))) for lists in open_.values()]
    for ways in assigned:
        every: list[tuple[Rule, ...]] = []
        for way in ways:
            found = [option for pair in way for option in _options(pair, framework)]
            every += _of_one_convention([(key, _conventional(key, listed, evidence)) for key, listed in found])
        made.append(Choice(tuple(every[:ALTERNATIVES])))
    return settled, made


def _of_one_convention(listed: list[tuple[object, list[tuple[str, Rule]]]]) -> list[tuple[Rule, ...]]:
    """Every way to pick one rule a leaf under which leaves of one type and name have one layout."""
    labels: dict[object, list[str]] = {}
    for key, options in listed:
        own = [label for label, _ in options]
        labels[key] = [label for label in labels.get(key, own) if label in own]
    found = []
    for picked in itertools.product(*labels.values()):
        kept = dict(zip(labels, picked, strict=True))
        found.append(tuple(dict(options)[kept[key]] for key, options in listed))
    return found


def _options(pair: Pair, framework: str) -> list[tuple[object, list[tuple[str, Rule]]]]:
    """For every leaf of a pair the rules it may have, after what it is: torch layer type, name in the port, rank."""
    a, b = pair
    made: list[tuple[object, list[tuple[str, Rule]]]] = []
    for role, other in partners(a, b):
        found = rules(a, b, role, other)
        leaf = b.leaves[other]
        key = family(a.kind), role, leaf.last if role == other else "value", len(a.leaves[role].shape)
        one = found[-1:] if a.kind.startswith("ConvTranspose") and role == "weight" else found[:1]
        made.append((key, one if framework in OWN_LAYOUT else found))
    return made


def _conventional(
    key: object, listed: list[tuple[str, Rule]], evidence: dict[object, set[str]]
) -> list[tuple[str, Rule]]:
    """The rules that keep to what the port's other leaves of the same type and name show, if they agree."""
    shown = evidence.get(key, set())
    if len(listed) == 1 or len(shown) != 1:
        return listed
    return [option for option in listed if option[0] in shown] or listed


def _problem(matcher: Matcher, module: Module, right: list[Module]) -> str:
    """What is the matter with a module that has no counterpart."""
    path = next(iter(module.leaves.values())).template
    alike = sorted(right, key=lambda m: -matcher.likeness(module, m))
    if alike and matcher.likeness(module, alike[0]) > 0.9 and not fit(module, alike[0]):
        wrong = [_misfit(module, alike[0], *roles) for roles in partners(module, alike[0])]
        return "; ".join(filter(None, wrong)) or f"{path} and {min(alike[0].paths)} hold other kinds of leaves"
    close = [m for m in alike if fit(module, m)]
    if len(close) > 1:
        choices = [rule for m in close[:4] for roles in partners(module, m) for _, rule in rules(module, m, *roles)[:1]]
        return f"{path} could be any of: {', '.join(map(repr, choices))}"
    near = nearest(path, [p for m in right for p in m.paths], 1)
    every = ", ".join(leaf.template for leaf in module.leaves.values())
    return f"no port leaf is named like {every}" + (f" (nearest: {near[0]})" if near else "")


def _misfit(a: Module, b: Module, role: str, other: str) -> str | None:
    """That two leaves have shapes that no layout joins."""
    if rules(a, b, role, other):
        return None
    mine, its = a.leaves[role], b.leaves[other]
    return f"{mine.template} {mine.shape} does not fit {its.template} {its.shape} by any layout of a {a.kind}"
