"""What is learned: models and data, the one part of the client that the server may see."""
