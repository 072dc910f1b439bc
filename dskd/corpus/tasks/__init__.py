"""The paper's benchmarks: ARC-Challenge, CommonsenseQA, PIQA, MMLU and SQuAD v2 (docs/method.md, sections 4 and 5).

benchmarks  defines each benchmark: its splits, labels and files
reading     reads examples from the published files, from the Hub's Parquet files, and from the Hub
prompts     writes few-shot prompts, with the tokenizer's chat template or as plain text
documents   turns the training splits into documents to train on
"""
