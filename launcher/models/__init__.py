"""One torch-free table a model family: names in Hugging Face files, names in Megatron, shapes and transforms."""
