"""The expression language of conditions over columns: `capipe filter --keep`, the viewer, the loader."""
