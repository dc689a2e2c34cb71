"""The page is one file that answers first, whatever an analysis has come to and whatever its parts are called."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from experiments.findings import Estimate, Refused, Verdict
from experiments.report import figures, inline, page
from experiments.scaling.results import CellCounts, Multiplier
from tests.report import planted


def rendered(analysis=None, rows=None):
    rows = planted.rows() if rows is None else rows
    return page.render(planted.design(), rows, analysis or planted.analysis(), planted.prediction())


@pytest.fixture(scope="module")
def whole():
    return rendered()


def test_the_page_needs_no_other_file_and_links_only_to_runs(whole):
    assert "http" not in whole and "@import" not in whole and "url(#" in whole
    links = {link for link in re.findall(r'(?:src|href)="(.*?)"', whole) if link[0] != "#"}
    assert links == {f"cells/{name}/" for name in {*planted.rows().id, "0" * 12}}


def test_every_run_that_has_a_loss_is_a_point_that_says_what_it_is(whole):
    done = planted.rows().query("status == 'done'")
    assert set(re.findall(r'<a href="cells/(\w+)/"><title>', whole)) == set(done.id)
    run = done.iloc[5]
    title = re.search(rf'<a href="cells/{run.id}/"><title>(.*?)</title>', whole, re.DOTALL)[1]
    assert run.arm in title and f"run {run.id}" in title and "learning rate 0.01, seed 0" in title


def test_every_question_is_answered_before_the_first_figure(whole):
    first = whole[: whole.index("<svg")]
    for comparison in planted.analysis().comparisons:
        assert comparison.verdict.sentence in first and f"better than {comparison.reference}?" in first
    assert "2 of 3 outcomes" in first and "1.38" in first and "chance in the runs" in first
    assert "to tell 1.25: 3 seeds per cell" in first and "Read with care" in first


def test_every_tag_is_closed(whole):
    class Balance(HTMLParser):
        stack: list[str] = []

        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "path", "use", "br"):
                self.stack.append(tag)

        def handle_endtag(self, tag):
            if tag not in ("path", "use"):
                assert self.stack.pop() == tag

    parser = Balance()
    parser.feed(whole)
    assert parser.stack == []


def test_ids_of_the_figures_do_not_clash(whole):
    ids = re.findall(r' id="(.*?)"', whole)
    assert len(ids) == len(set(ids))


def test_colours_are_variables_that_the_dark_theme_sets(whole):
    used = set(re.findall(r"var\(--x(\w{6}),", whole))
    dark = set(re.findall(r"--x(\w{6}):", whole))
    assert {colour[1:] for colour in (figures.INK, figures.MUTED, figures.FAINT, figures.PAPER)} <= used & dark
    assert not re.search(r"(fill|stroke): ?#", whole)


def test_a_figure_is_drawn_the_same_each_time():
    rows, analysis = planted.rows(), planted.analysis()
    one, two = (inline.svg(figures.frontier(rows, analysis), "frontier", rows) for _ in range(2))
    assert one == two


def without_laws(analysis):
    refused = {name: replace(arm, law=Refused("too few runs"), tuning=None, best=None, holdout=None)
               for name, arm in analysis.arms.items()}  # fmt: skip
    verdict = Verdict("cannot tell", "Too few runs.", None, "rule")
    empty = {"centre": None, "multipliers": (), "trend": None, "floor": None, "p": {}, "costs": (), "shares": None}
    empty |= {"power": None, "paired": None, "verdict": verdict}
    comparisons = tuple(replace(comparison, **empty) for comparison in analysis.comparisons)
    return replace(analysis, arms=refused, comparisons=comparisons, record=None, cells=CellCounts(82, 0, 0, 0))


@pytest.mark.thorough
@pytest.mark.parametrize("some", [True, False])
def test_a_sweep_without_laws_and_one_without_runs_have_a_page(some):
    rows = planted.rows()
    got = rendered(without_laws(planted.analysis()), rows if some else rows[:0])
    assert "Too few runs." in got and "none: too few runs" in got


def test_a_multiplier_without_an_end_is_drawn_at_the_edge():
    analysis, endless = planted.analysis(), Estimate(2.0, 1.1, float("inf"))
    first = analysis.comparisons[0]
    multipliers = tuple(Multiplier(m.flops, endless, True) for m in first.multipliers)
    changed = replace(first, centre=replace(first.centre, estimate=endless), multipliers=multipliers)
    figure = figures.multipliers(replace(analysis, comparisons=(changed, *analysis.comparisons[1:])))
    drawn = inline.svg(figure, "multipliers", planted.rows())
    assert not re.search(r"\b(nan|inf)\b", drawn) and figure.axes[0].get_ylim()[1] >= 1000


@pytest.mark.thorough
def test_names_cannot_break_out_of_the_page_or_the_figures():
    bad = '<script>alert(1)</script> $x_{ & "quoted" fill: #0072b2'
    rows, analysis = planted.rows(), planted.analysis()
    rows["arm"] = rows.arm.replace(planted.HYBRID, bad)
    arms = {bad if name == planted.HYBRID else name: arm for name, arm in analysis.arms.items()}
    arms[bad] = replace(arms[bad], name=bad, warnings=("<b>bold</b>",))
    first = replace(analysis.comparisons[0], arm=bad)
    got = rendered(replace(analysis, arms=arms, comparisons=(first, *analysis.comparisons[1:])), rows)
    assert got.count("<script>") == 1 and "<b>bold" not in got and "&lt;script&gt;alert(1)" in got


def test_names_at_the_curves_do_not_lie_on_each_other():
    analysis = planted.analysis()
    figure = figures.frontier(planted.rows(), analysis)
    figure.draw_without_rendering()
    words = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(words) == 3 and not any(a.overlaps(b) for i, a in enumerate(words) for b in words[:i])
