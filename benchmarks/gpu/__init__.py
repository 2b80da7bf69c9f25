"""The parts of `benchmarks/gpu_queue.py`."""
