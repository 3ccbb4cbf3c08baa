"""Constraints: against enumeration, Python's own regular expressions and its own JSON."""

import json
import random
import re
from itertools import product

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fewstep.samplers import InputError
from fewstep.samplers.tokens import (
    Allowed,
    Ancestral,
    Ban,
    CallableDenoiser,
    DenoiserSpec,
    Dfa,
    EosExit,
    EotExit,
    Fixed,
    Guider,
    Json,
    Order,
    Proposal,
    Quota,
    Recipe,
    ReMDM,
    Threshold,
    decode,
    vocabulary_of,
)
from fewstep.samplers.tokens.automaton import TokenAutomaton, compiled
from fewstep.samplers.tokens.pattern import parsed

SAMPLED = Proposal(temperature=1.0)
PIECES = ["", "a", "b", "ab", "ba", "abc", "c", "d", "1", "12", "-"]
"""What tokens spell; the first ends an answer, and the mask follows the last."""


def denoiser(pieces=PIECES, eos=True):
    """Logits at random, of the position and of how many tokens are visible."""
    size = len(pieces)
    table = torch.randn(97, size, generator=torch.Generator().manual_seed(4))

    def logits(ids):
        visible = (ids != size).sum(1, keepdim=True)
        return table[(torch.arange(ids.shape[1]) * 7 + visible * 13) % 97]

    return CallableDenoiser(logits, DenoiserSpec(mask_id=size, vocab_size=size, eos_ids=(0,) if eos else ()))


def spelt(answers, pieces=PIECES):
    """Strings of answers, of which nothing but ends follows an end."""
    for row in answers.tolist():
        end = row.index(0) if 0 in row else len(row)
        assert set(row[end:]) <= {0}
        yield "".join(pieces[token] for token in row[:end])


def accepts(automaton, text):
    at = automaton.start
    for char in text:
        at = int(automaton.next[at, automaton.symbols.get(char, len(automaton.symbols))])
    return bool(automaton.accepts[at])


@pytest.mark.parametrize("pattern", [
    "a*", "(ab|a)*c", "a?b+c{2}", "[a-c]{1,3}d|", "(a|b)*abb", r"\d+(-\d+)*", "[^ab]c", ".b.",
    r"a{2,}|\x62\-", "(?:ab){0,2}c?", r"[\d\-]*", "()", r"\D\w\S", "(a*b*)*c", "((a|b)(c|d)){2}",
])  # fmt: skip
def test_patterns_mean_what_python_takes_them_for(pattern):
    automaton = compiled(parsed(pattern))
    for length in range(5):
        for chars in product("abcd1-\n"[: 7 if length < 4 else 5], repeat=length):
            text = "".join(chars)
            assert accepts(automaton, text) == bool(re.fullmatch(pattern, text)), text


@pytest.mark.parametrize(("pattern", "states"), [("a*", 2), ("(a|b)*abb", 5), ("a{3}", 5), ("(a|aa|aaa)*", 2)])
def test_automata_are_the_smallest(pattern, states):
    """By hand, with the state of no return."""
    assert len(compiled(parsed(pattern)).next) == states


@pytest.mark.parametrize(("pattern", "words"), [
    ("a)", "an unmatched )"), ("(a", "an unclosed group"), ("*a", "an unexpected *"), ("a**", "a second quantifier"),
    ("a{3,1}", "the quantifier {3,1}"), ("a{x}", "the quantifier {x}"), ("[b-a]", "a range that is none"),
    ("(?=a)", "an unknown group"), (r"\q", r"the unknown escape \q"), ("[ab", "an end too early"),
    ("^a", "an unexpected ^"), (r"\xzz", r"an escape that is not \xhh"), (r"[\D]", "an opposite within a class"),
])  # fmt: skip
def test_patterns_that_are_not_understood(pattern, words):
    with pytest.raises(InputError, match=re.escape(words)):
        Recipe(unmask=Quota(tokens=1), constraint={"type": "dfa", "pattern": pattern})


