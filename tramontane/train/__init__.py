"""Training: one loop (`loop.py`) is given batches and a loss; pre-training is its first user."""
