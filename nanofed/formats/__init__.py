"""Models in and out: transformers' folder, nanochat's checkpoints, one safetensors file."""
