"""What a client computes to forget; the same steps serve a federation and a single machine."""
