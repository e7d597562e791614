"""The pixel pass of the index: hashes, quality, text drawn into pixels."""
