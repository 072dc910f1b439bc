"""docs/models.md: a page that says of each architecture of the table what was found. `make models` writes it."""

import re
import sys
import tempfile
import warnings
from pathlib import Path

from architecture_findings import LIMITS, Finding, check_plan, find
from architectures import ARCHITECTURES

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "models.md"
_TEXT = """# Which models can be distilled

A teacher is any decoder of transformers whose logits are its last hidden states times its output matrix. The tables say
of {count} architectures what was found by trying a small random model of each on two ranks with different tokens: its
states and logits, in float32 and bf16, whole on a rank and sharded, at early and late positions, and every buffer,
against transformers' own model; a cut student against the teacher without the other layers; a training step against
plain gradients; and an exported student against the trained one. `make models` tries them again and writes this page; a
test holds the page to what it finds.

What is not in the tables is tried when it is loaded: its head, its packed documents and the kinds of its layers. What
does not fit is refused before work begins, with the reason.

- **teacher**: it is read as transformers reads it. No: it is refused when a command finds it.
- **in short sequences**: longer `corpus.sequence_length` is refused; the last column has the limit of the small model.
- **cut student**: any of its layers make a student in which each layer computes what it does in the teacher.
- **packed documents**: `corpus.packing: documents` keeps documents that share a sequence apart. No: it is refused, and
  `corpus.packing` has to be `stream` or `none`.
- **shared trunk**: frozen lower layers are computed once, in the teacher (`student.shared_trunk`). No: the student
  computes all of its layers, which takes time and changes no result.

In float32 two factors of Apertus's activation, which transformers keeps in bf16, are not trained.

Not supported yet are heads that cap, scale or shift logits, quantised weights, and models of images or sound.

{dense}

## Mixtures of experts

They are distilled like other decoders. A mixture under ZeRO-3 is gathered as a whole, so that ranks may choose
different experts. The loss has no term that balances the load of experts, so the routers of trained layers stay as
they are; their experts are trained.

{mixtures}
"""
_HEAD = (
    "| architecture | teacher | cut student | packed documents | shared trunk | why not |\n|---|---|---|---|---|---|"
)


def row(name: str, finding: Finding) -> str:
    """The line of the page about an architecture."""
    example = ARCHITECTURES[name].example
    if finding["refused"]:
        cells = [f"{example}", "no", "no", "", "", _short(finding["refused"])]
    else:
        limits = [key for key in LIMITS if not (key == "documents limit" and finding["documents"])]
        reasons = [finding[place] for place in ("cut", "documents", "trunk", *limits) if finding[place]]
        teacher = "in short sequences" if finding["stream limit"] else "yes"
        cut = "some layers" if finding["cut"] else "yes"
        documents = "no" if finding["documents"] else "in short sequences" if finding["documents limit"] else "yes"
        trunk = "no" if finding["trunk"] else "yes"
        cells = [example, teacher, cut, documents, trunk, "; ".join(_short(reason) for reason in reasons)]
    return f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")


def _short(reason: str) -> str:
    """A refusal without advice."""
    reason = re.sub(r"^student\.\w+: on is not possible: ", "", reason)
    if "would compute something else" in reason:  # the first difference
        reason = "a layer depends on its place: " + re.split(r"the teacher's \d+: |first\) ", reason)[-1]
    elif "its states of a document depend" in reason:
        reason = "documents see each other"
    for advice in (
        r"; such a model is.*",
        r"; set (it|corpus\.\w+).*",
        r"; keep others.*",
        r"; a student cannot.*",
        r"\. Set .*",
    ):
        reason = re.sub(advice, "", reason)
    return reason.strip()


def page(findings: dict[str, Finding]) -> str:
    """The whole page."""
    rows = {
        is_mixture: [
            row(name, finding) for name, finding in findings.items() if ARCHITECTURES[name].is_mixture == is_mixture
        ]
        for is_mixture in (False, True)
    }
    return _TEXT.format(
        count=len(ARCHITECTURES),
        dense="\n".join([_HEAD, *rows[False]]),
        mixtures="\n".join([_HEAD, *rows[True]]),
    )


def main() -> int:
    """Writes the page; exit code 1 where a number is wrong."""
    warnings.simplefilter("ignore")
    findings = find(list(ARCHITECTURES), thorough=True, timeout_s=3600)
    PAGE.write_text(page(findings), encoding="utf-8")
    for name, finding in findings.items():
        with tempfile.TemporaryDirectory() as folder:
            problem = check_plan(Path(folder), name, is_refused=finding["refused"] is not None)
        finding["faults"] += [f"plan: {problem}"] if problem else []
    faults = [f"{name}: {fault}" for name, finding in findings.items() for fault in finding["faults"]]
    print("\n".join([*faults, f"wrote {PAGE}; {len(faults)} faults"]))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
