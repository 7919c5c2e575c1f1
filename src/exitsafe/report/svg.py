"""One Altair chart in, one inline SVG for a page out. Knows nothing of what is drawn.

vl-convert draws. Its SVG is read again and only the shapes, texts and attributes named here are kept: whatever a name
from a run may bring along, no script, link, style or event handler reaches the page. Colours stay in attributes, where
the page's style sheet finds them (`[fill="#1a1a1a"]`) and replaces them in dark mode and print.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from markupsafe import Markup

_SVG = "http://www.w3.org/2000/svg"
_TAGS = {"svg", "g", "path", "line", "rect", "circle", "text", "tspan"}
_ATTRIBUTES = {
    "d", "transform", "x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "dx", "dy", "width", "height", "viewBox",
    "fill", "fill-opacity", "stroke", "stroke-opacity", "stroke-width", "stroke-dasharray", "stroke-linecap",
    "stroke-linejoin", "stroke-miterlimit", "opacity", "font-size", "font-weight", "text-anchor",
}  # fmt: skip
_NUMBER = re.compile(r"-?\d+\.\d{3,}")


def to_svg(chart: Any, *, name: str, title: str, description: str) -> Markup:
    """Draw a chart.

    Args:
        chart: An Altair chart.
        name: An id that nothing else on the page has; letters, digits and hyphens.
        title: What it is, for those who cannot see it.
        description: What it shows, for them.
    """
    import vl_convert
    from markupsafe import Markup

    assert re.fullmatch(r"[a-z][a-z0-9-]*", name), f"{name!r} is no id"
    drawn = vl_convert.vegalite_to_svg(chart.to_dict())
    root = _kept(ElementTree.fromstring(drawn))  # noqa: S314  # vl-convert's own output: no entities, no DTD
    assert root is not None
    root.set("xmlns", _SVG)
    root.set("class", "chart")
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-description")
    for position, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, {"id": f"{name}-{'title' if tag == 'title' else 'description'}"})
        element.text = text
        root.insert(position, element)
    # serialised as XML: every text and attribute is escaped
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # noqa: S704


def _kept(element: ElementTree.Element) -> ElementTree.Element | None:
    """The element with its children, cut down to what is known; None if it is not."""
    tag = element.tag.removeprefix(f"{{{_SVG}}}")
    if tag not in _TAGS or element.get("display") == "none" or not _is_seen(element, tag):
        return None
    found = ElementTree.Element(tag, {k: _rounded(v) for k, v in element.attrib.items() if k in _ATTRIBUTES})
    found.text = element.text if tag in ("text", "tspan") else None
    children = [kept for child in element if (kept := _kept(child)) is not None]
    found.extend(children)
    # Vega nests groups that hold nothing
    return None if tag == "g" and not children else found


def _is_seen(element: ElementTree.Element, tag: str) -> bool:
    """Vega writes a path without colours behind every group."""
    return not (tag == "path" and element.get("class") in ("background", "foreground") and not element.get("fill"))


def _rounded(value: str) -> str:
    return _NUMBER.sub(lambda match: f"{float(match[0]):.2f}", value)
