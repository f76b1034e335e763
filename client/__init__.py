"""One participant: the Flower ClientApp and local PyTorch training."""
