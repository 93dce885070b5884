"""The loader: original tars joined with captions and scores while they are read, as a stream of training samples."""
