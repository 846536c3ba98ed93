"""Figures and tables outside a run's report: SVG files, Markdown tables, small HTML pages."""

from collections.abc import Sequence

from markupsafe import Markup

FIGURE_STYLE = """svg{font:11px system-ui,sans-serif;fill:#333;background:#fff}text{stroke:none}.grid{stroke:#ddd}
.middle{text-anchor:middle}.end{text-anchor:end}.whisker{stroke-width:2}.s0{fill:#666;stroke:#666}
.s1{fill:#1d4ed8;stroke:#1d4ed8}.s2{fill:#15803d;stroke:#15803d}.s3{fill:#c2410c;stroke:#c2410c}
.s4{fill:#7e22ce;stroke:#7e22ce}.s5{fill:#0e7490;stroke:#0e7490}.name{stroke:none}.curve{fill:none;stroke-width:1.6}
.band{fill-opacity:.14;stroke:none}.rule{stroke:#b91c1c;stroke-dasharray:4 3}"""

PAGE_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse}td{padding:.2rem .7rem;border-bottom:1px solid #ddd}"""

Rows = Sequence[Sequence[str]]


def svg_file(svg: Markup) -> Markup:
    """A figure with its style and namespace, to be kept as a file of its own."""
    # A Markup's own replace would escape what is put in.
    named = str(svg).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return Markup(named.replace("><", f"><style>{FIGURE_STYLE}</style><", 1))


def markdown_table(rows: Rows) -> str:
    """A table in Markdown; the first row is its header."""
    header, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([header, "|---" * len(rows[0]) + "|", *body]) + "\n"


def html_table(rows: Rows) -> Markup:
    """A table in HTML."""
    lines = ("".join(Markup("<td>{}</td>").format(cell) for cell in row) for row in rows)
    return Markup("<table>{}</table>").format(Markup("".join(f"<tr>{line}</tr>" for line in lines)))


def html_page(title: str, *parts: Markup) -> str:
    """A self-contained page."""
    head = Markup("<!DOCTYPE html><html lang=en><meta charset=utf-8><title>{}</title>").format(title)
    heading = Markup("<style>{}</style><h1>{}</h1>").format(Markup(PAGE_STYLE), title)
    return str(head + heading + Markup("").join(parts) + Markup("</html>"))
