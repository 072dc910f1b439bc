"""Measures teacher, untrained student and exported students on the held-out shards, and writes WORKDIR/evaluation/NAME.

With --tasks, evaluates them on the paper's benchmarks instead, and writes WORKDIR/tasks/NAME/TASK. With --lexical,
measures their knowledge of words and senses instead, and writes WORKDIR/lexical/NAME.
"""

from dskd.cli.evaluate import run_evaluate

EPILOG = """
examples:
  deepspeed launcher/evaluate.py --config configs/quickstart.yaml
  deepspeed --num_gpus 2 launcher/evaluate.py --config configs/quickstart.yaml --force
  deepspeed launcher/evaluate.py --config mine.yaml tasks.limit=200 --tasks arc_challenge mmlu
  deepspeed launcher/evaluate.py --config mine.yaml --tasks all
  deepspeed launcher/evaluate.py --config mine.yaml --tasks                 the benchmarks of tasks.evaluate
  deepspeed launcher/evaluate.py --config mine.yaml --tasks mmlu --models teacher dskd
  deepspeed launcher/evaluate.py --config mine.yaml --lexical
  deepspeed launcher/evaluate.py --config mine.yaml --lexical --models teacher dskd

The keys under `tasks` say where the benchmarks' files are (`dskd config`).
`dskd compare` prints the measures side by side. Models whose measures are up to date are skipped. A run without an
export is left out, unless run=NAME chooses it: then that is an error.
"""

if __name__ == "__main__":
    run_evaluate(__doc__, EPILOG)
