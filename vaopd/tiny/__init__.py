"""Tiny models of the real Qwen3-VL classes for the demo and the tests: tokenizer, sizes, pre-training."""
