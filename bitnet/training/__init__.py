"""What a training run is made of, apart from the model: used by train.py and ``bench train``."""
