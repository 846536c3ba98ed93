"""Self-contained HTML pages made of sections and blocks."""

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from k2.monitoring.blocks import Section
from k2.monitoring.format import duration, number, value_text


def render_page(title: str, kicker: str, headline: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """A page: a line above the title, the title, (name, figure) pairs, and the sections. All text is escaped."""
    return render_template("page.html", title=title, kicker=kicker, headline=headline, sections=sections)


def render_template(name: str, **values: Any) -> str:
    """One of the templates, with style sheet and script inline."""
    css, script = Markup(_text("report.css")), Markup(_text("report.js.html"))
    page: str = _environment().get_template(name).render(css=css, script=script, **values)
    return page


@cache
def _text(name: str) -> str:
    return files("k2.monitoring").joinpath("templates", name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("k2.monitoring"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"duration": duration, "number": number, "value_text": value_text}
    return environment