@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize("pattern", ["(ab|c)*a?", "[abc]{4}d?", r"(a|ba)+(12|1)*"])
def test_what_is_allowed_is_what_enumeration_leaves(pattern, eos):
    """Every canvas of four tokens with some given: token by token, over all completions."""
    lifted = TokenAutomaton(compiled(parsed(pattern)), PIECES, (0,) if eos else (), torch.device("cpu"))
    size, n = len(PIECES), 4
    valid = []
    for row in product(range(size), repeat=n):
        end = row.index(0) if 0 in row else n
        whole = (eos or end == n) and not any(row[end:])
        if whole and re.fullmatch(pattern, "".join(PIECES[token] for token in row[:end])):
            valid.append(row)
    valid = torch.tensor(valid)
    rng = random.Random(3)
    for _ in range(40):
        given = torch.tensor([[rng.choice([*[size] * 6, *range(size)]) for _ in range(n)]])
        if rng.random() < 0.7:
            keep = torch.tensor([rng.random() < 0.4 for _ in range(n)])
            given = torch.where(keep, valid[rng.randrange(len(valid))], size)[None]
        open_ = given == size
        forward, backward = lifted.messages(given, open_, torch.zeros_like(open_))
        left = valid[((valid == given) | open_).all(1)]
        assert bool((forward[0, -1] & lifted.accepts).any()) == bool(len(left))
        for position in range(n):
            allowed = lifted.allowed(forward[:, position], backward[:, position + 1])[0]
            if open_[0, position]:
                assert set(allowed.nonzero()[:, 0].tolist()) == set(left[:, position].tolist())


RECIPES = {
    "two by two": Recipe(unmask=Quota(tokens=2), propose=SAMPLED),
    "five at random": Recipe(unmask=Quota(tokens=5, confidence="random"), propose=SAMPLED),
    "all that is sure": Recipe(unmask=Threshold(threshold=0.3), propose=SAMPLED, exit=EosExit(drop=True)),
    "blocks": Recipe(blocks=Fixed(length=3), unmask=Threshold(threshold=0.2), propose=SAMPLED, exit=EosExit()),
}


