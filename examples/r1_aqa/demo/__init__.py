"""Built-in demo: a tiny Qwen2-Audio and a synthetic audio question answering set, made on the spot from a seed."""
