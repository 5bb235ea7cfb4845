"""Builds the small chat models that ship with xLLM: corpus, tokenizer, training, evaluation and model card."""