@pytest.mark.parametrize("eos", [True, False], ids=["with ends", "filled"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_thousand_of_a_thousand_answers_match(recipe, eos):
    if not eos:
        recipe = recipe.replace(exit={"type": "none"})
    pattern = r"(abc|ab)+d(-?\d\d?){2,}"
    prompts = [[1] * (row % 3) for row in range(1000)]
    decoded = decode(
        denoiser(eos=eos), prompts, 9, recipe.replace(constraint=Dfa(pattern=pattern)), resources={"vocabulary": PIECES}
    )
    texts = list(spelt(decoded.answers))
    assert sum(bool(re.fullmatch(pattern, text)) for text in texts) == 1000
    assert not decoded.failed.any()
    assert len(set(texts)) > 100
    assert eos == any(0 in row for row in decoded.answers.tolist())


JSON_PIECES = [
    "",
    *'{}[]":,.-+eE0123456789abu\\ntrfls',
    "true",
    "false",
    "nu",
    "ll",
    '":',
    '{"',
    "[[",
    "}}",
    "é",
    " ",
    "\n",
]


@pytest.mark.parametrize(("fields", "kind"), [
    ({"root": "object", "depth": 2}, dict),
    ({"root": "array", "depth": 1}, list),
    ({"root": "value", "depth": 2}, object),
])  # fmt: skip
def test_a_thousand_of_a_thousand_answers_are_json(fields, kind):
    how = Recipe(unmask=Quota(tokens=3), propose=SAMPLED, constraint=Json(**fields))
    decoded = decode(denoiser(JSON_PIECES), [[]] * 1000, 12, how, resources={"vocabulary": JSON_PIECES})
    values = [json.loads(text) for text in spelt(decoded.answers, JSON_PIECES)]
    assert len(values) == 1000
    assert all(isinstance(value, kind) for value in values)
    assert max(map(depth, values)) <= fields["depth"]
    assert len({repr(value) for value in values}) > 50


def depth(value):
    if not isinstance(value, list | dict):
        return 0
    return 1 + max(map(depth, value.values() if isinstance(value, dict) else value), default=0)


@pytest.mark.parametrize(("text", "valid"), [
    ('{"a":1}', True), ("{}", True), ('{"a":[1,-2.5e+3,0]}', True), ('{"a":{"b":[]}}', False), ('{"a":01}', False),
    ('{"a":1,}', False), ('{"a" :1}', False), ('{"\\u00e9":"\\n"}', True), ('{"a":"\n"}', False), ("[]", False),
    ('{"a":tru}', False), ('{"é":null,"b":"}"}', True), ('{"a":.5}', False), ('{"a":{"b":2},"c":[[]]}', False),
])  # fmt: skip
def test_the_subset_of_json(text, valid):
    assert accepts(Json(depth=2).automaton(), text) == valid


def test_prompts_with_masks_are_completed_around_what_is_given():
    """The answer begins at the first mask; the tokens after it are part of it."""
    mask = len(PIECES)
    prompt = [[3, mask, 2, mask, mask, 7, mask]] * 50
    how = Recipe(unmask=Quota(tokens=2), propose=SAMPLED, constraint=Dfa(pattern="(ab|c)*b(a|b)*d1*"))
    decoded = decode(denoiser(eos=False), prompt, 0, how, resources={"vocabulary": PIECES})
    for row in decoded.tokens[:, 1:].tolist():
        assert re.fullmatch(how.constraint.pattern, "".join(PIECES[token] for token in row))


def test_what_is_sure_among_the_possible_is_sure():
    """Confidences are of the law that is left: a forced token has probability 1 and goes first."""
    how = Recipe(unmask=Threshold(threshold=0.99), constraint=Dfa(pattern="ab12"))
    decoded = decode(denoiser(eos=False), [[]] * 3, 3, how, resources={"vocabulary": PIECES})
    assert {tuple(row) for row in decoded.answers.tolist()} <= {(1, 2, 9)}
    assert decoded.nfe.tolist() == [1] * 3
    assert decoded.reveal_conf.eq(1).all()


@pytest.mark.parametrize(("pattern", "eos", "room", "words"), [
    ("(abc){5}", True, 4, "row 0: the shortest answer takes 5 tokens and there is room for 4; raise gen_length"),
    ("x+", True, 4, "row 0: the tokens of this vocabulary spell no answer at all"),
    ("(dd)*", False, 3, "row 0: no answer has exactly 3 tokens; take another gen_length, or a denoiser with eos_ids"),
])  # fmt: skip
def test_a_canvas_without_room_fails_before_anything_is_evaluated(pattern, eos, room, words):
    def never(ids):
        raise AssertionError

    oracle = CallableDenoiser(never, denoiser(eos=eos).spec)
    how = Recipe(unmask=Quota(tokens=1), constraint=Dfa(pattern=pattern))
    with pytest.raises(InputError, match="the dfa constraint cannot be met in " + re.escape(words)):
        decode(oracle, [[1]], room, how, resources={"vocabulary": PIECES})


def test_other_clear_failures():
    how = Recipe(unmask=Quota(tokens=1), constraint=Dfa(pattern="a+"))
    mask = len(PIECES)
    with pytest.raises(InputError, match="row 1: no answer has the tokens that are given there"):
        decode(denoiser(), [[mask, 1], [mask, 2]], 0, how, resources={"vocabulary": PIECES})
    with pytest.raises(InputError, match="the dfa constraint needs 'vocabulary'; hand it over"):
        decode(denoiser(), [[1]], 3, how)
    with pytest.raises(InputError, match="says what 3 tokens spell; the denoiser predicts 11"):
        decode(denoiser(), [[1]], 3, how, resources={"vocabulary": ["a", "b", "c"]})
    with pytest.raises(InputError, match="no token is left at some position"):
        decode(denoiser(eos=False), [[1]], 3, how.replace(logits=Ban(banned=(1,))), resources={"vocabulary": PIECES})


@pytest.mark.parametrize("constraint", [Dfa(pattern="a"), Json(), Allowed(tokens=((1,),))])
def test_what_could_break_a_promise_is_refused(constraint):
    plain = Recipe(unmask=Quota(tokens=1), constraint=constraint)
    name = constraint.type
    with pytest.raises(InputError, match=f"the {name} constraint holds for what is committed, and remdm changes it"):
        plain.replace(unmask=Ancestral(steps=4), remask=ReMDM(rule="cap"))
    with pytest.raises(InputError, match=f"the {name} constraint.*use"):
        plain.replace(unmask=Order(random=False), scorer=Guider(top_k=1))
    with pytest.raises(InputError, match=f"the eot exit ends answers where the {name} constraint may not allow an end"):
        plain.replace(exit=EotExit())


def test_each_position_has_its_tokens():
    how = Recipe(unmask=Quota(tokens=2), propose=SAMPLED, constraint=Allowed(tokens=((1, 2), (), (5,))))
    decoded = decode(denoiser(), [[3], [4, 4, 4]] * 50, 5, how)
    assert set(decoded.answers[:, 0].tolist()) == {1, 2}
    assert set(decoded.answers[:, 2].tolist()) == {5}
    assert len(set(decoded.answers[:, 1].tolist())) > 5
    assert len(set(decoded.answers[:, 4].tolist())) > 5
    for token in (11, -1, 40):
        with pytest.raises(InputError, match=f"position 0 allows token {token}; the denoiser generates tokens 0 to 10"):
            decode(denoiser(), [[3]], 2, how.replace(constraint=Allowed(tokens=((token,),))))


def test_what_the_tokens_of_a_tokenizer_spell():
    """Byte-level pieces with spaces, a special token, and half of a character."""
    words = {"<eos>": 0, "a": 1, "Ġa": 2, "b": 3, "ab": 4, "Ã": 5, "Ã©": 6}
    tokenizer = Tokenizer(models.BPE(words, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    assert vocabulary_of(fast, 9) == [None, "a", " a", "b", "ab", None, "é", None, None]
