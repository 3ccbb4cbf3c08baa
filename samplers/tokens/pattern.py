"""Regular expressions in their usual notation."""

from __future__ import annotations

from ..errors import InputError
from .automaton import Chain, Chars, Either, Expression, Repeat, literal

_DIGITS = frozenset("0123456789")
_WORD = _DIGITS | frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_")
_SPACE = frozenset(" \t\n\r\f\v")
_CLASSES = {"d": _DIGITS, "w": _WORD, "s": _SPACE}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v"}
_MOST = 1000


def parsed(pattern: str) -> Expression:
    r"""The expression of a pattern that whole answers match, as with ``re.fullmatch``.

    Characters, ``.`` (all but a newline), ``[a-z_]``, ``[^...]``, ``\d \w \s`` (of ASCII) and their opposites in
    capitals, ``\n \t \r \f \v``, ``\xhh``, groups ``( )`` and ``(?: )``, ``|``, ``* + ? {m} {m,} {m,n}``.

    Raises:
        InputError: for anything else.
    """
    parser = _Parser(pattern)
    expression = parser.either()
    if parser.at < len(pattern):
        parser.fail("an unmatched )")
    return expression


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    @property
    def next(self) -> str:
        return self.text[self.at : self.at + 1]

    def take(self) -> str:
        if not self.next:
            self.fail("an end too early")
        self.at += 1
        return self.text[self.at - 1]

    def skip(self, text: str) -> bool:
        found = self.text.startswith(text, self.at)
        self.at += len(text) if found else 0
        return found

    def fail(self, what: str) -> None:
        raise InputError(
            f"the pattern {self.text!r} has {what} at character {self.at}; characters, classes, groups, | and the "
            "quantifiers * + ? {m,n} are understood"
        )

    def either(self) -> Expression:
        parts = [self.sequence()]
        while self.skip("|"):
            parts.append(self.sequence())
        return parts[0] if len(parts) == 1 else Either(tuple(parts))

    def sequence(self) -> Expression:
        parts: list[Expression] = []
        while self.next and self.next not in "|)":
            parts.append(self.quantified(self.atom()))
        return Chain(tuple(parts))

    def quantified(self, atom: Expression) -> Expression:
        bounds = None
        if self.next and self.next in "*+?":
            bounds = {"*": (0, None), "+": (1, None), "?": (0, 1)}[self.take()]
        elif self.skip("{"):
            text = ""
            while self.next != "}":
                text += self.take()
            self.take()
            least, comma, most = text.partition(",")
            if not least.isdecimal() or (most and not most.isdecimal()):
                self.fail(f"the quantifier {{{text}}}")
            bounds = (int(least), int(most) if most else None if comma else int(least))
            if max(bounds[0], bounds[1] or 0) > _MOST or (bounds[1] is not None and bounds[1] < bounds[0]):
                self.fail(f"the quantifier {{{text}}}")
        if bounds is None:
            return atom
        if self.next and self.next in "*+?{":
            self.fail("a second quantifier")
        return Repeat(atom, *bounds)

    def atom(self) -> Expression:
        char = self.take()
        if char == "(":
            if self.next == "?" and not self.skip("?:"):
                self.fail("an unknown group")
            inner = self.either()
            if not self.skip(")"):
                self.fail("an unclosed group")
            return inner
        if char == "[":
            return self.char_class()
        if char == ".":
            return Chars(frozenset("\n"), others=True)
        if char == "\\":
            return self.escape()
        if char in "*+?{^$":
            self.at -= 1
            self.fail(f"an unexpected {char}")
        return literal(char)

    def escape(self) -> Chars:
        char = self.take()
        if char.lower() in _CLASSES:
            return Chars(_CLASSES[char.lower()], others=char.isupper())
        if char == "x":
            try:
                return Chars(frozenset(chr(int(self.take() + self.take(), 16))))
            except ValueError:
                self.fail("an escape that is not \\xhh")
        if char.isalnum() and char not in _ESCAPES:
            self.fail(f"the unknown escape \\{char}")
        return Chars(frozenset(_ESCAPES.get(char, char)))

    def char_class(self) -> Chars:
        others = self.skip("^")
        chars: set[str] = set()
        while True:
            one = self.member()
            if self.next == "-" and self.text[self.at + 1 : self.at + 2] != "]":
                self.take()
                last = self.member()
                if len(one) != 1 or len(last) != 1 or min(last) < min(one):
                    self.fail("a range that is none")
                one = frozenset(map(chr, range(ord(min(one)), ord(min(last)) + 1)))
            chars |= one
            if self.skip("]"):
                return Chars(frozenset(chars), others)

    def member(self) -> frozenset[str]:
        if not self.skip("\\"):
            return frozenset(self.take())
        escaped = self.escape()
        if escaped.others:
            self.fail("an opposite within a class")
        return escaped.chars
