"""What a file is and what its header says: bytes to plain values. No pixel is decoded."""
