"""Writes docs/models.md (`make models`): a page with the findings for each architecture of the table.

Names of architectures as arguments (`make models ARGS="gemma2 granite"`) try only these; the other rows stay.
"""

import re
import sys
import tempfile
import warnings
from pathlib import Path

from architecture_findings import LIMITS, Finding, find
from architectures import ARCHITECTURES
from plans import check_plan

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "models.md"
_TEXT = """# Which models can be distilled

A teacher can be any decoder of transformers whose logits are its last hidden states times its output matrix, or these
products scaled (Cohere, Granite) or softly capped (Gemma 2). The tables show what we found for {count} architectures,
by trying a small random model of each, on one rank and on two with different tokens. We compared its states, logits
and buffers with those of transformers' own model (in float32 and bf16, whole on a rank and sharded, at early and late
positions); a cut student with the teacher without the other layers; a training step with plain gradients, and its loss
in bf16; and an exported student with the trained one. `make models` tries them again and writes this page, and a test
checks that the page has the findings. All were tried on 2026-11-30.

A model that is not in the tables is tried when it is loaded: its head, packed documents and the kinds of its layers. If
something does not work, the model is refused before work begins, with the reason.

- **teacher**: the model computes what it does in transformers. If not, it is refused when a command opens its folder.
- **in short sequences**: a longer `corpus.sequence_length` is refused; the last column has the small model's limit.
- **cut student**: a student of any layers can be cut, and each layer computes what it does in the teacher.
- **packed documents**: `corpus.packing: documents` keeps documents that share a sequence apart. If not, it is
  refused, and `corpus.packing` must be `stream` or `none`.
- **shared trunk**: frozen lower layers are computed once, in the teacher (`student.shared_trunk`). If not, the student
  computes all of its layers, which takes more time and changes no result.

In float32, two factors of Apertus's activation, which transformers keeps in bf16, are not trained.

Gemma 2 and VaultGemma also cap the scores of attention. The fused attention that transformers chooses by default
leaves this cap out; here such a model runs with `eager` attention, which applies it and takes memory for all pairs of
positions. The `config.json` of its students and exports says so (`_attn_implementation`), so that transformers computes
the same.

Not supported yet are heads that add a bias to logits, quantised weights (other than block FP8 and [GGUF
files](gguf.md)), and models of images or sound.

{dense}

## Mixtures of experts

Mixtures are distilled like other decoders. Under ZeRO-3 each mixture is gathered as a whole, so that ranks can choose
different experts. The loss has no term that balances the load of the experts, so the routers of trained layers are
frozen; their experts are trained.

{mixtures}
"""
_HEAD = (
    "| architecture | teacher | cut student | packed documents | shared trunk | why not |\n|---|---|---|---|---|---|"
)


def row(name: str, finding: Finding) -> str:
    """Returns the row of an architecture."""
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
    """Returns a refusal without its advice."""
    reason = re.sub(r"^student\.\w+: on is not possible: ", "", reason)
    if "would compute something different" in reason:  # only the first difference
        reason = "a layer depends on its place: " + re.split(r"the teacher's \d+: |first\) ", reason)[-1]
    elif "its states of a document depend" in reason or "does not keep documents apart" in reason:
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


def written_rows() -> dict[str, str]:
    """Returns {name of an architecture: its row} of the page as it is."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    by_example = {line.split(" | ")[0].removeprefix("| "): line for line in lines}
    return {name: by_example[known.example] for name, known in ARCHITECTURES.items() if known.example in by_example}


def page(rows: dict[str, str]) -> str:
    """Returns the whole page with the rows of these architectures."""
    dense, mixtures = (
        [rows[name] for name, known in ARCHITECTURES.items() if name in rows and known.is_mixture == is_mixture]
        for is_mixture in (False, True)
    )
    return _TEXT.format(
        count=len(ARCHITECTURES), dense="\n".join([_HEAD, *dense]), mixtures="\n".join([_HEAD, *mixtures])
    )


def main(names: list[str]) -> int:
    """Writes the page; returns exit code 1 if a number is wrong."""
    warnings.simplefilter("ignore")
    findings = find(names or list(ARCHITECTURES), timeout_s=3600)
    rows = written_rows() | {name: row(name, finding) for name, finding in findings.items()}
    PAGE.write_text(page(rows), encoding="utf-8")
    for name, finding in findings.items():
        with tempfile.TemporaryDirectory() as folder:
            problem = check_plan(Path(folder), name, is_refused=finding["refused"] is not None)
        finding["faults"] += [f"plan: {problem}"] if problem else []
    faults = [f"{name}: {fault}" for name, finding in findings.items() for fault in finding["faults"]]
    print("\n".join([*faults, f"wrote {PAGE}; {len(faults)} faults"]))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
