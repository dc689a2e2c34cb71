"""The documents are true where a machine can tell: links lead somewhere, and every backbone and objective is listed."""

import os
import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from experiments import CONFIGS
from experiments.harness.identity import plain, run_of
from experiments.harness.run import execute
from experiments.harness.settings import check_run

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("results/**/*.md")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_its_heading(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), f"{path.name}: {target}"
        if heading:
            titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, target


@pytest.mark.parametrize(
    ("group", "page"), [("arch", "backbones.md"), ("objective", "objectives.md"), ("sampler", "objectives.md")]
)
def test_every_config_of_a_group_is_in_its_page(group, page):
    listed = re.findall(r"`(\w+)`", (ROOT / "docs" / page).read_text())
    assert {path.stem for path in (ROOT / "configs" / group).glob("*.yaml")} <= set(listed)


def overrides_of(text):
    """The overrides in what a person would type, without what stands for something of his own."""
    text = re.sub("<(id|run)>", "RUN", text)  # of another run
    words = shlex.split(text.replace("|", " "), comments=True)
    return [word for word in words if "=" in word and not re.search(r"[<>]|\.\.\.|\$", word)]


def typed():
    """(page, config, overrides) of every command and every row of a table of settings in the pages for users."""
    for name in ("README.md", "docs/configuration.md"):
        text = (ROOT / name).read_text().replace("\\\n", " ")
        for module, rest in re.findall(r"^python -m experiments\.(\w+)(.*)$", text, re.MULTILINE):
            if module in COMPOSED:
                yield name, module, overrides_of(rest.replace('"$arms"', ""))
        for row in re.findall(r"^\| .*\|$", text, re.MULTILINE):
            for span in re.findall(r"`([^`]+)`", row):
                if found := overrides_of(span):
                    yield name, "train", found


COMPOSED = ("train", "sweep", "watch", "merge", "compare", "score", "calibration", "sample", "context", "anatomy")
COMPOSED += ("bench", "fit")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("page", "config", "overrides"),
    list(typed()),
    ids=lambda value: value if isinstance(value, str) else " ".join(value) or "-",
)
def test_what_the_pages_show_can_be_typed(page, config, overrides):
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        composed = compose(config, overrides)
    if config == "train" and not any(word.startswith(("data=t", "init_from")) for word in overrides):
        check_run(plain(composed))


SMALL = ("arch.width=32", "budget.flops=1e9", "data.sequence_length=32", "trainer.compile=false")
ELSEWHERE = ("cuda", "=RUN", "books/", "token_bins", "fineweb", "hidden_markov", "python_stdlib_bpe", "study")
ELSEWHERE += ("devices=8", "experts=4", "nodes=2")


@pytest.mark.thorough
@pytest.mark.parametrize("overrides", [found for _, config, found in typed() if config == "train"], ids=" ".join)
def test_what_the_pages_show_of_a_run_runs(tmp_path, monkeypatch, overrides):
    if any(word in override for word in ELSEWHERE for override in overrides):
        pytest.skip("asks for GPUs, the network or minutes, and has tests of its own")
    (tmp_path / "my.txt").write_text("".join(f"line number {i}\n" for i in range(50_000)))
    cache = os.path.abspath(os.environ.get("ARCHIPELAGO_CACHE", ".cache/archipelago"))
    monkeypatch.setenv("ARCHIPELAGO_CACHE", cache)
    monkeypatch.chdir(tmp_path)
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = compose("train", [*overrides, *SMALL, f"session.root={tmp_path}"])
    assert execute(run_of(config))["status"] == "done"
