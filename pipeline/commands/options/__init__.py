"""Options that several commands share, and how option groups become a command line."""
