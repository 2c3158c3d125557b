"""Models in Flax, small enough to read, with the parameter names of Hugging Face."""
