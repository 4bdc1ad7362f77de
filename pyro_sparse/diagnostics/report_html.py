"""A report as one HTML file: no network, no script; for screens light and dark, and for paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from pyro_sparse.diagnostics.finding import Finding
from pyro_sparse.diagnostics.report_figures import Picture

_STYLE = """
:root { color-scheme: light dark; --ink: #1b2430; --quiet: #5b6675; --line: #d9dee5;
  --page: #ffffff; --card: #f6f8fa; --problem: #b42318; --attention: #8a5a00; --fine: #1a6b3c;
  --not-asked: #5b6675; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --quiet: #a3adba; --line: #363f4b;
  --page: #14181e; --card: #1c222a; --problem: #ff8a80; --attention: #f0b95b; --fine: #7fd6a2;
  --not-asked: #a3adba; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 70rem; background: var(--page);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { margin: .4rem 0; max-width: 46rem; }
.lead { font-size: 1.1rem; }
.quiet, figcaption, dt, caption { color: var(--quiet); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr));
  gap: .6rem 1.2rem; margin: 1.2rem 0 0; padding: .8rem 1rem; background: var(--card);
  border-radius: .5rem; }
dt { font-size: .8rem; } dd { margin: 0; font-variant-numeric: tabular-nums; }
table { width: 100%; border-collapse: collapse; font-size: .95rem; }
caption { text-align: left; font-size: .85rem; padding-bottom: .4rem; }
th, td { text-align: left; vertical-align: top; padding: .55rem .8rem .55rem 0;
  border-top: 1px solid var(--line); }
thead th:nth-child(3) { width: 46%; }
thead th { border-top: 0; font-size: .8rem; font-weight: 600; color: var(--quiet); }
tbody th { white-space: nowrap; font-weight: 600; }
td.verdict { white-space: nowrap; font-weight: 600; }
td .source { display: block; font-size: .8rem; color: var(--quiet); }
.problem { color: var(--problem); } .attention { color: var(--attention); }
.fine { color: var(--fine); } .not-asked { color: var(--not-asked); }
footer { margin-top: 2rem; font-size: .85rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr));
  gap: 1.2rem; }
figure { margin: 0; break-inside: avoid; }
figure img { display: block; width: 100%; height: auto; border-radius: .4rem; background: #fff; }
figcaption { font-size: .85rem; line-height: 1.4; margin-top: .4rem; }
figcaption b { color: var(--ink); }
@media (prefers-color-scheme: dark) { img.lines { filter: invert(.9) hue-rotate(180deg); }
  img.shades { filter: brightness(.85); } }
@media (max-width: 44rem) { thead { position: absolute; clip-path: inset(50%); }
  table, caption, tbody, th, td { display: block; }
  tbody tr { display: grid; grid-template-columns: 1fr auto; gap: .1rem 1rem; padding: .7rem 0;
  border-top: 1px solid var(--line); }
  th, td { border: 0; padding: 0; } td.seen, td.advice { grid-column: 1 / -1; }
  td:empty { display: none; } }
@page { margin: 12mm; }
@media print { html { font-size: 8.5pt; }
  :root { --ink: #000; --quiet: #444; --line: #bbb; --page: #fff; --card: #fff;
    --problem: #b42318; --attention: #8a5a00; --fine: #1a6b3c; --not-asked: #444; }
  body { max-width: none; padding: 0; } h2 { break-after: avoid; }
  tr { break-inside: avoid; } .figures { grid-template-columns: repeat(3, 1fr); }
  figure img, img.lines, img.shades { filter: none; } dl { border: 1px solid var(--line); } }
"""
_SIGNS = {"problem": "✕", "attention": "!", "fine": "✓", "not asked": "–"}


def page(
    title: str,
    lead: str,
    facts: Mapping[str, str],
    findings: Sequence[Finding],
    pictures: Sequence[Picture],
    made: str,
) -> str:
    """The whole file.

    Args:
        title: Of the page.
        lead: What was found, in a sentence or two.
        facts: Numbers without a verdict, by name.
        findings: In the order of the table.
        pictures: In their order.
        made: How it was made.
    """
    told = "\n".join(
        f"<div><dt>{escape(k)}</dt><dd>{_worded(v)}</dd></div>" for k, v in facts.items()
    )
    rows = "\n".join(map(_row, findings))
    drawn = "\n".join(map(_figure, pictures))
    figures = (
        f'<section aria-labelledby="figures"><h2 id="figures">Figures</h2>\n<div class="figures">\n'
        f"{drawn}\n</div></section>"
        if pictures
        else ""
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p class="lead">{escape(lead)}</p>
<dl>
{told}
</dl>
</header>
<main>
<section aria-labelledby="findings">
<h2 id="findings">Findings</h2>
<table>
<caption>Problems first. Each number is held against the threshold below it.</caption>
<thead><tr><th scope="col">topic</th><th scope="col">verdict</th><th scope="col">measured</th>
<th scope="col">what to do</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
</section>
{figures}
</main>
<footer><p class="quiet">{escape(made)}</p></footer>
</body>
</html>
"""


def _row(found: Finding) -> str:
    kind = found.verdict.replace(" ", "-")
    source = ""
    if found.threshold is not None:
        source = (
            f'<span class="source">threshold {found.threshold:.3g}, measured '
            f"{found.value:.3g}; {_worded(found.source)}</span>"
        )
    asked = found.verdict != "not asked"
    wide = "" if asked else ' colspan="2"'
    advice = f'<td class="advice">{_worded(found.advice)}</td>' if asked else ""
    return (
        f'<tr><th scope="row">{escape(found.topic)}</th>'
        f'<td class="verdict {kind}"><span aria-hidden="true">{_SIGNS[found.verdict]}</span> '
        f"{found.verdict}</td>"
        f'<td class="seen"{wide}>{_worded(_sentence(found.seen))}{source}</td>{advice}</tr>'
    )


def _figure(picture: Picture) -> str:
    kind = "shades" if picture.shades else "lines"
    return (
        f'<figure><img class="{kind}" src="{picture.data_uri()}" alt="{escape(picture.alt)}">'
        f"<figcaption><b>{escape(picture.name)}</b> {escape(picture.caption)}</figcaption></figure>"
    )


def _worded(text: str) -> str:
    """For a page, which has more signs than a terminal."""
    return escape(text.replace(" +- ", " \N{PLUS-MINUS SIGN} "))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
