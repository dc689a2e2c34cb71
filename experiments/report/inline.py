"""Figures as part of a page: SVG whose colours follow the page's theme and whose points are links to their runs."""

import io
import re
from html import escape

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from experiments.report.wording import run_words

NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def svg(figure: Figure, title: str, rows: pd.DataFrame) -> str:
    """Returns a figure as the text of an SVG element.

    A colour such as #1b1b1b becomes var(--x1b1b1b, #1b1b1b), for a theme to set. A point with the address cells/<id>/
    becomes a link with what the ledger's row of that id says of the run.
    """
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", metadata=NO_METADATA, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' (xmlns(:xlink)?|version|width|height)="[^"]*"', "", text, count=5)
    text = re.sub(r'<g id="[^"]*"', "<g", text).replace("xlink:href=", "href=")
    text = re.sub(r"(fill|stroke): #([0-9a-f]{6})", r"\1: var(--x\2, #\2)", text)
    text = re.sub(r'font-family: [^;"<]*; ', "", text)
    runs = {row.id: row for row in rows.itertuples()}
    text = re.sub(
        r'<a href="cells/([^"/]*)/"[^>]*>',
        lambda link: f'<a href="cells/{link[1]}/"><title>{escape(run_words(runs[link[1]]))}</title>',
        text,
    )
    return text.replace("<svg", f'<svg role="group" aria-label="{escape(title)}"', 1)
