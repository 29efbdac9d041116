"""Pages: a report as one HTML file that asks nothing of any network, or as Markdown."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

from longspan.evaluate import plot
from longspan.evaluate.outline import Code, Drawing, Grid, Legend, Part, headline, outline
from longspan.evaluate.report import Report

ENDINGS = (".html", ".md")
# Ordered as the models are; chosen to be told apart on white and on black, each has its own mark as well.
_LIGHT = ("#c2410c", "#0969da", "#1a7f37", "#8250df", "#bf3989", "#7d6100")
_DARK = ("#ff8c5a", "#58a6ff", "#4ac26b", "#b28cff", "#ff7ab8", "#d4a72c")
_STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1f2328;--faint:#59636e;--rule:#d8dee4;--panel:#f6f8fa;LIGHT}
@media(prefers-color-scheme:dark){:root{--page:#0d1117;--ink:#e6edf3;--faint:#9198a1;--rule:#30363d;--panel:#161b22;DARK}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem clamp(1rem,4vw,2.5rem) 3rem;max-width:68rem;background:var(--page);color:var(--ink);
 font:16px/1.5 system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.25;margin:.5rem 0 1rem}
h2{font-size:1.2rem;margin:2.2rem 0 .5rem;padding-top:.8rem;border-top:1px solid var(--rule)}
p{max-width:46rem;margin:.6rem 0}
.scroll{overflow-x:auto;margin:.6rem 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .8rem .3rem 0;border-bottom:1px solid var(--rule);text-align:right;vertical-align:top;
 overflow-wrap:normal}
th{font-weight:600;color:var(--faint)}
th[scope=row],.name{text-align:left;color:var(--ink)}
th[scope=row]{min-width:6rem}
td{min-width:4.2rem;white-space:nowrap}
table.words th,table.words td{text-align:left}
table.words td{overflow-wrap:anywhere;white-space:normal}
table.words th{white-space:nowrap}
pre{white-space:pre-wrap;background:var(--panel);border:1px solid var(--rule);border-radius:6px;padding:.8rem;margin:.6rem 0;
 font:13px/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.drawings{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,19rem),1fr));gap:1rem 1.5rem;margin:.8rem 0}
figure{margin:0;max-width:34rem}
figcaption{font-weight:600;font-size:.95rem;margin-bottom:.3rem}
figure svg{display:block;width:100%;height:auto}
figure svg:not(.plot){max-width:26rem}
.plot{font-size:11.5px;fill:var(--ink)}
.plot .faint{fill:var(--faint)}
.rule{stroke:var(--rule)}
.beyond{fill:var(--faint);fill-opacity:.1}
.line{fill:none;stroke:var(--m);stroke-width:2.2;stroke-linejoin:round}
.mark{fill:var(--m);stroke:var(--page);stroke-width:1}
.cell{fill:var(--m)}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;list-style:none;padding:0;margin:.6rem 0}
.key{width:1rem;height:1rem;vertical-align:-.15rem;margin-right:.35rem}
"""


def html(report: Report) -> str:
    """Return a report as an HTML page, complete in itself: drawings inline, no script, nothing fetched.

    It is readable on light and dark screens, from the width of a phone upward, and on paper.
    """
    title = escape(headline(report))
    colours = "".join(f".m{number}{{--m:var(--m{number})}}" for number in range(plot.HUES))
    style = _STYLE.replace("LIGHT", _hues(_LIGHT)).replace("DARK", _hues(_DARK)) + colours
    body = "\n".join(
        f"<section>\n<h2>{escape(section.title)}</h2>\n"
        + "\n".join(map(_element, section.parts))
        + "\n</section>"
        for section in outline(report)
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{style}</style>\n</head>\n<body>\n<h1>{_broken(headline(report))}</h1>\n{body}\n</body>\n</html>\n"
    )


def markdown(report: Report) -> str:
    """Return a report as Markdown: the same tables and text, with tables and characters in place of drawings."""
    lines = [f"# {_plain(headline(report))}", ""]
    for section in outline(report):
        lines += [f"## {_plain(section.title)}", ""]
        for part in section.parts:
            lines += _paragraph(part)
    return "\n".join(lines).rstrip() + "\n"


def save(report: Report, path: str | Path) -> None:
    """Write a report as HTML or Markdown, as the path's ending says."""
    path = Path(path)
    text = html(report) if path.suffix.lower() == ".html" else markdown(report)
    path.write_text(text, encoding="utf-8")


def _hues(colours: tuple[str, ...]) -> str:
    return "".join(f"--m{number}:{colour};" for number, colour in enumerate(colours))


def _broken(text: str) -> str:
    """Return a text whose names, of models and of folders, go on in a new line after a joint, never within a word."""
    # After hyphens lines are broken anyway.
    return re.sub(r"(?<=[/_])(?=\w)", "<wbr>", escape(text))


def _element(part: Part) -> str:
    if isinstance(part, str):
        return f"<p>{escape(part)}</p>"
    if isinstance(part, Code):
        return f"<pre>{escape(part.text)}</pre>"
    if isinstance(part, Legend):
        keys = [f"<li>{plot.mark(number)}{_broken(label)}</li>" for number, label in enumerate(part.labels)]
        keys += [f"<li>{plot.shade()}{_broken(part.shade)}</li>"] if part.shade else []
        return f'<ul class="legend">{"".join(keys)}</ul>'
    if isinstance(part, Grid):
        return _table(part)
    figures = "".join(
        f"<figure><figcaption>{_broken(drawing.title)}</figcaption>{drawing.svg}</figure>" for drawing in part
    )
    return f'<div class="drawings">{figures}</div>'


def _table(grid: Grid) -> str:
    head = "".join(
        f'<th scope="col"{" class=name" if column < grid.names else ""}>{escape(title)}</th>'
        for column, title in enumerate(grid.columns)
    )
    rows = []
    for row, cells in enumerate(grid.rows):
        shown = []
        for column, cell in enumerate(cells):
            text = f"<strong>{_broken(cell)}</strong>" if (row, column) in grid.best else _broken(cell)
            shown.append(f'<th scope="row">{text}</th>' if column < grid.names else f"<td>{text}</td>")
        rows.append(f"<tr>{''.join(shown)}</tr>")
    kind = ' class="words"' if len(grid.columns) == 2 else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _paragraph(part: Part) -> list[str]:
    if isinstance(part, str):
        return [_plain(part), ""]
    if isinstance(part, Code):
        return ["```text", part.text, "```", ""]
    if isinstance(part, Legend):
        return []
    if isinstance(part, Grid):
        return _rows(part)
    return [line for drawing in part for line in _stead(drawing)]


def _stead(drawing: Drawing) -> list[str]:
    """Return what stands for a drawing."""
    if drawing.instead is None:
        return []
    instead = drawing.instead
    shown = _paragraph(Code(instead)) if isinstance(instead, str) else _rows(instead)
    return [f"{_plain(drawing.title)}:", "", *shown]


def _rows(grid: Grid) -> list[str]:
    shown = [
        [
            f"**{_plain(cell)}**" if (row, column) in grid.best else _plain(cell)
            for column, cell in enumerate(cells)
        ]
        for row, cells in enumerate(grid.rows)
    ]
    sides = ["---"] * grid.names + ["---:"] * (len(grid.columns) - grid.names)
    lines = [list(map(_plain, grid.columns)), sides, *shown]
    return [*(f"| {' | '.join(cells)} |" for cells in lines), ""]


def _plain(text: str) -> str:
    """Keep Markdown from reading marks into a text."""
    for letter in "\\`*_[]<>|":
        text = text.replace(letter, f"\\{letter}")
    return text
