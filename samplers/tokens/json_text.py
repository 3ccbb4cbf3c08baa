"""Answers that are JSON."""

from __future__ import annotations

from functools import cache
from typing import Literal

from pydantic import Field

from .automaton import Automaton, Chain, Either, Expression, Repeat, compiled, literal
from .language import Language
from .pattern import parsed
from .slots import CONSTRAINTS

_STRING = r'"([^"\\\x00-\x1f]|\\(["\\/bfnrt]|u[0-9a-fA-F]{4}))*"'
_ATOM = rf"{_STRING}|-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?|true|false|null"


@CONSTRAINTS.register("json")
class Json(Language):
    """Every answer is JSON (RFC 8259) without white space, nested up to a depth; see `Language` for what is guaranteed.

    The subset: objects, arrays, strings with all escapes, numbers, true, false and null, with no white space outside
    strings. Depth is finite, which makes the context-free language regular: the constraint is exact for the number of
    positions left, where a context-free one with gaps of any length (arXiv:2508.10111) can run out of room. Not
    guaranteed: that keys differ from each other, a schema, and that escapes of surrogates come in pairs.
    """

    type: Literal["json"] = "json"
    root: Literal["object", "array", "value"] = Field(default="object", description="What the answer is.")
    depth: int = Field(default=2, ge=1, le=5, description="Objects and arrays within each other; the outermost is 1.")

    def automaton(self) -> Automaton:
        """That of the subset."""
        return _of(self.root, self.depth)


@cache
def _of(root: str, depth: int) -> Automaton:
    if root == "value":
        return compiled(_value(depth))
    return compiled(_object(depth) if root == "object" else _array(depth))


def _value(depth: int) -> Expression:
    return parsed(_ATOM) if depth == 0 else Either((parsed(_ATOM), _object(depth), _array(depth)))


def _object(depth: int) -> Expression:
    pair = Chain((parsed(_STRING), literal(":"), _value(depth - 1)))
    return Chain((literal("{"), Repeat(pair, between=literal(",")), literal("}")))


def _array(depth: int) -> Expression:
    return Chain((literal("["), Repeat(_value(depth - 1), between=literal(",")), literal("]")))
