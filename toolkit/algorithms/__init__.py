"""Pure functions of tensors: objectives, gates, weights, references, the meta-learner. No I/O, nothing distributed."""
