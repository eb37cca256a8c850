"""What is kept: instance files, rows and the hash-chained audit log."""
