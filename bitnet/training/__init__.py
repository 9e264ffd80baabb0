"""The parts of a training run other than the model; train.py and ``bench train`` use them."""
