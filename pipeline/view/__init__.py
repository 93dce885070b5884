"""`capipe view`: a page on this machine that shows what artifacts hold. It reads and never writes."""
