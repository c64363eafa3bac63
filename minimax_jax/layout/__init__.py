"""What a checkpoint is: names, shapes, dtypes. No arrays, no files."""
