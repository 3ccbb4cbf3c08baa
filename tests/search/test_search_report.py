"""A found search survives a file, and its report says what it holds, with n and errors, and smuggles nothing in."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from fabricated_search import FRESH, candidate, fabricate_search, log_snr, plan_of, scored
from html_page import Page, check_self_contained, words

from fewstep.eval import Estimate, Jackknife
from fewstep.eval.verdict import with_error
from fewstep.samplers.errors import InputError
from fewstep.search.found import Candidate, Found
from fewstep.search.report import write_search_report
from fewstep.search.report_plots import best_so_far, rungs, scales, wholes

TIMES = (950.0, 700.0, 450.0, 200.0, 60.0)


@pytest.fixture(scope="module", params=["nfe", None], ids=["front", "one objective"])
def found(request) -> Found:
    return fabricate_search(cost=request.param)


@pytest.fixture(scope="module")
def html(found, tmp_path_factory) -> str:
    return write_search_report(tmp_path_factory.mktemp("search") / "report.html", found).read_text(encoding="utf-8")


def page_of(found: Found, tmp_path) -> str:
    return write_search_report(tmp_path / "report.html", found).read_text(encoding="utf-8")


def with_best(found: Found, **fields: object) -> Found:
    front = tuple(replace(c, **fields) if c is found.best else c for c in found.front)
    return replace(found, front=front)


def small_search(cost: str | None = "nfe") -> Found:
    """One whose pictures are drawn fast."""
    found = fabricate_search(trials=20, cost=cost)
    return replace(found, front=found.front[:3], baselines=found.baselines[:1])


def rows_of(html: str, label: str) -> list[list[str]]:
    """Cells of the table in the scroller with this label, row by row."""
    table = re.search(rf'<div class="scroll"[^>]*aria-label(?:ledby)?="{label}">(.*?)</table>', html, re.DOTALL)
    rows = re.findall(r"<tr.*?</tr>", table.group(1), re.DOTALL)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
    return [[" ".join(re.sub(r"<[^>]+>", " ", cell).split()) for cell in row] for row in cells]


def test_a_found_search_survives_a_file(found, tmp_path):
    found.save(tmp_path / "found.json")
    again = Found.load(tmp_path / "found.json")
    assert again == found
    assert (again.best.order, again.teacher.name) == (found.best.order, "teacher-100")
    assert not list(tmp_path.glob(".*.tmp"))


def test_the_page_of_a_file_is_that_of_the_search(found, html, tmp_path):
    assert page_of(Found.from_json(json.loads(json.dumps(found.to_json()))), tmp_path) == html


def test_of_a_jackknife_the_file_keeps_value_error_and_n(found):
    estimate = Jackknife(3.0, 0.2, 40, 3.1, (3.0, 3.2), (20, 20))
    fresh = replace(found.best.fresh, quality=estimate)
    again = Found.from_json(json.loads(json.dumps(with_best(found, fresh=fresh).to_json())))
    assert again.best.fresh.quality == Estimate(3.0, 0.2, 40)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fewstep_found": 2}, r"found.json is no found search \(fewstep_found: Input should be 1; got 2\)"),
        ({"found.front": []}, r"the plan found is one of the front; got another than its 0\)"),
        ({"found.seconds": float("nan")}, r"found.seconds: Input should be a finite number; got nan"),
        ({"found.metric": None}, r"found.metric: Input should be a valid string; got None"),
        ({"found.front.0.state": "lost"}, r"front.0.state: .*'complete', 'pruned' or 'failed'; got 'lost'"),
        ({"found.front.0.at_search.quality.se": float("inf")}, r"quality.se: Input should be a finite number"),
        ({"found.front.0.log_snrs": [1.0]}, r"trial \d+ has a log-SNR for each timestep; got \d timesteps and 1 log"),
        ({"found.front.0.plan": {"grid": {}}}, r"plan: plan is not a fewstep plan; a plan is a JSON object"),
        ({"found.front.0.at_search": None}, r"trial \d+ is complete; a trial has a score of the search unless it f"),
        ({"found.front.0.at_search.costs": {}}, r"trial \d+ of the front has no nfe, which is an objective"),
        ({"found.surprise": 1}, r"found.surprise: Unexpected keyword argument"),
    ],
)
def test_a_bad_file_is_named_with_the_place(tmp_path, change, message):
    data = small_search().to_json()
    (path, value), place = next(iter(change.items())), data
    *steps, last = path.split(".")
    for step in steps:
        place = place[int(step) if step.isdigit() else step]
    place[last] = value
    (tmp_path / "found.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=message) as caught:
        Found.load(tmp_path / "found.json")
    assert "\n" not in str(caught.value)


def test_a_failure_has_a_reason():
    with pytest.raises(InputError, match="trial 3 failed; give the reason"):
        Candidate(3, plan_of(TIMES), {}, state="failed")


def test_page_is_self_contained_and_accessible(html):
    check_self_contained(html)
    assert not re.search(r"\b(nan|inf|None|undefined)\b", words(html))


def test_tables_show_both_measurements_with_their_n(found, html):
    rows = {row[0].removesuffix(" the plan found").removesuffix(" candidate"): row for row in rows_of(html, "front")}
    for member in found.front:
        row = rows[member.title]
        seen, fresh = member.at_search, member.fresh
        assert row[1] == str(member.order)
        assert row[2] == f"{with_error(seen.quality.value, seen.quality.se)} n = {seen.n:,}"
        assert row[3] == f"{with_error(fresh.quality.value, fresh.quality.se)} n = {FRESH:,}"
        se = (seen.quality.se**2 + fresh.quality.se**2) ** 0.5
        assert row[4].startswith(with_error(fresh.quality.value - seen.quality.value, se, signed=True))
    titles = [row[0] for row in rows_of(html, "plan")[1:]]
    assert titles[0] == f"{found.best.title} the plan found"
    assert titles[-1] == "teacher-100 teacher"
    assert len(titles) == 2 + len(found.baselines)


def test_parameters_and_transfers_are_those_of_the_search(found, html):
    rows = rows_of(html, "parameters")
    assert len(rows[0]) == 1 + len(found.front)
    assert rows[1][1:] == [f"{member.timesteps[0]:.4g}" for member in found.front]
    transfers = rows_of(html, "transfers")
    assert [row[0] for row in transfers[1:]] == ["guidance scale 1.0", "guidance scale 1.5", "guidance scale 3.0"]
    assert transfers[0][1:] == ["the plan found", "unipc-leading-5"]
    quality = found.transfers[0].scored.quality
    assert transfers[1][1] == f"{with_error(quality.value, quality.se)} n = 2,048"


def test_every_trial_is_counted_once(found, html):
    key = re.search(r'id="history".*?<ul class="key">(.*?)</ul>', html, re.DOTALL).group(1)
    counted = [int(count) for count in re.findall(r"\((\d+)\)", key)]
    assert sum(counted) == len(found.history)
    assert rungs(found) == [256, 512]
    failed = [trial for trial in found.history if trial.state == "failed"]
    reasons = {row[0]: int(row[1]) for row in rows_of(html, "Failed trials")[1:]}
    assert reasons == {reason: sum(t.reason == reason for t in failed) for reason in {t.reason for t in failed}}


@pytest.mark.parametrize("higher", [False, True])
def test_best_so_far_leaves_out_what_was_pruned_or_breaks_a_limit(found, higher):
    turned = replace(found, higher_is_better=higher)
    chosen = best_so_far(turned)
    best, expected = None, []
    for trial in found.history:
        if trial.state != "complete" or not trial.holds:
            continue
        value = trial.at_search.quality.value
        if best is None or (value > best if higher else value < best):
            best = value
            expected.append(trial.order)
    assert [trial.order for trial in chosen] == expected
    assert len(expected) < len(found.history) / 2


@pytest.mark.parametrize(
    ("fresh", "words_"),
    [
        (3.2, "the difference is within two errors"),
        (4.5, r"the fresh value is worse by 1\.\d+ ± 0\.\d+"),
        (2.0, r"the fresh value is better by 1\.\d+ ± 0\.\d+"),
    ],
)
def test_verdict_speaks_of_luck_only_beyond_two_errors(tmp_path, fresh, words_):
    found = small_search()
    found = with_best(found, at_search=scored(1024, 3.1, 5), fresh=scored(FRESH, fresh, 5))
    text = words(page_of(found, tmp_path))
    assert re.search(words_, text)
    assert "The teacher teacher-100 scores 2.550 ± 0.041 (n = 10,000) and is better than the plan" in text


def test_what_flatters_the_plan_is_said_first(tmp_path):
    found = small_search(cost=None)
    settings = found.settings | {"fresh_seeds": [1000, 11_000]}
    bad = with_best(replace(found, settings=settings), holds=False)
    text = words(page_of(bad, tmp_path))
    assert "The fresh seeds overlap those of the search" in text
    assert "The plan found breaks a limit" in text
    assert "With n = 1,024 a Fréchet distance is biased upwards" in text
    assert text.index("overlap") < text.index("minus the plan found")
    ahead = replace(found, front=(replace(found.front[0], gap=Estimate(-1.0, 0.4, FRESH)), *found.front[1:]))
    assert f"On fresh seeds better than the plan found: {found.front[0].title}." in words(page_of(ahead, tmp_path))
    assert "was not measured on fresh seeds" in words(page_of(with_best(found, fresh=None), tmp_path))


def test_missing_parts_leave_a_whole_page(tmp_path):
    alone = candidate(0, TIMES, 3.0)
    bare = Found(alone.plan, "relative_error", False, None, (alone,), (alone,), 1024, 3.0)
    blind = replace(bare, front=(replace(alone, timesteps=(), log_snrs=(), params={}),))
    for found in (bare, blind):
        html = page_of(found, tmp_path)
        check_self_contained(html)
        text = words(html)
        assert "The search does not state its command" in text
        assert "fresh seeds were not tried" in text
        assert ("Where the steps are" in text) == (found is bare)
        assert not re.search(r"\b(nan|inf|None|undefined)\b", text)


def test_nothing_from_a_search_becomes_markup(tmp_path):
    evil = '<script>alert("1")</script>$x$&\'"></svg>'
    found = small_search()
    broken = replace(found.history[0], state="failed", at_search=None, reason=evil)
    found = replace(
        with_best(found, name=evil, params={evil: evil}),
        metric=evil,
        command=evil,
        history=(broken, *found.history[1:]),
        settings={"pipe": evil, evil: {evil: evil}},
        transfers=tuple(replace(transfer, setting=evil, name=evil) for transfer in found.transfers),
    )
    html = page_of(found, tmp_path)
    assert "<script" not in html.lower()
    assert evil in "".join(Page(html).text)


def test_grids_show_what_caches_and_guidance_do():
    cached = plan_of(TIMES, caches=[{"type": "block-mask", "rows": ["1", "0", "1", "0", "1"]}])
    assert wholes(cached, 5) == (True, False, True, False, True)
    assert wholes(plan_of(TIMES), 5) == (True,) * 5
    assert wholes(cached, 9) == (True,) * 9, "a table for other timesteps says nothing about these"
    guided = plan_of(TIMES, guidance={"type": "guidance", "scale": 2.0, "window": [0.4, 1.0]})
    assert scales(guided, 5) == (1, 1, 2, 2, 2)
    assert scales(plan_of(TIMES, guidance={"type": "constant", "scale": 2.0}), 5) == ()


def test_dots_are_at_the_log_snr_of_the_timesteps(tmp_path):
    found = small_search()
    only = replace(found, front=(found.best,), baselines=(), teacher=None)
    html = page_of(only, tmp_path)
    svg = re.search(r'id="grids".*?<div class="wide">(.*?)</svg>', html, re.DOTALL).group(1)
    xs = sorted({float(x) for x in re.findall(r'<use [^>]*x="([\d.]+)"[^>]*fill: var\(--plan\)', svg)})
    expected = [log_snr(time) for time in sorted(found.best.timesteps, reverse=True)]
    assert len(xs) == len(expected)
    pixels = (xs[-1] - xs[0]) / (expected[-1] - expected[0])
    assert xs == pytest.approx([xs[0] + pixels * (value - expected[0]) for value in expected], abs=1e-2)
    assert f"timesteps of {found.best.title}" in svg
