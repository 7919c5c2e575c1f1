"""One self-contained HTML file: a template and its content in, a file out.

The content security policy forbids every request and names the styles and scripts by their hashes. Everything else
passes Jinja's autoescape.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from exitsafe.errors import ExitsafeError, InputError
from exitsafe.show.names import shown
from exitsafe.store.files import PRIVATE, PUBLIC, write_whole, writing
from exitsafe.version import __version__

if TYPE_CHECKING:
    from jinja2 import Environment

_NEEDED = ("altair", "jinja2", "vl_convert")


def check_can_render() -> None:
    """Check that the packages that draw are installed.

    Raises:
        ExitsafeError: Without the extra `report`.
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ExitsafeError(
            f'reports and charts need {", ".join(missing)}, which is not installed: pip install "exitsafe[report]"'
        )


def check_can_write(out: Path) -> None:
    """Check that a page can be written to `out`, and make its folder.

    Raises:
        ExitsafeError: Without the extra `report`.
        InputError: If `out` is a folder.
        RunError: If its folder cannot be made.
    """
    check_can_render()
    if out.is_dir():
        raise InputError(f"{out} is a folder; name the file to write, e.g. {out / 'report.html'}")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)


def write_page(
    out: Path,
    template: str,
    *,
    title: str,
    include_unsafe_text: bool,
    styles: Sequence[str] = (),
    scripts: Sequence[str] = (),
    **content: object,
) -> Path:
    """Render a template and write it whole.

    Args:
        out: The file.
        template: Its name among the package's templates.
        title: Of the page; escaped.
        include_unsafe_text: Whether the page contains answers; then only its owner can read it.
        styles, scripts: Our own, inserted as they are; `styles` follow the common style sheet.
        content: What the template needs; escaped.
    """
    from markupsafe import Markup

    styles = [asset("style.css"), *styles]
    page = page_environment().get_template(template)
    text = page.render(
        title=shown(title, max_length=200),
        policy=security_policy(styles=styles, scripts=scripts),
        styles=[Markup(style) for style in styles],  # noqa: S704 - the package's own
        scripts=[Markup(script) for script in scripts],  # noqa: S704
        include_unsafe_text=include_unsafe_text,
        version=__version__,
        **content,
    )
    write_whole(out, text.encode(), mode=PRIVATE if include_unsafe_text else PUBLIC)
    return out


def security_policy(*, styles: Sequence[str], scripts: Sequence[str]) -> str:
    """The content security policy: no requests, and only these inline styles and scripts."""
    named = {"style-src": styles, "script-src": scripts}
    parts = [" ".join([name, *(f"'sha256-{_hash(text)}'" for text in texts)]) for name, texts in named.items() if texts]
    # the empty icon keeps browsers from requesting one
    return "; ".join(["default-src 'none'", *parts, "img-src data:", "base-uri 'none'", "form-action 'none'"])


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def asset(name: str) -> str:
    """A file among the templates, as it is."""
    return (files("exitsafe.show") / "templates" / name).read_text(encoding="utf-8")


@cache
def page_environment() -> Environment:
    """Jinja with everything escaped and nothing undefined."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("exitsafe.show"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
