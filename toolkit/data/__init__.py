"""What a preference pair is: dataset formats, chat templates, tokenization, batches."""
