"""DeepSpeed's front door: its names, over the transformations of fds."""
