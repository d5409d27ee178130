"""What was measured, a file a measurement, and the index of them."""
