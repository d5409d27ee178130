"""The metrics of a run: one table of names, and the files and trackers they go to."""
