"""Training: one loop (`loop.py`), given a batch source and a loss; pre-training is its first user."""
