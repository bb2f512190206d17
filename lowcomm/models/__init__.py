"""The networks that replicas train: a compact Llama, any Hugging Face causal LM, any module by its path."""
