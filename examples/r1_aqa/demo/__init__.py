"""Built-in demo: a tiny Qwen2-Audio and a synthetic audio question answering set, made on the spot from a seed."""

FAMILIES = {"qwen2_audio": "Qwen2-Audio", "qwen2_5_omni": "Qwen2.5-Omni"}  # value of --family: name of the model
