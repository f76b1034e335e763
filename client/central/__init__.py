"""One machine with all the data: train, forget, fine-tune and measure, without a federation."""
