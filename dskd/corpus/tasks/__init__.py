"""The paper's benchmarks: ARC-Challenge, CommonsenseQA, PIQA, MMLU and SQuAD v2 (docs/method.md, sections 4 and 5).

benchmarks  what each of them is: splits, labels, where its files are
reading     examples of the published files, of the hub's Parquet files, and of the hub
prompts     few-shot prompts, by the tokenizer's chat template or plain
documents   the training splits as documents to train on
"""
