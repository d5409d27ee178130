"""What is pruned, when, and how gradients flow; knows no process group."""
