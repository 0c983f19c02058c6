"""The inference worker: sampling, annotation, evaluation. The only importer of vllm."""
