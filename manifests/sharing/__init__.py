"""Several runs on one output folder: who is at work there, who has which shard, whose turn it is to commit."""
