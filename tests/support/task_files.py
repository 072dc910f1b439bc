"""Small benchmark files, written by hand in the published formats."""

from pathlib import Path

DATA = Path(__file__).parent / "task_data"
PLACES = {
    "arc_challenge": str(DATA / "arc"),
    "commonsense_qa": str(DATA / "commonsense_qa"),
    "piqa": str(DATA / "piqa"),
    "mmlu": str(DATA / "mmlu"),
    "squad_v2": str(DATA / "squad"),
}
