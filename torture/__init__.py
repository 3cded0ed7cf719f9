"""What `make torture` does: stops runs, fills disks and alters files at random, and counts what did
not hold."""
