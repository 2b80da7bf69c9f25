"""Pure functions: tensors in, tensors out; no state, no files, no models."""
