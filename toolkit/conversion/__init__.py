"""Hugging Face <-> Megatron weights, one small map per architecture."""
