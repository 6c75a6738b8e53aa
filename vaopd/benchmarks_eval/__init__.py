"""The paper's eight benchmarks: `vaopd eval --benchmark`, which `vaopd.benchmarks_eval.run` drives.

    catalogue   the benchmarks, their metrics and formulas
    evaluator   the official evaluator as a subprocess in an environment of its own; vlmeval_runner.py is its program
    endpoint    an OpenAI-compatible endpoint, or vLLM's server started for a checkpoint
    answers     samples answers and keeps each question and sample exactly once, through kill -9
    results     averages, standard errors, the table and the official results schema

In: a model and the evaluator's questions. Out: a folder with answers, scores, results.json and table.md.
"""
