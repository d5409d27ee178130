"""What a run needs before it runs: FLOPs, memory, time."""
