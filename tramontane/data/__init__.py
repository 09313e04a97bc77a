"""From text on disk to batches: sources, memory-mapped token files, packing by mixture weight."""
