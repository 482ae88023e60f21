"""Byte-level BPE: trained with rustbpe, encoded with tiktoken, saved for Hugging Face tools too."""
