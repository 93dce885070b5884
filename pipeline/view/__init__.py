"""`capipe view`: a read-only local web page for browsing artifacts."""
