"""The trainer: Megatron-core model, log-probs, optimizer steps, checkpoints. The only importer of megatron."""
