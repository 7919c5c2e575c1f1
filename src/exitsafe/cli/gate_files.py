"""What a gate leaves for CI systems: JUnit XML and a Markdown summary. Ids, names and numbers only, no text of answers.

The XML keeps to what Jenkins' schema (junit-10.xsd of its xunit plugin) allows and GitLab reads: GitLab shows a
failure's text and not its `message`, and keeps only the first of cases with the same class name and name.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from exitsafe.cli.gate_tables import markdown, number
from exitsafe.gate import Finding, Gate
from exitsafe.show.names import without_folder, without_folders
from exitsafe.store.files import write_whole, writing

_ELEMENTS = {"breach": "failure", "unjudged": "error"}


def write_junit(gate: Gate, path: Path) -> None:
    """One test case per rule and place: a breach is a failure, what could not be judged an error."""
    write_whole(path, junit(gate))


def append_summary(gate: Gate, path: Path) -> None:
    """Add the gate in Markdown at the end of a file, as GitHub's step summary is written."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(markdown(gate))


def junit(gate: Gate) -> bytes:
    """The XML document."""
    counts = {
        "tests": str(len(gate.findings)),
        "failures": str(gate.count("breach")),
        "errors": str(gate.count("unjudged")),
    }
    root = Element("testsuites", {"name": "exitsafe gate", **counts})
    name = f"exitsafe gate {without_folder(gate.model)}"
    suite = SubElement(root, "testsuite", {"name": _xml_text(name), "time": "0", **counts})
    times_seen: Counter[str] = Counter()
    for finding in gate.findings:
        name = _xml_text(f"{finding.name}, {finding.place.name}")
        times_seen[f"{finding.rule} {name}"] += 1
        again = times_seen[f"{finding.rule} {name}"]
        case = SubElement(
            suite,
            "testcase",
            classname=_xml_text(f"exitsafe.gate.rule{finding.rule}.{finding.metric}"),
            name=name if again == 1 else f"{name} ({again})",  # hostile or long categories may look alike
            time="0",
        )
        if finding.outcome != "pass":
            message = _xml_text(_message(finding))
            fault = SubElement(case, _ELEMENTS[finding.outcome], type=finding.outcome, message=message)
            fault.text = message
    if gate.cautions:
        SubElement(suite, "system-out").text = _xml_text("; ".join(map(without_folders, gate.cautions)))
    indent(root)
    content: bytes = tostring(root, encoding="utf-8", xml_declaration=True)
    return content + b"\n"


def _message(finding: Finding) -> str:
    counts = f"n={finding.n}" + (f", {finding.unscored} unscored" if finding.unscored else "")
    reason = without_folders("; ".join(filter(None, [finding.reason, finding.fix])))
    if finding.value is None or finding.bound is None:
        return f"{reason} ({counts})"
    end = "" if finding.better_end is None else f"better end {number(finding, finding.better_end)}, "
    found = f"value {number(finding, finding.value)}, bound {number(finding, finding.bound)}, {end}{counts}"
    return f"{reason} ({found})"


def _xml_text(text: str) -> str:
    """XML has no escape for control characters and halves of surrogate pairs."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
