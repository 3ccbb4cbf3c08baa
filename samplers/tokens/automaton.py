"""Regular languages: expressions over characters, the smallest automaton of one, and its steps by whole tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import InputError

LARGEST = 20_000
"""States that an automaton may have before it is made as small as it can be."""
_AT_ONCE = 4096
"""Tokens that are spelt together."""


@dataclass(frozen=True)
class Chars:
    """One character: one of ``chars``, or, where ``others``, any but those."""

    chars: frozenset[str]
    others: bool = False


@dataclass(frozen=True)
class Chain:
    """Expressions one after the other; none of them: the empty string."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True)
class Either:
    """One of some expressions."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True)
class Repeat:
    """An expression from ``least`` to ``most`` times (None: any number), with ``between`` in between."""

    part: Expression
    least: int = 0
    most: int | None = None
    between: Expression | None = None


Expression = Chars | Chain | Either | Repeat


def literal(text: str) -> Chain:
    """The expression of one string."""
    return Chain(tuple(Chars(frozenset(char)) for char in text))


@dataclass(frozen=True)
class Automaton:
    """A complete deterministic automaton over characters.

    Attributes:
        symbols: number of each character that the expression names; all others have number ``len(symbols)``.
        next: (S, len(symbols) + 1) int64, the state after each.
        start: state before the first character.
        accepts: (S,) bool, states in which a string may end.
    """

    symbols: dict[str, int]
    next: Tensor
    start: int
    accepts: Tensor


@dataclass
class _Net:
    """A nondeterministic automaton: edges without a character, and edges with some."""

    free: list[list[int]] = field(default_factory=list)
    edges: list[list[tuple[Chars, int]]] = field(default_factory=list)

    def node(self) -> int:
        self.free.append([])
        self.edges.append([])
        return len(self.free) - 1

    def add(self, expression: Expression) -> tuple[int, int]:
        """First and last node of an expression (Thompson's construction)."""
        first, last = self.node(), self.node()
        match expression:
            case Chars():
                self.edges[first].append((expression, last))
            case Chain(parts):
                at = first
                for part in parts:
                    begin, end = self.add(part)
                    self.free[at].append(begin)
                    at = end
                self.free[at].append(last)
            case Either(parts):
                for part in parts:
                    begin, end = self.add(part)
                    self.free[first].append(begin)
                    self.free[end].append(last)
            case Repeat():
                self._repeat(expression, first, last)
        return first, last

    def _repeat(self, repeat: Repeat, first: int, last: int) -> None:
        between = repeat.between or Chain(())
        copies = max(repeat.least, 1) if repeat.most is None else repeat.most
        if repeat.least == 0:
            self.free[first].append(last)
        at, loop = first, first
        for number in range(copies):
            if number:
                begin, end = self.add(between)
                self.free[at].append(begin)
                at = end
            begin, end = self.add(repeat.part)
            self.free[at].append(begin)
            at, loop = end, begin
            if number + 1 >= repeat.least:
                self.free[at].append(last)
        if repeat.most is None:
            begin, end = self.add(between)
            self.free[at].append(begin)
            self.free[end].append(loop)

    def closure(self, nodes: Iterable[int]) -> frozenset[int]:
        """Nodes that are reached without a character."""
        found, left = set(nodes), list(nodes)
        while left:
            for node in self.free[left.pop()]:
                if node not in found:
                    found.add(node)
                    left.append(node)
        return frozenset(found)


def compiled(expression: Expression) -> Automaton:
    """The smallest automaton of an expression.

    Raises:
        InputError: when it gets too large.
    """
    net = _Net()
    first, last = net.add(expression)
    named = sorted({char for edges in net.edges for chars, _ in edges for char in chars.chars})
    numbers: dict[frozenset[int], int] = {}
    queue = [net.closure([first])]
    numbers[queue[0]] = 0
    table: list[list[int]] = []
    for nodes in queue:
        targets: list[set[int]] = [set() for _ in range(len(named) + 1)]
        for chars, node in (edge for at in nodes for edge in net.edges[at]):
            for number, char in enumerate([*named, ""]):
                if (char in chars.chars) != chars.others:
                    targets[number].add(node)
        row = []
        for target in map(net.closure, targets):
            if target not in numbers:
                numbers[target] = len(queue)
                queue.append(target)
            row.append(numbers[target])
        table.append(row)
        if len(queue) > LARGEST:
            raise InputError(f"the language needs more than {LARGEST} states; nest or repeat less")
    accepts = torch.tensor([last in nodes for nodes in queue])
    return _smallest(Automaton({char: number for number, char in enumerate(named)}, torch.tensor(table), 0, accepts))


def _smallest(automaton: Automaton) -> Automaton:
    """States that no string tells apart become one (Moore's algorithm)."""
    labels, count = automaton.accepts.long(), 0
    while True:
        signs = torch.cat([labels[:, None], labels[automaton.next]], dim=1)
        kinds, labels = torch.unique(signs, dim=0, return_inverse=True)
        if len(kinds) == count:
            break
        count = len(kinds)
    member = torch.zeros(count, dtype=torch.long)
    member[labels] = torch.arange(len(labels))
    return Automaton(
        automaton.symbols, labels[automaton.next[member]], int(labels[automaton.start]), automaton.accepts[member]
    )


class TokenAutomaton:
    """An automaton that steps by tokens, over answers of a fixed number of them.

    An answer is a string of the language spelt in tokens; where there are end-of-sequence tokens, it may end early, and
    nothing but those follows.

    Args:
        automaton: over characters.
        strings: (V) what each token spells; None or "" for a token that spells nothing and is never to be generated.
        eos_ids: tokens that end an answer.
        device: where answers are.

    Attributes:
        start: state before the first token.
        accepts: (S,) bool, states in which an answer of full length may be.
    """

    def __init__(
        self, automaton: Automaton, strings: Sequence[str | None], eos_ids: Sequence[int], device: torch.device
    ) -> None:
        dead, over = len(automaton.next), len(automaton.next) + 1
        accepts = torch.cat([automaton.accepts, torch.tensor([False, True])])
        steps, classes = torch.unique(automaton.next, dim=1, return_inverse=True)
        number = dict(zip(automaton.symbols, classes.tolist(), strict=False))
        spelt = [tuple(number.get(char, int(classes[-1])) for char in string or "") for string in strings]
        different = {word: index for index, word in enumerate(dict.fromkeys(spelt))}
        columns = torch.full((over + 1, len(different) + 1), dead)
        words = list(different)
        for begin in range(0, len(words), _AT_ONCE):
            some = words[begin : begin + _AT_ONCE]
            columns[:dead, begin : begin + len(some)] = _spelt(steps, some)
        if () in different:
            columns[:, different[()]] = dead
        columns[:, -1] = torch.where(accepts, over, dead)
        kinds = torch.tensor([different[word] for word in spelt])
        kinds[list(eos_ids)] = len(different)
        columns, index = torch.unique(columns, dim=1, return_inverse=True)
        self._columns: Tensor = columns.to(device)
        self._kind: Tensor = index[kinds].to(device)
        self.start, self.accepts = automaton.start, accepts.to(device)
        self._steps = torch.zeros(over + 1, over + 1, device=device)
        self._steps.scatter_(1, self._columns[:, torch.unique(self._kind)], 1.0)

    def after(self, tokens: Tensor) -> Tensor:
        """(B, S) int64, the state that each of the tokens (B,) leads to from each state."""
        return self._columns.T[self._kind[tokens]]

    def messages(self, tokens: Tensor, open_: Tensor, skipped: Tensor) -> tuple[Tensor, Tensor]:
        """Forward-backward reachability over the exact number of open positions.

        Args:
            tokens: (B, n) int64, read where neither open nor skipped.
            open_: (B, n) bool, positions that any token may take.
            skipped: (B, n) bool, positions that do not count.

        Returns:
            (B, n + 1, S) bool, states that some choice of the open tokens leads to before each position; and states
            from which some choice leads to the end of an answer.
        """
        batch, length = tokens.shape
        states = len(self.accepts)
        forward = torch.zeros(batch, length + 1, states, dtype=torch.bool, device=tokens.device)
        backward = torch.zeros_like(forward)
        forward[:, 0, self.start] = True
        backward[:, -1] = self.accepts
        taken = torch.where(open_ | skipped, 0, tokens)
        for at in range(length):
            here = forward[:, at]
            fixed = torch.zeros_like(here.float()).scatter_add_(1, self.after(taken[:, at]), here.float()) > 0
            forward[:, at + 1] = _by_kind(open_[:, at], skipped[:, at], here.float() @ self._steps > 0, here, fixed)
        for at in reversed(range(length)):
            there = backward[:, at + 1]
            fixed = there.gather(1, self.after(taken[:, at]))
            backward[:, at] = _by_kind(open_[:, at], skipped[:, at], there.float() @ self._steps.T > 0, there, fixed)
        return forward, backward

    def allowed(self, before: Tensor, after: Tensor) -> Tensor:
        """Tokens that lead from one of some states to one of others.

        Args:
            before: (M, S) bool.
            after: (M, S) bool.

        Returns:
            (M, V) bool.
        """
        rows, states = before.nonzero(as_tuple=True)
        found = torch.zeros(len(before), self._columns.shape[1], device=before.device)
        size = max(1, 2**24 // max(self._columns.shape))
        for row, state in zip(torch.split(rows, size), torch.split(states, size), strict=True):
            found.index_add_(0, row, after[row].gather(1, self._columns[state]).float())
        return (found > 0)[:, self._kind]

    def shortest(self) -> int | None:
        """Fewest tokens of an answer, without ends; None when no tokens spell one."""
        reached = torch.zeros_like(self.accepts)
        reached[self.start] = True
        for tokens in range(len(self.accepts) + 1):
            if bool((reached & self.accepts).any()):
                return tokens
            reached = reached.float() @ self._steps > 0
        return None


def _spelt(steps: Tensor, words: Sequence[tuple[int, ...]]) -> Tensor:
    """(S, N) int64, the state after each of N words from each of S states."""
    longest = max(map(len, words))
    symbols = torch.tensor([[*word, *[-1] * (longest - len(word))] for word in words], dtype=torch.long)
    at = torch.arange(len(steps))[:, None].expand(-1, len(words))
    for here in symbols.T:
        at = torch.where(here >= 0, steps[at, here.clamp(min=0)], at)
    return at


def _by_kind(open_: Tensor, skipped: Tensor, free: Tensor, same: Tensor, fixed: Tensor) -> Tensor:
    return torch.where(open_[:, None], free, torch.where(skipped[:, None], same, fixed))
