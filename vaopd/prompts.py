"""The old name of `vaopd.vlm.prompts`; goes with the next release."""

from vaopd.vlm.prompts import chat, check_same_tokenizer, load_processor, tokenizer_fingerprint

__all__ = ["chat", "check_same_tokenizer", "load_processor", "tokenizer_fingerprint"]
