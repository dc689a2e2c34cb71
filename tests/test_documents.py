"""The documents are true where a machine can tell: links lead somewhere, and every backbone and objective is listed."""

import re
from pathlib import Path

import pytest

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
